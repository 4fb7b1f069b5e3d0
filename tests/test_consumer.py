"""The consumer in this process: handlers of every kind, order, delays, a store that goes away."""

from __future__ import annotations

import asyncio
import gc
import itertools
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
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
    StoreUnavailable,
    TransportUnavailable,
    context,
    idempotent,
    open_store,
    open_transport,
    publish,
)
from idemp.consumer import COLLECT, _Shell
from idemp.message import Properties
from idemp.ports import (
    Claim,
    Claimed,
    Clock,
    Complete,
    Delivery,
    Done,
    Free,
    Get,
    NoMeter,
    Op,
    Parked,
    Publication,
    Ran,
    Store,
)
from tests.service import running


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

    def running(self) -> AbstractContextManager[None]:
        return running(self.consumer)

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


class Outage:
    """The broker is away as soon as ``since`` says so, until it is ``back``; ``met``: by who connects."""

    def __init__(self, bench: Bench, patch: pytest.MonkeyPatch, since: Callable[[], object]) -> None:
        self.back, self.met = threading.Event(), threading.Event()
        poll, connect = bench.transport.poll, bench.transport.connect

        def cut(timeout: float) -> Any:
            if since() and not self.back.is_set():
                raise TransportUnavailable("cut")
            return poll(timeout)

        def refuse() -> None:
            self.met.set()
            if not self.back.is_set():
                raise TransportUnavailable("still away")
            connect()

        patch.setattr(bench.transport, "poll", cut)
        patch.setattr(bench.transport, "connect", refuse)


