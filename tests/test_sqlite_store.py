"""What only the SQLite store has: lost replies of a commit, sessions by a clock, slices, bad files."""

from __future__ import annotations

import itertools
import random
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import pytest

from idemp import context, idempotent
from idemp.embedded import mount_of
from idemp.errors import ConfigError, StoreUnavailable
from idemp.laws import Entry, Ledger
from idemp.ports import (
    Abandon,
    Applied,
    Busy,
    Claim,
    Claimed,
    Clock,
    Complete,
    Done,
    Doubt,
    Forget,
    Free,
    Get,
    Lost,
    Op,
    Park,
    Parked,
    Release,
    Reply,
    Takeover,
)
from idemp.stores import open_store, sqlite_known
from idemp.stores.sqlite import LAYOUT, SqliteStore, _portions, layout_of
from idemp.transports import open_transport
from idemp.transports.sqlite import SqliteTransport
from tests.servers.need import missing
from tests.service import finished


class Time:
    """A clock that a test moves.  Sleeping moves it too.  ``ahead``: seconds that the wall clock is."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.ahead = 0.0
        self.clock = Clock(wall=lambda: self.now + self.ahead, steady=lambda: self.now, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Wire:
    """Connections whose statements a test can hinder: ``fault(when, sql)`` may raise."""

    def __init__(self) -> None:
        self.fault: Callable[[str, str], None] = lambda when, sql: None
        self.commits = 0

    def connect(self, *args: Any, factory: Any = sqlite3.Connection, **kwargs: Any) -> sqlite3.Connection:
        wire = self

        class Connection(factory):  # type: ignore[misc]
            def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
                wire.fault("before", sql)
                cursor: sqlite3.Cursor = super().execute(sql, *values)
                wire.commits += sql == "COMMIT"
                wire.fault("after", sql)
                return cursor

        return sqlite3.connect(*args, factory=Connection, **kwargs)

    def fail(self, when: str, sql: str, times: int) -> None:
        """Let the next ``times`` executions of ``sql`` fail, before or after they take effect."""
        left = [times]

        def fault(now: str, statement: str) -> None:
            if now == when and statement == sql and left[0]:
                left[0] -= 1
                raise sqlite3.OperationalError("disk I/O error")

        self.fault = fault

    def cut(self, when: str) -> None:
        """From the next commit on, before or after it takes effect, nothing gets through."""
        down = [False]

        def fault(now: str, statement: str) -> None:
            down[0] = down[0] or (statement == "COMMIT" and now == when)
            if down[0]:
                raise sqlite3.OperationalError("disk I/O error")

        self.fault = fault


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def make(tmp_path: Path, time: Time, wire: Wire) -> Iterator[Callable[..., SqliteStore]]:
    """Opens stores on one file."""
    stores = []

    def opened(retention: float = 3600.0, session_ttl: float = 10.0) -> SqliteStore:
        store = SqliteStore(
            str(tmp_path / "seen.db"),
            retention=retention,
            session_ttl=session_ttl,
            clock=time.clock,
            connect=wire.connect,
        )
        stores.append(store)
        return store

    yield opened
    wire.fault = lambda when, sql: None
    for store in stores:
        store.close()


# ------------------------------------------------------------------ law 10: ambiguous replies


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("sql", ["BEGIN IMMEDIATE", "COMMIT"])
def test_an_error_on_the_way_is_resolved(make: Any, wire: Wire, when: str, sql: str) -> None:
    """Law 10: whether the commit took effect or not, the caller gets the one true reply."""
    store = make()
    first = store.apply([Claim("warm")])[0]
    assert isinstance(first, Claimed)
    wire.fail(when, sql, 1)
    [claimed] = store.apply([Claim("a")])
    assert claimed == Claimed(claimed.token, 1)
    wire.fail(when, sql, 1)
    assert (
        store.apply([Complete("a", claimed.token, b"1"), Release("warm", first.token, 1)]) == [Applied()] * 2
    )
    [done] = store.apply([Claim("a")])
    assert isinstance(done, Done)
    assert done.result == b"1"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_claim_that_nobody_heard_of_is_given_back(make: Any, wire: Wire, when: str) -> None:
    """Law 10: after `StoreUnavailable` no claim of the batch is held, committed or not."""
    store, other = make(), make()
    store.apply([Claim("warm")])
    [doubted] = other.apply([Claim("doubt")])
    other.close()
    wire.cut(when)
    with pytest.raises(StoreUnavailable, match="disk I/O error"):
        store.apply([Claim("a"), Takeover("doubt", doubted.token)])
    wire.fault = lambda when, sql: None

    again = store.apply([Claim("a"), Get("doubt")])

    assert isinstance(again[0], Claimed)
    assert again[0].attempt == 1
    assert isinstance(again[1], Doubt)


def test_giving_back_may_be_ambiguous_too(make: Any, wire: Wire) -> None:
    """Law 10: the commit that gives claims back is heard of only at the second try."""
    store = make()
    store.apply([Claim("warm")])
    wire.cut("after")
    with pytest.raises(StoreUnavailable):
        store.apply([Claim("a")])
    wire.fail("after", "COMMIT", 1)

    b, a = store.apply([Claim("b"), Claim("a")])

    assert isinstance(b, Claimed)
    assert isinstance(a, Claimed)
    assert b.token < a.token
    assert a.attempt == 1


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("sql", ["BEGIN IMMEDIATE", "COMMIT"])
def test_giving_back_may_fail_too(make: Any, wire: Wire, when: str, sql: str) -> None:
    """Law 10: a second fault, in the batch that gives claims back; they are, and nothing else is."""
    store = make()
    [doubted] = store.apply([Claim("doubt")])
    store.apply([Abandon("doubt", doubted.token)])
    wire.cut("after")
    with pytest.raises(StoreUnavailable):
        store.apply([Claim("a"), Takeover("doubt", doubted.token)])
    wire.fail(when, sql, 1)

    [other] = store.apply([Claim("other")])

    states = store.apply([Get("a"), Get("doubt"), Get("other")])
    assert [type(state) for state in states] == [Free, Doubt, Busy]
    assert store.apply([Complete("other", other.token)]) == [Applied()]
    assert isinstance(store.apply([Claim("a")])[0], Claimed)


def test_giving_back_may_fail_for_long(make: Any, wire: Wire) -> None:
    """Law 10: so that the callers behind it are told `StoreUnavailable`, too: all of them hold nothing."""
    store = make(session_ttl=1000.0)
    store.apply([Claim("warm")])
    for key, when in (("a", "after"), ("b", "before"), ("c", "after"), ("d", "before")):
        wire.cut(when)
        with pytest.raises(StoreUnavailable):
            store.apply([Claim(key)])
    wire.fault = lambda when, sql: None

    again = store.apply([Claim(key) for key in "abcd"])
    assert [(type(reply), reply.attempt) for reply in again] == [(Claimed, 1)] * 4


def test_a_completion_that_was_not_heard_of_stands(make: Any, wire: Wire) -> None:
    """Repeating it is harmless."""
    store = make()
    [claimed] = store.apply([Claim("a")])
    wire.cut("after")
    with pytest.raises(StoreUnavailable):
        store.apply([Complete("a", claimed.token, b"1")])
    wire.fault = lambda when, sql: None
    assert store.apply([Complete("a", claimed.token, b"1")]) == [Applied()]
    assert isinstance(store.apply([Claim("a")])[0], Done)


# ------------------------------------------------------------------ sessions


def test_a_session_dies_by_the_clock_and_never_comes_back(make: Any, time: Time) -> None:
    """Law 6, at the very second: alive at its time to live, dead after."""
    store, other = make(), make()
    [claimed] = store.apply([Claim("a")])
    time.now += 9.99
    assert isinstance(other.apply([Claim("a")])[0], Busy)
    time.now += 0.02
    assert isinstance(other.apply([Claim("a")])[0], Doubt)
    [late] = store.apply([Claim("b")])
    assert isinstance(late, Claimed)
    assert isinstance(other.apply([Claim("a")])[0], Doubt), "the new session is another one"
    assert store.apply([Complete("a", claimed.token)]) == [Applied()], "nobody has taken it"


def test_freshness_ends_after_two_thirds(make: Any, time: Time) -> None:
    """No handler starts on a session that may soon be dead."""
    store = make(session_ttl=9.0)
    store.apply([Claim("a")])
    assert store.fresh()
    time.now += 5.9
    assert store.fresh()
    time.now += 0.2
    assert not store.fresh()
    store.apply([])
    assert store.fresh()


def test_what_a_lost_session_had_claimed_is_not_started(make: Any, time: Time) -> None:
    """It is in doubt by now, and perhaps another's already."""
    store, other = make(), make()
    [claimed] = store.apply([Claim("a")])
    assert store.fresh(claimed.token)
    time.now += 10.1
    [doubt] = other.apply([Claim("a")])
    [taken] = other.apply([Takeover("a", doubt.token)])
    [late] = store.apply([Claim("b")])
    assert store.fresh()
    assert not store.fresh(claimed.token)
    assert store.fresh(late.token)
    assert other.fresh(taken.token)


