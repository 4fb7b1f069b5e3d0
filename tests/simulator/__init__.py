"""A world for the shipped pipeline: clock, broker, store and processes simulated, faults by chance."""

from tests.simulator.judge import Broken
from tests.simulator.plan import CLASSIC, Plan, swarm
from tests.simulator.tally import Tally
from tests.simulator.world import World

__all__ = ["CLASSIC", "Broken", "Plan", "Tally", "World", "swarm"]
