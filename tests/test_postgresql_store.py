"""What only the PostgreSQL store has: tables and rights, a pooler, locks, slices of time, wrong settings."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest

from idemp import idempotent
from idemp.errors import ConfigError, SessionLost, StoreUnavailable
from idemp.ports import (
    Applied,
    Busy,
    Claim,
    Claimed,
    Complete,
    Done,
    Doubt,
    Forget,
    Free,
    Get,
    Inbox,
    Lost,
    Op,
    Park,
    Parked,
    Release,
    Reply,
    Takeover,
)
from idemp.stores import init_store, open_store, postgresql_line
from idemp.stores.postgresql_errors import explain
from idemp.stores.postgresql_sql import MIGRATIONS, VERSION
from tests.proxy import Proxy
from tests.servers import PostgreSQL, need
from tests.servers.pgbouncer import PgBouncer


def one(store: Any, op: Op) -> Reply:
    reply: Reply = store.apply([op])[0]
    return reply


def claim(store: Any, key: str) -> Claimed:
    reply = one(store, Claim(key))
    assert isinstance(reply, Claimed), reply
    return reply


def until(what: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def url(postgresql: PostgreSQL) -> str:
    """A new database, for its owner."""
    return postgresql.database()


@pytest.fixture
def store(url: str) -> Iterator[Any]:
    with closing(open_store(url)) as opened:
        opened.apply([])
        yield opened


def sql(url: str, *statements_: str) -> list[Any]:
    """What the last of them answers."""
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements_:
            answer = connection.execute(statement.encode())
        return answer.fetchall() if answer.description else []


def idemp(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "idemp", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


# ------------------------------------------------------------------ the short way


def test_a_key_that_is_done_while_it_is_claimed(store: Any, url: str) -> None:
    """Its claim waits for who completes it, finds no row of it any more, and then that it is done."""
    with closing(open_store(url)) as other, psycopg.connect(url) as line, ThreadPoolExecutor(1) as pool:
        theirs = claim(other, "key")
        claim(store, "mine")  # since then it knows of the other's birth, which would send it the long way
        store._session._detours = 0
        line.execute("DELETE FROM idemp_default.open WHERE key = 'key'")
        line.execute(
            "INSERT INTO idemp_default.done_0 VALUES ('key', %s, 1, extract(epoch FROM now()), '7')",
            [theirs.token],
        )
        mine = pool.submit(one, store, Claim("key"))
        until(lambda: sql(url, "SELECT 1 FROM pg_locks WHERE NOT granted"))
        line.commit()
        done = mine.result(30)
    assert isinstance(done, Done)
    assert (done.token, done.result) == (theirs.token, b"7")


def test_a_completion_does_not_wait_the_short_way(store: Any, url: str) -> None:
    """It would wait out of order.  A key that another transaction holds goes the long way, in order."""
    mine = claim(store, "key")
    with psycopg.connect(url) as line, ThreadPoolExecutor(1) as pool:
        line.execute("SELECT FROM idemp_default.open WHERE key = 'key' FOR UPDATE")
        reply = pool.submit(one, store, Complete("key", mine.token))
        until(lambda: store._session._detours)
        assert not reply.done()
        line.commit()
        assert reply.result(30) == Applied()


def test_what_cannot_go_the_short_way_leaves_no_trace(store: Any) -> None:
    """One wrong operation and the whole batch goes the long way, where each gets its own answer."""
    old = claim(store, "old")
    store.apply([Complete("old", old.token, b"1")])
    mine = claim(store, "mine")
    for wrong, kind in ((Complete("lost", 99), Lost), (Claim("old"), Done)):
        store._session._detours = 0
        key = f"with {kind.__name__}"
        replies = store.apply([Claim(key), wrong])
        assert [type(reply) for reply in replies] == [Claimed, kind]
        assert store._session._detours
        assert type(one(store, Get(key))) is Busy
    store._session._detours = 0
    assert one(store, Complete("mine", mine.token, b"2", b"print")) == Applied()
    assert not store._session._detours
    assert one(store, Complete("mine", mine.token, b"2", b"print")) == Applied()


def forget_done(store: Any, url: str, mine: Claimed) -> None:
    assert store.apply([Complete("b", mine.token), Forget("b", mine.token)]) == [Applied(), Applied()]


def forget_parked(store: Any, url: str, mine: Claimed) -> None:
    assert one(store, Park("b", mine.token, "why")) == Applied()
    parked = one(store, Get("b"))
    assert isinstance(parked, Parked)
    assert one(store, Forget("b", parked.token)) == Applied()


def give_back(store: Any, url: str, mine: Claimed) -> None:
    assert one(store, Release("b", mine.token, 0)) == Applied()


def be_swept(store: Any, url: str, mine: Claimed) -> None:
    assert one(store, Release("b", mine.token, 1)) == Applied()
    sql(url, "UPDATE idemp_default.open SET at = 0 WHERE key = 'b'")
    store._session._swept = -1e9
    store._session._beat_once()


@pytest.mark.parametrize("vanish", [forget_done, forget_parked, give_back, be_swept])
def test_a_claim_that_waited_has_the_highest_token(store: Any, url: str, vanish: Any) -> None:
    """It drew a number, then waited; one of its keys was meanwhile claimed by another, and is no more."""
    with closing(open_store(url)) as other, psycopg.connect(url) as line, ThreadPoolExecutor(1) as pool:
        other.apply([])
        assert one(store, Complete("now it knows that", claim(store, "now it knows that").token)) == Applied()
        store._session._detours = 0
        line.execute("INSERT INTO idemp_default.open (key, state) VALUES ('a', '')")
        claims = pool.submit(store.apply, [Claim("a"), Claim("b")])
        until(lambda: sql(url, "SELECT 1 FROM pg_locks WHERE NOT granted"))
        theirs = claim(other, "b")
        vanish(other, url, theirs)
        assert sql(url, "SELECT key FROM idemp_default.open") == []
        line.rollback()
        mine = claims.result(30)
    assert [type(each) for each in mine] == [Claimed, Claimed]
    assert mine[1].token > theirs.token


@pytest.mark.parametrize("attempts", [1, 3])
def test_attempts_are_kept_the_short_way(store: Any, attempts: int) -> None:
    """By claims of keys that are free and by what is recorded of them."""
    for attempt in range(1, attempts):
        store.apply([Release("key", claim(store, "key").token, attempt)])
    last = claim(store, "key")
    store._session._detours = 0
    store.apply([Complete("key", last.token, b"1")])
    done = one(store, Get("key"))
    assert (last.attempt, type(done), done.attempt) == (attempts, Done, attempts)  # type: ignore[union-attr]


# ------------------------------------------------------------------ tables and rights


def test_four_that_open_at_once_make_the_tables_once(url: str) -> None:
    """And all of them can claim."""
    stores = [open_store(url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda store: one(store, Claim("key")), stores))
    for store in stores:
        store.close()

    assert sorted(type(reply).__name__ for reply in replies) == ["Busy", "Busy", "Busy", "Claimed"]
    versions = sql(url, "SELECT version FROM idemp_default.migration ORDER BY version")
    assert versions == [(version,) for version in range(1, VERSION + 1)]


def test_a_user_who_may_not_make_tables(postgresql: PostgreSQL, url: str, unique: str) -> None:
    """One sentence with the command; after it, by somebody who may, the user can do all that a store does."""
    sql(url, f"CREATE ROLE {unique} LOGIN PASSWORD 'theirs'")
    theirs = postgresql.url_of(unique, "theirs", url.rpartition("/")[2])
    with closing(open_store(theirs)) as store, pytest.raises(ConfigError, match="idemp init URL --grant"):
        store.apply([])
    sql(url, "CREATE SCHEMA idemp_default")
    with closing(open_store(theirs)) as store, pytest.raises(ConfigError, match="idemp init URL --grant"):
        store.apply([])
    sql(url, "DROP SCHEMA idemp_default")

    told = idemp("init", url, "--grant", unique)

    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout == f"its tables are at version {VERSION} now; {unique} may use them.\n"
    with closing(open_store(theirs + "?retention=1s&session=1s")) as store:
        mine = claim(store, "key")
        assert one(store, Complete("key", mine.token)) == Applied()
        # The turn of a slice needs the right to truncate.
        until(lambda: sql(url, "SELECT slice > 0 FROM idemp_default.meta") == [(True,)])
    again = idemp("init", url)
    assert again.stdout == "its tables were there already.\n"


def test_tables_of_version_1_are_renewed(
    postgresql: PostgreSQL, url: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not behind anybody's back: one sentence names the command, and after it all that was known is known."""
    sql(url, f"CREATE ROLE {unique} LOGIN PASSWORD 'theirs'")
    theirs = postgresql.url_of(unique, "theirs", url.rpartition("/")[2])
    with monkeypatch.context() as older:
        older.setattr(postgresql_line, "STORE", postgresql_line.STORE._replace(migrations=MIGRATIONS[:1]))
        with closing(open_store(url)) as store:
            assert one(store, Complete("key", claim(store, "key").token, b"result")) == Applied()
    assert sql(url, "SELECT to_regclass('idemp_default.outbox')") == [(None,)]
    with closing(open_store(url)) as store, pytest.raises(ConfigError) as refused:
        store.apply([])
    assert str(refused.value).endswith("has tables of an older idemp; run: idemp init URL")

    told = idemp("init", url, "--grant", unique)

    assert (told.returncode, told.stderr) == (0, "")
    with closing(open_store(theirs)) as store:
        found = one(store, Get("key"))
        assert isinstance(found, Done)
        assert found.result == b"result"
        assert cast(Inbox, store).backlog().letters == 0


