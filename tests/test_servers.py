"""The servers themselves: they start apart, come back with their data, and never outlive the run."""

import base64
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pika
import pytest

from tests.servers import Etcd, RabbitMQ, __main__, container, free_port, install, need
from tests.servers.catalog import SERVERS, Server

ROOT = Path(__file__).parents[1]


def wait_until(condition: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def open_at(host: str, port: int) -> bool:
    code = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)"
    return subprocess.run([sys.executable, "-c", code, host, str(port)], capture_output=True).returncode == 0


def put(broker: RabbitMQ, queue: str, body: bytes) -> None:
    with pika.BlockingConnection(pika.URLParameters(broker.url)) as connection:
        channel = connection.channel()
        channel.queue_declare(queue, durable=True)
        channel.confirm_delivery()
        channel.basic_publish("", queue, body, pika.BasicProperties(delivery_mode=2))


def peek(broker: RabbitMQ, queue: str) -> bytes | None:
    """The first message, left where it is: an acknowledgement might not outlast a kill."""
    with pika.BlockingConnection(pika.URLParameters(broker.url)) as connection:
        body: bytes | None = connection.channel().basic_get(queue)[2]
        return body


def test_the_shared_broker_carries_messages(rabbitmq: RabbitMQ, amqp_url: str, unique: str) -> None:
    assert rabbitmq.url == amqp_url
    put(rabbitmq, unique, b"hello")
    assert peek(rabbitmq, unique) == b"hello"


def test_a_broker_listens_on_the_loopback_address_only(rabbitmq: RabbitMQ) -> None:
    assert open_at("127.0.0.1", rabbitmq.port)
    assert not open_at("127.0.0.2", rabbitmq.port)


def test_what_is_durable_outlasts_restart_and_kill(
    own_rabbitmq: RabbitMQ, rabbitmq: RabbitMQ, unique: str
) -> None:
    url = own_rabbitmq.url
    put(own_rabbitmq, unique, b"hello")

    own_rabbitmq.restart()
    assert peek(own_rabbitmq, unique) == b"hello"

    own_rabbitmq.kill()
    assert not open_at("127.0.0.1", own_rabbitmq.port)
    assert open_at("127.0.0.1", rabbitmq.port), "only its own processes"

    own_rabbitmq.start()
    assert own_rabbitmq.url == url
    assert peek(own_rabbitmq, unique) == b"hello"


def test_the_management_plugin_is_there_when_asked_for(own_rabbitmq: RabbitMQ) -> None:
    with pytest.raises(ValueError, match="management=True"):
        _ = own_rabbitmq.management_url
    with RabbitMQ(management=True) as broker:
        page = broker.management_url.replace("guest:guest@", "")
        with urllib.request.urlopen(page, timeout=10) as answer:
            assert b"RabbitMQ" in answer.read()


def test_free_ports_are_given_once() -> None:
    ports = [free_port() for _ in range(200)]
    assert len(set(ports)) == len(ports)


# ------------------------------------------------------------------ the end


def processes_of(folder: Path) -> list[str]:
    """Every process with this folder in its environment: what a server starts inherits it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if bytes(folder) in (process / "environ").read_bytes():
                found.append((process / "comm").read_text().strip())
        except OSError:
            continue  # it ended while we looked
    return found


@pytest.fixture
def run_with_broker(tmp_path: Path) -> subprocess.Popen[str]:
    """Another test run, in the middle of it: it has a broker, in tmp_path, and prints the broker's port."""
    need("rabbitmq")
    code = (
        "import time; from tests.servers import RabbitMQ;"
        "b = RabbitMQ(); b.start(); print(b.port, flush=True); time.sleep(600)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_broker_ends_with_its_run_however_that_ends(
    run_with_broker: subprocess.Popen[str], tmp_path: Path, how: signal.Signals
) -> None:
    with run_with_broker as run:
        assert run.stdout is not None
        port = int(run.stdout.readline())
        assert open_at("127.0.0.1", port)
        if SERVERS["rabbitmq"].path() and Path("/proc/self/environ").exists():
            assert {"beam.smp", "epmd"} <= set(processes_of(tmp_path))

        run.send_signal(how)

        assert run.wait(timeout=10) == -how
    wait_until(lambda: not open_at("127.0.0.1", port))
    wait_until(lambda: not processes_of(tmp_path))
    wait_until(lambda: not list(tmp_path.iterdir()))


