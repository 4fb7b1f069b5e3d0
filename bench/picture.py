"""Pictures of what is on record, as SVG that needs no script and reads in light and dark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#57606a}.bar{fill:#8c959f}.ours{fill:#2f81f7}"
    ".axis{stroke:#8c959f;stroke-opacity:.4}.line{fill:none;stroke:#2f81f7;stroke-width:2}"
    "@media(prefers-color-scheme:dark){text{fill:#9da7b3}}"
)
_WIDTH, _LEFT, _ROW = 760, 250, 26


class Bar(NamedTuple):
    """One line of a chart.  ``label``: what stands at its end."""

    name: str
    value: float
    label: str
    ours: bool


def bars(title: str, rows: Sequence[Bar]) -> str:
    """Horizontal bars, the longest over the whole width."""
    most = max(row.value for row in rows)
    room = _WIDTH - _LEFT - 150
    parts = []
    for number, row in enumerate(rows):
        top = 40 + number * _ROW
        parts.append(f'<text x="{_LEFT - 8}" y="{top + 14}" text-anchor="end">{escape(row.name)}</text>')
        kind = "bar ours" if row.ours else "bar"
        width = max(1.0, room * row.value / most)
        parts.append(f'<rect class="{kind}" x="{_LEFT}" y="{top}" width="{width:.1f}" height="18" rx="3"/>')
        parts.append(f'<text x="{_LEFT + width + 6:.1f}" y="{top + 14}">{escape(row.label)}</text>')
    return _svg(title, 52 + len(rows) * _ROW, parts)


def lines(title: str, names: Sequence[str], curves: Mapping[str, Sequence[float]]) -> str:
    """A curve each over the same places, each in its own panel from zero."""
    parts = []
    for panel, (name, values) in enumerate(curves.items()):
        top, height = 44 + panel * 110, 80
        most = max(values) * 1.1
        step = (_WIDTH - _LEFT - 110) / max(1, len(names) - 1)
        points = [
            (_LEFT + 50 + at * step, top + height * (1 - value / most)) for at, value in enumerate(values)
        ]
        parts.append(f'<text x="{_LEFT - 8}" y="{top + height / 2}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<path class="axis" d="M{_LEFT} {top + height}H{_WIDTH - 20}"/>')
        parts.append(f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        for (x, y), value, place in zip(points, values, names, strict=True):
            parts.append(f'<text x="{x:.1f}" y="{y - 6:.1f}" text-anchor="middle">{value:g}</text>')
            if panel == len(curves) - 1:
                parts.append(f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{place}</text>')
    return _svg(title, 70 + len(curves) * 110, parts)


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">'
    name = f'<title>{escape(title)}</title><style>{_STYLE}</style><text x="12" y="22">{escape(title)}</text>'
    return head + name + "".join(parts) + "</svg>\n"


def draw_all(record: Path, into: Path) -> None:
    """docs/speed.svg and docs/growth.svg."""
    cells = _read(record, "factors")["cells"]
    (into / "speed.svg").write_text(bars("Fresh messages a second, one consumer, 2 cores", _base(cells)))
    growth = _read(record, "growth")["growth"]
    panels = {
        "messages a second on etcd": ("etcd", "rate"),
        "messages a second on sqlite": ("sqlite", "rate"),
        "bytes of memory an id, etcd": ("etcd", "memory"),
        "bytes in the store an id, etcd": ("etcd", "bytes"),
        "seconds until ready, etcd": ("etcd", "ready"),
    }
    curves = {name: [each[what] for each in growth[store].values()] for name, (store, what) in panels.items()}
    names = [f"{int(size):,} ids".replace(",", " ") for size in growth["etcd"]]
    (into / "growth.svg").write_text(lines("idemp with ever more remembered ids", names, curves))


def _base(cells: dict[str, Any]) -> list[Bar]:
    words = {
        "plain": "plain pika, an ack each",
        "ceiling": "pika's ceiling, remembers nothing",
        "seed": "a put in etcd for each message",
    }
    found = []
    for cell, each in cells.items():
        factor, name = cell.split(": ")
        if factor == "base":
            ratio = each["ratios"].get("base: plain")
            label = f"{each['median']:,.0f}".replace(",", " ") + (f"  ({ratio:.2f} x plain)" if ratio else "")
            found.append(Bar(words.get(name, f"idemp on {name}"), each["median"], label, name not in words))
    return sorted(found, key=lambda bar: bar.value)


def _read(record: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((record / f"{name}.json").read_text())
    return found
