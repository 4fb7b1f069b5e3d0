"""Resolve: what a person does with a key in doubt or parked, and with its dead letter."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from idemp import Consumer, KeyBusy, Message, PermanentFailure, idempotent, open_store, open_transport
from idemp.errors import IdempError, Unroutable
from idemp.message import Properties
from idemp.ports import (
    Abandon,
    Busy,
    Claim,
    Claimed,
    Clock,
    Complete,
    Delivery,
    Done,
    Doubt,
    Free,
    Get,
    Op,
    Park,
    Parked,
    Publication,
    Release,
    Reply,
    Store,
    Takeover,
    Transport,
)
from idemp.resolve import NothingToResolve, mark_done, send_back, set_free
from idemp.transports import publish

KEY = "orders.new_order/1"


@pytest.fixture(params=["memory://", "sqlite:///{}/seen.db"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """Each embedded store."""
    opened = open_store(request.param.format(tmp_path))
    yield opened
    opened.close()


def state(store: Store) -> Reply:
    return store.apply([Get(KEY)])[0]


def claimed(store: Store) -> Claimed:
    reply = store.apply([Claim(KEY)])[0]
    assert isinstance(reply, Claimed)
    return reply


def in_doubt(store: Store) -> None:
    store.apply([Abandon(KEY, claimed(store).token)])


def parked(store: Store) -> None:
    store.apply([Park(KEY, claimed(store).token, "attempts used up")])


# ------------------------------------------------------------------ the key


@pytest.mark.parametrize(("leave", "was"), [(in_doubt, Doubt), (parked, Parked)])
@pytest.mark.parametrize("result", [None, b"0", b'{"receipt":1}'])
def test_a_key_is_marked_done(
    store: Store, leave: Callable[[Store], None], was: type, result: bytes | None
) -> None:
    """Its duplicates are answered with the result that the person gave."""
    leave(store)
    assert isinstance(mark_done(store, KEY, result), was)
    done = state(store)
    assert isinstance(done, Done)
    assert done.result == result


@pytest.mark.parametrize(("leave", "was"), [(in_doubt, Doubt), (parked, Parked)])
def test_a_key_is_set_free(store: Store, leave: Callable[[Store], None], was: type) -> None:
    """It has all its attempts again."""
    leave(store)
    assert isinstance(set_free(store, KEY), was)
    assert state(store) == Free(0)
    assert claimed(store).attempt == 1


def test_the_old_holder_lost_its_claim(store: Store) -> None:
    """What a person decided is not overwritten by the handler that hung."""
    claim = claimed(store)
    store.apply([Abandon(KEY, claim.token)])
    set_free(store, KEY)
    store.apply([Complete(KEY, claim.token, b"late"), Release(KEY, claim.token, 7)])
    assert state(store) == Free(0)


@pytest.mark.parametrize("deed", [mark_done, set_free])
def test_a_key_that_runs_is_left_alone(store: Store, deed: Callable[[Store, str], Any]) -> None:
    """`KeyBusy`, and the claim stands."""
    claim = claimed(store)
    with pytest.raises(KeyBusy):
        deed(store, KEY)
    assert isinstance(state(store), Busy)
    store.apply([Complete(KEY, claim.token, b"1")])
    done = state(store)
    assert isinstance(done, Done)
    assert done.result == b"1"


@pytest.mark.parametrize("deed", [mark_done, set_free])
def test_a_key_that_is_done_stays_done(store: Store, deed: Callable[[Store, str], Any]) -> None:
    """`NothingToResolve` says so."""
    store.apply([Complete(KEY, claimed(store).token, b"1")])
    before = state(store)
    with pytest.raises(NothingToResolve, match="is done, so there is nothing to resolve"):
        deed(store, KEY)
    assert state(store) == before


@pytest.mark.parametrize("deed", [mark_done, set_free])
@pytest.mark.parametrize("attempts", [0, 2])
def test_a_free_key_stays_free(store: Store, deed: Callable[[Store, str], Any], attempts: int) -> None:
    """`NothingToResolve` says so; attempts so far stay counted."""
    store.apply([Release(KEY, claimed(store).token, attempts)])
    with pytest.raises(NothingToResolve, match="free or unknown"):
        deed(store, KEY)
    assert state(store) == Free(attempts)


class Rival:
    """A store where somebody else is faster: ``then`` happens right before the first takeover."""

    def __init__(self, store: Store, then: Callable[[Doubt | Parked], Sequence[Op]]) -> None:
        self._store, self._then = store, then

    def apply(self, ops: Sequence[Op]) -> list[Reply]:
        [op] = ops
        if isinstance(op, Takeover):
            seen = self._store.apply([Get(KEY)])[0]
            assert isinstance(seen, Doubt | Parked)
            self._store.apply(self._then(seen))
        return self._store.apply(ops)


@pytest.mark.parametrize("deed", [mark_done, set_free])
def test_a_consumer_that_takes_it_first_keeps_it(store: Store, deed: Callable[[Any, str], Any]) -> None:
    """Of a person and a consumer who come at the same time one wins."""
    in_doubt(store)
    with pytest.raises(KeyBusy):
        deed(Rival(store, lambda seen: [Takeover(KEY, seen.token)]), KEY)
    assert isinstance(state(store), Busy)


# ------------------------------------------------------------------ its message


@pytest.fixture(params=["memory", "sqlite", "rabbitmq"])
def broker(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[Callable[[], Transport]]:
    """Opens connections to one broker of each kind, which has ``<unique>-queue`` and its ``.dead``."""
    if request.param == "rabbitmq":
        url = request.getfixturevalue("rabbitmq").url
    else:
        url = {"memory": f"memory://{unique}", "sqlite": f"sqlite:///{tmp_path}/queues.db"}[request.param]
    opened: list[Transport] = []

    def connect() -> Transport:
        opened.append(open_transport(url))
        return opened[-1]

    first = connect()
    first.declare(f"{unique}-queue")
    first.declare(f"{unique}-queue.dead")
    yield connect
    for transport in opened:
        transport.close()


def dead_letter(queue: str, key: str, body: bytes = b"{}", origin: str = "") -> Publication:
    """A message as the consumer of ``queue`` sets it aside; ``origin``: where it says it came from."""
    said: dict[str, Any] = {"traceparent": "00-1", "idemp-key": key, "idemp-queue": origin or queue}
    said |= {"idemp-reason": "because", "idemp-attempt": 3}
    properties = Properties(message_id="1", type="new_order", timestamp=1000.0, headers=said)
    return Publication(body, properties, "", f"{queue}.dead")


def taken(transport: Transport, queue: str, n: int) -> list[Delivery]:
    """The ``n`` messages of ``queue``, and no more."""
    transport.consume(queue, n + 1)
    found: list[Delivery] = []
    deadline = time.monotonic() + 10
    while len(found) < n and time.monotonic() < deadline:
        found += [event for event in transport.poll(1.0) if isinstance(event, Delivery)]
    found += [event for event in transport.poll(0.3) if isinstance(event, Delivery)]
    return found


def resolve(broker: Callable[[], Transport], queue: str, key: str, **options: Any) -> int:
    transport = broker()
    try:
        return send_back(transport, queue, key, **options)
    finally:
        transport.close()


def test_the_messages_of_a_key_go_back_and_others_stay(broker: Callable[[], Transport], unique: str) -> None:
    """In their order, without what the consumer wrote on them, and with a new beginning of their age."""
    # Given
    queue = f"{unique}-queue"
    letters = [
        dead_letter(queue, key, body)
        for key, body in [("a", b"1"), (KEY, b"2"), ("b", b"3"), (KEY, b"4"), ("c", b"5")]
    ]
    publish(broker(), letters)

    # When
    sent = resolve(broker, queue, KEY, clock=Clock(wall=lambda: 2000.5))

    # Then
    assert sent == 2
    back = taken(broker(), queue, 2)
    assert [delivery.body for delivery in back] == [b"2", b"4"]
    for delivery in back:
        headers = dict(delivery.properties.headers)
        assert headers.pop("idemp-retry")
        assert headers == {"traceparent": "00-1", "idemp-retried-at": 2000}
        assert (delivery.properties.message_id, delivery.properties.timestamp) == ("1", 1000.0)
    left = taken(broker(), f"{queue}.dead", 3)
    assert [delivery.body for delivery in left] == [b"1", b"3", b"5"]
    assert [delivery.properties.headers["idemp-reason"] for delivery in left] == ["because"] * 3


def test_a_message_goes_to_the_queue_it_came_from(broker: Callable[[], Transport], unique: str) -> None:
    """The dead-letter header names it."""
    broker().declare(f"{unique}-other")
    letter = dead_letter(f"{unique}-queue", KEY, origin=f"{unique}-other")
    publish(broker(), [letter])
    assert resolve(broker, f"{unique}-queue", KEY) == 1
    assert len(taken(broker(), f"{unique}-other", 1)) == 1


def test_a_message_whose_queue_is_gone_stays(broker: Callable[[], Transport], unique: str) -> None:
    """`Unroutable`, and the dead letter is where it was."""
    letter = dead_letter(f"{unique}-queue", KEY, origin=f"{unique}-gone")
    publish(broker(), [letter])
    with pytest.raises(Unroutable):
        resolve(broker, f"{unique}-queue", KEY)
    assert len(taken(broker(), f"{unique}-queue.dead", 1)) == 1


def test_nothing_to_send_back(broker: Callable[[], Transport], unique: str) -> None:
    """No such message, no such queue: none were sent, and no queue was made."""
    publish(broker(), [dead_letter(f"{unique}-queue", "another")])
    assert resolve(broker, f"{unique}-queue", KEY) == 0
    assert resolve(broker, f"{unique}-nowhere", KEY) == 0
    with pytest.raises(Unroutable):
        publish(broker(), [Publication(b"{}", Properties(), "", f"{unique}-nowhere.dead")])


class Crash(Exception):
    """The process ends here."""


def test_a_crash_before_the_acknowledgement_leaves_a_duplicate(
    broker: Callable[[], Transport], unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Confirmed first, then taken out: nothing is lost, and a second time sends it again."""
    queue = f"{unique}-queue"
    publish(broker(), [dead_letter(queue, KEY)])
    transport = broker()

    def crash(tags: object) -> None:
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(transport, "ack", crash)
        with pytest.raises(Crash):
            send_back(transport, queue, KEY)
    transport.close()
    assert resolve(broker, queue, KEY) == 1
    assert len(taken(broker(), queue, 2)) == 2
    assert taken(broker(), f"{queue}.dead", 0) == []