def test_init_refuses_in_one_sentence(postgresql: PostgreSQL, url: str, unique: str) -> None:
    """A user without the right, an unknown role, and a store that has no roles."""
    sql(url, f"CREATE ROLE {unique} LOGIN PASSWORD 'theirs'")
    theirs = postgresql.url_of(unique, "theirs", url.rpartition("/")[2])
    for words, says in (
        ((theirs,), "permission denied"),
        ((url, "--grant", "no_such_role"), "no_such_role"),
        (("memory://", "--grant", unique), "--grant is for PostgreSQL's tables"),
    ):
        told = idemp("init", *words)
        assert told.returncode == 2
        assert says in told.stderr
        assert "theirs" not in told.stderr
        assert told.stderr.count("\n") == 1
    assert sql(url, "SELECT to_regnamespace('idemp_default')") == [(None,)]  # nothing half done
    assert idemp("init", "memory://").stdout == "it is ready.\n"


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("INSERT INTO idemp_default.migration VALUES (99, now())", "newer idemp .version 99.; upgrade idemp"),
        ("DROP TABLE idemp_default.open", "run: idemp init URL"),
    ],
)
def test_tables_that_do_not_fit(url: str, statement: str, says: str) -> None:
    """One sentence."""
    with closing(open_store(url)) as store:
        store.apply([])
    sql(url, statement)
    with closing(open_store(url)) as store, pytest.raises(ConfigError, match=says):
        claim(store, "key")


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("INSERT INTO idemp_default.migration VALUES (99, now())", "newer idemp .version 99.; upgrade idemp"),
        ("DROP TABLE idemp_default.open", 'no "idemp_default".open, .*DROP SCHEMA'),
        ("DROP TABLE idemp_default.migration", "already exists.*DROP SCHEMA"),
        ("TRUNCATE idemp_default.meta, idemp_default.migration", "already exists.*DROP SCHEMA"),
    ],
)
def test_init_says_what_it_cannot_mend(url: str, unique: str, statement: str, says: str) -> None:
    """One sentence, and nothing done."""
    sql(url, f"CREATE ROLE {unique}")
    init_store(url)
    sql(url, statement)
    before = sql(url, "SELECT count(*) FROM pg_tables WHERE schemaname = 'idemp_default'")
    with pytest.raises(ConfigError, match=says) as told:
        init_store(url, unique)
    assert "\n" not in str(told.value)
    assert sql(url, "SELECT count(*) FROM pg_tables WHERE schemaname = 'idemp_default'") == before
    assert sql(url, f"SELECT has_schema_privilege('{unique}', 'idemp_default', 'USAGE')") == [(False,)]


