"""Attempts of what may have killed its process: counted first, alone if it must be, and never twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from idemp.errors import Contended, StoreUnavailable
from idemp.inbox import Job, transact
from idemp.policy import make_policy
from idemp.ports import Claimed, Done, Free, Get, Parked, State
from idemp.protocol import Ok, Refused, Returned, Verdict, protocol
from idemp.stores import open_store
from tests.servers import PostgreSQL


class Died(BaseException):
    """The process, in the middle of a handler."""


class Place:
    """A store, and what ran in it: the keys of each transaction, with their attempts."""

    def __init__(self, url: str) -> None:
        store: Any = open_store(url)
        self.store = store
        self.ran: list[list[tuple[str, int]]] = []
        self.deadly: set[str] = set()
        self._transaction = self.store.transaction
        self.store.transaction = self.transaction
        self.twice = False

    def transaction(self, work: Callable[[Any], Any], wait: float, **options: Any) -> Any:
        self.ran.append([])
        if self.twice:  # it committed, and the reply was lost
            self.twice = False
            self._transaction(work, wait, **options)
        return self._transaction(work, wait, **options)

    def run(self, key: str, claim: Claimed, connection: Any) -> Returned:
        self.ran[-1].append((key, claim.attempt))
        if key in self.deadly:
            raise Died
        return Returned(None, None)

    def job(self, key: str, *, again: bool = True, attempts: int = 3) -> Job:
        policy = make_policy(
            lambda message: None, self.store, name="a", key=None, fingerprint=None, on_busy="wait", wait=2.0,
            in_doubt="retry", attempts=attempts, permanent=(), codec=None, transaction=True,
        )  # fmt: skip
        begin = partial(protocol, policy, key, None)
        return Job(key, begin, partial(self.run, key), lambda _: None, 2.0, attempts, again=again)

    def handle(self, *jobs: Job) -> list[Verdict]:
        """The verdicts; what ran in which transaction is in ``ran``."""
        self.ran.clear()
        try:
            return transact(self.store, jobs)
        finally:
            self.ran = [each for each in self.ran if each]

    def state(self, key: str) -> State:
        found: State = self.store.apply([Get(key)])[0]
        return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(f"sqlite:///{tmp_path}/app.db")
    with closing(made.store):
        yield made


def die(place: Place, *jobs: Job) -> None:
    with pytest.raises(Died):
        place.handle(*jobs)


def test_it_is_counted_before_it_begins(place: Place) -> None:
    """Only what was delivered before: the first death is nobody's."""
    place.deadly = {"key"}
    die(place, place.job("key", again=False))
    assert place.state("key") == Free(0)
    die(place, place.job("key"))
    assert place.state("key") == Free(1)


def test_the_attempt_that_was_counted_is_this_one(place: Place) -> None:
    """What ends well is at its first attempt, and so is what it is told."""
    [verdict] = place.handle(place.job("key"))
    assert isinstance(verdict, Ok)
    assert place.ran == [[("key", 1)]]
    done = place.state("key")
    assert isinstance(done, Done)
    assert done.attempt == 1


def test_what_was_counted_before_goes_alone(place: Place) -> None:
    """It may be the guilty one: it takes no neighbour with it, and gives none an attempt."""
    place.deadly = {"bad"}
    die(place, place.job("bad"))
    die(place, place.job("a"), place.job("bad"), place.job("b"))
    assert place.ran == [[("a", 1), ("b", 1)], [("bad", 2)]]
    assert [type(place.state(key)) for key in ("a", "b")] == [Done, Done]
    assert place.state("bad") == Free(2)


def test_one_that_has_one_attempt_only_goes_alone_at_once(place: Place) -> None:
    """It would be parked for its neighbour's deed."""
    place.handle(place.job("a"), place.job("once", attempts=1), place.job("b"))
    assert place.ran == [[("a", 1), ("b", 1)], [("once", 1)]]


def test_a_count_whose_reply_was_lost_is_not_made_again(place: Place) -> None:
    """The transaction is tried anew, and finds what it left."""
    place.twice = True
    place.deadly = {"key"}
    die(place, place.job("key"))
    assert place.state("key") == Free(1)


def test_in_the_end_it_is_parked(place: Place) -> None:
    """After its attempts it is not run again."""
    place.deadly = {"key"}
    for _ in range(3):
        die(place, place.job("key"))
    [verdict] = place.handle(place.job("key"))
    assert isinstance(verdict, Refused)
    assert place.ran == []
    parked = place.state("key")
    assert isinstance(parked, Parked)
    assert parked.reason == "attempts used up: 3 began, none is known to have ended"


def test_after_a_commit_that_nobody_knows_of_a_deadlock_divides_nothing(
    postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only who made that commit can tell that what is done is its own."""
    place = Place(postgresql.database())
    with closing(place.store):
        session = place.store._session_here()
        once, tries = session._once, itertools.count(1)

        def tried(*what: Any) -> Any:
            number = next(tries)
            if number == 2:
                return Contended("deadlock detected")
            came = once(*what)
            return StoreUnavailable("the commit's reply is lost") if number == 1 else came

        monkeypatch.setattr(session, "_once", tried)
        verdicts = place.handle(place.job("a", again=False), place.job("b", again=False))
        assert [type(verdict) for verdict in verdicts] == [Ok, Ok]
        assert place.ran == [[("a", 1), ("b", 1)]]
        assert next(tries) == 4
