"""A batch on PostgreSQL, in anybody's transaction: hold and load its keys, decide, write what changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import psycopg

from idemp.errors import ConfigError
from idemp.laws import DONE, Entry, Ledger
from idemp.ports import Applied, Claim, Claimed, Complete, Done, Forget, Get, Op, Reply, Takeover
from idemp.stores.postgresql_handlers import HandlersConnection
from idemp.stores.postgresql_line import Connection
from idemp.stores.postgresql_sql import Statements

BATCH_TOKENS = 1 << 20
"""Tokens that one batch may give out: the sequence counts batches."""

Rows = psycopg.Cursor[tuple[Any, ...]]


class Head(NamedTuple):
    """What a batch knows before it decides.  ``batch``: my session's last; None: there is no such session.

    mark: another whenever a key has left nothing behind.
    """

    number: int
    retention: float
    slice: int
    now: float
    batch: int | None
    alive: bool | None
    mark: str = ""


EMPTIED = "its table meta is empty, as after a TRUNCATE of all tables; run: idemp init URL"


def head_in(rows: Rows) -> Head:
    """What the server answered.  Raises `ConfigError` if somebody has emptied the tables."""
    row = rows.fetchone()
    if row is None:
        raise ConfigError(f"PostgreSQL: {EMPTIED}")
    return Head(*row)


class Loaded(NamedTuple):
    """The keys of a batch, held until the transaction ends."""

    head: Head
    entries: dict[str, Entry]
    empty: set[str]
    """Keys whose row in ``open`` is there only to be held."""
    awaited: set[str]
    alive: set[str]


class Asked(NamedTuple):
    """Answers that come when the pipeline ends."""

    seen: Rows
    head: Rows
    rows: Rows

    def loaded(self) -> Loaded:
        """What they say."""
        loaded = Loaded(head_in(self.head), {}, set(), set(), set())
        fold(loaded, self.rows.fetchall())
        # What was seen done without being held stands as it was seen: another may have forgotten it since.
        for key, *columns in self.seen.fetchall():
            loaded.entries[bytes(key).decode()] = _entry(columns[:-2])
        return loaded


def ask(
    connection: Connection, words: Statements, session: str, ops: Sequence[Op], *, held_too: bool = True
) -> Asked:
    """In a pipeline: hold the keys of ``ops`` and load them.

    held_too: the session's own row, which its heartbeat and its other batches then wait for.
    """
    keys = sorted({op.key.encode() for op in ops})
    held = sorted({op.key.encode() for op in ops if not isinstance(op, Get)})
    firm = {op.key.encode() for op in ops if isinstance(op, Forget)}
    taken = [op.key.encode() for op in ops if isinstance(op, Takeover)]
    seen = run(connection, words.lock, {"keys": held, "firm": [key in firm for key in held]})
    run(connection, words.holders, {"me": session if held_too else "", "taken": taken})
    head = run(connection, words.head, {"me": session})
    return Asked(seen, head, run(connection, words.load, {"keys": keys}))


# ------------------------------------------------------------------ the short way


class Quick(NamedTuple):
    """A batch as most are: claims of keys that nobody knows, and completions of what was claimed here.

    Both by their keys' order, so that of two transactions one waits for the other.
    """

    claims: list[bytes]
    ends: list[Complete]


class Tried(NamedTuple):
    """Answers that come when the pipeline ends: whether the short way leads there."""

    quick: Quick
    made: Rows | None
    known: Rows | None
    ended: Rows | None
    head: Rows


class Went(NamedTuple):
    """The short way led there, if the head is that of a live session: the replies, and what was done.

    awaited: whether somebody waits for one of the completed.
    """

    replies: dict[str, Reply]
    done: list[tuple[str, Done]]
    awaited: bool


def quick(ops: Sequence[Op]) -> Quick | None:
    """``ops``, if they are such a batch by their looks."""
    claims = [op.key.encode() for op in ops if type(op) is Claim]
    ends = [op for op in ops if type(op) is Complete]
    if len(claims) + len(ends) < len(ops) or len({op.key for op in ops}) < len(ops):
        return None
    return Quick(sorted(claims), sorted(ends, key=lambda op: op.key.encode()))


def attempt(connection: Connection, words: Statements, session: str, quick: Quick, slice_now: int) -> Tried:
    """In a pipeline: write what the batch wants, as if nothing spoke against it.

    Claims come first, for they may have to wait; the completed are not waited for.  Whether a claimed key
    is done is asked when it is held, for it may have been done a moment before.
    """
    made = known = ended = None
    if quick.claims:
        values = {"keys": quick.claims, "me": session, "step": BATCH_TOKENS}
        made = run(connection, words.claim, values)
        known = run(connection, words.known, values)
    if quick.ends:
        values = {
            "keys": [op.key.encode() for op in quick.ends],
            "tokens": [op.token for op in quick.ends],
            "results": [op.result for op in quick.ends],
            "prints": [op.fingerprint for op in quick.ends],
        }
        ended = run(connection, words.finish[slice_now % 3], values)
    run(connection, words.holders, {"me": session, "taken": []})
    return Tried(quick, made, known, ended, run(connection, words.head, {"me": session}))


def went(tried: Tried) -> Went | None:
    """What came of it; None if something spoke against it, so that all of it must be undone."""
    quick, replies, done, awaited = tried.quick, dict[str, Reply](), list[tuple[str, Done]](), False
    if tried.made is not None and tried.known is not None:
        (first, many), (known,) = tried.made.fetchall()[0], tried.known.fetchall()[0]
        if known or many < len(quick.claims):
            return None
        for token, key in enumerate(quick.claims, first + 1):
            replies[key.decode()] = Claimed(token, 1)
    if tried.ended is not None:
        many, awaited, attempts, at = tried.ended.fetchall()[0]
        if many < len(quick.ends):
            return None
        for op in quick.ends:
            replies[op.key] = Applied()
            if attempts == 1:
                done.append((op.key, Done(op.token, op.result, op.fingerprint, at)))
    return Went(replies, done, awaited)


# ------------------------------------------------------------------ the long way


def decide(loaded: Loaded, session: str) -> Ledger:
    """The laws over what was loaded."""
    head = loaded.head
    alive = {*loaded.alive, session}
    return Ledger(loaded.entries, alive.__contains__, session, head.number * BATCH_TOKENS, head.now)


def save(connection: Connection, words: Statements, loaded: Loaded, ledger: Ledger) -> None:
    """In a pipeline: write what changed."""
    opened: list[tuple[str, Entry]] = []
    done: list[tuple[str, Entry]] = []
    gone: list[bytes] = []
    for key in ledger.changed | (loaded.empty - loaded.entries.keys()):
        entry = ledger.entries.get(key)
        if entry is not None and entry.state != DONE:
            opened.append((key, entry))
            continue
        gone.append(key.encode())
        if entry is not None:
            done.append((key, entry))
    if opened:
        run(connection, words.save_open, _open_columns(opened))
    if gone:
        run(connection, words.drop_open, [gone])
    if done:
        run(connection, words.save_done[loaded.head.slice % 3], _done_columns(done))
    left = {key for key in ledger.changed if key not in ledger.entries}
    for statement in words.drop_done if left else ():
        run(connection, statement, [[key.encode() for key in left]])
    # Nobody else has seen what was claimed and given back in this very transaction.
    if ledger.forgotten or left - loaded.empty:
        run(connection, words.vanish)
    # Only then: notifications make all commits of a server wait for each other.
    if loaded.awaited & ledger.changed:
        run(connection, words.tell)
    if ledger.forgotten:
        run(connection, words.tell_forgotten)


def done_now(ledger: Ledger) -> Iterator[tuple[str, Done]]:
    """Keys and what is done, once it is committed."""
    for key, entry in ledger.entries.items():
        if entry.state == DONE:
            yield key, Done(entry.token, entry.result, entry.fingerprint, entry.at, entry.attempt)


def run(connection: Connection, text: str, values: Any = None) -> Rows:
    # Between the statements of many handlers psycopg would not notice that this one comes often.
    prepare = True if isinstance(connection, HandlersConnection) else None
    return connection.execute(text.encode(), values, prepare=prepare, binary=True)


def fold(loaded: Loaded, rows: Sequence[tuple[Any, ...]]) -> None:
    """The newest row of each key."""
    for key, *columns in rows:
        name = bytes(key).decode()
        *plain, awaited, alive = columns
        if not plain[0]:
            loaded.empty.add(name)
            continue
        entry = _entry(plain)
        if awaited:
            loaded.awaited.add(name)
        if alive:
            loaded.alive.add(entry.session)
        if name not in loaded.entries or loaded.entries[name].token <= entry.token:
            loaded.entries[name] = entry


def _entry(columns: Sequence[Any]) -> Entry:
    state, token, attempt, session, at, reason, result, fingerprint = columns
    said = "" if reason is None else bytes(reason).decode()
    return Entry(state, token, attempt, session, at, said, result, fingerprint)


def _open_columns(rows: Sequence[tuple[str, Entry]]) -> list[list[Any]]:
    columns = _columns(rows, "state", "token", "attempt", "session", "at")
    # A reason is what an error said: it may hold what no text of PostgreSQL may.
    return [*columns, [entry.reason.encode(errors="backslashreplace") for _, entry in rows]]


def _done_columns(rows: Sequence[tuple[str, Entry]]) -> list[list[Any]]:
    return _columns(rows, "token", "attempt", "at", "result", "fingerprint")


def _columns(rows: Sequence[tuple[str, Entry]], *names: str) -> list[list[Any]]:
    values = ([getattr(entry, name) for _, entry in rows] for name in names)
    return [[key.encode() for key, _ in rows], *values]
