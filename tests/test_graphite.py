"""The demo with real servers: each number goes from a service through statsd and carbon to graphite-web."""

from __future__ import annotations

import json
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from idemp import Message
from idemp.ports import OUTCOMES, TIMERS
from tests.picture import COUNTERS, Story, draw, stack
from tests.servers import Etcd, Graphite, RabbitMQ, Statsd, free_port, need
from tests.servers.catalog import Server
from tests.service import Program, Stand, finished, stand, until
from tests.test_dashboards import DASHBOARDS, service_variable, targets
from tests.test_servers import processes_of

METHODS = {1: "average", 2: "sum", 3: "last", 4: "max", 5: "min"}
"""How whisper writes them."""


@pytest.fixture(scope="module")
def story(graphite: Graphite, statsd: Statsd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Told once, from the first start to the last stop."""
    need("rabbitmq")
    need("etcd")
    with stack(tmp_path_factory.mktemp("story"), graphite, statsd) as built:
        built.tell()
        yield built


# ------------------------------------------------------------------ the story


def test_the_story_is_in_graphite(story: Story) -> None:
    """N1-N6, N9: fan-out, catch-up, five times without a store, once with one, also after a kill."""
    assert story.counted == {
        "orders_new_order_ok": 8,
        "orders_new_order_skipped": 5,
        "notify_new_order_ok": 8,
        "notify_new_order_skipped": 5,
    }
    assert story.sums("-10min") == story.counted


def test_sums_stay_sums_when_they_are_older_than_an_hour(story: Story, graphite: Graphite) -> None:
    """N9: two hours are answered from the second archive, ten seconds a point, which carbon summed up."""
    # What is still in carbon's cache hides the rest of its ten seconds until it is written.
    until(lambda: story.sums("-2h") == story.counted, lambda: (story.sums("-2h"), story.counted))
    [points] = graphite.points("stats_counts.orders_new_order_ok", "-2h").values()
    assert all(at % 10 == 0 for at in points)


@pytest.mark.usefixtures("story")
def test_counters_begin_with_zero(graphite: Graphite) -> None:
    """N8: both services' counters are there before the first event; one second is one point."""
    for name in COUNTERS:
        [points] = graphite.points(f"stats_counts.{name}", "-10min").values()
        times = sorted(points)
        assert points[times[0]] == 0
        assert 1 in {later - earlier for earlier, later in pairwise(times)}


@pytest.mark.usefixtures("story")
@pytest.mark.parametrize(
    ("metric", "method"),
    [
        ("stats_counts.orders_new_order_ok", "sum"),
        ("stats_counts.orders_rejected", "sum"),
        ("stats.orders_new_order_ok", "average"),
        ("stats.timers.orders_handler.count", "sum"),
        ("stats.timers.orders_handler.sum_90", "sum"),
        ("stats.timers.orders_handler.upper", "max"),
        ("stats.timers.orders_handler.upper_99", "max"),
        ("stats.timers.orders_handler.lower", "min"),
        ("stats.timers.orders_handler.mean", "average"),
        ("stats.gauges.statsd.timestamp_lag", "last"),
    ],
)
def test_carbon_keeps_each_kind_as_it_should(graphite: Graphite, metric: str, method: str) -> None:
    """N9: 1 s for an hour, 10 s for 6 hours, a minute for 6 days, 10 minutes for 1800 days."""
    file = graphite.whisper / (metric.replace(".", "/") + ".wsp")
    until(file.exists, lambda: file)
    content = file.read_bytes()[:64]
    kind, longest, factor, archives = struct.unpack_from("!2LfL", content)
    kept = [struct.unpack_from("!3L", content, 16 + 12 * n)[1:] for n in range(archives)]
    assert METHODS[kind] == method
    assert factor == 0
    assert [(step, step * points) for step, points in kept] == [
        (1, 3600),
        (10, 6 * 3600),
        (60, 6 * 86400),
        (600, 1800 * 86400),
    ]
    assert longest == 1800 * 86400


def test_the_picture_is_drawn(story: Story, graphite: Graphite) -> None:
    """N9: graphite-web makes the PNG of the README."""
    picture = draw(graphite, story.began, int(time.time()))
    assert picture.startswith(b"\x89PNG\r\n")
    assert struct.unpack_from("!2L", picture, 16) == (900, 320)
    assert len(picture) > 5000


@pytest.mark.usefixtures("story")
@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_graph_of_a_dashboard_shows_something(graphite: Graphite, name: str) -> None:
    """N9: after the story no target is empty, and none is a mistake."""
    for target in targets(name, service="orders"):
        assert any(graphite.points(target, "-10min").values()), target


@pytest.mark.usefixtures("story")
def test_grafana_finds_the_services(graphite: Graphite) -> None:
    """Its variable lists them, whole names."""
    query, regex = service_variable()
    found = [node["text"] for node in json.loads(graphite.get("metrics/find", query=query))]
    assert {"orders", "notify"} <= {match[1] for text in found if (match := regex.fullmatch(text))}


@pytest.mark.usefixtures("story")
def test_the_table_of_names_is_what_a_service_sends(graphite: Graphite) -> None:
    """N8: every outcome of every type is there from the start; nothing else is sent."""

    def sent(query: str) -> set[str]:
        return {node["text"] for node in json.loads(graphite.get("metrics/find", query=query))}

    counters = {f"orders_{kind}_{outcome}" for kind in ("new_order", "ban_user") for outcome in OUTCOMES}
    assert sent("stats_counts.orders_*") == {*counters, "orders_rejected"}
    assert sent("stats.timers.orders_*") == {f"orders_{timer}" for timer in TIMERS}


def test_graphite_takes_its_dashboard(graphite: Graphite) -> None:
    """Saved and loaded through its own API."""
    state = DASHBOARDS["graphite"].read_text()
    assert graphite.post("dashboard/save/idemp", state=state) == {"success": True}
    assert json.loads(graphite.get("dashboard/load/idemp"))["state"] == json.loads(state)


# ------------------------------------------------------------------ SIGTERM

SLOW = """
import os, sys, time
from svc.__main__ import main

def new_order(message):
    with open(os.environ["EFFECTS"], "a") as effects:
        print(message.id, file=effects)
    time.sleep(0.01)

sys.exit(main({"new_order": new_order}))
"""


def test_sigterm_loses_nothing(
    rabbitmq: RabbitMQ, etcd: Etcd, graphite: Graphite, statsd: Statsd, unique: str, tmp_path: Path
) -> None:
    """N11: stopped twice in the middle of the work: each event has one effect, and Graphite counted each."""
    effects = tmp_path / "effects"
    effects.touch()
    settings = {
        "SERVICE_NAME": unique,
        "IDEMP_TRANSPORT": rabbitmq.url,
        "IDEMP_STORE": f"{etcd.url}{unique}",
        "IDEMP_STATSD": statsd.address,
        "EFFECTS": str(effects),
    }

    def done() -> int:
        return effects.read_text().count("\n")

    def counted() -> float:
        found = graphite.points(f"stats_counts.{unique}_*_ok", "-10min")
        return sum(sum(points.values()) for points in found.values())

    def until_done(n: int) -> None:
        until(lambda: done() >= n, done)

    events = [Message(str(uuid4()), "new_order") for _ in range(900)]
    with stand(rabbitmq.url, tmp_path) as desk, ExitStack() as ends:
        for start, enough in enumerate((200, 500, 900)):
            program = Program(tmp_path / f"service-{start}", ["-c", SLOW], settings)
            ends.callback(program.stop, signal.SIGKILL)
            program.wait_for(f"{unique}: ready")
            if start == 0:
                desk.publish(*events)
            until_done(enough)
            began = time.monotonic()
            assert program.stop() == 0, program.said()
            assert time.monotonic() - began < 30  # the grace time
            assert enough == 900 or done() < 900
    assert sorted(effects.read_text().split()) == sorted(event.id for event in events)
    until(lambda: counted() == len(events), counted)


# ------------------------------------------------------------------ a server is away


@pytest.fixture
def desk(own_rabbitmq: RabbitMQ, tmp_path: Path) -> Iterator[Stand]:
    """With a broker that may be stopped."""
    with stand(own_rabbitmq.url, tmp_path) as built:
        yield built


def test_a_service_says_that_it_waits_for_its_broker(
    own_rabbitmq: RabbitMQ, etcd: Etcd, desk: Stand, unique: str
) -> None:
    """N16: one sentence, and it goes on by itself."""
    service = desk.service(unique, IDEMP_STORE=f"{etcd.url}{unique}")
    own_rabbitmq.stop()
    service.wait_for("; connecting again")
    own_rabbitmq.start()
    desk.publish(Message("1", "new_order"))
    desk.counted(**{f"{unique}_new_order_ok": 1})
    assert service.said().count(" WARNING ") == 1, service.said()


def test_a_service_says_that_it_waits_for_its_store(own_etcd: Etcd, desk: Stand, unique: str) -> None:
    """N16: one sentence; nothing runs meanwhile, and it goes on by itself."""
    service = desk.service(unique, IDEMP_STORE=f"{own_etcd.url}{unique}")
    own_etcd.stop()
    desk.publish(Message("1", "new_order"))
    service.wait_for("no store, so nothing runs: etcd at ")
    assert desk.statsd.counts()[f"{unique}_new_order_ok"] == 0
    own_etcd.start()
    desk.counted(**{f"{unique}_new_order_ok": 1})
    assert service.said().count("no store, so nothing runs") == 1, service.said()


@pytest.mark.parametrize("away", ["IDEMP_TRANSPORT", "IDEMP_STORE"])
def test_without_its_servers_a_service_does_not_start(rabbitmq: RabbitMQ, etcd: Etcd, away: str) -> None:
    """One sentence and exit code 2: whoever started it may start it again."""
    nobody = f"127.0.0.1:{free_port()}"
    urls: dict[str, Any] = {"IDEMP_TRANSPORT": rabbitmq.url, "IDEMP_STORE": f"{etcd.url}x"}
    urls[away] = f"{urls[away].split(':')[0]}://{nobody}/x"
    done = finished("-m", "svc", settings={"SERVICE_NAME": "orders", **urls})
    assert done.returncode == 2
    [said] = done.stderr.splitlines()
    assert said.startswith(f"svc: {away}: ")
    assert nobody in said


# ------------------------------------------------------------------ the servers themselves


def test_ended_they_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process, no file."""
    need("carbon")
    need("graphite-web")
    need("statsd")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Graphite() as graphite, Statsd(graphite.carbon_port):
        if Path("/proc/self/environ").exists():
            assert len(processes_of(tmp_path)) >= 3
    until(lambda: not processes_of(tmp_path), lambda: processes_of(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("server", [Graphite, lambda: Statsd(free_port())], ids=["graphite", "statsd"])
def test_one_that_cannot_start_says_why(
    server: Callable[[], Graphite | Statsd], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the last that it said."""
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no luck today\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(Server, "path", lambda self: str(broken))
    with pytest.raises(RuntimeError, match="no luck today"), server():
        pass
