"""The journal's state machine: appends in order of revision -> the state of every key.  Pure.

Every replica of a namespace folds the same appends and so agrees with all others; etcd.py brings
them.  An *append* is one batch of records by one session.  The outcome of a record is what `apply`
returned at its line, never a later look at memory.

    C key                       claim, if the key is free
    D key [=result|-] [print]   done, by the holder of the current claim; a plain D has result null
    R key attempts              free again, by the holder
    Q key [attempts]            in doubt, by the holder's own word
    P key reason                parked, by the holder
    T key token                 take over what is in doubt or parked
    F key token                 forget what is done or parked
    S key                       done before there was a journal (the seed's ids)
    X session n                 that session is dead, and its last append was n
    E bucket                    the next bucket begins here
    B bucket                    what was done before that bucket is dropped here

The first line of an append is the writer's wall clock.  Keys, results and reasons are percent-encoded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import quote, quote_from_bytes, unquote, unquote_to_bytes

from idemp.laws import CLAIMED, DONE, FREE, Entry, Ledger, view
from idemp.ports import (
    Abandon,
    Applied,
    Claim,
    Complete,
    Forget,
    Op,
    Park,
    Release,
    Reply,
    State,
    Takeover,
)

LINES = 1 << 16
"""Tokens of one append: token = revision * LINES + line."""
# Everything that can be seen stays as it is, but the percent sign.
_SAFE = "/:.-_~!$&'()*+,;=@?#[]{}|^`\"<>\\"
_PLAIN = re.compile(r"[!-$&-~]+").fullmatch
_NULL = b"null"


# ------------------------------------------------------------------ records that are no operations


class Declare(NamedTuple):
    """X: ``session`` is dead, its last append was ``last``."""

    session: str
    last: int


class Begin(NamedTuple):
    """E: the bucket begins here."""

    bucket: int


class Raise(NamedTuple):
    """B: what was done or set free before the bucket is dropped here."""

    bucket: int


class Seed(NamedTuple):
    """S: the key was done before there was a journal."""

    key: str


Record = Op | Declare | Begin | Raise | Seed


class Append(NamedTuple):
    """One batch.  ``wall``: the writer's clock, seconds since 1970.  ``seq`` counts from 1 in a session."""

    revision: int
    session: str
    seq: int
    wall: float
    records: Sequence[Record]


class OutOfOrder(Exception):
    """An append is missing before this one, or came late: the memory must be made anew."""


# ------------------------------------------------------------------ text


def encode(wall: float, records: Sequence[Record]) -> bytes:
    """The value of a log key."""
    return "\n".join([f"{wall:.3f}", *(_line(record) for record in records)]).encode()


def decode(text: bytes) -> tuple[float, list[Record]]:
    """The wall clock and the records of a log key's value."""
    wall, *lines = text.decode().split("\n")
    return float(wall), [_record(line) for line in lines]


def _line(record: Record) -> str:
    match record:
        case Claim(key):
            return f"C {_quote(key)}"
        case Complete(key, _, result, fingerprint):
            return f"D {_quote(key)}{_result(result, fingerprint)}"
        case Release(key, _, attempts):
            return f"R {_quote(key)} {attempts}"
        case Abandon(key, _, attempts):
            return f"Q {_quote(key)}" if attempts is None else f"Q {_quote(key)} {attempts}"
        case Park(key, _, reason):
            return f"P {_quote(key)} {_quote(reason)}"
        case Takeover(key, token):
            return f"T {_quote(key)} {token}"
        case Forget(key, token):
            return f"F {_quote(key)} {token}"
        case Seed(key):
            return f"S {_quote(key)}"
        case Declare(session, last):
            return f"X {session} {last}"
        case Begin(bucket):
            return f"E {bucket}"
        case Raise(bucket):
            return f"B {bucket}"
    raise TypeError(f"{record!r} is no record")


def _result(result: bytes | None, fingerprint: bytes | None) -> str:
    if fingerprint is None and result == _NULL:
        return ""
    text = " -" if result is None else " =" + quote_from_bytes(result, _SAFE)
    return text if fingerprint is None else f"{text} {fingerprint.hex()}"


