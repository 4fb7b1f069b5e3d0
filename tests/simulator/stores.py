"""Two stores for simulated processes: the laws over one table, and many lagging replicas of the journal.

The decisions are the product's (`Ledger`, `Journal`, `view`); here are time, sessions and lost replies, as
sqlite.py and etcd.py have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Any, NamedTuple, Protocol

from msgspec.structs import replace

from idemp.errors import StoreUnavailable
from idemp.laws import CLAIMED, DONE, FREE, Entry, Ledger, view
from idemp.ports import (
    Abandon,
    Applied,
    Busy,
    Claim,
    Claimed,
    Complete,
    Done,
    Lost,
    Op,
    Park,
    Release,
    Reply,
    State,
    Takeover,
)
from idemp.stores.journal import Append, Journal
from idemp.stores.records import (
    LINES,
    Begin,
    Declare,
    Finish,
    Raise,
    Record,
    decode,
    decode_open,
    encode,
    encode_open,
)

TTL = 10.0
"""Seconds that a session lives without a heartbeat."""
_SETTLES = (Complete, Release, Abandon, Park)


class Session(Protocol):
    """A process's presence in a store.

    lost: "" or what does not get through, the request or the reply; then `StoreUnavailable` is raised.
    """

    retention: float
    id: str

    def apply(self, ops: Sequence[Op], lost: str = "") -> list[Reply]: ...
    def recall(self, key: str, since: float = inf) -> Done | None: ...
    def fresh(self, token: int) -> bool: ...
    def beat(self) -> None: ...
    def learn(self) -> None: ...
    def close(self) -> None: ...


class Place(NamedTuple):
    """What a store is told by its world.

    now, wall: the clocks.  saw: called with each key that may have changed.  retook: a process has its
    claim under another token now.  chance: in [0, 1).
    """

    now: Callable[[], float]
    wall: Callable[[], float]
    saw: Callable[[Iterable[str]], None]
    retook: Callable[[str, int, int], None]
    chance: Callable[[], float]
    retention: float


def undoing(ops: Sequence[Any], replies: Sequence[Reply]) -> list[Op]:
    """What gives back the claims of a batch whose caller never heard of them."""
    undo: list[Op] = []
    for op, reply in zip(ops, replies, strict=True):
        match op, reply:
            case Claim(key), Claimed(token, attempt):
                undo.append(Release(key, token, attempt - 1))
            case Takeover(key), Claimed(token):
                undo.append(Abandon(key, token))
    return undo


# ------------------------------------------------------------------ one table


class LedgerStore:
    """Rows and sessions that expire by the store's clock."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.entries: dict[str, Entry] = {}
        self.token = 0
        self.sessions: dict[str, float] = {}
        self.born = 0

    def open(self) -> LedgerSession:
        """A new process comes."""
        return LedgerSession(self)

    def entry(self, key: str) -> Entry | None:
        """What is stored."""
        return self.entries.get(key)

    def state(self, key: str) -> State:
        """What everybody is told."""
        return view(self.entries.get(key), self.alive)

    def alive(self, session: str) -> bool:
        """Whether its time is not over."""
        return self.sessions.get(session, -1.0) > self.place.now()

    def check(self) -> None:
        """There is one table, so nothing to compare."""

    def drop_what_is_over(self, keys: Iterable[str]) -> None:
        """Done and free are remembered for the retention."""
        over = self.place.wall() - self.place.retention
        for key in keys:
            entry = self.entries.get(key)
            if entry is not None and entry.state in (DONE, FREE) and entry.at <= over:
                del self.entries[key]
                self.place.saw((key,))