@pytest.mark.parametrize("isolation", ["read committed", "serializable"])
def test_init_by_four_at_once(url: str, isolation: str) -> None:
    """One makes the tables, and the others find them, whatever the server's default is."""
    sql(url, f"ALTER DATABASE {url.rpartition('/')[2]} SET default_transaction_isolation = '{isolation}'")
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(init_store, [url] * 4))
    assert sorted(told) == [
        f"its tables are at version {VERSION} now",
        *["its tables were there already"] * 3,
    ]


def test_init_killed_in_the_middle(url: str) -> None:
    """Nothing of it is left, and the next one makes all."""
    mine = f"FROM pg_stat_activity WHERE application_name = 'idemp' AND datname = '{url.rpartition('/')[2]}'"
    with psycopg.connect(url) as holder:
        holder.execute("CREATE SCHEMA idemp_default")  # for which it waits, in its transaction
        killed = subprocess.Popen([sys.executable, "-m", "idemp", "init", url])
        try:
            until(lambda: sql(url, f"SELECT 1 {mine} AND wait_event_type = 'Lock'"))
        finally:
            killed.kill()
            killed.wait(30)
        holder.rollback()
    until(lambda: not sql(url, f"SELECT 1 {mine}"))
    assert sql(url, "SELECT to_regnamespace('idemp_default')") == [(None,)]
    assert init_store(url) == f"its tables are at version {VERSION} now"


def test_emptied_tables(url: str) -> None:
    """As by a test that empties all tables of its database: a sentence, also to who had begun before."""
    with closing(open_store(url)) as store, closing(open_store(url)) as new:
        assert one(store, Complete("key", claim(store, "key").token)) == Applied()
        sql(url, "TRUNCATE idemp_default.meta")
        for each in (store, new):
            with pytest.raises(ConfigError, match=r"meta is empty.*run: idemp init URL"):
                claim(each, "other")
        with pytest.raises(ConfigError, match=r"meta is empty.*DROP SCHEMA"):
            init_store(url)
        sql(url, "DROP SCHEMA idemp_default CASCADE")
        init_store(url)
        claim(store, "other")
        assert store.retention == 24 * 3600