def test_after_a_restart_of_the_host_every_session_is_dead(
    make: Any, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steady clock begins anew; the boot's id tells."""
    store = make()
    store.apply([Claim("a")])
    monkeypatch.setattr("idemp.stores.sqlite._boot_id", lambda: "another boot")
    time.now -= 900_000

    assert isinstance(make().apply([Claim("a")])[0], Doubt)


def test_an_idle_duplicate_costs_no_write(make: Any, wire: Wire) -> None:
    """Answers from what is stored commit nothing."""
    store = make()
    [claimed] = store.apply([Claim("a")])
    store.apply([Complete("a", claimed.token)])
    before = wire.commits
    for _ in range(100):
        store.apply([Claim("a")] * 10)
    assert wire.commits == before


def test_a_single_duplicate_waits_for_no_writer(make: Any, tmp_path: Path) -> None:
    """While another process is in the middle of a transaction; a key that is not done waits for it."""
    store = make()
    [claimed] = store.apply([Claim("a")])
    store.apply([Complete("a", claimed.token, b"1")])
    other = sqlite3.connect(tmp_path / "seen.db", check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    [done] = store.apply([Claim("a")])
    assert (type(done), done.result) == (Done, b"1")
    with ThreadPoolExecutor(1) as pool:
        fresh = pool.submit(store.apply, [Claim("b")])
        assert not wait([fresh], 0.3).done
        other.execute("ROLLBACK")
        assert isinstance(fresh.result(20)[0], Claimed)
    other.close()


def test_threads_share_commits(make: Any, wire: Wire) -> None:
    """Group commit: far fewer commits than calls."""
    store = make()
    store.apply([])
    slow = threading.Event()

    def slowly(when: str, sql: str) -> None:
        if (when, sql) == ("before", "COMMIT"):
            slow.wait(0.005)

    wire.fault = slowly
    before = wire.commits

    def work(number: int) -> None:
        for n in range(10):
            assert isinstance(store.apply([Claim(f"{number}/{n}")])[0], Claimed)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    assert wire.commits - before < 80


# ------------------------------------------------------------------ what is known without asking


def done(store: SqliteStore, key: str, result: bytes = b"1") -> int:
    """Claim and complete ``key``; its token."""
    [claimed] = store.apply([Claim(key)])
    assert isinstance(claimed, Claimed)
    assert store.apply([Complete(key, claimed.token, result)]) == [Applied()]
    return claimed.token


def test_what_this_process_wrote_is_not_loaded_again(make: Any, wire: Wire) -> None:
    """A completion of its own claim; a batch of duplicates not even begins a transaction."""
    store = make()
    store.apply([])
    said: list[str] = []
    wire.fault = lambda when, sql: said.append(sql.split()[0]) if when == "before" else None
    claims = store.apply([Claim(key) for key in "abc"])
    assert said.count("SELECT") == 1
    store.apply([Complete(key, claim.token) for key, claim in zip("abc", claims, strict=True)])
    assert said.count("SELECT") == 1
    said.clear()
    assert all(isinstance(reply, Done) for reply in store.apply([Claim(key) for key in "abcabc"]))
    assert set(said) == {"PRAGMA"}


@pytest.mark.parametrize("asked", [1, 2])
def test_what_another_process_wrote_is_seen(make: Any, asked: int) -> None:
    """Forgotten by it: not done; taken over by it: lost.  In batches of one key and of more."""
    mine, theirs = make(), make()
    mine.apply([])
    for key in "abc":
        token = done(mine, key)
        assert mine.recall(key) == mine.apply([Claim(key)])[0]
        assert theirs.apply([Forget(key, token)]) == [Applied()]
        assert mine.recall(key) is None
        assert [type(reply) for reply in mine.apply([Claim(key)] * asked)] == [Claimed, Busy][:asked]
        [busy] = theirs.apply([Claim(key)])
        assert mine.apply([Abandon(key, busy.token)]) == [Applied()]
        [taken] = theirs.apply([Takeover(key, busy.token)])
        assert isinstance(taken, Claimed)
        [lost] = mine.apply([Complete(key, busy.token)])
        assert isinstance(lost, Lost)
        assert theirs.apply([Complete(key, taken.token, b"2")]) == [Applied()]
        [seen] = mine.apply([Claim(key)])
        assert (type(seen), seen.result) == (Done, b"2")


def test_what_is_known_is_what_is_loaded(make: Any, time: Time) -> None:
    """To the last digit of its time."""
    time.now = 1795305467.117982345
    store = make()
    [busy] = store.apply([Claim("a")])
    done(store, "b")
    states = store.apply([Get("a"), Get("b")])
    assert (states[0].token, states[1]) == (busy.token, store.recall("b"))
    assert states == make().apply([Get("a"), Get("b")])


def test_what_a_handler_wrote_is_seen(make: Any) -> None:
    """Its transaction has a connection of its own."""
    store = make()
    token = done(store, "a")
    assert store.recall("a")
    store.transaction(lambda transaction: transaction.apply([Forget("a", token)]), 10.0)
    assert store.recall("a") is None
    assert isinstance(store.apply([Claim("a")])[0], Claimed)


def test_one_look_serves_what_came_before_it(make: Any, time: Time, wire: Wire) -> None:
    """Who asks what held at the last look or later, or later than that."""
    store, other = make(), make()
    token = done(store, "a")
    looks: list[str] = []
    wire.fault = lambda when, sql: looks.append(sql) if when == "before" else None
    assert store.recall("a")
    assert looks == ["PRAGMA data_version"]
    assert store.recall("a", time.now)
    assert store.recall("a", time.now - 5)
    assert len(looks) == 1
    other.apply([Forget("a", token)])
    looks.clear()
    assert store.recall("a", time.now)  # it held when it was looked at
    assert looks == []
    assert store.recall("a", time.now + 1) is None
    assert store.recall("a", time.now) is None


def test_nothing_is_recalled_that_cannot_be_looked_at(make: Any, wire: Wire) -> None:
    """The look fails, or another thread is reading; what is committed stands."""
    store = make()
    done(store, "a")
    wire.fail("before", "PRAGMA data_version", 1)
    assert store.recall("a") is None
    assert store.recall("a")
    [claimed] = store.apply([Claim("b")])
    looks = [0]

    def fault(when: str, sql: str) -> None:
        looks[0] += (when, sql) == ("before", "PRAGMA data_version")
        if looks[0] == 2:
            raise sqlite3.OperationalError("disk I/O error")

    wire.fault = fault
    assert store.apply([Complete("b", claimed.token)]) == [Applied()]
    wire.fault = lambda when, sql: None
    assert store.recall("b") is None
    assert isinstance(store.apply([Claim("b")])[0], Done)
    with store._session_here()._reading:
        assert store.recall("b") is None
    assert store.recall("b")


def test_another_writes_between_a_commit_and_the_look_behind_it(make: Any, wire: Wire) -> None:
    """The look is of what the other wrote, so nothing is recalled by it."""
    store, other = make(), make()
    other.apply([])
    [claimed] = store.apply([Claim("a")])
    committed = []

    def fault(when: str, sql: str) -> None:
        if (when, sql) == ("after", "COMMIT"):
            committed.append(sql)
        elif committed and when == "before":
            wire.fault = lambda when, sql: None
            assert other.apply([Forget("a", claimed.token)]) == [Applied()]

    wire.fault = fault
    assert store.apply([Complete("a", claimed.token)]) == [Applied()]
    assert store.recall("a") is None
    assert isinstance(store.apply([Claim("a")])[0], Claimed)


def test_a_new_connection_knows_nothing(make: Any, wire: Wire) -> None:
    """Its numbers are its own; others wrote while the old one was lost."""
    store, other = make(), make()
    other.apply([])
    for _ in range(5):
        token = done(store, "a")
        failed: list[str] = []

        def fault(when: str, sql: str, token: int = token, failed: list[str] = failed) -> None:
            if (when, sql) == ("before", "BEGIN IMMEDIATE") and not failed:
                failed.append(sql)
                wire.fault = lambda when, sql: None
                other.apply([Forget("a", token)])
                raise sqlite3.OperationalError("disk I/O error")

        wire.fault = fault
        [again, _] = store.apply([Claim("a"), Claim("b")])
        assert failed
        assert isinstance(again, Claimed)
        assert store.apply([Complete("a", again.token)]) == [Applied()]
        assert other.apply([Forget("a", again.token)]) == [Applied()]


def test_what_is_over_is_not_known(make: Any, time: Time) -> None:
    """Done for a retention; free with its attempts as long."""
    store = make(retention=100.0, session_ttl=1000.0)
    done(store, "a")
    [claimed] = store.apply([Claim("b")])
    store.apply([Release("b", claimed.token, 7)])
    time.now += 100
    assert store.recall("a") is None
    first, second = store.apply([Claim("a"), Claim("b")])
    assert (type(first), second.attempt) == (Claimed, 1)


def test_memory_is_bounded(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two generations of keys, without large results; the rest is loaded as before."""
    monkeypatch.setattr(sqlite_known, "MOST", 10)
    store = make()
    for number in range(95):
        done(store, f"k/{number}", str(number).encode())
    done(store, "large", b"x" * 2000)
    known = [number for number in range(95) if store.recall(f"k/{number}")]
    assert 10 <= len(known) <= 20
    assert known[-1] == 94
    assert store.recall("large") is None
    results = [reply.result for reply in store.apply([Claim(f"k/{number}") for number in range(95)])]
    assert results == [str(number).encode() for number in range(95)]
    assert store.apply([Claim("large")])[0].result == b"x" * 2000


def test_what_was_asked_for_is_known_again(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key was forgotten by the memory, or done before this process began."""
    monkeypatch.setattr(sqlite_known, "MOST", 10)
    store = make()
    for number in range(95):
        done(store, f"k/{number}")
    assert store.recall("k/0") is None
    [again] = store.apply([Claim("k/0")])
    assert store.recall("k/0") == again
    late = make()
    late.apply([Claim("k/1")])  # it learns from where on it sees what others write
    [again] = late.apply([Claim("k/1")])
    assert late.recall("k/1") == again


def test_another_writes_while_the_file_is_asked(make: Any, wire: Wire) -> None:
    """What was done when it was read may not be any more: it is told, and not kept."""
    store, other = make(), make()
    token = done(other, "a")
    done(store, "b")
    read: list[str] = []

    def fault(when: str, sql: str) -> None:
        if when == "after" and sql.startswith("SELECT") and not read:
            read.append(sql)
            assert other.apply([Forget("a", token)]) == [Applied()]

    wire.fault = fault
    assert isinstance(store.apply([Claim("a")])[0], Done)
    assert read
    assert store.recall("a") is None
    assert isinstance(store.apply([Claim("a")])[0], Claimed)


@pytest.mark.parametrize("seed", range(4))
def test_random_histories_of_two_processes_and_handlers(make: Any, time: Time, seed: int) -> None:
    """Each answer is the one that the laws give over one table of entries, whoever knows what."""
    chance = random.Random(seed)
    stores = [make(retention=1000.0, session_ttl=1e6) for _ in range(2)]
    entries: dict[str, Entry] = {}
    token = 0

    def after(me: str, ops: list[Op]) -> list[Reply]:
        nonlocal token
        for key in [key for key, entry in entries.items() if entry.state in ("done", "free")]:
            if entries[key].at + 1000.0 <= time.now:
                del entries[key]
        ledger = Ledger(entries, lambda session: session != "", me, token, time.now)
        replies = [ledger.apply(op) for op in ops]
        token = ledger.token
        return replies

    for _ in range(600):
        store = chance.choice(stores)
        key = chance.choice("abcdef")
        entry = entries.get(key)
        now = (entry.token if entry else 0) - chance.choice([0, 0, 0, 1])
        kinds: list[Op] = [
            Claim(key),
            Complete(key, now, b"%d" % now),
            Release(key, now, 2),
            Forget(key, now),
        ]
        kinds += [Park(key, now, "why"), Abandon(key, now), Takeover(key, now), Get(key)]
        weights = [6, 6, 1, 2, 1, 1, 2, 1]
        ops = chance.choices(kinds, weights, k=chance.choice([1, 1, 2]))
        ops += [Claim(other) for other in chance.sample("abcdef", chance.choice([0, 0, 3]))]
        recalled = store.recall(key)
        assert recalled in (None, after("", [Get(key)])[0])
        if chance.random() < 0.1:
            found = store.transaction(lambda t, ops=ops: t.apply([Get(op.key) for op in ops]), 10.0)
            assert found == after("", [Get(op.key) for op in ops])
            continue
        replies = store.apply(ops)
        assert replies == after(store._session_here()._id, ops)
        time.now += chance.choice([0.0, 1.0, 1.0, 200.0])


def test_the_reason_of_a_parked_key_is_legible(make: Any) -> None:
    """An error's text may hold half a character, or NUL."""
    store = make()
    [claimed] = store.apply([Claim("a")])
    store.apply([Park("a", claimed.token, "because\0 \udc80 100 %")])
    [parked] = make().apply([Get("a")])
    assert parked.reason == "because\\x00 \\udc80 100 %"


# ------------------------------------------------------------------ retention


def test_space_is_bounded_by_rate_times_retention(make: Any, time: Time, tmp_path: Path) -> None:
    """Law 8 (N12): twenty retentions of the same rate leave no bigger file than three; nothing goes early."""
    store = make(retention=1000.0, session_ttl=100.0)
    sizes = []
    tokens: dict[str, float] = {}
    for second in range(0, 20_000, 50):
        keys = [f"k/{second}/{n}" for n in range(40)]
        claims = store.apply([Claim(key) for key in keys])
        store.apply([Complete(k, c.token, b"x" * 50) for k, c in zip(keys, claims, strict=True)])
        tokens.update(dict.fromkeys(keys, time.now))
        time.now += 50
        young = [key for key, at in tokens.items() if at + 1000 > time.now]
        assert all(isinstance(reply, Done) for reply in store.apply([Get(key) for key in young[:60]]))
        old = [key for key, at in tokens.items() if at + 1000 <= time.now]
        assert all(reply == Free() for reply in store.apply([Get(key) for key in old[-60:]]))
        if second % 1000 == 0:
            with closing(sqlite3.connect(tmp_path / "seen.db")) as db:
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            sizes.append((tmp_path / "seen.db").stat().st_size)
    assert max(sizes) <= max(sizes[:5]) * 1.2
    with closing(sqlite3.connect(tmp_path / "seen.db")) as db:
        rows = sum(db.execute(f"SELECT count(*) FROM idemp_done_{n}").fetchone()[0] for n in range(3))
    assert rows <= 1.5 * 20 * 40 + 40


def test_a_key_done_again_after_its_retention_is_done_anew(make: Any, time: Time) -> None:
    """The old record, still in an older slice, does not shine through."""
    store = make(retention=100.0, session_ttl=30.0)
    [first] = store.apply([Claim("a")])
    store.apply([Complete("a", first.token, b"old")])
    time.now += 101
    [second] = store.apply([Claim("a")])
    assert isinstance(second, Claimed)
    store.apply([Complete("a", second.token, b"new")])
    [done] = store.apply([Claim("a")])
    assert done.result == b"new"
    assert len(store.scan()) == 1


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), RuntimeError("no thread is left")])
def test_a_heartbeat_outlives_what_nobody_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Else every handler that takes longer than the session would be in doubt, from then on."""
    with closing(SqliteStore(str(tmp_path / "seen.db"), retention=60.0, session_ttl=0.9)) as store:
        store.apply([Claim("a")])
        session: Any = store._session
        real, beats = session.group.apply, itertools.count()
        failed, again = threading.Event(), threading.Event()

        def fail(ops: Sequence[Op]) -> Any:
            if next(beats) == 0:
                failed.set()
                raise error
            again.set()
            return real(ops)

        monkeypatch.setattr(session.group, "apply", fail)
        assert failed.wait(10)
        assert again.wait(10)


class Rate:
    """A key a second is done, and every second all is looked at: nothing that is young may be gone.

    rows: how many are in the file, second by second.
    """

    def __init__(self, store: SqliteStore, time: Time, path: Path) -> None:
        self.store, self.time, self.path = store, time, path
        self.done: dict[str, float] = {}
        self.rows: list[int] = []

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.time.now += 1
            key = f"k/{self.time.now}"
            [claimed] = self.store.apply([Claim(key)])
            assert isinstance(claimed, Claimed)
            assert self.store.apply([Complete(key, claimed.token)]) == [Applied()]
            self.done[key] = self.time.now
            with closing(sqlite3.connect(self.path)) as db:
                found = [db.execute(f"SELECT count(*) FROM idemp_done_{n}").fetchone()[0] for n in range(3)]
            self.rows.append(sum(found))
            self.look()

    def look(self) -> None:
        """All of the last hundred seconds, which is the retention."""
        young = [key for key, at in self.done.items() if at + 100 > self.time.now]
        found = dict(self.store.scan(limit=1000))  # in the file, not in memory
        assert all(isinstance(found.get(key), Done) for key in young)


@pytest.fixture
def rate(make: Any, time: Time, tmp_path: Path) -> Rate:
    return Rate(make(retention=100.0, session_ttl=30.0), time, tmp_path / "seen.db")


def test_a_clock_that_was_ahead_once(rate: Rate, time: Time) -> None:
    """It does not grow for a year, and what was done meanwhile and after goes neither early nor never."""
    time.ahead = 365 * 86_400.0
    rate.run(10)
    time.ahead = 0.0
    rate.run(520)
    assert max(rate.rows) <= 310
    assert max(rate.rows[-100:]) <= 151
    assert not [key for key, _ in rate.store.scan() if rate.done[key] + 100 <= time.now]


@pytest.mark.parametrize("seconds", [10, 230])
def test_a_clock_that_was_behind_once(rate: Rate, time: Time, seconds: int) -> None:
    """As that of a host without a battery, until it has asked for the time: what it did before stays."""
    rate.run(130)
    before = dict(rate.done)
    time.ahead = 1.0 - time.now
    rate.run(seconds)
    time.ahead = 0.0
    rate.done = before  # what was done meanwhile is long over by what was written down
    rate.look()
    rate.run(200)
    assert max(rate.rows) <= 310
    assert max(rate.rows[-50:]) <= 151


def test_how_long_a_slice_was_seen_is_of_one_host(make: Any, time: Time, rate: Rate) -> None:
    """A file may come from another, whose clock began elsewhere."""
    rate.run(110)
    time.ahead = -1000.0
    rate.run(1)
    rate.store._session._boot = "another"  # type: ignore[union-attr]
    time.now += 1_000_000
    time.ahead -= 1_000_000
    rate.run(99)
    assert rate.rows[-1] == 210


def test_the_retention_only_grows(make: Any) -> None:
    """A later opener with a longer one raises it, also for what is there."""
    make(retention=10.0).apply([])
    longer = make(retention=99.0)
    longer.apply([])
    shorter = make(retention=5.0)
    shorter.apply([])
    assert shorter.retention == 99.0


# ------------------------------------------------------------------ files that are none


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    """One sentence each, which names the file and the fix."""
    text = tmp_path / "notes.db"
    text.write_text("this is not a database, but a text of some length " * 50)
    with pytest.raises(ConfigError, match=r"notes\.db is no SQLite file .*; name another file"):
        open_store(f"sqlite:///{text}").apply([])
    with pytest.raises(ConfigError, match=r"the folder of .* does not exist; make it"):
        open_store(f"sqlite:///{tmp_path}/none/seen.db").apply([])
    with pytest.raises(ConfigError, match="cannot be written"):
        open_store(f"sqlite:///{tmp_path}").apply([])
    newer = tmp_path / "newer.db"
    with closing(sqlite3.connect(newer)) as db:
        db.execute("CREATE TABLE idemp_layout AS SELECT 9 AS version")
    with pytest.raises(ConfigError, match="layout 9 of a newer idemp"):
        open_store(f"sqlite:///{newer}").apply([])


def test_a_file_that_others_have_tables_in(tmp_path: Path) -> None:
    """Handlers write to the same file: its other tables and its version are theirs, whatever their names."""
    path, theirs = tmp_path / "app.db", ("meta", "session", "open", "outbox", "done_0")
    with closing(sqlite3.connect(path)) as db:
        for name in theirs:
            db.execute(f"CREATE TABLE {name} (theirs)")
        db.execute("PRAGMA user_version=1")
    with closing(cast(SqliteStore, open_store(f"sqlite:///{path}"))) as store:

        @idempotent(store, name="app", key="order", transaction=True)
        def handler(order: str) -> None:
            for name in theirs:
                context().connection.execute(f"INSERT INTO {name} VALUES (?)", [order])
            context().publish("billed", {}, exchange="out")

        handler("A")
        handler("A")
        assert len(store.letters(10)) == 1
    with closing(sqlite3.connect(path)) as db:
        assert [db.execute(f"SELECT * FROM {name}").fetchall() for name in theirs] == [[("A",)]] * len(theirs)
        assert db.execute("PRAGMA user_version").fetchone() == (1,)


def make_old(path: Path, *more: str) -> None:
    """Give a file the names that the tables had in the first layout."""
    with closing(sqlite3.connect(path)) as db:
        for name in ("meta", "session", "open", "done_0", "done_1", "done_2", *more):
            db.execute(f"ALTER TABLE idemp_{name} RENAME TO {name}")
        db.execute("DROP TABLE idemp_layout")
        db.execute("PRAGMA user_version=1")


def test_a_file_of_the_first_layout_is_renewed_once(tmp_path: Path) -> None:
    """By one of four that open it at once; what was known is known, and its letters wait."""
    path = tmp_path / "app.db"
    url = f"sqlite:///{path}"
    with closing(open_store(url)) as store:

        @idempotent(store, name="app", key="order", transaction=True)
        def handler(order: str) -> str:
            context().publish("billed", {}, exchange="out")
            return order

        handler("A")
        parked = store.apply([Claim("parked")])[0]
        assert isinstance(parked, Claimed)
        store.apply([Park("parked", parked.token, "why")])
    make_old(path, "outbox")
    stores = [cast(SqliteStore, open_store(url)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: each.apply([Get("app/A"), Get("parked")]), stores))
    assert {tuple(type(state) for state in states) for states in found} == {(Done, Parked)}
    assert [letter.key for letter in stores[0].letters(10)] == ["app/A"]
    for each in stores:
        each.close()
    with closing(sqlite3.connect(path)) as db:
        names = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert db.execute("PRAGMA user_version").fetchone() == (2,), "which the idemp of before refuses"
    assert all(name.startswith(("idemp_", "sqlite_")) for name in names)


def test_the_renewal_leaves_what_is_not_ours(tmp_path: Path) -> None:
    """The first layout made its outbox when it was needed: in a file without, one of that name is theirs."""
    path = tmp_path / "app.db"
    with closing(open_store(f"sqlite:///{path}")) as store:
        store.apply([Claim("key")])
    make_old(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE outbox (theirs)")
    with closing(open_store(f"sqlite:///{path}")) as store:
        assert not isinstance(store.apply([Get("key")])[0], Free)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT theirs FROM outbox").fetchall() == []


_RENEWS = """
import os, signal, sqlite3, sys
from idemp.stores.sqlite import SqliteStore