def _record(line: str) -> Record:
    kind, first, *rest = line.split(" ")
    match kind:
        case "C":
            return Claim(unquote(first))
        case "D":
            return Complete(unquote(first), 0, *_what_is_kept(rest))
        case "R":
            return Release(unquote(first), 0, int(rest[0]))
        case "Q":
            return Abandon(unquote(first), 0, int(rest[0]) if rest else None)
        case "P":
            return Park(unquote(first), 0, unquote(rest[0]))
        case "T":
            return Takeover(unquote(first), int(rest[0]))
        case "F":
            return Forget(unquote(first), int(rest[0]))
        case "S":
            return Seed(unquote(first))
        case "X":
            return Declare(first, int(rest[0]))
        case "E":
            return Begin(int(first))
        case "B":
            return Raise(int(first))
    raise ValueError(f"{line!r} is no record")


def _what_is_kept(words: Sequence[str]) -> tuple[bytes | None, bytes | None]:
    """The result and the fingerprint of a D."""
    if not words:
        return _NULL, None
    result = None if words[0] == "-" else unquote_to_bytes(words[0][1:])
    return result, bytes.fromhex(words[1]) if len(words) > 1 else None


def _quote(text: str) -> str:
    return text if _PLAIN(text) else quote(text, _SAFE)


class Opened(NamedTuple):
    """A key that is not done, as it stood.  ``bucket``: where it was set free, if it was."""

    key: str
    entry: Entry
    bucket: int


def encode_open(opened: Sequence[Opened]) -> bytes:
    """A page of a snapshot."""
    return "\n".join(
        f"{_quote(key)} {e.state} {e.token} {e.attempt} {e.session or '-'} {e.at:.3f} {_quote(e.reason)} {b}"
        for key, e, b in opened
    ).encode()


def decode_open(text: bytes) -> list[Opened]:
    """The open keys of a snapshot's page."""
    found = []
    for line in text.decode().split("\n") if text else []:
        key, state, token, attempt, session, at, reason, bucket = line.split(" ")
        held = "" if session == "-" else session
        entry = Entry(state, int(token), int(attempt), held, float(at), unquote(reason))
        found.append(Opened(unquote(key), entry, int(bucket)))
    return found


# ------------------------------------------------------------------ the machine


class _Keys:
    """The entries as one mapping: what is done, and what is open."""

    __slots__ = ("done", "freed", "open")

    def __init__(self) -> None:
        self.done: dict[str, Entry] = {}
        self.open: dict[str, Entry] = {}
        self.freed: dict[str, int] = {}  # the bucket where one of the open was set free

    def get(self, key: str) -> Entry | None:
        return self.done.get(key) or self.open.get(key)


class _Fold(Ledger):
    """The laws over `_Keys`; the writer is the session, and each line has its own token."""

    bucket: int
    settled: list[tuple[str, Entry]]

    def _put(self, key: str, entry: Entry | None) -> Applied:
        keys: _Keys = self.entries  # type: ignore[assignment]
        keys.freed.pop(key, None)
        if entry is None:
            keys.open.pop(key, None)
            keys.done.pop(key, None)
        elif entry.state == DONE:
            keys.open.pop(key, None)
            keys.done[key] = entry
            self.settled.append((key, entry))
        else:
            keys.done.pop(key, None)
            keys.open[key] = entry
            if entry.state == FREE:
                keys.freed[key] = self.bucket
        return Applied()


