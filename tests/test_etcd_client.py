"""The client of etcd on the real thing: what each call answers, and how it fails."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from idemp.errors import Closed, ConfigError, StoreUnavailable
from idemp.stores import etcd_client
from idemp.stores.etcd_client import (
    Client,
    Compacted,
    Created,
    Delete,
    Denied,
    EtcdError,
    FutureRevision,
    KeyValue,
    LeaseNotFound,
    Modified,
    NoSpace,
    Put,
    Range,
    Refused,
    Sort,
    TooLarge,
    Unreachable,
    Unsure,
    Value,
    WatchBatch,
)
from tests.proxy import Proxy
from tests.servers import Etcd, free_port, need


@pytest.fixture
def client(etcd: Etcd) -> Iterator[Client]:
    """A client of the shared member."""
    client = Client(etcd.endpoints)
    yield client
    client.close()


@pytest.fixture
def root(unique: str) -> str:
    """A prefix that no other test uses."""
    return f"/{unique}/"


@pytest.fixture
def first_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients begin with the endpoint named first, not with any."""
    monkeypatch.setattr("idemp.stores.etcd_client.random.randrange", lambda _: 0)


def until(condition: Callable[[], object], seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def insist(act: Callable[[], object], seconds: float = 15) -> None:
    """Again and again, as the store would."""
    end = time.monotonic() + seconds
    while True:
        try:
            act()
            return
        except (Unsure, Unreachable):
            assert time.monotonic() < end, "failed for too long"
            time.sleep(0.05)


def keys(pairs: tuple[KeyValue, ...]) -> list[str]:
    return [pair.key.rpartition("/")[2] for pair in pairs]


class Heard(list[WatchBatch]):
    """What a watch delivered."""

    def events(self) -> list[KeyValue]:
        return [event for batch in self for event in batch.events]

    def stands(self) -> bool:
        return any(batch.created for batch in self)

    def broken(self) -> bool:
        return bool(self) and bool(self[-1].broken)


# ---------------------------------------------------------------- reading and writing


def test_what_is_put_is_found_until_it_is_deleted(client: Client, root: str) -> None:
    first = client.put(root + "a", b"1")
    second = client.put(root + "a", b"\x00\xff")

    (pair,) = client.range(root + "a").pairs
    assert pair == KeyValue(root + "a", b"\x00\xff", first.revision, second.revision, 2, 0)

    gone = client.delete(root + "a")
    assert (gone.count, gone.revision) == (1, second.revision + 1)
    assert client.delete(root + "a").count == 0
    empty = client.range(root + "a")
    assert (empty.pairs, empty.count, empty.more) == ((), 0, False)
    assert empty.revision >= gone.revision


def test_a_header_says_who_answered(client: Client, root: str) -> None:
    header, status = client.put(root + "a", b""), client.status()
    assert header.cluster_id == status.header.cluster_id != 0
    assert header.member_id == status.header.member_id == status.leader
    assert header.term > 0


def test_ranges(client: Client, root: str) -> None:
    for key in "cab":
        last = client.put(root + key, key.encode()).revision
    client.put(root.rstrip("/") + "0", b"the next prefix")

    everything = client.range(root, prefix=True)
    assert keys(everything.pairs) == ["a", "b", "c"]
    assert (everything.count, everything.more) == (3, False)
    page = client.range(root, prefix=True, limit=2)
    assert (keys(page.pairs), page.more, page.count) == (["a", "b"], True, 3)
    assert keys(client.range(root, prefix=True, after=page.pairs[-1].key).pairs) == ["c"]
    assert keys(client.range(root + "a", root + "c").pairs) == ["a", "b"]
    assert [pair.value for pair in client.range(root, prefix=True, keys_only=True).pairs] == [b""] * 3
    newest = client.range(root, prefix=True, min_mod_revision=last, limit=1)
    assert keys(newest.pairs) == ["b"], "what is too old does not count for the limit"
    assert keys(client.range(root, prefix=True, sort=Sort.MODIFIED).pairs) == ["c", "a", "b"]
    assert keys(client.range(root, prefix=True, sort=Sort.CREATED, descending=True).pairs) == ["b", "a", "c"]
    assert keys(client.range(root, prefix=True, descending=True).pairs) == ["c", "b", "a"]


def test_a_range_at_a_revision_sees_what_was_there_then(client: Client, root: str) -> None:
    then = client.put(root + "a", b"old").revision
    now = client.put(root + "a", b"new").revision
    client.delete(root, prefix=True)

    found = client.range(root + "a", revision=then)
    assert found.pairs[0].value == b"old"
    assert found.revision > now, "the header is the store's own"


def test_keys_are_text_and_those_of_others_come_through(client: Client, root: str) -> None:
    odd = root + "gr\u00fc\u00dfe \udcff"  # the last is a byte that is no UTF-8
    client.put(odd, b"1")
    assert client.range(root, prefix=True).pairs[0].key == odd
    assert client.delete(root, prefix=True).count == 1


def test_a_prefix_ends_where_the_next_begins() -> None:
    assert etcd_client._span("ab", "", True, "") == (b"ab", b"ac")
    assert etcd_client._span("a\udcff", "", True, "") == (b"a\xff", b"b")
    assert etcd_client._span("", "", True, "") == (b"\0", b"\0"), "all keys"
    assert etcd_client._span("a/", "", True, "a/x") == (b"a/x\0", b"a0")


# ---------------------------------------------------------------- transactions


def test_a_transaction_takes_one_branch_or_the_other(client: Client, root: str) -> None:
    a, b = root + "a", root + "b"

    def attempt() -> etcd_client.TxnResult:
        return client.txn(
            [Created(a)],
            [Put(a, b"1"), Put(b, b"2"), Range(root, prefix=True), Delete(root + "none")],
            [Range(a), Delete(b)],
        )

    first, second = attempt(), attempt()

    assert first.succeeded
    put, _, found, deleted = first.responses
    assert put.pairs == ()
    assert keys(found.pairs) == ["a", "b"], "it sees what was put before it"
    assert {pair.mod_revision for pair in found.pairs} == {first.revision}
    assert deleted.count == 0
    assert not second.succeeded
    assert second.responses[0].pairs[0].value == b"1"
    assert second.responses[1].count == 1
    assert second.revision == first.revision + 1


def test_comparisons(client: Client, root: str) -> None:
    there, none = root + "there", root + "none"
    made = client.put(there, b"1").revision
    put = client.put(there, b"2").revision

    def holds(*compares: etcd_client.Compare) -> bool:
        return client.txn(compares, [], []).succeeded

    assert holds(Created(there, made), Modified(there, put), Value(there, b"2"))
    assert holds(
        Created(there, equal=False), Modified(there, made, equal=False), Value(there, b"1", equal=False)
    )
    assert holds(Created(none), Modified(none))
    assert not holds(Created(there))
    assert not holds(Modified(there, made))
    assert not holds(Value(there, b"1"))
    assert not holds(Created(none, equal=False))
    assert not holds(Created(there, made), Created(there))


def test_a_value_is_compared_to_nothing_as_false(client: Client, root: str) -> None:
    """Also that it is another one: so a key must be there before its value guards anything."""
    for value in (b"", b"1"):
        for equal in (True, False):
            assert not client.txn([Value(root + "none", value, equal)], []).succeeded


def test_what_etcd_refuses_changes_nothing(client: Client, root: str) -> None:
    with pytest.raises(Refused, match="duplicate key"):
        client.txn([], [Put(root + "a", b"1"), Put(root + "a", b"2")])
    with pytest.raises(TooLarge, match="too many operations"):
        client.txn([], [Put(f"{root}{n}", b"") for n in range(129)])
    with pytest.raises(TooLarge, match="too large"):
        client.put(root + "a", bytes(1_600_000))
    with pytest.raises(TooLarge, match="larger than max"):
        client.put(root + "a", bytes(5_000_000))
    with pytest.raises(LeaseNotFound):
        client.txn([], [Put(root + "a", b""), Put(root + "b", b"", lease=4711)])
    assert client.range(root, prefix=True).count == 0


def test_revisions_that_are_gone_or_to_come(own_etcd: Etcd) -> None:
    client = Client(own_etcd.endpoints)
    old = client.put("/a", b"1").revision
    new = client.put("/a", b"2").revision
    client.compact(new)

    with pytest.raises(Compacted):
        client.range("/a", revision=old)
    with pytest.raises(Compacted):
        client.compact(new)
    with pytest.raises(FutureRevision):
        client.range("/a", revision=new + 100)
    client.close()


# ---------------------------------------------------------------- leases


def test_a_lease_keeps_its_keys_until_it_goes(client: Client, root: str) -> None:
    lease = client.lease_grant(60)
    client.put(root + "a", b"", lease)
    assert client.range(root + "a").pairs[0].lease == lease
    assert client.lease_keepalive(lease) == 60

    client.lease_revoke(lease)

    assert client.range(root + "a").count == 0
    assert client.lease_keepalive(lease) == 0
    with pytest.raises(LeaseNotFound):
        client.put(root + "a", b"", lease)
    with pytest.raises(LeaseNotFound):
        client.lease_revoke(lease)


def test_a_lease_that_nobody_keeps_runs_out(client: Client, root: str) -> None:
    lease = client.lease_grant(1)
    client.put(root + "a", b"", lease)
    until(lambda: client.range(root + "a").count == 0)
    assert client.lease_keepalive(lease) == 0


# ---------------------------------------------------------------- watches


def test_a_watch_hears_everything_in_order(client: Client, root: str) -> None:
    heard = Heard()
    client.put(root + "before", b"")
    watch = client.watch(root, 0, heard.append)
    until(heard.stands)

    revisions = [client.put(f"{root}{n}", b"%d" % n).revision for n in range(100)]
    client.put(root.rstrip("/") + "0", b"another prefix")
    gone = client.delete(root + "7").revision

    until(lambda: len(heard.events()) == 101)
    events = heard.events()
    assert [event.mod_revision for event in events] == [*revisions, gone]
    assert events[3] == KeyValue(root + "3", b"3", revisions[3], revisions[3], 1, 0)
    assert events[-1].deleted
    assert (events[-1].key, events[-1].value) == (root + "7", b"")
    assert heard[-1].revision >= gone
    watch.cancel()


def test_all_events_of_a_transaction_come_in_one_batch(client: Client, root: str) -> None:
    start = client.put(root + "0", b"").revision
    live, later = Heard(), Heard()
    watches = [client.watch(root, start, live.append)]
    until(live.stands)
    for round_ in range(20):
        client.txn([], [Put(f"{root}{n}", b"%d" % round_) for n in range(50)])

    watches.append(client.watch(root, start, later.append))

    for heard in (live, later):
        until(lambda heard=heard: len(heard.events()) == 1001)  # type: ignore[misc]
        homes: dict[int, set[int]] = {}
        for number, batch in enumerate(heard):
            for event in batch.events:
                homes.setdefault(event.mod_revision, set()).add(number)
        assert len(homes) == 21
        assert all(len(numbers) == 1 for numbers in homes.values())
    for watch in watches:
        watch.cancel()


def test_a_cancelled_watch_is_silent_and_leaves_no_thread(client: Client, root: str) -> None:
    heard, before = Heard(), threading.active_count()
    watch = client.watch(root, 0, heard.append)
    until(heard.stands)

    watch.cancel()
    until(lambda: threading.active_count() <= before)
    client.put(root + "a", b"")
    time.sleep(0.2)

    assert len(heard) == 1


def test_a_watch_may_be_cancelled_before_it_stands_and_by_what_it_delivers_to(
    client: Client, root: str
) -> None:
    before = threading.active_count()
    watches = [client.watch(root, 0, lambda batch: None) for _ in range(5)]
    for watch in watches:
        watch.cancel()
    own: list[etcd_client.Watch] = []
    heard = Heard()

    def deliver(batch: WatchBatch) -> None:
        heard.append(batch)
        if batch.events:
            own[0].cancel()

    own.append(client.watch(root, 0, deliver))
    until(heard.stands)
    client.put(root + "a", b"")
    client.put(root + "b", b"")
    until(lambda: threading.active_count() <= before)
    assert len(heard.events()) == 1


def test_a_watch_gives_a_sign_of_life_when_asked(client: Client, root: str) -> None:
    heard = Heard()
    watch = client.watch(root, 0, heard.append)
    until(heard.stands)
    now = client.put("/elsewhere/" + root, b"").revision

    watch.request_progress()

    until(lambda: len(heard) == 2)
    assert not heard[-1].broken
    assert heard[-1].events == ()
    assert heard[-1].revision >= now
    watch.cancel()


def test_a_watch_from_a_compacted_revision_ends_with_the_oldest_there_is(own_etcd: Etcd) -> None:
    client, heard = Client(own_etcd.endpoints), Heard()
    for _ in range(5):
        now = client.put("/a", b"").revision
    client.compact(now)

    client.watch("/a", now - 3, heard.append)

    until(heard.broken)
    last = heard[-1]
    assert (last.canceled, last.compact_revision, last.events) == (True, now, ())
    assert "compacted" in last.broken
    client.close()


def test_a_failing_callback_ends_its_watch_and_is_logged(
    client: Client, root: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = threading.active_count()

    def fail(batch: WatchBatch) -> None:
        raise ZeroDivisionError

    client.watch(root, 0, fail)
    until(lambda: threading.active_count() <= before)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


@pytest.mark.parametrize("end", [Etcd.kill, Etcd.stop])
def test_a_broken_watch_says_so_once_and_is_not_mended(own_etcd: Etcd, end: Callable[[Etcd], None]) -> None:
    client, heard = Client(own_etcd.endpoints), Heard()
    client.watch("/a", 0, heard.append)
    until(heard.stands)

    end(own_etcd)

    until(heard.broken)
    assert not heard[-1].canceled
    own_etcd.start()
    insist(lambda: client.put("/a", b""))
    time.sleep(0.3)
    assert len(heard) == 2
    client.close()


def test_a_watch_of_a_server_that_is_not_there_is_broken_from_the_start() -> None:
    heard = Heard()
    client = Client([f"127.0.0.1:{free_port()}"])
    client.watch("/a", 0, heard.append)
    until(heard.broken)
    assert len(heard) == 1
    client.close()


def test_a_connection_that_fell_silent_is_noticed(own_etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    """By grpc's pings; here faster than they may be sent to one that is awake."""
    fast = dict(etcd_client._OPTIONS) | {"grpc.keepalive_time_ms": 500, "grpc.http2.ping_timeout_ms": 500}
    monkeypatch.setattr(etcd_client, "_OPTIONS", tuple(fast.items()))
    client, heard = Client(own_etcd.endpoints), Heard()
    client.watch("/a", 0, heard.append)
    until(heard.stands)

    own_etcd.members[0].pause()

    until(heard.broken, seconds=5)
    own_etcd.members[0].resume()
    client.close()


# ---------------------------------------------------------------- failures


def test_nothing_listens(first_endpoint: None, etcd: Etcd, root: str) -> None:
    nobody = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    client = Client(nobody)
    began = time.monotonic()
    with pytest.raises(Unreachable) as caught:
        client.put(root + "a", b"")
    assert time.monotonic() - began < 2
    assert isinstance(caught.value, StoreUnavailable)
    client.close()

    client = Client([*nobody, *etcd.endpoints])
    client.put(root + "a", b"")
    client.close()


def test_no_answer_in_time_is_unsure_and_sending_it_again_settles_it(own_etcd: Etcd) -> None:
    client, member = Client(own_etcd.endpoints), own_etcd.members[0]
    client.put("/a", b"before")

    member.pause()
    began = time.monotonic()
    with pytest.raises(Unsure):
        client.txn([Value("/a", b"before")], [Put("/a", b"after")], timeout=0.5)
    with pytest.raises(Unsure):
        client.range("/a", timeout=0.5)
    with pytest.raises(Unsure):
        client.lease_keepalive(1, timeout=0.5)
    assert 1.4 < time.monotonic() - began < 10, "the three of them would take 15 s if left to themselves"
    member.resume()

    client.txn([Value("/a", b"before")], [Put("/a", b"after")])
    (pair,) = client.range("/a").pairs
    assert (pair.value, pair.version) == (b"after", 2)
    client.close()


def test_a_connection_lost_before_the_answer_is_unsure(own_etcd: Etcd) -> None:
    member = own_etcd.members[0]
    failures: list[EtcdError] = []

    with Proxy(member.port) as proxy:
        client = Client([f"127.0.0.1:{proxy.port}"])

        def put() -> None:
            try:
                client.put("/a", b"2")
            except EtcdError as error:
                failures.append(error)

        client.put("/a", b"1")
        member.pause()
        thread = threading.Thread(target=put)
        thread.start()
        time.sleep(0.3)
        assert proxy.cut() == 1
        thread.join(timeout=3)
        member.resume()
        assert [type(failure) for failure in failures] == [Unsure]
        insist(lambda: client.put("/a", b"3"))
        client.close()


def test_it_outlasts_a_restart_of_etcd(own_etcd: Etcd) -> None:
    client = Client(own_etcd.endpoints)
    before = client.put("/a", b"1")
    for end in (own_etcd.stop, own_etcd.kill):
        end()
        own_etcd.start()
        insist(lambda: client.range("/a"))
        found = client.range("/a")
        assert found.pairs[0].value == b"1"
        assert found.header.cluster_id == before.cluster_id
    client.close()


def fill(client: Client) -> None:
    for n in range(100):
        client.put(f"/{n}", bytes(700_000))
        time.sleep(0.1)  # etcd looks at what is on the disk


def test_a_full_database_takes_reads_deletes_and_keepalives_only() -> None:
    need("etcd")
    with Etcd(quota_bytes=4 * 1024 * 1024) as etcd:
        client = Client(etcd.endpoints)
        lease = client.lease_grant(60)
        assert client.status().alarms == ()
        with pytest.raises(NoSpace) as caught:
            fill(client)
        assert isinstance(caught.value, StoreUnavailable)
        with pytest.raises(NoSpace):
            client.txn([], [Put("/a", b"")])
        with pytest.raises(NoSpace):
            client.lease_grant(60)

        assert client.range("/0").count == 1
        assert client.lease_keepalive(lease) == 60
        assert client.txn([], [Delete("/0")]).responses[0].count == 1
        status = client.status()
        assert status.alarms == ("NOSPACE",)
        assert status.db_size >= status.db_size_in_use > 1_000_000
        assert status.version.startswith("3.")

        etcd.restart()  # it serves although it is not healthy
        insist(lambda: client.range("/1"))
        client.close()


# ---------------------------------------------------------------- a cluster


@pytest.fixture
def cluster() -> Iterator[Etcd]:
    """Three members for this test alone."""
    need("etcd")
    with Etcd(members=3) as cluster:
        yield cluster


def test_the_leader_may_die(cluster: Etcd) -> None:
    client = Client(cluster.endpoints)
    tail = b"0"
    client.put("/tail", tail)
    killed = cluster.leader()
    for n in range(1, 100):
        if n == 30:
            cluster.members[killed].kill()
        mine = b"%d" % n

        def append(before: bytes = tail, after: bytes = mine) -> None:
            """Once, however often it is sent."""
            result = client.txn([Value("/tail", before)], [Put("/tail", after)], [Range("/tail")], timeout=2)
            assert result.succeeded or result.responses[0].pairs[0].value == after

        insist(append)
        tail = mine
    assert client.range("/tail").pairs[0].version == 100
    assert cluster.leader() != killed
    cluster.members[killed].start()
    client.close()


def test_a_paused_member_costs_a_new_client_the_time_to_connect(cluster: Etcd, first_endpoint: None) -> None:
    follower = next(n for n in range(3) if n != cluster.leader())
    paused = cluster.members[follower]
    others = [member.endpoint for member in cluster.members if member is not paused]
    paused.pause()
    client = Client([paused.endpoint, *others])
    began = time.monotonic()

    client.put("/a", b"it was not sent to the paused one")

    assert time.monotonic() - began < etcd_client.CONNECT + 1.5
    began = time.monotonic()
    client.put("/a", b"and it stays with the one that answers")
    assert time.monotonic() - began < 1
    paused.resume()
    client.close()


def test_a_read_does_not_wait_for_a_paused_member_to_the_end(cluster: Etcd, first_endpoint: None) -> None:
    follower = next(n for n in range(3) if n != cluster.leader())
    paused = cluster.members[follower]
    client = Client([paused.endpoint, *(each for each in cluster.endpoints if each != paused.endpoint)])
    client.put("/a", b"1")
    paused.pause()
    assert client.range("/a", timeout=3).count == 1
    paused.resume()
    client.close()


def test_without_a_majority_it_fails_and_watches_end(cluster: Etcd) -> None:
    one = cluster.members[cluster.leader()]
    client, heard = Client([one.endpoint], timeout=3), Heard()
    client.watch("/a", 0, heard.append)
    until(heard.stands)
    others = [member for member in cluster.members if member is not one]
    for member in others:
        member.kill()

    until(heard.broken)
    assert "no leader" in heard[-1].broken
    began = time.monotonic()
    with pytest.raises(Unreachable, match="no leader"):
        client.put("/a", b"")
    assert time.monotonic() - began < 1
    assert client.status().leader == 0
    for member in others:
        member.launch()
    insist(lambda: client.put("/a", b""))
    client.close()


def test_a_lease_is_kept_without_a_thread(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may have no more threads for a moment keeps its session."""
    lease = client.lease_grant(60)

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert client.lease_keepalive(lease) == 60
    assert client.lease_keepalive(7) == 0


# ---------------------------------------------------------------- users


@pytest.fixture
def guarded(own_etcd: Etcd) -> Etcd:
    """It lets in root:secret, and mole:secret who has no rights."""
    let_in(own_etcd, "root", "mole")
    return own_etcd


def let_in(etcd: Etcd, *names: str) -> None:
    """From now on only these, all with the password ``secret``, and root alone with rights."""
    call = etcd.members[0].call
    for name in names:
        call("/v3/auth/user/add", name=name, password="secret")
    call("/v3/auth/role/add", name="root")
    call("/v3/auth/user/grant", user="root", role="root")
    call("/v3/auth/enable")


def test_who_may_come_in(guarded: Etcd) -> None:
    client = Client(guarded.endpoints, "root", "secret")
    client.put("/a", b"1")
    assert client.range("/a").count == 1
    client.close()

    for login in (("root", "wrong"), ("nobody", "secret"), ("mole", "secret"), (None, None)):
        client = Client(guarded.endpoints, *login)
        with pytest.raises(Denied) as caught:
            client.put("/a", b"2")
        assert isinstance(caught.value, ConfigError)
        assert "secret" not in str(caught.value)
        client.close()


def test_a_token_that_etcd_forgot_is_renewed(guarded: Etcd) -> None:
    client, heard = Client(guarded.endpoints, "root", "secret"), Heard()
    client.put("/a", b"1")
    guarded.restart()  # its tokens are in memory only
    insist(lambda: client.txn([], [Put("/a", b"2")]))
    guarded.restart()
    for _ in range(20):
        heard.clear()
        client.watch("/a", 1, heard.append)
        until(lambda: len(heard) >= 2 or heard.broken())
        if not heard.broken():
            break
        time.sleep(0.1)
    assert [event.value for event in heard.events()] == [b"1", b"2"]
    client.close()


def test_users_that_are_needed_from_now_on(own_etcd: Etcd) -> None:
    """Who has a password logs in then, also where none was needed when it first called."""
    client, heard = Client(own_etcd.endpoints, "root", "secret"), Heard()
    client.put("/a", b"1")
    let_in(own_etcd, "root")
    client.put("/a", b"2")
    client.watch("/a", 1, heard.append)
    until(lambda: heard.broken() or len(heard.events()) == 2)
    assert [event.value for event in heard.events()] == [b"1", b"2"]
    client.close()

    nobody = Client(own_etcd.endpoints)
    with pytest.raises(Denied, match="user name is empty"):
        nobody.put("/a", b"3")
    nobody.close()


def test_a_password_is_no_fault_where_none_is_needed(etcd: Etcd, root: str) -> None:
    client = Client(etcd.endpoints, "root", "secret")
    client.put(root + "a", b"")
    client.close()


# ---------------------------------------------------------------- TLS


def secured(papers: Path, name: str) -> Etcd:
    need("etcd")
    files = {"cert-file": f"{name}.pem", "key-file": f"{name}.key", "trusted-ca-file": "ca.pem"}
    options = {option: str(papers / file) for option, file in files.items()}
    return Etcd(options={**options, "client-cert-auth": "true"})


def test_tls_lets_in_who_is_known_and_trusts_only_what_it_knows(papers: Path) -> None:
    ca, stranger, cert, key = (
        str(papers / name) for name in ("ca.pem", "stranger.pem", "client.pem", "client.key")
    )
    with secured(papers, "server") as etcd:
        client, heard = Client(etcd.endpoints, ca=ca, cert=cert, key=key), Heard()
        client.watch("/a", 0, heard.append)
        until(heard.stands)
        client.put("/a", b"1")
        until(heard.events)
        client.close()
        for refused in (
            Client(etcd.endpoints, timeout=1),
            Client(etcd.endpoints, tls=True, timeout=1),
            Client(etcd.endpoints, ca=stranger, cert=cert, key=key, timeout=1),
            Client(etcd.endpoints, ca=ca, timeout=1),
        ):
            with pytest.raises((Unreachable, Unsure)):
                refused.range("/a")
            refused.close()


def test_tls_looks_at_the_name(papers: Path) -> None:
    with secured(papers, "elsewhere") as etcd:
        ca, cert, key = (str(papers / name) for name in ("ca.pem", "client.pem", "client.key"))
        client = Client(etcd.endpoints, ca=ca, cert=cert, key=key, timeout=1)
        with pytest.raises(Unreachable):
            client.put("/a", b"")
        client.close()


# ---------------------------------------------------------------- settings, end, fork


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no host"):
        Client([])
    with pytest.raises(ConfigError, match="user and password"):
        Client(["localhost:2379"], user="root")
    with pytest.raises(ConfigError, match="cert and key"):
        Client(["localhost:2379"], cert="client.pem")
    with pytest.raises(ConfigError, match=r"none\.pem"):
        Client(["localhost:2379"], ca=str(tmp_path / "none.pem"))
    client = Client(["localhost:2379"], "root", "secret")
    assert "secret" not in repr(client)
    client.close()


def test_a_closed_client_is_closed(etcd: Etcd, root: str) -> None:
    client, heard = Client(etcd.endpoints), Heard()
    before = threading.active_count()
    client.watch(root, 0, heard.append)
    until(heard.stands)

    client.close()
    client.close()

    with pytest.raises(Closed):
        client.put(root + "a", b"")
    with pytest.raises(Closed):
        client.watch(root, 0, heard.append)
    until(lambda: threading.active_count() <= before)
    assert len(heard) == 1


def test_many_threads_may_use_one_client(client: Client, root: str) -> None:
    def work(number: int) -> None:
        for n in range(50):
            client.put(f"{root}{number}/{n}", b"")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert client.range(root, prefix=True).count == 400


@pytest.mark.parametrize(("used", "expected"), [(False, "child 1\n"), (True, "child refused\nparent 1\n")])
def test_a_fork_comes_before_the_first_call(etcd: Etcd, root: str, used: bool, expected: str) -> None:
    """After it grpc would hang in the child; the parent goes on all the same."""
    code = """
import os, sys
from idemp.errors import ConfigError
from idemp.stores.etcd_client import Client
endpoint, key, used = sys.argv[1:]
client = Client([endpoint])
def once():
    client.put(key, b"1")
    return client.range(key).count
if used: once()
child = os.fork()
if child == 0:
    try:
        print("child", once(), flush=True)
    except ConfigError:
        print("child refused", flush=True)
    client.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
if used: print("parent", once(), flush=True)
client.close()
"""
    arguments = [etcd.endpoints[0], root + "a", "yes" if used else ""]
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert (run.stdout, run.returncode) == (expected, 0), run.stderr