def test_what_ended_is_recorded_while_the_broker_is_away(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A completion that was to go out with the next batch does not wait until the broker is back."""
    bench = make()
    asked, ask = threading.Event(), _Shell.ask

    def ask_and_cut(shell: _Shell, store: Store, ops: Sequence[Op]) -> None:
        ask(shell, store, ops)
        if any(isinstance(op, Complete) for op in ops):
            asked.set()

    monkeypatch.setattr(_Shell, "ask", ask_and_cut)
    back = Outage(bench, monkeypatch, asked.is_set).back

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


class Count:
    """An audit's tally whose database is away as long as ``away`` says, asked with the number of the call."""

    def __init__(self, away: Callable[[int], bool]) -> None:
        self.counted: list[str] = []
        self._away, self._asked = away, itertools.count(1)

    def start(self, service: str) -> None:
        pass

    def stop(self) -> None:
        pass

    def ran(self, runs: Sequence[Ran]) -> None:
        if runs and self._away(next(self._asked)):
            raise StoreUnavailable("the audit's database is away")
        self.counted += [run.id for run in runs]


@pytest.mark.parametrize("workers", [1, 4])
def test_a_run_that_ends_with_an_error_begins_no_more_and_records_what_ran(
    make: Callable[..., Bench], workers: int
) -> None:
    """What was claimed ahead is free again, and who goes on runs the rest: none twice, none in doubt."""
    audit = Count(away=lambda call: call == 3)
    bench = make(audit=audit, workers=workers, grace=5.0)
    runs: list[str] = []

    def handle(message: Message) -> None:
        runs.append(message.id)
        time.sleep(0.01)

    bench.consumer.on("t")(idempotent(bench.store, name="s.t")(handle))
    ids = {str(n) for n in range(200)}
    bench.publish(*(Message(each, "t") for each in ids))
    with pytest.raises(StoreUnavailable, match="the audit's database is away"):
        bench.consumer.run()
    ran = list(runs)
    assert len(ran) < 100
    assert set(audit.counted) == set(ran)
    states = {each: bench.state(f"s.t/{each}") for each in ids}
    assert {each for each, state in states.items() if isinstance(state, Done)} == set(ran)
    assert {type(states[each]) for each in ids - set(ran)} == {Free}
    time.sleep(0.3)
    assert runs == ran, "handlers began after the end"

    bench.transport.connect()
    again = Consumer(bench.transport, service="s", audit=audit)
    again.on("t")(idempotent(bench.store, name="s.t")(handle))
    with running(again):
        until(lambda: len(runs) >= 200)
    assert Counter(runs) == Counter(audit.counted) == dict.fromkeys(ids, 1)


def test_an_audit_that_stays_away_keeps_only_what_ran_from_being_recorded(
    make: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    """It counts first: what it cannot count is in doubt, and named.  What had not begun is free."""
    bench = make(audit=Count(away=lambda call: call > 1), grace=1.0)
    runs: list[str] = []

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t")
    def handle(message: Message) -> None:
        runs.append(message.id)
        time.sleep(0.001)  # so that some are handed back together

    ids = [str(n) for n in range(400)]
    bench.publish(*(Message(each, "t") for each in ids))
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="the audit's database is away"):
        bench.consumer.run()
    assert time.monotonic() - began < 10
    states = {each: type(bench.state(f"s.t/{each}")) for each in ids}
    assert {states[each] for each in ids if each not in runs} == {Free}
    unsure = [each for each in runs if states[each] is not Done]
    assert unsure
    assert all(f"s.t/{each} may have taken effect and is not recorded; it is in doubt" in caplog.text
               for each in unsure)  # fmt: skip
    assert caplog.text.count("the audit's database is away") == 1


def test_what_goes_wrong_while_it_ends_changes_nothing(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler that runs is waited for and recorded, and the error that is raised is the first."""
    meter = NoMeter()
    bench = make(meter=meter)
    poll, started, failed = bench.transport.poll, threading.Event(), threading.Event()

    def fail(timeout: float) -> Any:
        if started.is_set():
            failed.set()
            monkeypatch.setattr(meter, "count", fail_too)
            raise RuntimeError("the first")
        return poll(timeout)

    def fail_too(name: str, n: int = 1) -> None:
        raise ValueError("the second")

    monkeypatch.setattr(bench.transport, "poll", fail)
    monkeypatch.setattr(bench.transport, "cancel", lambda: fail_too(""))

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t")
    def handle(message: Message) -> None:
        started.set()
        assert failed.wait(10)
        time.sleep(0.5)

    bench.publish(*(Message(str(n), "t") for n in range(3)))
    with pytest.raises(RuntimeError, match="the first"):
        bench.consumer.run()
    states = [type(bench.state(f"s.t/{n}")) for n in range(3)]
    assert states == [Done, Free, Free]
    assert "while it ends: ValueError: the second" in caplog.text


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupt_does_not_wait_for_the_handlers(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Neither as the first error nor while it ends with another, which stays the one that is raised."""
    bench = make()
    poll, sleep, started, leave = bench.transport.poll, time.sleep, threading.Event(), threading.Event()
    runs: list[str] = []

    def fail(timeout: float) -> Any:
        if not started.is_set():
            return poll(timeout)
        if late:
            raise RuntimeError("the first")
        raise KeyboardInterrupt

    def interrupted(seconds: float) -> None:
        if started.is_set() and threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(bench.transport, "poll", fail)
    monkeypatch.setattr(bench.consumer, "_clock", Clock(sleep=interrupted if late else sleep))

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t")
    def handle(message: Message) -> None:
        runs.append(message.id)
        started.set()
        leave.wait(20)

    bench.publish(*(Message(str(n), "t") for n in range(3)))
    began = time.monotonic()
    with pytest.raises(RuntimeError if late else KeyboardInterrupt):
        bench.consumer.run()
    assert time.monotonic() - began < 10
    leave.set()
    sleep(0.3)
    assert runs == ["0"]


def test_a_worker_that_breaks_hands_back_what_ended_before(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug beside the handlers, here of a meter, takes no result with it, and ends it at once."""
    meter = NoMeter()
    bench = make(meter=meter, grace=15.0)
    runs: list[str] = []

    def fail(name: str, seconds: float) -> None:
        if name == "s_handler" and len(runs) == 3:
            raise ValueError("a meter that breaks")

    monkeypatch.setattr(meter, "time", fail)

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t")
    def handle(message: Message) -> None:
        runs.append(message.id)

    bench.publish(*(Message(str(n), "t") for n in range(20)))
    began = time.monotonic()
    with pytest.raises(ValueError, match="a meter that breaks"):
        bench.consumer.run()
    assert time.monotonic() - began < 10
    states = {str(n): type(bench.state(f"s.t/{n}")) for n in range(20)}
    assert {each for each, state in states.items() if state is Done} == set(runs)
    assert set(states.values()) == {Done, Free}


def test_a_store_that_breaks_ends_it_at_once(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing can be recorded any more nobody waits for it."""
    bench = make(grace=15.0)
    apply = bench.store.apply

    def breaks(ops: Sequence[Op]) -> Any:
        if any(isinstance(op, Complete) for op in ops):
            raise ConfigError("this store is of a newer idemp")
        return apply(ops)

    monkeypatch.setattr(bench.store, "apply", breaks)
    bench.consumer.on("t")(idempotent(bench.store, name="s.t")(lambda message: None))
    bench.publish(Message("1", "t"))
    began = time.monotonic()
    with pytest.raises(ConfigError, match="newer idemp"):
        bench.consumer.run()
    assert time.monotonic() - began < 10


def test_what_runs_while_the_broker_is_away_is_recorded(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that was claimed before, one after the other, and not only when the broker is back."""
    bench = make()
    runs: list[str] = []
    back = Outage(bench, monkeypatch, lambda: runs).back

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t")
    def handle(message: Message) -> None:
        runs.append(message.id)
        time.sleep(0.1)

    bench.publish(*(Message(str(n), "t") for n in range(10)))
    try:
        with bench.running():
            until(lambda: isinstance(bench.state("s.t/9"), Done))
            assert not back.is_set()
            assert [type(bench.state(f"s.t/{n}")) for n in range(10)] == [Done] * 10
            back.set()
            until(lambda: bench.transport.depth("s-queue") == 0)
    finally:
        back.set()
    assert sorted(runs) == [str(n) for n in range(10)]


def test_what_a_handler_publishes_while_the_broker_is_away_goes_out_when_it_is_back(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for that as it waits for a confirmation, and the handler does not run again."""
    bench = make()
    runs: list[str] = []
    outage = Outage(bench, monkeypatch, lambda: runs)
    back, away = outage.back, outage.met

    @bench.consumer.on("t")
    @idempotent(bench.store, name="s.t")
    def handle(message: Message) -> None:
        runs.append(message.id)
        assert away.wait(10)
        context().publish("told", {})

    bench.consumer.on("told")(lambda message: runs.append(message.type))
    bench.publish(Message("1", "t"))
    try:
        with bench.running():
            assert away.wait(10)
            time.sleep(0.5)
            back.set()
            until(lambda: "told" in runs)
            until(lambda: isinstance(bench.state("s.t/1"), Done))
    finally:
        back.set()
    assert runs == ["1", "told"]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_no_policy_keeps_apart_waits_in_one_line_only(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """What stands in line when the connection is lost comes again, and only then is it run."""
    bench = make(workers=workers)
    poll = bench.transport.poll
    runs: list[str] = []
    lost = threading.Event()

    def cut(timeout: float) -> Any:
        if runs and not lost.is_set():
            lost.set()
            raise TransportUnavailable("cut")
        return poll(timeout)

    monkeypatch.setattr(bench.transport, "poll", cut)

    @bench.consumer.on("t")
    def handle(message: Message) -> None:
        runs.append(message.id)
        time.sleep(0.05)

    bench.publish(*(Message(str(n), "t") for n in range(20)))
    with bench.running():
        until(lambda: len(set(runs)) == 20)
        assert lost.is_set()
        time.sleep(0.5)
    twice = [each for each, n in Counter(runs).items() if n > 1]
    assert len(twice) <= 2 * workers, "at most those that ran when the connection was lost"


def test_connections_that_do_nothing_come_slower_and_slower(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ends each connection as soon as it is made does not cost the broker a hundred a second."""
    bench = make()
    poll, connect = bench.transport.poll, bench.transport.connect
    made: list[float] = []
    well = threading.Event()

    def counted() -> None:
        made.append(time.monotonic())
        connect()

    def lose(timeout: float) -> Any:
        if not well.is_set():
            raise TransportUnavailable("a message that ends connections")
        return poll(timeout)

    monkeypatch.setattr(bench.transport, "connect", counted)
    monkeypatch.setattr(bench.transport, "poll", lose)

    @bench.consumer.on("foo")
    @idempotent(bench.store, name="s.foo")
    def handle(message: Message) -> None:
        pass

    bench.publish(Message("1", "foo"))
    with bench.running():
        time.sleep(2.0)
        assert 1 <= len(made) < 40
        well.set()
        until(lambda: isinstance(bench.state("s.foo/1"), Done))


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
