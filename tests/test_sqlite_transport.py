"""The broker in a file: what the contract of all transports does not ask."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idemp.errors import ConfigError, TransportUnavailable
from idemp.message import Properties
from idemp.ports import Clock, Delivery, Publication, Sent
from idemp.stores import open_store
from idemp.transports import open_transport, publish
from idemp.transports import sqlite as module
from idemp.transports.envelope import pack, unpack
from idemp.transports.sqlite import SqliteTransport

VISIBILITY = 30.0


class Time:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.steady = 1000.0
        self.wall = 1_700_000_000.0
        self.clock = Clock(wall=lambda: self.wall, steady=lambda: self.steady, sleep=self.go)

    def go(self, seconds: float) -> None:
        self.steady += seconds
        self.wall += seconds

    def reboot(self, seconds: float, steady: float = 5.0) -> None:
        """The host was away for ``seconds``."""
        self.wall += seconds
        self.steady = steady


@pytest.fixture
def now() -> Time:
    return Time()


Open = Callable[[], SqliteTransport]


@pytest.fixture
def opened(tmp_path: Path, now: Time) -> Iterator[Open]:
    """Connections to one file, with the queue q, at the time ``now``."""
    transports: list[SqliteTransport] = []

    def open() -> SqliteTransport:
        path = str(tmp_path / "queues.db")
        transports.append(SqliteTransport(path, visibility=VISIBILITY, clock=now.clock))
        return transports[-1]

    open().declare("q")
    yield open
    for transport in transports:
        transport.close()


def message(name: str, delay: float = 0.0) -> Publication:
    return Publication(name.encode(), Properties(message_id=name), "", "q", delay)


def bodies(transport: SqliteTransport) -> list[str]:
    """What there is at this moment."""
    return [event.body.decode() for event in transport.poll(0.0) if isinstance(event, Delivery)]


def put(transport: SqliteTransport, *publications: Publication) -> None:
    transport.send(publications)
    assert all(isinstance(event, Sent) and not event.error for event in transport.poll(0.0))


# ------------------------------------------------------------------ visibility


def test_a_silent_consumer_is_missed(opened: Open, now: Time) -> None:
    """After the visibility time-out others get what it has not acknowledged, in its place."""
    dead, alive = opened(), opened()
    put(dead, message("a"), message("b"), message("c"))
    dead.consume("q", 2)
    assert bodies(dead) == ["a", "b"]
    alive.consume("q", 10)
    assert bodies(alive) == ["c"]

    now.go(VISIBILITY - 1)
    assert bodies(alive) == []
    now.go(1)
    assert bodies(alive) == ["a", "b"]


def test_the_silent_one_hears_of_it(opened: Open, now: Time) -> None:
    """And its acknowledgements do not touch what is another's now."""
    late, other = opened(), opened()
    put(late, message("a"))
    late.consume("q", 10)
    (mine,) = late.poll(0.0)
    assert isinstance(mine, Delivery)
    now.go(VISIBILITY)
    other.consume("q", 10)
    assert bodies(other) == ["a"]

    late.ack([mine.tag])
    with pytest.raises(TransportUnavailable, match="for 30 s"):
        late.poll(0.0)
    with pytest.raises(TransportUnavailable):
        late.poll(0.0)
    late.connect()
    late.consume("q", 10)
    assert bodies(late) == []
    other.close()
    assert bodies(late) == ["a"]


def test_who_holds_nothing_is_not_missed(opened: Open, now: Time) -> None:
    """An idle consumer goes on, as after a suspend of the machine."""
    idle, other = opened(), opened()
    idle.consume("q", 10)
    other.consume("q", 10)
    assert bodies(idle) == []
    now.go(VISIBILITY * 10)
    assert bodies(other) == []
    put(opened(), message("a"))
    assert bodies(idle) == ["a"]
    assert bodies(other) == []
    idle.close()
    assert bodies(other) == ["a"]


def test_nobody_missed_means_nothing_lost(opened: Open, now: Time) -> None:
    """A consumer that was away too long, but that no other has replaced, goes on."""
    transport = opened()
    put(transport, message("a"))
    transport.consume("q", 10)
    (mine,) = transport.poll(0.0)
    assert isinstance(mine, Delivery)
    now.go(VISIBILITY * 10)
    transport.ack([mine.tag])
    assert transport.poll(0.0) == []
    assert transport.depth("q") == 0


def test_polling_keeps_what_is_out(opened: Open, now: Time) -> None:
    """However long the handler takes; also after a cancel."""
    busy, other = opened(), opened()
    put(busy, message("a"))
    busy.consume("q", 1)
    assert bodies(busy) == ["a"]
    other.consume("q", 1)
    for round in range(20):
        now.go(VISIBILITY / 3)
        busy.poll(0.0)
        assert bodies(other) == []
        if round == 10:
            busy.cancel()


