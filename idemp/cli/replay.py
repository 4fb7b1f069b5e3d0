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

from idemp.bars import bar, watching
from idemp.cli.consume import load
from idemp.cli.events import KINDS, events_at, moments, window
from idemp.cli.options import (
    Duration,
    agree,
    broker_at,
    escaped,
    json_option,
    reason_option,
    store_at,
    transport_option,
    who_option,
    yes_option,
)
from idemp.consumer import Consumer
from idemp.deeds import Book
from idemp.errors import ConfigError, IdempError, Unavailable, Unroutable
from idemp.message import Properties
from idemp.ports import Query, Store
from idemp.resolve import MOST as LETTERS
from idemp.resolve import set_all_free
from idemp.tracking import replay as replays
from idemp.tracking.hold import check, holding
from idemp.tracking.pace import Pace
from idemp.tracking.plan_queue import Kept, PlanQueue, name_of
from idemp.tracking.replay import Desk, Handlers, Item, Mark, Planned, Released

MOST = 1_000_000
"""Events that are looked at."""
DEAD = 15.0
"""Seconds until one that resumes is told that the other is alive: more than a session lives."""
_LOOK = 0.1
_SELECTION = (
    *("ids", "conversation", "service", "kind", "outcomes", "since", "until", "dead", "file", "to"),
    *("consumer", "force", "confirm"),
)


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
@click.option(
    "--pause-at",
    type=click.FloatRange(0, 100),
    default=20.0,
    show_default=True,
    help="Pause when so many in 100 fail; 0: never.",
)
@click.option("--resume", metavar="REPLAY", help="Go on with one that was cut short, or paused.")
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
    Same message id, to the receiver's queue only.  Ctrl-C stops it, and so do failures (--pause-at);
    --resume goes on.  One replay at a time goes to a service.

    Exit code 1 if there is nothing to send, or something did not become ok.
    """
    with ExitStack() as stack:
        desk = Desk(stack.enter_context(broker_at(transport)))
        if given["cancel"]:
            return _cancel(desk, given["cancel"], as_json)
        stores = _Stores(stack, given["stores"])
        run = _Run(stack, desk, stores, transport, tracking, given, as_json)
        if given["resume"]:
            return run.resume(given["resume"])
        given["since"], given["until"] = moments(given["since"], given["until"], time.time())
        if given["dead"] and given["file"]:
            raise click.UsageError("Say --dead or --file.")
        if given["dead"]:  # whose letters are out while another replays them
            service = given["dead"].removesuffix(".dead").removesuffix("-queue")
            check(stores(service), service)
        planned = run.plan()
        sends = len(replays.sends(planned))
        if as_json and given["dry_run"]:
            for each in planned:
                click.echo(json.dumps(_record(each)))
        if not as_json:
            _say(planned)
        if given["dry_run"] or not sends:
            return 0 if sends else 1
        agree(f"Send {sends} messages?", given["yes"], as_json)
        return run.begin(replays.sends(planned))


class _Run:
    """One replay, from its plan to what became of it."""

    def __init__(
        self,
        stack: ExitStack,
        desk: Desk,
        stores: _Stores,
        transport: str,
        tracking: str | None,
        given: dict[str, Any],
        as_json: bool,
    ) -> None:
        self._stack, self._desk, self._stores = stack, desk, stores
        self._transport, self._tracking, self._given, self._as_json = transport, tracking, given, as_json
        self._holds: list[Callable[[], bool]] = []
        self._asked = 0.0

    def plan(self) -> list[Planned]:
        """What would become of what was chosen."""
        given = self._given
        handlers = _handlers(given["consumer"])
        self._asked = time.time()
        return replays.plan(
            _items(self._desk, self._tracking, handlers, given),
            self._stores,
            self._asked,
            handlers=handlers,
            force=given["force"],
            confirmed=given["confirm"],
        )

    def begin(self, chosen: Sequence[Planned]) -> int:
        """Stage these and release them."""
        given, name = self._given, replays.new_id()
        origin = f"{given['dead'].removesuffix('.dead')}.dead" if given["dead"] else ""
        mark = Mark(name, given["who"] if given["confirm"] else "", self._asked, origin)
        self._hold(name, Counter(each.item.service for each in chosen), 0.0)
        kept = PlanQueue(self._desk, name)
        kept.keep(chosen, mark, _selection(given))
        return self._stage(kept, chosen, mark) or self._release(name)

    def resume(self, name: str) -> int:
        """Go on where it was cut short."""
        plan = self._kept(name)
        self._hold(name, Counter(service for service, _ in plan.names), DEAD)
        _await(self._desk, name)
        plan = self._kept(name)  # as whoever had it left it
        missing = 0
        if not plan.released and (plan.staged < len(plan.names) or plan.mark.origin):
            self._given.update(plan.selection)
            if self._given["file"] and not Path(self._given["file"]).exists():
                raise ConfigError(
                    f"--resume {name}: its messages were in {self._given['file']}, which is gone"
                )
            if plan.mark.origin:
                _wait_for(self._desk, plan.mark.origin)  # also the letters that it had
            rest = self._rest(plan)
            missing = len(plan.names) - plan.staged - len(rest)
            kept = PlanQueue(self._desk, name)
            kept.number(plan.names)
            if failed := self._stage(kept, rest, plan.mark):
                return failed
        if missing:
            what = "are not there any more, or not to be sent now"
            click.echo(f"idemp: {missing} of those that were planned {what}", err=True)
        return self._release(name) or (1 if missing else 0)

    def _kept(self, name: str) -> Kept:
        """Its plan, read on a connection of its own, which gives it back."""
        _wait_for(self._desk, PlanQueue(self._desk, name).queue)
        with broker_at(self._transport) as other:
            plan = PlanQueue(Desk(other), name).read()
        if plan is not None:
            return plan
        if self._desk.transport.depth(replays.staging(name)):
            cancel = f"idemp replay --cancel {name}"
            raise IdempError(f"replay {name} has messages and no plan; bring them back: {cancel}")
        raise IdempError(f"replay {name} has nothing staged")

    def _rest(self, plan: Kept) -> list[Planned]:
        """What was planned and is not staged yet.  Letters whose copies are staged are let go."""
        here = {name_of(each.item): each for each in self.plan()}
        staged = (here[name].item.tag for name in plan.names[: plan.staged] if name in here)
        self._desk.settle([tag for tag in staged if tag is not None])
        return replays.sends([here[name] for name in plan.names[plan.staged :] if name in here])

    def _hold(self, name: str, messages: Mapping[str, int], wait: float) -> None:
        """Nobody else replays to these services until the end; and it is recorded who does."""
        for service in sorted(messages):
            store = self._stores(service)
            with watching(f"waiting until nobody else replays to {service}", lambda: None):
                self._holds.append(self._stack.enter_context(holding(store, service, wait=wait)))
        for service, n in messages.items():
            book = Book(self._stores(service), self._given["who"], self._given["reason"])
            book.note("replay", replay=name, service=service, messages=n)

    def _stage(self, kept: PlanQueue, chosen: Sequence[Planned], mark: Mark) -> int:
        """0, or the exit code of one that was interrupted."""
        try:
            with bar(len(chosen), "staged") as step:
                replays.stage(self._desk, chosen, mark, step, safe=kept.staged)
            kept.released()
        except (KeyboardInterrupt, Unavailable) as error:
            why = str(error) or "it was interrupted"
            click.echo(f"idemp: {why}; {_onward(mark.replay)}", err=True)
            return 1
        return 0

    def _release(self, name: str) -> int:
        """Send what is staged; who cannot be reached is to be tried again."""
        try:
            return _release(self._desk, self._stores, name, self._given, self._as_json, self._holds)
        except (Unroutable, Unavailable) as error:
            raise IdempError(f"{error}; {_onward(name)}") from None


def _selection(given: Mapping[str, Any]) -> dict[str, Any]:
    """What finds the same messages again, also from another folder."""
    found = {name: given[name] for name in _SELECTION}
    return {**found, "file": str(given["file"].absolute()) if given["file"] else None}


def _onward(name: str) -> str:
    return f"idemp replay --resume {name} goes on, --cancel {name} gives it up"


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


def _handlers(target: str | None) -> Handlers:
    if target is None:
        return {}
    found = load(target)
    if not isinstance(found, Consumer):
        raise ConfigError(f"--consumer: {target} is no Consumer")
    return {found.service: found.policies()}


# ------------------------------------------------------------------ which


def _items(desk: Desk, tracking: str | None, handlers: Handlers, given: Mapping[str, Any]) -> list[Item]:
    names = replays.names_of(handlers)
    if given["dead"]:
        queue = given["dead"].removesuffix(".dead")
        if (letters := desk.transport.depth(f"{queue}.dead")) > LETTERS:
            said = f"{queue}.dead has {letters} messages: the first {LETTERS} now, replay again for the rest"
            click.echo(f"idemp: {said}", err=True)
        found = replays.from_dead(desk, queue)
        return [each for each in found if _chosen(each, given)]
    if given["file"]:
        if not given["to"]:
            raise click.UsageError("Say --to, for a file does not tell who receives.")
        lines = [line for line in Path(given["file"]).read_bytes().splitlines() if line.strip()]
        made = [replays.item(line, Properties(), service, names) for line in lines for service in given["to"]]
        return [each for each in made if _chosen(each, given)]
    if not tracking:
        raise click.UsageError("Say --tracking (IDEMP_TRACKING), --dead or --file: where the messages are.")
    if not any(given[name] for name in ("ids", "conversation", "service", "kind", "outcomes", "since")):
        raise click.UsageError("Choose: --id, --conversation, --service, --type, --outcome or --since.")
    items: list[Item] = []
    with events_at(tracking) as log:
        for uuid in given["ids"] or ("",):
            query = Query(
                uuid,
                given["conversation"],
                given["service"],
                given["kind"],
                tuple(given["outcomes"]),
                "",
                given["since"],
                given["until"],
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


def _wait_for(desk: Desk, queue: str) -> bool:
    """Whether all that a killed process had of ``queue`` is there again."""
    with watching(f"waiting for what a process that was killed had of {queue}", lambda: None):
        return replays.given_back(desk, queue)


def _await(desk: Desk, name: str) -> None:
    """All of the replay's messages.  Raises `IdempError` if some are still out."""
    for queue in (replays.staging(name), PlanQueue(desk, name).queue):
        if not _wait_for(desk, queue):
            raise IdempError(
                f"replay {name}: messages of {queue} are out with a process that lives, or was lost just now;"
                " end it, or try again later"
            )


