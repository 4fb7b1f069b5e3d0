"""A stream of Redis as a log: read without a group, from a position that the reader keeps himself."""

from __future__ import annotations

from typing import Any

from idemp.errors import Closed, MissingExtra, TransportUnavailable
from idemp.ports import LogEntry
from idemp.redis_server import Met, Server, explain
from idemp.transports.redis_streams import connection
from idemp.transports.shared_stream import message

try:
    from redis.exceptions import RedisError
except ImportError:
    raise MissingExtra("redis://", "redis") from None


class RedisLog:
    """See `idemp.ports.Log`: the stream ``stream``, with entries as in shared_stream.py."""

    def __init__(self, at: Server, stream: str) -> None:
        self._at, self._stream = at, stream
        self._line = connection(Met(at))
        self._closed = False

    def read(self, after: str, most: int, wait: float) -> list[LogEntry]:
        """See `Log`: one XREAD, which blocks in the server for ``wait`` seconds."""
        block = ("BLOCK", max(1, int(wait * 1000))) if wait > 0 else ()
        answer = self._ask("XREAD", "COUNT", most, *block, "STREAMS", self._stream, after or "0")
        entries = answer[0][1] if answer else []
        return [self._entry(id.decode(), fields) for id, fields in entries]

    def _entry(self, id: str, fields: list[bytes]) -> LogEntry:
        body, properties, _ = message(self._stream, id, fields)
        return LogEntry(id, body, properties)

    def behind(self, a: str, b: str) -> bool:
        """See `Log`."""
        return _order(a) > _order(b)

    def end(self) -> str:
        """See `Log`."""
        last = self._ask("XREVRANGE", self._stream, "+", "-", "COUNT", 1)
        return last[0][0].decode() if last else ""

    def tell(self, reader: str, position: str) -> None:
        """See `Log`."""
        self._ask("HSET", f"{self._at.prefix}readers:{self._stream}", reader, position)

    def close(self) -> None:
        """See `Log`."""
        self._closed = True
        self._line.disconnect()

    def _ask(self, *words: Any) -> Any:
        if self._closed:
            raise Closed("this log was closed")
        try:
            self._line.send_command(*words)
            return self._line.read_response()
        except RedisError as error:
            self._line.disconnect()
            raise explain(self._at, error, TransportUnavailable) from None


def _order(position: str) -> tuple[int, int]:
    first, _, second = position.partition("-")
    return int(first or 0), int(second or 0)
