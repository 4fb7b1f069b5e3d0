"""`make bench`: a deduplicating consumer beside plain ones, in alternating rounds on one real broker.

Machines are shared and noisy, so ratios within a round count, and their median is quoted.  A round
is void unless the store remembers as many keys as there were messages.
"""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import click
import pika

from idemp import Message, open_transport, publish
from idemp.ports import Publication
from tests.servers import Etcd, RabbitMQ

CONTENDERS = ("plain", "ceiling", "seed", "sqlite", "etcd")
SEED_SHARE = 10
"""The seed's way is so much slower that it gets a tenth of the messages."""
PAYLOAD = {"sku": "x" * 100, "cents": 500}


def fill(url: str, queue: str, count: int) -> None:
    """Put ``count`` fresh messages into ``queue``."""
    transport = open_transport(url)
    transport.declare(queue, "events")
    messages = [Message(uuid.uuid4().hex, "new_order", PAYLOAD) for _ in range(count)]
    for start in range(0, count, 5000):
        part = messages[start : start + 5000]
        publish(transport, [Publication(m.encode(), m.properties(), "", queue) for m in part])
    transport.close()


def measure(name: str, url: str, etcd: str, count: int) -> float:
    """Messages a second of one contender on a full queue."""
    run = uuid.uuid4().hex[:8]
    queue = f"bench{run}-queue"
    count = count // SEED_SHARE if name == "seed" else count
    fill(url, queue, count)
    with tempfile.TemporaryDirectory() as folder:
        store = f"sqlite:///{folder}/seen.db" if name == "sqlite" else f"{etcd}{run}"
        command = [sys.executable, "-m", "bench.contenders", name, url, queue, str(count), store]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    result = json.loads(done.stdout)
    if name not in ("plain", "ceiling") and result["remembered"] != count:
        raise SystemExit(f"void: {name} remembers {result['remembered']} of {count} messages")
    return float(result["rate"])


@click.command()
@click.option("--messages", default=20_000, show_default=True, help="Messages in a round.")
@click.option("--rounds", default=5, show_default=True, help="Rounds; each runs every contender once.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the figures here too.")
def main(messages: int, rounds: int, file: Path | None) -> None:
    """Measure the contenders side by side."""
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with RabbitMQ() as broker, Etcd() as etcd:
        for number in range(rounds):
            for name in CONTENDERS:
                rates[name].append(measure(name, broker.url, etcd.url, messages))
            row = "  ".join(f"{name} {rates[name][-1]:7.0f}" for name in CONTENDERS)
            click.echo(f"round {number + 1}/{rounds}   {row}  messages/s")
    click.echo()
    ratios = {name: ratio(rates[name], rates["plain"]) for name in CONTENDERS}
    for name in CONTENDERS:
        low, high = min(rates[name]), max(rates[name])
        middle = statistics.median(rates[name])
        click.echo(
            f"{name:8} {ratios[name]:5.2f} x plain   median {middle:7.0f}/s   ({low:.0f} to {high:.0f})"
        )
    if file is not None:
        file.write_text(json.dumps(report(messages, rates, ratios), indent=2) + "\n")


def ratio(rates: list[float], base: list[float]) -> float:
    """The median over the rounds of what each round says."""
    return statistics.median(a / b for a, b in zip(rates, base, strict=True))


def report(messages: int, rates: dict[str, list[float]], ratios: dict[str, float]) -> dict[str, object]:
    """Everything that a reader of the figures would ask for."""
    versions = {
        "python": platform.python_version(),
        "pika": pika.__version__,
        "sqlite": sqlite3.sqlite_version,
    }
    machine = {"cores": os.cpu_count(), "system": platform.platform()}
    return {"messages": messages, "ratios": ratios, "rates": rates, "versions": versions, "machine": machine}


if __name__ == "__main__":
    main()
