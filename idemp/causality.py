"""Causality: what stands around this line and wants to know what is published or said here.

The consumer's worker threads carry their tracker in `current`; where there is none nothing is tracked, and
asking costs one look at a context variable.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, Protocol

PARENT = "x-parent-id"
"""Header: the id of the message whose handler published this one."""
SENT = "x-sent-ms"
"""Header: when it was published, milliseconds since 1970, by the publisher's clock."""
TRACE = "traceparent"
"""Header: W3C trace context, as text."""
REPLAY = "x-replay-id"
"""Header: the replay that sent this message again."""
CONFIRMED = "x-replay-confirmed"
"""Header: who confirmed that it is sent again."""


class Tracks(Protocol):
    """What a tracker does for those who publish; see `idemp.tracking`."""

    def stamp(self, publications: Sequence[Any]) -> list[Any]:
        """The publications with parent, conversation and trace in their properties."""
        ...

    def sent(self, publications: Sequence[Any]) -> None:
        """They are safe in a queue."""
        ...

    def note(self, message: Any, text: str, *, hide_payload: bool = False) -> None:
        """Somebody says ``text`` of ``message``."""
        ...


current: ContextVar[Tracks | None] = ContextVar("idemp_tracker", default=None)
