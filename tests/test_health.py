"""Health of the sample service: ready only when caught up and consuming, live also without its servers."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from idemp import ConfigError, Consumer, open_transport
from idemp.ports import Clock
from svc.health import Health
from svc.settings import read
from tests.servers import Etcd, RabbitMQ, free_port
from tests.service import Program, Stand, finished, stand, until

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
from svc.__main__ import main
sys.exit(main())
"""


def ask(port: int, path: str) -> tuple[int, str]:
    """The status, and why."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, json.load(answer)["why"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["why"] if error.code == 503 else ""
    except OSError:
        return 0, ""


@pytest.fixture
def desk(own_rabbitmq: RabbitMQ, tmp_path: Path) -> Iterator[Stand]:
    """A broker that may be stopped."""
    with stand(own_rabbitmq.url, tmp_path) as built:
        yield built


def test_ready_follows_broker_and_store(
    desk: Stand, own_rabbitmq: RabbitMQ, own_etcd: Etcd, unique: str
) -> None:
    """Both there: ready.  One away: not ready, and why; live all the time; ready again by itself."""
    port = free_port()
    store = f"{own_etcd.url}{unique}?session=3s"
    service = desk.service(unique, IDEMP_STORE=store, IDEMP_HEALTH_PORT=str(port))
    assert (ask(port, "/ready"), ask(port, "/live")) == ((200, ""), (200, ""))
    assert ask(port, "/else")[0] == 404

    own_rabbitmq.stop()
    until(lambda: ask(port, "/ready") == (503, "the broker does not deliver"), lambda: ask(port, "/ready"))
    assert ask(port, "/live") == (200, "")
    own_rabbitmq.start()
    until(lambda: ask(port, "/ready") == (200, ""), lambda: ask(port, "/ready"))

    own_etcd.stop()
    until(lambda: ask(port, "/ready") == (503, "the store does not answer"), lambda: ask(port, "/ready"))
    assert ask(port, "/live") == (200, "")
    own_etcd.start()
    until(lambda: ask(port, "/ready") == (200, ""), lambda: ask(port, "/ready"))

    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(30) == 0
    assert ask(port, "/ready") == (0, "")


def test_it_answers_while_it_starts(desk: Stand, own_rabbitmq: RabbitMQ, unique: str) -> None:
    """Before store and broker are there: live, and not ready."""
    port = free_port()
    health = Health(port)
    try:
        assert (ask(port, "/ready"), ask(port, "/live")) == ((503, "it is starting"), (200, ""))
        health.consumer = Consumer(open_transport(f"memory://{unique}"), service=unique)
        assert ask(port, "/ready") == (503, "the broker does not deliver")
        with pytest.raises(ConfigError, match=f"port {port}: Address already in use"):
            Health(port)
    finally:
        health.close()


def test_a_loop_that_hangs_is_not_live(unique: str) -> None:
    """A minute without a turn; waiting for a broker is no hanging."""
    now = [0.0]
    health = Health(free_port())
    try:
        health.consumer = consumer = Consumer(
            open_transport(f"memory://{unique}"), service=unique, clock=Clock(steady=lambda: now[0])
        )
        assert health.live() == ""
        consumer._turned = 0.0
        now[0] = 61.0
        assert health.live() == "its loop has not turned for 61 s"
        consumer._turned = None
        assert health.live() == ""
    finally:
        health.close()


def test_the_setting(unique: str) -> None:
    """A port, or none; what is wrong is one sentence."""
    assert read({"SERVICE_NAME": "orders"}).health_port is None
    assert read({"SERVICE_NAME": "orders", "IDEMP_HEALTH_PORT": "8080"}).health_port == 8080
    done = finished("-m", "svc", settings={"SERVICE_NAME": "orders", "IDEMP_HEALTH_PORT": "x"})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "IDEMP_HEALTH_PORT='x': a port is a number from 1 to 65535" in done.stderr
    taken = Health(port := free_port())
    try:
        done = finished("-m", "svc", settings={"SERVICE_NAME": "orders", "IDEMP_HEALTH_PORT": str(port)})
        assert (done.returncode, "IDEMP_HEALTH_PORT: port" in done.stderr) == (2, True)
    finally:
        taken.close()


# ------------------------------------------------------------------ who connects and says nothing


@contextmanager
def silent(port: int, number: int) -> Iterator[list[socket.socket]]:
    """So many connections on which nobody says anything."""
    with ExitStack() as stack:
        found = []
        for _ in range(number):
            found.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10)))
            time.sleep(0.002)
        yield found


def burnt(program: Program) -> float:
    """Seconds of a processor that it has used."""
    fields = Path(f"/proc/{program.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(("files", "silences", "answers"), [(128, 200, True), (24, 14, False)])
def test_silent_connections_neither_hide_it_nor_keep_it_busy(
    tmp_path: Path, unique: str, files: int, silences: int, answers: bool
) -> None:
    """More of them than the process may have files; where not even the cap fits in, it does not spin."""
    port = free_port()
    with stand(f"sqlite:///{tmp_path}/queues.db", tmp_path) as desk:
        settings = {"IDEMP_STORE": desk.store, "IDEMP_HEALTH_PORT": str(port)}
        service = desk.service(unique, "-c", LIMITED, str(files), **settings)
        with silent(port, silences):
            if answers:
                assert ask(port, "/live") == (200, "")
            before = burnt(service)
            time.sleep(2.0)
            assert burnt(service) - before < 0.7
        until(lambda: ask(port, "/live") == (200, ""), service.said)
        assert "Traceback" not in service.said()


def test_who_says_nothing_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the time that it has to ask."""
    monkeypatch.setattr("svc.health.PATIENCE", 0.3)
    health = Health(port := free_port())
    try:
        with silent(port, 3) as found:
            assert [each.recv(1) for each in found] == [b""] * 3
        assert ask(port, "/live") == (200, "")
    finally:
        health.close()
