"""`make bench`: a deduplicating consumer beside plain ones, in short alternating rounds on real servers.

Machines are shared and noisy, so ratios within a round count, and their median is quoted.  A round
is void unless the store remembers as many ids as there were.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from bench import audit, decorator, growth, inbox, latency, picture, streams, tables, tally, tracking
from bench.cells import STORES, Cell, cells
from bench.stack import environment, run, stack
from idemp.bars import bar

RECORD = Path(__file__).parent / "record"
MINUTES = 15.0


@click.group(invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Measure idemp beside its contenders.  Without a command: all but the growth, within 15 minutes."""
    if context.invoked_subcommand is None:
        context.invoke(factors)
        context.invoke(decorators)
        context.invoke(latencies)
        context.invoke(redis_streams)
        context.invoke(inboxes)


@main.command()
@click.option("--messages", default=20_000, show_default=True, help="Messages in a round.")
@click.option("--rounds", default=3, show_default=True, help="Rounds; each runs every cell once.")
@click.option(
    "--only", default="", help="Only cells whose name has this in it, and those they are divided by."
)
@click.option("--json", "file", type=click.Path(path_type=Path), default=RECORD / "factors.json")
def factors(
    messages: int = 20_000, rounds: int = 3, only: str = "", file: Path = RECORD / "factors.json"
) -> None:
    """One factor at a time around a base point, each contender in a process of its own."""
    chosen = _chosen(cells(), only)
    rates: dict[str, list[float]] = {cell.name: [] for cell in chosen}
    end = time.monotonic() + MINUTES * 60
    with stack(STORES) as servers, bar(rounds * len(chosen), "factors", least=1) as step:
        for number in range(rounds):
            if number and time.monotonic() > end:
                click.echo(f"time is up after {number} of {rounds} rounds", err=True)
                break
            # Every other round backwards, so that nobody always runs after the same one.
            for cell in chosen if number % 2 == 0 else reversed(chosen):
                rates[cell.name].append(run(cell.setting, servers, messages))
                step(1)
                told = f"{cell.name:34} {rates[cell.name][-1]:9.0f}/s"
                click.echo(f"round {number + 1}/{rounds}  {told}", err=True)
    found = {cell.name: _summary(rates, cell) for cell in chosen}
    for name, each in found.items():
        ratios = "  ".join(f"{value:5.2f} x {over.split(': ')[1]}" for over, value in each["ratios"].items())
        click.echo(f"{name:34} {each['median']:9.0f}/s  ({each['low']:.0f} to {each['high']:.0f})  {ratios}")
    _keep(file, {"messages": messages, "cells": found})


@main.command("inbox")
@click.option("--messages", default=10_000, show_default=True, help="Messages in a round.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), default=RECORD / "inbox.json")
def inboxes(messages: int = 10_000, rounds: int = 3, file: Path = RECORD / "inbox.json") -> None:
    """The inbox beside a consumer that inserts and commits message by message."""
    _keep(file, inbox.measure(messages, rounds))


def _chosen(every: Sequence[Cell], only: str) -> list[Cell]:
    over = {cell.name: cell.over for cell in every}
    needed = {name for name in over if only in name}
    while more := {base for name in needed for base in over[name]} - needed:
        needed |= more
    return [cell for cell in every if cell.name in needed]


def _summary(rates: Mapping[str, Sequence[float]], cell: Cell) -> dict[str, Any]:
    """Messages a second, and the median over the rounds of what each says in ratios."""
    mine = rates[cell.name]
    over = {
        name: statistics.median(a / b for a, b in zip(mine, rates[name], strict=True)) for name in cell.over
    }
    return {"median": statistics.median(mine), "low": min(mine), "high": max(mine), "ratios": over}


@main.command()
@click.option("--seconds", default=3.0, show_default=True, help="Of each measurement.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), default=RECORD / "decorator.json")
def decorators(seconds: float = 3.0, rounds: int = 3, file: Path = RECORD / "decorator.json") -> None:
    """The decorator alone, without a broker, beside that of AWS Powertools."""
    _keep(file, decorator.measure(seconds, rounds))


@main.command()
@click.option("--messages", default=400, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), default=RECORD / "latency.json")
def latencies(messages: int = 400, file: Path = RECORD / "latency.json") -> None:
    """One message at a time on an idle stack: until its handler begins, until it is acknowledged."""
    _keep(file, latency.measure(messages))


@main.command()
@click.option("--services", default=200, show_default=True)
@click.option("--fields", default=50, show_default=True, help="Of each service.")
@click.option("--reports", default=10, show_default=True, help="Of each service.")
@click.option("--json", "file", type=click.Path(path_type=Path), default=RECORD / "audit.json")
def audits(services: int, fields: int, reports: int, file: Path) -> None:
    """The auditor's reports a second, beside parsing them alone."""
    with stack(("postgresql",)) as servers:
        _keep(file, audit.measure(servers, services, fields, reports))


@main.command()
@click.option("--messages", default=20_000, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), default=RECORD / "tally.json")
def tallies(messages: int, rounds: int, file: Path) -> None:
    """A consumer whose messages the audit counts, and one whose it does not."""
    _keep(file, tally.measure(messages, rounds))


@main.command()
@click.option("--ids", default=10_000_000, show_default=True, help="The most.")
@click.option("--store", "stores", multiple=True, default=growth.STORES, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), default=RECORD / "growth.json")
def growths(ids: int, stores: Sequence[str], file: Path) -> None:
    """The same with ever more remembered ids: throughput, memory, import, bytes in the store."""
    _keep(file, growth.measure(stores, ids))


@main.command("tracking")
@click.option("--part", "parts", multiple=True, type=click.Choice(tracking.PARTS), default=tracking.PARTS)
@click.option("--log", "logs", multiple=True, type=click.Choice(tracking.LOGS), default=tracking.LOGS[:1])
@click.option("--messages", default=20_000, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--events", default=10_000_000, show_default=True, help="In the large log, at most.")
@click.option("--seconds", default=480.0, show_default=True, help="To load it.")
@click.option("--envelopes", default=1_000_000, show_default=True, help="Messages that only notes tell of.")
@click.option("--json", "file", type=click.Path(path_type=Path), default=RECORD / "tracking.json")
def tracked(
    parts: Sequence[str],
    logs: Sequence[str],
    messages: int,
    rounds: int,
    events: int,
    seconds: float,
    envelopes: int,
    file: Path,
) -> None:
    """A consumer with tracking on and off; look-ups in a large event log.  What is not measured stays."""
    found = tracking.measure(parts, logs, messages, rounds, events, seconds, envelopes)
    before = json.loads(file.read_text()) if file.exists() else {}
    for part in ("looks", "envelopes"):
        if part in found:
            found[part] = {**before.get(part, {}), **found[part]}
    _keep(file, {**before, **found})


@main.command("streams")
@click.option("--messages", default=20_000, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), default=RECORD / "streams.json")
def redis_streams(messages: int = 20_000, rounds: int = 3, file: Path = RECORD / "streams.json") -> None:
    """Fresh messages over Redis Streams with the Redis store, beside a plain group reader."""
    _keep(file, streams.measure(messages, rounds))


@main.command()
def docs() -> None:
    """Bring the pictures and tables of docs/ up to what is on record."""
    folder = Path(__file__).parent.parent / "docs"
    picture.draw_all(RECORD, folder)
    tables.renew_all(RECORD, folder)


def _keep(file: Path, found: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**found, **environment()}, indent=1) + "\n")
    click.echo(f"kept in {file}", err=True)


if __name__ == "__main__":
    main()
