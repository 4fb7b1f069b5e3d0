"""What one process has counted, in an SQLite file (WAL): each id in the bucket of time of its message.

A batch is one transaction.  Once it has returned, the batch outlives a kill of the process.  It does not
wait for the disk (synchronous=NORMAL), so a power loss may take the last batches: after one, every
bucket begun before is unsure, for good.

A type is kept in small letters, for the auditor's fields have theirs in any case: what differs in nothing
else is one type.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from idemp.audit.tally import ANY, SLICES, Tally, hashed, slice_of
from idemp.embedded import alone as only_one
from idemp.embedded import check_place, explained
from idemp.errors import ConfigError
from idemp.held import Held
from idemp.ports import Ran

PATIENCE = 10.0
"""Seconds that a transaction waits for another's."""
TOGETHER = 5000
"""Ids that are forgotten, or buckets that are told, at a time."""

# Ids come in no order, so that a batch touches many pages: they are written back seldom, and kept at hand.
_SETTINGS = ("journal_mode=WAL", "synchronous=NORMAL", "cache_size=-65536", "wal_autocheckpoint=16000")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta
    (instance TEXT, number INTEGER, born REAL, length INTEGER, boot TEXT, open INTEGER, gap REAL,
    no_time INTEGER, arrived INTEGER);
