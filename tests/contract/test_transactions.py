"""The laws of a store that handlers write in (design of `idemp.ports.Inbox`): SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, cast

import pytest

from idemp.errors import Closed, Contended, KeyBusy
from idemp.message import Properties
from idemp.ports import Applied, Claim, Claimed, Complete, Done, Free, Get, Inbox, Publication, Transaction
from tests.contract.backends import BACKENDS, Backend

WAIT = 30.0
LETTER = Publication(b"{}", Properties(), "out", "billed")


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    """Each that has transactions, empty."""
    return BACKENDS[request.param](request, tmp_path)


@pytest.fixture
def store(backend: Backend) -> Iterator[Inbox]:
    """A store of the backend, with a table of effects beside it."""
    with closing(cast(Inbox, backend.open())) as opened:
        opened.transaction(lambda transaction: write(transaction, "CREATE TABLE effect (id TEXT)"), WAIT)
        yield opened


def write(transaction: Transaction, statement: str) -> None:
    transaction.connection.execute(statement)


def effects(store: Inbox) -> list[str]:
    """As everybody sees them."""

    def read(transaction: Transaction) -> list[str]:
        rows = transaction.connection.execute("SELECT id FROM effect ORDER BY id").fetchall()
        return [str(row[0]) for row in rows]

    return store.transaction(read, WAIT)


def take_effect(transaction: Transaction, key: str) -> Any:
    """What a handler's call is: claim, write, complete; what the claim was told."""
    claim = transaction.apply([Claim(key)])[0]
    if isinstance(claim, Claimed):
        write(transaction, f"INSERT INTO effect VALUES ('{key}')")
        transaction.keep()
        transaction.put(key, [LETTER])
        assert transaction.apply([Complete(key, claim.token, b"7")]) == [Applied()]
    return claim


def test_all_of_it_commits_together(backend: Backend, store: Inbox) -> None:
    """Effect, record and letter, for everybody; and nothing of it before."""
    with closing(cast(Inbox, backend.open())) as other:

        def work(transaction: Transaction) -> str:
            take_effect(transaction, "a")
            assert other.letters(10) == []
            return "returned"

        assert store.transaction(work, WAIT) == "returned"
        done = other.apply([Get("a")])[0]
        assert isinstance(done, Done)
        assert (done.result, done.attempt) == (b"7", 1)
        assert effects(other) == ["a"]
        [letter] = other.letters(10)
        assert (letter.key, letter.publication) == ("a", LETTER)
        assert other.backlog().letters == 1
        other.sent([letter.number, letter.number + 1])
        assert store.backlog() == (0, 0.0)


def test_of_what_raises_nothing_is_left(store: Inbox) -> None:
    """Neither effect nor record nor letter, and the key is free."""

    def work(transaction: Transaction) -> None:
        take_effect(transaction, "a")
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        store.transaction(work, WAIT)
    assert effects(store) == []
    assert store.apply([Get("a")]) == [Free(0)]
    assert store.letters(10) == []


def test_what_is_kept_is_not_undone(store: Inbox) -> None:
    """One of several goes back alone, and what was decided of keys stays."""

    def work(transaction: Transaction) -> None:
        take_effect(transaction, "a")
        claim = transaction.apply([Claim("b")])[0]
        assert isinstance(claim, Claimed)
        write(transaction, "INSERT INTO effect VALUES ('b')")
        assert transaction.undo(ValueError("not this one"))
        take_effect(transaction, "c")

    store.transaction(work, WAIT)
    assert effects(store) == ["a", "c"]
    found = store.apply([Get(key) for key in "abc"])
    assert [type(state).__name__ for state in found[::2]] == ["Done", "Done"]


def test_who_comes_at_the_same_time_waits_and_finds_it_done(backend: Backend, store: Inbox) -> None:
    """Of two transactions with one key the second goes on when the first has ended."""
    coming = threading.Event()
    told: list[Future[Any]] = []

    def second(other: Inbox) -> Any:
        coming.set()
        return other.transaction(lambda transaction: take_effect(transaction, "a"), WAIT)

    with closing(cast(Inbox, backend.open())) as other, ThreadPoolExecutor(1) as pool:
        other.apply([])

        def work(transaction: Transaction) -> None:
            take_effect(transaction, "a")
            told.append(pool.submit(second, other))
            assert coming.wait(20)
            with pytest.raises(TimeoutError):
                told[0].result(0.3)  # it does not end while this one has not

        store.transaction(work, WAIT)
        found = told[0].result(30)
    assert isinstance(found, Done)
    assert found.result == b"7"
    assert effects(store) == ["a"]


