"""``consume``: run a `Consumer`, or one handler, found by its import path."""

from __future__ import annotations

import importlib
import json
import logging
import operator
import sys
from contextlib import closing, nullcontext
from typing import Any

import click

from idemp.bars import watching
from idemp.cli.options import json_option, transport_at, transport_option
from idemp.consumer import Consumer
from idemp.errors import ConfigError
from idemp.eventlogs import open_event_log
from idemp.signals import ended_once


@click.command()
@click.argument("target", metavar="MODULE:NAME")
@click.option("--service", help="A handler's service: it takes from SERVICE-queue.")
@click.option("--type", "kind", help="The message type that a handler is for; by default its name.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads that run a handler; 1 keeps the order.")
@click.option("--prefetch", type=click.IntRange(min=1), help="Messages out at a time.")
@click.option(
    "--tracking", metavar="URL", envvar="IDEMP_TRACKING", show_envvar=True, help="Record events of a handler."
)
@transport_option
@json_option
def consume(target: str, transport: str, tracking: str | None, as_json: bool, **given: Any) -> None:
    """Run a Consumer, or a handler, until stopped.

    MODULE:NAME is where Python finds it.  A handler takes effect once if it is decorated with
    @idempotent, else it runs at least once.
    """
    found = load(target)
    options = {name: value for name, value in given.items() if value is not None}
    if isinstance(found, Consumer):
        if options:
            raise click.UsageError(f"{target} is a Consumer, which has its own {', '.join(options)}.")
        _run(found, as_json)
        return
    kind = options.pop("kind", getattr(found, "__name__", ""))
    if not callable(found) or not kind:
        raise ConfigError(f"{target} is neither a Consumer nor a function")
    if "service" not in options:
        raise click.UsageError(f"{target} is a handler; say --service, like --service orders.")
    events = closing(open_event_log(tracking)) if tracking else nullcontext()
    with transport_at(transport) as broker, events as log:
        consumer = Consumer(broker, tracking=log, **options)
        consumer.on(kind)(found)
        _run(consumer, as_json)


def load(target: str) -> Any:
    """What ``module:name`` names.  Raises `ConfigError`."""
    module, colon, name = target.partition(":")
    if not (module and colon and name) or module.startswith("."):
        raise ConfigError(f"{target!r}: write it like orders.handlers:new_order")
    sys.path.insert(0, "")  # as `python -m` does
    try:
        found: object = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{module} cannot be imported: {error}") from None
    try:
        return operator.attrgetter(name)(found)
    except AttributeError:
        raise ConfigError(f"{module} has no {name}") from None


def _run(consumer: Consumer, as_json: bool) -> None:
    def say(ready: bool) -> None:
        if as_json:
            click.echo(json.dumps({"service": consumer.service, "queue": consumer.queue, "ready": ready}))
        elif ready:
            click.echo(f"{consumer.service}: taking from {consumer.queue}; Ctrl-C ends it", err=True)

    if logging.root.level > logging.INFO:
        logging.getLogger("idemp").setLevel(logging.INFO)
    with ended_once() as running, watching("reading the store", consumer.progress) as read:

        def ready() -> None:
            running()
            read()
            say(True)

        consumer.run(ready=ready)
    say(False)
