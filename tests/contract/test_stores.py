"""The laws of a store (design of `idemp.ports.Store`), which every store keeps."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from idemp.errors import Closed, ConfigError
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
from idemp.stores import open_store
from tests.contract.backends import BACKENDS, SHARED, Backend

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    """Each backend in turn, empty."""
    return BACKENDS[request.param](request, tmp_path)


@pytest.fixture
def store(backend: Backend) -> Iterator[Store]:
    """A store of the backend."""
    opened = backend.open()
    yield opened
    opened.close()


def one(store: Store, op: Op) -> Reply:
    return store.apply([op])[0]


def claim(store: Store, key: str) -> Claimed:
    reply = one(store, Claim(key))
    assert isinstance(reply, Claimed), reply
    return reply


def until(what: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait for ``what`` to become true."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return found


def contend(backend: Backend, work: Callable[..., Any], *args: Any) -> list[Any]:
    """``work(store, number, *args)`` by four at once: processes where the store is shared, else threads."""
    if backend.shared:
        with ProcessPoolExecutor(4, SPAWN) as pool:
            return list(
                pool.map(in_process, *zip(*[(work, backend.url, n, *args) for n in range(4)], strict=True))
            )
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda n: work(backend.open(), n, *args), range(4)))


def in_process(work: Callable[..., Any], url: str, number: int, *args: Any) -> Any:
    store = open_store(url)
    try:
        return work(store, number, *args)
    finally:
        store.close()


# ------------------------------------------------------------------ 1: one winner


def claim_all(store: Store, number: int, count: int) -> list[str]:
    """Claim every key, in an order and in batches of one's own, and complete what was won."""
    chance = random.Random(number)
    keys = [f"k/{n}" for n in range(count)]
    chance.shuffle(keys)
    won = []
    while keys:
        batch = [keys.pop() for _ in range(min(len(keys), chance.randint(1, 40)))]
        replies = store.apply([Claim(key) for key in batch])
        mine = [(key, reply) for key, reply in zip(batch, replies, strict=True) if isinstance(reply, Claimed)]
        won += [key for key, _ in mine]
        store.apply([Complete(key, reply.token) for key, reply in mine])
    return won


def test_of_simultaneous_claims_exactly_one_wins(backend: Backend) -> None:
    """Law 1: four claim the same 2000 keys; each key is won once."""
    won = Counter(key for winners in contend(backend, claim_all, 2000) for key in winners)

    assert len(won) == 2000
    assert set(won.values()) == {1}


def test_the_same_key_twice_in_a_batch_is_claimed_once(store: Store) -> None:
    """Law 9: the second line of a batch sees what the first did."""
    first, second, third = store.apply([Claim("a"), Claim("a"), Claim("b")])

    assert isinstance(first, Claimed)
    assert isinstance(second, Busy)
    assert second.token == first.token
    assert isinstance(third, Claimed)


# ------------------------------------------------------------------ 2, 3, 4: done, free, tokens


def test_what_is_recalled_is_what_a_claim_would_hear(store: Store) -> None:
    """Of done keys, and perhaps nothing; never of one that is free, mine, parked or forgotten."""
    assert store.recall("done") is None
    done, parked = claim(store, "done"), claim(store, "parked")
    assert store.recall("done") is None
    store.apply([Complete("done", done.token, b"7", b"print"), Park("parked", parked.token, "bad")])

    assert store.recall("done") in (None, one(store, Claim("done")))
    assert store.recall("parked") is None
    store.apply([Forget("done", done.token)])
    assert store.recall("done") is None
    store.close()
    with pytest.raises(Closed):
        store.recall("done")


@pytest.mark.parametrize(
    "result",
    # An id, for a test's name is in the environment of what it starts, which cannot be so long.
    [None, b"", b"0", b"null", b"[]", pytest.param(b"\x00\xff" * 40_000, id="large")],
)
def test_done_answers_with_the_same_bytes(backend: Backend, result: bytes | None) -> None:
    """Law 2: falsy results, none, and any bytes; to everybody, and after a restart."""
    store = backend.open()
    token = claim(store, "a").token
    assert one(store, Complete("a", token, result, b"print")) == Applied()
    if backend.shared:
        store.close()
        store = backend.open()

    for _ in range(2):
        reply = one(store, Claim("a"))
        assert isinstance(reply, Done)
        assert (reply.token, reply.result, reply.fingerprint) == (token, result, b"print")
    assert one(store, Complete("a", token, b"other")) == Applied()
    assert one(store, Get("a")) == reply


