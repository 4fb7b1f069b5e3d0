"""The door of a store: its session is made at the first use, one for each process."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from math import inf
from typing import Protocol

from idemp.errors import Closed
from idemp.ports import Clock, Done, Op, Progress, Reply, State
from idemp.stores.group import GroupCommit


class Session(Protocol):
    """One process's presence in a store."""

    retention: float
    group: GroupCommit

    def recall(self, key: str, since: float) -> Done | None:
        """See `idemp.ports.Store`."""

    def wait(self, key: str, token: int, timeout: float) -> None:
        """See `idemp.ports.Store`."""

    def fresh(self, token: int = 0) -> bool:
        """See `idemp.ports.Store`."""
        ...

    def scan(self, prefix: str, after: str, limit: int) -> list[tuple[str, State]]:
        """See `idemp.ports.Store`."""
        ...

    def size(self) -> int:
        """See `idemp.ports.Store`."""
        ...

    def close(self) -> None:
        """End it."""


class Confirmed:
    """A session that its store confirms, now and then, by its own clock.

    _confirmed: when the last confirmation was asked for.  _born: the last token before the session.
    """

    _clock: Clock
    _ttl: float
    _confirmed: float
    _born: int

    def fresh(self, token: int = 0) -> bool:
        """Whether the session was confirmed less than 2/3 of its time to live ago, and made the claim."""
        if self._clock.steady() - self._confirmed >= self._ttl * 2 / 3:
            return False
        # In this order: a session that begins in between is confirmed after its birth is known.
        return not token or token > self._born


class SessionStore:
    """A store over sessions that ``make`` opens."""

    def __init__(self, make: Callable[[], Session], retention: float) -> None:
        self._make = make
        self._retention = retention
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._inherited: list[Session] = []
        self._closed = False
        _stores.add(self)

    @property
    def retention(self) -> float:
        """See `idemp.ports.Store`."""
        return self._session.retention if self._session else self._retention

    def apply(self, ops: Sequence[Op]) -> list[Reply]:
        """See `idemp.ports.Store`."""
        return self._mine().group.apply(ops)

    def recall(self, key: str, since: float = inf) -> Done | None:
        """See `idemp.ports.Store`.  Nothing before there is a session: to make one is to ask."""
        session = self._session
        if session is not None:
            return session.recall(key, since)
        if self._closed:
            raise Closed("this store was closed")
        return None

    def wait(self, key: str, token: int, timeout: float) -> None:
        """See `idemp.ports.Store`."""
        self._mine().wait(key, token, timeout)

    def fresh(self, token: int = 0) -> bool:
        """See `idemp.ports.Store`."""
        return self._mine().fresh(token)

    def scan(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> list[tuple[str, State]]:
        """See `idemp.ports.Store`."""
        return self._mine().scan(prefix, after, limit)

    def progress(self) -> Progress | None:
        """See `idemp.ports.Store`.  None: most sessions read nothing before they answer."""
        return None

    def size(self) -> int:
        """See `idemp.ports.Store`."""
        return self._mine().size()

    def close(self) -> None:
        """See `idemp.ports.Store`."""
        with self._lock:
            session, self._session, self._closed = self._session, None, True
        if session:
            session.close()

    def _mine(self) -> Session:
        """This process's session."""
        session = self._session
        if session is not None:
            return session
        with self._lock:
            if self._closed:
                raise Closed("this store was closed")
            if self._session is None:
                self._session = self._make()
            return self._session

    def _forked(self) -> None:
        """In the child, before anything else: what it inherits is kept, never used and never closed."""
        if self._session is not None:
            self._inherited.append(self._session)
        # The lock may be held by a thread that is not here.
        self._session, self._lock = None, threading.Lock()


_stores: weakref.WeakSet[SessionStore] = weakref.WeakSet()


def _forked() -> None:
    for store in list(_stores):
        store._forked()


os.register_at_fork(after_in_child=_forked)
