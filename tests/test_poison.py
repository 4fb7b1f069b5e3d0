"""Messages that can never be handled, each with a good one behind it: that is run, and both are settled."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import asdict

from idemp import Consumer, Message, PermanentFailure, idempotent, open_store, open_transport, publish
from idemp.dead import Letter, letters
from idemp.message import Properties
from idemp.ports import Delivery, Publication
from idemp.transports.rabbitmq import RabbitMQTransport
from tests.servers import RabbitMQ, Redis
from tests.service import running


class Service:
    """A consumer of one message type at the broker at ``url``, and what it ran."""

    def __init__(self, url: str, name: str, store: str = "memory://", **policy: Any) -> None:
        self.url, self.name, self.queue = url, name, f"{name}-queue"
        self.ran: list[str] = []
        self.transport = open_transport(url)
        self.store = open_store(store)
        self.consumer = Consumer(self.transport, service=name, prefetch=3, backoff=0.05)

        @self.consumer.on("t")
        @idempotent(self.store, name=f"{name}.t", **policy)
        def handle(message: Message) -> None:
            self.handle(message)

    def handle(self, message: Message) -> None:
        self.ran.append(message.id)
        if (error := message.args.get("error")) is not None:
            raise PermanentFailure(error)

    def running(self) -> AbstractContextManager[None]:
        return running(self.consumer)

    def send(self, *bodies: bytes, **properties: Any) -> None:
        with closing(open_transport(self.url)) as transport:
            publish(
                transport, [Publication(each, Properties(**properties), "", self.queue) for each in bodies]
            )

    def declare(self) -> None:
        with closing(open_transport(self.url)) as transport:
            transport.declare(self.queue)

    def dead(self) -> list[Letter]:
        with closing(open_transport(self.url)) as transport:
            return list(letters(transport, self.queue))

    def depth(self, queue: str) -> int:
        with closing(open_transport(self.url)) as transport:
            return transport.depth(queue)

    def set_aside(self, n: int) -> list[Letter]:
        """Wait for ``n`` dead letters and the good one: see `GOOD`."""
        with self.running():
            until(lambda: "good" in self.ran and self.depth(f"{self.queue}.dead") >= n)
        assert self.depth(self.queue) == 0  # what was not acknowledged has come back by now
        assert self.ran.count("good") == 1
        return self.dead()

    def close(self) -> None:
        self.transport.close()
        self.store.close()


GOOD = Message("good", "t").encode()


@pytest.fixture
def rabbit(rabbitmq: RabbitMQ, unique: str) -> Iterator[Service]:
    """With its queue."""
    service = Service(rabbitmq.url, unique)
    service.declare()
    yield service
    service.close()


def until(what: Callable[[], Any], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


# ------------------------------------------------------------------ RabbitMQ


@pytest.mark.parametrize("tried", [1024, (1 << 31) - 1, (1 << 63) - 1])
def test_a_message_that_says_it_was_tried_often(rabbit: Service, tried: int) -> None:
    """Anybody may write a header."""
    failed: list[str] = []

    def fail_once(message: Message) -> None:
        rabbit.ran.append(message.id)
        if message.id == "tried" and not failed:
            failed.append(message.id)
            raise ValueError("not now")

    rabbit.handle = fail_once  # type: ignore[method-assign]
    rabbit.send(Message("tried", "t").encode(), headers={"idemp-attempt": tried})
    rabbit.send(GOOD)
    with rabbit.running():
        until(lambda: "good" in rabbit.ran and failed)
        until(lambda: not rabbit.depth(rabbit.queue))


def test_a_letter_is_whole_though_its_queue_was_away(rabbit: Service) -> None:
    """It is declared again, and gets the message with its id, its type and its headers."""

    def refuse(message: Message) -> None:
        rabbit.ran.append(message.id)
        raise PermanentFailure("no stock")

    def send(id: str) -> None:
        given = Properties(id, "t", "c", "shop", int(time.time()), "application/json", {"tenant": "acme"})
        rabbit.send(b'{"amount": 5}', **asdict(given))

    rabbit.handle = refuse  # type: ignore[method-assign]
    dead = f"{rabbit.queue}.dead"
    with rabbit.running():
        send("usual")
        until(lambda: rabbit.depth(dead) == 1)
        [usual] = rabbit.dead()
        with closing(open_transport(rabbit.url)) as transport:
            transport.consume(dead, 1)
            transport.ack([letter.tag for letter in transport.poll(5.0) if isinstance(letter, Delivery)])
        with closing(RabbitMQTransport(rabbit.url)) as broker:
            broker.drop(dead)
            assert broker.consumers(dead) is None
        send("later")
        until(lambda: rabbit.ran == ["usual", "later"] and rabbit.depth(dead) == 1, 60.0)
    [later] = rabbit.dead()

    def shown(letter: Letter) -> list[Any]:
        properties = letter.properties
        headers = {**properties.headers, "idemp-key": ""}
        return [letter.type, properties.correlation_id, properties.app_id, properties.content_type, headers]

    assert later.properties.message_id == "later"
    assert shown(later) == shown(usual)


@pytest.mark.parametrize("transaction", [False, True])
def test_a_reason_that_is_no_unicode(
    rabbitmq: RabbitMQ, unique: str, tmp_path: Path, transaction: bool
) -> None:
    """A handler's error may quote what JSON lets through: half of a character."""
    store = f"sqlite:///{tmp_path}/seen.db" if transaction else "memory://"
    with closing(Service(rabbitmq.url, unique, store, transaction=transaction)) as rabbit:
        rabbit.declare()
        rabbit.send(*(b'{"type":"t","id":"s%d","args":{"error":"Bj\\ud800rn"}}' % n for n in range(3)), GOOD)
        found = rabbit.set_aside(3)
    assert {letter.outcome for letter in found} == {"parked"}
    assert all("Bj\\ud800rn" in letter.reason for letter in found)


