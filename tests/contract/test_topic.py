"""Topic matching, against the definition written down as plainly as can be.

That the definition is RabbitMQ's own is for test_transports.py, where the real one is the witness.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from idemp.transports.topic import matches

words = st.sampled_from(["a", "b", "", "long-word", "ž"])
keys = st.lists(words, max_size=6).map(".".join)
patterns = st.lists(words | st.sampled_from(["*", "#"]), max_size=6).map(".".join)


def plainly(pattern: list[str], key: list[str]) -> bool:
    if not pattern:
        return not key
    first, *rest = pattern
    if first == "#":
        return plainly(rest, key) or (bool(key) and plainly(pattern, key[1:]))
    return bool(key) and first in ("*", key[0]) and plainly(rest, key[1:])


def split(text: str) -> list[str]:
    return text.split(".") if text else []


@given(patterns, keys)
def test_it_matches_as_defined(pattern: str, key: str) -> None:
    assert matches(pattern, key) == plainly(split(pattern), split(key))


@given(keys)
def test_a_key_matches_itself_and_everything(key: str) -> None:
    assert matches(key, key)
    assert matches("#", key)
    assert matches("#.#", key)


def test_many_hashes_take_no_longer() -> None:
    """Where a simple search would try every division."""
    assert not matches(".".join(["#", "a"] * 30), ".".join(["a"] * 60 + ["b"]))
