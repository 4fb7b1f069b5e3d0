"""The demo: the whole story with real processes, and that it says no when the story is not true."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from idemp import Message, open_transport
from idemp.ports import Publication
from idemp.transports import publish
from tests.servers.need import missing
from tests.service import environment, finished, until

TELLS = 100.0
"""Seconds; a demo takes 18."""


class Demo:
    """A demo under way; its temporary files are in ``folder``."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        folder.mkdir()
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "idemp", "demo", *arguments],
            env=environment({"TMPDIR": str(folder)}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        self._told: tuple[int, str, str] | None = None

    def told(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr at its end."""
        if self._told is None:
            out, err = self.process.communicate(timeout=TELLS)
            self._told = self.process.returncode, out, err
        return self._told

    def services(self) -> list[int]:
        """The processes that it has started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        if not children.exists():
            missing("this system does not say who a process has started")
        return [int(pid) for pid in children.read_text().split()]

    def close(self) -> None:
        self.process.terminate()
        self.told()


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Demo]]:
    """Two that run beside each other: as it is, and with a store that forgets at each restart."""
    folder = tmp_path_factory.mktemp("demos")
    running = {
        "embedded": Demo(folder / "embedded", "--json"),
        "forgetful": Demo(folder / "forgetful", "--store", "memory://"),
    }
    yield running
    for demo in running.values():
        demo.close()


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    """One to interfere with, as soon as both services are there."""
    started = Demo(tmp_path / "demo")
    until(lambda: len(started.services()) == 2, started.services)
    yield started
    started.close()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


STORY = [
    ("both start", "orders_new_order_ok", 0),
    ("", "notify_new_order_ok", 0),
    ("an event", "orders_new_order_ok", 1),
    ("", "notify_new_order_ok", 1),
    ("notify stops", "notify's exit code", 0),
    ("an event", "orders_new_order_ok", 1),
    ("", "notify_new_order_ok", 0),
    ("notify starts", "orders_new_order_ok", 0),
    ("", "notify_new_order_ok", 1),
    ("it, 5 times", "orders_new_order_ok", 5),
    ("", "notify_new_order_ok", 5),
    ("an event", "orders_new_order_ok", 1),
    ("", "notify_new_order_ok", 1),
    ("it, 4 times more", "orders_new_order_ok", 0),
    ("", "notify_new_order_ok", 0),
    ("", "orders_new_order_skipped", 4),
    ("", "notify_new_order_skipped", 4),
    ("the same event", "orders_new_order_ok", 0),
    ("", "notify_new_order_ok", 0),
    ("", "orders_new_order_skipped", 1),
    ("", "notify_new_order_skipped", 1),
]


def test_the_story_is_true(demos: dict[str, Demo]) -> None:
    """N15: one command, nothing installed: fan-out, catch-up, wrong without, right with it, restart."""
    code, out, err = demos["embedded"].told()
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert (told["holds"], told["failed"]) == (True, "")
    rows = [row for step in told["steps"] for row in step["rows"]]
    assert [(row["did"], row["what"], row["expected"]) for row in rows] == STORY
    assert all(row["seen"] == row["expected"] and row["holds"] for row in rows)
    assert list(demos["embedded"].folder.iterdir()) == []


def test_a_store_that_forgets_is_found_out(demos: dict[str, Demo]) -> None:
    """N15: a store in memory does not survive a restart: the last chapter differs, exit code 1."""
    code, out, err = demos["forgetful"].told()
    assert (code, err) == (1, "")
    assert "\x1b" not in out  # a pipe gets no colours
    crosses = [line.split() for line in out.splitlines() if line.endswith("✗")]
    assert [words[-4:-1] for words in crosses] == [
        ["orders_new_order_ok", "0", "+1"],
        ["notify_new_order_ok", "0", "+1"],
        ["orders_new_order_skipped", "+1", "0"],
        ["notify_new_order_skipped", "+1", "0"],
    ]
    assert out.endswith("\n4 of 21 numbers are not as expected.\n")


def test_the_story_is_true_on_rabbitmq_and_etcd(
    own_rabbitmq: Any, etcd: Any, unique: str, tmp_path: Path
) -> None:
    """N15: the same with a real broker and store, whose password is not shown, and which is left empty."""
    stack = ("--stack", "real", "--transport", own_rabbitmq.url, "--store", f"{etcd.url}{unique}")
    demo = Demo(tmp_path / "demo", *stack)
    code, out, err = demo.told()
    assert (code, err) == (0, ""), out
    assert "events through: amqp://guest:***@127.0.0.1" in out
    assert out.count("✓") == len(STORY)
    assert f"\nAll {len(STORY)} numbers are as expected, after " in out
    with closing(open_transport(own_rabbitmq.url)) as transport:
        assert [transport.depth(f"{name}-queue") for name in ("orders", "notify")] == [0, 0]

    # And where messages of somebody else wait, it does not touch them
    event = Message("1", "new_order")
    with closing(open_transport(own_rabbitmq.url)) as transport:
        publish(transport, [Publication(event.encode(), event.properties(), "events", "foo")])
    done = finished("-m", "idemp", "demo", "--transport", own_rabbitmq.url)
    assert done.returncode == 2
    assert done.stderr.startswith("idemp: orders-queue has 1 messages waiting, which the demo would process")
    with closing(open_transport(own_rabbitmq.url)) as transport:
        assert transport.depth("orders-queue") == 1


def consumers(folder: Path) -> int:
    """How many services take messages of the demo that has its files there."""
    file = next(folder.rglob("queues.db"), None)
    if file is None:
        return 0
    with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(file)) as queues:
        return int(queues.execute("SELECT count(*) FROM consumer").fetchone()[0])
    return 0


def test_a_service_that_dies_ends_the_story(demo: Demo) -> None:
    """N15: exit code 1, and its last words."""
    victim, other = demo.services()
    # Each says where it works before it takes messages.
    until(lambda: consumers(demo.folder) == 2, lambda: demo.told())
    os.kill(victim, signal.SIGKILL)
    code, out, err = demo.told()
    assert (code, err) == (1, "")
    assert "\nThe story broke off: orders ended with exit code -9; the last it said:\n  20" in out
    assert gone(other)
    assert list(demo.folder.iterdir()) == []


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_story_leaves_nothing(demo: Demo, how: signal.Signals, code: int) -> None:
    """N15: Ctrl-C ends the services, too, and removes the files."""
    services = demo.services()
    demo.process.send_signal(how)
    told, _, err = demo.told()
    assert told == code
    assert "Traceback" not in err
    until(lambda: all(gone(pid) for pid in services), lambda: services)
    assert list(demo.folder.iterdir()) == []
