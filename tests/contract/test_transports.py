"""The laws of a transport (design of `idemp.ports.Transport`), which every transport keeps."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import astuple

from idemp.errors import Closed, ConfigError, TransportUnavailable, Unroutable
from idemp.message import Properties
from idemp.ports import Delivery, Publication, Sent, Transport
from idemp.transports import open_transport, publish
from tests.contract.brokers import BROKERS, FEATURES, OWN_SERVERS, Broker
from tests.pair import until

SPAWN = multiprocessing.get_context("spawn")
SECONDS = 30.0
SILENCE = 0.3
"""Seconds in which what must not come has not come."""


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Broker:
    """Each broker in turn."""
    return BROKERS[request.param](request, tmp_path)


@pytest.fixture(params=[name for name, features in FEATURES.items() if features.shared])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Broker:
    """Each broker that other processes reach."""
    return BROKERS[request.param](request, tmp_path)


Open = Callable[[], Transport]


@pytest.fixture
def opened(broker: Broker) -> Iterator[Open]:
    """Opens connections that the test need not close."""
    transports: list[Transport] = []

    def open() -> Transport:
        transports.append(broker.open())
        return transports[-1]

    yield open
    for transport in transports:
        transport.close()


@pytest.fixture
def transport(opened: Open, unique: str) -> Transport:
    """One with the queue ``unique``."""
    transport = opened()
    transport.declare(unique)
    return transport


def to(queue: str, name: str, delay: float = 0.0) -> Publication:
    """A message straight to ``queue``."""
    return Publication(name.encode(), Properties(message_id=name), "", queue, delay)


def on(exchange: str, key: str, name: str = "m") -> Publication:
    """A message to an exchange."""
    return Publication(name.encode(), Properties(message_id=name), exchange, key)


def take(transport: Transport, n: int) -> list[Delivery]:
    """The next ``n`` deliveries."""
    got: list[Delivery] = []
    end = time.monotonic() + SECONDS
    while len(got) < n:
        assert time.monotonic() < end, f"{len(got)} of {n} came: {names(got)[:20]}"
        got += deliveries(transport.poll(0.2))
    return got


def deliveries(events: Sequence[Delivery | Sent]) -> list[Delivery]:
    return [event for event in events if isinstance(event, Delivery)]


def names(got: Sequence[Delivery]) -> list[str]:
    return [delivery.body.decode() for delivery in got]


def silent(transport: Transport, seconds: float = SILENCE) -> bool:
    """Nothing comes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if transport.poll(0.05):
            return False
    return True


def answers(transport: Transport, numbers: Sequence[int]) -> dict[int, Sent]:
    """The broker's word on each."""
    got: dict[int, Sent] = {}
    end = time.monotonic() + SECONDS
    while not got.keys() >= set(numbers):
        assert time.monotonic() < end, f"{len(got)} of {len(numbers)} were answered"
        got |= {event.number: event for event in transport.poll(0.2) if isinstance(event, Sent)}
    return got


def tags(got: Sequence[Delivery]) -> list[int]:
    return [delivery.tag for delivery in got]


# ------------------------------------------------------------------ 4, 5: publishing


def test_a_message_comes_as_it_was_sent(transport: Transport, unique: str) -> None:
    """Law 4: confirmed, and every property and header of it delivered."""
    headers = {"n": -7, "big": 1 << 40, "yes": True, "text": "t", "nested": {"list": [1, "two", [None]]}}
    given = Properties("id-1", "new_order", "cause-1", "shop", 1_700_000_000, "application/json", headers)
    transport.declare(unique, f"{unique}-x", "orders.*")
    numbers = transport.send([Publication(b"\x00body\xff", given, f"{unique}-x", "orders.new")])

    assert answers(transport, numbers) == {numbers[0]: Sent(numbers[0], "")}

    transport.consume(unique, 10)
    (came,) = take(transport, 1)
    assert astuple(came)[1:] == (b"\x00body\xff", given, f"{unique}-x", "orders.new", False)


