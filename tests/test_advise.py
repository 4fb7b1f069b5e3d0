"""Advice on workers: queues with a known optimum, a shared lock, and what it does not say.  Row U12."""

from __future__ import annotations

import heapq
import json
import math
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest

from idemp import Message, open_event_log, open_transport, publish
from idemp.ports import Batch, Event
from idemp.tracking.advise import LEAST, Sample, Wish, advise, concurrency, shared, waiting
from tests.service import finished, until
from tests.test_tracking import service, to


def simulated(
    rate: float, service: Callable[[random.Random], float], workers: int, n: int, seed: int
) -> list[Sample]:
    """A queue with Poisson arrivals: first come, first served."""
    chance = random.Random(seed)
    free = [0.0] * workers
    now, samples = 0.0, []
    for _ in range(n):
        now += chance.expovariate(rate)
        began = max(now, heapq.heappop(free))
        took = service(chance)
        heapq.heappush(free, began + took)
        samples.append(Sample(now, began, took))
    return samples


def erlang(rate: float, service: float, latency: float) -> int:
    """The fewest workers of an M/M/c whose mean wait is short enough, by the textbook's sum."""
    load = rate * service
    n = math.floor(load) + 1
    while True:
        top = load**n / math.factorial(n) * n / (n - load)
        waits = top / (sum(load**k / math.factorial(k) for k in range(n)) + top)
        if waits * service / (n - load) <= latency and load / n <= 0.7:
            return n
        n += 1


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("rate", "service", "latency"),
    [(5, 0.1, 0.5), (20, 0.2, 0.05), (50, 0.3, 0.1), (8, 1.0, 2.0), (100, 0.1, 0.001)],
)
@pytest.mark.parametrize("workers", [2, 12, 40])
def test_u12_within_one_worker_of_the_optimum(
    rate: float, service: float, latency: float, workers: int, seed: int
) -> None:
    """U12: an M/M/c, whose optimum the textbook knows; also while it falls behind, and while it idles."""
    samples = simulated(rate, lambda chance: chance.expovariate(1 / service), workers, 5000, seed)
    advice = advise(samples, workers=workers, wish=Wish(latency, 300.0))
    assert advice is not None
    needed = max(advice.steady, advice.catching_up, advice.for_latency)
    assert abs(needed - erlang(rate, service, latency)) <= 1
    assert advice.arrivals == pytest.approx(rate, rel=0.1)
    assert advice.service_time == pytest.approx(service, rel=0.1)
    if needed > workers:
        assert (advice.verdict, advice.recommended) == (f"add {needed - workers}", needed)


def locked(rate: float, hold: float, workers: int, n: int, fair: float = 1.0) -> list[Sample]:
    """Handlers that run in parallel and all wait for one lock.

    fair: how often it goes to the one that waits longest, and not to the one that came last.
    """
    chance = random.Random(7)
    sent, now = 0.0, 0.0
    arrived: list[float] = []
    for _ in range(n):
        sent += chance.expovariate(rate)
        arrived.append(sent)
    coming, waiting_for_it, samples = deque(arrived), list[tuple[float, float]](), list[Sample]()
    while len(samples) < n:
        if not waiting_for_it:
            now = max(now, coming[0])
            waiting_for_it.append((now, coming.popleft()))
        began, at = waiting_for_it.pop(0 if chance.random() < fair else -1)
        free = workers - 1 - len(waiting_for_it)
        while free and coming and coming[0] <= now + hold:  # while it holds the lock
            waiting_for_it.append((max(now, coming[0]), coming.popleft()))
            free -= 1
        now += hold
        samples.append(Sample(at, began, now - began))
    return samples


@pytest.mark.parametrize("workers", [4, 8])
def test_u12_a_shared_lock_is_named(workers: int) -> None:
    """U12: more workers will not help, and why."""
    samples = locked(9.5, 0.1, workers, 3000)
    advice = advise(samples, workers=workers, backlog=500, wish=Wish(0.1, 60.0))
    assert advice is not None
    assert advice.verdict == "more workers will not help"
    assert "the more run beside it" in advice.why
    assert advice.recommended == workers


@pytest.mark.parametrize("fair", [0.0, 0.1, 0.5])
def test_u12_a_shared_lock_is_named_that_is_not_fair(fair: float) -> None:
    """U12: who frees Python's lock has it again before those that wait: most wait little, few very long."""
    advice = advise(locked(9.5, 0.1, 4, 3000, fair), workers=4, backlog=500, wish=Wish(0.1, 60.0))
    assert advice is not None
    assert advice.verdict == "more workers will not help", advice


def test_u12_while_all_are_busy_the_past_tells() -> None:
    """U12: of a service at its limit nobody sees what fewer would take; unless there was a quieter time."""
    busy = locked(50.0, 0.1, 4, 400)[100:300]
    assert {round(each) for each in concurrency(busy)[10:-10]} == {4}
    alone = advise(busy, workers=4, backlog=500)
    assert alone is not None
    assert alone.verdict.startswith("add ")
    assert "nobody can tell whether they wait for each other: add one first" in alone.why
    before = [each._replace(began=each.began - 1000) for each in locked(3.0, 0.1, 4, 300)]
    told = advise(busy, workers=4, backlog=500, past=[*before, *busy])
    assert told is not None
    assert told.verdict == "more workers will not help"


