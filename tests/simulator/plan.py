"""What a world is made of: which faults, how often, and on which store.  Everything follows from the seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import NamedTuple

STRIKES = (
    "kill",
    "pause",
    "mute",
    "disconnect",
    "stop",
    "store_away",
    "duplicate",
    "reorder",
    "clock",
    "leap",
    "person",
)
"""What strikes from outside, now and then.

mute: heartbeats do not get through, while everything else goes on.  clock: the wall clock jumps.
leap: time goes on for longer than the retention while messages wait.  person: resolves a parked key.
"""
ODDS = {
    "lost_reply": 0.06,
    "lost_request": 0.06,
    "slow_reply": 0.08,
    "unconfirmed": 0.12,
    "confirm_lost": 0.12,
    "unroutable": 0.10,
    "resolver_raises": 0.5,
    "resolver_unknown": 0.3,
    "not_started": 0.2,
    "raises": 0.4,
    "raises_after": 0.2,
    "InDoubt": 0.2,
    "permanent": 0.1,
    "retry_later": 0.2,
    "interrupted": 0.1,
    "slow_handler": 0.1,
}
"""What may happen each time that it could, and how likely at most."""
ODD_MESSAGES = ("poison", "conflict", "garbage", "unknown", "old", "bare")
"""poison: kills its process every time.  unknown: no handler for its type.  bare: no policy."""


class Plan(NamedTuple):
    """One world.

    strikes: kind -> weight; ``blows`` of them fall.  odds: kind -> probability.
    odd: kind -> how many messages are so.  spread: seconds in which the messages are published.  trouble:
    seconds that the odds last, and until the last strike; then all is calm.
    """

    in_doubt: str = "retry"
    store: str = "ledger"
    keys: int = 6
    copies: int = 3
    processes: int = 2
    workers: int = 1
    prefetch: int = 5
    attempts: int = 50
    retention: float = 3600.0
    fingerprint: bool = False
    fenced: bool = False
    blows: int = 12
    spread: float = 0.0
    trouble: float = 5.0
    strikes: Mapping[str, float] = {}
    odds: Mapping[str, float] = {}
    odd: Mapping[str, int] = {}


CLASSIC = Plan(
    spread=10.0,
    trouble=15.0,
    strikes={"kill": 1, "pause": 3, "disconnect": 1, "stop": 1},
    odds={"not_started": 0.05, "raises": 0.1, "InDoubt": 0.05, "unconfirmed": 0.1, "slow_handler": 0.3},
)


def swarm(seed: int) -> Plan:
    """A random subset of the faults with random weights, so that rare ones are not averaged out."""
    chance = random.Random(f"plan {seed}")
    among = chance.random()

    def subset(names: tuple[str, ...]) -> list[str]:
        return [name for name in names if chance.random() < among]

    fingerprint = chance.random() < 0.3
    odd = {name: chance.randint(1, 2) for name in subset(ODD_MESSAGES)}
    if not fingerprint:
        odd.pop("conflict", None)
    strikes = {name: chance.expovariate(1.0) for name in subset(STRIKES)}
    # A retention that is over while the world lasts, or one beside which the jumps of clocks are small:
    # it counts by the wall clock, so one that jumps back shortens it.
    retention = 3600.0
    if chance.random() < 0.25:
        retention = 40.0
    if retention < 3600.0 or "leap" in strikes:
        strikes.pop("clock", None)
    return Plan(
        in_doubt=chance.choice(["retry", "park", "ask"]),
        store=chance.choice(["ledger", "journal"]),
        keys=chance.choice([1, 3, 6, 12, 24]),
        copies=chance.randint(1, 4),
        processes=chance.randint(1, 4),
        workers=chance.choice([1, 1, 2, 5]),
        prefetch=chance.choice([1, 2, 4, 8, 16]),
        attempts=chance.choice([1, 2, 3, 5, 5, 5, 50]),
        retention=retention,
        fingerprint=fingerprint,
        fenced=chance.random() < 0.3,
        blows=chance.randint(0, 40),
        spread=chance.choice([0.0, 5.0, 30.0]),
        trouble=chance.choice([10.0, 60.0, 200.0]),
        strikes=strikes,
        odds={name: chance.random() * ODDS[name] for name in subset(tuple(ODDS))},
        odd=odd,
    )
