"""The journal's state machine: what every replica makes of the appends, in order of revision, then line.

Pure, and the only place where a record means something.  Product code is compared with
`apply_append`: the same appends must give the same states and outcomes.

Records: C claim, T take over, D done, R release, Q abandon, P park, F forget, X session is dead,
E a bucket begins, S its snapshot is written, B the floor rises.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

LINES = 16  # the model's 2**16: token = revision * LINES + line
NOBODY = -1

Mutants = frozenset[str]
SOUND: Mutants = frozenset()


class Line(NamedTuple):
    """A record.

    C key; T, D, P, Q, F key token; R key token n=attempts; X key=session n=its last seq;
    E, S key=bucket; B key=bucket n=the floor that the writer saw.
    late: a D written after the writer's own Q.
    """

    verb: str
    key: int
    token: int = 0
    n: int = 0
    late: bool = False

    def __str__(self) -> str:
        """As in a trace."""
        match self.verb:
            case "C" | "E" | "S":
                return f"{self.verb} {self.key}"
            case "X":
                return f"X s{self.key} {self.n}"
            case "B":
                return f"B {self.key}"
        return f"{self.verb}{'?' if self.late else ''} {self.key} {show_token(self.token)}"


def show_token(token: int) -> str:
    """`revision` or `revision.line`."""
    revision, line = divmod(token, LINES)
    return f"{revision}.{line}" if line else f"{revision}"


class Entry(NamedTuple):
    """A key.

    status: free, claimed, doubt, parked or done.  session: the holder; after its Q the former
    holder, who may still write D.  bucket: that of the last record that changed it.
    again: taken from parked, so it goes back there when its holder dies or abandons it.
    """

    status: str
    token: int
    attempt: int
    session: int
    bucket: int
    again: bool = False


Keys = tuple[tuple[int, Entry], ...]


class Opened(NamedTuple):
    """The open keys as of the place where a bucket began, and the clock of its S; -1 before that."""

    bucket: int
    clock: int
    keys: Keys


class State(NamedTuple):
    """All that a replica remembers.  ``opened``: buckets above the floor, for snapshots and B."""

    keys: Keys = ()
    bucket: int = 0
    floor: int = 0
    opened: tuple[Opened, ...] = ()

    def get(self, key: int) -> Entry | None:
        """The entry of ``key``."""
        for name, entry in self.keys:
            if name == key:
                return entry
        return None


class Outcome(NamedTuple):
    """What a line did: claimed (a C or T won), applied, lost, or what a C or T met: busy, doubt..."""

    word: str
    token: int = 0
    attempt: int = 0


APPLIED = Outcome("applied")
LOST = Outcome("lost")


def open_keys(keys: Keys) -> Keys:
    """What a snapshot holds: everything but done."""
    return tuple(item for item in keys if item[1].status != "done")


def apply_append(
    state: State,
    revision: int,
    session: int,
    lines: tuple[Line, ...],
    clock: int = 0,
    mutants: Mutants = SOUND,
) -> tuple[State, tuple[Outcome, ...]]:
    """The state after an append, and the outcome of each of its lines.  ``clock``: its writer's."""
    outcomes = []
    for index, line in enumerate(lines):
        state, outcome = _apply(state, revision * LINES + index, session, line, clock, mutants)
        outcomes.append(outcome)
    return state, tuple(outcomes)


def _apply(
    state: State, token: int, session: int, line: Line, clock: int, mutants: Mutants
) -> tuple[State, Outcome]:
    match line.verb:
        case "X":
            return _bury(state, line.key), APPLIED
        case "E":
            began = clock if "retention_from_e" in mutants else -1
            opened = (*state.opened, Opened(line.key, began, open_keys(state.keys)))
            return state._replace(bucket=line.key, opened=opened), APPLIED
        case "S":
            opened = tuple(
                o._replace(clock=clock) if (o.bucket, o.clock) == (line.key, -1) else o for o in state.opened
            )
            return state._replace(opened=opened), APPLIED
        case "B":
            keys = state.keys
            if not mutants & {"delete_is_state", "own_clock"}:
                keys = below(keys, line.key)
            opened = tuple(o for o in state.opened if o.bucket > line.key)
            return state._replace(keys=keys, floor=line.key, opened=opened), APPLIED
    entry = state.get(line.key)
    entry, outcome = _apply_key(entry, state.bucket, token, session, line, mutants)
    keys = tuple(item for item in state.keys if item[0] != line.key)
    if entry is not None:
        keys = tuple(sorted((*keys, (line.key, entry))))
    return state._replace(keys=keys), outcome


