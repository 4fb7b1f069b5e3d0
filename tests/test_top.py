"""Top: rates from Graphite and from services themselves, in a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from idemp import Message
from idemp.metrics import PrometheusMeter
from idemp.ports import Clock
from idemp.rates import Counter, FromMetrics, _place, _services
from tests.servers import Graphite, Statsd, free_port
from tests.service import Stand, environment, finished, stand


@contextmanager
def busy(desk: Stand) -> Iterator[None]:
    """Two new orders all the time, one of them a duplicate."""
    ended = threading.Event()

    def publish() -> None:
        number = 0
        while not ended.wait(0.05):
            number += 1
            desk.publish(*[Message(str(number), "new_order")] * 2)

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Stand]:
    """An embedded broker."""
    with stand(f"sqlite:///{tmp_path}/queues.db", tmp_path) as built:
        yield built


def printed(*arguments: str) -> list[dict[str, Any]]:
    done = finished("-m", "idemp", "top", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_service_is_asked_itself(desk: Stand, unique: str) -> None:
    """Its metrics port tells what happened since the last time."""
    port = free_port()
    desk.service(unique, IDEMP_STORE=desk.store, IDEMP_METRICS_PORT=str(port))
    url = f"http://127.0.0.1:{port}/metrics"
    with busy(desk):
        found = printed("--metrics", url, "--every", "1s", "--times", "3")
    orders = [each["per_second"] for each in found if each["type"] == "new_order"]
    assert len(orders) == 3
    assert {each["service"] for each in found} == {unique}
    assert max(each["ok"] for each in orders) > 1
    assert max(each["skipped"] for each in orders) > 1
    assert all(each["parked"] == 0 for each in orders)


def test_graphite_knows_all(desk: Stand, graphite: Graphite, statsd: Statsd, unique: str) -> None:
    """Service, type and outcome are told apart, whatever underscores are in their names."""
    names = (unique, f"{unique}_eu")
    for name in names:
        desk.service(name, IDEMP_STORE=f"{desk.store}-{name}", IDEMP_STATSD=statsd.address)
    with busy(desk):
        end = time.monotonic() + 30
        while time.monotonic() < end:
            found = printed(
                "--graphite", graphite.url, "--times", "1", "--service", names[0], "--service", names[1]
            )
            rates = {each["service"]: each["per_second"] for each in found if each["type"] == "new_order"}
            if len(rates) == 2 and all(each["ok"] > 1 and each["skipped"] > 1 for each in rates.values()):
                break
        else:
            pytest.fail(f"{found}")
    assert {each["type"] for each in found} == {"", "new_order", "ban_user"}


def test_plain_lines_in_a_pipe_and_a_table_on_a_terminal(desk: Stand, unique: str) -> None:
    """No colours and no movement where nobody looks."""
    port = free_port()
    desk.service(unique, IDEMP_METRICS_PORT=str(port))
    arguments = ["--metrics", f"http://127.0.0.1:{port}/metrics", "--every", "100ms", "--times", "2"]
    done = finished("-m", "idemp", "top", *arguments)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    line = next(line for line in done.stdout.splitlines() if " new_order " in line)
    assert line.endswith(
        f"{unique} new_order ok=0 skipped=0 failed=0 deferred=0 parked=0 lost=0 conflict=0 rejected=0"
    )
    shown = _terminal("top", *arguments)
    assert "\x1b" in shown
    for word in ("service", "skipped", unique, "new_order", "messages a second"):
        assert word in shown


def _terminal(*arguments: str) -> str:
    ours, theirs = pty.openpty()
    env = {**environment(), "COLUMNS": "140", "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "idemp", *arguments]
    with subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs):
        os.close(theirs)
        shown = b""
        with open(ours, "rb", buffering=0) as reader:
            try:
                while chunk := reader.read(4096):
                    shown += chunk
            except OSError:  # EIO is how a terminal says that it ended
                pass
    return shown.decode()


def test_a_service_that_was_started_again() -> None:
    """Its counters begin anew: what they have is what is new."""
    now = [0.0]
    port = free_port()
    source = FromMetrics([f"http://127.0.0.1:{port}/metrics"], clock=Clock(steady=lambda: now[0]))
    place = Counter("orders", "new_order", "ok")
    rates = []
    for counts in (10, 20, 4):
        with closing(PrometheusMeter("orders", port)) as meter:
            meter.count("orders_new_order_ok", counts)
            rates.append(source.read()[place])
        now[0] += 2.0
    assert rates == [0.0, 5.0, 2.0]


def test_names_with_underscores() -> None:
    """``a_b`` may be a service, or a type of ``a``: only a service has no ok of its own."""
    names = ["a_rejected", "a_b_rejected", "a_b_ok", "a_c_rejected", "a_c_x_rejected", "a_c_x_ok", "else"]
    services = _services(dict.fromkeys(names))
    assert services == ["a_c", "a"]
    assert _place("a_b_ok", services) == Counter("a", "b", "ok")
    assert _place("a_c_x_ok", services) == Counter("a_c", "x", "ok")
    assert _place("a_c_rejected", services) == Counter("a_c", "", "rejected")
    assert _place("else", services) is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--metrics", "http://me:secret@127.0.0.1:9/metrics"], "--metrics: no metrics answer at"),
        (["--metrics", "nonsense"], "--metrics: 'nonsense' is no URL of metrics"),
        (
            ["--graphite", "http://me:secret@127.0.0.1:9"],
            "--graphite (IDEMP_GRAPHITE): no Graphite answers at",
        ),
        (["--graphite", "nonsense"], "is no URL of a Graphite"),
        (["--every", "soon"], "--every='soon' is no duration"),
    ],
)
def test_what_does_not_answer_is_one_sentence(arguments: list[str], sentence: str) -> None:
    """Exit code 2, no traceback, no password."""
    done = finished("-m", "idemp", "top", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert sentence in done.stderr
    assert "secret" not in done.stderr
