"""The contenders, each a process of its own: `python -m bench.contenders NAME AMQP QUEUE COUNT STORE`.

    plain     pika as people write it: prefetch, acknowledge each message
    ceiling   pika at its best: acknowledge a hundred at a time; remembers nothing
    seed      the way of the service before idemp, made safe: one etcd put a message, then its ack
    sqlite    idemp with the SQLite store: claimed and done durably, each message once
    etcd      idemp with the etcd store: the same, replicated

All decode the same payload.  Each prints its messages a second, from the first handler to the last
acknowledgement, and how many it remembers at the end.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import pika

from idemp import Consumer, Message, idempotent, open_store, open_transport
from idemp.stores.etcd_client import Client

PREFETCH = 256
"""Of those that acknowledge message by message."""
FAR = 1024
"""Of those that acknowledge many at once: a batch that is under way must not use it up."""


def plain(url: str, queue: str, count: int, every: int = 1) -> tuple[float, int]:
    """Acknowledge ``every`` messages."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.basic_qos(prefetch_count=PREFETCH if every == 1 else FAR)
    seen, began = 0, 0.0

    def handle(_: Any, method: Any, properties: Any, body: bytes) -> None:
        nonlocal seen, began
        began = began or time.perf_counter()
        json.loads(body)
        seen += 1
        if seen % every == 0:
            channel.basic_ack(method.delivery_tag, multiple=every > 1)
        if seen == count:
            channel.basic_ack(method.delivery_tag, multiple=True) if seen % every else None
            channel.stop_consuming()

    channel.basic_consume(queue, handle)
    channel.start_consuming()
    connection.close()
    return count / (time.perf_counter() - began), 0


def seed(url: str, queue: str, count: int, store_url: str) -> tuple[float, int]:
    """A set in memory, one put a message in etcd, acknowledge each."""
    host, _, namespace = store_url.removeprefix("etcd://").partition("/")
    client, known = Client([host]), set[str]()
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.basic_qos(prefetch_count=PREFETCH)
    began = 0.0

    def handle(_: Any, method: Any, properties: Any, body: bytes) -> None:
        nonlocal began
        began = began or time.perf_counter()
        identity = json.loads(body)["id"]
        if identity not in known:
            known.add(identity)
            client.put(f"/service/{namespace}/{identity}", b"true")
        channel.basic_ack(method.delivery_tag)
        if len(known) == count:
            channel.stop_consuming()

    channel.basic_consume(queue, handle)
    channel.start_consuming()
    took = time.perf_counter() - began
    connection.close()
    remembered = client.range(f"/service/{namespace}/", prefix=True, keys_only=True).count
    client.close()
    return count / took, remembered


def idemp(url: str, queue: str, count: int, store_url: str) -> tuple[float, int]:
    """The product, with its defaults but the prefetch."""
    store = open_store(store_url)
    consumer = Consumer(open_transport(url), service=queue.removesuffix("-queue"), prefetch=FAR)
    seen, began = 0, 0.0

    @consumer.on("new_order")
    @idempotent(store, name="bench.new_order")
    def handle(message: Message) -> None:
        nonlocal seen, began
        began = began or time.perf_counter()
        seen += 1
        if seen == count:
            consumer.stop()

    consumer.run()
    took = time.perf_counter() - began
    remembered, after = 0, ""
    while page := store.scan("bench.new_order/", after=after):
        remembered += sum(type(state).__name__ == "Done" for _, state in page)
        after = page[-1][0]
    store.close()
    return count / took, remembered


def main(name: str, url: str, queue: str, count: str, store: str) -> None:
    """Run one contender on a queue that is full already."""
    match name:
        case "plain":
            rate, remembered = plain(url, queue, int(count))
        case "ceiling":
            rate, remembered = plain(url, queue, int(count), every=100)
        case "seed":
            rate, remembered = seed(url, queue, int(count), store)
        case "sqlite" | "etcd":
            rate, remembered = idemp(url, queue, int(count), store)
        case _:
            sys.exit(f"no contender {name!r}; there are plain, ceiling, seed, sqlite, etcd")
    print(json.dumps({"rate": rate, "remembered": remembered}))


if __name__ == "__main__":
    main(*sys.argv[1:])
