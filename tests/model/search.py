"""Breadth-first search with a memory of what was seen: the first violation has a shortest trace."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

from tests.model.journal import Config, Violation, World, first, imported, successors, truth
from tests.model.machine import step


class Result(NamedTuple):
    """What a search found.  ``exhausted``: it saw every world within the budgets.

    states: worlds expanded.  depth: of the last one.  trace: up to the violation.
    """

    config: Config
    states: int
    depth: int
    exhausted: bool
    seconds: float
    violation: Violation | None = None
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line, or the trace."""
        how = "exhausted" if self.exhausted else "cut"
        if self.violation:
            how = f"violation after {len(self.trace)} steps"
        text = f"{self.config.name}: {self.states} states, depth {self.depth}, {how}, {self.seconds:.2f} s"
        if self.violation:
            text = "\n    ".join((text, *self.trace, f"=> {self.violation}"))
        return text


def search(config: Config, limit: int = 1_000_000) -> Result:
    """Expand at most ``limit`` worlds of ``config``."""
    for cached in (truth, imported, step):
        cached.cache_clear()
    began = time.perf_counter()
    root = first(config)
    parent: dict[World, World | None] = {root: None}
    queue: deque[tuple[World, int]] = deque([(root, 0)])
    states = depth = 0
    while queue:
        if states >= limit:
            return Result(config, states, depth, False, time.perf_counter() - began)
        world, depth = queue.popleft()
        states += 1
        for move in successors(config, world):
            if move.world is None:
                trace = (*_path(config, parent, world), _text(move.label))
                seconds = time.perf_counter() - began
                return Result(config, states, depth, False, seconds, move.violation, trace)
            if move.world not in parent:
                parent[move.world] = world
                queue.append((move.world, depth + 1))
    return Result(config, states, depth, True, time.perf_counter() - began)


def _path(config: Config, parent: dict[World, World | None], world: World) -> list[str]:
    """The steps from the beginning to ``world``."""
    path: list[str] = []
    before = parent[world]
    while before is not None:
        path.append(next(_text(s.label) for s in successors(config, before) if s.world == world))
        world, before = before, parent[before]
    return path[::-1]


def _text(label: tuple[object, ...]) -> str:
    return " ".join(map(str, label))