READ_ONLY = (
    "default_transaction_read_only = on",
    "default_transaction_read_only to off, or name the primary",
)
TOO_SHORT = ("statement_timeout = '50ms'", "raise the statement_timeout of this user or database")


@pytest.mark.parametrize(("setting", "says"), [READ_ONLY, TOO_SHORT])
def test_a_setting_that_lets_nothing_through(
    postgresql: PostgreSQL, url: str, monkeypatch: pytest.MonkeyPatch, setting: str, says: str
) -> None:
    """For a while: unavailable, with the setting and the fix, in the inbox, too; then it goes on."""
    database, ran = url.rpartition("/")[2], list[str]()

    def now(what: str) -> None:
        postgresql.psql(f"ALTER DATABASE {database} {what}")
        postgresql.psql(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
        )

    with closing(open_store(url)) as store:

        @idempotent(store, name="inbox", key="key", transaction=True, attempts=1)
        def handler(key: str) -> None:
            ran.append(key)

        mine = claim(store, "mine")
        handler("first")
        now(f"SET {setting}")
        with monkeypatch.context() as short, psycopg.connect(url) as holder:
            if "timeout" in setting:
                holder.execute("SET statement_timeout = 0")
                holder.execute("LOCK TABLE idemp_default.open")
            short.setattr("idemp.stores.postgresql.PATIENCE", 0.3)
            for what in (
                lambda: store.apply([Complete("mine", mine.token), Claim("other")]),
                lambda: handler("second"),
            ):
                with pytest.raises(StoreUnavailable, match=says) as told:
                    what()
                assert "\n" not in str(told.value)
        if "read_only" in setting:
            with pytest.raises(ConfigError, match=says):
                init_store(f"{url}?namespace=new")
        now(f"RESET {setting.split()[0]}")

        assert store.apply([Get("other"), Complete("mine", mine.token)]) == [Free(0), Applied()]
        handler("second")
    assert ran == ["first", "second"]
    assert sql(url, "SELECT to_regnamespace('idemp_new')") == [(None,)]


