"""The inbox: a handler's writes and the record of it in one transaction, on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from idemp import (
    ConfigError,
    Happened,
    IdempError,
    InDoubt,
    KeyBusy,
    KeyParked,
    PermanentFailure,
    context,
    idempotent,
    once,
    open_store,
)
from idemp.errors import StoreUnavailable
from idemp.ports import Abandon, Applied, Claim, Claimed, Done, Doubt, Free, Get, Parked, Release
from idemp.stores.postgresql_inbox import PostgresqlTransaction
from idemp.stores.sqlite_inbox import HandlersConnection
from tests.proxy import Proxy
from tests.servers import PostgreSQL

ROOT = Path(__file__).resolve().parent.parent


class Database:
    """A database with a store and a table of effects in it, looked at from beside."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.store: Any = open_store(url)
        self.sql("CREATE TABLE effect (id TEXT)")

    def sql(self, statement: str) -> list[Any]:
        if self.url.startswith("sqlite"):
            path = self.url.removeprefix("sqlite:///")
            with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as line:
                return line.execute(statement).fetchall()
        with psycopg.connect(self.url, autocommit=True) as line:
            found = line.execute(statement.encode())
            return found.fetchall() if found.description else []

    def effects(self) -> list[str]:
        return sorted(row[0] for row in self.sql("SELECT id FROM effect"))

    def state(self, key: str) -> Any:
        return self.store.apply([Get(key)])[0]


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """On each store that has transactions."""
    if request.param == "sqlite":
        made = Database(f"sqlite:///{tmp_path}/app.db")
    else:
        made = Database(request.getfixturevalue("postgresql").database())
    yield made
    made.store.close()


def write(key: str) -> None:
    """A handler's effect."""
    context().connection.execute(f"INSERT INTO effect VALUES ('{key}')")


