"""The plan of a replay, in a queue beside the one in which its messages are staged.

It is written before anything is staged, with what was chosen and the name of each message that is to be
sent, and then how far the staging is.  Whoever resumes a replay that was killed stages the rest of it, and
nothing that was not planned.  What was confirmed and not written here is staged twice: same id, skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from idemp.message import Properties
from idemp.ports import Publication
from idemp.tracking.replay import Desk, Item, Mark, Planned, staging

TOGETHER = 5000
"""Names in one message."""
MOST = 60_000
"""Messages that a plan has at most."""

Name = tuple[str, str]
"""The receiver, and the message's key there; its id where nobody can tell the key."""


class Kept(NamedTuple):
    """A plan as it was kept.  ``names``: of what is to be sent, in order; so many are ``staged``.

    released: whether any of it may have been sent.
    """

    names: Sequence[Name]
    mark: Mark
    selection: Mapping[str, Any]
    staged: int
    released: bool


class PlanQueue:
    """The plan of ``replay``."""

    def __init__(self, desk: Desk, replay: str) -> None:
        self._desk, self.queue = desk, f"{staging(replay)}.plan"
        self._places: dict[Name, int] = {}

    def keep(self, planned: Sequence[Planned], mark: Mark, selection: Mapping[str, Any]) -> None:
        """Write what is to be sent; the last line makes it a plan.  Raises `TransportUnavailable`."""
        names = [name_of(each.item) for each in planned]
        self.number(names)
        self._desk.transport.declare(self.queue)
        for start in range(0, len(names), TOGETHER):
            self._write(first=start, names=names[start : start + TOGETHER])
        self._write(names_in_all=len(names), mark=mark._asdict(), selection=selection)

    def staged(self, some: Sequence[Planned]) -> None:
        """These are safe in the replay's queue, and so are all before them."""
        self._write(staged=max(self._places[name_of(each.item)] for each in some))

    def released(self) -> None:
        """All that can be is staged, its letters are taken out, and from now on it is sent."""
        self._write(released=True)

    def read(self) -> Kept | None:
        """What was kept; None if it is none, or not whole."""
        lines = [line for _, line in self._read()]
        head = next((line for line in lines if "mark" in line), None)
        parts = sorted((line for line in lines if "names" in line), key=lambda line: int(line["first"]))
        names = [(service, name) for part in parts for service, name in part["names"]]
        if head is None or head["names_in_all"] > len(names):
            return None
        staged = max((line["staged"] for line in lines if "staged" in line), default=0)
        released = any("released" in line for line in lines)
        return Kept(names, Mark(**head["mark"]), head["selection"], staged, released)

    def drop(self) -> None:
        """It is not needed any more."""
        self._desk.settle([tag for tag, _ in self._read()])

    def number(self, names: Sequence[Name]) -> None:
        """These are its names, in order."""
        self._places = {name: place for place, name in enumerate(names, 1)}

    def _write(self, **line: Any) -> None:
        about = Properties(type="idemp.replay", content_type="application/json")
        self._desk.send([Publication(msgspec.json.encode(line), about, "", self.queue)])

    def _read(self) -> list[tuple[int, dict[str, Any]]]:
        """All lines with their tags; they stay unless they are settled."""
        left = min(self._desk.transport.depth(self.queue), MOST)
        lines: list[tuple[int, dict[str, Any]]] = []
        if left:
            self._desk.consume(self.queue, left)
        while len(lines) < left and (came := self._desk.take()):
            lines += [(delivery.tag, msgspec.json.decode(delivery.body)) for delivery in came]
        return lines


def name_of(item: Item) -> Name:
    """Its name in a plan."""
    return item.service, item.key or item.uuid
