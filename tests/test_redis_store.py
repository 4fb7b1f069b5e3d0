"""What only the Redis store has: settings that forget, full memory, a lost tail, the script itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from idemp.errors import ConfigError, StoreUnavailable
from idemp.ports import Applied, Busy, Claim, Claimed, Complete, Done, Doubt, Free, Get, Lost, Op, Reply
from idemp.stores import open_store
from idemp.stores.redis import _words
from tests.proxy import Proxy
from tests.servers import Redis, need


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
def store(own_redis: Redis) -> Iterator[Any]:
    with closing(open_store(own_redis.url)) as opened:
        opened.apply([])
        yield opened


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("appendonly", "no"),
        ("appendfsync", "everysec"),
        ("appendfsync", "no"),
        ("maxmemory-policy", "allkeys-lru"),
    ],
)
def test_a_server_that_may_forget_is_refused(setting: str, value: str) -> None:
    """Unless it is said that it may.  The first is what Debian's package comes with."""
    need("redis")
    with Redis(options={setting: value}) as server:
        with closing(open_store(server.url)) as store, pytest.raises(ConfigError, match=f"{setting} {value}"):
            claim(store, "key")
        with closing(open_store(f"{server.url}?unsafe_durability=true")) as store:
            claim(store, "key")


def test_a_server_that_hides_its_settings_is_refused(request: pytest.FixtureRequest, unique: str) -> None:
    """With the right that it needs; and a user who may do nothing, with the command that was refused."""
    server: Redis = request.getfixturevalue("redis")
    server.call("ACL", "SETUSER", unique, "on", ">theirs", "~*", "&*", "+@all", "-config")
    url = f"redis://{unique}:theirs@127.0.0.1:{server.port}/0"
    with closing(open_store(url)) as store, pytest.raises(ConfigError, match="allow it CONFIG GET") as told:
        claim(store, "key")
    assert "theirs" not in str(told.value)
    with closing(open_store(f"{url}?unsafe_durability=true")) as store:
        claim(store, unique)
    server.call("ACL", "SETUSER", unique, "-eval", "-evalsha")
    unsafe = f"{url}?unsafe_durability=true"
    with closing(open_store(unsafe)) as store, pytest.raises(ConfigError, match="evalsha"):
        claim(store, "key")


def test_a_replica_is_refused(own_redis: Redis) -> None:
    """In one sentence."""
    need("redis")
    follows = {"replicaof": f"127.0.0.1 {own_redis.port}"}
    with (
        Redis(options=follows) as replica,
        closing(open_store(replica.url)) as store,
        pytest.raises(ConfigError, match="read-only replica"),
    ):
        claim(store, "key")


# ------------------------------------------------------------------ faults


def test_a_session_lives_on_while_memory_is_full(own_redis: Redis) -> None:
    """Whoever runs for long is not in doubt for that."""
    url = f"{own_redis.url}?session=2s"
    with closing(open_store(url)) as here, closing(open_store(url)) as there:
        mine = claim(here, "mine")
        own_redis.call("CONFIG", "SET", "maxmemory", "1")
        time.sleep(3)
        own_redis.call("CONFIG", "SET", "maxmemory", "0")
        assert isinstance(one(there, Get("mine")), Busy)
        assert one(here, Complete("mine", mine.token)) == Applied()