def test_a_message_without_properties_comes(transport: Transport, unique: str) -> None:
    """Law 4: they are all optional, and so is the body."""
    publish(transport, [Publication(b"", Properties(), "", unique)])
    transport.consume(unique, 10)
    (came,) = take(transport, 1)
    assert (came.body, came.properties) == (b"", Properties())


@pytest.mark.parametrize("text", ["žluťoučký kůň", "\U0001f4a5", "a\x00b", "שלום", " ", "\n", "'\"\\%"])
def test_any_unicode_goes_through(transport: Transport, unique: str, text: str) -> None:
    """Law 4: in ids, types, header names and values, routing keys and queue names."""
    queue = unique + text.replace("\n", "")  # RabbitMQ drops line ends from names of queues
    transport.declare(queue)
    given = Properties(text, text, text, text, None, text, {text: text, "list": [text]})
    publish(transport, [Publication(text.encode(), given, "", queue)])
    transport.consume(queue, 10)
    (came,) = take(transport, 1)
    assert (came.properties, came.routing_key, came.body.decode()) == (given, queue, text)


def test_bytes_in_a_header_come_as_bytes(transport: Transport, unique: str) -> None:
    """Law 4: also those that are not text."""
    given = Properties("id", headers={"raw": b"\x00\xff", "list": [b"\xfe"], "table": {"deep": b"\x00"}})
    publish(transport, [Publication(b"", given, "", unique)])
    transport.consume(unique, 10)
    assert take(transport, 1)[0].properties == given


def test_a_big_body_goes_through(transport: Transport, unique: str) -> None:
    """Law 4: 5 MB, beside small ones, in order."""
    big = os.urandom(1 << 20) * 5
    publish(transport, [to(unique, "a"), Publication(big, Properties(), "", unique), to(unique, "b")])
    transport.consume(unique, 10)
    got = take(transport, 3)
    assert [delivery.body for delivery in got] == [b"a", big, b"b"]


def test_each_bound_queue_gets_each_matching_message(transport: Transport, unique: str) -> None:
    """Law 5: also a queue that is bound twice gets it once."""
    exchange = f"{unique}-x"
    transport.declare(unique, exchange, "orders.*")
    transport.declare(unique, exchange, "orders.#")
    transport.declare(f"{unique}-2", exchange, "#")
    publish(transport, [on(exchange, key, key) for key in ("orders.new", "orders.new.eu", "refunds", "")])

    transport.consume(unique, 10)
    assert names(take(transport, 2)) == ["orders.new", "orders.new.eu"]
    assert silent(transport)
    transport.cancel()
    transport.consume(f"{unique}-2", 10)
    assert names(take(transport, 4)) == ["orders.new", "orders.new.eu", "refunds", ""]


@pytest.mark.parametrize("pattern", ["a.*", "a.#", "#.b", "*.*", "#", "a.#.b", "*", "", "#.#", "a..b", "*.#"])
def test_topics_match_alike_everywhere(transport: Transport, unique: str, pattern: str) -> None:
    """Law 5: as this table says, of which the real broker is the witness."""
    expected = {
        "a.*": ["a.b", "a.c", "a."],
        "a.#": ["a", "a.b", "a.c", "a.x.b", "a.", "a..b"],
        "#.b": ["a.b", "b", "a.x.b", "a..b"],
        "*.*": ["a.b", "a.c", "a."],
        "#": ["a", "a.b", "a.c", "b", "a.x.b", "", "a.", "a..b"],
        "a.#.b": ["a.b", "a.x.b", "a..b"],
        "*": ["a", "b"],
        "": [""],
        "#.#": ["a", "a.b", "a.c", "b", "a.x.b", "", "a.", "a..b"],
        "a..b": ["a..b"],
        "*.#": ["a", "a.b", "a.c", "b", "a.x.b", "a.", "a..b"],
    }
    exchange = f"{unique}-x"
    transport.declare(f"{unique}-all", exchange, "#")
    transport.declare(unique, exchange, pattern)
    publish(transport, [on(exchange, key, key) for key in expected["#"]])
    transport.consume(unique, 20)
    assert sorted(names(take(transport, len(expected[pattern])))) == sorted(expected[pattern])
    assert silent(transport, 0.05)