def test_a_message_that_dies_again_at_once_is_sent_back_once(unique: str) -> None:
    """A person's one deed is one more try, not a loop between two queues."""
    # Given a consumer that sets everything aside, while the dead-letter queue is read
    queue = f"{unique}-queue"
    url = f"memory://{unique}"
    consumer = Consumer(open_transport(url), service=unique)

    @consumer.on("new_order")
    def broken(message: Message) -> None:
        raise PermanentFailure("never")

    ready = threading.Event()
    thread = threading.Thread(target=lambda: consumer.run(ready=ready.set))
    thread.start()
    assert ready.wait(10)
    message = Message("1", "new_order")
    with_key = replace(message.properties(), headers={"idemp-key": KEY, "idemp-queue": queue})
    connection = open_transport(url)
    body = message.encode()
    letters = [Publication(body, with_key, "", f"{queue}.dead") for _ in range(50)]
    publish(connection, letters)

    # When
    sent = resolve(lambda: open_transport(url), queue, KEY)

    # Then
    assert sent == 50
    deadline = time.monotonic() + 10
    while connection.depth(f"{queue}.dead") < 50 and time.monotonic() < deadline:
        time.sleep(0.02)
    consumer.stop()
    thread.join(10)
    assert connection.depth(f"{queue}.dead") == 50
    connection.close()


