"""What must hold, checked after every event, and what must hold when everything has come to rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from msgspec.structs import astuple

from idemp.laws import CLAIMED, DONE, FREE, PARKED, Entry
from idemp.once import Context
from idemp.ports import Claimed, Done, Parked, State
from tests.simulator.plan import Plan


class Broken(AssertionError):
    """A promise does not hold."""


def must(holds: object, text: str) -> None:
    """Say what is broken."""
    if not holds:
        raise Broken(text)


@dataclass(slots=True)
class Attempt:
    """A handler that started.

    said: what came of it: "" while it runs, returned, raised, unsure.  effects: that it had.
    """

    key: str
    claim: Claimed
    said: str = ""
    effects: int = 0


@dataclass(slots=True)
class Record:
    """What the judge knows of a key.

    fate: of each claim: done, free, parked, doubt.  roots: claim -> the one of a lost session that its
    own process took back with it.  settled: doubts up to this token were dealt with, by
    another attempt, a resolver or a person.  cleared: effects of attempts up to it cannot come any more.
    happened: the claim under which somebody said that the effect is there.  floor: attempts are counted
    anew above this token.  fenced: the highest token that a sink which compares them has seen.
    """

    key: str
    entry: Entry | None
    token: int
    done_at: float
    attempts: dict[int, Attempt]
    fate: dict[int, str]
    roots: dict[int, int]
    settled: int = 0
    cleared: int = 0
    happened: int = 0
    floor: int = 0
    effects: int = 0
    fenced: int = 0


class Judge:
    """Watches a world.  ``entry``, ``state``, ``alive``: the truth of its store."""

    def __init__(self, plan: Plan, now: Callable[[], float]) -> None:
        self.plan = plan
        self.now = now
        self.records: dict[str, Record] = {}
        self.keyed: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.store: Any = None
        self.resolving = ""  # the key that a person has at hand

    def of(self, key: str) -> Record:
        """The record of a key."""
        record = self.records.get(key)
        if record is None:
            record = self.records[key] = Record(key, None, 0, 0.0, {}, {}, {})
        return record

    # ------------------------------------------------------------ the store

    def saw(self, keys: Iterable[str]) -> None:
        """These keys may have changed."""
        for key in keys:
            record, entry = self.of(key), self.store.entry(key)
            if entry != record.entry:
                before, record.entry = record.entry, entry
                self._changed(key, record, before, entry)

    def _changed(self, key: str, record: Record, old: Entry | None, new: Entry | None) -> None:
        if old is not None and old.state == DONE:
            self._done_is_left(key, record, old, new)
        if old is not None and old.state in (FREE, DONE) and new is None:
            self.freed(key)
        if new is not None and new.token > record.token:
            must(new.state in (CLAIMED, PARKED), f"{key} has a token that nobody was given: {new}")
            record.token = new.token
        elif new is not None:
            must(new.token == record.token, f"the token of {key} goes back: {old} -> {new}")
        if old is not None and old.state == CLAIMED:
            self._claim_ends(key, record, old, new)
        if old is not None and old.state == PARKED and new is not None:
            must(key == self.resolving, f"{key} was parked, and no person decided: {old} -> {new}")
        if new is not None and new.state == DONE and (old is None or old.state != DONE):
            must(old is not None and old.state == CLAIMED, f"{key} was done by nobody: {old} -> {new}")
            record.done_at = self.now()

    def _done_is_left(self, key: str, record: Record, old: Entry, new: Entry | None) -> None:
        kept = new is not None and new.state == DONE and _lasting(new) == _lasting(old)
        over = self.now() - record.done_at >= self.plan.retention
        must(kept or over, f"done of {key} changes within the retention: {old} -> {new}")

    def _claim_ends(self, key: str, record: Record, old: Entry, new: Entry | None) -> None:
        """What the end of a claim says must be what its handler said."""
        if new is None or new.state == FREE:
            fate = "free"
        elif new.state in (DONE, PARKED):
            fate = str(new.state)
        elif new.token != old.token or not new.session:
            fate = "doubt"
            lives = self.store.alive(old.session) and new.session not in ("", old.session)
            must(not lives, f"{key} is taken from a live session: {old} -> {new}")
        else:
            return
        if record.fate.get(old.token) == "doubt" and new is not None and new.state == CLAIMED:
            return
        self.counts[f"claim {fate}"] += 1
        root = record.roots.get(old.token, old.token)
        attempt = record.attempts.get(root)
        said = attempt.said if attempt else "nothing"
        record.fate[old.token] = record.fate[root] = fate
        match fate:
            case "done":
                here = said == "returned" or record.happened == root
                must(here, f"{key} is done, but its handler said {said!r} under {old.token}")
            case "free":
                must(said in ("raised", "nothing"), f"{key} goes free, but its handler said {said!r}")
                if said == "nothing":
                    must(not self._doubts(record, root), f"a doubt of {key} is forgotten: {old} -> {new}")
            case "parked":
                must(said in ("raised", "nothing"), f"{key} is parked, but its handler said {said!r}")
                self._explain(record, root, old, new)

    def _doubts(self, record: Record, below: int) -> list[int]:
        """Claims in doubt that nothing has settled, and that are not just given back."""
        return [t for t, fate in record.fate.items() if fate == "doubt" and record.settled < t < below]

    def _explain(self, record: Record, root: int, old: Entry, new: Entry | None) -> None:
        """A key is parked for a reason, which is true."""
        assert new is not None
        key = record.key
        match new.reason.split(":")[0].split(" (")[0]:
            case "in doubt":
                must(self._doubts(record, root), f"{key} is parked in doubt, and there is none")
                may = self.plan.in_doubt != "retry" or "; older than the retention" in new.reason
                must(may, f"{key} is parked in doubt under retry")
            case "attempts used up":
                must(old.attempt >= self.plan.attempts, f"{key} is parked after {old.attempt} attempts")
            case "permanent failure":
                attempt = record.attempts.get(root)
                must(attempt is not None and attempt.said == "raised", f"{key} is parked, nothing was raised")
            case "older than the retention":
                must(root not in record.attempts, f"{key} is parked as too old, but its handler ran")
            case reason:
                raise Broken(f"{key} is parked, nobody knows why: {reason}")
        self.counts[f"parked: {new.reason.split(':')[0].split(' (')[0]}"] += 1

    # ------------------------------------------------------------ handlers

    def starts(self, key: str, claim: Claimed, session: str, too_old: bool) -> Attempt:
        """A handler is about to start.  too_old: its message was, for the retention, when it came."""
        record = self.of(key)
        entry: Entry | None = self.store.entry(key)
        held = entry is not None and astuple(entry)[:4] == (CLAIMED, claim.token, claim.attempt, session)
        must(held, f"{key} starts under {claim}, in truth it is {entry}")
        must(self.store.alive(session), f"{key} starts under a dead session")
        must(claim.attempt <= self.plan.attempts, f"{key} starts for the {claim.attempt}th time")
        must(claim.token not in record.attempts, f"{key} starts twice under {claim}")
        for token, earlier in record.attempts.items():
            if record.fate.get(token) == DONE:
                raise Broken(f"{key} starts again after it was done under {token}")
            unique = token <= record.floor or earlier.claim.attempt < claim.attempt
            must(unique, f"{key}: attempt {claim.attempt} twice")
        doubts = self._doubts(record, claim.token)
        if self.plan.in_doubt != "retry":
            must(not doubts, f"{key} starts, though {doubts} are in doubt")
        must(not too_old, f"{key} starts, though its message is older than the retention")
        if self.plan.in_doubt == "retry":
            record.settled = claim.token - 1
        attempt = record.attempts[claim.token] = Attempt(key, claim)
        return attempt

    def effect(self, attempt: Attempt) -> bool:
        """A handler reaches out.  False: what it reaches refuses it, because it is a ghost."""
        key, claim = attempt.key, attempt.claim
        record = self.of(key)
        if claim.token <= record.cleared:
            self.counts["effect refused"] += 1
            return False
        if claim.token <= record.fenced:
            must(record.token > claim.token, f"the current claim {claim} of {key} is fenced off")
            self.counts["effect fenced"] += 1
            if self.plan.fenced:
                return False
        else:
            record.fenced = claim.token
        attempt.effects += 1
        record.effects += 1
        self.keyed.add(Context(key, claim.token, claim.attempt).idempotency_key)
        self._explained(key, record)
        return True

    def _explained(self, key: str, record: Record) -> None:
        """Every effect but one belongs to a doubt on record, or to a handler that said it failed."""
        extra = [a for a in record.attempts.values() if a.effects and a.said != "raised"]
        sure = [a for a in extra if record.fate.get(a.claim.token) != "doubt"]
        if self._over(key):
            return
        must(len(sure) <= 1, f"{key} has {record.effects} effects that no doubt explains")
        if self.plan.in_doubt != "retry":
            must(len(extra) <= 1, f"{key} has {record.effects} effects under {self.plan.in_doubt}")
        if len(extra) > 1:
            self.counts["doubled"] += 1

    def settle(self, key: str, token: int, *, happened: bool) -> None:
        """Who can look at the effect says whether it is there; what did not come cannot come any more."""
        record = self.of(key)
        record.settled = max(record.settled, token - 1)
        record.cleared = max(record.cleared, token - 1)
        if happened:
            record.happened = token

    def retook(self, key: str, before: int, token: int) -> None:
        """A process took its claim back that it had under a session which was lost."""
        record = self.of(key)
        record.roots[token] = record.roots.get(before, before)

    def freed(self, key: str) -> None:
        """A person, or the end of the retention, gives a key all its attempts back."""
        record = self.of(key)
        record.floor = record.token

    def had_effect(self, key: str) -> bool:
        """Whether an effect stands that no failed handler took the blame for."""
        attempts = self.of(key).attempts.values()
        return any(attempt.effects and attempt.said != "raised" for attempt in attempts)

    # ------------------------------------------------------------ acknowledgements and copies

    def acknowledged(self, key: str, print_: bytes | None) -> None:
        """A delivery is acknowledged outright: its key must be done, and with the same payload."""
        state: State = self.store.state(key)
        if self._over(key):
            return
        must(isinstance(state, Done), f"acknowledged {key} against {state}")
        assert isinstance(state, Done)
        same = not (print_ and state.fingerprint) or print_ == state.fingerprint
        must(same, f"acknowledged {key} with another payload than was done")

    def set_aside(self, key: str, outcome: str) -> None:
        """A copy goes to the dead letters: the store must say the same."""
        state: State = self.store.state(key)
        if self._over(key) or self.of(key).floor:
            return  # what was answered is not so any more
        if outcome == "parked":
            must(isinstance(state, Parked), f"{key} goes to the dead letters as parked, it is {state}")
        elif outcome == "conflict":
            must(isinstance(state, Done), f"{key} goes to the dead letters as a conflict, it is {state}")

    def at_rest(self, keys: Iterable[str], dead: Mapping[str, int]) -> None:
        """Nothing is lost, nothing is doubled without a cause on record."""
        for key in keys:
            record, state = self.of(key), self.store.state(key)
            must(isinstance(state, Done | Parked) or self._over(key), f"{key} ended as {state}")
            if isinstance(state, Parked):
                must(dead.get(key), f"{key} is parked, but its message is not at hand")
            if isinstance(state, Done) and not self._resolved(record, state):
                must(self.had_effect(key), f"{key} is done, and nothing happened")
        effective = {key for key, record in self.records.items() if record.effects}
        must(len(self.keyed) == len(effective), "a keyed sink would have counted twice")

    def _over(self, key: str) -> bool:
        """Whether it was done so long ago that it may be forgotten."""
        record = self.of(key)
        return bool(record.done_at) and self.now() - record.done_at >= self.plan.retention

    @staticmethod
    def _resolved(record: Record, state: Done) -> bool:
        return record.happened == state.token


def _lasting(entry: Entry) -> tuple[object, ...]:
    """What of a done key never changes."""
    return entry.token, entry.attempt, entry.result, entry.fingerprint
