"""Entries of a stream that is shared with other programs: an event's type and payload, as two fields.

`EventTypeName` and `Payload` (JSON) are all that others need, to read and to write.  What idemp adds, the
message's id and its properties, is in fields of their own, which they ignore.

An entry of others has no id but the stream's, so it is the same message however often it is read, and
another one when its writer sends it twice.  What is no event keeps its text as the body, for a person.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from msgspec.structs import replace

from idemp.errors import BadMessage
from idemp.message import Properties, decode
from idemp.ports import Publication
from idemp.transports.envelope import describe, read

TYPE, PAYLOAD, ID, PROPERTIES = b"EventTypeName", b"Payload", b"Id", b"Properties"

_ESCAPED = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def entry(publication: Publication) -> list[bytes]:
    """The fields of ``publication`` and their values.  Raises `BadMessage` if it is no event."""
    event = decode(publication.body, publication.properties)
    payload = json.dumps(event.args, separators=(",", ":"), ensure_ascii=False).translate(_ESCAPED)
    try:
        return [
            *(TYPE, event.type.encode(), PAYLOAD, payload.encode()),
            *(ID, event.id.encode(), PROPERTIES, describe(publication)),
        ]
    except (TypeError, ValueError) as error:
        raise BadMessage(f"the message cannot be kept: {error}") from None


def message(stream: str, id: str, fields: Sequence[bytes]) -> tuple[bytes, Properties, str]:
    """The body, the properties and the routing key of an entry."""
    found = dict(zip(fields[::2], fields[1::2], strict=False))
    kind, payload = found.get(TYPE), found.get(PAYLOAD)
    identity = _text(found.get(ID, b"")) or f"{stream}/{id}"
    properties = replace(_properties(found), message_id=identity)
    if kind is None or payload is None:
        return no_event(fields), replace(properties, type=None), ""
    properties = replace(properties, type=_text(kind))
    try:
        json.loads(payload)
    except (ValueError, RecursionError):
        return payload, properties, _text(kind)
    head = json.dumps({"type": _text(kind), "id": identity}, separators=(",", ":"))
    return b"".join((head[:-1].encode(), b',"args":', payload, b"}")), properties, _text(kind)


def no_event(fields: Sequence[bytes]) -> bytes:
    """The body of what is none.  It has no type: it is rejected, with what there was in it to look at."""
    found = zip(fields[::2], fields[1::2], strict=False)
    return json.dumps({"fields": {_text(name): _text(value) for name, value in found}}).encode()


def _properties(found: dict[bytes, bytes]) -> Properties:
    """What idemp wrote of them, or none."""
    try:
        return read(found[PROPERTIES])[0]
    except (KeyError, ValueError, TypeError):
        return Properties()


def _text(value: bytes) -> str:
    return value.decode(errors="backslashreplace")