def _cancel(desk: Desk, name: str, as_json: bool) -> int:
    _await(desk, name)
    back, gone = replays.cancel(desk, name)
    PlanQueue(desk, name).drop()
    replays.leave(desk, name)
    told = {"replay": name, "back_to_dead": back, "dropped": gone}
    text = f"replay {name}: {back} went back to the dead letters, {gone} copies were dropped"
    click.echo(json.dumps(told) if as_json else text)
    return 0


def _release(
    desk: Desk,
    stores: _Stores,
    name: str,
    given: Mapping[str, Any],
    as_json: bool,
    holds: Sequence[Callable[[], bool]],
) -> int:
    staged = desk.transport.depth(replays.staging(name))
    pace = Pace(stores, limit=given["pause_at"] / 100, patience=given["wait"])
    paused = ""

    books: dict[str, Book] = {}

    def free(some: Sequence[Released]) -> None:
        for service in {one.service for one in some}:
            if service not in books:
                of = "" if given["resume"] else name
                books[service] = Book(stores(service), given["who"], given["reason"], of=of)
                if given["resume"]:
                    books[service].note("replay resumed", replay=name, service=service, messages=staged)
            tokens = {one.key: one.token for one in some if one.service == service}
            set_all_free(stores(service), tokens, books[service], tokens)

    with _until_interrupted() as goes_on:

        def may() -> bool:
            nonlocal paused
            if goes_on() and not all(hold() for hold in holds):
                paused = "it stood still so long that another may replay to the same service"
            elif goes_on():
                paused = pace.trouble(goes_on)
            return goes_on() and not paused

        with bar(staged, "sent") as step:

            def told(some: Sequence[Released]) -> None:
                pace.sent(some)
                step(len(some))

            sent = replays.release(desk, name, rate=given["rate"] or 0.0, free=free, goes_on=may, told=told)
        if not paused:
            with bar(sent, "settled", least=1) as settled:
                _settle(pace, given["wait"], goes_on, settled)
    left = staged - sent
    if not left:
        PlanQueue(desk, name).drop()
        replays.leave(desk, name)
    _report(name, pace.outcomes, sent, left, paused, as_json)
    return 0 if not left and set(pace.outcomes.values()) <= {"ok", "skipped"} else 1


