"""The decorator alone: calls a second of `@idempotent` and of AWS Powertools' `@idempotent_function`.

Each with its strongest honest setting: Powertools with its cache on and Redis without persistence, which
is faster than a Redis that keeps what it acknowledged; idemp on a store that does.  Beside them what threads
can reach at all where a call waits for two appends to etcd: the same without idemp's decisions and memory.
And all again with every thread of this process on one core, the servers on all: no other thread runs Python
at the same time anyway, and threads that hand over to one another on one core need not wake another.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from bench.stack import Stack, stack
from idemp import idempotent, open_store
from idemp.bars import bar
from idemp.ports import Applied, Claim, Op, Reply
from idemp.stores.etcd_client import Client, Created, Put, Value
from idemp.stores.group import GroupCommit
from tests.servers import Redis

THREADS = 32
BARE = "two bare appends, etcd"

Call = Callable[[str], Any]


def measure(seconds: float, rounds: int) -> dict[str, Any]:
    """Alternating rounds of each; medians and their ratios."""
    rates: dict[str, list[float]] = {}
    with (
        stack() as servers,
        Redis(options={"appendonly": "no"}) as redis,
        bar(rounds * (3 * 3 + 2), "decorators", least=1) as step,
    ):
        subjects = {
            "powertools": powertools(redis.port),
            "idemp, etcd": ours(servers, "etcd"),
            "idemp, sqlite": ours(servers, "sqlite"),
            BARE: bare(servers),
        }
        for _ in range(rounds):
            for name, call in subjects.items():
                call("warm")
                if name != BARE:
                    rates.setdefault(f"duplicate, 1 thread: {name}", []).append(
                        rate(call, 1, seconds, ["warm"])
                    )
                    step(1)
                rates.setdefault(f"fresh, {THREADS} threads: {name}", []).append(rate(call, THREADS, seconds))
                step(1)
                with one_core():
                    held = rate(call, THREADS, seconds)
                rates.setdefault(f"fresh, {THREADS} threads on one core: {name}", []).append(held)
                step(1)
    found = {}
    for name, each in rates.items():
        base = rates[name.split(":")[0] + ": powertools"]
        ratio = statistics.median(a / b for a, b in zip(each, base, strict=True))
        found[name] = {"median": statistics.median(each), "low": min(each), "high": max(each), "ratio": ratio}
        click.echo(f"{name:54} {found[name]['median']:9.0f}/s  {ratio:6.2f} x powertools")
    return {"threads": THREADS, "calls": found}


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
