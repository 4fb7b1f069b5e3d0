"""verdict.json, report.md and timeline.svg in a run's folder."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.chaos.picture import draw, timeline
from tests.chaos.run import Outcome
from tests.reliability.checker import Finding, lines_of, merged

INVARIANTS = ("I1", "I2", "I3", "I4", "I5", "I6", "I7", "I8", "I9", "I10", "I16", "I17", "crash")
SHOWN = 40
LINES = 200


def write(outcome: Outcome, commit: str) -> None:
    """All three."""
    folder, verdict, plan = outcome.folder, outcome.verdict, outcome.schedule
    facts = {
        "seed": plan.seed,
        "minutes": plan.minutes,
        "profile": plan.profile,
        "store": plan.store,
        "commit": commit,
        **verdict.as_json(),
    }
    (folder / "verdict.json").write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "report.md").write_text("\n".join(_report(outcome, commit)) + "\n")
    title = f"seed {plan.seed}, {plan.minutes:g} minutes, {plan.profile}, {plan.store}: {verdict.result}"
    picture = timeline(merged(folder), lines_of(folder / "ledger"))
    (folder / "timeline.svg").write_text(draw(picture, title))


def _report(outcome: Outcome, commit: str) -> Iterator[str]:
    verdict, plan = outcome.verdict, outcome.schedule
    which = f"seed {plan.seed}, {plan.minutes:g} minutes, {plan.profile}, {plan.store}"
    yield f"# {verdict.result}: {which}, at {commit}"
    yield ""
    yield "![the run](timeline.svg)"
    yield ""
    yield "| what | how many |"
    yield "|---|---|"
    for name, count in verdict.counts.items():
        yield f"| {name} | {count} |"
    yield f"| recall of doubts | {verdict.recall:.3f} |"
    yield f"| precision of doubts | {verdict.precision:.3f} |"
    yield f"| seconds from the last heal until 99 of 100 had ended | {verdict.drained:.2f} |"
    yield ""
    yield from _table("answer", verdict.outcomes)
    yield from _faults(verdict.faults, verdict.drains)
    yield "| invariant | findings |"
    yield "|---|---|"
    for invariant in INVARIANTS:
        yield f"| {invariant} | {sum(each.invariant == invariant for each in verdict.findings)} |"
    yield ""
    for finding in verdict.findings[:SHOWN]:
        yield f"- **{finding.invariant}** `{finding.id}` {finding.what}"
        for line in finding.lines:
            yield f"    - `{line}`"
    yield from _of_ids(outcome.folder, verdict.findings)


def _table(name: str, counts: Mapping[str, int]) -> Iterator[str]:
    yield f"| {name} | how many |"
    yield "|---|---|"
    for key, count in sorted(counts.items()):
        yield f"| {key} | {count} |"
    yield ""


def _faults(counts: Mapping[str, int], drains: Sequence[tuple[str, float]]) -> Iterator[str]:
    longest: dict[str, list[float]] = defaultdict(list)
    for kind, seconds in drains:
        longest[kind].append(seconds)
    yield "| fault | times | seconds until what was confirmed by its heal had ended, at most |"
    yield "|---|---|---|"
    for kind, count in sorted(counts.items()):
        yield f"| {kind} | {count} | {max(longest[kind], default=0.0):.1f} |"
    yield ""


def _of_ids(folder: Path, findings: Sequence[Finding]) -> Iterator[str]:
    """Every line of the first ids that something was found of."""
    ids = list(dict.fromkeys(each.id for each in findings if each.id))[:5]
    if not ids:
        return
    of: dict[str, list[dict[str, Any]]] = {id: [] for id in ids}
    for line in merged(folder):
        if line.get("k") in of and len(of[line["k"]]) < LINES:
            of[line["k"]].append(line)
    for id, lines in of.items():
        yield f"\n## {id}\n"
        yield from (f"    {json.dumps(line)}" for line in lines)
