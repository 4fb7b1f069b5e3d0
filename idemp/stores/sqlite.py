"""The embedded store: one SQLite file (WAL, synchronous=FULL), many threads and processes of one host.

A batch is one transaction: load its keys, let `idemp.laws` decide, write what changed.  Each of
these is a statement or a few, whatever the batch's size, because sqlite3 lets go of the GIL at every
step and a busy thread beside it would take it each time.  What the writer read or wrote it need not load
again until another connection has written, which SQLite tells (sqlite_known.py).

Keys that are not done live in ``idemp_open``.  Done keys live in three slices of time, ``idemp_done_0`` to
``idemp_done_2``: a new slice begins when the last is half a retention old, in the place of the oldest,
which is over by then as a whole.  So nothing is deleted row by row, and the file holds at most
one and a half retentions.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec.structs import astuple

from idemp.embedded import check_durable, check_place, look
from idemp.errors import Closed, ConfigError, StoreUnavailable
from idemp.held import Held
from idemp.laws import DONE, FREE, Entry, Ledger, undoing, view
from idemp.ports import Backlog, Busy, Claim, Clock, Done, Letter, Op, Reply, State, Transaction
from idemp.stores.door import Confirmed, SessionStore
from idemp.stores.group import GroupCommit
from idemp.stores.outbox import pack, unpack
from idemp.stores.sqlite_inbox import HandlersConnection, SqliteTransaction
from idemp.stores.sqlite_known import Known, Loaded

T = TypeVar("T")
Row = tuple[Any, ...]

log = logging.getLogger(__name__)

LAYOUT = 2
"""Of the file.  The first had no prefix before its tables' names, which those of handlers may have, too."""
PATIENCE = 10.0
"""Seconds that a batch tries to get through before `StoreUnavailable`."""
_MOST_ROWS = 256
"""In one statement: SQLite takes 32 766 values."""
_POLL = 0.01
_SWEEP = 3600.0
_SLICES = range(3)

# Keys are random, so a batch touches many pages: keep them at hand (KiB), and write them back seldom (pages).
_SETTINGS = ("journal_mode=WAL", "synchronous=FULL", "cache_size=-65536", "wal_autocheckpoint=8000")

_SCHEMA = f"""
CREATE TABLE idemp_layout (version INTEGER);
INSERT INTO idemp_layout VALUES ({LAYOUT});
CREATE TABLE idemp_meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE idemp_session
    (id TEXT PRIMARY KEY, boot TEXT, expires REAL, batch INTEGER, pid INTEGER) WITHOUT ROWID;
CREATE TABLE idemp_open
    (key TEXT PRIMARY KEY, state TEXT, token INTEGER, attempt INTEGER, session TEXT, at REAL, reason TEXT)
    WITHOUT ROWID;
""" + "".join(
    f"CREATE TABLE idemp_done_{n} (key TEXT PRIMARY KEY, token INTEGER, attempt INTEGER, at REAL, "
    "result BLOB, fingerprint BLOB) WITHOUT ROWID;"
    for n in _SLICES
)


_FIRST = ("meta", "session", "open", "done_0", "done_1", "done_2")
_OUTBOX_COLUMNS = ["number", "key", "at", "letter"]


def layout_of(db: sqlite3.Connection) -> int:
    """Of the file; 0: it has none of our tables."""
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'idemp_layout'").fetchone():
        return int(db.execute("SELECT max(version) FROM idemp_layout").fetchone()[0])
    ours = db.execute("SELECT 1 FROM pragma_table_info('done_0') WHERE name = 'fingerprint'").fetchone()
    return 1 if ours and db.execute("PRAGMA user_version").fetchone() == (1,) else 0


def exists(path: str) -> bool:
    """Whether the file ``path`` has a store in it.  Makes nothing."""
    return look(path, lambda db: layout_of(db) > 0)


def _columns(db: sqlite3.Connection, table: str) -> list[str]:
    return [name for (name,) in db.execute("SELECT name FROM pragma_table_info(?) ORDER BY cid", (table,))]


