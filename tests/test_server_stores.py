"""What the stores on a server have in common: lost replies, restarts, a server that hangs, bad input."""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from redis.exceptions import ConnectionError as RedisConnectionError

from idemp import idempotent
from idemp.errors import BadMessage, ConfigError, StoreUnavailable
from idemp.ports import (
    Abandon,
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
    Lost,
    Op,
    Park,
    Parked,
    Release,
    Reply,
    Store,
    Takeover,
)
from idemp.stores import open_store, postgresql_of, redis_of
from tests.proxy import Proxy
from tests.servers import free_port


@dataclass
class Far:
    """A server behind a proxy.  ``url``: through it.  ``straight``: past it."""

    kind: str
    server: Any
    proxy: Proxy
    url: str
    straight: str

    def open(self, query: str = "", url: str = "") -> Any:
        return open_store((url or self.url) + query)


@pytest.fixture(params=["postgresql", "redis"])
def far(request: pytest.FixtureRequest) -> Iterator[Far]:
    """A fresh database of the shared server."""
    server = request.getfixturevalue(request.param)
    url = server.database()
    with Proxy(server.port) as proxy:
        yield Far(request.param, server, proxy, url.replace(f":{server.port}", f":{proxy.port}"), url)


@pytest.fixture(params=["postgresql", "redis"])
def own(request: pytest.FixtureRequest) -> Any:
    """A server to stop and kill."""
    return request.getfixturevalue(f"own_{request.param}")


@pytest.fixture
def store(far: Far) -> Iterator[Any]:
    """Through the proxy, used once."""
    with closing(far.open()) as opened:
        opened.apply([])
        yield opened


def one(store: Store, op: Op) -> Reply:
    return store.apply([op])[0]


def claim(store: Store, key: str) -> Claimed:
    reply = one(store, Claim(key))
    assert isinstance(reply, Claimed), reply
    return reply


