"""Watching: each verdict with its numbers, and a queue that was unbound on a real broker.  Row U11."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pika
import pytest

from idemp import Message, open_event_log, open_transport, publish
from idemp.cli.stage import Statsd
from idemp.cli.watch import _look
from idemp.ports import Batch, Event, Publication
from idemp.tracking.tracker import tracking
from idemp.tracking.watch import IDS, Finding, Limits, Seen, judge, look
from tests.servers import Redis
from tests.service import ROOT, Program, environment, finished, until
from tests.test_tracking import service

NOW = 10_000.0
LIMITS = Limits(deadline=30.0, stuck=60.0, recent=120.0)


def ok(n: int, at: float, kind: str = "ok", why: str = "") -> Event:
    return Event(str(n), kind, "billing", at, "receiver", took=0.5, why=why)


def steady(until: float, n: int = 100) -> list[Event]:
    """A message a second, up to ``until``; the newest first."""
    return [ok(number, until - number) for number in range(n)]


def kinds(seen: Seen) -> dict[str, Finding]:
    return {each.kind: each for each in judge(seen, NOW, LIMITS)}


def test_u11_all_is_well() -> None:
    """U11: nothing is said of a service that works, waits, or is new."""
    assert kinds(Seen("billing", steady(NOW - 1), ready=500, consumers=2)) == {}
    assert kinds(Seen("billing", [], ready=None, consumers=None)) == {}
    assert kinds(Seen("billing", steady(NOW - 900, 5), ready=0, consumers=1)) == {}


def test_u11_no_consumer() -> None:
    """U11: with how many wait, and since when; also where the queue is gone."""
    found = kinds(Seen("billing", steady(NOW - 10), ready=7, consumers=0))
    assert found["no consumer"].why == "nobody consumes billing-queue; 7 messages are ready"
    assert found["no consumer"].oldest == NOW - 9.5
    assert kinds(Seen("billing", [], absent=True))["no consumer"].why == "there is no queue billing-queue"
    waiting = [Event(str(n), "sent", "shop", NOW - 100 + n, "sender") for n in (3, 1, 2)]
    named = kinds(Seen("billing", steady(NOW - 10), waiting, ready=7, consumers=0))["no consumer"]
    assert named.why == "nobody consumes billing-queue; 7 messages are ready; the oldest is 1"
    assert (named.oldest, named.ids) == (NOW - 99, ("1", "2", "3"))


def test_u11_alive_but_no_progress() -> None:
    """U11: consumers, ready messages, the time without an outcome, the last error."""
    events = [ok(1, NOW - 90, "failed", "ValueError: no"), ok(2, NOW - 95)]
    found = kinds(Seen("billing", events, ready=1841, consumers=2))
    assert found.keys() == {"no progress"}
    told = "2 consumers, 1841 messages ready, and no outcome for 90 s; last error ValueError: no"
    assert found["no progress"].why == told
    waiting = [Event("7", "sent", "shop", NOW - 95, "sender")]
    named = kinds(Seen("billing", events, waiting, ready=1841, consumers=2))["no progress"]
    assert (named.why, named.oldest, named.ids) == (f"{told}; the oldest is 7", NOW - 95, ("7",))


def test_u11_started_and_never_finished() -> None:
    """U11: only what has not ended since, the oldest by name."""
    events = [
        ok(1, NOW - 300, "started"),
        ok(2, NOW - 200, "started"),
        ok(2, NOW - 200),
        ok(3, NOW - 30, "started"),
        ok(4, NOW - 100, "started"),
    ]
    found = kinds(Seen("billing", events, ready=0, consumers=1))
    assert found["never finished"].ids == ("1", "4")
    assert found["never finished"].why == "2 handlers began and did not end; 1 for 300 s"


def test_u11_a_step_in_failures() -> None:
    """U11: against the time before; what always failed a little is no news."""
    before = steady(NOW - 200, 200)
    recent = [ok(n, NOW - n, "failed" if n % 2 else "ok", "KeyError: 'sku'") for n in range(1, 61)]
    found = kinds(Seen("billing", [*recent, *before], ready=0, consumers=1))
    assert (
        found["failing"].why == "50% of 60 messages fail since 120 s, 0% before; last error KeyError: 'sku'"
    )
    assert len(found["failing"].ids) == IDS
    always = [ok(n, NOW - 200 - n, "failed" if n % 2 else "ok") for n in range(200)]
    assert "failing" not in kinds(Seen("billing", [*recent, *always], ready=0, consumers=1))


def test_u11_silence_where_there_was_traffic() -> None:
    """U11: against its own rhythm."""
    found = kinds(Seen("billing", steady(NOW - 120), ready=0, consumers=1))
    assert found["silence"].why == "nothing for 120 s, where a message came every 1.0 s"
    slow = [ok(n, NOW - 120 - 10 * n) for n in range(100)]
    assert kinds(Seen("billing", slow, ready=0, consumers=1)) == {}


def test_u11_missing_only_after_the_deadline_and_not_while_they_wait() -> None:
    """U11: ids and queue; those that may stand in the queue are not missing."""
    missing = [Event(str(n), "sent", "shop", NOW - 100 + n, "sender") for n in range(80)]
    found = kinds(Seen("billing", steady(NOW - 1), missing, ready=0, consumers=1))
    assert found["missing"].why.startswith("70 messages that billing-queue used to get did not come in 30 s")
    assert found["missing"].ids == tuple(str(n) for n in range(IDS))
    assert kinds(Seen("billing", steady(NOW - 1), missing, ready=3, consumers=1)) == {}


def test_what_was_sent_before_a_service_came_is_not_missing(tmp_path: Path) -> None:
    """Nor what went straight to somebody else's queue."""
    with closing(open_event_log(f"sqlite:///{tmp_path}/events.db")) as log:

        def sent(id: str, at: float, queue: str = "") -> Event:
            return Event(id, "sent", "shop", at, "sender", type="order", queue=queue)

        first = Event("2", "ok", "billing", 9000.0, "receiver", sender="shop", type="order", sent_at=8999.0)
        events = [
            sent("1", 8000.0),
            sent("2", 8999.0),
            first,
            sent("3", 9100.0, "post-queue"),
            sent("4", 9200.0),
        ]
        log.append(Batch("w", 1, events))
        found = look(log, lambda _: (0, 1, False), NOW, LIMITS)
    assert [(each.kind, each.ids) for each in found] == [("missing", ("4",))]


