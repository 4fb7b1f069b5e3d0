"""The story: what happens to an event, two services and its duplicates, and what is counted.

The numbers arrive over UDP from the services; this program sends no metric itself.  How a story
looks is in demo.py, its processes are in stage.py.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

from idemp.cli.options import transport_at
from idemp.cli.stage import Service, ServiceFailed, Statsd
from idemp.message import Message
from idemp.ports import Publication
from idemp.transports import publish

SERVICES = ("orders", "notify")
TIMES = 5
PATIENCE = 15.0
"""Seconds that counters have to arrive."""
SETTLE = 1.2
"""Seconds in which nothing more may arrive; services send once a second."""


class Row(NamedTuple):
    """One number: what was done, what was counted.  ``seen`` is None if it never arrived."""

    did: str
    what: str
    expected: int
    seen: int | None

    @property
    def holds(self) -> bool:
        """Whether it is as it should be."""
        return self.seen == self.expected


class Chapter(NamedTuple):
    """A step of the story."""

    title: str
    rows: list[Row]


class Listener:
    """Hears the story as it happens, and says nothing."""

    def chapter(self, number: int, title: str) -> None:
        """A step begins."""

    def doing(self, what: str) -> None:
        """Something that takes a moment."""

    def row(self, row: Row) -> None:
        """A number."""


class Story:
    """Carries the steps out and keeps what was seen."""

    def __init__(self, broker: str, memory: str, listener: Listener) -> None:
        self._broker, self._memory, self._listener = broker, memory, listener
        self._statsd: Statsd
        self._services: dict[str, Service] = {}
        self.chapters: list[Chapter] = []
        self.failed = ""

    @property
    def rows(self) -> list[Row]:
        """All numbers."""
        return [row for chapter in self.chapters for row in chapter.rows]

    @property
    def holds(self) -> bool:
        """Whether the story went as it should."""
        return not self.failed and all(row.holds for row in self.rows)

    def tell(self) -> None:
        """From the first start to the last stop.  Raises `ServiceFailed`."""
        with ExitStack() as stack:
            self._statsd = stack.enter_context(closing(Statsd()))
            for name in SERVICES:
                self._services[name] = Service(name, self._broker, self._statsd.address)
                stack.callback(self._services[name].end)
            self._fan_out()
            self._catch_up()
            self._wrong()
            event = self._right()
            self._restart(event)

    def _fan_out(self) -> None:
        self._chapter("Every service gets every event")
        self._act("both start", lambda: self._start(*SERVICES), _both("ok", 0))
        self._act("an event", lambda: self._publish(_event()), _both("ok", 1))

    def _catch_up(self) -> None:
        orders, notify = (f"{name}_new_order_ok" for name in SERVICES)
        self._chapter("A service that was down catches up by itself")
        code = self._services["notify"].stop()
        self._row("notify stops", "notify's exit code", 0, code)
        self._act("an event", lambda: self._publish(_event()), {orders: 1, notify: 0})
        self._act("notify starts", lambda: self._start("notify"), {orders: 0, notify: 1})

    def _wrong(self) -> None:
        self._chapter(f"Without a store, one event sent {TIMES} times has {TIMES} effects: wrong")
        self._stop()
        self._start(*SERVICES, store=False)
        self._act(f"it, {TIMES} times", lambda: self._publish(*[_event()] * TIMES), _both("ok", TIMES))

    def _right(self) -> Message:
        event = _event()
        self._chapter("With a store it has one")
        self._stop()
        self._start(*SERVICES)
        self._act("an event", lambda: self._publish(event), _both("ok", 1))
        again = {**_both("ok", 0), **_both("skipped", TIMES - 1)}
        self._act(f"it, {TIMES - 1} times more", lambda: self._publish(*[event] * (TIMES - 1)), again)
        return event

    def _restart(self, event: Message) -> None:
        self._chapter("Started again, both still know it")
        self._stop()
        self._start(*SERVICES)
        self._act("the same event", lambda: self._publish(event), {**_both("ok", 0), **_both("skipped", 1)})

    # ---------------------------------------------------------------- what is done

    def _start(self, *names: str, store: bool = True) -> None:
        self._listener.doing(f"starting {' and '.join(names)}")
        for name in names:
            self._services[name].start(self._memory if store else None)
        for name in names:
            self._services[name].wait_ready()

    def _stop(self) -> None:
        self._listener.doing("stopping both")
        for service in self._services.values():
            if code := service.stop():
                raise ServiceFailed(f"{service.name} ended with exit code {code} at SIGTERM", service.last())

    def _publish(self, *events: Message) -> None:
        self._listener.doing("publishing")
        with transport_at(self._broker) as transport:
            properties = events[0].properties(app_id="idemp-demo")
            publish(transport, [Publication(event.encode(), properties, "events", "foo") for event in events])

    # ---------------------------------------------------------------- what is counted

    def _chapter(self, title: str) -> None:
        self.chapters.append(Chapter(title, []))
        self._listener.chapter(len(self.chapters), title)

    def _act(self, did: str, deed: Callable[[], None], expected: Mapping[str, int]) -> None:
        """Do it, wait for what should be counted, and a moment for what should not."""
        before = self._statsd.counts()
        deed()
        self._listener.doing("counting")

        def arrived(counts: Mapping[str, int]) -> bool:
            known = expected.keys() <= counts.keys()
            grown = {name: counts.get(name, 0) - before.get(name, 0) for name in expected}
            too_many = any(grown[name] > n for name, n in expected.items())
            return (known and all(grown[name] >= n for name, n in expected.items())) or too_many

        self._wait(arrived, PATIENCE)
        self._wait(lambda _: False, SETTLE)
        after = self._statsd.counts()
        for name, n in expected.items():
            self._row(did, name, n, after[name] - before.get(name, 0) if name in after else None)
            did = ""

    def _wait(self, until: Callable[[Mapping[str, int]], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._statsd.wait(until, min(left, 0.2)):
            for service in self._services.values():
                service.check()

    def _row(self, did: str, what: str, expected: int, seen: int | None) -> None:
        row = Row(did, what, expected, seen)
        self.chapters[-1].rows.append(row)
        self._listener.row(row)

    # ---------------------------------------------------------------- what came of it

    def record(self, took: float) -> dict[str, Any]:
        """The story for JSON."""
        steps = [
            {"title": title, "rows": [{**row._asdict(), "holds": row.holds} for row in rows]}
            for title, rows in self.chapters
        ]
        return {"holds": self.holds, "failed": self.failed, "seconds": round(took, 1), "steps": steps}


def _event() -> Message:
    return Message(f"demo-{uuid.uuid4()}", "new_order", {"cents": 4200})


def _both(outcome: str, n: int) -> dict[str, int]:
    return {f"{name}_new_order_{outcome}": n for name in SERVICES}
