"""The door to the stores.  A driver is imported when its URL is opened, and connects at first use."""

from __future__ import annotations

from idemp.errors import ConfigError
from idemp.ports import Store
from idemp.settings import duration, hidden, options, split, sqlite_path

RETENTION = 24 * 3600.0
"""Seconds that done is remembered unless the URL says otherwise."""
SESSION = 10.0
"""Seconds without a heartbeat after which a session is dead, unless the URL says otherwise."""

_OPTIONS = {"retention": "24h", "session": "10s"}


def open_store(url: str) -> Store:
    """The store at ``url``; nothing connects before its first use.

    ``sqlite:///seen.db`` (``sqlite:////absolute/seen.db``), or ``memory://`` for one process.
    ``?retention=24h`` says how long done is remembered; the longest that any opener named is in
    force.  ``?session=10s`` says how long a process may be silent before its claims are in doubt.
    Raises `ConfigError`.
    """
    parts = split(url)
    if parts.scheme not in {"sqlite", "memory"}:
        raise ConfigError(f"there is no store for {hidden(url)!r}; use sqlite:///seen.db or memory://")
    found = options(parts, _OPTIONS)
    retention = duration(found["retention"], "retention") if "retention" in found else None
    session = duration(found["session"], "session") if "session" in found else SESSION
    if parts.scheme == "memory":
        from idemp.stores.memory import MemoryStore

        return MemoryStore(retention=retention or RETENTION)
    from idemp.stores.sqlite import SqliteStore

    return SqliteStore(sqlite_path(parts), retention=retention or RETENTION, session_ttl=session)
