"""The house: imports go down only, drivers stay outside, names are whole, nothing connects at import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "words": [
        "idemp.errors",
        "idemp.message",
        "idemp.settings",
        "idemp.tls",
        "idemp.embedded",
        "idemp.held",
        "idemp.findings",
        "idemp.audit.messages",
        "idemp.audit.questions",
        "idemp.audit.tally",
        "idemp.audit.nodes",
        "idemp.causality",
    ],
    "ports": ["idemp.ports", "idemp.laws"],
    "heart": [
        "idemp.policy",
        "idemp.protocol",
        "idemp.inbox",
        "idemp.relay",
        "idemp.offloop",
        "idemp.once",
        "idemp.pipeline",
        "idemp.consumer",
        "idemp.reader",
        "idemp.resolve",
        "idemp.signals",
        "idemp.deeds",
        "idemp.dead",
        "idemp.audit",
        "idemp.tracking",
    ],
    "adapters": [
        "idemp.eventlogs",
        "idemp.stores",
        "idemp.transports",
        "idemp.metrics",
        "idemp.graphite",
        "idemp.rates",
        "idemp.redis_server",
        "idemp.audit.document",
        "idemp.audit.state",
        "idemp.audit.tallies",
    ],
    "faces": ["idemp.cli", "idemp.bars", "idemp.__main__", "svc", "example1", "example2"],
}
BELOW = {
    "words": {"words"},
    "ports": {"words", "ports"},
    "heart": {"words", "ports", "heart"},
    "adapters": {"words", "ports", "adapters"},
    "faces": {"words", "ports", "heart", "adapters", "faces"},
}
BESIDE = {
    ("idemp.eventlogs", "idemp.transports"),
    ("idemp.rates", "idemp.graphite"),
    ("idemp.audit.state", "idemp.stores.postgresql"),
    ("idemp.audit.state.postgresql", "idemp.stores.postgresql_errors"),
    ("idemp.audit.state.postgresql", "idemp.stores.postgresql_line"),
    ("idemp.stores", "idemp.redis_server"),
    ("idemp.stores.redis", "idemp.redis_server"),
    ("idemp.stores.redis_doctor", "idemp.redis_server"),
    ("idemp.transports", "idemp.redis_server"),
    ("idemp.transports.redis_streams", "idemp.redis_server"),
    ("idemp.transports.redis_log", "idemp.redis_server"),
}
"""Adapters that are of one technology, in two rooms; an event log that is a queue."""
DRIVERS = {
    "pika",
    "pyetcd",
    "grpc",
    "google",
    "redis",
    "psycopg",
    "statsd",
    "prometheus_client",
    "sqlite3",
    "yaml",
    "pymongo",
}


def modules() -> dict[str, Path]:
    """Every module of the product."""
    files = [file for top in ("idemp", "svc", "example1", "example2") for file in (ROOT / top).rglob("*.py")]
    return {module_name(file): file for file in files}


def module_name(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(module: str) -> str | None:
    """The floor that ``module`` stands on; the package itself is the front door, above them all.

    A room inside a room may stand on a floor of its own.
    """
    found = [(len(room), name) for name, rooms in FLOORS.items() for room in rooms if _within(module, room)]
    return max(found)[1] if found else None


def _within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def imported(file: Path) -> set[str]:
    """Whole names of what ``file`` imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down_only(module: str) -> None:
    """Adapters stand beside the heart, and never import each other's technology."""
    here = floor(module)
    known = modules()
    if module == "idemp":
        return
    assert here is not None, f"{module} stands on no floor; give it one"
    for name in imported(known[module]) & known.keys():
        if name == "idemp":
            assert here == "faces", f"{module} imports the front door"
            continue
        there = floor(name)
        assert there in BELOW[here], f"{module} ({here}) imports {name} ({there})"
        if here == "adapters" and there == "adapters":
            if (module, name) in BESIDE:
                continue
            room = ".".join(module.split(".")[:2])
            assert name.startswith(room), f"{module} imports another kind of adapter, {name}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_the_heart_imports_no_driver(module: str) -> None:
    """Nor does anything else but the adapter of that driver."""
    drivers = {name.split(".")[0] for name in imported(modules()[module])} & DRIVERS
    allowed = {
        "idemp.stores.sqlite": {"sqlite3"},
        "idemp.stores.sqlite_doctor": {"sqlite3"},
        "idemp.stores.sqlite_inbox": {"sqlite3"},
        "idemp.transports.sqlite": {"sqlite3"},
        "idemp.transports.sqlite_doctor": {"sqlite3"},
        "idemp.eventlogs.sqlite": {"sqlite3"},
        "idemp.eventlogs.postgresql": {"psycopg"},
        "idemp.eventlogs.mongodb": {"pymongo"},
        "idemp.transports.rabbitmq": {"pika"},
        "idemp.stores.etcd_client": {"pyetcd", "grpc", "google"},
        "idemp.stores.postgresql": {"psycopg"},
        "idemp.stores.postgresql_errors": {"psycopg"},
        "idemp.stores.postgresql_line": {"psycopg"},
        "idemp.stores.postgresql_batch": {"psycopg"},
        "idemp.stores.postgresql_handlers": {"psycopg"},
        "idemp.stores.postgresql_inbox": {"psycopg"},
        "idemp.stores.redis": {"redis"},
        "idemp.stores.redis_doctor": {"redis"},
        "idemp.stores.postgresql_doctor": {"psycopg"},
        "idemp.transports.redis_streams": {"redis"},
        "idemp.transports.redis_log": {"redis"},
        "idemp.redis_server": {"redis"},
        "idemp.metrics": {"statsd", "prometheus_client"},
        "idemp.embedded": {"sqlite3"},
        "idemp.audit.state.sqlite": {"sqlite3"},
        "idemp.audit.state.postgresql": {"psycopg"},
        "idemp.audit.tallies": {"sqlite3"},
        "idemp.audit.document": {"yaml"},
    }
    assert drivers <= allowed.get(module, set())


