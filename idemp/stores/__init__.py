"""The door to the stores.  A driver is imported when its URL is opened, and connects at first use."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote

from idemp.errors import ConfigError
from idemp.ports import Store
from idemp.settings import duration, hidden, namespace_in, options, split, sqlite_path, switch
from idemp.tls import FILES

RETENTION = 24 * 3600.0
"""Seconds that done is remembered unless the URL says otherwise."""
SESSION = 10.0
"""Seconds without a heartbeat after which a session is dead, unless the URL says otherwise."""

_PORT = re.compile(r":\d+$")  # not the end of an IPv6, which is in brackets
_OPTIONS = {"retention": "24h", "session": "10s"}
_ETCD = {"tls": "true", **FILES, "seed_layout": "1"}
_SERVER = {"namespace": "orders", "unsafe_durability": "true"}
_POSTGRESQL = {**_SERVER, "sslmode": "verify-full", **FILES}
_REDIS = {**_SERVER, **FILES}
_OF = {
    "etcd": _ETCD,
    "postgresql": _POSTGRESQL,
    "postgres": _POSTGRESQL,
    "redis": _REDIS,
    "rediss": _REDIS,
    "sqlite": {},
    "memory": {},
}


def open_store(url: str) -> Store:
    """The store at ``url``; nothing connects before its first use.

    ``sqlite:///seen.db`` (``sqlite:////absolute/seen.db``), ``memory://`` for one process,
    ``etcd://host1:2379,host2:2379/namespace``, there with ``user:password@`` and the options ``tls``,
    ``ca``, ``cert`` and ``key`` (files); ``seed_layout=1`` writes ``/service/<namespace>/<id>`` too;
    ``postgresql://user:password@host/database?namespace=orders``, with ``sslmode``, ``ca``, ``cert`` and
    ``key``; or ``redis://host/0?namespace=orders`` (``rediss://`` for TLS).  The last two refuse a server
    that may forget what it confirmed, unless ``unsafe_durability=true`` says that it may.
    ``?retention=24h`` says how long done is remembered; the longest that any opener named is in
    force.  ``?session=10s`` says how long a process may be silent before its claims are in doubt.
    Raises `ConfigError`.
    """
    parts = split(url)
    if parts.scheme not in _OF:
        offer = (
            "sqlite:///seen.db, postgresql://host/database, redis://host, etcd://host/namespace or memory://"
        )
        raise ConfigError(f"there is no store for {hidden(url)!r}; use {offer}")
    found = options(parts, {**_OPTIONS, **_OF[parts.scheme]})
    retention = duration(found["retention"], "retention") if "retention" in found else None
    session = duration(found["session"], "session") if "session" in found else SESSION
    if parts.scheme == "memory":
        from idemp.stores.memory import MemoryStore

        return MemoryStore(retention=retention or RETENTION)
    if parts.scheme == "etcd":
        return _etcd(parts, found, retention or RETENTION, session)
    if parts.scheme in ("postgresql", "postgres"):
        from idemp.stores.postgresql import PostgresqlStore

        return PostgresqlStore(postgresql_of(url), retention=retention or RETENTION, session_ttl=session)
    if parts.scheme in ("redis", "rediss"):
        from idemp.stores.redis import RedisStore

        return RedisStore(redis_of(url), retention=retention or RETENTION, session_ttl=session)
    from idemp.stores.sqlite import SqliteStore

    return SqliteStore(sqlite_path(parts), retention=retention or RETENTION, session_ttl=session)


def init_store(url: str, grant: str = "") -> str:
    """Make what the store at ``url`` needs before its first use; what was done, in a sentence.

    Only PostgreSQL's tables need it: when the services' own user may not make them, or for a new version
    of idemp.  ``grant``: the role that the services use, which gets the rights on them.  Raises
    `ConfigError`, `StoreUnavailable`.
    """
    parts = split(url)
    if parts.scheme not in ("postgresql", "postgres"):
        if grant:
            raise ConfigError(f"--grant is for PostgreSQL's tables; {parts.scheme}:// has none")
        with closing(open_store(url)) as store:
            store.apply([])
        return "it is ready"
    from idemp.stores.postgresql import init

    new = init(postgresql_of(url), grant)
    made = f"its tables are at version {new[-1]} now" if new else "its tables were there already"
    return f"{made}; {grant} may use them" if grant else made


def check_exists(url: str) -> None:
    """Raise `ConfigError` if there is no store at ``url`` yet: to look at one must not make it."""
    parts = split(url)
    if parts.scheme == "sqlite":
        from idemp.stores.sqlite import exists as in_sqlite

        if not Path(path := sqlite_path(parts)).exists():
            raise ConfigError(f"there is no file {path}; name the store that the service uses")
        if not in_sqlite(path):
            raise ConfigError(f"{path} has no store in it; name the file that the service uses as one")
    if (namespace := _missing_namespace(url, parts.scheme)) is not None:
        raise ConfigError(
            f"{hidden(url)} has no namespace {namespace!r}; name the store that the service uses"
        )


def _missing_namespace(url: str, scheme: str) -> str | None:
    """The namespace that ``url`` names, if its server has none of that name."""
    match scheme:
        case "etcd":
            from idemp.stores.etcd_replica import Layout

            endpoints, connect, name = etcd_of(url)
            with closing(connect(endpoints)) as client:
                return None if client.range(Layout(name).bucket).pairs else name
        case "postgresql" | "postgres":
            from idemp.stores.postgresql import exists as in_postgresql

            place = postgresql_of(url)
            return None if in_postgresql(place) else str(place.namespace)
        case "redis" | "rediss":
            from idemp.stores.redis import exists as in_redis

            server = redis_of(url)
            return None if in_redis(server) else str(server.namespace)
    return None


def namespace_of(url: str) -> str:
    """What a store at ``url`` calls the place where its keys are: a file, or a name on a server."""
    parts = split(url)
    match parts.scheme:
        case "sqlite":
            return sqlite_path(parts)
        case "etcd":
            return etcd_of(url)[2]
        case "postgresql" | "postgres" | "redis" | "rediss":
            return namespace_in(options(parts, {**_OPTIONS, **_OF[parts.scheme]}))
    return parts.scheme


def postgresql_of(url: str) -> Any:
    """The namespace that ``url`` names: a `Place` of postgresql_line.py."""
    from idemp.stores.postgresql import place

    parts = split(url)
    found = options(parts, {**_OPTIONS, **_POSTGRESQL})
    return place(parts, found, namespace_in(found))


def redis_of(url: str) -> Any:
    """The namespace that ``url`` names: a `Server` of redis_server.py."""
    from idemp.redis_server import server

    parts = split(url)
    found = options(parts, {**_OPTIONS, **_REDIS})
    return server(parts, found, namespace_in(found))


def etcd_of(url: str) -> tuple[list[str], Callable[[list[str]], Any], str]:
    """The members that ``url`` names, what makes a client of some of them, and the namespace."""
    parts = split(url)
    return _etcd_parts(parts, options(parts, {**_OPTIONS, **_ETCD}))


def _etcd(parts: SplitResult, found: Mapping[str, str], retention: float, session: float) -> Store:
    from idemp.stores.etcd import EtcdStore

    endpoints, connect, namespace = _etcd_parts(parts, found)
    seed_layout = switch(found.get("seed_layout", ""))
    client = partial(connect, endpoints)
    return EtcdStore(client, namespace, retention=retention, session_ttl=session, seed_layout=seed_layout)


def _etcd_parts(
    parts: SplitResult, found: Mapping[str, str]
) -> tuple[list[str], Callable[[list[str]], Any], str]:
    from idemp.stores.etcd_client import Client

    login, _, hosts = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    namespace = parts.path.strip("/") or "default"
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", namespace):
        raise ConfigError(
            f"etcd namespace {namespace!r}: up to 100 letters, digits, dots, dashes, underscores"
        )
    endpoints = [host if _PORT.search(host) else f"{host}:2379" for host in hosts.split(",") if host]
    login_and_files: dict[str, Any] = {
        "user": unquote(user) or None,
        "password": unquote(password) if user else None,
        **{name: found.get(name) for name in ("ca", "cert", "key")},
    }
    connect = partial(Client, **login_and_files, tls=switch(found.get("tls", "")))
    return endpoints or ["localhost:2379"], connect, namespace
