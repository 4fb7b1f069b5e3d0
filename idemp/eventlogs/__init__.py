"""Event logs: where the events of messages are kept, and the door to them.

One module for each place; what they promise is `idemp.ports.EventLog`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote_to_bytes, urlencode, urlunsplit

from idemp.errors import ConfigError
from idemp.ports import EventLog
from idemp.settings import duration, hidden, options, split, sqlite_path, switch
from idemp.tls import FILES, for_libpq

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
    ``?business=order_id``, where in a message's args its business key stands.  PostgreSQL's takes
    ``sslmode``, ``ca``, ``cert``, ``key`` and what its library knows, too.  ``amqp://`` publishes events to
    the collector, `idemp track`.
    reading: to look at it must not make it; its first use raises `ConfigError` where there is none.
    Raises `ConfigError`.
    """
    parts = split(url)
    match parts.scheme:
        case "sqlite":
            from idemp.eventlogs.sqlite import SqliteEventLog

            told = _told(options(parts, _OPTIONS))
            return SqliteEventLog(sqlite_path(parts), reading=reading, **told)
        case "postgresql" | "postgres":
            from idemp.eventlogs.postgresql import PostgresqlEventLog

            ours, rest = _sorted(parts)
            rest |= for_libpq(rest)
            rest = {name: value for name, value in rest.items() if name not in FILES}
            return PostgresqlEventLog(_with(_escaped(parts), rest), reading=reading, **_told(ours))
        case "amqp" | "amqps":
            from idemp.eventlogs.collector import PublishingLog
            from idemp.transports import open_transport

            ours, rest = _sorted(parts)
            told = _told(ours)
            out = open_transport(_with(parts, rest))
            return PublishingLog(out, payloads=told["payloads"], business=told["business"])
    raise ConfigError(
        f"there is no event log for {hidden(url)!r}; use sqlite:///events.db, postgresql:// or amqp://"
    )


def _sorted(parts: SplitResult) -> tuple[dict[str, str], dict[str, str]]:
    """The options that are ours, and those of the driver."""
    found = dict(parse_qsl(parts.query))
    ours = {name: value for name, value in found.items() if name in _OPTIONS}
    return ours, {name: value for name, value in found.items() if name not in _OPTIONS}


def _with(parts: SplitResult, options: Mapping[str, str]) -> str:
    return urlunsplit(parts._replace(query=urlencode(options)))


def _escaped(parts: SplitResult) -> SplitResult:
    """With a login in which nothing is left that PostgreSQL's library would take for something else."""
    login, at, hosts = parts.netloc.rpartition("@")
    again = ":".join(quote(unquote_to_bytes(each), safe="") for each in login.split(":", 1))
    return parts._replace(netloc=f"{again}{at}{hosts}")


def _told(given: Mapping[str, str]) -> dict[str, Any]:
    return {
        "retention": duration(given.get("retention", f"{RETENTION:.0f}s"), "retention"),
        "rows": _rows(given.get("rows", str(ROWS))),
        "payloads": switch(given.get("payloads", "on")),
        "business": given.get("business", ""),
    }


def _rows(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"rows={text!r}: a whole number from 1, like {ROWS}")
    return int(text)
