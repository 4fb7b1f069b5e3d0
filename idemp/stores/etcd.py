"""The etcd store: a replicated journal, one for each namespace, that every replica replays in memory.

The protocol is in docs/journal.md; the fold of it is journal.py, the memory etcd_replica.py, the
server's words etcd_client.py.  Here is what moves: the session and its lease, appends one at a
time, and the keeping of the journal.

Trust the transaction, not the watch and not the keepalive: the tails that come back with an append
say what precedes it, and its outcomes count when all of that is applied.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from msgspec.structs import replace

from idemp.errors import Closed, ConfigError, IdempError, StoreUnavailable
from idemp.laws import CLAIMED, DONE, Entry, undoing, view
from idemp.ports import (
    Abandon,
    Applied,
    Busy,
    Claim,
    Claimed,
    Clock,
    Complete,
    Done,
    Get,
    Lost,
    Op,
    Park,
    Progress,
    Release,
    Reply,
    State,
    Takeover,
)
from idemp.stores.door import SessionStore
from idemp.stores.etcd_client import (
    Client,
    Compare,
    Created,
    Delete,
    EtcdError,
    NoSpace,
    Put,
    Range,
    Refused,
    Request,
    Unsure,
    Value,
    WentBack,
)
from idemp.stores.etcd_health import MAKE_ROOM, keep_looking
from idemp.stores.etcd_replica import Layout, Replica, Tails, Tell
from idemp.stores.group import GroupCommit
from idemp.stores.journal import Append
from idemp.stores.records import (
    LINES,
    Begin,
    Declare,
    Opened,
    Raise,
    Record,
    Seed,
    Unreadable,
    encode,
    encode_pages,
)

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that a batch tries to get through before `StoreUnavailable`."""
CATCH_UP = 1.0
"""Seconds that the watch has to bring what precedes an append; then the memory is imported again."""
MOST = 4000
"""Records in one append."""
SEED_MOST = 100
"""The same where each done writes a key of its own too: a transaction has at most 128 requests."""
MOST_BYTES = 1_000_000
"""Bytes of them, at their worst: etcd takes 1.5 MiB in one request."""
SLICES = 8
"""Buckets in a retention."""
LISTED = 60.0
"""Seconds that a scan's names are kept for its next page: to read them is to read the whole log."""
_PAGE = 500
_SETTLES = (Complete, Release, Abandon, Park)


class EtcdStore(SessionStore):
    """The namespace of the cluster that ``connect`` reaches.

    retention: seconds that done is remembered (the longest that any opener named is in force).
    session_ttl: seconds without a keepalive after which this process's claims are in doubt.
    seed_layout: write ``/service/<namespace>/<id>`` too, as the services before idemp did.
    """

    def __init__(
        self,
        connect: Callable[[], Client],
        namespace: str,
        *,
        retention: float,
        session_ttl: float,
        seed_layout: bool = False,
        clock: Clock | None = None,
    ) -> None:
        clock = clock or Clock()
        self._progress: Progress | None = None
        make = partial(_Session, connect, namespace, retention, session_ttl, seed_layout, clock, self._tell)
        super().__init__(make, retention)

    def progress(self) -> Progress | None:
        """See `idemp.ports.Store`.  How many of the journal's keys in etcd have come."""
        return self._progress

    def _tell(self, progress: Progress | None) -> None:
        self._progress = progress


class _Sent(NamedTuple):
    """An append as it goes over the wire, to be sent again as it is when its fate is unknown."""

    append: Append
    bucket: int
    compares: Sequence[Compare]
    success: Sequence[Request]


class _Listing(NamedTuple):
    """The names of a scan, kept from page to page."""

    prefix: str
    names: list[str]
    until: float

    def holds(self, prefix: str, now: float) -> bool:
        """Whether it is of the same scan, and not too old."""
        return prefix == self.prefix and now < self.until


class _Never(Exception):
    """The append was refused, and can never be applied: compose it anew."""


