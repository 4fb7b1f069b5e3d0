"""The flow: services, and what goes from which to which, as text, Graphviz, Mermaid and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
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
        f"  s{number[each.sender]} -->|{_entities(_label(each))}| s{number[each.service]}"
        for each in arrows(edges)
    ]
    return "\n".join(lines) + "\n"


def _entities(name: str) -> str:
    plain = "".join(c if c.isalnum() or c in " -_./%,:" else f"#{ord(c)};" for c in name)
    return f'"{plain}"'


def _label(arrow: Arrow) -> str:
    bad = f", {arrow.failing:.1%} failing" if arrow.failing else ""
    return f"{arrow.n}{bad}"


def svg(edges: Sequence[Edge]) -> str:
    """A picture: services on a circle, arrows as wide as they are busy, red where messages fail."""
    names, found = services(edges), arrows(edges)
    radius = max(120.0, 34.0 * len(names))
    size = 2 * radius + 240
    middle = size / 2
    places = {
        name: (
            middle + radius * math.cos(2 * math.pi * n / len(names) - math.pi / 2),
            middle + radius * math.sin(2 * math.pi * n / len(names) - math.pi / 2),
        )
        for n, name in enumerate(names)
    }
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size:.0f} {size:.0f}" role="img" '
        'font-family="sans-serif" font-size="13">',
        "<title>message flow</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" '
        'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 8 4 0 8z"/></marker></defs>',
        f'<rect width="{size:.0f}" height="{size:.0f}" fill="#fff"/>',
        *(_curve(each, places[each.sender], places[each.service]) for each in found),
        *(_box(name, *places[name]) for name in names),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _curve(arrow: Arrow, start: tuple[float, float], end: tuple[float, float]) -> str:
    (x1, y1), (x2, y2) = start, end
    length = math.hypot(x2 - x1, y2 - y1) or 1.0
    ux, uy = (x2 - x1) / length, (y2 - y1) / length
    # Bent to the right, so that two services that send to each other have two arrows.
    mx, my = (x1 + x2) / 2 - uy * 26, (y1 + y2) / 2 + ux * 26
    ex, ey = x2 - ux * 40, y2 - uy * 26
    colour = "#b42318" if arrow.failing > 0.01 else "#344054"
    width = 1 + math.log10(max(arrow.n, 1))
    told = escape(f"{arrow.sender} to {arrow.service}: {_label(arrow)}", quote=True)
    return (
        f'<path d="M{x1:.1f} {y1:.1f} Q{mx:.1f} {my:.1f} {ex:.1f} {ey:.1f}" fill="none" stroke="{colour}" '
        f'stroke-width="{width:.1f}" marker-end="url(#tip)"><title>{told}</title></path>'
        f'<text x="{mx:.1f}" y="{my:.1f}" text-anchor="middle" fill="{colour}">{escape(_label(arrow))}</text>'
    )


def _box(name: str, x: float, y: float) -> str:
    told = escape("".join(c if c.isprintable() else " " for c in name))
    width = 24 + 8 * len(name)
    return (
        f'<rect x="{x - width / 2:.1f}" y="{y - 15:.1f}" width="{width}" height="30" rx="6" fill="#f2f4f7" '
        f'stroke="#344054"/><text x="{x:.1f}" y="{y + 5:.1f}" text-anchor="middle">{told}</text>'
    )


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
