"""The recorder: events go into a bounded buffer, and a thread takes them to the log.

Nobody who records waits or fails for it.  While the log is away the oldest events go when the buffer is
full; how many went is counted, told once the log is back, and logged.
"""

from __future__ import annotations

import itertools
import logging
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

from idemp.errors import Closed, Unavailable
from idemp.ports import Batch, Clock, Event, Events

log = logging.getLogger(__name__)

ROOM = 50_000
"""Events that wait at most."""
TOGETHER = 5_000
"""Events in a batch at most."""
EVERY = 0.2
"""Seconds between two batches."""
PATIENCE = (0.2, 5.0)
"""Seconds until the log is tried again: at first, and at most."""
FAREWELL = 5.0
"""Seconds that `close` waits for the log."""


class Recorder:
    """Takes events of ``service`` to ``target``: an `EventLog`, or any object with ``write(event)``.

    extra: called before each batch, for events that nobody told of.
    """

    def __init__(
        self,
        target: Any,
        service: str,
        *,
        room: int = ROOM,
        every: float = EVERY,
        extra: Callable[[], Iterable[Event]] = tuple,
        clock: Clock | None = None,
        writer: str = "",
    ) -> None:
        self._target, self._service, self._extra = target, service, extra
        self._room, self._every, self._clock = room, every, clock or Clock()
        self.writer = writer or uuid.uuid4().hex[:12]
        self._waiting: deque[Sequence[Event]] = deque()
        self._weight = 0
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._lost = 0  # dropped, and not told yet
        self.dropped = 0
        self.delivered = 0
        self._bell = threading.Event()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, events: Sequence[Event]) -> None:
        """Record ``events`` soon."""
        if self._ending.is_set():
            return
        with self._lock:
            self._waiting.append(events)
            self._weight += len(events)
            while self._weight > self._room and len(self._waiting) > 1:
                gone = len(self._waiting.popleft())
                self._weight -= gone
                self._drop(gone)
        if self._thread is None:
            self.start()
        if self._weight >= TOGETHER:
            self._bell.set()

    def write(self, event: Event) -> None:
        """`add` of one, so that a recorder is a logger for envelopes."""
        self.add([event])

    def start(self) -> None:
        """Let its thread run, which else begins with the first event; needed for ``extra`` alone."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="idemp-recorder", daemon=True)
                self._thread.start()

    def _drop(self, n: int) -> None:
        self.dropped += n
        self._lost += n

    def close(self) -> None:
        """Hand over what is left, waiting a few seconds for it; what stays behind counts as dropped."""
        self._ending.set()
        self._bell.set()
        if self._thread is not None:
            self._thread.join(FAREWELL + 1.0)
        with self._lock:
            self._drop(self._weight)
            self._weight = 0
            self._waiting.clear()
        if self.dropped:
            log.warning("%s: %d events were not recorded", self._service, self.dropped)

    # ---------------------------------------------------------------- its thread

    def _run(self) -> None:
        end: float | None = None
        while True:
            self._bell.wait(self._every)
            self._bell.clear()
            if self._ending.is_set() and end is None:
                end = self._clock.steady() + FAREWELL
            while events := self._next():
                if not self._deliver(events, end):
                    return
            if end is not None:
                return

    def _next(self) -> Events:
        """What is to go now."""
        events = Events()
        with self._lock:
            while self._waiting and len(events) < TOGETHER:
                events.extend(self._waiting.popleft())
            self._weight -= len(events)
            lost, self._lost = self._lost, 0
        try:
            events.extend(self._extra())
        except Exception:
            log.exception("%s: events could not be made", self._service)
        if lost:
            events.extend([Event("", "dropped", self._service, self._clock.wall(), attempt=lost)])
        return events

    def _deliver(self, events: Events, end: float | None) -> bool:
        """Whether to go on; what a broken log refuses is dropped, what an absent one misses waits."""
        number, wait = next(self._numbers), PATIENCE[0]
        left: deque[Sequence[Event]] = deque([events])
        if not hasattr(self._target, "append"):
            left = deque([each] for each in events)
        while left:
            try:
                self._hand_over(left, number)
            except (Unavailable, OSError) as error:
                if wait == PATIENCE[0]:
                    log.warning("%s: events wait for their log: %s", self._service, error)
                if self._ending.is_set() and end is None:
                    end = self._clock.steady() + FAREWELL
                if end is not None and self._clock.steady() + wait > end:
                    self._count_dropped(left)
                    return False
                self._pause(wait)
                wait = min(PATIENCE[1], wait * 2)
            except Closed:
                self._count_dropped(left)
                return False
            except Exception as error:
                log.error("%s: the event log refuses events: %r", self._service, error)
                self._count_dropped([left.popleft()])
        return True

    def _pause(self, seconds: float) -> None:
        """Until the log is tried again; the end does not cut it short twice."""
        if self._ending.is_set():
            self._clock.sleep(PATIENCE[0])
        else:
            self._ending.wait(seconds)

    def _hand_over(self, left: deque[Sequence[Event]], number: int) -> None:
        """A log gets all together, and who only writes one after the other."""
        while left:
            if hasattr(self._target, "append"):
                self._target.append(Batch(self.writer, number, left[0]))
            else:
                self._target.write(left[0][0])
            self.delivered += len(left.popleft())

    def _count_dropped(self, parts: Iterable[Sequence[Event]]) -> None:
        events = list(chain.from_iterable(parts))
        told = sum(each.attempt for each in events if each.kind == "dropped")
        with self._lock:
            self._lost += told  # these were counted before
            self._drop(sum(1 for each in events if each.kind != "dropped"))
