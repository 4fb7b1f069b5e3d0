"""What can befall etcd, on the real thing: it is full, compacted, silent, without a quorum, restarted.

None of it may run a handler twice without naming the doubt, forget what was done, or acknowledge
what is not recorded.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from idemp import Consumer, Message, idempotent, publish
from idemp.errors import StoreUnavailable
from idemp.ports import Applied, Busy, Claim, Claimed, Complete, Done, Doubt, Get, Publication, Store
from idemp.stores.etcd import SLICES, EtcdStore
from idemp.stores.etcd_client import Client, Compacted, Found, KeyValue, NoSpace, Watch
from idemp.stores.etcd_replica import Layout
from idemp.stores.records import decode
from idemp.transports.memory import MemoryTransport
from tests.proxy import Proxy
from tests.servers import Etcd, RabbitMQ, need
from tests.service import Program
from tests.test_replicas import Stage, three_times

TTL = 2.0
Opens = Callable[..., Store]


@pytest.fixture
def opens() -> Iterator[Opens]:
    """Opens stores, which are closed at the end."""
    with ExitStack() as stack:

        def open_one(
            client: Client, namespace: str, retention: float = 3600.0, session_ttl: float = TTL
        ) -> Store:
            store = EtcdStore(lambda: client, namespace, retention=retention, session_ttl=session_ttl)
            store.apply([])
            stack.callback(store.close)
            return store

        yield open_one


@pytest.fixture
def small_etcd() -> Iterator[Etcd]:
    """One member for this test alone, that is full soon."""
    need("etcd")
    with Etcd(quota_bytes=4 * 1024 * 1024) as etcd:
        yield etcd


def one(store: Store, op: Any) -> Any:
    return store.apply([op])[0]


def until(what: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def stays(what: Callable[[], bool], seconds: float) -> bool:
    """Whether it holds all the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not what():
            return False
        time.sleep(0.02)
    return True


