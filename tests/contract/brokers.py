"""The brokers that the contract holds, and what each can be asked: later ones are added here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from idemp.ports import Transport
from idemp.transports import open_transport


@dataclass(frozen=True)
class Features:
    """shared: other processes reach it.  server: it can be killed, and a connection to it be lost.

    forks_after_use: a process may use it, fork, and use it in the child.
    """

    shared: bool
    server: bool
    forks_after_use: bool = True


@dataclass(frozen=True)
class Broker:
    """A broker, perhaps with other tests' queues in it.  ``nowhere``: a URL where none can be."""

    features: Features
    url: str
    nowhere: str

    def open(self) -> Transport:
        """Another connection each time."""
        return open_transport(self.url)


def memory(request: pytest.FixtureRequest, folder: Path) -> Broker:
    """One process."""
    return Broker(FEATURES["memory"], f"memory://{folder.name}-{id(folder)}", "memory://nowhere")


def sqlite(request: pytest.FixtureRequest, folder: Path) -> Broker:
    """One file; a consumer that is killed is missed soon."""
    url = f"sqlite:///{folder}/queues.db?visibility=2s"
    return Broker(FEATURES["sqlite"], url, f"sqlite:///{folder}/none/queues.db")


def rabbitmq(request: pytest.FixtureRequest, folder: Path) -> Broker:
    """The one that the run shares."""
    url = request.getfixturevalue("rabbitmq").url
    return Broker(FEATURES["rabbitmq"], url, "amqp://127.0.0.1:1/")


def redis_streams(request: pytest.FixtureRequest, folder: Path) -> Broker:
    """The server that the run shares; a consumer that is killed is missed soon."""
    url = request.getfixturevalue("redis").url
    return Broker(FEATURES["redis_streams"], f"{url}?idle=5s", "redis://127.0.0.1:1/0")


FEATURES = {
    "memory": Features(shared=False, server=False),
    "sqlite": Features(shared=True, server=False, forks_after_use=False),
    "rabbitmq": Features(shared=True, server=True),
    "redis_streams": Features(shared=True, server=True),
}
BROKERS: dict[str, Callable[[pytest.FixtureRequest, Path], Broker]] = {
    "memory": memory,
    "sqlite": sqlite,
    "rabbitmq": rabbitmq,
    "redis_streams": redis_streams,
}
OWN_SERVERS = {"rabbitmq": "own_rabbitmq", "redis_streams": "own_redis"}
"""The fixture that gives a server which a test may kill."""