def test_messages_wait_while_nobody_consumes(opened: Open, unique: str) -> None:
    """Law 5: and survive their publisher's connection."""
    publisher = opened()
    publisher.declare(unique)
    publish(publisher, [to(unique, str(n)) for n in range(100)])
    publisher.close()

    transport = opened()
    assert transport.depth(unique) == 100
    transport.consume(unique, 30)
    got: list[Delivery] = []
    while len(got) < 100:
        some = take(transport, 1)
        transport.ack(tags(some))
        got += some
    assert names(got) == [str(n) for n in range(100)]


@pytest.mark.parametrize("delay", [0.0, 0.5])
def test_what_no_queue_takes_is_an_error(transport: Transport, unique: str, delay: float) -> None:
    """Law 4: and does not touch its neighbours."""
    numbers = transport.send([to(unique, "a"), to(f"{unique}-nobody", "b", delay), to(unique, "c")])
    said = answers(transport, numbers)

    assert [said[number].error == "" for number in numbers] == [True, False, True]
    assert [said[number].unroutable for number in numbers] == [False, True, False]
    assert f"'{unique}-nobody'" in said[numbers[1]].error
    transport.consume(unique, 10)
    assert names(take(transport, 2)) == ["a", "c"]


def test_a_direct_exchange(transport: Transport, unique: str) -> None:
    """Takes messages with its binding's key, and no others; declared again it is the same."""
    for _ in range(2):
        transport.declare(unique, f"{unique}-direct", "in", kind="direct")
    with pytest.raises(Unroutable):
        publish(transport, [on(f"{unique}-direct", "out")])
    publish(transport, [on(f"{unique}-direct", "in")])
    assert transport.depth(unique) == 1


def test_what_no_binding_matches_is_an_error(transport: Transport, unique: str) -> None:
    """Law 4: the exchange alone keeps nothing."""
    exchange = f"{unique}-x"
    transport.declare(unique, exchange, "orders")
    numbers = transport.send([on(exchange, "orders"), on(exchange, "refunds"), on(exchange, "orders")])
    said = answers(transport, numbers)
    assert [said[number].unroutable for number in numbers] == [False, True, False]
    assert exchange in said[numbers[1]].error
    assert "'refunds'" in said[numbers[1]].error


def test_a_missing_exchange_is_an_error_and_no_more(transport: Transport, unique: str) -> None:
    """Law 4: deliveries and later publications are not disturbed."""
    publish(transport, [to(unique, "before")])
    transport.consume(unique, 10)
    (before,) = take(transport, 1)
    numbers = transport.send([on(f"{unique}-nowhere", "k")])
    assert answers(transport, numbers)[numbers[0]].unroutable

    transport.ack([before.tag])
    transport.send([to(unique, "after")])
    assert names(take(transport, 1)) == ["after"]


def test_publish_says_what_became_of_it(transport: Transport, unique: str) -> None:
    """Law 4: the exchange and the routing key are named."""
    with pytest.raises(Unroutable, match=r"'k'.*nowhere"):
        publish(transport, [to(unique, "a"), on("nowhere", "k")])
    publish(transport, [])


def test_publish_refuses_a_consuming_transport(transport: Transport, unique: str) -> None:
    """Rather than lose a delivery that comes meanwhile."""
    publish(transport, [to(unique, "first")])
    transport.consume(unique, 1)
    with pytest.raises(ConfigError, match="of its own"):
        publish(transport, [to(unique, str(n)) for n in range(10)])