def test_after_release_the_key_is_free_and_attempts_count_on(store: Store) -> None:
    """Law 3."""
    first = claim(store, "a")
    assert one(store, Release("a", first.token, first.attempt)) == Applied()
    assert one(store, Get("a")) == Free(1)
    second = claim(store, "a")
    assert second.attempt == 2
    assert one(store, Release("a", second.token, 0)) == Applied()
    assert one(store, Get("a")) == Free(0)
    assert claim(store, "a").attempt == 1


def test_tokens_only_grow(store: Store) -> None:
    """Law 4: through release, park, takeover and forget."""
    tokens = []
    for _ in range(3):
        mine = claim(store, "a")
        assert one(store, Park("a", mine.token, "because")) == Applied()
        parked = one(store, Get("a"))
        assert isinstance(parked, Parked)
        taken = one(store, Takeover("a", parked.token))
        assert isinstance(taken, Claimed)
        assert one(store, Complete("a", taken.token)) == Applied()
        assert one(store, Forget("a", taken.token)) == Applied()
        tokens += [mine.token, parked.token, taken.token]

    assert tokens == sorted(set(tokens))


# ------------------------------------------------------------------ 5: fencing


def test_a_token_that_is_not_current_changes_nothing(store: Store) -> None:
    """Law 5: for every state of the key and every operation that names a token."""
    claimed, parked, done, doubt = (claim(store, key).token for key in ("claimed", "parked", "done", "doubt"))
    store.apply([Park("parked", parked, "because"), Complete("done", done, b"1"), Abandon("doubt", doubt)])
    keys = ("claimed", "parked", "done", "doubt", "free")
    before = store.apply([Get(key) for key in keys])

    for stale in (claimed - 1, doubt + (1 << 40)):  # a token of Redis is a time; this one is far away
        for key, state in zip(keys, before, strict=True):
            ops: list[Op] = [
                Complete(key, stale, b"2"),
                Release(key, stale, 1),
                Park(key, stale, "no"),
                Abandon(key, stale),
                Forget(key, stale),
            ]
            assert store.apply(ops) == [Lost(state)] * 5  # type: ignore[arg-type]
            assert one(store, Takeover(key, stale)) == state
    assert store.apply([Get(key) for key in keys]) == before


def test_only_a_claim_can_be_settled_and_only_a_record_forgotten(store: Store) -> None:
    """Law 5: the right token, but not of a thing that this can be done to."""
    mine, before, done = (claim(store, key).token for key in ("mine", "parked", "done"))
    _, _, state = store.apply([Park("parked", before, "because"), Complete("done", done), Get("parked")])
    assert isinstance(state, Parked)
    parked = state.token

    assert isinstance(one(store, Forget("mine", mine)), Lost)
    assert isinstance(one(store, Takeover("mine", mine)), Busy)
    assert isinstance(one(store, Takeover("done", done)), Done)
    for key, token in (("parked", parked), ("done", done)):
        assert isinstance(one(store, Release(key, token, 1)), Lost)
        assert isinstance(one(store, Abandon(key, token)), Lost)
        assert isinstance(one(store, Park(key, token, "again")), Lost)
    assert isinstance(one(store, Complete("parked", parked)), Lost)


# ------------------------------------------------------------------ 6, 7: doubt


def test_an_abandoned_claim_is_in_doubt(store: Store) -> None:
    """Law 6: by its holder's own word; it can still be completed until somebody takes it."""
    mine = claim(store, "a")
    assert one(store, Abandon("a", mine.token)) == Applied()
    state = one(store, Claim("a"))
    assert isinstance(state, Doubt)
    assert (state.token, state.attempt) == (mine.token, 1)
    assert one(store, Complete("a", mine.token, b"1")) == Applied()
    assert isinstance(one(store, Claim("a")), Done)


