"""A replica of one namespace: imported at one revision, then fed by the watch; and its keys in etcd.

Whatever seems out of order (an append that is missing, late, or from before a compaction) makes the
memory untrusted until it is imported again.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from idemp.errors import ConfigError
from idemp.ports import Clock, Progress, Reply
from idemp.stores.etcd_client import Client, KeyValue, Watch, WatchBatch
from idemp.stores.journal import Append, Journal, OutOfOrder
from idemp.stores.records import Opened, Unreadable, decode_open, names

log = logging.getLogger(__name__)

MANY = 100_000
"""Done keys, for which an import takes much for itself."""
PAGE = 100
"""Keys in one page of an import: each may have a megabyte."""

Tails = Mapping[str, tuple[int, int]]
"""session -> (seq, bucket) of its last append."""
Tell = Callable[[Progress | None], None]
"""How far reading the journal is; None: it is over."""


@contextmanager
def _uncollected() -> Iterator[None]:
    """Millions of entries come and none goes: looking for garbage again and again is a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _give_back() -> None:
    """To the system, what an import took and freed: some C libraries keep it, as much again as the memory."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Layout:
    """The keys of a namespace.  Buckets are padded, so that they sort."""

    def __init__(self, namespace: str) -> None:
        self.root = f"/idemp/v1/{namespace}/"
        self.sessions = self.root + "session/"
        self.tails = self.root + "tail/"
        self.logs = self.root + "log/"
        self.snaps = self.root + "snap/"
        self.bucket = self.root + "bucket"
        self.floor = self.root + "floor"
        self.retention = self.root + "retention"
        self.seeded = self.root + "seeded"
        self.seed = f"/service/{namespace}/"
        self._seed_handler = f"{namespace}.new_order/"

    def key_of_seed(self, key: str) -> str:
        """The key that an id of the services before idemp stands for."""
        return self._seed_handler + key[len(self.seed) :]

    def seed_of(self, key: str) -> str:
        """Where they would have written it; "" for what they did not remember."""
        return self.seed + key[len(self._seed_handler) :] if key.startswith(self._seed_handler) else ""

    def session(self, session: str) -> str:
        """The presence of a session."""
        return self.sessions + session

    def tail(self, session: str) -> str:
        """Its last append."""
        return self.tails + session

    def log_of(self, bucket: int) -> str:
        """All appends of a bucket."""
        return f"{self.logs}{bucket:010d}/"

    def log(self, bucket: int, session: str, seq: int) -> str:
        """One append."""
        return f"{self.log_of(bucket)}{session}/{seq}"

    def snap_of(self, bucket: int) -> str:
        """All pages of a bucket's snapshot."""
        return f"{self.snaps}{bucket:010d}/"

    def snap_end(self, bucket: int) -> str:
        """Says that a snapshot is whole; its value is the session whose pages count."""
        return self.snap_of(bucket) + "end"

    def place(self, key: str) -> tuple[str, int]:
        """Session and seq of a log key."""
        _, session, seq = key[len(self.logs) :].split("/")
        return session, int(seq)

    def read_tails(self, pairs: Sequence[KeyValue]) -> Tails:
        """Tails as they came back from a range."""
        found = {}
        for pair in pairs:
            seq, bucket = pair.value.split()
            found[pair.key[len(self.tails) :]] = (int(seq), int(bucket))
        return found


