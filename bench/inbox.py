"""The inbox beside what people write: a consumer that inserts a row and commits, message by message.

Both take the same messages from a queue that is full already and put each into one table, durably; the
plain one remembers nothing.  The rounds alternate, and the median of their ratios is told.  Where a store
takes several transactions side by side, both are measured with as many threads, too.
"""

from __future__ import annotations

import statistics
import uuid
from typing import Any

import click

from bench.cells import Setting
from bench.contenders import Job, database, row
from bench.stack import Stack, contend, fill, stack
from idemp import Message
from idemp.bars import bar

WORKERS = {"sqlite": (1,), "postgresql": (1, 4)}


def measure(messages: int, rounds: int) -> dict[str, Any]:
    """Messages a second of each, and how many times as fast the inbox is."""
    cells: dict[str, Any] = {}
    pairs = [(name, workers) for name, many in WORKERS.items() for workers in many]
    with stack(("postgresql",)) as servers, bar(len(pairs) * rounds * 2, "inbox", least=1) as step:
        for name, workers in pairs:
            rates: dict[str, list[float]] = {"insert": [], "inbox": []}
            for number in range(rounds):
                for kind in rates if number % 2 == 0 else reversed(rates):
                    rates[kind].append(
                        _round(servers, name, Setting(contender=kind, workers=workers), messages)
                    )
                    step(1)
            ratio = statistics.median(a / b for a, b in zip(rates["inbox"], rates["insert"], strict=True))
            threads = f", {workers} threads" if workers > 1 else ""
            plain = f"{name}: insert and commit{threads}"
            cells[plain] = _summary(rates["insert"], {})
            cells[f"{name}: inbox{threads}"] = _summary(rates["inbox"], {plain: ratio})
    for name, each in cells.items():
        ratios = "  ".join(f"{ratio:5.2f} x {over.split(': ')[1]}" for over, ratio in each["ratios"].items())
        click.echo(f"{name:34} {each['median']:9.0f}/s  ({each['low']:.0f} to {each['high']:.0f})  {ratios}")
    return {"messages": messages, "cells": cells}


def _summary(rates: list[float], ratios: dict[str, float]) -> dict[str, Any]:
    return {"median": statistics.median(rates), "low": min(rates), "high": max(rates), "ratios": ratios}


def _round(servers: Stack, store: str, setting: Setting, count: int) -> float:
    """Messages a second.  Raises `SystemExit` if the table does not have each once."""
    url, queue = servers.store(store), f"b{uuid.uuid4().hex[:10]}-queue"
    ids = [uuid.uuid4().hex for _ in range(count)]
    fill(servers.broker, queue, [Message(each, "new_order", {"cents": 500}) for each in ids])
    with database(url) as connection:
        connection.execute("DROP TABLE IF EXISTS effect")
        connection.execute("CREATE TABLE effect (id TEXT)")
        connection.commit()
    [span] = contend(Job(setting, servers.broker, queue, 0, count, url))
    with database(url) as connection:
        rows = connection.execute("SELECT id FROM effect").fetchall()
    if sorted(row[0] for row in rows) != sorted(ids):
        raise SystemExit(f"void: {setting.contender} on {store} has {len(rows)} rows of {count}: {row(url)}")
    return count / (span["ended"] - span["began"])
