"""The story of a message: the tree that it belongs to, who sent each part, who received it, what came of it.

Parents, senders and receivers are what was recorded; no order and no arrow is guessed from clocks.  Where two
services' clocks do not agree, a wait that would be negative is called unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from idemp.ports import OUTCOMES, Event

ENDS = frozenset(OUTCOMES) - {"failed", "deferred", "lost"}
"""Outcomes after which a service is through with a message."""


class Receipt(msgspec.Struct):
    """What one service did with one message, in its own order."""

    service: str
    events: list[Event]

    @property
    def outcome(self) -> str:
        """The one that counts: what ran stays ok, however often it came again."""
        kinds = [event.kind for event in self.events]
        ends = [kind for kind in kinds if kind in ENDS]
        if "ok" in ends:
            return "ok"
        told = [kind for kind in ends if kind != "skipped"] or ends
        return told[-1] if told else kinds[-1] if kinds else ""


class Node(msgspec.Struct):
    """One message.  ``sent``: by whom; None if only its receivers told of it, or a child named it."""

    uuid: str
    parent: str = ""
    sent: Event | None = None
    sender: str = ""
    type: str = ""
    receipts: list[Receipt] = []
    children: list[Node] = []

    def at(self) -> float:
        """When it was sent, as far as anybody knows."""
        times = [event.sent_at or event.at for each in self.receipts for event in each.events]
        return self.sent.at if self.sent is not None else min(times, default=0.0)

    def walk(self) -> Iterator[Node]:
        """This and all below."""
        left = [self]
        while left:
            node = left.pop()
            yield node
            left += node.children


def stories(events: Sequence[Event]) -> list[Node]:
    """The trees of ``events``, roots first sent first.  A message that only a child names is there, empty."""
    nodes: dict[str, Node] = {}
    receipts: dict[tuple[str, str], Receipt] = {}
    for event in events:
        if not event.uuid:
            continue
        node = nodes.setdefault(event.uuid, Node(event.uuid))
        node.parent = node.parent or event.parent
        node.type = node.type or event.type
        node.sender = node.sender or event.sender
        if event.parent:
            nodes.setdefault(event.parent, Node(event.parent))
        if event.role == "sender":
            if node.sent is None or (node.sent.kind == "note" and event.kind == "sent"):
                node.sent = event
            node.sender = event.service
            if event.kind != "note":
                continue
        place = (event.uuid, event.service)
        if place not in receipts:
            receipts[place] = Receipt(event.service, [])
            node.receipts.append(receipts[place])
        receipts[place].events.append(event)
    return _linked(nodes)


def _linked(nodes: dict[str, Node]) -> list[Node]:
    roots = []
    for node in nodes.values():
        node.receipts.sort(key=lambda each: each.service)
        for receipt in node.receipts:
            receipt.events.sort(key=lambda event: event.at)  # of one service, hence one clock
        if node.parent and node.parent != node.uuid:
            nodes[node.parent].children.append(node)
        else:
            roots.append(node)
    for node in nodes.values():
        node.children.sort(key=lambda child: (child.at(), child.uuid))  # siblings have one sender
    seen = {node.uuid for root in roots for node in root.walk()}
    # A circle of parents, which nobody of ours makes, has no root: begin anywhere.
    for node in nodes.values():
        if node.uuid not in seen:
            node.parent = ""
            for other in nodes.values():
                other.children = [child for child in other.children if child is not node]
            roots.append(node)
            seen |= {each.uuid for each in node.walk()}
    return sorted(roots, key=lambda node: (node.at(), node.uuid))


def wait_of(event: Event) -> float | None:
    """Seconds from sent to begun; None if nobody knows, or the clocks do not agree."""
    if event.sent_at is None or event.at < event.sent_at:
        return None
    return event.at - event.sent_at


def clocks_differ(event: Event) -> bool:
    """Whether it began before it was sent, by the clocks."""
    return event.sent_at is not None and event.at < event.sent_at - 0.001


# ------------------------------------------------------------------ as text and as JSON


def lines(root: Node, asked: str = "") -> Iterator[str]:
    """The tree for people; the message that was ``asked`` for is marked."""
    left: list[tuple[Node, int]] = [(root, 0)]
    while left:
        node, depth = left.pop()
        yield _line(node, depth, asked)
        for receipt in node.receipts:
            for event in receipt.events:
                yield f"{'  ' * depth}    {_told(event)}"
        left += [(child, depth + 1) for child in reversed(node.children)]


def _line(node: Node, depth: int, asked: str) -> str:
    mark = "* " if node.uuid == asked else "  "
    if node.sent is None and not node.receipts:
        return f"{'  ' * depth}{mark}{shown(node.uuid)}  nobody told of it"
    told = f"{'  ' * depth}{mark}{shown(node.uuid)}  {shown(node.type)}".rstrip()
    by = f"  sent by {shown(node.sender)}" if node.sender else "  sender unknown"
    when = f" at {moment(node.sent.at)}" if node.sent is not None else ""
    silent = "" if node.receipts else "; no receiver told of it"
    return f"{told}{by}{when}{silent}"


def _told(event: Event) -> str:
    parts = [f"{shown(event.service)}: {event.kind if event.kind != 'note' else 'note ' + repr(event.why)}"]
    parts.append(f"at {moment(event.at)}")
    if (wait := wait_of(event)) is not None and event.kind in OUTCOMES:
        parts.append(f"waited {seconds(wait)}")
    elif clocks_differ(event):
        parts.append("waited ? (the clocks differ)")
    if event.took is not None:
        parts.append(f"took {seconds(event.took)}")
    if event.attempt > 1:
        parts.append(f"attempt {event.attempt}")
    if event.replay:
        parts.append(f"replay {shown(event.replay)}")
    if event.why and event.kind != "note":
        parts.append(f"({shown(event.why)})")
    return "  ".join(parts)


def record(node: Node) -> dict[str, Any]:
    """The tree for programs; not deeper than JSON readers take, so children are listed by id."""
    return {
        "uuid": node.uuid,
        "parent_uuid": node.parent or None,
        "type": node.type or None,
        "sender": node.sender or None,
        "sent_at": None if node.sent is None else node.sent.at,
        "receivers": [
            {
                "service": receipt.service,
                "outcome": receipt.outcome,
                "events": [record_of(event) for event in receipt.events],
            }
            for receipt in node.receipts
        ],
        "children": [child.uuid for child in node.children],
    }


def record_of(event: Event) -> dict[str, Any]:
    """One event for programs; what is not known is left out."""
    told = {
        name: value
        for name, value in msgspec.structs.asdict(event).items()
        if value not in ("", None) and name not in ("properties", "parent")
    }
    if not event.attempt:
        told.pop("attempt", None)
    return {**told, "parent_uuid": event.parent or None}


def moment(at: float) -> str:
    """A time for people: UTC, milliseconds; one beyond all calendars as its number."""
    try:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    except (ValueError, OverflowError, OSError):
        return f"{at:g}"


def seconds(value: float) -> str:
    """A duration for people."""
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.1f} s"


def shown(text: str) -> str:
    """``text`` on one line and harmless to a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
