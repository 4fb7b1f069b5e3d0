"""The auditor: reports a second beside parsing them alone, one process, one core."""

from __future__ import annotations

import random
import resource
import tempfile
import threading
import time
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

from idemp import open_transport
from idemp.audit import Report
from idemp.audit.auditor import Auditor
from idemp.audit.config import Config
from idemp.audit.judge import Field
from idemp.audit.messages import decoded
from idemp.audit.state.sqlite import SqliteState
from idemp.message import Properties
from idemp.ports import Publication
from idemp.transports import publish

PATIENCE = 120.0


def measure(url: str, services: int, fields: int, reports: int) -> dict[str, Any]:
    """Reports that wait on the broker at ``url``: how many a second are parsed, and are taken for good.

    Services share their fields in pairs.
    """
    name = f"bench-{uuid4().hex[:8]}"
    bodies = _bodies(services, fields, reports)
    began = time.perf_counter()
    for body in bodies:
        decoded(body)
    parsed = len(bodies) / (time.perf_counter() - began)
    with tempfile.TemporaryDirectory() as folder:
        config = _config(url, name, folder, services, fields)
        with closing(open_transport(url)) as transport:
            transport.declare(config.consumer_queue, name, "auditmq", kind="direct")
            about = [Properties(message_id=uuid4().hex) for _ in bodies]
            letters = [
                Publication(body, each, name, "auditmq") for body, each in zip(bodies, about, strict=True)
            ]
            publish(transport, letters, timeout=PATIENCE)
        took, busy = _audited(config, len(bodies))
    return {
        "services": services,
        "fields": fields,
        "reports": len(bodies),
        "parsed": round(parsed),
        "taken": round(len(bodies) / took),
        "share": round(len(bodies) / took / parsed, 3),
        "core": round(busy / took, 2),
    }


def _audited(config: Config, reports: int) -> tuple[float, float]:
    """Seconds, and seconds of processor, until all are taken."""
    done = threading.Event()

    class Counting(SqliteState):
        taken = 0

        def save(self, *rows: Any, **more: Any) -> None:
            super().save(*rows, **more)
            self.taken += (more.get("counts") or {}).get("reports", 0)
            if self.taken >= reports:
                done.set()

    with closing(open_transport(config.dsn)) as transport:
        transport.connect()

        def audit() -> None:
            with closing(Counting(config.state)) as state:
                auditors.append(Auditor(transport, config, state))
                auditors[0].run(ready=ready.set)

        auditors: list[Auditor] = []
        ready = threading.Event()
        thread = threading.Thread(target=audit)
        thread.start()
        if not ready.wait(PATIENCE):
            raise RuntimeError("the auditor did not start")
        began, used = time.perf_counter(), _processor()
        if not done.wait(PATIENCE):
            raise RuntimeError(f"the auditor did not take {reports} reports within {PATIENCE:g} s")
        took, busy = time.perf_counter() - began, _processor() - used
        auditors[0].stop()
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


def _config(url: str, name: str, folder: str, services: int, fields: int) -> Config:
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
        state=str(Path(folder) / "audit.db"),
    )


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
