"""Fresh messages over Redis Streams: idemp with its Redis store beside a plain group reader.

Both take 200-byte messages that wait in a stream and decode them; plain is redis-py as people write it:
XREADGROUP, the handler, an XACK each.  One server, which flushes its log at every write; plain also on one
that flushes it every second, and so may forget an acknowledgement.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
import uuid
from contextlib import closing
from typing import Any

import click
import redis

from idemp import Consumer, Message, idempotent, open_store, open_transport, publish
from idemp.bars import bar
from idemp.ports import Publication
from tests.servers import Redis

NAMES = ("plain", "plain, forgetful", "idemp")
COUNT = 256
"""Entries that plain reads at a time."""
FAR = 2048
PAD = "x" * 120


def measure(messages: int, rounds: int) -> dict[str, Any]:
    """Alternating rounds; the median of the ratios within a round."""
    rates: dict[str, list[float]] = {name: [] for name in NAMES}
    with (
        Redis() as server,
        Redis(options={"appendfsync": "everysec"}) as forgetful,
        bar(rounds * len(NAMES), "streams", least=1) as step,
    ):
        for number in range(rounds):
            for name in NAMES if number % 2 == 0 else reversed(NAMES):
                url = forgetful.url if name == "plain, forgetful" else server.url
                rates[name].append((ours if name == "idemp" else plain)(url, messages))
                step(1)
                click.echo(f"round {number + 1}/{rounds}  {name:16} {rates[name][-1]:9.0f}/s", err=True)
    found = {name: _summary(rates, name) for name in NAMES}
    for name, each in found.items():
        click.echo(f"{name:16} {each['median']:9.0f}/s  idemp is {each['idemp is']:.2f} x that")
    return {"messages": messages, "rates": found}


def _summary(rates: dict[str, list[float]], name: str) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(rates["idemp"], rates[name], strict=True)]
    return {
        "median": statistics.median(rates[name]),
        "rounds": rates[name],
        "idemp is": statistics.median(ratios),
    }


def plain(url: str, messages: int) -> float:
    """Messages a second of redis-py alone."""
    stream, group = uuid.uuid4().hex, "group"
    with closing(redis.Redis.from_url(url)) as client:
        client.xgroup_create(stream, group, id="0", mkstream=True)
        pipe = client.pipeline(transaction=False)
        for number in range(messages):
            pipe.xadd(stream, {"body": _event(number).encode()})
        pipe.execute()
        done, began = 0, time.monotonic()
        while done < messages:
            found: Any = client.xreadgroup(group, "one", {stream: ">"}, count=COUNT, block=1000)
            for id, fields in found[0][1]:
                json.loads(fields[b"body"])
                client.xack(stream, group, id)
                done += 1
        seconds = time.monotonic() - began
        client.delete(stream)
    return messages / seconds


def ours(url: str, messages: int) -> float:
    """Messages a second, each claimed, run, recorded and acknowledged."""
    service = uuid.uuid4().hex[:12]
    place = f"{url}?namespace={service}"
    with closing(open_transport(place)) as transport, closing(open_store(place)) as store:
        transport.declare(f"{service}-queue")
        events = [_event(number) for number in range(messages)]
        publish(
            transport,
            [Publication(e.encode(), e.properties(), "", f"{service}-queue") for e in events],
            timeout=120,
        )
        consumer = Consumer(open_transport(place), service=service, prefetch=FAR)
        done, times = [0], [0.0, 0.0]

        @consumer.on("order")
        @idempotent(store, name="bench.order", codec=None)
        def order(message: Message) -> None:
            if not done[0]:
                times[0] = time.monotonic()
            done[0] += 1

        thread = threading.Thread(target=consumer.run)
        thread.start()
        while done[0] < messages or _left(transport, f"{service}-queue"):
            time.sleep(0.005)
        times[1] = time.monotonic()
        consumer.stop()
        thread.join()
        if len(store.scan("bench.order/", limit=messages + 1)) != messages:
            raise SystemExit("the store does not remember as many ids as there were: the round is void")
    return messages / (times[1] - times[0])


def _left(transport: Any, queue: str) -> int:
    waiting = transport.look(queue)
    return int(waiting.ready + waiting.out + waiting.delayed)


def _event(number: int) -> Message:
    return Message(f"{number}-{uuid.uuid4().hex[:12]}", "order", {"n": number, "pad": PAD})
