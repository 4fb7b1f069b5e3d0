"""``deeds``: who changed what in a store, when and why."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from typing import Any

import click

from idemp import deeds as book
from idemp.bars import reading
from idemp.cli.options import escaped, json_option, store_at, store_option
from idemp.deeds import Deed


@click.command()
@click.option(
    "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Show the last so many."
)
@click.option("--keys", is_flag=True, help="Also the keys of a deed of many, while ids are remembered.")
@store_option
@json_option
def deeds(limit: int, keys: bool, store: str, as_json: bool) -> None:
    """List what people did with resolve, forget, dead send and replay, the latest last.

    Deeds are kept for a year, the newest 5000, however long ids are remembered.
    """
    last: deque[Deed] = deque(maxlen=limit)
    number = 0
    with store_at(store) as opened:
        for deed in reading(opened, book.read(opened, pages=keys)):
            number += 1
            last.append(deed)
        for deed in last:
            click.echo(json.dumps(_record(deed)) if as_json else _line(deed))
        book.sweep(opened)
    if number > len(last):
        click.echo(f"showing the last {len(last)} of {number}; --limit shows more", err=True)


def _record(deed: Deed) -> dict[str, Any]:
    return {"id": deed.id, **(deed.about or {"verb": None})}


def _line(deed: Deed) -> str:
    if deed.about is None:
        return f"{deed.id}  was begun, and changed nothing"
    if deed.of:
        return "\n".join(f"    {escaped(key['key'])} (was {key['state']})" for key in deed.about["keys"])
    about = deed.about
    why = f": {about['why']}" if about["why"] else ""
    return escaped(f"{about['at']}  {about['who']}  {about['verb']}  {_what(about)}{why}")


def _what(about: Mapping[str, Any]) -> str:
    """What was done it to."""
    if "number" in about:
        states = ", ".join(f"{n} {word}" for word, n in about["states"].items())
        which = f" that start with {about['prefix']}" if about["prefix"] else ""
        return f"{about['number']} keys ({states}){which}"
    if "keys" not in about:
        place = about.get("queue") or f"{about.get('service', '')}, replay {about.get('replay', '')}"
        return f"{about.get('messages', '')} messages of {place}".strip()
    keys = about["keys"]
    return f"{len(keys)} keys" if len(keys) != 1 else f"{keys[0]['key']} (was {keys[0]['state']})"
