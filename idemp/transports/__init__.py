"""Transports: the brokers that messages come through, and the door to them.

One module for each broker; what they all promise is `idemp.ports.Transport`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from urllib.parse import SplitResult

from idemp.causality import current
from idemp.errors import ConfigError, TransportUnavailable, Unroutable
from idemp.ports import Delivery, Log, Publication, Sent, Transport
from idemp.settings import duration, hidden, options, split, sqlite_path
from idemp.tls import FILES

__all__ = ["check_exists", "open_log", "open_transport", "publish"]

_OFFER = "amqp://, redis://, sqlite:/// or memory://"
_REDIS = {
    "namespace": "orders",
    "idle": "30s",
    "stream": "event-stream",
    "keep": "100000",
    "unsafe_durability": "true",
    **FILES,
}


def open_transport(url: str) -> Transport:
    """The transport at ``url``; nothing connects before its first use.

    ``amqp://user:password@host:port/vhost`` (or ``amqps``), ``sqlite:///queues.db``
    (``sqlite:////absolute/queues.db``), ``redis://host/0?namespace=orders`` (``rediss://`` for TLS), or
    ``memory://name`` for one process.
    ``sqlite`` takes ``?visibility=30s``: how long a consumer may be silent before others get what
    it has not acknowledged; ``amqp`` takes the options of pika; ``amqps`` and ``rediss`` take ``ca``,
    ``cert`` and ``key`` (files).  Raises `ConfigError`.
    """
    parts = split(url)
    match parts.scheme:
        case "amqp" | "amqps":
            from idemp.transports.rabbitmq import RabbitMQTransport

            return RabbitMQTransport(url)
        case "sqlite":
            from idemp.transports.sqlite import SqliteTransport

            visibility = options(parts, {"visibility": "30s"}).get("visibility", "30s")
            return SqliteTransport(sqlite_path(parts), visibility=duration(visibility, "visibility"))
        case "redis" | "rediss":
            return _redis(parts)
        case "memory":
            from idemp.transports.memory import MemoryTransport

            if not parts.netloc or parts.path or parts.query:
                raise ConfigError(f"{url!r} names no broker; write it like memory://orders")
            return MemoryTransport(parts.netloc)
    raise ConfigError(f"there is no transport for {hidden(url)!r}; use {_OFFER}")


def _redis(parts: SplitResult) -> Transport:
    from idemp.redis_server import server
    from idemp.transports.redis_streams import RedisStreamsTransport

    found = options(parts, _REDIS)
    keep = found.get("keep")
    if keep is not None and not keep.isdecimal():
        raise ConfigError(f"keep={keep!r} is no number of entries; write it like keep=100000")
    streams = [name for name in found.get("stream", "").split(",") if name]
    return RedisStreamsTransport(
        server(parts, found, _namespace(found)),
        idle=duration(found.get("idle", "30s"), "idle"),
        shared=streams,
        keep=None if keep is None else int(keep),
    )


def open_log(url: str) -> Log:
    """The log at ``url``: ``redis://host/0?stream=event-stream``, with the options of `open_transport`.

    Nothing connects before its first use.  Raises `ConfigError`.
    """
    parts = split(url)
    if parts.scheme not in ("redis", "rediss"):
        raise ConfigError(f"there is no log at {hidden(url)!r}; write it like redis://host/0?stream=events")
    from idemp.redis_server import server
    from idemp.transports.redis_log import RedisLog

    found = options(parts, _REDIS)
    stream = found.get("stream", "")
    if not stream or "," in stream:
        raise ConfigError(f"stream={stream!r}: a log is one stream; write it like ?stream=event-stream")
    return RedisLog(server(parts, found, _namespace(found)), stream)


def _namespace(found: Mapping[str, str]) -> str:
    namespace = found.get("namespace", "default")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,50}", namespace):
        raise ConfigError(f"namespace={namespace!r}: up to 50 letters, digits, dots, dashes, underscores")
    return namespace


def check_exists(url: str) -> None:
    """Raise `ConfigError` if ``url`` is a file without a broker: to look at one must not make it."""
    parts = split(url)
    if parts.scheme == "sqlite":
        from idemp.transports.sqlite import exists

        if not exists(path := sqlite_path(parts)):
            raise ConfigError(f"there is no broker in {path}; name the file that the service uses as one")


def publish(transport: Transport, publications: Sequence[Publication], *, timeout: float = 30.0) -> None:
    """Send all and wait until each is safe in a queue.

    For a transport that nobody consumes from: a delivery that comes meanwhile has nobody to go
    to, so it is left unacknowledged (it comes again after `close`) and `ConfigError` is raised.

    Raises `Unroutable` if no queue takes one of them, `TransportUnavailable` if one was refused or
    not confirmed within ``timeout`` seconds.  Others of them may have been accepted: sending all
    again is safe for consumers that know the ids.

    In a handler of a tracked consumer, what is published is the child of the handled message.
    """
    if (tracker := current.get()) is not None:
        publications = tracker.stamp(publications)
    waiting = dict(zip(transport.send(publications), publications, strict=True))
    until = time.monotonic() + timeout
    refused: Sent | None = None
    while waiting:
        left = until - time.monotonic()
        if left <= 0:
            raise TransportUnavailable(f"{len(waiting)} messages were not confirmed within {timeout:g} s")
        for event in transport.poll(left):
            if isinstance(event, Delivery):
                raise ConfigError("publish() needs a transport of its own; this one is consuming")
            # Of several errors, the one that sending again would not mend.
            if waiting.pop(event.number, None) and event.error and not (refused and refused.unroutable):
                refused = event
    if refused is not None:
        raise (Unroutable if refused.unroutable else TransportUnavailable)(refused.error)
    if tracker is not None:
        tracker.sent(publications)
