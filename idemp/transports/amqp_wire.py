"""AMQP 0-9-1 on the wire, as far as deliveries and message properties go.

pika can do all of this, at two and a half times the processor time for a delivery.  It also loses
the fraction of a number in a header and the whole connection over a time that no calendar has, so
that one such message would be delivered, and end the connection, for ever.  No connection here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any

from idemp.message import Properties
from idemp.ports import Delivery

UNREADABLE = "x-unreadable-headers"
"""The header that holds the others' bytes when they are no AMQP table."""

_FRAME = struct.Struct(">BHI")
_FRAME_END = 0xCE
_METHOD, _HEADER, _BODY, _HEARTBEAT = _KINDS = 1, 2, 3, 8
_DELIVER = b"\x00\x3c\x00\x3c"  # class basic, method deliver
_CONTENT = struct.Struct(">4xQH")  # of a header frame: size of the body, which properties follow
_HEAD = struct.Struct(">BHI4xQH")  # the same after its `_FRAME`
_LONG = struct.Struct(">I")
_LONGLONG = struct.Struct(">Q")
_TAG = struct.Struct(">QB")  # of a delivery, and whether it is one again
_PERSISTENT = 2


class Reader:
    """Takes the deliveries out of what the broker says; ``hand_on`` gets all other frames, in order.

    first: added to the broker's tags.
    """

    def __init__(self, arrived: list[Delivery], hand_on: Callable[[bytes], None], first: int = 0) -> None:
        self._arrived, self._hand_on, self._first = arrived, hand_on, first
        self._chunks: list[bytes] = []
        self._have = 0
        self._need = _FRAME.size + 1
        # The delivery whose content is coming; frames of other channels may come in between.
        self._channel = -1
        self._envelope: tuple[int, bool, str, str] = 0, False, "", ""
        self._properties = Properties()
        self._missing = 0
        self._parts: list[bytes] = []

    def feed(self, data: bytes) -> int:
        """Take what came; how many bytes of it, or of what came before, were deliveries."""
        self._chunks.append(data)
        self._have += len(data)
        if self._have < self._need:
            return 0
        data = b"".join(self._chunks) if len(self._chunks) > 1 else data
        start, taken, end = 0, 0, len(data)
        self._need = _FRAME.size + 1
        while end - start >= _FRAME.size + 1:
            kind, channel, size = _FRAME.unpack_from(data, start)
            if kind not in _KINDS:
                size = end - start - _FRAME.size - 1  # no frame at all: let pika say so
            at = start + _FRAME.size
            stop = at + size
            if stop >= end:
                self._need = stop + 1 - start
                break
            if kind == _METHOD and (past := self._take_whole(channel, data, at, stop, end)):
                taken += past - start
                start = past
                continue
            if self._take(kind, channel, data, at, stop):
                taken += stop + 1 - start
            else:
                self._hand_on(data[start : stop + 1])
            start = stop + 1
        self._chunks = [data[start:]] if start < end else []
        self._have = end - start
        return taken

    def _take_whole(self, channel: int, data: bytes, at: int, stop: int, end: int) -> int:
        """Take a delivery whose three frames are here, one after the other, as most are.

        at, stop: of what the first one holds.  Where the delivery ends; 0 if it is not such a one.
        """
        header = stop + 1
        if end - header < _HEAD.size + _FRAME.size or not data.startswith(_DELIVER, at):
            return 0
        kind, of, size, missing, flags = _HEAD.unpack_from(data, header)
        body: int = header + _FRAME.size + size + 1
        last: int = body + _FRAME.size + missing
        if kind != _HEADER or of != channel or last >= end:
            return 0
        if _FRAME.unpack_from(data, body) != (_BODY, channel, missing):
            return 0
        if not data[stop] == data[body - 1] == data[last] == _FRAME_END:
            return 0
        tag, redelivered, exchange, key = _envelope(data, at + 4, stop)
        properties = decode(data, header + _HEAD.size, flags)
        content = data[body + _FRAME.size : last]
        self._arrived.append(Delivery(self._first + tag, content, properties, exchange, key, redelivered))
        return last + 1

    def _take(self, kind: int, channel: int, data: bytes, start: int, stop: int) -> bool:
        """Whether the frame is of a delivery."""
        if data[stop] != _FRAME_END:
            return False
        if kind == _METHOD:
            if not data.startswith(_DELIVER, start):
                return False
            self._channel, self._parts = channel, []
            self._envelope = _envelope(data, start + 4, stop)
            return True
        if channel != self._channel or kind == _HEARTBEAT:
            return False
        if kind == _HEADER:
            self._missing, flags = _CONTENT.unpack_from(data, start)
            self._properties = decode(data, start + _CONTENT.size, flags)
        else:
            self._parts.append(data[start:stop])
            self._missing -= stop - start
        if self._missing <= 0:
            body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            tag, redelivered, exchange, key = self._envelope
            self._arrived.append(
                Delivery(self._first + tag, body, self._properties, exchange, key, redelivered)
            )
            self._channel = -1
        return True


