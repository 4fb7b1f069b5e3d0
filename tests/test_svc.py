"""The sample service as a process: the rows of the system that it replaces, and bad input."""

from __future__ import annotations

import datetime
import decimal
import json
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pika
import pytest

from idemp import ConfigError, Message, open_store
from idemp.message import Properties
from idemp.ports import Done, Get
from idemp.stores.etcd_client import Client
from svc.settings import read
from tests.servers import Etcd
from tests.service import Stand, finished, stand

BOTH = pytest.mark.parametrize("desk", ["sqlite", "rabbitmq"], indirect=True)
EMBEDDED = pytest.mark.parametrize("desk", ["sqlite"], indirect=True)
RABBITMQ = pytest.mark.parametrize("desk", ["rabbitmq"], indirect=True)


@pytest.fixture
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stand]:
    """A broker of the kind asked for."""
    if request.param == "rabbitmq":
        url = request.getfixturevalue("rabbitmq").url
    else:
        url = f"sqlite:///{tmp_path}/queues.db"
    with stand(url, tmp_path) as built:
        yield built


def order(id: str = "") -> Message:
    return Message(id or str(uuid4()), "new_order", {"cents": 4200})


# ------------------------------------------------------------------ settings


def test_the_service_name_is_required() -> None:
    """N1: without SERVICE_NAME: one sentence, exit code 2."""
    done = finished("-m", "svc")
    assert done.returncode == 2
    assert done.stderr == "svc: SERVICE_NAME is not set; name the service, like SERVICE_NAME=orders\n"


@pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "ä", "a" * 101, "a\nb", "#"])
def test_a_service_name_that_is_none(name: str) -> None:
    """N1: it becomes the name of queues, metrics and keys: letters, digits, dots, dashes, underscores."""
    with pytest.raises(ConfigError, match="SERVICE_NAME"):
        read({"SERVICE_NAME": name})


@pytest.mark.parametrize("name", ["orders", "a", "7", "shop.orders-eu_1", "a" * 100])
def test_a_service_name(name: str) -> None:
    """N1: these are fine, and the defaults are the seed's."""
    settings = read({"SERVICE_NAME": name})
    assert settings.service == name
    assert settings.transport == "amqp://guest:guest@localhost:5672/"
    assert settings.statsd == "127.0.0.1:8125"
    assert settings.store is None


STORE = "sqlite:///seen.db"


@pytest.mark.parametrize(
    ("environment", "store"),
    [
        ({}, None),
        ({"IDEMP_STORE": STORE}, STORE),
        ({"IDEMP_STORE": STORE, "ENABLE_ETCD": "true"}, STORE),
        ({"IDEMP_STORE": STORE, "ENABLE_STATE": "1"}, STORE),
        ({"IDEMP_STORE": STORE, "ENABLE_STATE": "anything"}, STORE),
        ({"IDEMP_STORE": STORE, "ENABLE_ETCD": "on", "ENABLE_STATE": "off"}, STORE),
        ({"IDEMP_STORE": STORE, "ENABLE_ETCD": "false"}, None),
        ({"IDEMP_STORE": STORE, "ENABLE_STATE": "0"}, None),
        ({"IDEMP_STORE": STORE, "ENABLE_STATE": ""}, None),
        ({"IDEMP_STORE": STORE, "ENABLE_STATE": "No", "ENABLE_ETCD": " OFF "}, None),
        ({"ENABLE_STATE": "no"}, None),
        ({"IDEMP_STORE": ""}, None),
    ],
)
def test_the_switch(environment: dict[str, str], store: str | None) -> None:
    """N4: ENABLE_ETCD and ENABLE_STATE both turn deduplication on; 0, false, no, off and empty do not."""
    assert read({"SERVICE_NAME": "orders", **environment}).store == store


