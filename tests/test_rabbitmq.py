"""RabbitMQ: what the contract of all transports does not ask, with plain pika as the witness."""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import asdict, astuple

from idemp.errors import ConfigError, IdempError, TransportUnavailable, Unroutable
from idemp.message import Properties
from idemp.ports import Delivery, Publication, Sent, Transport
from idemp.transports import open_transport, publish
from idemp.transports import rabbitmq as rabbitmq_module
from idemp.transports.amqp import Outstanding, Unconfirmed, waiting_queue
from idemp.transports.amqp_wire import UNREADABLE, Reader, decode, encode
from idemp.transports.rabbitmq import RabbitMQTransport
from tests.proxy import Proxy
from tests.servers import RabbitMQ, free_port

SECONDS = 30.0


@pytest.fixture
def transport(amqp_url: str, unique: str) -> Iterator[Transport]:
    """One with the queue ``unique``."""
    transport = open_transport(amqp_url)
    transport.declare(unique)
    yield transport
    transport.close()


@contextmanager
def plain(url: str) -> Iterator[Any]:
    """A channel of plain pika."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    yield connection.channel()
    connection.close()


def message(queue: str, name: str, delay: float = 0.0) -> Publication:
    return Publication(name.encode(), Properties(message_id=name), "", queue, delay)


def take(transport: Transport, n: int) -> list[Delivery]:
    """The next ``n`` deliveries."""
    got: list[Delivery] = []
    end = time.monotonic() + SECONDS
    while len(got) < n:
        assert time.monotonic() < end, f"{len(got)} of {n} came"
        got += [event for event in transport.poll(0.2) if isinstance(event, Delivery)]
    return got


def until(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + SECONDS
    while not (found := what()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return found


# ------------------------------------------------------------------ what is on the wire


def test_much_is_taken_from_the_socket_at_once(transport: Transport) -> None:
    """As long as pika has that number, which another pika may call otherwise."""
    stream = transport._link._connection._transport  # type: ignore[attr-defined]
    assert type(stream)._MAX_RECV_BYTES == 4096
    assert stream._MAX_RECV_BYTES == rabbitmq_module.RECEIVE


def test_a_plain_client_sees_what_was_sent(transport: Transport, amqp_url: str, unique: str) -> None:
    """Every property under AMQP's own name, and persistent."""
    given = Properties("id-1", "new_order", "cause", "shop", 1_700_000_000.9, "application/json", {"n": 1})
    publish(transport, [Publication(b"body", given, "", unique)])
    with plain(amqp_url) as channel:
        _, seen, body = channel.basic_get(unique, auto_ack=True)
    assert body == b"body"
    assert (seen.message_id, seen.type, seen.correlation_id, seen.app_id) == astuple(given)[:4]
    assert (seen.timestamp, seen.content_type, seen.headers) == (1_700_000_000, "application/json", {"n": 1})
    assert (seen.delivery_mode, seen.expiration) == (2, None)


def test_a_plain_message_is_readable(transport: Transport, amqp_url: str, unique: str) -> None:
    """One with no properties at all, as the simplest publisher sends it."""
    with plain(amqp_url) as channel:
        channel.basic_publish("", unique, b"hello")
    transport.consume(unique, 1)
    (came,) = take(transport, 1)
    assert (came.body, came.properties) == (b"hello", Properties())


ODD: dict[Any, Any] = {
    "bytes": b"\x00\xff",
    "decimal": Decimal("12.50"),
    "time": datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC),
    "none": None,
    "list": [1, [None, [b"\x01"]], {"deep": [True]}],
    "table": {"empty": {}, "big": 1 << 60},
    "negative": -1,
    "mixed": {b"\xff": "a key that is no text"},
}


def test_odd_headers_come_and_can_be_sent_on(transport: Transport, amqp_url: str, unique: str) -> None:
    """As a dead letter is."""
    with plain(amqp_url) as channel:
        channel.basic_publish("", unique, b"", pika.BasicProperties(headers=ODD))
    transport.consume(unique, 1)
    (first,) = take(transport, 1)
    transport.send([Publication(first.body, first.properties, "", unique)])
    transport.ack([first.tag])
    (second,) = take(transport, 1)
    assert first.properties.headers == second.properties.headers == ODD


