"""A publication as the blob that a row of an outbox has."""

from __future__ import annotations

import msgspec

from idemp.ports import Publication


def pack(publication: Publication) -> bytes:
    """The blob."""
    return msgspec.msgpack.encode(publication)


def unpack(blob: bytes) -> Publication:
    """What was packed."""
    return msgspec.msgpack.decode(blob, type=Publication)