def test_a_doubt_taken_over_and_not_started_costs_no_attempt(store: Store) -> None:
    """Law 6: back in doubt, under the taker's token, with the attempts that there were."""
    mine = claim(store, "a")
    store.apply([Abandon("a", mine.token)])
    for _ in range(3):
        doubt = one(store, Claim("a"))
        assert isinstance(doubt, Doubt)
        assert doubt.attempt == 1
        taken = one(store, Takeover("a", doubt.token))
        assert isinstance(taken, Claimed)
        assert taken.attempt == 2
        assert one(store, Abandon("a", taken.token, 1)) == Applied()


def test_a_parked_key_waits_for_a_person(store: Store) -> None:
    """A claim of it is refused with the reason; taken over and abandoned it is parked again."""
    mine = claim(store, "a")
    assert one(store, Park("a", mine.token, "because")) == Applied()
    state = one(store, Claim("a"))
    assert isinstance(state, Parked)
    assert (state.reason, state.attempt) == ("because", 1)
    taken = one(store, Takeover("a", state.token))
    assert isinstance(taken, Claimed)
    assert one(store, Abandon("a", taken.token)) == Applied()
    assert isinstance(one(store, Claim("a")), Parked)


def test_who_saw_a_doubt_does_not_take_what_came_after_it(store: Store) -> None:
    """Laws 5 and 7: its token is not the current one of what was parked since, nor of a newer doubt."""
    parked, newer = claim(store, "parked"), claim(store, "newer")
    for mine, key in ((parked, "parked"), (newer, "newer")):
        assert one(store, Abandon(key, mine.token)) == Applied()
    first = one(store, Takeover("newer", newer.token))
    assert isinstance(first, Claimed)
    assert one(store, Abandon("newer", first.token)) == Applied()
    assert one(store, Park("parked", parked.token, "late")) == Applied()

    kept, doubt = store.apply([Takeover("parked", parked.token), Takeover("newer", newer.token)])

    assert isinstance(kept, Parked)
    assert kept.token > parked.token
    assert doubt == one(store, Get("newer"))
    assert isinstance(doubt, Doubt)
    assert doubt.token == first.token


def take_all(store: Store, number: int, tokens: dict[str, int]) -> list[str]:
    replies = store.apply([Takeover(key, token) for key, token in tokens.items()])
    return [key for key, reply in zip(tokens, replies, strict=True) if isinstance(reply, Claimed)]


def test_of_takers_of_a_doubt_exactly_one_wins(backend: Backend) -> None:
    """Law 7: four take the same 500 doubts."""
    store = backend.open()
    tokens = {f"k/{n}": claim(store, f"k/{n}").token for n in range(500)}
    store.apply([Abandon(key, token) for key, token in tokens.items()])

    won = Counter(key for taken in contend(backend, take_all, tokens) for key in taken)

    assert len(won) == 500
    assert set(won.values()) == {1}


def hold(url: str, keys: list[str], conn: Any) -> None:
    """Claim ``keys``, say so, and try to complete them when told to."""
    store = open_store(url)
    tokens = [claim(store, key).token for key in keys]
    conn.send(tokens)
    conn.recv()
    conn.send(store.apply([Complete(key, token, b"late") for key, token in zip(keys, tokens, strict=True)]))
    conn.recv()


class Holder:
    """Another process that holds claims."""

    def __init__(self, url: str, *keys: str) -> None:
        self.conn, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=hold, args=(url, list(keys), theirs), daemon=True)
        self.process.start()
        assert self.conn.poll(30)
        self.tokens: list[int] = self.conn.recv()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.join()

    def complete(self) -> list[Reply]:
        self.conn.send(None)
        assert self.conn.poll(30)
        replies: list[Reply] = self.conn.recv()
        return replies


@pytest.fixture
def shared(tmp_path: Path, request: pytest.FixtureRequest) -> Backend:
    """A backend that several processes reach."""
    return BACKENDS[request.param](request, tmp_path)


only_shared = pytest.mark.parametrize("shared", SHARED, indirect=True)