def test_what_is_no_text_comes_and_can_be_sent_on(transport: Transport, amqp_url: str, unique: str) -> None:
    """A broken id is the message's fault: it must not take the connection down, again and again."""
    with plain(amqp_url) as channel:
        channel.basic_publish("", unique, b"", pika.BasicProperties(message_id=b"\xff\xfe", type=b"\xff"))
    transport.consume(unique, 1)
    (first,) = take(transport, 1)
    transport.send([Publication(first.body, first.properties, "", unique)])
    transport.ack([first.tag])
    (second,) = take(transport, 1)
    assert first.properties == second.properties
    odd: list[object] = [*astuple(first.properties)[:2]]
    assert odd == [b"\xff\xfe", b"\xff"]


class Raw(pika.BasicProperties):  # type: ignore[misc]
    """Properties as somebody else's client wrote them."""

    def __init__(self, headers: bytes) -> None:
        super().__init__()
        self.wire = b"\x20\x00" + len(headers).to_bytes(4, "big") + headers

    def encode(self) -> list[bytes]:
        return [self.wire]


@pytest.mark.parametrize(
    ("raw", "read"),
    [
        (b"\x02msT" + (1_700_000_000_000).to_bytes(8, "big"), {"ms": 1_700_000_000_000}),
        (b"\x01dd" + struct.pack(">d", 1.5), {"d": 1.5}),
        (b"\x01ff" + struct.pack(">f", 0.25), {"f": 0.25}),
        (b"\x01sS\x00\x00\x00\x01\xff", {"s": b"\xff"}),
    ],
)
def test_headers_of_other_clients_come_and_can_be_sent_on(
    transport: Transport, amqp_url: str, unique: str, raw: bytes, read: dict[str, Any]
) -> None:
    """A time in milliseconds would end pika's connection, each time that it is delivered."""
    with plain(amqp_url) as channel:
        channel.basic_publish("", unique, b"", Raw(raw))
    transport.consume(unique, 1)
    (first,) = take(transport, 1)
    transport.send([Publication(first.body, first.properties, "", unique)])
    transport.ack([first.tag])
    (second,) = take(transport, 1)
    assert first.properties.headers == second.properties.headers == read


