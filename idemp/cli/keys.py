"""``ls``, ``get``, ``doubt``, ``stats``: look at what a store knows of keys."""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import click

from idemp import deeds
from idemp.bars import reading, watching
from idemp.cli import options
from idemp.cli.options import Duration, escaped, json_option, store_at, store_option
from idemp.deeds import DEEDS, WORDS, described
from idemp.ports import Doubt, Free, Get, Inbox, Parked, State, Store
from idemp.stores import namespace_of

PAGE = 20_000
"""Keys that are asked for at a time, where all are wanted."""
COUNTED = 1_000_000
"""Keys that are counted for the last line; beyond it stands "more than"."""


def _paged(command: Callable[..., Any]) -> Callable[..., Any]:
    after = click.option("--after", type=options.key, default="", help="Continue behind this key.")
    least = click.IntRange(min=1)
    limit = click.option("--limit", type=least, default=50, show_default=True, help="Show so many.")
    older = click.option(
        "--older-than", type=Duration(), help="Only what has not changed for so long, like 90s, 30m or 7d."
    )
    return limit(after(older(command)))


class Filter(NamedTuple):
    """Which keys are meant.  older_than: seconds since their last change."""

    prefix: str
    states: frozenset[type]
    older_than: float | None = None

    def takes(self, key: str, state: State, now: float) -> bool:
        """Whether this one is; deeds only where the prefix asks for them."""
        if type(state) not in self.states or (key.startswith(DEEDS) and not self.prefix.startswith(DEEDS)):
            return False
        at = getattr(state, "at", None)
        return self.older_than is None or (at is not None and now - at > self.older_than)

    def found(self, store: Store, after: str = "", page: int = PAGE) -> Iterator[tuple[str, State]]:
        """Those of ``store``, in order."""
        now = time.time()
        for key, state in deeds.keys(store, self.prefix, after, page):
            if self.takes(key, state, now):
                yield key, state


# ------------------------------------------------------------------ commands


@click.command()
@click.argument("prefix", type=options.key, default="")
@click.option("--state", type=click.Choice(sorted(WORDS.values())), help="Only keys in this state.")
@_paged
@store_option
@json_option
def ls(
    prefix: str,
    state: str | None,
    older_than: float | None,
    after: str,
    limit: int,
    store: str,
    as_json: bool,
) -> None:
    """List keys, those that start with PREFIX: state, age, key, and why.

    A key is its handler's name, a slash, and the id.
    """
    wanted = frozenset(kind for kind, word in WORDS.items() if state in (None, word))
    with store_at(store) as opened:
        _list(opened, Filter(prefix, wanted, older_than), after, limit, as_json, namespace_of(store))


@click.command()
@click.argument("prefix", type=options.key, default="")
@_paged
@store_option
@json_option
def doubt(prefix: str, older_than: float | None, after: str, limit: int, store: str, as_json: bool) -> None:
    """List the keys that wait for a person.

    In doubt: a claim whose session died.  Parked: set aside, with the reason.
    """
    with store_at(store) as opened:
        _list(
            opened,
            Filter(prefix, frozenset({Doubt, Parked}), older_than),
            after,
            limit,
            as_json,
            namespace_of(store),
        )


@click.command()
@click.argument("key", type=options.key)
@store_option
@json_option
def get(key: str, store: str, as_json: bool) -> int:
    """Show a key; exit code 1 if it is unknown."""
    with store_at(store) as opened:
        state = opened.apply([Get(key)])[0]
    known = described(key, state)
    if as_json:
        click.echo(json.dumps(known))
    elif state == Free():
        click.echo(f"idemp: the store knows nothing of {escaped(key)}", err=True)
    else:
        for name, value in known.items():
            text = value if isinstance(value, str) else json.dumps(value)
            click.echo(f"{name + ':':<13}{escaped(text)}")
    return 1 if state == Free() else 0


