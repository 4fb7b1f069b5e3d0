"""``dead``: look at dead letters, and send them back."""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import click

from idemp.bars import bar
from idemp.cli import options
from idemp.cli.keys import age
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
from idemp.dead import Letter, letters
from idemp.deeds import Book
from idemp.errors import ConfigError
from idemp.ports import Delivery, Done, Get, Parked, Store, Transport
from idemp.resolve import MOST, send_all_back, set_all_free

PATIENCE = 30.0
"""Seconds that the first may take until it is known what became of it."""
_LOOK = 0.2
_WELL = ("done", "taken")
"""What becomes of the first where the rest may follow."""
_BODY = 2000
"""Characters of a body that are shown."""
_REASONS = 10
"""What letters died of, in the deed: the most frequent."""
_SETTLED = 2.0
"""Seconds with an empty queue after which a message counts as taken, where no store can be asked."""

Wanted = Callable[[Mapping[str, Any]], bool]


def _queue(value: str) -> str:
    """``orders-queue``, also when it is called ``orders-queue.dead``."""
    return options.unicode(value).removesuffix(".dead")


_chosen = (
    click.argument("queue", type=_queue),
    click.option("--key", type=options.key, help="Only messages of this key."),
    click.option("--reason-has", metavar="TEXT", help="Only those whose outcome or reason has TEXT in it."),
)


def _choice(command: Callable[..., Any]) -> Callable[..., Any]:
    for decorate in reversed(_chosen):
        command = decorate(command)
    return command


@click.group()
def dead() -> None:
    """Messages that were set aside: why, and back to their queue.

    QUEUE is like orders-queue; its dead letters are in orders-queue.dead.
    """


# ------------------------------------------------------------------ look


@dead.command("list")
@_choice
@transport_option
@json_option
def list_(queue: str, key: str | None, reason_has: str | None, transport: str, as_json: bool) -> None:
    """Group them by reason: how many, since when, and one of each."""
    with broker_at(transport) as broker:
        depth = broker.depth(f"{queue}.dead")
        found = _chosen_of(broker, queue, key, reason_has)
    groups: dict[str, list[Letter]] = {}
    for letter in found:
        groups.setdefault(letter.group, []).append(letter)
    for some in sorted(groups.values(), key=len, reverse=True):
        click.echo(json.dumps(_record_of_group(some)) if as_json else _lines_of_group(some))
    if not as_json:
        many = f"{len(found)} of {depth}" if len(found) != depth else str(depth)
        click.echo(f"{many} messages in {queue}.dead" if depth else f"{queue}.dead is empty")


@dead.command()
@_choice
@click.option("--limit", type=click.IntRange(min=1), default=1, show_default=True, help="Show so many.")
@transport_option
@json_option
def show(
    queue: str, key: str | None, reason_has: str | None, limit: int, transport: str, as_json: bool
) -> int:
    """Show them whole, the oldest first; exit code 1 if there is none."""
    shown = 0
    with broker_at(transport) as broker:
        for letter in letters(broker, queue):
            if shown < limit and _is(letter, key, reason_has):
                shown += 1
                record = _record(letter)
                click.echo(json.dumps(record) if as_json else _pairs(record))
    if not shown:
        click.echo(f"idemp: {queue}.dead has no such message", err=True)
    return 0 if shown else 1


def _is(letter: Letter, key: str | None, reason_has: str | None) -> bool:
    about = f"{letter.outcome}: {letter.reason}"
    return key in (None, letter.key) and (reason_has is None or reason_has in about)


def _record_of_group(some: Sequence[Letter]) -> dict[str, Any]:
    first = some[0]
    times = [letter.at for letter in some if letter.at is not None]
    return {
        "messages": len(some),
        "outcome": first.outcome,
        "reason": first.reason,
        "key": first.key,
        "oldest": min(times, default=None),
        "newest": max(times, default=None),
    }


