"""The record of all runs: one line each in tally.jsonl, and their sum."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.reliability.checker import lines_of

FILE = Path(__file__).with_name("tally.jsonl")


def line_of(folder: Path) -> dict[str, Any]:
    """What is kept of a run.  Raises `OSError`, `ValueError` or `KeyError` if the folder has no verdict."""
    file = folder / "verdict.json"
    verdict = json.loads(file.read_text())
    counts = verdict["counts"]
    return {
        "date": datetime.fromtimestamp(file.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M"),
        **{name: verdict[name] for name in ("seed", "minutes", "profile", "store", "commit")},
        "messages": counts["attempted"],
        "publications": counts["publications"],
        "deliveries": counts["deliveries"],
        "effects": counts["effects"],
        "faults": sum(verdict["faults"].values()),
        "kinds": sorted(verdict["faults"]),
        "kills": sum(count for kind, count in verdict["faults"].items() if "kill" in kind),
        "doubles_named": counts.get("doubled and named", 0),
        "doubles_unnamed": counts.get("doubled and unnamed", 0),
        "lost": counts["lost"],
        "invented": counts["unexpected"],
        "verdict": verdict["result"],
        "drain_p99": round(verdict["drained"], 2),
    }


def add(folder: Path, file: Path = FILE) -> None:
    """Append a run."""
    with file.open("a") as lines:
        lines.write(json.dumps(line_of(folder)) + "\n")


def runs(file: Path = FILE) -> list[dict[str, Any]]:
    """All of them."""
    return list(lines_of(file))


def total(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Their sum."""
    sums: Counter[str] = Counter()
    for run in found:
        for name, value in run.items():
            if isinstance(value, int) and name != "seed":
                sums[name] += value
    verdicts = Counter(run["verdict"] for run in found)
    return {
        "runs": len(found),
        **{verdict: verdicts[verdict] for verdict in ("valid", "unknown", "invalid")},
        "minutes": round(sum(run["minutes"] for run in found), 1),
        **{name: sums[name] for name in sums if name != "minutes"},
        "kinds": len({kind for run in found for kind in run["kinds"]}),
        "worst drain_p99": max((run["drain_p99"] for run in found), default=0.0),
    }
