"""Routing: AMQP topic matching, and the sentence for a message that no queue takes.

Pure; for the brokers that live inside this package.  RabbitMQ does its own.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from operator import or_


@lru_cache(maxsize=8192)
def matches(pattern: str, key: str) -> bool:
    """Whether a queue bound with ``pattern`` gets what was published with ``key``.

    Both are words with dots between; ``*`` is any one word, ``#`` any number of words, also none.
    """
    words = _words(key)
    row = [True, *(False for _ in words)]  # row[n]: the pattern so far matches the first n words
    for part in _words(pattern):
        if part == "#":
            row = list(accumulate(row, or_))
        elif part == "*":
            row = [False, *row[:-1]]
        else:
            row = [False, *(ok and word == part for ok, word in zip(row, words, strict=False))]
    return row[-1]


def _words(text: str) -> list[str]:
    """As RabbitMQ splits: an empty text has no words, yet ``a.`` has two."""
    return text.split(".") if text else []


def no_queue(exchange: str, routing_key: str) -> str:
    """Why a publication was not accepted."""
    if not exchange:
        return f"no queue is named {routing_key!r}"
    return f"no queue takes routing key {routing_key!r} of exchange {exchange!r}"
