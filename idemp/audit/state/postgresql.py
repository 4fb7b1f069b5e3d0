"""The auditor's state in a PostgreSQL database, in a schema of its own.

The auditor holds an advisory lock, which its connection takes with it when it goes; and it writes over no
other connection.  So of two auditors one is refused, and one that was away writes nothing before it is alone
again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from idemp.audit.state.sql import Execute, Rows, SqlState, be_born, migrations
from idemp.errors import Closed, ConfigError, MissingExtra
from idemp.ports import Clock

try:
    import psycopg
    from psycopg import errors

    from idemp.stores.postgresql_errors import explain
    from idemp.stores.postgresql_line import Connection, Line, Place, Tables, exists, watch
except ImportError:
    raise MissingExtra("a state at postgresql://", "postgresql") from None

T = TypeVar("T")

PATIENCE = 10.0
"""Seconds that the server has for a transaction."""
WAIT = 8
"""Seconds for another auditor to be gone; longer than `_ALIVE` takes to see that its host is."""
_ALIVE = {"tcp_keepalives_idle": 3, "tcp_keepalives_interval": 1, "tcp_keepalives_count": 2}

TABLES = Tables(
    "idempaudit_",
    migrations(
        "{s}.",
        serial="bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
        real="double precision",
        bytes="bytea",
    ),
    "idemp audit init URL",
)


class PostgresqlState(SqlState):
    """The state in the namespace ``place``.  reading: see `idemp.audit.state.open_state`."""

    def __init__(self, place: Place, *, reading: bool = False) -> None:
        self._place, self._reading = place, reading
        self._line = Line(place, Clock())
        self._mine: Connection | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=watch, args=([self._line], self._closed), name="idemp-audit-watch", daemon=True
        )
        self._thread.start()

    def transact(self, work: Callable[[Execute], T], *, writes: bool = True) -> T:
        """See `SqlState`."""
        if self._closed.is_set():
            raise Closed(f"the state {self._place.shown} was closed")
        try:
            if self._reading and self._mine is None and not exists(self._place):
                raise ConfigError(
                    f"{self._place.shown} has no state in namespace {self._place.namespace!r}:"
                    " has `idemp audit run` been started on it?"
                )
            with self._line.use(PATIENCE) as db:
                if db is not self._mine:
                    self._take(db)
                if not writes:
                    return work(partial(_run, db))
                with db.transaction():
                    return work(partial(_run, db))
        except psycopg.Error as error:
            raise explain(self._place, error) from None

    def _take(self, db: Connection) -> None:
        """What a new connection needs, before anything is read or written over it."""
        schema = self._place.schema
        if self._line.pooled:
            raise ConfigError(
                f"{self._place.shown} is a pooler, behind which nobody knows who is connected;"
                " name the server itself as state"
            )
        db.execute(f"SET search_path = {schema}".encode())
        if self._reading:
            db.execute("SET default_transaction_read_only = on")
        else:
            for setting, value in {**_ALIVE, "lock_timeout": f"'{WAIT}s'"}.items():
                db.execute(f"SET {setting} = {value}".encode())
            try:
                db.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [f"auditor of {schema}"])
            except errors.LockNotAvailable:
                raise ConfigError(
                    f"another auditor is using {self._place.shown}; stop it, or name another namespace"
                ) from None
            with db.transaction():
                be_born(partial(_run, db))
        self._mine = db

    def among(self, column: str) -> str:
        """See `SqlState`."""
        return f"{column} = ANY(?)"

    def texts(self, texts: Iterable[str]) -> list[str]:
        """See `SqlState`."""
        return list(texts)

    def close(self) -> None:
        """See `SqlState`."""
        self._closed.set()
        self._thread.join(PATIENCE)
        self._line.drop()


def _run(db: Connection, text: str, given: Sequence[Any]) -> Rows:
    cursor = db.execute(text.replace("?", "%s").encode(), given)
    return cursor.fetchall() if cursor.description else []
