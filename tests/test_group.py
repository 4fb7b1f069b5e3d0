"""Group commit: who is in a commit together, who leads, and what an interrupted caller leaves behind."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from idemp import idempotent, open_store
from idemp.errors import StoreUnavailable
from idemp.ports import Applied, Claim, Op, Reply
from idemp.stores.group import ALONE, GroupCommit, _Asleep


class Clock:
    """The real one, and ``ahead`` of it."""

    ahead = 0.0

    def __call__(self) -> float:
        return time.perf_counter() + self.ahead


class Commits:
    """What was committed; each takes ``seconds``, and waits where it is told to."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.sizes: list[int] = []
        self.seconds = seconds
        self.hold: Callable[[], object] = lambda: None

    def __call__(self, ops: Sequence[Op]) -> list[Reply]:
        self.sizes.append(len(ops))
        self.hold()
        threading.Event().wait(self.seconds)
        return [Applied()] * len(ops)


def test_callers_who_come_back_at_once_are_in_one_commit() -> None:
    """Six threads, one call after another: not two halves that wait for each other."""
    commits = Commits(0.1)
    group = GroupCommit(commits)

    def work(_: int) -> None:
        for _ in range(8):
            assert group.apply([Claim("a")]) == [Applied()]

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert sum(commits.sizes) == 48
    assert len(commits.sizes) <= 12, commits.sizes


def together(group: GroupCommit, commits: Commits) -> None:
    """One is under way while another comes: the group knows of two callers."""
    under_way, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        commits.hold = lambda: None
        under_way.set()
        assert go_on.wait(10)

    commits.hold = hold
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(group.apply, [Claim("a")])
        assert under_way.wait(10)
        second = pool.submit(group.apply, [Claim("b")])
        while not group._waiting:
            time.sleep(0.001)
        go_on.set()
        first.result(10)
        second.result(10)


def test_one_who_does_not_come_back_is_waited_for_ever_more_seldom() -> None:
    """One commit without a wait after the first in vain, then twice as many each time; ``ALONE`` at most."""
    without: list[int] = [0]

    def pause(lock: threading.Lock, seconds: float) -> bool:
        assert 0 < seconds < 10
        without.append(0)
        return False

    group = GroupCommit(Commits(), pause=pause)
    group.apply([Claim("a")])
    for _ in range(60):
        group._callers = 2
        group.apply([Claim("a")])
        without[-1] += 1
    assert without[1:6] == [2, 3, 5, 9, 17]  # with the one that waited
    assert max(without) == ALONE + 1


def test_who_was_waited_for_and_came_is_waited_for_again() -> None:
    """Those in vain before count no more."""
    commits = Commits()
    group = GroupCommit(commits, pause=lambda lock, seconds: False)
    for _ in range(20):
        group._callers = 2
        group.apply([Claim("a")])
    assert group._in_vain == ALONE

    def comes(lock: threading.Lock, seconds: float) -> bool:
        threading.Thread(target=group.apply, args=([Claim("late")],)).start()
        return lock.acquire(timeout=10)

    group._pause, group._callers, group._alone = comes, 2, 0
    group.apply([Claim("a")])
    assert commits.sizes[-1] == 2
    assert group._in_vain == 0


def test_a_single_caller_never_waits() -> None:
    def pause(lock: threading.Lock, seconds: float) -> bool:
        raise AssertionError("there is nobody to wait for")

    group = GroupCommit(Commits(), pause=pause)
    for _ in range(5):
        group.apply([Claim("a")])
    with group.paused():
        pass
    group.apply([Claim("a")])