def until(what: Callable[[], Any], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


# ------------------------------------------------------------------ both or neither


def test_effect_and_record_commit_together(database: Database) -> None:
    """Nobody sees either before; a repeated call gets the first answer."""
    seen = []

    @idempotent(database.store, name="app.order", key="order", transaction=True)
    def order(order: str) -> dict[str, str]:
        write(order)
        seen.append((database.effects(), context().attempt))
        return {"receipt": order}

    assert order("A") == {"receipt": "A"}
    assert order("A") == {"receipt": "A"}
    assert context().replayed
    assert seen == [([], 1)]
    assert database.effects() == ["A"]
    assert isinstance(database.state("app.order/A"), Done)


def test_what_raises_leaves_its_attempt_and_no_effect(database: Database) -> None:
    """Counted with the rest; then parked; an interruption counts as well, and is not in doubt."""
    errors: list[BaseException] = [ValueError("one"), KeyboardInterrupt(), ValueError("three")]

    @idempotent(database.store, name="app.order", key="order", transaction=True, attempts=3)
    def order(order: str) -> None:
        write(order)
        raise errors[context().attempt - 1]

    with pytest.raises(ValueError, match="one"):
        order("A")
    assert database.state("app.order/A") == Free(1)
    with pytest.raises(KeyboardInterrupt):
        order("A")
    assert database.state("app.order/A") == Free(2)
    with pytest.raises(ValueError, match="three"):
        order("A")
    assert isinstance(database.state("app.order/A"), Parked)
    with pytest.raises(KeyParked):
        order("A")
    assert database.effects() == []


def test_a_statement_that_failed_and_was_swallowed(database: Database) -> None:
    """On PostgreSQL that is a failed attempt; SQLite goes on, as the handler did."""

    @idempotent(database.store, name="app.order", key="order", transaction=True)
    def order(order: str) -> None:
        write(order)
        with suppress(psycopg.Error, sqlite3.Error):
            context().connection.execute("INSERT INTO nowhere VALUES (1)")

    if database.url.startswith("sqlite"):
        order("A")
        assert database.effects() == ["A"]
    else:
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            order("A")
        assert database.effects() == []
        assert database.state("app.order/A") == Free(1)


def test_a_doubt_of_before_is_taken_over(database: Database) -> None:
    """Left by a handler that had no transaction, or said itself that it is in doubt."""
    answers: list[Any] = [Happened("it was"), None]

    @idempotent(
        database.store, name="app.order", key="order", transaction=True, in_doubt=lambda order: answers.pop(0)
    )
    def order(order: str) -> str:
        write(order)
        raise InDoubt

    claimed = database.store.apply([Claim("app.order/A")])[0]
    assert isinstance(claimed, Claimed)
    assert database.store.apply([Abandon("app.order/A", claimed.token)]) == [Applied()]
    assert order("A") == "it was"
    done = database.state("app.order/A")
    assert isinstance(done, Done)
    assert done.token > claimed.token
    with pytest.raises(InDoubt):
        order("B")
    assert isinstance(database.state("app.order/B"), Doubt)
    assert database.effects() == []


def test_a_key_that_a_session_holds_is_waited_for(database: Database) -> None:
    """By a handler without a transaction, during an upgrade; the transaction does not stand in its way."""

    @idempotent(database.store, name="app.order", key="order", transaction=True, wait=20.0)
    def order(order: str) -> str:
        write(order)
        return "mine"

    claimed = database.store.apply([Claim("app.order/A")])[0]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(order, "A")
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        assert database.store.apply([Release("app.order/A", claimed.token, 0)]) == [Applied()]
        assert waiting.result(20) == "mine"


# ------------------------------------------------------------------ at the same time


def test_a_duplicate_at_the_same_time_waits_and_is_skipped(database: Database) -> None:
    """In another process, as far as the store can tell."""
    began, go = threading.Event(), threading.Event()
    calls = []

    def handler(store: Any) -> Callable[[str], int]:
        @idempotent(store, name="app.order", key="order", transaction=True)
        def order(order: str) -> int:
            calls.append(order)
            write(order)
            began.set()
            assert go.wait(20)
            return len(calls)

        return order

    with closing(open_store(database.url)) as other, ThreadPoolExecutor(2) as pool:
        first = pool.submit(handler(database.store), "A")
        assert began.wait(20)
        second = pool.submit(handler(other), "A")
        with pytest.raises(TimeoutError):
            second.result(0.5)
        go.set()
        assert (first.result(20), second.result(20)) == (1, 1)
    assert calls == database.effects() == ["A"]


def test_busy_at_once(postgresql: PostgreSQL) -> None:
    """Where locks are by key, ``on_busy="raise"`` does not wait for another transaction."""
    database = Database(postgresql.database())
    began, go = threading.Event(), threading.Event()

    @idempotent(database.store, name="app.order", key="order", transaction=True, on_busy="raise")
    def order(order: str) -> None:
        began.set()
        assert go.wait(20)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(order, "A")
        assert began.wait(20)
        with pytest.raises(KeyBusy):
            order("A")
        go.set()
        first.result(20)
    database.store.close()


def test_many_threads(database: Database) -> None:
    """Each of a hundred keys from eight threads takes effect once."""

    @idempotent(database.store, name="app.order", key="order", transaction=True)
    def order(order: str) -> str:
        write(order)
        return order

    keys = [f"{n:03}" for n in range(100)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            assert list(pool.map(order, keys * 4)) == keys * 4
    assert database.effects() == keys


def test_connections_are_not_used_up(own_postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many call at once: they take turns.  Who gets none in time is told, and later all goes on."""
    url, count = own_postgresql.url, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'idemp'"
    hold, held = threading.Event(), threading.Semaphore(0)
    with closing(open_store(url)) as store, ThreadPoolExecutor(60) as pool:

        @idempotent(store, name="slow", key="key", transaction=True)
        def slow(key: str) -> str:
            held.release()
            assert hold.wait(30)
            return key

        calls = [pool.submit(slow, f"{n}") for n in range(10)]
        for _ in calls:
            assert held.acquire(timeout=30)
        monkeypatch.setattr("idemp.stores.postgresql.PATIENCE", 0.5)
        with pytest.raises(StoreUnavailable, match="10 transactions of this process are open"):
            slow("late")
        monkeypatch.undo()
        calls += [pool.submit(slow, f"{n}") for n in range(10, 60)]
        assert int(own_postgresql.psql(count)) <= 14
        hold.set()
        assert [call.result(30) for call in calls] == [f"{n}" for n in range(60)]
        assert slow("late") == "late"
        assert int(own_postgresql.psql(count)) <= 14


def test_a_deadlock_is_tried_again(postgresql: PostgreSQL) -> None:
    """The server rolled one of the two back: that is no attempt."""
    database = Database(postgresql.database())
    database.sql("CREATE TABLE account (id INT PRIMARY KEY, cents INT)")
    database.sql("INSERT INTO account VALUES (1, 0), (2, 0)")
    meet = threading.Barrier(2)
    tries: list[tuple[str, int]] = []

    @idempotent(database.store, name="app.move", key="name", transaction=True)
    def move(name: str, first: int, second: int) -> None:
        tries.append((name, context().attempt))
        context().connection.execute(f"UPDATE account SET cents = cents + 1 WHERE id = {first}".encode())
        if len(tries) <= 2:
            meet.wait(20)
        try:
            context().connection.execute(f"UPDATE account SET cents = cents + 1 WHERE id = {second}".encode())
        except psycopg.Error as error:
            raise RuntimeError("as a library puts it") from error

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(move, "A", 1, 2), pool.submit(move, "B", 2, 1)]
        for each in both:
            each.result(30)
    assert len(tries) == 3
    assert {attempt for _, attempt in tries} == {1}
    assert database.sql("SELECT cents FROM account") == [(2,), (2,)]
    database.store.close()


# ------------------------------------------------------------------ the commit


def test_a_commit_that_is_refused_is_a_failed_attempt(database: Database) -> None:
    """By a constraint that is checked then."""
    database.sql("CREATE TABLE child (id INT PRIMARY KEY)")
    database.sql("CREATE TABLE part (child INT REFERENCES child (id) DEFERRABLE INITIALLY DEFERRED)")

    @idempotent(database.store, name="app.part", key="part", transaction=True)
    def order(part: int) -> None:
        context().connection.execute(f"INSERT INTO part VALUES ({part})")

    with pytest.raises((sqlite3.IntegrityError, psycopg.errors.ForeignKeyViolation)):
        order(1)
    assert database.state("app.part/1") == Free(1)
    database.sql("INSERT INTO child VALUES (1)")
    order(1)
    done = database.state("app.part/1")
    assert isinstance(done, Done)
    assert done.attempt == 2


def test_a_with_statement_would_commit(tmp_path: Path) -> None:
    """sqlite3 says so nowhere near; it is refused before anything of it happened."""
    database = Database(f"sqlite:///{tmp_path}/app.db")

    @idempotent(database.store, name="app.order", key="order", transaction=True)
    def order(order: str) -> None:
        with context().connection:
            write(order)

    with pytest.raises(PermanentFailure, match="leave it out"):
        order("A")
    assert isinstance(database.state("app.order/A"), Parked)
    assert database.effects() == []
    database.store.close()


@pytest.mark.parametrize("word", ["COMMIT", "ROLLBACK", "commit()", "rollback()"])
def test_a_handler_must_not_end_the_transaction(database: Database, word: str) -> None:
    """It is told so; what it committed by force is set aside, not run again and again."""

    @idempotent(database.store, name="app.order", key="order", transaction=True)
    def order(order: str) -> None:
        write(order)
        connection = context().connection
        getattr(connection, word[:-2])() if word.endswith("()") else connection.execute(word)

    with pytest.raises((PermanentFailure, psycopg.ProgrammingError)):
        order("A")
    state = database.state("app.order/A")
    assert isinstance(state, Parked) if not word.endswith("()") else isinstance(state, Parked | Free)
    assert database.effects() == (["A"] if word == "COMMIT" else [])


def test_the_backend_dies_in_the_commit(postgresql: PostgreSQL) -> None:
    """Nothing of it is there, and it runs again: seen once by whoever called."""
    database = Database(postgresql.database())
    database.sql("CREATE SEQUENCE commits")
    database.sql(
        "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF nextval('commits') < 3"
        " THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF; RETURN NULL; END $$"
    )
    database.sql(
        "CREATE CONSTRAINT TRIGGER die AFTER INSERT ON effect DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION die()"
    )
    ran: list[int] = []
    with closing(database.store):

        @idempotent(database.store, name="app.order", key="order", transaction=True)
        def order(order: str) -> int:
            write(order)
            ran.append(context().attempt)
            return len(ran)

        assert order("A") == 3
        assert order("A") == 3
    assert ran == [1, 1, 1]
    assert database.effects() == ["A"]


def test_a_handler_finds_its_own_settings(postgresql: PostgreSQL) -> None:
    """How the store looks keys up, and how long it waits, is not for the handler's statements."""
    database = Database(postgresql.database())
    found: list[str] = []

    @idempotent(database.store, name="app.order", key="order", transaction=True)
    def order(order: str) -> None:
        names = ("enable_seqscan", "enable_hashjoin", "lock_timeout", "transaction_isolation")
        line = context().connection
        found.extend(line.execute(f"SHOW {name}".encode()).fetchone()[0] for name in names)

    order("A")
    assert found == ["on", "on", "0", "read committed"]
    database.store.close()


@pytest.mark.parametrize("took_effect", [False, True])
def test_an_unknown_commit_of_sqlite_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, took_effect: bool
) -> None:
    """It failed, before or after it had taken effect."""
    database = Database(f"sqlite:///{tmp_path}/app.db")
    calls = []
    left = [1]
    real = HandlersConnection.execute

    def execute(line: Any, sql: str, *values: Any) -> Any:
        strike = sql == "COMMIT" and left and left.pop()
        if strike and not took_effect:
            raise sqlite3.OperationalError("disk I/O error")
        found = real(line, sql, *values)
        if strike:
            raise sqlite3.OperationalError("disk I/O error")
        return found

    monkeypatch.setattr(HandlersConnection, "execute", execute, raising=False)

    @idempotent(database.store, name="app.order", key="order", transaction=True, codec=None)
    def order(order: str) -> str:
        calls.append(order)
        write(order)
        context().publish("written", {})
        return "kept nowhere"

    assert order("A") == "kept nowhere"
    assert not left
    assert len(calls) == (1 if took_effect else 2)
    assert database.effects() == ["A"]
    assert database.store.backlog().letters == 1  # what the first of two published is not in it
    database.store.close()


@pytest.mark.parametrize("step", ["open", "keep", "save", "commit"])
def test_a_lost_reply_of_postgresql_is_looked_up(
    postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Whatever it was a reply to: the effect is there once, and the caller gets its value."""
    straight = postgresql.database()
    database = Database(straight)
    calls = []
    with Proxy(postgresql.port) as proxy:
        far = open_store(straight.replace(f":{postgresql.port}", f":{proxy.port}"))
        far.apply([])
        left = [1]

        def lose() -> None:
            if left:
                left.pop()
                proxy.lose()

        real_keep, real_save = PostgresqlTransaction.keep, PostgresqlTransaction.save

        def keep(transaction: Any) -> None:
            if step == "keep":
                lose()
            real_keep(transaction)

        def save(transaction: Any) -> None:
            if step == "save":
                lose()
            real_save(transaction)
            if step == "commit":
                lose()

        monkeypatch.setattr(PostgresqlTransaction, "keep", keep)
        monkeypatch.setattr(PostgresqlTransaction, "save", save)

        @idempotent(far, name="app.order", key="order", transaction=True, codec=None)
        def order(order: str) -> str:
            calls.append(order)
            write(order)
            return "kept nowhere"

        order("first")
        calls.clear()
        left[:] = [1]
        if step == "open":
            lose()
        assert order("A") == "kept nowhere"
        assert proxy.counts.lost >= 1
        far.close()
    assert len(calls) == (1 if step in ("open", "commit") else 2)
    assert database.effects() == ["A", "first"]
    database.store.close()


# ------------------------------------------------------------------ kill -9

_VICTIM = """
import os, signal, sys
from idemp import context, idempotent, open_store
url, where = sys.argv[1:]

def die(at):
    if at == where:
        os.kill(os.getpid(), signal.SIGKILL)

if url.startswith("sqlite"):
    from idemp.stores.sqlite_inbox import HandlersConnection as Line
    real = Line.execute
    def execute(line, sql, *values):
        if sql == "COMMIT":
            die("before the commit")
        return real(line, sql, *values)
    Line.execute = execute
else:
    from idemp.stores.postgresql_inbox import PostgresqlTransaction
    real = PostgresqlTransaction.save
    def save(transaction):
        real(transaction)
        die("before the commit")
    PostgresqlTransaction.save = save

@idempotent(open_store(url), name="app.order", key="order", transaction=True)
def order(order):
    die("before the effect")
    context().connection.execute(f"INSERT INTO effect VALUES ('{order}')")
    die("after the effect")

order("A")
die("after the commit")
"""


@pytest.mark.parametrize(
    "where", ["before the effect", "after the effect", "before the commit", "after the commit"]
)
def test_killed(database: Database, where: str) -> None:
    """Both or neither, at once: nothing is in doubt, and nobody waits for a session to die."""
    command = [sys.executable, "-c", _VICTIM, database.url, where]
    victim = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert victim.returncode == -signal.SIGKILL
    committed = where == "after the commit"
    assert isinstance(database.state("app.order/A"), Done if committed else Free)
    assert database.effects() == (["A"] if committed else [])

    @idempotent(database.store, name="app.order", key="order", transaction=True)
    def order(order: str) -> None:
        write(order)

    order("A")
    assert context().replayed == committed
    assert database.effects() == ["A"]


# ------------------------------------------------------------------ async def


def test_async_effect_and_record_commit_together(database: Database) -> None:
    """On the caller's loop, many at once; duplicates wait for the first and get its answer."""
    ran: list[str] = []

    @idempotent(database.store, name="app.order", key="order", transaction=True)
    async def order(order: str) -> str:
        assert threading.get_ident() == here
        await asyncio.sleep(0)
        write(order)
        await asyncio.sleep(0)
        ran.append(order)
        return f"{order} of {asyncio.current_task() is not None}"

    async def many() -> list[str]:
        return await asyncio.gather(*(order(f"{n % 10}") for n in range(30)))

    here = threading.get_ident()
    assert asyncio.run(many()) == [f"{n % 10} of True" for n in range(30)]
    assert sorted(ran) == database.effects() == [f"{n}" for n in range(10)]


def test_async_what_raises_leaves_its_attempt_and_no_effect(database: Database) -> None:
    """And `context()` afterwards tells of the latest call that was made here."""

    @idempotent(database.store, name="app.order", key="order", transaction=True)
    async def order(order: str) -> int:
        write(order)
        await asyncio.sleep(0)
        if context().attempt == 1:
            raise ValueError("not yet")
        return 7

    async def twice() -> None:
        with pytest.raises(ValueError, match="not yet"):
            await order("A")
        assert database.effects() == []
        assert database.state("app.order/A") == Free(1)
        assert await order("A") == 7
        assert await order("A") == 7
        assert context().replayed

    asyncio.run(twice())
    assert database.effects() == ["A"]


def test_async_cancelled_in_the_handler_nothing_is_left(database: Database) -> None:
    """The transaction has ended when the caller is told: its keys and rows are nobody's."""
    began = asyncio.Event()
    patience = [3600.0]

    @idempotent(database.store, name="app.order", key="order", transaction=True)
    async def order(order: str) -> None:
        write(order)
        began.set()
        await asyncio.sleep(patience[0])

    async def cancel() -> None:
        task = asyncio.create_task(order("A"))
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert database.effects() == []
        assert database.state("app.order/A") == Free(1)
        patience[0] = 0.0
        await order("A")

    asyncio.run(cancel())
    assert database.effects() == ["A"]


# ------------------------------------------------------------------ what cannot be


def test_a_store_without_transactions_refuses() -> None:
    """In one sentence."""
    with (
        closing(open_store("memory://")) as store,
        pytest.raises(ConfigError, match="must share a database"),
    ):
        idempotent(store, name="app.order", key="order", transaction=True)(lambda order: None)


def test_a_block_is_refused(database: Database) -> None:
    """It cannot be run again."""
    with (
        pytest.raises(ConfigError, match="a block cannot be run again"),
        once(database.store, "app.order", "A", transaction=True),
    ):
        raise AssertionError


def test_one_in_another_is_refused(database: Database) -> None:
    """It would wait for the file that its caller holds, or commit without its caller."""

    @idempotent(database.store, name="app.inner", key="order", transaction=True)
    def inner(order: str) -> None:
        raise AssertionError

    @idempotent(database.store, name="app.outer", key="order", transaction=True)
    def outer(order: str) -> None:
        inner(order)

    with pytest.raises(IdempError, match="cannot be called in that of"):
        outer("A")
    assert database.state("app.outer/A") == Free(1)
    assert database.state("app.inner/A") == Free(0)
