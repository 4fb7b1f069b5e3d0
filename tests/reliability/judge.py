"""Judges one small run: from its histories, ledger, store and dead letters to a list of violations.  Pure.

The rules are those of the promise, each on its own, and none believes the product where a witness can
be asked: an ack is judged by what its process had been told by then, an effect by the ledger.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from idemp.ports import Done, Parked, State
from tests.reliability.history import Line

COPIES = ("retry", "dead")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a run left behind.

    published: id -> how often it was sent to the queue.  effects: the ledger.  dead: id -> its copies
    among the dead letters.  paused: processes that were stopped for a while and went on.
    """

    published: Mapping[str, int]
    lines: Sequence[Line]
    effects: Sequence[Line]
    states: Mapping[str, State]
    dead: Mapping[str, int] = field(default_factory=dict)
    paused: frozenset[int] = frozenset()


class Doubt(NamedTuple):
    """A takeover: attempt ``att`` of ``k`` follows one that is in doubt.  ``true``: that one took effect."""

    k: str
    att: int
    true: bool


def judge(evidence: Evidence) -> list[str]:
    """Every violation, as a sentence."""
    return [f"{rule.__name__}: {found}" for rule in RULES for found in rule(evidence)]


def doubts(evidence: Evidence) -> list[Doubt]:
    """The doubts on record."""
    attempted = {(effect["k"], effect["att"]) for effect in evidence.effects}
    return [
        Doubt(line["k"], line["att"], (line["k"], line["att"] - 1) in attempted)
        for line in evidence.lines
        if line["f"] == "takeover" and _claimed(line)
    ]


class Again(NamedTuple):
    """``k`` took effect again, though no failure allowed it.  ``named``: a doubt on record says so."""

    k: str
    att: int
    named: bool


def doubled(evidence: Evidence) -> list[Again]:
    """Every effect beyond the first of its key, but for those that follow a failure."""
    lines = evidence.lines
    taken = {(line["k"], line["tok"]) for line in lines if _claimed(line) and line["f"] == "takeover"}
    failed = {(line["k"], line["tok"]) for line in lines if line["f"] == "run" and line["type"] == "fail"}
    return [
        Again(id, next["att"], (id, next["tok"]) in taken)
        for id, effects in _by_id(evidence.effects).items()
        for one, next in pairwise(_by_token(effects))
        if (id, one["tok"]) not in failed
    ]


def windows(evidence: Evidence) -> list[float]:
    """Of each effect: seconds until its handler's return was known to be recorded."""
    began = {(effect["k"], effect["tok"]): effect["t"] for effect in evidence.effects}
    recorded = [line for line in evidence.lines if _applied(line, "complete")]
    ends = [(line["t"], began.get((line["k"], line["tok"]))) for line in recorded]
    return [(end - begin) / 1e9 for end, begin in ends if begin is not None]


# ------------------------------------------------------------------ the rules


def nothing_lost(evidence: Evidence) -> Iterator[str]:
    """Every id is done, or parked and among the dead letters."""
    for id in evidence.published:
        match evidence.states.get(id):
            case Done():
                pass
            case Parked():
                if not evidence.dead.get(id):
                    yield f"{id} is parked, and no dead letter has it"
            case other:
                yield f"{id} ended as {other}"


def nothing_invented(evidence: Evidence) -> Iterator[str]:
    """No id appears that nobody published; a dead letter's key is parked; copies have their causes."""
    seen = {effect["k"] for effect in evidence.effects} | {*evidence.states, *evidence.dead}
    seen |= {line["k"] for line in evidence.lines if "k" in line}
    for id in sorted(seen - evidence.published.keys()):
        yield f"{id} was never published"
    struck = {line["p"] for line in evidence.lines if line["f"] == "failpoint"}
    began = Counter(
        line["k"]
        for line in evidence.lines
        if line["f"] in COPIES and line["type"] == "invoke" and line["p"] in struck
    )
    for id, copies in evidence.dead.items():
        if not isinstance(evidence.states.get(id), Parked):
            yield f"{id} is among the dead letters, and {evidence.states.get(id)}"
        # A copy that was sent, and not yet its original acknowledged, is doubled by a crash.
        elif copies > evidence.published.get(id, 0) + began[id]:
            yield f"{id} has {copies} dead letters of {evidence.published.get(id, 0)} messages"


