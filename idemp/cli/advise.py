"""``advise``: how many workers a service needs, and whether more would help."""

from __future__ import annotations

import json
import time

import click

from idemp.cli.events import events_at, tracking_option
from idemp.cli.options import Duration, broker_at, escaped, json_option, transport_option
from idemp.ports import EventLog, Query
from idemp.tracking.advise import LEAST, Advice, Sample, Wish, advise

MOST = 20_000
"""Messages that are looked at, the newest."""
PAST = 86_400.0
"""Seconds in which it is looked for a time with fewer at work."""


@click.command("advise")
@click.option("--service", "services", multiple=True, help="Only this service.")
@click.option("--window", type=Duration(), default=300.0, show_default="5m", help="Look so far back.")
@click.option(
    "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Over all replicas."
)
@click.option(
    "--latency", type=Duration(), default=1.0, show_default="1s", help="A message may wait so long."
)
@click.option("--catch-up", type=Duration(), default=300.0, show_default="5m", help="For what waits already.")
@click.option("--most", type=click.IntRange(min=1), default=1000, show_default=True, help="Workers, at most.")
@click.option("--backlog", type=click.IntRange(min=0), help="Messages that wait; by default the broker says.")
@tracking_option
@transport_option
@json_option
def advise_(
    services: tuple[str, ...],
    window: float,
    workers: int,
    latency: float,
    catch_up: float,
    most: int,
    backlog: int | None,
    tracking: str,
    transport: str,
    as_json: bool,
) -> int:
    """Say for each service how busy it is, and whether to add workers, take some away, or mend something.

    Exit code 1 if too little is known of all of them.
    """
    said = 0
    with events_at(tracking) as log:
        since = time.time() - window
        names = services or tuple(sorted({edge.service for edge in log.edges(since) if edge.service}))
        for service in names:
            samples = _samples(log, service, since)
            waits = _waiting(transport, service) if backlog is None else backlog
            past = _samples(log, service, min(since, time.time() - PAST))
            wish = Wish(latency, catch_up, most)
            advice = advise(samples, workers=workers, backlog=waits, wish=wish, past=past)
            if advice is None:
                few = f"{escaped(service)} has {len(samples)} messages in that time, and {LEAST} are needed"
                click.echo(f"idemp: too little is known: {few}", err=True)
                continue
            said += 1
            click.echo(
                json.dumps({"service": service, **_record(advice)}) if as_json else _text(service, advice)
            )
    return 0 if said else 1


def _samples(log: EventLog, service: str, since: float) -> list[Sample]:
    found = log.find(Query(service=service, kinds=("ok", "failed"), since=since), limit=MOST)
    return [
        Sample(each.sent_at, each.at, each.took, each.kind == "failed")
        for each in found
        if each.took is not None
    ]


def _waiting(transport: str, service: str) -> int:
    with broker_at(transport) as broker:
        return broker.depth(f"{service}-queue")


def _record(advice: Advice) -> dict[str, object]:
    told = advice._asdict()
    if told["expected_wait"] == float("inf"):
        told["expected_wait"] = None
    return told


def _text(service: str, advice: Advice) -> str:
    wait = "for ever" if advice.expected_wait == float("inf") else f"{advice.expected_wait * 1000:.1f} ms"
    rows = (
        ("messages", f"{advice.messages} in {advice.window:.0f} s"),
        ("arrivals", f"{advice.arrivals:.2f}/s, variation {advice.arrivals_cv:.2f}"),
        ("service time", f"{advice.service_time * 1000:.1f} ms, variation {advice.service_cv:.2f}"),
        ("utilisation", f"{advice.utilisation:.0%} of {advice.workers} workers"),
        ("backlog", f"{advice.backlog}"),
        ("expected wait", wait),
        (
            "needed",
            f"{advice.steady} steady, {advice.catching_up} to catch up, {advice.for_latency} for latency",
        ),
    )
    lines = [f"{escaped(service)}: {advice.verdict}: {advice.why}"]
    return "\n".join([*lines, *(f"  {name:<14}{value}" for name, value in rows)])