def below(keys: Keys, bucket: int) -> Keys:
    """Without the done and free keys whose last record is in a bucket below ``bucket``."""
    return tuple(i for i in keys if i[1].status not in ("done", "free") or i[1].bucket >= bucket)


def _bury(state: State, session: int) -> State:
    """Claims of a dead session are in doubt, or parked again; and it writes no late D any more."""
    keys = []
    for key, entry in state.keys:
        if entry.session == session and entry.status == "claimed":
            entry = entry._replace(status="parked" if entry.again else "doubt", session=NOBODY)
        elif entry.session == session and entry.status in ("doubt", "parked"):
            entry = entry._replace(session=NOBODY)
        keys.append((key, entry))
    return state._replace(keys=tuple(keys))


def _met(entry: Entry) -> Outcome:
    return Outcome("busy" if entry.status == "claimed" else entry.status, entry.token, entry.attempt)


def _apply_key(
    entry: Entry | None, bucket: int, token: int, session: int, line: Line, mutants: Mutants
) -> tuple[Entry | None, Outcome]:
    if line.verb == "C":
        if entry is None or entry.status == "free":
            attempt = 1 if entry is None else entry.attempt + 1
            return Entry("claimed", token, attempt, session, bucket), Outcome("claimed", token, attempt)
        return entry, _met(entry)
    if line.verb == "T":
        if entry is None:
            return entry, Outcome("free")
        takeable = entry.status in ("doubt", "parked") or (
            "take_without_x" in mutants and entry.status == "claimed"
        )
        if takeable and entry.token == line.token:
            again = entry.status == "parked"
            taken = Entry("claimed", token, entry.attempt + 1, session, bucket, again)
            return taken, Outcome("claimed", token, taken.attempt)
        return entry, _met(entry)
    if entry is None:
        return entry, LOST
    current = entry.token == line.token or ("tokenless" in mutants and line.verb in "DRPQ")
    holder = current and entry.session == session
    claim = holder and entry.status == "claimed"
    if "overtaken" in mutants and line.verb in "DR":
        claim = entry.status == "claimed"
    if "void_done" in mutants and line.verb in "DR" and current:
        claim = claim or entry.status == "parked"
    if "q_by_others" in mutants and line.verb == "Q":
        claim = current and entry.status == "claimed"
    match line.verb:
        case "D":
            if claim or (holder and entry.status in ("doubt", "parked")):
                return Entry("done", entry.token, entry.attempt, NOBODY, bucket), APPLIED
            if current and entry.status == "done":
                return entry, APPLIED
        case "R" if claim:
            return (Entry("free", entry.token, line.n, NOBODY, bucket) if line.n else None), APPLIED
        case "P" if claim:
            return Entry("parked", entry.token, entry.attempt, NOBODY, bucket), APPLIED
        case "Q" if claim:
            status = "parked" if entry.again else "doubt"
            return entry._replace(status=status, bucket=bucket), APPLIED
        case "F":
            statuses = ("done", "parked", "claimed") if "forget_claim" in mutants else ("done", "parked")
            if current and entry.status in statuses:
                return None, APPLIED
    return entry, LOST


@cache
def step(
    state: State, revision: int, session: int, lines: tuple[Line, ...], clock: int, mutants: Mutants
) -> tuple[State, tuple[Outcome, ...]]:
    """`apply_append`, remembered: a search asks the same again and again."""
    return apply_append(state, revision, session, lines, clock, mutants)
