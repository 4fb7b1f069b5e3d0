"""The stores that the contract holds, and what each can be asked: later ones are added here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from idemp.ports import Store
from idemp.stores import open_store


@dataclass(frozen=True)
class Features:
    """shared: other processes reach it; sessions of its own then die one by one."""

    shared: bool


@dataclass(frozen=True)
class Backend:
    """A place where stores can be opened, empty at first.  ``open`` gives another session each time."""

    features: Features
    url: str
    open: Callable[..., Store]


def sqlite(folder: Path) -> Backend:
    """One file."""
    url = f"sqlite:///{folder}/seen.db"
    return Backend(Features(shared=True), url, lambda query="": open_store(url + query))


def memory(folder: Path) -> Backend:
    """One object, which is its own only session."""
    stores: dict[str, Store] = {}

    def opened(query: str = "") -> Store:
        return stores.setdefault("", open_store("memory://" + query))

    return Backend(Features(shared=False), "memory://", opened)


BACKENDS: dict[str, Callable[[Path], Backend]] = {"memory": memory, "sqlite": sqlite}
