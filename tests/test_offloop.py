"""Calls from an event loop: those of all its tasks go to the store together, and off the loop."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from idemp import idempotent, open_store
from idemp.errors import KeyBusy, StoreUnavailable
from idemp.once import _Pools
from idemp.ports import Busy, Claim, Claimed, Complete, Done, Doubt, Free, Get, Op, Release, Reply, Store
from tests.pair import ROOT, until


class Noted:
    """A store, whose batches are noted; ``before`` and ``after`` are called around each, in its thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.batches: list[Sequence[Op]] = []
        self.before: Callable[[Sequence[Op]], None] = lambda ops: None
        self.after: Callable[[Sequence[Op]], None] = lambda ops: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def apply(self, ops: Sequence[Op]) -> list[Reply]:
        self.batches.append(ops)
        self.before(ops)
        replies = self._store.apply(ops)
        self.after(ops)
        return replies

    def fail(self, kind: type[Op]) -> None:
        """Each batch with such an operation in it."""

        def fail(ops: Sequence[Op]) -> None:
            if kind in map(type, ops):
                raise StoreUnavailable("it is away")

        self.before = fail


@pytest.fixture(params=["memory://", "sqlite:///{}/seen.db"])
def noted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Noted]:
    """Each embedded store."""
    store = open_store(request.param.format(tmp_path))
    store.apply([])
    yield Noted(store)
    store.close()


def state(noted: Noted, key: str) -> Reply:
    return noted._store.apply([Get(key)])[0]


