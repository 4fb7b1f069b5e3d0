"""The contenders, each a process of its own: `python -m bench.contenders JOB`, a `Job` as JSON.

    plain       pika as people write it: prefetch, acknowledge each message
    ceiling     pika at its best: acknowledge a hundred at a time; remembers nothing
    insert      as plain, with a row and a commit for each message
    inbox       idemp with transaction=True, and the same row
    seed        the way of the service before idemp, made safe: one etcd put a message, then its ack
    the others  idemp with that store: claimed and done durably, each id once

All decode the same payload.  Each prints when it took its first measured message and when its last was
acknowledged, in seconds of the system's steady clock, so that several of them can be one figure.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import msgspec
import pika
import psycopg

from bench.cells import IDEMP, Setting
from idemp import Consumer, Message, context, idempotent, open_event_log, open_store, open_transport
from idemp.audit import Tallier
from idemp.audit.tallies import Tallies
from idemp.ports import Delivery, Transport
from idemp.stores.etcd_client import Client

AUDIT = "bench-audit"
"""The exchange of the auditor."""
IDLE = 2.0
"""Seconds without a message after which one of several replicas takes the queue for empty."""


class Job(msgspec.Struct, frozen=True):
    """warm: how many messages are not measured.  count: those that are, over all replicas."""

    setting: Setting
    url: str
    queue: str
    warm: int
    count: int
    store: str


class Span:
    """From the first measured message to the last acknowledgement."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.came = self.settled = 0
        self.began = self.ended = 0.0

    def arrive(self, many: int = 1) -> None:
        """So many messages came."""
        self.came += many
        if not self.began and self.came > self._job.warm:
            self.began = time.monotonic()

    def settle(self, many: int = 1) -> bool:
        """So many were acknowledged; whether those were the last."""
        self.settled += many
        self.ended = time.monotonic()
        return self.settled >= self._job.warm + self._job.count

    def over(self) -> bool:
        """Whether a replica that shares the queue may stop."""
        return self.settled > 0 and time.monotonic() - self.ended > IDLE


# ------------------------------------------------------------------ pika


def plain(job: Job, every: int = 1, handle: Callable[[bytes], object] = json.loads) -> Span:
    """Acknowledge ``every`` messages."""
    span, setting = Span(job), job.setting
    connection = pika.BlockingConnection(pika.URLParameters(job.url))
    channel = connection.channel()
    channel.basic_qos(prefetch_count=setting.window())
    pool = ThreadPoolExecutor(setting.workers) if setting.workers > 1 else None

    def settle(tag: int) -> None:
        if every == 1 or tag % every == 0 or tag == job.warm + job.count:
            channel.basic_ack(tag, multiple=every > 1)
            if span.settle(1 if every == 1 else tag - span.settled):
                channel.stop_consuming()

    def work(tag: int, body: bytes) -> None:
        handle(body)
        time.sleep(setting.milliseconds / 1000)
        connection.add_callback_threadsafe(partial(settle, tag))

    def came(_: Any, method: Any, properties: Any, body: bytes) -> None:
        span.arrive()
        if pool is not None:
            pool.submit(work, method.delivery_tag, body)
            return
        handle(body)
        settle(method.delivery_tag)

    channel.basic_consume(job.queue, came)
    if setting.replicas > 1:
        look(connection, span, channel.stop_consuming)
    channel.start_consuming()
    connection.close()
    return span


def look(connection: Any, span: Span, stop: Callable[[], None]) -> None:
    """End one of several replicas when nothing comes any more."""
    if span.over():
        stop()
    else:
        connection.call_later(0.2, partial(look, connection, span, stop))


def seed(job: Job) -> Span:
    """A set in memory, one put a message in etcd, acknowledge each."""
    host, _, namespace = job.store.removeprefix("etcd://").partition("/")
    client, known = Client([host]), set[str]()

    def handle(body: bytes) -> None:
        identity = json.loads(body)["id"]
        if identity not in known:
            known.add(identity)
            client.put(f"/service/{namespace}/{identity}", b"true")

    try:
        return plain(job, handle=handle)
    finally:
        client.close()


