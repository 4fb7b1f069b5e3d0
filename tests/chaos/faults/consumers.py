"""What befalls consumers and the publisher as processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tests.chaos.faults.kind import Fault, Kind, Witness
from tests.chaos.ground import SESSION
from tests.chaos.schedule import Span
from tests.chaos.stage import stopped, until

_BUSY = """
import os, sys, time
parent, end = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
while time.monotonic() < end and os.getppid() == parent:  # it must not outlive who started it
    sum(range(200_000))
"""


class Killed(Fault):
    """kill -9."""

    def inject(self) -> None:
        pid = self.stage.replicas.pick(self.pick)
        self._status = self.stage.replicas.signal(pid, signal.SIGKILL)

    def witness(self) -> Witness:
        return {"exit": self._status} if self._status == -signal.SIGKILL else None


class AllKilled(Fault):
    """kill -9 for all at once."""

    def inject(self) -> None:
        self._pids = self.stage.replicas.pids()
        for pid in self._pids:
            if self.stage.replicas.status(pid) is None:
                os.kill(pid, signal.SIGKILL)

    def witness(self) -> Witness:
        replicas = self.stage.replicas
        ended = until(lambda: [pid for pid in self._pids if replicas.status(pid) is not None])
        return {"ended": ended} if ended else None


class Paused(Fault):
    """SIGSTOP for a while."""

    _pid = 0

    def inject(self) -> None:
        self._pid = self.stage.replicas.pick(self.pick)
        os.kill(self._pid, signal.SIGSTOP)

    def witness(self) -> Witness:
        return {"stopped": self._pid} if until(lambda: stopped(self._pid), 1) else None

    def heal(self) -> None:
        if self._pid and self.stage.replicas.status(self._pid) is None:
            os.kill(self._pid, signal.SIGCONT)


class PausedAtWork(Paused):
    """In a handler, while others hold duplicates of what it runs: two runs overlap, and one comes late."""

    def inject(self) -> None:
        self.stage.publisher.order("held", count=2, seconds=1.5)
        if not (found := until(self._at_work, 20)):
            raise RuntimeError("nobody is at work")
        self._pid = found
        os.kill(found, signal.SIGSTOP)

    def _at_work(self) -> int:
        """Who has begun such a message, and not come to its end."""
        for pid in self.stage.replicas.pids():
            history = self.stage.folder / f"consumer.{pid}.jsonl"
            lines = history.read_text().splitlines()[-50:] if history.exists() else []
            runs = [line for line in lines if '"f":"run"' in line]
            if runs and "/held/" in runs[-1] and '"type":"invoke"' in runs[-1]:
                return pid
        return 0


class Terminated(Fault):
    """SIGTERM: it finishes what runs, and another takes its place."""

    def inject(self) -> None:
        pid = self.stage.replicas.pick(self.pick)
        self._status = self.stage.replicas.signal(pid, signal.SIGTERM)

    def witness(self) -> Witness:
        return {"exit": self._status} if self._status is not None else None


class Starved(Fault):
    """Other processes take the processor."""

    def inject(self) -> None:
        count = 2 * (os.cpu_count() or 1)
        command = [sys.executable, "-I", "-S", "-c", _BUSY, str(os.getpid()), str(self.seconds + 10)]
        self._busy = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for _ in range(count)]

    def witness(self) -> Witness:
        used = [_ticks(process.pid) for process in self._busy]
        return {"ticks": used} if all(used) else None

    def heal(self) -> None:
        for process in self._busy:
            process.kill()
            process.wait()


def _ticks(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[11])


class PublisherKilled(Fault):
    """kill -9; the next one begins with other ids."""

    def inject(self) -> None:
        self._status = self.stage.publisher.kill()

    def witness(self) -> Witness:
        return {"exit": self._status} if self._status == -signal.SIGKILL else None

    def heal(self) -> None:
        self.stage.publisher.start()


class PublisherPaused(Fault):
    """SIGSTOP for a while."""

    def inject(self) -> None:
        self._pid = self.stage.publisher.pid
        os.kill(self._pid, signal.SIGSTOP)

    def witness(self) -> Witness:
        return {"stopped": self._pid} if until(lambda: stopped(self._pid), 1) else None

    def heal(self) -> None:
        os.kill(self._pid, signal.SIGCONT)


KINDS = {
    "consumer.kill": Kind(Killed, Span("consumers", (0.2, 1.0)), quick=True),
    "consumer.kill-all": Kind(AllKilled, Span("consumers", (0.2, 1.0)), quick=True),
    "consumer.pause-short": Kind(Paused, Span("consumers", (0.3 * SESSION, 0.7 * SESSION)), quick=True),
    "consumer.pause-long": Kind(Paused, Span("consumers", (2.0 * SESSION, 3.0 * SESSION)), quick=True),
    "consumer.pause-at-work": Kind(
        PausedAtWork, Span("consumers", (2.0 * SESSION, 3.0 * SESSION)), quick=True
    ),
    "consumer.terminate": Kind(Terminated, Span("consumers", (0.2, 1.0)), quick=True),
    "machine.starved": Kind(Starved, Span("machine", (3.0, 6.0))),
    "publisher.kill": Kind(PublisherKilled, Span("publisher", (0.2, 1.0)), quick=True),
    "publisher.pause": Kind(PublisherPaused, Span("publisher", (1.0, 3.0))),
}