@only_shared
def test_a_killed_sessions_claim_is_in_doubt_to_everybody(shared: Backend) -> None:
    """Law 6: after kill -9, for those who were there and for those who come later."""
    query = "?session=1s"
    here = shared.open(query)
    holder = Holder(shared.url + query, "a", "b")
    assert isinstance(one(here, Claim("a")), Busy)
    holder.signal(signal.SIGKILL)

    state = until(lambda: isinstance(found := one(here, Claim("a")), Doubt) and found)

    assert (state.token, state.attempt) == (holder.tokens[0], 1)
    later = shared.open()
    assert isinstance(one(later, Get("a")), Doubt)
    taken = one(later, Takeover("a", state.token))
    assert isinstance(taken, Claimed)
    assert taken.attempt == 2
    assert isinstance(one(here, Claim("a")), Busy)
    assert isinstance(one(here, Get("b")), Doubt)
    later.close()
    here.close()


@only_shared
def test_a_paused_owner_finds_its_claim_lost(shared: Backend) -> None:
    """Laws 5 and 6: stopped past its session, overtaken, resumed: it changes nothing.

    The key that nobody took meanwhile it still completes.
    """
    query = "?session=1s"
    here = shared.open(query)
    holder = Holder(shared.url + query, "taken", "left")
    holder.signal(signal.SIGSTOP)
    state = until(lambda: isinstance(found := one(here, Claim("taken")), Doubt) and found)
    taken = one(here, Takeover("taken", state.token))
    assert isinstance(taken, Claimed)
    assert one(here, Complete("taken", taken.token, b"mine")) == Applied()
    holder.signal(signal.SIGCONT)

    replies = holder.complete()

    assert isinstance(replies[0], Lost)
    assert replies[1] == Applied()
    done = one(here, Get("taken"))
    assert isinstance(done, Done)
    assert (done.token, done.result) == (taken.token, b"mine")
    holder.signal(signal.SIGKILL)
    here.close()


@only_shared
def test_a_closed_sessions_claims_are_in_doubt_at_once(shared: Backend) -> None:
    """Law 6: nobody has to wait for a session that said goodbye."""
    store, other = shared.open(), shared.open()
    claim(store, "a")
    store.close()

    assert isinstance(one(other, Claim("a")), Doubt)
    other.close()


@only_shared
@pytest.mark.parametrize("used", [False, True])
def test_a_forked_child_opens_its_own_session(shared: Backend, used: bool) -> None:
    """What the parent holds is busy to the child, and stays the parent's when the child dies.

    A driver that cannot be forked after its first use says so in the child, and changes nothing.
    """
    with ProcessPoolExecutor(1, SPAWN) as pool:
        code, child, parent = pool.submit(fork, shared.url, used).result()

    if used and not shared.forks_after_use:
        assert (code, child) == (3, Free(0))
    else:
        assert code == 0
        assert isinstance(child, Busy | Doubt)
    assert parent == Applied()


def fork(url: str, used: bool) -> tuple[int, Reply, Reply]:
    """In a fresh process: the child's exit code, its key's state, and what became of the parent's claim."""
    store = open_store(url)
    mine = claim(store, "parent") if used else None
    child = os.fork()
    if child == 0:
        os._exit(in_child(store, used))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    mine = mine or claim(store, "parent")
    state, done = one(store, Get("child")), one(store, Complete("parent", mine.token))
    store.close()
    return code, state, done


def in_child(store: Store, used: bool) -> int:
    try:
        fine = not used or isinstance(one(store, Claim("parent")), Busy)
        return 0 if fine and isinstance(one(store, Claim("child")), Claimed) else 1
    except ConfigError:
        return 3


# ------------------------------------------------------------------ 8: retention


def test_done_lasts_for_the_retention_and_then_goes(backend: Backend) -> None:
    """Law 8 (N12): and a parked key, and one in doubt, do not go."""
    store = backend.open("?retention=1s")
    for key in ("done", "free", "parked", "doubt"):
        claim(store, key)
    tokens = {key: state.token for key, state in store.scan()}  # type: ignore[union-attr]
    store.apply(
        [
            Complete("done", tokens["done"]),
            Release("free", tokens["free"], 3),
            Park("parked", tokens["parked"], "because"),
            Abandon("doubt", tokens["doubt"]),
        ]
    )
    assert isinstance(one(store, Claim("done")), Done)
    assert one(store, Get("free")) == Free(3)

    until(lambda: one(store, Get("done")) == Free(0))

    assert one(store, Get("free")) == Free(0)
    assert isinstance(one(store, Get("parked")), Parked)
    assert isinstance(one(store, Get("doubt")), Doubt)
    assert {key for key, _ in store.scan()} == {"parked", "doubt"}
    assert claim(store, "done").token > tokens["done"]
    store.close()


