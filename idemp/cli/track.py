"""``track``: the collector of events, and the reader of other libraries' log lines."""

from __future__ import annotations

import json
import signal
import threading
import uuid
from contextlib import closing, suppress
from typing import IO

import click

from idemp.bars import bar
from idemp.cli.events import tracking_option
from idemp.cli.options import about, json_option, transport_at, transport_option
from idemp.cli.publish import size_of
from idemp.errors import BadMessage, ConfigError, Unavailable
from idemp.eventlogs import open_event_log
from idemp.eventlogs.collector import QUEUE, PublishingLog, collect
from idemp.ports import Batch, Event, EventLog, Query, Transport
from idemp.tracking.envelope import read_line

_AGAIN = 1.0
_TOGETHER = 1000
_LONG = 1_000_000  # bytes of lines that are worth a bar
# A byte that is no UTF-8 is read, so that its line can be named.
_LINES = click.File("r", encoding="utf-8", errors="surrogateescape")


@click.command()
@click.option("--lines", type=_LINES, help="Read log lines of envelopes from here; - is stdin.")
@tracking_option
@transport_option
@json_option
def track(lines: IO[str] | None, tracking: str, transport: str, as_json: bool) -> int:
    """Collect the events that services publish into one event log, until stopped.

    Services publish them where IDEMP_TRACKING is a broker's URL; they wait in the queue idemp.track while no
    collector runs.  A batch is kept once, however often it comes.
    """
    with about("--tracking (IDEMP_TRACKING)"):
        log = open_event_log(tracking)
        if isinstance(log, PublishingLog):
            raise ConfigError("a collector keeps events in sqlite:/// or postgresql://, not in a broker")
    with closing(log):
        with about("--tracking (IDEMP_TRACKING)"):
            log.find(Query(), limit=1)  # whether it answers
        if lines is not None:
            return _import(log, lines, as_json)
        with transport_at(transport) as broker:
            return _collect(log, broker, as_json)


def _import(log: EventLog, lines: IO[str], as_json: bool) -> int:
    """All lines, or none of those from the first bad one on."""
    writer, number, events, total = uuid.uuid4().hex[:12], 0, list[Event](), 0

    def flush() -> None:
        nonlocal number, events, total
        if events:
            log.append(Batch(writer, number, events))
        number, total, events = number + 1, total + len(events), []

    with bar(size_of(lines), "keeping", least=_LONG) as step:
        for place, line in enumerate(lines, 1):
            step(len(line.encode(errors="replace")))
            if not line.strip():
                continue
            try:
                events.append(read_line(line))
            except BadMessage as error:
                flush()
                raise BadMessage(f"line {place}: {error}; {total} lines before it were kept") from None
            if len(events) == _TOGETHER:
                flush()
        flush()
    click.echo(json.dumps({"events": total}) if as_json else f"kept {total} events")
    return 0


def _collect(log: EventLog, broker: Transport, as_json: bool) -> int:
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    events = 0

    def told(n: int, why: str) -> None:
        nonlocal events
        events += n
        if why:
            click.echo(f"idemp: set aside in {QUEUE}.dead: {why}", err=True)

    ready = json.dumps({"queue": QUEUE, "ready": True}) if as_json else f"collecting from {QUEUE}"
    click.echo(ready, err=not as_json)
    while not stopped.is_set():
        try:
            collect(broker, log, lambda: not stopped.is_set(), told=told)
        except ConfigError:
            raise
        except Unavailable as error:
            click.echo(f"idemp: {error}; trying again", err=True)
            stopped.wait(_AGAIN)
            with suppress(Unavailable):
                broker.connect()
    click.echo(json.dumps({"events": events}) if as_json else f"kept {events} events", err=not as_json)
    return 0