@pytest.mark.parametrize("switch", ["ENABLE_ETCD", "ENABLE_STATE"])
def test_the_switch_without_a_store_means_etcd(switch: str) -> None:
    """N4: at the seed's address, in a namespace of the service's name."""
    told = {"SERVICE_NAME": "orders", switch: "true"}
    assert read(told).store == "etcd://localhost:2379/orders"


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("IDEMP_TRANSPORT", "nonsense", "svc: IDEMP_TRANSPORT: 'nonsense' is no URL"),
        ("IDEMP_TRANSPORT", "kafka://me:secret@h/", "svc: IDEMP_TRANSPORT: there is no transport for"),
        ("IDEMP_TRANSPORT", "amqp://me:secret@127.0.0.1:9/", "svc: IDEMP_TRANSPORT: "),
        ("IDEMP_STORE", "mongodb://me:secret@h/", "svc: IDEMP_STORE: there is no store for"),
        ("IDEMP_STORE", "sqlite:///seen.db?ttl=3", "svc: IDEMP_STORE: sqlite:// has no option 'ttl'"),
        ("IDEMP_STORE", "sqlite:////no/such/folder/seen.db", "svc: IDEMP_STORE: the folder of"),
        ("IDEMP_STATSD", "localhost:x", "svc: IDEMP_STATSD: statsd address 'localhost:x'"),
    ],
)
def test_a_wrong_setting_is_one_sentence(setting: str, value: str, sentence: str) -> None:
    """It names the variable; no traceback, no password, exit code 2."""
    done = finished("-m", "svc", settings={"SERVICE_NAME": "orders", setting: value})
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, last[: len(sentence)]) == (2, sentence)
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr


def test_a_wrong_password_is_one_sentence(rabbitmq: Any) -> None:
    """RabbitMQ refuses it; the sentence does not show it."""
    url = rabbitmq.url.replace("guest:guest", "guest:tellnobody")
    done = finished("-m", "svc", settings={"SERVICE_NAME": "orders", "IDEMP_TRANSPORT": url})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("svc: IDEMP_TRANSPORT: ")
    assert "Traceback" not in done.stderr
    assert "tellnobody" not in done.stderr


@pytest.mark.parametrize(
    ("module", "extra", "variable"),
    [("pika", "rabbitmq", "IDEMP_TRANSPORT"), ("statsd", "statsd", "IDEMP_STATSD")],
)
def test_a_missing_extra_is_one_sentence(module: str, extra: str, variable: str) -> None:
    """With the line to type."""
    code = f"import sys; sys.modules[{module!r}] = None; from svc.__main__ import main; sys.exit(main())"
    done = finished("-c", code, settings={"SERVICE_NAME": "orders"})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"svc: {variable}: ")
    assert f"pip install 'idemp[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------ its life


@EMBEDDED
def test_told_to_end_more_than_once(desk: Stand) -> None:
    """It was heard: another SIGTERM while it lets go of everything is no end in disorder."""
    service = desk.service("orders")
    while service.process.poll() is None:
        service.process.send_signal(signal.SIGTERM)
        time.sleep(0.002)
    assert service.process.returncode == 0
    assert "stopped" in service.said()


@BOTH
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_it_starts_and_stops(desk: Stand, unique: str, how: signal.Signals) -> None:
    """One line says what it is connected to, without a password; a signal ends it with exit code 0."""
    service = desk.service(unique, IDEMP_STORE=desk.store)
    assert service.stop(how) == 0
    said = service.said()
    assert f"{unique}: broker " in said
    assert f"deduplication on, store {desk.store}" in said
    assert f"{unique}: stopped" in said
    assert "guest:guest" not in said
    assert "Traceback" not in said


@EMBEDDED
def test_without_a_store_it_says_so(desk: Stand, unique: str) -> None:
    """N4: one warning at start, and every delivery is processed."""
    service = desk.service(unique)
    warnings = [line for line in service.said().splitlines() if " WARNING " in line]
    assert len(warnings) == 1
    assert "every delivery is processed, duplicates too" in warnings[0]


# ------------------------------------------------------------------ topology and fan-out


@RABBITMQ
def test_the_topology_is_the_seeds(desk: Stand, unique: str) -> None:
    """N1: a durable topic exchange `events`, a durable queue `<name>-queue` bound `#`, no arguments."""
    # Given
    desk.service(unique, IDEMP_STORE=desk.store)
    connection = pika.BlockingConnection(pika.URLParameters(desk.url))
    queue = f"{unique}-queue"

    # Then declaring them the same way is fine, and in any other way is not
    channel = connection.channel()
    channel.exchange_declare("events", exchange_type="topic", durable=True)
    channel.queue_declare(queue, durable=True)
    for other in ({"durable": False}, {"durable": True, "arguments": {"x-message-ttl": 1000}}):
        with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="PRECONDITION_FAILED"):
            connection.channel().queue_declare(queue, **other)

    # And every routing key arrives
    channel = connection.channel()
    for key in ("foo", "", "a.b.c", "x" * 255):
        channel.basic_publish("events", key, order().encode())
    desk.counted(**{f"{unique}_new_order_ok": 4})
    connection.close()