def test_numbers_name_publications(transport: Transport, unique: str) -> None:
    """Law 4: each is answered exactly once."""
    numbers: list[int] = []
    for batch in range(10):
        numbers += transport.send([to(unique, f"{batch}-{n}") for n in range(50)])
    got: Counter[int] = Counter()
    while sum(got.values()) < 500:
        got.update(event.number for event in transport.poll(5.0) if isinstance(event, Sent))
    assert got == Counter(numbers)
    assert transport.depth(unique) == 500


# ------------------------------------------------------------------ 6: delay


def test_a_delayed_message_comes_after_its_delay(transport: Transport, unique: str) -> None:
    """Law 6: not before, and not long after."""
    transport.consume(unique, 10)
    began = time.monotonic()
    transport.send([to(unique, "late", delay=1.0), to(unique, "now")])
    assert names(take(transport, 1)) == ["now"]
    (late,) = take(transport, 1)
    took = time.monotonic() - began
    assert names([late]) == ["late"]
    assert 1.0 <= took < 5.0
    assert (late.properties.message_id, late.exchange, late.routing_key) == ("late", "", unique)


def test_a_longer_delay_holds_nobody_up(transport: Transport, unique: str) -> None:
    """Law 6: the shorter ones behind it come first."""
    transport.consume(unique, 10)
    publications = [to(unique, "60", delay=60), to(unique, "2", delay=2.0), to(unique, "1", delay=0.5)]
    transport.send([*publications, to(unique, "0")])
    assert names(take(transport, 3)) == ["0", "1", "2"]


def test_a_delayed_message_waits_while_nobody_is_connected(opened: Open, unique: str) -> None:
    """Law 6: it is confirmed, so it is safe."""
    first = opened()
    first.declare(unique)
    publish(first, [to(unique, "late", delay=0.5)])
    assert first.depth(unique) == 0
    first.close()

    second = opened()
    second.consume(unique, 10)
    assert names(take(second, 1)) == ["late"]


def test_a_delayed_message_can_be_delayed_again(transport: Transport, unique: str) -> None:
    """Law 6: as a retry does, with what came."""
    transport.consume(unique, 10)
    transport.send([to(unique, "m", delay=0.1)])
    for _ in range(3):
        (came,) = take(transport, 1)
        transport.send([Publication(came.body, came.properties, "", unique, 0.1)])
        transport.ack([came.tag])
    assert names(take(transport, 1)) == ["m"]


def test_a_delay_needs_the_default_exchange(transport: Transport, unique: str) -> None:
    """As the port says; nothing of the batch is sent."""
    with pytest.raises(ConfigError):
        transport.send([to(unique, "a"), on("x", "k")._replace(delay=1.0)])
    assert silent(transport)
    assert transport.depth(unique) == 0


# ------------------------------------------------------------------ 1, 2, 3: consuming


def test_what_is_not_acknowledged_comes_again(opened: Open, unique: str) -> None:
    """Law 1: after the connection's end, in its place, and says so."""
    first = opened()
    first.declare(unique)
    publish(first, [to(unique, name) for name in "abcde"])
    first.consume(unique, 3)
    got = take(first, 3)
    assert [delivery.redelivered for delivery in got] == [False] * 3
    first.ack([got[1].tag])
    first.close()

    second = opened()
    second.consume(unique, 10)
    again = take(second, 4)
    assert names(again) == ["a", "c", "d", "e"]
    # "d" may have been on its way when the connection ended.
    assert [delivery.redelivered for delivery in again if delivery.body != b"d"] == [True, True, False]


