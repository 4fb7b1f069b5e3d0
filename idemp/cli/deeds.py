"""``deeds``: who changed what in a store, when and why."""

from __future__ import annotations

import json
from collections import deque
from typing import Any

import click

from idemp import deeds as book
from idemp.cli.options import escaped, json_option, store_at, store_option
from idemp.deeds import Deed


@click.command()
@click.option(
    "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Show the last so many."
)
@store_option
@json_option
def deeds(limit: int, store: str, as_json: bool) -> None:
    """List what people did with resolve, forget and dead send, the latest last.

    A deed is remembered as long as an id is.
    """
    last: deque[Deed] = deque(maxlen=limit)
    number = 0
    with store_at(store) as opened:
        for deed in book.read(opened):
            number += 1
            last.append(deed)
        for deed in last:
            click.echo(json.dumps(_record(deed)) if as_json else _line(deed))
        book.drop_unfinished(opened)
    if number > len(last):
        click.echo(f"showing the last {len(last)} of {number}; --limit shows more", err=True)


def _record(deed: Deed) -> dict[str, Any]:
    return {"id": deed.id, **(deed.about or {"verb": None})}


def _line(deed: Deed) -> str:
    if deed.about is None:
        return f"{deed.id}  was begun, and changed nothing"
    about = deed.about
    keys = about.get("keys", [])
    what = f"{len(keys)} keys" if len(keys) != 1 else f"{keys[0]['key']} (was {keys[0]['state']})"
    if not keys:
        place = about.get("queue") or f"{about.get('service', '')}, replay {about.get('replay', '')}"
        what = f"{about.get('messages', '')} messages of {place}".strip()
    why = f": {about['why']}" if about["why"] else ""
    return escaped(f"{about['at']}  {about['who']}  {about['verb']}  {what}{why}")