def lose_the_last_reply(far: Far, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next change takes effect, and its reply is lost: for PostgreSQL, that of the COMMIT."""
    session = store._session
    name = "_write" if far.kind == "postgresql" else "_call"
    real = getattr(session, name)

    def struck(*args: Any) -> Any:
        monkeypatch.setattr(session, name, real)
        far.proxy.lose()
        return real(*args)

    monkeypatch.setattr(session, name, struck)


def fail_the_next_change(far: Far, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no effect: the connection is lost before, with PostgreSQL before the COMMIT."""
    session = store._session
    name = "_write" if far.kind == "postgresql" else "_call"
    error = psycopg.OperationalError if far.kind == "postgresql" else RedisConnectionError
    real = getattr(session, name)

    def struck(*args: Any) -> Any:
        if args[0] in ("void", "beat"):
            return real(*args)
        monkeypatch.setattr(session, name, real)
        raise error("lost")

    monkeypatch.setattr(session, name, struck)


# ------------------------------------------------------------------ a reply is lost


@pytest.mark.parametrize("when", ["request", "commit"])
def test_a_lost_reply_is_resolved(far: Far, store: Any, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Law 10: every kind of operation, struck where nothing was done yet, and where all was."""
    tokens = {key: claim(store, key).token for key in ("done", "free", "parked", "left", "taken", "gone")}
    store.apply([Abandon("taken", tokens["taken"]), Complete("gone", tokens["gone"], b"1")])
    ops: list[Op] = [
        Claim("new"),
        Complete("done", tokens["done"], b"result", b"print"),
        Release("free", tokens["free"], 2),
        Park("parked", tokens["parked"], "because\0 \udc80"),
        Abandon("left", tokens["left"]),
        Takeover("taken", tokens["taken"]),
        Forget("gone", tokens["gone"]),
        Claim("new"),
        Complete("done", tokens["done"] + 1),
    ]
    if when == "request":
        far.proxy.lose()
    else:
        lose_the_last_reply(far, store, monkeypatch)

    replies = store.apply(ops)

    assert far.proxy.counts.lost == 1
    kinds = [Claimed, Applied, Applied, Applied, Applied, Claimed, Applied, Busy, Lost]
    assert [type(reply) for reply in replies] == kinds
    assert replies[5].attempt == 2
    keys = ("new", "done", "free", "parked", "left", "taken", "gone")
    states = store.apply([Get(key) for key in keys])
    assert [type(state) for state in states] == [Busy, Done, Free, Parked, Doubt, Busy, Free]
    assert (states[1].result, states[1].fingerprint, states[2]) == (b"result", b"print", Free(2))
    assert states[0].token == replies[0].token
    assert one(store, Complete("new", replies[0].token)) == Applied()
    with closing(far.open(url=far.straight)) as other:
        assert isinstance(one(other, Claim("new")), Done)


@pytest.mark.parametrize("when", ["request", "commit"])
def test_a_lost_reply_to_a_usual_batch(
    far: Far, store: Any, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The same for what most batches are, which has a way of its own."""
    mine = claim(store, "done").token
    if when == "request":
        far.proxy.lose()
    else:
        lose_the_last_reply(far, store, monkeypatch)

    won, ended = store.apply([Claim("new"), Complete("done", mine, b"1")])

    assert far.proxy.counts.lost == 1
    assert (type(won), ended) == (Claimed, Applied())
    assert one(store, Complete("new", won.token)) == Applied()
    with closing(far.open(url=far.straight)) as other:
        states = other.apply([Get("new"), Get("done")])
    assert [type(state) for state in states] == [Done, Done]
    assert states[1].result == b"1"


def test_a_claim_that_nobody_heard_of_is_given_back(
    far: Far, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller was told `StoreUnavailable`: its claim is free again, its takeover in doubt."""
    old = claim(store, "doubt").token
    store.apply([Abandon("doubt", old)])
    module = f"idemp.stores.{far.kind}"
    with monkeypatch.context() as short:
        short.setattr(f"{module}.PATIENCE", 0.0)
        lose_the_last_reply(far, store, monkeypatch)
        with pytest.raises(StoreUnavailable):
            store.apply([Claim("key"), Takeover("doubt", old)])
    with closing(far.open(url=far.straight)) as other:
        assert isinstance(one(other, Get("key")), Busy)

    claim(store, "another")

    assert one(store, Get("key")) == Free(0)
    state = one(store, Get("doubt"))
    assert isinstance(state, Doubt)
    assert (state.attempt, state.token > old) == (1, True)


@pytest.mark.parametrize("times", [1, 2])
def test_giving_back_may_fail_too(far: Far, store: Any, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Law 10: a second fault, in the batch that gives claims back, which may be unavailable, too."""
    module = f"idemp.stores.{far.kind}"
    old = claim(store, "doubt").token
    store.apply([Abandon("doubt", old)])
    with monkeypatch.context() as short:
        short.setattr(f"{module}.PATIENCE", 0.0)
        lose_the_last_reply(far, store, monkeypatch)
        with pytest.raises(StoreUnavailable):
            store.apply([Claim("key"), Takeover("doubt", old)])
        for each in range(1, times):
            fail_the_next_change(far, store, monkeypatch)
            with pytest.raises(StoreUnavailable):
                claim(store, f"unheard/{each}")
    fail_the_next_change(far, store, monkeypatch)

    another = claim(store, "another")

    assert [type(state) for state in store.apply([Get("key"), Get("doubt")])] == [Free, Doubt]
    assert one(store, Complete("another", another.token)) == Applied()
    assert claim(store, "key").attempt == claim(store, "unheard/1").attempt == 1


def test_a_completion_that_was_not_heard_of_stands(
    far: Far, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated by the caller it is applied, which it was."""
    mine = claim(store, "key").token
    with monkeypatch.context() as short:
        short.setattr(f"idemp.stores.{far.kind}.PATIENCE", 0.0)
        lose_the_last_reply(far, store, monkeypatch)
        with pytest.raises(StoreUnavailable):
            store.apply([Complete("key", mine, b"1")])

    assert one(store, Complete("key", mine, b"2")) == Applied()
    state = one(store, Get("key"))
    assert isinstance(state, Done)
    assert state.result == b"1"


# ------------------------------------------------------------------ it is gone, or stands still


def test_it_restarts_under_load(own: Any) -> None:
    """Killed once and stopped once, with eight threads at work: every key is won once and ends done."""
    with closing(open_store(own.url)) as store, ThreadPoolExecutor(8) as pool:
        stop = threading.Event()

        def work(number: int) -> list[str]:
            mine: list[str] = []
            n = 0
            while not stop.is_set():
                key, n = f"{number}/{n}", n + 1
                try:
                    won = claim(store, key)
                    assert one(store, Complete(key, won.token, key.encode())) == Applied()
                except StoreUnavailable:
                    continue
                mine.append(key)
            return mine

        works = [pool.submit(work, number) for number in range(8)]
        try:
            for end in (own.kill, own.stop):
                wait_for_more(store)
                end()
                own.start()
            wait_for_more(store)
        finally:
            stop.set()
        done = [key for each in works for key in each.result(60)]
        states = store.apply([Get(key) for key in done])

    assert len(done) > 60
    assert all(isinstance(state, Done) for state in states)
    assert [state.result.decode() for state in states] == done  # type: ignore[union-attr]


def wait_for_more(store: Store) -> None:
    before = len(store.scan(limit=100_000))
    wait_for(lambda: len(store.scan(limit=100_000)) > before + 20)


def wait_for(what: Any, seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_a_server_that_stands_still_is_unavailable(
    far: Far, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It neither answers nor hangs up: the caller is told in time, and later all goes on."""
    mine = claim(store, "key").token
    monkeypatch.setattr(f"idemp.stores.{far.kind}.PATIENCE", 1.0)
    if far.kind == "redis":
        monkeypatch.setattr("idemp.stores.redis.TIMEOUT", 1.0)
    far.proxy.hold(questions=True, answers=True)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        one(store, Claim("other"))
    assert time.monotonic() - began < 20
    far.proxy.release()
    monkeypatch.setattr(f"idemp.stores.{far.kind}.PATIENCE", 10.0)

    assert one(store, Complete("key", mine)) == Applied()
    assert isinstance(one(store, Get("other")), Free | Busy)


def test_a_session_that_was_cut_off_is_not_fresh(far: Far) -> None:
    """What it had claimed is in doubt to the others, not started by it in the next session, but completed."""
    with closing(far.open("?session=1s")) as store, closing(far.open(url=far.straight)) as other:
        first = claim(store, "first")
        assert store.fresh(first.token)
        far.proxy.hold(questions=True, answers=True)
        wait_for(lambda: isinstance(one(other, Get("first")), Doubt))
        assert not store.fresh(first.token)
        far.proxy.cut()
        far.proxy.release()
        second = claim(store, "second")

        assert store.fresh(second.token)
        assert not store.fresh(first.token)
        assert one(store, Complete("first", first.token)) == Applied()


# ------------------------------------------------------------------ waiting


@pytest.mark.parametrize("told", [True, False])
def test_a_waiter_in_another_process_is_woken(
    far: Far, store: Any, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """At once by a notification; and by a look now and then where none comes."""
    if told:
        monkeypatch.setattr("idemp.stores.listening._POLL", (60.0, 60.0, 60.0))
    else:
        monkeypatch.setattr(store._session, "_listen", lambda: None)
    with closing(far.open(url=far.straight)) as other:
        mine = claim(other, "key").token
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(store.wait, "key", mine, 50.0)
            if told:
                wait_for(lambda: store._session._listens)
            time.sleep(0.3)  # until it sleeps; too soon would be seen at once, which is fine as well
            began = time.monotonic()
            assert one(other, Complete("key", mine)) == Applied()
            waiting.result(20)
            assert time.monotonic() - began < 5


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("key", "says"), [("lone \ud800 surrogate", "is not valid Unicode"), ("x" * 8192, "8192 bytes")]
)
def test_a_key_that_breaks_an_index(far: Far, store: Any, key: str, says: str) -> None:
    """One sentence to its own caller, and nothing half done.  Redis takes a long one."""
    if far.kind == "redis" and len(key) > 100:
        claim(store, key)
        return
    with pytest.raises(BadMessage, match=says):
        store.apply([Claim("before"), Claim(key), Claim("after")])
    assert store.scan() == []
    claim(store, "before")


def test_the_longest_key_that_a_handler_may_have(store: Any) -> None:
    """Whatever a message says, a call that is let through is one that every store takes."""
    for longest in ("x" * 2049, 10**1023):
        handler = idempotent(store, name="n" * 200, key="k")(lambda k: "ran")
        assert handler(longest) == handler(longest) == "ran"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://postgres:wrong-word@127.0.0.1:{postgresql}/idemp", "check the user, the password"),
        ("postgresql://nobody:wrong-word@127.0.0.1:{postgresql}/idemp", "check the user, the password"),
        ("postgresql://postgres:secret%20word@127.0.0.1:{postgresql}/nowhere", "nowhere"),
        ("redis://user:wrong-word@127.0.0.1:{redis}/0", "check the user, the password"),
        ("redis://127.0.0.1:{redis}/123456", "name a database that the server has"),
    ],
)
def test_a_url_that_the_server_refuses(request: pytest.FixtureRequest, url: str, says: str) -> None:
    """One sentence, at the first use, without the password."""
    kind = "redis" if url.startswith("redis") else "postgresql"
    port = request.getfixturevalue(kind).port
    with closing(open_store(url.format(**{kind: port}))) as store:
        with pytest.raises(ConfigError, match=says) as told:
            store.apply([])
        assert "wrong-word" not in str(told.value)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://localhost/x?namespace=a/b", "namespace='a/b'"),
        ("postgresql://localhost/x?appendfsync=no", "has no option 'appendfsync'"),
        ("redis://localhost/orders", "database's number"),
        ("redis://localhost/0?namespace=", "namespace=''"),
    ],
)
def test_wrong_urls(url: str, says: str) -> None:
    """Told before anything connects."""
    with pytest.raises(ConfigError, match=says):
        open_store(url)