def test_connecting_anew_gives_back(transport: Transport, unique: str) -> None:
    """Laws 1, 7: the deliveries of the connection before are forgotten, and so are its tags."""
    publish(transport, [to(unique, "a"), to(unique, "b")])
    transport.consume(unique, 10)
    old = take(transport, 2)
    transport.connect()
    assert silent(transport)  # nobody has said consume
    transport.consume(unique, 10)
    new = take(transport, 2)
    assert names(new) == ["a", "b"]
    assert all(delivery.redelivered for delivery in new)

    transport.ack(tags(old))  # law 2: ignored
    transport.connect()
    transport.consume(unique, 10)
    assert names(take(transport, 2)) == ["a", "b"]


def test_what_is_acknowledged_never_comes_again(opened: Open, unique: str) -> None:
    """Law 2: acknowledged in any order, in batches and singly, twice, and before the close."""
    first = opened()
    first.declare(unique)
    publish(first, [to(unique, str(n)) for n in range(20)])
    first.consume(unique, 20)
    got = tags(take(first, 20))
    first.ack([got[5], got[3], got[3]])
    first.ack(got[0:4])
    first.ack(got[4:8])
    first.ack([])
    first.ack([max(got) + 1000, 0, -1])
    first.ack(reversed(got[10:19]))
    first.ack(iter([got[19]]))
    first.close()

    second = opened()
    second.consume(unique, 20)
    assert names(take(second, 2)) == ["8", "9"]
    assert silent(second)


def test_tags_never_repeat(transport: Transport, unique: str) -> None:
    """Law 2: not even over connections, or a stale one would acknowledge another message."""
    publish(transport, [to(unique, str(n)) for n in range(5)])
    seen: list[int] = []
    for _ in range(3):
        transport.connect()
        transport.consume(unique, 10)
        seen += tags(take(transport, 5))
    assert len(set(seen)) == 15


def test_no_more_than_prefetch_are_out(transport: Transport, unique: str) -> None:
    """Law 3: an acknowledgement makes room for as many."""
    publish(transport, [to(unique, str(n)) for n in range(10)])
    transport.consume(unique, 4)
    got = take(transport, 4)
    assert silent(transport)
    transport.ack(tags(got[:3]))
    got += take(transport, 3)
    assert silent(transport)
    assert names(got) == [str(n) for n in range(7)]
    assert transport.depth(unique) == 3


def test_cancel_stops_deliveries(opened: Open, unique: str) -> None:
    """What is out stays mine; what comes later waits for others."""
    transport, other = opened(), opened()
    transport.declare(unique)
    publish(other, [to(unique, "mine")])
    transport.consume(unique, 10)
    mine = take(transport, 1)
    transport.cancel()
    transport.cancel()
    publish(other, [to(unique, "later")])

    assert silent(transport)
    transport.ack(tags(mine))
    transport.poll(0.0)
    other.consume(unique, 10)
    assert names(take(other, 1)) == ["later"]
    transport.close()
    assert silent(other)


def test_one_can_consume_again_after_a_cancel(transport: Transport, unique: str) -> None:
    """And from another queue."""
    transport.declare(f"{unique}-2")
    publish(transport, [to(unique, "a"), to(f"{unique}-2", "b")])
    transport.consume(unique, 1)
    transport.ack(tags(take(transport, 1)))
    transport.cancel()
    transport.consume(f"{unique}-2", 1)
    assert names(take(transport, 1)) == ["b"]


def test_two_consumers_share_a_queue(opened: Open, unique: str) -> None:
    """Law 3: each has its own prefetch, and nothing goes to both."""
    first, second = opened(), opened()
    first.declare(unique)
    first.consume(unique, 2)
    second.consume(unique, 2)
    publish(opened(), [to(unique, str(n)) for n in range(5)])
    assert sorted(names([*take(first, 2), *take(second, 2)])) == ["0", "1", "2", "3"]
    assert silent(first)
    assert silent(second)


def test_consuming_from_no_queue_is_an_error(transport: Transport, unique: str) -> None:
    """It would never get anything."""
    with pytest.raises(TransportUnavailable):
        transport.consume(f"{unique}-nobody", 1)


