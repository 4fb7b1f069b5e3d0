"""The servers of a bench, the queues and stores that its rounds use, and what a reader asks about them."""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pika

from bench.cells import FAR, IDEMP, Setting
from bench.contenders import Job
from idemp import Message, open_store, open_transport, publish
from idemp.ports import Done, Publication
from tests.servers import Etcd, PostgreSQL, RabbitMQ, Redis

PATIENCE = 300
"""Seconds that a contender may take."""
DURABILITY = {
    "plain, ceiling": "remember nothing",
    "seed": "etcd, one put a message, fsync",
    "sqlite": "WAL, synchronous=FULL",
    "etcd": "one member, fsync",
    "redis": "appendonly, appendfsync always",
    "postgresql": "synchronous_commit on, fsync",
}


class Stack(NamedTuple):
    """Where everything is.  ``urls``: of the stores, to which a namespace is added."""

    broker: str
    urls: dict[str, str]
    folder: Path

    def store(self, name: str) -> str:
        """A store that nobody has used."""
        run = uuid.uuid4().hex[:10]
        if name == "sqlite":
            return f"sqlite:///{self.folder}/{run}.db"
        return self.urls.get("etcd" if name == "seed" else name, "memory://{}").format(run)


@contextmanager
def stack(names: Sequence[str] = ("etcd",)) -> Iterator[Stack]:
    """RabbitMQ and the servers of these stores."""
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="idemp-bench-")))
        broker = opened.enter_context(RabbitMQ())
        urls = {}
        if "etcd" in names:
            urls["etcd"] = opened.enter_context(Etcd()).url + "{}"
        if "redis" in names:
            urls["redis"] = opened.enter_context(Redis()).url + "?namespace=b{}"
        if "postgresql" in names:
            urls["postgresql"] = opened.enter_context(PostgreSQL()).url + "?namespace=b{}"
        yield Stack(broker.url, urls, folder)


# ------------------------------------------------------------------ a round


def run(setting: Setting, stack: Stack, count: int) -> float:
    """Messages a second of a contender on a full queue.  Raises `SystemExit` if the round is void."""
    count = int(count * setting.share)
    queue, store = f"b{uuid.uuid4().hex[:10]}-queue", stack.store(setting.contender)
    batches = _batches(setting.ids, _messages(setting, count))
    spans = []
    for warm, messages in batches:
        fill(stack.broker, queue, messages, quorum=setting.quorum)
        job = Job(setting, stack.broker, queue, warm, len(messages) - warm, store)
        spans = contend(job)
    settled = sum(span["settled"] for span in spans)
    warm, messages = batches[-1]
    if settled < len(messages):
        raise SystemExit(f"void: {setting} settled {settled} of {len(messages)} messages")
    unique = len({message.id for _, part in batches for message in part})
    if setting.contender in (*IDEMP, "seed") and (known := remembered(setting.contender, store)) != unique:
        raise SystemExit(f"void: {setting} remembers {known} of {unique} ids")
    took = max(span["ended"] for span in spans) - min(span["began"] for span in spans if span["began"])
    return (len(messages) - warm) / took


def _messages(setting: Setting, count: int) -> list[Message]:
    payload = {"sku": "x" * (setting.size - 100), "cents": 500}
    return [Message(uuid.uuid4().hex, "new_order", payload) for _ in range(count)]


def _batches(ids: str, fresh: list[Message]) -> list[tuple[int, list[Message]]]:
    """What each process of a round gets, and how much of it is not measured."""
    match ids:
        case "duplicates":
            half = fresh[: len(fresh) // 2]
            # When the first of them come the prefetch is still full of fresh ones.
            return [(len(half) + min(FAR, len(half)), half * 4)]
        case "again":
            return [(0, fresh), (0, fresh)]
        case "half":
            half = fresh[: len(fresh) // 2]
            # Each again when some hundred others have come.
            late = [each for at in range(0, len(half), 200) for each in half[at : at + 200] * 2]
            return [(0, late)]
    return [(0, fresh)]


def fill(url: str, queue: str, messages: Sequence[Message], *, quorum: bool = False) -> None:
    """Put ``messages`` into ``queue``, in order."""
    if quorum:
        with pika.BlockingConnection(pika.URLParameters(url)) as connection:
            connection.channel().queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})
    transport = open_transport(url)
    if not quorum:
        transport.declare(queue, "events")
    for start in range(0, len(messages), 2000):
        part = messages[start : start + 2000]
        publish(transport, [Publication(m.encode(), m.properties(), "", queue) for m in part])
    transport.close()


def contend(job: Job) -> list[dict[str, float]]:
    """Run a contender's processes side by side; what each printed."""
    command = [sys.executable, "-m", "bench.contenders", msgspec.json.encode(job).decode()]
    with ExitStack() as opened:
        processes = [
            opened.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            for _ in range(job.setting.replicas)
        ]
        said = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"void: {job.setting} failed")
    return [json.loads(line) for line in said]


def remembered(contender: str, url: str) -> int:
    """How many ids a store holds as done."""
    if contender == "seed":
        host, _, namespace = url.removeprefix("etcd://").partition("/")
        from idemp.stores.etcd_client import Client

        client = Client([host])
        count = client.range(f"/service/{namespace}/", prefix=True, keys_only=True).count
        client.close()
        return count
    store, found, after = open_store(url), 0, ""
    while page := store.scan("bench.new_order/", after=after):
        found += sum(type(state) is Done for _, state in page)
        after = page[-1][0]
    store.close()
    return found


# ------------------------------------------------------------------ the machine


def environment() -> dict[str, Any]:
    """What a reader of the figures would ask for."""
    names = ("pika", "grpcio", "msgspec", "redis", "psycopg", "aws-lambda-powertools")
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "")
    return {
        "machine": {"cores": os.cpu_count(), "processor": model, "system": platform.platform()},
        "load": os.getloadavg(),
        "versions": {
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            **{name: version(name) for name in names},
        },
        "durability": DURABILITY,
    }
