"""What a fault is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tests.chaos.schedule import Span
from tests.chaos.stage import Stage

Witness = Mapping[str, Any] | None


class Fault(ABC):
    """One fault, once.  ``pick`` says which of several it meets, ``seconds`` how long it is to last."""

    def __init__(self, stage: Stage, pick: int, seconds: float) -> None:
        self.stage, self.pick, self.seconds = stage, pick, seconds

    @abstractmethod
    def inject(self) -> None:
        """Begin."""

    def witness(self) -> Witness:
        """What shows that it happened, asked before it is healed; None: nothing does."""
        return None

    def heal(self) -> None:  # noqa: B027 - some end by themselves
        """End, whatever came of the rest."""

    def after(self) -> Witness:
        """What shows it only when it is over."""
        return None


class Kind(NamedTuple):
    """needs: means without which it is left out.  quick: fit for a run of a few minutes."""

    make: Callable[[Stage, int, float], Fault]
    span: Span
    quick: bool = False
    needs: frozenset[str] = frozenset()