def test_a_key_that_another_holds_for_too_long(backend: Backend, store: Inbox) -> None:
    """Is busy, or the whole store is: then nothing of the second is left."""
    with closing(cast(Inbox, backend.open())) as other, ThreadPoolExecutor(1) as pool:
        other.apply([])
        held, over = threading.Event(), threading.Event()

        def hold(transaction: Transaction) -> None:
            take_effect(transaction, "a")
            held.set()
            assert over.wait(60)

        first = pool.submit(store.transaction, hold, WAIT)
        assert held.wait(20)
        if backend.url.startswith("postgresql"):
            with pytest.raises(KeyBusy):
                other.transaction(lambda transaction: take_effect(transaction, "a"), 0.1)
        over.set()
        first.result(30)
        assert isinstance(other.transaction(lambda transaction: take_effect(transaction, "a"), WAIT), Done)
    assert effects(store) == ["a"]


def crosswise(backend: Backend, store: Inbox, *, divisible: bool) -> list[str]:
    """What became of two transactions that hold what the other wants: the names of their replies."""
    meet = threading.Barrier(2)

    def both(opened: Inbox, keys: str) -> list[str]:
        def work(transaction: Transaction) -> list[Any]:
            first = take_effect(transaction, keys[0])
            with suppress(threading.BrokenBarrierError):
                meet.wait(1)  # at the first attempt each has its first key, where that can be
            return [first, take_effect(transaction, keys[1])]

        try:
            return [type(reply).__name__ for reply in opened.transaction(work, WAIT, divisible=divisible)]
        except Contended as error:
            return [type(error).__name__]

    with closing(cast(Inbox, backend.open())) as other, ThreadPoolExecutor(2) as pool:
        other.apply([])
        ran = [pool.submit(both, store, "ab"), pool.submit(both, other, "ba")]
        return sorted(name for each in ran for name in each.result(60))


def test_those_that_hold_what_the_other_wants(backend: Backend, store: Inbox) -> None:
    """A deadlock is broken, and whoever was rolled back is called again: each key takes effect once."""
    assert crosswise(backend, store, divisible=False) == ["Claimed", "Claimed", "Done", "Done"]
    assert effects(store) == ["a", "b"]


def test_who_would_rather_do_less_at_a_time_is_told_of_a_deadlock(backend: Backend, store: Inbox) -> None:
    """Nothing of it happened.  Writers of a SQLite file wait for each other before they hold anything."""
    came = crosswise(backend, store, divisible=True)
    if backend.url.startswith("postgresql"):
        assert came == ["Claimed", "Claimed", "Contended"]
    else:
        assert came == ["Claimed", "Claimed", "Done", "Done"]
    assert effects(store) == ["a", "b"]


def test_many_at_once_in_no_order(backend: Backend, store: Inbox) -> None:
    """Sixteen threads on two sessions and twenty keys: every key takes effect once."""
    with closing(cast(Inbox, backend.open())) as other, ThreadPoolExecutor(16) as pool:

        def work(n: int) -> Any:
            opened, key = (store, other)[n % 2], f"{n * 7 % 20:02}"
            return opened.transaction(lambda transaction: take_effect(transaction, key), WAIT)

        told = list(pool.map(work, range(200)))
    assert sum(isinstance(each, Claimed) for each in told) == 20
    assert effects(store) == [f"{n:02}" for n in range(20)]


def test_after_close_it_is_closed(backend: Backend) -> None:
    """Law 12, for these verbs too."""
    opened = cast(Inbox, backend.open())
    opened.apply([])
    opened.close()
    for verb in (
        lambda: opened.transaction(lambda transaction: None, WAIT),
        lambda: opened.letters(1),
        lambda: opened.sent([1]),
        opened.backlog,
    ):
        with pytest.raises(Closed):
            verb()