def _lines_of_group(some: Sequence[Letter]) -> str:
    times = [letter.at for letter in some if letter.at is not None]
    since = f", published {age(time.time() - min(times))} ago at most" if times else ""
    first = some[0]
    return (
        f"{len(some):>6}  {escaped(f'{first.outcome}: {first.reason}')}\n"
        f"        like {escaped(first.key) or 'one without a key'}{since}"
    )


def _record(letter: Letter) -> dict[str, Any]:
    record: dict[str, Any] = {
        "key": letter.key,
        "outcome": letter.outcome,
        "reason": letter.reason,
        "attempt": letter.attempt,
        "queue": letter.queue,
        "type": letter.type,
        "message_id": letter.properties.message_id,
        "published": letter.at,
    }
    others = {
        str(name): str(value)
        for name, value in letter.properties.headers.items()
        if not str(name).startswith("idemp-")
    }
    return {**record, "headers": others, "body": letter.body.decode(errors="backslashreplace")}


def _pairs(record: Mapping[str, Any]) -> str:
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in record.items()}
    if record["published"] is not None:
        texts["published"] = datetime.fromtimestamp(record["published"], UTC).isoformat(timespec="seconds")
    body = texts["body"]
    texts["body"] = body if len(body) <= _BODY else f"{body[:_BODY]} ... ({len(body)} characters)"
    return "\n".join(f"{name + ':':<13}{escaped(text)}" for name, text in texts.items()) + "\n"


# ------------------------------------------------------------------ send


@dead.command()
@_choice
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.option("--no-first", is_flag=True, help="Do not send one first and wait for what becomes of it.")
@click.option(
    "--wait", type=Duration(), default=PATIENCE, show_default="30s", help="How long the first may take."
)
@yes_option
@reason_option
@who_option
@click.option(
    "--store",
    metavar="URL",
    envvar="IDEMP_STORE",
    show_envvar=True,
    help="The service's store, where their keys are parked; a service without one needs none.",
)
@transport_option
@json_option
def send(
    queue: str,
    key: str | None,
    reason_has: str | None,
    everything: bool,
    no_first: bool,
    wait: float,
    yes: bool,
    reason: str,
    who: str,
    store: str | None,
    transport: str,
    as_json: bool,
) -> int:
    """Send them back to the queue that they came from: one first, then the rest.

    Their keys are set free before.  A message is taken out only when its copy is safe, so whatever is
    killed here is done again by the same command: none is lost, and what went twice is skipped.
    Exit code 1 if there are none, or if the first died again.
    """
    if not (everything or key or reason_has):
        raise click.UsageError("Say which: --key, --reason-has, or --all.")
    with ExitStack() as stack:
        opened = None if store is None else stack.enter_context(store_at(store))
        found = _found(transport, queue, key, reason_has)
        if opened is None and (parked := [letter for letter in found if _has_key(letter)]):
            raise ConfigError(
                f"{len(parked)} of these messages are parked in a store and would be parked again: "
                "name it, --store (IDEMP_STORE)"
            )
        if not found:
            click.echo(json.dumps({"sent_back": 0}) if as_json else f"{queue}.dead has no such message")
            return 1
        agree(f"Send {len(found)} messages back to {queue}?", yes, as_json)
        sender = _Sender(transport, queue, _headers_are(key, reason_has), opened, who, reason)
        sent, fate = 0, ""
        if len(found) > 1 and not no_first:
            sent, fate = sender.first(found[0], wait)
            if not as_json:
                click.echo(f"the first, {escaped(found[0].key) or 'without a key'}, is {fate}")
            if fate not in _WELL:
                return _ended(sent, fate, as_json, queue)
            agree(f"Send the other {len(found) - sent}?", yes, as_json)
        sent += sender.rest(found[sent:])
    return _ended(sent, fate, as_json, queue, ended=True)


def _ended(sent: int, fate: str, as_json: bool, queue: str, *, ended: bool = False) -> int:
    if as_json:
        click.echo(json.dumps({"sent_back": sent, "first": fate or None}))
    else:
        hint = " (--no-first does not wait)" if fate == "waiting" else ""
        why = "" if ended else f"; the rest stay, for the first is {fate}{hint}"
        click.echo(f"{sent} messages went back to {queue}{why}")
    return 0 if ended else 1