class Connection(sqlite3.Connection):
    left = 0

    def execute(self, statement, *values):
        if statement.startswith("BEGIN"):
            Connection.left = int(sys.argv[2])
        if Connection.left:
            Connection.left -= 1
            if not Connection.left:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(statement, *values)

SqliteStore(
    sys.argv[1], retention=60.0, session_ttl=10.0,
    connect=lambda *at, **how: sqlite3.connect(*at, **how, factory=Connection),
).apply([])
"""


def test_a_renewal_is_killed(tmp_path: Path) -> None:
    """Before each of its statements: the file is the old one, which the next that opens it renews."""
    path = tmp_path / "app.db"
    with closing(open_store(f"sqlite:///{path}")) as store:
        store.apply([Claim("key")])
    make_old(path)
    old = path.read_bytes()
    for statement in itertools.count(2):  # the first is its BEGIN
        for each in tmp_path.iterdir():
            each.unlink()
        path.write_bytes(old)
        done = finished("-c", _RENEWS, str(path), str(statement))
        with closing(sqlite3.connect(path)) as db:
            layout = layout_of(db)
        if layout == LAYOUT:  # the next BEGIN is that of a batch
            break
        assert (done.returncode, layout) == (-signal.SIGKILL, 1)
        with closing(open_store(f"sqlite:///{path}")) as store:
            assert not isinstance(store.apply([Get("key")])[0], Free)
    assert statement >= 11


def opened(path: str, connect: Callable[..., sqlite3.Connection] = sqlite3.connect) -> SqliteStore:
    return SqliteStore(path, retention=60.0, session_ttl=10.0, connect=connect)


def test_a_file_that_sqlite_gives_no_wal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A way of locking without shared memory: SQLite says nothing, and takes another journal."""
    path, connect = f"file:{tmp_path}/seen.db?vfs=unix-dotfile", partial(sqlite3.connect, uri=True)
    sentence = r"seen\.db.* has journal_mode=delete although WAL .*; name a plain"
    with pytest.raises(ConfigError, match=sentence):
        opened(path, connect).apply([])
    monkeypatch.setattr(sqlite3, "connect", connect)
    with pytest.raises(ConfigError, match=sentence):
        SqliteTransport(path).connect()


