"""What the auditor knows, in an SQLite file (WAL, synchronous=FULL): rows, counts, what is not told yet."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from idemp.embedded import check_durable, check_place
from idemp.errors import ConfigError, StoreUnavailable

PATIENCE = 10.0
"""Seconds that a transaction waits for those of others."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS row (name TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS unsent
    (number INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS count (name TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID;
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
        self._lock = None if reading else _locked(path)
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
        rows: Sequence[tuple[str, str]],
        reports: Sequence[bytes] = (),
        *,
        at: float = 0.0,
        counts: Mapping[str, int] | None = None,
        tick: float | None = None,
    ) -> None:
        """All of it durably, or nothing: rows replace those of their name, reports wait to be sent.

        at: now, in seconds since 1970.  counts: added to.  tick: seconds to the next look, if this was one.
        """
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO row VALUES (?, ?)", rows)
            self._db.executemany(
                "INSERT INTO unsent (body, at) VALUES (?, ?)", [(body, at) for body in reports]
            )
            self._db.executemany(
                "INSERT INTO count VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET n = n + excluded.n",
                list((counts or {}).items()),
            )
            if tick is not None:
                self._db.execute("UPDATE audit SET looked = ?, tick = ?", (at, tick))

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


def _locked(path: str) -> int:
    """Mine until it is closed, or this process is gone.  Raises `ConfigError` if it is another's."""
    try:
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"{path}.lock cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ConfigError(
            f"another auditor is using {path}; stop it, or name another file as state"
        ) from None
    return lock