def test_without_its_own_reader_it_reads_with_pika(
    transport: Transport, amqp_url: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would if a later pika called it no more."""
    monkeypatch.delattr(rabbitmq_module._Connection, "_on_data_available")
    transport.connect()
    headers = {"n": 1, "list": [None]}
    given = Properties("id-1", "new_order", "cause", "shop", 1_700_000_000, "application/json", headers)
    publish(transport, [Publication(b"body", given, "", unique), Publication(b"", Properties(), "", unique)])
    transport.consume(unique, 10)
    got = take(transport, 2)
    assert [(each.body, each.properties) for each in got] == [(b"body", given), (b"", Properties())]
    transport.ack([each.tag for each in got])
    transport.connect()
    assert transport.depth(unique) == 0


# ------------------------------------------------------------------ bytes

shorts = st.text(max_size=40)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.text()
    | st.binary()
    | st.builds(Decimal, st.integers(-(1 << 31), (1 << 31) - 1)).map(lambda number: number.scaleb(-3))
    | st.integers(0, 1 << 37).map(lambda seconds: datetime.fromtimestamp(seconds, UTC)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(shorts, inner, max_size=3),
    max_leaves=10,
)
some_properties = st.builds(
    Properties,
    *[st.none() | shorts for _ in range(4)],
    st.none() | st.integers(0, 1 << 40),
    st.none() | shorts,
    st.dictionaries(shorts, values, max_size=4),
)


def as_pika(given: Properties, **more: Any) -> pika.BasicProperties:
    fields = asdict(given)
    return pika.BasicProperties(**fields | {"headers": given.headers or None} | more)


@given(some_properties, st.none() | st.just("100"))
def test_properties_are_written_as_pika_writes_them(given: Properties, expiration: str | None) -> None:
    """pika reads the same in them."""
    read = pika.BasicProperties().decode(encode(given, expiration))
    assert read == as_pika(given, delivery_mode=2, expiration=expiration)


@given(some_properties, st.sets(st.sampled_from(["content_encoding", "reply_to", "user_id", "priority"])))
def test_properties_are_read_as_pika_reads_them(given: Properties, others: set[str]) -> None:
    """Also beside those that are of no use to us."""
    more = {name: 3 if name == "priority" else name for name in others}
    data = b"".join(as_pika(given, **more).encode())
    assert decode(data, 2, int.from_bytes(data[:2], "big")) == given


@given(st.binary(max_size=60))
def test_headers_that_are_no_table_are_kept_as_they_are(data: bytes) -> None:
    """Whatever they are, the message is readable."""
    wire = len(data).to_bytes(4, "big") + data + b"\x02id"
    read = decode(wire, 0, 0x2000 | 0x0080)
    assert read.message_id == "id"
    if UNREADABLE in read.headers:
        assert read.headers[UNREADABLE] == wire[: 4 + len(data)]
    decode(encode(read), 2, int.from_bytes(encode(read)[:2], "big"))


def frames(channel: int, tag: int, body: bytes, given: Properties, piece: int = 7) -> list[bytes]:
    """A delivery, its body in pieces."""
    deliver = pika.spec.Basic.Deliver("ctag", tag, tag % 2 == 0, "x", f"key.{tag}")
    header = pika.frame.Header(channel, len(body), as_pika(given))
    pieces = [pika.frame.Body(channel, body[at : at + piece]) for at in range(0, len(body), piece)]
    return [frame.marshal() for frame in (pika.frame.Method(channel, deliver), header, *pieces)]


OTHERS = [
    pika.frame.Heartbeat().marshal(),
    pika.frame.Method(2, pika.spec.Basic.Ack(7, True)).marshal(),
    pika.frame.Method(2, pika.spec.Basic.Return(312, "NO_ROUTE", "", "q")).marshal(),
    pika.frame.Header(2, 5, pika.BasicProperties()).marshal(),
    pika.frame.Body(2, b"other").marshal(),
]


@given(st.lists(st.binary(max_size=30), max_size=6), st.randoms(), st.data())
def test_deliveries_are_found_among_other_frames(bodies: list[bytes], random: Any, data: Any) -> None:
    """However the stream is cut, and with other channels' frames between a delivery's own."""
    stream, handed_on, expected = [], b"", []
    for tag, body in enumerate(bodies, 1):
        given = Properties(f"id-{tag}")
        expected.append(Delivery(tag, body, given, "x", f"key.{tag}", tag % 2 == 0))
        between = random.choice([0.0, 0.5])
        for frame in frames(1, tag, body, given, random.choice([7, 30])):
            stream.append(frame)
            if random.random() < between:
                stream.append(random.choice(OTHERS))
                handed_on += stream[-1]
    whole = b"".join(stream)
    arrived: list[Delivery] = []
    rest: list[bytes] = []
    reader = Reader(arrived, rest.append)
    taken = start = 0
    while start < len(whole):
        size = data.draw(st.integers(1, 500))
        taken += reader.feed(whole[start : start + size])
        start += size
    assert arrived == expected
    assert b"".join(rest) == handed_on
    assert taken == len(whole) - len(handed_on)


@pytest.mark.parametrize("data", [b"AMQP\x00\x00\x09\x01", b"HTTP/1.1 400 Bad Request\r\n"])
def test_what_is_no_frame_is_for_pika_to_refuse(data: bytes) -> None:
    handed_on: list[bytes] = []
    assert Reader([], handed_on.append).feed(data) == 0
    assert handed_on == [data]


def test_a_frame_without_its_end_is_for_pika_to_refuse() -> None:
    frame = frames(1, 1, b"", Properties())[0]
    handed_on: list[bytes] = []
    assert Reader([], handed_on.append).feed(frame[:-1] + b"\x00") == 0
    assert handed_on == [frame[:-1] + b"\x00"]


def nested(depth: int) -> list[Any]:
    """A list in a list in a list."""
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(
    "odd",
    [
        Properties("x" * 256),
        Properties(headers={"set": {1}}),
        Properties(headers={"nested": nested(600)}),
        Properties(timestamp=-1),
    ],
    ids=["long", "set", "nested", "time"],
)
def test_what_amqp_cannot_carry_is_an_error(transport: Transport, unique: str, odd: Properties) -> None:
    """Of that message alone, and sending it again would not help."""
    good = [message(unique, "a"), message(unique, "b")]
    numbers = transport.send([good[0], Publication(b"", odd, "", unique), good[1]])
    said: dict[int, Sent] = {}
    while len(said) < 3:
        said |= {event.number: event for event in transport.poll(5.0) if isinstance(event, Sent)}
    assert [said[number].error == "" for number in numbers] == [True, False, True]
    assert "AMQP cannot carry the message" in said[numbers[1]].error
    assert said[numbers[1]].unroutable
    assert said[numbers[1]].unfit
    assert transport.depth(unique) == 2


def test_what_a_frame_has_no_room_for_is_an_error(transport: Transport, unique: str) -> None:
    """The broker would end the connection over it; the last byte that has room is taken."""
    empty = len(encode(Properties(headers={"h": ""})))
    fits = 131_072 - 8 - 12 - empty
    sent = [Publication(b"b", Properties(headers={"h": "x" * n}), "", unique) for n in (fits + 1, fits)]
    numbers = transport.send(sent)
    said: dict[int, Sent] = {}
    while len(said) < 2:
        said |= {event.number: event for event in transport.poll(5.0) if isinstance(event, Sent)}
    assert said[numbers[0]].unfit
    assert "131053 bytes of properties, and 131052 are allowed" in said[numbers[0]].error
    assert said[numbers[1]].error == ""
    assert transport.depth(unique) == 1


def test_a_queue_that_expires_goes(amqp_url: str, unique: str) -> None:
    """Once nobody consumes; while somebody does, it stays."""
    with closing(open_transport(amqp_url)) as asker, closing(open_transport(amqp_url)) as other:
        asker.declare(unique, expires=0.5)
        asker.declare(unique, expires=0.5)  # again is harmless
        asker.consume(unique, 1)
        publish(other, [Publication(b"", Properties(), "", unique)])
        asker.close()
        end = time.monotonic() + 30
        while True:
            try:
                publish(other, [Publication(b"", Properties(), "", unique)])
            except Unroutable:
                break
            assert time.monotonic() < end
            time.sleep(0.05)


def test_a_quorum_queue_that_somebody_made_is_consumed(
    transport: Transport, amqp_url: str, unique: str
) -> None:
    """Its owner chose it for safety; a stream, which forgets no message, is refused."""
    quorum, stream = f"{unique}-quorum", f"{unique}-stream"
    with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
        for queue, kind in ((quorum, "quorum"), (stream, "stream")):
            connection.channel().queue_declare(queue, durable=True, arguments={"x-queue-type": kind})
    transport.declare(quorum, "events", "orders.#")
    transport.consume(quorum, 10)
    transport.send([Publication(b"1", Properties(), "events", "orders.new")])
    came: list[Delivery] = []
    while not came:
        came = [event for event in transport.poll(5.0) if isinstance(event, Delivery)]
    transport.ack([came[0].tag])
    assert came[0].body == b"1"
    with pytest.raises(ConfigError, match=r"refuses to declare .*x-queue-type"):
        transport.declare(stream)


# ------------------------------------------------------------------ acknowledgements


@pytest.fixture
def acks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Every acknowledgement that goes out: its tag, and whether it means all up to it."""
    seen: list[tuple[int, bool]] = []
    plain_ack = pika.channel.Channel.basic_ack

    def ack(channel: Any, delivery_tag: int = 0, multiple: bool = False) -> None:
        seen.append((delivery_tag, multiple))
        plain_ack(channel, delivery_tag, multiple)

    monkeypatch.setattr(pika.channel.Channel, "basic_ack", ack)
    return seen


def test_a_settled_prefix_is_one_command(
    transport: Transport, unique: str, acks: list[tuple[int, bool]]
) -> None:
    """And what is beyond a gap goes singly, once."""
    publish(transport, [message(unique, str(n)) for n in range(1000)])
    transport.consume(unique, 1000)
    tags = [delivery.tag for delivery in take(transport, 1000)]
    transport.ack(tags[:900])
    assert acks == [(900, True)]
    transport.ack([tags[999], tags[950]])
    assert acks[1:] == [(951, False), (1000, False)]
    transport.ack(tags[900:])
    assert acks[3:] == [(999, True)]
    transport.connect()
    assert transport.depth(unique) == 0


@given(st.lists(st.lists(st.integers(0, 40), max_size=10), max_size=20), st.randoms())
def test_acknowledgements_mean_what_was_settled(batches: list[list[int]], random: Any) -> None:
    """The broker, played by a set, ends up with what is not settled, and hears no unknown tag."""
    outstanding, broker, mine = Outstanding(), set[int](), set[int]()
    last = 0
    for batch in batches:
        new = range(last + 1, last + 1 + random.randrange(4))
        last += len(new)
        outstanding.add(new)
        broker.update(new)
        mine.update(new)
        upto, singly = outstanding.settle(batch)
        if upto:
            assert upto in broker
            broker = {tag for tag in broker if tag > upto}
        for tag in singly:
            assert tag in broker
            broker.remove(tag)
        mine -= set(batch)
        assert broker == mine


def test_one_slow_handler_makes_nobody_remember_the_fast() -> None:
    """What is settled beyond it is forgotten all the same."""
    outstanding = Outstanding()
    for tag in range(1, 100_000):
        outstanding.add([tag])
        if tag > 1:
            outstanding.settle([tag])
    assert len(outstanding._order) < 2000
    assert outstanding.settle([1]) == (1, [])


# ------------------------------------------------------------------ confirms


def test_confirms_and_returns_find_their_publications() -> None:
    """In any grouping; a return names the first that it may mean."""
    unconfirmed = Unconfirmed()
    for number in range(10, 20):
        unconfirmed.add(number, Publication(b"same", Properties(), "", "nobody" if number % 2 else "q"))
    unconfirmed.returned("", "nobody", b"same")
    unconfirmed.returned("", "nobody", b"same")
    unconfirmed.returned("", "never sent", b"same")
    said = [*unconfirmed.answered(3, False, refused=False), *unconfirmed.answered(5, True, refused=False)]
    assert [(each.number, each.unroutable) for each in said] == [
        (12, False),
        (10, False),
        (11, True),
        (13, True),
        (14, False),
    ]
    refused = list(unconfirmed.answered(6, False, refused=True))
    assert [(each.number, bool(each.error), each.unroutable) for each in refused] == [(15, True, False)]
    assert list(unconfirmed.answered(6, True, refused=False)) == []
    assert [each.number for each in unconfirmed.closed("gone")] == [16, 17, 18, 19]
    assert list(unconfirmed.closed("gone")) == []


def test_a_missing_exchange_is_told_from_its_neighbours(transport: Transport, unique: str) -> None:
    """The broker closes the channel over it: they are not confirmed, but they could be sent again."""
    missing = Publication(b"", Properties(), f"{unique}-nowhere", "k")
    numbers = transport.send([message(unique, "a"), missing, message(unique, "b")])
    said: dict[int, Sent] = {}
    while len(said) < 3:
        said |= {event.number: event for event in transport.poll(5.0) if isinstance(event, Sent)}
    assert said[numbers[1]].unroutable
    assert f"exchange '{unique}-nowhere'" in said[numbers[1]].error
    assert said[numbers[2]].error
    assert not said[numbers[2]].unroutable
    publish(transport, [message(unique, "b")])
    with pytest.raises(Unroutable):
        publish(transport, [message(unique, "a"), missing])


def test_returns_among_many_are_not_mixed_up(transport: Transport, unique: str) -> None:
    """Thousands in flight, some of which nobody takes, all with the same body."""
    publications = [
        Publication(b"", Properties(), "", unique if n % 7 else f"{unique}-nobody") for n in range(3000)
    ]
    numbers = transport.send(publications)
    said: dict[int, Sent] = {}
    while len(said) < 3000:
        said |= {event.number: event for event in transport.poll(5.0) if isinstance(event, Sent)}
    assert [said[number].unroutable for number in numbers] == [n % 7 == 0 for n in range(3000)]


# ------------------------------------------------------------------ delay


def test_delayed_messages_wait_in_queues_by_magnitude(
    transport: Transport, amqp_url: str, unique: str
) -> None:
    """With these arguments and no others, or another version of us could not declare them."""
    publish(transport, [message(unique, str(delay), delay) for delay in (0.5, 3.0, 4.0, 100.25)])
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": unique}
    with plain(amqp_url) as channel:
        for bucket in (4, 128):
            channel.queue_declare(f"{unique}.delay.{bucket}", durable=True, arguments=arguments)
        seen = [channel.basic_get(f"{unique}.delay.4")[1] for _ in range(2)]
        assert [(each.message_id, each.expiration) for each in seen] == [("3.0", "3000"), ("4.0", "4000")]
        assert channel.basic_get(f"{unique}.delay.128")[1].expiration == "100250"
        assert {each.delivery_mode for each in seen} == {2}


@given(st.floats(0.001, 1e6))
def test_nothing_waits_more_than_twice_its_delay(delay: float) -> None:
    """Or a second, whichever is more."""
    bucket = int(waiting_queue("q", delay).removeprefix("q.delay."))
    assert delay <= bucket < max(2 * delay, 1.1)
    assert bucket & (bucket - 1) == 0


def test_a_waiting_queue_that_was_deleted_is_made_again(
    transport: Transport, amqp_url: str, unique: str
) -> None:
    """At the second try: the first is returned."""
    publish(transport, [message(unique, "a", 60)])
    with plain(amqp_url) as channel:
        channel.queue_delete(f"{unique}.delay.64")
    with pytest.raises(TransportUnavailable):
        publish(transport, [message(unique, "b", 60)])
    publish(transport, [message(unique, "b", 60)])
    assert transport.depth(f"{unique}.delay.64") == 1


def test_delays_leave_no_trail_that_the_broker_takes_for_a_loop(
    transport: Transport, amqp_url: str, unique: str
) -> None:
    """A message that once expired in its own queue is dropped when it comes round again by expiry."""
    death = {"count": 1, "reason": "expired", "queue": unique, "exchange": "", "routing-keys": [unique]}
    given = Properties("m", headers={"x-death": [death], "mine": 1})
    transport.send([Publication(b"", given, "", unique, 0.1)])
    transport.consume(unique, 1)
    (came,) = take(transport, 1)
    assert came.properties.headers["mine"] == 1
    assert [death["queue"] for death in came.properties.headers["x-death"]] == [f"{unique}.delay.1"]


# ------------------------------------------------------------------ the connection


@pytest.fixture(autouse=True)
def no_password_in_the_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever happens in the test."""
    caplog.set_level(logging.DEBUG, "idemp")
    yield
    assert "s3cret" not in caplog.text


def refused(url: str) -> IdempError:
    """What a connection to ``url`` fails with: one sentence, without the password."""
    transport = open_transport(url)
    with pytest.raises((ConfigError, TransportUnavailable)) as caught:
        transport.connect()
    transport.close()
    text = str(caught.value)
    assert "s3cret" not in text
    assert "\n" not in text
    assert len(text) < 200
    assert isinstance(caught.value, IdempError)
    return caught.value


def test_a_wrong_password_is_a_wrong_setting(rabbitmq: RabbitMQ) -> None:
    error = refused(f"amqp://guest:s3cret@127.0.0.1:{rabbitmq.port}/")
    assert isinstance(error, ConfigError)
    assert f"127.0.0.1:{rabbitmq.port} refuses user 'guest'" in str(error)


def test_an_unknown_vhost_is_a_wrong_setting(rabbitmq: RabbitMQ) -> None:
    error = refused(f"{rabbitmq.url}nowhere")
    assert isinstance(error, ConfigError)
    assert "'nowhere'" in str(error)


def test_a_closed_port_is_unavailable() -> None:
    port = free_port()
    error = refused(f"amqp://guest:s3cret@127.0.0.1:{port}/")
    assert isinstance(error, TransportUnavailable)
    assert str(error) == f"no broker answers at amqp://127.0.0.1:{port}: Connection refused"


def test_an_unknown_host_is_unavailable() -> None:
    error = refused("amqp://guest:s3cret@nowhere.invalid/")
    assert isinstance(error, TransportUnavailable)
    assert "nowhere.invalid:5672" in str(error)


@pytest.mark.parametrize("said", [None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_what_is_no_broker_is_unavailable(said: bytes | None) -> None:
    """One that says nothing, one that hangs up, one that speaks something else: in bounded time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        wires: list[socket.socket] = []

        def serve() -> None:
            wire, _ = server.accept()
            wires.append(wire)
            if said is not None:
                wire.recv(8)
                wire.sendall(said)
                wire.close()

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"amqp://guest:s3cret@127.0.0.1:{server.getsockname()[1]}/?stack_timeout=1"
        began = time.monotonic()
        try:
            error = refused(url)
        finally:
            thread.join()
            wires[0].close()
    assert isinstance(error, TransportUnavailable)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "url",
    [
        "amqp://localhost/?heartbeat=soon",
        "amqp://localhost/?colour=red",
        "amqp://localhost:port/",
        "amqp://user:s3cret@localhost:99999/",
        "amqp://user@localhost/",
    ],
)
def test_a_malformed_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_transport(url)
    assert "s3cret" not in str(caught.value)