def insist(act: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What it answers, as soon as the store is there."""
    end = time.monotonic() + seconds
    while True:
        try:
            return act()
        except StoreUnavailable:
            assert time.monotonic() < end, "the store did not come back"
            time.sleep(0.05)


# ------------------------------------------------------------------ a consumer in this process


class Noting(MemoryTransport):
    """Keeps what was acknowledged."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.acknowledged: list[int] = []

    def ack(self, tags: Iterable[int]) -> None:
        tags = list(tags)
        self.acknowledged += tags
        super().ack(tags)


@contextmanager
def consuming(consumer: Consumer, transport: Noting) -> Iterator[None]:
    """The consumer runs, on a thread of its own."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            consumer.run(ready=ready.set)
        except BaseException as error:
            failed.append(error)
            ready.set()

    ready, thread = threading.Event(), threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(30)
    try:
        yield
    finally:
        consumer.stop()
        thread.join(40)
        transport.close()
    assert not thread.is_alive()
    assert failed == []


def send(name: str, *ids: str) -> None:
    """To the queue of the service ``name``."""
    messages = [Message(id, "new_order", {}) for id in ids]
    copies = [Publication(each.encode(), each.properties(), "", f"{name}-queue") for each in messages]
    with closing(MemoryTransport(name)) as transport:
        publish(transport, copies)


# ------------------------------------------------------------------ it is full

FILLER = "/filler/"


def fill(etcd: Etcd) -> None:
    """Until it takes no more, and says so."""
    with closing(Client(etcd.endpoints)) as admin:
        with suppress(NoSpace):
            for n in range(100):
                admin.put(f"{FILLER}{n}", bytes(700_000))
                time.sleep(0.1)  # it looks at what is on the disk
        assert admin.status().alarms == ("NOSPACE",)


def make_room(etcd: Etcd) -> None:
    """What its operator does: delete, compact, defragment, and take the alarm off."""
    call = etcd.members[0].call

    def shrunk() -> bool:
        call("/v3/maintenance/defragment")
        return admin.status().db_size < 1_000_000

    with closing(Client(etcd.endpoints)) as admin:
        admin.compact(admin.delete(FILLER, prefix=True).revision)
        until(shrunk)  # a compaction takes its time
        for alarm in call("/v3/maintenance/alarm", action="GET")["alarms"]:
            call("/v3/maintenance/alarm", **{**alarm, "action": "DEACTIVATE"})
        assert admin.status().alarms == ()


def test_it_is_full_between_claim_and_mark(small_etcd: Etcd, unique: str, opens: Opens) -> None:
    """The claim is held as long as the session lives, and the mark lands when there is room."""
    store, other = (opens(Client(small_etcd.endpoints), unique) for _ in "12")
    claimed = one(store, Claim("a"))
    fill(small_etcd)

    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            one(store, Complete("a", claimed.token, b"1"))
    assert stays(lambda: isinstance(one(other, Get("a")), Busy), 2 * TTL)
    assert isinstance(one(other, Claim("a")), Busy)
    assert store.fresh(), "keepalives go on"
    with pytest.raises(StoreUnavailable):
        one(other, Claim("b"))

    make_room(small_etcd)
    assert one(store, Complete("a", claimed.token, b"1")) == Applied()
    done = one(other, Claim("a"))
    assert (done.__class__, done.result, done.attempt) == (Done, b"1", 1)
    assert one(other, Claim("b")).attempt == 1


def test_a_consumer_acknowledges_nothing_while_it_is_full(
    small_etcd: Etcd, unique: str, opens: Opens, caplog: pytest.LogCaptureFixture
) -> None:
    """The handler ran, and its message stays the broker's until that is on record; it does not run again."""
    transport, runs, full = Noting(unique), list[str](), threading.Event()
    consumer = Consumer(transport, service=unique)

    @consumer.on("new_order")
    @idempotent(opens(Client(small_etcd.endpoints), unique), name="new_order")
    def new_order(message: Message) -> None:
        runs.append(message.id)
        full.wait(60)

    with consuming(consumer, transport):
        send(unique, "a")
        until(lambda: runs)
        fill(small_etcd)
        full.set()
        until(lambda: "database space exceeded" in caplog.text)
        assert stays(lambda: transport.acknowledged == [], 2 * TTL)

        make_room(small_etcd)
        until(lambda: len(transport.acknowledged) == 1)
        send(unique, "a")
        until(lambda: len(transport.acknowledged) == 2)
    assert runs == ["a"]


def test_a_batch_that_is_too_big_for_one_request_is_several(etcd: Etcd, unique: str, opens: Opens) -> None:
    """etcd takes 1.5 MiB at a time; what it refused for its size must not be sent again for ever."""
    store, other = (opens(Client(etcd.endpoints), unique) for _ in "12")
    keys = [str(n) for n in range(40)]
    claims = store.apply([Claim(key) for key in keys])
    result = b"1" * 60_000
    done = [Complete(key, each.token, result) for key, each in zip(keys, claims, strict=True)]  # type: ignore[union-attr]
    assert store.apply(done) == [Applied()] * 40
    assert one(store, Claim("next")).attempt == 1
    assert [state.result for _, state in other.scan(limit=40)] == [result] * 40  # type: ignore[union-attr]


# ------------------------------------------------------------------ the lease is gone


class Heartbeats(Client):
    """Keeps what its keepalives were answered."""

    def __init__(self, endpoints: list[str]) -> None:
        super().__init__(endpoints)
        self.told: list[int] = []

    def lease_keepalive(self, lease: int, timeout: float | None = None) -> int:
        self.told.append(super().lease_keepalive(lease, timeout))
        return self.told[-1]


def revoke(admin: Client, namespace: str) -> None:
    """End the one session there is, as an administrator can: without asking it."""
    [presence] = admin.range(Layout(namespace).sessions, prefix=True).pairs
    admin.lease_revoke(presence.lease)


class Slow:
    """A consumer with one worker, whose first handler takes its time while the second is claimed already."""

    def __init__(self, store: Store, name: str) -> None:
        self.runs: list[str] = []
        self.store, self.name = store, name
        self.go_on = threading.Event()
        self.transport = Noting(name)
        self.consumer = Consumer(self.transport, service=name)
        self.consumer.on("new_order")(idempotent(store, name="new_order")(self.new_order))

    def new_order(self, message: Message) -> None:
        self.runs.append(message.id)
        if message.id == "first":
            self.go_on.wait(60)

    @contextmanager
    def consuming(self) -> Iterator[None]:
        with consuming(self.consumer, self.transport):
            send(self.name, "first", "second")
            until(lambda: self.runs == ["first"])
            assert isinstance(one(self.store, Get("new_order/second")), Busy)
            try:
                yield
            finally:
                self.go_on.set()


def test_a_keepalive_without_a_time_to_live_is_no_sign_of_life(
    small_etcd: Etcd, unique: str, opens: Opens
) -> None:
    """etcd answers it as if all were well.  It is full, too, so that the store cannot get a new lease."""
    wire = Heartbeats(small_etcd.endpoints)
    slow = Slow(opens(wire, unique), unique)
    with slow.consuming(), closing(Client(small_etcd.endpoints)) as admin:
        fill(small_etcd)
        assert slow.store.fresh()
        wire.told.clear()
        revoke(admin, unique)

        until(lambda: not slow.store.fresh(), 2 * TTL)
        slow.go_on.set()
        assert stays(lambda: not slow.store.fresh() and slow.runs == ["first"], 2 * TTL)
        assert wire.told.count(0) > 2

        make_room(small_etcd)
        until(lambda: len(slow.transport.acknowledged) == 2)
    assert slow.runs == ["first", "second"]


def test_what_a_lost_session_had_claimed_is_not_started_in_the_next(
    etcd: Etcd, unique: str, opens: Opens
) -> None:
    """By then it is in doubt, and may be somebody else's: a new session gives no right to run it."""
    slow, other = Slow(opens(Client(etcd.endpoints), unique), unique), list[str]()
    with slow.consuming(), closing(Client(etcd.endpoints)) as admin:
        revoke(admin, unique)

        @idempotent(opens(Client(etcd.endpoints), unique), name="new_order", key="id")
        def new_order(id: str) -> None:
            other.append(id)

        new_order("second")
        until(slow.store.fresh)
        slow.go_on.set()
        until(lambda: len(slow.transport.acknowledged) == 2)
    assert (slow.runs, other) == (["first"], ["second"])
    assert one(slow.store, Get("new_order/second")).attempt == 2, "it was named in doubt"


# ------------------------------------------------------------------ it is compacted


class Paged(Client):
    """Lets a test act before each page of an import, and counts the pages that were gone."""

    def __init__(self, endpoints: list[str]) -> None:
        super().__init__(endpoints)
        self.before_page: Callable[[], object] = lambda: None
        self.gone = 0

    def range(self, *args: Any, **options: Any) -> Found:
        if options.get("limit"):
            self.before_page()
        try:
            return super().range(*args, **options)
        except Compacted:
            self.gone += 1
            raise


class WatchElsewhere(Paged):
    """Watches through ``watcher``; all else goes the straight way."""

    def __init__(self, endpoints: list[str], watcher: Client) -> None:
        super().__init__(endpoints)
        self._watcher = watcher

    def watch(self, *args: Any, **options: Any) -> Watch:
        return self._watcher.watch(*args, **options)

    def close(self) -> None:
        self._watcher.close()
        super().close()


def compact(admin: Client) -> None:
    """Nothing older than this moment is left."""
    admin.compact(admin.put("/now", b"").revision)


def compact_times(n: int, admin: Client) -> Callable[[], None]:
    """Before the third page, and ``n - 1`` times after it."""
    pages = iter(range(1_000_000))

    def before_page() -> None:
        if 2 <= next(pages) < 2 + n:
            compact(admin)

    return before_page


def settle(store: Store, count: int, size: int = 1) -> None:
    """Append ``count`` keys that are done, with results of that many bytes, and as many that stay claimed."""
    for n in range(count):
        done, _ = store.apply([Claim(f"done/{n}"), Claim(f"open/{n}")])
        assert isinstance(done, Claimed)
        assert one(store, Complete(f"done/{n}", done.token, b"1" * size)) == Applied()


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import of a few keys takes several pages."""
    monkeypatch.setattr("idemp.stores.etcd_replica.PAGE", 10)


@pytest.mark.usefixtures("small_pages")
def test_it_is_compacted_while_a_store_opens(own_etcd: Etcd, unique: str, opens: Opens) -> None:
    """The revision that is being read is gone in the middle: it begins again at a new one."""
    store, wire = opens(Client(own_etcd.endpoints), unique), Paged(own_etcd.endpoints)
    settle(store, 20)
    with closing(Client(own_etcd.endpoints)) as admin:
        wire.before_page = compact_times(2, admin)
        importer = opens(wire, unique)
        assert wire.gone == 2
        assert importer.scan() == store.scan()
    assert len(importer.scan()) == 40


@pytest.mark.usefixtures("small_pages")
def test_it_is_compacted_while_a_memory_is_imported_again(own_etcd: Etcd, unique: str, opens: Opens) -> None:
    """The same, after the watch was lost; what was missed meanwhile is there."""
    store = opens(Client(own_etcd.endpoints), unique)
    with Proxy(own_etcd.members[0].port) as proxy, closing(Client(own_etcd.endpoints)) as admin:
        wire = WatchElsewhere(own_etcd.endpoints, Client([f"127.0.0.1:{proxy.port}"]))
        importer = opens(wire, unique)
        wire.before_page = compact_times(2, admin)
        assert proxy.cut() == 1
        settle(store, 20)
        until(lambda: wire.gone == 2)
        assert importer.scan() == store.scan()
        assert len(importer.scan()) == 40


def test_it_is_compacted_past_a_stalled_watch(
    own_etcd: Etcd, unique: str, opens: Opens, caplog: pytest.LogCaptureFixture
) -> None:
    """What the watch never brought is read anew, and what it brings late does no harm."""
    store = opens(Client(own_etcd.endpoints), unique)
    with Proxy(own_etcd.members[0].port) as proxy, closing(Client(own_etcd.endpoints)) as admin:
        wire = WatchElsewhere(own_etcd.endpoints, Client([f"127.0.0.1:{proxy.port}"]))
        # Thrice in its time to live it looks for what the watch did not bring: not before the compaction.
        behind = opens(wire, unique, session_ttl=120.0)
        proxy.hold(answers=True)
        settle(store, 300, 60_000)  # more than etcd and the kernel keep for one that does not read
        compact(admin)
        proxy.release()
        until(lambda: re.search("importing again: .*compacted", caplog.text))
        assert [one(behind, Claim(f"{kind}/299")).__class__ for kind in ("done", "open")] == [Done, Busy]
        assert behind.scan() == store.scan()
        assert len(behind.scan()) == 600


# ------------------------------------------------------------------ it is silent


@pytest.mark.parametrize("way", ["questions", "answers"])
def test_nothing_comes_through(
    etcd: Etcd, unique: str, opens: Opens, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Every connection stands, but no byte goes this way: unavailable in time, and nothing runs meanwhile."""
    monkeypatch.setattr("idemp.stores.etcd.PATIENCE", 1.0)
    ran: list[str] = []
    with Proxy(etcd.members[0].port) as proxy:
        store = opens(Client([f"127.0.0.1:{proxy.port}"], timeout=1.0), unique)

        @idempotent(store, name="job", key="id")
        def job(id: str) -> str:
            ran.append(id)
            return id

        assert job("before") == "before"
        proxy.hold(**{way: True})
        for id in ("during", "during", "also"):
            began = time.monotonic()
            with pytest.raises(StoreUnavailable):
                job(id)
            assert time.monotonic() - began < 6
        until(lambda: not store.fresh(), 2 * TTL)
        assert ran == ["before"]

        proxy.release()
        assert [insist(partial(job, id)) for id in ("during", "also")] == ["during", "also"]
        assert ran == ["before", "during", "also"]
        until(store.fresh)
        other = opens(Client(etcd.endpoints), unique)
        assert {state.__class__ for _, state in other.scan()} == {Done}


def test_the_watch_alone_is_silent(etcd: Etcd, unique: str, opens: Opens) -> None:
    """Claims are decided all the same, and who only waits finds out by itself."""
    other = opens(Client(etcd.endpoints), unique)
    with Proxy(etcd.members[0].port) as proxy:
        store = opens(WatchElsewhere(etcd.endpoints, Client([f"127.0.0.1:{proxy.port}"])), unique)
        seen = one(other, Claim("seen"))
        until(lambda: isinstance(one(store, Get("seen")), Busy))
        proxy.hold(answers=True)
        one(other, Complete("seen", seen.token, b"1"))
        missed = one(other, Claim("missed"))
        # Sooner than the connection is found dead, which takes a ping of three seconds.
        until(lambda: isinstance(one(store, Claim("seen")), Done), 2.5)
        found = one(store, Claim("missed"))
        assert (found.__class__, found.token) == (Busy, missed.token)
        proxy.release()
        one(other, Complete("missed", missed.token))
        until(lambda: isinstance(one(store, Claim("missed")), Done))


# ------------------------------------------------------------------ under load


def load(stage: Stage, deliveries: list[str], seconds: float) -> None:
    """Publish them, a few at a time."""
    portion = max(1, int(len(deliveries) / (seconds / 0.25)))
    while deliveries:
        stage.publish([deliveries.pop() for _ in range(min(portion, len(deliveries)))])
        time.sleep(0.25)


def check(stage: Stage, count: int) -> Counter[bool]:
    """Nothing lost, and no effect more than doubt was named; how many had more than one."""
    stage.until(lambda: len(stage.effects()) == count and len(stage.states()) == count)
    stage.until(stage.at_rest)
    assert [replica.stop() for replica in stage.replicas] == [0] * len(stage.replicas)
    effects, states = stage.effects(), stage.states()
    assert states.keys() == effects.keys()
    for id, state in states.items():
        assert isinstance(state, Done), f"{id} ended as {state}"
        assert len(effects[id]) <= state.attempt, f"{id} took effect more often than it was attempted"
        assert state.token == effects[id][-1].token, "the last effect is the one on record"
    assert "Traceback" not in "".join(replica.said() for replica in stage.replicas)
    return Counter(len(found) > 1 for found in effects.values())


def test_the_quorum_is_lost_for_20_seconds(
    tmp_path: Path, unique: str, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions outlast it, because nobody is there to end them: nothing doubled, and everything handled."""
    need("etcd")
    monkeypatch.setattr("tests.test_replicas.SESSION", "10s")
    with Etcd(members=3) as cluster, ExitStack() as stack:
        stage = Stage(tmp_path, rabbitmq.url, unique, f"{cluster.url}{unique}")
        stack.callback(stage.close)
        stage.start()
        stage.start()
        deliveries = three_times(2_000)
        publisher = threading.Thread(target=load, args=(stage, deliveries, 25))
        publisher.start()
        stack.callback(publisher.join)
        stage.until(lambda: len(stage.effects()) > 100)
        lost = [member for number, member in enumerate(cluster.members) if number != cluster.leader()]
        for member in lost:
            member.kill()
        time.sleep(10)  # what was claimed already may end
        before = len(stage.effects())
        time.sleep(10)
        assert len(stage.effects()) == before, "a handler started without a quorum"
        for member in lost:
            member.launch()
        publisher.join()
        assert check(stage, 2_000)[True] == 0


def test_etcd_restarts_under_load(tmp_path: Path, unique: str, rabbitmq: RabbitMQ, own_etcd: Etcd) -> None:
    """Stopped once and killed once."""
    with ExitStack() as stack:
        stage = Stage(tmp_path, rabbitmq.url, unique, f"{own_etcd.url}{unique}")
        stack.callback(stage.close)
        stage.start()
        stage.start()
        publisher = threading.Thread(target=load, args=(stage, three_times(2_000), 8))
        publisher.start()
        stack.callback(publisher.join)
        for end in (own_etcd.stop, own_etcd.kill):
            here = len(stage.effects())
            stage.until(lambda here=here: len(stage.effects()) > here + 200)  # type: ignore[misc]
            end()
            time.sleep(1)
            own_etcd.start()
        publisher.join()
        check(stage, 2_000)


# ------------------------------------------------------------------ a hundred restarts

VICTIM = """
import sys, time
from idemp import open_store
from idemp.ports import Claim, Complete
url, name = sys.argv[1:]
store = open_store(url)
done, _ = store.apply([Claim(name + "done"), Claim(name + "open")])
store.apply([Complete(name + "done", done.token)])
print("ready", flush=True)
time.sleep(600)
"""


class Restarts:
    """Opens one namespace again and again, and leaves it in every way there is."""

    retention = 4.0  # long beside what a keeper's round takes on a slow disk: three of them come on top

    def __init__(self, etcd: Etcd, namespace: str, folder: Path) -> None:
        self.layout, self.admin = Layout(namespace), Client(etcd.endpoints)
        self.open: set[str] = set()  # keys whose claims nobody completed
        self._etcd, self._namespace, self._folder = etcd, namespace, folder
        self._victims: list[Program] = []

    def store(self) -> Store:
        connect = partial(Client, self._etcd.endpoints)
        return EtcdStore(connect, self._namespace, retention=self.retention, session_ttl=TTL)

    def close_in_good_order(self, name: str) -> None:
        with closing(self.store()) as store:
            self._work(store, name)

    def lose_the_lease(self, name: str) -> None:
        with closing(self.store()) as store:
            self._work(store, name)
            mine = str(os.getpid()).encode()
            [lease] = [each.lease for each in self._of(self.layout.sessions) if each.value == mine]
            self.admin.lease_revoke(lease)
            self._work(store, name + "again/")

    def be_killed(self, name: str) -> None:
        url = f"{self._etcd.url}{self._namespace}?retention={self.retention:.0f}s&session={TTL:.0f}s"
        self._victims.append(Program(self._folder / str(len(self._victims)), ["-c", VICTIM, url, name], {}))
        self.open.add(name + "open")

    def kill(self) -> None:
        """The victims, when they have done their part."""
        for victim in self._victims:
            victim.wait_for("ready")
            victim.stop(signal.SIGKILL)

    def _work(self, store: Store, name: str) -> None:
        done, _ = store.apply([Claim(name + "done"), Claim(name + "open")])
        assert isinstance(done, Claimed)
        store.apply([Complete(name + "done", done.token)])
        self.open.add(name + "open")

    def _of(self, prefix: str) -> tuple[KeyValue, ...]:
        return self.admin.range(prefix, prefix=True).pairs

    def left(self) -> dict[str, set[str]]:
        """What etcd holds of the namespace: kind -> the names below it."""
        found: dict[str, set[str]] = defaultdict(set)
        for pair in self._of(self.layout.root):
            kind, _, name = pair.key.removeprefix(self.layout.root).partition("/")
            found[kind].add(name)
        return found

    def only_what_the_retention_explains(self) -> bool:
        """One live session; its log and one snapshot for each bucket that is not over."""
        found, [floor] = self.left(), self._of(self.layout.floor)
        buckets = {int(name.split("/")[0]) for name in found["log"] | found["snap"]}
        age = time.time() - min(decode(pair.value)[0] for pair in self._of(self.layout.logs))
        return (
            found.keys() == {"bucket", "floor", "retention", "session", "tail", "log", "snap"}
            and len(found["session"]) == 1
            and found["tail"] == found["session"]
            and min(buckets) >= int(floor.value)
            and len(buckets) <= SLICES + 3
            and len(found["snap"]) <= 2 * len(buckets)  # a page, and its end
            and age < 1.5 * self.retention
        )


def threads_and_files() -> tuple[int, int]:
    """How many this process has."""
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def test_a_hundred_restarts_leave_only_what_the_retention_explains(
    etcd: Etcd, unique: str, tmp_path: Path
) -> None:
    """Most are closed in good order; every tenth is killed, and every tenth loses its lease."""
    restarts = Restarts(etcd, unique, tmp_path)
    ways = [restarts.close_in_good_order] * 8 + [restarts.lose_the_lease, restarts.be_killed]
    for number in range(100):
        if number == 10:  # by now the driver has what it keeps for itself
            before = threads_and_files()
        ways[number % 10](f"{number}/")
    restarts.kill()
    last = restarts.store()
    last.apply([])
    until(restarts.only_what_the_retention_explains, 60)
    # The last ones may be done for less than the retention still.
    doubts = {(key, Doubt) for key in restarts.open}
    until(lambda: {(key, state.__class__) for key, state in last.scan()} == doubts, 60)
    last.close()
    until(lambda: threads_and_files() <= before)
    assert {kind: len(names) for kind, names in restarts.left().items() if kind in ("session", "tail")} == {
        "tail": 1
    }
    restarts.admin.close()
