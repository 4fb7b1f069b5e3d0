"""What growing costs: the same measurements with ever more remembered ids.

For each store: fresh messages a second beside an empty one in alternating rounds, bytes an id in the
store, and, where a process carries them, its memory for an id and how long it takes until it is ready.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from bench.cells import Setting
from bench.contenders import Job
from bench.stack import Stack, contend, fill, stack
from idemp import Message, open_store
from idemp.bars import bar
from idemp.ports import Claim, Claimed, Complete
from idemp.stores.etcd_client import Client
from tests.servers import Etcd

STORES = ("etcd", "sqlite")
SIZES = (10_000, 1_000_000, 10_000_000)
BATCH = 2000
ROUNDS = 3
MESSAGES = 20_000
HOURS = 24
PATIENCE = 300.0
"""Seconds that etcd may take to write its database anew."""


def measure(stores: Sequence[str], most: int) -> dict[str, Any]:
    """Each store at each size up to ``most``."""
    found: dict[str, Any] = {store: {} for store in stores}
    sizes = [size for size in SIZES if size <= most]
    with stack(()) as servers, bar(len(found) * len(sizes) * (1 + 2 * ROUNDS), "growths", least=1) as step:
        for store in found:
            for size in sizes:
                found[store][str(size)] = each = _one(servers, store, size, step)
                click.echo(f"{store:7} {size:9} ids: {json.dumps(each)}")
    return {"retention_hours": HOURS, "growth": found}


def _one(servers: Stack, store: str, size: int, step: Callable[[int], None]) -> dict[str, Any]:
    if store == "sqlite":
        urls = [f"sqlite:///{servers.folder}/{name}-{size}.db" for name in ("full", "empty")]
        _remember(urls[0], size)
        step(1)
        held = Path(urls[0].removeprefix("sqlite:///")).stat().st_size
        return {"bytes": round(held / size, 1), **_throughput(servers, store, urls[0], urls[1], step)}
    with Etcd(quota_bytes=8 << 30) as etcd, Etcd() as other:
        _remember(etcd.url + "full", size)
        step(1)
        held = _compacted(etcd)
        ready = json.loads(_python("bench.growth", "ready", etcd.url + "full", str(size)))
        rates = _throughput(servers, store, etcd.url + "full", other.url + "empty", step)
        return {"bytes": round(held / size, 1), **ready, **rates}


def _python(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def _remember(url: str, size: int) -> None:
    """Claim and complete so many ids, in a process of its own."""
    began = time.monotonic()
    _python("bench.growth", "remember", url, str(size))
    click.echo(f"  {size} ids remembered in {time.monotonic() - began:.0f} s", err=True)


def _compacted(etcd: Etcd) -> int:
    """Bytes of the database after compaction and defragmentation."""
    client = Client(etcd.endpoints)
    revision = client.range("none").revision
    client.close()
    member = etcd.members[0]
    member.call("/v3/kv/compaction", patience=PATIENCE, revision=str(revision), physical=True)
    member.call("/v3/maintenance/defragment", patience=PATIENCE)
    return int(member.call("/v3/maintenance/status")["dbSize"])


def _throughput(
    servers: Stack, store: str, full: str, empty: str, step: Callable[[int], None]
) -> dict[str, Any]:
    """Fresh messages a second on both, in turns."""
    rates: dict[str, list[float]] = {full: [], empty: []}
    for _ in range(ROUNDS):
        for url in rates:
            queue = f"g{uuid.uuid4().hex[:8]}-queue"
            messages = [Message(uuid.uuid4().hex, "new_order", {"sku": "x" * 100}) for _ in range(MESSAGES)]
            fill(servers.broker, queue, messages)
            [span] = contend(Job(Setting(contender=store), servers.broker, queue, 0, MESSAGES, url))
            rates[url].append(MESSAGES / (span["ended"] - span["began"]))
            step(1)
    rate = statistics.median(rates[full])
    ratio = statistics.median(a / b for a, b in zip(rates[full], rates[empty], strict=True))
    # What that rate would fill in a retention: ids in memory and in the store.
    return {"rate": round(rate), "of_empty": round(ratio, 3), "fills": round(rate * HOURS * 3600)}


# ------------------------------------------------------------------ in a process of its own


def remember(url: str, size: int) -> None:
    """Fill a store."""
    store = open_store(url)
    for start in range(0, size, BATCH):
        keys = [f"bench.new_order/{uuid.uuid4().hex}" for _ in range(min(BATCH, size - start))]
        claims = store.apply([Claim(key) for key in keys])
        store.apply(
            [
                Complete(k, c.token, b"null")
                for k, c in zip(keys, claims, strict=True)
                if isinstance(c, Claimed)
            ]
        )
    store.close()


def ready(url: str, size: int) -> None:
    """Say how long it takes until a store is ready, and how much memory its ids take."""
    open_store("memory://").apply([])
    before, began = _memory(), time.monotonic()
    store = open_store(url)
    store.apply([])
    took = time.monotonic() - began
    held = _memory() - before
    store.close()
    print(json.dumps({"ready": round(took, 2), "memory": round(held / size, 1)}))


def _memory() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


if __name__ == "__main__":
    {"remember": remember, "ready": ready}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