class Journal:
    """The memory of one replica.

    revision: of the last append applied.  bucket, floor: the present one, and the oldest that counts.
    seqs: session -> its last append.  walls: session -> the clock of its last append.
    began: bucket -> the latest clock when its first append was written.
    opens: bucket -> what was open where it begins.
    """

    def __init__(self) -> None:
        self.revision = 0
        self.bucket = 0
        self.floor = 0
        self.seqs: dict[str, int] = {}
        self.walls: dict[str, float] = {}
        self.began: dict[int, float] = {}
        self.opens: dict[int, list[Opened]] = {}
        self._ended: dict[str, int] = {}  # sessions declared dead -> the bucket where that was
        self._keys = _Keys()
        self._settled: dict[int, list[tuple[str, Entry]]] = {0: []}

    # ---------------------------------------------------------------- looking

    def state(self, key: str) -> State:
        """What everybody is told of a key."""
        return view(self._keys.get(key), bool)

    def entry(self, key: str) -> Entry | None:
        """What is stored of a key."""
        return self._keys.get(key)

    def known(self) -> list[str]:
        """All keys, in no order."""
        return [*self._keys.open, *self._keys.done]

    def has(self, session: str, seq: int) -> bool:
        """Whether that append is applied.  Who declared its session dead had all of them."""
        return self.seqs.get(session, 0) >= seq or session in self._ended

    def opened(self) -> list[Opened]:
        """What is not done: claimed, in doubt, parked, free with attempts."""
        return [Opened(key, entry, self._keys.freed.get(key, 0)) for key, entry in self._keys.open.items()]

    def remembered(self) -> int:
        """How many keys are done."""
        return len(self._keys.done)

    # ---------------------------------------------------------------- applying

    def apply(self, append: Append, *, importing: bool = False) -> list[Reply]:
        """Fold one append in; the outcome of each record.  One that was applied before changes nothing.

        importing: what came before the floor is not there, so a session may begin with any append.
        Raises `OutOfOrder` if an append of its session is missing, or a later one is applied already.
        """
        known = self.seqs.get(append.session, 0)
        if append.seq <= known or append.session in self._ended:
            return []
        gap = append.seq != known + 1 and not (importing and not known)
        if gap or append.revision <= self.revision:
            raise OutOfOrder
        self.revision = append.revision
        self.seqs[append.session] = append.seq
        self.walls[append.session] = append.wall
        # Not the clock of E, which was composed while the bucket before still took records; and the
        # latest clock, so that one that runs behind cannot shorten the retention.
        self.began.setdefault(self.bucket, max(self.walls.values()))
        fold = _Fold(self._keys, bool, append.session, 0, append.wall)  # type: ignore[arg-type]
        fold.bucket, fold.settled = self.bucket, self._settled[self.bucket]
        first = append.revision * LINES
        outcomes: list[Reply] = []
        for line, record in enumerate(append.records):
            fold.token = first + line - 1
            outcomes.append(self._apply(fold, append, record))
        return outcomes

    def _apply(self, fold: _Fold, append: Append, record: Record) -> Reply:
        match record:
            case Claim() | Takeover() | Forget():
                return fold.apply(record)
            case Complete(key, _, result, fingerprint):
                token = self._held(key, append.session)
                return fold.apply(Complete(key, token, result, fingerprint))
            case Release(key) | Abandon(key) | Park(key):
                return fold.apply(record._replace(token=self._held(key, append.session)))
            case Seed(key):
                if self._keys.get(key) is None:
                    fold._put(key, Entry(DONE, fold.token + 1, 1, "", append.wall, "", b"true"))
                return Applied()
            case Declare(session, last):
                if self.seqs.get(session, last) != last:
                    raise OutOfOrder
                self._declare_dead(session)
            case Begin(bucket):
                self._begin(bucket)
            case Raise(bucket):
                self._raise(bucket)
        return Applied()

    def _held(self, key: str, session: str) -> int:
        """The token of the claim that ``session`` holds; 0, which is nobody's, if it holds none."""
        entry = self._keys.open.get(key)
        mine = entry is not None and entry.state == CLAIMED and entry.session == session
        return entry.token if entry is not None and mine else 0

    def _declare_dead(self, session: str) -> None:
        """Its claims are nobody's now."""
        self._ended[session] = self.bucket
        self.seqs.pop(session, None)
        self.walls.pop(session, None)
        for key, entry in self._keys.open.items():
            if entry.session == session and entry.state == CLAIMED:
                self._keys.open[key] = entry._replace(session="")

    def _begin(self, bucket: int) -> None:
        self.bucket = bucket
        self._settled.setdefault(bucket, [])
        self.opens[bucket] = self.opened()

    def _raise(self, floor: int) -> None:
        """Drop what has not changed since before ``floor``."""
        self.floor = floor
        for bucket in [bucket for bucket in self._settled if bucket < floor]:
            for key, entry in self._settled.pop(bucket):
                if self._keys.done.get(key) is entry:
                    del self._keys.done[key]
            self.began.pop(bucket, None)
        for key in [key for key, bucket in self._keys.freed.items() if bucket < floor]:
            del self._keys.freed[key], self._keys.open[key]
        self.opens = {bucket: found for bucket, found in self.opens.items() if bucket >= floor}
        self._ended = {session: bucket for session, bucket in self._ended.items() if bucket >= floor}

    # ---------------------------------------------------------------- importing

    def restore(self, floor: int, opened: Sequence[Opened]) -> None:
        """Begin at ``floor`` with what was open there."""
        self.floor = self.bucket = floor
        self._settled = {floor: []}
        for key, entry, bucket in opened:
            self._keys.open[key] = entry
            if entry.state == FREE:
                self._keys.freed[key] = bucket