@BOTH
def test_each_service_gets_each_event_once(desk: Stand, unique: str) -> None:
    """N2: two services, a hundred events: a hundred each."""
    orders, notify = f"{unique}o", f"{unique}n"
    for name in (orders, notify):
        desk.service(name, IDEMP_STORE=desk.store)
    desk.publish(*(order() for _ in range(100)))
    desk.counted(**{f"{orders}_new_order_ok": 100, f"{notify}_new_order_ok": 100})
    ok = {f"{orders}_new_order_ok": 100, f"{notify}_new_order_ok": 100}
    desk.exactly(**ok, **{f"{orders}_new_order_skipped": 0, f"{notify}_new_order_skipped": 0})


@BOTH
def test_replicas_share_the_events(desk: Stand, unique: str) -> None:
    """N2: two processes of one service are one service."""
    for _ in range(2):
        desk.service(unique, IDEMP_STORE=desk.store)
    events = [order() for _ in range(100)]
    desk.publish(*events, *events)
    desk.counted(**{f"{unique}_new_order_ok": 100, f"{unique}_new_order_skipped": 100})
    desk.exactly(**{f"{unique}_new_order_ok": 100, f"{unique}_new_order_skipped": 100})


@BOTH
def test_a_service_catches_up(desk: Stand, unique: str) -> None:
    """N3: events that came while it was down are processed when it is back."""
    assert desk.service(unique, IDEMP_STORE=desk.store).stop() == 0
    desk.publish(*(order() for _ in range(10)))
    desk.service(unique, IDEMP_STORE=desk.store)
    desk.counted(**{f"{unique}_new_order_ok": 10})
    desk.exactly(**{f"{unique}_new_order_ok": 10, f"{unique}_new_order_skipped": 0})


# ------------------------------------------------------------------ once


@BOTH
@pytest.mark.parametrize("kind", ["new_order", "ban_user"])
def test_the_second_is_skipped_and_counted(desk: Stand, unique: str, kind: str) -> None:
    """N5: the same id again is skipped, by each service for itself, and of both types."""
    orders, notify = f"{unique}o", f"{unique}n"
    event = Message(str(uuid4()), kind)
    desk.service(orders, IDEMP_STORE=desk.store)
    desk.publish(event)
    desk.counted(**{f"{orders}_{kind}_ok": 1})
    desk.service(notify, IDEMP_STORE=desk.store)
    desk.publish(event)
    desk.counted(**{f"{orders}_{kind}_skipped": 1, f"{notify}_{kind}_ok": 1})
    desk.publish(event)
    desk.counted(**{f"{orders}_{kind}_skipped": 2, f"{notify}_{kind}_skipped": 1})
    desk.exactly(**{f"{orders}_{kind}_ok": 1, f"{notify}_{kind}_ok": 1})


@EMBEDDED
def test_two_types_may_have_the_same_id(desk: Stand, unique: str) -> None:
    """N5: an id is an id of its type's handler."""
    desk.service(unique, IDEMP_STORE=desk.store)
    desk.publish(Message("1", "new_order"), Message("1", "ban_user"))
    desk.counted(**{f"{unique}_new_order_ok": 1, f"{unique}_ban_user_ok": 1})


@EMBEDDED
@pytest.mark.parametrize("switch", [{}, {"IDEMP_STORE": "{}", "ENABLE_STATE": "off"}])
def test_switched_off_everything_is_processed(desk: Stand, unique: str, switch: dict[str, str]) -> None:
    """N4: five times the same event are five effects: wrong, and on purpose."""
    desk.service(unique, **{name: value.format(desk.store) for name, value in switch.items()})
    desk.publish(*[order("1")] * 5)
    desk.counted(**{f"{unique}_new_order_ok": 5})
    desk.exactly(**{f"{unique}_new_order_ok": 5, f"{unique}_new_order_skipped": 0})


