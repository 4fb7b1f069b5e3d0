"""The simulator by hand: ``python -m tests.simulator [SEED] [--steps N] [--classic retry|park|ask]``.

With a seed alone it runs that world; with steps, worlds from that seed upwards until so many are made.
"""

from __future__ import annotations

import argparse
import sys
import time

from idemp.bars import watching
from idemp.ports import Progress
from tests.simulator import Broken, Tally, World


def main() -> int:
    """Run, and print what happened."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulator")
    parser.add_argument("seed", type=int, nargs="?")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--classic", choices=("retry", "park", "ask"))
    given = parser.parse_args()
    steps = given.steps or (1 if given.seed is not None else 500_000)
    tally, seed, began = Tally(), given.seed or 0, time.perf_counter()
    try:
        with watching("steps", lambda: Progress(tally.steps, steps)):
            while tally.steps < steps:
                world = World(seed, in_doubt=given.classic) if given.classic else World.swarm(seed)
                tally.run(world)
                seed += 1
    except Broken as broken:
        print(f"\nseed {seed}: {broken}", file=sys.stderr)
        return 1
    finally:
        seconds = time.perf_counter() - began
        print(f"{tally}\n{seconds:.1f} s, {tally.steps / seconds:.0f} steps a second")
    return 0


sys.exit(main())
