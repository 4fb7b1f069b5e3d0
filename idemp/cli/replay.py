"""``replay``: messages to their receivers once more, after a plan that asks their stores."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from idemp.bars import bar
from idemp.cli.consume import load
from idemp.cli.events import KINDS, events_at, moments, window
from idemp.cli.options import (
    Duration,
    agree,
    escaped,
    json_option,
    reason_option,
    store_at,
    transport_at,
    transport_option,
    who_option,
    yes_option,
)
from idemp.consumer import Consumer
from idemp.deeds import Book
from idemp.errors import ConfigError, IdempError
from idemp.message import Properties
from idemp.policy import Policy
from idemp.ports import Get, Query, Store
from idemp.resolve import set_all_free
from idemp.tracking import replay as replays
from idemp.tracking.replay import Desk, Item, Mark, Planned, Released

MOST = 1_000_000
"""Events that are looked at."""
_LOOK = 0.1
_UNSETTLED = ("waiting", "failed", "in doubt")


@click.command()
@click.option("--id", "ids", multiple=True, help="This message.")
@click.option("--conversation", default="", help="All messages of this conversation.")
@click.option("--service", default="", help="What this service received, or sent.")
@click.option("--type", "kind", default="", help="Messages of this type.")
@click.option("--outcome", "outcomes", multiple=True, type=click.Choice(KINDS), help="What came of them.")
@window
@click.option("--dead", metavar="QUEUE", help="What is in QUEUE.dead; QUEUE is like orders-queue.")
@click.option("--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="JSON lines.")
@click.option("--to", multiple=True, help="Only to this service; by default to those who received it.")
@click.option(
    "--store",
    "stores",
    metavar="[SERVICE=]URL",
    multiple=True,
    envvar="IDEMP_STORE",
    show_envvar=True,
    help="The receivers' store; several with the service's name before it.",
)
@click.option("--consumer", metavar="MODULE:NAME", help="The receiver itself, which knows its keys.")
@click.option("--tracking", metavar="URL", envvar="IDEMP_TRACKING", show_envvar=True, help="The event log.")
@click.option("--dry-run", is_flag=True, help="Only the plan.")
@click.option("--force", is_flag=True, help="Also what may have been done and forgotten.")
@click.option("--confirm", is_flag=True, help="To handlers with replay='confirm' too; --who confirms it.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Messages a second, at most.")
@click.option("--wait", type=Duration(), default=30.0, show_default="30s", help="For what comes of them.")
@click.option("--resume", metavar="REPLAY", help="Go on with one that was cut short.")
@click.option("--cancel", metavar="REPLAY", help="Give up one that was cut short.")
@yes_option
@reason_option
@who_option
@transport_option
@json_option
def replay(transport: str, tracking: str | None, as_json: bool, **given: Any) -> int:
    """Send messages to their receivers again: a plan first, then, if you agree, the messages.

    The plan says for each receiver, from its store: done already (it will be skipped), will run, in doubt,
    parked (set free first), or left out: its record may have expired (--force), or its body was not kept.
    Same message id, to the receiver's queue only.  Ctrl-C stops it; --resume goes on.

    Exit code 1 if there is nothing to send, or something did not become ok.
    """
    with ExitStack() as stack:
        desk = Desk(stack.enter_context(transport_at(transport)))
        if given["cancel"]:
            return _cancel(desk, given["cancel"], as_json)
        stores = _Stores(stack, given["stores"])
        if given["resume"]:
            return _release(desk, stores, given["resume"], given, as_json)
        policies = _policies(given["consumer"])
        items = _items(desk, tracking, policies, given)
        planned = replays.plan(
            items,
            stores,
            time.time(),
            policies=policies,
            force=given["force"],
            confirmed=given["confirm"],
        )
        sends = sum(each.verdict in replays.SENDS for each in planned)
        if as_json and given["dry_run"]:
            for each in planned:
                click.echo(json.dumps(_record(each)))
        if not as_json:
            _say(planned)
        if given["dry_run"] or not sends:
            return 0 if sends else 1
        agree(f"Send {sends} messages?", given["yes"], as_json)
        name = replays.new_id()
        origin = f"{given['dead'].removesuffix('.dead')}.dead" if given["dead"] else ""
        mark = Mark(name, given["who"] if given["confirm"] else "", time.time(), origin)
        for service in {each.item.service for each in planned}:
            book = Book(stores(service), given["who"], given["reason"])
            book.note("replay", replay=name, service=service, messages=sends)
        with bar(sends, "staged") as step:
            replays.stage(desk, planned, mark, step)
        return _release(desk, stores, name, given, as_json)


class _Stores:
    """The dedup store of each service."""

    def __init__(self, stack: ExitStack, urls: Sequence[str]) -> None:
        self._stack = stack
        self._urls: dict[str, str] = {}
        self._open: dict[str, Store] = {}
        for url in urls:
            service, equals, rest = url.partition("=")
            named = bool(equals) and "/" not in service and ":" not in service
            self._urls[service if named else ""] = rest if named else url

    def __call__(self, service: str) -> Store:
        url = self._urls.get(service) or self._urls.get("")
        if not url:
            raise ConfigError(f"--store (IDEMP_STORE): name the store of {service}: --store {service}=URL")
        if url not in self._open:
            self._open[url] = self._stack.enter_context(store_at(url))
        return self._open[url]


def _policies(target: str | None) -> Mapping[str, Policy | None] | None:
    if target is None:
        return None
    found = load(target)
    if not isinstance(found, Consumer):
        raise ConfigError(f"--consumer: {target} is no Consumer")
    return found.policies()


# ------------------------------------------------------------------ which


def _items(
    desk: Desk, tracking: str | None, policies: Mapping[str, Policy | None] | None, given: Mapping[str, Any]
) -> list[Item]:
    names = replays.names_of(policies)
    if given["dead"] and given["file"]:
        raise click.UsageError("Say --dead or --file.")
    if given["dead"]:
        found = replays.from_dead(desk, given["dead"].removesuffix(".dead"))
        return [each for each in found if _chosen(each, given)]
    if given["file"]:
        if not given["to"]:
            raise click.UsageError("Say --to, for a file does not tell who receives.")
        lines = [line for line in given["file"].read_bytes().splitlines() if line.strip()]
        made = [replays.item(line, Properties(), service, names) for line in lines for service in given["to"]]
        return [each for each in made if _chosen(each, given)]
    if not tracking:
        raise click.UsageError("Say --tracking (IDEMP_TRACKING), --dead or --file: where the messages are.")
    if not any(given[name] for name in ("ids", "conversation", "service", "kind", "outcomes", "since")):
        raise click.UsageError("Choose: --id, --conversation, --service, --type, --outcome or --since.")
    since, until = moments(given["since"], given["until"], time.time())
    items: list[Item] = []
    with events_at(tracking) as log:
        for uuid in given["ids"] or ("",):
            query = Query(
                uuid,
                given["conversation"],
                given["service"],
                given["kind"],
                given["outcomes"],
                "",
                since,
                until,
            )
            items += replays.from_events(log, query, given["to"], names, most=MOST)
    return items


def _chosen(each: Item, given: Mapping[str, Any]) -> bool:
    ids, kind, to = given["ids"], given["kind"], given["to"]
    return (not ids or each.uuid in ids) and kind in ("", each.type) and (not to or each.service in to)


# ------------------------------------------------------------------ the plan in words


_WORDS = {
    "run": "will run",
    "done": "done already, will be skipped",
    "doubt": "in doubt: the handler's policy decides",
    "parked": "parked: set free, then run",
    "busy": "running just now",
    "expired": "left out: the record may have expired (--force)",
    "confirm": "left out: must be confirmed (--confirm)",
    "never": "left out: replay='never'",
    "unknown": "left out: nobody can tell the key",
    "no body": "left out: the body was not kept",
}


def _say(planned: Sequence[Planned]) -> None:
    if not planned:
        click.echo("no messages were found")
    for service, verdicts in sorted(replays.counts(planned).items()):
        for verdict in replays.VERDICTS:
            if verdicts[verdict]:
                click.echo(f"{escaped(service)}: {verdicts[verdict]} {_WORDS[verdict]}")


def _record(each: Planned) -> dict[str, Any]:
    item = each.item
    told = {"id": item.uuid, "type": item.type, "service": item.service, "key": item.key}
    return {**told, "plan": each.verdict, "sends": each.verdict in replays.SENDS, "why": each.why}


# ------------------------------------------------------------------ the messages


def _cancel(desk: Desk, name: str, as_json: bool) -> int:
    back, gone = replays.cancel(desk, name)
    told = {"replay": name, "back_to_dead": back, "dropped": gone}
    text = f"replay {name}: {back} went back to the dead letters, {gone} copies were dropped"
    click.echo(json.dumps(told) if as_json else text)
    return 0


def _release(desk: Desk, stores: _Stores, name: str, given: Mapping[str, Any], as_json: bool) -> int:
    released: list[Released] = []
    staged = desk.transport.depth(replays.staging(name))
    if not staged:
        raise IdempError(f"replay {name} has nothing staged")

    books: dict[str, Book] = {}

    def free(some: Sequence[Released]) -> None:
        for service in {one.service for one in some}:
            if service not in books:
                of = "" if given["resume"] else name
                books[service] = Book(stores(service), given["who"], given["reason"], of=of)
                if given["resume"]:
                    books[service].note("replay resumed", replay=name, service=service, messages=staged)
            keys = [one.key for one in some if one.service == service]
            set_all_free(stores(service), keys, books[service])

    with _until_interrupted() as goes_on:
        with bar(staged, "sent") as step:

            def told(some: Sequence[Released]) -> None:
                released.extend(some)
                step(len(some))

            replays.release(desk, name, rate=given["rate"] or 0.0, free=free, goes_on=goes_on, told=told)
        with bar(len(set(released)), "settled", least=1) as settled:
            outcomes = _settled(released, stores, given["wait"], goes_on, settled)
    counted = Counter(outcomes.values())
    for one, became in outcomes.items():
        line = f"{became:<9}{escaped(one.key)}"
        click.echo(
            json.dumps({"key": one.key, "service": one.service, "outcome": became}) if as_json else line
        )
    left = staged - len(released)
    told_all = {"replay": name, "sent": len(released), "ran": counted["ok"], "left": left, **counted}
    what = ", ".join(f"{n} {became}" for became, n in sorted(counted.items()))
    text = f"replay {name}: {len(released)} sent: {what or 'nothing'}"
    if left:
        text += f"; {left} are still staged: idemp replay --resume {name}, or --cancel {name}"
    click.echo(json.dumps(told_all) if as_json else text)
    return 0 if not left and counted.keys() <= {"ok", "skipped"} else 1


def _settled(
    released: Sequence[Released],
    stores: _Stores,
    wait: float,
    goes_on: Callable[[], bool],
    step: Callable[[int], None],
) -> dict[Released, str]:
    """What became of each, by its receiver's store; those that take too long are waiting."""
    found: dict[Released, str] = {}
    left = list(dict.fromkeys(released))
    end = time.monotonic() + wait
    while left:
        for service in dict.fromkeys(each.service for each in left):
            mine = [each for each in left if each.service == service]
            for start in range(0, len(mine), replays.TOGETHER):
                some = mine[start : start + replays.TOGETHER]
                states = stores(service).apply([Get(each.key) for each in some])
                found |= {
                    each: replays.outcome(each, state) for each, state in zip(some, states, strict=True)
                }
        before, left = len(left), [each for each in left if found[each] in _UNSETTLED]
        step(before - len(left))
        if time.monotonic() > end or not goes_on():
            break
        if left:
            time.sleep(_LOOK)
    return {each: found[each] for each in dict.fromkeys(released)}


@contextmanager
def _until_interrupted() -> Iterator[Callable[[], bool]]:
    """False once Ctrl-C was pressed, or SIGTERM came; the second one is deadly as usual."""
    stopped: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        stopped.append(number)
        for which, handler in before.items():
            signal.signal(which, handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield lambda: not stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
