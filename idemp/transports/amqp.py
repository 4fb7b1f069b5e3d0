"""What AMQP leaves to its clients, as pure decisions: which acknowledgement covers what, which
publication a confirm or a return means, and in which queue a delayed one waits.

No connection here: see rabbitmq.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from idemp.ports import Publication, Sent
from idemp.transports.topic import no_queue


class Outstanding:
    """The deliveries of one channel that are not acknowledged; tags grow."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        self._order: deque[int] = deque()  # of delivery; those settled singly stay in it for a while

    def add(self, tags: Iterable[int]) -> None:
        """They were delivered."""
        tags = list(tags)
        self._open.update(tags)
        self._order.extend(tags)

    def settle(self, tags: Iterable[int]) -> tuple[int, list[int]]:
        """What to say to the broker: (all up to this one or, if 0, nothing; each of these).

        Tags that are not outstanding are ignored: an acknowledgement of one of them would make the
        broker close the channel.
        """
        settled = self._open.intersection(tags)
        self._open -= settled
        order, upto = self._order, 0
        while order and order[0] not in self._open:
            tag = order.popleft()
            if tag in settled:
                upto = tag
        # One handler that runs for hours must not make us remember everything that overtook it.
        if len(order) > 2 * len(self._open) + 1000:
            self._order = deque(tag for tag in order if tag in self._open)
        return upto, sorted(tag for tag in settled if tag > upto)


class Unconfirmed:
    """The publications of one channel that the broker has not answered for.

    It counts them from 1, as the broker does, and answers in our numbers.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[int, Publication]] = {}
        self._last = 0
        self._lowest = 1  # all below are answered
        self._unreturned = 1  # no return can mean one below: they come in order
        self._returned: set[int] = set()

    def add(self, number: int, publication: Publication) -> None:
        """It was sent, as it stands."""
        self._last += 1
        self._waiting[self._last] = number, publication

    def returned(self, exchange: str, routing_key: str, body: bytes) -> None:
        """The broker gave one back.  Its confirm is still to come, and only that names it."""
        for count in range(self._unreturned, self._last + 1):
            if count in self._waiting:
                publication = self._waiting[count][1]
                wire = publication.exchange, publication.routing_key, publication.body
                if wire == (exchange, routing_key, body):
                    self._returned.add(count)
                    self._unreturned = count + 1
                    return

    def answered(self, count: int, multiple: bool, *, refused: bool) -> Iterator[Sent]:
        """The broker's ack, or if ``refused`` nack, of one or of all up to it."""
        counts = range(self._lowest, count + 1) if multiple else (count,)
        if multiple:
            self._lowest = count + 1
        for each in counts:
            entry = self._waiting.pop(each, None)
            if entry is None:
                continue
            number, publication = entry
            if each in self._returned:
                self._returned.remove(each)
                yield _unroutable(number, publication)
            else:
                yield Sent(number, "the broker refused the message" if refused else "")

    def closed(self, reason: str) -> Iterator[Sent]:
        """The channel is gone: nothing more will be heard of any of them."""
        for number, publication in self._waiting.values():
            # The broker closes the channel over an exchange that does not exist.
            if publication.exchange and f"no exchange '{publication.exchange}'" in reason:
                yield _unroutable(number, publication)
            else:
                yield Sent(number, f"the broker did not confirm the message: {reason}")
        self._waiting.clear()


def _unroutable(number: int, publication: Publication) -> Sent:
    # A delayed one has lost its waiting queue; that is made again when it is sent again.
    lasting = not publication.delay
    return Sent(number, no_queue(publication.exchange, publication.routing_key), lasting)


def waiting_queue(queue: str, delay: float) -> str:
    """Where messages for ``queue`` wait for ``delay`` seconds.

    A queue lets go of expired messages at its head only, so a queue for each power of two: what is
    held up there by the message before it waits at most twice its delay.
    """
    bucket = 1
    while bucket < delay:
        bucket *= 2
    return f"{queue}.delay.{bucket}"
