"""What befalls the connections between consumers, publisher, store and broker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from tests.chaos.faults.kind import Fault, Kind, Witness
from tests.chaos.schedule import Span
from tests.chaos.stage import Stage, until
from tests.proxy import Proxy, Way

Doors = Callable[[Stage, int], Sequence[Proxy]]
_SEEN = 15.0
"""Seconds that traffic may take to meet a fault that waits for it."""


def store(stage: Stage, pick: int) -> Sequence[Proxy]:
    """To all members, or to the one that is spoken to most at the moment."""
    if pick % 2:
        return stage.doors
    before = [door.counts.questions for door in stage.doors]
    time.sleep(0.3)
    passed = [door.counts.questions - count for door, count in zip(stage.doors, before, strict=True)]
    return [stage.doors[passed.index(max(passed))]] if any(passed) else stage.doors


def all_of_store(stage: Stage, pick: int) -> Sequence[Proxy]:
    return stage.doors


def broker(stage: Stage, pick: int) -> Sequence[Proxy]:
    return [stage.broker_door]


def publisher(stage: Stage, pick: int) -> Sequence[Proxy]:
    return [stage.publisher_door]


class OfDoors(Fault):
    """Does something to some proxies."""

    def __init__(self, stage: Stage, pick: int, seconds: float, *, doors: Doors) -> None:
        super().__init__(stage, pick, seconds)
        self.doors = doors(stage, pick)

    def total(self, *names: str) -> int:
        """What they have counted so far."""
        return sum(getattr(door.counts, name) for door in self.doors for name in names)


class Cut(OfDoors):
    """Every connection is reset, again and again."""

    def inject(self) -> None:
        self._cut = 0
        for _ in range(1 + self.pick % 3):
            # Another fault may have ended them all just now.
            self._cut += until(lambda: sum(door.cut() for door in self.doors), _SEEN) or 0
            time.sleep(0.2)

    def witness(self) -> Witness:
        return {"cut": self._cut} if self._cut else None


class Silent(OfDoors):
    """Nothing gets through, one way or both, and no connection ends."""

    def __init__(
        self,
        stage: Stage,
        pick: int,
        seconds: float,
        *,
        doors: Doors,
        way: Literal["questions", "answers", "both"],
    ) -> None:
        super().__init__(stage, pick, seconds, doors=doors)
        self._way = way

    def inject(self) -> None:
        for door in self.doors:
            door.hold(questions=self._way != "answers", answers=self._way != "questions")
        self._names = ("questions", "answers") if self._way == "both" else (self._way,)
        time.sleep(0.1)
        self._before = self.total(*self._names)

    def witness(self) -> Witness:
        passed = self.total(*self._names) - self._before
        return {"held": self._names, "bytes": passed} if passed == 0 else None

    def heal(self) -> None:
        for door in self.doors:
            door.release()

    def after(self) -> Witness:
        return None


class Slow(OfDoors):
    """50 to 200 ms each way."""

    def inject(self) -> None:
        self._before = self.total("questions", "answers")
        for door in self.doors:
            door.delay(0.125, 0.075)

    def witness(self) -> Witness:
        # Nothing passes while another fault holds everybody up.
        passed = until(lambda: self.total("questions", "answers") - self._before, _SEEN)
        return {"bytes": passed} if passed else None

    def heal(self) -> None:
        for door in self.doors:
            door.delay(0.0)


class Narrow(Slow):
    """Some kilobytes a second."""

    def inject(self) -> None:
        self._before = self.total("questions", "answers")
        for door in self.doors:
            door.limit(60_000)

    def heal(self) -> None:
        for door in self.doors:
            door.limit(0)


class Waits(OfDoors):
    """Lies in wait for what passes next."""

    counted = ""

    def inject(self) -> None:
        self._before = self.total(self.counted)
        self.lie_in_wait()

    def lie_in_wait(self) -> None:
        """On every door."""

    def witness(self) -> Witness:
        met = until(lambda: self.total(self.counted) - self._before, _SEEN)
        return {self.counted: met} if met else None


class ReplyLost(Waits):
    """What was asked is done, and nobody hears of it."""

    counted = "lost"

    def lie_in_wait(self) -> None:
        for door in self.doors:
            door.lose(1 + self.pick % 3, 100)

    def heal(self) -> None:
        for door in self.doors:
            door.lose(0)


class Garbled(Waits):
    """The first byte of what comes next is another.

    There it breaks the framing, which either side must notice.  Inside a message only TLS can.
    """

    counted = "flipped"

    def lie_in_wait(self) -> None:
        ways: Sequence[Way] = ("questions", "answers") if self.pick % 3 else ("answers",)
        for door in self.doors:
            for way in ways:
                door.flip(way, 1)

    def heal(self) -> None:
        for door in self.doors:
            door.flip("questions", 0)
            door.flip("answers", 0)


class HalfClosed(OfDoors):
    """One side is told that nothing more comes."""

    def inject(self) -> None:
        self._before = self._connections()
        for door in self.doors:
            door.half_close("answers" if self.pick % 2 else "questions")

    def _connections(self) -> int:
        """Who loses one member may go to another."""
        doors = self.stage.doors if self.doors[0] in self.stage.doors else self.doors
        return sum(door.counts.connections for door in doors)

    def after(self) -> Witness:
        again = until(lambda: self._connections() > self._before, _SEEN)
        return {"connections": [self._before, self._connections()]} if again else None


def _kinds(name: str, doors: Doors, quick: Sequence[str]) -> dict[str, Kind]:
    settle = 5.0
    found = {
        "cut": Kind(partial(Cut, doors=doors), Span(name, (0.3, 1.0), settle)),
        "mute-questions": Kind(partial(Silent, doors=doors, way="questions"), Span(name, (1.0, 5.0), settle)),
        "mute-answers": Kind(partial(Silent, doors=doors, way="answers"), Span(name, (1.0, 5.0), settle)),
        "silence": Kind(partial(Silent, doors=doors, way="both"), Span(name, (1.0, 6.0), settle)),
        "slow": Kind(partial(Slow, doors=doors), Span(name, (2.0, 5.0), settle)),
        "narrow": Kind(partial(Narrow, doors=doors), Span(name, (2.0, 4.0), settle)),
        "reply-lost": Kind(partial(ReplyLost, doors=doors), Span(name, (0.5, 2.0), settle)),
        "garbled": Kind(partial(Garbled, doors=doors), Span(name, (0.5, 2.0), settle)),
        "half-closed": Kind(partial(HalfClosed, doors=doors), Span(name, (0.5, 2.0), settle)),
    }
    return {f"{name}.{kind}": found[kind]._replace(quick=kind in quick) for kind in found}


_PUBLISHER = {
    name: kind._replace(span=kind.span._replace(scope="publisher"))
    for name, kind in _kinds("publisher-net", publisher, ("reply-lost",)).items()
    if name.rpartition(".")[2] in ("cut", "silence", "slow", "reply-lost", "garbled")
}
KINDS = {
    **_kinds("store-net", store, ("cut", "mute-answers", "silence", "reply-lost", "slow", "garbled")),
    **_kinds("broker-net", broker, ("cut", "mute-questions", "reply-lost", "garbled")),
    **_PUBLISHER,
}