@pytest.mark.parametrize("module", sorted(modules()))
def test_every_module_says_what_room_it_is(module: str) -> None:
    """In its first line."""
    assert ast.get_docstring(ast.parse(modules()[module].read_text()))


def test_only_faces_read_the_environment() -> None:
    """Everything else is told."""
    for module, file in modules().items():
        if floor(module) != "faces":
            text = file.read_text().replace(
                'os.environ.setdefault("GRPC', ""
            )  # a driver is told, nothing read
            assert not re.search(r"\benviron\b|\bgetenv\b", text), f"{module} reads the environment"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_needs_no_extra_and_starts_nothing() -> None:
    """Without any driver installed, and without a thread or a socket."""
    code = f"""
import sys, threading, socket
for name in {sorted(DRIVERS - {"sqlite3"})!r}:
    sys.modules[name] = None
def refuse(*a, **k): raise AssertionError("a socket at import")
socket.socket.connect = refuse
import idemp, idemp.cli, svc.settings
store = idemp.open_store("sqlite:////nowhere/at/all.db")
transport = idemp.open_transport("sqlite:////nowhere/at/all.db")
print(threading.active_count())
"""
    assert run(code) == "1"


@pytest.mark.parametrize(
    ("open_it", "extra"),
    [
        ('open_transport("amqp://localhost")', "rabbitmq"),
        ('open_store("etcd://localhost/x")', "etcd"),
        ('open_store("postgresql://localhost/x")', "postgresql"),
        ('open_store("redis://localhost/0")', "redis"),
        ('open_transport("redis://localhost/0")', "redis"),
    ],
)
def test_a_missing_extra_is_one_sentence(open_it: str, extra: str) -> None:
    """With the line to type."""
    code = f"""
import sys
for name in ("pika", "grpc", "psycopg", "redis"):
    sys.modules[name] = None
import idemp
try:
    idemp.{open_it}
except idemp.ConfigError as error:
    print(error)
"""
    assert f"pip install 'idemp[{extra}]'" in run(code)
