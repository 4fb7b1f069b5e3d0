"""Two accounts instances, every entry twice, kill -9 all the time: the revenue is right to the cent.

The suite runs a share of it; `python -m tests.test_example2_storm 5000` all.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import redis as driver

from tests.pair import SECONDS, Service, login, revenue, until
from tests.servers import PostgreSQL, Redis

SHARE = 800
EVERY = 2.0
"""Seconds between two kills."""
GROUP = "accounts-queue"


class Storm:
    """Invoices come, twice each; instances are killed; what they had taken and not settled is counted."""

    def __init__(self, redis: str, database: str, folder: Path, stack: ExitStack, seed: int = 7) -> None:
        self.dice = random.Random(seed)
        self.client: Any = stack.enter_context(driver.Redis.from_url(redis))
        self.place = redis, folder
        self.instances = [
            stack.enter_context(closing(Service("accounts", redis, database, folder, IDLE="2s")))
            for _ in range(2)
        ]
        self.expected: Counter[int] = Counter()
        self.kills = self.interrupted = 0

    def add(self, kind: str, **payload: Any) -> None:
        """One event, as two entries of a writer that sent it twice under one id."""
        event = {"EventTypeName": kind, "Payload": json.dumps(payload), "Id": f"{kind}-{payload['id']}"}
        for _ in range(2):
            self.client.xadd("event-stream", event)

    def publish(self, invoices: int) -> None:
        """Customers of both accounts in the midst of their invoices."""
        events: list[tuple[str, dict[str, Any]]] = [
            ("CustomerCreated", {"id": str(n), "account_id": str(n % 2 + 1), "name": f"c{n}"})
            for n in range(20)
        ]
        for n in range(invoices):
            customer, cents = self.dice.randrange(20), self.dice.randrange(1, 10**9)
            self.expected[customer % 2 + 1] += cents
            payload = {"id": str(n), "customer_id": str(customer), "purchase_price_cents": cents}
            events.append(("InvoiceCreated", payload))
        self.dice.shuffle(events)
        for kind, payload in events:
            self.add(kind, **payload)

    def kill(self) -> None:
        """One of them, at a moment when it holds entries that it has taken and not settled."""
        victim = self.dice.choice(self.instances)
        assert victim.process is not None
        victim.process.send_signal(signal.SIGSTOP)  # so that what it holds does not change while we look
        held = self._held(victim)
        victim.kill()
        self.kills += 1
        self.interrupted += held
        victim.start(ready=False)

    def _held(self, victim: Service) -> int:
        assert victim.process is not None
        consumers = self.client.xinfo_consumers("event-stream", GROUP)
        mine = f"-{victim.process.pid}-".encode()
        return sum(each["pending"] for each in consumers if mine in each["name"])

    def settled(self) -> bool:
        """All was delivered, and nothing is out."""
        groups = [each for each in self.client.xinfo_groups("event-stream") if each["name"] == GROUP.encode()]
        return bool(groups) and groups[0]["lag"] == 0 and groups[0]["pending"] == 0

    def claimed(self) -> int:
        """Entries that an instance says it took over."""
        said = [file.read_text(errors="replace") for file in self.place[1].glob("accounts-*.log")]
        lines = [line for text in said for line in text.splitlines() if "took over" in line]
        return sum(int(line.partition("took over ")[2].split()[0]) for line in lines)

    def totals(self, service: Service) -> dict[int, int]:
        """Of both accounts, as their owners see them."""
        return revenue(service, login(service, "user1")) | revenue(service, login(service, "user2"))

    def run(self, invoices: int) -> None:
        """All of it, with the same end."""
        for instance in self.instances:
            instance.start(ready=False)
        for instance in self.instances:
            until(instance.ready, instance.said())
        self._signal(signal.SIGSTOP)  # so that all is there to be taken while they are killed
        self.publish(invoices)
        self._signal(signal.SIGCONT)
        end = time.monotonic() + SECONDS * 5
        while not self.settled() or self.kills < 4 or not self.interrupted:
            assert time.monotonic() < end
            if self.settled():
                invoices += 1
                self.add("InvoiceCreated", id=str(invoices), customer_id="1", purchase_price_cents=1)
                self.expected[2] += 1
            else:
                self.kill()
                until(lambda: self.settled() or self._somebody_holds(), "", SECONDS)
        until(lambda: self.settled(), "all is settled")
        for instance in self.instances:
            until(instance.ready, instance.said())
            assert self.totals(instance) == dict(self.expected)

    def _signal(self, number: int) -> None:
        for instance in self.instances:
            assert instance.process is not None
            instance.process.send_signal(number)

    def _somebody_holds(self) -> bool:
        """Time for work between two kills, and a moment in which there is something to interrupt."""
        end = time.monotonic() + EVERY
        while time.monotonic() < end and not self.settled():
            time.sleep(0.05)
        return True


def play(redis: str, postgresql: PostgreSQL, folder: Path, invoices: int) -> Storm:
    """The storm, then the same state from an empty database."""
    with ExitStack() as stack:
        storm = Storm(redis, postgresql.database(), folder, stack)
        storm.run(invoices)
        for instance in storm.instances:
            assert instance.stop() == 0
        again = Service("accounts", redis, postgresql.database(), folder)
        with closing(again.start()):
            assert storm.totals(again) == dict(storm.expected)
        return storm


def test_a_storm(redis: Redis, postgresql: PostgreSQL, tmp_path: Path) -> None:
    """R8, R11, R14, R16: each entry twice, kill -9 between XREADGROUP and XACK; then from nothing."""
    storm = play(redis.database(), postgresql, tmp_path, SHARE)
    assert storm.kills >= 4
    assert storm.interrupted > 0
    assert storm.claimed() > 0


def main() -> None:
    """The whole."""
    folder = Path(tempfile.mkdtemp(prefix="idemp-storm-"))
    with Redis() as server, PostgreSQL() as postgresql:
        began = time.monotonic()
        storm = play(server.url, postgresql, folder, int(sys.argv[1]))
        seconds = time.monotonic() - began
    total = sum(storm.expected.values())
    said = f"{storm.kills} kills, {storm.interrupted} entries interrupted, {storm.claimed()} taken over"
    print(f"{said}; {total} cents, in {seconds:.0f} s")


if __name__ == "__main__":
    main()