def _envelope(data: bytes, at: int, stop: int) -> tuple[int, bool, str, str]:
    """Of basic.deliver: tag, redelivered, exchange, routing key."""
    at += 1 + data[at]  # the consumer tag
    tag, redelivered = _TAG.unpack_from(data, at)
    return tag, redelivered & 1 == 1, *_way(data[at + _TAG.size : stop])


@lru_cache(maxsize=64)
def _way(data: bytes) -> tuple[str, str]:
    """Exchange and routing key, which are the same for most of a queue's messages."""
    exchange, at = _short(data, 0)
    return exchange, _short(data, at)[0]


# ------------------------------------------------------------------ properties


def decode(data: bytes, at: int, flags: int) -> Properties:
    """The properties that ``flags`` says are there; those that are not ours are skipped."""
    content_type = correlation_id = message_id = type = app_id = None
    timestamp: int | None = None
    headers: dict[Any, Any] = {}
    if flags & 0x8000:
        content_type, at = _short(data, at)
    if flags & 0x4000:  # content encoding
        at += 1 + data[at]
    if flags & 0x2000:
        headers, at = _headers(data, at)
    if flags & 0x1000:  # delivery mode
        at += 1
    if flags & 0x0800:  # priority
        at += 1
    if flags & 0x0400:
        correlation_id, at = _short(data, at)
    if flags & 0x0200:  # reply to
        at += 1 + data[at]
    if flags & 0x0100:  # expiration
        at += 1 + data[at]
    if flags & 0x0080:
        message_id, at = _short(data, at)
    if flags & 0x0040:
        (timestamp,) = _LONGLONG.unpack_from(data, at)
        at += 8
    if flags & 0x0020:
        type, at = _short(data, at)
    if flags & 0x0010:  # user id
        at += 1 + data[at]
    if flags & 0x0008:
        app_id, at = _short(data, at)
    return Properties(message_id, type, correlation_id, app_id, timestamp, content_type, headers)


def encode(properties: Properties, expiration: str | None = None) -> bytes:
    """Flags and properties, of a message that is to survive the broker.

    Raises `ValueError`, `TypeError` or `struct.error` for what AMQP has no place for.
    """
    flags, parts = 0x1000, []
    if properties.content_type is not None:
        flags |= 0x8000
        parts.append(_as_short(properties.content_type))
    if properties.headers:
        flags |= 0x2000
        parts.append(_as_table(properties.headers))
    parts.append(bytes((_PERSISTENT,)))
    for flag, text in (
        (0x0400, properties.correlation_id),
        (0x0100, expiration),
        (0x0080, properties.message_id),
    ):
        if text is not None:
            flags |= flag
            parts.append(_as_short(text))
    if properties.timestamp is not None:
        flags |= 0x0040
        parts.append(_LONGLONG.pack(int(properties.timestamp)))
    for flag, text in ((0x0020, properties.type), (0x0008, properties.app_id)):
        if text is not None:
            flags |= flag
            parts.append(_as_short(text))
    return b"".join((flags.to_bytes(2, "big"), *parts))


# ------------------------------------------------------------------ values

