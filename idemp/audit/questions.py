"""What `idemp audit explain` asks of who counts, and the answers.  Queue to queue, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from idemp.audit.messages import NAME, fit, tallied, written
from idemp.audit.tally import Tally
from idemp.errors import BadMessage

PAGE = 2000
"""Ids in an answer."""
QUEUE = 255
"""Bytes that the name of a queue has at most."""


def asked_queue(exchange: str, instance: str) -> str:
    """Where this instance is asked."""
    return f"{exchange}.asked.{instance}"


class Question(NamedTuple):
    """What is in the buckets of ``kind``.

    about: ``buckets`` (their tallies), ``slices`` (those of one bucket's slices), ``ids`` (a bucket's, of
    some slices, from the first > ``after``).  reply_to: the queue for the answer, which carries ``number``.
    """

    about: str
    kind: str
    reply_to: str
    number: int
    start: int = 0
    slices: Sequence[int] = ()
    after: str = ""

    def encode(self) -> bytes:
        """As JSON."""
        return json.dumps(self._asdict()).encode()

    @classmethod
    def decode(cls, body: bytes) -> Question:
        """The question in ``body``.  Raises `BadMessage`."""
        try:
            told = cls(**json.loads(body))
            if not all(isinstance(each, str) for each in (told.about, told.kind, told.reply_to, told.after)):
                raise TypeError("a name is no text")
            for name, most in ((told.kind, NAME), (told.reply_to, QUEUE)):
                if not fit(name, most):
                    raise ValueError(f"{name[:40]!r} is no name")
            told.after.encode()
            start, slices = int(told.start), [int(each) for each in told.slices]
            if abs(start) >= 2**63:
                raise ValueError(f"no bucket begins at {start}")
            return told._replace(number=int(told.number), start=start, slices=slices)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise BadMessage(f"this is no question of an audit: {error}") from None


class Answer(NamedTuple):
    """To question ``number``: tallies, or ids (each with how often, and how often unsure).

    more: the ids go on after the last of these.
    """

    number: int
    instance: str
    tallies: Mapping[int, Tally]
    ids: Sequence[tuple[str, int, int]] = ()
    more: bool = False

    def encode(self) -> bytes:
        """As JSON."""
        return json.dumps({**self._asdict(), "tallies": written(self.tallies)}).encode()

    @classmethod
    def decode(cls, body: bytes) -> Answer:
        """The answer in ``body``.  Raises `BadMessage`."""
        try:
            told: dict[str, Any] = json.loads(body)
            ids = [(str(id), int(n), int(unsure)) for id, n, unsure in told["ids"]]
            tallies = tallied(told["tallies"])
            return cls(int(told["number"]), str(told["instance"]), tallies, ids, told["more"] is True)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise BadMessage(f"this is no answer of an audit: {error}") from None
