"""The database of a service: SQLite or PostgreSQL, which is also idemp's store, inbox and outbox."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from idemp import ConfigError, open_store
from idemp.ports import Inbox, Transaction

T = TypeVar("T")

PATIENCE = 5.0
"""Seconds that a transaction waits for others."""
_RETENTION = "3650d"
"""Of what is done: an entry of the stream may be read again as long as the stream keeps it."""


class Rows:
    """SQL on a connection of either driver: one placeholder, ``?``."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._sqlite = hasattr(connection, "executescript")

    def all(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of a query."""
        return list(self._execute(sql, values).fetchall())

    def one(self, sql: str, *values: Any) -> tuple[Any, ...] | None:
        """The first row."""
        found = self._execute(sql, values).fetchone()
        return None if found is None else tuple(found)

    def do(self, sql: str, *values: Any) -> int:
        """A change; how many rows it changed."""
        return int(self._execute(sql, values).rowcount)

    def make(self, tables: Sequence[str]) -> None:
        """Make tables, one process at a time.  ``SERIAL`` is a number that grows and never comes again."""
        kind = "INTEGER PRIMARY KEY AUTOINCREMENT" if self._sqlite else "BIGSERIAL PRIMARY KEY"
        if not self._sqlite:
            self._connection.execute("SELECT pg_advisory_xact_lock(5129)")
        for table in tables:
            self._connection.execute(f"CREATE TABLE IF NOT EXISTS {table.replace('SERIAL', kind)}")

    def _execute(self, sql: str, values: Sequence[Any]) -> Any:
        if not self._sqlite:
            sql = sql.replace("%", "%%").replace("?", "%s")
        return self._connection.execute(sql, values)


class Database:
    """Tables and transactions of the service ``service``, at ``url``."""

    def __init__(self, url: str, service: str) -> None:
        scheme, query = urlsplit(url).scheme, urlsplit(url).query
        if scheme not in ("sqlite", "postgresql", "postgres"):
            raise ConfigError("DATABASE_URL: write it like sqlite:///app.db or postgresql://host/database")
        more = f"retention={_RETENTION}" + ("" if scheme == "sqlite" else f"&namespace={service}")
        self.store = cast(Inbox, open_store(f"{url}{'&' if query else '?'}{more}"))

    def begin(self, work: Callable[[Rows], T]) -> T:
        """What ``work`` returned, committed.  It may be called again, so it must bear that."""

        def within(transaction: Transaction) -> T:
            return work(Rows(transaction.connection))

        return self.store.transaction(within, PATIENCE)

    def close(self) -> None:
        """Let go."""
        self.store.close()
