"""One message at a time on an idle stack: what idemp adds to a message's way.

From its publication until its handler begins, and until its acknowledgement is written; each contender is
a process of its own that says both times of each message.  Beside them one put into the same etcd.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click
import pika

from bench.stack import stack
from idemp import Consumer, Message, idempotent, open_store, open_transport, publish
from idemp.bars import bar
from idemp.ports import Publication, Transport
from idemp.stores.etcd_client import Client

NAMES = ("plain", "sqlite", "etcd", "redis", "postgresql")
PAUSE = 0.005
"""Seconds between two messages: nothing of the one before is under way."""
WARM = 20


def measure(messages: int) -> dict[str, Any]:
    """Milliseconds p50 and p99 of each, and what that is over plain."""
    found: dict[str, Any] = {}
    total = len(NAMES) * (messages + WARM) + messages
    with stack(NAMES) as servers, bar(total, "latencies", least=1) as step:
        for name in NAMES:
            samples = _one(name, servers.broker, servers.store(name), messages, step)
            found[name] = {
                "started": _spread([started - sent for sent, started, _ in samples]),
                "settled": _spread([settled - sent for sent, _, settled in samples]),
            }
        host = servers.urls["etcd"].removeprefix("etcd://").partition("/")[0]
        found["one etcd put"] = {"settled": _spread(_puts(host, messages, step))}
    base = found["plain"]["settled"]
    for name, each in found.items():
        each["added"] = {part: round(each["settled"][part] - base[part], 3) for part in base}
        p50, p99, added = each["settled"]["p50"], each["settled"]["p99"], each["added"]["p50"]
        click.echo(f"{name:14} settled p50 {p50:6.2f} ms  p99 {p99:6.2f} ms  added p50 {added:6.2f} ms")
    return {"messages": messages, "latencies": found}


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": round(cuts[49] * 1000, 3), "p99": round(cuts[98] * 1000, 3)}


def _one(
    name: str, broker: str, store: str, messages: int, step: Callable[[int], None]
) -> list[tuple[float, float, float]]:
    """(sent, handler began, acknowledged) of each message but the first ones."""
    queue = f"l{uuid.uuid4().hex[:8]}-queue"
    transport = open_transport(broker)
    transport.declare(queue, "events")
    command = [sys.executable, "-m", "bench.latency", name, broker, queue, store]
    samples = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as consumer:
        assert consumer.stdout is not None
        assert consumer.stdout.readline().strip() == "ready"
        for _ in range(messages + WARM):
            time.sleep(PAUSE)
            message = Message(uuid.uuid4().hex, "new_order", {"cents": 500})
            sent = time.monotonic()
            publish(transport, [Publication(message.encode(), message.properties(), "", queue)])
            started, settled = json.loads(consumer.stdout.readline())
            samples.append((sent, started, settled))
            step(1)
        consumer.terminate()
    transport.close()
    return samples[WARM:]


def _puts(host: str, count: int, step: Callable[[int], None]) -> list[float]:
    client = Client([host])
    took = []
    for number in range(count):
        time.sleep(PAUSE)
        began = time.monotonic()
        client.put(f"/bench/{number}", b"true")
        took.append(time.monotonic() - began)
        step(1)
    client.close()
    return took


# ------------------------------------------------------------------ the consumer's process


def _say(*times: float) -> None:
    print(json.dumps(times), flush=True)


def plain(broker: str, queue: str) -> None:
    """Says when each message came, and when it was acknowledged."""
    connection = pika.BlockingConnection(pika.URLParameters(broker))
    channel = connection.channel()
    channel.basic_qos(prefetch_count=256)

    def handle(_: Any, method: Any, properties: Any, body: bytes) -> None:
        json.loads(body)
        began = time.monotonic()
        channel.basic_ack(method.delivery_tag)
        _say(began, time.monotonic())

    channel.basic_consume(queue, handle)
    print("ready", flush=True)
    channel.start_consuming()


class _Watched:
    """A transport that says when an acknowledgement is written."""

    def __init__(self, inner: Transport, began: list[float]) -> None:
        self._inner, self._began = inner, began

    def ack(self, tags: Iterable[int]) -> None:
        """See `Transport`."""
        self._inner.ack(tags)
        _say(self._began.pop(), time.monotonic())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def idemp(broker: str, queue: str, url: str) -> None:
    """The same for idemp."""
    began: list[float] = []
    store = open_store(url)
    transport = _Watched(open_transport(broker), began)
    consumer = Consumer(transport, service=queue.removesuffix("-queue"))

    @consumer.on("new_order")
    @idempotent(store, name="bench.new_order")
    def handle(message: Message) -> None:
        began.append(time.monotonic())

    consumer.run(ready=lambda: print("ready", flush=True))
    store.close()


if __name__ == "__main__":
    if sys.argv[1] == "plain":
        plain(*sys.argv[2:4])
    else:
        idemp(*sys.argv[2:5])
