"""Store, transport and handler with a witness: what passes is noted, and a test may strike at each step.

``at(step, ids)`` is called at every step of the protocol, with the ids of the messages that are at it;
a test hands in what then happens.  The steps, in the order of a message's life:

    deliver.after                                      the broker handed it over; nothing is known of it yet
    claim.before, claim.sent, claim.after              asked; answered, but nobody here has heard; heard
    takeover.before, takeover.sent, takeover.after     the same for a key in doubt
    handler.before, effect.mid, effect.after           inside the handler
    mark.before, mark.sent, mark.after                 the record that it is done
    release.before, release.sent, release.after        the record that it is free again
    park.before, park.sent, park.after                 the record that it is set aside
    retry.publish, retry.after_publish                 the delayed copy: before it is sent; confirmed
    dlq.publish, dlq.after_publish                     the copy for the dead letters
    ack.before, ack.after, ack.sent                    the acknowledgement: before; handed over; on its way
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Any

from idemp.errors import Unavailable
from idemp.ports import (
    Abandon,
    Claim,
    Complete,
    Delivery,
    Done,
    Forget,
    Get,
    Lost,
    Op,
    Park,
    Progress,
    Publication,
    Release,
    Reply,
    Sent,
    State,
    Store,
    Takeover,
    Transport,
)
from tests.reliability.history import History, Line, digest

At = Callable[[str, Sequence[str]], None]

STEPS = {Claim: "claim", Takeover: "takeover", Complete: "mark", Release: "release", Park: "park"}
NAMES: dict[type, str] = {
    Claim: "claim",
    Takeover: "takeover",
    Complete: "complete",
    Release: "release",
    Abandon: "abandon",
    Park: "park",
    Forget: "forget",
    Get: "get",
}


def nothing(step: str, ids: Sequence[str]) -> None:
    """Strike at no step."""


def id_of(key: str) -> str:
    """The message's id in a key."""
    return key.partition("/")[2]