def test_a_default_isolation_of_the_server_is_not_ours(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A heartbeat that meets a batch of its own session goes through."""
    sql(url, f"ALTER DATABASE {url.rpartition('/')[2]} SET default_transaction_isolation = 'serializable'")
    with closing(open_store(f"{url}?session=1s")) as store, psycopg.connect(url) as batch:
        claim(store, "key")
        batch.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        batch.execute("UPDATE idemp_default.session SET expires = expires + interval '1 day'")
        until(lambda: sql(url, "SELECT 1 FROM pg_locks WHERE NOT granted"))
        batch.commit()
        until(
            lambda: (
                sql(url, "SELECT expires < now() + interval '1 hour' FROM idemp_default.session") == [(True,)]
            )
        )
    assert "serialize" not in caplog.text


@pytest.mark.parametrize("setting", ["synchronous_commit", "fsync", "full_page_writes"])
def test_a_server_that_may_forget_is_refused(setting: str) -> None:
    """Unless it is said that it may."""
    need("postgresql")
    with PostgreSQL(options={setting: "off"}) as server:
        with closing(open_store(server.url)) as store, pytest.raises(ConfigError, match=f"{setting} = off"):
            claim(store, "key")
        with closing(open_store(f"{server.url}?unsafe_durability=true")) as store:
            claim(store, "key")


def test_a_replica_is_refused_and_a_promoted_one_is_taken(own_postgresql: PostgreSQL) -> None:
    """A read-only one in one sentence; several hosts: the one that can be written is found."""
    with closing(open_store(own_postgresql.url)) as store:
        mine = claim(store, "key")
    own_postgresql.stop()
    with PostgreSQL.copy(own_postgresql) as replica:
        own_postgresql.start()
        with closing(open_store(replica.url)) as store, pytest.raises(ConfigError, match="read-only replica"):
            store.apply([])
        several = replica.url.replace("@", f"@127.0.0.1:{own_postgresql.port},")
        with closing(open_store(several)) as store:
            assert isinstance(one(store, Get("key")), Doubt)
            own_postgresql.kill()
            replica.promote()

            assert one(store, Complete("key", mine.token)) == Applied()


def test_a_failover_is_waited_for(own_postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address leads to a replica that is not promoted yet: unavailable, and then it goes on."""
    with closing(open_store(own_postgresql.url)) as store:
        store.apply([])
    own_postgresql.stop()
    with PostgreSQL.copy(own_postgresql) as replica, Proxy(own_postgresql.port) as proxy:
        own_postgresql.start()
        url = own_postgresql.url.replace(f":{own_postgresql.port}/", f":{proxy.port}/")
        with closing(open_store(url)) as store:

            @idempotent(store, name="inbox", key="key", transaction=True)
            def handler(key: str) -> str:
                return key

            mine = claim(store, "key")
            until(lambda: replica.psql("SELECT count(*) FROM idemp_default.open") == "1")
            own_postgresql.kill()
            proxy.move(replica.port)
            proxy.cut()
            with monkeypatch.context() as short:
                short.setattr("idemp.stores.postgresql.PATIENCE", 0.3)
                for what in (lambda: store.apply([Get("key")]), lambda: handler("A"), store.scan):
                    with pytest.raises(StoreUnavailable, match="read-only replica; name the primary"):
                        what()
            replica.promote()
            assert one(store, Complete("key", mine.token)) == Applied()
            assert handler("A") == "A"


# ------------------------------------------------------------------ a server that has forgotten


def test_a_server_that_forgot_what_it_had_confirmed_is_noticed(
    url: str, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a failover to a replica that lags: no old claim is fresh, and no token comes twice."""
    old = claim(store, "old")
    lost = claim(store, "lost")
    sql(
        url,
        "DELETE FROM idemp_default.open WHERE key = 'lost'",
        "UPDATE idemp_default.session SET batch = batch - 1",
        "SELECT setval('idemp_default.token', 1)",
    )

    new = claim(store, "lost")

    assert "has forgotten what it had confirmed" in caplog.text
    assert new.token > lost.token
    assert store.fresh(new.token)
    assert not store.fresh(old.token)
    with closing(open_store(url)) as other:
        assert isinstance(one(other, Get("old")), Doubt)
    assert one(store, Complete("old", old.token)) == Applied()


# ------------------------------------------------------------------ locks


def test_a_taker_waits_for_the_batch_of_a_session_that_is_about_to_die(url: str) -> None:
    """The holder's batch, under way when its time is over, confirms it: then its claims are not in doubt."""
    with (
        closing(open_store(f"{url}?session=60s")) as store,
        closing(open_store(url)) as other,
        psycopg.connect(url) as holder,
    ):
        mine = claim(store, "key")
        session = one(other, Get("key")).session  # type: ignore[union-attr]
        life = (
            "UPDATE idemp_default.session SET expires = clock_timestamp() + interval '{} s' WHERE id = '{}'"
        )
        sql(url, life.format(1, session))
        # The holder's batch, which found its session alive; then its time is over.
        holder.execute(b"SELECT 1 FROM idemp_default.session WHERE id = %s FOR UPDATE", [session])
        until(lambda: isinstance(one(other, Get("key")), Doubt))
        with ThreadPoolExecutor(1) as pool:
            taking = pool.submit(one, other, Takeover("key", mine.token))
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            until(lambda: taking.done() or sql(url, waiting) == [(1,)])
            holder.execute(life.format(60, session).encode())
            holder.commit()
            assert isinstance(taking.result(30), Busy)


def test_a_key_that_another_holds_is_unavailable_in_time(
    url: str, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody's transaction, left open, holds a key: its claim fails in time, and the others go on."""
    mine = claim(store, "held")
    monkeypatch.setattr("idemp.stores.postgresql.PATIENCE", 0.5)
    with psycopg.connect(url) as holder:
        holder.execute(b"SELECT 1 FROM idemp_default.open WHERE key = 'held' FOR UPDATE")
        with pytest.raises(StoreUnavailable):
            one(store, Complete("held", mine.token))
        claim(store, "free")

    assert one(store, Complete("held", mine.token)) == Applied()


def test_a_statement_time_out_is_survived(url: str, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that an administrator set, too short for a while."""
    said: list[str] = []

    def explained(place: Any, error: psycopg.Error) -> Exception:
        said.append(str(error))
        return explain(place, error)

    monkeypatch.setattr("idemp.stores.postgresql.explain", explained)
    with psycopg.connect(url) as holder, ThreadPoolExecutor(1) as pool:
        mine = claim(store, "held")
        sql(url, f"ALTER DATABASE {url.rpartition('/')[2]} SET statement_timeout = '50ms'")
        store._session._writer.drop()
        holder.execute(b"SELECT 1 FROM idemp_default.open WHERE key = 'held' FOR UPDATE")
        completing = pool.submit(one, store, Complete("held", mine.token, b"1"))
        until(lambda: any("statement timeout" in each for each in said))
        holder.rollback()
        assert completing.result(30) == Applied()
    assert isinstance(one(store, Get("held")), Done)


def test_backends_are_terminated_under_load(url: str, store: Any) -> None:
    """Again and again, in whatever they are doing: every key is won once, and ends done."""
    stop = threading.Event()

    def work(number: int) -> list[str]:
        done: list[str] = []
        while not stop.is_set():
            keys = [f"{number}/{len(done) + n}" for n in range(10)]
            claims = store.apply([Claim(key) for key in keys])
            assert {type(reply) for reply in claims} == {Claimed}, claims
            ops = [Complete(k, c.token, k.encode()) for k, c in zip(keys, claims, strict=True)]
            assert set(store.apply(ops)) == {Applied()}
            done += keys
        return done

    with ThreadPoolExecutor(4) as pool:
        works = [pool.submit(work, number) for number in range(4)]
        terminate = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        try:
            for _ in range(25):
                time.sleep(0.04)
                sql(url, f"{terminate} WHERE application_name = 'idemp' AND datname = current_database()")
        finally:
            stop.set()
        done = [key for each in works for key in each.result(60)]

    assert len(done) > 100
    states = store.apply([Get(key) for key in done])
    assert [state.result.decode() for state in states] == done


def test_no_connection_is_left(
    postgresql: PostgreSQL, url: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unavailable in time; and it goes on once there is one."""
    sql(url, f"CREATE ROLE {unique} LOGIN PASSWORD 'theirs' CONNECTION LIMIT 0")
    assert idemp("init", url, "--grant", unique).returncode == 0
    theirs = postgresql.url_of(unique, "theirs", url.rpartition("/")[2])
    with closing(open_store(theirs)) as store:
        with monkeypatch.context() as short:
            short.setattr("idemp.stores.postgresql.PATIENCE", 0.3)
            with pytest.raises(StoreUnavailable, match="too many connections"):
                claim(store, "key")
        sql(url, f"ALTER ROLE {unique} CONNECTION LIMIT 10")
        claim(store, "key")


def work_on(store: Any, done: list[str], batches: int) -> None:
    """Batches of a hundred, each done with a long result."""
    for _ in range(batches):
        keys = [f"{len(done) + n}" for n in range(100)]
        tokens = [reply.token for reply in store.apply([Claim(key) for key in keys])]
        marks = [Complete(k, t, b"x" * 3000) for k, t in zip(keys, tokens, strict=True)]
        assert set(store.apply(marks)) == {Applied()}
        done += keys


def test_a_full_disk_is_unavailable_and_nothing_is_half_done(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence that says why; with room again, what was told as done is done, and the rest is not."""
    need("postgresql")
    folder = small_disk / "server"
    folder.mkdir()
    done: list[str] = []
    options = {"min_wal_size": "32MB", "max_wal_size": "48MB"}
    with PostgreSQL(options=options, folder=folder) as server, closing(open_store(server.url)) as store:
        work_on(store, done, 3)
        ballast = small_disk / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(b"0" * 65_536)
        monkeypatch.setattr("idemp.stores.postgresql.PATIENCE", 1.0)
        with pytest.raises(StoreUnavailable) as full:
            work_on(store, done, 1000)
        monkeypatch.undo()
        assert str(full.value).startswith(f"postgresql://127.0.0.1:{server.port}/idemp: ")
        assert "No space left on device" in str(full.value)
        assert str(full.value).endswith("; make room on its disk")
        assert "\n" not in str(full.value)
        ballast.unlink()
        server.kill()  # it may have ended by itself, for want of room for its log
        server.start()
        assert {type(state) for state in store.apply([Get(key) for key in done])} == {Done}
        left = store.apply([Get(f"{len(done) + n}") for n in range(100)])
        assert len({type(state) for state in left}) == 1, "a batch is there, or not"
        assert not isinstance(left[0], Done)
        claim(store, "last")


def test_a_server_that_ends_is_told_with_what_it_said_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk is an error first and the server's end a moment later; the end alone tells nobody why."""
    need("postgresql")
    caplog.set_level("DEBUG", "idemp.stores.postgresql")
    with PostgreSQL() as server, closing(open_store(server.url)) as store:
        claim(store, "key")
        for line in (
            "CREATE FUNCTION full_disk() RETURNS trigger AS $$ BEGIN"
            " RAISE 'no room is left' USING ERRCODE = 'disk_full'; END $$ LANGUAGE plpgsql",
            "CREATE TRIGGER full_disk BEFORE INSERT ON idemp_default.open EXECUTE FUNCTION full_disk()",
        ):
            sql(server.url, line)
        monkeypatch.setattr("idemp.stores.postgresql.PATIENCE", 2.0)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(claim, store, "another")
            until(lambda: "no room is left" in caplog.text)
            server.kill()
            with pytest.raises(StoreUnavailable, match=r"no room is left; .*; then it was gone") as ended:
                asked.result()
        monkeypatch.undo()
        assert "\n" not in str(ended.value)
        server.start()


@pytest.mark.parametrize("where", ["psycopg.Connection.connect", "socket.dup", "psycopg.Connection.execute"])
def test_without_a_descriptor_it_is_unavailable(
    url: str, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Psycopg raises the system's error as it is; with descriptors again it goes on."""
    with closing(open_store(url)) as store:
        with monkeypatch.context() as short:
            short.setattr("idemp.stores.postgresql.PATIENCE", 0.3)
            short.setattr(where, lambda *_, **__: os.open("/dev/null/no", 0))
            with pytest.raises(StoreUnavailable, match="Not a directory"):
                claim(store, "key")
        claim(store, "key")


# ------------------------------------------------------------------ a pooler


def test_a_pooler_without_a_free_connection(
    postgresql: PostgreSQL, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes who comes and lets them wait for minutes: unavailable in time, also for a new connection."""
    need("pgbouncer")
    with PgBouncer(postgresql.port) as pooler, closing(open_store(pooler.through(url))) as store:

        @idempotent(store, name="inbox", key="key", transaction=True)
        def handler(key: str) -> str:
            return key

        store.apply([])
        with ExitStack() as stack:
            for _ in range(3):
                line = stack.enter_context(psycopg.connect(pooler.through(url)))
                line.execute("SELECT 1")
            monkeypatch.setattr("idemp.stores.postgresql.PATIENCE", 1.0)
            for what in (lambda: claim(store, "key"), lambda: handler("A")):
                began = time.monotonic()
                with pytest.raises(StoreUnavailable):
                    what()
                assert time.monotonic() - began < 30
        monkeypatch.undo()
        claim(store, "key")
        assert handler("A") == "A"


def test_behind_a_pooler_in_transaction_mode(postgresql: PostgreSQL, url: str) -> None:
    """Nothing hangs on a connection: no prepared statement, no setting, no notification."""
    need("pgbouncer")
    with (
        PgBouncer(postgresql.port) as pooler,
        closing(open_store(pooler.through(url))) as store,
        closing(open_store(pooler.through(url))) as other,
    ):
        init_store(pooler.through(url))
        assert init_store(pooler.through(url)) == "its tables were there already"
        for n in range(30):
            with ThreadPoolExecutor(2) as pool:
                keys = [f"{n}/{m}" for m in range(5)]
                ops = [Claim(key) for key in keys]
                first, second = pool.map(lambda each, ops=ops: each.apply(ops), (store, other))
            for key, mine, theirs in zip(keys, first, second, strict=True):
                assert {type(mine), type(theirs)} == {Claimed, Busy}
                winner, token = (store, mine.token) if isinstance(mine, Claimed) else (other, theirs.token)
                assert one(winner, Complete(key, token)) == Applied()
        mine = claim(other, "awaited")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(store.wait, "awaited", mine.token, 50.0)
            time.sleep(0.2)  # until it sleeps; too soon would be seen at once, which is fine as well
            one(other, Complete("awaited", mine.token))
            waiting.result(10)
        assert store._session._writer.pooled  # type: ignore[attr-defined]


# ------------------------------------------------------------------ slices of time


def test_space_is_bounded_by_rate_times_retention(url: str) -> None:
    """Done keys go by truncation, a slice at a time, and nothing that is not over goes with them."""
    sizes: list[tuple[float, int]] = []
    tables = " + ".join(f"(SELECT count(*) FROM idemp_default.done_{n})" for n in range(3))
    with closing(open_store(f"{url}?retention=2s&session=600ms")) as store:
        end = time.monotonic() + 20
        n = 0
        done: list[tuple[str, float]] = []
        while time.monotonic() < end:
            keys = [f"{n}/{m}" for m in range(20)]
            claims = store.apply([Claim(key) for key in keys])
            done += [(key, time.time()) for key in keys]
            store.apply([Complete(k, c.token) for k, c in zip(keys, claims, strict=True)])  # type: ignore[union-attr]
            states = store.apply([Get(key) for key, _ in done[-400:]])
            now = time.time()
            gone = [
                key for (key, at), s in zip(done[-400:], states, strict=True) if at > now - 2 and s == Free(0)
            ]
            assert not gone
            n += 1
            sizes.append((time.time(), sql(url, f"SELECT {tables}")[0][0]))
            time.sleep(0.1)
        turns = sql(url, "SELECT slice FROM idemp_default.meta")[0][0]

    assert turns >= 4
    # Two slices that follow each other last for a retention and its margin, 4 s, and there are three.
    for looked, held in sizes:
        assert held <= sum(at > looked - 9 for _, at in done)
    assert sizes[-1][1] < 0.8 * len(done)


def test_a_slice_begins_beside_who_reads_on(url: str) -> None:
    """A dump, handlers that overlap, a forgotten psql: nobody waits, and what is over goes, nothing else."""
    waited: list[Any] = []
    late = "extract(epoch FROM now()) + 3600"
    with (
        closing(open_store(f"{url}?retention=2s&session=600ms")) as store,
        closing(open_store(f"{url}?retention=2s&session=600ms")) as other,
        psycopg.connect(url) as reader,
        ThreadPoolExecutor(1) as pool,
    ):
        other.apply([])
        store.apply([])
        reader.execute("SELECT FROM idemp_default.done_0, idemp_default.done_1, idemp_default.done_2")
        for n in range(3):
            sql(url, f"INSERT INTO idemp_default.done_{n} VALUES ('late/{n}', 1, 1, {late})")
        ended = threading.Event()
        watching = pool.submit(_watch_waiting, url, waited, ended)
        done: list[tuple[str, float]] = []
        first = slice_of(url)
        end = time.monotonic() + 40
        while slice_of(url) < first + 4 and time.monotonic() < end:
            keys = [f"{len(done)}/{m}" for m in range(20)]
            claims = store.apply([Claim(key) for key in keys])
            done += [(key, time.time()) for key in keys]
            store.apply([Complete(k, c.token) for k, c in zip(keys, claims, strict=True)])  # type: ignore[union-attr]
            states = store.apply([Get(key) for key, _ in done[-400:]])
            young = time.time() - 2
            assert all(
                at < young or isinstance(s, Done) for (_, at), s in zip(done[-400:], states, strict=True)
            )
            time.sleep(0.05)
        ended.set()
        watching.result()
        held = [sql(url, f"SELECT count(*) FROM idemp_default.done_{n}")[0][0] for n in range(3)]
        kept = [sql(url, f"SELECT key FROM idemp_default.done_{n} WHERE token = 1") for n in range(3)]
    assert slice_of(url) >= first + 4
    assert not waited
    assert kept == [[(b"late/0",)], [(b"late/1",)], [(b"late/2",)]]
    assert sum(held) - 3 < 0.9 * len(done)


def slice_of(url: str) -> int:
    return int(sql(url, "SELECT slice FROM idemp_default.meta")[0][0])


def _watch_waiting(url: str, waited: list[Any], ended: threading.Event) -> None:
    """For a table: who waits for a row or a page does not count."""
    with psycopg.connect(url, autocommit=True) as line:
        while not ended.wait(0.005):
            waited += line.execute("SELECT mode FROM pg_locks WHERE locktype = 'relation' AND NOT granted")


def test_what_is_claimed_anew_is_not_done_again_by_a_longer_retention(url: str, store: Any) -> None:
    """The old record is there until its slice is truncated: the claim that came after it counts."""
    with closing(open_store(f"{url}?retention=1s")) as short:
        sql(url, "UPDATE idemp_default.meta SET retention = 1")
        first = claim(short, "key")
        assert one(short, Complete("key", first.token)) == Applied()
        until(lambda: one(short, Get("key")) == Free(0))
        second = claim(short, "key")
        sql(url, "UPDATE idemp_default.meta SET retention = 3600")

        assert isinstance(one(short, Claim("key")), Busy)
        assert one(short, Complete("key", second.token, b"2")) == Applied()
        done = one(short, Get("key"))
        assert isinstance(done, Done)
        assert (done.token, done.result) == (second.token, b"2")


# ------------------------------------------------------------------ in a caller's transaction


def test_a_batch_commits_with_the_callers_own_statements(url: str, store: Any) -> None:
    """Both or neither; until then a claim waits; and who waits for the key is told."""
    mine = claim(store, "key")
    with psycopg.connect(url) as connection:
        connection.execute(b"CREATE TABLE effect (id text)")
        connection.commit()
        for end in (connection.rollback, connection.commit):
            connection.execute(b"INSERT INTO effect VALUES ('key')")
            replies = store.transact(connection, [Complete("key", mine.token, b"1"), Claim("new")])
            assert [type(reply) for reply in replies] == [Applied, Claimed]
            claim(store, f"beside/{end.__name__}")  # the session is not held by the caller
            with ThreadPoolExecutor(1) as pool:
                claiming = pool.submit(one, store, Claim("new"))
                until(lambda: sql(url, "SELECT count(*) FROM pg_locks WHERE NOT granted") == [(1,)])
                end()
                state = claiming.result(20)
            assert isinstance(state, Busy if end == connection.commit else Claimed)
            if isinstance(state, Claimed):
                assert one(store, Release("new", state.token, 0)) == Applied()
            expected = Done if end == connection.commit else Busy
            assert isinstance(one(store, Get("key")), expected)
        assert sql(url, "SELECT * FROM effect") == [("key",)]
        sql(url, "UPDATE idemp_default.session SET expires = now()")
        with pytest.raises(SessionLost):
            store.transact(connection, [Claim("other")])


def test_the_folder_of_a_server_goes_with_it(tmp_path: Path) -> None:
    """And none of its processes stays."""
    need("postgresql")
    with PostgreSQL() as server:
        folder = server.folder
        assert sql(server.url, "SELECT 1") == [(1,)]
    assert not folder.exists()
