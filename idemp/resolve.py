"""Resolve: what a person does with a key that is in doubt or parked, and with its message.

`mark_done` and `set_free` change one key, under the token that was seen, so that of a person and a
consumer who come at the same time one wins.  `send_back` brings the message out of the dead-letter
queue.  To run a message again: `set_free` first, then `send_back`; after a crash in between, both again.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from idemp.errors import IdempError, KeyBusy, TransportUnavailable, Unroutable
from idemp.ports import (
    Applied,
    Busy,
    Claimed,
    Clock,
    Complete,
    Delivery,
    Done,
    Doubt,
    Free,
    Get,
    Parked,
    Publication,
    Release,
    Reply,
    Sent,
    Store,
    Takeover,
    Transport,
)

QUIET = 1.0
"""Seconds without a delivery after which the rest of a dead-letter queue is somebody else's."""
CONFIRM = 30.0
"""Seconds that the broker has to confirm."""
MOST = 65_535
"""Messages that are looked at: what AMQP lets be out at a time."""


class NothingToResolve(IdempError):
    """The key is neither in doubt nor parked; nothing changed."""

    def __init__(self, key: str, now: Reply) -> None:
        what = {Done: "done", Free: "free or unknown"}.get(type(now), "changing just now")
        super().__init__(f"key {key!r} is {what}, so there is nothing to resolve")
        self.key = key


# ------------------------------------------------------------------ the key


def mark_done(store: Store, key: str, result: bytes | None = None) -> Doubt | Parked:
    """The effect of ``key`` is there: never run it again.  ``result`` answers its duplicates.

    Returns the state before.  Raises `NothingToResolve`, or `KeyBusy` if somebody else has it.
    """
    before, token = _take(store, key)
    return _applied(store, Complete(key, token, result), before)


def set_free(store: Store, key: str) -> Doubt | Parked:
    """The effect of ``key`` is not there: let it run again, with all its attempts.

    Returns the state before.  Raises `NothingToResolve`, or `KeyBusy` if somebody else has it.
    """
    before, token = _take(store, key)
    return _applied(store, Release(key, token, 0), before)


def _take(store: Store, key: str) -> tuple[Doubt | Parked, int]:
    before = now = store.apply([Get(key)])[0]
    if isinstance(before, Doubt | Parked):
        now = store.apply([Takeover(key, before.token)])[0]
        if isinstance(now, Claimed):
            return before, now.token
    if isinstance(now, Busy):
        raise KeyBusy(key)
    raise NothingToResolve(key, now)


def _applied(store: Store, op: Complete | Release, before: Doubt | Parked) -> Doubt | Parked:
    if not isinstance(store.apply([op])[0], Applied):
        raise KeyBusy(op.key)  # this process was away for so long that somebody took it over
    return before


# ------------------------------------------------------------------ its message


def send_back(transport: Transport, queue: str, key: str, *, clock: Clock | None = None) -> int:
    """Bring the messages of ``key`` from ``<queue>.dead`` back to the queue they came from.

    Returns how many.  Each is published, confirmed, and only then taken out: a crash in between leaves
    a duplicate, which is skipped.  All others go back to their place when ``transport`` is closed, so
    give it one of its own and close it.  Raises `Unroutable`, `TransportUnavailable`.
    """
    dead = f"{queue}.dead"
    left = min(transport.depth(dead), MOST)
    if not left:
        return 0
    mark = {"idemp-retried-at": int((clock or Clock()).wall()), "idemp-retry": uuid.uuid4().hex}
    transport.consume(dead, left)
    unconfirmed: dict[int, int] = {}
    sent = 0
    while (left > 0 or unconfirmed) and (came := transport.poll(CONFIRM if unconfirmed else QUIET)):
        for event in came:
            if isinstance(event, Delivery):
                left -= 1
                if _wanted(event, key, mark):
                    [number] = transport.send([_again(event, queue, mark)])
                    unconfirmed[number] = event.tag
            elif event.number in unconfirmed:
                transport.ack([_confirmed(event, unconfirmed)])
                sent += 1
    if unconfirmed:
        raise TransportUnavailable(f"not confirmed within {CONFIRM:g} s; {dead} still has the message")
    return sent


def _confirmed(event: Sent, unconfirmed: dict[int, int]) -> int:
    if event.error:
        raise (Unroutable if event.unroutable else TransportUnavailable)(event.error)
    return unconfirmed.pop(event.number)


def _wanted(delivery: Delivery, key: str, mark: Mapping[str, Any]) -> bool:
    """Whether it is one of ``key``'s; one that was sent back just now and died again is not."""
    headers = delivery.properties.headers
    return headers.get("idemp-key") == key and headers.get("idemp-retry") != mark["idemp-retry"]


def _again(delivery: Delivery, queue: str, mark: Mapping[str, Any]) -> Publication:
    """The message as it was, with the time from which its age is counted anew."""
    dead = delivery.properties.headers
    headers = {name: value for name, value in dead.items() if not str(name).startswith("idemp-")}
    properties = replace(delivery.properties, headers={**headers, **mark})
    return Publication(delivery.body, properties, "", str(dead.get("idemp-queue", queue)))
