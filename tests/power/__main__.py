"""Power loss by hand: ``python -m tests.power [--images N] [--setting NAME] [--json FILE]``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from idemp.bars import bar
from tests.power.disk import why_not
from tests.power.harness import Row, Verdict, run, verdict, with_controls
from tests.power.settings import SETTINGS, Expect
from tests.servers.catalog import SERVERS

_WIDTHS = (36, 14, 7, 13, 8, 12, 8)
_HEAD = ("setting", "expected", "images", "acknowledged", "lost", "images hit", "verdict")


def main(words: Sequence[str] | None = None) -> int:
    """Cut, print the table, and say with the number it ends with what the run is worth."""
    wanted = _arguments().parse_args(words)
    names = with_controls(wanted.setting) if wanted.setting else list(SETTINGS)
    if reason := why_not() or _missing(names):
        print(reason, file=sys.stderr)
        return Verdict.UNKNOWN
    print(_line(_HEAD), flush=True)
    rows = []
    for name in names:
        images = wanted.images if SETTINGS[name].expect is not Expect.LOSES else wanted.controls
        rows.append(_measure(name, images, wanted.jobs))
        print(_line(_cells(rows[-1])), flush=True)
        if wanted.json:  # after each, for who has to stop a long run
            wanted.json.write_text(json.dumps(_report(rows), indent=1) + "\n")
    for row in rows:
        if reason := row.verdict()[1]:
            print(f"{row.setting}: {reason}")
    print(f"this run is {verdict(rows).name.lower()}")
    return verdict(rows)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.power", description="Cut the power, and count.")
    parser.add_argument("--images", type=int, default=3, metavar="N", help="cuts of each setting: 3")
    parser.add_argument("--controls", type=int, default=1, metavar="N", help="cuts of each control: 1")
    parser.add_argument(
        "--setting", action="append", choices=SETTINGS, metavar="NAME", help=f"one of: {'; '.join(SETTINGS)}"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cuts at a time: 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


def _missing(names: Sequence[str]) -> str:
    needed = {server for name in names for server in SETTINGS[name].needs}
    missing = sorted(server for server in needed if SERVERS[server].path() is None)
    return f"{missing[0]} is not on this machine: `make servers` brings it" if missing else ""


def _measure(name: str, images: int, jobs: int) -> Row:
    with bar(images, name, least=1) as step:
        return run(name, images, jobs=jobs, tell=lambda: step(1))


def _cells(row: Row) -> tuple[object, ...]:
    counts = (len(row.images), row.acknowledged, row.lost, row.hit)
    return (row.setting, row.expect.value, *counts, row.verdict()[0].name.lower())


def _line(cells: Sequence[object]) -> str:
    """Words to the left, numbers to the right."""
    return "  ".join(
        f"{cell:>{width}}" if isinstance(cell, int) else f"{cell:<{width}}"
        for cell, width in zip(cells, _WIDTHS, strict=True)
    ).rstrip()


def _report(rows: Sequence[Row]) -> dict[str, object]:
    return {
        "verdict": verdict(rows).name.lower(),
        "rows": [
            {
                "setting": row.setting,
                "expected": row.expect.value,
                "images": len(row.images),
                "acknowledged": row.acknowledged,
                "lost": row.lost,
                "images_hit": row.hit,
                "verdict": row.verdict()[0].name.lower(),
                "why": row.verdict()[1],
                "each": [{**image._asdict(), "lost": len(image.lost)} for image in row.images],
            }
            for row in rows
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
