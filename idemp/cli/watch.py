"""``watch``: say which service is broken, and why."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import ExitStack, closing, suppress

import click

from idemp.cli.events import events_at, tracking_option
from idemp.cli.options import Duration, about, broker_at, escaped, json_option, transport_option
from idemp.errors import ConfigError, Unavailable
from idemp.metrics import StatsdMeter
from idemp.ports import EventLog, Meter, NoMeter, Transport
from idemp.tracking.trace import moment
from idemp.tracking.watch import KINDS, Finding, Limits, Queue, look

_PATIENCE = 5.0
_BLIND = ("blind", "idemp watch")


@click.command()
@click.option("--service", "services", multiple=True, help="Only this service.")
@click.option("--every", type=Duration(), default=10.0, show_default="10s", help="How often.")
@click.option("--times", type=click.IntRange(min=1), help="End after so many; by default Ctrl-C ends it.")
@click.option(
    "--deadline", type=Duration(), default=30.0, show_default="30s", help="For an expected receiver."
)
@click.option(
    "--stuck", type=Duration(), default=60.0, show_default="60s", help="For a handler, and a queue."
)
@click.option("--back", type=Duration(), default=86_400.0, show_default="24h", help="Look so far back.")
@click.option("--webhook", metavar="URL", help="POST what is new, and what is over, as JSON.")
@click.option("--statsd", metavar="HOST:PORT", help="Count findings: <service>_watch_<kind>.")
@tracking_option
@transport_option
@json_option
def watch(
    services: tuple[str, ...],
    every: float,
    times: int | None,
    deadline: float,
    stuck: float,
    back: float,
    webhook: str | None,
    statsd: str | None,
    tracking: str,
    transport: str,
    as_json: bool,
) -> int:
    """Tell each broken service when it breaks and when it is well again, with numbers and ids.

    No consumer; no progress; handlers that never finish; a step in failures; an expected receiver that
    did not get a message; silence where there was traffic.  Exit code 1 if something is
    wrong at the last look.
    """
    if webhook is not None and not webhook.startswith(("http://", "https://")):
        raise click.UsageError(f"--webhook {webhook}: write it like https://host/path.")
    limits = Limits(deadline, stuck, back=back)
    with ExitStack() as stack:
        meter = stack.enter_context(closing(_meter(statsd)))
        log = stack.enter_context(events_at(tracking))
        broker = stack.enter_context(broker_at(transport))
        before: dict[tuple[str, str], Finding] = {}
        number = 0
        if sys.stderr.isatty() and times != 1:
            click.echo(f"idemp: looking every {every:g} s; Ctrl-C ends it", err=True)
        try:
            while True:
                seen = {(each.kind, each.service): each for each in _look(log, broker, limits, services)}
                _count(meter, seen, services)
                # Who sees nothing does not see that something is over.
                now = {**before, **seen} if _BLIND in seen else seen
                for place, finding in now.items():
                    if place not in before:
                        _tell(finding, True, webhook, as_json)
                for place, finding in before.items():
                    if place not in now:
                        _tell(finding, False, webhook, as_json)
                before = now
                number += 1
                if number == times:
                    break
                time.sleep(every)
        except KeyboardInterrupt:
            pass
    if sys.stderr.isatty() and not before:
        click.echo("idemp: nothing is wrong", err=True)
    return 1 if before else 0


def _meter(statsd: str | None) -> Meter:
    if statsd is None:
        return NoMeter()
    with about("--statsd"):
        return StatsdMeter(statsd)


def _look(log: EventLog, broker: Transport, limits: Limits, services: tuple[str, ...]) -> list[Finding]:
    """What is wrong; the second time on a new connection, for the old one may have been lost since."""
    with suppress(Unavailable):
        return look(log, _queues(broker), time.time(), limits, services)
    try:
        broker.connect()
        return look(log, _queues(broker), time.time(), limits, services)
    except Unavailable as error:
        return [Finding(*_BLIND, str(error))]


def _queues(broker: Transport) -> Queue:
    """RabbitMQ tells who consumes; the others only what is ready."""
    consumers = getattr(broker, "consumers", None)

    def queue(name: str) -> tuple[int | None, int | None, bool]:
        number = None if consumers is None else consumers(name)
        return broker.depth(name), number, consumers is not None and number is None

    return queue


def _count(meter: Meter, now: dict[tuple[str, str], Finding], services: tuple[str, ...]) -> None:
    counted = Counter({(kind, service): 0 for kind in KINDS for service in services})
    counted.update(now.keys())
    for (kind, service), n in counted.items():
        meter.count(f"{service}_watch_{kind.replace(' ', '_')}", n)


def _tell(finding: Finding, new: bool, webhook: str | None, as_json: bool) -> None:
    record = {**finding._asdict(), "over": not new}
    if as_json:
        click.echo(json.dumps(record))
    else:
        since = f"; since {moment(finding.oldest)}" if finding.oldest is not None else ""
        ids = f"; {', '.join(map(escaped, finding.ids))}" if finding.ids else ""
        what = f"{finding.kind}: {escaped(finding.why)}{since}{ids}" if new else f"{finding.kind}: over"
        click.echo(f"{escaped(finding.service)}: {what}")
    if webhook is not None:
        _post(webhook, record)


def _post(url: str, record: dict[str, object]) -> None:
    """A receiver that is away is said, and does not end the watch."""
    request = urllib.request.Request(
        url, json.dumps(record).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE):
            pass
    except (OSError, urllib.error.URLError) as error:
        click.echo(f"idemp: --webhook: {getattr(error, 'reason', error)}", err=True)
    except ValueError as error:
        raise ConfigError(f"--webhook: {error}") from None
