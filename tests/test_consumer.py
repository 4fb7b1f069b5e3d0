"""The consumer in this process: handlers of every kind, order, delays, a store that goes away."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from idemp import (
    ConfigError,
    Consumer,
    FingerprintConflict,
    InDoubt,
    Message,
    RetryLater,
    TransportUnavailable,
    context,
    idempotent,
    open_store,
    open_transport,
    publish,
)
from idemp.consumer import COLLECT, _Shell
from idemp.message import Properties
from idemp.ports import Claim, Claimed, Complete, Delivery, Done, Get, Op, Parked, Publication, Store


class Bench:
    """A consumer on a memory broker and an SQLite store."""

    def __init__(self, folder: Path, name: str, **options: Any) -> None:
        self.url = f"memory://{name}"
        self.path = folder / "seen.db"
        self.store: Store = open_store(f"sqlite:///{self.path}?session=3s")
        self.transport = open_transport(self.url)
        self.consumer = Consumer(self.transport, service="s", **{"backoff": 0.05, **options})
        with closing(open_transport(self.url)) as transport:
            transport.declare("s-queue", "events")

    def publish(self, *messages: Message, properties: Properties | None = None) -> None:
        copies = [Publication(m.encode(), properties or m.properties(), "events", "foo") for m in messages]
        with closing(open_transport(self.url)) as transport:
            publish(transport, copies)

    @contextmanager
    def running(self) -> Iterator[None]:
        ready = threading.Event()
        errors: list[BaseException] = []

        def run() -> None:
            try:
                self.consumer.run(ready=ready.set)
            except BaseException as error:
                errors.append(error)
                ready.set()

        thread = threading.Thread(target=run)
        thread.start()
        assert ready.wait(10)
        try:
            yield
        finally:
            self.consumer.stop()
            thread.join(20)
            assert not thread.is_alive()
            if errors:
                raise errors[0]

    def dead(self) -> list[Delivery]:
        with closing(open_transport(self.url)) as transport:
            transport.consume("s-queue.dead", 100)
            return [event for event in transport.poll(0.2) if isinstance(event, Delivery)]

    def state(self, key: str) -> Any:
        return self.store.apply([Get(key)])[0]


@pytest.fixture
def make(tmp_path: Path, unique: str) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def built(**options: Any) -> Bench:
        benches.append(Bench(tmp_path, f"{unique}{len(benches)}", **options))
        return benches[-1]

    yield built
    for bench in benches:
        bench.transport.close()
        bench.store.close()


def until(what: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_one_worker_keeps_the_order(make: Callable[..., Bench]) -> None:
    """Of a thousand messages in batches."""
    bench = make()
    seen: list[str] = []

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t")
    def handle(message: Message) -> None:
        seen.append(message.id)

    with bench.running():
        bench.publish(*(Message(str(n), "t") for n in range(1000)))
        until(lambda: len(seen) == 1000)
    assert seen == [str(n) for n in range(1000)]


def test_garbage_is_looked_for_seldom_unless_the_application_says_when(make: Callable[..., Bench]) -> None:
    """While messages come, and as before afterwards."""
    before = gc.get_threshold()
    try:
        for own, meanwhile, set_in_between in (
            ((700, 10, 10), COLLECT, None),
            ((701, 10, 10), (701, 10, 10), None),
            ((700, 10, 10), COLLECT, (702, 10, 10)),
        ):
            bench = make()
            seen: list[tuple[int, int, int]] = []

            @bench.consumer.on("t")
            def handle(message: Message, seen: list[tuple[int, int, int]] = seen) -> None:
                seen.append(gc.get_threshold())

            gc.set_threshold(*own)
            with bench.running():
                bench.publish(Message("1", "t"))
                until(partial(len, seen))
                if set_in_between:
                    gc.set_threshold(*set_in_between)
            assert seen == [meanwhile]
            assert gc.get_threshold() == (set_in_between or own)
    finally:
        gc.set_threshold(*before)


def test_many_workers_work_at_once(make: Callable[..., Bench]) -> None:
    """Twenty slow handlers on ten workers take two turns, not twenty."""
    bench = make(workers=10)
    together = threading.Barrier(10)
    done: list[str] = []

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t")
    def handle(message: Message) -> None:
        together.wait(10)
        done.append(message.id)

    with bench.running():
        bench.publish(*(Message(str(n), "t") for n in range(20)))
        until(lambda: len(done) == 20)


def test_async_handlers_and_context(make: Callable[..., Bench]) -> None:
    """``async def`` runs on its worker's loop; the context has the message."""
    bench = make()
    seen: list[Any] = []

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t")
    async def handle(message: Message) -> dict[str, int]:
        await asyncio.sleep(0.001)
        seen.append((context().message, context().attempt, message.args))
        return {"n": 1}

    with bench.running():
        bench.publish(Message("1", "t", {"a": 1}))
        until(lambda: isinstance(bench.state("s.t/1"), Done))
    assert seen[0][1:] == (1, {"a": 1})
    assert seen[0][0].id == "1"
    assert bench.state("s.t/1").result == b'{"n":1}'


