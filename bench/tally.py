"""What it costs a consumer that the audit counts its messages."""

from __future__ import annotations

import statistics
from contextlib import closing
from typing import Any

import click

from bench.cells import Setting
from bench.contenders import AUDIT
from bench.stack import run, stack
from idemp import open_transport
from idemp.audit.tallies import Tallies

STORES = ("etcd", "sqlite")


def measure(messages: int, rounds: int) -> dict[str, Any]:
    """Messages a second with and without, in alternating rounds; void unless each message is counted once."""
    rates: dict[str, list[float]] = {}
    with stack(STORES) as servers:
        with closing(open_transport(servers.broker)) as transport:
            transport.declare(f"{AUDIT}-in", AUDIT, "auditmq", kind="direct")
        for number in range(rounds):
            for store in STORES:
                for on in (False, True) if number % 2 == 0 else (True, False):
                    file = f"{servers.folder}/tallies-{number}-{store}.db" if on else ""
                    rate = run(Setting(contender=store, tallies=file), servers, messages)
                    rates.setdefault(f"{store}, {'on' if on else 'off'}", []).append(rate)
                    if on and (counted := _counted(file)) != messages:
                        raise SystemExit(f"void: {counted} of {messages} messages were counted")
    found: dict[str, Any] = {"messages": messages, "rounds": rounds}
    for store in STORES:
        off, on_ = rates[f"{store}, off"], rates[f"{store}, on"]
        ratios = [b / a for a, b in zip(off, on_, strict=True)]
        found[store] = {
            "off": statistics.median(off),
            "on": statistics.median(on_),
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
        }
        each = found[store]
        click.echo(
            f"{store:8} off {each['off']:8.0f}/s  on {each['on']:8.0f}/s  {each['ratio']:.2f}"
            f"  ({each['low']:.2f} to {each['high']:.2f})"
        )
    return found


def _counted(file: str) -> int:
    with closing(Tallies(file, alone=False)) as tallies:
        return sum(tally.count for tally in tallies.buckets("new_order").values())
