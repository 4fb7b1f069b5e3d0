"""``forget``: drop what is done or parked, so that it may run again."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import click

from idemp.bars import bar, reading
from idemp.cli import options
from idemp.cli.keys import Filter, age
from idemp.cli.options import (
    Duration,
    agree,
    escaped,
    json_option,
    reason_option,
    store_at,
    store_option,
    who_option,
    yes_option,
)
from idemp.deeds import TOGETHER, WORDS, Book
from idemp.ports import Done, Get, Parked
from idemp.resolve import forget as drop

_MAY_GO = {"done": Done, "parked": Parked}


@click.command()
@click.argument("key", type=options.key, required=False)
@click.option("--prefix", type=options.key, help="All keys that start with this.")
@click.option("--older-than", type=Duration(), help="Only what has not changed for so long, like 7d.")
@click.option("--state", type=click.Choice(sorted(_MAY_GO)), help="Only keys in this state.")
@yes_option
@reason_option
@who_option
@store_option
@json_option
def forget(
    key: str | None,
    prefix: str | None,
    older_than: float | None,
    state: str | None,
    yes: bool,
    reason: str,
    who: str,
    store: str,
    as_json: bool,
) -> int:
    """Forget KEY, or all keys of --prefix: a message of theirs will run again.

    Says first how many there are, and asks.  Only what is done or parked goes, and only as it was found;
    what a consumer is running, or what is in doubt, stays (see idemp resolve).
    Exit code 1 if there is nothing of the kind.
    """
    if (key is None) == (prefix is None):
        raise click.UsageError("Say a KEY, or --prefix, which may be empty for all.")
    states = frozenset(kind for word, kind in _MAY_GO.items() if state in (None, word))
    wanted = Filter(prefix or key or "", states, older_than)
    with store_at(store) as opened:
        if key is None:
            found: list[Any] = list(reading(opened, wanted.found(opened)))
        else:
            now: Any = opened.apply([Get(key)])[0]
            found = [(key, now)] if type(now) in states else []
            if found and not wanted.takes(key, now, time.time()):
                return _too_fresh(key, WORDS[type(now)], older_than or 0.0, as_json)
        if not found:
            return _nothing(as_json)
        agree(f"Forget {_counted(found, key)}?", yes, as_json)
        gone = 0
        book = Book(opened, who, reason)
        if len(found) > 1:
            narrowed = {"prefix": prefix, "older_than": older_than}
            book.note("forget", number=len(found), states=_states(found), **narrowed)
        with bar(len(found), "forgetting") as step:
            for start in range(0, len(found), TOGETHER):
                some = found[start : start + TOGETHER]
                gone += drop(some, book)
                step(len(some))
    stayed = len(found) - gone
    if as_json:
        click.echo(json.dumps({"forgotten": gone, "changed_meanwhile": stayed}))
    else:
        late = f"; {stayed} changed meanwhile and stayed" if stayed else ""
        click.echo(f"forgot {gone} of {len(found)} keys{late}")
    return 0 if gone else 1


def _too_fresh(key: str, word: str, older_than: float, as_json: bool) -> int:
    if as_json:
        click.echo(json.dumps({"forgotten": 0, "changed_meanwhile": 0, "too_fresh": key}))
    else:
        why = f"is {word} and changed less than {age(older_than)} ago, so it stays"
        click.echo(f"idemp: {escaped(key)} {why}", err=True)
    return 1


def _nothing(as_json: bool) -> int:
    if as_json:
        click.echo(json.dumps({"forgotten": 0, "changed_meanwhile": 0}))
    else:
        click.echo("idemp: nothing of the kind is done or parked", err=True)
    return 1


def _counted(found: list[Any], key: str | None) -> str:
    if key is not None:
        return f"{escaped(key)}, which is {WORDS[type(found[0][1])]}"
    counts = sorted(_states(found).items())
    return f"{len(found)} keys ({', '.join(f'{n} {word}' for word, n in counts)})"


def _states(found: list[Any]) -> dict[str, int]:
    return Counter(WORDS[type(state)] for _, state in found)
