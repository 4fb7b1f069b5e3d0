"""Keeps the tally of a consumer, tells it to the auditor, and answers what it is asked.

    consumer = Consumer(transport, service="billing", audit=Tallier(Tallies("audit.db"), open_transport(url)))

Counting is in the consumer's thread, a transaction for each batch of handlers that returned.  All else
is in a thread of its own, with a connection of its own; whatever happens to it, messages are handled.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Protocol
from uuid import uuid4

from idemp.audit.messages import TallyReport
from idemp.audit.questions import PAGE, Answer, Question, asked_queue
from idemp.audit.tally import Tally
from idemp.errors import BadMessage, ConfigError, IdempError, StoreUnavailable
from idemp.message import Properties
from idemp.ports import Clock, Delivery, Publication, Ran, Sent, Transport

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that the broker has to confirm a report."""
FAREWELL = 5.0
"""Seconds for the last one."""
AGAIN = 2.0
"""Seconds between two tries to reach the broker."""
EXPIRES = 86400.0
"""Seconds after which nobody is asked who does not listen."""


class Told(Protocol):
    """See `idemp.audit.tallies.Changed`."""

    @property
    def number(self) -> int: ...
    @property
    def through(self) -> float: ...
    @property
    def first(self) -> bool: ...
    @property
    def untimed(self) -> int: ...
    @property
    def tallies(self) -> Mapping[str, Mapping[int, Tally]]: ...
    @property
    def versions(self) -> Sequence[tuple[int, str, int]]: ...


class Counted(Protocol):
    """What is counted, on disk: see tallies.py."""

    instance: str
    born: float
    length: int

    def add(self, runs: Sequence[Ran]) -> None: ...

    def changed(self, *, ending: bool = False) -> Told: ...

    def told(self, versions: Sequence[tuple[int, str, int]]) -> None: ...

    def buckets(self, kind: str) -> dict[int, Tally]: ...

    def slices(self, kind: str, start: int) -> dict[int, Tally]: ...

    def ids(
        self, kind: str, start: int, slices: Collection[int], after: str, limit: int
    ) -> tuple[list[tuple[str, int, int]], bool]: ...

    def forget(self, before: float) -> None: ...

    def close(self) -> None: ...