def test_a_reboot_frees_everything(opened: Open, now: Time) -> None:
    """The clock of all leases starts anew: none of them may last for days."""
    before = opened()
    put(before, message("a"))
    before.consume("q", 1)
    assert bodies(before) == ["a"]
    now.reboot(60)
    after = opened()
    after.consume("q", 1)
    assert bodies(after) == ["a"]


@pytest.mark.parametrize(("away", "left"), [(60, 40), (3600, 0)])
def test_a_delay_goes_on_over_a_reboot(opened: Open, now: Time, away: float, left: float) -> None:
    """By the wall clock, because that is all there is."""
    put(opened(), message("late", delay=100))
    now.reboot(away)
    after = opened()
    after.consume("q", 1)
    if left:
        now.go(left - 1)
        assert bodies(after) == []
        now.go(1)
    assert bodies(after) == ["late"]


def test_a_wall_clock_that_jumps_changes_nothing(opened: Open, now: Time) -> None:
    """Neither for delays nor for leases."""
    first, second = opened(), opened()
    put(first, message("a"), message("late", delay=100))
    first.consume("q", 10)
    second.consume("q", 10)
    assert bodies(first) == ["a"]
    for jump in (1e6, -2e6):
        now.wall += jump
        assert bodies(second) == []
    now.go(99)
    first.poll(0.0)
    assert bodies(second) == []
    now.go(1)
    assert bodies(second) == ["late"]


def test_delayed_messages_come_in_the_order_of_their_times(opened: Open, now: Time) -> None:
    """Behind those that came meanwhile."""
    transport = opened()
    put(transport, message("30", delay=30), message("10", delay=10), message("20", delay=20))
    now.go(25)
    transport.consume("q", 10)
    put_and_came = transport.send([message("0")])
    assert put_and_came
    assert bodies(transport) == ["0", "10", "20"]
    now.go(5)
    assert bodies(transport) == ["30"]


def test_a_short_delay_needs_no_renewal_to_be_noticed(tmp_path: Path) -> None:
    """A poll that waits already knows when the next one is due, whatever the visibility."""
    transport = SqliteTransport(str(tmp_path / "q.db"), visibility=600)
    transport.declare("q")
    transport.consume("q", 10)
    transport.send([message("late", delay=0.2)])
    began = time.monotonic()
    assert isinstance(transport.poll(10.0)[0], Sent)
    assert bodies_of(transport.poll(10.0)) == ["late"]
    assert 0.19 <= time.monotonic() - began < 5
    transport.close()


def bodies_of(events: list[Any]) -> list[str]:
    return [event.body.decode() for event in events]


# ------------------------------------------------------------------ the file


def test_what_is_sent_and_acknowledged_is_in_the_file_after_close(tmp_path: Path) -> None:
    """Without a poll between: both go out with the next call that writes, and that may be close."""
    url = f"sqlite:///{tmp_path}/q.db"
    first = open_transport(url)
    first.declare("q")
    publish(first, [message("a")])
    first.consume("q", 1)
    (came,) = first.poll(1.0)
    assert isinstance(came, Delivery)
    first.send([message("b")])
    first.ack([came.tag])
    first.close()
    second = open_transport(url)
    second.consume("q", 10)
    assert bodies_of(second.poll(1.0)) == ["b"]
    second.close()


def test_big_messages_come_in_portions(tmp_path: Path) -> None:
    """No poll brings many times 16 MB, and no statement carries it; the order stays."""
    transport = SqliteTransport(str(tmp_path / "q.db"))
    transport.declare("q")
    big = os.urandom(6_000_000)
    publish(transport, [Publication(big + bytes([n]), Properties(), "", "q") for n in range(8)])
    transport.consume("q", 100)
    sizes: list[int] = []
    order: list[int] = []
    while len(order) < 8:
        got = transport.poll(5.0)
        sizes.append(len(got))
        order += [event.body[-1] for event in got if isinstance(event, Delivery)]
    assert order == list(range(8))
    assert max(sizes) == 3
    transport.close()


def test_every_batch_is_few_statements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sqlite3 gives the GIL away at each: a busy thread beside it must not take it per message."""
    transport = SqliteTransport(str(tmp_path / "q.db"))
    transport.declare("q")
    transport.consume("q", 500)
    seen: list[str] = []
    link = transport._link
    assert link is not None
    transport.send([message(str(n)) for n in range(500)])
    link._db.set_trace_callback(seen.append)
    got = [event for event in transport.poll(0.0) if isinstance(event, Delivery)]
    transport.ack([each.tag for each in got])
    transport.poll(0.0)
    link._db.set_trace_callback(None)
    transport.close()
    assert len(got) == 500
    assert len(seen) < 25


def test_the_broker_may_live_in_the_file_of_the_store(tmp_path: Path) -> None:
    """One file is enough for a small service."""
    url = f"sqlite:///{tmp_path}/all.db"
    transport, store = open_transport(url), open_store(url)
    transport.declare("q")
    assert store.scan() == []
    publish(transport, [message("a")])
    assert transport.depth("q") == 1
    store.close()
    transport.close()
    store, transport = open_store(url), open_transport(url)
    assert store.scan() == []
    assert transport.depth("q") == 1
    store.close()
    transport.close()


def test_a_locked_file_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sentence that names it; `connect` goes on when it is free again."""
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    path = tmp_path / "q.db"
    transport = SqliteTransport(str(path))
    transport.declare("q")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    transport.send([message("a")])
    with pytest.raises(TransportUnavailable, match=r"q\.db: database is locked"):
        transport.poll(1.0)
    other.execute("ROLLBACK")
    other.close()
    transport.connect()
    assert transport.depth("q") == 0
    transport.close()