def test_a_handler_without_policy_runs_at_least_once(make: Callable[..., Bench]) -> None:
    """Every delivery; what raises comes again, five times, then goes to the dead letters."""
    bench = make()
    runs: list[str] = []

    @bench.consumer.on("t")
    def handle(message: Message) -> None:
        runs.append(message.id)
        if message.id == "bad":
            raise ValueError("no")

    with bench.running():
        bench.publish(Message("1", "t"), Message("1", "t"), Message("bad", "t"))
        until(lambda: runs.count("bad") == 5 and runs.count("1") == 2)
        until(bench.dead)
    assert "attempts used up (5): ValueError: no" in bench.dead()[0].properties.headers["idemp-reason"]


def test_retry_later_says_when(make: Callable[..., Bench]) -> None:
    """Not before."""
    bench = make(backoff=0.001)
    times: list[float] = []

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t")
    def handle(message: Message) -> None:
        times.append(time.monotonic())
        if len(times) == 1:
            raise RetryLater(after=0.5)

    with bench.running():
        bench.publish(Message("1", "t"))
        until(lambda: len(times) == 2)
    assert times[1] - times[0] >= 0.5


def test_a_handler_that_is_unsure_is_parked_if_it_asked_for_that(make: Callable[..., Bench]) -> None:
    """`InDoubt` leaves the claim in doubt; the next look parks it, with its message at hand."""
    bench = make()
    runs: list[str] = []

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t", in_doubt="park")
    def handle(message: Message) -> None:
        runs.append(message.id)
        raise InDoubt("no answer from the bank")

    with bench.running():
        bench.publish(Message("1", "t"))
        until(bench.dead)
    assert runs == ["1"]
    assert isinstance(bench.state("s.t/1"), Parked)


def test_a_conflict_is_set_aside_and_the_first_result_stands(make: Callable[..., Bench]) -> None:
    """The same id with another payload, where fingerprints are on."""
    bench = make()

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t", fingerprint="message.args")
    def handle(message: Message) -> Any:
        return message.args

    with bench.running():
        bench.publish(Message("1", "t", {"a": 1}), Message("1", "t", {"a": 1}), Message("1", "t", {"a": 2}))
        until(bench.dead)
        [copy] = bench.dead()
    assert copy.properties.headers["idemp-outcome"] == "conflict"
    assert bench.state("s.t/1").result == b'{"a":1}'
    with pytest.raises(FingerprintConflict):
        handle(Message("1", "t", {"a": 2}))


def test_a_message_older_than_the_retention_is_parked(make: Callable[..., Bench]) -> None:
    """N12's other side: what may have been forgotten is not run."""
    bench = make()
    runs: list[str] = []

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t")
    def handle(message: Message) -> None:
        runs.append(message.id)

    with bench.running():
        bench.publish(Message("old", "t", published=time.time() - 90_000), Message("new", "t"))
        until(bench.dead)
        until(lambda: runs == ["new"])
    assert "older than the retention" in bench.state("s.t/old").reason


