"""The flow: services, and what goes from which to which, as text, for Graphviz and for Mermaid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from idemp.ports import Edge

UNKNOWN = "(unknown)"
"""The sender of messages that name none."""
_BAD = ("failed", "parked", "rejected", "conflict", "lost")


class Arrow(msgspec.Struct):
    """What went from one service to another.  ``types``: what kinds of messages; seconds are of handlers."""

    sender: str
    service: str
    types: list[str] = []
    outcomes: dict[str, int] = {}
    seconds: float = 0.0
    longest: float = 0.0
    first: float = math.inf
    last: float = 0.0

    @property
    def n(self) -> int:
        """Events in all."""
        return sum(self.outcomes.values())

    @property
    def failing(self) -> float:
        """The share of what failed or was set aside, from 0 to 1."""
        bad = sum(self.outcomes.get(kind, 0) for kind in _BAD)
        return bad / self.n if self.n else 0.0

    @property
    def rate(self) -> float:
        """Events a second, over the minutes in which there were any."""
        return self.n / (self.last - self.first + 60.0)

    @property
    def mean(self) -> float:
        """Seconds that its handler ran, on the average."""
        runs = self.outcomes.get("ok", 0) + self.outcomes.get("failed", 0)
        return self.seconds / runs if runs else 0.0


def arrows(edges: Sequence[Edge]) -> list[Arrow]:
    """One for each pair of services, in the order of names; a service that sends to itself is no arrow."""
    found: dict[tuple[str, str], Arrow] = {}
    for edge in edges:
        if not edge.service or edge.sender == edge.service:
            continue
        pair = (edge.sender or UNKNOWN, edge.service)
        arrow = found.setdefault(pair, Arrow(*pair))
        if edge.type and edge.type not in arrow.types:
            arrow.types.append(edge.type)
        arrow.outcomes[edge.kind] = arrow.outcomes.get(edge.kind, 0) + edge.n
        arrow.seconds += edge.seconds
        arrow.longest = max(arrow.longest, edge.longest)
        arrow.first, arrow.last = min(arrow.first, edge.first), max(arrow.last, edge.last)
    return [found[pair] for pair in sorted(found)]


def services(edges: Sequence[Edge]) -> list[str]:
    """All that sent or received, also what nobody received, in the order of names."""
    named = {edge.sender or UNKNOWN for edge in edges} | {edge.service for edge in edges}
    return sorted(named - {""})


# ------------------------------------------------------------------ drawings


def text(edges: Sequence[Edge]) -> Iterator[str]:
    """A line an arrow."""
    for arrow in arrows(edges):
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(arrow.outcomes.items()))
        yield (
            f"{arrow.sender} -> {arrow.service}  {kinds}; {arrow.rate:.2f}/s, {arrow.failing:.1%} failing, "
            f"{arrow.mean * 1000:.1f} ms on average, {arrow.longest * 1000:.1f} ms at most"
        )


def dot(edges: Sequence[Edge]) -> str:
    """Graphviz: each node and right after it its arrows; names are quoted."""
    lines = ["digraph message_flow {", "  node [style=filled fillcolor=white]", "  rankdir=LR"]
    found = arrows(edges)
    for name in services(edges):
        lines.append(f"  {_quoted(name)}")
        lines += [f"  {_quoted(name)} -> {_quoted(each.service)}" for each in found if each.sender == name]
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(name: str) -> str:
    text = name.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else " " for c in text) + '"'


def mermaid(edges: Sequence[Edge]) -> str:
    """For Markdown pages that draw it."""
    names = services(edges)
    number = {name: place for place, name in enumerate(names)}
    lines = ["flowchart LR", *(f"  s{number[name]}[{_entities(name)}]" for name in names)]
    lines += [
        f"  s{number[each.sender]} -->|{_entities(label(each))}| s{number[each.service]}"
        for each in arrows(edges)
    ]
    return "\n".join(lines) + "\n"


def _entities(name: str) -> str:
    plain = "".join(c if c.isalnum() or c in " -_./%,:" else f"#{ord(c)};" for c in name)
    return f'"{plain}"'


def label(arrow: Arrow) -> str:
    """What is written on it in a drawing."""
    bad = f", {arrow.failing:.1%} failing" if arrow.failing else ""
    return f"{arrow.n}{bad}"


def record(arrow: Arrow) -> dict[str, Any]:
    """An arrow for programs; seconds are of handlers."""
    return {
        "from": arrow.sender,
        "to": arrow.service,
        "types": sorted(arrow.types),
        "messages": arrow.n,
        "outcomes": arrow.outcomes,
        "rate": round(arrow.rate, 4),
        "failing": round(arrow.failing, 4),
        "mean_seconds": round(arrow.mean, 6),
        "longest_seconds": round(arrow.longest, 6),
    }