@click.command()
@store_option
@json_option
def stats(store: str, as_json: bool) -> None:
    """Count what a store knows: keys by handler and state, who waits for a person, deeds, the outbox."""
    everything = Filter("", frozenset(WORDS))
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    waiting: list[float] = []
    with store_at(store) as opened:
        for key, state in reading(opened, everything.found(opened)):
            counts[key.partition("/")[0]][WORDS[type(state)]] += 1
            if isinstance(state, Doubt | Parked):
                waiting.append(state.at)
        recorded = sum(1 for _ in deeds.read(opened))
        kept = opened.retention
        outbox = cast(Inbox, opened).backlog() if callable(getattr(opened, "backlog", None)) else None
    now = time.time()
    oldest = round(now - min(waiting)) if waiting else None
    total = sum(counts.values(), Counter[str]())
    if as_json:
        handlers = {name: dict(found) for name, found in sorted(counts.items())}
        whole = {"keys": total.total(), "states": dict(total), "handlers": handlers}
        whole |= {"oldest_waiting": oldest, "retention": kept, "deeds": recorded}
        whole |= {"outbox": outbox._asdict() if outbox else None}
        click.echo(json.dumps(whole))
        return
    shown = [word for word in WORDS.values() if total[word]]
    for name, found in [*sorted(counts.items()), ("all", total)]:
        cells = "".join(f"{found[word]:>9} {word}" for word in shown)
        click.echo(f"{escaped(name):<32}{cells or '        no keys'}")
    if oldest is not None:
        click.echo(f"{len(waiting)} wait for a person, the oldest for {age(oldest)}: see idemp doubt")
    if outbox is not None and outbox.letters:
        click.echo(f"{outbox.letters} wait in the outbox, the oldest for {age(outbox.age)}: see idemp relay")
    click.echo(f"done is remembered for {age(kept)}; {recorded} deeds are recorded")


# ------------------------------------------------------------------ a list


def _list(store: Store, wanted: Filter, after: str, limit: int, as_json: bool, namespace: str) -> None:
    """A page, and behind it how much there is in the namespace."""
    now = time.time()
    last, shown, all_of_them = "", 0, 0
    # The page first, so that it stands there while the rest is counted.
    for key, state in _begun(store, wanted.found(store, after, max(limit + 1, 1000))):
        all_of_them += 1
        if shown < limit:
            known = {"namespace": namespace, **described(key, state)}
            click.echo(json.dumps(known) if as_json else _line(key, state, now))
            last, shown = key, shown + 1
        else:
            break
    if all_of_them > shown:
        there = f"{_number(wanted, store, after)} in {escaped(namespace)}"
        more = f"showing {shown} of {there}; continue with --after {shlex.quote(escaped(last))}"
        click.echo(more, err=True)


def _begun(store: Store, found: Iterator[tuple[str, State]]) -> Iterator[tuple[str, State]]:
    """The same, with a bar until the first has come: what follows is printed where the bar would be."""
    with watching("reading", store.progress):
        first = next(found, None)
    if first is not None:
        yield first
        yield from found


def _number(wanted: Filter, store: Store, after: str) -> str:
    """How many there are behind ``after``, in words."""
    number = 0
    for _ in reading(store, wanted.found(store, after), "counting"):
        number += 1
        if number > COUNTED:
            return f"more than {COUNTED}"
    return str(number)


def _line(key: str, state: State, now: float) -> str:
    at = getattr(state, "at", None)
    line = f"{WORDS[type(state)]:<7}{'' if at is None else age(now - at):>7}  {escaped(key)}"
    return f"{line}  ({escaped(reason)})" if (reason := why(state)) else line


# ------------------------------------------------------------------ a key


def why(state: State) -> str:
    """Why a key waits for a person, or for its next attempt; "" if it does not."""
    match state:
        case Parked(_, _, reason):
            return reason
        case Doubt(_, attempt):
            return f"attempt {attempt} may have taken effect"
        case Free(attempts):
            return f"{attempts} attempts so far"
    return ""


def age(seconds: float) -> str:
    """``90`` as ``1 min``."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
