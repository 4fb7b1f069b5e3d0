"""The store in memory: for tests and for one process that need not remember across restarts.

Its session lives as long as the process, so a claim is in doubt only when its holder says so.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from math import inf

from idemp.errors import Closed
from idemp.laws import CLAIMED, DONE, FREE, Entry, Ledger, view
from idemp.ports import Clock, Done, Op, Progress, Reply, State


def _session() -> str:
    """A forked child has a copy of the entries and is another session."""
    return f"process-{os.getpid()}"


class MemoryStore:
    """A dictionary under a lock.  ``retention``: seconds that done is remembered."""

    def __init__(self, *, retention: float, clock: Clock | None = None) -> None:
        self.retention = retention
        self._clock = clock or Clock()
        self._entries: dict[str, Entry] = {}
        self._token = 0
        self._changed = threading.Condition()
        self._swept = self._clock.wall()
        self._closed = False

    def apply(self, ops: Sequence[Op]) -> list[Reply]:
        """See `idemp.ports.Store`."""
        with self._changed:
            self._check_open()
            now = self._clock.wall()
            self._sweep(now)
            loaded = {op.key: entry for op in ops if (entry := self._live(op.key, now)) is not None}
            ledger = Ledger(loaded, self._alive, _session(), self._token, now)
            replies = [ledger.apply(op) for op in ops]
            self._token = ledger.token
            for key in ledger.changed:
                if key in loaded:
                    self._entries[key] = loaded[key]
                else:
                    self._entries.pop(key, None)
            if ledger.changed:
                self._changed.notify_all()
            return replies

    def recall(self, key: str, since: float = inf) -> Done | None:
        """See `idemp.ports.Store`."""
        with self._changed:
            self._check_open()
            entry = self._live(key, self._clock.wall())
            state = view(entry, self._alive)
            return state if type(state) is Done else None

    def wait(self, key: str, token: int, timeout: float) -> None:
        """See `idemp.ports.Store`."""
        with self._changed:
            self._check_open()
            self._changed.wait_for(lambda: not self._busy(key, token), timeout)

    def fresh(self, token: int = 0) -> bool:
        """Always: the session is this process."""
        self._check_open()
        return True

    def scan(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> list[tuple[str, State]]:
        """See `idemp.ports.Store`."""
        with self._changed:
            self._check_open()
            now = self._clock.wall()
            keys = sorted(key for key in self._entries if key.startswith(prefix) and key > after)
            live = ((key, self._live(key, now)) for key in keys)
            return [(key, view(entry, self._alive)) for key, entry in live if entry is not None][:limit]

    def progress(self) -> Progress | None:
        """See `idemp.ports.Store`.  It has nothing to read."""
        return None

    def size(self) -> int:
        """See `idemp.ports.Store`."""
        with self._changed:
            self._check_open()
            return len(self._entries)

    def close(self) -> None:
        """Forget everything."""
        with self._changed:
            self._closed = True
            self._entries.clear()
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("this store was closed")

    @staticmethod
    def _alive(session: str) -> bool:
        return session == _session()

    def _busy(self, key: str, token: int) -> bool:
        entry = self._entries.get(key)
        return (
            entry is not None
            and (entry.state, entry.token) == (CLAIMED, token)
            and self._alive(entry.session)
        )

    def _live(self, key: str, now: float) -> Entry | None:
        entry = self._entries.get(key)
        return None if entry is None or self._over(entry, now) else entry

    def _over(self, entry: Entry, now: float) -> bool:
        return entry.state in (DONE, FREE) and entry.at + self.retention <= now

    def _sweep(self, now: float) -> None:
        """Every tenth of the retention, drop what is over."""
        if now - self._swept < self.retention / 10:
            return
        self._swept = now
        self._entries = {key: entry for key, entry in self._entries.items() if not self._over(entry, now)}
