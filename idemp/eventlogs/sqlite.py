"""The event log in one SQLite file: WAL, and no sync for each batch, for no effect hangs on it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from idemp.embedded import check_place
from idemp.errors import Closed, ConfigError, StoreUnavailable
from idemp.eventlogs.sql import COLUMNS, EVENT, LAYOUT, TOGETHER, Execute, Rows, SqlEventLog
from idemp.held import Held

_UUID, _CONVERSATION = COLUMNS.index("uuid"), COLUMNS.index("conversation")
PATIENCE = 10.0
"""Seconds that a batch waits for other processes."""
_SETTINGS = ("journal_mode=WAL", "synchronous=NORMAL", "cache_size=-65536", "wal_autocheckpoint=16000")


class SqliteEventLog(SqlEventLog):
    """The event log in the file ``path``."""

    def __init__(self, path: str, **told: Any) -> None:
        super().__init__(**told)
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._file: Held | None = None
        self._closed = False

    def transact(self, work: Callable[..., Any], *, writes: bool = True) -> Any:
        """See `SqlEventLog`."""
        if self._closed:
            raise Closed(f"the event log {self._path} was closed")
        if self._file is not None:
            self._file.check_mine()
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
        if not Path(self._path).exists():
            self.check(0, self._path)
        if not Path(self._path).absolute().parent.is_dir():
            raise ConfigError(f"the event log {self._path}: there is no such folder; make it")
        check_place(self._path)
        file = Held(self._path, self)
        db = sqlite3.connect(
            self._path, timeout=PATIENCE, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        try:
            self._set_up(db)
        except BaseException:
            db.close()
            raise
        self._file = file
        return db

    def _set_up(self, db: sqlite3.Connection) -> None:
        self._layout(db)  # before anything is set
        for setting in _SETTINGS:
            db.execute(f"PRAGMA {setting}")
        if self._layout(db) != LAYOUT:
            with db:
                db.execute("BEGIN IMMEDIATE")
                if (layout := self._layout(db)) != LAYOUT:
                    execute = partial(_run, db)
                    self.prepare(execute, layout == 1, serial="INTEGER PRIMARY KEY", real="REAL")

    def _layout(self, db: sqlite3.Connection) -> int:
        """0 where there is none."""
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "event_layout" not in tables:
            return self.check(1 if "edge" in tables else 0, self._path)
        [layout] = db.execute("SELECT version FROM event_layout").fetchone()
        return self.check(layout, self._path)

    def insert(self, execute: Execute, events: Sequence[Any]) -> None:
        """See `SqlEventLog`.  What is the same in all is bound once: to bind is a third of the work."""
        width = len(COLUMNS)
        every = [events[place::width] for place in range(width)]
        if every[_CONVERSATION] == every[_UUID]:  # each begins its own: NULL says so
            every[_CONVERSATION] = [None] * len(every[_UUID])
        same = tuple(each.count(each[0]) == len(each) for each in every if each)
        varying = [each for each, shared in zip(every, same, strict=False) if not shared]
        values = list(chain.from_iterable(zip(*varying, strict=True)))
        for start in range(0, len(every[0]), TOGETHER):
            rows = min(TOGETHER, len(every[0]) - start)
            rest = values[(start + 1) * len(varying) : (start + rows) * len(varying)]
            execute(_insertion(same, rows), [*(each[start] for each in every), *rest])

    def alone(self, execute: Execute) -> None:
        """See `SqlEventLog`; whoever writes is alone anyway."""

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
            if self._db is not None and self._file is not None and self._file.mine():
                self._db.close()
                self._db = None


@lru_cache(maxsize=64)
def _insertion(same: tuple[bool, ...], rows: int) -> str:
    """Into ``event``, whose columns have one value for all ``rows``, the first one's, or one for each."""
    first = ", ".join("?" * len(same))
    other = ", ".join(f"?{place}" if shared else "?" for place, shared in enumerate(same, 1))
    return f"INSERT INTO {EVENT} VALUES ({first}){f', ({other})' * (rows - 1)}"


def _run(db: sqlite3.Connection, text: str, given: Mapping[str, Any] | Sequence[Any]) -> Rows:
    return db.execute(text, given).fetchall()
