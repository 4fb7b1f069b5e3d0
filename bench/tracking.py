"""Tracking: what it costs a consumer, and how long look-ups take in a large event log."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from bench.cells import Setting
from bench.stack import run, stack
from idemp import open_event_log
from idemp.bars import bar, watching
from idemp.ports import Batch, Event, EventLog, Progress, Query
from idemp.tracking import flow, trace

CHAIN = 4
"""Messages in each conversation of the large log."""
SERVICES = 12
LOOKS = 50
_AT = 1_700_000_000.0


def measure(messages: int, rounds: int, events: int, seconds: float) -> dict[str, Any]:
    """Ratios of alternating rounds; then look-ups in as many events as are loaded in ``seconds``."""
    return {"cost": cost(messages, rounds), "looks": looks(events, seconds)}


def cost(messages: int, rounds: int) -> dict[str, Any]:
    """Messages a second with tracking off and on; each event recorded, or the round is void."""
    rates: dict[str, list[float]] = {}
    with stack(("sqlite", "etcd")) as servers, bar(rounds * 4, "tracking", least=1) as step:
        for number in range(rounds):
            for store in ("etcd", "sqlite"):
                for on in (False, True) if number % 2 == 0 else (True, False):
                    url = f"sqlite:///{servers.folder}/events-{number}-{store}.db" if on else ""
                    rate = run(Setting(contender=store, tracking=url), servers, messages)
                    rates.setdefault(f"{store}, {'on' if on else 'off'}", []).append(rate)
                    step(1)
                    if on:
                        with closing(open_event_log(url)) as log:
                            known = sum(edge.n for edge in log.edges())
                        if known != messages:
                            raise SystemExit(f"void: {known} of {messages} events were recorded")
    found: dict[str, Any] = {}
    for store in ("etcd", "sqlite"):
        off, on_ = rates[f"{store}, off"], rates[f"{store}, on"]
        ratio = statistics.median(b / a for a, b in zip(off, on_, strict=True))
        found[store] = {"off": statistics.median(off), "on": statistics.median(on_), "ratio": ratio}
        click.echo(f"{store:8} off {found[store]['off']:8.0f}/s  on {found[store]['on']:8.0f}/s  {ratio:.2f}")
    return found


def looks(events: int, seconds: float) -> dict[str, Any]:
    """Milliseconds, the median and the worst of `LOOKS`, in a log of SQLite."""
    with tempfile.TemporaryDirectory(prefix="idemp-bench-") as folder:
        url = f"sqlite:///{folder}/events.db?rows={events + 1}&retention=36500d"
        with closing(open_event_log(url)) as log:
            loaded = load(log, events, seconds)
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
        with closing(open_event_log(url)) as log:
            chance = random.Random(1)
            chains = loaded // (2 * CHAIN)
            found = {
                "trace": timed(lambda: _trace(log, f"{chance.randrange(chains)}-{CHAIN - 1}")),
                "events of a service": timed(lambda: log.find(Query(service="s3", kinds=("ok",)), limit=100)),
                "flow": timed(lambda: flow.svg(log.edges())),
            }
    click.echo(f"{loaded} events, {size / loaded:.0f} bytes each")
    for name, (median, worst) in found.items():
        click.echo(f"{name:22} {median:8.2f} ms  {worst:8.2f} ms at worst")
    return {"events": loaded, "messages": loaded // 2, "bytes": size, "milliseconds": found}


def load(log: EventLog, events: int, seconds: float) -> int:
    """Fill it; how many events fitted in."""
    end, loaded, number = time.monotonic() + seconds, 0, 0
    with watching("loading events", lambda: Progress(loaded, events)):
        while loaded < events and time.monotonic() < end:
            some = [event for n in range(number * 500, number * 500 + 500) for event in _life(n)]
            log.append(Batch("bench", number, some))
            number += 1
            loaded += len(some)
    return loaded


def _life(n: int) -> list[Event]:
    """A message that was sent and handled, one of a chain."""
    chain, place = divmod(n, CHAIN)
    uuid, parent = f"{chain}-{place}", f"{chain}-{place - 1}" if place else ""
    sender, receiver = f"s{(chain + place) % SERVICES}", f"s{(chain + place + 1) % SERVICES}"
    at = _AT + n / 100
    kind = f"type{place}"
    whole = f"{chain}-0"
    return [
        Event(uuid, "sent", sender, at, "sender", parent, whole, sender, kind, sent_at=at),
        Event(uuid, "ok", receiver, at + 0.1, "receiver", parent, whole, sender, kind, "", at, 0.01),
    ]


def _trace(log: EventLog, uuid: str) -> None:
    [root] = trace.stories(log.story(uuid, limit=1000))
    if len(list(root.walk())) != CHAIN:
        raise SystemExit(f"void: the story of {uuid} has {len(list(root.walk()))} messages")


def timed(work: Any) -> tuple[float, float]:
    """Median and worst, in milliseconds."""
    took = []
    for _ in range(LOOKS):
        began = time.perf_counter()
        work()
        took.append((time.perf_counter() - began) * 1000)
    return statistics.median(took), max(took)
