"""``ls``, ``get``, ``doubt``: look at what a store knows of keys."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import click

from idemp.cli import options
from idemp.cli.options import escaped, json_option, store_at, store_option
from idemp.ports import Busy, Done, Doubt, Free, Get, Parked, State, Store

PAGE = 1000
_WORDS: dict[type, str] = {Done: "done", Busy: "busy", Doubt: "doubt", Parked: "parked", Free: "free"}


def _paged(command: Callable[..., Any]) -> Callable[..., Any]:
    after = click.option("--after", type=options.key, default="", help="Continue behind this key.")
    least = click.IntRange(min=1)
    limit = click.option("--limit", type=least, default=50, show_default=True, help="Show so many.")
    return limit(after(command))


# ------------------------------------------------------------------ commands


@click.command()
@click.argument("prefix", type=options.key, default="")
@click.option("--state", type=click.Choice(sorted(_WORDS.values())), help="Only keys in this state.")
@_paged
@store_option
@json_option
def ls(prefix: str, state: str | None, after: str, limit: int, store: str, as_json: bool) -> None:
    """List keys, those that start with PREFIX."""
    wanted = {kind for kind, word in _WORDS.items() if state in (None, word)}
    with store_at(store) as opened:
        _list(opened, prefix, after, limit, wanted, as_json)


@click.command()
@click.argument("prefix", type=options.key, default="")
@_paged
@store_option
@json_option
def doubt(prefix: str, after: str, limit: int, store: str, as_json: bool) -> None:
    """List the keys that wait for a person.

    In doubt: a claim whose session died.  Parked: set aside, with the reason.
    """
    with store_at(store) as opened:
        _list(opened, prefix, after, limit, {Doubt, Parked}, as_json)


@click.command()
@click.argument("key", type=options.key)
@store_option
@json_option
def get(key: str, store: str, as_json: bool) -> int:
    """Show a key; exit code 1 if it is unknown."""
    with store_at(store) as opened:
        state = opened.apply([Get(key)])[0]
    known = record(key, state)
    if as_json:
        click.echo(json.dumps(known))
    elif state == Free():
        click.echo(f"idemp: the store knows nothing of {escaped(key)}", err=True)
    else:
        for name, value in known.items():
            text = value if isinstance(value, str) else json.dumps(value)
            click.echo(f"{name + ':':<13}{escaped(text)}")
    return 1 if state == Free() else 0


# ------------------------------------------------------------------ a list


def _list(store: Store, prefix: str, after: str, limit: int, wanted: set[type], as_json: bool) -> None:
    found = (item for item in _scan(store, prefix, after) if type(item[1]) in wanted)
    now = time.time()
    last = ""
    for last, state in islice(found, limit):
        click.echo(json.dumps(record(last, state)) if as_json else _line(last, state, now))
    if last and next(found, None) is not None:
        more = f"showing {limit} of more; continue with --after {shlex.quote(escaped(last))}"
        click.echo(more, err=True)


def _scan(store: Store, prefix: str, after: str) -> Iterator[tuple[str, State]]:
    while page := store.scan(prefix, after=after, limit=PAGE):
        yield from page
        after = page[-1][0]


def _line(key: str, state: State, now: float) -> str:
    at = getattr(state, "at", None)
    line = f"{_WORDS[type(state)]:<7}{'' if at is None else age(now - at):>7}  {escaped(key)}"
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


def record(key: str, state: Any) -> dict[str, Any]:
    """What is known of ``key``, for JSON."""
    found: dict[str, Any] = {"key": key, "state": _WORDS[type(state)]}
    for name, value in state._asdict().items():
        if name == "at":
            found[name] = datetime.fromtimestamp(value, UTC).isoformat(timespec="milliseconds")
        elif isinstance(value, bytes):
            found.update(_readable(name, value))
        elif value is not None:
            found[name] = value
    return found


def _readable(name: str, value: bytes) -> dict[str, Any]:
    """Stored bytes: a JSON result as itself, everything else in hexadecimal digits."""
    if name == "result":
        try:
            return {name: json.loads(value)}
        except ValueError:
            pass
    return {f"{name}_hex": value.hex()}


def age(seconds: float) -> str:
    """``90`` as ``1 min``."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
