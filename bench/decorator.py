"""The decorator alone: calls a second of `@idempotent` and of AWS Powertools' `@idempotent_function`.

Each with its strongest honest setting: Powertools with its cache on and Redis without persistence, which
is faster than a Redis that keeps what it acknowledged; idemp on a store that does.  Beside them what threads
can reach at all where a call waits for two appends to etcd: the same without idemp's decisions and memory.
And all again with every thread of this process on one core, the servers on all: no other thread runs Python
at the same time anyway, and threads that hand over to one another on one core need not wake another.
Last, ours with the tasks of an event loop instead of threads, for which Powertools has nothing.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click

from bench.stack import Stack, stack
from idemp import idempotent, open_store
from idemp.bars import bar
from idemp.ports import Applied, Claim, Op, Reply
from idemp.stores.etcd_client import Client, Created, Put, Value
from idemp.stores.group import GroupCommit
from tests.servers import Redis

THREADS = 32
MANY = 500
"""Tasks of an event loop, where a service has that many requests at a time."""
BARE = "two bare appends, etcd"
THEIRS = "powertools"

Call = Callable[[str], Any]
"""What it is called with is a new key, or always the same."""


class Cell(NamedTuple):
    """One figure.  ``over``: the cell that it is divided by.  run: calls a second, within so many seconds."""

    name: str
    over: str
    run: Callable[[float], float]


def measure(seconds: float, rounds: int) -> dict[str, Any]:
    """Alternating rounds of each; medians and their ratios."""
    with stack() as servers, Redis(options={"appendonly": "no"}) as redis:
        chosen = list(cells(servers, redis.port))
        rates: dict[str, list[float]] = {cell.name: [] for cell in chosen}
        with bar(rounds * len(chosen), "decorators", least=1) as step:
            for _ in range(rounds):
                for cell in chosen:
                    rates[cell.name].append(cell.run(seconds))
                    step(1)
    found = {}
    for name, over, _ in chosen:
        each = rates[name]
        ratio = statistics.median(a / b for a, b in zip(each, rates[over], strict=True))
        found[name] = {"median": statistics.median(each), "low": min(each), "high": max(each), "ratio": ratio}
        click.echo(f"{name:54} {found[name]['median']:9.0f}/s  {ratio:6.2f} x powertools")
    return {"threads": THREADS, "calls": found}


def cells(servers: Stack, redis: int) -> Iterator[Cell]:
    """Theirs and ours, in turn; ``redis``: the port of theirs."""
    subjects = {THEIRS: powertools(redis)}
    subjects |= {f"idemp, {store}": ours(servers, store) for store in ("etcd", "sqlite")}
    subjects[BARE] = bare(servers)
    for name, call in subjects.items():
        if name != BARE:
            yield Cell(f"duplicate, 1 thread: {name}", f"duplicate, 1 thread: {THEIRS}", partial(again, call))
        fresh = f"fresh, {THREADS} threads"
        yield Cell(f"{fresh}: {name}", f"{fresh}: {THEIRS}", partial(rate, call, THREADS))
        yield Cell(f"{fresh} on one core: {name}", f"{fresh} on one core: {THEIRS}", partial(held, call))
    for store in ("etcd", "sqlite"):
        for tasks in (THREADS, MANY):
            run = partial(rate_of_tasks, ours_async(servers, store), tasks)
            yield Cell(
                f"fresh, {tasks} tasks of a loop: idemp, {store}", f"fresh, {THREADS} threads: {THEIRS}", run
            )


def rate(call: Call, threads: int, seconds: float, keys: list[str] | None = None) -> float:
    """Calls a second of so many threads; with ``keys`` the same again and again, else a new one each."""
    counts = [0] * threads
    gate = threading.Barrier(threads + 1)
    end = [0.0]

    def work(number: int) -> None:
        gate.wait()
        while time.perf_counter() < end[0]:
            call(keys[0] if keys else uuid.uuid4().hex)
            counts[number] += 1

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    began = time.perf_counter()
    end[0] = began + seconds
    gate.wait()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - began)


def again(call: Call, seconds: float) -> float:
    """Calls a second of one thread with a key that is done."""
    call("warm")
    return rate(call, 1, seconds, ["warm"])


def held(call: Call, seconds: float) -> float:
    """`rate` with every thread of this process on one core."""
    with one_core():
        return rate(call, THREADS, seconds)


def rate_of_tasks(call: Call, tasks: int, seconds: float) -> float:
    """Calls a second of so many tasks of one event loop, a new key each."""
    count = 0

    async def work(end: float) -> None:
        nonlocal count
        while time.perf_counter() < end:
            await call(uuid.uuid4().hex)
            count += 1

    async def all_of_them() -> None:
        await asyncio.gather(*[work(began + seconds) for _ in range(tasks)])

    began = time.perf_counter()
    asyncio.run(all_of_them())
    return count / (time.perf_counter() - began)


@contextmanager
def one_core() -> Iterator[None]:
    """Every thread of this process, and all that it starts, on its first core."""
    before = os.sched_getaffinity(0)
    hold({min(before)})
    try:
        yield
    finally:
        hold(before)


def hold(cores: set[int]) -> None:
    """Every thread of this process on ``cores``; one that ended meanwhile needs none."""
    for task in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), cores)


def ours(servers: Stack, name: str) -> Call:
    """A handler of ours."""
    store = open_store(servers.store(name))

    @idempotent(store, name="bench.place", key="order")
    def place(order: str) -> dict[str, str]:
        return {"order": order}

    return place


def ours_async(servers: Stack, name: str) -> Call:
    """The same as `async def`."""
    store = open_store(servers.store(name))

    @idempotent(store, name="bench.place", key="order")
    async def place(order: str) -> dict[str, str]:
        return {"order": order}

    asyncio.run(place("warm"))
    return place


def bare(servers: Stack) -> Call:
    """Two durable appends a call, shared by all threads like ours, and nothing else: the ceiling on etcd."""
    host, _, namespace = servers.store("etcd").removeprefix("etcd://").partition("/")
    client, root = Client([host]), f"/bare/{namespace}/"
    seq = 0

    def commit(ops: Sequence[Op]) -> list[Reply]:
        nonlocal seq
        text = "\n".join([op.key for op in ops]).encode()
        log, tail = Put(f"{root}log/{seq + 1}", text), Put(f"{root}tail", b"%d" % (seq + 1))
        mine = [Value(f"{root}tail", b"%d" % seq)] if seq else [Created(f"{root}tail", 0)]
        assert client.txn(mine, [log, tail]).succeeded
        seq += 1
        return [Applied()] * len(ops)

    group = GroupCommit(commit)

    def place(order: str) -> None:
        group.apply([Claim(order)])
        group.apply([Claim(order)])

    return place


def powertools(port: int) -> Call:
    """The same handler as theirs."""
    from aws_lambda_powertools.utilities.idempotency import IdempotencyConfig, idempotent_function
    from aws_lambda_powertools.utilities.idempotency.persistence.redis import RedisCachePersistenceLayer

    warnings.simplefilter("ignore")  # that no Lambda's time-out is known
    layer = RedisCachePersistenceLayer(host="127.0.0.1", port=port, ssl=False)
    config = IdempotencyConfig(use_local_cache=True, local_cache_max_items=1024)

    @idempotent_function(data_keyword_argument="order", config=config, persistence_store=layer)  # type: ignore[untyped-decorator]
    def place(order: str) -> dict[str, str]:
        return {"order": order}

    return lambda order: place(order=order)
