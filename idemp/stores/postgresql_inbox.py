"""A transaction of the PostgreSQL store that handlers write in.

It costs one round trip to hold and load all its keys and one to write what became of them; the laws decide
in between, in memory.  Its claims are never written, so that no session has to live for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psycopg
from psycopg import errors
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from idemp.errors import KeyBusy, PermanentFailure
from idemp.laws import Ledger
from idemp.ports import Clock, Get, Op, Publication, Reply, Takeover
from idemp.stores.outbox import pack
from idemp.stores.postgresql_batch import BATCH_TOKENS, Head, Loaded, ask, decide, done_now, run, save
from idemp.stores.postgresql_handlers import NEXT, HandlersConnection, HandlersCursor
from idemp.stores.postgresql_line import Line
from idemp.stores.postgresql_sql import GIVEN, TAKE_TURNS, Statements, own
from idemp.stores.recall import Recall

ME = "in this transaction"
"""The session of its claims, which nobody ever sees."""
TURNED = 1.0
"""Seconds after which another slice of time may have begun."""
PATIENCE = 10.0
"""Seconds that the server has for what is not the handler's."""


class PostgresqlTransaction:
    """See `idemp.ports.Transaction`.

    line: cut when the server stands still, but not while a handler is at it.
    wait: seconds for keys that other transactions hold.
    """

    def __init__(
        self, line: Line, connection: HandlersConnection, words: Statements, wait: float, clock: Clock
    ) -> None:
        self.connection = connection
        self.lost = False
        self.tells = False
        self._line, self._words, self._clock = line, words, clock
        self._wait = wait
        self._loaded: Loaded | None = None
        self._ledger: Ledger | None = None
        self._known: set[str] = set()
        self._held: set[str] = set()
        self._outgoing: list[tuple[str, Publication]] = []
        self._began = 0.0

    @property
    def begun(self) -> bool:
        """Whether a handler may have run in it: none does before the first look."""
        return self._ledger is not None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, the driver refuses commit and rollback to the handler."""
        self.connection.owes, self.connection.torn = False, None
        self.connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        with self.connection.transaction():
            yield
            self._line.limit(PATIENCE)

    def apply(self, ops: Sequence[Op]) -> list[Reply]:
        """See `idemp.ports.Transaction`."""
        new = [op for op in ops if not self._has(op)]
        ledger = self._ledger
        if ledger is None or new:
            ledger = self._look(new)
        return [ledger.apply(op) for op in ops]

    def _has(self, op: Op) -> bool:
        """Whether what is known of the key is enough to decide ``op``."""
        if isinstance(op, Get):
            return op.key in self._known
        # Of a key in doubt the session is held, too, before it is taken over.
        return op.key in self._held and not isinstance(op, Takeover)

    def _look(self, ops: Sequence[Op]) -> Ledger:
        self._line.limit(PATIENCE + self._wait)
        if not self._line.given:
            self._line.given = list(run(self.connection, GIVEN).fetchone() or ())
        try:
            with self.connection.pipeline():
                run(self.connection, TAKE_TURNS, own(self._wait))
                asked = ask(self.connection, self._words, ME, ops, held_too=False)
                run(self.connection, TAKE_TURNS, self._line.given)
                run(self.connection, NEXT[1].decode())
        except errors.LockNotAvailable:
            raise KeyBusy(ops[0].key) from None
        found = asked.loaded()
        self._line.limit(math.inf)
        self._known |= {op.key for op in ops}
        self._held |= {op.key for op in ops if not isinstance(op, Get)}
        return self._merge(found)

    def _merge(self, found: Loaded) -> Ledger:
        if self._loaded is None or self._ledger is None:
            self._began = self._clock.steady()
            self._loaded, self._ledger = found, decide(found, ME)
            return self._ledger
        mine = self._loaded
        for key in found.entries.keys() - self._ledger.changed:
            mine.entries[key] = found.entries[key]
        for ours, theirs in (
            (mine.empty, found.empty),
            (mine.awaited, found.awaited),
            (mine.alive, found.alive),
        ):
            ours |= theirs
        alive = {*mine.alive, ME}
        self._ledger.alive = alive.__contains__
        # One that was taken over has a token of the number that came with it.
        self._ledger.token = max(self._ledger.token, found.head.number * BATCH_TOKENS)
        return self._ledger

    def keep(self) -> None:
        """See `idemp.ports.Transaction`."""
        self._reset()
        status = self.connection.pgconn.transaction_status
        if status == TransactionStatus.IDLE:
            raise PermanentFailure(
                "the handler ended the transaction that it was given; leave commit and rollback to idemp"
            )
        if status != TransactionStatus.INTRANS:
            self.connection.execute(NEXT[0], prepare=False)  # the server says what is wrong
        self.connection.owes = True
        if self._loaded is not None and self._ledger is not None:
            self._ledger.now = self._loaded.head.now + self._clock.steady() - self._began

    def undo(self, error: BaseException) -> bool:
        """See `idemp.ports.Transaction`.  Raises psycopg's errors: then nothing of it can be kept."""
        if any(gone(each) for each in _chain(error)) or self.connection.broken:
            self.lost = True
            return False
        self._reset()
        if self.connection.torn is not None:
            raise self.connection.torn
        if not self.connection.owes:  # else nothing was done
            self.connection.execute("ROLLBACK TO SAVEPOINT idemp", prepare=False)
        return True

    def _reset(self) -> None:
        """What the handler may have set for its own rows."""
        self.connection.row_factory = tuple_row
        self.connection.cursor_factory = HandlersCursor

    def teach(self, recall: Recall, era: int, asked: float) -> None:
        """What is done now, or forgotten, once that is committed.

        ``era`` and ``asked``: of the moment before it began.
        """
        if self._loaded is not None and self._ledger is not None:
            recall.told(self._loaded.head.retention, self._loaded.head.now, asked)
            if self._ledger.forgotten:
                recall.forget_all()
            else:
                recall.learn(era, done_now(self._ledger))

    def put(self, key: str, publications: Sequence[Publication]) -> None:
        """See `idemp.ports.Transaction`."""
        self._outgoing += [(key, publication) for publication in publications]

    def save(self) -> None:
        """Write what changed, right before the commit."""
        if self._loaded is None or self._ledger is None:
            return
        self._line.limit(PATIENCE)
        owed, self.connection.owes = self.connection.owes, False
        if self._clock.steady() - self._began > TURNED:
            head = run(self.connection, self._words.head, {"me": ME}).fetchone()
            assert head is not None
            self._loaded = self._loaded._replace(head=Head(*head))
        with self.connection.pipeline():
            if owed:
                run(self.connection, NEXT[0].decode())  # fails if a handler has ended it
            run(self.connection, TAKE_TURNS, own(self._wait))
            save(self.connection, self._words, self._loaded, self._ledger)
            if self._outgoing:
                keys = [key.encode() for key, _ in self._outgoing]
                run(self.connection, self._words.put, [keys, [pack(each) for _, each in self._outgoing]])
        self.tells = bool(self._loaded.awaited & self._ledger.changed)


def gone(error: BaseException) -> bool:
    """Whether ``error`` says that the server rolled the transaction back, or that the connection is lost."""
    match error:
        case psycopg.InterfaceError() | errors.IdleInTransactionSessionTimeout():
            return True
        case errors.QueryCanceled() | errors.LockNotAvailable():
            return False  # a bound of the handler's own, and only its statement has failed
        case psycopg.OperationalError():
            return error.sqlstate is None or error.sqlstate[:2] in ("08", "40", "57")
    return False


def beaten(error: BaseException) -> bool:
    """Whether the server rolled it back so that others, who wait for the same rows, get on."""
    lost = errors.DeadlockDetected, errors.SerializationFailure
    return any(isinstance(each, lost) for each in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those behind it: a handler may have put it into one of its own."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
