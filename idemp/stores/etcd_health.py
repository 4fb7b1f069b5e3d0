"""What an operator should hear of the etcd below, before it stops: room, history, alarms, versions.

A look never fails and holds nobody up: what cannot be read, or may not be, is not judged.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from idemp.errors import IdempError
from idemp.stores.etcd_client import Client

log = logging.getLogger(__name__)

DEADLINE = 2.0
"""Seconds that each question may take beside a service's work."""
SOON = 1.0
"""Seconds before the first look: the opening has its own to ask."""
PAUSE = 3600.0
"""Seconds between two looks."""
NEARLY_FULL = 0.7
QUOTA = 2 * 1024**3
"""Bytes that etcd takes unless it is told otherwise."""
LONG = 100_000
"""Revisions in a history that is worth a word."""

MAKE_ROOM = "`etcdctl compact REVISION`, `etcdctl defrag` of each member, then `etcdctl alarm disarm`"
_ALARMS = {
    "NOSPACE": f"etcd is out of space (alarm NOSPACE) and takes no claim and no completion: {MAKE_ROOM}",
    "CORRUPT": "etcd says that a member's data are damaged (alarm CORRUPT): its operator must replace it",
}


class Health(NamedTuple):
    """One member's word.

    quota: bytes at which it is full; 0 if it does not tell.
    history: revisions since the first one, if that can still be read, and so nothing was ever compacted.
    """

    version: str
    size: int
    in_use: int
    alarms: Sequence[str] = ()
    quota: int = 0
    history: int = 0


class Finding(NamedTuple):
    """A sentence for the log; ``topic`` stays the same where its figures change."""

    topic: str
    level: int
    text: str


def findings(health: Health, *, settled: bool) -> list[Finding]:
    """What is worth a word.  settled: the namespace is older than its retention, so history can be judged."""
    found = [
        Finding(alarm, logging.ERROR, _ALARMS.get(alarm, f"etcd raises the alarm {alarm}"))
        for alarm in health.alarms
    ]
    if health.size >= NEARLY_FULL * (health.quota or QUOTA):
        found.append(Finding("room", logging.WARNING, _room(health)))
    if settled and health.history >= LONG:
        text = (
            f"etcd has compacted none of its {health.history} revisions, so that its database only grows:"
            " start its members with --auto-compaction-retention=1h"
        )
        found.append(Finding("history", logging.WARNING, text))
    return [*found, *_of_version(health.version)]


def seen(health: Health) -> str:
    """What it rests on, in a line."""
    used = f"a database of {_mib(health.size)}, {_mib(health.in_use)} of it in use"
    alarms = ", ".join(health.alarms) or "none"
    return f"etcd {health.version}, {used}; alarms: {alarms}"


def _room(health: Health) -> str:
    quota = health.quota or QUOTA
    known = "" if health.quota else ", if that is etcd's default,"
    full = f"etcd's database has {_mib(health.size)} of {_mib(quota)}{known} at which it takes nothing more"
    if health.in_use < health.size / 2:
        return f"{full}, but only {_mib(health.in_use)} are in use: `etcdctl defrag` each member"
    return f"{full}: compact it more often, shorten the retention, or raise --quota-backend-bytes"


def _mib(size: int) -> str:
    return f"{size / 1024**2:.0f} MiB"


def _of_version(version: str) -> list[Finding]:
    """Releases with defects that their own notes tell of."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    release = tuple(map(int, numbers.groups())) if numbers else ()
    if (3, 5, 0) <= release < (3, 5, 3):
        text = f"etcd {version} may lose what it acknowledged when it is killed: upgrade to 3.5.3 or newer"
        return [Finding("version", logging.WARNING, text)]
    if (3, 4, 0) <= release < (3, 4, 42):
        text = (
            f"etcd {version} has defects in watches, leases and reads, which idemp expects:"
            " upgrade to 3.4.42 or newer, which has fewer"
        )
        return [Finding("version", logging.INFO, text)]
    return []


# ---------------------------------------------------------------- to look


def look(client: Client, key: str, timeout: float = DEADLINE) -> Health | None:
    """Ask; None if etcd does not say.  ``key``: one that this user may read.

    timeout: seconds that each question may take.
    """
    try:
        status, quota = client.status(timeout), client.quota(timeout)
    except IdempError:
        return None
    history = status.header.revision
    try:
        client.range(key, revision=1, timeout=timeout)
    except IdempError:
        history = 0  # compacted; or not to be known
    return Health(status.version, status.db_size, status.db_size_in_use, status.alarms, quota, history)


def keep_looking(client: Client, key: str, settled: Callable[[], bool], ended: threading.Event) -> None:
    """For a thread of its own: look soon, then now and then, and say what was not said the last time."""
    said: set[str] = set()
    pause = SOON
    while not ended.wait(pause):
        pause = PAUSE
        try:
            health = look(client, key)
        except Exception:
            log.exception("%s", client)
            continue
        if health is None:
            continue
        found = findings(health, settled=settled())
        for finding in found:
            if finding.topic not in said:
                log.log(finding.level, "%s: %s", client, finding.text)
        said = {finding.topic for finding in found}
