"""Group commit: the batches of many threads become one, committed by one of them for all.

The thread that finds nobody committing leads.  When its commit is over, it wakes those it
committed for, and hands the lead to the first of those who came meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from idemp.ports import Op, Reply

Commit = Callable[[Sequence[Op]], list[Reply]]


class _Slot:
    """One caller: its batch, what became of it, and a lock that is released to wake it.

    ``alone``: it wants the lead itself, and no batch.
    """

    __slots__ = ("alone", "error", "ops", "replies", "sleeping")

    def __init__(self, ops: Sequence[Op], *, alone: bool = False) -> None:
        self.ops = ops
        self.alone = alone
        self.replies: list[Reply] | None = None
        self.error: BaseException | None = None
        self.sleeping = threading.Lock()
        self.sleeping.acquire()


class GroupCommit:
    """Calls ``commit`` with everything that gathered while the previous commit was under way."""

    def __init__(self, commit: Commit) -> None:
        self._commit = commit
        self._lock = threading.Lock()
        self._led = False
        self._waiting: list[_Slot] = []

    def apply(self, ops: Sequence[Op]) -> list[Reply]:
        """The replies to ``ops``, after a commit that had them in it; raises what it raised."""
        slot = _Slot(ops)
        if self._leads(slot):
            self._lead()
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
        try:
            slot.sleeping.acquire()
        except BaseException:
            self._leave(slot)
            raise
        return slot.replies is None and slot.error is None

    def _leave(self, slot: _Slot) -> None:
        """An interrupted caller must not keep the lead that it was handed."""
        with self._lock:
            if slot not in self._waiting:
                return
            self._waiting.remove(slot)
            handed = slot.sleeping.acquire(blocking=False)
        if handed:
            self._hand_over()

    def _lead(self) -> None:
        with self._lock:
            slots = [slot for slot in self._waiting if not slot.alone]
            self._waiting = [slot for slot in self._waiting if slot.alone]
        try:
            replies = self._commit([op for slot in slots for op in slot.ops])
        except BaseException as error:
            for slot in slots:
                slot.error = error
        else:
            start = 0
            for slot in slots:
                slot.replies = replies[start : start + len(slot.ops)]
                start += len(slot.ops)
        self._hand_over()
        for slot in slots:
            slot.sleeping.release()

    def _hand_over(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting[0].sleeping.release()
            else:
                self._led = False
