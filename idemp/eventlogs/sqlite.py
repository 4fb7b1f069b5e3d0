"""The event log in one SQLite file: WAL, and no sync for each batch, for no effect hangs on it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from idemp.embedded import check_place
from idemp.errors import Closed, ConfigError, StoreUnavailable
from idemp.eventlogs.sql import TABLES, Rows, SqlEventLog

PATIENCE = 10.0
"""Seconds that a batch waits for other processes."""
_SETTINGS = ("journal_mode=WAL", "synchronous=NORMAL", "cache_size=-65536", "wal_autocheckpoint=16000")


class SqliteEventLog(SqlEventLog):
    """The event log in the file ``path``."""

    def __init__(self, path: str, **told: Any) -> None:
        super().__init__(**told)
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._closed = False

    def transact(self, work: Callable[..., Any], *, writes: bool = True) -> Any:
        """See `SqlEventLog`."""
        if self._closed:
            raise Closed(f"the event log {self._path} was closed")
        try:
            db = self._db = self._db or self._connect()
            with db:
                db.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
                return work(lambda text, given: _run(db, text, given))
        except sqlite3.OperationalError as error:
            raise StoreUnavailable(f"the event log {self._path}: {error}") from None
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"the event log {self._path}: {error}; name another file") from None

    def _connect(self) -> sqlite3.Connection:
        if not Path(self._path).absolute().parent.is_dir():
            raise ConfigError(f"the event log {self._path}: there is no such folder; make it")
        check_place(self._path)
        db = sqlite3.connect(
            self._path, timeout=PATIENCE, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        for setting in _SETTINGS:
            db.execute(f"PRAGMA {setting}")
        for table in TABLES:
            db.execute(table.format(serial="INTEGER PRIMARY KEY", real="REAL"))
        return db

    def among(self, column: str) -> str:
        """See `SqlEventLog`."""
        return f"{column} IN (SELECT value FROM json_each(:ids))"

    def ids(self, ids: Iterable[str]) -> str:
        """See `SqlEventLog`."""
        return json.dumps(list(ids))

    def close(self) -> None:
        """See `idemp.ports.EventLog`."""
        with self._lock:
            self._closed = True
            if self._db is not None:
                self._db.close()
                self._db = None


def _run(db: sqlite3.Connection, text: str, given: Mapping[str, Any] | Sequence[Any]) -> Rows:
    return db.execute(text, given).fetchall()