class LedgerSession:
    """One process."""

    def __init__(self, store: LedgerStore) -> None:
        self.store = store
        self.retention = store.place.retention
        self.id = ""
        self.undo: list[Op] = []
        self._renew()

    def _renew(self) -> None:
        store = self.store
        store.born += 1
        self.id = f"s{store.born}"
        self.born = store.token
        self.beat()

    def beat(self) -> None:
        """A session whose time is over never comes back; the next batch begins another."""
        now = self.store.place.now()
        if self.id not in self.store.sessions or self.store.alive(self.id):
            self.store.sessions[self.id] = now + TTL
            self.confirmed = now

    def learn(self) -> None:
        """There is nothing to learn."""

    def recall(self, key: str, since: float = inf) -> Done | None:
        """See `idemp.ports.Store`.  Nothing is kept in the process."""
        return None

    def fresh(self, token: int) -> bool:
        """See `idemp.ports.Store`."""
        return token > self.born and self.store.place.now() - self.confirmed < TTL * 2 / 3

    def apply(self, ops: Sequence[Op], lost: str = "") -> list[Reply]:
        """One transaction."""
        if lost == "request":
            raise StoreUnavailable("the request was lost")
        store = self.store
        if not store.alive(self.id):
            self._renew()
        self.beat()
        undo, self.undo = self.undo, []
        batch = [*undo, *ops]
        store.drop_what_is_over(op.key for op in batch)
        ledger = Ledger(store.entries, store.alive, self.id, store.token, store.place.wall())
        replies = []
        for op in batch:
            replies.append(ledger.apply(op))
            store.token = ledger.token
            store.place.saw((op.key,))
        if lost:
            self.undo = undoing(batch, replies)
            raise StoreUnavailable("the reply was lost")
        return replies[len(undo) :]

    def close(self) -> None:
        """Its claims are in doubt at once."""
        self.store.sessions.pop(self.id, None)


# ------------------------------------------------------------------ the journal


class Refused(Exception):
    """The append was not taken, and never will be."""