def test_an_interrupted_leader_leaves_the_lead() -> None:
    """Ctrl-C while it waits for others: its batch is not committed, and the next caller is served."""
    answers: list[type[BaseException]] = []

    def pause(lock: threading.Lock, seconds: float) -> bool:
        if answers:
            raise answers.pop()
        return False

    commits = Commits(0.01)
    group = GroupCommit(commits, pause=pause)
    together(group, commits)
    before = len(commits.sizes)
    group._alone = 0
    group._callers = 2
    answers.append(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        group.apply([Claim("a"), Claim("b")])
    assert len(commits.sizes) == before
    served = threading.Thread(target=group.apply, args=([Claim("c")],), daemon=True)
    served.start()
    served.join(5)
    assert not served.is_alive()
    assert (len(commits.sizes), commits.sizes[-1]) == (before + 1, 1)


def test_the_last_one_may_come_while_time_runs_out() -> None:
    """Then the next leader waits no shorter for it."""
    commits = Commits(0.01)
    clock = Clock()

    def pause(lock: threading.Lock, seconds: float) -> bool:
        threading.Thread(target=group.apply, args=([Claim("late")],)).start()
        while len(group._waiting) < 2:
            time.sleep(0.001)
        clock.ahead += 60.0
        return False

    group = GroupCommit(commits, pause=pause, clock=clock)
    together(group, commits)
    group._callers, group._alone = 2, 0
    group.apply([Claim("a")])
    assert commits.sizes[-1] == 2
    assert not group._enough.acquire(blocking=False)
    assert group._alone == 0


def test_who_leads_waits_as_long_as_they_keep_coming() -> None:
    """One more in each moment: all three are in its commit; a moment without one is the last."""
    commits = Commits(0.01)

    def pause(lock: threading.Lock, seconds: float) -> bool:
        pauses.append(seconds)
        there = len(group._waiting)
        if there < 3:
            threading.Thread(target=group.apply, args=([Claim("late")],)).start()
            while len(group._waiting) == there:
                time.sleep(0.001)
        return False

    pauses: list[float] = []
    group = GroupCommit(commits, pause=pause, clock=lambda: 1.0)
    group._callers, group._took = 5, 1.0
    group.apply([Claim("a")])
    assert commits.sizes == [3]
    assert len(pauses) == 3


# ------------------------------------------------------------------ who wakes whom


class Together:
    """Threads whose calls are in one commit, under way until `go` is called; ``first`` is alone in the one
    before."""

    def __init__(self, names: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.sizes: list[int] = []
        self.replies: dict[str, list[Reply]] = {}
        self.errors: dict[str, BaseException] = {}
        self.outcome: Callable[[Sequence[Op]], list[Reply]] = lambda ops: [Applied()] * len(ops)
        self.after: Callable[[str], object] = lambda name: None
        self._held = [threading.Event() for _ in range(2)]
        self._under_way = threading.Event()
        self.group = GroupCommit(self._commit, clock=clock)
        self._threads = {name: self.start(name) for name in names[:1]}
        self.wait_for(lambda: len(self.sizes) == 1)
        for name in names[1:]:
            there = len(self.group._waiting)
            self._threads[name] = self.start(name)
            self.wait_for(lambda there=there: len(self.group._waiting) > there)  # type: ignore[misc]

    def start(self, name: str) -> threading.Thread:
        thread = threading.Thread(target=self._call, args=(name,), name=name, daemon=True)
        thread.start()
        return thread

    def _call(self, name: str) -> None:
        try:
            self.replies[name] = self.group.apply([Claim(name)])
        except BaseException as error:
            self.errors[name] = error
        self.after(name)

    def _commit(self, ops: Sequence[Op]) -> list[Reply]:
        self.sizes.append(len(ops))
        number = len(self.sizes) - 1
        if number < len(self._held):
            assert self._held[number].wait(10)
        return self.outcome(ops) if number == 1 else [Applied()] * len(ops)

    def begin(self) -> None:
        """The first is over, and the commit of all others under way."""
        self._held[0].set()
        self.wait_for(lambda: len(self.sizes) == 2)

    def go(self) -> None:
        """It is over too."""
        self._held[1].set()

    def end(self, *names: str) -> None:
        for name in names:
            self._threads[name].join(10)
            assert not self._threads[name].is_alive(), f"nobody woke {name}"

    @staticmethod
    def wait_for(ready: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not ready():
            assert time.monotonic() < end
            time.sleep(0.001)


Interrupt = Callable[[Callable[[], object]], None]


@pytest.fixture
def ctrl_c() -> Iterator[Interrupt]:
    """Interrupts the call that this thread makes next, once what is given here returns."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    main, threads = threading.get_ident(), list[threading.Thread]()

    def when(ready: Callable[[], object]) -> None:
        def run() -> None:
            ready()
            signal.pthread_kill(main, signal.SIGINT)

        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()

    yield when
    for thread in threads:
        thread.join(10)
    signal.signal(signal.SIGINT, before)


def test_one_who_is_awake_wakes_the_next_before_anything_else() -> None:
    """A handler that takes long holds nobody up, not even if it is the first that was woken."""
    calls = Together("abcdef")
    slow = threading.Event()
    calls.after = lambda name: slow.wait(10) if name == "c" else None
    calls.begin()
    calls.go()
    calls.end("a", "b", "d", "e", "f")
    slow.set()
    calls.end("c")
    assert calls.sizes == [1, 5]
    assert all(calls.replies[name] == [Applied()] for name in "abcdef")


def test_an_append_that_fails_wakes_everybody() -> None:
    """Each raises what the commit raised."""
    calls = Together("abcd")

    def fail(ops: Sequence[Op]) -> list[Reply]:
        raise StoreUnavailable("no server")

    calls.outcome = fail
    calls.begin()
    calls.go()
    calls.end("a", "b", "c", "d")
    assert sorted(calls.errors) == ["b", "c", "d"]
    assert {str(error) for error in calls.errors.values()} == {"no server"}


def test_ctrl_c_in_the_one_who_commits_is_its_own() -> None:
    """The others are told that nobody knows what became of it, and the next commit goes on."""
    calls = Together("abcd")

    def interrupted(ops: Sequence[Op]) -> list[Reply]:
        raise KeyboardInterrupt

    calls.outcome = interrupted
    calls.begin()
    calls.go()
    calls.end("a", "b", "c", "d")
    assert {name: type(error) for name, error in calls.errors.items()} == {
        "b": KeyboardInterrupt,
        "c": StoreUnavailable,
        "d": StoreUnavailable,
    }
    assert calls.group.apply([Claim("e")]) == [Applied()]


def test_ctrl_c_while_queued_leaves_the_others_their_commit(ctrl_c: Interrupt) -> None:
    calls = Together("abc")
    ctrl_c(lambda: calls.wait_for(lambda: len(calls.group._waiting) == 3))
    with pytest.raises(KeyboardInterrupt):
        calls.group.apply([Claim("mine")])
    calls.begin()
    calls.go()
    calls.end("a", "b", "c")
    assert calls.sizes == [1, 2]


def test_ctrl_c_while_the_commit_is_under_way_lets_nobody_sleep(ctrl_c: Interrupt) -> None:
    """It is passed over when those are woken who come after it."""
    calls = Together("ab")
    threads = []

    def begin() -> None:
        calls.wait_for(lambda: len(calls.group._waiting) == 2)
        threads.append(calls.start("c"))
        calls.wait_for(lambda: len(calls.group._waiting) == 3)
        calls.begin()

    ctrl_c(begin)
    with pytest.raises(KeyboardInterrupt):
        calls.group.apply([Claim("mine")])
    calls.go()
    calls.end("a", "b")
    threads[0].join(10)
    assert calls.replies["c"] == [Applied()]
    assert calls.sizes == [1, 3]


def test_ctrl_c_in_one_who_is_about_to_be_woken_wakes_the_others(ctrl_c: Interrupt) -> None:
    """The one before it was held up, with the clock in its hand, and wakes them no more."""
    held, go_on = threading.Event(), threading.Event()

    def clock() -> float:
        if threading.current_thread().name == "c" and not held.is_set():
            held.set()
            assert go_on.wait(10)
        return 1.0

    calls = Together("abc", clock)
    threads = []

    def begin() -> None:
        calls.wait_for(lambda: len(calls.group._waiting) == 3)
        threads.append(calls.start("d"))
        calls.wait_for(lambda: len(calls.group._waiting) == 4)
        calls.begin()
        calls.go()
        assert held.wait(10)

    ctrl_c(begin)
    with pytest.raises(KeyboardInterrupt):
        calls.group.apply([Claim("mine")])
    threads[0].join(10)
    assert calls.replies["d"] == [Applied()]
    go_on.set()
    calls.end("a", "b", "c")


def test_one_who_was_late_wakes_all_others() -> None:
    """A thread that computes holds the interpreter five milliseconds at a time: not once for each of them."""
    ahead = 0.0

    def clock() -> float:
        nonlocal ahead
        if threading.current_thread().name == "c":
            ahead = 1.0
        return 1.0 + ahead

    calls = Together("abcdef", clock)
    woken: list[int] = []
    wake = _Asleep.wake

    def noted(self: _Asleep, number: int) -> None:
        woken.append(number)
        wake(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Asleep, "wake", noted)
        calls.begin()
        calls.go()
        calls.end("a", "b", "c", "d", "e", "f")
    assert woken[:2] == [1, 3]


def test_a_handler_that_takes_long_delays_no_other_caller(tmp_path: Path) -> None:
    """Eight threads on a real store: seven of them call on and on while the eighth's handler runs."""
    store = open_store(f"sqlite:///{tmp_path}/seen.db")
    running, go_on = threading.Event(), threading.Event()

    @idempotent(store, name="place", key="order")
    def place(order: str) -> str:
        if order == "slow":
            running.set()
            assert go_on.wait(30)
        return order

    def work(number: int) -> None:
        for call in range(40):
            assert place(f"{number}-{call}") == f"{number}-{call}"

    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(work, number) for number in range(7)]
        slow = pool.submit(place, "slow")
        assert running.wait(30)
        try:
            for other in others:
                other.result(30)
            assert not slow.done()
        finally:
            go_on.set()
        assert slow.result(30) == "slow"
    store.close()