def test_the_store_goes_away_and_comes_back(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """N16: nothing runs meanwhile, the deliveries are kept, and it goes on by itself."""
    monkeypatch.setattr("idemp.stores.sqlite.PATIENCE", 0.3)
    bench = make()
    runs: list[str] = []

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t")
    def handle(message: Message) -> None:
        runs.append(message.id)

    with bench.running():
        bench.publish(Message("1", "t"))
        until(lambda: isinstance(bench.state("s.t/1"), Done))
        with closing(sqlite3.connect(bench.path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            bench.publish(*(Message(str(n), "t") for n in range(2, 20)))
            time.sleep(1.5)
            assert runs == ["1"]
            other.execute("ROLLBACK")
        until(lambda: len(runs) == 19)
    assert sorted(runs, key=int) == [str(n) for n in range(1, 20)]


def test_what_ended_is_recorded_while_the_broker_is_away(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A completion that was to go out with the next batch does not wait until the broker is back."""
    bench = make()
    back, asked = threading.Event(), threading.Event()
    poll, connect, ask = bench.transport.poll, bench.transport.connect, _Shell.ask

    def ask_and_cut(shell: _Shell, store: Store, ops: Sequence[Op]) -> None:
        ask(shell, store, ops)
        if any(isinstance(op, Complete) for op in ops):
            asked.set()

    def cut(timeout: float) -> Any:
        if asked.is_set() and not back.is_set():
            raise TransportUnavailable("cut")
        return poll(timeout)

    def refuse() -> None:
        if not back.is_set():
            raise TransportUnavailable("still away")
        connect()

    monkeypatch.setattr(_Shell, "ask", ask_and_cut)
    monkeypatch.setattr(bench.transport, "poll", cut)
    monkeypatch.setattr(bench.transport, "connect", refuse)

    @bench.consumer.on("foo")
    @idempotent(bench.store, name="s.foo")
    def handle(message: Message) -> None:
        pass

    bench.publish(Message("1", "foo"))
    try:
        with bench.running():
            until(lambda: isinstance(bench.state("s.foo/1"), Done))
            assert not back.is_set()
            back.set()
    finally:
        back.set()


def test_a_session_that_was_lost_starts_nothing(make: Callable[..., Bench]) -> None:
    """A handler finds the session stale before its first instruction: it is looked up again and runs."""
    bench = make()
    runs: list[int] = []
    fresh = bench.store.fresh
    answers = [False, False]

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t")
    def handle(message: Message) -> None:
        runs.append(context().attempt)

    bench.store.fresh = lambda token=0: answers.pop() if answers else fresh(token)  # type: ignore[method-assign]
    with bench.running():
        bench.publish(Message("1", "t"))
        until(lambda: isinstance(bench.state("s.t/1"), Done))
    assert runs == [1]


def test_a_busy_key_is_deferred_and_done_later(make: Callable[..., Bench]) -> None:
    """Held by another session for longer than the policy waits."""
    bench = make()
    runs: list[str] = []

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t", wait=0.1)
    def handle(message: Message) -> None:
        runs.append(message.id)

    with closing(open_store(f"sqlite:///{bench.path}")) as other:
        claim = other.apply([Claim("s.t/1")])[0]
        assert isinstance(claim, Claimed)
        with bench.running():
            bench.publish(Message("1", "t"))
            time.sleep(0.5)
            assert runs == []
            other.close()
            until(lambda: isinstance(bench.state("s.t/1"), Done))


def test_a_slow_handler_is_named_when_the_grace_is_over(
    make: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    """The consumer returns in time and says whose effect it cannot be sure of."""
    bench = make(grace=0.3)
    started, leave = threading.Event(), threading.Event()

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t")
    def handle(message: Message) -> None:
        started.set()
        leave.wait(20)

    with bench.running():
        bench.publish(Message("1", "t"))
        assert started.wait(10)
    leave.set()
    assert "s.t/1 was still running after the grace time; it is in doubt" in caplog.text


def test_wrong_settings_are_refused(make: Callable[..., Bench]) -> None:
    """At once, by name."""
    bench = make()
    with pytest.raises(ConfigError, match="service=''"):
        Consumer(bench.transport, service="")
    with pytest.raises(ConfigError, match="workers=0"):
        Consumer(bench.transport, service="s", workers=0)
    bench.consumer.on("t")(print)
    with pytest.raises(ConfigError, match="'t' has a handler already"):
        bench.consumer.on("t")(print)
    lost = Consumer(bench.transport, service="s")
    lost.on("t")(idempotent(open_store("sqlite:////no/such/folder/seen.db"), name="n")(lambda message: None))
    with pytest.raises(ConfigError, match="does not exist"):
        lost.run()