def row(url: str) -> str:
    """The statement that inserts a message's id, as each driver wants its parameters."""
    return f"INSERT INTO effect VALUES ({'?' if url.startswith('sqlite') else '%s'})"


@contextmanager
def database(url: str) -> Iterator[Any]:
    """A connection to the database that a store's URL names, which commits durably."""
    url = url.partition("?")[0]
    if url.startswith("sqlite"):
        connection: Any = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=30)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
    else:
        connection = psycopg.connect(url)
    with closing(connection):
        yield connection


def insert(job: Job) -> Span:
    """A row and a commit for each message, then its acknowledgement; each thread has its connection."""
    statement, mine = row(job.store), threading.local()
    with ExitStack() as connections:

        def handle(body: bytes) -> None:
            if not hasattr(mine, "connection"):
                mine.connection = connections.enter_context(database(job.store))
            mine.connection.execute(statement, [json.loads(body)["id"]])
            mine.connection.commit()

        return plain(job, handle=handle)


# ------------------------------------------------------------------ idemp


class Watched:
    """A transport, whose deliveries and acknowledgements are noted."""

    def __init__(self, inner: Transport, span: Span) -> None:
        self._inner, self._span = inner, span
        self.last: Callable[[], None] = lambda: None

    def poll(self, timeout: float) -> list[Any]:
        """See `Transport`."""
        came = self._inner.poll(timeout)
        self._span.arrive(sum(type(event) is Delivery for event in came))
        return came

    def ack(self, tags: Iterable[int]) -> None:
        """See `Transport`."""
        tags = list(tags)
        self._inner.ack(tags)
        if self._span.settle(len(tags)):
            self.last()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def idemp(job: Job, *, inbox: bool = False) -> Span:
    """The product, with its defaults but the prefetch.  inbox: each inserts a row, in a transaction."""
    span, setting = Span(job), job.setting
    store = open_store(job.store)
    store.apply([])
    transport = Watched(open_transport(job.url), span)
    events = open_event_log(setting.tracking) if setting.tracking else None
    audit = None
    if setting.tallies:
        audit = Tallier(Tallies(setting.tallies), open_transport(job.url), exchange=AUDIT)
    consumer = Consumer(
        transport,
        service=job.queue.removesuffix("-queue"),
        prefetch=setting.window(),
        workers=setting.workers,
        tracking=events,
        audit=audit,
    )
    transport.last = consumer.stop
    pause, statement = setting.milliseconds / 1000, row(job.store)

    @consumer.on("new_order")
    @idempotent(store, name="bench.new_order", transaction=inbox)
    def handle(message: Message) -> None:
        if inbox:
            context().connection.execute(statement, [message.id])
        if pause:
            time.sleep(pause)

    if setting.replicas > 1:
        stop_when_over(span, consumer.stop)
    consumer.run()
    store.close()
    if events is not None:
        events.close()
    return span


def stop_when_over(span: Span, stop: Callable[[], None]) -> None:
    """`look`, with a thread."""

    def watch() -> None:
        while not span.over():
            time.sleep(0.2)
        stop()

    threading.Thread(target=watch, daemon=True).start()


def main(text: str) -> None:
    """Run one contender on a queue that is full already."""
    job = msgspec.json.decode(text, type=Job)
    name = job.setting.contender
    if name == "plain":
        span = plain(job)
    elif name == "ceiling":
        span = plain(job, every=100)
    elif name == "seed":
        span = seed(job)
    elif name == "insert":
        span = insert(job)
    elif name == "inbox":
        span = idemp(job, inbox=True)
    elif name in IDEMP:
        span = idemp(job)
    else:
        sys.exit(f"no contender {name!r}")
    print(json.dumps({"began": span.began, "ended": span.ended, "settled": span.settled}))


if __name__ == "__main__":
    main(sys.argv[1])