# ------------------------------------------------------------------ a real broker, and who is told


@pytest.fixture
def hook() -> Iterator[tuple[str, list[Any]]]:
    """A receiver of webhooks: its URL, and what it got."""
    got: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/found", got
    server.shutdown()
    thread.join()
    server.server_close()


def test_u11_a_queue_that_was_unbound(
    amqp_url: str, tmp_path: Path, unique: str, hook: tuple[str, list[Any]]
) -> None:
    """U11: ten are published past it; the finding names the queue and the ten ids within its deadline."""
    ran: Counter[str] = Counter()
    one, other = f"{unique}-a", f"{unique}-b"
    url = f"sqlite:///{tmp_path}/events.db"

    def send(out: Any, ids: list[str]) -> None:
        messages = [Message(id, "order") for id in ids]
        publish(out, [Publication(each.encode(), each.properties(), unique, "x") for each in messages])

    with (
        service(amqp_url, tmp_path, one, {"order": lambda m, _: ran.update([f"a{m.id}"])}, exchange=unique),
        service(amqp_url, tmp_path, other, {"order": lambda m, _: ran.update([f"b{m.id}"])}, exchange=unique),
        closing(open_event_log(url)) as log,
        closing(open_transport(amqp_url)) as out,
        closing(Statsd()) as statsd,
        tracking(log, "shop"),
    ):
        send(out, [f"before-{n}" for n in range(20)])
        until(lambda: len(ran) == 40, lambda: ran)
        options = ["--deadline", "2s", "--every", "0.3s", "--times", "30", "--webhook", hook[0]]
        options += ["--service", one, "--service", other, "--statsd", statsd.address, "--json"]
        watcher = subprocess.Popen(
            [sys.executable, "-m", "idemp", "watch", *options],
            cwd=ROOT,
            env=environment({"IDEMP_TRACKING": url, "IDEMP_TRANSPORT": amqp_url}),
            stdout=subprocess.PIPE,
            text=True,
        )
        connection = pika.BlockingConnection(pika.URLParameters(amqp_url))
        connection.channel().queue_unbind(f"{other}-queue", unique, "#")
        connection.close()
        lost = [f"lost-{n}" for n in range(10)]
        send(out, lost)
        sent = time.time()
        until(lambda: bool(hook[1]), lambda: hook[1])
        told = hook[1][0]
        assert time.time() - sent < 15.0
        assert (told["kind"], told["service"], told["over"]) == ("missing", other, False)
        assert f"10 messages that {other}-queue used to get did not come in 2 s" in told["why"]
        assert sorted(told["ids"]) == lost
        said, _ = watcher.communicate(timeout=60)
        counted = statsd.counts()
    assert watcher.returncode == 1
    assert [json.loads(line)["service"] for line in said.splitlines()] == [other]
    assert counted[f"{other}_watch_missing"] >= 1
    assert counted[f"{one}_watch_missing"] == 0