def cancelled_while_claiming(noted: Noted, call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A task for it, in which it is cancelled after its claim was won and before it hears of that."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(call)

    def cancel(ops: Sequence[Op]) -> None:
        loop.call_soon_threadsafe(task.cancel)
        until(task.done)
        noted.after = lambda ops: None

    noted.after = cancel
    return task


def test_the_tasks_of_a_loop_go_together(noted: Noted) -> None:
    """Their claims are one batch and their completions another; what comes meanwhile is the next."""

    @idempotent(noted, name="n", key="k")
    async def handler(k: str) -> str:
        return k

    async def main() -> None:
        assert await asyncio.gather(*[handler(f"{number}") for number in range(100)]) == [
            f"{number}" for number in range(100)
        ]
        assert [len(batch) for batch in noted.batches] == [100, 100]
        noted.batches.clear()
        queued: list[int] = []
        noted.after = lambda ops: until(lambda: queued)  # so long the first is under way
        first = asyncio.create_task(handler("first"))
        await asyncio.to_thread(until, lambda: noted.batches)
        late = [asyncio.create_task(handler(f"late {number}")) for number in range(10)]
        await asyncio.sleep(0)  # each has asked
        queued.append(10)
        await asyncio.gather(first, *late)
        assert [len(batch) for batch in noted.batches] == [1, 11, 10]

    asyncio.run(main())


def test_loops_in_threads_share_a_store(noted: Noted) -> None:
    """Each gathers its own; one key runs once over all."""
    runs = []

    @idempotent(noted, name="n", key="k")
    async def handler(k: str) -> str:
        runs.append(k)
        await asyncio.sleep(0)
        return k

    async def main() -> None:
        for _ in range(5):
            await asyncio.gather(*[handler(f"{number}") for number in range(50)])

    threads = [threading.Thread(target=asyncio.run, args=(main(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(runs) == sorted(f"{number}" for number in range(50))


def test_a_failure_is_each_callers(noted: Noted) -> None:
    """And the next batch goes again."""

    @idempotent(noted, name="n", key="k")
    async def handler(k: str) -> str:
        return k

    async def main() -> None:
        noted.fail(Claim)
        found = await asyncio.gather(*[handler(f"{number}") for number in range(3)], return_exceptions=True)
        assert [type(each) for each in found] == [StoreUnavailable] * 3
        noted.before = lambda ops: None
        assert await handler("0") == "0"

    asyncio.run(main())


def test_a_completion_whose_answer_is_lost_stands(noted: Noted) -> None:
    """Its caller is told that it is not known; the next one gets the first answer."""
    runs = []

    @idempotent(noted, name="n", key="k")
    async def handler(k: str) -> str:
        runs.append(k)
        return k

    def lose(ops: Sequence[Op]) -> None:
        if Complete in map(type, ops):
            raise StoreUnavailable("it was applied, but who knows that")

    async def main() -> None:
        noted.after = lose
        found = await asyncio.gather(*[handler(f"{number}") for number in range(3)], return_exceptions=True)
        assert [type(each) for each in found] == [StoreUnavailable] * 3
        noted.after = lambda ops: None
        assert await asyncio.gather(*[handler(f"{number}") for number in range(3)]) == ["0", "1", "2"]

    asyncio.run(main())
    assert runs == ["0", "1", "2"]


@pytest.mark.parametrize("when", ["before it is sent", "under way"])
def test_what_is_done_is_completed_though_its_caller_is_cancelled(noted: Noted, when: str) -> None:
    """The effect has happened."""
    tasks: list[asyncio.Task[None]] = []

    @idempotent(noted, name="n", key="k")
    async def handler(k: str) -> None:
        if when == "before it is sent":
            asyncio.get_running_loop().call_soon(tasks[0].cancel)

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def cancel(ops: Sequence[Op]) -> None:
            if Complete in map(type, ops):
                loop.call_soon_threadsafe(tasks[0].cancel)
                until(tasks[0].done)

        noted.before = cancel
        tasks.append(asyncio.create_task(handler("a")))
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]

    asyncio.run(main())
    assert isinstance(state(noted, "n/a"), Done)


def test_what_waits_to_be_completed_is_when_its_loop_ends(noted: Noted) -> None:
    """Behind a batch that takes longer than the loop; what is not claimed yet is not claimed any more."""
    ran: list[str] = []
    tasks: list[asyncio.Task[None]] = []

    @idempotent(noted, name="n", key="k")
    async def handler(k: str) -> None:
        ran.append(k)
        if k == "done":
            await asyncio.to_thread(until, lambda: len(noted.batches) == 2)  # the other's claim is under way
            ran.append("over")

    async def main() -> None:
        tasks.append(asyncio.create_task(handler("done")))
        await asyncio.to_thread(until, lambda: ran)
        noted.after = lambda ops: until(lambda: all(task.done() for task in tasks))
        tasks.append(asyncio.create_task(handler("under way")))
        await asyncio.to_thread(until, lambda: len(noted.batches) == 2)
        tasks.append(asyncio.create_task(handler("waits")))
        await asyncio.to_thread(until, lambda: "over" in ran)  # and by the next turn it has asked

    asyncio.run(main())
    assert ran == ["done", "over"]
    assert isinstance(state(noted, "n/done"), Done)
    assert (state(noted, "n/under way"), state(noted, "n/waits")) == (Free(0), Free(0))
    asked = [op.key for batch in noted.batches for op in batch if type(op) is Claim]
    assert asked == ["n/done", "n/under way"]


def test_the_loop_goes_on_while_a_claim_is_given_back(noted: Noted) -> None:
    """However long that takes."""
    turns: list[str] = []

    @idempotent(noted, name="n", key="k")
    async def handler(k: str) -> None:
        raise AssertionError(k)

    async def main() -> None:
        noted.before = lambda ops: until(lambda: type(ops[0]) is Claim or turns)
        cancelled_while_claiming(noted, handler("a"))
        await asyncio.to_thread(until, lambda: len(noted.batches) == 2)
        turns.append("the loop's")

    asyncio.run(main())
    assert [type(op) for batch in noted.batches for op in batch] == [Claim, Release]
    assert state(noted, "n/a") == Free(0)


def test_a_claim_is_given_back_when_its_loop_ends(noted: Noted) -> None:
    """The one who asked for it was cancelled with the loop, before the answer came."""

    @idempotent(noted, name="n", key="k")
    async def handler(k: str) -> None:
        raise AssertionError(k)

    async def main() -> None:
        task = asyncio.create_task(handler("a"))
        noted.after = lambda ops: until(task.done)
        await asyncio.to_thread(until, lambda: noted.batches)

    asyncio.run(main())
    assert state(noted, "n/a") == Free(0)


def test_a_claim_that_cannot_be_given_back_is_named(noted: Noted, caplog: pytest.LogCaptureFixture) -> None:
    """It stays with this process until its session ends."""

    @idempotent(noted, name="n", key="k")
    async def handler(k: str) -> None:
        raise AssertionError(k)

    async def main() -> None:
        cancelled_while_claiming(noted, handler("a"))
        noted.fail(Release)
        await asyncio.to_thread(until, lambda: caplog.text)

    asyncio.run(main())
    assert "'n/a': it is away" in caplog.text


def test_a_completion_that_fails_after_its_caller_is_cancelled_is_named(
    noted: Noted, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody else would be told.  A claim is not named: who asked for it did nothing."""

    @idempotent(noted, name="n", key="k")
    async def handler(k: str) -> None:
        pass

    async def main() -> None:
        loop = asyncio.get_running_loop()

        for kind, key in ((Claim, "claimed"), (Complete, "completed")):
            task = asyncio.create_task(handler(key))

            def fail(ops: Sequence[Op], kind: type[Op] = kind, task: asyncio.Task[None] = task) -> None:
                if kind in map(type, ops):
                    loop.call_soon_threadsafe(task.cancel)
                    until(task.done)
                    raise StoreUnavailable("it is away")

            noted.before = fail
            with pytest.raises(asyncio.CancelledError):
                await task
        await asyncio.to_thread(until, lambda: caplog.text)

    asyncio.run(main())
    assert "'n/completed': it is away" in caplog.text
    assert "n/claimed" not in caplog.text


def test_who_stands_in_line_to_wait_looks_again(noted: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that took: the key may be done by then."""
    monkeypatch.setattr(
        sys.modules["idemp.once"], "_pools", _Pools(ThreadPoolExecutor(1), ThreadPoolExecutor(1))
    )
    [claim] = noted.apply([Claim("n/short")])
    noted.apply([Claim("n/long")])
    assert isinstance(claim, Claimed)

    async def handler(k: str) -> int:
        raise AssertionError(k)

    async def main() -> None:
        long = idempotent(noted, name="n", key="k", wait=0.6)(handler)("long")
        short = idempotent(noted, name="n", key="k", wait=0.2)(handler)("short")
        waits = [asyncio.create_task(long), asyncio.create_task(short)]
        await asyncio.to_thread(until, lambda: len(noted.batches) == 3)
        noted.apply([Complete("n/short", claim.token, b"7")])
        assert await waits[1] == 7
        with pytest.raises(KeyBusy):
            await waits[0]

    asyncio.run(main())


def test_a_loop_that_is_shut_down_takes_no_more(noted: Noted) -> None:
    """It says so to each who asks, every time."""

    @idempotent(noted, name="n", key="k")
    async def handler(k: str) -> None:
        raise AssertionError(k)

    async def main() -> None:
        await asyncio.get_running_loop().shutdown_default_executor()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="shut"):
                await handler("a")

    asyncio.run(main())
    assert noted.batches == []


KILLED = """
import asyncio, os, sys
from idemp import idempotent, open_store

store = open_store(sys.argv[1])
effects = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

@idempotent(store, name="n", key="k", in_doubt="park")
async def handler(k: str) -> None:
    os.write(effects, f"{k}\\n".encode())
    await asyncio.sleep(0)

async def main() -> None:
    for turn in range(1000):
        await asyncio.gather(*[handler(f"{turn}-{number}") for number in range(100)])

asyncio.run(main())
"""


@pytest.mark.parametrize("effects", [1, 150, 730])
def test_what_is_killed_is_once_or_named(tmp_path: Path, effects: int) -> None:
    """A hundred tasks at a time, and kill -9: no effect without its key done or in doubt, and none twice."""
    url, file = f"sqlite:///{tmp_path}/seen.db?session=1s", tmp_path / "effects"
    with subprocess.Popen([sys.executable, "-c", KILLED, url, str(file)], cwd=ROOT) as child:
        until(lambda: file.exists() and file.read_bytes().count(b"\n") >= effects)
        child.kill()
    happened = Counter(file.read_text().split())
    assert max(happened.values()) == 1
    with closing(open_store(url)) as store:

        def states() -> list[Reply]:
            return store.apply([Get(f"n/{key}") for key in happened])

        until(lambda: not any(type(state) is Busy for state in states()))
        assert {type(state) for state in states()} <= {Done, Doubt}
        done = {key for key, state in store.scan("n/", limit=100_000) if type(state) is Done}
        assert done <= {f"n/{key}" for key in happened}


KILLS_ITSELF = """
import asyncio, os, signal, sys
from idemp import idempotent, open_store

store = open_store(sys.argv[1])
effects = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
when, kind = sys.argv[3:]
apply = store.apply

def killed(ops):
    mine = kind in [type(op).__name__ for op in ops]
    if mine and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    replies = apply(ops)
    if mine:
        os.kill(os.getpid(), signal.SIGKILL)
    return replies

store.apply = killed

@idempotent(store, name="n", key="k", in_doubt="park")
async def handler(k: str) -> None:
    os.write(effects, b"x")

async def main() -> None:
    await asyncio.gather(*[handler(f"{number}") for number in range(20)])

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("when", "kind", "left", "happened"),
    [
        ("before", "Claim", Free, 0),
        ("after", "Claim", Doubt, 0),
        ("before", "Complete", Doubt, 20),
        ("after", "Complete", Done, 20),
    ],
)
def test_killed_at_a_batch(tmp_path: Path, when: str, kind: str, left: type[Reply], happened: int) -> None:
    """Right before it is applied, and right after, when nobody has heard of it."""
    url, file = f"sqlite:///{tmp_path}/seen.db?session=3s", tmp_path / "effects"
    command = [sys.executable, "-c", KILLS_ITSELF, url, str(file), when, kind]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert len(file.read_bytes()) == happened
    with closing(open_store(url)) as store:

        def states() -> list[Reply]:
            return store.apply([Get(f"n/{number}") for number in range(20)])

        until(lambda: not any(type(state) is Busy for state in states()))
        assert {type(state) for state in states()} == {left}