def test_a_full_disk_is_unavailable(tmp_path: Path) -> None:
    """And what was not confirmed is not there."""
    path = tmp_path / "q.db"
    transport = SqliteTransport(str(path))
    transport.declare("q")
    link = transport._link
    assert link is not None
    link._db.execute("PRAGMA max_page_count=30")
    transport.send([Publication(bytes(200_000), Properties(), "", "q")])
    with pytest.raises(TransportUnavailable, match="full"):
        transport.poll(1.0)
    transport.connect()
    assert transport.depth("q") == 0
    transport.close()


def test_what_is_no_sqlite_file_is_refused(tmp_path: Path) -> None:
    """Rather than overwritten."""
    path = tmp_path / "notes.txt"
    path.write_text("not a database " * 100)
    transport = open_transport(f"sqlite:///{path}")
    with pytest.raises(ConfigError, match=r"notes\.txt is no SQLite file"):
        transport.declare("q")
    transport.close()
    assert path.read_text().startswith("not a database")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """It is a wrong setting, and waiting would not help."""
    transport = open_transport(f"sqlite:///{tmp_path}/none/q.db")
    with pytest.raises(ConfigError, match=r"the folder of .* does not exist"):
        transport.declare("q")
    transport.close()


@pytest.mark.parametrize(
    "url", ["sqlite://q.db", "sqlite://", "sqlite:///q.db?visible=3s", "sqlite:///q.db?visibility=soon"]
)
def test_a_malformed_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigError):
        open_transport(url)


def test_many_openers_make_one_file(tmp_path: Path) -> None:
    """At the same moment."""
    transports = [SqliteTransport(str(tmp_path / "q.db")) for _ in range(8)]
    start = threading.Barrier(8)
    errors: list[Exception] = []

    def go(transport: SqliteTransport) -> None:
        start.wait()
        try:
            transport.declare("q", "x", "#")
            publish(transport, [message("m")])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=go, args=(transport,)) for transport in transports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert transports[0].depth("q") == 8
    for transport in transports:
        transport.close()


# ------------------------------------------------------------------ the envelope

texts = st.text() | st.just("\ud800")
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | texts
    | st.binary()
    | st.decimals(allow_nan=False)
    | st.datetimes(timezones=st.just(UTC)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | st.binary(), inner, max_size=3),
    max_leaves=10,
)
properties = st.builds(
    Properties,
    *[st.none() | texts for _ in range(4)],
    st.none() | st.floats(0, 1e10),
    st.none() | texts,
    st.dictionaries(texts, values, max_size=3),
)


@given(st.binary(), properties, texts, texts)
def test_what_is_packed_is_unpacked(body: bytes, given: Properties, exchange: str, key: str) -> None:
    assert unpack(pack(Publication(body, given, exchange, key))) == (body, given, exchange, key)


def test_a_header_that_looks_like_a_tag_is_none() -> None:
    given = Properties(headers={"$": "bytes", "of": {"$": "bytes", "of": "AAAA"}})
    assert unpack(pack(Publication(b"", given, "", "")))[1] == given


def test_what_no_header_can_hold_is_an_error_of_that_message_alone(opened: Open) -> None:
    """And sending it again would not help."""
    transport = opened()
    odd = Publication(b"", Properties(headers={"odd": {1, 2}}), "", "q")
    numbers = transport.send([message("a"), odd, message("b")])
    said = [event for event in transport.poll(0.0) if isinstance(event, Sent)]
    assert [event.number for event in said] == numbers
    assert [event.error for event in said] == [
        "",
        "the message cannot be kept: a header cannot hold a set",
        "",
    ]
    assert transport.depth("q") == 2


def test_what_amqp_brings_can_be_kept(opened: Open) -> None:
    """As the dead letters of another broker do."""
    headers: dict[Any, Any] = {
        "x-death": [{"count": 1, "time": datetime(2024, 1, 2, tzinfo=UTC), "queue": b"q"}],
        "price": Decimal("1.50"),
        b"\xff": None,
    }
    transport = opened()
    given = Properties(headers=headers)
    put(transport, Publication(b"", given, "", "q"))
    transport.consume("q", 1)
    (came,) = transport.poll(0.0)
    assert isinstance(came, Delivery)
    assert came.properties == given