CREATE TABLE IF NOT EXISTS tally
    (kind TEXT, start INTEGER, n INTEGER, checksum TEXT, unsure INTEGER, version INTEGER, told INTEGER,
    PRIMARY KEY (kind, start)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ran
    (start INTEGER, kind TEXT, id TEXT, n INTEGER, unsure INTEGER,
    PRIMARY KEY (start, kind, id)) WITHOUT ROWID;
"""
_RAN = """
INSERT INTO ran SELECT value->>0, value->>1, value->>2, value->>3, value->>4 FROM json_each(?) WHERE true
ON CONFLICT DO UPDATE SET n = n + excluded.n, unsure = unsure + excluded.unsure
"""
_TALLY = """
INSERT INTO tally VALUES (?, ?, ?, ?, ?, 1, 0)
ON CONFLICT DO UPDATE SET n = excluded.n, checksum = excluded.checksum, unsure = excluded.unsure,
version = version + 1
"""


_Row = tuple[int, str, str, int, int]
"""Bucket, type, id, times, how often unsure."""


class Changed(NamedTuple):
    """Buckets that are to be told, in report ``number``; versions: what `told` is to be given then.

    through: seconds since 1970; of those that end before, none is left out.  first: no report is known to
    have arrived.  untimed: messages so far that did not say when they were published.
    """

    number: int
    through: float
    first: bool
    untimed: int
    tallies: Mapping[str, Mapping[int, Tally]]
    versions: Sequence[tuple[int, str, int]]


class Tallies:
    """The file ``path``, of one process at a time.

    length: seconds in a bucket, the same for all whose copies are compared.  alone: false for a look, or a
    correction, beside that process.  Raises `ConfigError` if the
    file cannot be one, else `StoreUnavailable` all along.
    """

    def __init__(
        self, path: str, *, length: int = 60, alone: bool = True, wall: Callable[[], float] = time.time
    ) -> None:
        if length < 1:
            raise ConfigError(f"length={length}: a bucket has at least one second")
        self.path, self._wall = path, wall
        self._local = threading.local()
        self._opened: list[sqlite3.Connection] = []
        check_place(path)
        self._file = Held(path, self)
        self._lock = only_one(path, "another process counts in", "tallies") if alone else None
        try:
            self._open(length)
        except BaseException:
            self._let_go()
            raise

    def _open(self, length: int) -> None:
        path, wall = self.path, self._wall
        with self._transaction() as db:
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            found = db.execute("SELECT instance, born, length, boot, open, gap FROM meta").fetchone()
            boot = _boot_id()
            if found is None:
                row = (uuid4().hex, 0, wall(), length, boot, 1, 0.0, 0)
                db.execute("INSERT INTO meta VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0)", row)
                found = (row[0], row[2], length, boot, 0, 0.0)
            self.instance, self.born, self.length, before, left_open, self._gap = found
            if self.length != length:
                raise ConfigError(
                    f"{path} has buckets of {self.length} s, not of {length} s; name another file"
                )
            if left_open and before != boot:
                self._gap = wall()
                db.execute("UPDATE tally SET version = version + 1")  # all of them are unsure now
            db.execute("UPDATE meta SET open = 1, boot = ?, gap = ?", (boot, self._gap))
            self._renew(db)
        self._db().execute("PRAGMA wal_checkpoint(FULL)")  # that it is open is on disk

    def _renew(self, db: sqlite3.Connection) -> None:
        """A file of before may have types as they were spelled."""
        for kind, first in db.execute("SELECT kind, min(start) FROM tally GROUP BY kind").fetchall():
            if kind != kind.lower():
                db.execute("DELETE FROM tally WHERE kind = ?", (kind,))
                take = "DELETE FROM ran WHERE start >= ? AND kind = ? RETURNING start, id, n, unsure"
                rows = db.execute(take, (first, kind)).fetchall()
                self._change(db, [(start, kind.lower(), *row) for start, *row in rows])

    # ---------------------------------------------------------------- counting

    def add(self, runs: Sequence[Ran]) -> None:
        """Count them; a message without a time is in no bucket, and counted as such."""
        counted = [(int(each.at // self.length) * self.length, each) for each in runs if each.at is not None]
        with self._transaction() as db:
            rows = [row for place, each in counted if (row := self._row(db, place, each))]
            self._change(db, rows)
            if len(counted) < len(runs):
                db.execute("UPDATE meta SET no_time = no_time + ?", (len(runs) - len(counted),))

    def _row(self, db: sqlite3.Connection, place: int, run: Ran) -> _Row | None:
        """What is counted of one; None if it is what was counted here before its process was killed."""
        kind = run.type.lower()
        if not (run.unsure or run.found):
            return place, kind, run.id, 1, 0
        ask = "SELECT 1 FROM ran WHERE start = ? AND kind = ? AND id = ?"
        known = db.execute(ask, (place, kind, run.id)).fetchone() is not None
        if run.found:  # it is there once, and counted by who made it, unless he was killed before
            return None if known else (place, kind, run.id, 0, 1)
        return place, kind, run.id, 1, int(not known)

    def correct(self, kind: str, id: str, times: int, at: float | None = None) -> tuple[int, int]:
        """A person says: the effect of ``id`` is there so many times.  How many were counted, and the bucket.

        at: when it was published, in seconds since 1970, for an id that is not counted here.  Raises
        `ConfigError` if it is not and ``at`` is None.
        """
        kind = kind.lower()
        with self._transaction() as db:
            found = db.execute(
                "SELECT start, n, unsure FROM ran WHERE kind = ? AND id = ?", (kind, id)
            ).fetchone()
            if found is None and at is None:
                raise ConfigError(f"{id!r} is not counted in {self.path}; say --at, when it was published")
            place, n, unsure = found or (int((at or 0.0) // self.length) * self.length, 0, 0)
            self._change(db, [(place, kind, id, times - n, -unsure)])
            db.execute("DELETE FROM ran WHERE start = ? AND kind = ? AND id = ? AND n = 0", (place, kind, id))
        return n, place

    def _change(self, db: sqlite3.Connection, rows: Sequence[_Row]) -> None:
        tallies: dict[tuple[str, int], Tally] = {}
        for place, kind, id, times, unsure in rows:
            before = tallies.get((kind, place))
            if before is None:
                before = _tally(db, kind, place)
            tallies[kind, place] = before.plus(hashed(id), times, unsure)
        db.execute(_RAN, (json.dumps(rows),))
        written = [(*key, each.count, f"{each.checksum:032x}", each.unsure) for key, each in tallies.items()]
        db.executemany(_TALLY, written)

    # ---------------------------------------------------------------- telling

    def changed(self, *, ending: bool = False) -> Changed:
        """The closed buckets that are not told as they are now, the oldest first; all that are, if ending."""
        with self._transaction() as db:
            through = self._wall()
            last = 2**62 if ending else through - self.length
            rows = db.execute(
                "SELECT kind, start, n, checksum, unsure, version FROM tally"
                " WHERE version > told AND start <= ? ORDER BY start LIMIT ?",
                (last, TOGETHER + 1),
            ).fetchall()
            if len(rows) > TOGETHER:
                through = float(rows.pop()[1])
            count = "UPDATE meta SET number = number + 1 RETURNING number, arrived, no_time"
            number, arrived, untimed = db.execute(count).fetchone()
        tallies: dict[str, dict[int, Tally]] = {}
        for kind, place, *counted, _ in rows:
            tallies.setdefault(kind, {})[place] = self._honest(place, *counted)
        versions = [(version, kind, place) for kind, place, *_, version in rows]
        return Changed(number, through, not arrived, untimed, tallies, versions)

    def told(self, versions: Sequence[tuple[int, str, int]]) -> None:
        """A report with these is safe in a queue."""
        with self._transaction() as db:
            db.executemany("UPDATE tally SET told = ? WHERE kind = ? AND start = ?", versions)
            db.execute("UPDATE meta SET arrived = 1")

    def _honest(self, place: int, n: int, checksum: str, unsure: int) -> Tally:
        return Tally(n, int(checksum, 16), unsure + (ANY if place <= self._gap else 0))

    # ---------------------------------------------------------------- being asked

    def buckets(self, kind: str) -> dict[int, Tally]:
        """All of them, also the one that is not closed yet."""
        ask = "SELECT start, n, checksum, unsure FROM tally WHERE kind = ? ORDER BY start"
        with explained(self.path):
            return {
                place: self._honest(place, *row) for place, *row in self._db().execute(ask, (kind.lower(),))
            }

    def slices(self, kind: str, start: int) -> dict[int, Tally]:
        """The ids of a bucket by the slice that they fall into."""
        found = dict.fromkeys(range(SLICES), Tally())
        for id, n, unsure in self._ids(kind, start, ""):
            hash = hashed(id)
            found[slice_of(hash)] = found[slice_of(hash)].plus(hash, n, unsure)
        return found

    def ids(
        self, kind: str, start: int, slices: Collection[int], after: str, limit: int
    ) -> tuple[list[tuple[str, int, int]], bool]:
        """Id, times, how often unsure, in order from the first one > ``after``; whether there are more."""
        found: list[tuple[str, int, int]] = []
        for row in self._ids(kind, start, after):
            if slice_of(hashed(row[0])) in slices:
                if len(found) == limit:
                    return found, True
                found.append(row)
        return found, False

    def _ids(self, kind: str, start: int, after: str) -> Iterator[tuple[str, int, int]]:
        ask = "SELECT id, n, unsure FROM ran WHERE start = ? AND kind = ? AND id > ? ORDER BY id"
        with explained(self.path):
            yield from self._db().execute(ask, (start, kind.lower(), after))

    # ---------------------------------------------------------------- the file

    def forget(self, before: float) -> None:
        """Buckets that begin before, in seconds since 1970; a part of them, if there are many ids."""
        oldest = "SELECT start, kind, id FROM ran WHERE start < ? ORDER BY start LIMIT ?"
        with self._transaction() as db:
            db.execute(f"DELETE FROM ran WHERE (start, kind, id) IN ({oldest})", (before, TOGETHER))
            db.execute("DELETE FROM tally WHERE start < ?", (before,))

    def close(self) -> None:
        """Let go of the file; what was counted is on disk."""
        try:
            if self._lock is not None:
                with explained(self.path):
                    self._db().execute("PRAGMA wal_checkpoint(FULL)")
                with self._transaction() as db:
                    db.execute("UPDATE meta SET open = 0")
        finally:
            self._let_go()

    def _let_go(self) -> None:
        for each in self._opened if self._file.mine() else ():
            each.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _db(self) -> sqlite3.Connection:
        """Of this thread."""
        self._file.check_mine()
        db: sqlite3.Connection | None = getattr(self._local, "db", None)
        if db is None:
            db = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
            self._opened.append(db)
            for setting in _SETTINGS:
                db.execute(f"PRAGMA {setting}")
            self._local.db = db
        return db

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with explained(self.path):
            db = self._db()
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")


def _tally(db: sqlite3.Connection, kind: str, place: int) -> Tally:
    ask = "SELECT n, checksum, unsure FROM tally WHERE kind = ? AND start = ?"
    found = db.execute(ask, (kind, place)).fetchone()
    return Tally() if found is None else Tally(found[0], int(found[1], 16), found[2])


def _boot_id() -> str:
    """Names this run of the host."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return uuid4().hex  # nobody can say: every start without an orderly end counts as a power loss
