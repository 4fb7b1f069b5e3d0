"""The tracker: what a service's consumer and publishers tell, as events.

The consumer hands over a batch of outcomes at a time; a thread of the recorder takes their events to the log.
Short handlers cost one event, at their end; one that is still at it when the recorder comes by is told as
``started`` too, so that one which never ends is seen.
"""

from __future__ import annotations

import base64
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import msgspec
from msgspec.structs import replace

from idemp.causality import PARENT, REPLAY, SENT, TRACE, current
from idemp.errors import BadMessage
from idemp.message import Message, Properties, decode
from idemp.once import around
from idemp.ports import OUTCOMES, Clock, Event, Events, Meter, NoMeter, Publication
from idemp.tracking.recorder import ROOM, Recorder

log = logging.getLogger(__name__)

CONVERSATION = "x-conversation-id"
"""Header: the conversation, where the sender uses the correlation id for something else."""
LONG = 1.0
"""Seconds after which a handler that has not ended is told as started."""
MOST = 64 * 1024
"""Bytes of a body that is recorded."""
_USUAL = "application/json"
_LAST = 253_402_300_800
"""Seconds until the calendar ends, which headers of others need not know."""
_TRACE = re.compile(r"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class Tracker:
    """Makes events of what ``service`` sends and receives, and records them in ``target``.

    Who runs a handler says so in ``running``, by its thread: the flight, since when by `time.perf_counter`,
    and the attempt; then in the flight's ``ran``: since when by the wall clock, seconds, the attempt.
    target: an `EventLog`, or any object with ``write(event)``; it stays open.  queue: of the service.
    """

    def __init__(
        self,
        target: Any,
        service: str,
        *,
        queue: str = "",
        meter: Meter | None = None,
        clock: Clock | None = None,
        room: int = ROOM,
    ) -> None:
        self._service, self._queue = service, queue
        self._clock, self._meter = clock or Clock(), meter or NoMeter()
        self._payloads = bool(getattr(target, "payloads", True))
        business = getattr(target, "business", "")
        self._business = business.split(".") if business else []
        self.running: dict[int, tuple[Any, float, int]] = {}
        self._started: dict[int, Any] = {}
        self._told_dropped = 0
        self.recorder = Recorder(target, service, room=room, extra=self._started_since, clock=self._clock)
        if queue:
            self.recorder.start()  # for the handlers that have told nothing yet

    def close(self) -> None:
        """Record what is left."""
        self.recorder.close()
        self._count()

    def _count(self) -> None:
        if (dropped := self.recorder.dropped) > self._told_dropped:
            self._meter.count(f"{self._service}_events_dropped", dropped - self._told_dropped)
            self._told_dropped = dropped

    # ---------------------------------------------------------------- what the consumer tells

    def since(self) -> float:
        """Seconds to add to `time.perf_counter` for the time by the wall clock."""
        return float(self._clock.wall() - time.perf_counter())

    def ends(self) -> None:
        """This worker is at nothing now."""
        self.running.pop(threading.get_ident(), None)

    def told(self, lines: Sequence[tuple[str, Any, str]]) -> None:
        """A batch of outcomes: each with its flight, and why.

        Events are made at once: they are nothing to the garbage collector, and flights that waited for the
        recorder would be much.
        """
        wall = self._clock.wall()
        self._count()
        self._record(lambda: self._outcomes(lines, wall))

    def _outcomes(self, lines: Sequence[tuple[str, Any, str]], wall: float) -> Events:
        events = Events()
        for outcome, flight, why in lines:
            if outcome in OUTCOMES:
                events.fields += self._received(flight, outcome, wall, why)
        return events

    def _record(self, make: Callable[[], Sequence[Event]]) -> None:
        """What cannot be recorded is logged: nobody fails for it."""
        try:
            if events := make():
                self.recorder.add(events)
        except Exception:
            log.exception("%s: events could not be made", self._service)

    def _received(self, flight: Any, kind: str, wall: float, why: str = "") -> tuple[Any, ...]:
        """The fields of an event, in order."""
        delivery, message, ran = flight.delivery, flight.message, flight.ran
        properties = delivery.properties
        headers = properties.headers
        if message is None:
            identity, kind_of = properties.message_id or "", properties.type or ""
        else:
            identity, kind_of = message.id, message.type
        parent = replay = ""
        conversation, attempt, at, took = properties.correlation_id or identity, 0, wall, None
        sent_at: Any = properties.timestamp
        if headers:  # most have none, and each look costs
            parent, replay = _text(headers.get(PARENT)), _text(headers.get(REPLAY))
            conversation = _text(headers.get(CONVERSATION)) or conversation
            attempt = _number(headers.get("idemp-attempt"))
        if headers or type(sent_at) is not float:
            sent_at = _sent_at(properties)
        if ran is not None:
            at, took, attempt = ran
        body = stored = None
        if self._payloads and kind not in ("skipped", "started"):
            body = text_of(delivery.body)
            if body is not None:
                usual = not headers and _is_usual(properties, identity, kind_of, sent_at)
                packed = pack_usual if usual else partial(pack, properties)
                stored = packed(delivery.exchange, delivery.routing_key)
        return (
            identity,
            kind,
            self._service,
            at,
            "receiver",
            parent,
            conversation,
            properties.app_id or "",
            kind_of,
            self._queue,
            sent_at,
            took,
            attempt,
            why[:1000] if why else "",
            "" if flight.key.startswith("delivery ") else flight.key,
            replay,
            self._find_business(message.args) if self._business and message is not None else "",
            body,
            stored,
        )

    def _started_since(self) -> Iterable[Event]:
        """The handlers that have been at it for long, each once."""
        running = dict(self.running)
        since, old = self.since(), time.perf_counter() - LONG
        self._started = {
            thread: each for thread, each in self._started.items() if running.get(thread) is each
        }
        events = []
        for thread, (flight, began, attempt) in running.items():
            if thread not in self._started and began < old:
                self._started[thread] = running[thread]
                told = self._received(flight, "started", began + since)
                events.append(replace(Event(*told), attempt=attempt))
        return events

    def _find_business(self, args: Any) -> str:
        if not self._business:
            return ""
        for name in self._business:
            if not isinstance(args, Mapping):
                return ""
            args = args.get(name)
        return args if isinstance(args, str) else "" if args is None else str(args)

    # ---------------------------------------------------------------- what publishers tell

    def stamp(self, publications: Sequence[Publication]) -> list[Publication]:
        """See `idemp.causality.Tracks`.  What was stamped before stays as it is."""
        cause, now = around(), int(self._clock.wall() * 1000)
        try:
            return [
                each if SENT in each.properties.headers else self._stamped(each, cause, now)
                for each in publications
            ]
        except Exception:
            log.exception("%s: published without its parent", self._service)
            return list(publications)

    def _stamped(self, publication: Publication, cause: Message | None, now: int) -> Publication:
        properties = publication.properties
        identity = _identity(publication)
        headers: dict[str, Any] = {SENT: now}
        conversation = properties.correlation_id or identity
        trace = ""
        if cause is not None:
            conversation = _text(cause.headers.get(CONVERSATION)) or cause.correlation_id or cause.id
            headers[PARENT] = cause.id
            trace = _text(cause.headers.get(TRACE))
            if properties.correlation_id not in (None, conversation):
                headers[CONVERSATION] = conversation
        match = _TRACE.fullmatch(trace)
        headers[TRACE] = f"00-{match[1] if match else uuid.uuid4().hex}-{os.urandom(8).hex()}-01"
        return publication._replace(
            properties=replace(
                properties,
                message_id=properties.message_id or _fitting(identity),
                app_id=properties.app_id or _fitting(self._service),
                correlation_id=properties.correlation_id or _fitting(conversation),
                headers={**headers, **properties.headers},
            )
        )

    def sent(self, publications: Sequence[Publication]) -> None:
        """See `idemp.causality.Tracks`."""
        self._record(lambda: [self._sent(each) for each in publications])

    def relayed(self, publications: Sequence[Publication], at: float) -> None:
        """They waited in an outbox and went out ``at``: sent by the services that wrote them."""
        self._record(
            lambda: [
                replace(self._sent(each), service=each.properties.app_id or self._service, at=at)
                for each in publications
            ]
        )

    def _sent(self, publication: Publication) -> Event:
        properties = publication.properties
        headers = properties.headers
        message = _decoded(publication)
        identity = (properties.message_id or "") if message is None else message.id
        body = text_of(publication.body) if self._payloads else None
        at = _sent_at(properties)
        return Event(
            identity,
            "sent",
            self._service,
            self._clock.wall() if at is None else at,
            "sender",
            _text(headers.get(PARENT)),
            _text(headers.get(CONVERSATION)) or properties.correlation_id or identity,
            properties.app_id or self._service,
            (properties.type or "") if message is None else message.type,
            publication.routing_key if not publication.exchange else "",
            at,
            replay=_text(headers.get(REPLAY)),
            business=self._find_business(None if message is None else message.args),
            body=body,
            properties=None
            if body is None
            else pack(properties, publication.exchange, publication.routing_key),
        )

    def note(self, message: Message, text: str, *, hide_payload: bool = False) -> None:
        """See `idemp.causality.Tracks`."""
        self._record(lambda: [self._note(message, text, hide_payload)])

    def _note(self, message: Message, text: str, hide_payload: bool) -> Event:
        cause = around()
        body = None
        if self._payloads and not hide_payload:
            body = text_of(message.encode())
        role = "receiver" if cause is not None and cause.id == message.id else "sender"
        parent = _text(message.headers.get(PARENT)) or (
            "" if role == "receiver" or cause is None else cause.id
        )
        thread = message.correlation_id or (message.id if cause is None else cause.correlation_id or cause.id)
        return Event(
            message.id,
            "note",
            self._service,
            self._clock.wall(),
            role,
            parent,
            _text(message.headers.get(CONVERSATION)) or thread,
            type=message.type,
            why=text,
            business=self._find_business(message.args),
            body=body,
        )


@contextmanager
def tracking(target: Any, service: str, **options: Any) -> Iterator[Tracker]:
    """What is published inside, with `publish`, is recorded in ``target`` as sent by ``service``."""
    tracker = Tracker(target, service, **options)
    before = current.set(tracker)
    try:
        yield tracker
    finally:
        current.reset(before)
        tracker.close()


# ------------------------------------------------------------------ bodies and properties as text


def text_of(body: bytes) -> str | None:
    """A body as text; None if it is too long to be recorded."""
    if len(body) > MOST:
        return None
    try:
        text = body.decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text or text.startswith("base64:"):
        return f"base64:{base64.b64encode(body).decode()}"
    return text


def body_of(text: str) -> bytes:
    """The bytes that `text_of` was given."""
    return base64.b64decode(text[7:]) if text.startswith("base64:") else text.encode()


def pack(properties: Properties, exchange: str, routing_key: str) -> str:
    """Properties as JSON; a header that JSON has no word for is left out."""
    told = (
        properties.message_id,
        properties.type,
        properties.correlation_id,
        properties.app_id,
        properties.timestamp,
        properties.content_type,
        properties.headers,
        exchange,
        routing_key,
    )
    try:
        return _encode(told).decode()
    except (TypeError, ValueError, RecursionError):
        plain = {name: value for name, value in properties.headers.items() if _is_plain(name, value)}
        return _encode((*told[:6], plain, exchange, routing_key)).decode()


def _is_usual(properties: Properties, identity: str, kind: str, sent_at: float | None) -> bool:
    """Whether an event tells them all by itself."""
    return (
        properties.message_id == identity
        and properties.type == kind
        and properties.correlation_id is None
        and properties.app_id != ""
        and properties.timestamp == sent_at
        and properties.content_type == _USUAL
    )


@lru_cache(maxsize=64)
def pack_usual(exchange: str, routing_key: str) -> str:
    """What stands for properties that an event tells by itself; the same text for most messages."""
    return _encode((exchange, routing_key)).decode()


def unpack(event: Event) -> tuple[Properties, str, str]:
    """Properties, exchange and routing key of the message that ``event`` has properties of."""
    *told, exchange, routing_key = msgspec.json.decode(event.properties or "")
    if not told:
        told = [event.uuid, event.type, None, event.sender or None, event.sent_at, _USUAL]
    return Properties(*told), exchange, routing_key


_encode = msgspec.json.Encoder(enc_hook=lambda value: _unfit(value)).encode


def _unfit(value: Any) -> Any:
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _is_plain(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, str | int | float | bool)


# ------------------------------------------------------------------ what others wrote into headers


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, str) else ""


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _sent_at(properties: Properties) -> float | None:
    at = properties.headers.get(SENT)
    stamp: object = properties.timestamp
    if isinstance(at, int | float) and 0 <= at < _LAST * 1000:
        return at / 1000
    return float(stamp) if isinstance(stamp, int | float) and 0 <= stamp < _LAST else None


def _decoded(publication: Publication) -> Message | None:
    try:
        return decode(publication.body, publication.properties)
    except BadMessage:
        return None


def _identity(publication: Publication) -> str:
    message = _decoded(publication)
    return (publication.properties.message_id or "") if message is None else message.id


def _fitting(text: str) -> str | None:
    """What AMQP has room for."""
    return text if text and len(text.encode()) <= 255 else None