class WitnessedStore:
    """A `Store`, and what it was asked and answered."""

    def __init__(self, inner: Store, history: History, at: At = nothing) -> None:
        self._inner, self._history, self._at = inner, history, at

    @property
    def retention(self) -> float:
        """See `Store`."""
        return self._inner.retention

    def apply(self, ops: Sequence[Op]) -> list[Reply]:
        """See `Store`."""
        asked = [
            {"f": NAMES[type(op)], "op": self._history.number(), "k": id_of(op.key), **_named(op)}
            for op in ops
        ]
        self._history.note_all({**line, "type": "invoke"} for line in asked)
        self._strike(ops, "before")
        try:
            replies = self._inner.apply(ops)
        except Unavailable as error:
            self._history.note_all({**line, "type": "info", "error": str(error)} for line in asked)
            raise
        self._strike(ops, "sent")
        self._history.note_all(
            {**line, "type": "ok", **_told(reply)} for line, reply in zip(asked, replies, strict=True)
        )
        self._strike(ops, "after")
        return replies

    def recall(self, key: str, since: float = inf) -> Done | None:
        """See `Store`.  What it knows is the answer of a claim."""
        done = self._inner.recall(key, since)
        if done is not None:
            asked = {"f": NAMES[Claim], "op": self._history.number(), "k": id_of(key)}
            self._history.note_all([{**asked, "type": "invoke"}, {**asked, "type": "ok", **_told(done)}])
        return done

    def _strike(self, ops: Sequence[Op], moment: str) -> None:
        for kind, step in STEPS.items():
            ids = [id_of(op.key) for op in ops if type(op) is kind]
            if ids:
                self._at(f"{step}.{moment}", ids)

    def wait(self, key: str, token: int, timeout: float) -> None:
        """See `Store`."""
        self._inner.wait(key, token, timeout)

    def fresh(self, token: int = 0) -> bool:
        """See `Store`."""
        return self._inner.fresh(token)

    def scan(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> list[tuple[str, State]]:
        """See `Store`."""
        return self._inner.scan(prefix, after=after, limit=limit)

    def progress(self) -> Progress | None:
        """See `Store`."""
        return self._inner.progress()

    def size(self) -> int:
        """See `Store`."""
        return self._inner.size()

    def close(self) -> None:
        """See `Store`."""
        self._inner.close()


def _named(op: Op) -> Line:
    token = getattr(op, "token", None)
    named: dict[str, Any] = {} if token is None else {"tok": token}
    if isinstance(op, Complete):
        named["sha"] = digest(op.result or b"")
    return named


def _told(reply: Reply) -> Line:
    state = reply.now if isinstance(reply, Lost) else reply
    told: dict[str, Any] = {"r": type(reply).__name__.lower()}
    if isinstance(reply, Lost):
        told["now"] = type(state).__name__.lower()
    for ours, theirs in (("tok", "token"), ("att", "attempt")):
        if hasattr(state, theirs):
            told[ours] = getattr(state, theirs)
    if isinstance(state, Done):
        told["sha"] = digest(state.result or b"")
    return told


class WitnessedTransport:
    """A `Transport`, and what came and went through it."""

    def __init__(self, inner: Transport, history: History, at: At = nothing) -> None:
        self._inner, self._history, self._at = inner, history, at
        self._out: dict[int, tuple[int, str]] = {}  # a delivery's tag -> number, message id
        self._copies: dict[
            int, tuple[str, int, str]
        ] = {}  # a publication's number -> verb, number, message id
        self._acked: list[str] = []

    def connect(self) -> None:
        """See `Transport`."""
        self._history.note("connect", "invoke")
        self._forget()
        self._inner.connect()
        self._history.note("connect", "ok")

    def _forget(self) -> None:
        copies, self._copies = self._copies, {}
        self._out.clear()
        self._history.note_all(
            {"f": verb, "type": "info", "op": op, "k": id} for verb, op, id in copies.values()
        )

    def declare(
        self,
        queue: str,
        exchange: str = "",
        binding: str = "#",
        *,
        kind: str = "topic",
        expires: float | None = None,
    ) -> None:
        """See `Transport`."""
        self._inner.declare(queue, exchange, binding, kind=kind, expires=expires)

    def consume(self, queue: str, prefetch: int, *, name: str = "") -> None:
        """See `Transport`."""
        self._inner.consume(queue, prefetch, name=name)

    def cancel(self) -> None:
        """See `Transport`."""
        self._inner.cancel()

    def poll(self, timeout: float) -> list[Delivery | Sent]:
        """See `Transport`."""
        came = self._inner.poll(timeout)
        if self._acked:
            acked, self._acked = self._acked, []
            self._at("ack.sent", acked)
        deliveries = [event for event in came if isinstance(event, Delivery)]
        for delivery in deliveries:
            self._out[delivery.tag] = (self._history.number(), delivery.properties.message_id or "")
        self._history.note_all(self._delivered(delivery) for delivery in deliveries)
        if deliveries:
            self._at("deliver.after", [delivery.properties.message_id or "" for delivery in deliveries])
        for event in came:
            if isinstance(event, Sent):
                self._confirmed(event)
        return came

    def _delivered(self, event: Delivery) -> Line:
        op, id = self._out[event.tag]
        return {
            "f": "deliver",
            "type": "ok",
            "op": op,
            "k": id,
            "again": event.redelivered,
            "sha": digest(event.body),
        }

    def _confirmed(self, event: Sent) -> None:
        verb, op, id = self._copies.pop(event.number)
        told = {"type": "fail", "error": event.error} if event.error else {"type": "ok"}
        self._history.note_all([{"f": verb, "op": op, "k": id, **told}])
        if not event.error:
            self._at(f"{_step(verb)}.after_publish", [id])

    def ack(self, tags: Iterable[int]) -> None:
        """See `Transport`."""
        tags = list(tags)
        # Of a connection that is gone: the broker will hand them out again.
        out = [self._out.pop(tag) for tag in tags if tag in self._out]
        self._history.note_all({"f": "ack", "type": "invoke", "op": op, "k": id} for op, id in out)
        ids = [id for _, id in out]
        if ids:
            self._at("ack.before", ids)
        self._inner.ack(tags)
        if ids:
            self._at("ack.after", ids)
            self._acked += ids

    def send(self, publications: Sequence[Publication]) -> list[int]:
        """See `Transport`."""
        named = [
            ("dead" if copy.routing_key.endswith(".dead") else "retry", self._history.number(), copy)
            for copy in publications
        ]
        lines = [(verb, op, copy.properties.message_id or "") for verb, op, copy in named]
        self._history.note_all({"f": verb, "type": "invoke", "op": op, "k": id} for verb, op, id in lines)
        for verb, _, id in lines:
            self._at(f"{_step(verb)}.publish", [id])
        numbers = self._inner.send(publications)
        self._copies.update(zip(numbers, lines, strict=True))
        return numbers

    def depth(self, queue: str) -> int:
        """See `Transport`."""
        return self._inner.depth(queue)

    def taken(self, queue: str) -> bool:
        """See `Transport`."""
        return self._inner.taken(queue)

    def wake(self) -> None:
        """See `Transport`."""
        self._inner.wake()

    def close(self) -> None:
        """See `Transport`."""
        self._inner.close()


def _step(verb: str) -> str:
    return "dlq" if verb == "dead" else verb