@EMBEDDED
@pytest.mark.parametrize("switch", ["ENABLE_ETCD", "ENABLE_STATE"])
def test_switched_on_it_has_one_effect(desk: Stand, unique: str, switch: str) -> None:
    """N4: either name turns it on."""
    desk.service(unique, IDEMP_STORE=desk.store, **{switch: "true"})
    desk.publish(*[order("1")] * 5)
    desk.counted(**{f"{unique}_new_order_ok": 1, f"{unique}_new_order_skipped": 4})


@BOTH
def test_ids_survive_a_restart(desk: Stand, unique: str) -> None:
    """N6: after a stop and a start the known ids are skipped at once."""
    events = [order() for _ in range(20)]
    service = desk.service(unique, IDEMP_STORE=desk.store)
    desk.publish(*events)
    desk.counted(**{f"{unique}_new_order_ok": 20})
    assert service.stop() == 0
    desk.service(unique, IDEMP_STORE=desk.store)
    desk.publish(*events)
    desk.counted(**{f"{unique}_new_order_skipped": 20})
    desk.exactly(**{f"{unique}_new_order_ok": 20, f"{unique}_new_order_skipped": 20})


@EMBEDDED
def test_with_etcd(desk: Stand, unique: str, etcd: Etcd) -> None:
    """N4, N5, N6, N7: the seed's keys count as done, ids survive a restart, in the seed's layout too."""
    client = Client(etcd.endpoints)
    client.put(f"/service/{unique}/from the seed", b"true")
    settings = {"ENABLE_ETCD": "true", "IDEMP_STORE": f"{etcd.url}{unique}?seed_layout=1"}
    service = desk.service(unique, **settings)
    events = [order() for _ in range(150)]
    desk.publish(order("from the seed"), *events, *events)
    desk.counted(**{f"{unique}_new_order_ok": 150, f"{unique}_new_order_skipped": 151})
    assert service.stop() == 0
    desk.service(unique, **settings)
    desk.publish(order("from the seed"), *events)
    desk.counted(**{f"{unique}_new_order_skipped": 302})
    kept = client.range(f"/service/{unique}/", prefix=True).pairs
    assert {pair.key.rpartition("/")[2] for pair in kept} == {
        "from the seed",
        *(event.id for event in events),
    }
    assert {pair.value for pair in kept} == {b"true"}
    logged = client.range(f"/idemp/v1/{unique}/log/", prefix=True).pairs
    lines = [line for pair in logged for line in pair.value.decode().splitlines()[1:]]
    assert f"C {unique}.new_order/{events[0].id}" in lines
    assert any(line.startswith("d ") for line in lines)
    assert f"S {unique}.new_order/from%20the%20seed" in lines
    client.close()
    desk.exactly(**{f"{unique}_new_order_ok": 150, f"{unique}_new_order_skipped": 302})


@EMBEDDED
def test_ids_survive_a_kill(desk: Stand, unique: str) -> None:
    """N6: nothing that was counted is only in memory."""
    events = [order() for _ in range(20)]
    service = desk.service(unique, IDEMP_STORE=desk.store)
    desk.publish(*events)
    desk.counted(**{f"{unique}_new_order_ok": 20})
    service.stop(signal.SIGKILL)
    desk.programs.clear()
    desk.service(unique, IDEMP_STORE=desk.store)
    desk.publish(*events)
    desk.counted(**{f"{unique}_new_order_skipped": 20})
    desk.exactly(**{f"{unique}_new_order_ok": 20})


@EMBEDDED
def test_ids_are_remembered_for_the_retention(desk: Stand, unique: str) -> None:
    """N12: then they go, and an event that is as old as that is set aside rather than run."""
    store = f"{desk.store}?retention=4s"
    desk.service(unique, IDEMP_STORE=store)
    desk.publish(order("1"))
    desk.counted(**{f"{unique}_new_order_ok": 1})
    desk.publish(order("1"))
    desk.counted(**{f"{unique}_new_order_skipped": 1})
    time.sleep(4.1)
    desk.publish(order("1"))
    desk.counted(**{f"{unique}_new_order_ok": 2})
    desk.publish(Message("2", "new_order", published=time.time() - 60))
    desk.counted(**{f"{unique}_new_order_parked": 1})
    [letter] = desk.taken(f"{unique}-queue.dead", 1)
    assert "older than the retention" in letter.properties.headers["idemp-reason"]


