"""The PostgreSQL store: many hosts on one database.

A batch is one short transaction of two round trips: take the rows of its keys in a fixed order and load
them; let `idemp.laws` decide; write what changed and commit.  `PostgresqlStore.transact` does that in a
caller's transaction, so that the caller's own statements commit with it.

Keys that are not done live in ``open``.  Done keys live in three slices of time, ``done_0`` to ``done_2``: a
new slice begins when the last is half a retention old, in the place of the oldest, which is over by then
and is truncated as a whole.  So nothing is deleted row by row, and the tables hold at most one and a
half retentions.  Where somebody reads on and on, so that it cannot be truncated, it is deleted by the page.

The session's row has an expiry by the server's clock, and the number of its last batch: after a lost
connection that tells whether the commit took effect.  Who declares a session dead holds its row.

Who forgets says so with NOTIFY.  Who asked `recall` once listens, and answers duplicates of what it saw done
from memory (recall.py) as long as it hears.  It is not told of what others do, for notifications make
all commits of a server wait for each other.
"""

from __future__ import annotations

import logging
import random
import selectors
import threading
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

from idemp.errors import (
    BadMessage,
    Closed,
    ConfigError,
    Contended,
    MissingExtra,
    SessionLost,
    StoreUnavailable,
)
from idemp.laws import undoing, view
from idemp.ports import Backlog, Clock, Get, Letter, Op, Reply, State, Transaction
from idemp.stores.door import SessionStore
from idemp.stores.group import GroupCommit
from idemp.stores.listening import Listening
from idemp.stores.outbox import unpack
from idemp.stores.postgresql_sql import CLOCK, settings, statements
from idemp.stores.recall import VOUCH

try:
    import psycopg
    from psycopg import errors

    from idemp.stores.postgresql_batch import (
        BATCH_TOKENS,
        EMPTIED,
        Head,
        Loaded,
        Quick,
        ask,
        attempt,
        decide,
        done_now,
        fold,
        head_in,
        quick,
        run,
        save,
        went,
    )
    from idemp.stores.postgresql_errors import exists, explain, init, outside
    from idemp.stores.postgresql_handlers import HandlersConnection
    from idemp.stores.postgresql_inbox import PostgresqlTransaction, beaten, gone
    from idemp.stores.postgresql_line import (
        Connection,
        IsReplica,
        Line,
        Place,
        one_line,
        place,
        watch,
    )
except ImportError:
    raise MissingExtra("postgresql://", "postgresql") from None

T = TypeVar("T")

