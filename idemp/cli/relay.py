"""``relay``: publish what waits in a store's outbox."""

from __future__ import annotations

import json
import signal
from typing import Any, cast

import click

from idemp.cli.options import json_option, store_at, store_option, transport_at, transport_option
from idemp.ports import Inbox
from idemp.relay import Relay


@click.command()
@click.option("--once", is_flag=True, help="End when the outbox is empty, or nothing of it can be sent.")
@store_option
@transport_option
@json_option
def relay(store: str, transport: str, once: bool, as_json: bool) -> None:
    """Publish what handlers with transaction=True put into the store's outbox, until stopped."""
    with store_at(store) as opened, transport_at(transport) as broker:
        working = Relay(cast(Inbox, opened), broker)
        sent = 0
        if once:
            while (turn := working.turn()) > 0:
                sent += turn
        else:

            def stop(number: int, frame: Any) -> None:
                working.stop()

            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, stop)
            working.run()
        left = working.backlog().letters
    said = {"sent": sent, "left": left} if once else {"left": left}
    click.echo(json.dumps(said) if as_json else ", ".join(f"{n} {what}" for what, n in said.items()))
    if once and left:
        click.get_current_context().exit(1)
