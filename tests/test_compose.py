"""docker-compose.yaml and the Dockerfile, read: no Docker is needed.  `make compose-check` runs them."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from idemp import Consumer
from svc.settings import read
from tests.servers import RabbitMQ, free_port
from tests.service import ROOT, Stand, environment, stand

FILE = ROOT / "docker-compose.yaml"
STACK: dict[str, Any] = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = STACK["services"]
OURS = ("orders", "notify")
DOCKERFILE = re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text())
LINES = [line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
PINNED = re.compile(r"[a-z0-9./-]+:v?\d+\.\d+\.\d+[a-z0-9.-]*")
KNOWN = {
    *("build", "cap_drop", "depends_on", "environment", "healthcheck", "hostname", "image", "init", "ports"),
    *("read_only", "restart", "security_opt", "stop_grace_period", "tmpfs", "ulimits", "volumes"),
}


def said(word: str) -> list[str]:
    """What follows this word of the Dockerfile, each time."""
    return [line[1] for line in LINES if line[0] == word]


# ------------------------------------------------------------------ docker-compose.yaml


def composer() -> list[str]:
    """Docker Compose's command, if it is here; `make compose-check` is what needs it."""
    plugin = ["docker", "compose"]
    if shutil.which("docker") and subprocess.run([*plugin, "version"], capture_output=True).returncode == 0:
        return plugin
    return ["docker-compose"] if shutil.which("docker-compose") else []


