"""``publish``: messages from the command line, a file or a pipe to an exchange, confirmed."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
import uuid
from collections.abc import Iterator
from typing import IO, Any

import click

from idemp.bars import bar
from idemp.cli.options import json_option, recording, transport_at, transport_option
from idemp.errors import BadMessage, TransportUnavailable, Unroutable
from idemp.message import MAX_BODY, Properties, decode
from idemp.ports import Publication, Transport
from idemp.transports import publish as confirm

CHUNK = 256 * 1024
"""Bytes that are read at a time; the messages in them are sent together."""
IDLE = 20.0
"""Seconds after which a broker may have given up on a silent connection."""


@click.command()
@click.argument("event", metavar="[JSON]", required=False)
@click.option("--file", type=click.File("rb"), help="Take JSON lines from this file; - is stdin.")
@click.option("--exchange", default="events", show_default=True)
@click.option("--routing-key", default="foo", show_default=True)
@click.option("--new-id", is_flag=True, help="Give a new id to a message that has none.")
@transport_option
@click.option("--tracking", metavar="URL", envvar="IDEMP_TRACKING", show_envvar=True, help="Record it here.")
@json_option
def publish(
    event: str | None,
    file: IO[bytes] | None,
    transport: str,
    tracking: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Publish messages and wait for the broker's word.

    One as JSON, or one a line from --file or stdin (JSON is - or left out).  A message is
    {"type": ..., "id": ..., "args": ...} or a CloudEvent; what a consumer would reject is refused.
    """
    if event is not None and file is not None:
        raise click.UsageError("Give either JSON or --file.")
    if file is None and event in (None, "-"):
        if event is None and sys.stdin.isatty():
            raise click.UsageError("Give a message as JSON, a --file, or lines on stdin.")
        file = sys.stdin.buffer
    with transport_at(transport) as broker, recording(tracking):
        publisher = _Publisher(broker, **options)
        if file is not None:
            _send_lines(publisher, file)
        elif event is not None:
            publisher.send([publisher.publication(os.fsencode(event))])
    publisher.say(as_json)


class _Publisher:
    """Makes publications and sends them; counts what was confirmed."""

    def __init__(self, transport: Transport, exchange: str, routing_key: str, new_id: bool) -> None:
        self._transport = transport
        self._exchange, self._routing_key, self._new_id = exchange, routing_key, new_id
        self._last = time.monotonic()
        self._last_id = ""
        self.sent = 0

    def publication(self, body: bytes) -> Publication:
        """The publication of ``body`` as it is.  Raises `BadMessage` where a consumer would reject it."""
        if self._new_id:
            body = _with_id(body)
        try:
            message = decode(body, Properties())
        except BadMessage as error:
            hint = "; --new-id gives it one" if str(error) == "the message has no id" else ""
            raise BadMessage(f"{error}{hint}") from None
        self._last_id = message.id
        return Publication(body, message.properties(app_id="idemp"), self._exchange, self._routing_key)

    def send(self, publications: list[Publication]) -> None:
        """Send all and wait until they are confirmed."""
        if not publications:
            return
        if time.monotonic() - self._last > IDLE:
            self._transport.connect()
        try:
            confirm(self._transport, publications)
        except (Unroutable, TransportUnavailable) as error:
            before = f"; {self.sent} messages were sent before" if self.sent else ""
            raise type(error)(f"{error}{before}") from None
        self.sent += len(publications)
        self._last = time.monotonic()

    def say(self, as_json: bool) -> None:
        """How it ended."""
        said = {"sent": self.sent, "exchange": self._exchange, "routing_key": self._routing_key}
        if self.sent == 1:
            said["id"] = self._last_id
        which = f"message {self._last_id!r}" if self.sent == 1 else f"{self.sent} messages"
        click.echo(json.dumps(said) if as_json else f"sent {which} to {self._exchange}")


def _with_id(body: bytes) -> bytes:
    """``body``, with a new id if it is an object without one."""
    try:
        event = json.loads(body)
    except (ValueError, RecursionError):
        return body
    if not isinstance(event, dict) or any(name.lower() == "id" for name in event):
        return body
    return json.dumps({**event, "id": str(uuid.uuid4())}).encode()


# ------------------------------------------------------------------ lines


def _send_lines(publisher: _Publisher, file: IO[bytes]) -> None:
    """Send every line; a bad one ends it, behind those before it."""
    size = size_of(file)
    with bar(size, "publishing", least=CHUNK + 1) as step:
        for lines in _chunks(file):
            publications: list[Publication] = []
            wrong = ""
            for number, line in lines:
                try:
                    publications.append(publisher.publication(line))
                except BadMessage as error:
                    wrong = f"line {number}: {error}"
                    break
            publisher.send(publications)
            if wrong:
                raise BadMessage(f"{wrong}; {publisher.sent} messages were sent before it")
            step(sum(len(line) + 1 for _, line in lines))


def size_of(file: IO[Any]) -> int:
    """Bytes in a regular file; 0 where nobody knows."""
    try:
        found = os.fstat(file.fileno())
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def _chunks(file: IO[bytes]) -> Iterator[list[tuple[int, bytes]]]:
    """Numbered lines, as many at a time as have come: a slow pipe is not kept waiting."""
    number, rest = 0, b""
    while True:
        chunk: bytes = file.read1(CHUNK)  # type: ignore[attr-defined]
        *lines, rest = (rest + chunk).split(b"\n")
        if rest and (not chunk or len(rest) > MAX_BODY):  # the last line, or no line at all
            lines.append(rest)
            rest = b""
        numbered = [(number + place, line) for place, line in enumerate(lines, 1)]
        number += len(lines)
        yield [(place, line) for place, line in numbered if line.strip()]
        if not chunk:
            return
