"""``relay``: publish what waits in a store's outbox."""

from __future__ import annotations

import json
import signal
from contextlib import ExitStack, closing
from typing import Any, cast

import click

from idemp.bars import bar
from idemp.cli.options import about, json_option, store_at, store_option, transport_at, transport_option
from idemp.eventlogs import open_event_log
from idemp.metrics import Meters, PrometheusMeter, StatsdMeter
from idemp.ports import Inbox, Meter
from idemp.relay import Relay


@click.command()
@click.option("--once", is_flag=True, help="End when the outbox is empty, or nothing of it can be sent.")
@click.option("--service", default="relay", show_default=True, help="Its name in the metrics.")
@click.option(
    "--statsd", metavar="HOST:PORT", envvar="IDEMP_STATSD", show_envvar=True, help="Metrics go there."
)
@click.option(
    "--metrics-port",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    envvar="IDEMP_METRICS_PORT",
    show_envvar=True,
    help="Metrics are at /metrics of it.",
)
@click.option(
    "--tracking",
    metavar="URL",
    envvar="IDEMP_TRACKING",
    show_envvar=True,
    help="The event log, which is told what was sent.",
)
@store_option
@transport_option
@json_option
def relay(
    store: str,
    transport: str,
    once: bool,
    service: str,
    statsd: str | None,
    metrics_port: int | None,
    tracking: str | None,
    as_json: bool,
) -> None:
    """Publish what handlers with transaction=True put into the store's outbox, until stopped.

    Metrics tell how much waits in it (SERVICE_outbox_letters), and for how long (SERVICE_outbox_age).
    """
    with ExitStack() as stack:
        opened = stack.enter_context(store_at(store))
        broker = stack.enter_context(transport_at(transport))
        meters: list[Meter] = []
        if statsd:
            with about("--statsd (IDEMP_STATSD)"):
                meters.append(stack.enter_context(closing(StatsdMeter(statsd))))
        if metrics_port:
            with about("--metrics-port (IDEMP_METRICS_PORT)"):
                meters.append(stack.enter_context(closing(PrometheusMeter(service, metrics_port))))
        log = None
        if tracking:
            with about("--tracking (IDEMP_TRACKING)"):
                log = stack.enter_context(closing(open_event_log(tracking)))
        with about("--store (IDEMP_STORE)"):
            working = Relay(cast(Inbox, opened), broker, service=service, meter=Meters(*meters), tracking=log)
        stack.callback(working.close)
        sent = 0
        if once:
            with bar(working.backlog().letters, "relaying") as step:
                while (turn := working.turn()) > 0:
                    sent += turn
                    step(turn)
        else:

            def stop(number: int, frame: Any) -> None:
                working.stop()

            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, stop)
            working.run()
        left = working.backlog().letters
    said = {"sent": sent, "left": left} if once else {"left": left}
    click.echo(json.dumps(said) if as_json else ", ".join(f"{n} {what}" for what, n in said.items()))
    if once and left:
        click.get_current_context().exit(1)
