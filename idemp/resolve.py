"""Resolve: what a person does with a key that is in doubt, parked or done, and with its message.

`mark_done`, `set_free` and `forget` change keys under the tokens that were seen, so that of a person and a
consumer who come at the same time one wins; with a `Book` the change is recorded with it.  `send_back` and
`send_all_back` bring messages out of the dead-letter queue.  To run a message again: `set_free` first, then
`send_back`; after a crash in between, both again.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from idemp.deeds import TOGETHER, Book, Change
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
    Forget,
    Free,
    Get,
    Lost,
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


def mark_done(
    store: Store, key: str, result: bytes | None = None, *, book: Book | None = None
) -> Doubt | Parked:
    """The effect of ``key`` is there: never run it again.  ``result`` answers its duplicates.

    Returns the state before.  Raises `NothingToResolve`, or `KeyBusy` if somebody else has it.
    """
    before, token = _take(store, key)
    return _applied(store, Complete(key, token, result), before, book, "done")


def set_free(store: Store, key: str, *, book: Book | None = None) -> Doubt | Parked:
    """The effect of ``key`` is not there: let it run again, with all its attempts.

    Returns the state before.  Raises `NothingToResolve`, or `KeyBusy` if somebody else has it.
    """
    before = store.apply([Get(key)])[0]
    if isinstance(before, Parked):
        return _applied(store, Forget(key, before.token), before, book, "retry")
    before, token = _take(store, key)
    return _applied(store, Release(key, token, 0), before, book, "retry")


def _take(store: Store, key: str) -> tuple[Doubt | Parked, int]:
    before = now = store.apply([Get(key)])[0]
    if isinstance(before, Doubt | Parked):
        now = store.apply([Takeover(key, before.token)])[0]
        if isinstance(now, Claimed):
            return before, now.token
    if isinstance(now, Busy):
        raise KeyBusy(key)
    raise NothingToResolve(key, now)


def _applied(
    store: Store, op: Complete | Release | Forget, before: Doubt | Parked, book: Book | None, verb: str
) -> Doubt | Parked:
    reply = store.apply([op])[0] if book is None else book.change(verb, [Change(op, before)])[0]
    if isinstance(reply, Lost) and not isinstance(reply.now, Busy):
        raise NothingToResolve(op.key, reply.now)
    if not isinstance(reply, Applied):
        raise KeyBusy(op.key)
    return before


def set_all_free(
    store: Store, keys: Iterable[str], book: Book, tokens: Mapping[str, int] | None = None
) -> int:
    """Let those of ``keys`` run again that are in doubt or parked, and that nobody else takes; how many.

    tokens: of the states that were looked at; a key that has another by now is left as it is.
    What is parked goes free in one step.  What is in doubt is taken over first: who is killed in between
    leaves it in doubt.
    """
    asked, freed = list(dict.fromkeys(keys)), 0
    for start in range(0, len(asked), TOGETHER):
        some = asked[start : start + TOGETHER]
        states = zip(some, store.apply([Get(key) for key in some]), strict=True)
        known = [(key, state) for key, state in states if isinstance(state, Doubt | Parked)]
        known = [(key, state) for key, state in known if tokens is None or tokens[key] == state.token]
        doubts = [(key, state) for key, state in known if isinstance(state, Doubt)]
        taken = store.apply([Takeover(key, state.token) for key, state in doubts]) if doubts else []
        changes = [
            Change(Forget(key, state.token), state) for key, state in known if isinstance(state, Parked)
        ]
        changes += [
            Change(Release(key, claim.token, 0), before)
            for (key, before), claim in zip(doubts, taken, strict=True)
            if isinstance(claim, Claimed)
        ]
        freed += sum(isinstance(reply, Applied) for reply in book.change("retry", changes))
    return freed


def forget(found: Sequence[tuple[str, Done | Parked]], book: Book) -> int:
    """Drop keys as they were ``found``: those that have changed since then stay.  How many went."""
    changes = [Change(Forget(key, state.token), state) for key, state in found]
    return sum(isinstance(reply, Applied) for reply in book.change("forget", changes))


# ------------------------------------------------------------------ its message


def send_back(transport: Transport, queue: str, key: str, *, clock: Clock | None = None) -> int:
    """Bring the messages of ``key`` from ``<queue>.dead`` back to the queue they came from.

    Returns how many.  See `send_all_back`.
    """
    return send_all_back(transport, queue, lambda headers: headers.get("idemp-key") == key, clock=clock)


def send_all_back(
    transport: Transport,
    queue: str,
    wanted: Callable[[Mapping[str, Any]], bool],
    *,
    prepare: Callable[[Sequence[Delivery]], None] = lambda _: None,
    retry: str = "",
    most: int = MOST,
    told: Callable[[int], None] = lambda _: None,
    clock: Clock | None = None,
) -> int:
    """Bring messages from ``<queue>.dead`` back to the queue they came from.  Returns how many.

    wanted: says so of a message's headers.  prepare: called with some of them before they go.  retry: names
    this deed; what went back in its name and died again is left alone.  most: how many go.  told: called
    with each number that is safe.

    Each is published, confirmed, and only then taken out: a crash in between leaves a duplicate, which is
    skipped.  All others go back to their place when ``transport`` is closed, so give it one of its own and
    close it.  Raises `Unroutable`, `TransportUnavailable`, and what ``prepare`` raises.
    """
    dead = f"{queue}.dead"
    left = min(transport.depth(dead), MOST)
    if not left:
        return 0
    mark = {
        "idemp-retried-at": int((clock or Clock()).wall()),
        "idemp-retry": retry or uuid.uuid4().hex,
    }
    transport.consume(dead, left)
    unconfirmed: dict[int, int] = {}
    room, sent = most, 0
    while ((left > 0 and room > 0) or unconfirmed) and (
        came := transport.poll(CONFIRM if unconfirmed else QUIET)
    ):
        letters = [event for event in came if isinstance(event, Delivery)]
        left -= len(letters)
        chosen = [letter for letter in letters if _wanted(letter, wanted, mark)][:room]
        room -= len(chosen)
        if chosen:
            prepare(chosen)
            numbers = transport.send([_again(letter, queue, mark) for letter in chosen])
            unconfirmed.update(zip(numbers, (letter.tag for letter in chosen), strict=True))
        safe = [
            _confirmed(event, unconfirmed)
            for event in came
            if isinstance(event, Sent) and event.number in unconfirmed
        ]
        if safe:
            transport.ack(safe)
            sent += len(safe)
            told(len(safe))
    if unconfirmed:
        raise TransportUnavailable(f"not confirmed within {CONFIRM:g} s; {dead} still has the message")
    return sent


def _confirmed(event: Sent, unconfirmed: dict[int, int]) -> int:
    if event.error:
        raise (Unroutable if event.unroutable else TransportUnavailable)(event.error)
    return unconfirmed.pop(event.number)


def _wanted(delivery: Delivery, wanted: Callable[[Mapping[str, Any]], bool], mark: Mapping[str, Any]) -> bool:
    """One that was sent back in this name already, and died again, is not."""
    headers = delivery.properties.headers
    return headers.get("idemp-retry") != mark["idemp-retry"] and wanted(headers)


def _again(delivery: Delivery, queue: str, mark: Mapping[str, Any]) -> Publication:
    """The message as it was, with the time from which its age is counted anew."""
    dead = delivery.properties.headers
    headers = {name: value for name, value in dead.items() if not str(name).startswith("idemp-")}
    properties = replace(delivery.properties, headers={**headers, **mark})
    return Publication(delivery.body, properties, "", str(dead.get("idemp-queue", queue)))
