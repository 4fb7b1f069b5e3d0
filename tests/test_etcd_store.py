"""What only the etcd store has: lost replies, restarts, a silent watch, the keeping of the journal."""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idemp import ConfigError, open_store
from idemp.errors import StoreUnavailable
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
    Free,
    Get,
    Op,
    Park,
    Store,
)
from idemp.stores import etcd, etcd_of
from idemp.stores.etcd import SLICES, EtcdStore
from idemp.stores.etcd_client import (
    Client,
    Compacted,
    NoSpace,
    Overloaded,
    Put,
    Unreachable,
    Unsure,
    Watch,
    WatchBatch,
    WentBack,
)
from idemp.stores.etcd_health import Health, findings, keep_looking, look
from idemp.stores.etcd_replica import Layout
from idemp.stores.records import LINES, encode
from tests.servers import Etcd, need
from tests.service import stand
from tests.test_etcd_client import fill, secured


class Wire(Client):
    """A client whose transactions and watch a test can hinder."""

    def __init__(self, endpoints: list[str]) -> None:
        super().__init__(endpoints)
        self.lose: Callable[[], bool] = lambda: False  # the reply of a transaction that took effect
        self.drop: Callable[[WatchBatch], bool] = lambda batch: False  # what the watch brings
        self.calls = 0  # transactions
        self.requests = 0

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        self.requests += 1
        return super()._call(*args, **kwargs)

    def txn(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        result = super().txn(*args, **kwargs)
        if self.lose():
            raise Unsure("the reply was lost")
        return result

    def watch(self, prefix: str, start_revision: int, deliver: Any, progress_notify: bool = False) -> Any:
        def filtered(batch: WatchBatch) -> None:
            if not self.drop(batch):
                deliver(batch)

        return super().watch(prefix, start_revision, filtered, progress_notify)


Make = Callable[..., tuple[Store, Wire]]


@pytest.fixture
def make(etcd: Etcd, unique: str) -> Iterator[Make]:
    """Opens stores on one namespace, each on a wire of its own."""
    opened: list[tuple[Store, Wire]] = []

    def build(retention: float = 3600.0, session_ttl: float = 10.0) -> tuple[Store, Wire]:
        wire = Wire(etcd.endpoints)
        store = EtcdStore(lambda: wire, unique, retention=retention, session_ttl=session_ttl)
        store.apply([])
        opened.append((store, wire))
        return opened[-1]

    yield build
    for store, wire in opened:
        wire.lose, wire.drop = lambda: False, lambda batch: False
        store.close()


def one(store: Store, op: Any) -> Any:
    return store.apply([op])[0]


def until(what: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_what_any_replica_did_is_recalled_without_asking_etcd(make: Make) -> None:
    """A duplicate costs etcd nothing; a memory that is not trusted recalls nothing."""
    here, _ = make()
    there, wire = make()
    claim = one(here, Claim("a"))
    here.apply([Complete("a", claim.token, b"7", b"print")])
    until(lambda: there.recall("a"))

    before = wire.requests
    known = there.recall("a")
    assert isinstance(known, Done)
    assert (known.token, known.result, known.fingerprint) == (claim.token, b"7", b"print")
    assert known == one(there, Claim("a"))
    assert there.recall("b") is None
    assert wire.requests == before
    there._session._replica.distrust("for a test")  # type: ignore[attr-defined]
    assert there.recall("a") is None
    assert one(there, Claim("a")) == known
    assert there.recall("a") == known


def times(n: int) -> Callable[[], bool]:
    """True ``n`` times, then false."""
    left = [n]

    def lose() -> bool:
        left[0] -= 1
        return left[0] >= 0

    return lose


def test_a_lost_reply_is_resolved(make: Make) -> None:
    """Law 10: the same append is sent again, and its else branch says that it was applied."""
    store, wire = make()
    one(store, Claim("warm"))
    wire.lose = times(1)
    claimed = one(store, Claim("a"))
    assert claimed == Claimed(claimed.token, 1)
    wire.lose = times(2)
    assert one(store, Complete("a", claimed.token, b"1")) == Applied()
    assert one(store, Claim("a")).result == b"1"


def test_a_claim_that_nobody_heard_of_is_given_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 10: after `StoreUnavailable` no claim of the batch is held."""
    monkeypatch.setattr("idemp.stores.etcd.PATIENCE", 0.3)
    store, wire = make()
    other, _ = make()
    wire.lose = lambda: True
    with pytest.raises(StoreUnavailable):
        one(store, Claim("a"))
    wire.lose = lambda: False
    assert isinstance(one(store, Claim("b")), Claimed)
    assert one(other, Get("a")) == Free(0)
    assert one(other, Claim("a")).attempt == 1


def test_a_refusal_after_a_lost_reply_settles_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first sending took effect; that the second was refused does not undo it."""
    (store, wire), (other, _) = make(), make()
    transact, fates = wire.txn, iter(["lost", "refused"])

    def txn(*args: Any, **kwargs: Any) -> Any:
        fate = next(fates, "")
        if fate == "refused":
            raise Overloaded("too many requests")
        result = transact(*args, **kwargs)
        if fate == "lost":
            raise Unsure("the reply was lost")
        return result

    monkeypatch.setattr(wire, "txn", txn)
    with pytest.raises(StoreUnavailable):
        store.apply([Claim("a")])
    assert isinstance(one(store, Claim("b")), Claimed)
    assert isinstance(one(other, Claim("a")), Claimed), "nobody heard of that claim, so it was given back"
    assert isinstance(one(other, Claim("b")), Busy)


def test_claims_of_a_batch_that_broke_in_the_middle_are_given_back(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took several appends; the second could not be sent, so nobody heard of what the first had won."""
    monkeypatch.setattr("idemp.stores.etcd.MOST", 2)
    monkeypatch.setattr("idemp.stores.etcd.PATIENCE", 0.3)
    (store, wire), (other, _) = make(), make()
    store.apply([])
    transact, broken = wire.txn, [b"\nC c", b"\nR a"]

    def txn(*args: Any, **kwargs: Any) -> Any:
        written = b"".join(each.value for each in args[1] if isinstance(each, Put))
        if any(line in written for line in broken):
            raise Overloaded("too many requests")
        return transact(*args, **kwargs)

    monkeypatch.setattr(wire, "txn", txn)
    with pytest.raises(StoreUnavailable):
        store.apply([Claim("a"), Claim("b"), Claim("c")])
    assert isinstance(one(other, Claim("a")), Busy)
    with pytest.raises(StoreUnavailable):
        store.apply([Claim("d")])  # the giving back could not be sent either
    broken.clear()
    assert isinstance(one(store, Claim("e")), Claimed)
    assert isinstance(one(other, Get("a")), Free)  # which asks; a claim might be told what was heard before
    assert [type(state) for state in other.apply([Claim("a"), Claim("b"), Claim("c")])] == [Claimed] * 3
    assert one(other, Get("a")).attempt == 1


def test_what_the_watch_does_not_bring_is_fetched(make: Make) -> None:
    """The tails tell that something precedes; nobody decides without it."""
    store, wire = make()
    other, _ = make()
    one(store, Claim("warm"))
    wire.drop = lambda batch: bool(batch.events)
    claimed = one(other, Claim("a"))
    one(other, Complete("a", claimed.token, b"1"))

    began = time.monotonic()
    state = one(store, Claim("a"))

    assert isinstance(state, Done)
    assert state.result == b"1"
    assert time.monotonic() - began < 8


def test_one_event_that_is_dropped_is_noticed(make: Make) -> None:
    """A gap in a session's appends, or a late one, makes the memory untrusted until it is read anew."""
    store, wire = make()
    other, _ = make()
    drop = times(1)
    wire.drop = lambda batch: bool(batch.events) and drop()
    first = one(other, Claim("a"))
    one(other, Claim("b"))
    assert one(other, Complete("a", first.token)) == Applied()
    assert isinstance(one(store, Claim("a")), Done)
    assert isinstance(one(store, Claim("b")), Busy)


@given(
    st.lists(
        st.builds(Claim, st.text(max_size=30))
        | st.builds(Complete, st.text(max_size=3), st.just(1), st.none() | st.binary(max_size=200), st.none())
        | st.builds(Park, st.text(max_size=3), st.just(1), st.text(max_size=50)),
        max_size=30,
    )
)
def test_what_fits_into_one_append(ops: list[Op]) -> None:
    """The quick answer never says so of what the exact one divides; nothing is left out, or out of order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(etcd, "MOST_BYTES", 1000)
        fits, parts = etcd._fit(ops, 20), etcd._parts(ops, 20)
        patch.setattr(etcd, "_fit", lambda ops, most: False)
        exact = etcd._parts(ops, 20)
    assert [op for part in parts for op in part] == ops
    assert [list(part) for part in parts] == [list(part) for part in exact]
    assert len(exact) == 1 or not fits
    for part in parts:
        assert sum(map(etcd._weight, part)) <= 1000 or len(part) == 1
        assert len(part) <= 20


def test_an_import_may_outlast_a_session(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one comes before there is a lease; during a later one the lease is kept."""
    quick = Wire.watch

    def slow(self: Wire, *args: Any, **kwargs: Any) -> Any:
        time.sleep(4.0)
        return quick(self, *args, **kwargs)

    monkeypatch.setattr(Wire, "watch", slow)
    store, _ = make(session_ttl=2.0)
    session: Any = store._session  # type: ignore[attr-defined]
    mine = session._id
    claim = one(store, Claim("a"))
    assert (session._id, type(claim)) == (mine, Claimed)
    session._replica.distrust("for a test")
    assert isinstance(one(store, Claim("b")), Claimed)
    assert session._id == mine
    assert one(store, Complete("a", claim.token)) == Applied()


def test_a_duplicate_costs_no_round_trip(make: Make) -> None:
    """Done is answered from memory."""
    store, _ = make()
    other, there = make()
    claimed = one(store, Claim("a"))
    one(store, Complete("a", claimed.token, b"1"))
    until(lambda: isinstance(one(other, Claim("a")), Done))
    before = there.calls
    for _ in range(1000):
        assert one(other, Claim("a")).result == b"1"
    assert there.calls - before <= 3, "only the keeper spoke"


def test_a_million_remembered_ids(own_etcd: Etcd, capsys: pytest.CaptureFixture[str]) -> None:
    """All are there when it is ready, and the first duplicate is skipped without a single request."""
    layout, wire = Layout("m"), Wire(own_etcd.endpoints)
    for seq in range(1, 251):
        keys = [f"h/{seq:06d}{n:026d}" for n in range(4000)]
        claims = encode(time.time(), [*map(Claim, keys)])
        at = wire.put(layout.log(0, "writer", 2 * seq - 1), claims).revision * LINES
        done = [Complete(key, at + line, b"null") for line, key in enumerate(keys)]
        wire.put(layout.log(0, "writer", 2 * seq), encode(time.time(), done))
    store = EtcdStore(lambda: wire, "m", retention=86_400, session_ttl=10.0)
    began = time.perf_counter()
    store.apply([])
    took = time.perf_counter() - began
    before = wire.requests
    assert isinstance(one(store, Claim(f"h/{7:06d}{9:026d}")), Done)
    assert wire.requests == before
    assert isinstance(one(store, Claim("h/another")), Claimed)
    found = store._mine()._replica.journal.remembered()  # type: ignore[attr-defined]
    store.close()
    with capsys.disabled():
        print(f" [1 000 000 ids ready in {took:.1f} s]", end="")
    assert found == 1_000_000


def test_a_waiter_is_woken_by_the_watch(make: Make) -> None:
    """No polling: it hears of the completion by another process's append."""
    store, _ = make()
    other, there = make()
    claimed = one(store, Claim("a"))
    assert isinstance(one(other, Claim("a")), Busy)
    before = there.calls
    other.wait("a", claimed.token, 0.2)
    one(store, Complete("a", claimed.token))
    began = time.monotonic()
    other.wait("a", claimed.token, 20.0)
    assert time.monotonic() - began < 5
    assert there.calls - before <= 3
    assert isinstance(one(other, Claim("a")), Done)


def test_a_lost_session_is_replaced_and_its_claims_completed(make: Make, etcd: Etcd, unique: str) -> None:
    """The lease is revoked behind our back: a new session takes the claim over, if nobody was first."""
    store, _ = make()
    claimed = one(store, Claim("a"))
    admin = Client(etcd.endpoints)
    [presence] = admin.range(Layout(unique).sessions, prefix=True).pairs
    admin.lease_revoke(presence.lease)
    assert one(store, Complete("a", claimed.token, b"1")) == Applied()
    assert one(store, Claim("a")).result == b"1"
    [renewed] = admin.range(Layout(unique).sessions, prefix=True).pairs
    assert renewed.key != presence.key
    admin.close()


def test_a_session_that_begins_while_freshness_is_asked(make: Make) -> None:
    """Its presence is not taken for that of the session that made the claim."""
    store, _ = make()
    claimed = one(store, Claim("a"))
    session, steady = store._mine(), Clock().steady  # type: ignore[attr-defined]

    def renewed() -> float:
        session._born, session._alive_at = claimed.token // LINES, steady()
        return float(steady())

    session._clock = Clock(steady=renewed)
    assert not store.fresh(claimed.token)


def test_to_abandon_what_a_lost_session_claimed_is_no_attempt(make: Make, etcd: Etcd, unique: str) -> None:
    """It is in doubt by that loss; to take it over first would count an attempt that nobody made."""
    (store, _), (other, _) = make(), make()
    claimed = one(store, Claim("a"))
    admin = Client(etcd.endpoints)
    presences = admin.range(Layout(unique).sessions, prefix=True).pairs
    [mine] = [pair for pair in presences if pair.key.endswith(store._mine()._id)]  # type: ignore[attr-defined]
    admin.lease_revoke(mine.lease)
    assert one(store, Abandon("a", claimed.token)) == Applied()
    assert one(store, Abandon("a", claimed.token)) == Applied()
    doubt = one(other, Get("a"))
    assert isinstance(doubt, Doubt)
    assert (doubt.token, doubt.attempt) == (claimed.token, 1)
    admin.close()


def test_closed_while_its_keeper_is_about_to_ask(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper's thread ends; pytest makes an error of what a thread raises."""
    store, wire = make()
    store.apply([])
    asked, entered, left = wire.lease_keepalive, threading.Event(), threading.Event()

    def late(lease: int) -> int:
        entered.set()
        while not wire._closed:
            time.sleep(0.01)
        try:
            return asked(lease)
        finally:
            left.set()

    monkeypatch.setattr(wire, "lease_keepalive", late)
    assert entered.wait(30)
    store.close()
    assert left.wait(30)


def test_who_keeps_it_outlasts_a_file_that_was_away(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate that is being replaced when another member has to be asked: the next time it is there."""
    store, wire = make(retention=8.0, session_ttl=3.0)
    left = dict.fromkeys(("lease_keepalive", "range"), 1)
    kept = {name: threading.Event() for name in left}

    def missing(name: str, asked: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **named: Any) -> Any:
            if threading.current_thread().name not in ("idemp-etcd-lease", "idemp-etcd-keeper"):
                return asked(*args, **named)
            if left[name]:
                left[name] -= 1
                raise ConfigError("cannot read ca.pem of the etcd:// URL: No such file or directory")
            kept[name].set()
            return asked(*args, **named)

        return ask

    for name in left:
        monkeypatch.setattr(wire, name, missing(name, getattr(wire, name)))
    for name, event in kept.items():
        assert event.wait(30), name
    until(lambda: store.fresh(one(store, Claim(f"{time.monotonic()}")).token))


def test_a_word_for_the_lease_before_says_nothing_of_this_one(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leader that is cut off still says that it lives, while another session has begun."""
    opened, wire = make()
    session: Any = opened._session  # type: ignore[attr-defined]
    old, began = session._lease, session._clock.steady() - 60
    monkeypatch.setattr(session, "_alive_at", began)

    def late(lease: int) -> int:
        session._lease = old + 1
        return 10

    monkeypatch.setattr(wire, "lease_keepalive", late)
    session._keep_alive()
    session._lease = old
    assert session._alive_at == began


def test_buckets_roll_and_what_is_over_is_deleted(make: Make, etcd: Etcd, unique: str) -> None:
    """Law 8 (N12): etcd holds what the retention explains, and an importer agrees with who was there."""
    store, _ = make(retention=2.0)
    admin, layout = Client(etcd.endpoints), Layout(unique)
    claimed = one(store, Claim("open"))
    began, sizes = time.monotonic(), list[tuple[float, int]]()
    while (now := time.monotonic()) < began + 12:
        keys = [f"k/{now}/{n}" for n in range(20)]
        claims = store.apply([Claim(key) for key in keys])
        store.apply([Complete(k, c.token) for k, c in zip(keys, claims, strict=True)])  # type: ignore[union-attr]
        sizes.append((now, admin.range(layout.logs, prefix=True, keys_only=True).count))
        time.sleep(0.02)
    assert int(admin.range(layout.floor).pairs[0].value) > 8
    for at, size in sizes:
        # The retention, its last slice, and three seconds for who rolls the buckets; two appends a turn.
        lately = sum(at - 5.5 < then <= at for then, _ in sizes)
        assert size <= 2 * lately + 40, "the log has more than the retention explains"
    assert 2 * len(sizes) > sizes[-1][1] + 80, "nothing was deleted"
    other, _ = make()
    assert isinstance(one(other, Get("open")), Busy)
    # A bucket may roll between the two scans.
    until(lambda: {key for key, _ in store.scan("k/")} == {key for key, _ in other.scan("k/")})
    assert one(store, Complete("open", claimed.token)) == Applied()
    admin.close()


def test_what_is_parked_outlives_the_log_whatever_it_says(make: Make, etcd: Etcd, unique: str) -> None:
    """More than one request of etcd's takes goes into a snapshot page by page; it is all there after it."""
    store, _ = make(retention=2.0)
    admin, layout = Client(etcd.endpoints), Layout(unique)
    reasons = {f"parked/{number:02}": f"{number} " + "\n" * 90_000 for number in range(8)}
    for key, reason in reasons.items():
        assert one(store, Park(key, one(store, Claim(key)).token, reason)) == Applied()
    first = int(admin.range(layout.bucket).pairs[0].value)
    until(lambda: int(admin.range(layout.floor).pairs[0].value) > first + 1, 60)
    snapshots = admin.range(layout.snaps, prefix=True, keys_only=True).pairs
    assert len(snapshots) > 10
    other, _ = make()
    assert {key: state.reason for key, state in other.scan("parked/")} == reasons  # type: ignore[union-attr]
    # Begun anew for each bucket, and only of the buckets that count.
    buckets = {pair.key[len(layout.snaps) :].partition("/")[0] for pair in snapshots}
    assert len(buckets) <= SLICES + 3
    admin.close()


def test_etcd_restarts(own_etcd: Etcd) -> None:
    """N16: stopped, killed and started again on its data; what was done is done, and it goes on by itself."""
    store = open_store(f"{own_etcd.url}x")
    claimed = one(store, Claim("a"))
    own_etcd.restart()
    assert one(store, Complete("a", claimed.token, b"1")) == Applied()
    own_etcd.kill()
    own_etcd.start()
    assert isinstance(one(store, Claim("b")), Claimed)
    assert one(store, Claim("a")).result == b"1"
    store.close()


def test_etcd_is_away(own_etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unavailable, in one sentence; nothing is claimed."""
    monkeypatch.setattr("idemp.stores.etcd.PATIENCE", 1.0)
    store = open_store(f"{own_etcd.url}x")
    one(store, Claim("a"))
    own_etcd.stop()
    with pytest.raises(StoreUnavailable):
        one(store, Claim("b"))
    own_etcd.start()
    until(lambda: _claims(store))
    store.close()


def _claims(store: Store) -> bool:
    try:
        return isinstance(one(store, Claim("b")), Claimed | Busy)
    except StoreUnavailable:
        return False


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("etcd://localhost/a b", "etcd namespace"),
        ("etcd://localhost/x?cert=only.pem", "TLS needs cert and key"),
        ("etcd://localhost/x?retention=never", "retention='never' is no duration"),
        ("etcd://localhost/x?ttl=1", "has no option 'ttl'"),
    ],
)
def test_wrong_urls(url: str, sentence: str) -> None:
    """One sentence that names the setting."""
    with pytest.raises(ConfigError, match=sentence):
        open_store(url).apply([])


def test_a_closed_port_is_unavailable() -> None:
    """One sentence that names the host."""
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1"):
        open_store("etcd://127.0.0.1:1/x").apply([])


def test_the_port_may_be_left_out() -> None:
    """Also behind an IPv6, which is in brackets."""
    assert etcd_of("etcd://[::1],[::2]:5,h,h:7/x")[0] == ["[::1]:2379", "[::2]:5", "h:2379", "h:7"]


def test_three_members_lose_their_leader_and_their_quorum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes on without the leader; without a quorum nothing is claimed, and what was done is not forgotten."""
    monkeypatch.setattr("idemp.stores.etcd.PATIENCE", 3.0)
    need("etcd")
    with Etcd(members=3) as cluster:
        store = open_store(f"{cluster.url}x?session=5s")
        first = one(store, Claim("a"))
        leader = cluster.leader()
        cluster.members[leader].kill()
        until(lambda: _completes(store, first.token), 30)
        assert isinstance(one(store, Claim("a")), Done)

        other = (leader + 1) % 3
        cluster.members[other].kill()
        with pytest.raises(StoreUnavailable):
            one(store, Claim("b"))
        for index in (leader, other):
            cluster.members[index].start()
        until(lambda: _claims(store), 30)
        assert isinstance(one(store, Claim("a")), Done)
        store.close()


def _completes(store: Store, token: int) -> bool:
    try:
        return bool(one(store, Complete("a", token)) == Applied())
    except StoreUnavailable:
        return False


# ------------------------------------------------------------------ a cluster that is not what it was


def restore(cluster: Etcd, snapshot: Path, token: str = "") -> None:
    """Start the one member again on what the snapshot has.  ``token``: as another cluster than it was."""
    [member] = cluster.members
    settings = member._runs._environment  # type: ignore[union-attr]
    settings["ETCD_INITIAL_CLUSTER_TOKEN"] = token or settings["ETCD_INITIAL_CLUSTER_TOKEN"]
    same = ("data-dir", "name", "initial-cluster", "initial-cluster-token", "initial-advertise-peer-urls")
    options = [f"--{name}={settings['ETCD_' + name.upper().replace('-', '_')]}" for name in same]
    cluster.stop()
    shutil.rmtree(settings["ETCD_DATA_DIR"])
    etcdctl("snapshot", "restore", str(snapshot), *options)
    cluster.start()


def etcdctl(*words: str) -> None:
    environment = {"ETCDCTL_API": "3", "PATH": os.environ["PATH"]}
    subprocess.run(["etcdctl", *words], env=environment, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("token", "what"),
    [("", r"went back from (revision|append) \d+ .*to \d+"), ("another", "is another cluster than it was")],
    ids=["the same cluster", "another cluster"],
)
def test_a_restored_snapshot_is_noticed(own_etcd: Etcd, tmp_path: Path, token: str, what: str) -> None:
    """F21: what was done since is forgotten there, so nobody who knew of it goes on without a person's word.

    Also who was idle since the snapshot, and whose next transaction etcd would take.
    """
    need("etcdctl")
    busy, idle = open_store(f"{own_etcd.url}x"), open_store(f"{own_etcd.url}x")
    first, _ = one(busy, Claim("a")), one(idle, Claim("b"))
    etcdctl("--endpoints", own_etcd.endpoints[0], "snapshot", "save", str(tmp_path / "snapshot"))
    assert one(busy, Complete("a", first.token)) == Applied()
    until(lambda: isinstance(one(idle, Get("a")), Done))

    restore(own_etcd, tmp_path / "snapshot", token)
    sentence = f"{what}, as after the restore of a snapshot, .*: stop every process"

    for store in (idle, busy):
        for op in (Claim("c"), Get("a"), Claim("d")):
            with pytest.raises(StoreUnavailable, match=sentence):
                one(store, op)
        with contextlib.suppress(StoreUnavailable):
            assert isinstance(one(store, Claim("a")), Done), "who remembers may say so"
        store.close()
    with closing(open_store(f"{own_etcd.url}x")) as anew:
        assert isinstance(one(anew, Claim("c")), Claimed | Busy), "a new start is a person's word"


def test_what_etcd_itself_goes_through_is_no_restore() -> None:
    """Members that lag, elections, a restart, compactions: the revision only grows for who asks in order."""
    need("etcd")
    with Etcd(members=3) as cluster, closing(open_store(f"{cluster.url}x?session=5s")) as store:
        admin = Client(cluster.endpoints)
        for round, member in enumerate((*cluster.members, cluster.members[0])):
            (member.kill if round % 2 else member.pause)()
            for n in range(10):
                until(lambda: _is_claimed(store, f"{round}/{n}"), 30)  # noqa: B023
            (member.start if round % 2 else member.resume)()
            with contextlib.suppress(Compacted, Unreachable, Unsure):
                admin.compact(admin.status().header.revision)
        admin.close()


def _is_claimed(store: Store, key: str) -> bool:
    """Without a majority, or a leader, it may have to be asked again."""
    try:
        return isinstance(one(store, Claim(key)), Claimed | Busy)
    except WentBack:
        raise
    except StoreUnavailable:
        return False


# ------------------------------------------------------------------ a journal of a newer version

NEWER = r"/idemp/v1/{}/: this journal was written by a newer idemp \(it has '{}'\); upgrade this process"


def as_a_newer_one(monkeypatch: pytest.MonkeyPatch, store: Store, line: str) -> None:
    """Let it write a claim of "new", and that line behind it."""

    def written(wall: float, records: Any) -> bytes:
        return encode(wall, records) + f"\n{line}".encode() * (list(records) == [Claim("new")])

    with monkeypatch.context() as newer:
        newer.setattr(etcd, "encode", written)
        assert isinstance(one(store, Claim("new")), Claimed)


@pytest.mark.parametrize("line", ["Z key 7", "R key", "T key x"])
@pytest.mark.parametrize("heard", [True, False])
def test_a_journal_of_a_newer_idemp_is_not_read_on(
    make: Make, unique: str, monkeypatch: pytest.MonkeyPatch, line: str, heard: bool
) -> None:
    """What follows may depend on it: whoever cannot read it says so, to everything, and holds nothing.

    Whether the watch has brought the line or an import finds it.
    """
    (newer, _), (here, wire) = make(), make()
    mine, done = one(here, Claim("mine")), one(here, Claim("done"))
    assert one(here, Complete("done", done.token)) == Applied()
    if not heard:
        wire.drop = lambda batch: True
    as_a_newer_one(monkeypatch, newer, line)
    if heard:
        until(lambda: not here.fresh(), 10)
        assert here.recall("done") is None

    sentence = NEWER.format(unique, line)
    for op in (Claim("theirs"), Get("new"), Complete("mine", mine.token), Claim("done"), Claim("theirs")):
        with pytest.raises(ConfigError, match=sentence):
            one(here, op)
    with pytest.raises(ConfigError, match=sentence):
        here.scan()
    with pytest.raises(ConfigError, match=sentence):
        here.wait("mine", mine.token, 30.0)
    with pytest.raises(ConfigError, match=sentence):
        make()
    assert not here.fresh()
    assert isinstance(one(newer, Get("mine")), Busy)
    if heard:
        assert one(newer, Get("theirs")) == Free(0)
    here.close()
    until(lambda: isinstance(one(newer, Get("mine")), Doubt), 30)


CONSUMER = """
import os
from idemp import Consumer, idempotent, open_store, open_transport

@idempotent(open_store({store!r}), name="app.order")
def order(message):
    os.write(1, b"handled\\n")

consumer = Consumer(open_transport({broker!r}), service="app")
consumer.on("order")(order)
"""


def test_a_consumer_ends_at_a_journal_of_a_newer_idemp(
    etcd: Etcd, unique: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One sentence, exit code 2; the message that it had taken is there for the next one."""
    url, broker = f"{etcd.url}{unique}", f"sqlite:///{tmp_path}/queues.db?visibility=4s"
    (tmp_path / "handlers.py").write_text(CONSUMER.format(store=url, broker=broker))
    code = "import os, sys; os.chdir(sys.argv.pop(1)); from idemp.cli import main; main()"
    with closing(open_store(url)) as newer, stand(broker, tmp_path) as desk:
        program = desk.run("-c", code, str(tmp_path), "consume", "handlers:consumer")
        program.wait_for("taking from app-queue")
        desk.publish(b'{"type":"order","id":"1"}', to="app-queue")
        program.wait_for("1 ok")

        as_a_newer_one(monkeypatch, newer, "Z key 7")
        desk.publish(b'{"type":"order","id":"2"}', to="app-queue")

        assert program.process.wait(60) == 2
        said = program.said()
        last = said.splitlines()[-1]
        assert re.fullmatch(f"idemp: .*{NEWER.format(unique, 'Z key 7')}", last), said
        assert (said.count("Traceback"), said.count("handled\n")) == (0, 1)
        assert not isinstance(one(newer, Get("app.order/2")), Done)
        assert [each.body for each in desk.taken("app-queue", 1)] == [b'{"type":"order","id":"2"}']


# ------------------------------------------------------------------ the health of etcd

FINE = Health("3.4.42", size=100 * 2**20, in_use=90 * 2**20, quota=8 * 2**30, history=1000)


@pytest.mark.parametrize(
    ("health", "sentences"),
    [
        (FINE, []),
        (FINE._replace(history=10**9), ["none of its 1000000000 revisions, .*: start .*auto-compaction"]),
        (FINE._replace(alarms=("NOSPACE",)), ["NOSPACE.*etcdctl compact .*etcdctl defrag.*alarm disarm"]),
        (FINE._replace(alarms=("CORRUPT",)), ["CORRUPT.*its operator must replace it"]),
        (FINE._replace(alarms=("LATER",)), ["etcd raises the alarm LATER"]),
        (
            FINE._replace(size=6 * 2**30, in_use=5 * 2**30),
            ["6144 MiB of 8192 MiB at which it .*: compact it more often, .*--quota-backend-bytes"],
        ),
        (
            FINE._replace(size=6 * 2**30, in_use=2**30),
            ["6144 MiB of 8192 MiB at which it .* only 1024 MiB are in use: `etcdctl defrag`"],
        ),
        (
            FINE._replace(size=1500 * 2**20, in_use=1400 * 2**20, quota=0),
            ["1500 MiB of 2048 MiB, if that is etcd's default, at which"],
        ),
        (FINE._replace(size=1400 * 2**20, in_use=1400 * 2**20, quota=0), []),
        (FINE._replace(version="3.4.23"), ["etcd 3.4.23 has defects in watches, leases and reads"]),
        (FINE._replace(version="3.5.2"), ["etcd 3.5.2 may lose what it acknowledged .*: upgrade to 3.5.3"]),
        (FINE._replace(version="3.5.29"), []),
        (FINE._replace(version="3.6.0-rc.1"), []),
        (FINE._replace(version="not a number"), []),
    ],
)
def test_what_is_found_in_a_member_s_word(health: Health, sentences: list[str]) -> None:
    """One sentence each, with the fix where there is one."""
    found = [finding.text for finding in findings(health, settled=True)]
    assert len(found) == len(sentences)
    assert all(re.search(expected, text) for expected, text in zip(sentences, found, strict=True)), found


def test_history_is_not_judged_before_a_retention_is_over() -> None:
    """A cluster that compacts each hour has compacted nothing in its first."""
    assert not findings(FINE._replace(history=10**9), settled=False)


def test_a_look_at_a_real_etcd(own_etcd: Etcd) -> None:
    """Sizes and version by gRPC, the quota by its metrics, and history until somebody compacts it."""
    client = Client(own_etcd.endpoints)
    for _ in range(50):
        revision = client.put("a", b"1").revision
    health = look(client, "a")
    assert health is not None
    assert health.version.count(".") == 2
    assert (health.quota, health.history, health.alarms) == (2**31, revision, ())
    assert 0 < health.in_use <= health.size < 2**20
    client.compact(revision)
    assert look(client, "a")._replace(size=0, in_use=0) == health._replace(size=0, in_use=0, history=0)  # type: ignore[union-attr]
    own_etcd.stop()
    assert look(client, "a") is None
    assert client.quota(0.2) == 0
    client.close()


def test_a_quota_behind_tls(papers: Path) -> None:
    """With the files that the URL names; a stranger learns nothing, and is not told off."""
    ca, cert, key = (str(papers / name) for name in ("ca.pem", "client.pem", "client.key"))
    with secured(papers, "server") as cluster:
        for client, quota in (
            (Client(cluster.endpoints, ca=ca, cert=cert, key=key), 2**31),
            (Client(cluster.endpoints, ca=ca), 0),
        ):
            assert client.quota(2.0) == quota
            client.close()


def test_a_full_etcd_says_how_to_make_room(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To who asks something of it, and in the log of who does not."""
    need("etcd")
    monkeypatch.setattr("idemp.stores.etcd_health.SOON", 0.1)
    monkeypatch.setattr("idemp.stores.etcd_health.PAUSE", 0.1)
    with (
        Etcd(quota_bytes=4 * 2**20) as cluster,
        closing(Client(cluster.endpoints)) as admin,
        closing(open_store(f"{cluster.url}x")) as store,
    ):
        store.apply([])
        with pytest.raises(NoSpace):
            fill(admin)
        until(lambda: "(alarm NOSPACE)" in caplog.text and "MiB of 4 MiB at which" in caplog.text)
        how = "`etcdctl compact .*defrag.*alarm disarm"
        with pytest.raises(StoreUnavailable, match=how):
            store.apply([Claim("a")])
        with pytest.raises(StoreUnavailable, match=how):
            open_store(f"{cluster.url}x").apply([])


def test_a_look_holds_nobody_up(own_etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the end of the store: who looks is elsewhere, and stops when it is asked to."""
    monkeypatch.setattr("idemp.stores.etcd_health.SOON", 0.05)
    asked, go = threading.Event(), threading.Event()

    def slow(client: Client, key: str) -> None:
        asked.set()
        go.wait(20)

    monkeypatch.setattr("idemp.stores.etcd_health.look", slow)
    before, began = set(threading.enumerate()), time.monotonic()
    store = open_store(f"{own_etcd.url}x")
    assert isinstance(one(store, Claim("a")), Claimed)
    assert asked.wait(10)
    assert isinstance(one(store, Claim("b")), Claimed)
    store.close()
    assert time.monotonic() - began < 5
    [looker] = {each for each in threading.enumerate() if each.name == "idemp-etcd-health"} - before
    go.set()
    looker.join(10)
    assert not looker.is_alive()


def test_what_is_said_once_is_not_said_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Until it was well in between."""
    monkeypatch.setattr("idemp.stores.etcd_health.SOON", 0.0)
    monkeypatch.setattr("idemp.stores.etcd_health.PAUSE", 0.0)
    full, fuller = FINE._replace(size=7 * 2**30), FINE._replace(size=7 * 2**30 + 2**29)
    looks, ended = iter([full, fuller, None, full, FINE, full]), threading.Event()

    def look_again(client: Client, key: str) -> Health | None:
        try:
            return next(looks)
        except StopIteration:
            ended.set()
            return None

    monkeypatch.setattr("idemp.stores.etcd_health.look", look_again)
    keep_looking(Client(["localhost:1"]), "key", lambda: True, ended)
    assert [message.split(" of ")[0] for message in caplog.messages] == [
        "Client(localhost:1): etcd's database has 7168 MiB"
    ] * 2


def test_who_may_see_only_the_namespace_is_not_bothered(
    own_etcd: Etcd, caplog: pytest.LogCaptureFixture
) -> None:
    """With a user of its own, whose role names nothing else."""
    call = own_etcd.members[0].call
    for user in ("root", "app"):
        call("/v3/auth/user/add", name=user, password="secret")
        call("/v3/auth/role/add", name=user)
        call("/v3/auth/user/grant", user=user, role=user)
    span = {"key": _base64("/idemp/v1/x/"), "range_end": _base64("/idemp/v1/x0")}
    service = {"key": _base64("/service/x/"), "range_end": _base64("/service/x0")}
    for each in (span, service):
        call("/v3/auth/role/grant", name="app", perm={"permType": "READWRITE", **each})
    call("/v3/auth/enable")
    url = own_etcd.url.replace("etcd://", "etcd://app:secret@")
    with closing(open_store(f"{url}x")) as store:
        assert isinstance(one(store, Claim("a")), Claimed)
    client = Client(own_etcd.endpoints, "app", "secret")
    allowed, forbidden = look(client, Layout("x").floor), look(client, "/elsewhere")
    assert allowed is not None
    assert allowed.history > 0
    assert forbidden is not None
    assert forbidden.history == 0
    client.close()
    assert not [
        record for record in caplog.records if "etcd_health" in record.name and record.levelno > logging.INFO
    ]


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_users_that_are_needed_from_now_on(own_etcd: Etcd) -> None:
    """A store whose URL has user and password goes on, with its session, when etcd begins to ask for them."""
    call = own_etcd.members[0].call
    url = own_etcd.url.replace("etcd://", "etcd://root:secret@")
    with closing(open_store(f"{url}x?session=3s")) as store:
        mine = one(store, Claim("before"))
        call("/v3/auth/user/add", name="root", password="secret")
        call("/v3/auth/role/add", name="root")
        call("/v3/auth/user/grant", user="root", role="root")
        call("/v3/auth/enable")
        assert isinstance(one(store, Claim("after")), Claimed)
        time.sleep(4)  # longer than the session lives by itself
        assert store.fresh(mine.token)
        with closing(open_store(f"{url}x")) as other:
            done = one(other, Claim("theirs"))
            assert one(other, Complete("theirs", done.token)) == Applied()
            until(lambda: store.recall("theirs"))
        assert one(store, Complete("before", mine.token)) == Applied()


# ------------------------------------------------------------------ threads


@pytest.mark.parametrize(
    "error",
    [OSError(24, "Too many open files"), RuntimeError("can't start new thread")],
    ids=["OSError", "RuntimeError"],
)
def test_no_thread_dies_of_what_nobody_expected(
    make: Make, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It fails once in each; then the session is confirmed again, and a session that is gone is found."""
    failed, threads = set[str](), {"idemp-etcd-lease", "idemp-etcd-keeper", "idemp-etcd-health"}
    (store, wire), (other, _) = make(session_ttl=2.0), make(session_ttl=2.0)
    real = wire._call

    def call(*args: Any, **kwargs: Any) -> Any:
        thread = threading.current_thread().name
        if thread in threads - failed:
            failed.add(thread)
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(wire, "_call", call)
    until(lambda: failed == threads)
    since = time.monotonic()
    session: Any = store._session  # type: ignore[attr-defined]
    until(lambda: session._alive_at > since)
    looked = session._seen
    until(lambda: session._seen is not looked)
    assert store.fresh()
    assert isinstance(one(other, Claim("key")), Claimed)


def test_a_watch_that_ends_for_a_reason_nobody_expected(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory is imported again, and does not go on as if nothing happened elsewhere."""
    (here, _), (there, _) = make(), make()
    real, once = Watch._follow, [RuntimeError("can't start new thread")]

    def follow(*words: Any) -> None:
        if once:
            raise once.pop()
        real(*words)

    monkeypatch.setattr(Watch, "_follow", follow)
    here._session._replica.distrust("for a test")  # type: ignore[attr-defined]
    one(here, Get("key"))
    until(lambda: "importing again: can't start new thread" in caplog.text)
    claim = one(there, Claim("key"))
    assert one(there, Complete("key", claim.token)) == Applied()
    assert isinstance(one(here, Get("key")), Done)


def test_a_journal_with_a_key_deleted_by_hand(make: Make, unique: str, etcd: Etcd) -> None:
    """It is refused in a sentence, by who comes and by who has to read it again, and closed all the same."""
    store, _ = make()
    for key in "abcd":
        one(store, Claim(key))
    with closing(Client(etcd.endpoints)) as by_hand:
        logged = by_hand.range(f"/idemp/v1/{unique}/log/", prefix=True).pairs
        by_hand.delete(logged[1].key)
    sentence = (
        f"the journal /idemp/v1/{unique}/ in etcd is damaged: what comes before {logged[2].key} is missing"
    )
    with pytest.raises(ConfigError, match=sentence):
        make()
    store._session._replica.distrust("for a test")  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=sentence):
        one(store, Claim("e"))
    store.close()
