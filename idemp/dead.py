"""Dead letters: what a consumer set aside in ``<queue>.dead``, and why.  Reading takes nothing out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from idemp.message import Properties
from idemp.ports import Delivery, Transport
from idemp.resolve import MOST, QUIET

_VARIES = re.compile(r"'[^']*'|\"[^\"]*\"|\d+(?:\.\d+)?")
"""What differs between two messages that failed for one reason: names in quotes, numbers."""


class Letter(NamedTuple):
    """One dead letter.  ``at``: when it was published, in seconds since 1970, if that is known."""

    key: str
    outcome: str
    reason: str
    attempt: int
    queue: str
    type: str
    at: float | None
    body: bytes
    properties: Properties

    @property
    def group(self) -> str:
        """The same for all letters that died of one thing."""
        return f"{self.outcome}: {_VARIES.sub('_', self.reason)}"


def letters(transport: Transport, queue: str, most: int = MOST) -> Iterator[Letter]:
    """Up to ``most`` letters of ``<queue>.dead``, the oldest first.

    They are everybody's again when ``transport`` is closed, so give it one of its own.
    """
    dead = f"{queue}.dead"
    left = min(transport.depth(dead), most, MOST)
    if not left:
        return
    transport.consume(dead, left)
    while left > 0 and (came := transport.poll(QUIET)):
        for event in came[:left]:
            if isinstance(event, Delivery):
                left -= 1
                yield _letter(event, queue)


def _letter(delivery: Delivery, queue: str) -> Letter:
    properties = delivery.properties
    headers = properties.headers
    attempt: Any = headers.get("idemp-attempt", 0)
    return Letter(
        str(headers.get("idemp-key", "")),
        str(headers.get("idemp-outcome", "unknown")),
        str(headers.get("idemp-reason", "no reason is written on it")),
        attempt if isinstance(attempt, int) else 0,
        str(headers.get("idemp-queue", queue)),
        properties.type or "",
        properties.timestamp,
        delivery.body,
        properties,
    )
