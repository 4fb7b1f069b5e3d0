"""The blocks of docs/redis_streams.md, run on a real server."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import redis as driver

from bench.tables import spaced
from idemp import Message, open_transport, publish
from idemp.ports import Publication
from tests.pair import ROOT, until
from tests.servers import Redis

TEXT = (ROOT / "docs" / "redis_streams.md").read_text()
CONSUMER, READER = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)


def start(code: str, redis: str, folder: Path) -> subprocess.Popen[str]:
    """The block with a server's address in it."""
    code = code.replace("redis://localhost/0", redis)
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_the_consumer(redis: Redis, tmp_path: Path) -> None:
    """An order sent twice is taken once."""
    url = redis.database()
    with start(CONSUMER + "\nconsumer.run()\n", url, tmp_path) as process:
        with closing(open_transport(f"{url}?namespace=orders")) as transport:
            transport.declare("orders-queue")
            sent = Message("A-1", "new_order")
            publish(transport, [Publication(sent.encode(), sent.properties(), "", "orders-queue")] * 2)
            assert process.stdout is not None
            assert process.stdout.readline() == "order A-1\n"
            until(lambda: transport.depth("orders-queue") == 0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stdout.read() == ""


def test_the_reader(redis: Redis, tmp_path: Path) -> None:
    """Two entries are two rows."""
    url = redis.database()
    with closing(sqlite3.connect(tmp_path / "app.db")) as db:
        db.execute("CREATE TABLE entry (id TEXT)")
        with driver.Redis.from_url(url) as client:
            for id in "12":
                payload = json.dumps({"id": id})
                client.xadd("event-stream", {"EventTypeName": "InvoiceCreated", "Payload": payload})
        with start(READER + "\nreader.run()\n", url, tmp_path) as process:
            until(lambda: db.execute("SELECT id FROM entry ORDER BY id").fetchall() == [("1",), ("2",)])
            process.kill()


def test_the_speeds_are_those_on_record() -> None:
    """Median and ratio of each."""
    rates = json.loads((ROOT / "bench/record/streams.json").read_text())["rates"]
    for name, each in rates.items():
        assert f"| {name} | {spaced(round(each['median']))} | {each['idemp is']:.2f} |" in TEXT