def _parts(ops: Sequence[Op], most: int) -> list[Sequence[Op]]:
    """Batches for one append each: no token is named of a key that the same append changes before.

    On the wire a D, R, Q or P names no token, for nobody else can change a live session's claim; so
    its token is checked against a memory that has everything before it.
    """
    if _fit(ops, most):
        return [ops]
    parts: list[Sequence[Op]] = []
    start, size, touched = 0, 0, set[str]()
    for place, op in enumerate(ops):
        weight = _weight(op)
        full = place - start >= most or size + weight > MOST_BYTES
        if full or (op.key in touched and isinstance(op, _SETTLES)):
            parts.append(ops[start:place])
            start, size, touched = place, 0, set()
        size += weight
        touched.add(op.key)
    return [*parts, ops[start:]]


def _fit(ops: Sequence[Op], most: int) -> bool:
    """Whether one append is enough for sure: what is usual, told quickly."""
    keys = [op.key for op in ops]
    said = sum([len(op.result or b"") for op in ops if type(op) is Complete])
    said += sum([len(op.reason) for op in ops if type(op) is Park])
    size = 100 * len(ops) + 12 * (sum(map(len, keys)) + said)
    return size <= MOST_BYTES and len(ops) <= most and len(set(keys)) == len(ops)


def _weight(op: Op) -> int:
    """How many bytes its line has at most: each that cannot be seen becomes three."""
    text = op.key + op.reason if type(op) is Park else op.key
    kept = len(op.result or b"") if type(op) is Complete else 0
    return 100 + 3 * kept + len(text) * (3 if text.isascii() else 12)


