"""Event logs: where the events of messages are kept, and the door to them.

One module for each place; what they promise is `idemp.ports.EventLog`.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, urlencode, urlunsplit

from idemp.errors import ConfigError
from idemp.ports import EventLog
from idemp.settings import duration, hidden, options, split, sqlite_path, switch

__all__ = ["RETENTION", "ROWS", "open_event_log"]

RETENTION = 7 * 86400.0
"""Seconds that events are kept, if nobody says otherwise."""
ROWS = 10_000_000
"""Events that are kept, if nobody says otherwise."""
_OPTIONS = {"retention": "7d", "rows": str(ROWS), "payloads": "off", "business": "order_id"}


def open_event_log(url: str, *, reading: bool = False) -> EventLog:
    """The event log at ``url``; nothing connects before its first use.

    ``sqlite:///events.db`` or ``postgresql://user:password@host/database``, with ``?retention=7d``,
    ``?rows=10000000``, ``?payloads=off`` (then a replay can only take bodies from elsewhere), and
    ``?business=order_id``, where in a message's args its business key stands.  ``amqp://`` publishes events
    to the collector, `idemp track`.
    reading: to look at it must not make it; its first use raises `ConfigError` where there is none.
    Raises `ConfigError`.
    """
    parts = split(url)
    if parts.scheme not in ("sqlite", "postgresql", "postgres", "amqp", "amqps"):
        raise ConfigError(
            f"there is no event log for {hidden(url)!r}; use sqlite:///events.db, postgresql:// or amqp://"
        )
    if parts.scheme == "sqlite":
        given = options(parts, _OPTIONS)
    else:
        given = {name: value for name, value in parse_qsl(parts.query) if name in _OPTIONS}
    told: dict[str, Any] = {
        "retention": duration(given.get("retention", f"{RETENTION:.0f}s"), "retention"),
        "rows": _rows(given.get("rows", str(ROWS))),
        "payloads": switch(given.get("payloads", "on")),
        "business": given.get("business", ""),
    }
    if parts.scheme == "sqlite":
        from idemp.eventlogs.sqlite import SqliteEventLog

        return SqliteEventLog(sqlite_path(parts), reading=reading, **told)
    rest = [(name, value) for name, value in parse_qsl(parts.query) if name not in _OPTIONS]
    place = urlunsplit(parts._replace(query=urlencode(rest)))
    if parts.scheme.startswith("amqp"):
        from idemp.eventlogs.collector import PublishingLog
        from idemp.transports import open_transport

        return PublishingLog(open_transport(place), payloads=told["payloads"], business=told["business"])
    from idemp.eventlogs.postgresql import PostgresqlEventLog

    return PostgresqlEventLog(place, reading=reading, **told)


def _rows(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"rows={text!r}: a whole number from 1, like {ROWS}")
    return int(text)
