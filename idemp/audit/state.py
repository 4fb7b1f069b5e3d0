"""What the auditor knows, in an SQLite file (WAL, synchronous=FULL): rows, counts, what is not told yet."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from idemp.embedded import alone, check_durable, check_place
from idemp.errors import ConfigError, StoreUnavailable

PATIENCE = 10.0
"""Seconds that a transaction waits for those of others."""
REMEMBERED = 100_000
"""Ids of reports that are remembered, so that one that comes again is known."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS row (name TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS unsent
    (number INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS count (name TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS taken (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS audit (id TEXT NOT NULL, looked REAL, tick REAL);
"""


class AuditState:
    """The file ``path``.  Raises `ConfigError` if it cannot be one, else `StoreUnavailable` all along.

    reading: only look; then a file that is not there is a `ConfigError`, and nothing is changed.
    """

    def __init__(self, path: str, *, reading: bool = False) -> None:
        self._path = path
        if reading and not Path(path).exists():
            raise ConfigError(f"there is no file {path}: has `idemp audit run` been started here?")
        check_place(path)
        self._lock = None if reading else alone(path, "another auditor is using", "state")
        with self._explained():
            self._db = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
            try:
                if reading:
                    self._db.execute("PRAGMA query_only=ON")
                else:
                    self._make()
            except BaseException:
                self.close()
                raise

    def _make(self) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        check_durable(self._path, self._db.execute)
        self._db.executescript(_SCHEMA)
        self._db.execute(
            "INSERT INTO audit (id) SELECT ? WHERE NOT EXISTS (SELECT * FROM audit)", (uuid4().hex,)
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if "not a database" in str(error):
                raise ConfigError(f"{self._path} is no SQLite file; name another one as state") from None
            if "no such table" in str(error):
                raise ConfigError(f"{self._path} is not the state of an audit") from None
            raise StoreUnavailable(f"{self._path}: {error}") from None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    # ---------------------------------------------------------------- rows

    def rows(self) -> list[tuple[str, str]]:
        """All that was kept: name, text."""
        with self._explained():
            return self._db.execute("SELECT name, text FROM row").fetchall()

    def save(
        self,
        rows: Sequence[tuple[str, str | None]],
        reports: Sequence[bytes] = (),
        *,
        at: float = 0.0,
        counts: Mapping[str, int] | None = None,
        taken: Sequence[str] = (),
        tick: float | None = None,
    ) -> None:
        """All of it durably, or nothing: rows replace those of their name, reports wait to be sent.

        A row without text is forgotten.  at: now, in seconds since 1970.  counts: added to.  taken: ids of
        what came.  tick: seconds to the next look, if this was one.
        """
        kept = [(name, text) for name, text in rows if text is not None]
        gone = [(name,) for name, text in rows if text is None]
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO row VALUES (?, ?)", kept)
            self._db.executemany("DELETE FROM row WHERE name = ?", gone)
            self._db.executemany("INSERT OR IGNORE INTO taken (id) VALUES (?)", [(id,) for id in taken])
            self._db.executemany(
                "INSERT INTO unsent (body, at) VALUES (?, ?)", [(body, at) for body in reports]
            )
            self._db.executemany(
                "INSERT INTO count VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET n = n + excluded.n",
                list((counts or {}).items()),
            )
            if tick is not None:
                newest = "(SELECT max(number) FROM taken)"
                self._db.execute(f"DELETE FROM taken WHERE number <= {newest} - ?", (REMEMBERED,))
                self._db.execute("UPDATE audit SET looked = ?, tick = ?", (at, tick))

    def known(self, ids: Sequence[str]) -> set[str]:
        """Those of ``ids`` that were taken before."""
        ask = "SELECT id FROM taken WHERE id IN (SELECT value FROM json_each(?))"
        with self._explained():
            return {id for (id,) in self._db.execute(ask, (json.dumps(ids),))}

    def forget(self, names: Sequence[str]) -> None:
        """Rows that nobody asks for any more."""
        with self._transaction():
            self._db.executemany("DELETE FROM row WHERE name = ?", [(name,) for name in names])

    def counts(self) -> dict[str, int]:
        """All counters."""
        with self._explained():
            return dict(self._db.execute("SELECT name, n FROM count ORDER BY name").fetchall())

    def looked(self) -> tuple[float, float] | None:
        """When the auditor last judged, in seconds since 1970, and its tick; None if it never did."""
        with self._explained():
            looked, tick = self._db.execute("SELECT looked, tick FROM audit").fetchone()
        return None if looked is None else (looked, tick)

    # ---------------------------------------------------------------- what is not told yet

    def oldest(self) -> tuple[str, bytes, float] | None:
        """Of what is not told yet: an id that stays its own, the body, and when that was."""
        ask = "SELECT id || '-' || number, body, at FROM unsent, audit ORDER BY number LIMIT 1"
        with self._explained():
            found: tuple[str, bytes, float] | None = self._db.execute(ask).fetchone()
        return found

    def told(self, name: str) -> None:
        """The one with this id is safe in a queue."""
        with self._transaction():
            self._db.execute("DELETE FROM unsent WHERE number = ?", (int(name.rpartition("-")[2]),))

    def unsent(self) -> int:
        """How many are not told yet."""
        with self._explained():
            return int(self._db.execute("SELECT count(*) FROM unsent").fetchone()[0])

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