# ------------------------------------------------------------------ 9, 12, and the rest of the port


def test_a_batch_may_mix_everything(store: Store) -> None:
    """Law 9: operations apply in order, each seeing those before it."""
    token = claim(store, "a").token
    replies = store.apply(
        [
            Complete("a", token, b"1"),
            Claim("a"),
            Claim("b"),
            Get("b"),
            Claim("c"),
            Forget("a", token),
            Claim("a"),
        ]
    )

    assert [type(reply) for reply in replies] == [Applied, Done, Claimed, Busy, Claimed, Applied, Claimed]
    assert store.apply([]) == []


KEYS = [
    "n/" + name
    for name in (
        "urn:isbn:0451450523", "https://shop.example/orders 7f3a", "..", "../../etc/passwd", "/", "a/b/c",
        "a b", "tab\tnewline\nreturn\r", "nul\0nul", "%00", "%", "*", "{}", "{key}", "#", "?", "'", '"',
        "\\", "$1", ":a",
        "é", "e\u0301", "日本語", "🦉", "\u200b", "\x7f", "\ufeff", "null", "true", "x" * 1024,
    )
]  # fmt: skip


def test_keys_may_be_anything(store: Store) -> None:
    """Every key is itself and no other, in batches, looks and scans."""
    replies = store.apply([Claim(key) for key in KEYS])
    assert all(isinstance(reply, Claimed) for reply in replies)
    store.apply([Complete(k, r.token, k.encode()) for k, r in zip(KEYS, replies, strict=True)])  # type: ignore[union-attr]

    for key, reply in zip(KEYS, store.apply([Get(key) for key in KEYS]), strict=True):
        assert isinstance(reply, Done)
        assert reply.result == key.encode()
    assert sorted(key for key, _ in store.scan()) == sorted(KEYS)
    assert {key for key, _ in store.scan("n/%")} == {"n/%", "n/%00"}


def test_scan_goes_page_by_page(store: Store) -> None:
    """In order, from after the last of the page before, below a prefix."""
    store.apply([Claim(f"{name}/{n:03}") for name in ("a", "b") for n in range(120)])
    keys: list[str] = []
    while page := store.scan("b/", after=keys[-1] if keys else "", limit=50):
        keys += [key for key, _ in page]

    assert keys == [f"b/{n:03}" for n in range(120)]


def test_wait_returns_when_the_claim_ends(backend: Backend) -> None:
    """At once when it is over already, when another thread completes it, or at the time-out."""
    store = backend.open()
    token = claim(store, "a").token
    began = time.monotonic()
    store.wait("a", token, 0.2)
    assert time.monotonic() - began >= 0.2
    timer = threading.Timer(0.2, lambda: one(store, Complete("a", token)))
    timer.start()
    store.wait("a", token, 30.0)
    assert isinstance(one(store, Get("a")), Done)
    store.wait("a", token, 30.0)
    timer.join()
    assert time.monotonic() - began < 20
    store.close()


def test_many_threads_share_a_store(store: Store) -> None:
    """Each caller gets the replies to its own operations."""

    def work(number: int) -> bool:
        keys = [f"{number}/{n}" for n in range(20)]
        tokens = [claim(store, key).token for key in keys]
        return store.apply([Complete(k, t) for k, t in zip(keys, tokens, strict=True)]) == [Applied()] * 20

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))
    assert len(store.scan(limit=1000)) == 320


def test_after_close_every_call_raises(backend: Backend) -> None:
    """Law 12."""
    store = backend.open()
    claim(store, "a")
    store.close()
    calls: list[Callable[[], Any]] = [
        lambda: store.apply([Claim("a")]),
        lambda: store.apply([]),
        lambda: store.wait("a", 1, 0.1),
        lambda: store.scan(),
        lambda: store.fresh(),
    ]
    for call in calls:
        with pytest.raises(Closed):
            call()
    store.close()


def test_a_used_session_is_fresh(store: Store) -> None:
    """Right after an answer a handler may start."""
    claim(store, "a")
    assert store.fresh()