def test_limits_of_time_are_set_unless_the_url_says_otherwise() -> None:
    """pika's own is to wait for ever."""
    usual = RabbitMQTransport("amqp://localhost")._parameters
    assert (usual.heartbeat, usual.blocked_connection_timeout, usual.virtual_host) == (30, 60, "/")
    named = RabbitMQTransport("amqp://localhost/x?heartbeat=5&blocked_connection_timeout=7")._parameters
    assert (named.heartbeat, named.blocked_connection_timeout, named.virtual_host) == (5, 7, "x")


def test_a_restart_loses_nothing(own_rabbitmq: RabbitMQ) -> None:
    """What was confirmed is there, what was not acknowledged comes again, delayed ones too."""
    transport = open_transport(own_rabbitmq.url)
    transport.declare("q", "x", "#")
    publish(transport, [Publication(str(n).encode(), Properties(), "x", "k") for n in range(100)])
    publish(transport, [message("q", "late", 1.0)])
    transport.consume("q", 10)
    got = take(transport, 10)
    transport.ack([delivery.tag for delivery in got[:5]])
    transport.poll(0.0)
    own_rabbitmq.restart()
    with pytest.raises(TransportUnavailable, match=str(own_rabbitmq.port)):
        transport.poll(SECONDS)

    transport.connect()
    transport.declare("q", "x", "#")
    transport.consume("q", 1000)
    came = {delivery.body for delivery in take(transport, 96)}
    assert came == {str(n).encode() for n in range(5, 100)} | {b"late"}
    transport.send([message("q", "after")])
    assert [delivery.body for delivery in take(transport, 1)] == [b"after"]
    transport.close()


