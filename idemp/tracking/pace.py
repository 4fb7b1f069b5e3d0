"""The pace of a replay: what became of what went, by the receivers' stores, and whether more may go."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from idemp.ports import Clock, Get, Store
from idemp.tracking.replay import TOGETHER, Released, outcome

AHEAD = 1000
"""Messages that may be on their way without an outcome."""
WINDOW = 100
"""Messages, the last that came to something, whose failures count."""
LEAST = 20
"""Fewer than these tell nothing."""
_BAD = ("failed", "parked", "in doubt")
_OPEN = ("waiting", "failed", "in doubt")
_LOOK = 0.1


class Pace:
    """Follows a replay.

    stores: the dedup store of a service.  limit: the share of failures, from 0 to 1, at which it pauses;
    0 for never.  patience: seconds that it waits for the receivers when too much is on its way.
    """

    def __init__(
        self, stores: Callable[[str], Store], *, limit: float, patience: float, clock: Clock | None = None
    ) -> None:
        self._stores, self._limit, self._patience = stores, limit, patience
        self._clock = clock or Clock()
        self.outcomes: dict[Released, str] = {}
        self._open: dict[Released, None] = {}
        self._last: deque[Released] = deque(maxlen=WINDOW)

    def sent(self, some: Sequence[Released]) -> None:
        """These went."""
        for each in some:
            self.outcomes[each] = "waiting"
            self._open[each] = None

    def ended(self) -> bool:
        """Whether all that went came to an end."""
        return not self._open

    def over(self) -> int:
        """How many came to an end."""
        return len(self.outcomes) - len(self._open)

    def look(self) -> int:
        """Ask the stores; of how many the outcome has changed."""
        changed = 0
        asked = list(self._open)
        for service in dict.fromkeys(each.service for each in asked):
            mine = [each for each in asked if each.service == service]
            for start in range(0, len(mine), TOGETHER):
                some = mine[start : start + TOGETHER]
                states = self._stores(service).apply([Get(each.key) for each in some])
                changed += sum(self._became(each, state) for each, state in zip(some, states, strict=True))
        return changed

    def _became(self, each: Released, state: object) -> bool:
        before, now = self.outcomes[each], outcome(each, state)
        self.outcomes[each] = now
        if now not in _OPEN:
            del self._open[each]
        # A skip tells nothing of the handler.
        if before == "waiting" != now and each.verdict != "done":
            self._last.append(each)
        return before != now

    def trouble(self, goes_on: Callable[[], bool]) -> str:
        """Why nothing more may go now; "" if it may.  Waits for receivers that are far behind."""
        if not self._limit:
            return ""
        self.look()
        since = self._clock.steady()
        while not (why := self._failing()) and goes_on() and (behind := self._behind()) > AHEAD:
            if self.look():
                since = self._clock.steady()
            elif self._clock.steady() - since > self._patience:
                return f"{behind} are on their way, and nothing came of any for {self._patience:.0f} s"
            self._clock.sleep(_LOOK)
        return why

    def _behind(self) -> int:
        return sum(self.outcomes[each] == "waiting" and bool(each.key) for each in self._open)

    def _failing(self) -> str:
        bad = sum(self.outcomes[each] in _BAD for each in self._last)
        if len(self._last) < LEAST or bad < self._limit * len(self._last):
            return ""
        return f"{bad} of the last {len(self._last)} fail"
