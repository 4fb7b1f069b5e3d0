"""What a process remembers of a store on a server: only what is done for sure, and only while it hears."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from idemp.errors import ConfigError, StoreUnavailable
from idemp.ports import Applied, Claim, Claimed, Clock, Complete, Done, Forget, Free, Get, Lost, Op, Reply
from idemp.stores import open_store
from idemp.stores.postgresql_inbox import PostgresqlTransaction
from idemp.stores.postgresql_sql import CLOCK
from idemp.stores.recall import LARGE, TRUST, Recall
from idemp.stores.redis import _BATCH
from tests.proxy import Proxy
from tests.servers import PostgreSQL, Redis, need
from tests.servers.pgbouncer import PgBouncer


def one(store: Any, op: Op) -> Reply:
    reply: Reply = store.apply([op])[0]
    return reply


def finish(store: Any, key: str, result: bytes = b"null") -> Done:
    """Claim and complete it; its state, as the server has it."""
    mine = one(store, Claim(key))
    assert isinstance(mine, Claimed), mine
    store.apply([Complete(key, mine.token, result, b"print")])
    done = one(store, Get(key))
    assert isinstance(done, Done)
    return done


def until(what: Callable[[], Any], seconds: float = 30.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
    return found


def listening(store: Any) -> Any:
    """The store, once it hears everything."""
    store.apply([])  # who asks what is remembered opens nothing
    store.recall("nothing")
    until(lambda: store._session._recall.follows)
    return store


def recalled(store: Any, key: str) -> Done:
    """What is remembered of it; memory is silent where whoever listens had no time for seconds."""
    found = until(lambda: store.recall(key))
    assert isinstance(found, Done)
    return found


# ------------------------------------------------------------------ on real servers


@dataclass
class Pair:
    """Two processes' stores; ``here`` is behind a proxy, and hears."""

    kind: str
    server: Any
    url: str
    proxy: Proxy
    here: Any
    there: Any

    def deafen(self) -> None:
        """Only the connection that hears is ended, by the server."""
        if self.kind == "redis":
            self.server.call("CLIENT", "KILL", "TYPE", "pubsub")
            return
        with psycopg.connect(self.url, autocommit=True) as line:
            line.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND (query LIKE 'LISTEN%%' OR query = %s)",
                [CLOCK],
            )