def stubborn(level: str) -> Callable[..., sqlite3.Connection]:
    """Connections that go over a setting of synchronous without a word, as some builds of SQLite do."""

    def allow(action: int, name: str | None, value: str | None, *_: Any) -> int:
        setting = action == sqlite3.SQLITE_PRAGMA and name == "synchronous" and value is not None
        return sqlite3.SQLITE_IGNORE if setting else sqlite3.SQLITE_OK

    class Connection(sqlite3.Connection):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.execute(f"PRAGMA synchronous={level}")
            self.set_authorizer(allow)

    return partial(sqlite3.connect, factory=Connection)


@pytest.mark.parametrize("level", ["OFF", "NORMAL"])
def test_an_sqlite_that_cannot_be_made_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    """What is read back counts, for the broker too."""
    sentence = r"seen\.db: SQLite has synchronous=[01] although FULL \(2\) was asked for, .*; use a build"
    with pytest.raises(ConfigError, match=sentence):
        opened(f"{tmp_path}/seen.db", stubborn(level)).apply([])
    monkeypatch.setattr(sqlite3, "connect", stubborn(level))
    with pytest.raises(ConfigError, match=sentence):
        open_transport(f"sqlite:///{tmp_path}/seen.db").connect()


@pytest.mark.parametrize("level", ["FULL", "EXTRA"])
def test_an_sqlite_that_is_durable_by_itself(tmp_path: Path, level: str) -> None:
    """That it cannot be set does no harm then."""
    with closing(opened(f"{tmp_path}/seen.db", stubborn(level))) as store:
        assert isinstance(store.apply([Claim("a")])[0], Claimed)


