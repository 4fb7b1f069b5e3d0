"""``demo``: tells the story of story.py on a terminal, or as JSON."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from contextlib import closing

import click

from idemp.cli.options import about, json_option, transport_at
from idemp.cli.stage import ServiceFailed, checkout
from idemp.cli.story import SERVICES, Listener, Row, Story
from idemp.errors import ConfigError
from idemp.settings import hidden
from idemp.stores import open_store

EMBEDDED = "SQLite in a temporary folder"
REAL = ("amqp://guest:guest@localhost:5672/", "etcd://localhost:2379/demo")


@click.command()
@click.option(
    "--stack",
    type=click.Choice(["embedded", "real"]),
    default="embedded",
    show_default=True,
    help=f"real: {REAL[0]} and {REAL[1]}; embedded: {EMBEDDED}.",
)
@click.option("--transport", metavar="URL", help="A broker other than the stack's.")
@click.option("--store", metavar="URL", help="A store other than the stack's.")
@json_option
def demo(stack: str, transport: str | None, store: str | None, as_json: bool) -> int:
    """See it work: two services, a duplicate, a restart.

    Exit code 0 if every number is as expected, else 1.
    """
    if stack == "real":
        transport, store = transport or REAL[0], store or REAL[1]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the services are ended, too
    with tempfile.TemporaryDirectory(prefix="idemp-demo-", ignore_cleanup_errors=True) as folder:
        broker = transport or f"sqlite:///{folder}/queues.db"
        memory = store or f"sqlite:///{folder}/seen.db"
        _check(broker, memory)
        if not as_json:
            _say_begin(transport, store)
        began = time.monotonic()
        story = Story(broker, memory, Listener() if as_json else _Printer())
        try:
            story.tell()
        except ServiceFailed as error:
            story.failed = str(error)
        took = time.monotonic() - began
    if as_json:
        click.echo(json.dumps(story.record(took)))
    else:
        _say_end(story, took)
    return 0 if story.holds else 1


def _check(broker: str, memory: str) -> None:
    """All is there, and no queue has messages in it that are not the demo's to process."""
    checkout()
    with about("--store"), closing(open_store(memory)) as opened:
        opened.apply([])
    if broker.startswith("memory:"):
        raise ConfigError("--transport: memory:// is for one process; use sqlite:///queues.db")
    with transport_at(broker) as transport:
        for service in SERVICES:
            queue = f"{service}-queue"
            if waiting := transport.depth(queue):
                raise ConfigError(
                    f"{queue} has {waiting} messages waiting, which the demo would process: "
                    "empty it, or use another broker or vhost"
                )


# ------------------------------------------------------------------ how it looks


def _say_begin(transport: str | None, store: str | None) -> None:
    broker, memory = (hidden(url) if url else EMBEDDED for url in (transport, store))
    click.echo(f"Two services, {' and '.join(SERVICES)}, get the same events and count what they do.")
    click.echo(_faint(f"events through: {broker}\nids kept in:    {memory}"))


class _Printer(Listener):
    """A table that grows; in colour, and with a word on what takes a moment, on a terminal."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        unicode = (sys.stdout.encoding or "").lower().startswith("utf")
        self._marks = ("✓", "✗") if unicode else ("ok", "NOT OK")

    def chapter(self, number: int, title: str) -> None:
        """See `Listener`."""
        self._wipe()
        click.echo(f"\n{number}  {click.style(title, bold=True)}")
        if number == 1:
            click.echo(_faint(f"   {'':<22}{'counter':<28}{'expected':>9}{'seen':>7}"))

    def doing(self, what: str) -> None:
        """See `Listener`."""
        if self._live:
            self._wipe()
            click.echo(_faint(f"   {what} ..."), nl=False)

    def row(self, row: Row) -> None:
        """See `Listener`."""
        self._wipe()
        seen = "none" if row.seen is None else _signed(row.seen)
        good, bad = self._marks
        mark = click.style(good, fg="green") if row.holds else click.style(bad, fg="red", bold=True)
        click.echo(f"   {row.did:<22}{row.what:<28}{_signed(row.expected):>9}{seen:>7}  {mark}")

    def _wipe(self) -> None:
        if self._live:
            click.echo("\r\x1b[K", nl=False)


def _say_end(story: Story, took: float) -> None:
    numbers = len(story.rows)
    wrong = sum(not row.holds for row in story.rows)
    if story.failed:
        verdict, colour = f"The story broke off: {story.failed}", "red"
    elif wrong:
        verdict, colour = f"{wrong} of {numbers} numbers are not as expected.", "red"
    else:
        verdict, colour = f"All {numbers} numbers are as expected", "green"
    after = "" if story.failed or wrong else f", after {took:.0f} seconds."
    click.echo(f"\n{click.style(verdict, fg=colour)}{after}")


def _signed(n: int) -> str:
    return f"{n:+}" if n else "0"


def _faint(text: str) -> str:
    return click.style(text, dim=True)
