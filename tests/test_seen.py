"""The table of done keys: like a dictionary, whatever is added, forgotten and dropped."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from idemp.stores.seen import Record, Seen


class Alike(str):
    """A key whose hash is that of many."""

    def __hash__(self) -> int:
        return int(self[-1]) % 2


def test_many_stay_small_and_are_all_found() -> None:
    """And what was never done is not."""
    seen = Seen()
    for n in range(100_000):
        seen.add(f"a/{n}", n, n, b"null", None, 1)
    assert len(seen) == 100_000
    assert all(seen.find(f"a/{n}") == Record(n, n, b"null", None, 1) for n in range(100_000))
    assert not any(seen.find(f"b/{n}") for n in range(100_000))
    assert max(map(len, seen._cells)) < 32 * 150, "the cells are about even"


class Tables(RuleBasedStateMachine):
    """Against a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()
        self.model: dict[str, tuple[int, Record]] = {}
        self.place = self.bucket = self.floor = 0

    @rule(
        keys=st.lists(st.integers(0, 300), max_size=40),
        alike=st.booleans(),
        result=st.sampled_from([b"null", None, b"x"]),
        attempt=st.integers(1, 2),
    )
    def add(self, keys: list[int], alike: bool, result: Any, attempt: int) -> None:
        for number in keys:
            key: str = Alike(number) if alike else f"k{number}"
            if str(key) in self.model:
                continue
            self.place += 3
            made = Record(1_000_000 + self.place, self.place, result, None, attempt)
            self.seen.add(key, *made)
            self.model[str(key)] = self.bucket, made

    @rule(number=st.integers(0, 300), alike=st.booleans())
    def forget(self, number: int, alike: bool) -> None:
        key: str = Alike(number) if alike else f"k{number}"
        self.seen.remove(key)
        self.model.pop(str(key), None)

    @rule()
    def begin(self) -> None:
        self.place += 1
        self.bucket += 1
        self.seen.begin(self.bucket, self.place)

    @rule(distance=st.integers(0, 2))
    def drop(self, distance: int) -> None:
        self.floor = max(self.floor, self.bucket - distance)
        self.seen.drop_before(self.floor)
        self.model = {key: found for key, found in self.model.items() if found[0] >= self.floor}

    @invariant()
    def they_agree(self) -> None:
        assert len(self.seen) == len(self.model)
        for number in range(301):
            for key in (Alike(number), f"k{number}"):
                expected = self.model.get(str(key))
                assert self.seen.find(key) == (expected[1] if expected else None)


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
