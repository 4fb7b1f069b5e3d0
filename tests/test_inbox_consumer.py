"""The inbox in the consumer: many messages in one transaction, each with a savepoint, acks after it."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from math import inf
from pathlib import Path
from typing import Any

import psycopg
import pytest

from idemp import Consumer, Message, Relay, context, idempotent, open_store, open_transport, publish
from idemp import consumer as consumer_module
from idemp import inbox as inbox_module
from idemp.message import Properties
from idemp.pipeline import (
    CALM,
    TOGETHER,
    Acknowledge,
    Delivered,
    Disconnected,
    Pipeline,
    Route,
    Tell,
    Transact,
    Transacted,
)
from idemp.policy import make_policy
from idemp.ports import Claimed, Delivery, Done, Free, Get, Parked, Publication
from idemp.protocol import NotRun, Ok, Verdict
from tests.servers import PostgreSQL
from tests.service import running

ROOT = Path(__file__).resolve().parent.parent


class Bench:
    """A consumer on a memory broker, a store, and a table of effects beside it."""

    def __init__(self, url: str, broker: str, workers: int = 1, *, table: bool = True) -> None:
        self.url, self.broker, self.workers = url, broker, workers
        self.store: Any = open_store(url)
        if table:
            self.sql("CREATE TABLE effect (id TEXT)")
        self.transport = open_transport(broker)
        self.consumer = Consumer(self.transport, service="s", backoff=0.05, workers=workers)
        with closing(open_transport(broker)) as transport:
            transport.declare("s-queue", "events")

    def sql(self, statement: str) -> list[Any]:
        if self.url.startswith("sqlite"):
            path = self.url.removeprefix("sqlite:///")
            with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as line:
                return line.execute(statement).fetchall()
        with psycopg.connect(self.url, autocommit=True) as line:
            found = line.execute(statement.encode())
            return found.fetchall() if found.description else []

    def effects(self) -> list[str]:
        return sorted(row[0] for row in self.sql("SELECT id FROM effect"))

    def reach(self, effects: int) -> None:
        """Wait until there are so many."""
        until(lambda: self.sql("SELECT count(*) FROM effect")[0][0] >= effects)

    def publish(self, ids: list[str]) -> None:
        send(self.broker, ids)

    def running(self) -> AbstractContextManager[None]:
        return running(self.consumer)

    def depth(self, queue: str) -> int:
        with closing(open_transport(self.broker)) as transport:
            return transport.depth(queue)

    def close(self) -> None:
        self.transport.close()
        self.store.close()


def send(url: str, ids: list[str]) -> None:
    messages = [Message(each, "t") for each in ids]
    with closing(open_transport(url)) as transport:
        publish(transport, [Publication(m.encode(), m.properties(), "events", "foo") for m in messages])


@pytest.fixture(params=["sqlite", "postgresql"])
def bench(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[Bench]:
    """On each store that has transactions; its name may be followed by a number of workers."""
    name, _, workers = request.param.partition(" ")
    sqlite = name == "sqlite"
    url = f"sqlite:///{tmp_path}/app.db" if sqlite else request.getfixturevalue("postgresql").database()
    made = Bench(url, f"memory://{unique}", int(workers or 1))
    yield made
    made.close()


SIDE_BY_SIDE = pytest.mark.parametrize("bench", ["sqlite", "postgresql", "postgresql 4"], indirect=True)


def until(what: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def write(message: Message) -> None:
    """A handler's effect."""
    context().connection.execute(f"INSERT INTO effect VALUES ('{message.id}')")


