"""What a fork leaves of a store, and of the threads that calls wait in: nothing hangs, nothing is doubled."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from idemp.errors import Closed
from idemp.metrics import StatsdMeter
from idemp.ports import Done, Op, Reply
from idemp.stores.door import SessionStore
from idemp.stores.group import GroupCommit

ROOT = Path(__file__).parents[1]
DONE = Done(1, None, None, 0.0, 1)


class Presence:
    """A session that does nothing and knows nobody."""

    retention = 60.0

    def __init__(self, made: list[Any]) -> None:
        self.group = GroupCommit(self._commit)
        made.append(self)

    def _commit(self, ops: Sequence[Op]) -> list[Reply]:
        return []

    def recall(self, key: str, since: float) -> Done:
        return DONE

    def close(self) -> None:
        raise AssertionError("it is the parent's")


def store_of(make: Callable[[], Presence]) -> SessionStore:
    return SessionStore(make, 60.0)  # type: ignore[arg-type]


def test_threads_that_come_first_after_a_fork_share_a_session() -> None:
    """Of two, one would be lost, and stay alive for ever."""
    made: list[list[Any]] = [[] for _ in range(200)]
    stores = [store_of(partial(Presence, each)) for each in made]
    for store in stores:
        store.apply([])
    child = os.fork()
    if child == 0:
        os._exit(_race(stores, made))
    assert os.waitpid(child, 0)[1] == 0
    assert [len(each) for each in made] == [1] * len(stores)


def test_what_is_remembered_opens_no_session() -> None:
    """To open one may take long, and who asks for what is remembered may be an event loop."""
    made: list[Any] = []
    store = store_of(partial(Presence, made))
    assert store.recall("a") is None
    assert made == []
    store.apply([])
    assert store.recall("a") is DONE
    store = store_of(partial(Presence, made))
    store.close()
    with pytest.raises(Closed):
        store.recall("a")


def _race(stores: Sequence[SessionStore], made: Sequence[Sequence[Any]]) -> int:
    sys.setswitchinterval(1e-6)
    for store in stores:
        together = threading.Barrier(4)

        def first(store: SessionStore = store, together: threading.Barrier = together) -> None:
            together.wait(20)
            store.apply([])

        threads = [threading.Thread(target=first) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    return max(map(len, made)) - 2


def test_a_store_that_only_the_parent_used_is_closed_there_alone() -> None:
    """The child's close leaves the parent's session."""
    made: list[Any] = []
    store = store_of(partial(Presence, made))
    store.apply([])
    child = os.fork()
    if child == 0:
        try:
            store.close()
        except AssertionError:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_fork_while_another_thread_opens_the_store() -> None:
    """What that thread holds is never let go in the child."""
    parent, opening, go_on = os.getpid(), threading.Event(), threading.Event()

    def make() -> Presence:
        if os.getpid() == parent:
            opening.set()
            assert go_on.wait(20)
        return Presence([])

    store = store_of(make)
    thread = threading.Thread(target=store.apply, args=([],))
    thread.start()
    assert opening.wait(20)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        store.apply([])
        os._exit(0)
    ended = os.waitpid(child, 0)[1]
    go_on.set()
    thread.join(20)
    assert ended == 0


def test_calls_that_wait_in_threads_go_on_after_a_fork(tmp_path: Path) -> None:
    """The parent's threads are not in the child: what is left of their pool would wait for them."""
    code = f"""
import asyncio, os, signal
from idemp import idempotent, open_store

async def both(number):
    store = open_store("sqlite:///{tmp_path}/seen.db")  # which is not open at the fork

    @idempotent(store, name="written", key="number", transaction=True)
    async def written(number):
        return number

    @idempotent(store, name="slow", key="number")
    async def slow(number):
        await asyncio.sleep(0.2)
        return number

    assert await written(number) == number
    assert await asyncio.gather(slow(number), slow(number)) == [number, number]
    store.close()

asyncio.run(both(1))
child = os.fork()
if child == 0:
    signal.alarm(20)
    asyncio.run(both(2))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "the child hangs"
asyncio.run(both(3))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_a_forked_child_counts_for_itself() -> None:
    """What the parent counted is sent once, by the parent; its thread is not in the child."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as statsd:
        statsd.bind(("127.0.0.1", 0))
        statsd.settimeout(20)
        meter = StatsdMeter(f"127.0.0.1:{statsd.getsockname()[1]}")
        meter.count("ours", 7)
        with meter._lock:  # as its thread might, just then
            child = os.fork()
        if child == 0:
            signal.alarm(20)
            meter.count("theirs", 3)
            meter.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        meter.close()
        assert sorted(statsd.recv(1000) for _ in range(2)) == [b"ours:7|c", b"theirs:3|c"]
