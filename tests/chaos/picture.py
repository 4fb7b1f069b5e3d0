"""The run as a picture: bars for faults, lines for what happened each second.  An SVG, written by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from tests.reliability.checker import SECOND
from tests.reliability.history import Line

WIDTH, LEFT, TOP, PLOT, ROW = 1100, 60, 40, 180, 14
COLORS = {"published": "#64748b", "effects": "#0f6f64", "acknowledged": "#b45309"}
BARS = {
    "consumer": "#7c3aed",
    "publisher": "#64748b",
    "message": "#db2777",
    "etcd": "#0f6f64",
    "store-net": "#0ea5e9",
    "broker": "#b45309",
    "broker-net": "#eab308",
    "machine": "#475569",
}


class Bar(NamedTuple):
    """A fault: seconds from the start of the run."""

    kind: str
    begin: float
    end: float


class Timeline(NamedTuple):
    """What is drawn.  rates: name -> how many in each second."""

    seconds: int
    bars: Sequence[Bar]
    rates: Mapping[str, Sequence[int]]


def timeline(lines: Iterable[Line], ledger: Iterable[Line]) -> Timeline:
    """From the histories; the effects are the ledger's."""
    seen: dict[str, Counter[int]] = {name: Counter() for name in COLORS}
    began: dict[int, tuple[str, int]] = {}
    spans: list[tuple[str, int, int]] = []
    first = last = 0
    for line in lines:
        t = line["t"]
        first, last = first or t, max(last, t)
        match line["f"], line["type"]:
            case "publish", "ok":
                seen["published"][t // SECOND] += 1
            case "ack", "invoke":
                seen["acknowledged"][t // SECOND] += 1
            case kind, "invoke" if line["role"] == "nemesis":
                began[line["op"]] = (kind, t)
            case kind, "ok" if line["role"] == "nemesis" and line.get("op") in began:
                spans.append((*began.pop(line["op"]), line.get("healed", t)))
    for effect in ledger:
        seen["effects"][effect["t"] // SECOND] += 1
    start = first // SECOND
    seconds = max(1, last // SECOND - start + 1)
    rates = {name: [counts[start + n] for n in range(seconds)] for name, counts in seen.items()}
    bars = [Bar(kind, (begin - first) / SECOND, (end - first) / SECOND) for kind, begin, end in spans]
    return Timeline(seconds, sorted(bars, key=lambda bar: bar.begin), rates)


def draw(found: Timeline, title: str) -> str:
    """The SVG."""
    rows = _rows(found.bars)
    height = TOP + PLOT + 30 + ROW * (max(rows, default=0) + 2)
    scale = (WIDTH - LEFT - 20) / found.seconds
    highest = _highest(found.rates)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>',
        *_axes(found.seconds, scale, highest),
    ]
    for place, (name, rate) in enumerate(found.rates.items()):
        points = " ".join(
            f"{LEFT + n * scale:.1f},{TOP + PLOT - min(count, highest) * PLOT / highest:.1f}"
            for n, count in enumerate(rate)
        )
        parts.append(f'<polyline fill="none" stroke="{COLORS[name]}" stroke-width="1.4" points="{points}"/>')
        parts.append(f'<text x="{LEFT + 110 * place}" y="33" fill="{COLORS[name]}">{name} a second</text>')
    for bar, row in zip(found.bars, rows, strict=True):
        x, y = LEFT + bar.begin * scale, TOP + PLOT + 26 + row * ROW
        color = next((c for name, c in BARS.items() if bar.kind.startswith(f"{name}.")), "#334155")
        width = max(2.0, (bar.end - bar.begin) * scale)
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 3}" fill="{color}"/>')
        parts.append(f'<text x="{x + width + 2:.1f}" y="{y + 9}" font-size="8">{escape(bar.kind)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _highest(rates: Mapping[str, Sequence[int]]) -> int:
    """What two in a hundred seconds go beyond: one burst must not press all the rest to the ground."""
    counts = sorted(count for rate in rates.values() for count in rate)
    return max(1, counts[len(counts) * 98 // 100]) if counts else 1


def _axes(seconds: int, scale: float, highest: int) -> Iterable[str]:
    bottom = TOP + PLOT
    yield f'<path d="M{LEFT},{TOP}V{bottom}H{WIDTH - 20}" fill="none" stroke="#94a3b8"/>'
    yield f'<text x="{LEFT - 6}" y="{TOP + 8}" text-anchor="end">{highest}</text>'
    yield f'<text x="{LEFT - 6}" y="{bottom}" text-anchor="end">0</text>'
    step = max(10, seconds // 10 // 10 * 10)
    for second in range(0, seconds, step):
        x = LEFT + second * scale
        yield f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{second} s</text>'


def _rows(bars: Sequence[Bar]) -> list[int]:
    """A row for each, so that neither they nor their names lie upon each other."""
    ends: list[float] = []
    rows = []
    name = 0.0
    total = max((bar.end for bar in bars), default=1.0)
    for bar in bars:
        name = total * 5.0 * len(bar.kind) / (WIDTH - LEFT)
        row = next((n for n, end in enumerate(ends) if end <= bar.begin), len(ends))
        if row == len(ends):
            ends.append(0.0)
        ends[row] = bar.end + name
        rows.append(row)
    return rows