@pytest.mark.parametrize("one_lock", [True, False])
def test_u12_a_real_handler_on_one_lock(amqp_url: str, tmp_path: Path, unique: str, one_lock: bool) -> None:
    """U12: four workers on RabbitMQ; where all of them wait for one lock, more will not help."""
    lock, ran = threading.Lock(), Counter[str]()

    def handle(message: Message, _: Any) -> None:
        with lock if one_lock else nullcontext():
            time.sleep(0.02)
        ran[message.id] += 1

    with (
        service(amqp_url, tmp_path, unique, {"order": handle}, workers=4),
        closing(open_transport(amqp_url)) as out,
    ):
        for n in range(30):  # one after the other
            publish(out, to(f"{unique}-queue", Message(str(n), "order")))
            until(lambda n=n: len(ran) == n + 1, lambda: ran)  # type: ignore[misc]
        publish(out, to(f"{unique}-queue", *(Message(str(n), "order") for n in range(30, 150))))
        until(lambda: len(ran) == 150, lambda: ran)
    told = ("-m", "idemp", "advise", "--tracking", f"sqlite:///{tmp_path}/events.db", "--workers", "4")
    done = finished(*told, "--backlog", "5000", "--catch-up", "10s", "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["messages"], row["verdict"] == "more workers will not help") == (150, one_lock), row


def test_independent_handlers_share_nothing() -> None:
    """However many run beside each other."""
    found = shared(simulated(20, lambda chance: chance.uniform(0.2, 0.4), 8, 3000, 5))
    assert found is not None
    assert abs(found) < 0.3


def test_concurrency_is_that_of_each_moment() -> None:
    """By hand: two that overlap by half, one alone, one that took no time."""
    samples = [
        Sample(None, 0.0, 2.0),
        Sample(None, 1.0, 2.0),
        Sample(None, 10.0, 1.0),
        Sample(None, 20.0, 0.0),
    ]
    assert concurrency(samples) == [1.5, 1.5, 1.0, 1.0]


def test_u12_the_backlog_is_worked_off_in_time() -> None:
    """U12: what waits counts as arrivals of the time allowed."""
    samples = simulated(10, lambda chance: chance.expovariate(10), 2, 2000, 1)
    for backlog, least in ((0, 1), (6000, 3), (60_000, 21)):
        advice = advise(samples, workers=2, backlog=backlog, wish=Wish(10.0, 300.0))
        assert advice is not None
        assert advice.catching_up in (least, least + 1)


def test_u12_too_many_are_named() -> None:
    """U12: taken away only as far as the rest stay relaxed, and never while messages wait."""
    samples = simulated(10, lambda chance: chance.expovariate(10), 10, 2000, 1)
    advice = advise(samples, workers=10)
    assert advice is not None
    assert (advice.verdict, advice.recommended) == ("remove 8", 2)
    kept = advise(samples, workers=10, backlog=5)
    assert kept is not None
    assert kept.verdict == "enough"


def test_failures_are_mended_first() -> None:
    """More workers would only fail more."""
    samples = simulated(10, lambda chance: chance.expovariate(2), 2, 200, 1)
    failing = [each._replace(failed=n % 5 == 0) for n, each in enumerate(samples)]
    advice = advise(failing, workers=2)
    assert advice is not None
    assert advice.verdict == "mend first"


def test_silent_under_thirty() -> None:
    """And where nothing took any time."""
    samples = simulated(10, lambda chance: 0.1, 2, LEAST, 1)
    assert advise(samples[:-1], workers=1) is None
    assert advise(samples, workers=1) is not None
    assert advise([each._replace(took=0.0) for each in samples], workers=1) is None


def test_erlang_agrees_with_the_textbook() -> None:
    """The recursion, for numbers whose factorial no float holds too."""
    assert waiting(1.0, 0.5, 1) == pytest.approx(0.5)  # M/M/1: rho / (mu - lambda)
    assert waiting(2.0, 1.0, 3) == pytest.approx(4 / 9)
    assert waiting(2.0, 1.0, 2) == math.inf
    assert 0 < waiting(480.0, 1.0, 500) < 0.05


# ------------------------------------------------------------------ the command line


def filled(folder: Path, samples: list[Sample], service: str = "billing") -> str:
    url = f"sqlite:///{folder}/events.db"
    shift = time.time() - max(each.began + each.took for each in samples) - 1
    with closing(open_event_log(url)) as log:
        events = [
            Event(str(n), "ok", service, each.began + shift, "receiver", sender="shop", took=each.took,
                  sent_at=None if each.sent is None else each.sent + shift)
            for n, each in enumerate(samples)
        ]  # fmt: skip
        log.append(Batch("w", 1, events))
    return url


def test_u12_the_command(tmp_path: Path) -> None:
    """U12: a sentence and a table; JSON; nothing under thirty; one sentence for what is wrong."""
    url = filled(tmp_path, simulated(20, lambda chance: chance.expovariate(5), 2, 1000, 1))
    told = ("-m", "idemp", "advise", "--tracking", url, "--window", "1h")
    done = finished(*told, "--workers", "2", "--backlog", "100")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("billing: add ")
    assert "arrivals" in done.stdout
    [row] = [
        json.loads(line)
        for line in finished(*told, "--workers", "2", "--backlog", "0", "--json").stdout.splitlines()
    ]
    assert (row["service"], row["workers"], row["messages"]) == ("billing", 2, 1000)
    assert row["recommended"] > 4
    few = finished(*told, "--service", "nobody", "--backlog", "0")
    assert (few.returncode, few.stdout) == (1, "")
    assert few.stderr == "idemp: too little is known: nobody has 0 messages in that time, and 30 are needed\n"
    gone = finished(*told, "--transport", "amqp://guest:secret@127.0.0.1:9/")
    assert (gone.returncode, gone.stdout) == (2, "")
    assert gone.stderr.startswith("idemp: --transport (IDEMP_TRANSPORT): ")
    assert "secret" not in gone.stderr
