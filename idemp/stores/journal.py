"""The journal's state machine: appends in order of revision -> the state of every key.  Pure.

Every replica of a namespace folds the same appends and so agrees with all others; etcd.py brings
them, records.py has their text.  The outcome of a record is what `Journal.apply` returned at its line,
never a later look at memory.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, cast

from msgspec.structs import replace

from idemp.laws import CLAIMED, DONE, FREE, Entry, Ledger, view
from idemp.ports import (
    Abandon,
    Applied,
    Claim,
    Claimed,
    Complete,
    Done,
    Forget,
    Park,
    Release,
    Reply,
    State,
    Takeover,
)
from idemp.stores.records import (
    LINES,
    NULL,
    Begin,
    Claims,
    Declare,
    Finish,
    Opened,
    Raise,
    Record,
    Run,
    Seed,
    read,
)
from idemp.stores.seen import PLACES, Seen

HOT = 4096
"""Done keys that are kept ready because somebody asked for them; then it begins anew."""


class Append(NamedTuple):
    """One batch.  ``wall``: the writer's clock, seconds since 1970.  ``seq`` counts from 1 in a session."""

    revision: int
    session: str
    seq: int
    wall: float
    records: Sequence[Record]


class OutOfOrder(Exception):
    """An append is missing before this one, or came late: the memory must be made anew."""


# ------------------------------------------------------------------ the machine


class _Keys:
    """The entries as one mapping: what is done, what is open, and the key of each claim's token."""

    __slots__ = ("claims", "done", "freed", "open", "seconds", "since")

    def __init__(self) -> None:
        self.done = Seen()
        self.open: dict[str, Entry] = {}
        self.freed: dict[str, int] = {}  # the bucket where one of the open was set free
        self.claims: dict[int, str] = {}
        # The whole second of the writer's clock, and since which place it is that of every append.
        self.seconds, self.since = array("q"), array("Q")

    def get(self, key: str) -> Entry | None:
        entry = self.open.get(key)
        if entry is not None:
            return entry
        found = self.done.find(key)
        if found is None:
            return None
        token, place, result, fingerprint, attempt = found
        return Entry(DONE, token, attempt, "", self.at(place), "", result, fingerprint)

    def at(self, place: int) -> int:
        """Seconds since 1970, by the clock of the writer of the append at ``place``."""
        return self.seconds[bisect_right(self.since, place) - 1]

    def put(self, key: str, entry: Entry) -> None:
        """An open one."""
        self.close(key)
        self.open[key] = entry
        if entry.state == CLAIMED:
            self.claims[entry.token] = key

    def close(self, key: str) -> None:
        """It is open no more."""
        entry = self.open.pop(key, None)
        if entry is not None:
            self.claims.pop(entry.token, None)
            self.freed.pop(key, None)

    def tell_time(self, place: int, wall: float) -> None:
        """The writer's clock when it composed the append at ``place``."""
        second = int(wall)
        if not self.seconds or self.seconds[-1] != second:
            self.seconds.append(second)
            self.since.append(place)

    def drop_before(self, bucket: int) -> None:
        """What was done before it is over."""
        self.done.drop_before(bucket)
        over = bisect_right(self.since, self.done.start()) - 1
        if over > 0:
            del self.seconds[:over], self.since[:over]


class _Fold(Ledger):
    """The laws over `_Keys`; the writer is the session, and each line has its own token."""

    bucket: int
    place: int

    def _put(self, key: str, entry: Entry | None) -> Applied:
        keys: _Keys = self.entries  # type: ignore[assignment]
        if entry is None:
            keys.close(key)
            keys.done.remove(key)
        elif entry.state == DONE:
            keys.close(key)
            keys.done.add(key, entry.token, self.place, entry.result, entry.fingerprint, entry.attempt)
        else:
            keys.put(key, entry)
            if entry.state == FREE:
                keys.freed[key] = self.bucket
        return _APPLIED


_APPLIED = Applied()


