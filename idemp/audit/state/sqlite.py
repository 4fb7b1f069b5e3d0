"""The auditor's state in one SQLite file: WAL, synchronous=FULL."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from idemp.audit.state.sql import Execute, Rows, SqlState, be_born, migrations
from idemp.embedded import alone, check_durable, check_place, explained
from idemp.errors import Closed, ConfigError
from idemp.held import Held

T = TypeVar("T")

PATIENCE = 10.0
"""Seconds that a transaction waits for those of others."""
_VERSIONS = migrations("", serial="INTEGER PRIMARY KEY AUTOINCREMENT", real="REAL", bytes="BLOB")


class SqliteState(SqlState):
    """The file ``path``.  reading: see `idemp.audit.state.open_state`."""

    def __init__(self, path: str, *, reading: bool = False) -> None:
        self._path, self._reading = path, reading
        self._lock: int | None = None
        self._db: sqlite3.Connection | None = None
        self._file: Held | None = None
        self._closed = False

    def transact(self, work: Callable[[Execute], T], *, writes: bool = True) -> T:
        """See `SqlState`."""
        if self._closed:
            raise Closed(f"the state {self._path} was closed")
        if self._file is not None:
            self._file.check_mine()
        with explained(self._path):
            db = self._db = self._db or self._connect()
            if not writes:
                return work(partial(_run, db))
            with db:
                db.execute("BEGIN IMMEDIATE")
                return work(partial(_run, db))

    def _connect(self) -> sqlite3.Connection:
        path = self._path
        if self._reading and not Path(path).exists():
            raise ConfigError(f"there is no file {path}: has `idemp audit run` been started here?")
        if not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"the folder of {path} does not exist; make it, or name another file")
        if Path(path).is_dir():
            raise ConfigError(f"{path} is a folder; name a file in it")
        check_place(path)
        if not self._reading and self._lock is None:
            self._lock = alone(path, "another auditor is using", "state")
        file = Held(path, self)
        db = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            self._check(db)
        except BaseException:
            db.close()
            raise
        self._file = file
        return db

    def _check(self, db: sqlite3.Connection) -> None:
        if self._reading:
            db.execute("PRAGMA query_only=ON")
        else:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            check_durable(self._path, db.execute)
        [version] = db.execute("PRAGMA user_version").fetchone()
        if version > len(_VERSIONS):
            raise ConfigError(f"{self._path} is of a newer idemp (version {version}); upgrade idemp")
        foreign = version == 0 and db.execute("SELECT * FROM sqlite_master").fetchone()
        if foreign or (self._reading and version == 0):
            raise ConfigError(f"{self._path} is not the state of an audit; name another file")
        if not self._reading:
            self._renew(db, version)

    def _renew(self, db: sqlite3.Connection, version: int) -> None:
        with db:
            db.execute("BEGIN IMMEDIATE")
            for text in [text for new in _VERSIONS[version:] for text in new]:
                db.execute(text)
            be_born(partial(_run, db))
            db.execute(f"PRAGMA user_version={len(_VERSIONS)}")

    def among(self, column: str) -> str:
        """See `SqlState`."""
        return f"{column} IN (SELECT value FROM json_each(?))"

    def texts(self, texts: Iterable[str]) -> str:
        """See `SqlState`."""
        return json.dumps(list(texts))

    def close(self) -> None:
        """See `SqlState`."""
        self._closed = True
        if self._db is not None and self._file is not None and self._file.mine():
            self._db.close()
        if self._lock is not None:
            os.close(self._lock)
        self._db = self._lock = None


def _run(db: sqlite3.Connection, text: str, given: Sequence[object]) -> Rows:
    return db.execute(text, given).fetchall()
