"""The laws of a store as one pure function: (operation, what is stored) -> (reply, what to store).

Stores that can load a key, decide here and write it back in one transaction (memory, SQLite)
share it, so that there is one place where the laws are written.  No clock, no store, no policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from idemp.message import Value
from idemp.ports import (
    Abandon,
    Applied,
    Busy,
    Claim,
    Claimed,
    Complete,
    Done,
    Doubt,
    Forget,
    Free,
    Get,
    Lost,
    Op,
    Park,
    Parked,
    Release,
    Reply,
    State,
    Takeover,
)

CLAIMED, FREE, PARKED, DONE = "claimed", "free", "parked", "done"


class Entry(Value, frozen=True, gc=False):
    """What a store holds of a key.

    state: one of the four names above.  session: the claim's holder; "" after `Abandon`, which
    is nobody's, hence in doubt.  reason: why it was parked; kept by a claim taken from parked,
    which goes back to parked when its holder dies.  at: seconds since 1970 of the last change.
    """

    state: str
    token: int
    attempt: int
    session: str
    at: float
    reason: str = ""
    result: bytes | None = None
    fingerprint: bytes | None = None


@dataclass(slots=True)
class Ledger:
    """Folds operations over the entries that a transaction loaded.

    entries: key -> Entry, changed in place; what changed is in ``changed``.
    session: the one that claims.  token: the last one given out; grows with every claim and parking.
    forgotten: keys that were done and are not any more.
    """

    entries: dict[str, Entry]
    alive: Callable[[str], bool]
    session: str
    token: int
    now: float
    changed: set[str] = field(default_factory=set)
    forgotten: set[str] = field(default_factory=set)

    def apply(self, op: Op) -> Reply:
        """Do one operation."""
        key = op.key
        entry = self.entries.get(key)
        match op:
            case Claim():
                if entry is not None and entry.state != FREE:
                    return view(entry, self.alive)
                return self._give(key, 0 if entry is None else entry.attempt, "")
            case Complete(_, token, result, fingerprint):
                if entry is not None and entry.token == token:
                    if entry.state == CLAIMED:
                        done = Entry(DONE, token, entry.attempt, "", self.now, "", result, fingerprint)
                        return self._put(key, done)
                    if entry.state == DONE:
                        return Applied()
            case Takeover(_, token):
                state = view(entry, self.alive)
                if isinstance(state, Doubt | Parked) and state.token == token:
                    reason = state.reason if isinstance(state, Parked) else ""
                    return self._give(key, state.attempt, reason)
                return state
            case Release(_, token, attempts):
                if _held(entry, token):
                    free = Entry(FREE, token, attempts, "", self.now)
                    return self._put(key, free if attempts else None)
            case Abandon(_, token, attempts):
                if entry is not None and _held(entry, token):
                    count = entry.attempt if attempts is None else attempts
                    return self._put(key, replace(entry, session="", attempt=count))
            case Park(_, token, reason):
                if entry is not None and _held(entry, token):
                    # A token of its own, so that who saw a doubt cannot take what was parked since.
                    self.token += 1
                    return self._put(key, Entry(PARKED, self.token, entry.attempt, "", self.now, reason))
            case Forget(_, token):
                if isinstance(view(entry, self.alive), Done | Parked) and entry and entry.token == token:
                    if entry.state == DONE:
                        self.forgotten.add(key)
                    return self._put(key, None)
            case Get():
                return view(entry, self.alive)
        return Lost(view(entry, self.alive))

    def _give(self, key: str, attempts: int, reason: str) -> Claimed:
        self.token += 1
        self._put(key, Entry(CLAIMED, self.token, attempts + 1, self.session, self.now, reason))
        return Claimed(self.token, attempts + 1)

    def _put(self, key: str, entry: Entry | None) -> Applied:
        if entry is None:
            self.entries.pop(key, None)
        else:
            self.entries[key] = entry
        self.changed.add(key)
        return Applied()


def undoing(ops: Sequence[Any], replies: Sequence[Reply]) -> list[Op]:
    """What gives back the claims of a batch whose caller never heard of them, whatever else is in it."""
    undo: list[Op] = []
    for op, reply in zip(ops, replies, strict=True):
        match op, reply:
            case Claim(key), Claimed(token, attempt):
                undo.append(Release(key, token, attempt - 1))
            case Takeover(key), Claimed(token, attempt):
                undo.append(Abandon(key, token, attempt - 1))
    return undo


def _held(entry: Entry | None, token: int) -> bool:
    return entry is not None and entry.state == CLAIMED and entry.token == token


def view(entry: Entry | None, alive: Callable[[str], bool]) -> State:
    """The state that everybody is told."""
    if entry is None:
        return Free()
    match entry.state:
        case "done":
            return Done(entry.token, entry.result, entry.fingerprint, entry.at, entry.attempt)
        case "parked":
            return Parked(entry.token, entry.attempt, entry.reason, entry.at)
        case "free":
            return Free(entry.attempt)
    if alive(entry.session):
        return Busy(entry.token, entry.attempt, entry.session, entry.at)
    if entry.reason:
        return Parked(entry.token, entry.attempt, entry.reason, entry.at)
    return Doubt(entry.token, entry.attempt, entry.session, entry.at)
