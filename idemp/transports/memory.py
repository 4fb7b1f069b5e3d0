"""A broker inside the process: for tests, demos, and handlers that publish to each other.

All transports with the same name in one process meet at the same broker.  It keeps every law of
a transport as long as the process lives; nothing reaches a disk or another process.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple

from idemp.errors import Closed, ConfigError, TransportUnavailable
from idemp.ports import Clock, Delivery, Publication, Sent
from idemp.transports.topic import matches, no_queue


class _Waiting(NamedTuple):
    """A message in a queue; ``order`` is its place, also when it comes back."""

    order: int
    publication: Publication
    redelivered: bool


class _Broker:
    """Queues and bindings.  Every method is called with ``changed`` held."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.queues: dict[str, list[_Waiting]] = {}  # heaps
        self.out: Counter[str] = Counter()
        self.bindings: dict[str, set[tuple[str, str]]] = {}
        self._delayed: list[tuple[float, _Waiting]] = []
        self._orders = count()

    def publish(self, publication: Publication, now: float) -> bool:
        """Put it into every queue that takes it; false if there is none."""
        waiting = _Waiting(next(self._orders), publication, False)
        _, _, exchange, key, delay = publication
        if exchange:
            bindings = self.bindings.get(exchange, ())
            queues = {queue for pattern, queue in bindings if matches(pattern, key)}
        else:
            queues = {key} & self.queues.keys()
        if delay and queues:
            heappush(self._delayed, (now + delay, waiting))
        else:
            for queue in queues:
                heappush(self.queues[queue], waiting)
        return bool(queues)

    def ripen(self, now: float) -> float | None:
        """Let in what was delayed long enough; seconds until the next one."""
        while self._delayed and self._delayed[0][0] <= now:
            waiting = heappop(self._delayed)[1]
            # Its place is behind what came during the delay, as in any broker.
            ripe = waiting._replace(order=next(self._orders))
            heappush(self.queues[waiting.publication.routing_key], ripe)
            self.changed.notify_all()
        return self._delayed[0][0] - now if self._delayed else None


_brokers: dict[str, _Broker] = {}
# A lock that another thread held during a fork stays locked in the child for ever: start anew.
os.register_at_fork(after_in_child=_brokers.clear)


class MemoryTransport:
    """One connection to the broker named ``name`` in this process."""

    def __init__(self, name: str, *, clock: Clock | None = None) -> None:
        self._name = name
        self._clock = clock or Clock()
        self._broker: _Broker | None = None
        self._pid = 0
        self._tags = count(1)
        self._numbers = count(1)
        self._closed = False
        self._woken = False
        self._forget()

    def _forget(self) -> None:
        self._out: dict[int, tuple[str, _Waiting]] = {}
        self._sent: list[Sent] = []
        self._queue = ""
        self._prefetch = 0

    def _open(self) -> _Broker:
        if self._closed:
            raise Closed
        if self._broker is None or self._pid != os.getpid():
            self._broker = _brokers.setdefault(self._name, _Broker())
            self._pid = os.getpid()
            self._forget()
        return self._broker

    def connect(self) -> None:
        """Connect anew: what was delivered and not acknowledged goes back to its place."""
        self._give_back(self._open())

    def _give_back(self, broker: _Broker) -> None:
        with broker.changed:
            for queue, waiting in self._out.values():
                broker.out[queue] -= 1
                heappush(broker.queues[queue], waiting._replace(redelivered=True))
            broker.changed.notify_all()
        self._forget()

    def declare(
        self,
        queue: str,
        exchange: str = "",
        binding: str = "#",
        *,
        kind: str = "topic",
        expires: float | None = None,
    ) -> None:
        """Make ``queue`` and bind it."""
        broker = self._open()
        with broker.changed:
            broker.queues.setdefault(queue, [])
            if exchange:
                broker.bindings.setdefault(exchange, set()).add((binding, queue))

    def consume(self, queue: str, prefetch: int, *, name: str = "") -> None:
        """Start deliveries from ``queue``; they end from the one before."""
        broker = self._open()
        with broker.changed:
            if queue not in broker.queues:
                raise TransportUnavailable(no_queue("", queue))
        self._queue, self._prefetch = queue, prefetch

    def cancel(self) -> None:
        """Stop new deliveries."""
        self._open()
        self._prefetch = 0

    def poll(self, timeout: float) -> list[Delivery | Sent]:
        """What came, waiting up to ``timeout`` seconds for the first."""
        broker = self._open()
        until = self._clock.steady() + timeout
        with broker.changed:
            while True:
                now = self._clock.steady()
                ripe_in = broker.ripen(now)
                events: list[Delivery | Sent] = [*self._sent, *self._take(broker)]
                left = until - now
                if events or self._woken or left <= 0:
                    self._sent = []
                    self._woken = False
                    return events
                broker.changed.wait(left if ripe_in is None else min(left, ripe_in))

    def _take(self, broker: _Broker) -> list[Delivery]:
        room = self._prefetch - len(self._out)
        if room <= 0:
            return []
        ready = broker.queues[self._queue]
        taken = []
        for _ in range(min(room, len(ready))):
            waiting = heappop(ready)
            tag = next(self._tags)
            self._out[tag] = self._queue, waiting
            broker.out[self._queue] += 1
            body, properties, exchange, key, _ = waiting.publication
            taken.append(Delivery(tag, body, properties, exchange, key, waiting.redelivered))
        return taken

    def ack(self, tags: Iterable[int]) -> None:
        """Acknowledge deliveries."""
        broker = self._open()
        with broker.changed:
            for tag in tags:
                if (delivered := self._out.pop(tag, None)) is not None:
                    broker.out[delivered[0]] -= 1

    def send(self, publications: Sequence[Publication]) -> list[int]:
        """Publish; each is in its queues at once."""
        broker = self._open()
        if any(each.delay and each.exchange for each in publications):
            raise ConfigError('a publication with a delay needs exchange ""')
        numbers = []
        with broker.changed:
            for each in publications:
                numbers.append(next(self._numbers))
                taken = broker.publish(each, self._clock.steady())
                error = "" if taken else no_queue(each.exchange, each.routing_key)
                self._sent.append(Sent(numbers[-1], error, not taken))
            broker.changed.notify_all()
        return numbers

    def depth(self, queue: str) -> int:
        """Messages in ``queue`` that are ready for delivery."""
        broker = self._open()
        with broker.changed:
            broker.ripen(self._clock.steady())
            return len(broker.queues.get(queue, ()))

    def taken(self, queue: str) -> bool:
        """Whether messages of ``queue`` are out."""
        broker = self._open()
        with broker.changed:
            return broker.out[queue] > 0

    def wake(self) -> None:
        """From any thread: let `poll` return."""
        self._woken = True
        broker = self._broker
        if broker is not None:
            with broker.changed:
                broker.changed.notify_all()

    def close(self) -> None:
        """Let go; what was not acknowledged goes back to its place."""
        broker, self._broker = self._broker, None
        if broker is not None and self._pid == os.getpid():
            self._give_back(broker)
        self._closed = True