def _settle(pace: Pace, wait: float, goes_on: Callable[[], bool], settled: Callable[[int], None]) -> None:
    """Until all came to an end, or it takes too long."""
    end, told = time.monotonic() + wait, 0
    while True:
        pace.look()
        settled(pace.over() - told)
        told = pace.over()
        if pace.ended() or time.monotonic() > end or not goes_on():
            return
        time.sleep(_LOOK)


def _report(
    name: str, outcomes: Mapping[Released, str], sent: int, left: int, paused: str, as_json: bool
) -> None:
    counted = Counter(outcomes.values())
    for one, became in outcomes.items():
        line = f"{became:<9}{escaped(one.key)}"
        click.echo(
            json.dumps({"key": one.key, "service": one.service, "outcome": became}) if as_json else line
        )
    told = {"replay": name, "sent": sent, "ran": counted["ok"], "left": left, **counted}
    if paused:
        told["paused"] = paused
    what = ", ".join(f"{n} {became}" for became, n in sorted(counted.items()))
    text = f"replay {name}: {sent} sent: {what or 'nothing'}"
    if paused:
        text += f"; paused: {paused}"
    if left:
        text += f"; {left} are still staged: idemp replay --resume {name}, or --cancel {name}"
    click.echo(json.dumps(told) if as_json else text)


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
