"""The README's demo on real servers, typed into a shell line by line: each says what the README says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.servers import Etcd, Graphite, RabbitMQ, Statsd, need
from tests.service import PATIENCE, ROOT, environment, until

README = (ROOT / "README.md").read_text()
SECTION = README.partition("\n## The demo on real servers\n")[2].partition("\n## ")[0]


class Typed(NamedTuple):
    """A command, and what is seen."""

    command: str
    seen: str


def typed(section: str = SECTION) -> list[Typed]:
    """The lines of the console: ``$`` and ``>`` begin what a person types."""
    lines = "".join(re.findall(r"^```console\n(.*?)^```", section, re.M | re.S))
    steps = re.findall(r"^\$ (.*\n(?:>.*\n)*)((?:[^$>].*\n)*)", lines, re.M)
    return [Typed(re.sub(r"^> ", "", command, flags=re.M), seen.rstrip("\n")) for command, seen in steps]


class Shell:
    """bash at work in a folder; `run` says what a command printed."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self._log = folder / "said"
        self._log.touch()
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                ["bash"],
                cwd=folder,
                env=environment(settings),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._number = 0

    def run(self, command: str) -> str:
        """Type it and wait until it is done."""
        assert self.process.stdin is not None
        self._number += 1
        begin, end = f"<begin {self._number}>\n", f"<end {self._number}>\n"
        self.process.stdin.write(f"echo '{begin[:-1]}'\n{command}\necho '{end[:-1]}'\n")
        self.process.stdin.flush()
        until(lambda: end in self._log.read_text(), self._log.read_text)
        return self._log.read_text().partition(begin)[2].partition(end)[0].rstrip("\n")

    def close(self) -> None:
        """The end of it and of everything that it started."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def shell(etcd: Etcd, unique: str, tmp_path: Path) -> Iterator[tuple[Shell, dict[str, str]]]:
    """A shell before the servers of the demo, and what in the README stands for theirs."""
    for server in ("rabbitmq", "carbon", "graphite-web", "statsd"):
        need(server)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, arguments in {"python": "", "idemp": "-m idemp "}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        (programs / name).chmod(0o755)
    with ExitStack() as stack:
        # Its own: the counters are the demo's, and nobody else's.
        broker = stack.enter_context(RabbitMQ(management=True))
        graphite = stack.enter_context(Graphite())
        statsd = stack.enter_context(Statsd(graphite.carbon_port))
        settings = {
            "IDEMP_TRANSPORT": broker.url,
            "IDEMP_STORE": f"{etcd.url}{unique}",
            "IDEMP_STATSD": statsd.address,
        }
        instead = {
            "$PWD/.venv/bin": str(programs),
            "/tmp/": f"{tmp_path}/",
            "localhost:80/": f"127.0.0.1:{graphite.port}/",
            "localhost:15672": f"127.0.0.1:{broker.management_port}",
            "localhost:5672": f"127.0.0.1:{broker.port}",
        }
        typist = Shell(tmp_path, settings)
        stack.callback(typist.close)
        yield typist, instead


def test_the_demo_on_real_servers(shell: tuple[Shell, dict[str, str]]) -> None:
    """N2 N3 N4 N5 N6 N9 N14 N15: fan-out, catch-up, the state off and on, a restart; three ways in."""
    typist, instead = shell
    anywhere = re.compile("|".join(re.escape(there) for there in instead))
    for typed_there, seen in typed():
        command = anywhere.sub(lambda found: instead[found[0]], typed_there)
        if command.startswith("docker compose "):
            continue
        end = time.monotonic() + PATIENCE
        said = typist.run(command)
        while said != seen and command.startswith(("counters\n", "grep ")) and time.monotonic() < end:
            time.sleep(0.5)
            said = typist.run(command)  # a person looks again
        assert said == seen, command


def test_what_docker_compose_is_asked_for() -> None:
    """The servers by the names they have; `test_compose` looks at those."""
    asked = [step.command.split() for step in typed() if step.command.startswith("docker compose ")]
    assert asked == [
        ["docker", "compose", "up", "-d", "--wait", "rabbitmq", "etcd", "graphite"],
        ["docker", "compose", "down", "--volumes"],
    ]


def test_the_demo_is_told_unattended() -> None:
    """`make demo STACK=real` runs what test_demo tests, on servers of its own."""
    assert "`make demo STACK=real`" in SECTION
    plan = ["make", "-n", "demo", "STACK=real"]
    done = subprocess.run(plan, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert "-m tests.demo\n" in done.stdout, done.stderr