# ------------------------------------------------------------------ metrics


@EMBEDDED
def test_counters_begin_at_zero(desk: Stand, unique: str) -> None:
    """N8: every counter exists as soon as the service runs."""
    desk.service(unique, IDEMP_STORE=desk.store)
    desk.counted(
        **{
            f"{unique}_{kind}_{outcome}": 0
            for kind in ("new_order", "ban_user")
            for outcome in ("ok", "skipped", "failed", "deferred", "parked", "lost", "conflict", "rejected")
        },
        **{f"{unique}_rejected": 0},
    )


@EMBEDDED
def test_what_is_counted_adds_up(desk: Stand, unique: str) -> None:
    """N8: ok and skipped of both types, sent by the service over UDP."""
    desk.service(unique, IDEMP_STORE=desk.store)
    orders = [order() for _ in range(300)]
    bans = [Message(str(uuid4()), "ban_user") for _ in range(50)]
    desk.publish(*orders, *bans, *orders[:100], *bans[:10])
    expected = {
        f"{unique}_new_order_ok": 300,
        f"{unique}_new_order_skipped": 100,
        f"{unique}_ban_user_ok": 50,
        f"{unique}_ban_user_skipped": 10,
    }
    desk.counted(**expected)
    desk.exactly(**expected)


@EMBEDDED
def test_a_statsd_that_is_not_there_costs_nothing(desk: Stand, unique: str) -> None:
    """N8: the service does its work and stops in good order."""
    service = desk.service(unique, IDEMP_STORE=desk.store, IDEMP_STATSD="127.0.0.1:9")
    desk.publish(order("1"))
    service.wait_for("1 ok")
    assert service.stop() == 0


# ------------------------------------------------------------------ bad input

BAD: list[tuple[bytes, str]] = [
    (b"\xff\xfe\x00", "the body is not JSON"),
    (b"", "the body is not JSON"),
    (b"not json", "the body is not JSON"),
    (b'{"type":"new_order","id":"1"', "the body is not JSON"),
    (b"[" * 100_000, "the body is not JSON"),
    (b"[1,2]", "not an object: list"),
    (b"null", "not an object: NoneType"),
    (b'"text"', "not an object: str"),
    (b'{"type":"new_order"}', "the message has no id"),
    (b'{"type":"new_order","id":null}', "the message has no id"),
    (b'{"type":"new_order","id":""}', "the id is empty"),
    (b'{"type":"new_order","id":7}', "the id must be a string, not int"),
    (b'{"type":"new_order","id":["1"]}', "the id must be a string, not list"),
    (b'{"type":"new_order","id":"\\ud800"}', "the id is not valid Unicode"),
    (json.dumps({"type": "new_order", "id": "x" * 1025}).encode(), "the id has 1025 bytes"),
    (
        json.dumps({"type": "new_order", "id": "ü" * 600}, ensure_ascii=False).encode(),
        "the id has 1200 bytes",
    ),
    (b'{"id":"1"}', "the message has no type"),
    (b'{"type":"","id":"1"}', "the type is empty"),
    (b'{"type":"no_such_type","id":"1"}', "no handler for type 'no_such_type'"),
    (b'{"specversion":"1.0","source":"a b","id":"1","type":"new_order"}', "source has a space"),
    (json.dumps({"type": "new_order", "id": "big", "args": "x" * 5_000_000}).encode(), "the body has 50000"),
]