def test_a_deleted_queue_ends_the_deliveries(transport: Transport, amqp_url: str, unique: str) -> None:
    """And says so, instead of waiting for ever; after declaring anew it goes on."""
    transport.consume(unique, 10)
    with plain(amqp_url) as channel:
        channel.queue_delete(unique)
    with pytest.raises(TransportUnavailable, match="was the queue deleted"):
        transport.poll(SECONDS)
    transport.connect()
    transport.declare(unique)
    transport.consume(unique, 10)
    transport.send([message(unique, "a")])
    assert len(take(transport, 1)) == 1


def test_a_queue_that_was_made_otherwise_is_a_wrong_setting(
    transport: Transport, amqp_url: str, unique: str
) -> None:
    """The broker's reason is told, and the connection stays."""
    with plain(amqp_url) as channel:
        channel.queue_declare(f"{unique}-2", durable=True, arguments={"x-max-length": 1})
        with pytest.raises(ConfigError, match="x-max-length"):
            transport.declare(f"{unique}-2")
        channel.queue_delete(f"{unique}-2")
    publish(transport, [message(unique, "a")])


def test_a_queue_of_the_systems_before_is_welcome(amqp_url: str, unique: str) -> None:
    """Durable, without arguments, bound to a durable topic exchange."""
    with plain(amqp_url) as channel:
        channel.exchange_declare(f"{unique}-x", "topic", durable=True)
        channel.queue_declare(unique, durable=True)
        channel.queue_bind(unique, f"{unique}-x", "#")
        transport = open_transport(amqp_url)
        transport.declare(unique, f"{unique}-x", "#")
        publish(transport, [Publication(b"", Properties(), f"{unique}-x", "k")])
        assert transport.depth(unique) == 1
        transport.close()


