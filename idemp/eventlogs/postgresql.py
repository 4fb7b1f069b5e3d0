"""The event log in a PostgreSQL database, in a schema of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec

from idemp.errors import Closed, ConfigError, MissingExtra, StoreUnavailable
from idemp.eventlogs.sql import COLUMNS, EVENT, LAYOUT, TYPES, Execute, SqlEventLog
from idemp.settings import hidden
from idemp.tls import tls_fix

try:
    import psycopg
    from psycopg import errors
except ImportError:
    raise MissingExtra("an event log at postgresql://", "postgresql") from None

SCHEMA = "idemp_events"
TIMEOUT = 10
"""Seconds that the server has for a connection, and for a statement."""
_LOCK, _NOTING = 0x1DE3_17AC, 0x1DE3_17AD
TOGETHER = 1_000
"""Events in a statement."""
_KINDS = {name: kind.format(real="DOUBLE PRECISION") for name, kind in TYPES.items()}
_VALUES = (f"(each->>{place})::{_KINDS.get(name, 'TEXT')}" for place, name in enumerate(COLUMNS))
_INSERT = f"INSERT INTO {EVENT} SELECT {', '.join(_VALUES)} FROM jsonb_array_elements(?::jsonb) each"
_NAMED = re.compile(r"(?<![:\w]):(\w+)")


class PostgresqlEventLog(SqlEventLog):
    """The event log in the database at ``url``."""

    GREATEST = "greatest"
    UNFIT = (*SqlEventLog.UNFIT, psycopg.DataError)

    def __init__(self, url: str, **told: Any) -> None:
        super().__init__(**told)
        self._url, self._shown = url, hidden(url)
        self._db: psycopg.Connection[tuple[Any, ...]] | None = None
        self._closed = False

    def transact(self, work: Callable[..., Any], *, writes: bool = True) -> Any:
        """See `SqlEventLog`."""
        if self._closed:
            raise Closed(f"the event log {self._shown} was closed")
        try:
            db = self._db = self._db or self._connect()
            with db.transaction():
                return work(lambda text, given: _run(db, text, given))
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            self._drop()
            raise StoreUnavailable(f"the event log {self._shown}: {_line(error)}") from None
        except errors.InsufficientPrivilege as error:
            self._drop()
            raise ConfigError(f"the event log {self._shown}: {_line(error)}; grant it to this user") from None

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        try:
            db = psycopg.connect(self._url, connect_timeout=TIMEOUT, autocommit=True)
        except psycopg.ProgrammingError as error:
            raise ConfigError(f"the event log {self._shown}: {self._unread(_line(error))}") from None
        try:
            self._set_up(db)
        except BaseException:
            db.close()
            raise
        return db

    def _unread(self, said: str) -> str:
        """What the library says of a URL, without what it quotes of it: an option's name, or a password."""
        options = dict(parse_qsl(urlsplit(self._url).query))
        return re.sub('"(.*)"', lambda quoted: quoted[0] if quoted[1] in options else '"***"', said)

    def _set_up(self, db: psycopg.Connection[tuple[Any, ...]]) -> None:
        with db.transaction():
            db.execute(f"SET statement_timeout = {TIMEOUT * 1000}")
            db.execute(f"SELECT pg_advisory_xact_lock({_LOCK})")  # of two who make them at once one waits
            if (layout := self._layout(db)) != LAYOUT:
                db.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
                db.execute(f"SET LOCAL search_path = {SCHEMA}")
                serial = "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY"
                self.prepare(partial(_run, db), layout == 1, serial=serial, real="DOUBLE PRECISION")
        db.execute(f"SET search_path = {SCHEMA}")

    def _layout(self, db: psycopg.Connection[tuple[Any, ...]]) -> int:
        """0 where there is none."""
        asked = [f"{SCHEMA}.edge", f"{SCHEMA}.event_layout"]
        [(edge, layout)] = db.execute("SELECT to_regclass(%s), to_regclass(%s)", asked).fetchall()
        if layout is None:
            return self.check(0 if edge is None else 1, self._shown)
        [(version,)] = db.execute(f"SELECT version FROM {SCHEMA}.event_layout").fetchall()
        return self.check(version, self._shown)

    def _drop(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.close()

    def insert(self, execute: Execute, events: Sequence[Any]) -> None:
        """See `SqlEventLog`.  As one document: to send each value by itself is most of the work."""
        width = len(COLUMNS)
        for start in range(0, len(events), width * TOGETHER):
            part = iter(events[start : start + width * TOGETHER])
            rows = msgspec.json.encode(list(zip(*[part] * width, strict=True)))
            execute(_INSERT, [rows.decode()])

    def alone(self, execute: Execute) -> None:
        """See `SqlEventLog`."""
        execute(f"SELECT pg_advisory_xact_lock({_NOTING})", ())

    def among(self, column: str) -> str:
        """See `SqlEventLog`."""
        return f"{column} = ANY(:ids)"

    def ids(self, ids: Iterable[str]) -> list[str]:
        """See `SqlEventLog`."""
        return list(ids)

    def close(self) -> None:
        """See `idemp.ports.EventLog`."""
        with self._lock:
            self._closed = True
            self._drop()


def _run(db: psycopg.Connection[tuple[Any, ...]], text: str, given: Any) -> list[tuple[Any, ...]]:
    text = _NAMED.sub(r"%(\1)s", text) if isinstance(given, dict) else text.replace("?", "%s")
    cursor = db.execute(text, given)
    return cursor.fetchall() if cursor.description else []


def _line(error: BaseException) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return said + tls_fix(said, over=False)