__all__ = ["PostgresqlStore", "exists", "init", "place"]

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that a batch tries to get through before `StoreUnavailable`."""
MAX_KEY = 2600
"""Bytes; a third of a page of an index is the most that PostgreSQL takes."""
_HOLD = 5.0  # how long a batch waits for another's keys, and may hold its own if this host stands still
_SWEEP = 3600.0
_MARGIN = 2.0
_TURN = 1.0  # seconds at most that a heartbeat spends on the turn of a slice
_PAGES = 64  # of some thousand rows, which one transaction deletes
# Of a step, in ms: what it may wait for a vacuum, and how long this host may stand still in it, so that all
# of it lasts less than the margin, and holds nobody up.
_STEP = (
    "SELECT set_config('lock_timeout', '50', true),"
    " set_config('idle_in_transaction_session_timeout', '300', true)"
)
TRANSACTIONS = 10
"""With handlers in them, of one process at a time, each with a connection: the others wait for their turn."""
DETOURS = 8
"""Batches that go the long way at once, after one that could not go the short way."""


class PostgresqlStore(SessionStore):
    """The store in the namespace ``place``.

    retention: seconds that done is remembered (the longest that any opener named is in force).
    session_ttl: seconds without a heartbeat after which this process's claims are in doubt.
    """

    transactions = TRANSACTIONS

    def __init__(
        self, place: Place, *, retention: float, session_ttl: float, clock: Clock | None = None
    ) -> None:
        super().__init__(partial(_Session, place, retention, session_ttl, clock or Clock()), retention)
        self.place = place

    def apply(self, ops: Sequence[Op]) -> list[Reply]:
        """See `idemp.ports.Store`.  Raises `BadMessage` for a key that no index takes."""
        for op in ops:
            _check_key(op.key)
        return super().apply(ops)

    def transact(self, connection: Connection, ops: Sequence[Op]) -> list[Reply]:
        """Apply ``ops`` in the transaction that is open on ``connection``: they commit with it or not at all.

        connection: to the store's own database, READ COMMITTED.  Until it commits, whoever claims one of
        these keys waits.  Raises `BadMessage`, `SessionLost`, and psycopg's errors; then roll back.
        """
        for op in ops:
            _check_key(op.key)
        session = self._mine()
        assert isinstance(session, _Session)
        return session.transact(connection, ops)

    def transaction(self, work: Callable[[Transaction], T], wait: float, *, divisible: bool = False) -> T:
        """See `idemp.ports.Inbox`.  The connection is a psycopg one in READ COMMITTED."""
        return self._session_here().transaction(work, wait, divisible)

    def letters(self, limit: int, after: int = 0) -> list[Letter]:
        """See `idemp.ports.Inbox`."""
        rows = self._session_here().outbox("letters", [after, limit])
        return [
            Letter(number, bytes(key).decode(), at, unpack(bytes(blob))) for number, key, at, blob in rows
        ]

    def sent(self, numbers: Sequence[int]) -> None:
        """See `idemp.ports.Inbox`."""
        self._session_here().outbox("sent", [list(numbers)])

    def backlog(self) -> Backlog:
        """See `idemp.ports.Inbox`."""
        [(letters, age)] = self._session_here().outbox("backlog", [])
        return Backlog(letters, max(0.0, age))

    def _session_here(self) -> _Session:
        session = self._mine()
        assert isinstance(session, _Session)
        return session


def _check_key(key: str) -> None:
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise BadMessage(f"the key {key!r} is not valid Unicode") from None
    if size > MAX_KEY:
        raise BadMessage(f"the key {key[:40]!r}... has {size} bytes; PostgreSQL's index takes {MAX_KEY}")


# ------------------------------------------------------------------ the session


class _Unsure(NamedTuple):
    """A commit whose fate is not known yet: the session's row names the last that took effect."""

    batch: int
    ops: Sequence[Op]
    replies: list[Reply]


class _Result(NamedTuple):
    """What a transaction returned, which is committed."""

    value: Any


