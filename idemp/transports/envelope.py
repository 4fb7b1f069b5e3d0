"""A message as one blob, for brokers that only keep bytes: an envelope in JSON, then the body.

What JSON has no word for, but an AMQP header may hold (bytes, decimals, times), is tagged.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

from msgspec.structs import astuple

from idemp.message import Properties
from idemp.ports import Publication

_TAG = "$"


def pack(publication: Publication) -> bytes:
    """The blob.  Raises `TypeError` or `ValueError` for a header that cannot be kept."""
    envelope = describe(publication)
    return b"".join((len(envelope).to_bytes(4, "big"), envelope, publication.body))


def unpack(blob: bytes) -> tuple[bytes, Properties, str, str]:
    """Body, properties, exchange and routing key."""
    end = 4 + int.from_bytes(blob[:4], "big")
    return blob[end:], *read(blob[4:end])


def describe(publication: Publication) -> bytes:
    """The envelope alone.  Raises as `pack` does."""
    properties = publication.properties
    fields = [publication.exchange, publication.routing_key, *astuple(properties)[:6]]
    if properties.headers:
        fields.append(_tagged(properties.headers))
    return json.dumps(fields, separators=(",", ":")).encode()


def read(envelope: bytes) -> tuple[Properties, str, str]:
    """Properties, exchange and routing key.  Raises `ValueError` for what `describe` never wrote."""
    fields = json.loads(envelope)
    if type(fields) is not list:
        raise ValueError("the envelope is no list")
    exchange, key, *given = fields
    if len(given) == 7:
        given[6] = _untagged(given[6])
        if not isinstance(given[6], dict):
            raise ValueError("the headers are no map")
    return Properties(*given), exchange, key


def _tagged(value: Any) -> Any:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple():
            return [_tagged(each) for each in value]
        case Mapping():
            # As pairs: a key may be bytes, or look like a tag.
            return {_TAG: "map", "of": [[_tagged(key), _tagged(each)] for key, each in value.items()]}
        case bytes() | bytearray():
            return {_TAG: "bytes", "of": base64.b64encode(value).decode()}
        case Decimal():
            return {_TAG: "decimal", "of": str(value)}
        case datetime():
            return {_TAG: "time", "of": value.isoformat()}
    raise TypeError(f"a header cannot hold a {type(value).__name__}")


def _untagged(value: Any) -> Any:
    if isinstance(value, list):
        return [_untagged(each) for each in value]
    if not isinstance(value, dict):
        return value
    match value[_TAG], value["of"]:
        case "map", pairs:
            return {_untagged(key): _untagged(each) for key, each in pairs}
        case "bytes", text:
            return base64.b64decode(text)
        case "decimal", text:
            return Decimal(text)
        case "time", text:
            return datetime.fromisoformat(text)
    raise ValueError(f"unknown tag {value[_TAG]!r}")