def test_a_full_memory_is_unavailable_and_nothing_is_half_done(
    own_redis: Redis, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script is refused as a whole; once there is room, all goes on."""
    mine = claim(store, "mine")
    monkeypatch.setattr("idemp.stores.redis.PATIENCE", 0.3)
    own_redis.call("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(
        StoreUnavailable, match=r"raise its maxmemory, or name a shorter \?retention= at every process$"
    ):
        store.apply([Complete("mine", mine.token), Claim("other")])
    own_redis.call("CONFIG", "SET", "maxmemory", "0")

    states = store.apply([Get("mine"), Get("other")])

    assert (states[0].token, states[1]) == (mine.token, Free(0))
    assert one(store, Complete("mine", mine.token)) == Applied()


def test_a_full_disk_is_unavailable_and_nothing_is_half_done(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends rather than confirm what it cannot write; with room again, what was told as done is done."""
    need("redis")
    folder = small_disk / "server"
    folder.mkdir()
    done: list[str] = []

    def work_on(store: Any, batches: int) -> None:
        for _ in range(batches):
            keys = [f"{len(done) + n}" for n in range(100)]
            tokens = [reply.token for reply in store.apply([Claim(key) for key in keys])]
            marks = [Complete(k, t, b"x" * 3000) for k, t in zip(keys, tokens, strict=True)]
            assert set(store.apply(marks)) == {Applied()}
            done.extend(keys)

    with Redis(folder=folder) as server, closing(open_store(server.url)) as store:
        work_on(store, 3)
        ballast = small_disk / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(b"0" * 65_536)
        monkeypatch.setattr("idemp.stores.redis.PATIENCE", 1.0)
        with pytest.raises(StoreUnavailable) as full:
            work_on(store, 1000)
        monkeypatch.undo()
        assert str(full.value).startswith(f"redis://127.0.0.1:{server.port}/0: ")
        assert "\n" not in str(full.value)
        ballast.unlink()
        server.kill()
        server.start()
        assert {type(state) for state in store.apply([Get(key) for key in done])} == {Done}
        left = store.apply([Get(f"{len(done) + n}") for n in range(100)])
        assert len({type(state) for state in left}) == 1, "a batch is there, or not"
        assert not isinstance(left[0], Done)
        claim(store, "last")


def test_connections_are_ended_under_load(own_redis: Redis, store: Any) -> None:
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
        ended = 0
        try:
            for _ in range(25):
                time.sleep(0.04)
                ended += int(own_redis.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"))
        finally:
            stop.set()
        done = [key for each in works for key in each.result(60)]

    assert ended >= 10
    assert len(done) > 100
    assert [state.result.decode() for state in store.apply([Get(key) for key in done])] == done


def test_no_connection_is_left(own_redis: Redis, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unavailable in time; and it goes on once there is one."""
    mine = claim(store, "key")
    with closing(redis.Redis(port=own_redis.port, single_connection_client=True)) as line:
        line.config_set("maxclients", 1)
        line.client_kill_filter(_type="normal", skipme=True)
        with monkeypatch.context() as short:
            short.setattr("idemp.stores.redis.PATIENCE", 0.3)
            with pytest.raises(StoreUnavailable, match=r"max number of clients.*; raise its maxclients$"):
                claim(store, "other")
        line.config_set("maxclients", 100)
    assert one(store, Complete("key", mine.token)) == Applied()
    claim(store, "other")


def test_too_few_replicas(own_redis: Redis, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its administrator wants some: unavailable, with the setting, and nothing is half done."""
    mine = claim(store, "mine")
    own_redis.call("CONFIG", "SET", "min-replicas-to-write", "1")
    with monkeypatch.context() as short:
        short.setattr("idemp.stores.redis.PATIENCE", 0.3)
        with pytest.raises(StoreUnavailable, match=r"NOREPLICAS.*min-replicas-to-write$"):
            store.apply([Complete("mine", mine.token), Claim("other")])
    own_redis.call("CONFIG", "SET", "min-replicas-to-write", "0")
    assert store.apply([Get("other"), Complete("mine", mine.token)]) == [Free(0), Applied()]


def test_the_script_is_flushed(own_redis: Redis, store: Any) -> None:
    """It is sent again."""
    claim(store, "first")
    own_redis.call("SCRIPT", "FLUSH")
    claim(store, "second")


def test_a_restart_that_forgets_nothing_changes_nothing(own_redis: Redis, store: Any) -> None:
    """Killed and started on its file: the claim is still this session's, and fresh."""
    mine = claim(store, "key")
    own_redis.kill()
    own_redis.start()
    store.apply([])

    assert store.fresh(mine.token)
    assert one(store, Complete("key", mine.token)) == Applied()
    own_redis.kill()
    own_redis.start()
    assert isinstance(one(store, Claim("key")), Done)


@pytest.mark.parametrize("all_of_it", [True, False])
def test_a_lost_tail_is_noticed(
    own_redis: Redis, store: Any, caplog: pytest.LogCaptureFixture, all_of_it: bool
) -> None:
    """As after a failover: no old claim is fresh, tokens still grow, what is left of mine is in doubt."""
    old = claim(store, "old")
    session = store._session._id
    name = f"idemp:{{default}}:s:{session}"
    before = own_redis.call("GET", name)
    lost = claim(store, "lost")
    if all_of_it:
        own_redis.call("FLUSHALL")
    else:
        own_redis.call("DEL", "idemp:{default}:k:lost")
        own_redis.call("SET", name, before, "PX", "10000")
        own_redis.call("SET", "idemp:{default}:token", "1")

    new = claim(store, "lost")

    assert new.token > lost.token > old.token
    assert store.fresh(new.token)
    assert not store.fresh(old.token)
    if not all_of_it:
        assert "has forgotten what it had confirmed" in caplog.text
        with closing(open_store(own_redis.url)) as other:
            assert isinstance(one(other, Get("old")), Doubt)
        assert one(store, Complete("old", old.token)) == Applied()


def test_a_failover_loses_what_its_replica_had_not_heard(
    own_redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Redis confirms before its replicas know: no setting helps.  It is noticed by who had written it."""
    follows = {"replicaof": f"127.0.0.1 {own_redis.port}"}
    with (
        Redis(options=follows) as replica,
        Proxy(own_redis.port) as proxy,
        closing(open_store(f"redis://127.0.0.1:{proxy.port}/0")) as store,
    ):
        old = claim(store, "old")
        until(lambda: replica.call("EXISTS", "idemp:{default}:k:old") == "1")
        replica.call("REPLICAOF", "NO", "ONE")  # here the stream breaks off
        lost, done = claim(store, "lost"), claim(store, "done")
        assert one(store, Complete("done", done.token)) == Applied()
        own_redis.kill()
        proxy.move(replica.port)
        proxy.cut()

        with closing(open_store(replica.url)) as other:
            doubled = [claim(other, key) for key in ("lost", "done")]
            store.apply([])
            assert "has forgotten what it had confirmed" in caplog.text
            assert not any(store.fresh(mine.token) for mine in (old, lost))
            assert isinstance(one(other, Get("old")), Doubt)

        assert min(each.token for each in doubled) > done.token
        assert isinstance(one(store, Complete("lost", lost.token)), Lost)


def test_an_idle_process_notices_a_lost_tail_by_its_heartbeat(own_redis: Redis) -> None:
    """What it had claimed is not fresh any more, without another call."""
    with closing(open_store(f"{own_redis.url}?session=1s")) as store:
        mine = claim(store, "key")
        own_redis.call("FLUSHALL")
        until(lambda: not store.fresh(mine.token))


def test_a_call_that_was_given_up_takes_no_effect_when_it_comes_late(store: Any) -> None:
    """It was on its way when its caller was told that it had failed, and the next batch had asked for it."""
    session = store._session
    late = ("apply", session._id, 10_000, 7, session._last, "told", 0, *_words(Claim("key")))
    assert session._call("void", session._id, 7) == [b"void"]

    session._call(*late)

    session._last = 7
    assert one(store, Get("key")) == Free(0)
    claim(store, "key")


def test_two_masters_behind_one_address(
    own_redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a balancer shows them around a failover: a call ends in its time, and asks now and then."""
    with (
        Redis() as second,
        Proxy(own_redis.port) as proxy,
        closing(open_store(f"redis://127.0.0.1:{proxy.port}/0?session=60s")) as store,
    ):
        claim(store, "before")
        monkeypatch.setattr("idemp.stores.redis.PATIENCE", 1.0)
        proxy.move(second.port, own_redis.port)
        proxy.cut()
        tried, mute = proxy.counts.connections, threading.Timer(20.0, proxy.move, [own_redis.port])
        mute.start()  # a call that never ends would hold up all tests
        with pytest.raises(StoreUnavailable, match="began anew, or is another"):
            claim(store, "key")
        mute.cancel()
        assert proxy.counts.connections - tried <= 40
        assert caplog.text.count("began anew") <= 2
        monkeypatch.undo()
        proxy.move(own_redis.port)
        claim(store, "key")


# ------------------------------------------------------------------ memory


def test_done_keys_go_by_themselves(own_redis: Redis) -> None:
    """After the retention nothing of them is left, and open ones have no expiry."""
    with closing(open_store(f"{own_redis.url}?retention=1s")) as store:
        keys = [f"done/{n}" for n in range(500)]
        claims = store.apply([Claim(key) for key in keys])
        claim(store, "open")
        store.apply([Complete(k, c.token, b"x") for k, c in zip(keys, claims, strict=True)])  # type: ignore[union-attr]
        until(lambda: own_redis.call("DBSIZE") == "5")  # session, token, retention, since, and the open one

        assert own_redis.call("PTTL", "idemp:{default}:k:open") == "-1"
