"""Group commit: the batches of many threads become one, committed by one of them for all.

The thread that finds nobody committing leads.  When its commit is over, it hands the lead to the first of
those who came meanwhile, and wakes one of those it committed for; each that wakes wakes the next before
anything else.  Woken all at once they would queue for the interpreter's lock, and each switch costs more
the more of them do; so one waits for it while another runs.

Threads that do one call after another would fall into two halves that take turns, each waiting for
the other's commit.  So who leads waits for those who were just served, as long as they keep coming and
that pays: they come back at once, or they are not waited for again for a while, the longer the more often.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from idemp.errors import StoreUnavailable
from idemp.ports import Op, Reply

Commit = Callable[[Sequence[Op]], list[Reply]]

MOMENT = 0.5
"""Of the time that a commit takes, that its leader waits for the next one to join it."""
LONGEST = 2.0
"""The same for all of them together."""
ALONE = 16
"""Commits that do not wait, after one that waited in vain once more; one after the first."""
LATE = 0.001
"""Seconds that a thread may take to wake the next; then the one it wakes wakes all the others."""


def _interrupted() -> StoreUnavailable:
    """What Ctrl-C in the one who commits is to the others."""
    return StoreUnavailable("the commit was interrupted: what became of it is not known")


class _Asleep:
    """Those of a commit that nobody has woken yet.  ``until``: when the next should be awake."""

    __slots__ = ("slots", "until")

    def __init__(self, slots: Sequence[_Slot], until: float) -> None:
        self.slots = deque(slots)
        self.until = until

    def wake(self, number: int) -> None:
        """So many of them, each once, whoever asks."""
        slots = self.slots
        for _ in range(number):
            try:
                slots.popleft().sleeping.release()
            except IndexError:
                return


class _Slot:
    """One caller: its batch, what became of it, and a lock that is released to wake it.

    alone: it wants the lead itself, and no batch.  left: it waits no more.
    served: the others of its commit, once that is over.
    """

    __slots__ = ("alone", "error", "left", "ops", "replies", "served", "sleeping")

    def __init__(self, ops: Sequence[Op], *, alone: bool = False) -> None:
        self.ops = ops
        self.alone = alone
        self.left = False
        self.replies: list[Reply] | None = None
        self.error: BaseException | None = None
        self.served: _Asleep | None = None
        self.sleeping = threading.Lock()
        self.sleeping.acquire()


class GroupCommit:
    """Calls ``commit`` with everything that gathered while the previous commit was under way.

    clock: seconds that never go back.  pause: waits so many seconds for a lock; whether it came free.
    """

    def __init__(
        self,
        commit: Commit,
        *,
        clock: Callable[[], float] = time.perf_counter,
        pause: Callable[[threading.Lock, float], bool] = lambda lock, seconds: lock.acquire(timeout=seconds),
    ) -> None:
        self._commit, self._clock, self._pause = commit, clock, pause
        self._lock = threading.Lock()
        self._led = False
        self._waiting: list[_Slot] = []
        self._took = 0.0  # the last commit, seconds
        self._callers = 0  # who was in it, and who came meanwhile
        self._alone = 0  # so many commits do not wait
        self._in_vain = 0  # how many that was the last time, and nobody was worth it since
        self._wanted = 0  # so many, for the leader to go on; 0 while it does not wait
        self._enough = threading.Lock()
        self._enough.acquire()

    def apply(self, ops: Sequence[Op]) -> list[Reply]:
        """The replies to ``ops``, after a commit that had them in it; raises what it raised."""
        slot = _Slot(ops)
        if self._leads(slot):
            self._gather(slot)
            self._lead(slot)
        if slot.replies is None:
            assert slot.error is not None
            raise slot.error
        return slot.replies

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No commit is under way inside."""
        slot = _Slot((), alone=True)
        self._leads(slot)
        with self._lock:
            self._waiting.remove(slot)
        try:
            yield
        finally:
            self._hand_over()

    def _leads(self, slot: _Slot) -> bool:
        """Queue up; return when the slot is served (false) or has the lead (true)."""
        with self._lock:
            self._waiting.append(slot)
            if not self._led:
                self._led = True
                return True
            if len(self._waiting) == self._wanted:
                self._wanted = 0
                self._enough.release()
        try:
            slot.sleeping.acquire()
            if slot.served is None:
                return True
            self._wake_next(slot.served)
        except BaseException:
            self._leave(slot)
            raise
        return False

    def _wake_next(self, asleep: _Asleep) -> None:
        """Or all of them, if it took long to come here: something else holds the interpreter."""
        if not asleep.slots:
            return
        now = self._clock()
        late, asleep.until = now > asleep.until, now + LATE
        asleep.wake(len(asleep.slots) if late else 1)

    def _leave(self, slot: _Slot) -> None:
        """An interrupted caller must keep neither the lead that it was handed, nor others asleep."""
        with self._lock:
            slot.left = True
            waiting = slot in self._waiting
            if waiting:
                self._waiting.remove(slot)
            handed = waiting and slot.sleeping.acquire(blocking=False)
        if handed:
            self._hand_over()
        if slot.served is not None:
            slot.served.wake(len(slot.served.slots))

    def _gather(self, mine: _Slot) -> None:
        """Wait a moment for those who were just served, if they used to come back at once."""
        with self._lock:
            before, wanted = len(self._waiting), self._callers
            if before >= wanted or self._alone:
                self._alone = max(0, self._alone - 1)
                return
            self._wanted = wanted
        try:
            if self._all_come(before):
                self._in_vain = 0
                return
        except BaseException:
            self._stop_waiting()
            with self._lock:
                self._waiting.remove(mine)
            self._hand_over()
            raise
        if self._stop_waiting() - before < (wanted - before) / 2:
            self._alone = self._in_vain = min(ALONE, 2 * self._in_vain or 1)

    def _all_come(self, there: int) -> bool:
        """Whether all came that are wanted, before a moment went by without one."""
        end = self._clock() + self._took * LONGEST
        while not self._pause(self._enough, self._took * MOMENT):
            before, there = there, len(self._waiting)
            if there == before or self._clock() >= end:
                return False
        return True

    def _stop_waiting(self) -> int:
        """How many are there."""
        with self._lock:
            if not self._wanted:  # the last came just now
                self._enough.acquire()
            self._wanted = 0
            return len(self._waiting)

    def _lead(self, mine: _Slot) -> None:
        began = self._clock()
        with self._lock:
            slots = [slot for slot in self._waiting if not slot.alone]
            self._waiting = [slot for slot in self._waiting if slot.alone]
        try:
            replies = self._commit([op for slot in slots for op in slot.ops])
        except BaseException as error:
            for slot in slots:
                slot.error = error if slot is mine or isinstance(error, Exception) else _interrupted()
        else:
            start = 0
            for slot in slots:
                slot.replies = replies[start : start + len(slot.ops)]
                start += len(slot.ops)
        ended = self._clock()
        self._took = ended - began
        with self._lock:
            self._callers = len(slots) + sum(not slot.alone for slot in self._waiting)
            served = _Asleep([slot for slot in slots if slot is not mine and not slot.left], ended + LATE)
            for slot in slots:
                slot.served = served
        self._hand_over()
        self._wake_next(served)

    def _hand_over(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting[0].sleeping.release()
            else:
                self._led = False
