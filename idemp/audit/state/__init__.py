"""What the auditor knows, where it outlives it: a file, or a PostgreSQL database.  And the door to it."""

from __future__ import annotations

from typing import Any

from idemp.audit.state.sql import SqlState
from idemp.errors import ConfigError
from idemp.settings import hidden, namespace_in, options, split, sqlite_path
from idemp.tls import FILES

__all__ = ["SqlState", "init_state", "open_state"]

_OPTIONS = {
    "namespace": "orders",
    "unsafe_durability": "true",
    "sslmode": "verify-full",
    **FILES,
}


def open_state(place: str, *, reading: bool = False) -> SqlState:
    """The state at ``place``; nothing connects before its first use.

    place: a file, ``sqlite:///audit.db``, or ``postgresql://user:password@host/database?namespace=orders``
    with ``sslmode``, ``ca``, ``cert``, ``key`` and ``unsafe_durability``, as stores have them.
    reading: only look, beside the auditor whose state it is; then one that is not there is a
    `ConfigError`, and nothing is changed.  Raises `ConfigError`.
    """
    if "://" not in place:
        return _sqlite(place, reading)
    parts = split(place)
    match parts.scheme:
        case "sqlite":
            options(parts, {})
            return _sqlite(sqlite_path(parts), reading)
        case "postgresql" | "postgres":
            from idemp.audit.state.postgresql import PostgresqlState

            return PostgresqlState(_postgresql(place), reading=reading)
    raise ConfigError(
        f"there is no state for {hidden(place)!r}; use audit.db, sqlite:///audit.db or postgresql://host/database"
    )


def init_state(url: str, grant: str = "") -> str:
    """Make or renew the tables of a state in PostgreSQL; what was done, in a sentence.

    grant: the role that the auditor uses, which gets the rights on them.  Raises `ConfigError`,
    `StoreUnavailable`.
    """
    parts = split(url)
    if parts.scheme not in ("postgresql", "postgres"):
        raise ConfigError(
            f"only postgresql:// has tables that somebody must make; {parts.scheme}:// has none"
        )
    from idemp.stores.postgresql import init

    new = init(_postgresql(url), grant)
    made = f"its tables are at version {new[-1]} now" if new else "its tables were there already"
    return f"{made}; {grant} may use them" if grant else made


def _sqlite(path: str, reading: bool) -> SqlState:
    from idemp.audit.state.sqlite import SqliteState

    return SqliteState(path, reading=reading)


def _postgresql(url: str) -> Any:
    """The namespace that ``url`` names: a `Place` of postgresql_line.py."""
    from idemp.audit.state.postgresql import TABLES
    from idemp.stores.postgresql import place

    parts = split(url)
    found = options(parts, _OPTIONS)
    return place(parts, found, namespace_in(found), TABLES)