def test_many_messages_in_one_transaction(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, duplicates among them once; one that raises loses its own effect only, and runs again."""
    ids = [f"{n:04}" for n in range(1000)]
    commits: list[int] = []
    ran: list[str] = []
    real = bench.store.transaction

    def transaction(*args: Any, **options: Any) -> Any:
        commits.append(1)
        return real(*args, **options)

    monkeypatch.setattr(bench.store, "transaction", transaction)

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t", transaction=True, attempts=2)
    def handle(message: Message) -> None:
        ran.append(message.id)
        write(message)
        if message.id == "0500" or (message.id == "0700" and context().attempt == 1):
            raise ValueError("not this one")

    bench.publish(ids + ids[:300])
    with bench.running():
        until(lambda: bench.depth("s-queue.dead") == 1 and "0700" in bench.effects())
        until(lambda: bench.depth("s-queue") == 0)
    assert bench.effects() == [each for each in ids if each != "0500"]
    assert list(dict.fromkeys(ran)) == ids
    assert sorted(ran) == sorted([*ids, "0500", "0700"])
    assert len(commits) < 60
    parked = bench.store.apply([Get("s.t/0500")])[0]
    assert isinstance(parked, Parked)
    assert parked.attempt == 2


def test_a_commit_that_one_spoils_is_made_without_it(bench: Bench) -> None:
    """Its neighbours are done; its own attempts are counted until it is set aside."""
    bench.sql("CREATE TABLE parent (id INT PRIMARY KEY)")
    bench.sql("CREATE TABLE part (parent INT REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED)")

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t", transaction=True, attempts=2)
    def handle(message: Message) -> None:
        write(message)
        if message.id == "3":
            context().connection.execute("INSERT INTO part VALUES (1)")

    bench.publish([str(n) for n in range(8)])
    with bench.running():
        until(lambda: bench.depth("s-queue.dead") == 1)
    assert bench.effects() == [str(n) for n in range(8) if n != 3]
    assert isinstance(bench.store.apply([Get("s.t/3")])[0], Parked)


@pytest.mark.parametrize("bench", ["sqlite 4", "postgresql 4"], indirect=True)
def test_workers_run_transactions_side_by_side(bench: Bench) -> None:
    """Where the store takes them: each handler waits for three others, which SQLite never lets begin."""
    here = threading.Semaphore(0)
    beside: list[int] = []
    running = 0

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t", transaction=True)
    def handle(message: Message) -> None:
        nonlocal running
        write(message)
        with lock:
            running += 1
            beside.append(running)
        here.acquire(timeout=20 if bench.store.transactions > 1 else 0.05)
        with lock:
            running -= 1

    lock = threading.Lock()
    ids = [f"{n:02}" for n in range(8)]
    bench.publish(ids)
    most = min(4, bench.store.transactions)
    with bench.running():
        until(lambda: len(beside) >= most)
        for _ in ids:
            here.release()
        bench.reach(len(ids))
    assert max(beside) == most
    assert bench.effects() == ids


def test_replicas_that_want_the_same_rows(
    postgresql: PostgreSQL, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two batches is rolled back, once, and goes on call by call."""
    sizes: list[int] = []
    real = inbox_module._transact

    def transact(store: Any, jobs: Any, *more: Any) -> Any:
        sizes.append(len(jobs))
        return real(store, jobs, *more)

    monkeypatch.setattr(inbox_module, "_transact", transact)
    benches = [Bench(postgresql.database(), f"memory://{unique}")]
    benches.append(Bench(benches[0].url, f"memory://{unique}-other", table=False))
    benches[0].sql("CREATE TABLE account (id INT PRIMARY KEY, cents INT)")
    benches[0].sql("INSERT INTO account VALUES (0, 0), (1, 0)")
    meet = threading.Barrier(2)
    ran: list[tuple[str, int]] = []

    def serve(bench: Bench, mine: int) -> None:
        @bench.consumer.on("t")
        @idempotent(bench.store, name="s.t", transaction=True)
        def handle(message: Message) -> None:
            ran.append((message.id, context().attempt))
            row = (mine + int(message.id[1:])) % 2
            context().connection.execute(f"UPDATE account SET cents = cents + 1 WHERE id = {row}".encode())
            if message.id[1:] == "0" and len(ran) <= 2:
                meet.wait(20)

    for mine, bench in enumerate(benches):
        serve(bench, mine)
        bench.publish([f"{'ab'[mine]}{n}" for n in range(2)])
    with benches[0].running(), benches[1].running():
        until(lambda: benches[0].sql("SELECT sum(cents) FROM account") == [(4,)])
        until(lambda: all(bench.depth("s-queue") == 0 for bench in benches))
    assert {attempt for _, attempt in ran} == {1}
    assert len(ran) == 4 + 2  # both calls of one of them a second time
    assert sorted(sizes) == [1, 1, 2, 2]
    assert benches[0].sql("SELECT cents FROM account") == [(2,), (2,)]
    for bench in benches:
        bench.close()


def test_async_handlers_in_a_consumer(bench: Bench) -> None:
    """In order, as the others; one that raises loses its own effect only."""

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t", transaction=True)
    async def handle(message: Message) -> None:
        write(message)
        await asyncio.sleep(0)
        if message.id == "3" and context().attempt == 1:
            raise ValueError("not yet")

    bench.publish([str(n) for n in range(8)] * 2)
    with bench.running():
        bench.reach(8)
        until(lambda: bench.depth("s-queue") == 0)
    assert bench.effects() == [str(n) for n in range(8)]
    done = bench.store.apply([Get("s.t/3")])[0]
    assert isinstance(done, Done)
    assert done.attempt == 2


def test_a_stop_gives_back_what_has_not_begun(bench: Bench) -> None:
    """What ran is committed; the rest is free, with no attempt, and comes again."""
    began = threading.Event()

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t", transaction=True)
    def handle(message: Message) -> None:
        write(message)
        began.set()
        bench.consumer.stop()

    bench.publish([str(n) for n in range(20)])
    with bench.running():
        assert began.wait(20)
    bench.transport.close()  # what was not acknowledged goes back
    [first] = bench.effects()
    others = [str(n) for n in range(20) if str(n) != first]
    assert bench.store.apply([Get(f"s.t/{each}") for each in others]) == [Free(0)] * 19
    assert bench.depth("s-queue") == 19


# ------------------------------------------------------------------ kill -9

_SERVICE = """
import sys
from idemp import Consumer, context, idempotent, open_store, open_transport
url, broker, workers = sys.argv[1:]
consumer = Consumer(open_transport(broker), service="s", workers=int(workers))

@consumer.on("t")
@idempotent(open_store(url), name="s.t", transaction=True)
def handle(message):
    context().connection.execute(f"INSERT INTO effect VALUES ('{message.id}')")

consumer.run(ready=lambda: print("ready", flush=True))
"""


@SIDE_BY_SIDE
def test_killed_again_and_again(bench: Bench, tmp_path: Path) -> None:
    """Wherever it strikes, every message takes effect once, and none is ever in doubt."""
    broker = f"sqlite:///{tmp_path}/queues.db?visibility=1s"
    with closing(open_transport(broker)) as transport:
        transport.declare("s-queue", "events")
    ids = [f"{n:05}" for n in range(6000)]
    send(broker, ids)
    dice = random.Random(1)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    kills, done = 0, 0
    while done < len(ids):
        command = [sys.executable, "-c", _SERVICE, bench.url, broker, str(bench.workers)]
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as service:
            assert service.stdout is not None
            assert service.stdout.readline() == b"ready\n"
            if kills < 8:
                bench.reach(min(len(ids), done + dice.randrange(1, 700)))
                time.sleep(dice.random() / 20)  # so that it strikes anywhere in a transaction
                service.send_signal(signal.SIGKILL)
                kills += 1
            else:
                bench.reach(len(ids))
                service.terminate()
            service.wait(60)
        done = bench.sql("SELECT count(*) FROM effect")[0][0]
    assert kills >= 3
    assert bench.effects() == ids
    assert bench.sql("SELECT 1 FROM effect GROUP BY id HAVING count(*) > 1") == []


def test_the_database_is_restarted_under_load(own_postgresql: PostgreSQL, unique: str) -> None:
    """Killed and stopped with the consumer and its relay at work: both go on, and all is there once."""
    bench = Bench(own_postgresql.url, f"memory://{unique}")
    with closing(open_transport(bench.broker)) as other:
        other.declare("billed", "out")
        relay = Relay(bench.store, other)

        @bench.consumer.on("t")
        @idempotent(bench.store, name="s.t", transaction=True)
        def handle(message: Message) -> None:
            write(message)
            context().publish("billed", {}, exchange="out")

        ids = [f"{n:05}" for n in range(3000)]
        publishing = threading.Thread(target=relay.run)
        publishing.start()
        try:
            with bench.running():
                for part, end in enumerate((own_postgresql.kill, own_postgresql.stop, own_postgresql.kill)):
                    bench.publish(ids[part * 1000 : part * 1000 + 1000])
                    bench.reach(part * 1000 + 100)
                    end()
                    own_postgresql.start()
                bench.reach(len(ids))
                until(lambda: bench.depth("s-queue") == 0)
                until(lambda: bench.store.backlog().letters == 0)
        finally:
            relay.stop()
            publishing.join(30)
        assert bench.effects() == ids
        with closing(open_transport(bench.broker)) as theirs:
            theirs.consume("billed", 10_000)
            came: list[Any] = []
            while some := theirs.poll(0.2):
                came += some
        names = {each.properties.message_id for each in came if isinstance(each, Delivery)}
        assert len(names) == len(ids)
    bench.close()


@pytest.mark.parametrize("setting", ["default_transaction_read_only = on", "statement_timeout = '20ms'"])
def test_a_database_that_lets_nothing_through_is_waited_for(
    postgresql: PostgreSQL, unique: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after its administrator's mistake: nothing runs, no attempt is counted, and then it goes on."""
    url = postgresql.database()
    database = url.rpartition("/")[2]
    bench = Bench(url, f"memory://{unique}")
    waited: list[Any] = []
    monkeypatch.setattr(consumer_module, "_say_unavailable", waited.append)
    monkeypatch.setattr("idemp.stores.postgresql.PATIENCE", 0.5)

    def now(what: str) -> None:
        postgresql.psql(f"ALTER DATABASE {database} {what}")
        postgresql.psql(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
        )

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t", transaction=True, attempts=1)
    def handle(message: Message) -> None:
        write(message)

    ids = [f"{n:03}" for n in range(300)]
    with bench.running():
        bench.publish(ids[:100])
        bench.reach(100)
        now(f"SET {setting}")
        with psycopg.connect(url) as holder:
            if "timeout" in setting:
                holder.execute("SET statement_timeout = 0")
                holder.execute("LOCK TABLE idemp_default.open")
            bench.publish(ids[100:])
            until(lambda: len(waited) >= 2)
        now(f"RESET {setting.split()[0]}")
        bench.reach(300)
        until(lambda: bench.depth("s-queue") == 0)
    assert bench.effects() == ids
    assert bench.depth("s-queue.dead") == 0
    bench.close()


_POISON = """
import os, signal, sys
from idemp import Consumer, context, idempotent, open_store, open_transport
url, broker, workers = sys.argv[1:]
consumer = Consumer(open_transport(broker), service="s", workers=int(workers))

@consumer.on("t")
@idempotent(open_store(url), name="s.t", transaction=True, attempts=3)
def handle(message):
    context().connection.execute(f"INSERT INTO effect VALUES ('{message.id}')")
    if message.id == "07":
        os._exit(7)
    if message.id == "12":
        os.kill(os.getpid(), signal.SIGKILL)

consumer.run(ready=lambda: print("ready", flush=True))
"""


@SIDE_BY_SIDE
def test_what_kills_its_process_each_time_is_set_aside(bench: Bench, tmp_path: Path) -> None:
    """After the policy's attempts, with its reason; its neighbours take effect once, and none is parked."""
    broker = f"sqlite:///{tmp_path}/queues.db?visibility=1s"
    with closing(open_transport(broker)) as transport:
        transport.declare("s-queue", "events")
    ids = [f"{n:02}" for n in range(20)]
    poison = {"07", "12"}
    send(broker, ids)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ends: list[int] = []
    with closing(open_transport(broker)) as looking:
        while looking.depth("s-queue.dead") < len(poison):
            command = [sys.executable, "-c", _POISON, bench.url, broker, str(bench.workers)]
            with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as service:
                until(lambda: service.poll() is not None or looking.depth("s-queue.dead") == len(poison))
                service.terminate()
            ends.append(service.returncode)
            assert len(ends) < 12, ends
        until(lambda: looking.depth("s-queue") == 0)

    # The first death is nobody's; the second may be either's, in a batch; from then on each dies alone.
    assert ends.count(7) + ends.count(-signal.SIGKILL) <= 1 + 3 + 3, ends
    assert ends[-1] == 0, ends
    assert bench.effects() == [each for each in ids if each not in poison]
    for each in poison:
        parked = bench.store.apply([Get(f"s.t/{each}")])[0]
        assert isinstance(parked, Parked)
        assert parked.reason == "attempts used up: 3 began, none is known to have ended"


# ------------------------------------------------------------------ the pipeline's part


class Store:
    """One that the pipeline never asks."""

    retention = 3600.0
    transactions = 4

    def recall(self, key: str, since: float = inf) -> None:
        """Its memory is not sure of anything."""

    def apply(self, ops: Any) -> Any:
        raise AssertionError

    def transaction(self, work: Any, wait: float) -> Any:
        raise AssertionError


STORE: Any = Store()


def pipeline(workers: int = 1) -> Pipeline:
    policy = make_policy(
        lambda message: None, STORE, name="h", key=None, fingerprint=None, on_busy="wait", wait=2.0,
        in_doubt="retry", attempts=3, permanent=(), codec=None, transaction=True,
    )  # fmt: skip
    return Pipeline("q", {"t": Route(print, policy)}, workers=workers, chance=lambda: 0.0)


def deliver(line: Pipeline, *ids: str, again: bool = False) -> list[Any]:
    deliveries = [
        Delivery(tag, Message(each, "t").encode(), Properties(), "events", "foo", again)
        for tag, each in enumerate(ids, 1)
    ]
    return step(line, Delivered(deliveries, 1000.0))


def step(line: Pipeline, event: Any, now: float = 0.0) -> list[Any]:
    return [command for command in line.step(event, now) if not isinstance(command, Tell)]


def all_of(command: Transact, verdict: Verdict) -> Transacted:
    return Transacted(STORE, [(flight, verdict) for flight, _ in command.items])


OK = Ok(None, Claimed(1, 1))


def test_what_gathers_meanwhile_is_the_next_batch() -> None:
    """A duplicate waits for its first; nothing is acknowledged before the commit."""
    line = pipeline()
    [first] = deliver(line, "a", "b", "a")
    assert [flight.key for flight, _ in first.items] == ["h/a", "h/b"]
    assert deliver(line, "c", "d") == []
    assert not line.idle()
    [second, acks] = step(line, all_of(first, OK))
    assert isinstance(second, Transact)
    assert [flight.key for flight, _ in second.items] == ["h/c", "h/d"]
    assert isinstance(acks, Acknowledge)
    assert sorted(acks.tags) == [1, 2, 3]
    assert step(line, all_of(second, OK)) == [Acknowledge([1, 2])]
    assert line.idle()


def test_a_full_batch_is_handed_over_ahead() -> None:
    """So that the next begins at once when one has ended; a third waits, and what is not full gathers."""
    line = pipeline()
    first, second = deliver(line, *(f"{n:04}" for n in range(TOGETHER * 3 + 1)))
    assert [len(each.items) for each in (first, second)] == [TOGETHER] * 2
    assert next(flight.key for flight, _ in second.items) == f"h/{TOGETHER:04}"
    third, _ = step(line, all_of(first, OK))
    assert next(flight.key for flight, _ in third.items) == f"h/{TOGETHER * 2:04}"
    [acks] = step(line, all_of(second, OK))
    assert isinstance(acks, Acknowledge)
    last, _ = step(line, all_of(third, OK))
    assert [flight.key for flight, _ in last.items] == [f"h/{TOGETHER * 3:04}"]
    assert not line.idle()
    assert step(line, all_of(last, OK)) == [Acknowledge([TOGETHER * 3 + 1])]
    assert line.idle()


def keys(*commands: Any) -> list[list[str]]:
    """Of each transaction."""
    assert all(isinstance(each, Transact) for each in commands), commands
    return [[flight.key.removeprefix("h/") for flight, _ in each.items] for each in commands]


def test_workers_share_what_waits() -> None:
    """In as many transactions as the store takes; what gathers is the next, and a full one goes ahead."""
    line = pipeline(workers=6)
    some = deliver(line, *"abcdefg")
    assert keys(*some) == [["a", "b"], ["c", "d"], ["e", "f"], ["g"]]
    assert deliver(line, "h", "i") == []
    [next_, _] = step(line, all_of(some[2], OK))
    assert keys(next_) == [["h", "i"]]
    [ahead] = deliver(line, *(f"{n:04}" for n in range(TOGETHER + 1)))
    assert len(ahead.items) == TOGETHER
    [acks] = step(line, all_of(some[0], OK))
    assert isinstance(acks, Acknowledge)
    [last, _] = step(line, all_of(some[1], OK))
    assert keys(last) == [[f"{TOGETHER:04}"]]


def test_nothing_runs_beside_one_that_may_have_killed_its_process() -> None:
    """It would not be known who was guilty the next time."""
    line = pipeline(workers=4)
    [fresh] = deliver(line, "a")
    assert deliver(line, "x", "y", again=True) == []
    assert deliver(line, "b", "c") == []  # nor do they overtake
    [again, _] = step(line, all_of(fresh, OK))
    assert keys(again) == [["x", "y"]]
    assert deliver(line, *(f"{n:04}" for n in range(TOGETHER))) == []
    rest = step(line, all_of(again, OK))[:-1]
    assert len(rest) == 4
    assert keys(rest[0])[0][:3] == ["b", "c", "0000"]


def test_where_others_want_the_same_rows_fewer_go_together() -> None:
    """After a deadlock, until it has been calm for long; then twice as many, and so on."""
    line, tags = pipeline(), itertools.count()

    def next_of(command: Transact, lost: int = 0, now: float = 0.0) -> Transact:
        event = all_of(command, OK)._replace(lost=lost)
        return next(each for each in step(line, event, now) if isinstance(each, Transact))

    first, ahead = deliver(line, *(f"{next(tags)}" for _ in range(2000)))
    batch = next_of(next_of(first, lost=TOGETHER), now=1.0)
    assert len(ahead.items) == TOGETHER
    assert len(batch.items) == 11
    batch = next_of(next_of(batch, lost=11, now=2.0), now=2.0)
    assert len(batch.items) == 2
    sizes = []
    for now in (2.0 + CALM, 2.0 + CALM, 2.0 + CALM * 2, 2.0 + CALM * 3):
        batch = next_of(next_of(batch, now=now), now=now)
        sizes.append(len(batch.items))
    assert sizes == [4, 4, 8, 16]


def test_a_lost_connection_lets_go_of_those_that_wait() -> None:
    """What is under way is recorded, and nothing of it is acknowledged."""
    line = pipeline()
    [first] = deliver(line, "a")
    assert deliver(line, "b") == []
    assert step(line, Disconnected()) == []
    assert step(line, all_of(first, OK)) == []
    [again] = deliver(line, "a", "b")
    assert [flight.key for flight, _ in again.items] == ["h/a", "h/b"]


def test_what_was_not_run_is_tried_again() -> None:
    """After a moment, in a transaction."""
    line = pipeline()
    [first] = deliver(line, "a")
    assert step(line, all_of(first, NotRun())) == []
    due = line.due()
    assert due is not None
    [again] = step(line, Delivered([], 1000.0), due)
    assert isinstance(again, Transact)
