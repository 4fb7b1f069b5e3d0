"""The stores that the contract holds, and what each can be asked: later ones are added here."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from idemp.ports import Store
from idemp.stores import open_store


@dataclass(frozen=True)
class Backend:
    """A place where stores can be opened, empty at first.  ``open`` gives another session each time.

    shared: other processes reach it; sessions of its own then die one by one.
    forks_after_use: a process may use it, fork, and use it in the child.
    """

    url: str
    shared: bool
    open: Callable[..., Store]
    forks_after_use: bool = True


def sqlite(request: pytest.FixtureRequest, folder: Path) -> Backend:
    """One file."""
    url = f"sqlite:///{folder}/seen.db"
    return Backend(url, True, lambda query="": open_store(url + query), forks_after_use=False)


def memory(request: pytest.FixtureRequest, folder: Path) -> Backend:
    """One object, which is its own only session."""
    stores: dict[str, Store] = {}

    def opened(query: str = "") -> Store:
        return stores.setdefault("", open_store("memory://" + query))

    return Backend("memory://", False, opened)


def etcd(request: pytest.FixtureRequest, folder: Path) -> Backend:
    """A namespace of the shared cluster."""
    url = f"{request.getfixturevalue('etcd').url}{uuid.uuid4().hex[:12]}"
    return Backend(url, True, lambda query="": open_store(url + query), forks_after_use=False)


def postgresql(request: pytest.FixtureRequest, folder: Path) -> Backend:
    """A database of the shared server."""
    url = request.getfixturevalue("postgresql").database()
    return Backend(url, True, lambda query="": open_store(url + query))


def redis(request: pytest.FixtureRequest, folder: Path) -> Backend:
    """A database of the shared server."""
    url = request.getfixturevalue("redis").database()
    return Backend(url, True, lambda query="": open_store(url + query))


BACKENDS: dict[str, Callable[[pytest.FixtureRequest, Path], Backend]] = {
    "memory": memory,
    "sqlite": sqlite,
    "etcd": etcd,
    "postgresql": postgresql,
    "redis": redis,
}
SHARED = ("sqlite", "etcd", "postgresql", "redis")