if COMPOSE := composer():

    def test_compose_understands_it() -> None:
        """All of its words, as Compose itself reads them."""
        done = subprocess.run(
            [*COMPOSE, "config", "-q"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_it_has_the_servers_of_the_demo_and_both_services() -> None:
    """N9: all on 127.0.0.1, at the ports that everybody knows."""
    assert set(SERVICES) == {"rabbitmq", "etcd", "graphite", *OURS}
    known = {
        "rabbitmq": ["5672:5672", "15672:15672"],
        "etcd": ["2379:2379"],
        "graphite": ["80:80", "2003-2004:2003-2004", "2023-2024:2023-2024", "8125:8125/udp", "8126:8126"],
    }
    for name, service in SERVICES.items():
        assert service.get("ports", []) == [f"127.0.0.1:{port}" for port in known.get(name, ())]


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_pinned_watched_and_restarted(name: str) -> None:
    """And uses no word that Compose does not have."""
    service = SERVICES[name]
    assert service.keys() <= KNOWN
    assert PINNED.fullmatch(service["image"])
    assert service["restart"] == "unless-stopped"
    assert "build" in service or service["healthcheck"]["test"]
    assert said("HEALTHCHECK")


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_is_there(name: str) -> None:
    """Files of the checkout, which nothing may change, and volumes that have a name."""
    for volume in SERVICES[name].get("volumes", ()):
        source, *rest = volume.split(":")
        if source.startswith("."):
            assert (ROOT / source).is_file()
            assert rest[1:] == ["ro"]
        else:
            assert source in STACK["volumes"]


def test_all_of_graphites_configuration_is_mounted() -> None:
    """N9: a file that is forgotten is a retention that is not ours."""
    mounted = {volume.split(":")[0] for volume in SERVICES["graphite"]["volumes"] if volume[0] == "."}
    assert mounted == {f"./{file.relative_to(ROOT)}" for file in (ROOT / "assets/graphite").iterdir()}


def test_etcd_does_not_grow_for_ever() -> None:
    """Old revisions go, and there is a limit."""
    environment = SERVICES["etcd"]["environment"]
    assert environment["ETCD_AUTO_COMPACTION_MODE"] == "periodic"
    assert environment["ETCD_AUTO_COMPACTION_RETENTION"] == "1h"
    assert environment["ETCD_QUOTA_BACKEND_BYTES"] >= 2**31


def test_there_is_no_secret_in_it() -> None:
    """But the one that every RabbitMQ has, for this machine only."""
    assert set(re.findall(r"//(.*?)@", FILE.read_text())) == {"guest:guest"}
    assert not re.search("password|secret|token", FILE.read_text(), re.I)


@pytest.mark.parametrize("name", OURS)
def test_our_services_are_confined_and_may_finish(name: str) -> None:
    """N11: the engine waits longer than the service does for its handlers."""
    service = SERVICES[name]
    assert (service["read_only"], service["tmpfs"], service["cap_drop"]) == (True, "/tmp", ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    grace = inspect.signature(Consumer).parameters["grace"].default
    assert int(service["stop_grace_period"].removesuffix("s")) > grace
    healthy = {"condition": "service_healthy"}
    assert service["depends_on"] == {"rabbitmq": healthy, "etcd": healthy}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(("outside", "on"), [("true", True), ("", False), ("off", False)])
def test_our_services_understand_their_settings(name: str, outside: str, on: bool) -> None:
    """N1 N4: each has its own store; ENABLE_ETCD from outside turns it off."""
    settings = SERVICES[name]["environment"]
    assert settings["ENABLE_ETCD"] == "${ENABLE_ETCD-true}"
    understood = read({**settings, "ENABLE_ETCD": outside})
    assert understood.service == name
    assert understood.store == (f"etcd://etcd:2379/{name}" if on else None)
    assert (understood.transport, understood.statsd) == (
        "amqp://guest:guest@rabbitmq:5672/",
        "graphite:8125",
    )


# ------------------------------------------------------------------ the Dockerfile


def test_the_image_is_built_in_stages_from_a_pinned_base() -> None:
    """The last has what the others made, and not what they made it with."""
    first, *others = said("FROM")
    assert PINNED.fullmatch(first.removesuffix(" AS base"))
    assert others == ["base AS build", "base"]
    last = LINES[LINES.index(["FROM", "base"]) :]
    assert "RUN" not in [line[0] for line in last]


def test_the_image_is_not_root() -> None:
    """A number says so to whoever looks only at the image."""
    [user] = said("USER")
    assert all(int(each) > 0 for each in user.split(":"))


def test_the_image_has_what_is_locked_and_asks_nobody_else() -> None:
    """Hashes for what is fetched; after that, no index."""
    [fetch, install] = said("RUN")
    assert "--require-hashes" in fetch
    assert install.count("pip wheel ") == install.count("pip --python ") == 1
    assert install.count("--no-index") == 2
    extras = re.search(r"idemp\[(.*)\]", install)
    assert extras is not None
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"rabbitmq", "etcd", "statsd"} <= set(extras[1].split(",")) <= known.keys() - {"dev", "all"}


def test_the_builder_gets_what_it_copies_and_nothing_else() -> None:
    """`.dockerignore` is a list of what goes in."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    sent = {line[1:] for line in lines if line.startswith("!")}
    assert (lines[0], lines[-1]) == ("*", "**/__pycache__")
    copied = {name for line in said("COPY") if "--from" not in line for name in line.split()[:-1]}
    assert sent == copied
    assert all((ROOT / name).exists() for name in sent)


# ------------------------------------------------------------------ its health


@pytest.fixture
def desk(rabbitmq: RabbitMQ, tmp_path: Any) -> Iterator[Stand]:
    with stand(rabbitmq.url, tmp_path) as built:
        yield built


def healthy(port: int) -> bool:
    """What the image's HEALTHCHECK says."""
    [check] = said("HEALTHCHECK")
    _, program, code = json.loads(check.partition(" CMD ")[2])
    assert program == "-c"
    command = [sys.executable, "-c", code]
    settings = {"IDEMP_HEALTH_PORT": str(port)}
    return (
        subprocess.run(command, env=environment(settings), capture_output=True, check=False).returncode == 0
    )


def test_a_service_is_healthy_while_it_consumes(desk: Stand, unique: str) -> None:
    """Not before and not after."""
    port = free_port()
    assert not healthy(port)
    service = desk.service(unique, IDEMP_HEALTH_PORT=str(port))
    assert healthy(port)
    assert service.stop() == 0
    assert not healthy(port)


def test_the_image_says_where_its_health_is() -> None:
    """The port that the check asks."""
    assert "IDEMP_HEALTH_PORT=8080" in said("ENV")
