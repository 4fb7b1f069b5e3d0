"""A broker in one SQLite file (WAL, synchronous=FULL), for the processes of one host; no server.

`ack` and `send` only collect: each `poll` is one transaction that acknowledges, publishes and
takes, and each of these is one statement whatever the batch's size, because sqlite3 lets go of
the GIL at every step and a busy thread beside it would take it each time.  So blobs travel as
one parameter that rows name their places in, and come back as one hexadecimal text.

A consumer has a row with the time until which what it took is its own; `poll` renews it, so it
must be called more often than the visibility time-out.  Time is `Clock.steady`, which all
processes of a host share and which starts anew with the host: see `_SWEEP` and `_AFTER_REBOOT`.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from idemp.embedded import check_durable, check_place, look
from idemp.errors import Closed, ConfigError, IdempError, TransportUnavailable
from idemp.held import Held
from idemp.ports import Clock, Delivery, Publication, Sent
from idemp.transports.envelope import pack, unpack
from idemp.transports.topic import matches, no_queue

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that a transaction waits for those of others."""
_LOOK = 0.01  # seconds between two looks at what other processes did
_MOST = 16 * 1024 * 1024  # bytes in one statement, or a single message that is bigger

_SETTINGS = ("journal_mode=WAL", "cache_size=-65536", "wal_autocheckpoint=8000")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS topology (version INTEGER);
CREATE TABLE IF NOT EXISTS queue (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS binding
    (exchange TEXT, pattern TEXT, queue INTEGER, PRIMARY KEY (exchange, pattern, queue)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS consumer
    (id INTEGER PRIMARY KEY AUTOINCREMENT, until REAL NOT NULL, visibility REAL NOT NULL);
CREATE TABLE IF NOT EXISTS message
    (id INTEGER PRIMARY KEY, queue INTEGER NOT NULL, consumer INTEGER NOT NULL DEFAULT 0,
     redelivered INTEGER NOT NULL DEFAULT 0, size INTEGER NOT NULL, content BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS ready ON message (queue, id) WHERE consumer = 0;
CREATE INDEX IF NOT EXISTS taken ON message (consumer) WHERE consumer <> 0;
CREATE TABLE IF NOT EXISTS delayed
    (id INTEGER PRIMARY KEY, due REAL NOT NULL, delay REAL NOT NULL, wall REAL NOT NULL,
     queue INTEGER NOT NULL, size INTEGER NOT NULL, content BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS due ON delayed (due);
INSERT INTO topology SELECT 0 WHERE NOT EXISTS (SELECT * FROM topology);
"""

# Who has more time left than anybody is given got it before the host was started anew.
_OVER = "(until <= :now OR until > :now + visibility)"
_STATE = (
    "SELECT (SELECT data_version FROM pragma_data_version), (SELECT version FROM topology),"
    " (SELECT until FROM consumer WHERE id = :me),"
    f" (SELECT min(iif({_OVER}, 0, until)) FROM consumer WHERE id <> :me), (SELECT min(due) FROM delayed)"
)
# "consumer <> 0" lets SQLite use the index that has only those.
_SWEEP = (
    f"UPDATE message SET consumer = 0 WHERE consumer IN (SELECT id FROM consumer WHERE {_OVER})"
    " AND consumer <> 0",
    f"DELETE FROM consumer WHERE {_OVER}",
)
_LEAVE = (
    "UPDATE message SET consumer = 0 WHERE consumer = :me AND consumer <> 0",
    "DELETE FROM consumer WHERE id = :me",
)
_AFTER_REBOOT = "UPDATE delayed SET due = :now + max(0, min(delay, wall - :wall)) WHERE due > :now + delay"
_RIPEN = (
    "INSERT INTO message (queue, size, content)"
    " SELECT queue, size, content FROM delayed WHERE due <= :now ORDER BY due, id",
    "DELETE FROM delayed WHERE due <= :now",
)
_PUT = (
    "INSERT INTO message (queue, size, content)"
    " SELECT value->>0, value->>2, substr(:blob, value->>1, value->>2) FROM json_each(:rows)"
)
_PUT_DELAYED = (
    "INSERT INTO delayed (queue, size, content, due, delay, wall) SELECT value->>0, value->>2,"
    " substr(:blob, value->>1, value->>2), :now + (value->>3), value->>3, :wall + (value->>3)"
    " FROM json_each(:rows)"
)
_FRONT = (
    "WITH front AS MATERIALIZED"
    " (SELECT id, size FROM message WHERE queue = :queue AND consumer = 0 ORDER BY id LIMIT :room),"
    " some AS MATERIALIZED (SELECT id FROM"
    " (SELECT id, sum(size) OVER (ORDER BY id) - size AS before FROM front) WHERE before < :most)"
    " SELECT json_group_array(json_array(m.id, m.redelivered, m.size)), group_concat(hex(m.content), ''),"
    " (SELECT count(*) FROM front) > (SELECT count(*) FROM some)"
    " FROM some CROSS JOIN message m ON m.id = some.id"
)
_TAKE = "UPDATE message SET consumer = :me, redelivered = 1 WHERE id IN (SELECT value FROM json_each(:ids))"
# The consumer is named because what it lost to another is not its own to acknowledge.
_ACKNOWLEDGE = "DELETE FROM message WHERE consumer = :me AND id IN (SELECT value FROM json_each(:ids))"
_COUNT = (
    "WITH it AS (SELECT id FROM queue WHERE name = ?)"
    " SELECT (SELECT count(*) FROM message WHERE consumer = 0 AND queue = (SELECT id FROM it)),"
    " (SELECT count(*) FROM message WHERE consumer <> 0 AND queue = (SELECT id FROM it))"
)


def exists(path: str) -> bool:
    """Whether the file ``path`` has a broker in it.  Makes nothing."""
    asked = "SELECT count(*) FROM sqlite_master WHERE name IN ('topology', 'binding', 'delayed')"
    return look(path, lambda db: db.execute(asked).fetchone() == (3,))


class _Bell(threading.Condition):
    """Rung in this process whenever a transport of it has changed the file."""


_bells: WeakValueDictionary[str, _Bell] = WeakValueDictionary()
os.register_at_fork(after_in_child=_bells.clear)  # a lock that was held at the fork stays locked


class SqliteTransport:
    """The broker in the file ``path``.

    visibility: seconds after the last `poll` of a consumer when others get what it has not
    acknowledged.
    """

    def __init__(self, path: str, *, visibility: float = 30.0, clock: Clock | None = None) -> None:
        if sqlite3.sqlite_version_info < (3, 38):
            raise ConfigError(f"SQLite {sqlite3.sqlite_version} is too old; sqlite:// needs 3.38 or newer")
        self._path, self._visibility = path, visibility
        self._clock = clock or Clock()
        self._link: _Link | None = None
        self._inherited: list[_Link] = []
        self._tags = count(1)
        self._numbers = count(1)
        self._closed = False
        self._woken = False

    def connect(self) -> None:
        """Open the file anew; what was taken and not acknowledged is anybody's."""
        if self._closed:
            raise Closed("this transport was closed")
        self._end()
        self._link = _Link(self._path, self._visibility, self._clock, self._tags)

    def _end(self) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        if link.pid == os.getpid():
            link.end()
        else:
            # SQLite must not be used, nor closed, on the far side of a fork.
            self._inherited.append(link)

    def _connected(self) -> _Link:
        if self._closed or self._link is None or self._link.pid != os.getpid():
            self.connect()
        assert self._link is not None
        if self._link.lost is not None:
            raise type(self._link.lost)(str(self._link.lost))  # another each time: a traceback grows
        return self._link

    def declare(
        self,
        queue: str,
        exchange: str = "",
        binding: str = "#",
        *,
        kind: str = "topic",
        expires: float | None = None,
    ) -> None:
        """Make ``queue`` and bind it."""
        self._connected().declare(queue, exchange, binding)

    def consume(self, queue: str, prefetch: int, *, name: str = "") -> None:
        """Start deliveries from ``queue``; they end from the one before."""
        self._connected().consume(queue, prefetch)

    def cancel(self) -> None:
        """Stop new deliveries."""
        self._connected().prefetch = 0

    def poll(self, timeout: float) -> list[Delivery | Sent]:
        """Acknowledge, publish, and what came."""
        came = self._connected().poll(timeout, lambda: self._woken)
        self._woken = False
        return came

    def ack(self, tags: Iterable[int]) -> None:
        """Acknowledge with the next `poll`, or `close`."""
        self._connected().ack(tags)

    def send(self, publications: Sequence[Publication]) -> list[int]:
        """Publish with the next `poll`, or `close`."""
        if any(each.delay and each.exchange for each in publications):
            raise ConfigError('a publication with a delay needs exchange ""')
        link = self._connected()
        numbers = [next(self._numbers) for _ in publications]
        link.unsent.extend(zip(numbers, publications, strict=True))
        return numbers

    def depth(self, queue: str) -> int:
        """Messages in ``queue`` that are ready for delivery."""
        return self._connected().look(queue)[0]

    def taken(self, queue: str) -> bool:
        """Whether messages of ``queue`` are out."""
        return self._connected().look(queue)[1] > 0

    def wake(self) -> None:
        """From any thread; free until the next `poll` has returned."""
        if not self._woken:
            self._woken = True
            link = self._link
            if link is not None and link.pid == os.getpid():
                link.ring()

    def close(self) -> None:
        """Let go, when what was acknowledged and sent is in the file."""
        self._closed = True
        self._end()


class _Topology(NamedTuple):
    """Who gets what, as it stood at ``version``."""

    version: int
    queues: dict[str, int]
    bindings: dict[str, list[tuple[str, int]]]

    def takers(self, publication: Publication) -> set[int]:
        """The queues that take it."""
        if not publication.exchange:
            queue = self.queues.get(publication.routing_key)
            return set() if queue is None else {queue}
        bound = self.bindings.get(publication.exchange, ())
        return {queue for pattern, queue in bound if matches(pattern, publication.routing_key)}


class _Link:
    """One process's connection to the file, and what it holds of it."""

    def __init__(self, path: str, visibility: float, clock: Clock, tags: Iterator[int]) -> None:
        self.pid = os.getpid()
        self.lost: IdempError | None = None
        self.unsent: list[tuple[int, Publication]] = []
        self.prefetch = 0
        self._path, self._visibility, self._clock, self._tags = path, visibility, clock, tags
        self._me = 0
        self._renew_at = float("inf")
        self._queue = 0
        self._out: dict[int, int] = {}
        self._settled: list[int] = []
        self._sent: list[Sent] = []
        self._topology = _Topology(-1, {}, {})
        self._version = -1  # of the file, when it was last looked at
        self._look_at = 0.0  # when time alone will have changed something
        self._full = False
        self._bell = _bells.setdefault(os.path.realpath(path), _Bell())
        self._file = Held(path, self)
        self._db = self._open()
        self._file.opened()

    # ---------------------------------------------------------------- the file

    def _open(self) -> sqlite3.Connection:
        """Several processes may be making the same file at this moment."""
        deadline = self._clock.steady() + PATIENCE
        while True:
            try:
                return self._open_once()
            except sqlite3.OperationalError as error:
                if not Path(self._path).resolve().parent.is_dir():
                    raise ConfigError(f"the folder of {self._path} does not exist; make it first") from None
                if "locked" not in str(error) or self._clock.steady() >= deadline:
                    raise TransportUnavailable(f"{self._path}: {error}") from None
                self._clock.sleep(0.05)
            except sqlite3.DatabaseError as error:
                raise ConfigError(f"{self._path} is no SQLite file ({error}); name another file") from None

    def _open_once(self) -> sqlite3.Connection:
        check_place(self._path)
        db = sqlite3.connect(self._path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            for setting in _SETTINGS:
                db.execute(f"PRAGMA {setting}")
            self._set_durable(db, True)
            check_durable(self._path, db.execute)
            db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
            db.execute(_AFTER_REBOOT, {"now": self._clock.steady(), "wall": self._clock.wall()})
        except (sqlite3.Error, ConfigError):
            db.close()
            raise
        return db

    @contextmanager
    def _transaction(self, *, durable: bool) -> Iterator[sqlite3.Connection]:
        """One that is not ``durable`` survives this process, but perhaps not the power.

        To forget what a consumer took is what a power cut does anyway; it also reaches the disk with
        the next one that is durable.
        """
        db = self._db
        if not self._file.same():
            self._lose(TransportUnavailable(self._file.gone()))
        try:
            self._set_durable(db, durable)
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")
        except sqlite3.Error as error:
            self._lose(TransportUnavailable(f"{self._path}: {error}"))
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")

    def _set_durable(self, db: sqlite3.Connection, durable: bool) -> None:
        if durable != self._full:
            db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._full = durable

    def _lose(self, error: IdempError) -> None:
        self.lost = self.lost or error
        raise error

    def ring(self) -> None:
        """Let every `poll` of this process on this file look again."""
        with self._bell:
            self._bell.notify_all()

    def end(self) -> None:
        """Put in the file what was settled and sent, give back the rest."""
        try:
            if self.lost is None and (self._me or self._settled or self.unsent):
                with self._transaction(durable=bool(self._settled or self.unsent)) as db:
                    self._catch_up(db)
                    if self._me:
                        for statement in _LEAVE:
                            db.execute(statement, {"me": self._me})
        except TransportUnavailable as error:
            log.warning("closing: %s", error)
        self._db.close()
        self.ring()

    # ---------------------------------------------------------------- queues

    def declare(self, queue: str, exchange: str, binding: str) -> None:
        """Every transport reads them again when their version has changed."""
        with self._transaction(durable=True) as db:
            db.execute("INSERT OR IGNORE INTO queue (name) VALUES (?)", (queue,))
            if exchange:
                bind = "INSERT OR IGNORE INTO binding SELECT ?, ?, id FROM queue WHERE name = ?"
                db.execute(bind, (exchange, binding, queue))
            db.execute("UPDATE topology SET version = version + 1")

    def _read_topology(self, db: sqlite3.Connection, version: int) -> None:
        if version != self._topology.version:
            queues = dict(db.execute("SELECT name, id FROM queue").fetchall())
            bindings: dict[str, list[tuple[str, int]]] = defaultdict(list)
            for exchange, pattern, queue in db.execute("SELECT exchange, pattern, queue FROM binding"):
                bindings[exchange].append((pattern, queue))
            self._topology = _Topology(version, queues, dict(bindings))

    def look(self, queue: str) -> tuple[int, int]:
        """How many are ready, also by time alone, and out."""
        with self._transaction(durable=bool(self._settled or self.unsent)) as db:
            self._catch_up(db)
            self._version = -1
            ready, out = db.execute(_COUNT, (queue,)).fetchone()
            return ready, out

    # ---------------------------------------------------------------- consuming

    def consume(self, queue: str, prefetch: int) -> None:
        """From now on `poll` takes what is in ``queue``."""
        with self._transaction(durable=False) as db:
            found = db.execute("SELECT id FROM queue WHERE name = ?", (queue,)).fetchone()
            if found is None:
                self._lose(TransportUnavailable(f"{self._path}: {no_queue('', queue)}"))
            if not self._me:
                self._enter(db)
        self._queue, self.prefetch = found[0], prefetch
        self._version = -1

    def _enter(self, db: sqlite3.Connection) -> None:
        """Become a consumer, or a new one."""
        now = self._clock.steady()
        enter = "INSERT INTO consumer (until, visibility) VALUES (?, ?)"
        self._me = db.execute(enter, (now + self._visibility, self._visibility)).lastrowid or 0
        self._renew_at = now + self._visibility / 3

    def poll(self, timeout: float, woken: Callable[[], bool]) -> list[Delivery | Sent]:
        """What came."""
        until = self._clock.steady() + timeout
        while True:
            now = self._clock.steady()
            taken = self._exchange() if self._has_work(now) else []
            if taken or self._sent or woken() or now >= until:
                sent, self._sent = self._sent, []
                return [*sent, *taken]
            with self._bell:
                # Looked at again with the bell in hand, so that no ring is missed.
                if not woken() and not self._has_work(now):
                    self._bell.wait(min(_LOOK, until - now))

    def _has_work(self, now: float) -> bool:
        if self._settled or self.unsent or now >= self._renew_at:
            return True
        return self._room() > 0 and (now >= self._look_at or self._changed())

    def _room(self) -> int:
        return self.prefetch - len(self._out)

    def _changed(self) -> bool:
        """Whether another connection has committed since we last looked."""
        try:
            return bool(self._db.execute("PRAGMA data_version").fetchone()[0] != self._version)
        except sqlite3.Error as error:
            self._lose(TransportUnavailable(f"{self._path}: {error}"))
            raise

    def _exchange(self) -> list[Delivery]:
        """One transaction: settle, publish, take."""
        published = bool(self.unsent)
        with self._transaction(durable=bool(self._settled or self.unsent)) as db:
            self._catch_up(db)
            rows, content, more = self._take(db) if self._room() > 0 else ([], "", False)
        if more:
            self._look_at = 0.0
        if published:
            self.ring()
        return self._deliveries(rows, bytes.fromhex(content))

    def _catch_up(self, db: sqlite3.Connection) -> None:
        """What we have to say, and what time has brought."""
        now, wall = self._clock.steady(), self._clock.wall()
        state = db.execute(_STATE, {"me": self._me, "now": now}).fetchone()
        self._version, topology, until, others_until, due = state
        if self._me and until is None:
            if self._out or self._settled:
                silent = f"nothing was heard of this consumer for {self._visibility:g} s"
                self._lose(TransportUnavailable(f"{self._path}: {silent}; others have got its deliveries"))
            self._enter(db)
        elif now >= self._renew_at:
            renew = "UPDATE consumer SET until = ? WHERE id = ?"
            db.execute(renew, (now + self._visibility, self._me))
            self._renew_at = now + self._visibility / 3
        if self._settled:
            db.execute(_ACKNOWLEDGE, {"me": self._me, "ids": json.dumps(self._settled)})
            self._settled.clear()
        soonest = min((now + each.delay for _, each in self.unsent if each.delay), default=float("inf"))
        if self.unsent:
            self._read_topology(db, topology)
            self._put(db, now, wall)
        self._look_at = min(_or_never(others_until), _or_never(due), soonest)
        if _or_never(others_until) <= now:
            for statement in _SWEEP:
                db.execute(statement, {"now": now})
        if _or_never(due) <= now:
            for statement in _RIPEN:
                db.execute(statement, {"now": now})

    def _take(self, db: sqlite3.Connection) -> tuple[list[tuple[int, int, int]], str, bool]:
        """Ids, whether delivered before, sizes; all contents; whether there is more."""
        front = {"queue": self._queue, "room": self._room(), "most": _MOST}
        found, content, more = db.execute(_FRONT, front).fetchone()
        rows = json.loads(found)
        if rows:
            db.execute(_TAKE, {"me": self._me, "ids": json.dumps([row[0] for row in rows])})
        return rows, content or "", bool(more)

    def _deliveries(self, rows: Sequence[tuple[int, int, int]], contents: bytes) -> list[Delivery]:
        deliveries, start = [], 0
        for identity, redelivered, size in rows:
            body, properties, exchange, key = unpack(contents[start : start + size])
            start += size
            tag = next(self._tags)
            self._out[tag] = identity
            deliveries.append(Delivery(tag, body, properties, exchange, key, bool(redelivered)))
        return deliveries

    def ack(self, tags: Iterable[int]) -> None:
        """Tags of other connections are not out here."""
        out = self._out
        self._settled += [out.pop(tag) for tag in dict.fromkeys(tags) if tag in out]

    # ---------------------------------------------------------------- publishing

    def _put(self, db: sqlite3.Connection, now: float, wall: float) -> None:
        batch = _Batch()
        for number, publication in self.unsent:
            queues = self._topology.takers(publication)
            error = "" if queues else no_queue(publication.exchange, publication.routing_key)
            unfit = False
            try:
                if queues:
                    batch.add(pack(publication), queues, publication.delay)
            except (TypeError, ValueError, RecursionError) as odd:
                error, unfit = f"the message cannot be kept: {odd}", True
            self._sent.append(Sent(number, error, bool(error), unfit))
            if len(batch.blob) >= _MOST:
                batch.write(db, now, wall)
                batch = _Batch()
        batch.write(db, now, wall)
        self.unsent.clear()


def _or_never(at: float | None) -> float:
    return float("inf") if at is None else at


class _Batch:
    """Messages on their way into the file: one blob, and rows that name their places in it."""

    def __init__(self) -> None:
        self.blob = bytearray()
        self._now: list[tuple[int, int, int]] = []
        self._later: list[tuple[int, int, int, float]] = []

    def add(self, content: bytes, queues: Iterable[int], delay: float) -> None:
        """Into each of ``queues``; SQLite counts from 1."""
        start, size = len(self.blob) + 1, len(content)
        self.blob += content
        if delay:
            self._later += [(queue, start, size, delay) for queue in queues]
        else:
            self._now += [(queue, start, size) for queue in queues]

    def write(self, db: sqlite3.Connection, now: float, wall: float) -> None:
        """One statement for what is due at once, and one for what is not."""
        if self._now:
            db.execute(_PUT, {"rows": json.dumps(self._now), "blob": self.blob})
        if self._later:
            values: dict[str, Any] = {"rows": json.dumps(self._later), "blob": self.blob}
            db.execute(_PUT_DELAYED, values | {"now": now, "wall": wall})