@pytest.mark.parametrize("end", [RabbitMQ.stop, RabbitMQ.kill, RabbitMQ.close])
def test_an_ended_broker_leaves_no_process(
    end: Callable[[RabbitMQ], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("rabbitmq")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with RabbitMQ() as broker:
        end(broker)
        assert not open_at("127.0.0.1", broker.port)
        wait_until(lambda: not processes_of(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_broker_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "rabbitmq-server"
    broken.write_text("#!/bin/sh\necho no luck today\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(Server, "path", lambda self: str(broken))
    with pytest.raises(RuntimeError, match="no luck today"), RabbitMQ():
        pass


# ------------------------------------------------------------------ the way here


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the servers, and without a way to have them."""
    monkeypatch.setattr(Server, "path", lambda self: None)
    monkeypatch.setattr(container, "has_image", lambda image: False)
    monkeypatch.setattr(container, "pull", lambda image: False)
    monkeypatch.setattr(install, "_apt_install", lambda server: False)
    monkeypatch.setattr(install, "_npm_install", lambda: False)


@pytest.mark.usefixtures("bare_machine")
def test_a_missing_server_skips_on_a_laptop_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="make servers"):
        need("rabbitmq")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="make servers"):
        need("rabbitmq")


@pytest.mark.usefixtures("bare_machine")
def test_make_servers_says_in_one_sentence_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main() == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == len(SERVERS)
    assert "rabbitmq: install rabbitmq-server" in said.err


@pytest.mark.parametrize("before", [None, "#!/bin/sh\nexit 0\n"])
def test_an_installation_starts_no_service(tmp_path: Path, before: str | None) -> None:
    policy = tmp_path / "policy-rc.d"
    if before is not None:
        policy.write_text(before)
    with install.services_stay_down(policy):
        assert subprocess.run([policy], check=False).returncode == 101
    assert (policy.read_text() if policy.exists() else None) == before
    assert len(list(tmp_path.iterdir())) == (before is not None)


# ------------------------------------------------------------------ etcd


def ask(etcd: Etcd, path: str, **texts: str) -> dict[str, Any]:
    """Its JSON gateway wants keys and values in base 64."""
    coded: dict[str, Any] = {name: base64.b64encode(text.encode()).decode() for name, text in texts.items()}
    answer: dict[str, Any] = etcd.members[0].call(path, **coded)
    return answer


def value(etcd: Etcd, key: str) -> str:
    return base64.b64decode(ask(etcd, "/v3/kv/range", key=key)["kvs"][0]["value"]).decode()


def test_etcd_listens_on_the_loopback_address_only(etcd: Etcd) -> None:
    assert etcd.url == f"etcd://127.0.0.1:{etcd.members[0].port}/"
    assert open_at("127.0.0.1", etcd.members[0].port)
    assert not open_at("127.0.0.2", etcd.members[0].port)


def test_what_etcd_took_outlasts_restart_and_kill(own_etcd: Etcd, etcd: Etcd) -> None:
    ask(own_etcd, "/v3/kv/put", key="a", value="hello")
    own_etcd.restart()
    assert value(own_etcd, "a") == "hello"
    own_etcd.kill()
    assert not open_at("127.0.0.1", own_etcd.members[0].port)
    assert etcd.members[0].serves(), "only its own processes"
    own_etcd.start()
    assert value(own_etcd, "a") == "hello"


def test_members_of_a_cluster_die_pause_and_come_back() -> None:
    need("etcd")
    with Etcd(members=3) as cluster:
        first = cluster.leader()
        cluster.members[first].kill()
        second = cluster.leader()
        assert second != first
        cluster.members[first].start()
        cluster.members[second].pause()
        wait_until(lambda: cluster.leader() != second, seconds=30)
        cluster.members[second].resume()
        wait_until(lambda: all(member.serves() for member in cluster.members))
        cluster.kill()
        cluster.start()
        assert cluster.url == f"etcd://{','.join(cluster.endpoints)}/"


@pytest.mark.parametrize("paused", [False, True])
def test_etcd_ends_with_its_run_also_when_it_is_paused(tmp_path: Path, paused: bool) -> None:
    need("etcd")
    code = (
        "import sys, time; from tests.servers import Etcd;"
        "e = Etcd(); e.start(); sys.argv[1:] and e.members[0].pause();"
        "print(e.members[0].port, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, *(["pause"] if paused else [])],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout is not None
        port = int(run.stdout.readline())
        if SERVERS["etcd"].path() and Path("/proc/self/environ").exists():
            assert "etcd" in processes_of(tmp_path)
        run.kill()
    wait_until(lambda: not open_at("127.0.0.1", port))
    wait_until(lambda: not processes_of(tmp_path))
    wait_until(lambda: not list(tmp_path.iterdir()))


@pytest.mark.parametrize("end", [Etcd.stop, Etcd.kill, Etcd.close])
def test_an_ended_etcd_leaves_no_process_also_when_it_was_paused(
    end: Callable[[Etcd], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("etcd")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Etcd() as etcd:
        etcd.members[0].pause()
        end(etcd)
        wait_until(lambda: not processes_of(tmp_path))
    assert not list(tmp_path.iterdir())


def test_an_etcd_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "etcd"
    broken.write_text("#!/bin/sh\necho no luck today\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(Server, "path", lambda self: str(broken))
    with pytest.raises(RuntimeError, match="no luck today"), Etcd():
        pass


@pytest.mark.usefixtures("bare_machine")
def test_a_cluster_of_containers_is_refused() -> None:
    with pytest.raises(RuntimeError, match="needs etcd itself"):
        Etcd(members=3)
