"""A session on a server that tells of changes: who waits is woken, duplicates are answered from memory."""

from __future__ import annotations

import logging
import threading
from abc import abstractmethod
from collections.abc import Callable

from idemp.errors import Closed
from idemp.ports import Busy, Clock, Done, State
from idemp.stores.door import Confirmed
from idemp.stores.recall import Recall

log = logging.getLogger(__name__)

_POLL = (0.01, 0.25, 2.0)  # at first, at most, and at most while notifications come


class Listening(Confirmed):
    """What such sessions have in common.  kind: of the server, for the names of threads."""

    def __init__(self, kind: str, clock: Clock) -> None:
        self._kind, self._clock = kind, clock
        self._recall = Recall(clock)
        self._changed = threading.Condition()
        self._listens: bool | None = None  # None: nobody has asked or waited yet
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    @abstractmethod
    def _hear_once(self) -> bool:
        """Listen, until something may go unheard; false, after a word to the log, if it failed.

        ``_listens`` says whether what is told is heard; `_wake` who waits.
        """

    @abstractmethod
    def _peek(self, key: str) -> State:
        """What the server knows of the key now."""

    @abstractmethod
    def _await(self, key: str, token: int) -> None:
        """Leave word that the key is awaited, if it is busy with ``token``."""

    def recall(self, key: str, since: float) -> Done | None:
        """See `idemp.ports.Store`.  From the first time on this process listens."""
        if self._ended.is_set():
            raise Closed("this store was closed")
        if self._listens is None:
            self._listen()
        return self._recall.find(key)

    def wait(self, key: str, token: int, timeout: float) -> None:
        """See `idemp.ports.Store`.  It looks when it is told, and now and then."""
        deadline = self._clock.steady() + timeout
        pause, told = _POLL[0], False
        while True:
            state = self._peek(key)
            left = deadline - self._clock.steady()
            if left <= 0 or not (isinstance(state, Busy) and state.token == token):
                return
            if not told:
                self._await(key, token)
                self._listen()
                told = True
                continue
            with self._changed:
                self._changed.wait(min(left, pause))
            pause = min(pause * 2, _POLL[2] if self._listens else _POLL[1])

    def _listen(self) -> None:
        """Be told from now on, on a connection of its own."""
        with self._changed:
            if self._listens is None:
                self._listens = False
                try:
                    self._start("listen", self._hear)
                except RuntimeError:  # no thread is left: the next one asks again
                    self._listens = None
                    raise

    def _hear(self) -> None:
        """Listen, until the end: whatever fails, this process must not stay deaf."""
        while not self._ended.is_set():
            heard = False
            try:
                heard = self._hear_once()
            except Exception:
                log.exception("%s: not listening", self._kind)
            self._listens = False
            self._recall.lose()
            self._ended.wait(0.0 if heard else 1.0)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _start(self, name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=f"idemp-{self._kind}-{name}", daemon=True)
        thread.start()
        self._threads.append(thread)