class Tallier:
    """See `idemp.ports.Tallier`.  The transport is its own.

    every: seconds between two reports.  keep: seconds that ids can be asked for.
    """

    def __init__(
        self,
        tallies: Counted,
        transport: Transport,
        *,
        exchange: str = "auditmq_exchange",
        routing_key: str = "auditmq",
        every: float = 10.0,
        keep: float = 86400.0,
        clock: Clock | None = None,
    ) -> None:
        if every <= 0 or keep <= 0:
            raise ConfigError(f"every={every:g}, keep={keep:g}: each must be more than 0 seconds")
        self._tallies, self._transport = tallies, transport
        self._exchange, self._routing_key = exchange, routing_key
        self._every, self._keep, self._clock = every, keep, clock or Clock()
        self._service = ""
        self._since = 0.0
        self._stopping = threading.Event()
        self._queue = asked_queue(exchange, tallies.instance)
        self._sent = 0
        self._error: str | None = None
        self._warned = ""
        self._thread = threading.Thread(target=self._tell, name="idemp-tallier", daemon=True)

    def start(self, service: str) -> None:
        """See `idemp.ports.Tallier`."""
        self._service = service
        self._thread.start()

    def ran(self, runs: Sequence[Ran]) -> None:
        """See `idemp.ports.Tallier`."""
        if runs:
            self._tallies.add(runs)

    def stop(self) -> None:
        """Tell the rest, in so far as the broker takes it within `FAREWELL`."""
        self._stopping.set()
        self._transport.wake()
        self._thread.join(2 * FAREWELL)
        if self._thread.is_alive():
            log.warning("%s: the broker does not answer; the next start tells what is counted", self._service)
            return
        self._transport.close()
        with suppress(StoreUnavailable):
            self._tallies.close()

    # ---------------------------------------------------------------- the thread

    def _tell(self) -> None:
        while not self._stopping.is_set():
            try:
                self._connected()
            except IdempError as error:
                self._warn(str(error))
            except Exception as error:  # nobody's normal outcome; what is counted is told all the same
                self._warn(f"{type(error).__name__}: {error}", where=error)
            self._stopping.wait(AGAIN)

    def _connected(self) -> None:
        """Until it is stopped or the connection is lost."""
        self._transport.connect()
        self._transport.declare(self._queue, expires=EXPIRES)
        self._transport.consume(self._queue, 1)
        self._since = self._clock.wall()
        due = self._clock.steady()
        while not self._stopping.is_set():
            if self._clock.steady() >= due:
                due = self._clock.steady() + self._every
                self._report(PATIENCE)
                self._tallies.forget(self._clock.wall() - self._keep)
            self._turn(max(0.0, due - self._clock.steady()))
        self._report(FAREWELL, ending=True)

    def _turn(self, wait: float) -> None:
        for event in self._transport.poll(wait):
            match event:
                case Sent(number, error) if number == self._sent:
                    self._error = error
                case Delivery():
                    self._answer(event)

    def _report(self, patience: float, *, ending: bool = False) -> None:
        """Tell what has changed; it is told again until the broker has confirmed it."""
        changed, tallies = self._tallies.changed(ending=ending), self._tallies
        report = TallyReport(
            self._service,
            tallies.instance,
            changed.number,
            tallies.born,
            self._since,
            tallies.length,
            changed.through,
            ending,
            changed.first,
            changed.untimed,
            changed.tallies,
        )
        error = self._safe(report.encode(), patience)
        if error:
            self._warn(error)
        else:
            self._warned = ""
            tallies.told(changed.versions)

    def _safe(self, body: bytes, patience: float) -> str:
        """Why a report is not in the auditor's queue; "" if it is."""
        publication = Publication(body, self._about(), self._exchange, self._routing_key)
        self._error = None
        [self._sent] = self._transport.send([publication])
        until = self._clock.steady() + patience
        while self._error is None and (left := until - self._clock.steady()) > 0:
            self._turn(left)
        return f"a report was not confirmed within {patience:g} s" if self._error is None else self._error

    def _about(self) -> Properties:
        return Properties(
            message_id=uuid4().hex,
            app_id=self._service,
            timestamp=self._clock.wall(),
            content_type="application/json",
        )

    def _warn(self, error: str, where: Exception | None = None) -> None:
        """Once for each trouble.  where: whose traceback is worth reading."""
        if error != self._warned:
            log.warning("%s: tallies wait: %s", self._service, error, exc_info=where)
        self._warned = error

    # ---------------------------------------------------------------- being asked

    def _answer(self, delivery: Delivery) -> None:
        """What has no answer is settled too, lest it come again, here or after a restart."""
        try:
            question = Question.decode(delivery.body)
            body = self._found(question).encode()
            self._transport.send([Publication(body, self._about(), "", question.reply_to)])
        except BadMessage as error:
            log.warning("%s: %s", self._service, error)
        except IdempError:
            raise  # the broker or the file is away
        except Exception:
            log.exception("%s: a question of an audit has no answer", self._service)
        self._transport.ack([delivery.tag])

    def _found(self, asked: Question) -> Answer:
        number, instance = asked.number, self._tallies.instance
        match asked.about:
            case "buckets":
                return Answer(number, instance, self._tallies.buckets(asked.kind))
            case "slices":
                return Answer(number, instance, self._tallies.slices(asked.kind, asked.start))
        ids, more = self._tallies.ids(asked.kind, asked.start, set(asked.slices), asked.after, PAGE)
        return Answer(number, instance, {}, ids, more)