def test_what_a_mount_table_says() -> None:
    """The deepest place that is above the file; of several there the last; names as they were."""
    table = "\n".join(
        [
            "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw",
            "30 22 0:50 / /home rw - nfs4 server:/home rw,vers=4.2",
            "31 30 254:1 / /home/local rw master:2 propagate_from:1 - xfs /dev/vdb rw",
            r"32 22 0:51 / /my\040shares rw - fuse.sshfs me@host:/ rw",
            "33 22 254:2 / /twice rw - ext4 /dev/vdc rw",
            "34 33 0:52 / /twice rw - cifs //server/share rw",
            "a line of another time",
        ]
    )
    kinds = {
        "/seen.db": "ext4",
        "/home/me/seen.db": "nfs4",
        "/homes/seen.db": "ext4",
        "/home/local/seen.db": "xfs",
        "/my shares/seen.db": "fuse.sshfs",
        "/twice/seen.db": "cifs",
    }
    found = {path: mount_of(path, table) for path in kinds}
    assert {path: mount and mount.kind for path, mount in found.items()} == kinds
    assert mount_of("/seen.db", "") is None


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "9p", "fuse.sshfs"])
def test_a_network_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The mount table is a made-up one: the file itself must not come to be."""
    (tmp_path / "link").symlink_to(tmp_path)
    table = f"1 1 0:1 / / rw - ext4 /dev/vda rw\n2 1 0:2 / {tmp_path} rw - {kind} server:/ rw"
    read = Path.read_text

    def told(self: Path, *args: Any, **options: Any) -> str:
        return table if str(self) == "/proc/self/mountinfo" else read(self, *args, **options)

    monkeypatch.setattr(Path, "read_text", told)
    file = tmp_path / "link" / "seen.db"
    with pytest.raises(ConfigError, match=rf"seen\.db lies on a network file system \({kind} at .*; put it"):
        opened(str(file)).apply([])
    with pytest.raises(ConfigError, match="on a network file system"):
        SqliteTransport(str(file)).connect()
    assert not file.exists()


def test_a_file_in_memory_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a real one, which Linux has at this place: it works, and a power loss forgets it.

    Where such a place is for temporary files nobody expects it to last.
    """
    if not Path("/dev/shm").is_mount():
        missing("there is no /dev/shm on this machine")
    with TemporaryDirectory(dir="/dev/shm") as folder:
        for temporary, warnings in (("/elsewhere", 1), (folder, 0)):
            monkeypatch.setattr("tempfile.tempdir", temporary)
            caplog.clear()
            with closing(opened(f"{folder}/{warnings}.db")) as store:
                assert isinstance(store.apply([Claim("a")])[0], Claimed)
            assert len(caplog.messages) == warnings
            sentence = f"{warnings}.db lies in memory (tmpfs at /dev/shm): a power loss forgets"
            assert all(sentence in said for said in caplog.messages)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("seen.db", "is no URL"),
        ("sqlite://seen.db", "three slashes"),
        ("sqlite:///", "three slashes"),
        ("mongodb://user:secret@host/x", r"there is no store for 'mongodb://user:\*\*\*@host/x'"),
        ("sqlite:///seen.db?retention=forever", "retention='forever' is no duration"),
        ("sqlite:///seen.db?ttl=3", "no option 'ttl'; it has retention=24h, session=10s"),
    ],
)
def test_wrong_urls(url: str, sentence: str) -> None:
    """One sentence that names the setting, never a password."""
    with pytest.raises(ConfigError, match=sentence) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_a_full_disk_is_unavailable_and_loses_nothing(make: Any, wire: Wire) -> None:
    """What was there stays; what was asked did not happen."""
    store = make(session_ttl=100.0)
    [claimed] = store.apply([Claim("a")])

    def full(when: str, sql: str) -> None:
        if when == "before" and "INTO idemp_done" in sql:
            raise sqlite3.OperationalError("database or disk is full")

    wire.fault = full
    with pytest.raises(StoreUnavailable, match="disk is full"):
        store.apply([Complete("a", claimed.token, b"1")])
    wire.fault = lambda when, sql: None
    assert isinstance(store.apply([Claim("a")])[0], Busy)
    assert store.apply([Complete("a", claimed.token, b"1")]) == [Applied()]
    assert isinstance(store.apply([Complete("a", 99)])[0], Lost)


