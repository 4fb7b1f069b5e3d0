"""``resolve``: a person decides about a key that is in doubt or parked."""

from __future__ import annotations

import json
from typing import Any

import click

from idemp.cli import options
from idemp.cli.keys import why
from idemp.cli.options import (
    broker_at,
    escaped,
    json_option,
    reason_option,
    store_at,
    store_option,
    transport_option,
    who_option,
)
from idemp.deeds import DEEDS, Book
from idemp.ports import Doubt, Free, Get, Parked, Store, Transport
from idemp.resolve import NothingToResolve, mark_done, send_back, set_free


@click.command()
@click.argument("key", type=options.key)
@click.option("--done", "deed", flag_value="done", help="The effect is there: never run it again.")
@click.option("--retry", "deed", flag_value="retry", help="The effect is not there: let it run again.")
@click.option("--result", metavar="JSON", help="With --done: what the handler would have returned.")
@click.option(
    "--queue",
    metavar="QUEUE",
    help="With --retry: send the message back from QUEUE.dead; QUEUE is like orders-queue.",
)
@reason_option
@who_option
@transport_option
@store_option
@json_option
def resolve(
    key: str,
    deed: str | None,
    result: str | None,
    queue: str | None,
    reason: str,
    who: str,
    transport: str,
    store: str,
    as_json: bool,
) -> None:
    """Decide about KEY, which is in doubt or parked.

    Without --queue, --retry lets KEY run when its message comes again, and sends none.  Of a person and
    a consumer who come at the same time one wins.  What was done is recorded: idemp deeds.
    """
    _check(deed, result, queue)
    if key.startswith(DEEDS):
        raise click.UsageError(f"{escaped(key)} is a deed, which needs no decision: see idemp deeds.")
    with store_at(store) as opened:
        book = Book(opened, who, reason)
        if deed == "done":
            before = mark_done(opened, key, None if result is None else result.encode(), book=book)
            _say(key, before, {"now": "done"}, as_json)
        elif queue is None:
            _say(key, set_free(opened, key, book=book), {"now": "free"}, as_json)
        else:
            with broker_at(transport) as broker:
                _retry(key, opened, broker, queue, book, as_json)


def _check(deed: str | None, result: str | None, queue: str | None) -> None:
    if deed is None:
        raise click.UsageError("Say --done or --retry.")
    if result is not None and deed != "done":
        raise click.UsageError("--result goes with --done.")
    if queue is not None and deed != "retry":
        raise click.UsageError("--queue goes with --retry.")
    if result is not None:
        try:
            json.loads(result)
        except ValueError as error:
            raise click.UsageError(f"--result is not JSON: {error}.") from None
        except RecursionError:
            raise click.UsageError("--result is not JSON: it is nested too deeply.") from None


def _retry(key: str, store: Store, broker: Transport, queue: str, book: Book, as_json: bool) -> None:
    # Free already: a crash came between the two deeds, and the second is left.
    already = isinstance(store.apply([Get(key)])[0], Free)
    before = None if already else set_free(store, key, book=book)
    sent = send_back(broker, queue, key)
    if already and not sent:
        raise NothingToResolve(key, Free())
    _say(key, before, {"now": "free", "queue": queue, "sent_back": sent}, as_json)


def _say(key: str, before: Doubt | Parked | None, after: dict[str, Any], as_json: bool) -> None:
    was = "free" if before is None else "doubt" if isinstance(before, Doubt) else "parked"
    if as_json:
        click.echo(json.dumps({"key": key, "was": was, **after}))
        return
    because = "" if before is None else f" ({escaped(why(before))})"
    click.echo(f"{escaped(key)} was {'in ' * (was == 'doubt')}{was}{because}, and is {after['now']} now")
    if "queue" in after:
        sent, queue = after["sent_back"], after["queue"]
        none = f"{queue}.dead has no message of it"
        click.echo(f"{sent} of its messages went back to {queue}" if sent else none)
