"""The shortest series of faults that still breaks it: halves are left out while it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tests.chaos.schedule import Planned

Fails = Callable[[Sequence[Planned]], bool]


def minimise(faults: Sequence[Planned], fails: Fails, tries: int, seconds: float) -> Sequence[Planned]:
    """As few of ``faults`` as ``tries`` runs and so much time find; ``fails`` runs some: did it break?"""
    end = time.monotonic() + seconds
    parts = 2
    while len(faults) > 1:
        size = -(-len(faults) // parts)
        for start in range(0, len(faults), size):
            if not tries or time.monotonic() > end:
                return faults
            tries -= 1
            # With two parts, each alone; with more, all but one.
            stop = start + size
            less = faults[start:stop] if parts == 2 else [*faults[:start], *faults[stop:]]
            if fails(less):
                faults, parts = less, 2
                break
        else:
            if size == 1:
                return faults
            parts = min(len(faults), 2 * parts)
    return faults