def test_what_cancel_meets_on_its_way_goes_back(transport: Transport, amqp_url: str, unique: str) -> None:
    """Deliveries that no poll has handed out are another's at once, not only after our end."""
    publish(transport, [message(unique, str(n)) for n in range(50)])
    transport.consume(unique, 50)
    until(lambda: transport.depth(unique) == 0)  # so they are all here, or on their way
    transport.cancel()
    assert transport.poll(0.1) == []
    with plain(amqp_url) as channel:
        until(lambda: channel.queue_declare(unique, passive=True).method.message_count == 50)


def test_heartbeats_are_served_by_poll(rabbitmq: RabbitMQ, unique: str) -> None:
    """Long beyond the time after which the broker would hang up."""
    transport = open_transport(f"{rabbitmq.url}?heartbeat=1")
    transport.declare(unique)
    transport.consume(unique, 1)
    assert transport.poll(4.0) == []
    transport.send([message(unique, "a")])
    assert len(take(transport, 1)) == 1
    transport.close()


def test_a_broker_that_holds_up_publishing_is_told_of_and_not_awaited_for_ever(
    amqp_url: str, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so when its memory or disk is full; what it says is put into its mouth here."""
    transport = RabbitMQTransport(f"{amqp_url}?blocked_connection_timeout=1")
    transport.declare(unique)
    link = transport._link
    assert link is not None
    blocked = pika.frame.Method(0, pika.spec.Connection.Blocked("low on memory"))
    unblocked = pika.frame.Method(0, pika.spec.Connection.Unblocked())
    for frame in (blocked, unblocked):
        link._connection._on_data_available(frame.marshal())
    assert "holds up publishing: low on memory" in caplog.text
    assert transport.poll(1.5) == []

    link._connection._on_data_available(blocked.marshal())
    with pytest.raises(TransportUnavailable, match="Blocked"):
        transport.poll(SECONDS)
    transport.connect()
    publish(transport, [message(unique, "a")])
    transport.close()


def test_close_is_bounded_when_the_broker_hangs(own_rabbitmq: RabbitMQ, unique: str) -> None:
    """A peer that says nothing more must not hold up the end of the process."""
    relay = Relay(own_rabbitmq.port)
    transport = open_transport(f"amqp://127.0.0.1:{relay.port}/")
    transport.declare(unique)
    relay.pause()
    began = time.monotonic()
    transport.close()
    assert time.monotonic() - began < 10
    relay.close()


class Relay:
    """A wire to the broker that can be held."""

    def __init__(self, port: int) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._open = threading.Event()
        self._open.set()
        self._wires: list[socket.socket] = []
        threading.Thread(target=self._serve, args=(port,), daemon=True).start()

    def _serve(self, port: int) -> None:
        near, _ = self._server.accept()
        far = socket.create_connection(("127.0.0.1", port))
        self._wires = [near, far]
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self._open.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def pause(self) -> None:
        self._open.clear()

    def close(self) -> None:
        self._open.set()
        for wire in (*self._wires, self._server):
            wire.close()


def test_a_channel_that_ends_in_the_middle_of_a_call(amqp_url: str, unique: str) -> None:
    """As a connection that is cut between two steps leaves it: lost, and not pika's error."""
    with closing(open_transport(amqp_url)) as transport:
        transport.declare(unique)
        link: Any = transport._link  # type: ignore[attr-defined]
        channel = link._channel()
        channel.close()
        link._until(lambda: channel.is_closed)
        link._channel = lambda: channel
        with pytest.raises(TransportUnavailable):
            transport.consume(unique, 1)
        with pytest.raises(TransportUnavailable):
            transport.declare(unique)
        transport.connect()
        transport.consume(unique, 1)


def take_part(transport: Transport, queue: str) -> None:
    transport.consume(queue, 1)
    transport.poll(SECONDS)


@pytest.mark.parametrize("ask", [RabbitMQTransport.declare, take_part, RabbitMQTransport.depth])
def test_a_reply_that_is_lost_is_no_refusal(rabbitmq: RabbitMQ, unique: str, ask: Any) -> None:
    """The channel is closed then too, but by nobody's word: neither a wrong setting nor an empty queue."""
    proxy = Proxy(rabbitmq.port)
    url = f"amqp://guest:guest@127.0.0.1:{proxy.port}/"
    with proxy, closing(open_transport(url)) as transport:
        transport.declare(unique)
        publish(transport, [message(unique, "a")])
        proxy.lose()
        with pytest.raises(TransportUnavailable):
            ask(transport, unique)
        assert proxy.counts.lost == 1
        transport.connect()
        assert transport.depth(unique) == 1