class Journal:
    """The memory of one replica.

    revision: of the last append applied.  bucket, floor: the present one, and the oldest that counts.
    seqs: session -> its last append.  walls: session -> the clock of its last append.
    began: bucket -> the latest clock when its first append was written.
    opens: bucket -> what was open where it begins.
    hot: what `done` found of late, as long as nothing is forgotten; may be read without the lock.
    """

    def __init__(self) -> None:
        self.revision = 0
        self.bucket = 0
        self.floor = 0
        self.seqs: dict[str, int] = {}
        self.walls: dict[str, float] = {}
        self.began: dict[int, float] = {}
        self.opens: dict[int, list[Opened]] = {}
        self.hot: dict[str, Done] = {}
        self._ended: dict[str, int] = {}  # sessions declared dead -> the bucket where that was
        self._applied = 0  # appends
        self._keys = _Keys()

    # ---------------------------------------------------------------- looking

    def state(self, key: str) -> State:
        """What everybody is told of a key."""
        return view(self._keys.get(key), bool)

    def entry(self, key: str) -> Entry | None:
        """What is stored of a key."""
        return self._keys.get(key)

    def unheard(self, key: str) -> bool:
        """Whether no append that was applied says that ``key`` is done, as of most.  Needs no lock."""
        return not self._keys.done.perhaps(key)

    def done(self, key: str) -> Done | None:
        """Its state, if it is done: what most duplicates ask."""
        found = self._keys.done.find(key)
        if found is None:
            return None
        token, place, result, fingerprint, attempt = found
        if len(self.hot) >= HOT:
            self.hot.clear()
        done = self.hot[key] = Done(token, result, fingerprint, self._keys.at(place), attempt)
        return done

    def has(self, session: str, seq: int) -> bool:
        """Whether that append is applied.  Who declared its session dead had all of them."""
        return self.seqs.get(session, 0) >= seq or session in self._ended

    def opened(self) -> list[Opened]:
        """What is not done: claimed, in doubt, parked, free with attempts."""
        return [Opened(key, entry, self._keys.freed.get(key, 0)) for key, entry in self._keys.open.items()]

    def remembered(self) -> int:
        """How many keys are done."""
        return len(self._keys.done)

    def size(self) -> int:
        """How many keys there are."""
        return len(self._keys.done) + len(self._keys.open)

    # ---------------------------------------------------------------- applying

    def apply(self, append: Append, *, importing: bool = False) -> list[Reply]:
        """Fold one append in; the outcome of each record.  One that was applied before changes nothing.

        importing: what came before the floor is not there, so a session may begin with any append.
        Raises `OutOfOrder` if an append of its session is missing, or a later one is applied already.
        """
        revision, session, seq, wall, records = append
        fold = self._next(revision, session, seq, wall, importing)
        if fold is None:
            return []
        outcomes: list[Reply] = []
        for kind, run in groupby(records, type):
            token = revision * LINES + len(outcomes)
            if kind is Claim:
                keys = [claim.key for claim in cast("Iterator[Claim]", run)]
                others = self._claim_all(fold, keys, token)
                outcomes += [others.get(each) or Claimed(each, 1) for each in range(token, token + len(keys))]
                continue
            for record in run:
                if self._complete(fold, record):
                    outcomes.append(_APPLIED)
                    continue
                fold.token = revision * LINES + len(outcomes) - 1
                outcomes.append(self._apply(fold, record))
        return outcomes

    def replay(self, revision: int, session: str, seq: int, text: bytes, *, importing: bool = False) -> None:
        """The same by the short way: an append as it is written, whose outcomes nobody asks for."""
        wall, blocks = read(text)
        fold = self._next(revision, session, seq, wall, importing)
        if fold is None:
            return
        token = revision * LINES
        for block in blocks:
            match block:
                case Claims(keys):
                    self._claim_all(fold, keys, token)
                    token += len(keys)
                case Run(first, many):
                    self._finish_all(fold, first, many)
                    token += many
                case _:
                    fold.token = token - 1
                    self._apply(fold, block)
                    token += 1

    def _next(self, revision: int, session: str, seq: int, wall: float, importing: bool) -> _Fold | None:
        """What folds the next append; None if it is folded already."""
        known = self.seqs.get(session, 0)
        if seq <= known or session in self._ended:
            return None
        gap = seq != known + 1 and not (importing and not known)
        if gap or revision <= self.revision or self._applied == PLACES - 1:
            raise OutOfOrder
        self.revision = revision
        self.seqs[session] = seq
        self.walls[session] = wall
        if self.bucket not in self.began:
            # Not the clock of E, which was composed while the bucket before still took records; and the
            # latest clock, so that one that runs behind cannot shorten the retention.
            self.began[self.bucket] = max(self.walls.values())
        self._applied += 1
        self._keys.tell_time(self._applied, wall)
        fold = _Fold(self._keys, bool, session, 0, wall)  # type: ignore[arg-type]
        fold.bucket, fold.place = self.bucket, self._applied
        return fold

    def _claim_all(self, fold: _Fold, keys: Sequence[str], token: int) -> dict[int, Reply]:
        """Claims, by the short way for keys that nobody has claimed before; what the others are told."""
        known, find, claims = self._keys.open, self._keys.done.find, self._keys.claims
        session, wall = fold.session, fold.now
        others: dict[int, Reply] = {}
        for key in keys:
            if key not in known and find(key) is None:
                known[key] = Entry(CLAIMED, token, 1, session, wall)
                claims[token] = key
            else:
                fold.token = token - 1
                others[token] = fold.apply(Claim(key))
            token += 1
        return others

    def _complete(self, fold: _Fold, record: Record) -> bool:
        """A completion by its claim's holder; false: it is none, and nothing was done."""
        keys = self._keys
        if type(record) is not Complete or keys.claims.get(record.token) != record.key:
            return False
        key, token, result, fingerprint = record.key, record.token, record.result, record.fingerprint
        if keys.open[key].session != fold.session:
            return False
        del keys.claims[token]
        keys.done.add(key, token, fold.place, result, fingerprint, keys.open.pop(key).attempt)
        return True

    def _finish_all(self, fold: _Fold, first: int, many: int) -> None:
        """Plain completions, by the short way; one that is not of its claim's holder is void."""
        known, claims, add = self._keys.open, self._keys.claims, self._keys.done.add
        session, place = fold.session, fold.place
        for token in range(first, first + many):
            key = claims.get(token)
            if key is not None and known[key].session == session:
                del claims[token]
                add(key, token, place, NULL, None, known.pop(key).attempt)

    def _apply(self, fold: _Fold, record: Record) -> Reply:
        match record:
            case Claim() | Takeover():
                return fold.apply(record)
            case Forget():
                self.hot.clear()
                return fold.apply(record)
            case Complete(key, token):
                return fold.apply(record if self._held(fold, key) == token else replace(record, token=0))
            case Finish(token, result, fingerprint):
                key = self._keys.claims.get(token, "")
                return self._apply(fold, Complete(key, token, result, fingerprint))
            case Release(key) | Abandon(key) | Park(key):
                return fold.apply(replace(record, token=self._held(fold, key)))
            case Seed(key):
                if self._keys.get(key) is None:
                    fold._put(key, Entry(DONE, fold.token + 1, 1, "", fold.now, "", b"true"))
                return Applied()
            case Declare(session, last):
                if self.seqs.get(session, last) != last:
                    raise OutOfOrder
                self._declare_dead(session)
            case Begin(bucket):
                self.bucket = bucket
                self._keys.done.begin(bucket, fold.place)
                self.opens[bucket] = self.opened()
            case Raise(bucket):
                self._raise(bucket)
        return Applied()

    def _held(self, fold: _Fold, key: str) -> int:
        """The token of the claim that the writer holds; 0, which is nobody's, if it holds none."""
        entry = self._keys.open.get(key)
        held = entry is not None and entry.session == fold.session and entry.state == CLAIMED
        return entry.token if entry is not None and held else 0

    def _declare_dead(self, session: str) -> None:
        """Its claims are nobody's now."""
        self._ended[session] = self.bucket
        self.seqs.pop(session, None)
        self.walls.pop(session, None)
        for key, entry in self._keys.open.items():
            if entry.session == session and entry.state == CLAIMED:
                self._keys.open[key] = replace(entry, session="")

    def _raise(self, floor: int) -> None:
        """Drop what has not changed since before ``floor``."""
        self.floor = floor
        self.hot.clear()
        self._keys.drop_before(floor)
        for bucket in [bucket for bucket in self.began if bucket < floor]:
            del self.began[bucket]
        for key in [key for key, bucket in self._keys.freed.items() if bucket < floor]:
            self._keys.close(key)
        self.opens = {bucket: found for bucket, found in self.opens.items() if bucket >= floor}
        self._ended = {session: bucket for session, bucket in self._ended.items() if bucket >= floor}

    # ---------------------------------------------------------------- importing

    def restore(self, floor: int, opened: Sequence[Opened]) -> None:
        """Begin at ``floor`` with what was open there."""
        self.floor = self.bucket = floor
        self._keys.done = Seen(floor)
        for key, entry, bucket in opened:
            self._keys.put(key, entry)
            if entry.state == FREE:
                self._keys.freed[key] = bucket
