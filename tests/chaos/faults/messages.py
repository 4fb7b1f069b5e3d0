"""What befalls in the shape of messages."""

from __future__ import annotations

from functools import partial

from tests.chaos.faults.kind import Fault, Kind, Witness
from tests.chaos.ground import SESSION
from tests.chaos.schedule import Span
from tests.chaos.stage import Stage

_WORD = 40.0
"""Seconds that the broker's word may take: another fault may hold it up."""


class Ordered(Fault):
    """The publisher sends some of a kind; ``told``: what the broker has to say of them."""

    def __init__(
        self, stage: Stage, pick: int, seconds: float, *, order: str, count: int, told: str = "ok"
    ) -> None:
        super().__init__(stage, pick, seconds)
        self._order, self._count, self._told = order, count, told

    def inject(self) -> None:
        seconds = SESSION + 1.0  # longer than a session may be silent
        self._number = self.stage.publisher.order(self._order, count=self._count, seconds=seconds)

    def witness(self) -> Witness:
        answer = self.stage.publisher.answer(self._number, _WORD)
        return answer if answer and answer.get(self._told) else None


class Poison(Ordered):
    """It kills whoever runs it, until its attempts are used up."""

    def inject(self) -> None:
        self._before = self.stage.replicas.ends["-9"]
        super().inject()

    def after(self) -> Witness:
        killed = self.stage.replicas.ends["-9"] - self._before
        return {"killed": killed} if killed else None


def _kind(order: str, count: int, settle: float = 0.0, told: str = "ok", *, quick: bool = False) -> Kind:
    make = partial(Poison if order == "poison" else Ordered, order=order, count=count, told=told)
    return Kind(make, Span("publisher", (0.5, 2.0), settle), quick)


KINDS = {
    "message.poison": _kind("poison", 1, 45.0, quick=True),
    "message.slow": _kind("slow", 2, 10.0, quick=True),
    "message.raising": _kind("raising", 30, 5.0, quick=True),
    "message.hopeless": _kind("hopeless", 3, 10.0),
    "message.storm": _kind("storm", 8, quick=True),
    "message.repeats": _kind("repeats", 150),
    "message.conflict": _kind("conflict", 10, 5.0, quick=True),
    "message.garbage": _kind("garbage", 20, quick=True),
    "message.unroutable": _kind("unroutable", 10, told="fail"),
}
