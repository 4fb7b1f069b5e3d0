"""Message: what a handler gets, and how its identity is found in the bytes of a broker.

Accepted: event JSON ``{"type", "id", "args"}`` (names in any case), CloudEvents 1.0 structured
and binary, and any JSON object whose broker properties carry ``message_id`` and ``type``.
Identity, first match wins: CloudEvents ``source`` + ``id`` (there an ``id`` inside the data is
data); the body's ``id``; the broker's ``message_id``.  Anything else is `BadMessage`: a message
without an identity is never taken for another one without an identity.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from idemp.causality import current
from idemp.errors import BadMessage

MAX_ID = 1024
"""Bytes of UTF-8 that an id may have."""
MAX_BODY = 4 * 1024 * 1024
"""Bytes that a body may have."""

_AMQP_TEXT = 255
_strict = msgspec.json.Decoder().decode


class _Usual(msgspec.Struct, forbid_unknown_fields=True):
    """The body that most messages have, which is read in one go.

    One with more in it is not: what would be skipped here is not looked at, and need be no JSON.
    """

    type: str
    id: str
    args: Any


_usual = msgspec.json.Decoder(_Usual).decode
_CE_PREFIXES = ("cloudEvents:", "cloudEvents_", "ce-", "ce_")


class Value(msgspec.Struct, frozen=True, gc=False):
    """What each message needs several of: made in a sixth of the time of a named tuple.  In no cycle."""


class Properties(Value, frozen=True, gc=False):
    """What a broker carries beside the body; the names are AMQP's.

    timestamp: seconds since 1970, when the message was first published.
    """

    message_id: str | None = None
    type: str | None = None
    correlation_id: str | None = None
    app_id: str | None = None
    timestamp: float | None = None
    content_type: str | None = None
    headers: Mapping[str, Any] = {}


class Message(msgspec.Struct, frozen=True):
    """One event.  ``id`` is its identity, ``args`` its payload, ``published`` seconds since 1970."""

    id: str
    type: str
    args: Any = {}
    source: str = ""
    published: float | None = None
    correlation_id: str | None = None
    headers: Mapping[str, Any] = {}

    def encode(self) -> bytes:
        """The event JSON, compact."""
        event = {"type": self.type, "id": self.id, "args": self.args}
        return json.dumps(event, separators=(",", ":")).encode()

    def log(self, text: str, *, hide_payload: bool = False) -> None:
        """Record ``text`` about this message where tracking is on; elsewhere nothing happens."""
        if (tracker := current.get()) is not None:
            tracker.note(self, text, hide_payload=hide_payload)

    def properties(self, *, app_id: str | None = None) -> Properties:
        """The broker properties that go with `encode`; a missing ``published`` becomes now.

        An id or type that is too long for AMQP is left to the body, which has them both.
        """
        return Properties(
            message_id=_short(self.id),
            type=_short(self.type),
            correlation_id=self.correlation_id,
            app_id=app_id,
            timestamp=time.time() if self.published is None else self.published,
            content_type="application/json",
            headers=self.headers,
        )


def _short(text: str) -> str | None:
    return text if len(text.encode()) <= _AMQP_TEXT else None


def decode(body: bytes, properties: Properties) -> Message:
    """The message in ``body``.  Raises `BadMessage` with the reason, and nothing else."""
    if len(body) > MAX_BODY:
        raise BadMessage(f"the body has {len(body)} bytes; {MAX_BODY} are allowed")
    if properties.headers and (attributes := _binary_cloudevent(properties.headers)):
        return _from_cloudevent(attributes, _data(body, properties), properties)
    try:
        usual = _usual(body)
    except (ValueError, RecursionError):
        pass  # it is another one, or nothing that is accepted: see below
    else:
        return _message(usual.id, usual.type, usual.args, properties)
    event = _json_object(body)
    if "specversion" in event and "source" in event:
        return _from_cloudevent(event, event.get("data", {}), properties)
    return _message(
        id=_either(event, "id", properties.message_id),
        type=_either(event, "type", properties.type),
        args=_either(event, "args", {}),
        properties=properties,
    )


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        event = _loads(body)
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"the body is not JSON: {error}") from None
    if not isinstance(event, dict):
        raise BadMessage(f"the body is JSON, but not an object: {type(event).__name__}")
    return event


def _loads(text: bytes) -> Any:
    """Seven times as fast as the standard library, which knows more spellings and says what is wrong."""
    try:
        return _strict(text)
    except (ValueError, RecursionError):
        return json.loads(text)


def _either(event: dict[str, Any], name: str, otherwise: Any) -> Any:
    """``event[name]`` in any case of letters; the exact name wins."""
    if name in event:
        return event[name]
    for key, value in event.items():
        if key.lower() == name:
            return value
    return otherwise


def _binary_cloudevent(headers: Mapping[str, Any]) -> dict[str, Any]:
    attributes = {
        key[len(prefix) :]: value
        for key, value in headers.items()
        for prefix in _CE_PREFIXES
        if isinstance(key, str) and key.startswith(prefix)
    }
    return attributes if {"id", "source"} <= attributes.keys() else {}


def _data(body: bytes, properties: Properties) -> Any:
    """The data of a binary CloudEvent: JSON unless its content type says otherwise."""
    try:
        if "json" in str(properties.content_type or "json"):  # bytes, where it is not valid Unicode
            return _loads(body) if body else {}
        return body.decode()
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"the data does not match its content type: {error}") from None


def _from_cloudevent(attributes: Mapping[str, Any], data: Any, properties: Properties) -> Message:
    source = _text("source", attributes["source"])
    # A source is a URI reference and has no spaces, so source and id cannot run into each other.
    if " " in source:
        raise BadMessage("the CloudEvents source has a space in it; a URI reference has none")
    identity = f"{source} {_text('id', attributes.get('id'))}"
    return _message(identity, attributes.get("type"), data, properties, source=source)


def _message(id: Any, type: Any, args: Any, properties: Properties, *, source: str = "") -> Message:
    return Message(
        _text("id", id),
        _text("type", type),
        args,
        source,
        properties.timestamp,
        properties.correlation_id,
        properties.headers,
    )


def _text(name: str, value: Any) -> str:
    """The id or type, which must be one."""
    if isinstance(value, str) and value.isascii() and 0 < len(value) <= MAX_ID:
        return value
    if value is None:
        raise BadMessage(f"the message has no {name}")
    if not isinstance(value, str):
        raise BadMessage(f"the {name} must be a string, not {value.__class__.__name__}")
    if not value:
        raise BadMessage(f"the {name} is empty")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise BadMessage(f"the {name} is not valid Unicode") from None
    if size > MAX_ID:
        raise BadMessage(f"the {name} has {size} bytes; {MAX_ID} are allowed")
    return value
