"""``top``: what services do just now, a line for each type of message."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import click

from idemp.cli.options import Duration, about, escaped, json_option
from idemp.errors import Unavailable
from idemp.ports import OUTCOMES
from idemp.rates import Counter, FromGraphite, FromMetrics, Rates, Source

if TYPE_CHECKING:
    from rich.table import Table

GRAPHITE = "http://localhost:80"
_GOOD = ("ok", "skipped")


@click.command()
@click.option(
    "--graphite",
    metavar="URL",
    envvar="IDEMP_GRAPHITE",
    default=GRAPHITE,
    show_default=True,
    show_envvar=True,
    help="Graphite's pages, which know all services.",
)
@click.option(
    "--metrics",
    metavar="URL",
    multiple=True,
    help="Ask a service itself, like http://localhost:9100/metrics.",
)
@click.option("--service", "services", multiple=True, help="Only this service.")
@click.option("--every", type=Duration(), default=2.0, show_default="2s", help="How often.")
@click.option("--times", type=click.IntRange(min=1), help="End after so many; by default Ctrl-C ends it.")
@json_option
def top(
    graphite: str,
    metrics: tuple[str, ...],
    services: tuple[str, ...],
    every: float,
    times: int | None,
    as_json: bool,
) -> None:
    """Show messages a second by service, type and outcome.

    From Graphite, where the services' counters are, or with --metrics from services that have a
    metrics port (IDEMP_METRICS_PORT).  A table on a terminal, plain lines in a pipe.
    """
    source: Source = FromMetrics(metrics) if metrics else FromGraphite(graphite)
    with about("--metrics" if metrics else "--graphite (IDEMP_GRAPHITE)"):
        first = source.read()
    readings = _readings(source, first, every, times, bool(metrics))
    try:
        if sys.stdout.isatty() and not as_json:
            _draw(readings, services)
        else:
            _print(readings, services, as_json)
    except KeyboardInterrupt:
        return


def _readings(
    source: Source, first: Rates, every: float, times: int | None, differences: bool
) -> Iterator[tuple[Rates, str]]:
    """Rates, and what went wrong, each ``every`` seconds; the first of differences says nothing."""
    number = 0
    if not differences:
        number = 1
        yield first, ""
    while times is None or number < times:
        time.sleep(every)
        number += 1
        try:
            yield source.read(), ""
        except Unavailable as error:  # it may be starting again
            yield {}, str(error)


def _rows(rates: Rates, services: Sequence[str]) -> dict[tuple[str, str], dict[str, float]]:
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for place, rate in sorted(rates.items()):
        if not services or place.service in services:
            rows.setdefault(_name(place), {})[place.outcome] = rate
    return rows


def _name(place: Counter) -> tuple[str, str]:
    return place.service, place.type


# ------------------------------------------------------------------ how it looks


def _draw(readings: Iterator[tuple[Rates, str]], services: Sequence[str]) -> None:
    # Here, because no other command needs them, and they take a while to import.
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(), auto_refresh=False) as live:
        for rates, trouble in readings:
            live.update(_table(rates, trouble, services), refresh=True)


def _table(rates: Rates, trouble: str, services: Sequence[str]) -> Table:
    from rich.table import Table

    at = datetime.now().strftime("%H:%M:%S")
    table = Table(caption=trouble or f"messages a second, {at}; Ctrl-C ends it", box=None, pad_edge=False)
    table.add_column("service")
    table.add_column("type")
    for outcome in OUTCOMES:
        table.add_column(outcome, justify="right")
    for (service, kind), outcomes in _rows(rates, services).items():
        cells = (_cell(outcome, outcomes.get(outcome)) for outcome in OUTCOMES)
        table.add_row(escaped(service), escaped(kind) or "-", *cells)
    return table


def _cell(outcome: str, rate: float | None) -> str:
    if not rate:
        return "[dim]" + ("0" if rate is not None else "") + "[/dim]"
    colour = "green" if outcome in _GOOD else "yellow"
    return f"[{colour}]{_number(rate)}[/{colour}]"


def _print(readings: Iterator[tuple[Rates, str]], services: Sequence[str], as_json: bool) -> None:
    for rates, trouble in readings:
        if trouble:
            click.echo(f"idemp: {trouble}", err=True)
        at = datetime.now().astimezone().isoformat(timespec="seconds")
        for (service, kind), outcomes in _rows(rates, services).items():
            if as_json:
                rounded = {name: round(rate, 3) for name, rate in outcomes.items()}
                click.echo(json.dumps({"at": at, "service": service, "type": kind, "per_second": rounded}))
            else:
                told = " ".join(f"{name}={_number(outcomes[name])}" for name in OUTCOMES if name in outcomes)
                click.echo(f"{at} {escaped(service)} {escaped(kind) or '-'} {told}")
        sys.stdout.flush()


def _number(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 or rate == 0 else f"{rate:.1f}"
