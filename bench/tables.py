"""The tables of the documents whose figures are those on record: ``python -m bench docs`` writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

STORES = ("sqlite", "postgresql", "redis", "etcd")
"""In the order of the page to choose by."""


class Row(NamedTuple):
    """A row of a table: what tells it from the others under that heading, and its figures."""

    heading: str
    names: tuple[str, ...]
    figures: tuple[str, ...]

    def beginning(self) -> str:
        """Of its line."""
        return f"| {' | '.join(self.names)} |"

    def line(self) -> str:
        """All of it."""
        return f"| {' | '.join(self.names + self.figures)} |"


def renew_all(record: Path, folder: Path) -> None:
    """Write the figures on record into the documents of ``folder``."""
    for name in ("performance.md", "inbox.md", "stores.md"):
        file = folder / name
        file.write_text(renewed(name, file.read_text(), record))


def renewed(document: str, text: str, record: Path) -> str:
    """Its text with the figures on record.  Raises `SystemExit` if it does not have a row once."""
    lines = text.split("\n")
    under = list(_headings(lines))
    for row in _rows(document, record):
        mine = (n for n, heading in enumerate(under) if heading == row.heading)
        places = [n for n in mine if lines[n].startswith(row.beginning())]
        if len(places) != 1:
            raise SystemExit(f"docs/{document}: {len(places)} rows {row.beginning()!r} under {row.heading!r}")
        lines[places[0]] = row.line()
    return "\n".join(lines)


def _headings(lines: Iterable[str]) -> Iterator[str]:
    """That under which each line is."""
    heading = ""
    for line in lines:
        if line.startswith("#"):
            heading = line.strip("# ")
        yield heading


def spaced(number: float) -> str:
    """As the documents write it: 12 345."""
    return f"{round(number):,}".replace(",", " ")


def _rows(document: str, record: Path) -> Iterator[Row]:
    def on_record(name: str) -> dict[str, Any]:
        return dict(json.loads((record / f"{name}.json").read_text()))

    if document == "inbox.md":
        yield from _cells("How fast", on_record("inbox")["cells"])
        return
    factors, latencies = on_record("factors")["cells"], on_record("latency")["latencies"]
    if document == "performance.md":
        yield from _cells("How fast it is, and what holds it", factors)
        yield from _latencies(latencies)
        for name, each in on_record("decorator")["calls"].items():
            yield Row("The decorator alone", (name,), (_range(each), f"{each['ratio']:.2f}"))
        yield from _growth(on_record("growth")["growth"])
        return
    heading = "Rate and memory"
    base = [factors[f"base: {store}"] for store in STORES]
    rates, file = [spaced(each["median"]) for each in base], "`bench/record/factors.json`"
    yield Row(heading, (f"fresh messages a second, median: {file}",), tuple(rates))
    shares = tuple(f"{each['ratios']['base: ceiling']:.2f}" for each in base)
    yield Row(heading, (f"of what a consumer could do that remembers nothing (the ceiling): {file}",), shares)
    idle = "one message on an idle machine, until it is acknowledged, ms, median: `bench/record/latency.json`"
    yield Row(heading, (idle,), tuple(f"{latencies[store]['settled']['p50']:.2f}" for store in STORES))


def _cells(heading: str, cells: dict[str, Any]) -> Iterator[Row]:
    for name, each in cells.items():
        ratios = (f"{ratio:.2f} x {base.split(': ')[1]}" for base, ratio in each["ratios"].items())
        yield Row(heading, (name,), (_range(each), ", ".join(ratios)))


def _range(each: dict[str, float]) -> str:
    return f"{spaced(each['median'])} ({spaced(each['low'])} to {spaced(each['high'])})"


def _latencies(found: dict[str, Any]) -> Iterator[Row]:
    for name, each in found.items():
        added = "" if name == "plain" or "put" in name else f"{each['added']['p50']:.2f}"
        yield Row("Latency", (name,), (*(f"{each['settled'][share]:.2f}" for share in ("p50", "p99")), added))


def _growth(growth: dict[str, Any]) -> Iterator[Row]:
    for store, sizes in growth.items():
        for size, each in sizes.items():
            carried = (f"{each['memory']}", f"{each['ready']}") if "memory" in each else ("none", "at once")
            figures = (spaced(each["rate"]), f"{each['of_empty']:.2f}", f"{each['bytes']:.0f}", *carried)
            yield Row("Growth", (store, spaced(int(size))), figures)