BIG = {"trace": "x" * 131_030}
"""Headers that fit into a frame of 128 KiB, by a few bytes."""


def test_headers_that_leave_no_room_for_ours(rabbit: Service) -> None:
    """The broker would end the connection over a greater frame, each time."""
    rabbit.send(*(b'{"type":"none","id":"%d"}' % n for n in range(3)), headers=BIG)
    rabbit.send(GOOD)
    found = rabbit.set_aside(3)
    assert {(letter.outcome, letter.reason) for letter in found} == {
        ("rejected", "no handler for type 'none'")
    }
    assert not any("trace" in letter.properties.headers for letter in found)


def test_headers_that_leave_no_room_for_a_retry(rabbit: Service) -> None:
    """It is not run again without them."""

    def fail(message: Message) -> None:
        rabbit.ran.append(message.id)
        if message.id != "good":
            raise ValueError("not now")

    rabbit.handle = fail  # type: ignore[method-assign]
    rabbit.send(Message("big", "t").encode(), headers=BIG)
    rabbit.send(GOOD)
    [letter] = rabbit.set_aside(1)
    assert rabbit.ran.count("big") == 1
    assert "failed, and cannot be tried again: AMQP cannot carry the message" in letter.reason


# ------------------------------------------------------------------ Redis Streams


FOREIGN = {
    "nothing of ours": ["foo", "bar"],
    "a body only": ["body", '{"type":"t","id":"h1","args":{}}'],
    "another order": ["body", GOOD.decode(), "envelope", "[]"],
    "other names": ["a", '["","q"]', "b", GOOD.decode()],
    "an event": ["EventTypeName", "t", "Payload", "{}"],
    "no list": ["envelope", "{}", "body", "x"],
    "a map": ["envelope", '{"a":1,"b":2}', "body", GOOD.decode()],
    "a number": ["envelope", "7", "body", GOOD.decode()],
    "no JSON": ["envelope", "\\xff", "body", GOOD.decode()],
    "too long": ["envelope", "[1,2,3,4,5,6,7,8,9,10]", "body", GOOD.decode()],
    "no headers": ["envelope", '["","q",null,null,null,null,null,null,5]', "body", GOOD.decode()],
    "no such tag": ["envelope", '["","q",null,null,null,null,null,null,{"x":1}]', "body", GOOD.decode()],
    "no decimal": [
        *("envelope", '["","q",null,null,null,null,null,null,{"$":"decimal","of":"x"}]'),
        *("body", GOOD.decode()),
    ],
}


@pytest.mark.parametrize("fields", FOREIGN.values(), ids=FOREIGN)
def test_an_entry_that_somebody_else_wrote(redis: Redis, unique: str, fields: list[str]) -> None:
    """With XADD into a queue's own stream: it is shown to a person, not run."""
    with closing(Service(f"{redis.url}?namespace={unique}", unique)) as service:
        service.declare()
        for _ in range(3):
            redis.call("XADD", f"idemp:{{{unique}}}:queue:{service.queue}", "*", *fields)
        service.send(GOOD)
        oldest: float = service.transport.oldest(service.queue)  # type: ignore[attr-defined]
        assert abs(time.time() - oldest) < 60
        found = service.set_aside(3)
    assert {letter.outcome for letter in found} == {"rejected"}
    assert {letter.reason for letter in found} == {"the message has no type"}
    assert all(json.loads(letter.body)["fields"].keys() == set(fields[::2]) for letter in found)
