"""The auditor: takes reports from the broker, asks the judge, tells what has changed.

A report is acknowledged when what it changed is on disk.  A status goes to disk together with the
judgement that it comes from, and is sent from there, one at a time and in order, until the broker
confirms it; its message id stays the same.  A report that cannot be used goes to
``<consumer_queue>.dead`` with the reason, confirmed before it is acknowledged.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import tenacity
from msgspec.structs import replace

from idemp.audit.config import Config
from idemp.audit.judge import Judge, Row, Verdict
from idemp.audit.messages import Status, TallyReport, decoded
from idemp.errors import BadMessage, StoreUnavailable, TransportUnavailable, Unavailable
from idemp.message import Properties
from idemp.ports import Clock, Delivery, Publication, Sent, Transport

log = logging.getLogger(__name__)

PREFETCH = 256
POLL = 0.5
"""Seconds: the longest that the connection is left alone."""
FAREWELL = 5.0
"""Seconds that the broker gets at the end to confirm what is on its way."""
AHEAD = 300.0
"""Seconds that the clock of who reports may be ahead of ours."""
BEHIND = 7 * 86400.0
"""Seconds that a report may be old, having waited in the queue."""

Say = Callable[[Mapping[str, Any]], None]
Shown = tuple[str, str, str, Verdict]
"""Field, owner, replica, and the judgement."""


class Keeper(Protocol):
    """What the auditor knows, on disk: see `idemp.audit.state`."""

    def rows(self) -> list[tuple[str, str]]: ...

    def save(
        self,
        rows: Sequence[tuple[str, str | None]],
        reports: Sequence[bytes] = (),
        *,
        at: float = 0.0,
        counts: Mapping[str, int] | None = None,
        taken: Sequence[str] = (),
        tick: float | None = None,
    ) -> None: ...

    def known(self, ids: Sequence[str]) -> set[str]: ...

    def forget(self, names: Sequence[str]) -> None: ...

    def oldest(self) -> tuple[str, bytes, float] | None: ...

    def told(self, name: str) -> None: ...


def judge_of(config: Config, now: float) -> Judge:
    """A judge who knows nothing yet."""
    return Judge(
        config.fields,
        now,
        publish_unknown=config.publish_unknown,
        owner_reports=config.owner_reports,
        keep=config.keep,
    )


class Auditor:
    """Audits what ``config`` says.  say: told of each change, for a log.

    show: given all of it at each judgement, and when that was, in seconds since 1970.

    Of one state and one queue there must be one auditor: two would share the reports.
    """

    def __init__(
        self,
        transport: Transport,
        config: Config,
        state: Keeper,
        *,
        say: Say | None = None,
        show: Callable[[float, Sequence[Shown]], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._transport, self._config, self._state = transport, config, state
        self._say: Say = say or (lambda _: None)
        self._show = show or (lambda *_: None)
        self._clock = clock or Clock()
        self._services = config.services()
        self._stopping = threading.Event()
        self._judge = judge_of(config, self._clock.steady())
        self._seen: dict[tuple[str, str], Verdict] = {}
        self._letters: dict[int, tuple[int, Publication]] = {}
        self._refused: list[tuple[int, Publication]] = []
        self._telling: tuple[int, str] | None = None
        self._patience = 0.0  # before it nothing is told again
        self._warned = False

    def stop(self) -> None:
        """From any thread: finish what came, return from `run`."""
        self._stopping.set()
        self._transport.wake()

    def run(self, *, ready: Callable[[], None] | None = None) -> None:
        """Audit until `stop`, SIGTERM or SIGINT.

        ready: called once, when reports can arrive.  Raises `ConfigError`, `StoreUnavailable` or
        `TransportUnavailable` if it cannot start; losses of the broker and of the state are waited out.
        """
        self._remember()
        self._start()
        with _signals(self.stop):
            if ready is not None:
                ready()
            self._loop()

    def _remember(self) -> None:
        """Know what was kept, and nothing else."""
        judge = judge_of(self._config, self._clock.steady())
        unused = judge.restore([Row(*row) for row in self._state.rows()])
        if unused:
            log.warning("no longer audited, so forgotten: %s", ", ".join(unused))
            self._state.forget(unused)
        self._judge = judge
        self._seen = {(field.name, who): verdict for field, who, verdict in judge.verdicts()}

    # ---------------------------------------------------------------- the loop

    def _loop(self) -> None:
        due = self._clock.steady() + self._config.tick
        while not self._stopping.is_set():
            try:
                self._turn(max(0.0, min(POLL, due - self._clock.steady())))
                if self._clock.steady() >= due:
                    due = self._clock.steady() + self._config.tick
                    self._look()
                self._tell()
            except TransportUnavailable as error:
                log.warning("%s; connecting again", error)
                if not self._begin_again(self._start_anew):
                    return
                log.warning("the broker is back")
            except StoreUnavailable as error:
                # Nobody knows whether the last of it is kept: what is, is read; the rest comes again.
                log.warning("the state: %s; trying again", error)
                if not self._begin_again(self._remember, self._start_anew):
                    return
                log.warning("the state is back")
        with suppress(TransportUnavailable):  # what is not confirmed comes again, and is told again
            self._end()

    def _turn(self, wait: float) -> None:
        came = self._transport.poll(wait)
        for event in came:
            if isinstance(event, Sent):
                self._confirmed(event)
        if deliveries := [event for event in came if isinstance(event, Delivery)]:
            self._take(deliveries)

    def _end(self) -> None:
        """What came is done; what is on its way is waited for."""
        self._transport.cancel()
        until = self._clock.steady() + FAREWELL
        while (self._letters or self._telling) and self._clock.steady() < until:
            self._turn(POLL)
        self._transport.poll(0.0)  # the last acknowledgements go out

    def _declare(self) -> None:
        config = self._config
        self._transport.declare(f"{config.consumer_queue}.dead")
        self._transport.declare(
            config.consumer_queue, config.exchange, config.consumer_routing_key, kind="direct"
        )
        if config.report_queue:
            self._transport.declare(
                config.report_queue, config.exchange, config.report_routing_key, kind="direct"
            )

    def _start(self) -> None:
        self._declare()
        self._transport.consume(self._config.consumer_queue, PREFETCH, name=self._config.consumer_name)
        self._judge.listening(self._clock.steady())

    def _start_anew(self) -> None:
        self._transport.connect()
        self._start()

    def _begin_again(self, *steps: Callable[[], None]) -> bool:
        """Until all of ``steps`` are done (true), or the auditor is told to stop (false)."""
        self._letters, self._refused, self._telling, self._patience = {}, [], None, 0.0
        try:
            for attempt in tenacity.Retrying(
                retry=tenacity.retry_if_exception_type(Unavailable),
                wait=tenacity.wait_random_exponential(0.2, max=10),
                stop=tenacity.stop_when_event_set(self._stopping),
                sleep=tenacity.sleep_using_event(self._stopping),
                reraise=True,
            ):
                with attempt:
                    for step in steps:
                        step()
        except Unavailable:
            if not self._stopping.is_set():
                raise
            return False
        return True

    # ---------------------------------------------------------------- reports come

    def _take(self, deliveries: Sequence[Delivery]) -> None:
        """Into the windows, onto the disk, and only then acknowledged."""
        good, letters = [], []
        counts: Counter[str] = Counter()
        taken = self._state.known([id for each in deliveries if (id := each.properties.message_id)])
        for delivery in deliveries:
            if (name := delivery.properties.message_id) in taken:
                counts["repeated"] += 1
                good.append(delivery.tag)
                continue
            faults = self._read(delivery)
            if name and not faults:
                taken.add(name)
            counts["rejected" if faults else "reports"] += 1
            if faults:
                letters.append((delivery.tag, self._letter(delivery, "; ".join(faults))))
            else:
                good.append(delivery.tag)
        self._state.save(self._judge.changes(), counts=counts, taken=sorted(taken))
        self._transport.ack(good)
        self._bury(letters)

    def _read(self, delivery: Delivery) -> list[str]:
        """Why the report, or a part of it, cannot be used; what can be is."""
        wall = self._clock.wall()
        try:
            report = decoded(delivery.body)
            at = _at(delivery.properties.timestamp, wall)
        except BadMessage as error:
            return [str(error)]
        if report.service not in self._services:
            return [f"service {report.service!r} is in no field's settings"]
        log.debug("%s reports %s", report.service, delivery.body[:1000])
        now = self._clock.steady() - (wall - at)
        if isinstance(report, TallyReport):
            return _faults(self._judge.tally, report, now, at)
        faults = []
        for name, value in report.data.items():
            faults += _faults(self._judge.report, report.service, name, value, now, at)
        return faults

    def _letter(self, delivery: Delivery, reason: str) -> Publication:
        log.warning("rejected: %s", reason[:1000])
        headers = {
            **delivery.properties.headers,
            "idemp-outcome": "rejected",
            "idemp-reason": reason[:1000],
            "idemp-queue": self._config.consumer_queue,
            "idemp-exchange": delivery.exchange,
            "idemp-routing-key": delivery.routing_key,
        }
        properties = replace(delivery.properties, headers=headers)
        return Publication(delivery.body, properties, "", f"{self._config.consumer_queue}.dead")

    def _bury(self, letters: Sequence[tuple[int, Publication]]) -> None:
        numbers = self._transport.send([letter for _, letter in letters])
        self._letters.update(zip(numbers, letters, strict=True))

    def _confirmed(self, sent: Sent) -> None:
        if sent.number in self._letters:
            tag, letter = self._letters.pop(sent.number)
            if sent.error:
                log.warning("a dead letter is not safe yet: %s", sent.error)
                self._refused.append((tag, letter))
            else:
                self._transport.ack([tag])
        elif self._telling and self._telling[0] == sent.number:
            name = self._telling[1]
            self._telling = None
            if sent.error:
                self._hold_back(sent)
            else:
                self._warned = False
                self._state.told(name)

    def _hold_back(self, sent: Sent) -> None:
        self._patience = self._clock.steady() + self._config.tick
        if not self._warned:
            self._warned = True
            key = self._config.report_routing_key
            hint = f"; bind one with key {key!r}, or set report_queue" if sent.unroutable else ""
            log.warning("statuses wait: %s%s", sent.error, hint)

    # ---------------------------------------------------------------- what is told

    def _look(self) -> None:
        """Judge, and keep what is to be told with the judgement; the letters that were refused go again."""
        wall = self._clock.wall()
        told = self._judge.tick(self._clock.steady(), wall)
        bodies = [status.encode() for status in told]
        self._state.save(self._judge.changes(), bodies, at=wall, tick=self._config.tick)
        self._say_changes(told, wall)
        self._show(
            wall, [(each.name, each.owner, who, verdict) for each, who, verdict in self._judge.verdicts()]
        )
        if self._refused:
            refused, self._refused = self._refused, []
            self._declare()  # somebody may have deleted a queue of ours
            self._bury(refused)

    def _tell(self) -> None:
        """The oldest status that is not told yet, when the one before is safe."""
        if self._telling or self._clock.steady() < self._patience:
            return
        if (waiting := self._state.oldest()) is None:
            return
        name, body, at = waiting
        properties = Properties(
            message_id=name, app_id="idemp-audit", timestamp=at, content_type="application/json"
        )
        publication = Publication(body, properties, self._config.exchange, self._config.report_routing_key)
        [number] = self._transport.send([publication])
        self._telling = number, name

    def _say_changes(self, told: Sequence[Status], wall: float) -> None:
        for field, replica, verdict in self._judge.verdicts():
            before = self._seen.get((field.name, replica))
            if before is None or before.state is not verdict.state:
                why = f": {verdict.reason}" if verdict.reason else ""
                log.info("%s of %s is %s%s", field.name, replica, verdict.state, why)
                self._say(
                    {
                        "event": "state",
                        "at": wall,
                        "owner": field.owner,
                        **described(field.name, replica, verdict),
                    }
                )
            self._seen[field.name, replica] = verdict
        for status in told:
            log.info("%s: status %d", *status)
            self._say({"event": "status", "at": wall, **status._asdict()})


def _faults(take: Callable[..., None], *what: Any) -> list[str]:
    try:
        take(*what)
    except BadMessage as error:
        return [str(error)]
    return []


def described(name: str, replica: str, verdict: Verdict) -> dict[str, Any]:
    """A verdict for programs; values as text, which keeps every digit."""
    values = {"expected": verdict.expected, "actual": verdict.actual, "difference": verdict.difference}
    return {
        "field": name,
        "replica": replica,
        "state": str(verdict.state),
        "reason": verdict.reason,
        "since": verdict.since,
        "status": verdict.status,
        **{key: None if value is None else str(value) for key, value in values.items()},
    }


def _at(timestamp: float | None, wall: float) -> float:
    """When a report was made, never later than now.  Raises `BadMessage` for a clock that is far off."""
    if timestamp is None:
        return wall
    if not wall - BEHIND <= timestamp <= wall + AHEAD:
        ahead = timestamp - wall
        much = f"{abs(ahead) / 86400:.0f} d" if abs(ahead) > BEHIND else f"{abs(ahead):.0f} s"
        off = f"{much} ahead of" if ahead > 0 else f"{much} behind"
        raise BadMessage(f"the clock of who reports is {off} the auditor's: timestamp {timestamp:.0f}")
    return min(timestamp, wall)


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT stop.  Only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
