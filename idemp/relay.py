"""The relay: publishes what waits in an outbox, with confirms, and then takes it out.

A relay that is killed in between publishes the same ids again, which a receiver with a store skips.  Of one
key (one handled message) a letter goes out when the one before it is safe; keys do not wait for each other.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import tenacity

from idemp.errors import ConfigError, TransportUnavailable, Unavailable
from idemp.ports import Backlog, Clock, Delivery, Inbox, Letter, Meter, NoMeter, Transport
from idemp.tracking.tracker import Tracker

log = logging.getLogger(__name__)

TOGETHER = 500
"""Letters that are looked at together."""
CONFIRM = 30.0
"""Seconds that the broker has to confirm."""
LOOK = 0.1
"""Seconds between two looks at an outbox that was empty."""
REPORT = 1.0
"""Seconds between two looks at how much waits."""
WARN = 10.0
"""Seconds between two warnings that no queue takes a letter."""


class _Turn(NamedTuple):
    """What became of some letters: those that are safe, and those that no queue takes."""

    safe: list[Letter]
    refused: list[tuple[Letter, str]]


class Relay:
    """From the outbox of ``store`` to ``transport``, which must be nobody else's.

    Counts ``<service>_relayed`` and ``<service>_relay_refused``; times ``<service>_relay``, how long
    letters had waited when they were safe; tells the levels ``<service>_outbox_letters``, how many wait
    now, and ``<service>_outbox_age``, for how many seconds the oldest has.
    tracking: where ``sent`` events go, of the services that wrote the letters: an event log, or any object
    with ``write(event)``; it stays open.
    """

    def __init__(
        self,
        store: Inbox,
        transport: Transport,
        *,
        service: str = "relay",
        meter: Meter | None = None,
        clock: Clock | None = None,
        tracking: Any = None,
    ) -> None:
        if not callable(getattr(store, "letters", None)):
            raise ConfigError(
                f"{type(store).__name__} has no outbox; open one with sqlite:///app.db or postgresql://host/database"
            )
        self._store, self._transport, self._service = store, transport, service
        self._meter: Meter = meter or NoMeter()
        self._clock = clock or Clock()
        self._tracker = None
        if tracking is not None:
            self._tracker = Tracker(tracking, service, meter=self._meter, clock=self._clock)
        self._after, self._stuck = 0, set[str]()  # where a turn begins, and the keys that rest until the end
        self._stopping = threading.Event()
        self._reported = 0.0
        self._warned = -WARN

    def stop(self) -> None:
        """From any thread: let `run` return, behind what is under way."""
        self._stopping.set()

    def close(self) -> None:
        """Record what is left; `run` does so at its end."""
        if self._tracker is not None:
            self._tracker.close()

    def run(self) -> None:
        """Publish until `stop`; losses of the store and of the broker are waited out."""
        try:
            self._run()
        finally:
            self.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                sent = self._persistent()
            except Unavailable:
                return  # it was stopped meanwhile
            self._report()
            if not sent:
                self._stopping.wait(LOOK)

    def _persistent(self) -> int:
        for attempt in tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unavailable),
            wait=tenacity.wait_random_exponential(0.2, max=10),
            stop=tenacity.stop_when_event_set(self._stopping),
            sleep=tenacity.sleep_using_event(self._stopping),
            reraise=True,
        ):
            with attempt:
                if attempt.retry_state.attempt_number > 1:
                    self._transport.connect()
                return self.turn()
        return 0

    def turn(self) -> int:
        """Publish the oldest letters, one of each key; how many are safe.

        One that no queue takes stays, lets those of other keys pass, and is tried again when the end of the
        outbox is reached.  Raises `StoreUnavailable`, `TransportUnavailable`.
        """
        while True:
            letters = self._store.letters(TOGETHER, self._after)
            first: dict[str, Letter] = {}
            for letter in letters:
                if letter.key not in self._stuck:
                    first.setdefault(letter.key, letter)
            safe = self._relay(list(first.values())) if first else 0
            if len(letters) < TOGETHER:
                self._after, self._stuck = 0, set()
                return safe
            if safe:
                return safe
            self._after = letters[-1].number

    def _relay(self, letters: Sequence[Letter]) -> int:
        began = self._clock.wall()
        turn = self._publish(letters)
        if turn.safe:
            if self._tracker is not None:
                self._tracker.relayed([letter.publication for letter in turn.safe], began)
            self._store.sent([letter.number for letter in turn.safe])
        now = self._clock.wall()
        self._meter.count(f"{self._service}_relayed", len(turn.safe))
        for letter in turn.safe:
            self._meter.time(f"{self._service}_relay", max(0.0, now - letter.at))
        if turn.refused:
            self._stuck |= {letter.key for letter, _ in turn.refused}
            self._meter.count(f"{self._service}_relay_refused", len(turn.refused))
            self._warn(turn.refused)
        return len(turn.safe)

    def _warn(self, refused: Sequence[tuple[Letter, str]]) -> None:
        now = self._clock.steady()
        if now - self._warned >= WARN:
            self._warned = now
            letter, error = refused[0]
            log.warning("%d letters stay, like one of %s: %s", len(refused), letter.key, error)

    def _publish(self, letters: Sequence[Letter]) -> _Turn:
        numbers = self._transport.send([letter.publication for letter in letters])
        waiting = dict(zip(numbers, letters, strict=True))
        until = self._clock.steady() + CONFIRM
        turn = _Turn([], [])
        while waiting:
            left = until - self._clock.steady()
            if left <= 0:
                raise TransportUnavailable(f"{len(waiting)} letters were not confirmed within {CONFIRM:g} s")
            for event in self._transport.poll(left):
                if isinstance(event, Delivery):
                    raise ConfigError("a relay needs a transport of its own; this one is consuming")
                letter = waiting.pop(event.number, None)
                if letter is not None and event.error:
                    turn.refused.append((letter, event.error))
                elif letter is not None:
                    turn.safe.append(letter)
        return turn

    def backlog(self) -> Backlog:
        """How much waits."""
        return self._store.backlog()

    def _report(self) -> None:
        now = self._clock.steady()
        if now - self._reported >= REPORT:
            self._reported = now
            letters, age = self.backlog()
            self._meter.level(f"{self._service}_outbox_letters", letters)
            self._meter.level(f"{self._service}_outbox_age", age)