@BOTH
def test_bad_input_is_set_aside_and_the_service_goes_on(desk: Stand, unique: str) -> None:
    """N10: each bad message is set aside with its reason, counted and logged; good ones run."""
    # Given
    service = desk.service(unique, IDEMP_STORE=desk.store)
    queue = f"{unique}-queue"

    # When bad ones come between good ones
    for body, _ in BAD:
        desk.publish(order(), body, order(), to=queue)

    # Then
    desk.counted(**{f"{unique}_rejected": len(BAD), f"{unique}_new_order_ok": 2 * len(BAD)})
    letters = desk.taken(f"{queue}.dead", len(BAD))
    assert [letter.body for letter in letters] == [body for body, _ in BAD]
    for letter, (_, reason) in zip(letters, BAD, strict=True):
        headers = letter.properties.headers
        assert reason in headers["idemp-reason"]
        assert (headers["idemp-outcome"], headers["idemp-queue"]) == ("rejected", queue)
    said = service.said()
    assert said.count(f"WARNING {unique}: rejected") == len(BAD)
    desk.exactly(**{f"{unique}_rejected": len(BAD), f"{unique}_new_order_ok": 2 * len(BAD)})
    assert desk.depth(queue) == 0
    assert desk.depth(f"{queue}.dead") == 0


@BOTH
def test_messages_without_an_id_are_never_each_others_duplicates(desk: Stand, unique: str) -> None:
    """N13: refused, each by itself, whatever they have in common; the broker's message_id counts as an id."""
    desk.service(unique, IDEMP_STORE=desk.store)
    queue = f"{unique}-queue"
    bare = b'{"type":"new_order","args":{}}'
    desk.publish(bare, bare, to=queue)
    desk.publish(bare, to=queue, properties=Properties(message_id="from-the-broker"))
    desk.counted(**{f"{unique}_rejected": 2, f"{unique}_new_order_ok": 1})
    assert len(desk.taken(f"{queue}.dead", 2)) == 2
    desk.exactly(**{f"{unique}_new_order_skipped": 0})