@only_shared
def test_nothing_connects_before_the_first_use(
    shared: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening touches neither file nor server."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it connects")

    monkeypatch.setattr("idemp.stores.sqlite.sqlite3.connect", refuse)
    monkeypatch.setattr("idemp.stores.etcd_client.grpc.insecure_channel", refuse)
    store = shared.open()
    store.close()
    assert list(tmp_path.iterdir()) == []


@only_shared
def test_the_longest_retention_named_is_everybodys(shared: Backend) -> None:
    """It belongs to the namespace, not to an opener, and is never shortened by one."""
    first, second = shared.open("?retention=2h"), shared.open("?retention=1h")
    first.apply([])
    second.apply([])

    assert second.retention == 7200.0
    first.close()
    second.close()


# ------------------------------------------------------------------ all laws at once, at random


@pytest.mark.parametrize("seed", range(3))
def test_random_histories_keep_the_laws(backend: Backend, seed: int) -> None:
    """Laws 1 to 5 and 7 over thousands of random operations by three sessions on five keys."""
    chance = random.Random(seed)
    stores = [backend.open() for _ in range(3)]
    current: dict[str, int] = {}  # the token of the claim that holds the key now
    last: dict[str, int] = {}  # the highest token of the key so far
    done: dict[str, bytes] = {}
    for _ in range(400):
        batch = [random_op(chance, last) for _ in range(chance.randint(1, 8))]
        for op, reply in zip(batch, chance.choice(stores).apply(batch), strict=True):
            check(op, reply, current, last, done)
            if isinstance(op, Forget) and reply == Applied():
                # A replica may answer done from memory until it has heard; a look makes it listen.
                for store in stores:
                    store.apply([Get(op.key)])
    for store in stores:
        store.close()


def random_op(chance: random.Random, last: dict[str, int]) -> Op:
    key = chance.choice("abcde")
    token = max(0, last.get(key, 0) - chance.choice([0, 0, 0, 1]))
    ops: list[Op] = [
        Claim(key),
        Claim(key),
        Get(key),
        Complete(key, token, str(token).encode()),
        Release(key, token, chance.randint(0, 3)),
        Park(key, token, "because"),
        Abandon(key, token),
        Takeover(key, token),
        Forget(key, token),
    ]
    return chance.choice(ops)


def check(
    op: Op, reply: Reply, current: dict[str, int], last: dict[str, int], done: dict[str, bytes]
) -> None:
    key = op.key
    match op, reply:
        case ((Claim() | Takeover()), Claimed(token)):
            assert token > last.get(key, 0), "tokens grow"
            assert key not in done, "done is never claimed"
            assert isinstance(op, Takeover) or key not in current, "one winner"
            current[key] = last[key] = token
        case _, Applied():
            assert op.token == last[key], "only the current token changes anything"  # type: ignore[union-attr]
            if isinstance(op, Complete):
                done.setdefault(key, op.result or b"")
            if isinstance(op, Forget):
                done.pop(key, None)
            if not isinstance(op, Abandon | Park):
                current.pop(key, None)
        case _, (Parked(token) | Lost(Parked(token))):
            assert token >= last[key], "tokens grow"
            last[key] = token
        case _, Done(token, result):
            assert done[key] == result, "the same bytes"
        case _, Lost(Done(token, result)):
            assert done[key] == result, "nothing changed"
        case _, (Free() | Lost(Free())):
            assert key not in current
            assert key not in done


@pytest.mark.parametrize("kind", SHARED)
def test_a_look_sees_what_another_session_forgot(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """`Get` is answered from what holds now: the claim behind it is not called done any more."""
    backend = BACKENDS[kind](request, tmp_path)
    mine, theirs = backend.open(), backend.open()
    for number in range(30):
        key = f"k/{number}"
        [claim] = mine.apply([Claim(key)])
        assert isinstance(claim, Claimed)
        mine.apply([Complete(key, claim.token, b"1")])
        [done] = theirs.apply([Get(key)])
        assert isinstance(done, Done)
        assert mine.apply([Forget(key, claim.token)]) == [Applied()]
        assert theirs.apply([Get(key)]) == [Free()]
        assert isinstance(theirs.apply([Claim(key)])[0], Claimed)
    mine.close()
    theirs.close()
