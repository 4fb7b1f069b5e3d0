"""What is written in the journal: records, and their text.

    C key                       claim, if the key is free
    c rest                      the same for the key that starts like that of the last C, up to its last /
    d token [=result|-] [print] done, by the holder of that claim; a plain d has result null
    d token-line                the same for the claims from that token up to that line
    R key attempts              free again, by the holder
    Q key [attempts]            in doubt, by the holder's own word
    P key reason                parked, by the holder
    T key token                 take over what is in doubt or parked
    F key token                 forget what is done or parked
    S key                       done before there was a journal (the seed's ids)
    X session n                 that session is dead, and its last append was n
    E bucket                    the next bucket begins here
    B bucket                    what was done before that bucket is dropped here

The value of a log key is one *append*: the writer's wall clock, then a line for each of these.  Keys,
results and reasons are percent-encoded; the token of a ``d`` is written as revision.line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from urllib.parse import quote, quote_from_bytes, unquote, unquote_to_bytes

from idemp.errors import ConfigError
from idemp.laws import Entry
from idemp.ports import Abandon, Claim, Complete, Forget, Op, Park, Release, Takeover

LINES = 1 << 16
"""Tokens of one append: token = revision * LINES + line, where each record is a line."""
PAGE = 500
"""Keys in one page of a snapshot."""
PAGE_BYTES = 500_000
"""Bytes of one that has more than one key."""
# Everything that can be seen stays as it is, but the percent sign.
_SAFE = "/:.-_~!$&'()*+,;=@?#[]{}|^`\"<>\\"
_PLAIN = re.compile(r"[!-$&-~]+").fullmatch
NULL = b"null"


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


class Finish(NamedTuple):
    """d: the claim with that token is done.  What `Complete` is when it is read."""

    token: int
    result: bytes | None = None
    fingerprint: bytes | None = None


class Claims(NamedTuple):
    """C and c: many `Claim`, one after the other."""

    keys: list[str]


class Run(NamedTuple):
    """d: that claim and the next ones, ``many`` in all, are done with result null."""

    token: int
    many: int


Record = Op | Finish | Declare | Begin | Raise | Seed
Block = Claims | Run | Record


class Unreadable(ConfigError):
    """A line that means nothing to this version.  Who cannot read all of a journal decides nothing by it."""

    def __init__(self, line: str) -> None:
        super().__init__(
            f"this journal was written by a newer idemp (it has {line[:100]!r}); upgrade this process"
        )


# ------------------------------------------------------------------ an append


def encode(wall: float, records: Sequence[Record]) -> bytes:
    """The value of a log key."""
    lines = [f"{wall:.3f}"]
    prefix: str | None = None
    first = after = 0  # of a run of plain completions
    for record in records:
        if type(record) is Complete and record.result == NULL and record.fingerprint is None:
            if record.token != after or not after % LINES:
                if after:
                    lines.append(_run(first, after - first))
                first = record.token
            after = record.token + 1
            continue
        if after:
            lines.append(_run(first, after - first))
            after = 0
        if type(record) is not Claim:
            lines.append(_line(record))
            continue
        key = _quote(record.key)
        end = key.rfind("/") + 1
        if key[:end] == prefix:
            lines.append("c " + key[end:])
        else:
            prefix = key[:end]
            lines.append("C " + key)
    if after:
        lines.append(_run(first, after - first))
    return "\n".join(lines).encode()


def read(text: bytes) -> tuple[float, list[Block]]:
    """The wall clock and the records of a log key's value, those that follow their like in one.

    Raises `Unreadable`.
    """
    wall, *lines = text.decode().split("\n")
    blocks: list[Block] = []
    keys: list[str] = []
    prefix, last, line = "", "", wall
    try:
        clock = float(wall)
        for line in lines:
            kind = line[:2]
            if kind == "c ":
                rest = line[2:]
                key = prefix + (unquote(rest) if "%" in rest else rest)
            elif kind == "C ":
                key = unquote(line[2:])
                prefix = key[: key.rfind("/") + 1]
            else:
                blocks.append(_block(line))
                last = ""
                continue
            if not last:
                keys = []
                blocks.append(Claims(keys))
            keys.append(key)
            last = kind
    except (ValueError, IndexError):
        raise Unreadable(line) from None
    return clock, blocks


def decode(text: bytes) -> tuple[float, list[Record]]:
    """The same one by one."""
    wall, blocks = read(text)
    records: list[Record] = []
    for block in blocks:
        match block:
            case Claims(keys):
                records += map(Claim, keys)
            case Run(token, many):
                records += [Finish(token + line, NULL) for line in range(many)]
            case _:
                records.append(block)
    return wall, records


def names(text: bytes) -> Iterator[str]:
    """The keys that a log key's value names, in short: those of claims and of the seed's ids."""
    for block in read(text)[1]:
        match block:
            case Claims(keys):
                yield from keys
            case Seed(key):
                yield key


# ------------------------------------------------------------------ a line


def _line(record: Record) -> str:
    match record:
        case Complete(_, token, result, fingerprint) | Finish(token, result, fingerprint):
            return _run(token, 1) + _result(result, fingerprint)
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
    if fingerprint is None and result == NULL:
        return ""
    text = " -" if result is None else " =" + quote_from_bytes(result, _SAFE)
    return text if fingerprint is None else f"{text} {fingerprint.hex()}"


def _run(token: int, many: int) -> str:
    revision, line = divmod(token, LINES)
    return f"d {revision}.{line}" if many == 1 else f"d {revision}.{line}-{line + many - 1}"


def _block(line: str) -> Block:
    kind, first, *rest = line.split(" ")
    match kind:
        case "d":
            revision, _, place = first.partition(".")
            start, _, last = place.partition("-")
            token = int(revision) * LINES + int(start)
            return (
                Finish(token, *_what_is_kept(rest))
                if rest
                else Run(token, int(last or start) - int(start) + 1)
            )
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
    """The result and the fingerprint of a d."""
    result = None if words[0] == "-" else unquote_to_bytes(words[0][1:])
    return result, bytes.fromhex(words[1]) if len(words) > 1 else None


def _quote(text: str) -> str:
    return text if _PLAIN(text) else quote(text, _SAFE)


# ------------------------------------------------------------------ a snapshot


class Opened(NamedTuple):
    """A key that is not done, as it stood.  ``bucket``: where it was set free, if it was."""

    key: str
    entry: Entry
    bucket: int


def encode_open(opened: Sequence[Opened]) -> bytes:
    """A page of a snapshot."""
    return "\n".join(map(_opened_line, opened)).encode()


def encode_pages(opened: Sequence[Opened]) -> Iterator[bytes]:
    """As many pages as it takes: what is parked may have a long reason, and etcd takes 1.5 MiB at a time."""
    page: list[str] = []
    size = 0
    for line in map(_opened_line, opened):
        if page and (len(page) == PAGE or size + len(line) > PAGE_BYTES):
            yield "\n".join(page).encode()
            page, size = [], 0
        page.append(line)
        size += len(line)
    if page:
        yield "\n".join(page).encode()


def _opened_line(opened: Opened) -> str:
    key, e, bucket = opened
    held = e.session or "-"
    return f"{_quote(key)} {e.state} {e.token} {e.attempt} {held} {e.at:.3f} {_quote(e.reason)} {bucket}"


def decode_open(text: bytes) -> list[Opened]:
    """The open keys of a snapshot's page.  Raises `Unreadable`."""
    found = []
    for line in text.decode().split("\n") if text else []:
        try:
            key, state, token, attempt, session, at, reason, bucket = line.split(" ")
            held = "" if session == "-" else session
            entry = Entry(state, int(token), int(attempt), held, float(at), unquote(reason))
            found.append(Opened(unquote(key), entry, int(bucket)))
        except ValueError:
            raise Unreadable(line) from None
    return found