def test_depth_counts_what_is_ready(transport: Transport, unique: str) -> None:
    """Neither what is out nor what is delayed; 0 where there is no queue."""
    assert transport.depth(f"{unique}-nobody") == 0
    publish(transport, [to(unique, str(n)) for n in range(5)])
    publish(transport, [to(unique, "late", delay=60.0)])
    assert transport.depth(unique) == 5
    transport.consume(unique, 2)
    take(transport, 2)
    assert transport.depth(unique) == 3


def test_what_is_out_is_taken(opened: Open, unique: str) -> None:
    """Whoever has it; until it is settled, or given back by whoever ends."""
    first, second = opened(), opened()
    assert not first.taken(f"{unique}-nobody")
    first.declare(unique)
    publish(first, [to(unique, "0"), to(unique, "1")])
    assert not first.taken(unique)
    second.consume(unique, 1)
    take(second, 1)
    assert first.taken(unique)
    second.close()
    until(lambda: not first.taken(unique))
    assert first.depth(unique) == 2
    first.consume(unique, 2)
    first.ack([delivery.tag for delivery in take(first, 2)])
    assert first.poll(0.0) == []
    first.connect()
    assert (first.taken(unique), first.depth(unique)) == (False, 0)


def test_declaring_is_repeatable(opened: Open, unique: str) -> None:
    """By anybody, at any time, also while others use it."""
    first, second = opened(), opened()
    for transport in (first, second, first):
        transport.declare(unique, f"{unique}-x", "#")
    first.consume(unique, 10)
    publish(second, [on(f"{unique}-x", "k", "once")])
    assert names(take(first, 1)) == ["once"]
    assert silent(first)


# ------------------------------------------------------------------ poll and wake


def test_wake_ends_a_long_poll(transport: Transport, unique: str) -> None:
    """From another thread, at once, with nothing."""
    transport.consume(unique, 10)
    transport.poll(0.0)
    for _ in range(3):
        threading.Timer(0.05, transport.wake).start()
        began = time.monotonic()
        assert transport.poll(SECONDS) == []
        assert time.monotonic() - began < SECONDS / 4


def test_a_wake_before_the_poll_counts(transport: Transport) -> None:
    """Or the word between looking at one's work and polling would be lost."""
    transport.poll(0.0)
    for _ in range(100):
        transport.wake()
    began = time.monotonic()
    assert transport.poll(SECONDS) == []
    assert time.monotonic() - began < SECONDS / 4


def test_no_wake_is_lost(transport: Transport) -> None:
    """However it falls together with the end of a poll."""
    handed: list[int] = []
    done = threading.Event()

    def hand_over() -> None:
        for n in range(2000):
            handed.append(n)
            transport.wake()
        done.set()

    threading.Thread(target=hand_over).start()
    seen = 0
    began = time.monotonic()
    while seen < 2000:
        seen = len(handed)
        if seen < 2000:
            transport.poll(SECONDS)
    assert done.wait(SECONDS)
    assert time.monotonic() - began < SECONDS


def test_wake_is_harmless_at_any_time(opened: Open) -> None:
    """Law 8: before the first call, and after the last."""
    transport = opened()
    transport.wake()
    assert transport.poll(SECONDS) == []
    transport.close()
    transport.wake()
    transport.close()


def test_an_empty_poll_takes_its_time(transport: Transport, unique: str) -> None:
    """And returns [] at its end."""
    transport.consume(unique, 10)
    transport.poll(0.0)
    began = time.monotonic()
    assert transport.poll(0.3) == []
    assert 0.29 <= time.monotonic() - began < SECONDS / 4


def test_poll_returns_with_the_first_that_comes(opened: Open, unique: str) -> None:
    """Long before its time-out, if another connection publishes."""
    transport, other = opened(), opened()
    transport.declare(unique)
    transport.consume(unique, 10)
    transport.poll(0.0)
    other.connect()
    timer = threading.Timer(0.2, publish, (other, [to(unique, "a")]))
    timer.start()
    began = time.monotonic()
    assert names(deliveries(transport.poll(SECONDS))) == ["a"]
    assert time.monotonic() - began < SECONDS / 4
    timer.join()


