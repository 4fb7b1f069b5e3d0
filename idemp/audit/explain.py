"""Which messages make two services differ: asks those who count, over the broker, and names the ids.

First the tallies of all buckets; of one that differs the tallies of its slices, which are a 256th of
its ids each; of those that differ the ids.  So little travels, however many messages there are.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple
from uuid import uuid4

from idemp.audit.buckets import Pair
from idemp.audit.questions import Answer, Question, asked_queue
from idemp.audit.tally import Tally, together
from idemp.errors import BadMessage, Unavailable
from idemp.message import Properties
from idemp.ports import Delivery, Publication, Sent, Transport

EXPIRES = 600.0
"""Seconds after which the queue of the answers goes."""


class NoAnswer(Unavailable):
    """Who counts does not answer."""


class Difference(NamedTuple):
    """A bucket that is not the same.

    missing, extra: id -> how often the replica has too few, or too many.  unsure: ids that may have taken
    effect once more than is counted, at either.
    """

    start: int
    expected: Tally
    actual: Tally
    missing: Mapping[str, int]
    extra: Mapping[str, int]
    unsure: Sequence[str]


class Asker:
    """Asks over ``transport``, which nobody else uses.  patience: seconds for each answer."""

    def __init__(self, transport: Transport, exchange: str, *, patience: float = 10.0) -> None:
        self._transport, self._exchange, self._patience = transport, exchange, patience
        self._mine = f"{exchange}.answers.{uuid4().hex}"
        self._number = 0
        transport.declare(self._mine, expires=EXPIRES)
        transport.consume(self._mine, 100)

    def ask(self, service: str, instances: Sequence[str], question: Question) -> list[Answer]:
        """One from each instance.  Raises `NoAnswer`."""
        self._number += 1
        body = question._replace(reply_to=self._mine, number=self._number).encode()
        about = Properties(message_id=uuid4().hex, app_id="idemp-audit", timestamp=time.time())
        queues = {name: asked_queue(self._exchange, name) for name in instances}
        sent = self._transport.send([Publication(body, about, "", queue) for queue in queues.values()])
        waiting = dict(zip(sent, instances, strict=True))
        found: dict[str, Answer] = {}
        until = time.monotonic() + self._patience
        while len(found) < len(instances):
            silent = sorted(set(instances) - found.keys())
            if (left := until - time.monotonic()) <= 0:
                raise NoAnswer(
                    f"{service} ({silent[0][:8]}) did not answer within {self._patience:g} s; is it running?"
                )
            for event in self._transport.poll(left):
                match event:
                    case Sent(number, error) if error:
                        gone = waiting[number][:8]
                        raise NoAnswer(f"{service} ({gone}) cannot be asked, for nobody listens: {error}")
                    case Delivery():
                        self._transport.ack([event.tag])
                        answer = _answer(event.body)
                        if answer is not None and answer.number == self._number:
                            found[answer.instance] = answer
        return list(found.values())


def _answer(body: bytes) -> Answer | None:
    try:
        return Answer.decode(body)
    except BadMessage:
        return None


def differences(
    pair: Pair,
    instances: Callable[[str], Sequence[str]],
    asker: Asker,
    between: tuple[float, float],
) -> Iterator[Difference]:
    """Of the buckets between two times, the oldest first.  instances: of a service.  Raises `NoAnswer`."""
    both = (pair.owner, pair.replica)

    def ask(about: str, start: int = 0) -> list[list[Answer]]:
        question = Question(about, pair.field, "", 0, start)
        return [asker.ask(who, instances(who), question) for who in both]

    lower, upper = between
    for start, expected, actual in _odd(*ask("buckets")):
        if not lower <= start <= upper - pair.length:
            continue
        slices = [place for place, *_ in _odd(*ask("slices", start))]
        owners, replicas = (_ids(asker, pair, who, instances(who), start, slices) for who in both)
        missing, extra = owners[0] - replicas[0], replicas[0] - owners[0]
        unsure = sorted(owners[1] | replicas[1])
        if missing or extra or unsure:  # else it was mended while it was asked for
            yield Difference(
                start, expected, actual, dict(sorted(missing.items())), dict(sorted(extra.items())), unsure
            )


def _odd(owners: Sequence[Answer], replicas: Sequence[Answer]) -> list[tuple[int, Tally, Tally]]:
    """The places where the two are not surely the same."""
    sums = [_sums(answers) for answers in (owners, replicas)]
    found = []
    for place in sorted(sums[0].keys() | sums[1].keys()):
        one, other = (each.get(place, Tally()) for each in sums)
        if not one.same(other) or one.unsure or other.unsure:
            found.append((place, one, other))
    return found


def _sums(answers: Sequence[Answer]) -> dict[int, Tally]:
    parts: dict[int, list[Tally]] = defaultdict(list)
    for answer in answers:
        for place, tally in answer.tallies.items():
            parts[place].append(tally)
    return {place: together(each) for place, each in parts.items()}


def _ids(
    asker: Asker, pair: Pair, service: str, instances: Sequence[str], start: int, slices: Sequence[int]
) -> tuple[Counter[str], set[str]]:
    """How often each id is counted, and those that are unsure."""
    counted: Counter[str] = Counter()
    unsure: set[str] = set()
    for name in instances:
        after, more = "", True
        while more:
            question = Question("ids", pair.field, "", 0, start, slices, after)
            [answer] = asker.ask(service, [name], question)
            for id, n, times in answer.ids:
                counted[id] += n
                if times:
                    unsure.add(id)
            more = answer.more and bool(answer.ids)
            after = answer.ids[-1][0] if answer.ids else ""
    return counted, unsure