_FIXED = {
    b: struct.Struct(">" + code)
    for b, code in zip(b"bBsUuIilLfd", "bBhhHiIqqfd", strict=True)  # as RabbitMQ reads them
}


def _short(data: bytes, at: int) -> tuple[Any, int]:
    """A short string; what is no text stays bytes."""
    stop = at + 1 + data[at]
    try:
        return data[at + 1 : stop].decode(), stop
    except UnicodeDecodeError:
        return data[at + 1 : stop], stop


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _headers(data: bytes, at: int) -> tuple[dict[Any, Any], int]:
    """The table, or one header that holds its bytes."""
    stop = at + 4 + int(_LONG.unpack_from(data, at)[0])
    try:
        return _table(data, at)[0], stop
    except (ValueError, IndexError, RecursionError, struct.error):
        return {UNREADABLE: data[at:stop]}, stop


def _table(data: bytes, at: int) -> tuple[dict[Any, Any], int]:
    stop = at + 4 + int(_LONG.unpack_from(data, at)[0])
    at += 4
    table = {}
    while at < stop:
        name, at = _short(data, at)
        table[name], at = _value(data, at)
    return table, stop


def _value(data: bytes, at: int) -> tuple[Any, int]:
    kind = data[at]
    at += 1
    if kind in _FIXED:
        number = _FIXED[kind]
        return number.unpack_from(data, at)[0], at + number.size
    match chr(kind):
        case "S" | "x" | "A":
            stop = at + 4 + int(_LONG.unpack_from(data, at)[0])
            at += 4
            if kind == ord("A"):
                return _array(data, at, stop), stop
            return (_text(data[at:stop]) if kind == ord("S") else data[at:stop]), stop
        case "F":
            return _table(data, at)
        case "t":
            return bool(data[at]), at + 1
        case "V":
            return None, at
        case "D":
            places, units = struct.unpack_from(">Bi", data, at)
            return Decimal(units).scaleb(-places), at + 5
        case "T":
            return _time(_LONGLONG.unpack_from(data, at)[0]), at + 8
    raise ValueError(f"no AMQP value begins with {kind}")


def _array(data: bytes, at: int, stop: int) -> list[Any]:
    values = []
    while at < stop:
        value, at = _value(data, at)
        values.append(value)
    return values


def _time(seconds: int) -> datetime | int:
    if seconds >> 63:
        raise ValueError("no integer that AMQP has can hold this time")
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return seconds  # beyond the year 9999: milliseconds, probably


def _as_short(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    if len(data) > 255:
        raise ValueError(f"{data[:20]!r}... has {len(data)} bytes, and 255 are allowed")
    return bytes((len(data),)) + data


def _as_long(data: bytes) -> bytes:
    return _LONG.pack(len(data)) + data


def _as_table(table: Mapping[Any, Any]) -> bytes:
    return _as_long(b"".join(_as_short(name) + _as_value(value) for name, value in table.items()))


def _as_value(value: object) -> bytes:
    match value:
        case None:
            return b"V"
        case str():
            return b"S" + _as_long(value.encode())
        case bytes() | bytearray():
            return b"x" + _as_long(bytes(value))
        case bool():
            return b"t\x01" if value else b"t\x00"
        case int():
            return (
                struct.pack(">ci", b"I", value)
                if -(1 << 31) <= value < 1 << 31
                else struct.pack(">cq", b"l", value)
            )
        case float():
            return struct.pack(">cd", b"d", value)
        case Decimal():
            return b"D" + _as_decimal(value)
        case datetime():
            return b"T" + _LONGLONG.pack(int(value.timestamp()))
        case Mapping():
            return b"F" + _as_table(value)
        case Sequence():
            return b"A" + _as_long(b"".join(_as_value(each) for each in value))
    raise TypeError(f"a header cannot hold a {type(value).__name__}")


def _as_decimal(value: Decimal) -> bytes:
    exponent = value.as_tuple().exponent
    if not isinstance(exponent, int):
        raise TypeError(f"a header cannot hold {value}")
    places = max(0, -exponent)
    return struct.pack(">Bi", places, int(value.scaleb(places)))