@pytest.fixture(params=["redis", "postgresql"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    server = request.getfixturevalue(request.param)
    url = server.database()
    with (
        Proxy(server.port) as proxy,
        closing(open_store(url.replace(f":{server.port}", f":{proxy.port}"))) as here,
        closing(open_store(url)) as there,
    ):
        yield Pair(request.param, server, url, proxy, listening(here), there)


def test_what_this_process_did_and_was_told_is_recalled(pair: Pair) -> None:
    """Word for word what a claim would hear; nothing is asked for it."""
    mine = finish(pair.here, "mine", b"\x00\xff")
    theirs = finish(pair.there, "theirs")
    assert one(pair.here, Claim("theirs")) == theirs

    before = pair.here._session._batch
    assert (recalled(pair.here, "mine"), recalled(pair.here, "theirs")) == (mine, theirs)
    assert pair.here.recall("other") is None
    assert pair.here._session._batch == before


def test_what_others_do_is_heard_on_redis(redis: Redis) -> None:
    """Results, none and fingerprints, keys of any kind; not what is large, nor of another database."""
    url, other = redis.database(), redis.database()
    results = {"plain": b"null", "bytes\n,": b"\x00,\n", "empty ä": b"", "large": b"x" * LARGE}
    with (
        closing(open_store(url)) as here,
        closing(open_store(url)) as there,
        closing(open_store(other)) as far,
    ):
        one(listening(here), Get("nothing"))
        finish(far, "far")
        done = {key: finish(there, key, result) for key, result in results.items()}
        none = one(there, Claim("none"))
        assert isinstance(none, Claimed)
        there.apply([Complete("none", none.token), Claim("open")])

        heard = until(lambda: here.recall("none"))

        assert (heard.result, heard.fingerprint, heard.attempt) == (None, None, 1)
        del done["large"]
        assert {key: recalled(here, key) for key in done} == done
        assert here.recall("large") is here.recall("open") is here.recall("far") is None


def test_a_forget_by_another_replica_is_heard(pair: Pair) -> None:
    """Soon; and what is done anew is another."""
    old = finish(pair.here, "key")
    assert recalled(pair.here, "key") == old
    pair.there.apply([Forget("key", old.token)])
    until(lambda: pair.here.recall("key") is None, 5.0)

    new = finish(pair.there, "key", b"2")

    assert one(pair.here, Claim("key")) == new == recalled(pair.here, "key")


def test_what_this_process_forgets_is_forgotten_at_once(pair: Pair) -> None:
    """Also where others are still telling that it was done."""
    for n in range(50):
        done = finish(pair.there, f"{n}")
        pair.here.apply([Forget(f"{n}", done.token)])
        end = time.monotonic() + 0.005
        while time.monotonic() < end:
            assert pair.here.recall(f"{n}") is None


def test_what_this_process_forgot_in_a_commit_whose_reply_was_lost(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took effect, which the next call finds out; the news of it is still on its way."""
    session = pair.here._session
    gone = finish(pair.here, "gone")
    monkeypatch.setattr(session._recall, "forgotten", lambda pairs: None)
    real_all = session._recall.forget_all
    here = threading.current_thread()
    monkeypatch.setattr(
        session._recall, "forget_all", lambda: real_all() if threading.current_thread() is here else None
    )
    name = "_write" if pair.kind == "postgresql" else "_call"
    real = getattr(session, name)

    def struck(*args: Any) -> Any:
        monkeypatch.setattr(session, name, real)
        pair.proxy.lose()
        return real(*args)

    monkeypatch.setattr(session, name, struck)
    assert recalled(pair.here, "gone") == gone
    assert one(pair.here, Forget("gone", gone.token)) == Applied()
    assert pair.proxy.counts.lost == 1
    assert pair.here.recall("gone") is None


@pytest.mark.parametrize("lost", [False, True])
def test_what_this_process_forgot_in_a_transaction(
    postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """The news of it is still on its way when that is over; also if the reply to its commit was lost."""
    left = [psycopg.OperationalError("lost")] if lost else []
    real = PostgresqlTransaction.open

    @contextmanager
    def struck(transaction: PostgresqlTransaction) -> Iterator[None]:
        with real(transaction):
            yield
        if left:
            raise left.pop()

    monkeypatch.setattr(PostgresqlTransaction, "open", struck)
    with closing(open_store(postgresql.database())) as opened:
        store: Any = opened
        store.apply([])
        monkeypatch.setattr(store._session, "_told", lambda said: None)
        gone, kept = finish(listening(store), "gone"), finish(store, "kept")
        assert (recalled(store, "gone"), recalled(store, "kept")) == (gone, kept)
        replies = store.transaction(lambda here: here.apply([Forget("gone", gone.token), Get("kept")]), 5.0)
        assert store.recall("gone") is None
        assert (replies, left) == ([Lost(Free(0)) if lost else Applied(), kept], [])


def test_who_was_cut_off_from_the_news_knows_nothing(pair: Pair) -> None:
    """What was forgotten meanwhile is not recalled, and nothing else: it was not heard what else was."""
    gone, kept = finish(pair.here, "gone"), finish(pair.here, "kept")
    assert recalled(pair.here, "gone") == gone
    era = pair.here._session._recall.era()
    pair.deafen()
    pair.there.apply([Forget("gone", gone.token)])
    until(lambda: pair.here._session._recall.era() > era)
    listening(pair.here)

    assert pair.here.recall("gone") is pair.here.recall("kept") is None
    assert one(pair.here, Get("gone")) == Free(0)
    assert one(pair.here, Claim("kept")) == kept == recalled(pair.here, "kept")


def test_a_line_on_which_nothing_comes_is_not_trusted(pair: Pair) -> None:
    """It is open, and silent: in two seconds nothing is known; what was forgotten then never comes back."""
    gone, kept = finish(pair.here, "gone"), finish(pair.here, "kept")
    pair.proxy.hold(questions=True, answers=True)
    began = time.monotonic()
    pair.there.apply([Forget("gone", gone.token)])
    until(lambda: pair.here.recall("kept") is None)
    assert time.monotonic() - began < TRUST + 5
    assert pair.here.recall("gone") is None
    pair.proxy.release()

    assert one(pair.here, Claim("kept")) == kept
    listening(pair.here)
    until(lambda: one(pair.here, Claim("kept")) and pair.here.recall("kept"))
    assert pair.here.recall("gone") is None


@pytest.mark.parametrize("kind", ["redis", "postgresql"])
def test_the_server_is_restarted(kind: str, request: pytest.FixtureRequest) -> None:
    """While it is away nothing is known; then all goes on."""
    server = request.getfixturevalue(f"own_{kind}")
    with closing(open_store(server.url)) as store:
        done = finish(listening(store), "key")
        assert recalled(store, "key") == done
        server.kill()
        until(lambda: store.recall("key") is None)
        server.start()
        assert one(store, Claim("key")) == done
        listening(store)
        assert one(store, Claim("key")) == done == recalled(store, "key")


def test_another_server_takes_over(own_redis: Redis) -> None:
    """Commands go to it already while the line to the old one is still open: nothing of that counts."""
    need("redis")
    follows = {"replicaof": f"127.0.0.1 {own_redis.port}"}
    with (
        Redis(options=follows) as replica,
        Proxy(own_redis.port) as proxy,
        closing(open_store(f"redis://127.0.0.1:{proxy.port}/0")) as here,
    ):
        done = finish(listening(here), "key")
        until(lambda: replica.call("EXISTS", "idemp:{default}:k:key") == "1")
        replica.call("REPLICAOF", "NO", "ONE")
        proxy.move(replica.port)
        with closing(open_store(replica.url)) as there:
            there.apply([Forget("key", done.token)])
        own_redis.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

        assert one(here, Claim("new")) != Free(0)

        assert here.recall("key") is None
        listening(here)
        assert here.recall("key") is None
        assert isinstance(one(here, Claim("key")), Claimed)


def test_a_first_replica_comes(own_redis: Redis) -> None:
    """The server names itself anew then, and ends no connection: those that ask are older than the news."""
    need("redis")
    with closing(open_store(own_redis.url)) as here:
        done = finish(here, "key")
        before = own_redis.call("INFO", "replication")
        with Redis(options={"replicaof": f"127.0.0.1 {own_redis.port}"}):
            until(lambda: _name(own_redis.call("INFO", "replication")) != _name(before))
            listening(here)
            assert one(here, Claim("key")) == done == recalled(here, "key")


def _name(replication: str) -> str:
    return next(line for line in replication.splitlines() if line.startswith("master_replid:"))


def test_a_server_that_became_a_replica_is_left(own_redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps its connections, refuses to write, and hears of a forget late or never."""
    need("redis")
    monkeypatch.setattr("idemp.stores.redis.PATIENCE", 1.0)
    follows = {"replicaof": f"127.0.0.1 {own_redis.port}"}
    with (
        Redis(options=follows) as other,
        Proxy(own_redis.port) as proxy,
        closing(open_store(f"redis://127.0.0.1:{proxy.port}/0?session=2s")) as here,
    ):
        done = finish(listening(here), "key")
        until(lambda: other.call("EXISTS", "idemp:{default}:k:key") == "1")
        other.call("REPLICAOF", "NO", "ONE")
        own_redis.call("REPLICAOF", "127.0.0.1", "1")  # nobody is there, so it will hear nothing
        with closing(open_store(other.url)) as there:
            there.apply([Forget("key", done.token)])

        until(lambda: here.recall("key") is None, 10.0)
        with pytest.raises(StoreUnavailable, match="a read-only replica now"):
            here.apply([Claim("key")])
        assert here.recall("key") is None  # nor again, once whoever listens has time

        proxy.move(other.port)
        assert isinstance(one(here, Claim("key")), Claimed)
        listening(here)


@pytest.mark.parametrize("kind", ["redis", "postgresql"])
def test_a_retention_that_was_over_is_made_longer(kind: str, request: pytest.FixtureRequest) -> None:
    """What the store had let go, and another does anew, does not come back."""
    url = request.getfixturevalue(kind).database()
    with closing(open_store(f"{url}?retention=3s")) as opened:
        here: Any = listening(opened)
        old = finish(here, "key")
        assert recalled(here, "key") == old
        until(lambda: one(here, Get("key")) == Free(0))
        with closing(open_store(f"{url}?retention=3s")) as there:
            again = one(there, Claim("key"))
            assert isinstance(again, Claimed)
            with closing(open_store(f"{url}?retention=1h")) as third:
                third.apply([])
            one(here, Claim("other"))
            assert here.retention == 3600
            until(lambda: here._session._recall.follows)
            assert here.recall("key") is None
            there.apply([Complete("key", again.token, b"2")])
            assert one(here, Claim("key")).result == b"2"  # type: ignore[union-attr]


def test_what_was_done_before_the_retention_was_raised(redis: Redis) -> None:
    """It goes when it would have gone, also from the memory of who came later and was told it is done."""
    url = redis.database()
    with (
        closing(open_store(f"{url}?retention=4s")) as there,
        closing(open_store(f"{url}?retention=1h")) as here,
    ):
        old = finish(there, "old")
        listening(here)
        assert one(here, Claim("old")) == old
        new = finish(here, "new")
        until(lambda: one(there, Get("old")) == Free(0))
        assert here.recall("old") is None
        assert one(there, Claim("new")) == new == recalled(here, "new")


def test_a_servers_clock_that_is_put_forward_is_noticed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Done is over there at once, and soon here, where nothing is asked of the store."""
    old = finish(pair.here, "key")
    assert recalled(pair.here, "key") == old
    session, hours = pair.here._session, 25 * 3600.0
    if pair.kind == "redis":
        real = session._time
        monkeypatch.setattr(session, "_time", lambda: real() + hours)
    else:
        monkeypatch.setattr("idemp.stores.postgresql.CLOCK", f"{CLOCK} + {hours}")
    before = session._batch
    until(lambda: pair.here.recall("key") is None)
    assert session._recall.follows
    assert session._batch == before


def test_a_server_that_forgot_is_not_spoken_for(redis: Redis) -> None:
    """Its keys were deleted behind our back, and the session with them."""
    with closing(open_store(f"{redis.database()}?session=3s")) as opened:
        store: Any = opened
        finish(listening(store), "key")
        assert recalled(store, "key")
        number = store._session._at.options["db"]
        redis.call("EVAL", "redis.call('SELECT', ARGV[1]); redis.call('FLUSHDB')", "0", f"{number}")
        until(lambda: store.recall("key") is None)


def test_who_may_not_tell_is_refused_before_anything_is_done(redis: Redis, unique: str) -> None:
    """Redis gives a new user no channel, and takes nothing of a script back."""
    redis.call("ACL", "SETUSER", unique, "on", ">theirs", "~*", "resetchannels", "+@all")
    url = f"redis://{unique}:theirs@127.0.0.1:{redis.port}/0?namespace={unique}"
    with closing(open_store(url)) as store, pytest.raises(ConfigError, match="channel") as told:
        one(store, Claim("key"))
    assert "theirs" not in str(told.value)
    assert redis.call("EXISTS", f"idemp:{{{unique}}}:retention") == "0"


def test_behind_a_pooler_nothing_is_remembered(postgresql: PostgreSQL) -> None:
    """Nobody would hear of a forget there."""
    need("pgbouncer")
    with (
        PgBouncer(postgresql.port) as pooler,
        closing(open_store(pooler.through(postgresql.database()))) as opened,
    ):
        store: Any = opened
        store.apply([])
        assert store.recall("key") is None
        until(lambda: store._session._listener.pooled)
        done = finish(store, "key")
        assert one(store, Claim("key")) == done
        assert store.recall("key") is None


def test_a_process_with_many_files_hears_too(redis: Redis, postgresql: PostgreSQL) -> None:
    """More than select() can look at."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2000, limit[1]), limit[1]))
    with ExitStack() as files:
        files.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limit)
        for _ in range(1030):
            files.enter_context(open(os.devnull))
        for url in (redis.database(), postgresql.database()):
            here, there = (files.enter_context(closing(open_store(url))) for _ in range(2))
            _hears(here, there)


def _hears(here: Any, there: Any) -> None:
    done = finish(listening(here), "key")
    there.apply([Forget("key", done.token)])
    until(lambda: here.recall("key") is None, 5.0)
    new = finish(here, "new")
    assert recalled(here, "new") == new


# ------------------------------------------------------------------ the memory itself


class Hands:
    """A clock that is turned by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def clock(self) -> Clock:
        return Clock(wall=lambda: self.now, steady=lambda: self.now)


@pytest.fixture
def hands() -> Hands:
    return Hands()


def done(token: int, at: float = 5000.0, result: bytes = b"null") -> Done:
    return Done(token, result, None, at, 1)


@pytest.fixture
def memory(hands: Hands) -> Recall:
    """Hears, of a server whose clock is 4000 s ahead and whose retention is 80 s."""
    recall = Recall(hands.clock(), room=80_000)
    recall.begin(hands.now)
    recall.told(80.0, hands.now + 4000, hands.now)
    return recall


def test_it_answers_while_somebody_vouches(memory: Recall, hands: Hands) -> None:
    memory.learn(memory.era(), [("key", done(1))])
    hands.now += TRUST - 0.01
    assert memory.find("key") == done(1)
    hands.now += 0.01
    assert memory.find("key") is None
    memory.vouch(hands.now - 1, hands.now + 3999)
    assert memory.find("key") == done(1)
    memory.lose()
    memory.vouch(hands.now, hands.now + 4000)
    assert memory.find("key") is None
    memory.begin(hands.now)
    assert memory.find("key") is None


def test_a_reply_that_the_news_overtook_teaches_nothing(memory: Recall, hands: Hands) -> None:
    """Of a forget, of a lost line, of one that is whole again."""
    all_news: tuple[Callable[[], None], ...] = (
        lambda: memory.forgotten([("other", 9)]),
        memory.forget_all,
        memory.lose,
        lambda: memory.begin(hands.now),
    )
    for news in all_news:
        asked = memory.era()
        news()
        if not memory.follows:
            memory.begin(hands.now)
            memory.told(80.0, hands.now + 4000, hands.now)
        memory.learn(asked, [("key", done(1))])
        assert memory.find("key") is None
    memory.learn(memory.era(), [("key", done(1))])
    assert memory.find("key") == done(1)


def test_a_done_that_i_forgot_is_not_heard_of_again(memory: Recall) -> None:
    """Until my own word for it came round; a later one counts."""
    memory.forget([("key", 5)])
    memory.learn(memory.era(), [("key", done(5))])
    assert memory.find("key") is None
    memory.learn(memory.era(), [("key", done(6))])
    assert memory.find("key") == done(6)
    memory.forgotten([("key", 5)])
    assert memory.find("key") == done(6)
    memory.forgotten([("key", 6)])
    assert memory.find("key") is None


def test_a_done_that_i_forgot_is_not_learned_on_a_line_that_is_new(memory: Recall, hands: Hands) -> None:
    """It began to hear before the forget, and what it heard first is told to me after it."""
    memory.lose()
    asked = hands.now
    memory.forget([("key", 5)])
    memory.begin(asked)
    memory.told(80.0, hands.now + 4000, hands.now)
    memory.learn(memory.era(), [("key", done(5))])
    assert memory.find("key") is None


def test_what_i_forgot_is_kept_for_a_moment_only(memory: Recall, hands: Hands) -> None:
    """Nobody may ever say so again: it was parked, or its news came first, or nobody listens."""
    for n in range(1000):
        memory.forget([(f"{n}", n)])
        hands.now += TRUST / 10
    assert len(memory._gone) <= 11


def test_a_longer_retention_brings_nothing_back(memory: Recall, hands: Hands) -> None:
    """What was done under the shorter one may be gone from the store by now, and be run anew."""
    memory.learn(memory.era(), [("key", done(1, 5000.0))])
    hands.now += 90
    asked, now = memory.era(), hands.now + 4000
    memory.told(8000.0, now, hands.now)
    memory.vouch(hands.now, hands.now + 4000)
    assert memory.find("key") is None
    memory.learn(asked, [("asked before", done(2, now))])
    memory.learn(memory.era(), [("old", done(3, now - 0.1)), ("new", done(4, now))])
    assert memory.find("asked before") is memory.find("old") is None
    assert memory.find("new") == done(4, now)


def test_another_server_has_another_clock(memory: Recall, hands: Hands) -> None:
    """Nothing is learned until it has said what time it is there: else this would last for an hour more."""
    memory.lose()
    memory.begin(hands.now)
    memory.learn(memory.era(), [("key", done(1, 9000.0))])
    assert memory.find("key") is None
    memory.told(80.0, hands.now + 8000, hands.now)
    memory.learn(memory.era(), [("key", done(1, 9000.0))])
    assert memory.find("key") == done(1, 9000.0)
    hands.now += 80
    memory.vouch(hands.now, hands.now + 8000)
    assert memory.find("key") is None


def test_a_servers_clock_is_put_forward_and_back(memory: Recall, hands: Hands) -> None:
    """What is over by it is not answered, nor when it is not over any more: it was deleted there."""
    for by in (70.0, 90.0):
        memory.learn(memory.era(), [("key", done(1, hands.now + 4000))])
        memory.vouch(hands.now, hands.now + 4000 + by)
        assert bool(memory.find("key")) == (by < 80)
        asked = memory.era()
        memory.vouch(hands.now, hands.now + 4000)
        memory.learn(asked, [("asked before", done(2, hands.now + 4000))])
        assert memory.find("key") is memory.find("asked before") is None


def test_a_slow_answer_is_no_other_clock(memory: Recall, hands: Hands) -> None:
    """It seems ahead by as long as the answer took, and back with the next."""
    memory.learn(memory.era(), [("key", done(1))])
    for slow in (1.9, 0.0):
        memory.vouch(hands.now, hands.now + 4000 + slow)
    assert memory.find("key") == done(1)


def test_it_forgets_when_the_server_does(memory: Recall, hands: Hands) -> None:
    """By the server's clock and the time of done, whenever it was learned."""
    memory.learn(memory.era(), [("old", done(1, 4930.0)), ("new", done(2, 5000.0))])
    for seconds, known in ((9.9, ["old", "new"]), (0.2, ["new"]), (69.8, ["new"]), (0.2, [])):
        hands.now += seconds
        memory.vouch(hands.now, hands.now + 4000)
        assert [key for key in ("old", "new") if memory.find(key)] == known


def test_its_size_is_bounded(memory: Recall, hands: Hands) -> None:
    """By bytes and by time; the newest stays."""
    for n in range(20_000):
        memory.learn(memory.era(), [(f"{n}", done(n, 5000.0 + n / 1e6))])
    known = [n for n in range(20_000) if memory.find(f"{n}")]
    assert known == list(range(known[0], 20_000))
    assert 80_000 * 6 / 8 / 33 < len(known) <= 80_000 / 33 + 1
    memory.learn(memory.era(), [("large", done(20_000, result=b"x" * LARGE + b"x"))])
    assert memory.find("large") is None
    for n in range(20_001, 20_040):
        memory.learn(memory.era(), [(f"{n}", done(n, result=b"x" * LARGE))])
    assert sum(memory._weights) <= 80_000 + LARGE + 300
    for n in range(20_040, 20_060):
        hands.now += 20
        memory.learn(memory.era(), [(f"{n}", done(n))])
        assert len(memory._slices) <= 9
    assert len(memory._seen) <= 6


def test_the_script_and_the_memory_agree_on_what_is_large() -> None:
    """What is never kept need not be told."""
    assert f"local LARGE = {LARGE} " in _BATCH.text
