"""The model by hand: ``python -m tests.model [--long] [mutant ...]``."""

from __future__ import annotations

import sys

from tests.model.journal import Config, Faults
from tests.model.mutants import MUTANTS
from tests.model.search import search
from tests.model.test_model import SMALL

ROLL = Config("", buckets=1, ticks=1)

LONG = (
    Config("three processes race, events lost", ("CT", "CT", "CT"), (2, 1, 1), faults=Faults(drop=1)),
    Config("two expiries", appends=(2, 3), faults=Faults(expiry=2)),
    Config("expiry, events lost", ("CQ", "CT"), (3, 2), faults=Faults(expiry=1, drop=1)),
    Config("crash, restart, reply lost, a copy", appends=(2, 3), faults=Faults(1, 0, 1, 1), restart=True),
    Config("parked, resolved, expiry", ("CP", "RT"), (3, 3), faults=Faults(expiry=1, drop=1)),
    Config("two keys, two lines, expiry", ("C", "CT"), (2, 2), keys=2, batch=2, faults=Faults(expiry=1)),
    ROLL._replace(name="roll", verbs=("C", "CESB"), appends=(2, 4)),
    ROLL._replace(name="roll, expiry", verbs=("C", "ESBT"), appends=(2, 5), faults=Faults(expiry=1)),
    ROLL._replace(name="roll, import", verbs=("CR", "ESB"), appends=(2, 3), faults=Faults(imports=1)),
    ROLL._replace(name="roll, events lost", verbs=("CR", "ESB"), appends=(2, 3), faults=Faults(drop=1)),
    ROLL._replace(
        name="roll, crash, three processes",
        verbs=("CQ", "ESB", "CT"),
        appends=(2, 3, 2),
        faults=Faults(crash=1),
    ),
    ROLL._replace(
        name="roll, reply lost, a copy, events lost",
        verbs=("C", "ESB"),
        appends=(2, 3),
        faults=Faults(lost=1, copy=1, drop=1),
    ),
    ROLL._replace(
        name="two rolls, import", verbs=("CR", "ESB"), appends=(2, 6), buckets=2, faults=Faults(imports=1)
    ),
    ROLL._replace(name="two rolls, two rollers", verbs=("ESB", "ESB"), appends=(4, 2), buckets=2),
    ROLL._replace(name="roll, forgotten, parked", verbs=("CPT", "ESBF"), appends=(3, 4)),
)


def main(words: list[str]) -> None:
    """Search, and say what was found."""
    limit = 300_000
    if words and words[0].isdigit():
        limit = int(words.pop(0))
    if not words or "--long" in words:
        for config in (*SMALL, *(LONG if "--long" in words else ())):
            for head in (False, True):
                name = f"{config.name}{', head' if head else ''}"
                print(search(config._replace(name=name, head=head), limit), flush=True)
    for mutant in MUTANTS:
        if not words or mutant.name in words:
            for head in mutant.heads:
                print(f"without: {mutant.removed}\n{search(mutant.weakened(head), limit)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