class Replica:
    """The memory.  ``lock`` guards everything here; ``changed``, which is on it, tells of every change."""

    def __init__(
        self, client: Client, layout: Layout, clock: Clock, tell: Tell = lambda progress: None
    ) -> None:
        self.layout = layout
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.journal = Journal()
        self.trusted = False
        self.unreadable: Unreadable | None = None
        """From then on nothing is answered: what follows a line depends on it."""
        self._client, self._clock, self._tell = client, clock, tell
        self._watch: Watch | None = None
        self._generation = 0
        self._far = Progress(0, 0)
        self._imported = 0  # the revision at which that was
        self._early: list[WatchBatch] | None = None
        self._expected: dict[tuple[str, int], Append] = {}
        self._outcomes: dict[tuple[str, int], list[Reply]] = {}

    # ---------------------------------------------------------------- import

    def import_all(self) -> None:
        """Read everything at one revision and follow the watch from there.

        Raises what the client raises, `Unreadable`, and `ConfigError` if it is damaged.  Only when it
        returns is the memory trusted.
        """
        self.stop()
        self.check()
        layout = self.layout
        page = self._client.range(layout.tails, prefix=True)
        revision = page.revision
        with self.changed:
            self._generation += 1
            generation = self._generation
            self._early = []
        self._watch = self._client.watch(
            layout.logs, start_revision=revision + 1, deliver=lambda batch: self._hear(generation, batch)
        )
        with _uncollected(), self._telling(), self._giving_up():
            journal = self._read(revision, layout.read_tails(page.pairs))
        with self.changed:
            early, self._early = self._early or [], None
            self.journal, self.trusted = journal, True
            self._imported = revision
            for batch in early:
                self._feed(batch)
            self.changed.notify_all()
        if journal.remembered() >= MANY:
            _give_back()

    def _read(self, revision: int, tails: Tails) -> Journal:
        """The journal as it stood at ``revision``: the snapshot at the floor and the log from there."""
        layout, journal = self.layout, Journal()
        floor, bucket = self._number(layout.floor, revision), self._number(layout.bucket, revision)
        self._begin_to_tell(floor, bucket, revision)
        if floor:
            journal.restore(floor, list(self._snapshot(floor, revision)))
        for each in range(floor, bucket + 1):
            # All appends of a bucket come before all of the next, so it is sorted bucket by bucket.
            pairs = sorted(self._pages(layout.log_of(each), revision), key=lambda pair: pair.mod_revision)
            for pair in pairs:
                try:
                    self._fold(journal, pair, importing=True)
                except OutOfOrder:
                    raise ConfigError(self._damaged(pair.key)) from None
        for session, (seq, _) in tails.items():
            journal.seqs.setdefault(session, seq)
        journal.revision = revision
        return journal

    def _damaged(self, key: str) -> str:
        return (
            f"the journal {self.layout.root} in etcd is damaged: what comes before {key} is missing, so"
            " somebody has changed or deleted keys; restore a snapshot of etcd, or, to begin anew with"
            f" nothing remembered, stop all that use it and run: etcdctl del --prefix {self.layout.root}"
        )

    def _snapshot(self, bucket: int, revision: int) -> Iterator[Opened]:
        layout = self.layout
        author = self._client.range(layout.snap_end(bucket), revision=revision).pairs[0].value.decode()
        for pair in self._pages(f"{layout.snap_of(bucket)}{author}/", revision):
            yield from decode_open(pair.value)

    def names(self, prefix: str) -> list[str]:
        """The keys that start with ``prefix``, in order: read from etcd, for memory knows only hashes."""
        layout, found = self.layout, set[str]()
        revision = self._client.range(layout.floor).revision
        floor, bucket = self._number(layout.floor, revision), self._number(layout.bucket, revision)
        with self._telling():
            self._begin_to_tell(floor, bucket, revision)
            if floor:
                found.update(key for key, _, _ in self._snapshot(floor, revision))
            for each in range(floor, bucket + 1):
                for pair in self._pages(layout.log_of(each), revision):
                    found.update(names(pair.value))
        return sorted(key for key in found if key.startswith(prefix))

    def _pages(self, prefix: str, revision: int) -> Iterator[KeyValue]:
        """Everything below ``prefix`` at ``revision``, page by page."""
        after = ""
        while True:
            page = self._client.range(prefix, prefix=True, after=after, revision=revision, limit=PAGE)
            yield from page.pairs
            self._far = Progress(self._far.done + len(page.pairs), self._far.total)
            self._tell(self._far)
            if not page.more:
                return
            after = page.pairs[-1].key

    def _begin_to_tell(self, floor: int, bucket: int, revision: int) -> None:
        """How much is to be read: etcd counts what is in a range whatever the limit of the answer."""
        layout = self.layout
        log = self._client.range(
            layout.log_of(floor), layout.log_of(bucket + 1), revision=revision, limit=1, keys_only=True
        )
        snapshot = self._client.range(
            layout.snap_of(floor), prefix=True, revision=revision, limit=1, keys_only=True
        )
        self._far = Progress(0, log.count + snapshot.count)
        self._tell(self._far)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Afterwards nothing is being read."""
        try:
            yield
        finally:
            self._tell(None)

    def _number(self, key: str, revision: int) -> int:
        pairs = self._client.range(key, revision=revision).pairs
        return int(pairs[0].value) if pairs else 0

    # ---------------------------------------------------------------- watch

    def _hear(self, generation: int, batch: WatchBatch) -> None:
        """On the watch's thread."""
        with self.changed:
            if generation != self._generation:
                return
            if self._early is not None:
                self._early.append(batch)
                return
            self._feed(batch)
            self.changed.notify_all()

    def _feed(self, batch: WatchBatch) -> None:
        if batch.broken:
            self._distrust(batch.broken)
            return
        for event in batch.events:
            if event.deleted or not self.trusted:
                continue
            try:
                with self._giving_up():
                    self._fold(self.journal, event)
            except OutOfOrder:
                self._distrust(f"append {event.key} is out of order")
            except Unreadable as line:
                log.error("%s: %s", self.layout.root, line)

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        """For good, at a line that cannot be read."""
        try:
            yield
        except Unreadable as line:
            self.unreadable, self.trusted = line, False
            raise

    def check(self) -> None:
        """Raise `Unreadable` if it was given up."""
        if self.unreadable is not None:
            raise self.unreadable.with_traceback(None)

    def _distrust(self, why: str) -> None:
        if self.trusted:
            log.warning("%s: importing again: %s", self.layout.root, why)
        self.trusted = False

    def distrust(self, why: str) -> None:
        """Something does not fit: answer nothing from memory until it is imported again."""
        with self.changed:
            self._distrust(why)
            self.changed.notify_all()

    def _fold(self, journal: Journal, pair: KeyValue, *, importing: bool = False) -> None:
        session, seq = self.layout.place(pair.key)
        if seq <= journal.seqs.get(session, 0):
            return  # most that the watch brings are one's own, applied already
        mine = self._expected.get((session, seq))
        if mine is None:
            journal.replay(pair.mod_revision, session, seq, pair.value, importing=importing)
        else:
            self._fold_mine(journal, mine._replace(revision=pair.mod_revision), importing=importing)

    def _fold_mine(self, journal: Journal, append: Append, *, importing: bool = False) -> None:
        outcomes = journal.apply(append, importing=importing)
        place = (append.session, append.seq)
        if place in self._expected and len(outcomes) == len(append.records):
            self._outcomes[place] = outcomes

    # ---------------------------------------------------------------- one's own appends

    def expect(self, append: Append) -> None:
        """The outcomes of that append will be asked for."""
        with self.changed:
            self._expected[append.session, append.seq] = append

    def forget(self, append: Append) -> None:
        """They will not."""
        with self.changed:
            self._expected.pop((append.session, append.seq), None)
            self._outcomes.pop((append.session, append.seq), None)

    def outcomes(self, append: Append, tails: Tails) -> list[Reply] | None:
        """What became of one's own append, or None while something that precedes it is not applied.

        ``append.revision`` is 0 when all that is known is that it was applied.
        """
        with self.changed:
            place = (append.session, append.seq)
            if place not in self._outcomes and self.trusted and append.revision:
                if not self._complete(append, tails):
                    return None
                try:
                    self._fold_mine(self.journal, append)
                except OutOfOrder:
                    self._distrust("an append came late")
                self.changed.notify_all()
            return self._outcomes.get(place)

    def _complete(self, append: Append, tails: Tails) -> bool:
        """Whether everything that precedes ``append`` is applied, and nothing after it."""
        seqs = self.journal.seqs
        others = all(
            seqs.get(session, 0) >= seq for session, (seq, _) in tails.items() if session != append.session
        )
        return others and seqs.get(append.session, 0) == append.seq - 1

    def complete(self, tails: Tails, revision: int) -> bool:
        """Whether everything that ``tails``, as read at ``revision``, tell of is applied."""
        with self.changed:
            journal = self.journal
            return self.trusted and (
                self._imported >= revision
                or all(journal.has(session, seq) for session, (seq, _) in tails.items())
            )

    def stop(self) -> None:
        """End the watch."""
        watch, self._watch = self._watch, None
        with self.changed:
            self.trusted = False
            self._generation += 1
        if watch is not None:
            watch.cancel()