# ------------------------------------------------------------------ 7, 8: life


def test_nothing_connects_at_construction(broker: Broker) -> None:
    """Nor at the close of what was never used."""
    transport = open_transport(broker.nowhere)
    transport.wake()
    transport.close()


def test_a_place_where_no_broker_is_is_one_sentence(shared: Broker) -> None:
    """At the first use, soon."""
    transport = open_transport(shared.nowhere)
    with pytest.raises((TransportUnavailable, ConfigError)) as caught:
        transport.declare("q")
    assert "\n" not in str(caught.value)
    transport.close()


def test_after_close_every_call_raises_closed(transport: Transport, unique: str) -> None:
    """Law 8: but not `wake` and `close`."""
    transport.consume(unique, 1)
    transport.close()
    calls: list[Callable[[], Any]] = [
        transport.connect,
        lambda: transport.declare(unique),
        lambda: transport.consume(unique, 1),
        transport.cancel,
        lambda: transport.poll(0.0),
        lambda: transport.ack([1]),
        lambda: transport.send([to(unique, "a")]),
        lambda: transport.depth(unique),
    ]
    for call in calls:
        with pytest.raises(Closed):
            call()
    transport.wake()
    transport.close()


@pytest.mark.parametrize("name", [name for name, features in FEATURES.items() if features.server])
def test_a_lost_connection_is_unavailable(name: str, request: pytest.FixtureRequest, unique: str) -> None:
    """Law 7: every call says so until `connect`, which goes on where the queue stands."""
    server = request.getfixturevalue(OWN_SERVERS[name])
    transport = open_transport(server.url)
    transport.declare(unique)
    server.restart()  # so that the queue itself, which no confirm speaks of, is on the disk for certain
    transport.connect()
    publish(transport, [to(unique, "a")])
    transport.consume(unique, 10)
    (old,) = take(transport, 1)
    server.kill()

    with pytest.raises(TransportUnavailable):
        transport.poll(SECONDS)
    calls: list[Callable[[], Any]] = [
        lambda: transport.declare(unique),
        lambda: transport.consume(unique, 1),
        transport.cancel,
        lambda: transport.poll(0.0),
        lambda: transport.ack([old.tag]),
        lambda: transport.send([to(unique, "b")]),
        lambda: transport.depth(unique),
        transport.connect,
    ]
    for call in calls:
        with pytest.raises(TransportUnavailable):
            call()
    transport.wake()

    server.start()
    transport.connect()
    transport.declare(unique)
    transport.consume(unique, 10)
    (again,) = take(transport, 1)
    assert (again.body, again.redelivered) == (b"a", True)
    transport.ack([old.tag])
    transport.connect()
    transport.consume(unique, 10)
    transport.ack(tags(take(transport, 1)))
    transport.close()


