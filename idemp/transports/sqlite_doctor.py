"""What `idemp doctor` asks an SQLite file that is a broker.  It declares nothing and takes no message."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from urllib.parse import quote

from idemp.errors import ConfigError
from idemp.findings import Finding, too_old
from idemp.ports import Clock
from idemp.transports.envelope import unpack

EXCHANGE = "events"
_CONSUMERS = "SELECT count(*) FROM consumer WHERE until > :now AND until <= :now + visibility"
_QUEUE = "SELECT id FROM queue WHERE name = ?"
_READY = "SELECT count(*) FROM message WHERE queue = ? AND consumer = 0"
_OLDEST = "SELECT content FROM message WHERE queue = ? ORDER BY id LIMIT 1"
_BOUND = "SELECT count(*) FROM binding WHERE queue = ? AND exchange = ?"


def examine(path: str, services: Sequence[str], retention: float | None, clock: Clock) -> list[Finding]:
    """Look at the queues of ``services``.  retention: seconds that their store keeps ids."""
    try:
        with closing(sqlite3.connect(f"file:{quote(os.path.abspath(path))}?mode=ro", uri=True)) as db:
            return [each for service in services for each in _of_service(db, service, retention, clock)]
    except sqlite3.OperationalError as error:
        raise ConfigError(
            f"{path} is no broker of ours ({error}); name the one that the service uses"
        ) from None


def _of_service(db: sqlite3.Connection, service: str, retention: float | None, clock: Clock) -> list[Finding]:
    queue, dead = f"{service}-queue", f"{service}-queue.dead"
    start = f"start the service: SERVICE_NAME={service} python -m svc"
    mine, letters = (db.execute(_QUEUE, [name]).fetchone() for name in (queue, dead))
    if mine is None:
        return [Finding(queue, "there is no such queue", "the file does not know it", start)]
    found = []
    if not db.execute(_CONSUMERS, {"now": clock.steady()}).fetchone()[0]:
        # Of which queue a consumer takes, the file does not say.
        evidence = (
            f"{db.execute(_READY, mine).fetchone()[0]} messages are ready, and 0 consumers of any queue"
        )
        found.append(Finding(queue, "nobody consumes it", evidence, start))
    if not db.execute(_BOUND, [*mine, EXCHANGE]).fetchone()[0]:
        found.append(Finding(queue, "no event reaches it", f"no binding from {EXCHANGE!r}", start))
    if letters is None:
        what = "the dead-letter path is broken: what is set aside has nowhere to go"
        found.append(Finding(dead, what, "there is no such queue", start))
    elif ready := db.execute(_READY, letters).fetchone()[0]:
        fix = f"idemp dead list {queue}, then idemp dead send {queue}"
        found.append(Finding(dead, "messages are set aside", f"{ready} are ready", fix, fault=False))
    oldest = db.execute(_OLDEST, mine).fetchone()
    published = None if oldest is None else unpack(oldest[0])[1].timestamp
    return [*found, *too_old(queue, published, retention, clock.wall())]
