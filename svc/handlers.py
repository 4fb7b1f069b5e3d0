"""Handlers: what the service does with an event.  A real one would book and ban here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from idemp import Message

log = logging.getLogger(__name__)

Handler = Callable[[Message], None]


def new_order(message: Message) -> None:
    """An order came in."""
    log.debug("new order %r: %r", message.id, message.args)


def ban_user(message: Message) -> None:
    """A user is to be banned."""
    log.debug("ban user %r: %r", message.id, message.args)


HANDLERS: Mapping[str, Handler] = {"new_order": new_order, "ban_user": ban_user}
"""Message type -> handler; the type is also the metric's and the key's name."""