class _Session:
    """One process's presence in a namespace: lease, memory, appends."""

    def __init__(
        self,
        connect: Callable[[], Client],
        namespace: str,
        retention: float,
        ttl: float,
        seed_layout: bool,
        clock: Clock,
        tell: Tell,
    ) -> None:
        client = connect()
        self.retention = retention
        self.group = GroupCommit(self._commit)
        self._client, self._ttl, self._clock = client, max(2, round(ttl)), clock
        self._layout = Layout(namespace)
        self._seed_layout = seed_layout
        self._replica = Replica(client, self._layout, clock, tell)
        self._id, self._lease, self._seq, self._tail = "", 0, 0, b""
        self._born = 0  # the revision of its beginning
        self._seen: tuple[Tails, int] = {}, 0  # at the keeper's last look
        self._mine: set[str] = set()  # the sessions that this process had
        self._alive_at = clock.steady() - self._ttl
        self._unsure: _Sent | None = None
        self._undo: list[Op] = []  # what gives back claims that nobody heard of
        self._complete_to = -1  # the bucket up to whose beginning the tails say that nothing is missing
        self._appended_at = clock.wall()
        self._ended = threading.Event()
        self._listing: _Listing | None = None
        try:
            with self._as_store_error():
                self._prepare()
                # Before there is a lease, which it may outlast.
                self._import(clock.steady() + PATIENCE)
                self._begin_session()
                self._import_seed(clock.steady() + PATIENCE)
        except BaseException:
            client.close()
            raise
        threading.Thread(target=self._keep_lease, name="idemp-etcd-lease", daemon=True).start()
        threading.Thread(target=self._keep, name="idemp-etcd-keeper", daemon=True).start()
        look = (client, self._layout.floor, lambda: self._replica.journal.floor > 0, self._ended)
        threading.Thread(target=keep_looking, args=look, name="idemp-etcd-health", daemon=True).start()

    # ---------------------------------------------------------------- birth

    def _prepare(self) -> None:
        """A namespace begins with bucket 0 and floor 0; the longest retention named is everybody's."""
        layout = self._layout
        self._client.txn(
            [Created(layout.bucket, 0)],
            [Put(layout.bucket, b"0"), Put(layout.floor, b"0"), Put(layout.retention, b"0")],
            [],
        )
        while True:
            text = self._client.range(layout.retention).pairs[0].value
            if float(text) >= self.retention:
                self.retention = float(text)
                return
            mine = Put(layout.retention, repr(self.retention).encode())
            if self._client.txn([Value(layout.retention, text)], [mine], []).succeeded:
                return

    def _begin_session(self) -> None:
        """A new id on a new lease; its tail is born with it."""
        layout, id, tail = self._layout, uuid.uuid4().hex[:16], b"0 0"
        asked = self._clock.steady()
        lease = self._client.lease_grant(self._ttl)
        born: list[Request] = [Put(layout.session(id), str(os.getpid()).encode(), lease)]
        born.append(Put(layout.tail(id), tail))
        self._born = self._client.txn([Created(layout.session(id), 0)], born, []).revision
        # Not before it stands: a claim of mine is mine until its session is declared dead.
        self._id, self._lease, self._seq, self._tail = id, lease, 0, tail
        self._mine.add(id)
        self._alive_at = asked

    def _import_seed(self, deadline: float) -> None:
        """Ids that a service before idemp left count as done; they are put into the journal once."""
        layout, after = self._layout, ""
        if self._client.range(layout.seeded).pairs:
            return
        while True:
            page = self._client.range(layout.seed, prefix=True, after=after, limit=_PAGE, keys_only=True)
            if page.pairs:
                seeds = [Seed(layout.key_of_seed(pair.key)) for pair in page.pairs]
                self._append_surely(seeds, deadline)
                after = page.pairs[-1].key
            if not page.more:
                break
        if after:
            self._client.put(layout.seeded, b"true")

    # ---------------------------------------------------------------- a batch

    def recall(self, key: str, since: float) -> Done | None:
        """See `idemp.ports.Store`.  Whatever is done anywhere is in this memory, and true by itself."""
        if self._ended.is_set():
            raise Closed("this store was closed")
        replica = self._replica
        if not replica.trusted:
            return None
        journal = replica.journal
        if (done := journal.hot.get(key)) is not None or journal.unheard(key):
            return done
        with replica.lock:
            return journal.done(key)

    def _commit(self, ops: Sequence[Op]) -> list[Reply]:
        """Answer from memory what is certain there; append the rest, and act on its outcomes."""
        if self._ended.is_set():
            raise Closed("this store was closed")
        with self._as_store_error():
            replies: list[Reply] = []
            try:
                for part in _parts(ops, SEED_MOST if self._seed_layout else MOST):
                    replies += self._commit_part(part)
            except BaseException:
                self._undo += undoing(ops[: len(replies)], replies)
                raise
            return replies

    def _commit_part(self, ops: Sequence[Op]) -> list[Reply]:
        deadline = self._clock.steady() + PATIENCE
        self._trust(deadline)
        self._settle_unsure(deadline)
        current = Get in map(type, ops) and self._catch_up(deadline)
        while True:
            known, records, left = self._plan(ops)
            if left:
                ops = self._retake(ops, left, deadline)
                continue
            if Lost in map(type, known) and not current:
                current = self._catch_up(deadline)  # a loss is told with the state of now, not of before
                continue
            if not records:
                return [self._answer(op, reply, []) for op, reply in zip(ops, known, strict=True)]
            try:
                outcomes = self._append(records, deadline)
            except _Never:
                continue
            if len(records) == len(ops):
                return outcomes
            return [self._answer(op, reply, outcomes) for op, reply in zip(ops, known, strict=True)]

    def _retake(self, ops: Sequence[Op], left: Sequence[int], deadline: float) -> list[Op]:
        """Claims of my earlier sessions are taken over before they are settled, where nobody was first.

        By an append of its own: a D is true by itself, so it is written only by a holder who knows it.
        """
        ops = list(ops)
        with self._replica.changed:
            entries = [self._replica.journal.entry(ops[place].key) for place in left]
        if any(entry is not None and entry.session for entry in entries):
            self._bury(deadline)
            return ops
        settling = {place: op for place in left if isinstance(op := ops[place], _SETTLES)}
        takeovers = [Takeover(op.key, op.token) for op in settling.values()]
        outcomes = self._append_surely(takeovers, deadline)
        for (place, op), taken in zip(settling.items(), outcomes, strict=True):
            if isinstance(taken, Claimed):
                ops[place] = replace(op, token=taken.token)
        return ops

    def _bury(self, deadline: float) -> None:
        """Have my earlier sessions declared dead."""
        if self._clock.steady() >= deadline:
            raise StoreUnavailable("etcd: a session of ours that is gone is not declared dead")
        self._declare_dead(deadline)
        self._catch_up(deadline)

    def _plan(self, ops: Sequence[Op]) -> tuple[list[Reply | int], list[Record], list[int]]:
        """For each operation its reply, if memory is certain, or the place of its record.

        The third: the places of those that settle a claim of an earlier session of mine.
        """
        plan: list[Reply | int] = []
        records: list[Record] = []
        left: list[int] = []
        touched: set[str] = set()
        with self._replica.changed:
            journal = self._replica.journal
            for place, op in enumerate(ops):
                entry = journal.entry(op.key)
                if op.key not in touched and self._is_plain(op, entry):
                    touched.add(op.key)
                    plan.append(len(records))
                    records.append(op)
                    continue
                if isinstance(op, _SETTLES) and self._is_left(entry, op):
                    left.append(place)
                certain = None if op.key in touched else self._certain(op, entry)
                if certain is not None:
                    plan.append(certain)
                    continue
                if type(op) is not Get:
                    records.append(op)
                touched.add(op.key)
                plan.append(len(records) - 1)
        return plan, records, left

    def _is_plain(self, op: Op, entry: Entry | None) -> bool:
        """Whether memory has nothing to say: a claim of a new key, the completion of a claim of mine."""
        if entry is None:
            return type(op) is Claim
        mine = entry.session == self._id and entry.state == CLAIMED
        return mine and type(op) is Complete and op.token == entry.token

    def _is_left(self, entry: Entry | None, op: Complete | Release | Abandon | Park) -> bool:
        """Whether that claim is of an earlier session of mine, declared dead or not, or given up."""
        if entry is None or entry.token != op.token or entry.state != CLAIMED:
            return False
        if not entry.session and type(op) is Abandon:
            return op.attempts not in (None, entry.attempt)  # or it is in doubt as it stands
        if not entry.session:
            return True
        return entry.session != self._id and entry.session in self._mine

    def _certain(self, op: Op, entry: Entry | None) -> Reply | None:
        """A done is true by itself; a busy key's claimer waits on memory; a token is checked here."""
        if type(op) is Claim:
            state = None if entry is None else self._replica.journal.state(op.key)
            return state if isinstance(state, (Done, Busy)) else None
        if isinstance(op, _SETTLES):
            if entry is not None and entry.token == op.token:
                if entry.state == CLAIMED and entry.session == self._id:
                    return None
                if entry.state == DONE and type(op) is Complete:
                    return Applied()
                if entry.state == CLAIMED and not entry.session and type(op) is Abandon:
                    return Applied()  # unless `_is_left`
            return Lost(self._replica.journal.state(op.key))
        return self._replica.journal.state(op.key) if type(op) is Get else None

    def _answer(self, op: Op, known: Reply | int, outcomes: Sequence[Reply]) -> Reply:
        """The outcome at the record's line, never a later look."""
        if not isinstance(known, int):
            return known
        if isinstance(op, Get):
            with self._replica.changed:
                return self._replica.journal.state(op.key)
        return outcomes[known]

    # ---------------------------------------------------------------- an append

    def _append(
        self,
        records: Sequence[Record],
        deadline: float,
        *,
        bucket: int | None = None,
        compares: Sequence[Compare] = (),
        requests: Sequence[Request] = (),
    ) -> list[Reply]:
        """Append and return the outcomes.  `_Never` if it must be composed anew."""
        with self._replica.changed:
            current = self._replica.journal.bucket
        if current != self._complete_to:
            # No claim of this bucket may lose against a done of an earlier one that the watch forgot to tell.
            self._catch_up(deadline)
            self._complete_to = current
            raise _Never
        if self._seed_layout:
            requests = [*requests, *self._seed_requests(records)]
        return self._send(self._compose(records, current, bucket, compares, requests), deadline)

    def _seed_requests(self, records: Sequence[Record]) -> list[Request]:
        """A key for each id that is done here, which is true by itself: only a holder writes a D."""
        done = [self._layout.seed_of(record.key) for record in records if isinstance(record, Complete)]
        return [Put(key, b"true") for key in dict.fromkeys(done) if key]

    def _append_surely(self, records: Sequence[Record], deadline: float) -> list[Reply]:
        """Compose it anew until it is applied."""
        while True:
            with contextlib.suppress(_Never):
                return self._append(records, deadline)

    def _compose(
        self,
        records: Sequence[Record],
        current: int,
        bucket: int | None,
        compares: Sequence[Compare],
        requests: Sequence[Request],
    ) -> _Sent:
        """The transaction: if I live, this is my next, and the bucket is the one I know."""
        layout, seq, wall = self._layout, self._seq + 1, self._clock.wall()
        target = current if bucket is None else bucket
        guards: list[Compare] = [
            Created(layout.session(self._id), equal=False),
            Value(layout.tail(self._id), self._tail),
            Value(layout.bucket, str(current).encode()),
        ]
        success = [
            *requests,
            Put(layout.log(target, self._id, seq), encode(wall, records)),
            Put(layout.tail(self._id), f"{seq} {target}".encode()),
            Range(layout.tails, prefix=True),
        ]
        append = Append(0, self._id, seq, round(wall, 3), records)
        return _Sent(append, target, [*guards, *compares], success)

    def _send(self, sent: _Sent, deadline: float) -> list[Reply]:
        layout, append = self._layout, sent.append
        failure = [
            Range(layout.tail(append.session)),
            Range(layout.session(append.session)),
            Range(layout.log(sent.bucket, append.session, append.seq)),
            Range(layout.tails, prefix=True),
        ]
        perhaps_applied, known = self._unsure is sent, self._known()
        self._replica.expect(append)
        self._unsure = sent
        while True:
            try:
                result = self._client.txn(sent.compares, sent.success, failure)
                break
            except Unsure:
                # Sent again it says what became of it, because its compares, once false, stay false.
                perhaps_applied = True
                if self._clock.steady() >= deadline:
                    raise
                self._clock.sleep(0.05)
            except NoSpace:
                raise  # etcd also says so of the one that it took as the last: it is unsure
            except Refused:
                if not perhaps_applied:
                    self._unsure = None
                    self._replica.forget(append)
                raise
        if result.succeeded:
            tails = layout.read_tails(result.responses[-1].pairs)
            self._check_tails(known, tails)
            return self._settled(sent, result.revision, tails, deadline)
        tail, session, logged, tails_now = (response.pairs for response in result.responses)
        now = layout.read_tails(tails_now)
        self._check_tails(known, now)
        if logged or (tail and int(tail[0].value.split()[0]) >= append.seq):
            revision = logged[0].mod_revision if logged else 0
            return self._settled(sent, revision, now, deadline)
        self._unsure = None
        self._replica.forget(append)
        if not session:
            self._renew(deadline)
        else:
            self._wait_for(lambda: self._replica.complete(now, result.revision), deadline)
        raise _Never

    def _settled(self, sent: _Sent, revision: int, tails: Tails, deadline: float) -> list[Reply]:
        """It was applied: wait until what precedes it is applied here too."""
        append = sent.append._replace(revision=revision)
        found: list[Reply] | None = None

        def ready() -> bool:
            nonlocal found
            found = self._replica.outcomes(append, tails)
            return found is not None

        self._wait_for(ready, deadline)
        self._seq, self._tail = append.seq, f"{append.seq} {sent.bucket}".encode()
        self._unsure = None
        self._appended_at = append.wall
        self._replica.forget(append)
        assert found is not None
        return found

    def _settle_unsure(self, deadline: float) -> None:
        """An append whose caller was told `StoreUnavailable` is finished first, its claims are given back.

        Said twice that does no harm: the second finds the key no more in this session's hands.
        """
        if (sent := self._unsure) is not None:
            with contextlib.suppress(_Never):
                outcomes = self._send(sent, deadline)
                self._undo += undoing(sent.append.records, outcomes)
        if self._undo:
            self._append_surely(self._undo, deadline)
            self._undo = []

    # ---------------------------------------------------------------- catching up

    def _wait_for(self, ready: Callable[[], bool], deadline: float) -> None:
        """Until ``ready``; an untrusted or slow memory is imported again."""
        patience = self._clock.steady() + CATCH_UP
        while not ready():
            now = self._clock.steady()
            if now >= deadline:
                raise StoreUnavailable("etcd: the watch does not bring what precedes our append")
            if not self._replica.trusted or now >= patience:
                self._replica.distrust("the watch is behind")
                self._import(deadline)
                patience = self._clock.steady() + CATCH_UP
                continue
            with self._replica.changed:
                self._replica.changed.wait(0.005)

    def _trust(self, deadline: float) -> None:
        if not self._replica.trusted:
            self._import(deadline)

    def _import(self, deadline: float) -> None:
        while True:
            try:
                self._check_cluster()
                self._replica.import_all()
                return
            except EtcdError as error:
                if isinstance(error, (ConfigError, WentBack)) or self._clock.steady() >= deadline:
                    raise
                self._clock.sleep(0.1)

    def _check_cluster(self) -> None:
        """Before memory is given up for what etcd has: see that etcd has not forgotten any of it.

        It deletes nothing, but so it has its place behind all that was written, which a read may not have.
        """
        layout, known = self._layout, self._known()
        if not known:
            return  # this is the first import
        deletion = [Delete(layout.bucket)]  # a full etcd takes it, unlike a put
        found = self._client.txn([Created(layout.bucket, 0)], deletion, [Range(layout.tails, prefix=True)])
        if found.succeeded:
            self._client.went_back("has no journal any more")
        self._check_tails(known, layout.read_tails(found.responses[0].pairs))

    def _known(self) -> dict[str, int]:
        """The last seq of each session that memory has."""
        with self._replica.changed:
            return dict(self._replica.journal.seqs)

    def _check_tails(self, known: Mapping[str, int], tails: Tails) -> None:
        """What was ``known`` before these were asked for."""
        for session, (seq, _) in tails.items():
            if seq < known.get(session, 0):
                self._client.went_back(f"went back from append {known[session]} of a session to {seq}")

    def _catch_up(self, deadline: float) -> bool:
        """Memory is complete to now; true."""
        found = self._client.range(self._layout.tails, prefix=True)
        tails = self._layout.read_tails(found.pairs)
        self._wait_for(lambda: self._replica.complete(tails, found.revision), deadline)
        return True

    def _renew(self, deadline: float) -> None:
        """The session is gone: begin another, and let the old one's claims be in doubt."""
        log.warning("session %s was lost; its claims are in doubt", self._id)
        self._begin_session()
        self._declare_dead(deadline)
        self._catch_up(deadline)

    # ---------------------------------------------------------------- keeping

    def fresh(self, token: int = 0) -> bool:
        """Whether the session was heard of less than 2/3 of its time to live ago, and made the claim."""
        if self._ended.is_set():
            raise Closed("this store was closed")
        if not self._replica.trusted or self._clock.steady() - self._alive_at >= self._ttl * 2 / 3:
            return False
        # In this order: a session that begins in between is alive after its birth is known.  A claim of an
        # earlier one is in doubt.
        return not token or token // LINES > self._born

    def _keep_lease(self) -> None:
        """Thrice in a time to live, whatever else takes long, like an import."""
        while not self._ended.wait(self._ttl / 3):
            try:
                self._keep_alive()
            except Closed:
                return  # between the look at whether it ended and the call
            except IdempError as error:  # also a file of the URL that is away for a moment
                log.warning("keeping the session of %s: %s", self._layout.root, error)
            except Exception:  # without it every handler that takes longer would be in doubt, from now on
                log.exception("keeping the session of %s", self._layout.root)

    def _keep(self) -> None:
        """As often, and often enough for the buckets."""
        pause = min(self._ttl / 3, self.retention / SLICES)
        while not self._ended.wait(pause):
            try:
                with self.group.paused():
                    if not self._ended.is_set():
                        self._keep_journal(self._clock.steady() + self._ttl / 3)
            except Closed:
                return  # between the look at whether it ended and the call
            except _Never:
                continue  # somebody was first, or the bucket moved: next time
            except IdempError as error:
                log.warning("keeping %s: %s", self._layout.root, error)
            except Exception:
                log.exception("keeping %s", self._layout.root)

    def _keep_alive(self) -> None:
        asked, lease = self._clock.steady(), self._lease
        if self._client.lease_keepalive(lease) > 0 and lease == self._lease:
            self._alive_at = asked

    def _keep_journal(self, deadline: float) -> None:
        self._trust(deadline)
        self._settle_unsure(deadline)
        self._declare_dead(deadline)
        self._roll(deadline)
        if self._listing is not None and self._clock.steady() >= self._listing.until:
            self._listing = None

    def _declare_dead(self, deadline: float) -> None:
        """X for every tail without its session; found by a read, so that a lost event cannot hide it."""
        layout = self._layout
        found = self._client.txn(
            [], [Range(layout.sessions, prefix=True), Range(layout.tails, prefix=True)], []
        )
        alive = {pair.key[len(layout.sessions) :] for pair in found.responses[0].pairs}
        if self._id not in alive:
            self._renew(deadline)
            return
        tails = layout.read_tails(found.responses[1].pairs)
        if not self._replica.complete(*self._seen):
            # Who writes nothing itself finds here what the watch did not bring since the last look.
            self._replica.distrust("the watch is behind")
            self._trust(deadline)
        self._seen = tails, found.revision
        for session, (seq, bucket) in tails.items():
            if session not in alive:
                gone: list[Compare] = [Created(layout.session(session), 0)]
                gone.append(Value(layout.tail(session), f"{seq} {bucket}".encode()))
                with contextlib.suppress(_Never):
                    declared = [Declare(session, seq)]
                    self._append(declared, deadline, compares=gone, requests=[Delete(layout.tail(session))])

    def _roll(self, deadline: float) -> None:
        """Begin a bucket when the present one is old, write its snapshot, raise the floor, sweep.

        The clock is the earliest of the last ones of all sessions, so that one that runs ahead cannot
        shorten the retention; therefore an idle session says what time it is.
        """
        slice_ = self.retention / SLICES
        if self._clock.wall() - self._appended_at >= slice_ / 4:
            self._append([], deadline)
        with self._replica.changed:
            journal = self._replica.journal
            now = min(journal.walls.values(), default=0.0)
            bucket, floor, began = journal.bucket, journal.floor, dict(journal.began)
            opens = {each: list(found) for each, found in journal.opens.items() if each > floor}
        if now - began.get(bucket, now) >= slice_:
            after = [Put(self._layout.bucket, str(bucket + 1).encode())]
            self._append([Begin(bucket + 1)], deadline, bucket=bucket + 1, requests=after)
        for each, found in opens.items():
            self._snapshot(each, found)
        over = [each for each, at in began.items() if floor < each and now - at >= self.retention]
        if over:
            self._raise(floor, max(over), deadline)
        self._sweep(floor)

    def _snapshot(self, bucket: int, opened: Sequence[Opened]) -> None:
        """Write what was open where ``bucket`` began, unless somebody has."""
        end = self._layout.snap_end(bucket)
        if self._client.range(end).pairs:
            return
        for number, page in enumerate(encode_pages(opened)):
            self._client.put(f"{self._layout.snap_of(bucket)}{self._id}/{number:010d}", page)
        self._client.txn([Created(end, 0)], [Put(end, self._id.encode())], [])

    def _raise(self, floor: int, bucket: int, deadline: float) -> None:
        """B: a whole retention after the bucket began, and once its snapshot is whole."""
        ends = self._client.range(self._layout.snap_end(bucket)).pairs
        if ends:
            sure: list[Compare] = [Value(self._layout.snap_end(bucket), ends[0].value)]
            sure.append(Value(self._layout.floor, str(floor).encode()))  # it must never go back
            put = [Put(self._layout.floor, str(bucket).encode())]
            self._append([Raise(bucket)], deadline, compares=sure, requests=put)

    def _sweep(self, floor: int) -> None:
        """Delete what lies below the floor, page by page.  To memory it means nothing."""
        layout = self._layout
        for prefix, end in ((layout.logs, layout.log_of(floor)), (layout.snaps, layout.snap_of(floor))):
            while True:
                page = self._client.range(prefix, end=end, limit=_PAGE, keys_only=True)
                if not page.pairs:
                    break
                self._client.delete(prefix, end=page.pairs[-1].key + "\0")

    # ---------------------------------------------------------------- reading

    def wait(self, key: str, token: int, timeout: float) -> None:
        """On memory: whatever changes it comes through the journal."""
        deadline = self._clock.steady() + timeout
        with self._as_store_error(), self._replica.changed:
            while not self._ended.is_set():
                self._replica.check()
                state = self._replica.journal.state(key)
                left = deadline - self._clock.steady()
                if left <= 0 or not (isinstance(state, Busy) and state.token == token):
                    return
                self._replica.changed.wait(left)
        raise Closed("this store was closed")

    def scan(self, prefix: str, after: str, limit: int) -> list[tuple[str, State]]:
        """See `idemp.ports.Store`."""
        if self._ended.is_set():
            raise Closed("this store was closed")
        with self._as_store_error():
            if not after or self._listing is None or not self._listing.holds(prefix, self._clock.steady()):
                names = self._replica.names(prefix)
                self._listing = _Listing(prefix, names, self._clock.steady() + LISTED)
            listing = self._listing
            with self.group.paused():
                self._catch_up(self._clock.steady() + PATIENCE)
        found: list[tuple[str, State]] = []
        place = bisect_right(listing.names, after)
        with self._replica.changed:
            journal = self._replica.journal
            while place < len(listing.names) and len(found) < limit:
                key, place = listing.names[place], place + 1
                if (entry := journal.entry(key)) is not None:
                    found.append((key, view(entry, bool)))
        return found

    def size(self) -> int:
        """See `idemp.ports.Store`."""
        with self._replica.changed:
            return self._replica.journal.size()

    # ---------------------------------------------------------------- end

    def close(self) -> None:
        """What is still claimed is in doubt from here on; then the lease goes."""
        self._ended.set()
        with self.group.paused():
            with contextlib.suppress(IdempError, _Never):
                self._abandon_all()
            with contextlib.suppress(EtcdError):
                self._client.lease_revoke(self._lease)
            self._replica.stop()
            self._client.close()
        with self._replica.changed:
            self._replica.changed.notify_all()

    def _abandon_all(self) -> None:
        with self._replica.changed:
            mine = [
                Abandon(key, entry.token)
                for key, entry, _ in self._replica.journal.opened()
                if entry.state == CLAIMED and entry.session == self._id
            ]
        if mine:
            self._append_surely(mine, self._clock.steady() + 2.0)

    @contextlib.contextmanager
    def _as_store_error(self) -> Iterator[None]:
        """To the heart every trouble of the server is `StoreUnavailable`."""
        try:
            yield
        except NoSpace as error:
            raise StoreUnavailable(f"{error}: {MAKE_ROOM}") from error
        except Unreadable as error:
            raise ConfigError(f"etcd, {self._layout.root}: {error}") from None
        except (ConfigError, StoreUnavailable):
            raise
        except EtcdError as error:
            raise StoreUnavailable(f"etcd: {error}") from error
