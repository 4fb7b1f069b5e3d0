"""Which fault begins when: drawn from a seed before the run, written down, and read again for a replay.

A seed fixes the load and the faults; how the operating system lets processes take turns it does not.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

GAP = 1.5
"""Seconds without a fault after each time with one, at least."""
TAIL = 10.0
"""Seconds after the last, with the load going on."""
LEAD = 2.0
"""Seconds before the first fault."""
LATER = 0.8
"""Seconds that the second of two begins after the first, at most."""


class Planned(NamedTuple):
    """A fault: when it begins (seconds), its kind, how long it lasts, and which of several it meets."""

    at: float
    kind: str
    seconds: float
    pick: int


class Span(NamedTuple):
    """What the plan has to know of a kind of fault.

    scope: two of one scope never overlap.  seconds: the shortest and the longest.  settle: seconds that its
    consequences take, and that must be left before the end.
    """

    scope: str
    seconds: tuple[float, float]
    settle: float = 0.0


class Profile(NamedTuple):
    """What the load is like, and how dense the faults are.

    rate: new message ids a second.  floor: confirmed publications a second; less is no load.
    stretch: how long faults last, compared with their own measure.  free: time without a fault after each
    time with one, as a part of it; 1/3 is a quarter of the whole.  two: how often two faults overlap.
    """

    rate: float
    floor: float
    stretch: float
    free: float
    two: float


PROFILES: Mapping[str, Profile] = {
    "quick": Profile(165.0, 120.0, 0.7, 1.4, 0.45),
    "full": Profile(150.0, 100.0, 1.0, 1.4, 0.45),
    "soak": Profile(150.0, 100.0, 1.5, 1.4, 0.45),
}


STORES = ("etcd", "postgresql", "redis")


class BadSchedule(Exception):
    """A file that is no schedule; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The plan of one run, on one store."""

    seed: int
    minutes: float
    profile: str
    faults: Sequence[Planned]
    store: str = "etcd"

    def write(self, file: Path) -> None:
        plan = {**asdict(self), "faults": [fault._asdict() for fault in self.faults]}
        file.write_text(json.dumps(plan, indent=1) + "\n")

    def only(self, faults: Sequence[Planned]) -> Schedule:
        """With these alone, as soon as they can begin, and no longer than they take."""
        if not faults:
            return replace(self, faults=())
        earlier = max(0.0, min(fault.at for fault in faults) - LEAD)
        moved = [fault._replace(at=round(fault.at - earlier, 2)) for fault in faults]
        end = max(fault.at + fault.seconds for fault in moved) + 5.0
        return replace(self, minutes=min(self.minutes, round(end / 60 + 0.05, 2)), faults=moved)


def read(file: Path) -> Schedule:
    """A schedule that was written before.  Raises `BadSchedule`."""
    try:
        plan: dict[str, Any] = json.loads(file.read_text())
        faults = [Planned(**fault) for fault in plan.pop("faults")]
        found = Schedule(faults=faults, **plan)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadSchedule(f"{file} is no schedule: {error}") from None
    if found.store not in STORES:
        raise BadSchedule(f"{file} names the store {found.store!r}; there are {', '.join(STORES)}")
    if found.profile not in PROFILES:
        raise BadSchedule(f"{file} names the profile {found.profile!r}; there are {', '.join(PROFILES)}")
    return found


def make(seed: int, minutes: float, profile: str, kinds: Mapping[str, Span], store: str = "etcd") -> Schedule:
    """Every kind in turn, in an order of its own each time, until the time is over."""
    dice = random.Random(f"{seed} {profile}")
    _, _, stretch, free, two = PROFILES[profile]
    end = minutes * 60 - min(TAIL, minutes * 6)
    deck = _deck(dice, sorted(kinds))
    faults: list[Planned] = []
    at = LEAD
    while kinds and at < end:
        first = _fitting(deck, kinds, stretch, end - at, ())
        chosen = [first] if first else []
        if first and dice.random() < two:
            second = _fitting(deck, kinds, stretch, end - at, (kinds[first].scope,))
            chosen += [second] if second else []
        if not chosen:
            break
        longest = 0.0
        for kind in chosen:
            seconds = round(dice.uniform(*kinds[kind].seconds) * stretch, 2)
            later = round(dice.uniform(0, LATER), 2) if kind != chosen[0] else 0.0
            faults.append(Planned(round(at + later, 2), kind, seconds, dice.randrange(1000)))
            longest = max(longest, later + seconds)
        at += longest + max(GAP, longest * free)
    return Schedule(seed=seed, minutes=minutes, profile=profile, faults=faults, store=store)


class _Cards:
    """Kinds in shuffled rounds; one that does not fit is kept for later."""

    def __init__(self, more: Iterator[str], kinds: int) -> None:
        self._more, self._kinds = more, kinds
        self._waiting: list[str] = []

    def draw(self, fits: Any) -> str:
        for place, kind in enumerate(self._waiting):
            if fits(kind):
                return self._waiting.pop(place)
        for _ in range(2 * self._kinds):
            kind = next(self._more)
            if fits(kind):
                return kind
            if kind not in self._waiting:
                self._waiting.append(kind)
        return ""


def _deck(dice: random.Random, kinds: Sequence[str]) -> _Cards:
    def rounds() -> Iterator[str]:
        while True:
            yield from dice.sample(kinds, len(kinds))

    return _Cards(rounds(), len(kinds))


def _fitting(
    deck: _Cards, kinds: Mapping[str, Span], stretch: float, left: float, scopes: Sequence[str]
) -> str:
    """The next kind of another scope for which there is time."""

    def fits(kind: str) -> bool:
        span = kinds[kind]
        return span.scope not in scopes and LATER + span.seconds[1] * stretch + span.settle < left

    return deck.draw(fits)