def test_a_parked_message_is_freed_and_runs(
    store: Store, broker: Callable[[], Transport], unique: str
) -> None:
    """The whole way: it fails for good, is parked and set aside; a person frees it; it takes effect."""
    # Given
    queue, key = f"{unique}-queue", f"{unique}.new_order/1"
    consumer = Consumer(broker(), service=unique, exchange=f"{unique}-events")
    mended = threading.Event()
    ran = threading.Event()

    @consumer.on("new_order")
    @idempotent(store, name=f"{unique}.new_order")
    def new_order(message: Message) -> str:
        if not mended.is_set():
            raise PermanentFailure("no such customer")
        ran.set()
        return "booked"

    ready = threading.Event()
    thread = threading.Thread(target=lambda: consumer.run(ready=ready.set))
    thread.start()
    assert ready.wait(10)
    message = Message("1", "new_order", published=time.time() - 1_000_000)
    operator = broker()
    publish(operator, [Publication(message.encode(), message.properties(), f"{unique}-events", "foo")])
    deadline = time.monotonic() + 10
    while not operator.depth(f"{queue}.dead") and time.monotonic() < deadline:
        time.sleep(0.02)
    was = store.apply([Get(key)])[0]
    assert isinstance(was, Parked)
    assert "older than the retention" in was.reason

    # When
    mended.set()
    set_free(store, key)
    assert resolve(broker, queue, key) == 1

    # Then it is young again, for it was sent back just now
    assert ran.wait(10)
    consumer.stop()
    thread.join(10)
    done = store.apply([Get(key)])[0]
    assert isinstance(done, Done)
    assert done.result == b'"booked"'
    assert operator.depth(f"{queue}.dead") == 0


def test_the_error_is_an_idemp_error() -> None:
    """Faces catch one kind."""
    assert issubclass(NothingToResolve, IdempError)