def _make(db: sqlite3.Connection) -> None:
    """The tables, or those of the first layout renamed, unless another process was first."""
    db.execute("BEGIN IMMEDIATE")
    try:
        layout = layout_of(db)
        statements = _SCHEMA.split(";")
        if layout == 1:
            # The outbox was made when it was first needed: until then one of that name is somebody else's.
            ours = [*_FIRST, "outbox"] if _columns(db, "outbox") == _OUTBOX_COLUMNS else _FIRST
            renamed = [f"ALTER TABLE {name} RENAME TO idemp_{name}" for name in ours]
            # An idemp of before looks there, and refuses; it would begin anew in tables of the old names.
            statements = [*statements[:2], *renamed, f"PRAGMA user_version={LAYOUT}"]
        for statement in statements if layout < LAYOUT else ():
            db.execute(statement)
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise


# The columns of an Entry, for open and for done; blobs travel as hexadecimal text.
_OPEN_ENTRY = "o.state, o.token, o.attempt, o.session, o.at, o.reason, NULL, NULL"
_DONE_ENTRY = (
    "'done', d.token, d.attempt, '', d.at, '', "
    "iif(d.result IS NULL, NULL, hex(d.result)), iif(d.fingerprint IS NULL, NULL, hex(d.fingerprint))"
)

_LOAD = (
    "SELECT (SELECT json_group_object(name, value) FROM idemp_meta),"
    " (SELECT json_group_object(id, expires) FROM idemp_session WHERE boot = :boot AND expires > :now),"
    f" (SELECT json_group_array(json_array(o.key, {_OPEN_ENTRY}))"
    "    FROM json_each(:keys) k CROSS JOIN idemp_open o ON o.key = k.value)"
) + "".join(
    f", (SELECT json_group_array(json_array(d.key, {_DONE_ENTRY}))"
    f"    FROM json_each(:keys) k CROSS JOIN idemp_done_{n} d ON d.key = k.value)"
    for n in _SLICES
)
# Not INSERT OR REPLACE, which copies every page first that it may have to give back: three times the work.
# Here a failure ends the transaction.
_REPLACE = "INSERT OR FAIL INTO {} VALUES {} ON CONFLICT (key) DO UPDATE SET {}"
_OPEN_COLUMNS = ("state", "token", "attempt", "session", "at", "reason")
_DONE_COLUMNS = ("token", "attempt", "at", "result", "fingerprint")
_DROP_OPEN = "DELETE FROM idemp_open WHERE key IN (SELECT value FROM json_each(?))"
_DROP_DONE = tuple(
    f"DELETE FROM idemp_done_{n} WHERE key IN (SELECT value FROM json_each(?))" for n in _SLICES
)
_CONFIRM = "UPDATE idemp_session SET expires = ?, batch = ? WHERE id = ?"
_SCAN = (
    f"SELECT * FROM (SELECT o.key, {_OPEN_ENTRY} FROM idemp_open o WHERE o.key > :after AND o.key >= :prefix"
    " AND o.key < :end AND (o.state <> 'free' OR o.at > :over) ORDER BY o.key LIMIT :limit)"
) + "".join(
    f" UNION ALL SELECT * FROM (SELECT d.key, {_DONE_ENTRY} FROM idemp_done_{n} d WHERE d.key > :after"
    " AND d.key >= :prefix AND d.key < :end AND d.at > :over ORDER BY d.key LIMIT :limit)"
    for n in _SLICES
)

_SIZE = "SELECT (SELECT count(*) FROM idemp_open)" + "".join(
    f" + (SELECT count(*) FROM idemp_done_{n})" for n in _SLICES
)
_SESSIONS = "SELECT id FROM idemp_session WHERE boot = :boot AND expires > :now"

# Made when it is first needed: files of before have none.
_OUTBOX = (
    "CREATE TABLE IF NOT EXISTS idemp_outbox"
    " (number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT, at REAL, letter BLOB)"
)

_HAS_OUTBOX = "SELECT 1 FROM sqlite_master WHERE name = 'idemp_outbox'"
_SENT = "DELETE FROM idemp_outbox WHERE number IN (SELECT value FROM json_each(?))"

Connect = Callable[..., sqlite3.Connection]