def test_an_ipv6_is_named_as_it_is_typed() -> None:
    """In brackets, or its port would be a part of it."""
    assert redis_of("redis://[::1]:9/0").shown == "redis://[::1]:9/0"
    assert redis_of("redis://[::1]:9/0").options["host"] == "::1"
    assert postgresql_of("postgresql://u:p@[::1]:9,h/d").shown == "postgresql://[::1]:9,h/d"
    assert postgresql_of("postgresql://u:p@[::1]:9,h/d").conninfo["host"] == "::1,h"


def test_nobody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unavailable, in time."""
    for kind in ("postgresql", "redis"):
        monkeypatch.setattr(f"idemp.stores.{kind}.PATIENCE", 0.3)
        url = f"{kind}://127.0.0.1:{free_port()}/0"
        with closing(open_store(url)) as store, pytest.raises(StoreUnavailable, match=url):
            claim(store, "key")


TAKES = {"postgresql": (211, 0), "redis": (245, 350)}
"""Bytes of a done key with an id of 32 characters, as docs/stores.md has it; with Redis, its log, too."""


@pytest.mark.parametrize("kind", TAKES)
def test_what_a_done_key_takes(request: pytest.FixtureRequest, kind: str) -> None:
    """Of a handler with a usual name; tables, indexes and all, and what the keys themselves cost."""
    server, number = request.getfixturevalue(f"own_{kind}"), 30_000

    def sizes() -> tuple[int, int]:
        if kind == "redis":
            used = re.search(r"used_memory:(\d+)", server.call("INFO", "memory"))
            assert used
            return int(used[1]), sum(file.stat().st_size for file in server.folder.rglob("*.aof"))
        done = "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relname ~ '^done_.$'"
        return int(server.psql(done)), 0

    with closing(open_store(server.url)) as store:
        store.apply([])
        before = sizes()
        for start in range(0, number, 1000):
            keys = [f"bench.new_order/{uuid.uuid4().hex}" for _ in range(start, start + 1000)]
            claims = store.apply([Claim(key) for key in keys])
            store.apply([Complete(k, c.token) for k, c in zip(keys, claims, strict=True)])  # type: ignore[union-attr]
        each = [(now - then) / number for now, then in zip(sizes(), before, strict=True)]
    assert each == pytest.approx(TAKES[kind], rel=0.08), each
    text = (Path(__file__).parents[1] / "docs/stores.md").read_text()
    said = (
        "{} bytes of its disk, index" if kind == "postgresql" else "{} bytes of its memory, and {} of its log"
    )
    assert said.format(*TAKES[kind]) in text


def test_namespaces_keep_apart(far: Far) -> None:
    """The same key in two."""
    with closing(far.open("?namespace=a")) as a, closing(far.open("?namespace=B.c-d")) as b:
        claim(a, "key")
        claim(b, "key")
        assert len(a.scan()) == len(b.scan()) == 1


# ------------------------------------------------------------------ threads

NOBODY_EXPECTED = [OSError(24, "Too many open files"), RuntimeError("can't start new thread")]


@pytest.mark.parametrize("error", NOBODY_EXPECTED, ids=["OSError", "RuntimeError"])
def test_no_thread_dies_of_what_nobody_expected(
    far: Far, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It fails once in each; then the session is confirmed again, and what is told is heard again."""
    kind, name = {
        "postgresql": (psycopg.Connection, "execute"),
        "redis": (redis.Redis, "execute_command"),
    }[far.kind]
    real, failed = getattr(kind, name), set[str]()

    def execute(*args: Any, **kwargs: Any) -> Any:
        thread = threading.current_thread().name
        if thread.startswith(f"idemp-{far.kind}-") and thread not in failed:
            failed.add(thread)
            raise error
        return real(*args, **kwargs)

    with closing(far.open("?session=1s")) as store:
        store.apply([Claim("key")])
        store.recall("key")
        until(lambda: store._session._listens)
        monkeypatch.setattr(kind, name, execute)
        until(lambda: len(failed) == 2)
        since = time.monotonic()
        until(lambda: store._session._confirmed > since)
        until(lambda: store._session._listens and store._session._recall.follows)
        assert all(thread.is_alive() for thread in store._session._threads)
        assert store.fresh()


def until(what: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
