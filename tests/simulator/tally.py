"""What many worlds saw, summed up."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tests.simulator.plan import ODD_MESSAGES, ODDS, STRIKES
from tests.simulator.world import World

OUTCOMES = ("ok", "skipped", "failed", "deferred", "parked", "lost", "conflict", "rejected")


@dataclass(slots=True)
class Tally:
    """Counts: steps and worlds, what struck, what deliveries came to, what the judge noticed."""

    steps: int = 0
    worlds: int = 0
    did: Counter[str] = field(default_factory=Counter)
    noticed: Counter[str] = field(default_factory=Counter)
    effects: int = 0
    messages: int = 0

    def run(self, world: World) -> None:
        """One more world, counted even if it breaks."""
        try:
            world.run()
        finally:
            self.steps += world.steps
            self.worlds += 1
            self.did.update(world.did)
            self.noticed.update(world.judge.counts)
            self.effects += sum(world.effects.values())
            self.messages += world.messages

    def missing(self) -> list[str]:
        """Kinds of faults and outcomes that did not occur, so that nothing was shown about them."""
        return [kind for kind in (*STRIKES, *ODDS, *ODD_MESSAGES, *OUTCOMES) if not self.did[kind]]

    def __str__(self) -> str:
        """Some lines."""
        rows = {
            "strikes": STRIKES,
            "odds": tuple(ODDS),
            "odd messages": ODD_MESSAGES,
            "outcomes": OUTCOMES,
        }
        named = {kind for kinds in rows.values() for kind in kinds}
        rows["more"] = tuple(sorted(set(self.did) - named))
        lines = [
            f"{self.steps} steps in {self.worlds} worlds, {self.messages} messages, {self.effects} effects"
        ]
        lines += [f"  {row}: {_list(self.did, kinds)}" for row, kinds in rows.items()]
        lines.append(f"  noticed: {_list(self.noticed, tuple(sorted(self.noticed)))}")
        return "\n".join(lines)


def _list(counts: Counter[str], kinds: tuple[str, ...]) -> str:
    return ", ".join(f"{counts[kind]} {kind}" for kind in kinds)