class _Session(Listening):
    """One process's presence: connections, heartbeat, group commit."""

    def __init__(self, place: Place, retention: float, ttl: float, clock: Clock) -> None:
        super().__init__("postgresql", clock)
        self.retention = retention
        self.group = GroupCommit(self._commit)
        self._named = retention
        self._place, self._ttl = place, ttl
        self._words = statements(place.schema)
        self._settings = settings(_HOLD).encode()
        self._id = ""
        self._batch = 0
        self._last = 0  # the batch that the session's row names, if the server forgot nothing
        self._number = 0  # the highest of the server's numbers that came
        self._slice = 0  # that takes what is done, when the server last said so
        self._mark = ""  # the same of `Head.mark`
        self._detours = 0  # batches that do not try the short way
        self._confirmed = -ttl
        self._born = 0  # the last token before the session
        self._swept = clock.steady()
        self._wiping = 0, 0  # the slice that comes, and the page of its table that is next
        self._unsure: _Unsure | None = None
        self._undo: list[Op] = []  # what gives back claims that nobody heard of
        self._writer, self._beater, self._reader, self._listener = (Line(place, clock) for _ in range(4))
        self._lines = [self._writer, self._beater, self._reader, self._listener]
        self._idle: list[Line] = []  # for transactions with handlers in them
        self._turns = threading.BoundedSemaphore(TRANSACTIONS)
        self._reading = threading.Lock()
        self._start("watch", partial(watch, self._lines, self._ended))
        self._start("heartbeat", self._beat)

    # ---------------------------------------------------------------- one batch

    def _commit(self, ops: Sequence[Op]) -> list[Reply]:
        """One transaction, repeated until its fate is known or `PATIENCE` is over."""
        if self._ended.is_set():
            raise Closed("this store was closed")
        deadline = self._clock.steady() + PATIENCE
        self._batch += 1
        told: Exception | None = None
        while True:
            failed: Exception
            try:
                with self._writer.use(deadline - self._clock.steady()) as connection:
                    return self._attempt(connection, ops)
            except psycopg.Error as error:
                failed = explain(self._place, error)
                told = failed if error.sqlstate else told
            except StoreUnavailable as error:
                failed = error
            except OSError as error:  # the driver's own, without a descriptor to wait with
                failed = StoreUnavailable(f"{self._place.shown}: {error}")
            except IsReplica as error:
                failed = told = self._demoted(error)
            # Another server may be the primary now, of which who listens on the old line hears nothing; and
            # a forget of this batch may have taken effect.
            self._recall.lose()
            if isinstance(failed, ConfigError):
                raise failed
            if self._clock.steady() >= deadline:
                # A server that has ended says no more; what it said before is why.
                raise failed if told in (None, failed) else StoreUnavailable(f"{told}; then it was gone")
            log.debug("%s", failed)
            self._clock.sleep(0.05)

    def _attempt(self, connection: Connection, ops: Sequence[Op]) -> list[Reply]:
        """Apply ``ops``, once it is known what became of the commit before.

        If that was a commit of this very batch and it took effect, its replies stand.  If it was of
        an earlier batch, whose caller was told `StoreUnavailable`, its claims are given back.
        """
        if not self._id:
            self._be_born(connection)
        if not ops:
            if not self._confirm(connection):
                self._bury(connection, head_in(run(connection, self._words.head, {"me": self._id})).batch)
            return []
        if all(isinstance(op, Get) for op in ops):
            return self._look(connection, ops)
        if (
            self._unsure is None
            and not self._undo
            and (replies := self._shortly(connection, ops)) is not None
        ):
            return replies
        unsure, sent, era = self._unsure, self._clock.steady(), self._recall.era()
        given = [] if unsure is None else undoing(unsure.ops, unsure.replies)
        with connection.pipeline():
            connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
            connection.execute(self._settings)
            asked = ask(connection, self._words, self._id, [*self._undo, *given, *ops])
        loaded = asked.loaded()
        head = loaded.head
        self._heed(head, sent)
        if unsure is not None and head.batch == unsure.batch:
            if unsure.batch == self._batch:
                connection.execute("ROLLBACK")
                self._settle(unsure.batch, self._confirmed)
                return unsure.replies[len(unsure.replies) - len(ops) :]
            # Kept until a commit that holds it is known to have taken effect, for that may fail, too.
            self._settle(unsure.batch, self._confirmed)
            self._undo = given
        if not head.alive or head.batch != self._last:
            connection.execute("ROLLBACK")
            self._bury(connection, head.batch)
            return self._attempt(connection, ops)
        undo, ledger = self._undo, decide(loaded, self._id)
        replies = [ledger.apply(op) for op in [*undo, *ops]]
        if ledger.changed:
            self._unsure = _Unsure(self._batch, [*undo, *ops], replies)
            self._write(connection, partial(save, connection, self._words, loaded, ledger))
            self._settle(self._batch, sent)
            if loaded.awaited & ledger.changed:
                self._wake()
        else:
            connection.execute("ROLLBACK")
            self._undo = []
        if ledger.forgotten:
            self._recall.forget_all()
        elif self._recall.follows:
            self._recall.learn(era, done_now(ledger))
        return replies[len(undo) :]

    def _shortly(self, connection: Connection, ops: Sequence[Op]) -> list[Reply] | None:
        """The same by the short way, which most batches can go; None, and nothing done, if it cannot."""
        batch = quick(ops)
        if batch is None or self._detours:
            self._detours = max(0, self._detours - 1)
            return None
        replies = self._quickly(connection, ops, batch)
        if replies is None:
            self._detours = DETOURS
        return replies

    def _quickly(self, connection: Connection, ops: Sequence[Op], batch: Quick) -> list[Reply] | None:
        sent, era, slice_now, mark = self._clock.steady(), self._recall.era(), self._slice, self._mark
        with connection.pipeline():
            connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
            connection.execute(self._settings)
            tried = attempt(connection, self._words, self._id, batch, slice_now)
        found = went(tried)
        head = head_in(tried.head)
        self._heed(head, sent)
        alive = head.alive and head.batch == self._last
        # A token is drawn before its claim waits for who holds the key.  Others may have had that key since
        # under a higher one, and if it is no more, only the mark tells: it changed as the key went.
        outrun = batch.claims and head.mark != mark
        if found is None or not alive or head.slice != slice_now or outrun:
            connection.execute("ROLLBACK")
            return None
        replies = [found.replies[op.key] for op in ops]
        self._unsure = _Unsure(self._batch, ops, replies)
        told = [self._words.tell] if found.awaited else []
        self._write(connection, lambda: [run(connection, text) for text in told])
        self._settle(self._batch, sent)
        if found.awaited:
            self._wake()
        if self._recall.follows:
            self._recall.learn(era, found.done)
        return replies

    def _heed(self, head: Head, sent: float) -> None:
        self.retention, self._number = head.retention, head.number
        self._slice, self._mark = head.slice, head.mark
        self._recall.told(head.retention, head.now, sent)

    def _write(self, connection: Connection, what: Callable[[], object]) -> None:
        """Write the last of a batch, in a pipeline, and commit."""
        with connection.pipeline():
            what()
            run(connection, self._words.confirm, [self._ttl, self._batch, self._id])
            connection.execute("COMMIT")

    def transact(self, connection: Connection, ops: Sequence[Op]) -> list[Reply]:
        """See `PostgresqlStore.transact`."""
        if not self._id:
            self.group.apply([])
        mine = self._id
        with connection.pipeline():
            asked = ask(connection, self._words, mine, ops, held_too=False)
        loaded = asked.loaded()
        if not loaded.head.alive:
            raise SessionLost
        ledger = decide(loaded, mine)
        replies = [ledger.apply(op) for op in ops]
        with connection.pipeline():
            save(connection, self._words, loaded, ledger)
        return replies

    # ---------------------------------------------------------------- a transaction with handlers in it

    def transaction(self, work: Callable[[Transaction], T], wait: float, divisible: bool) -> T:
        """See `idemp.ports.Inbox`."""
        deadline: float | None = None
        while True:
            failed = self._once(work, wait)
            if isinstance(failed, _Result):
                return cast(T, failed.value)
            self._recall.lose()  # for the same reasons as after a batch
            if divisible and deadline is None and isinstance(failed, Contended):
                raise failed  # later, one before may have committed, which ``work`` alone can tell
            if deadline is None:
                deadline = self._clock.steady() + PATIENCE
            if isinstance(failed, ConfigError) or self._clock.steady() >= deadline:
                raise failed
            log.debug("%s", failed)
            self._clock.sleep(0.05 + random.random() / 20)  # those who deadlocked must not meet again

    def _once(self, work: Callable[[Transaction], Any], wait: float) -> _Result | Exception:
        """One attempt: what ``work`` returned, or why it must be tried again.

        A commit whose fate is not known is looked up by the next attempt: its claims wait until the old
        transaction has ended, and find their keys done, or not.
        """
        if self._ended.is_set():
            raise Closed("this store was closed")
        transaction: PostgresqlTransaction | None = None
        committing = False
        if not self._turns.acquire(timeout=PATIENCE):
            said = f"{TRANSACTIONS} transactions of this process are open, and none has ended"
            return StoreUnavailable(f"{self._place.shown}: {said} within {PATIENCE:g} s")
        line = self._idle.pop() if self._idle else self._new_line()
        era, asked = self._recall.era(), self._clock.steady()
        try:
            if not self._id:
                self.group.apply([])  # the retention that was named is in force from here on
            with line.use(PATIENCE) as connection:
                assert isinstance(connection, HandlersConnection)
                transaction = PostgresqlTransaction(line, connection, self._words, wait, self._clock)
                with transaction.open():
                    result = work(transaction)
                    transaction.save()
                    committing = True
            transaction.teach(self._recall, era, asked)
            if transaction.tells:
                self._wake()
        except IsReplica as error:
            return self._demoted(error)
        except (psycopg.Error, StoreUnavailable) as error:
            if isinstance(error, StoreUnavailable):
                return error
            failed = self._contended(error) or explain(self._place, error)
            if gone(error) or isinstance(failed, ConfigError) or (transaction and transaction.lost):
                return failed
            begun = transaction is not None and transaction.begun
            if not committing and outside(error, begun=begun):
                return failed
            raise  # the commit was refused
        except Exception as error:
            if transaction is None or not transaction.lost:
                raise
            return self._contended(error) or StoreUnavailable(f"{self._place.shown}: {one_line(error)}")
        finally:
            self._idle.append(line)
            self._turns.release()
        return _Result(result)

    def _contended(self, error: BaseException) -> Contended | None:
        return Contended(f"{self._place.shown}: {one_line(error)}") if beaten(error) else None

    def outbox(self, name: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Ask or change the outbox; either may be done twice."""
        text = getattr(self._words, name)

        def what(connection: Connection) -> list[tuple[Any, ...]]:
            cursor = run(connection, text, values)
            return cursor.fetchall() if cursor.description else []

        return self._asked(what)

    def _new_line(self) -> Line:
        line = Line(self._place, self._clock, HandlersConnection)
        self._lines.append(line)
        return line

    def _settle(self, batch: int, confirmed: float) -> None:
        """This commit took effect; what was to be given back is."""
        self._last, self._unsure, self._undo = batch, None, []
        self._confirmed = max(confirmed, self._confirmed)

    def _look(self, connection: Connection, ops: Sequence[Op]) -> list[Reply]:
        """Nothing is held where nothing is changed."""
        found = self._looked(connection, [op.key for op in ops])
        return [view(found.entries.get(op.key), found.alive.__contains__) for op in ops]

    def _looked(self, connection: Connection, keys: Sequence[str]) -> Loaded:
        found = Loaded(Head(0, 0.0, 0, 0.0, None, None), {}, set(), set(), set())
        rows = run(connection, self._words.load, {"keys": sorted({key.encode() for key in keys})})
        fold(found, rows.fetchall())
        return found

    # ---------------------------------------------------------------- the session

    def _be_born(self, connection: Connection) -> None:
        """A new session; the claims of the one before are in doubt."""
        words, new, sent = self._words, uuid.uuid4().hex, self._clock.steady()
        if self._id:
            run(connection, words.died, [self._id])
        named = run(connection, words.retention, [self._named]).fetchone()
        if named is None:
            raise ConfigError(f"{self._place.shown}: {EMPTIED}")
        row = run(connection, words.born, [new, self._ttl]).fetchone()
        assert row is not None
        if row[0] <= self._number:
            # The server forgot numbers that it gave out: tokens must not come again.
            row = run(connection, words.ahead, [self._number + 1]).fetchone()
            assert row is not None
        if self.retention < named[0]:
            log.warning(
                "%s remembers for %g s, longer than the %g s named", self._place.shown, named[0], self._named
            )
        self.retention, self._slice, self._mark = named
        self._number, self._born = row[0], (row[0] + 1) * BATCH_TOKENS - 1
        self._last, self._unsure = 0, None
        self._id, self._confirmed = new, sent

    def _demoted(self, error: IsReplica) -> Exception:
        """It was a primary, and another is one now, or will soon be: to wait for, not to give up."""
        return StoreUnavailable(str(error)) if self._id else error

    def _bury(self, connection: Connection, batch: int | None) -> None:
        """My session is over, or the server does not know its last batch any more."""
        if batch is not None and batch != self._last:
            log.error(
                "%s has forgotten what it had confirmed (batch %d; it names %d), as after a failover:"
                " the claims of this process are in doubt",
                self._place.shown,
                self._last,
                batch,
            )
        self._recall.lose()
        self._be_born(connection)

    def _confirm(self, connection: Connection) -> bool:
        """Whether my session lives on."""
        mine, sent = self._id, self._clock.steady()
        if run(connection, self._words.beat, [self._ttl, mine, self._last]).rowcount == 0:
            return False
        if mine == self._id:
            self._confirmed = max(self._confirmed, sent)
        return True

    def _beat(self) -> None:
        """Confirm the session thrice in its time to live, beside the batches, and clear what is over."""
        while not self._ended.wait(self._ttl / 3):
            try:
                if self._id:
                    self._beat_once()
            except Closed:
                break
            except (StoreUnavailable, ConfigError) as error:
                log.warning("heartbeat: %s", error)
            except psycopg.Error as error:
                log.warning("heartbeat of %s: %s", self._place.shown, one_line(error))
            except Exception:  # without it every handler that takes longer would be in doubt, from now on
                log.exception("heartbeat of %s", self._place.shown)
        self._beater.drop()

    def _beat_once(self) -> None:
        with self._beater.use(PATIENCE) as connection:
            # In any other a batch that writes the same row at the same time would end it.
            connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            with connection.transaction():
                alive = self._confirm(connection)
        if not alive:
            self.group.apply([])
        with self._beater.use(PATIENCE) as connection:
            self._turn(connection)
            if self._clock.steady() - self._swept >= min(self.retention / 4, _SWEEP):
                self._swept = self._clock.steady()
                for statement in self._words.sweep:
                    with connection.transaction():
                        run(connection, statement)

    def _turn(self, connection: Connection) -> None:
        """Begin a new slice when it is time, in the place of the oldest, which is over by then."""
        until = self._clock.steady() + min(_TURN, self._ttl / 6)
        while not self._turned(connection) and self._clock.steady() < until:
            self._clock.sleep(0.01)

    def _turned(self, connection: Connection) -> bool:
        """One step of it, a transaction; whether there is nothing more to do here.

        It never waits for the table, as every batch would behind it while somebody reads on.  Who looked
        at ``meta`` before may write to the old slice after it: under the time of that look, or a second
        later, for which the margin is there.
        """
        try:
            with connection.transaction():
                connection.execute(_STEP)
                row = run(connection, self._words.turn, [_MARGIN]).fetchone()
                if row is None:
                    return True
                number, now, late, free = row
                if free:
                    for statement in self._words.clear[(number + 1) % 3]:
                        run(connection, statement)
                elif not late or not self._wiped(connection, number + 1):
                    return False
                run(connection, self._words.turned, [number + 1, now])
        except errors.LockNotAvailable:
            return False
        return True

    def _wiped(self, connection: Connection, number: int) -> bool:
        """Delete some of what is over where slice ``number`` will be; whether there was nothing left.

        It leaves no mark: who drew a token before one of those was told when their slice ended.
        """
        first = self._wiping[1] if self._wiping[0] == number else 0
        end = first + _PAGES
        pages = {"first": f"({first},0)", "end": f"({end},0)"}
        [(size,)] = run(connection, self._words.wipe[number % 3], pages).fetchall()
        self._wiping = number, end
        return bool(first >= size)

    def close(self) -> None:
        """End the session and let go of the database."""
        self._ended.set()
        with self.group.paused():
            try:
                if self._id:
                    with self._writer.use(PATIENCE) as connection:
                        run(connection, self._words.died, [self._id])
            except (psycopg.Error, StoreUnavailable, ConfigError) as error:
                log.warning("%s: %s", self._place.shown, one_line(error))
            self._writer.drop()
        while self._idle:
            self._idle.pop().drop()
        self._wake()
        for thread in self._threads:
            thread.join(PATIENCE)
        with self._reading:
            self._reader.drop()

    # ---------------------------------------------------------------- reading

    def _peek(self, key: str) -> State:
        found = self._asked(lambda connection: self._looked(connection, [key]))
        return view(found.entries.get(key), found.alive.__contains__)

    def _await(self, key: str, token: int) -> None:
        self._asked(lambda line: run(line, self._words.await_key, [key.encode(), token]))

    def scan(self, prefix: str, after: str, limit: int) -> list[tuple[str, State]]:
        """See `idemp.ports.Store`."""
        start = prefix.encode()
        values = {"after": after.encode(), "prefix": start, "end": start + b"\xff", "limit": limit}
        found = Loaded(Head(0, 0.0, 0, 0.0, None, None), {}, set(), set(), set())
        fold(found, self._read(self._words.scan, values))
        keys = sorted(found.entries)[:limit]
        return [(key, view(found.entries[key], found.alive.__contains__)) for key in keys]

    def size(self) -> int:
        """See `idemp.ports.Store`.  The server's own estimate."""
        return int(self._read(self._words.size, None)[0][0])

    def _read(self, text: str, values: Any) -> list[tuple[Any, ...]]:
        return self._asked(lambda connection: run(connection, text, values).fetchall())

    def _asked(self, what: Callable[[Connection], T]) -> T:
        """The answer to what may be asked twice, beside the writer."""
        try:
            return self._ask(what)
        except psycopg.Error as error:
            if isinstance(failed := explain(self._place, error), ConfigError):
                raise failed from None
        except (StoreUnavailable, IsReplica):
            pass
        self.group.apply([])  # returns when the server is there again, or raises
        try:
            return self._ask(what)
        except psycopg.Error as error:
            raise explain(self._place, error) from None

    def _ask(self, what: Callable[[Connection], T]) -> T:
        with self._reading:
            if self._ended.is_set():
                raise Closed("this store was closed")
            with self._reader.use(PATIENCE) as connection:
                return what(connection)

    # ---------------------------------------------------------------- being told

    def _hear_once(self) -> bool:
        try:
            with self._listener.use(PATIENCE) as connection:
                if not self._listener.pooled:
                    self._hear_on(connection)
        except (psycopg.Error, StoreUnavailable, ConfigError) as error:
            log.info("%s: not listening: %s", self._place.shown, one_line(error))
            return False
        finally:
            self._listener.drop()
        if self._listener.pooled:
            self._ended.wait()  # who listens and who is told would be different connections
        return True

    def _hear_on(self, connection: Connection) -> None:
        """Until something may go unheard.  A question that is answered says that the line is whole."""
        connection.add_notify_handler(self._told)
        asked = self._clock.steady()
        run(connection, self._words.listen)
        self._recall.begin(asked)
        self._listens = True
        self._wake()  # what was said before goes unheard
        with selectors.DefaultSelector() as news:
            news.register(connection, selectors.EVENT_READ)
            while not self._ended.is_set() and self._recall.follows:
                self._listener.limit(PATIENCE + VOUCH)
                news.select(VOUCH)
                asked = self._clock.steady()
                row = run(connection, CLOCK).fetchone()
                assert row is not None
                self._recall.vouch(asked, row[0])

    def _told(self, said: psycopg.Notify) -> None:
        if said.payload:
            self._recall.forget_all()
        else:
            self._wake()
