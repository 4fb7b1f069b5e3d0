"""Judges a run from what it left behind: histories, ledger of effects, store, dead letters.

`check` reads the lines once, in the order of time, and keeps some facts of each message id; then it looks
at each id once more.  Its word has three values, and the worst wins: invalid, unknown, valid.  An operation
without a completion may have happened or not, and is never held against anybody.

I1   no loss              what the broker confirmed is done, or among the dead letters
I2   no invention         whatever was seen had been published
I3   ack after the end    an acknowledgement follows what its process knew: done, or a confirmed copy
I4   one done             one token and one result for good; nobody is told otherwise afterwards
I5   attempts             an attempt runs once, under its own claim; tokens and attempts grow together
I6   effects              each belongs to a run; one that was repeated is named; done has its effect
I7   doubts               each superseded attempt that ran is named, and nothing is named that never was
I8   overlap              two runs of a key at the same time: counted, and forbidden only on demand
I9   payload              nothing else runs under the id; what conflicts with it is a dead letter
I10  bounds               deliveries out at a time, memory
I16  liveness             after the last fault all comes to its end, in time
I17  not vacuous          each fault has a witness, and the load was not less than its floor
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from tests.reliability.history import Line

SECOND = 1_000_000_000
ALWAYS = 1 << 62
"""Later than anything."""
_OPEN = ("busy", "doubt", "claimed")
_decode = msgspec.json.Decoder().decode

Result = Literal["valid", "unknown", "invalid"]
_WORST: Sequence[Result] = ("valid", "unknown", "invalid")


class Finding(NamedTuple):
    """``id`` broke ``invariant``, or (``unknown``) nobody can tell whether it did.  lines: who saw it."""

    invariant: str
    id: str
    what: str
    lines: tuple[str, ...] = ()
    unknown: bool = False


class Kept(NamedTuple):
    """How the store has a key in the end: the name of its state in small letters, as in a history."""

    state: str
    tok: int = 0
    att: int = 0
    sha: str = ""


class Change(NamedTuple):
    """A record that the store applied: f is claim, takeover, complete, release, abandon, park or forget."""

    f: str
    k: str
    tok: int
    att: int


class Dead(NamedTuple):
    """A dead letter."""

    k: str
    outcome: str
    sha: str = ""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is asked of the run.  0 asks nothing.

    floor: confirmed publications a second.  prefetch: deliveries out at a time.  attempts: of one id.
    drain: seconds, for 99 of 100 messages, from the last heal to their ends.  rss: bytes of a process.
    fds: files that a process has open.
    overlaps: whether runs of a key may overlap, as they may where sessions are lost.
    """

    floor: float = 0.0
    prefetch: int = 0
    attempts: int = 0
    drain: float = 0.0
    rss: int = 0
    fds: int = 0
    overlaps: bool = True


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result, what speaks against it, and the numbers."""

    result: Result
    findings: Sequence[Finding]
    counts: Mapping[str, int]
    outcomes: Mapping[str, int]
    faults: Mapping[str, int]
    drains: Sequence[tuple[str, float]]
    """Of each fault: its kind, and seconds from its heal until all that was confirmed by then had ended."""
    drained: float
    """Seconds from the last heal, for 99 of 100 messages."""
    recall: float
    precision: float

    def as_json(self) -> dict[str, Any]:
        """For verdict.json."""
        found: dict[str, Any] = msgspec.to_builtins(self.__dict__)
        return found


def worst(results: Iterable[Result]) -> Result:
    """invalid before unknown before valid."""
    return max(results, key=_WORST.index, default="valid")


# ------------------------------------------------------------------ reading


def merged(folder: Path) -> Iterator[dict[str, Any]]:
    """Every line of a run in the order of time, without holding them all; a torn last line never counted."""
    return heapq.merge(*map(lines_of, sorted(folder.glob("*.jsonl"))), key=lambda line: line["t"])


def lines_of(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of one file; none if it is not there."""
    if file.exists():
        with file.open("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):
                    yield _decode(line)


# ------------------------------------------------------------------ facts of one id


class Run(NamedTuple):
    """A handler that began."""

    t: int
    p: int
    att: int
    tok: int
    sha: str


class Claim(NamedTuple):
    """A claim that was won."""

    t: int
    p: int
    att: int
    tok: int


@dataclass(slots=True)
class Facts:
    """What is known of one message id."""

    sent: set[str] = field(default_factory=set)
    """Digests of the bodies that may have been published."""
    confirmed: dict[str, int] = field(default_factory=dict)
    """Digest -> when it was confirmed first."""
    claims: list[Claim] = field(default_factory=list)
    unsure: int = 0
    """Claims and takeovers of which nobody knows what became."""
    runs: list[Run] = field(default_factory=list)
    ends: dict[tuple[int, int], tuple[int, str]] = field(default_factory=dict)
    """(attempt, token) -> when and how its run ended."""
    effects: list[Run] = field(default_factory=list)
    given_back: set[int] = field(default_factory=set)
    """Tokens that were released or parked, or may have been."""
    taken: set[int] = field(default_factory=set)
    """Attempts that a takeover began."""
    marks: dict[int, str] = field(default_factory=dict)
    """Token -> digest of the result that its holder asked to record."""
    done: tuple[int, str] | None = None
    """Token and digest of the result.  The token may be that of a takeover which its own holder made only to
    record what a lost session had finished: then it is another than the run's."""
    done_at: int = ALWAYS
    told_done: set[int] = field(default_factory=set)
    copies: Counter[int] = field(default_factory=Counter)
    """Process -> confirmed copies that no acknowledgement has been spent on."""
    ended_at: int = ALWAYS


def recorded(facts: Facts, tok: int, sha: str) -> Run:
    """The run whose return is on record; one that never was if there is none."""
    runs = [run for run in facts.runs if run.tok == tok]
    # Taken over only to be recorded: the run is the one whose holder asked for that.
    runs += [run for run in facts.runs if facts.marks.get(run.tok) == sha]
    return runs[0] if runs else Run(0, 0, 0, tok, "")


def text(line: Line) -> str:
    """A line for a finding."""
    return " ".join(f"{name}={value}" for name, value in line.items())


class _Reader:
    """Takes lines in the order of time; finds at once what a line alone can show."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.facts: dict[str, Facts] = defaultdict(Facts)
        self.findings: list[Finding] = []
        self.counts: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.last: dict[int, int] = {}
        self.faults: dict[tuple[int, int], tuple[str, int]] = {}
        self.healed: list[tuple[str, int]] = []
        self.phases: dict[str, int] = {}
        self.publications = 0
        self.kinds: Counter[str] = Counter()
        self._asked: dict[tuple[int, int], Line] = {}
        self._late: dict[int, list[Line]] = defaultdict(list)
        self._stops: Counter[int] = Counter()  # a process -> how often it was stopped
        self._out: dict[int, dict[int, str]] = defaultdict(dict)
        self._handlers: dict[str, Callable[[Facts, Line], None]] = {
            "publish": self._publish,
            "deliver": self._deliver,
            "ack": self._ack,
            "run": self._run,
            "dead": self._copy,
            "retry": self._copy,
            **dict.fromkeys(
                ("claim", "takeover", "get", "complete", "release", "abandon", "park"), self._store
            ),
        }

    def read(self, line: Line) -> None:
        self.last[line["p"]] = line["t"]
        if line["role"] == "nemesis":
            self._fault(line)
        elif line["f"] == "failpoint":
            self._stops[line["p"]] += line.get("action") == "stop"
        elif line["f"] == "connect":
            self._out.pop(line["p"], None)
        elif handler := self._handlers.get(line["f"]):
            handler(self.facts[line["k"]], line)

    def finish(self) -> None:
        """What was asked and never answered may have happened."""
        for line in self._asked.values():
            self._perhaps(line)
        self._judge_late()

    def find(self, invariant: str, what: str, line: Line) -> None:
        self.findings.append(Finding(invariant, line.get("k", ""), what, (text(line),)))

    # ---------------------------------------------------------------- the broker

    def _publish(self, facts: Facts, line: Line) -> None:
        match line["type"]:
            case "invoke":
                self.counts["publications"] += 1
                facts.sent.add(line["sha"])
            case "ok":
                self.publications += "load" in self.phases and "heal" not in self.phases
                facts.confirmed.setdefault(line["sha"], line["t"])
                facts.sent.add(line["sha"])

    def _deliver(self, facts: Facts, line: Line) -> None:
        self.counts["deliveries"] += 1
        self.counts["redeliveries"] += bool(line["again"])
        out = self._out[line["p"]]
        out[line["op"]] = line.get("sha", "")
        if self._limits.prefetch and len(out) > self._limits.prefetch:
            self.find("I10", f"{len(out)} deliveries out, {self._limits.prefetch} are allowed", line)

    def _ack(self, facts: Facts, line: Line) -> None:
        process = line["p"]
        self.counts["acks"] += 1
        body = self._out[process].pop(line["op"], "")
        # Another body than the one that was run needs its copy, though the key be done.
        mine = recorded(facts, *facts.done).sha if facts.done else ""
        if process in facts.told_done and (not body or not mine or body == mine):
            return
        if facts.copies[process] > 0:
            facts.copies[process] -= 1
        else:
            self.find("I3", "acknowledged, and its process knew neither of done nor of a copy", line)

    def _copy(self, facts: Facts, line: Line) -> None:
        if line["type"] == "ok":
            facts.copies[line["p"]] += 1
            self.outcomes[line["f"]] += 1
            if line["f"] == "dead":
                facts.ended_at = min(facts.ended_at, line["t"])

    # ---------------------------------------------------------------- the store

    def _store(self, facts: Facts, line: Line) -> None:
        place = (line["p"], line["op"])
        if line["type"] == "invoke":
            self._asked[place] = line
            if line["f"] == "complete":
                facts.marks[line["tok"]] = line["sha"]
            return
        asked = self._asked.pop(place, line)
        if line["type"] != "ok":
            self._perhaps(asked)
            return
        self.counts["store replies"] += 1
        told = line["now"] if line["r"] == "lost" else line["r"]
        self.outcomes[f"{line['f']} {line['r']}"] += 1
        if told == "claimed" and line["r"] != "lost":
            facts.claims.append(Claim(line["t"], line["p"], line["att"], line["tok"]))
            if line["f"] == "takeover":
                facts.taken.add(line["att"])
                self.counts["takeovers"] += 1
        if told == "done":
            self._done(facts, line, (line["tok"], line["sha"]))
        elif told == "applied":
            self._applied(facts, line, asked)
        elif asked["t"] > facts.done_at and not (told == "busy" and line["tok"] <= (facts.done or (0,))[0]):
            # Busy may be news of a moment ago, and only makes its reader wait; not so with a later token.
            self.find("I4", f"told {told} after it was done", line)

    def _applied(self, facts: Facts, line: Line, asked: Line) -> None:
        match line["f"]:
            case "complete":
                self._done(facts, line, (asked["tok"], asked["sha"]))
            case "release" | "park":
                facts.given_back.add(line["tok"])

    def _done(self, facts: Facts, line: Line, done: tuple[int, str]) -> None:
        if facts.done is None:
            facts.done, facts.done_at = done, line["t"]
            facts.ended_at = min(facts.ended_at, line["t"])
        elif facts.done != done and not self._taken_to_record(facts, done):
            self.find("I4", f"done as {done}, and before as {facts.done}", line)
        facts.told_done.add(line["p"])

    def _taken_to_record(self, facts: Facts, done: tuple[int, str]) -> bool:
        """The same result under a later token that nobody ran: see `Facts.done`."""
        assert facts.done is not None
        one, two = sorted((facts.done, done))
        if one[1] != two[1] or any(run.tok == two[0] for run in facts.runs):
            return False
        if facts.marks.get(one[0]) != one[1]:
            return False
        facts.done = two
        return True

    def _perhaps(self, asked: Line) -> None:
        facts = self.facts[asked["k"]]
        match asked["f"]:
            case "claim" | "takeover":
                facts.unsure += 1
            case "release" | "park":
                facts.given_back.add(asked["tok"])

    # ---------------------------------------------------------------- the handler

    def _ran_late(self, facts: Facts, line: Line) -> None:
        """Stopped between the look at its session and the handler's first instruction: once a stop, under a
        claim that was taken over since.  Nothing can close that gap; see docs/reliability.md."""
        if facts.done is not None and line["tok"] < facts.done[0]:
            self._late[line["p"]].append(line)
        else:
            self.find("I4", "run after it was done", line)

    def _judge_late(self) -> None:
        for process, lines in self._late.items():
            for line in lines[self._stops[process] :]:
                self.find("I4", "run after it was done", line)

    def _run(self, facts: Facts, line: Line) -> None:
        if line["type"] == "invoke":
            self.counts["runs"] += 1
            run = Run(line["t"], line["p"], line["att"], line["tok"], line.get("sha", ""))
            facts.runs.append(run)
            if line["t"] > facts.done_at:
                self._ran_late(facts, line)
            if self._limits.attempts and line["att"] > self._limits.attempts:
                self.find("I5", f"{self._limits.attempts} attempts are allowed", line)
            if run.sha and run.sha not in facts.sent:
                self.find("I9", "run with a body that was never published under this id", line)
        else:
            facts.ends[line["att"], line["tok"]] = (line["t"], line["type"])
            self.counts["failures"] += line["type"] == "fail"

    # ---------------------------------------------------------------- the faults

    def _fault(self, line: Line) -> None:
        place = (line["p"], line.get("op", 0))
        match line["f"], line["type"]:
            case "phase", _:
                self.phases[line["phase"]] = line["t"]
            case "sample", _:
                self.counts["largest rss"] = max(self.counts["largest rss"], line["rss"])
                self.counts["most open files"] = max(self.counts["most open files"], line.get("fds", 0))
                if self._limits.fds and line.get("fds", 0) > self._limits.fds:
                    self.find("I10", f"{line['of']} has {line['fds']} files open", line)
                if self._limits.rss and line["rss"] > self._limits.rss:
                    self.find("I10", f"{line['of']} has {line['rss']} bytes of memory", line)
            case kind, "invoke":
                self.kinds[kind] += 1
                self.faults[place] = (kind, line["t"])
            case kind, "ok":
                self.faults.pop(place, None)
                self.healed.append((kind, line.get("healed", line["t"])))
                self._stops[(line.get("witness") or {}).get("stopped", 0)] += 1
                if not line.get("witness"):
                    self.findings.append(
                        Finding("I17", "", f"{kind} has no witness", (text(line),), unknown=True)
                    )


# ------------------------------------------------------------------ the judgement


def check(
    lines: Iterable[Line],
    ledger: Iterable[Line],
    dump: Mapping[str, Kept] | None,
    dead: Iterable[Dead],
    changes: Iterable[Change] | None = None,
    limits: Limits | None = None,
) -> Verdict:
    """Judge a run.

    lines: of all processes, in the order of time.  ledger: the effects as they happened.  dump: id -> how
    the store has it in the end; None: it could not be read.  dead: what is in the dead-letter queue.
    changes: what the store applied, in its own order, where it can tell: then it is the truth on doubts.
    """
    limits = limits or Limits()
    reader = _Reader(limits)
    for line in lines:
        reader.read(line)
    reader.finish()
    for effect in ledger:
        run = Run(effect["t"], effect["p"], effect["att"], effect["tok"], effect.get("sha", ""))
        reader.facts[effect["k"]].effects.append(run)
    letters: dict[str, list[Dead]] = defaultdict(list)
    for letter in dead:
        letters[letter.k].append(letter)
    history: dict[str, list[Change]] | None = None
    if changes is not None:
        history = defaultdict(list)
        for change in changes:
            history[change.k].append(change)
    for id in [*letters, *(dump or {}), *(history or {})]:
        reader.facts[id]  # it may be one that no process ever saw
    judge = _Judge(reader, dump, letters, history, limits)
    for id, facts in reader.facts.items():
        judge.look_at(id, facts)
    return judge.verdict()


class _Judge:
    """Looks at each id once."""

    def __init__(
        self,
        reader: _Reader,
        dump: Mapping[str, Kept] | None,
        letters: Mapping[str, Sequence[Dead]],
        history: Mapping[str, Sequence[Change]] | None,
        limits: Limits,
    ) -> None:
        self._reader, self._dump, self._letters, self._limits = reader, dump, letters, limits
        self._history = history
        self._findings = reader.findings
        self.counts = reader.counts
        self.named = self.named_in_vain = self.superseded = self.missed = 0
        self.ends: list[tuple[int, int]] = []

    def look_at(self, id: str, facts: Facts) -> None:
        kept = (self._dump or {}).get(id)
        named = self._named(id, facts)
        self._loss(id, facts, kept)
        self._done(id, facts, kept)
        self._attempts(id, facts)
        self._effects(id, facts, kept, named)
        self._doubts(id, facts, kept, named)
        self._overlaps(id, facts)
        self._payload(id, facts, kept)

    def _find(self, invariant: str, id: str, what: str, *seen: object, unknown: bool = False) -> None:
        lines = tuple(map(str, seen))
        self._findings.append(Finding(invariant, id, what, lines, unknown))

    # ---------------------------------------------------------------- I1, I2, I16

    def _loss(self, id: str, facts: Facts, kept: Kept | None) -> None:
        copies = self._letters.get(id, ())
        state = kept.state if kept else ""
        settled = state == "done" or bool(copies)
        self.counts["attempted"] += bool(facts.sent)
        self.counts["acknowledged"] += bool(facts.confirmed)
        self.counts["ok"] += bool(facts.confirmed) and settled
        self.counts["recovered"] += not facts.confirmed and bool(facts.sent) and settled
        self.counts["parked"] += state == "parked"
        if not facts.sent:
            if id or copies:
                self.counts["unexpected"] += 1
                self._find("I2", id, "nobody published it", *facts.runs, *facts.claims, kept, *copies)
            return
        if self._dump is None:
            return
        if state in _OPEN:
            self._find("I16", id, f"still {state} in the end", kept)
        elif state == "parked" and not copies and (facts.confirmed or facts.told_done):
            self._find("I1", id, "parked, and no dead letter has it", kept)
            self.counts["lost"] += 1
        elif facts.confirmed and not settled:
            self._find("I1", id, f"confirmed, and in the end it is {state or 'nowhere'}", kept)
            self.counts["lost"] += 1
        elif facts.confirmed and facts.ended_at < ALWAYS:
            self.ends.append((min(facts.confirmed.values()), facts.ended_at))

    # ---------------------------------------------------------------- I4

    def _done(self, id: str, facts: Facts, kept: Kept | None) -> None:
        if facts.done and self._dump is not None:
            if kept is None or kept.state != "done":
                self._find("I4", id, f"was done as {facts.done}, and in the end is not", kept)
            elif (kept.tok, kept.sha) != facts.done:
                later = kept.tok > facts.done[0] and facts.marks.get(facts.done[0]) == kept.sha
                if not later or any(run.tok == kept.tok for run in facts.runs):
                    self._find("I4", id, f"was done as {facts.done}, and in the end otherwise", kept)
        if self._history is not None:
            applied = [change for change in self._history.get(id, ()) if change.f != "forget"]
            done = [place for place, change in enumerate(applied) if change.f == "complete"]
            if len({applied[place].tok for place in done}) > 1:
                self._find("I4", id, "the store took done twice", *applied)
            elif done and any(change.f != "complete" for change in applied[done[0] :]):
                self._find("I4", id, "the store took something after done", *applied)

    # ---------------------------------------------------------------- I5

    def _attempts(self, id: str, facts: Facts) -> None:
        runs = sorted(facts.runs, key=lambda run: run.tok)
        for one, two in pairwise(runs):
            if one.tok == two.tok or one.att >= two.att:
                self._find("I5", id, "an attempt ran twice, or after a later one", one, two)
        claims = sorted(facts.claims, key=lambda claim: claim.tok)
        for one, two in pairwise(claims):  # type: ignore[assignment]
            if one.tok == two.tok:
                self._find("I5", id, "two hold one claim", one, two)
            elif one.att > two.att:
                self._find("I5", id, "tokens grow, and attempts do not", one, two)
        won = {(claim.p, claim.att, claim.tok) for claim in facts.claims}
        for run in facts.runs:
            if (run.p, run.att, run.tok) not in won:
                self._find("I5", id, "run without a claim", run)
        if self._history is not None:
            given = [change for change in self._history.get(id, ()) if change.f in ("claim", "takeover")]
            if any(one.tok >= two.tok for one, two in pairwise(given)):
                self._find("I5", id, "the store's tokens went back", *given)

    # ---------------------------------------------------------------- I6

    def _effects(self, id: str, facts: Facts, kept: Kept | None, named: set[int]) -> None:
        self.counts["effects"] += len(facts.effects)
        self.counts["duplicated"] += len(facts.effects) > 1
        ran = {(run.p, run.att, run.tok) for run in facts.runs}
        done = self._done_by(facts, kept)
        accepted = 0
        unfailed: list[Run] = []
        seen: set[int] = set()
        for effect in facts.effects:
            if (effect.p, effect.att, effect.tok) not in ran:
                self._find("I6", id, "an effect without a run", effect)
            if effect.tok in seen:
                self._find("I6", id, "two effects of one attempt", effect)
            seen.add(effect.tok)
            self.counts["late effects, which a fenced sink refuses"] += effect.tok < accepted
            accepted = max(accepted, effect.tok)
            if facts.ends.get((effect.att, effect.tok), (0, ""))[1] != "fail":
                unfailed.append(effect)
        if done and facts.effects and accepted != done:
            self._find("I6", id, "a fenced sink's last effect is not the one on record", *facts.effects)
        if done and done not in seen:
            self._find("I6", id, "done without its effect", kept)
        unfailed.sort(key=lambda effect: effect.tok)
        for effect in unfailed[:-1]:
            self.counts["doubled"] += 1
            if effect.att in named:
                self.counts["doubled and named"] += 1
            else:
                self.counts["doubled and unnamed"] += 1
                self._find("I6", id, "an effect was repeated, and no doubt names it", *facts.effects)

    def _done_by(self, facts: Facts, kept: Kept | None) -> int:
        """The token of the run that is on record, 0 if none is."""
        if kept and kept.state == "done":
            return recorded(facts, kept.tok, kept.sha).tok
        return recorded(facts, *facts.done).tok if facts.done else 0

    # ---------------------------------------------------------------- I7

    def _named(self, id: str, facts: Facts) -> set[int]:
        """The attempts that were named in doubt."""
        if self._history is not None:
            return {c.att - 1 for c in self._history.get(id, ()) if c.f == "takeover"}
        found = {attempt - 1 for attempt in facts.taken}
        if facts.unsure:
            # What a takeover of which nobody heard named, shows in the attempts that follow.
            given_back = {claim.att for claim in facts.claims if claim.tok in facts.given_back}
            found |= set(range(1, max((claim.att for claim in facts.claims), default=0))) - given_back
        return found

    def _doubts(self, id: str, facts: Facts, kept: Kept | None, named: set[int]) -> None:
        effects = {effect.att for effect in facts.effects}
        self.named += len(named)
        self.named_in_vain += len(named - effects)
        done = self._done_by(facts, kept)
        last = max((run.tok for run in facts.runs), default=0)
        for run in facts.runs:
            if run.tok == done or run.tok in facts.given_back or (run.tok == last and not done):
                continue
            self.superseded += 1
            if run.att not in named:
                self.missed += 1
                self._find("I7", id, "superseded, and no doubt names it", run)
            elif kept and kept.state in ("done", "parked") and kept.att <= run.att:
                self._find("I7", id, "the store's attempts do not tell of it", run, kept)
        if self._history is not None:
            made = {c.att for c in self._history.get(id, ()) if c.f in ("claim", "takeover")}
        elif facts.unsure:
            return
        else:
            made = {claim.att for claim in facts.claims}
        for attempt in named - made:
            self._find("I7", id, f"attempt {attempt} is named in doubt, and never was", *facts.claims)

    # ---------------------------------------------------------------- I8

    def _overlaps(self, id: str, facts: Facts) -> None:
        runs = sorted(facts.runs)
        for one, two in pairwise(runs):
            end, _ = facts.ends.get((one.att, one.tok), (self._reader.last[one.p], ""))
            if two.t < end:
                self.counts["overlaps"] += 1
                if not self._limits.overlaps:
                    self._find("I8", id, "two runs at the same time", one, two)

    # ---------------------------------------------------------------- I9

    def _payload(self, id: str, facts: Facts, kept: Kept | None) -> None:
        bodies = facts.confirmed.keys()
        if len(bodies) < 2 or not kept or kept.state != "done" or self._dump is None:
            return
        mine = recorded(facts, kept.tok, kept.sha).sha
        dead = {letter.sha for letter in self._letters.get(id, ())}
        self.counts["conflicts"] += len(bodies - {mine})
        for body in bodies - {mine} - dead if mine else ():
            self._find("I9", id, f"body {body} conflicts with what was done, and no dead letter has it")

    # ---------------------------------------------------------------- the whole

    def verdict(self) -> Verdict:
        drained = self._liveness()
        self._vacuous()
        for name in ("lost", "unexpected", "duplicated", "doubled", "overlaps", "takeovers", "redeliveries"):
            self.counts.setdefault(name, 0)
        result = worst(["unknown" if each.unknown else "invalid" for each in self._findings])
        return Verdict(
            result=result,
            findings=self._findings,
            counts=dict(self.counts),
            outcomes=dict(self._reader.outcomes),
            faults=dict(self._reader.kinds),
            drains=self._drains(),
            drained=drained,
            recall=1.0 - self.missed / self.superseded if self.superseded else 1.0,
            precision=1.0 - self.named_in_vain / self.named if self.named else 1.0,
        )

    def _drains(self) -> list[tuple[str, float]]:
        ends = sorted(self.ends)
        confirmed = [at for at, _ in ends]
        latest = list(accumulate((end for _, end in ends), max))
        found = []
        for kind, heal in self._reader.healed:
            place = bisect_right(confirmed, heal)
            found.append((kind, max(0, latest[place - 1] - heal) / SECOND if place else 0.0))
        return found

    def _liveness(self) -> float:
        heal = self._reader.phases.get("heal")
        if heal is None:
            return 0.0
        if "drained" not in self._reader.phases:
            self._find("I16", "", "after the last heal it never came to rest")
        waits = sorted(max(0, end - max(heal, confirmed)) for confirmed, end in self.ends)
        p99 = waits[len(waits) * 99 // 100] / SECOND if waits else 0.0
        if self._limits.drain and p99 > self._limits.drain:
            self._find("I16", "", f"99 of 100 messages had ended {p99:.1f} s after the last heal")
        return p99

    def _vacuous(self) -> None:
        reader, limits = self._reader, self._limits
        if self._dump is None:
            self._find("I1", "", "the store could not be read", unknown=True)
        for kind, at in reader.faults.values():
            self._find("I17", "", f"{kind} at {at} has no end", unknown=True)
        if limits.floor:
            begin, end = reader.phases.get("load", 0), reader.phases.get("heal", 0)
            seconds = (end - begin) / SECOND
            rate = reader.publications / seconds if seconds > 0 else 0.0
            self.counts["confirmed a second"] = round(rate)
            if rate < limits.floor:
                what = f"{rate:.0f} confirmed publications a second, {limits.floor:g} are the floor"
                self._find("I17", "", what, unknown=True)