class SqliteStore(SessionStore):
    """The store in the file ``path``.

    retention: seconds that done is remembered (the longest that any opener named is in force).
    session_ttl: seconds without a heartbeat after which this process's claims are in doubt.
    """

    transactions = 1  # SQLite has one writer

    def __init__(
        self,
        path: str,
        *,
        retention: float,
        session_ttl: float,
        clock: Clock | None = None,
        connect: Connect = sqlite3.connect,
    ) -> None:
        make = partial(_Session, path, retention, session_ttl, clock or Clock(), connect)
        super().__init__(make, retention)

    def transaction(self, work: Callable[[Transaction], T], wait: float, *, divisible: bool = False) -> T:
        """See `idemp.ports.Inbox`.  One at a time: whoever writes to the file waits meanwhile."""
        return self._session_here().transaction(work, wait)

    def letters(self, limit: int, after: int = 0) -> list[Letter]:
        """See `idemp.ports.Inbox`."""
        query = "SELECT number, key, at, letter FROM idemp_outbox WHERE number > ? ORDER BY number LIMIT ?"
        rows = self._session_here().letters(query, [after, limit])
        return [Letter(number, _unescape(key), at, unpack(blob)) for number, key, at, blob in rows]

    def sent(self, numbers: Sequence[int]) -> None:
        """See `idemp.ports.Inbox`."""
        self._session_here().sent(numbers)

    def backlog(self) -> Backlog:
        """See `idemp.ports.Inbox`."""
        session = self._session_here()
        for letters, oldest in session.letters("SELECT count(*), min(at) FROM idemp_outbox", []):
            return Backlog(letters, max(0.0, session.now() - oldest) if letters else 0.0)
        return Backlog(0, 0.0)

    def _session_here(self) -> _Session:
        session = self._mine()
        assert isinstance(session, _Session)
        return session


class _Unsure(NamedTuple):
    """A commit whose fate is not known yet: the session's row names the last that took effect."""

    batch: int
    ops: Sequence[Op]
    replies: list[Reply]


