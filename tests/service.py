"""Services and other programs of the checkout as processes, and what they count."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from idemp import Consumer, Message, open_transport
from idemp.cli.stage import Statsd
from idemp.message import Properties
from idemp.ports import Delivery, Publication
from idemp.transports import publish

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 30.0
"""Seconds; what is waited for takes about one."""


def environment(settings: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a program of the checkout is started with: nothing of ours but ``settings``."""
    ours = ("SERVICE_NAME", "ENABLE_", "IDEMP_")
    outside = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**outside, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **(settings or {})}


def finished(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Python with ``arguments``, run to its end; ``settings`` is its environment."""
    env = environment(options.pop("settings", None))
    command = [sys.executable, *arguments]
    options = {"capture_output": True, "encoding": "utf-8", "timeout": 60, "cwd": ROOT, **options}
    return subprocess.run(command, env=env, check=False, **options)


def until(holds: Callable[[], bool], what: Callable[[], object]) -> None:
    """Wait for it, or fail and show ``what`` was instead."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, what()
        time.sleep(0.02)


class Program:
    """A process and the file that has all it said."""

    def __init__(self, said: Path, arguments: Sequence[str], settings: Mapping[str, str]) -> None:
        self._said = said
        with said.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-u", *arguments],
                cwd=ROOT,
                env=environment(settings),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        """Everything so far."""
        return self._said.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        """Return when it has said ``text``."""

        def holds() -> bool:
            assert text in self.said() or self.process.poll() is None, self.said()
            return text in self.said()

        until(holds, self.said)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End it with a signal; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(PATIENCE)


@dataclass
class Stand:
    """A broker, a statsd, a folder: everything around the services of one test."""

    url: str
    folder: Path
    statsd: Statsd
    programs: list[Program] = field(default_factory=list)

    @property
    def store(self) -> str:
        """The URL of one store file."""
        return f"sqlite:///{self.folder}/seen.db"

    def run(self, *arguments: str, **settings: str) -> Program:
        """Start a program; it is ended with the test."""
        said = self.folder / f"said-{len(self.programs)}"
        self.programs.append(Program(said, arguments, settings))
        return self.programs[-1]

    def service(self, name: str, *arguments: str, **settings: str) -> Program:
        """A service that is ready.  ``arguments``: what to run instead of the sample service."""
        told = {"SERVICE_NAME": name, "IDEMP_TRANSPORT": self.url, "IDEMP_STATSD": self.statsd.address}
        program = self.run(*(arguments or ("-m", "svc")), **{**told, **settings})
        program.wait_for(f"{name}: ready")
        return program

    def publish(self, *events: Message | bytes, to: str = "", properties: Properties | None = None) -> None:
        """To the exchange ``events``, or straight ``to`` a queue."""
        exchange, key = ("", to) if to else ("events", "foo")
        publications = []
        for event in events:
            body = event if isinstance(event, bytes) else event.encode()
            about = properties or (Properties() if isinstance(event, bytes) else event.properties())
            publications.append(Publication(body, about, exchange, key))
        with closing(open_transport(self.url)) as transport:
            publish(transport, publications)

    def taken(self, queue: str, n: int) -> list[Delivery]:
        """The next ``n`` messages of ``queue``, which lose them."""
        found: list[Delivery] = []
        with closing(open_transport(self.url)) as transport:
            transport.consume(queue, n)
            until_then = time.monotonic() + PATIENCE
            while len(found) < n and time.monotonic() < until_then:
                found += [event for event in transport.poll(0.5) if isinstance(event, Delivery)]
            transport.ack([event.tag for event in found])
        return found

    def depth(self, queue: str) -> int:
        """Messages that wait in ``queue``."""
        with closing(open_transport(self.url)) as transport:
            return transport.depth(queue)

    def counted(self, **expected: int) -> None:
        """Wait until the counters are what they should be; `exactly` says that they stayed so."""
        until(lambda: self._differ(expected) == {}, lambda: self._differ(expected))

    def exactly(self, **expected: int) -> None:
        """Stop all services, which send their last counts, and compare."""
        for program in self.programs:
            assert program.stop() == 0, program.said()
        self.counted(**expected)
        time.sleep(0.1)
        assert self._differ(expected) == {}

    def _differ(self, expected: Mapping[str, int]) -> dict[str, tuple[int | None, int]]:
        seen = self.statsd.counts()
        return {name: (seen.get(name), n) for name, n in expected.items() if seen.get(name) != n}


@contextmanager
def stand(url: str, folder: Path) -> Iterator[Stand]:
    """A stand that is cleared away."""
    with closing(Statsd()) as statsd:
        built = Stand(url, folder, statsd)
        try:
            yield built
        finally:
            for program in built.programs:
                program.stop(signal.SIGKILL)


@contextmanager
def running(consumer: Consumer) -> Iterator[None]:
    """It runs in a thread meanwhile, and what it raises is raised at the end."""
    ready = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            consumer.run(ready=ready.set)
        except BaseException as error:
            errors.append(error)
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(20)
    try:
        yield
    finally:
        consumer.stop()
        thread.join(40)
        assert not thread.is_alive()
        if errors:
            raise errors[0]
