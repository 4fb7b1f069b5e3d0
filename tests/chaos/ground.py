"""What the consumers of a run remember in: the servers of one store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from idemp.stores.etcd_client import Client
from tests.chaos import dump
from tests.chaos.schedule import STORES
from tests.reliability.checker import Change
from tests.servers import Etcd, PostgreSQL, Redis
from tests.servers.postgresql import url_of

NAMESPACE = "chaos"
SESSION = 3.0
"""Seconds of silence after which a consumer's claims are in doubt."""


class Ground(ABC):
    """Started by `with`; nothing of it is left at the end."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._stack.close()

    @abstractmethod
    def start(self, stack: ExitStack) -> None:
        """Start the servers; ``stack`` ends them."""

    @abstractmethod
    def ports(self) -> Sequence[int]:
        """Of each server."""

    @abstractmethod
    def url(self, ports: Sequence[int]) -> str:
        """The store's URL, by these ports instead of its servers' own."""

    def changes(self) -> list[Change] | None:
        """What the store itself says that it applied, in its order; None if it keeps no journal."""
        return None


class OnEtcd(Ground):
    """Three members."""

    def start(self, stack: ExitStack) -> None:
        """See `Ground`."""
        self.cluster = stack.enter_context(Etcd(members=3))
        self.admin = Client(self.cluster.endpoints)
        stack.callback(self.admin.close)

    def ports(self) -> Sequence[int]:
        """See `Ground`."""
        return [member.port for member in self.cluster.members]

    def url(self, ports: Sequence[int]) -> str:
        """See `Ground`."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        return f"etcd://{hosts}/{NAMESPACE}?session={SESSION:.0f}s"

    def changes(self) -> list[Change] | None:
        """See `Ground`."""
        return dump.changes(self.cluster.endpoints, NAMESPACE)


class OnPostgresql(Ground):
    """One server."""

    def start(self, stack: ExitStack) -> None:
        """See `Ground`."""
        self.server = stack.enter_context(PostgreSQL())

    def ports(self) -> Sequence[int]:
        """See `Ground`."""
        return [self.server.port]

    def url(self, ports: Sequence[int]) -> str:
        """See `Ground`."""
        return f"{url_of(ports[0])}?namespace={NAMESPACE}&session={SESSION:.0f}s"


class OnRedis(Ground):
    """One server."""

    def start(self, stack: ExitStack) -> None:
        """See `Ground`."""
        self.server = stack.enter_context(Redis())

    def ports(self) -> Sequence[int]:
        """See `Ground`."""
        return [self.server.port]

    def url(self, ports: Sequence[int]) -> str:
        """See `Ground`."""
        return f"redis://127.0.0.1:{ports[0]}/0?namespace={NAMESPACE}&session={SESSION:.0f}s"


GROUNDS: Mapping[str, Callable[[], Ground]] = dict(zip(STORES, (OnEtcd, OnPostgresql, OnRedis), strict=True))
