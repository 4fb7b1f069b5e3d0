"""The demo's story with real servers from end to end, and its picture for the README.

    python -m tests.picture

draws assets/graphite.png anew: what graphite-web makes of the four counters.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from uuid import uuid4

from idemp import Message, open_transport
from idemp.ports import Publication
from idemp.transports import publish
from tests.servers import Etcd, Graphite, RabbitMQ, Statsd
from tests.service import ROOT, Program, until

SERVICES = ("orders", "notify")
COUNTERS = [f"{name}_new_order_{outcome}" for name in SERVICES for outcome in ("ok", "skipped")]
PICTURE = ROOT / "assets" / "graphite.png"
_LOOK = {  # wide below narrow, where two counters go the same way
    "orders_new_order_ok": ("#0f6f64", 7),
    "notify_new_order_ok": ("#7bd88f", 2),
    "orders_new_order_skipped": ("#b45309", 7),
    "notify_new_order_skipped": ("#fcd34d", 2),
}


def order() -> Message:
    """An event that nobody has seen."""
    return Message(str(uuid4()), "new_order", {"cents": 4200})


class Story:
    """orders and notify; whatever is counted is read from Graphite."""

    def __init__(self, folder: Path, broker: str, etcd: str, statsd: str, graphite: Graphite) -> None:
        self._folder, self._broker, self._etcd, self._statsd = folder, broker, etcd, statsd
        self._graphite = graphite
        self._running: dict[str, Program] = {}
        self._started = 0
        self.began = int(time.time())
        self.counted: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))

    def tell(self) -> None:
        """From the first start to the last stop; each step until Graphite has its numbers."""
        self._start(*SERVICES)
        self._see()
        self._publish(order())
        self._see(orders_new_order_ok=1, notify_new_order_ok=1)

        # One is down, and catches up.
        self._stop("notify")
        self._publish(order())
        self._see(orders_new_order_ok=1)
        self._start("notify")
        self._see(notify_new_order_ok=1)

        # Without a store, one event five times is five: wrong.
        self._stop(*SERVICES)
        self._start(*SERVICES, store=False)
        self._publish(*[order()] * 5)
        self._see(orders_new_order_ok=5, notify_new_order_ok=5)

        # With one, it is one.
        self._stop(*SERVICES)
        self._start(*SERVICES)
        event = order()
        self._publish(event)
        self._see(orders_new_order_ok=1, notify_new_order_ok=1)
        self._publish(*[event] * 4)
        self._see(orders_new_order_skipped=4, notify_new_order_skipped=4)

        # Nor does a restart forget, in good order or not.
        self._stop("orders", how=signal.SIGKILL)
        self._stop("notify")
        self._start(*SERVICES)
        self._publish(event)
        self._see(orders_new_order_skipped=1, notify_new_order_skipped=1)
        self._stop(*SERVICES)

    def sums(self, since: str) -> dict[str, float]:
        """What Graphite has of the four counters."""
        found = self._graphite.points(f"stats_counts.{{{','.join(COUNTERS)}}}", since)
        return {name.removeprefix("stats_counts."): sum(points.values()) for name, points in found.items()}

    def close(self) -> None:
        """Whatever still runs, ends."""
        for program in self._running.values():
            program.stop(signal.SIGKILL)

    def _start(self, *names: str, store: bool = True) -> None:
        for name in names:
            settings = {
                "SERVICE_NAME": name,
                "IDEMP_TRANSPORT": self._broker,
                "IDEMP_STATSD": self._statsd,
                "IDEMP_STORE": f"{self._etcd}{name}",
                "ENABLE_ETCD": "true" if store else "",
            }
            self._started += 1
            self._running[name] = Program(self._folder / f"{self._started}", ["-m", "svc"], settings)
        for name in names:
            self._running[name].wait_for(f"{name}: ready")

    def _stop(self, *names: str, how: signal.Signals = signal.SIGTERM) -> None:
        for name in names:
            program = self._running.pop(name)
            code = program.stop(how)
            assert code == (0 if how is signal.SIGTERM else -how), program.said()

    def _publish(self, *events: Message) -> None:
        with closing(open_transport(self._broker)) as transport:
            publish(
                transport, [Publication(each.encode(), each.properties(), "events", "foo") for each in events]
            )

    def _see(self, **more: int) -> None:
        self.counted.update(more)
        until(lambda: self.sums("-10min") == self.counted, lambda: (self.sums("-10min"), self.counted))


def draw(graphite: Graphite, since: int, until: int) -> bytes:
    """The four counters as they grew, as a PNG."""
    targets = []
    for name, (color, width) in _LOOK.items():
        line = f"color(lineWidth(integral(stats_counts.{name}),{width}),'{color}')"
        targets.append(f"alias({line},'stats_counts.{name}')")
    look = {
        "width": 900,
        "height": 320,
        "bgcolor": "white",
        "fgcolor": "black",
        "fontSize": 11,
        "yMin": 0,
        "yMax": 10,
    }
    times = {"from": since, "until": until, "tz": "UTC", "xFormat": "%H:%M:%S"}
    return graphite.get("render", target=targets, format="png", lineMode="staircase", **look, **times)


@contextmanager
def stack(folder: Path, graphite: Graphite, statsd: Statsd) -> Iterator[Story]:
    """The story's other servers, for it alone: its queues have everybody's names."""
    with (
        RabbitMQ() as broker,
        Etcd() as etcd,
        closing(Story(folder, broker.url, etcd.url, statsd.address, graphite)) as story,
    ):
        yield story


def main() -> None:
    with ExitStack() as servers:
        folder = Path(servers.enter_context(tempfile.TemporaryDirectory(prefix="idemp-picture-")))
        graphite = servers.enter_context(Graphite())
        statsd = servers.enter_context(Statsd(graphite.carbon_port))
        story = servers.enter_context(stack(folder, graphite, statsd))
        story.tell()
        PICTURE.write_bytes(draw(graphite, story.began, int(time.time())))
    print(f"{PICTURE.relative_to(ROOT)}: {dict(story.counted)}")


if __name__ == "__main__":
    main()
