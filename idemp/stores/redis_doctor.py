"""What `idemp doctor` asks a Redis and a namespace in it.  It writes nothing and opens no session."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from redis.exceptions import RedisError, ResponseError

from idemp.errors import StoreUnavailable
from idemp.findings import Finding, Looked
from idemp.ports import Clock
from idemp.redis_server import Server, explain
from idemp.stores.redis import looking

SKEW = 5.0
"""Seconds between two clocks that are worth a word."""
NEARLY_FULL = 0.8
"""Of the memory that it may use: a full one takes no claim."""
_SAFE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}


def examine(at: Server, clock: Clock) -> Looked:
    """Look at the server, then at the namespace.  Raises `ConfigError`, `StoreUnavailable`."""
    client = looking(at)
    try:
        with closing(client):
            about, kept = client.info(), client.get(f"{at.prefix}retention")
            found = [*_place(at, about), *_durable(at, client), *_disk(at, about), *_memory(at, about)]
            seconds, fraction = client.time()
            found += _clock(at, clock.wall() - (seconds + fraction / 1e6))
    except RedisError as error:
        raise explain(at, error, StoreUnavailable) from None
    if kept is None:
        fix = "name the namespace of the service's IDEMP_STORE, or start the service once"
        what = f"there is no namespace {at.namespace!r}"
        return Looked([*found, Finding(at.shown, what, "no key of it", fix)])
    return Looked(found, int(kept) / 1000)


def _place(at: Server, about: Mapping[str, Any]) -> list[Finding]:
    """Which server it is, and what becomes of its copies."""
    if about.get("role") != "master":
        what, fix = "it is a replica, which takes no claim", "name its master"
        return [Finding(at.shown, what, f"role {about.get('role')}", fix)]
    if about.get("connected_slaves"):
        what = "a failover to a replica may forget what was confirmed: Redis does not wait for its replicas"
        evidence = f"{about['connected_slaves']} replicas"
        fix = "restart the master instead of failing over, or use PostgreSQL or etcd where that may not be"
        return [Finding(at.shown, what, evidence, fix, fault=False)]
    return []


def _durable(at: Server, client: Any) -> list[Finding]:
    """Whether what it confirms is on its disk by then."""
    try:
        told = {name: client.config_get(name).get(name, "nothing") for name in _SAFE}
    except ResponseError as error:
        what, fix = "this user may not see its settings", "allow it CONFIG GET"
        return [Finding(at.shown, what, " ".join(str(error).split()), fix, fault=not at.unsafe)]
    wrong = {name: value for name, value in told.items() if value != _SAFE[name]}
    if not wrong:
        return []
    evidence = ", ".join(f"{name} {value}" for name, value in wrong.items())
    settings = "; ".join(f"CONFIG SET {name} {_SAFE[name]}" for name in wrong)
    fix = f"redis-cli: {settings}; CONFIG REWRITE, so that it stays"
    return [Finding(at.shown, "it may forget what it confirmed", evidence, fix)]


def _disk(at: Server, about: Mapping[str, Any]) -> list[Finding]:
    found = []
    for name in ("aof_last_write_status", "aof_last_bgrewrite_status"):
        if about.get(name, "ok") != "ok":
            fix = "see its log; most often its disk is full: make room"
            found.append(Finding(at.shown, "it cannot write to its disk", f"{name} {about[name]}", fix))
    return found


def _memory(at: Server, about: Mapping[str, Any]) -> list[Finding]:
    used, most = int(about.get("used_memory", 0)), int(about.get("maxmemory", 0))
    if not most or used < NEARLY_FULL * most:
        return []
    evidence = f"{used / 1024**2:.0f} of {most / 1024**2:.0f} MiB are used"
    fix = "raise maxmemory, or name a shorter ?retention= at every process and wait for what is remembered"
    return [Finding(at.shown, "its memory is nearly full, and then it takes no claim", evidence, fix)]


def _clock(at: Server, ahead: float) -> list[Finding]:
    if abs(ahead) <= SKEW:
        return []
    evidence = f"this machine is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} it"
    what = "its clock and this machine's differ, and the retention goes by clocks"
    return [Finding(at.shown, what, evidence, "run chronyd or ntpd on both")]


LOOKED_AT = 1000
"""Keys, of which it is asked how much they take."""


def taken(at: Server) -> tuple[float, int] | None:
    """Bytes that an id takes, and of how many that was seen; None: nothing is remembered."""
    client = looking(at)
    try:
        with closing(client):
            some = itertools.islice(client.scan_iter(f"{at.prefix}k:*", count=LOOKED_AT), LOOKED_AT)
            sizes = [size for key in some if (size := client.memory_usage(key)) is not None]
    except RedisError as error:
        raise explain(at, error, StoreUnavailable) from None
    return (sum(sizes) / len(sizes), len(sizes)) if sizes else None
