"""The kill matrix of the inbox: every step of a message whose effect and record are one transaction.

    count.before, count.work, count.commit, count.sent    the attempts of what was delivered before: asked
                                                          for; in their transaction; before its commit; after
    hold.before, hold.after                               the transaction with the handlers: begun; keys held
    handler.before, effect.mid, effect.after              inside the handler
    save.before, commit.before, commit.sent               the records; the commit; committed, and nobody heard
    commit.after                                          heard
    deliver.after, ack.before, ack.after, ack.sent        as in the matrix of the other handlers

A cell is a small run: some thirty messages, many sent twice, to a consumer that is struck when it comes
to the step with the aimed one; others finish.  The table of effects must then have every id once, and
nobody may ever have seen a doubt.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psycopg

from idemp import Consumer, Message, context, idempotent, open_store, open_transport
from idemp.ports import Done, Doubt, Op, Reply
from idemp.stores.postgresql_inbox import PostgresqlTransaction
from idemp.stores.sqlite_inbox import HandlersConnection
from tests.proxy import Proxy
from tests.reliability.history import History
from tests.reliability.matrix import AIMED, IDS, Run, Servers
from tests.reliability.nursery import Spec, Strike, Striker
from tests.reliability.witness import WitnessedStore, WitnessedTransport, id_of
from tests.servers.postgresql import url_of

T = TypeVar("T")

STEPS = (
    "deliver.after",
    "hold.before",
    "hold.after",
    "handler.before",
    "effect.mid",
    "effect.after",
    "save.before",
    "commit.before",
    "commit.sent",
    "commit.after",
    "ack.before",
    "ack.after",
    "ack.sent",
    "count.before",
    "count.work",
    "count.commit",
    "count.sent",
)
STORES = ("sqlite", "postgresql")
CUTS = (
    "hold.before",
    "handler.before",
    "effect.mid",
    "save.before",
    "commit.before",
    "count.before",
    "count.work",
    "count.commit",
)
"""At which the reply to what is asked next is lost, with the connection."""
COMMITTED = ("commit.sent", "commit.after", "ack.before", "ack.after", "ack.sent")
"""From here on its effect is there, and it is not run again."""


class Cell(NamedTuple):
    """One place."""

    step: str
    action: str
    store: str

    def __str__(self) -> str:
        return "-".join(self)


def cells() -> Iterator[Cell]:
    """All of them.  A file has no wire: its unknown commits are in tests/test_inbox.py."""
    for store in STORES:
        for step in STEPS:
            yield Cell(step, "kill", store)
    for step in CUTS:
        yield Cell(step, "cut", "postgresql")


# ------------------------------------------------------------------ the consumer


class WitnessedInbox(WitnessedStore):
    """An `Inbox`, and where its transactions are."""

    def __init__(self, inner: Any, history: History, at: Callable[[str, Sequence[str]], None]) -> None:
        super().__init__(inner, history, at)
        self._striker, self._inbox, self.transactions = at, inner, inner.transactions
        self._ids: list[str] = []
        self._counting = False
        self._watch_commits()

    def _moment(self, step: str) -> None:
        word, _, moment = step.partition(".")
        if not self._counting:
            self._striker(step, self._ids)
        elif word == "commit":
            self._striker({"before": "count.commit", "sent": "count.sent"}.get(moment, ""), self._ids)

    def _watch_commits(self) -> None:
        """Between the records and the commit, and right behind it."""
        moment = self._moment
        save, execute = PostgresqlTransaction.save, HandlersConnection.execute

        def watched_save(transaction: PostgresqlTransaction) -> None:
            moment("save.before")
            save(transaction)
            moment("commit.before")

        def watched_execute(connection: HandlersConnection, statement: str, *values: Any) -> Any:
            if statement == "COMMIT":
                moment("save.before")
                moment("commit.before")
            return execute(connection, statement, *values)

        PostgresqlTransaction.save = watched_save  # type: ignore[method-assign,assignment]
        HandlersConnection.execute = watched_execute  # type: ignore[method-assign,assignment]

    def transaction(self, work: Callable[[Any], T], wait: float, **options: Any) -> T:
        """See `Inbox`."""
        counting = work.__qualname__.startswith("_count")

        def watched(transaction: Any) -> T:
            self._counting, self._ids = counting, []
            found = work(_Watched(transaction, self))
            if counting:
                self._striker("count.work", self._ids)
            return found

        found = self._inbox.transaction(watched, wait, **options)
        self._moment("commit.sent")
        self._moment("commit.after")
        self._counting = False
        return found  # type: ignore[no-any-return]

    def asked(self, ops: Sequence[Op], moment: str) -> None:
        """The transaction is at these keys."""
        new = [id_of(op.key) for op in ops if id_of(op.key) not in self._ids]
        if moment == "after":
            self._ids += new
        if new:
            self._striker(f"count.{moment}" if self._counting else f"hold.{moment}", new)


class _Watched:
    """A transaction that tells which keys it is asked for."""

    def __init__(self, inner: Any, inbox: WitnessedInbox) -> None:
        self._inner, self._inbox = inner, inbox

    def apply(self, ops: Sequence[Op]) -> list[Reply]:
        """See `Transaction`."""
        self._inbox.asked(ops, "before")
        replies: list[Reply] = self._inner.apply(ops)
        self._inbox.asked(ops, "after")
        for op, reply in zip(ops, replies, strict=True):
            if isinstance(reply, Doubt):
                raise SystemExit(f"{op.key} is in doubt")
        return replies

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def consume(spec: Spec) -> None:
    """Be one consumer with an inbox, until SIGTERM."""
    folder = Path(spec.folder)
    history = History(folder, "consumer")
    at = Striker(spec.strikes, history)
    store = WitnessedInbox(open_store(spec.store), history, at)
    transport = WitnessedTransport(open_transport(spec.transport), history, at)
    consumer = Consumer(transport, service=spec.service, backoff=spec.backoff)

    @consumer.on("new_order")
    @idempotent(store, name=f"{spec.service}.new_order", transaction=True, attempts=spec.attempts)
    def new_order(message: Message) -> None:
        at("handler.before", [message.id])
        values = f"VALUES ('{message.id}', {os.getpid()}, {context().attempt})"
        context().connection.execute(f"INSERT INTO {spec.service}_one {values}")
        at("effect.mid", [message.id])
        context().connection.execute(f"INSERT INTO {spec.service}_two {values}")
        at("effect.after", [message.id])

    consumer.run(ready=lambda: (folder / f"ready.{os.getpid()}").touch())
    store.close()
    transport.close()


# ------------------------------------------------------------------ a cell


class Place:
    """The tables of a run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        for table in ("one", "two"):
            self.sql(f"CREATE TABLE {run.service}_{table} (id TEXT, process BIGINT, attempt INT)")

    def sql(self, statement: str) -> list[Any]:
        """On a connection of its own."""
        if self._run.kind == "sqlite":
            path = self._run.folder / "seen.db"
            with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as line:
                return line.execute(statement).fetchall()
        with psycopg.connect(url_of(self._run.shared.postgresql), autocommit=True) as line:
            found = line.execute(statement.encode())
            return found.fetchall() if found.description else []

    def effects(self, table: str = "one") -> list[tuple[str, int, int]]:
        """Id, process and attempt of each."""
        return sorted(self.sql(f"SELECT * FROM {self._run.service}_{table}"))