def test_a_forked_child_connects_for_itself(shared: Broker, unique: str) -> None:
    """Law 7: and what it does leaves the parent's connection alone.

    A broker that cannot be forked after its first use says so in the child, and changes nothing.
    """
    transport = shared.open()
    transport.declare(unique)
    publish(transport, [to(unique, "a"), to(unique, "b")])
    transport.consume(unique, 1)
    (mine,) = take(transport, 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            transport.wake()
            transport.ack([mine.tag])  # the parent's tag: ignored
            fine = transport.poll(0.0) == []
            transport.consume(unique, 10)
            code = 0 if fine and names(take(transport, 1)) == ["b"] else 1
            transport.close()
        except ConfigError:
            code = 3
        finally:
            os._exit(code)
    expected = 0 if shared.features.forks_after_use else 3
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == expected

    transport.ack([mine.tag])
    assert names(take(transport, 1)) == ["b"]
    transport.close()
    second = shared.open()
    second.consume(unique, 10)
    assert names(take(second, 1)) == ["b"]
    assert silent(second)
    second.close()


def test_closing_in_a_forked_child_leaves_the_parent_alone(shared: Broker, unique: str) -> None:
    """Law 8: as a child does that only wanted to exec."""
    transport = shared.open()
    transport.declare(unique)
    publish(transport, [to(unique, "a")])
    transport.consume(unique, 1)
    got = take(transport, 1)
    child = os.fork()
    if child == 0:
        try:
            transport.close()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    transport.ack(tags(got))
    transport.send([to(unique, "b")])
    assert names(take(transport, 1)) == ["b"]
    transport.close()


# ------------------------------------------------------------------ many consumers


def compete(url: str, queue: str, record: Path, slow: float = 0.0) -> None:
    """Consume until the queue has been empty for a while; write down each message before its ack."""
    transport = open_transport(url)
    transport.consume(queue, 50)
    quiet = time.monotonic() + SECONDS  # until the first
    with record.open("a") as book:
        while time.monotonic() < quiet:
            for delivery in deliveries(transport.poll(0.1)):
                book.write(delivery.body.decode() + "\n")
                book.flush()
                transport.ack([delivery.tag])
                time.sleep(slow)
                quiet = time.monotonic() + 5.0
            if transport.depth(queue) == 0 and (record.parent / "over").exists():
                break
    transport.close()


def written(folder: Path) -> Counter[str]:
    """What all of them wrote down."""
    return Counter(line for book in folder.glob("book-*") for line in book.read_text().split())


def run_four(broker: Broker, queue: str, folder: Path, slow: float = 0.0) -> Sequence[Any]:
    """Four competitors: processes, or threads where a broker does not reach further."""
    make: Callable[..., Any] = SPAWN.Process if broker.features.shared else threading.Thread
    four = [
        make(target=compete, args=(broker.url, queue, folder / f"book-{n}", slow), daemon=True)
        for n in range(4)
    ]
    for one in four:
        one.start()
    return four


def until_written(folder: Path, n: int) -> None:
    end = time.monotonic() + 60
    while len(written(folder)) < n:
        assert time.monotonic() < end, f"{len(written(folder))} of {n} were written down"
        time.sleep(0.05)


def test_four_processes_share_the_work(broker: Broker, opened: Open, unique: str, tmp_path: Path) -> None:
    """Laws 1, 2, 3: each message goes to exactly one of them."""
    publisher = opened()
    publisher.declare(unique)
    four = run_four(broker, unique, tmp_path)
    publish(publisher, [to(unique, str(n)) for n in range(2000)])
    until_written(tmp_path, 2000)
    (tmp_path / "over").touch()
    for one in four:
        one.join(SECONDS)
    assert written(tmp_path) == Counter(str(n) for n in range(2000))
    assert publisher.depth(unique) == 0


def test_one_of_four_processes_is_killed(shared: Broker, unique: str, tmp_path: Path) -> None:
    """Law 1: what it held goes to the others; nothing is lost."""
    publisher = shared.open()
    publisher.declare(unique)
    publish(publisher, [to(unique, str(n)) for n in range(2000)])
    four = run_four(shared, unique, tmp_path, slow=0.001)
    victim = tmp_path / "book-0"
    end = time.monotonic() + SECONDS
    while not victim.exists() or len(victim.read_text()) < 200:
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(four[0].pid, signal.SIGKILL)
    four[0].join()

    until_written(tmp_path, 2000)
    (tmp_path / "over").touch()
    for one in four[1:]:
        one.join(SECONDS)
    twice = {name for name, n in written(tmp_path).items() if n > 1}
    assert set(victim.read_text().split()) >= twice
    assert len(twice) <= 50  # the prefetch of the one that was killed
    assert publisher.depth(unique) == 0
    publisher.close()
