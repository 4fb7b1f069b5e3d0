"""``trace``, ``flow`` and ``events``: what the event log knows of messages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import click

from idemp.cli.options import Duration, about, json_option
from idemp.eventlogs import open_event_log
from idemp.ports import OUTCOMES, EventLog, Query
from idemp.tracking import flow as flows
from idemp.tracking import trace as traces
from idemp.tracking.picture import svg

KINDS = ("sent", "started", *OUTCOMES, "note", "dropped")
MOST = 20_000
"""Events of a story that are looked at."""

Decorator = Callable[[Any], Any]

tracking_option: Decorator = click.option(
    "--tracking",
    metavar="URL",
    envvar="IDEMP_TRACKING",
    required=True,
    show_envvar=True,
    help="The event log, like sqlite:///events.db.",
)


@contextmanager
def events_at(url: str) -> Iterator[EventLog]:
    """The event log that services write; looking at it does not make it."""
    with about("--tracking (IDEMP_TRACKING)"):
        log = open_event_log(url, reading=True)
    with closing(log):
        with about("--tracking (IDEMP_TRACKING)"):
            log.find(Query(), limit=1)  # whether it answers
        yield log


_window = (
    click.option("--since", type=Duration(), help="Only the last so long, like 15m."),
    click.option("--until", type=Duration(), help="Only what is older than this, like 5m."),
)


def window(command: Any) -> Any:
    """The options for a range of time."""
    for decorate in reversed(_window):
        command = decorate(command)
    return command


def moments(since: float | None, until: float | None, now: float) -> tuple[float | None, float | None]:
    """Ages as times.  Raises `click.UsageError`."""
    if since is not None and until is not None and since <= until:
        raise click.UsageError("--since must be longer ago than --until.")
    return None if since is None else now - since, None if until is None else now - until


# ------------------------------------------------------------------ trace


@click.command()
@click.argument("id")
@tracking_option
@json_option
def trace(id: str, tracking: str, as_json: bool) -> int:
    """Tell the whole story of message ID, or of a conversation: parents, children, receivers, outcomes.

    Exit code 1 if nobody told of it.
    """
    with events_at(tracking) as log:
        found = log.story(id, limit=MOST)
    roots = traces.stories(found)
    if not roots:
        click.echo(f"idemp: the event log knows nothing of {traces.shown(id)}", err=True)
        return 1
    for root in roots:
        if as_json:
            for node in root.walk():
                click.echo(json.dumps(traces.record(node)))
        else:
            for line in traces.lines(root, id):
                click.echo(line)
    if len(found) == MOST:
        click.echo(f"idemp: showing the first {MOST} events; there may be more", err=True)
    return 0


# ------------------------------------------------------------------ flow


@click.command()
@click.option("--dot", "form", flag_value="dot", help="For Graphviz.")
@click.option("--mermaid", "form", flag_value="mermaid", help="For Markdown.")
@click.option("--svg", "form", flag_value="svg", help="A picture.")
@window
@tracking_option
@json_option
def flow(form: str | None, since: float | None, until: float | None, tracking: str, as_json: bool) -> int:
    """Show what goes from which service to which: how many, how fast, how many fail.

    Times are in whole minutes.  Exit code 1 if there is nothing.
    """
    if form is not None and as_json:
        raise click.UsageError(f"Say --{form} or --json.")
    with events_at(tracking) as log:
        edges = log.edges(*moments(since, until, time.time()))
    if not edges:
        click.echo("idemp: the event log knows of no messages in that time", err=True)
        return 1
    match form:
        case "dot":
            click.echo(flows.dot(edges), nl=False)
        case "mermaid":
            click.echo(flows.mermaid(edges), nl=False)
        case "svg":
            click.echo(svg(edges), nl=False)
        case _:
            found = flows.arrows(edges)
            for line in (json.dumps(flows.record(each)) for each in found) if as_json else flows.text(edges):
                click.echo(line)
    return 0


# ------------------------------------------------------------------ events


@click.command()
@click.option("--service", default="", help="Only of this service.")
@click.option("--type", "kind", default="", help="Only of messages of this type.")
@click.option("--outcome", "outcomes", multiple=True, type=click.Choice(KINDS), help="Only these.")
@click.option("--id", "uuid", default="", help="Only of this message.")
@click.option("--business", default="", help="Only of this business key; ?business= says where it stands.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True)
@window
@tracking_option
@json_option
def events(
    service: str,
    kind: str,
    outcomes: tuple[str, ...],
    uuid: str,
    business: str,
    limit: int,
    since: float | None,
    until: float | None,
    tracking: str,
    as_json: bool,
) -> None:
    """List events, the newest first."""
    start, end = moments(since, until, time.time())
    query = Query(uuid, "", service, kind, outcomes, business, start, end)
    with events_at(tracking) as log:
        found = log.find(query, limit=limit + 1)
    for event in found[:limit]:
        if as_json:
            click.echo(json.dumps(traces.record_of(event)))
            continue
        of = f"{event.sender} to " if event.sender and event.role == "receiver" else ""
        why = f"  ({traces.shown(event.why)})" if event.why else ""
        told = f"{event.attempt} events were not recorded" if event.kind == "dropped" else event.uuid
        line = f"{traces.moment(event.at)}  {event.kind:<8}  {of}{event.service}  {event.type}  {told}"
        click.echo(traces.shown(line) + why)
    if len(found) > limit:
        click.echo(f"idemp: showing {limit}; there are more: say --limit, or choose", err=True)