class JournalStore:
    """The server: a log in order of revision, leases, tails; and a replica that is never behind."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.log: list[tuple[Append, int]] = []
        self.leases: dict[str, float] = {}
        self.tails: dict[str, int] = {}
        self.bucket = self.floor = self.born = 0
        self.snaps: dict[int, bytes] = {0: b""}
        self.truth = Journal()
        self.named: set[str] = set()  # every key that ever was in the log
        self.open_sessions: list[JournalSession] = []

    def open(self) -> JournalSession:
        """A new process comes."""
        session = JournalSession(self)
        self.open_sessions.append(session)
        return session

    def entry(self, key: str) -> Entry | None:
        """What the order of the log says."""
        return self.truth.entry(key)

    def state(self, key: str) -> State:
        """What everybody is told who has read everything."""
        return self.truth.state(key)

    def alive(self, session: str) -> bool:
        """Whether its lease stands; it may be gone and not declared dead yet."""
        return self.leases.get(session, -1.0) > self.place.now()

    def put(self, session: str, seq: int, records: Sequence[Record], known: int, target: int) -> int:
        """The transaction: the revision, or `Refused`.  ``known``: the bucket that the writer knows."""
        if not self.alive(session) or self.tails[session] != seq - 1 or self.bucket != known:
            raise Refused
        wall, read = decode(encode(self.place.wall(), records))
        append = Append(len(self.log) + 1, session, seq, wall, read)
        self.log.append((append, target))
        self.tails[session] = seq
        self.bucket = target
        touched = {r.key for r in records if not isinstance(r, Declare | Begin | Raise | Finish)}
        self.named |= touched
        everything = any(isinstance(record, Declare | Raise) for record in read)
        self.truth.apply(append)
        self.place.saw(self.named if everything else touched)
        return append.revision

    def check(self) -> None:
        """Every replica that has read everything, and one that imports now, agree with the log."""
        for session in self.open_sessions:
            session.read_to(len(self.log))
            self._compare(session.replica)
        self._compare(self.imported())

    def imported(self) -> Journal:
        """What one has who starts now: the snapshot of the floor, and the log from there."""
        journal = Journal()
        journal.restore(self.floor, decode_open(self.snaps[self.floor]))
        for append, bucket in self.log:
            if bucket >= self.floor:
                text = encode(append.wall, append.records)
                journal.replay(append.revision, append.session, append.seq, text, importing=True)
        return journal

    def _compare(self, journal: Journal) -> None:
        truth = self.truth
        assert (journal.bucket, journal.floor) == (truth.bucket, truth.floor), "replicas disagree on buckets"
        assert journal.remembered() == truth.remembered(), "replicas disagree on how much is done"
        for key in self.named:
            assert journal.entry(key) == truth.entry(key), f"replicas disagree on {key}"


class JournalSession:
    """One process: its replica lags behind the log, but for what it has to know."""

    def __init__(self, store: JournalStore) -> None:
        self.store = store
        self.retention = store.place.retention
        self.mine: set[str] = set()
        self.outcomes: dict[tuple[str, int], list[Reply]] = {}
        self.unsure: list[tuple[tuple[str, int], Sequence[Record]]] = []
        self.appended_at = store.place.wall()
        self._begin()
        self.replica = store.imported()
        self.cursor = len(store.log)

    def _begin(self) -> None:
        store = self.store
        store.born += 1
        self.id, self.seq, self.born = f"s{store.born}", 0, len(store.log)
        self.mine.add(self.id)
        store.tails[self.id] = 0
        store.leases[self.id] = store.place.now() + TTL
        self.alive_at = store.place.now()

    def recall(self, key: str, since: float = inf) -> Done | None:
        """See `idemp.ports.Store`: what this replica has heard."""
        return self.replica.done(key)

    def fresh(self, token: int) -> bool:
        """See `idemp.ports.Store`."""
        return token // LINES > self.born and self.store.place.now() - self.alive_at < TTL * 2 / 3

    # ------------------------------------------------------------ reading

    def learn(self) -> None:
        """The watch brings something."""
        behind = len(self.store.log) - self.cursor
        self.read_to(self.cursor + round(behind * self.store.place.chance()))

    def read_to(self, revision: int) -> None:
        """Apply the log in order; outcomes of the own appends are kept."""
        for append, _ in self.store.log[self.cursor : revision]:
            outcomes = self.replica.apply(append)
            if append.session == self.id:
                self.outcomes[self.id, append.seq] = outcomes
        self.cursor = max(self.cursor, revision)

    # ------------------------------------------------------------ a batch

    def apply(self, ops: Sequence[Op], lost: str = "") -> list[Reply]:
        """Answer from memory what is certain there; append the rest."""
        if lost == "request":
            raise StoreUnavailable("the request was lost")
        self._settle_unsure()
        replies: list[Reply] = []
        for part in _parts(ops):
            replies += self._part(part, keep=bool(lost))
        if lost:
            raise StoreUnavailable("the reply was lost")
        return replies

    def _settle_unsure(self) -> None:
        """What was not heard of is looked up, and its claims are given back."""
        unsure, self.unsure = self.unsure, []
        for append, records in unsure:
            undo = undoing(records, self.outcomes.pop(append))
            if undo and append[0] == self.id:
                self._append_surely(undo)

    def _part(self, ops: Sequence[Op], keep: bool) -> list[Reply]:
        current = False
        while True:
            plan, records, left = self._plan(ops)
            if left:
                ops = self._retake(ops, left)
                continue
            if any(isinstance(known, Lost) for known in plan) and not current:
                self.read_to(len(self.store.log))
                current = True
                continue
            outcomes: list[Reply] = []
            if records:
                try:
                    outcomes = self._append(records)
                except Refused:
                    continue
                if keep:
                    self.unsure.append(((self.id, self.seq), records))
                    self.outcomes[self.id, self.seq] = outcomes
            return [outcomes[known] if isinstance(known, int) else known for known in plan]

    def _plan(self, ops: Sequence[Op]) -> tuple[list[Reply | int], list[Record], list[int]]:
        plan: list[Reply | int] = []
        records: list[Record] = []
        left: list[int] = []
        touched: set[str] = set()
        for place, op in enumerate(ops):
            entry = self.replica.entry(op.key)
            if isinstance(op, _SETTLES) and self._is_left(entry, op.token):
                left.append(place)
            certain = None if op.key in touched else self._certain(op, entry)
            if certain is not None:
                plan.append(certain)
                continue
            records.append(op)
            touched.add(op.key)
            plan.append(len(records) - 1)
        return plan, records, left

    def _is_left(self, entry: Entry | None, token: int) -> bool:
        """Whether that claim is of an earlier session of this process."""
        if entry is None or entry.token != token or entry.state != CLAIMED:
            return False
        return not entry.session or (entry.session != self.id and entry.session in self.mine)

    def _certain(self, op: Op, entry: Entry | None) -> Reply | None:
        state = self.replica.state(op.key)
        if isinstance(op, Claim):
            return state if isinstance(state, Done | Busy) else None
        if not isinstance(op, _SETTLES):
            return None
        if entry is not None and entry.token == op.token:
            if entry.state == CLAIMED and entry.session == self.id:
                return None
            if entry.state == DONE and isinstance(op, Complete):
                return Applied()
        return Lost(state)

    def _retake(self, ops: Sequence[Op], left: Sequence[int]) -> list[Op]:
        """Claims of earlier sessions are taken over before they are settled, where nobody was first."""
        changed = list(ops)
        entries = [self.replica.entry(ops[place].key) for place in left]
        if any(entry is not None and entry.session for entry in entries):
            self._declare_dead()
            self.read_to(len(self.store.log))
            return changed
        settling = [(place, op) for place in left if isinstance(op := ops[place], _SETTLES)]
        outcomes = self._append_surely([Takeover(op.key, op.token) for _, op in settling])
        for (place, op), taken in zip(settling, outcomes, strict=True):
            if isinstance(taken, Claimed):
                self.store.place.retook(op.key, op.token, taken.token)
                changed[place] = replace(op, token=taken.token)
        return changed

    # ------------------------------------------------------------ an append

    def _append(self, records: Sequence[Record], target: int | None = None) -> list[Reply]:
        """One append and its outcomes; `Refused` when it must be composed anew."""
        store, seq = self.store, self.seq + 1
        known = self.replica.bucket
        try:
            revision = store.put(self.id, seq, records, known, known if target is None else target)
        except Refused:
            if not store.alive(self.id):
                self._begin()
                self._declare_dead()
            self.read_to(len(store.log))
            raise
        self.seq, self.appended_at = seq, store.place.wall()
        self.read_to(revision)
        return self.outcomes.pop((self.id, seq))

    def _append_surely(self, records: Sequence[Record]) -> list[Reply]:
        while True:
            try:
                return self._append(records)
            except Refused:
                continue

    # ------------------------------------------------------------ keeping

    def beat(self) -> None:
        """The lease is kept, the dead are declared, buckets go on."""
        store = self.store
        if store.alive(self.id):
            store.leases[self.id] = store.place.now() + TTL
            self.alive_at = store.place.now()
        try:
            self._declare_dead()
            self._roll()
        except Refused:
            pass  # somebody was first: next time

    def _declare_dead(self) -> None:
        store = self.store
        for session, last in list(store.tails.items()):
            if session != self.id and not store.alive(session) and store.alive(self.id):
                self.read_to(len(store.log))
                self._append([Declare(session, last)])
                store.tails.pop(session, None)

    def _roll(self) -> None:
        store, slice_ = self.store, self.retention / 8
        if store.place.wall() - self.appended_at >= slice_ / 4:
            self._append([])
        replica = self.replica
        now = min(replica.walls.values(), default=0.0)
        for bucket, found in replica.opens.items():
            page = encode_open(found)
            assert store.snaps.setdefault(bucket, page) == page, "two replicas have two snapshots"
        over = [each for each, at in replica.began.items() if now - at >= self.retention]
        if over and max(over) > replica.floor and max(over) in store.snaps:
            self._append([Raise(max(over))])
            store.floor = max(over)
            store.snaps = {bucket: page for bucket, page in store.snaps.items() if bucket >= store.floor}
        if now - replica.began.get(replica.bucket, now) >= slice_:
            self._append([Begin(replica.bucket + 1)], replica.bucket + 1)

    def close(self) -> None:
        """What is still claimed is in doubt; then the lease goes."""
        self.read_to(len(self.store.log))
        held = [
            Abandon(key, entry.token)
            for key, entry, _ in self.replica.opened()
            if entry.state == CLAIMED and entry.session == self.id
        ]
        try:
            if held and self.store.alive(self.id):
                self._append(held)
        except Refused:
            pass  # then they are in doubt when its session is declared dead
        self.store.leases.pop(self.id, None)
        self.forget()

    def forget(self) -> None:
        """The process is gone."""
        if self in self.store.open_sessions:
            self.store.open_sessions.remove(self)


def _parts(ops: Sequence[Op]) -> list[Sequence[Op]]:
    """No token is named of a key that the same append changes before."""
    parts: list[list[Op]] = [[]]
    touched: set[str] = set()
    for op in ops:
        if op.key in touched and isinstance(op, _SETTLES):
            parts.append([])
            touched = set()
        parts[-1].append(op)
        touched.add(op.key)
    return [part for part in parts if part]