class _Again(Exception):
    """A transaction with handlers in it must be tried again."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


class _Session(Confirmed):
    """One process's presence in the file: connections, heartbeat, group commit."""

    def __init__(self, path: str, retention: float, ttl: float, clock: Clock, connect: Connect) -> None:
        if sqlite3.sqlite_version_info < (3, 38):
            raise ConfigError(f"SQLite {sqlite3.sqlite_version} is too old; this store needs 3.38 or newer")
        self.retention = retention
        self.group = GroupCommit(self._commit)
        self._path, self._ttl, self._clock, self._connect = path, ttl, clock, connect
        self._boot = _boot_id()
        self._id = ""
        self._batch = 0
        self._confirmed = -ttl
        self._born = 0  # the last token before the session
        self._swept = clock.steady()
        self._unsure: _Unsure | None = None
        self._undo: list[Op] = []  # what gives back claims that nobody heard of
        self._known = Known()
        self._looked = (-1, 0.0)  # what the reader saw last, and when it was asked
        check_place(path)
        self._file = Held(path, self)
        self._writer = self._open()
        self._file.opened()
        self._reader = self._open()
        self._handlers: HandlersConnection | None = None
        self._handling = threading.Lock()
        self._reading = threading.Lock()
        self._changed = threading.Condition()
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name="idemp-sqlite-heartbeat", daemon=True).start()

    # ---------------------------------------------------------------- connections

    def _open(self, **options: Any) -> sqlite3.Connection:
        """A connection; several processes may be making the same file at this moment."""
        deadline = self._clock.steady() + PATIENCE
        while True:
            try:
                return self._open_once(**options)
            except StoreUnavailable:
                if self._clock.steady() >= deadline:
                    raise
                self._clock.sleep(0.05)

    def _open_once(self, **options: Any) -> sqlite3.Connection:
        try:
            connection = self._connect(
                self._path, timeout=PATIENCE, isolation_level=None, check_same_thread=False, **options
            )
            try:
                self._set_up(connection)
            except BaseException:
                sqlite3.Connection.close(connection)
                raise
        except sqlite3.OperationalError as error:
            raise self._cannot_open(error) from None
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{self._path} is no SQLite file ({error}); name another file") from None
        return connection

    def _set_up(self, connection: sqlite3.Connection) -> None:
        for setting in _SETTINGS:
            connection.execute(f"PRAGMA {setting}")
        check_durable(self._path, connection.execute)
        layout = layout_of(connection)
        if layout > LAYOUT:
            raise ConfigError(
                f"{self._path} has layout {layout} of a newer idemp; upgrade idemp or name another file"
            )
        if layout < LAYOUT:
            _make(connection)

    def _cannot_open(self, error: sqlite3.OperationalError) -> Exception:
        folder = Path(self._path).resolve().parent
        if not folder.is_dir():
            return ConfigError(f"the folder of {self._path} does not exist; make it, or name another file")
        if "unable to open" in str(error) or "readonly" in str(error):
            return ConfigError(f"{self._path} cannot be written; give this user the right to its folder")
        return StoreUnavailable(f"{self._path}: {error}")

    # ---------------------------------------------------------------- one batch

    def _commit(self, ops: Sequence[Op]) -> list[Reply]:
        """One transaction, repeated until its fate is known or `PATIENCE` is over."""
        if self._ended.is_set():
            raise Closed("this store was closed")
        deadline = self._clock.steady() + PATIENCE
        self._batch += 1
        while True:
            self._file.check_same()
            try:
                replies = self._resolved(ops)
                self._stamp()
                return replies
            except sqlite3.Error as error:
                if self._clock.steady() >= deadline:
                    raise StoreUnavailable(f"{self._path}: {error}") from error
                self._clock.sleep(0.05)
                self._reopen()

    def _reopen(self) -> None:
        """After an error the connection's state is anybody's guess: take a new one."""
        self._known = Known()
        try:
            self._writer.close()
            self._writer = self._open()
        except (sqlite3.Error, StoreUnavailable, ConfigError) as error:
            log.warning("%s: %s", self._path, error)

    def _resolved(self, ops: Sequence[Op]) -> list[Reply]:
        """Apply ``ops``, once it is known what became of the commit before.

        If that was a commit of this very batch and it took effect, its replies stand.  If it was of
        an earlier batch, whose caller was told `StoreUnavailable`, its claims are given back.
        """
        db = self._writer
        if (found := self._duplicates(db, ops)) is not None:
            return found
        db.execute("BEGIN IMMEDIATE")
        try:
            if (unsure := self._unsure) is not None and self._took_effect(db, unsure.batch):
                if unsure.batch == self._batch:
                    db.execute("ROLLBACK")
                    self._settle()
                    return unsure.replies[len(unsure.replies) - len(ops) :]
                # Kept until a commit that holds it is known to have taken effect, for that may fail, too.
                self._settle()
                self._undo = undoing(unsure.ops, unsure.replies)
            undo = self._undo
            return self._transact(db, [*undo, *ops])[len(undo) :]
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def _duplicates(self, db: sqlite3.Connection, ops: Sequence[Op]) -> list[Reply] | None:
        """What those are told who claim what is done: it needs no lock, and waits for nobody's."""
        known, over = self._known, self._clock.wall() - self.retention
        replies: list[Reply] = []
        for op in ops:
            entry = known.find(op.key) if type(op) is Claim else None
            if entry is None or entry.state != DONE or entry.at <= over:
                break
            replies.append(view(entry, bool))
        else:
            if ops and known.version == _version(db):
                return replies
        if len(ops) == 1 and type(ops[0]) is Claim and (entry := self._done(db, ops[0].key)) is not None:
            return [view(entry, bool)]
        return None

    def _done(self, db: sqlite3.Connection, key: str) -> Entry | None:
        """What the reader finds done; known from then on, if nobody else wrote since the writer looked."""
        try:
            entry, _ = self._glimpse(key)
        except StoreUnavailable:  # the writer will find out
            return None
        if entry is None or entry.state != DONE:
            return None
        if (version := _version(db)) == self._known.version:
            self._known.keep(key, entry)
        else:
            self._known = Known(version)
        return entry

    def _settle(self) -> None:
        """The last commit took effect, or there was nothing to commit; what was to be given back is."""
        self._unsure, self._undo = None, []

    def _took_effect(self, db: sqlite3.Connection, batch: int) -> bool:
        row = db.execute("SELECT batch FROM idemp_session WHERE id = ?", (self._id,)).fetchone()
        return row is not None and row[0] == batch

    def _transact(self, db: sqlite3.Connection, ops: Sequence[Op]) -> list[Reply]:
        # SQLite's JSON has 15 digits of a number: what is known must not differ from what is loaded.
        now, wall = self._clock.steady(), round(self._clock.wall(), 5)
        meta, sessions, entries = self._look(db, {op.key for op in ops})
        ours = self._id in sessions
        if not ours:
            self._id, self._born = uuid.uuid4().hex, meta.get("token", 0)
        sessions[self._id] = now + self._ttl
        ledger = Ledger(entries, sessions.__contains__, self._id, meta.get("token", 0), wall)
        replies = [ledger.apply(op) for op in ops]
        if not ledger.changed and ours and now - self._confirmed < self._ttl / 6:
            db.execute("ROLLBACK")
            self._settle()
            return replies
        self._save(db, ledger, meta, wall)
        if ours:
            db.execute(_CONFIRM, (now + self._ttl, self._batch, self._id))
        else:
            new = (self._id, self._boot, now + self._ttl, self._batch, os.getpid())
            db.execute("INSERT INTO idemp_session VALUES (?, ?, ?, ?, ?)", new)
        self._unsure = _Unsure(self._batch, ops, replies)
        db.execute("COMMIT")
        self._settle()
        self._confirmed = now
        self._known.wrote(meta, sessions, ledger)
        with self._changed:
            self._changed.notify_all()
        return replies

    def _look(self, db: sqlite3.Connection, keys: set[str]) -> Loaded:
        """What the file says of ``keys``, in an open transaction of the writer; loads what is not known."""
        if (version := _version(db)) != self._known.version:
            self._known = Known(version)
        known, wall = self._known, self._clock.wall()
        entries = {key: entry for key in keys if (entry := known.find(key)) and not self._over(entry, wall)}
        if len(entries) == len(keys) and known.meta:
            return Loaded(dict(known.meta), known.alive(self._clock.steady()), entries)
        found = self._load(db, keys - entries.keys())
        for key, entry in found.entries.items():
            if entry.state == DONE:
                known.keep(key, entry)
        return found._replace(entries=found.entries | entries)

    def _load(self, db: sqlite3.Connection, keys: set[str]) -> Loaded:
        """What the file says of ``keys``, in an open transaction."""
        names = _json([_escape(key) for key in keys])
        row = db.execute(_LOAD, {"boot": self._boot, "now": self._clock.steady(), "keys": names}).fetchone()
        meta = _read(row[0])
        self._settle_retention(db, meta)
        return Loaded(meta, _read(row[1]), self._entries(row[2:], self._clock.wall()))

    def _entries(self, tables: Sequence[str], wall: float) -> dict[str, Entry]:
        """What is stored of the keys, without what is over; the newest where several slices have it."""
        entries: dict[str, Entry] = {}
        for table in tables:
            for key, *columns in _read(table):
                entry = _entry(columns)
                if self._over(entry, wall):
                    continue
                name = _unescape(key)
                if name not in entries or entries[name].token <= entry.token:
                    entries[name] = entry
        return entries

    def _over(self, entry: Entry, wall: float) -> bool:
        return entry.state in (DONE, FREE) and entry.at + self.retention <= wall

    def _save(self, db: sqlite3.Connection, ledger: Ledger, meta: dict[str, Any], wall: float) -> None:
        """Write the changed keys, and bring ``meta`` up to date."""
        slice_now = self._slice(db, meta, wall)
        opened, done, gone = [], [], []
        for key in ledger.changed:
            entry = ledger.entries.get(key)
            name = _escape(key)
            if entry is None:
                gone.append(name)
            elif entry.state == DONE:
                done.append((name, entry.token, entry.attempt, entry.at, entry.result, entry.fingerprint))
            else:
                opened.append((name, *astuple(entry)[:5], _legible(entry.reason)))
        _replace(db, "idemp_open", _OPEN_COLUMNS, opened)
        _replace(db, f"idemp_done_{slice_now}", _DONE_COLUMNS, done)
        if done or gone:
            db.execute(_DROP_OPEN, (_json([row[0] for row in done] + gone),))
        if gone:
            for statement in _DROP_DONE:
                db.execute(statement, (_json(gone),))
        _set(db, meta, token=ledger.token)

    # ---------------------------------------------------------------- a transaction with handlers in it

    def transaction(self, work: Callable[[Transaction], T], wait: float) -> T:
        """See `idemp.ports.Inbox`.  ``wait`` is at least `PATIENCE`: it is for the file, not for a key."""
        patience, deadline = max(wait, PATIENCE), 0.0
        if not self._handling.acquire(timeout=patience):
            raise StoreUnavailable(f"{self._path}: another transaction of this process did not end in time")
        try:
            while True:
                try:
                    return self._once(work)
                except _Again as again:
                    self._drop_handlers()
                    deadline = deadline or self._clock.steady() + PATIENCE
                    if self._clock.steady() >= deadline:
                        raise StoreUnavailable(f"{self._path}: {again.error}") from again.error
                    self._clock.sleep(0.05)
                except BaseException:
                    self._drop_handlers()
                    raise
        finally:
            self._handling.release()

    def _once(self, work: Callable[[Transaction], T]) -> T:
        """One attempt.  If it is not known whether it committed, the next finds its keys done, or not."""
        if self._ended.is_set():
            raise Closed("this store was closed")
        self._file.check_same()
        transaction: SqliteTransaction | None = None
        try:
            db = self._handlers_connection()
            transaction = SqliteTransaction(db, partial(self._load, db), self._clock.wall)
            result = work(transaction)
            ledger = transaction.ledger
            if ledger is not None:
                self._save(db, ledger, transaction.meta, self._clock.wall())
            if transaction.outgoing:
                db.execute(_OUTBOX)
                now = self._clock.wall()
                rows = [(_escape(key), now, pack(each)) for key, each in transaction.outgoing]
                db.executemany("INSERT INTO idemp_outbox (key, at, letter) VALUES (?, ?, ?)", rows)
            db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise _Again(error) from error
        except Exception as error:
            if transaction is not None and transaction.lost:
                raise _Again(error) from error
            raise
        with self._changed:
            self._changed.notify_all()
        return result

    def letters(self, query: str, values: Sequence[Any]) -> list[Any]:
        """What a query of the outbox finds; nothing where there has never been one."""
        with self._reading:
            if self._ended.is_set():
                raise Closed("this store was closed")
            self._file.check_same()
            try:
                if self._reader.execute(_HAS_OUTBOX).fetchone() is None:
                    return []
                return self._reader.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise StoreUnavailable(f"{self._path}: {error}") from error

    def sent(self, numbers: Sequence[int]) -> None:
        """See `idemp.ports.Inbox`."""
        with self.group.paused():
            if self._ended.is_set():
                raise Closed("this store was closed")
            self._file.check_same()
            try:
                self._writer.execute(_OUTBOX)
                self._writer.execute(_SENT, [_json(list(numbers))])
            except sqlite3.Error as error:
                raise StoreUnavailable(f"{self._path}: {error}") from error

    def now(self) -> float:
        """Seconds since 1970."""
        return float(self._clock.wall())

    def _handlers_connection(self) -> HandlersConnection:
        if self._handlers is None:
            opened = self._open(factory=HandlersConnection)
            assert isinstance(opened, HandlersConnection)
            opened.execute("PRAGMA foreign_keys=ON")  # inside a transaction a handler could not
            self._handlers = opened
        return self._handlers

    def _drop_handlers(self) -> None:
        """Roll back what is open, and take a new connection the next time."""
        connection, self._handlers = self._handlers, None
        if connection is not None:
            connection.end()

    # ---------------------------------------------------------------- retention

    def _settle_retention(self, db: sqlite3.Connection, meta: dict[str, Any]) -> None:
        """The longest retention that anybody named is everybody's."""
        known = meta.get("retention", 0.0)
        if self.retention > known:
            _set(db, meta, retention=self.retention)
        elif self.retention < known:
            log.warning(
                "%s remembers for %g s, longer than the %g s named", self._path, known, self.retention
            )
            self.retention = known

    def _slice(self, db: sqlite3.Connection, meta: dict[str, Any], wall: float) -> int:
        """The slice that takes what is done now; begins a new one when it is time."""
        number, began = meta.get("slice", 0), meta.get("began")
        if began is None:
            _set(db, meta, began=wall)
            return int(number) % 3
        due = wall - began >= self.retention / 2 and wall - meta.get("ended", 0) >= self.retention
        # The slice that comes next was closed when the one before the present began.
        if due or self._seen(db, meta) >= self.retention:
            number += 1
            db.execute(f"DELETE FROM idemp_done_{number % 3}")
            _set(db, meta, slice=number, began=wall, ended=began)
        return int(number) % 3

    def _seen(self, db: sqlite3.Connection, meta: dict[str, Any]) -> float:
        """Seconds for which the present slice has been that for sure, by the host's own clock.

        A wall clock that was ahead once would keep it for as long as that was; one that lies before what
        was written down need not be right.
        """
        now, name = self._clock.steady(), f"{meta.get('slice', 0)} {self._boot or self._id}"
        if meta.get("seen") != name or meta["since"] > now:
            _set(db, meta, seen=name, since=now)
        return float(now - meta["since"])

    def _sweep(self) -> None:
        """Drop dead sessions and free keys that are over; both are few, and nobody counts with them."""
        with self.group.paused():
            now = self._swept = self._clock.steady()
            over = self._clock.wall() - self.retention
            self._writer.execute("DELETE FROM idemp_open WHERE state = 'free' AND at <= ?", (over,))
            self._writer.execute(
                "DELETE FROM idemp_session WHERE boot <> ? OR expires <= ?", (self._boot, now)
            )

    # ---------------------------------------------------------------- the session

    def _beat(self) -> None:
        """Confirm the session thrice in its time to live, and sweep."""
        while not self._ended.wait(self._ttl / 3):
            try:
                self.group.apply([])
                if self._clock.steady() - self._swept >= min(self.retention / 4, _SWEEP):
                    self._sweep()
            except Closed:
                return
            except (StoreUnavailable, ConfigError, sqlite3.Error) as error:
                log.warning("heartbeat of %s: %s", self._path, error)
                if self._file.lost:
                    return  # every call says so from now on
            except Exception:  # without it every handler that takes longer would be in doubt, from now on
                log.exception("heartbeat of %s", self._path)

    def fresh(self, token: int = 0) -> bool:
        """See `Confirmed`.  Not in a file that others do not see."""
        return self._file.same() and super().fresh(token)

    def close(self) -> None:
        """End the session and let go of the file."""
        self._ended.set()
        with self._handling:
            self._drop_handlers()
        with self.group.paused(), self._reading:
            try:
                self._writer.execute("DELETE FROM idemp_session WHERE id = ?", (self._id,))
            except sqlite3.Error as error:
                log.warning("%s: %s", self._path, error)
            self._writer.close()
            self._reader.close()
        with self._changed:
            self._changed.notify_all()

    # ---------------------------------------------------------------- reading

    def _stamp(self) -> None:
        """Let others than the writer see whether what is known still holds, by the reader's number."""
        if self._known.stamp is None and self._reading.acquire(blocking=False):
            try:
                with suppress(sqlite3.Error):  # what was committed stands
                    stamp = _version(self._reader)
                    if _version(self._writer) == self._known.version:
                        self._known.stamp = stamp
            finally:
                self._reading.release()

    def recall(self, key: str, since: float) -> Done | None:
        """See `idemp.ports.Store`.  What memory knows to be done, unless somebody has written."""
        if self._ended.is_set():
            raise Closed("this store was closed")
        if self._file.lost:
            return None
        known = self._known
        stamp, entry = known.stamp, known.find(key)
        if stamp is None or entry is None or entry.state != DONE or self._over(entry, self._clock.wall()):
            return None
        seen, asked = self._looked
        if not (seen == stamp and asked >= since) and not self._still(stamp):
            return None
        return Done(entry.token, entry.result, entry.fingerprint, entry.at, entry.attempt)

    def _still(self, stamp: int) -> bool:
        """Whether the reader sees nothing newer than at that stamp; false if it is at work."""
        if not self._reading.acquire(blocking=False):
            return False
        try:
            if self._ended.is_set():
                return False
            asked = self._clock.steady()
            self._looked = (_version(self._reader), asked)
        except sqlite3.Error:
            return False
        finally:
            self._reading.release()
        return self._looked[0] == stamp

    def wait(self, key: str, token: int, timeout: float) -> None:
        """Look at the key after each commit of this process, and every `_POLL` for the others'."""
        deadline = self._clock.steady() + timeout
        while True:
            state = self._peek(key)
            left = deadline - self._clock.steady()
            if left <= 0 or not (isinstance(state, Busy) and state.token == token):
                return
            with self._changed:
                self._changed.wait(min(left, _POLL))

    def _peek(self, key: str) -> State:
        entry, sessions = self._glimpse(key)
        return view(entry, sessions.__contains__)

    def _glimpse(self, key: str) -> tuple[Entry | None, dict[str, float]]:
        """What the file says of ``key``, and which sessions live; beside the writer."""
        values = {"boot": self._boot, "now": self._clock.steady(), "keys": _json([_escape(key)])}
        row = self._read(_LOAD, values)[0]
        return self._entries(row[2:], self._clock.wall()).get(key), _read(row[1])

    def scan(self, prefix: str, after: str, limit: int) -> list[tuple[str, State]]:
        """See `idemp.ports.Store`."""
        prefix = _escape(prefix)
        values = {
            "after": _escape(after),
            "prefix": prefix,
            "end": prefix + "\U0010ffff",
            "limit": limit,
            "over": self._clock.wall() - self.retention,
        }
        rows = self._read(_SCAN, values)
        sessions = self._read(_SESSIONS, {"boot": self._boot, "now": self._clock.steady()})
        alive = {row[0] for row in sessions}
        found = {key: view(_entry(columns), alive.__contains__) for key, *columns in rows}
        return [(_unescape(key), found[key]) for key in sorted(found)[:limit]]

    def size(self) -> int:
        """See `idemp.ports.Store`.  Counted, beside the writer: what is over and not dropped yet, too."""
        return int(self._read(_SIZE, {})[0][0])

    def _read(self, query: str, values: dict[str, Any]) -> list[Any]:
        """Rows, beside the writer."""
        with self._reading:
            if self._ended.is_set():
                raise Closed("this store was closed")
            self._file.check_same()
            try:
                return self._reader.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise StoreUnavailable(f"{self._path}: {error}") from error


