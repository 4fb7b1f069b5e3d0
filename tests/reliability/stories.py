"""Runs that never were, for the tests of the checker: what true ones leave behind, line by line.

Each message gets a fate: done at once, twice delivered, failed before, its consumer killed before or
after the effect, paused and overtaken, parked, malformed, in conflict, its publication unconfirmed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.reliability.checker import Change, Dead, Kept, Limits, Verdict, check
from tests.reliability.history import digest

LIMITS = Limits(floor=1.0, prefetch=16, attempts=3, drain=15.0, rss=1 << 30, fds=256)
PUBLISHER, NEMESIS = 1, 2


@dataclass
class Bundle:
    """Everything that `check` is given."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    ledger: list[dict[str, Any]] = field(default_factory=list)
    dump: dict[str, Kept] = field(default_factory=dict)
    dead: list[Dead] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)

    def check(self, limits: Limits = LIMITS, *, journal: bool = True) -> Verdict:
        self.lines.sort(key=lambda line: line["t"])
        return check(self.lines, self.ledger, self.dump, self.dead, self.changes if journal else None, limits)


@dataclass(frozen=True)
class Held:
    """A claim in somebody's hands."""

    p: int
    id: str
    att: int
    tok: int
    op: int


class Teller:
    """Writes a bundle; time goes on with every line."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.told = Bundle()
        self._t, self._op, self._token, self._pid = 1_000_000, 0, 0, 1000
        self.steady = [self.process() for _ in range(3)]

    def process(self) -> int:
        self._pid += 1
        return self._pid

    def note(self, p: int, f: str, type: str, **facts: Any) -> dict[str, Any]:
        self._t += self.dice.randrange(1_000, 2_000_000)
        role = {PUBLISHER: "publisher", NEMESIS: "nemesis"}.get(p, "consumer")
        line = {"t": self._t, "p": p, "role": role, "f": f, "type": type, **facts}
        self.told.lines.append(line)
        return line

    def op(self) -> int:
        self._op += 1
        return self._op

    def token(self) -> int:
        self._token += 1
        return self._token

    # ---------------------------------------------------------------- what happens

    def publish(self, id: str, body: str = "", end: str = "ok") -> None:
        op, sha = self.op(), digest((body or id).encode())
        self.note(PUBLISHER, "publish", "invoke", op=op, k=id, sha=sha)
        if end:
            self.note(PUBLISHER, "publish", end, op=op, k=id, sha=sha)

    def deliver(self, p: int, id: str, body: str = "", *, again: bool = False) -> int:
        op = self.op()
        sha = digest((body or id).encode())
        self.note(p, "deliver", "ok", op=op, k=id, again=again, sha=sha)
        return op

    def ask(self, p: int, f: str, id: str, end: str = "ok", **told: Any) -> None:
        op = self.op()
        named = {name: told.pop(name) for name in ("asked_tok", "asked_sha") if name in told}
        asked = {name.removeprefix("asked_"): value for name, value in named.items()}
        self.note(p, f, "invoke", op=op, k=id, **asked)
        if end:
            self.note(p, f, end, op=op, k=id, **{**asked, **told})

    def claim(self, p: int, id: str, att: int = 1, f: str = "claim", *, heard: bool = True) -> Held:
        held = Held(p, id, att, self.token(), self.op())
        end = "ok" if heard else ""
        self.ask(p, f, id, end, asked_tok=held.tok - 1, r="claimed", att=att, tok=held.tok)
        self.told.changes.append(Change(f, id, held.tok, att))
        return held

    def run(self, held: Held, body: str = "", *, effect: bool = True, end: str = "ok") -> None:
        sha = digest((body or held.id).encode())
        mine = {"k": held.id, "att": held.att, "tok": held.tok, "sha": sha}
        self.note(held.p, "run", "invoke", op=held.op, **mine)
        if effect:
            self.told.ledger.append({**self.note(held.p, "effect", "ok", op=held.op, **mine)})
        if end:
            self.note(held.p, "run", end, op=held.op, **mine)

    def complete(self, held: Held, *, heard: bool = True) -> None:
        sha = digest(f"{held.id} at {held.att}".encode())
        end = "ok" if heard else ""
        self.ask(held.p, "complete", held.id, end, asked_tok=held.tok, asked_sha=sha, r="applied")
        self.told.changes.append(Change("complete", held.id, held.tok, held.att))
        self.told.dump[held.id] = Kept("done", held.tok, held.att, sha)

    def skip(self, p: int, id: str, op: int) -> None:
        """A duplicate of what is done."""
        kept = self.told.dump[id]
        self.ask(p, "claim", id, r="done", tok=kept.tok, att=kept.att, sha=kept.sha)
        self.ack(p, id, op)

    def give_back(self, held: Held, f: str = "release") -> None:
        self.ask(held.p, f, held.id, asked_tok=held.tok, r="applied")
        self.told.changes.append(Change(f, held.id, held.tok, held.att))
        state = "parked" if f == "park" else "free"
        self.told.dump[held.id] = Kept(state, held.tok, held.att)

    def copy(self, p: int, f: str, id: str, outcome: str = "", body: str = "") -> None:
        self.ask(p, f, id)
        if f == "dead":
            self.told.dead.append(Dead(id, outcome, digest((body or id).encode())))

    def ack(self, p: int, id: str, op: int) -> None:
        self.note(p, "ack", "invoke", op=op, k=id)

    # ---------------------------------------------------------------- fates

    def plain(self, id: str) -> None:
        self.publish(id)
        self._end(self.dice.choice(self.steady), id)

    def _end(self, p: int, id: str, att: int = 1, f: str = "claim", body: str = "") -> None:
        op = self.deliver(p, id, body, again=att > 1)
        held = self.claim(p, id, att, f)
        self.run(held, body)
        self.complete(held)
        self.ack(p, id, op)

    def twice(self, id: str) -> None:
        self.publish(id, end="info")
        self.plain(id)
        p = self.dice.choice(self.steady)
        self.skip(p, id, self.deliver(p, id))

    def unconfirmed(self, id: str) -> None:
        """Nobody knows whether it is in the queue; it is not."""
        self.publish(id, end=self.dice.choice(["", "info"]))

    def recovered(self, id: str) -> None:
        """Nobody knows, and it is."""
        self.publish(id, end="info")
        self._end(self.dice.choice(self.steady), id)

    def failed(self, id: str, times: int = 1) -> None:
        self.publish(id)
        p = self.dice.choice(self.steady)
        for att in range(1, times + 1):
            op = self.deliver(p, id)
            held = self.claim(p, id, att)
            self.run(held, effect=self.dice.random() < 0.5, end="fail")
            self.give_back(held)
            self.copy(p, "retry", id)
            self.ack(p, id, op)
        self._end(p, id, times + 1)

    def killed(self, id: str) -> None:
        """Before the handler, in it, or after it."""
        self.publish(id)
        victim = self.process()
        self.deliver(victim, id)
        held = self.claim(victim, id, heard=self.dice.random() < 0.7)
        if any(line.get("tok") == held.tok and line["type"] == "ok" for line in self.told.lines[-1:]):
            where = self.dice.choice(["before", "in", "after"])
            if where != "before":
                self.run(held, effect=self.dice.random() < 0.8, end="ok" if where == "after" else "")
        self._end(self.dice.choice(self.steady), id, 2, "takeover")

    def killed_recording(self, id: str) -> None:
        """The record landed, and nobody heard of it."""
        self.publish(id)
        victim = self.process()
        self.deliver(victim, id)
        held = self.claim(victim, id)
        self.run(held)
        self.complete(held, heard=False)
        p = self.dice.choice(self.steady)
        self.skip(p, id, self.deliver(p, id, again=True))

    def overtaken(self, id: str) -> None:
        """Stopped past its session, and then its record is refused."""
        self.publish(id)
        owner = self.process()
        op = self.deliver(owner, id)
        held = self.claim(owner, id)
        self.run(held, end="")
        self._end(self.dice.choice(self.steady), id, 2, "takeover")
        sha = digest(id.encode())
        self.note(owner, "run", "ok", op=held.op, k=id, att=1, tok=held.tok, sha=sha)
        kept = self.told.dump[id]
        told: dict[str, Any] = {"r": "lost", "now": "done", "tok": kept.tok, "att": kept.att, "sha": kept.sha}
        mine = digest(f"{id} at 1".encode())
        self.ask(owner, "complete", id, asked_tok=held.tok, asked_sha=mine, **told)
        self.skip(owner, id, op)

    def recorded_late(self, id: str) -> None:
        """Its session is lost while it runs, and nobody is first: a takeover of its own, only to record."""
        self.publish(id)
        p = self.dice.choice(self.steady)
        op = self.deliver(p, id)
        held = self.claim(p, id)
        self.run(held)
        sha = digest(f"{id} at 1".encode())
        later = self.token()
        self.ask(p, "complete", id, asked_tok=held.tok, asked_sha=sha, r="applied")
        self.told.changes += [Change("takeover", id, later, 2), Change("complete", id, later, 2)]
        self.told.dump[id] = Kept("done", later, 2, sha)
        self.ack(p, id, op)
        self.skip(p, id, self.deliver(p, id))

    def parked(self, id: str) -> None:
        self.publish(id)
        p = self.dice.choice(self.steady)
        op = self.deliver(p, id)
        held = self.claim(p, id)
        self.run(held, end="fail")
        self.give_back(held, "park")
        self.copy(p, "dead", id, "parked")
        self.ack(p, id, op)

    def malformed(self, id: str) -> None:
        self.publish(id, "{")
        p = self.dice.choice(self.steady)
        op = self.deliver(p, id, "{")
        self.copy(p, "dead", id, "rejected", "{")
        self.ack(p, id, op)

    def conflicting(self, id: str) -> None:
        self.plain(id)
        self.publish(id, "other")
        p = self.dice.choice(self.steady)
        op = self.deliver(p, id, "other")
        kept = self.told.dump[id]
        self.ask(p, "claim", id, r="done", tok=kept.tok, att=kept.att, sha=kept.sha)
        self.copy(p, "dead", id, "conflict", "other")
        self.ack(p, id, op)

    def busy(self, id: str) -> None:
        """A duplicate comes while the first runs, and later again."""
        self.publish(id)
        self.publish(id)
        one, two = self.dice.sample(self.steady, 2)
        first, second = self.deliver(one, id), self.deliver(two, id)
        held = self.claim(one, id)
        self.ask(two, "claim", id, r="busy", att=1, tok=held.tok)
        self.copy(two, "retry", id)
        self.ack(two, id, second)
        self.run(held)
        self.complete(held)
        # News of a moment ago: that is no transition.
        self.ask(two, "claim", id, r="busy", att=1, tok=held.tok)
        self.ack(one, id, first)
        self.skip(two, id, self.deliver(two, id))

    def fates(self) -> list[Callable[[str], None]]:
        return [
            self.plain,
            self.twice,
            self.unconfirmed,
            self.recovered,
            self.failed,
            self.killed,
            self.killed_recording,
            self.overtaken,
            self.recorded_late,
            self.parked,
            self.malformed,
            self.conflicting,
            self.busy,
        ]


def tell(seed: int, count: int = 30) -> Bundle:
    """A true run: every fate once, then at random; two faults; it comes to rest."""
    teller = Teller(seed)
    fates = teller.fates()
    chosen = fates + teller.dice.choices(fates, k=max(0, count - len(fates)))
    teller.note(NEMESIS, "phase", "ok", phase="load")
    for number, fate in enumerate(chosen):
        if number in (5, 15):
            fault = teller.op()
            teller.note(NEMESIS, "etcd.leader-kill", "invoke", op=fault)
            teller.note(NEMESIS, "etcd.leader-kill", "ok", op=fault, witness={"term": [2, 3]})
        fate(f"{fate.__name__}/{number}")
    teller.note(NEMESIS, "sample", "ok", of="consumer", rss=50_000_000, fds=20)
    teller.note(NEMESIS, "phase", "ok", phase="heal")
    teller.note(NEMESIS, "phase", "ok", phase="drained")
    return teller.told