def _found(transport: str, queue: str, key: str | None, reason_has: str | None) -> list[Letter]:
    """By a connection of their own, which gives them back when it is closed."""
    with broker_at(transport) as broker:
        return _chosen_of(broker, queue, key, reason_has)


def _chosen_of(broker: Transport, queue: str, key: str | None, reason_has: str | None) -> list[Letter]:
    found = []
    with bar(broker.depth(f"{queue}.dead"), "reading dead letters") as step:
        for letter in letters(broker, queue):
            step(1)
            if _is(letter, key, reason_has):
                found.append(letter)
    return found


def _has_key(letter: Letter) -> bool:
    """Whether a store keeps its key parked: a handler without a policy has none."""
    return letter.outcome == "parked" and not letter.key.startswith("delivery ")


def _headers_are(key: str | None, reason_has: str | None) -> Wanted:
    def wanted(headers: Mapping[str, Any]) -> bool:
        about = f"{headers.get('idemp-outcome', 'unknown')}: {headers.get('idemp-reason', '')}"
        mine = key is None or headers.get("idemp-key") == key
        return mine and (reason_has is None or reason_has in about)

    return wanted


class _Sender:
    """Sends letters back in the name of one deed."""

    def __init__(
        self, transport: str, queue: str, wanted: Wanted, store: Store | None, who: str, why: str
    ) -> None:
        self._transport, self._queue, self._wanted, self._store = transport, queue, wanted, store
        self._book = None if store is None else Book(store, who, why)
        self._retry = uuid.uuid4().hex
        self._last = ""  # the key of what was sent last

    def first(self, letter: Letter, wait: float) -> tuple[int, str]:
        """Send one, and look what becomes of it: done, taken, dead again, or waiting."""
        self._note([letter])
        sent = self._send(1)
        with broker_at(self._transport) as broker:
            return sent, self._fate(broker, time.monotonic() + wait)

    def rest(self, found: Sequence[Letter]) -> int:
        """Send all others that are there."""
        self._note(found)
        sent = 0
        with bar(len(found), "sending back") as step:
            while more := self._send(MOST, step):
                sent += more
        return sent

    def _note(self, letters: Sequence[Letter]) -> None:
        if self._book is not None:
            died = dict(Counter(letter.group for letter in letters).most_common(_REASONS))
            self._book.note("send back", queue=self._queue, messages=len(letters), died_of=died)

    def _send(self, most: int, told: Callable[[int], None] = lambda _: None) -> int:
        with broker_at(self._transport) as broker:
            return send_all_back(
                broker,
                self._queue,
                self._wanted,
                prepare=self._prepare,
                retry=self._retry,
                most=most,
                told=told,
            )

    def _prepare(self, chosen: Sequence[Delivery]) -> None:
        """Their keys are free before they go."""
        keys = [str(letter.properties.headers.get("idemp-key", "")) for letter in chosen]
        self._last = keys[-1]
        if self._store is not None and self._book is not None:
            set_all_free(self._store, [key for key in keys if key], self._book)

    def _fate(self, broker: Transport, end: float) -> str:
        """What became of the last that was sent."""
        dead, emptied = broker.depth(f"{self._queue}.dead"), 0.0
        while (now := time.monotonic()) < end:
            state = self._store.apply([Get(self._last)])[0] if self._store and self._last else None
            if isinstance(state, Done):
                return "done"
            if isinstance(state, Parked) or (
                broker.depth(f"{self._queue}.dead") > dead and self._died_again()
            ):
                return "dead again"
            if state is None and broker.depth(self._queue) == 0:
                emptied = emptied or now
                if now - emptied > _SETTLED:
                    return "dead again" if self._died_again() else "taken"
            time.sleep(_LOOK)
        return "waiting"

    def _died_again(self) -> bool:
        with broker_at(self._transport) as broker:
            return any(
                letter.properties.headers.get("idemp-retry") == self._retry
                for letter in letters(broker, self._queue)
            )