def _version(db: sqlite3.Connection) -> int:
    """Another number when another connection has written to the file."""
    return int(db.execute("PRAGMA data_version").fetchone()[0])


def _set(db: sqlite3.Connection, meta: dict[str, Any], **values: Any) -> None:
    """Write what differs, in the file and in ``meta``."""
    for name, value in values.items():
        if meta.get(name) != value:
            db.execute("INSERT OR REPLACE INTO idemp_meta VALUES (?, ?)", (name, value))
            meta[name] = value


def _entry(columns: Sequence[Any]) -> Entry:
    *plain, result, fingerprint = columns
    return Entry(*plain, *(None if blob is None else bytes.fromhex(blob) for blob in (result, fingerprint)))


def _excluded(*columns: str) -> str:
    """What replaces a row's columns where there is one."""
    return ", ".join(f"{column} = excluded.{column}" for column in columns)


def _replace(db: sqlite3.Connection, table: str, columns: tuple[str, ...], rows: Sequence[Row]) -> None:
    """Write rows of a key and ``columns``."""
    for portion in _portions(rows):
        db.execute(_replacing(table, columns, len(portion)), [value for row in portion for value in row])


@cache
def _replacing(table: str, columns: tuple[str, ...], rows: int) -> str:
    """So many rows at once: JSON would be parsed anew for each column."""
    values = ", ".join([f"(?{', ?' * len(columns)})"] * rows)
    return _REPLACE.format(table, values, _excluded(*columns))


def _portions(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """All rows, in portions of few different sizes, so that their statements stay prepared."""
    start, size = 0, _MOST_ROWS
    while start < len(rows):
        while size > len(rows) - start:
            size //= 2
        yield rows[start : start + size]
        start += size


def _legible(text: str) -> str:
    """As SQLite takes it: some errors' text holds half characters, and its JSON functions cut it at NUL."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\x00")


def _json(value: object) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except UnicodeEncodeError:  # half a character, as in the text of some errors
        return json.dumps(value, separators=(",", ":"))


def _read(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:  # what SQLite writes and JSON has no word for
        return json.loads(text)


def _escape(key: str) -> str:
    """SQLite's JSON functions cut a string at NUL."""
    return key.replace("%", "%25").replace("\0", "%00") if "%" in key or "\0" in key else key


def _unescape(key: str) -> str:
    return key.replace("%00", "\0").replace("%25", "%") if "%" in key else key


def _boot_id() -> str:
    """Names this run of the host: `Clock.steady` starts anew with each."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
