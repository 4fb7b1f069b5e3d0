"""Group commit: who is in a commit together, who leads, and what an interrupted caller leaves behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from idemp.ports import Applied, Claim, Op, Reply
from idemp.stores.group import ALONE, GroupCommit


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
        assert go_on.wait(20)

    commits.hold = hold
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(group.apply, [Claim("a")])
        assert under_way.wait(20)
        second = pool.submit(group.apply, [Claim("b")])
        while not group._waiting:
            time.sleep(0.001)
        go_on.set()
        first.result(20)
        second.result(20)


def test_one_who_does_not_come_back_is_not_waited_for_again() -> None:
    """After one moment in vain, many commits without one."""
    pauses: list[float] = []

    def pause(lock: threading.Lock, seconds: float) -> bool:
        pauses.append(seconds)
        return False

    commits = Commits(0.01)
    group = GroupCommit(commits, pause=pause)
    together(group, commits)
    pauses.clear()
    for _ in range(ALONE):
        group.apply([Claim("a")])
    assert len(pauses) <= 1
    assert all(0 < seconds < 10 for seconds in pauses)


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

    def pause(lock: threading.Lock, seconds: float) -> bool:
        threading.Thread(target=group.apply, args=([Claim("late")],)).start()
        while len(group._waiting) < 2:
            time.sleep(0.001)
        return False

    group = GroupCommit(commits, pause=pause)
    together(group, commits)
    group._callers, group._alone = 2, 0
    group.apply([Claim("a")])
    assert commits.sizes[-1] == 2
    assert not group._enough.acquire(blocking=False)
    assert group._alone == 0
