"""One collector for many services: they publish batches of events, it keeps them in one event log.

A batch has a name for ever, and the log keeps each once; so a batch that is published twice, delivered twice,
or whose collector was killed before it acknowledged, is there once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec

from idemp.errors import BadMessage, ConfigError, TransportUnavailable
from idemp.message import Properties
from idemp.ports import Batch, Delivery, Edge, Event, EventLog, Publication, Query, Sent, Transport

QUEUE = "idemp.track"
"""Where batches wait for the collector."""
CONFIRM = 10.0
"""Seconds that the broker has to confirm."""
_TYPE = "idemp.events"
_NUMBERS = 1 << 31
"""Of batches that a log has room for: a writer who is quick needs years."""


class PublishingLog:
    """Sends batches to the collector; for who records, not for who looks.

    payloads: whether bodies are recorded.  business: where the business key stands; see `open_event_log`.
    """

    def __init__(self, transport: Transport, *, payloads: bool = True, business: str = "") -> None:
        self._transport = transport
        self.payloads, self.business = payloads, business
        self._lost = self._declared = False
        self._lock = threading.Lock()

    def append(self, batch: Batch) -> None:
        """Publish ``batch``, confirmed.  Raises `TransportUnavailable`: then it is to be sent again."""
        publication = Publication(pack(batch), _named(batch), "", QUEUE)
        with self._lock:
            if self._lost:
                self._transport.connect()
            self._lost = True  # unless all goes well
            self._publish(publication)
            self._lost = False

    def _publish(self, publication: Publication) -> None:
        if not self._declared:
            self._transport.declare(QUEUE)
            self._declared = True
        [number] = self._transport.send([publication])
        for _ in range(int(CONFIRM * 10)):
            for event in self._transport.poll(0.1):
                if isinstance(event, Sent) and event.number == number:
                    if event.error:
                        self._declared = False
                        raise TransportUnavailable(event.error)
                    return
        raise TransportUnavailable(f"events were not confirmed within {CONFIRM:g} s")

    def close(self) -> None:
        """Let go of the broker."""
        self._transport.close()

    def find(self, query: Query, *, limit: int, newest: bool = True) -> list[Event]:
        """`ConfigError`, like all that look."""
        raise _elsewhere()

    def story(self, uuid: str, *, limit: int) -> list[Event]:
        """See `find`."""
        raise _elsewhere()

    def edges(self, since: float | None = None, until: float | None = None) -> list[Edge]:
        """See `find`."""
        raise _elsewhere()

    def unanswered(self, service: str, type: str, since: float, until: float, *, limit: int) -> list[Event]:
        """See `find`."""
        raise _elsewhere()

    def prune(self, now: float) -> int:
        """See `find`."""
        raise _elsewhere()


def _elsewhere() -> ConfigError:
    return ConfigError("events that are published are looked up where the collector keeps them: idemp track")


def _named(batch: Batch) -> Properties:
    return Properties(f"{batch.writer}-{batch.number}", _TYPE, content_type="application/json")


def pack(batch: Batch) -> bytes:
    """A batch as JSON."""
    told = batch._replace(events=list(batch.events))
    try:
        return msgspec.json.encode(told)
    except UnicodeEncodeError:
        return msgspec.json.encode(_clean(msgspec.to_builtins(told)))


def _clean(value: object) -> object:
    """Without halves of characters, which JSON has no bytes for."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list | tuple):
        return [_clean(each) for each in value]
    return value


def unpack(body: bytes) -> Batch:
    """A batch from JSON.  Raises `BadMessage`."""
    try:
        batch = msgspec.json.decode(body, type=Batch)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(f"this is no batch of events: {error}") from None
    if not 0 <= batch.number < _NUMBERS:
        raise BadMessage(f"this is no batch of events: its number is {batch.number}")
    return batch


def collect(
    transport: Transport,
    log: EventLog,
    goes_on: Callable[[], bool],
    *,
    told: Callable[[int, str], None] = lambda n, why: None,
    prefetch: int = 50,
) -> int:
    """Keep what comes until ``goes_on`` says no; how many batches.

    told: called with the events of each batch, or with 0 and why it is set aside in ``idemp.track.dead``.
    A batch is acknowledged once it is kept.  Raises `StoreUnavailable`, `TransportUnavailable`: begin again.
    """
    transport.declare(QUEUE)
    transport.declare(f"{QUEUE}.dead")
    transport.consume(QUEUE, prefetch)
    kept = 0
    aside: dict[int, int] = {}
    while goes_on():
        for event in transport.poll(0.2):
            if isinstance(event, Sent):
                if (tag := aside.pop(event.number, None)) is not None and not event.error:
                    transport.ack([tag])
                continue
            kept += _keep(transport, log, event, aside, told)
    transport.poll(0.0)
    return kept


def _keep(
    transport: Transport,
    log: EventLog,
    delivery: Delivery,
    aside: dict[int, int],
    told: Callable[[int, str], None],
) -> int:
    try:
        batch = unpack(delivery.body)
    except BadMessage as error:
        [number] = transport.send([Publication(delivery.body, delivery.properties, "", f"{QUEUE}.dead")])
        aside[number] = delivery.tag
        told(0, str(error))
        return 0
    log.append(batch)
    transport.ack([delivery.tag])
    told(len(batch.events), "")
    return 1
