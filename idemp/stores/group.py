"""Group commit: the batches of many threads become one, and whoever is free commits for all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from idemp.ports import Op, Reply

Commit = Callable[[Sequence[Op]], list[Reply]]


class _Slot:
    """One caller's batch and what became of it."""

    __slots__ = ("error", "ops", "replies")

    def __init__(self, ops: Sequence[Op]) -> None:
        self.ops = ops
        self.replies: list[Reply] | None = None
        self.error: BaseException | None = None


class GroupCommit:
    """Calls ``commit`` with everything that gathered while the previous commit was under way."""

    def __init__(self, commit: Commit) -> None:
        self._commit = commit
        self._gathering = threading.Lock()
        self._committing = threading.Lock()
        self._waiting: list[_Slot] = []

    def apply(self, ops: Sequence[Op]) -> list[Reply]:
        """The replies to ``ops``, after a commit that had them in it; raises what it raised."""
        slot = _Slot(ops)
        with self._gathering:
            self._waiting.append(slot)
        with self._committing:
            if slot.replies is None and slot.error is None:
                self._lead()
        if slot.replies is None:
            assert slot.error is not None
            raise slot.error
        return slot.replies

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No commit is under way inside."""
        with self._committing:
            yield

    def _lead(self) -> None:
        with self._gathering:
            slots, self._waiting = self._waiting, []
        try:
            replies = self._commit([op for slot in slots for op in slot.ops])
        except BaseException as error:
            for slot in slots:
                slot.error = error
            return
        start = 0
        for slot in slots:
            slot.replies = replies[start : start + len(slot.ops)]
            start += len(slot.ops)
