"""Tracking: what it costs a consumer, and how long look-ups take in a large event log."""

from __future__ import annotations

import hashlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import click

from bench.cells import Setting
from bench.stack import run, stack
from idemp import open_event_log
from idemp.bars import bar, watching
from idemp.ports import Batch, Event, EventLog, Progress, Query
from idemp.tracking import trace
from idemp.tracking.picture import svg
from tests.servers import PostgreSQL

CHAIN = 4
"""Messages in each conversation of the large log."""
SERVICES = 12
TOGETHER = 20_000
"""Messages that are written in one transaction, while the large log is loaded."""
ENVELOPES = 1_000
"""Messages that are written in one transaction, while envelopes are loaded: as from a service."""
LOOKS = {"trace": 2000, "events of a service": 200, "flow": 100}
"""How often each is asked."""
PARTS = ("cost", "looks", "envelopes")
LOGS = ("sqlite", "postgresql")
_AT = 1_700_000_000.0


def measure(
    parts: Sequence[str],
    logs: Sequence[str],
    messages: int,
    rounds: int,
    events: int,
    seconds: float,
    envelopes: int,
) -> dict[str, Any]:
    """Ratios of alternating rounds; look-ups in as many events as are loaded in ``seconds``."""
    found: dict[str, Any] = {}
    if "cost" in parts:
        found = {"rounds": rounds, "messages": messages, "cost": cost(messages, rounds)}
    if "looks" in parts:
        found["looks"] = {}
        for name in logs:
            with large(name, events) as url:
                found["looks"][name] = looks(name, url, events, seconds)
    if "envelopes" in parts:
        found["envelopes"] = {}
        for name in logs:
            with large(name, envelopes * 2) as url:
                found["envelopes"][name] = flow_of_envelopes(name, url, envelopes, seconds)
    return found


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


@contextmanager
def large(name: str, events: int) -> Iterator[str]:
    """The URL of an event log that has room for so many; it is gone afterwards."""
    options = f"rows={events + 1}&retention=36500d"
    if name == "sqlite":
        with tempfile.TemporaryDirectory(prefix="idemp-bench-") as folder:
            yield f"sqlite:///{folder}/events.db?{options}"
    else:
        with PostgreSQL() as server:
            yield f"{server.url}?{options}"


def looks(name: str, url: str, events: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of look-ups of messages chosen at random."""
    began = time.monotonic()
    with closing(open_event_log(url)) as log:
        loaded = load(log, events, seconds)
    took = time.monotonic() - began
    with closing(open_event_log(url)) as log:
        chance = random.Random(1)
        chains = loaded // (2 * CHAIN)
        found = {
            "trace": timed(
                "trace", lambda: _trace(log, _uuid(chance.randrange(chains), chance.randrange(CHAIN)))
            ),
            "events of a service": timed(
                "events of a service", lambda: log.find(Query(service="s3", kinds=("ok",)), limit=100)
            ),
            "flow": timed("flow", lambda: svg(log.edges())),
        }
    click.echo(f"{name}: {loaded} events, loaded in {took:.0f} s")
    for what, each in found.items():
        click.echo(f"  {what:22}" + "".join(f" {value:8.2f} ms {share}" for share, value in each.items()))
    size = _size(url)
    return {
        "events": loaded,
        "messages": loaded // 2,
        "seconds": round(took, 1),
        **({} if size is None else {"bytes": size}),
        "milliseconds": found,
    }


def _size(url: str) -> int | None:
    """Bytes of a log in a file."""
    path = Path(url.removeprefix("sqlite:///").partition("?")[0])
    return sum(file.stat().st_size for file in path.parent.iterdir()) if path.exists() else None


def flow_of_envelopes(name: str, url: str, messages: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of the flow of envelopes, as other libraries log them: without roles, types, senders."""
    began = time.monotonic()
    with closing(open_event_log(url)) as log:
        loaded = load(log, messages * 2, seconds, _envelope, ENVELOPES) // 2
        took = time.monotonic() - began
        found = {"flow": timed("flow", lambda: svg(log.edges()))}
        counted = sum(edge.n for edge in log.edges())
    if counted != loaded:
        raise SystemExit(f"void: {counted} of {loaded} messages are in the flow")
    told = "".join(f" {value:8.2f} ms {share}" for share, value in found["flow"].items())
    click.echo(f"{name}: {loaded} envelopes, loaded in {took:.0f} s; flow{told}")
    return {"messages": loaded, "seconds": round(took, 1), "milliseconds": found}


def load(
    log: EventLog,
    events: int,
    seconds: float,
    life: Callable[[int], list[Event]] | None = None,
    together: int = TOGETHER,
) -> int:
    """Fill it, with a transaction for many messages; how many events fitted in.  ``life``: of a message."""
    end, loaded, number = time.monotonic() + seconds, 0, 0
    with watching("loading events", lambda: Progress(loaded, events)):
        while loaded < events and time.monotonic() < end:
            first = number * together
            last = min(first + together, events // 2)
            some = [event for n in range(first, last) for event in (life or _life)(n)]
            log.append(Batch("bench", number, some))
            number += 1
            loaded += len(some)
    return loaded


def _uuid(chain: int, place: int) -> str:
    """As scattered as ids are."""
    return hashlib.blake2b(f"{chain}-{place}".encode(), digest_size=16).hexdigest()


def _life(n: int) -> list[Event]:
    """A message that was sent and handled, one of a chain."""
    chain, place = divmod(n, CHAIN)
    uuid, parent = _uuid(chain, place), _uuid(chain, place - 1) if place else ""
    sender, receiver = f"s{(chain + place) % SERVICES}", f"s{(chain + place + 1) % SERVICES}"
    at = _AT + n / 100
    kind = f"type{place}"
    whole = _uuid(chain, 0)
    return [
        Event(uuid, "sent", sender, at, "sender", parent, whole, sender, kind, sent_at=at),
        Event(uuid, "ok", receiver, at + 0.1, "receiver", parent, whole, sender, kind, "", at, 0.01),
    ]


def _envelope(n: int) -> list[Event]:
    """A message that two services tell of, in their own words."""
    chain, place = divmod(n, CHAIN)
    uuid, parent = _uuid(chain, place), _uuid(chain, place - 1) if place else ""
    at = _AT + n / 100
    sender, receiver = f"s{(chain + place) % SERVICES}", f"s{(chain + place + 1) % SERVICES}"
    return [
        Event(uuid, "note", sender, at, parent=parent, why="sending"),
        Event(uuid, "note", receiver, at + 0.1, parent=parent, why="received"),
    ]


def _trace(log: EventLog, uuid: str) -> None:
    [root] = trace.stories(log.story(uuid, limit=1000))
    if len(list(root.walk())) != CHAIN:
        raise SystemExit(f"void: the story of {uuid} has {len(list(root.walk()))} messages")


def timed(name: str, work: Any) -> dict[str, float]:
    """Milliseconds: the median, that of 99 in 100, and the worst."""
    took = []
    for _ in range(LOOKS[name]):
        began = time.perf_counter()
        work()
        took.append((time.perf_counter() - began) * 1000)
    took.sort()
    return {"p50": statistics.median(took), "p99": took[int(len(took) * 0.99)], "worst": took[-1]}
