"""The auditor: reports a second beside parsing them alone, one process, one core."""

from __future__ import annotations

import random
import resource
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from decimal import Decimal
from functools import partial
from typing import Any, cast
from uuid import uuid4

from bench.stack import Stack
from idemp import open_transport
from idemp.audit import Report
from idemp.audit.auditor import Auditor
from idemp.audit.config import Config
from idemp.audit.judge import Field
from idemp.audit.messages import decoded
from idemp.audit.state import SqlState, open_state
from idemp.bars import watching
from idemp.message import Properties
from idemp.ports import Progress, Publication
from idemp.transports import publish

PATIENCE = 120.0


def measure(servers: Stack, services: int, fields: int, reports: int) -> dict[str, Any]:
    """Reports that wait on the broker: how many a second are parsed, and are taken for good, by each state.

    Services share their fields in pairs.
    """
    bodies = _bodies(services, fields, reports)
    began = time.perf_counter()
    for body in bodies:
        decoded(body)
    parsed = len(bodies) / (time.perf_counter() - began)
    found: dict[str, Any] = {
        "services": services, "fields": fields, "reports": len(bodies), "parsed": round(parsed)
    }  # fmt: skip
    for name, state in (
        ("sqlite", f"sqlite:///{servers.folder}/audit.db"),
        ("postgresql", servers.store("postgresql")),
    ):
        took, busy = _audited(_filled(servers.broker, state, services, fields, bodies), len(bodies))
        found[name] = {
            "taken": round(len(bodies) / took),
            "share": round(len(bodies) / took / parsed, 3),
            "core": round(busy / took, 2),
        }
    return found


def _filled(url: str, state: str, services: int, fields: int, bodies: Sequence[bytes]) -> Config:
    """The settings of an auditor, whose reports wait."""
    name = f"bench-{uuid4().hex[:8]}"
    config = _config(url, name, state, services, fields)
    with closing(open_transport(url)) as transport:
        transport.declare(config.consumer_queue, name, "auditmq", kind="direct")
        letters = [Publication(body, Properties(message_id=uuid4().hex), name, "auditmq") for body in bodies]
        publish(transport, letters, timeout=PATIENCE)
    return config


class _Counting:
    """A state; ``done`` is set when it has ``reports``."""

    def __init__(self, inner: SqlState, reports: int) -> None:
        self._inner, self._left, self._reports = inner, reports, reports
        self.done = threading.Event()

    def save(self, *rows: Any, **more: Any) -> None:
        """See `SqlState`."""
        self._inner.save(*rows, **more)
        self._left -= (more.get("counts") or {}).get("reports", 0)
        if self._left <= 0:
            self.done.set()

    def progress(self) -> Progress:
        """How many it has."""
        return Progress(self._reports - self._left, self._reports)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _audited(config: Config, reports: int) -> tuple[float, float]:
    """Seconds, and seconds of processor, until all are taken."""
    ready = threading.Event()
    with closing(open_transport(config.dsn)) as transport, closing(open_state(config.state)) as inner:
        transport.connect()
        state = _Counting(inner, reports)
        auditor = Auditor(transport, config, cast(SqlState, state))
        thread = threading.Thread(target=partial(auditor.run, ready=ready.set))
        thread.start()
        if not ready.wait(PATIENCE):
            raise RuntimeError("the auditor did not start")
        began, used = time.perf_counter(), _processor()
        with watching("audits", state.progress):
            if not state.done.wait(PATIENCE):
                raise RuntimeError(f"the auditor did not take {reports} reports within {PATIENCE:g} s")
        took, busy = time.perf_counter() - began, _processor() - used
        auditor.stop()
        thread.join(PATIENCE)
    return took, busy


def _bodies(services: int, fields: int, reports: int) -> list[bytes]:
    chance = random.Random(1)
    return [
        Report(
            f"service-{who}", {f"field_{who // 2}_{n}": chance.randrange(10**6) for n in range(fields)}
        ).encode()
        for _ in range(reports)
        for who in range(services)
    ]


def _config(url: str, name: str, state: str, services: int, fields: int) -> Config:
    pairs = tuple(
        Field(f"field_{pair}_{n}", "int", f"service-{2 * pair}", 3, {f"service-{2 * pair + 1}": Decimal(0)})
        for pair in range(services // 2)
        for n in range(fields)
    )
    return Config(
        url,
        pairs,
        exchange=name,
        consumer_queue=f"{name}-in",
        report_queue=f"{name}-out",
        state=state,
    )


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