@pytest.mark.parametrize("kind", ["own_redis", "own_rabbitmq"])
def test_a_broker_that_went_and_came_back(
    request: pytest.FixtureRequest, tmp_path: Path, unique: str, kind: str
) -> None:
    """It sees nothing while the broker is away, and then again."""
    server = request.getfixturevalue(kind)
    url = f"sqlite:///{tmp_path}/events.db"
    with closing(open_event_log(url)) as log:
        log.append(Batch("w", 1, [Event("1", "started", unique, time.time() - 300, "receiver")]))
    watcher = Program(
        tmp_path / "said",
        ["-m", "idemp", "watch", "--every", "1s", "--json", "--service", unique],
        {"IDEMP_TRACKING": url, "IDEMP_TRANSPORT": server.url},
    )
    try:
        watcher.wait_for("never finished")

        def told() -> list[tuple[str, bool]]:
            lines = [json.loads(line) for line in watcher.said().splitlines()]
            return [(each["kind"], each["over"]) for each in lines if each["kind"] != "no consumer"]

        server.stop()
        until(lambda: told()[1:] == [("blind", False)], watcher.said)
        time.sleep(1.5)  # a look: what was wrong is not over because nobody sees it
        server.start()
        until(lambda: told()[1:] == [("blind", False), ("blind", True)], watcher.said)
        time.sleep(2.5)  # looks
        assert len(told()) == 3, watcher.said()
    finally:
        watcher.stop()


def test_a_connection_that_was_lost_between_two_looks(own_redis: Redis, tmp_path: Path, unique: str) -> None:
    """It is made anew for the same look."""
    with (
        closing(open_event_log(f"sqlite:///{tmp_path}/events.db")) as log,
        closing(open_transport(own_redis.url)) as broker,
    ):
        log.append(Batch("w", 1, [Event("1", "ok", unique, time.time(), "receiver", took=0.5)]))
        broker.connect()
        for _ in range(2):
            own_redis.stop()
            own_redis.start()
            assert "blind" not in {each.kind for each in _look(log, broker, LIMITS, ())}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--webhook", "ftp://x"), "--webhook ftp://x: write it like https://host/path."),
        (
            ("--transport", "amqp://guest:secret@127.0.0.1:9/"),
            "idemp: --transport (IDEMP_TRANSPORT): no broker",
        ),
        (("--every", "soon"), "is no duration"),
        (("--statsd", "localhost:port"), "--statsd: "),
    ],
)
def test_errors_are_one_sentence(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    """With exit code 2."""
    url = f"sqlite:///{tmp_path}/events.db"
    with closing(open_event_log(url)) as log:
        log.append(Batch("w", 1, []))
    done = finished("-m", "idemp", "watch", "--tracking", url, "--times", "1", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


# ------------------------------------------------------------------ Alice, Bob and Carl


@pytest.mark.parametrize("broker", ["memory", "rabbitmq"])
def test_u9_alice_bob_and_carl(request: pytest.FixtureRequest, tmp_path: Path, broker: str) -> None:
    """U4, U5, U9, U10: they talk, their flow is drawn, every story is found, and no secret is in the log."""
    url = request.getfixturevalue("amqp_url") if broker == "rabbitmq" else "memory://bots"
    done = finished("-m", "example1.bots", url, "3", f"sqlite:///{tmp_path}/bots.db")
    assert done.returncode == 0, done.stderr
    arrows = [f'"{a}" -> "{b}"' for a in ("alice", "bob", "carl") for b in ("alice", "bob", "carl") if a != b]
    assert [line.strip() for line in done.stdout.splitlines() if "->" in line] == arrows
    told = json.loads(done.stderr)
    settings = {"IDEMP_TRACKING": f"sqlite:///{tmp_path}/bots.db"}
    listed = finished("-m", "idemp", "events", "--limit", "100000", "--json", settings=settings)
    events = [json.loads(line) for line in listed.stdout.splitlines()]
    assert len(events) == told["recorded"]
    assert told["dropped"] == 0
    bodies = [event["body"] for event in events if "body" in event]
    assert bodies
    assert all("secret:<hidden>" in body for body in bodies)
    child = next(event for event in events if event["why"] == "reply")
    story = finished("-m", "idemp", "trace", child["uuid"], settings=settings)
    assert child["parent_uuid"] in story.stdout
    assert f"* {child['uuid']}" in story.stdout
