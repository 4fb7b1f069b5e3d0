"""Event logs that are away for half a minute while services work.  Row U14."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from idemp import Message, consumer, open_event_log, open_transport, publish
from idemp.ports import EventLog, Query
from idemp.tracking.tracker import Tracker
from tests.servers import PostgreSQL, RabbitMQ, need
from tests.service import Program, until
from tests.test_tracking import service, to

AWAY = 30.0
"""Seconds."""
LATE = 5.0
"""Seconds that a message may take: a time-out of a connection, or of a statement, is longer."""
ROOM = 100
"""Events that one of them has room for."""


def test_u14_event_logs_that_are_away_for_30_s(
    amqp_url: str,
    own_postgresql: PostgreSQL,
    own_rabbitmq: RabbitMQ,
    tmp_path: Path,
    unique: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """U14: no handler is held up meanwhile; afterwards each event is there, or counted as dropped.

    One PostgreSQL is killed, one stands still (its connections stay, and nobody answers), and the broker of
    the collector is killed.  It takes the whole half minute: only in that time a connection times out
    (10 s), a log is tried again and again at longer intervals (up to 5 s), and a buffer overflows at the pace
    of a service; and all of it must have stayed out of the handlers.
    """
    need("postgresql")
    waits: dict[str, list[float]] = defaultdict(list)
    names = {each: f"{unique}-{each}" for each in ("killed", "still", "collected", "small")}
    collected = f"sqlite:///{tmp_path}/collected.db"
    with ExitStack() as stack:
        standing = stack.enter_context(PostgreSQL())
        urls = {
            "killed": own_postgresql.url,
            "still": standing.url,
            "collected": own_rabbitmq.url,
            "small": standing.database(),
        }
        logs = {each: stack.enter_context(closing(open_event_log(url))) for each, url in urls.items()}
        trackers: dict[str, Tracker] = {}

        def tracker(log: Any, name: str, **more: Any) -> Tracker:
            if name == names["small"]:
                more["room"] = ROOM
            return trackers.setdefault(name, Tracker(log, name, **more))

        monkeypatch.setattr(consumer, "Tracker", tracker)
        settings = {"IDEMP_TRACKING": collected, "IDEMP_TRANSPORT": own_rabbitmq.url}
        collector = Program(tmp_path / "said", ["-m", "idemp", "track"], settings)
        stack.callback(partial(collector.stop, signal.SIGKILL))
        collector.wait_for("collecting from idemp.track")
        for each, log in logs.items():

            def handle(message: Message, _: Any, each: str = each) -> None:
                waits[each].append(time.time() - message.args["at"])

            stack.enter_context(service(amqp_url, tmp_path, names[each], {"order": handle}, log))
        out = stack.enter_context(closing(open_transport(amqp_url)))
        sent = 0

        def send() -> None:
            nonlocal sent
            for name in names.values():
                publish(out, to(f"{name}-queue", Message(str(sent), "order", {"at": time.time()})))
            sent += 1

        send()
        for each in ("killed", "still", "small"):
            until(_holds(logs[each], 1), lambda each=each: each)  # type: ignore[misc]
        stopped = _processes(standing)
        own_postgresql.kill()
        own_rabbitmq.kill()
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        stack.callback(_go_on, stopped)
        end = time.monotonic() + AWAY
        while time.monotonic() < end:
            send()
            threading.Event().wait(0.04)  # the pace of the messages
        for each in names:
            until(lambda each=each: len(waits[each]) == sent, lambda: (sent, _lengths(waits)))  # type: ignore[misc]
        assert sent > 2 * ROOM
        assert all(tracker.recorder.delivered <= 2 for tracker in trackers.values())

        # Then they are back
        _go_on(stopped)
        own_postgresql.start()
        own_rabbitmq.start()
        for each in ("killed", "still", "small"):
            until(_holds(logs[each], sent), lambda each=each: (each, sent, _held(logs[each])))  # type: ignore[misc]
        log = stack.enter_context(closing(open_event_log(collected)))
        until(_holds(log, sent), lambda: (sent, _held(log), collector.said()))
        dropped = {each: trackers[name].recorder.dropped for each, name in names.items()}
    assert max(max(each) for each in waits.values()) < LATE
    assert (dropped["killed"], dropped["still"], dropped["collected"]) == (0, 0, 0)
    assert dropped["small"] > 0


def _processes(server: PostgreSQL) -> list[int]:
    """Who takes connections, and who serves those that are there."""
    serving = server.psql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'"
                          " AND pid <> pg_backend_pid()")  # fmt: skip
    taking = (server.data / "postmaster.pid").read_text().splitlines()[0]
    return [int(pid) for pid in (taking, *serving.split())]


def _go_on(processes: list[int]) -> None:
    for pid in processes:
        os.kill(pid, signal.SIGCONT)


def _held(log: EventLog) -> tuple[int, int]:
    """Outcomes that are there, each of another message, and events that were counted as dropped."""
    found = log.find(Query(kinds=("ok", "dropped")), limit=100_000)
    ids = {event.uuid for event in found if event.kind == "ok"}
    assert len(ids) == sum(event.kind == "ok" for event in found)
    return len(ids), sum(event.attempt for event in found if event.kind == "dropped")


def _holds(log: EventLog, n: int) -> Callable[[], bool]:
    """Whether so many are there or counted."""
    return lambda: sum(_held(log)) == n


def _lengths(waits: dict[str, list[float]]) -> dict[str, int]:
    return {each: len(found) for each, found in waits.items()}