def play(shared: Servers, cell: Cell, seed: int = 0) -> list[str]:
    """Run a cell; every violation."""
    with Run(shared, cell.store, "rabbitmq") as run, ExitStack() as stack:
        place = Place(run)
        looking = stack.enter_context(closing(open_transport(run.transport)))

        def at_rest() -> bool:
            return not looking.depth(run.queue) and not run.left()

        ids = [*IDS, *IDS[::2], AIMED]
        random.Random(seed).shuffle(ids)
        run.send(ids)
        deaths = 0
        if cell.step.startswith("count."):
            run.killed(run.start(Strike(step="effect.mid", action="kill", id=AIMED), transaction=True))
            deaths = 1
        before = place.effects()
        if cell.action == "kill":
            run.killed(run.start(Strike(step=cell.step, action="kill", id=AIMED), transaction=True))
            deaths += 1
            committed = any(id == AIMED for id, _, _ in place.effects())
            run.start(transaction=True)
        else:
            proxy = stack.enter_context(Proxy(shared.port(cell.store)))
            strike = Strike(step=cell.step, action=f"call:{proxy.trigger()}", id=AIMED)
            pid = run.start(strike, store=run.store_at(proxy.port), transaction=True)
            run.until(lambda: run.struck(pid), "the step is reached")
            run.until(lambda: proxy.counts.lost == 1, "a reply is lost")
            committed = cell.step in COMMITTED
        for _ in range(2):  # the second time all of them are late duplicates
            run.until(lambda: {id for id, _, _ in place.effects()} == {*IDS}, "each took effect")
            run.until(at_rest, "nothing waits")
            run.send(IDS)
        run.until(at_rest, "nothing waits")
        run.end()
        while run.left():  # what was on its way between broker and consumer at that moment
            run.ready(run.start(transaction=True))
            run.until(at_rest, "the last is at rest")
            run.end()
        found = [*judged(run, place, deaths), *_expected(cell, committed)]
        if before and cell.step.startswith("count.") and any(id == AIMED for id, _, _ in before):
            found.append("an effect of who was killed in the middle of it is there")
        if not found:
            shutil.rmtree(run.folder)
        return found


def _expected(cell: Cell, committed: bool) -> Iterator[str]:
    if cell.action == "kill" and committed != (cell.step in COMMITTED):
        yield f"right after the kill its effect is {'' if committed else 'not '}there"


def judged(run: Run, place: Place, deaths: int) -> Iterator[str]:
    """What is wrong with what a run left, in which so many died with the aimed message."""
    one, two = place.effects("one"), place.effects("two")
    for id, times in Counter(id for id, _, _ in one).items():
        if times != 1:
            yield f"{id} took effect {times} times"
    if one != two:
        yield f"half of an effect: {set(one) ^ set(two)}"
    states = run.states()
    for id in IDS:
        state = states.get(id)
        if not isinstance(state, Done):
            yield f"{id} ended as {state}"
        elif (id, state.attempt) not in {(id, attempt) for id, _, attempt in one}:
            yield f"{id} is recorded with attempt {state.attempt}, which is not that of its effect"
        elif state.attempt > deaths + 1:
            yield f"{id} is at attempt {state.attempt} after {deaths} deaths"
    yield from (f"in doubt: {line}" for line in run.tail.look() if line.get("r") == "doubt")
    yield from (f"set aside: {dead}" for dead in run.dead())
    if "Traceback" in run.said():
        yield f"a traceback: {run.said()[-2000:]}"