@RABBITMQ
def test_odd_headers_are_carried_or_named(desk: Stand, unique: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """N10: every type that AMQP has; half a CloudEvent; our own names with nonsense in them."""

    def encode(pieces: list[bytes], value: Any, plain: Any = pika.data.encode_value) -> int:
        """As other clients do: pika reads numbers with a fraction, but does not write them."""
        if not isinstance(value, float):
            return int(plain(pieces, value))
        pieces.append(struct.pack(">cd", b"d", value))
        return 9

    monkeypatch.setattr(pika.data, "encode_value", encode)

    # Given
    desk.service(unique, IDEMP_STORE=desk.store)
    odd: dict[Any, Any] = {
        "nothing": None,
        "bytes": b"\xff\x00",
        "list": [1, "x", {"deep": [True, None]}],
        "when": datetime.datetime(2001, 2, 3, 4, 5, 6, tzinfo=datetime.UTC),
        "money": decimal.Decimal("1.25"),
        "big": 2**40,
        "fraction": 0.1,
        "": "no name",
        b"\xff": "a name that is no text",
        "idemp-attempt": "many",
        "idemp-retried-at": [],
        "idemp-key": {},
    }
    wrong: list[dict[Any, Any]] = [
        {"ce-id": 7, "ce-source": "/a"},
        {"ce-id": "1", "ce-source": "a b"},
        {"ce-id": "", "ce-source": "a"},
    ]
    connection = pika.BlockingConnection(pika.URLParameters(desk.url))
    channel = connection.channel()

    def send(body: bytes, headers: dict[Any, Any], **about: Any) -> None:
        channel.basic_publish("", f"{unique}-queue", body, pika.BasicProperties(headers=headers, **about))

    # When
    send(order("odd").encode(), odd)
    send(order("plain").encode(), {}, content_type="", timestamp=0, message_id="", type="")
    for headers in wrong:
        send(b"{}", headers, type="new_order")
    send(b'{"type":"no_such_type","id":"1"}', odd)
    send(b"{}", {}, message_id=b"\xff", type=b"\xfe", correlation_id=b"\xfd", app_id=b"\xfc")
    send(b"\xff", {"ce-id": "1", "ce-source": "/a", "ce-type": "new_order"}, content_type=b"\xfb")
    connection.close()

    # Then
    desk.counted(**{f"{unique}_new_order_ok": 1, f"{unique}_new_order_parked": 1, f"{unique}_rejected": 6})
    letters = desk.taken(f"{unique}-queue.dead", 7)
    reasons = {letter.properties.headers["idemp-reason"]: letter for letter in letters}
    kept: dict[Any, Any] = dict(reasons["no handler for type 'no_such_type'"].properties.headers)
    for name in ("nothing", "bytes", "list", "money", "big", "", b"\xff"):
        assert kept[name] == odd[name]
    desk.publish(order())
    desk.counted(**{f"{unique}_new_order_ok": 2})


ODD_IDS = [
    "a/b",
    "/",
    "//",
    "..",
    "../../etc/passwd",
    ".",
    " ",
    "two words",
    "line\nbreak",
    "\r\n\t",
    "\x00",
    "a\x00b",
    "\x1b[31m",
    "*",
    "#",
    "%",
    "%00",
    "{}",
    "{0}",
    "$(id)",
    "'; DROP TABLE open; --",
    '"',
    "\\",
    "Ü",
    "日本語",
    "🎉👩‍👩‍👧",
    "\u202e\u200b",
    "e\u0301",
    "é",
    "\U0010ffff",
    "urn:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6",
    "https://example.com/?a=b#c",
    "0",
    "null",
    "x" * 1024,
    "ü" * 512,
]


@BOTH
def test_odd_ids_keep_their_place(desk: Stand, unique: str) -> None:
    """N5: any Unicode is an id: taken once, skipped the second time, and equal to itself only."""
    desk.service(unique, IDEMP_STORE=desk.store)
    queue = f"{unique}-queue"
    bodies = [json.dumps({"type": "new_order", "id": id}).encode() for id in ODD_IDS]
    desk.publish(*bodies, to=queue)
    desk.counted(**{f"{unique}_new_order_ok": len(ODD_IDS)})
    desk.publish(*bodies, to=queue)
    desk.counted(**{f"{unique}_new_order_skipped": len(ODD_IDS)})
    desk.exactly(**{f"{unique}_new_order_ok": len(ODD_IDS), f"{unique}_rejected": 0})
    store = open_store(desk.store)
    keys = [f"{unique}.new_order/{id}" for id in ODD_IDS]
    assert all(isinstance(state, Done) for state in store.apply([Get(key) for key in keys]))
    assert {key for key, _ in store.scan("")} == set(keys)
    store.close()


@BOTH
def test_cloudevents_are_known_by_source_and_id(desk: Stand, unique: str) -> None:
    """N5: structured or binary, the same event is the same key; another source is another event."""
    desk.service(unique, IDEMP_STORE=desk.store)
    queue = f"{unique}-queue"
    event = {
        "specversion": "1.0",
        "source": "/shop",
        "id": "A 1",
        "type": "new_order",
        "data": {"id": "inner"},
    }
    structured = json.dumps(event).encode()
    elsewhere = json.dumps({**event, "source": "/other"}).encode()
    headers = {"ce-specversion": "1.0", "ce-source": "/shop", "ce-id": "A 1", "ce-type": "new_order"}
    desk.publish(structured, elsewhere, to=queue)
    desk.counted(**{f"{unique}_new_order_ok": 2})
    desk.publish(b'{"id":"inner"}', to=queue, properties=Properties(headers=headers))
    desk.counted(**{f"{unique}_new_order_skipped": 1})
    desk.exactly(**{f"{unique}_new_order_ok": 2})


# ------------------------------------------------------------------ handlers of one's own


@BOTH
def test_a_handler_that_raises_is_tried_again_and_then_set_aside(desk: Stand, unique: str) -> None:
    """N10: attempts are counted in the store; the last leaves the key parked and its message in the queue."""
    code = """
import sys
from idemp import PermanentFailure, context
from svc.__main__ import main

def new_order(message):
    if message.id == "hopeless":
        raise PermanentFailure("no such customer")
    if context().attempt < 2:
        raise OSError("not now")

sys.exit(main({"new_order": new_order}))
"""
    desk.service(unique, "-c", code, IDEMP_STORE=desk.store)
    desk.publish(order("hopeless"), order("later"), to=f"{unique}-queue")
    desk.counted(
        **{f"{unique}_new_order_failed": 1, f"{unique}_new_order_ok": 1, f"{unique}_new_order_parked": 1}
    )
    [letter] = desk.taken(f"{unique}-queue.dead", 1)
    headers = letter.properties.headers
    assert headers["idemp-reason"] == "permanent failure: PermanentFailure: no such customer"
    assert headers["idemp-key"] == f"{unique}.new_order/hopeless"
