"""The servers of the PostgreSQL and the Redis store, as the tests run them: alone, restarted, and gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.servers import PostgreSQL, Redis, need

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=["postgresql", "redis"])
def own(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"own_{request.param}")


def test_it_listens_on_the_loopback_address_only(own: Any) -> None:
    """Nobody else may reach it."""
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), own.port, socket.AF_INET)}
    for host in others - {"127.0.0.1"}:
        with socket.socket() as probe:
            probe.settimeout(2)
            assert probe.connect_ex((str(host), own.port)) != 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", own.port)) == 0


def test_what_it_took_outlasts_restart_and_kill(own_postgresql: PostgreSQL, own_redis: Redis) -> None:
    """On the same port."""
    own_postgresql.psql("CREATE TABLE kept (n int)")
    own_redis.call("SET", "kept", "yes")
    for server in (own_postgresql, own_redis):
        server.restart()
        server.kill()
        server.start()
    assert own_postgresql.psql("SELECT count(*) FROM kept") == "0"
    assert own_redis.call("GET", "kept") == "yes"


@pytest.mark.parametrize("kind", ["PostgreSQL", "Redis"])
def test_it_ends_with_its_run_however_that_ends(kind: str) -> None:
    """No process, no folder."""
    need(kind.lower())
    code = f"""
import time
from tests.servers import {kind}
server = {kind}()
server.start()
print(server.folder, flush=True)
time.sleep(600)
"""
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout is not None
        folder = Path(run.stdout.readline().strip())
        assert processes_of(folder)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()  # type: ignore[union-attr]
    end = time.monotonic() + 20
    while folder.exists() or processes_of(folder):
        assert time.monotonic() < end, processes_of(folder)
        time.sleep(0.05)


def processes_of(folder: Path) -> list[int]:
    """Whose working directory is in it: PostgreSQL's processes and Redis have theirs there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            place = os.readlink(process / "cwd").removesuffix(" (deleted)")
        except OSError:
            continue
        if Path(place).is_relative_to(folder):
            found.append(int(process.name))
    return found


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    """With what it said itself."""
    need("redis")
    need("postgresql")
    for server, says in (
        (Redis(options={"appendfsync": "perhaps"}), "appendfsync"),
        (PostgreSQL(options={"fsync": "perhaps"}), "fsync"),
    ):
        with pytest.raises(RuntimeError, match=says):
            server.start()
        server.close()
