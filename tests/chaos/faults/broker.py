"""What befalls the broker."""

from __future__ import annotations

import os
import signal

from tests.chaos.faults.kind import Fault, Kind, Witness
from tests.chaos.schedule import Span
from tests.chaos.stage import listener, stopped, until

_RAISE = (
    "vm_memory_monitor:set_vm_memory_high_watermark({watermark}), "
    "timer:sleep(1200), rabbit_alarm:get_alarms()."
)


class Restarted(Fault):
    """Stopped and started in good order."""

    def inject(self) -> None:
        self._before = listener(self.stage.broker.port)
        self.stage.broker.stop()

    def heal(self) -> None:
        self.stage.broker.start()

    def after(self) -> Witness:
        now = listener(self.stage.broker.port)
        return {"pid": [self._before, now]} if now != self._before else None


class Killed(Restarted):
    """kill -9, and a start on the same data."""

    def inject(self) -> None:
        self._before = listener(self.stage.broker.port)
        self.stage.broker.kill()


class Paused(Fault):
    """SIGSTOP for a while."""

    def inject(self) -> None:
        self._pid = listener(self.stage.broker.port)
        os.kill(self._pid, signal.SIGSTOP)

    def witness(self) -> Witness:
        return {"stopped": self._pid} if until(lambda: stopped(self._pid), 1) else None

    def heal(self) -> None:
        os.kill(self._pid, signal.SIGCONT)


class Alarmed(Fault):
    """Its memory counts as used up: whoever publishes is held up, consumers among them."""

    def inject(self) -> None:
        said = self.stage.rabbitmqctl("eval", _RAISE.format(watermark="0.00001"))
        self._said = said.stdout.strip()

    def witness(self) -> Witness:
        return {"alarms": self._said} if "memory" in self._said else None

    def heal(self) -> None:
        def off() -> bool:
            said = self.stage.rabbitmqctl("eval", _RAISE.format(watermark="0.9"))
            return said.returncode == 0 and "memory" not in said.stdout

        until(off, 30)


class ConnectionsClosed(Fault):
    """By its administrator; all that was out comes again."""

    def inject(self) -> None:
        self._before = self.stage.broker_door.counts.connections
        self._code = self.stage.rabbitmqctl("close_all_connections", "chaos").returncode

    def after(self) -> Witness:
        counts = self.stage.broker_door.counts
        again = until(lambda: counts.connections > self._before, 10)
        return {"connections": [self._before, counts.connections]} if again and not self._code else None


KINDS = {
    "broker.restart": Kind(Restarted, Span("broker", (0.5, 2.0), 5.0), quick=True),
    "broker.kill": Kind(Killed, Span("broker", (0.5, 2.0), 5.0), quick=True),
    "broker.pause": Kind(Paused, Span("broker", (1.0, 4.0)), quick=True),
    "broker.alarm": Kind(Alarmed, Span("broker", (1.0, 3.0), 5.0), needs=frozenset({"rabbitmqctl"})),
    "broker.close-all": Kind(
        ConnectionsClosed, Span("broker", (0.5, 1.0), 5.0), needs=frozenset({"rabbitmqctl"})
    ),
}