def test_a_disk_that_fills_up_in_the_middle_of_a_batch(tmp_path: Path) -> None:
    """Of its completions none or all took effect, though the statement has no journal of its own."""
    most = [1 << 30]

    def connect(*args: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = sqlite3.connect(*args, **options)
        connection.execute(f"PRAGMA max_page_count={most[0]}")
        return connection

    options = {"retention": 60.0, "session_ttl": 1e6, "clock": Time().clock, "connect": connect}
    with closing(SqliteStore(f"{tmp_path}/seen.db", **options)) as store:  # type: ignore[arg-type]
        keys = [f"{n}/{'x' * 500}" for n in range(200)]
        claims = store.apply([Claim(key) for key in keys])
        done = [Complete(key, claim.token, b"1") for key, claim in zip(keys, claims, strict=True)]  # type: ignore[union-attr]
        session: Any = store._mine()
        for room in (0, 7, 20):
            most[0] = int(session._writer.execute("PRAGMA page_count").fetchone()[0]) + room
            session._writer.execute(f"PRAGMA max_page_count={most[0]}")
            with pytest.raises(StoreUnavailable, match="disk is full"):
                store.apply(done)
            most[0] = 1 << 30
            session._reopen()
            assert {type(state) for state in store.apply([Get(key) for key in keys])} == {Busy}
        assert set(store.apply(done)) == {Applied()}


def test_a_session_that_begins_while_freshness_is_asked(tmp_path: Path) -> None:
    """Its confirmation is not taken for that of the session that made the claim."""
    with closing(opened(f"{tmp_path}/seen.db")) as store:
        [claimed] = store.apply([Claim("a")])
        assert isinstance(claimed, Claimed)
        session, steady = store._mine(), Clock().steady

        def renewed() -> float:
            session._born, session._confirmed = claimed.token, steady()  # type: ignore[attr-defined]
            return float(steady())

        session._clock = Clock(steady=renewed)  # type: ignore[attr-defined]
        assert not store.fresh(claimed.token)


@pytest.mark.parametrize("many", [0, 1, 2, 255, 256, 257, 1000])
def test_rows_go_in_portions_of_few_sizes(many: int) -> None:
    """All of them, in order: each size is a statement that stays prepared."""
    rows = [(n,) for n in range(many)]
    portions = list(_portions(rows))
    assert [row for portion in portions for row in portion] == rows
    assert {len(portion) for portion in portions} <= {1 << n for n in range(9)}