def acknowledged_after_its_end(evidence: Evidence) -> Iterator[str]:
    """Before an ack its process has been told that the key is done, or a copy was confirmed for it."""
    told: set[tuple[int, str]] = set()
    copies: Counter[tuple[int, str]] = Counter()
    for line in evidence.lines:
        here = (line["p"], line.get("k", ""))
        if _applied(line, "complete") or line.get("r") == "done" or line.get("now") == "done":
            told.add(here)
        elif line["f"] in COPIES and line["type"] == "ok":
            copies[here] += 1
        elif line["f"] == "ack" and line["type"] == "invoke" and here not in told:
            copies[here] -= 1
            if copies[here] < 0:
                yield f"{here[1]} was acknowledged by {here[0]} with nothing that allows it"


def done_once(evidence: Evidence) -> Iterator[str]:
    """One completion applies, and its result never changes."""
    tokens, results = defaultdict(set), defaultdict(set)
    for line in evidence.lines:
        if _applied(line, "complete"):
            tokens[line["k"]].add(line["tok"])
        if "sha" in line and (_applied(line, "complete") or line.get("r") == "done"):
            results[line["k"]].add(line["sha"])
    for what, found in (("completed with tokens", tokens), ("answered with results", results)):
        for id, each in found.items():
            if len(each) > 1:
                yield f"{id} was {what} {sorted(each)}"


def numbers_grow(evidence: Evidence) -> Iterator[str]:
    """Each effect has a token and an attempt of its own; both grow with time, but for who was paused."""
    for id, effects in _by_id(evidence.effects).items():
        running = [effect for effect in effects if effect["p"] not in evidence.paused]
        for one, next in [*pairwise(running), *pairwise(_by_token(effects))]:
            if not (one["tok"] < next["tok"] and one["att"] < next["att"]):
                yield f"{id}: attempt {next['att']} ({next['tok']}) after {one['att']} ({one['tok']})"


def effects_are_named(evidence: Evidence) -> Iterator[str]:
    """An effect beyond the first follows a failure or a doubt, and no more are there than attempts."""
    for again in doubled(evidence):
        if not again.named:
            yield f"{again.k} took effect again at attempt {again.att}, and no doubt names the one before"
    for id, effects in _by_id(evidence.effects).items():
        state = evidence.states.get(id)
        if isinstance(state, Done | Parked) and len(effects) > state.attempt:
            yield f"{id} took effect {len(effects)} times in {state.attempt} attempts"


def never_run_again(evidence: Evidence) -> Iterator[str]:
    """No run begins after its key is known to be done, and none without a claim of its process.

    But for one under a claim that was taken over, in a process that was stopped between the look at its
    session and the handler's first instruction: nothing can close that gap.
    """
    done: dict[str, int] = {}
    stops = Counter(line["p"] for line in evidence.lines if line.get("action") == "stop")
    claimed: set[tuple[int, str, int]] = set()
    for line in evidence.lines:
        if _applied(line, "complete") or line.get("r") == "done":
            done.setdefault(line["k"], line["tok"])
        elif _claimed(line):
            claimed.add((line["p"], line["k"], line["tok"]))
        elif line["f"] == "run" and line["type"] == "invoke":
            if line["tok"] < done.get(line["k"], 0) and stops[line["p"]]:
                stops[line["p"]] -= 1
            elif line["k"] in done:
                yield f"{line['k']} was run again, after it was done"
            mine = (line["p"], line["k"], line["tok"])
            if mine not in claimed:
                yield f"{line['k']} was run without a claim, or twice with one"
            claimed.discard(mine)


def one_at_a_time(evidence: Evidence) -> Iterator[str]:
    """Two processes never run one key at a time; who was paused past its session may."""
    # What a process that was killed had begun ended with it, at its last line or soon after.
    died = {line["p"]: line["t"] for line in evidence.lines}
    running: dict[str, Line] = {}
    for line in evidence.lines:
        if line["f"] != "run" or line["p"] in evidence.paused:
            continue
        if line["type"] != "invoke":
            running.pop(line["k"], None)
            continue
        other = running.get(line["k"])
        if other is not None and died[other["p"]] >= line["t"]:
            yield f"{line['k']} was run by {other['p']} and {line['p']} at a time"
        running[line["k"]] = line


RULES: Sequence[Callable[[Evidence], Iterator[str]]] = (
    nothing_lost,
    nothing_invented,
    acknowledged_after_its_end,
    done_once,
    numbers_grow,
    effects_are_named,
    never_run_again,
    one_at_a_time,
)


def _applied(line: Line, f: str) -> bool:
    return bool(line["f"] == f and line.get("r") == "applied")


def _claimed(line: Line) -> bool:
    return bool(line.get("r") == "claimed")


def _by_id(effects: Sequence[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = defaultdict(list)
    for effect in effects:
        found[effect["k"]].append(effect)
    return found


def _by_token(effects: Sequence[Any]) -> list[Any]:
    return sorted(effects, key=lambda effect: effect["tok"])
