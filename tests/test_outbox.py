"""The outbox: what a handler publishes goes out if its transaction commits, under ids that never change."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import psycopg
import pytest

from idemp import (
    ConfigError,
    Consumer,
    Message,
    Relay,
    context,
    idempotent,
    open_store,
    open_transport,
    publish,
)
from idemp.errors import TransportUnavailable
from idemp.ports import Busy, Delivery, Done, Doubt, Free, Get, Inbox, Parked, Publication, Sent
from tests.servers import Etcd, PostgreSQL, RabbitMQ, Redis
from tests.servers.ports import free_port

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """Makes URLs of fresh databases, on each store that has an outbox."""
    if request.param == "sqlite":
        return lambda name: f"sqlite:///{tmp_path}/{name}.db"
    server = request.getfixturevalue("postgresql")
    return lambda name: str(server.database())


@pytest.fixture
def store(new_database: Callable[[str], str]) -> Iterator[Any]:
    with closing(open_store(new_database("app"))) as opened:
        yield opened


def sql(url: str, statement: str) -> list[Any]:
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url[len("sqlite:///") :], timeout=30, isolation_level=None)) as line:
            return line.execute(statement).fetchall()
    with psycopg.connect(url, autocommit=True) as line:
        found = line.execute(statement.encode())
        return found.fetchall() if found.description else []


def until(what: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def came(url: str, queue: str, number: int) -> list[Delivery]:
    """So many messages of a queue."""
    found: list[Delivery] = []
    with closing(open_transport(url)) as transport:
        transport.consume(queue, 1000)
        while len(found) < number:
            some = [event for event in transport.poll(5.0) if isinstance(event, Delivery)]
            assert some, f"only {len(found)} of {number} came"
            found += some
            transport.ack([each.tag for each in some])
    return found


def test_what_is_published_goes_with_the_transaction(store: Any, unique: str) -> None:
    """Nothing of an attempt that raised; the ids of the first attempt and of the last are the same."""
    broker = f"memory://{unique}"
    ids: list[list[str]] = []

    @idempotent(store, name="app.order", key="order", transaction=True)
    def order(order: str) -> None:
        ids.append([context().publish("billed", {"n": n}, exchange="out") for n in range(3)])
        if len(ids) == 1:
            raise ValueError("not yet")

    with pytest.raises(ValueError, match="not yet"):
        order("A")
    assert store.letters(10) == []
    order("A")
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 3
    assert [letter.key for letter in store.letters(10)] == ["app.order/A"] * 3
    assert store.backlog().letters == 3
    with closing(open_transport(broker)) as transport:
        transport.declare("q", "out")
        relay = Relay(store, transport)
        assert [relay.turn() for _ in range(4)] == [1, 1, 1, 0]  # of one key, one after the other
    assert store.backlog() == (0, 0.0)
    bodies = [json.loads(each.body) for each in came(broker, "q", 3)]
    assert [(body["id"], body["args"]["n"]) for body in bodies] == list(zip(ids[0], range(3), strict=True))


def test_a_lost_confirm_repeats_the_same_id(store: Any, unique: str) -> None:
    """It is safe in the queue, and the relay was not told."""
    broker = f"memory://{unique}"

    @idempotent(store, name="app.order", key="order", transaction=True)
    def order(order: str) -> None:
        context().publish("billed", {}, exchange="out")

    order("A")
    with closing(open_transport(broker)) as transport:
        transport.declare("q", "out")
        deaf: Any = open_transport(broker)
        real = deaf.poll

        def poll(timeout: float) -> list[Any]:
            real(timeout)
            raise TransportUnavailable

        deaf.poll = poll
        with closing(deaf), pytest.raises(TransportUnavailable):
            Relay(store, deaf).turn()
        assert store.backlog().letters == 1
        assert Relay(store, transport).turn() == 1
    first, second = came(broker, "q", 2)
    assert first.body == second.body


def test_a_letter_that_no_queue_takes_stays(store: Any, unique: str) -> None:
    """And those of other keys go."""

    @idempotent(store, name="app.order", key="order", transaction=True)
    def order(order: str) -> None:
        context().publish("billed", {}, exchange=order)

    order("nowhere")
    order("out")
    with closing(open_transport(f"memory://{unique}")) as transport:
        transport.declare("q", "out")
        relay = Relay(store, transport)
        assert [relay.turn() for _ in range(2)] == [1, 0]
        assert [letter.key for letter in store.letters(10)] == ["app.order/nowhere"]
        transport.declare("late", "nowhere")
        assert relay.turn() == 1


def test_letters_that_no_queue_takes_hold_nobody_up(
    store: Any, unique: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However many they are; those behind them of the same key do not overtake them; later they go."""
    monkeypatch.setattr("idemp.relay.TOGETHER", 3)

    @idempotent(store, name="app.order", key="order", transaction=True)
    def order(order: str, *exchanges: str) -> None:
        for exchange in exchanges:
            context().publish("billed", {}, exchange=exchange)

    for n in range(7):
        order(f"lost{n}", "nowhere", "out")
    order("A", "out", "out")
    order("B", "out")
    with closing(open_transport(f"memory://{unique}")) as transport:
        transport.declare("q", "out")
        relay = Relay(store, transport)
        with caplog.at_level("WARNING"):
            assert [relay.turn() for _ in range(4)] == [1, 1, 1, 0]
        assert caplog.text.count("letters stay") == 1, "it says so now and then, not at each turn"
        assert store.backlog().letters == 14
        transport.declare("late", "nowhere")
        assert sum(relay.turn() for _ in range(20)) == 14
    assert store.backlog().letters == 0
    ids = [
        json.loads(each.body)["id"]
        for queue, number in (("late", 7), ("q", 10))
        for each in came(f"memory://{unique}", queue, number)
    ]
    assert len(set(ids)) == 17


def test_several_relays_keep_the_order_of_each_key(store: Any, broker: str, unique: str) -> None:
    """What one repeats comes behind its first, under the same id."""

    @idempotent(store, name="app.order", key="order", transaction=True)
    def order(order: str) -> None:
        for n in range(5):
            context().publish("billed", {"order": order, "n": n}, exchange=unique)

    with ExitStack() as stack:
        lines = [stack.enter_context(closing(open_transport(broker))) for _ in range(4)]
        lines[0].declare(f"{unique}-q", unique)
        relays = [Relay(store, line) for line in lines[1:]]
        running = [threading.Thread(target=relay.run) for relay in relays]
        for each in running:
            each.start()
        try:
            for n in range(30):
                order(f"{n}")
            until(lambda: store.backlog().letters == 0)
        finally:
            for relay in relays:
                relay.stop()
            for each in running:
                each.join(30)
    firsts: dict[str, dict[str, Any]] = {}
    with closing(open_transport(broker)) as receiver:
        receiver.consume(f"{unique}-q", 1000)
        while len(firsts) < 150:
            some = [json.loads(e.body) for e in receiver.poll(5.0) if isinstance(e, Delivery)]
            assert some, f"only {len(firsts)} of 150 came"
            for body in some:
                firsts.setdefault(body["id"], body["args"])
    orders: dict[str, list[int]] = {}
    for args in firsts.values():
        orders.setdefault(args["order"], []).append(args["n"])
    assert orders == {f"{n}": list(range(5)) for n in range(30)}


def test_a_direct_call_without_a_transaction_cannot_publish(store: Any) -> None:
    """In one sentence; and a store without an outbox has no relay."""

    @idempotent(store, name="app.order", key="order")
    def order(order: str) -> None:
        context().publish("billed", {})

    with pytest.raises(ConfigError, match="needs a handler with transaction=True, or one with @idempotent"):
        order("A")
    with closing(open_store("memory://")) as other, pytest.raises(ConfigError, match="has no outbox"):
        Relay(other, open_transport("memory://x"))  # type: ignore[arg-type]


# ------------------------------------------------------------------ at once, without a transaction


@pytest.fixture(params=["memory", "rabbitmq"])
def broker(request: pytest.FixtureRequest, unique: str) -> str:
    return f"memory://{unique}" if request.param == "memory" else request.getfixturevalue("amqp_url")


@contextmanager
def consuming(*consumers: Consumer) -> Iterator[None]:
    """All of them, each in a thread, until the end."""
    with ThreadPoolExecutor(len(consumers)) as pool:
        ready = [threading.Event() for _ in consumers]
        running = [pool.submit(each.run, ready=on.set) for each, on in zip(consumers, ready, strict=True)]
        try:
            for on, run in zip(ready, running, strict=True):
                until(lambda on=on, run=run: on.is_set() or run.done())  # type: ignore[misc]
            yield
        finally:
            for each in consumers:
                each.stop()
        for run in running:
            run.result(30)


def send(url: str, exchange: str, ids: list[str]) -> None:
    messages = [Message(each, "order", {"order": each}) for each in ids]
    with closing(open_transport(url)) as transport:
        publish(transport, [Publication(m.encode(), m.properties(), exchange, "order") for m in messages])


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_at_once_under_ids_that_never_change(broker: str, unique: str, kind: str) -> None:
    """What an attempt that raised had sent is sent again with the same id, and its receiver skips it."""
    sender, receiver = f"{unique}-a", f"{unique}-b"
    ids: dict[str, list[list[str]]] = {}
    got: list[tuple[str, str]] = []
    with ExitStack() as stack:
        store, theirs = (stack.enter_context(closing(open_store("memory://"))) for _ in range(2))
        ours, other = (stack.enter_context(closing(open_transport(broker))) for _ in range(2))
        first = Consumer(ours, service=sender, exchange=sender, backoff=0.05)
        second = Consumer(other, service=receiver, exchange=receiver)

        def handle(message: Message) -> None:
            sent = [context().publish("billed", {"n": n}, exchange=receiver) for n in range(2)]
            ids.setdefault(message.id, []).append(sent)
            if context().attempt == 1 and message.id < "05":
                raise ValueError("not yet")

        async def handle_async(message: Message) -> None:
            handle(message)

        first.on("order")(idempotent(store, name="a")(handle if kind == "def" else handle_async))

        @second.on("billed")
        @idempotent(theirs, name="b")
        def bill(message: Message) -> None:
            got.append((message.id, str(message.correlation_id)))

        with consuming(first, second):
            send(broker, sender, [f"{n:02}" for n in range(10)])
            until(lambda: len(got) >= 20)
            until(lambda: sum(map(len, ids.values())) == 15)
            until(lambda: other.depth(f"{receiver}-queue") == 0 if broker.startswith("memory") else True)
    assert all(attempts[0] == attempts[-1] for attempts in ids.values())
    assert sorted(got) == sorted((each, key) for key, attempts in ids.items() for each in attempts[0])


def deliveries(transport: Any) -> list[Delivery]:
    return [event for event in transport.poll(0.1) if isinstance(event, Delivery)]


def test_what_no_queue_takes_fails_the_handler(broker: str, unique: str) -> None:
    """It is done only when all that it published is safe: it is tried again, and then set aside."""
    with closing(open_store("memory://")) as store, closing(open_transport(broker)) as ours:
        consumer = Consumer(ours, service=unique, exchange=unique, backoff=0.05)

        @consumer.on("order")
        @idempotent(store, name="a", attempts=2)
        def handle(message: Message) -> None:
            where = f"{unique}-nowhere" if message.id == "1" else f"{unique}-out"
            context().publish("billed", {}, exchange=where)

        with closing(open_transport(broker)) as transport:
            transport.declare(f"{unique}-got", f"{unique}-out")
            with consuming(consumer):
                send(broker, unique, [f"{n}" for n in range(3)])
                until(lambda: transport.depth(f"{unique}-queue.dead") == 1)
                # One whose confirm the channel's end took along was sent again, under the same id.
                until(lambda: transport.depth(f"{unique}-got") >= 2)
            transport.consume(f"{unique}-got", 100)
            got: list[str | None] = []
            while len(set(got)) < 2:
                got += [each.properties.message_id for each in deliveries(transport)]
        parked = store.apply([Get("a/1")])[0]
        assert isinstance(parked, Parked)
        assert parked.reason.startswith("attempts used up (2): Unroutable: what the handler published")
        assert all(isinstance(state, Done) for state in store.apply([Get("a/0"), Get("a/2")]))


def test_a_connection_lost_before_the_confirm(unique: str) -> None:
    """The handler is not done; it runs again and repeats the same id."""
    broker = f"memory://{unique}"
    ids: list[str] = []
    with closing(open_store("memory://")) as store, closing(open_transport(broker)) as ours:
        deaf: Any = ours
        real = deaf.poll

        def poll(timeout: float) -> list[Any]:
            events: list[Any] = real(timeout)
            if len(ids) == 1 and any(isinstance(event, Sent) for event in events):
                raise TransportUnavailable("lost")
            return events

        deaf.poll = poll
        consumer = Consumer(ours, service="a", exchange="in", backoff=0.05)

        @consumer.on("order")
        @idempotent(store, name="a")
        def handle(message: Message) -> None:
            ids.append(context().publish("billed", {}, exchange="out"))

        with closing(open_transport(broker)) as transport:
            transport.declare("got", "out")
            with consuming(consumer):
                send(broker, "in", ["A"])
                until(lambda: isinstance(store.apply([Get("a/A")])[0], Done))
    assert len(ids) == 2
    assert ids[0] == ids[1]
    first, second = came(broker, "got", 2)
    assert first.body == second.body


# ------------------------------------------------------------------ the relay


def test_the_command_empties_an_outbox(new_database: Callable[[str], str], tmp_path: Path) -> None:
    """And says what it left, with exit code 1."""
    url, broker = new_database("app"), f"sqlite:///{tmp_path}/queues.db"
    with closing(open_store(url)) as store:

        @idempotent(store, name="app.order", key="order", transaction=True)
        def order(order: str, exchange: str) -> None:
            context().publish("billed", {}, exchange=exchange)

        for n in range(5):
            order(f"{n}", "out")
        with closing(open_transport(broker)) as transport:
            transport.declare("q", "out")
        assert relay_once(url, broker) == (0, {"sent": 5, "left": 0})
        order("lost", "nowhere")
        assert relay_once(url, broker) == (1, {"sent": 0, "left": 1})
    assert len(came(broker, "q", 5)) == 5


def test_the_backlog_is_told(
    new_database: Callable[[str], str], tmp_path: Path, amqp_url: str, unique: str
) -> None:
    """By `idemp stats`, and by a running relay to statsd and to whoever scrapes it."""
    url, port = new_database("app"), free_port()
    with closing(open_store(url)) as store, socket.socket(type=socket.SOCK_DGRAM) as statsd:
        statsd.bind(("127.0.0.1", 0))
        statsd.settimeout(30)

        @idempotent(store, name="app.order", key="order", transaction=True)
        def order(order: str) -> None:
            context().publish("billed", {}, exchange=f"{unique}-nowhere")

        for n in range(3):
            order(f"{n}")
        told = idemp("stats", "--store", url, "--json")
        assert json.loads(told.stdout)["outbox"]["letters"] == 3
        assert json.loads(told.stdout)["outbox"]["age"] >= 0
        assert "3 wait in the outbox, the oldest for " in idemp("stats", "--store", url).stdout

        command = [sys.executable, "-m", "idemp", "relay", "--store", url, "--transport", amqp_url]
        command += ["--statsd", f"127.0.0.1:{statsd.getsockname()[1]}", "--metrics-port", f"{port}"]
        with subprocess.Popen([*command, "--service", "app"], env=ENV, cwd=ROOT) as relay:
            lines: list[bytes] = []
            while b"app_outbox_letters:3|g" not in lines:
                lines += statsd.recv(9000).split(b"\n")
            assert any(line.startswith(b"app_outbox_age:") and line.endswith(b"|g") for line in lines)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
                text = page.read().decode()
            relay.terminate()
        assert relay.returncode == 0
    assert 'idemp_level{service="app",what="outbox_letters"} 3.0' in text
    assert 'idemp_level{service="app",what="outbox_age"}' in text


def test_a_wrong_metrics_setting_is_one_sentence(tmp_path: Path) -> None:
    """Which names it; and so is a store without an outbox."""
    url, broker = f"sqlite:///{tmp_path}/app.db", f"sqlite:///{tmp_path}/queues.db"
    with closing(open_store(url)) as store:
        store.apply([])
    told = idemp("relay", "--store", url, "--transport", broker, "--statsd", "nowhere:x")
    assert (told.returncode, told.stderr.count("\n")) == (2, 1)
    assert "--statsd (IDEMP_STATSD)" in told.stderr
    told = idemp("relay", "--store", "memory://", "--transport", broker)
    assert (told.returncode, told.stderr.count("\n")) == (2, 1)
    assert "has no outbox" in told.stderr


def idemp(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "idemp", *words]
    return subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=60)


_DYING_RELAY = """
import os, signal, sys
from idemp import Relay, open_store, open_transport
from idemp.ports import Delivery, Sent
url, broker, after = sys.argv[1:]
store, transport = open_store(url), open_transport(broker)
confirmed = 0
real = store.sent

def sent(numbers):  # the broker has confirmed these, and nobody has been told yet
    global confirmed
    confirmed += len(numbers)
    if confirmed > int(after):
        os.kill(os.getpid(), signal.SIGKILL)
    real(numbers)

store.sent = sent
Relay(store, transport).run()
"""


def test_a_relay_killed_between_confirm_and_mark(
    new_database: Callable[[str], str], amqp_url: str, unique: str
) -> None:
    """On a real broker: nothing is lost, of each key the order holds, and a receiver skips the repeats."""
    url = new_database("app")
    receiver = f"{unique}-b"
    got: list[tuple[str, int]] = []
    with (
        closing(open_store(url)) as store,
        closing(open_store("memory://")) as theirs,
        closing(open_transport(amqp_url)) as transport,
    ):
        consumer = Consumer(transport, service=receiver, exchange=receiver)

        @consumer.on("billed")
        @idempotent(theirs, name="b")
        def bill(message: Message) -> None:
            got.append((message.args["order"], message.args["n"]))

        @idempotent(store, name="app.order", key="order", transaction=True)
        def order(order: str) -> None:
            for n in range(5):
                context().publish("billed", {"order": order, "n": n}, exchange=receiver)

        with closing(open_transport(amqp_url)) as broker:
            broker.declare(f"{receiver}-queue", receiver)
        orders = [f"{n}" for n in range(10)]
        for each in orders:
            order(each)
        for after in (0, 10, 20):  # it dies with ten that are confirmed and not marked
            command = [sys.executable, "-c", _DYING_RELAY, url, amqp_url, f"{after}"]
            done = subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=60)
            assert done.returncode == -signal.SIGKILL, done.stderr
        assert cast(Inbox, store).backlog().letters == 50 - 10 - 20
        with closing(open_transport(amqp_url)) as broker:
            until(lambda: broker.depth(f"{receiver}-queue") == 10 + 20 + 30)
        assert relay_once(url, amqp_url) == (0, {"sent": 20, "left": 0})
        with consuming(consumer):
            until(lambda: len(got) >= 50)
            with closing(open_transport(amqp_url)) as broker:
                until(lambda: broker.depth(f"{receiver}-queue") == 0)
    assert len(got) == 50
    for each in orders:
        assert [n for key, n in got if key == each] == list(range(5))


def relay_once(store: str, broker: str) -> tuple[int, Any]:
    command = [sys.executable, "-m", "idemp", "relay", "--once", "--json"]
    command += ["--store", store, "--transport", broker]
    done = subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.returncode, json.loads(done.stdout)


# ------------------------------------------------------------------ three services, killed

_INBOX_SERVICE = """
import sys, threading
from idemp import Consumer, Relay, context, idempotent, open_store, open_transport
name, following, url, broker, _ = sys.argv[1:]
store = open_store(url)
consumer = Consumer(open_transport(broker), service=name, exchange=name)
relay = Relay(store, open_transport(broker))

@consumer.on("order")
@idempotent(store, name=name, transaction=True)
def handle(message):
    connection = context().connection
    values = f"'{message.args['order']}', {context().attempt}, '{message.id}'"
    connection.execute(f"INSERT INTO ledger VALUES ({values})")
    if following:
        context().publish("order", message.args, exchange=following)

threading.Thread(target=relay.run, daemon=True).start()
consumer.run()
"""

_PLAIN_SERVICE = """
import sqlite3, sys
from idemp import Consumer, context, idempotent, open_store, open_transport
name, following, url, broker, path = sys.argv[1:]
consumer = Consumer(open_transport(broker), service=name, exchange=name)
ledger = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
ledger.execute("PRAGMA synchronous=OFF")  # it is killed, not the machine

@consumer.on("order")
@idempotent(open_store(url), name=name, attempts=100)
def handle(message):
    row = [message.args["order"], context().attempt, message.id]
    ledger.execute("INSERT INTO ledger VALUES (?, ?, ?)", row)
    if following:
        context().publish("order", message.args, exchange=following)

consumer.run()
"""


@dataclass(frozen=True)
class Chain:
    """Services that each pass on what they get.  ``stores``, ``ledgers``: URLs, by name, in their order."""

    service: str
    stores: Mapping[str, str]
    ledgers: Mapping[str, str]

    def rows(self, name: str) -> list[Any]:
        """Order, attempt and message id of each effect."""
        return sql(self.ledgers[name], "SELECT id, attempt, message FROM ledger ORDER BY id, attempt")

    def orders(self, name: str) -> int:
        """How many it had."""
        return int(sql(self.ledgers[name], "SELECT count(DISTINCT id) FROM ledger")[0][0])

    def start(self, stack: ExitStack, name: str, broker: str) -> subprocess.Popen[bytes]:
        following = dict(zip(self.stores, [*list(self.stores)[1:], ""], strict=True))
        path = self.ledgers[name].removeprefix("sqlite:///")
        words = [name, following[name], self.stores[name], broker, path]
        process = subprocess.Popen([sys.executable, "-c", self.service, *words], env=ENV)
        stack.callback(process.wait)
        stack.callback(process.kill)
        return process


def chain_on(kind: str, new: Callable[[], str], prefix: str, folder: Path) -> Chain:
    """Three services on a kind of store.  ``new``: the URL of a place in it that is empty."""
    names = [f"{prefix}-{letter}" for letter in "abc"]
    files = {name: f"sqlite:///{folder}/{name}.db" for name in names}
    stores = files if kind == "sqlite" else {name: new() for name in names}
    if kind in ("sqlite", "postgresql"):
        return Chain(_INBOX_SERVICE, stores, stores)
    return Chain(_PLAIN_SERVICE, {name: f"{url}?session=1s" for name, url in stores.items()}, files)


def under_kills(chain: Chain, broker: str, seconds: float) -> tuple[list[str], int]:
    """Every second one of its services, by chance, is killed and started again.

    Orders come all the while, a fifth of them again later.  The orders, and how many kills there were.
    """
    names, dice = list(chain.stores), random.Random(3)
    orders: list[str] = []
    kills = 0
    with ExitStack() as stack:
        transport = stack.enter_context(closing(open_transport(broker)))
        for name in names:
            sql(chain.ledgers[name], "CREATE TABLE ledger (id TEXT, attempt INT, message TEXT)")
            transport.declare(f"{name}-queue", name)
        running = {name: chain.start(stack, name, broker) for name in names}
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            fresh = [f"{len(orders) + n:05}" for n in range(100)]
            orders += fresh
            messages = [
                Message(each, "order", {"order": each}) for each in [*fresh, *dice.sample(orders, 20)]
            ]
            publish(transport, [Publication(m.encode(), m.properties(), names[0], "order") for m in messages])
            time.sleep(0.5 + dice.random() / 2)
            victim = dice.choice(names)
            running[victim].kill()
            running[victim] = chain.start(stack, victim, broker)
            kills += 1
        for name in names:
            until(lambda name=name: chain.orders(name) >= len(orders), 180)  # type: ignore[misc]
        # The other one had nothing to do for too long.
        look = stack.enter_context(closing(open_transport(broker)))
        until(lambda: not any(look.depth(f"{name}-queue") for name in names))
    return orders, kills


def wrong(chain: Chain, orders: list[str]) -> list[str]:
    """What is lost, and what is doubled that must not be.

    With an inbox nothing; without one, only what was in doubt in between: the next attempt took it over
    from a session that died, so its number is higher, and each attempt began once.
    """
    found: list[str] = []
    for name in chain.stores:
        rows = chain.rows(name)
        had = [order for order, _, _ in rows]
        found += [f"{name} lost {order}" for order in sorted(set(orders) - set(had))]
        found += [f"{name} invented {order}" for order in sorted(set(had) - set(orders))]
        again = Counter(had)
        if chain.service is _INBOX_SERVICE:
            found += [f"{name} had {order} {n} times" for order, n in again.items() if n > 1]
            continue
        ids = {order: message for order, _, message in rows if again[order] > 1}
        with closing(open_store(chain.stores[name])) as store:
            states = store.apply([Get(f"{name}/{message}") for message in ids.values()])
        for order, state in zip(ids, states, strict=True):
            mine = [(attempt, message) for each, attempt, message in rows if each == order]
            attempts = [attempt for attempt, _ in mine]
            known = isinstance(state, Done | Busy | Doubt) and state.attempt >= max(attempts) >= len(attempts)
            if len(set(attempts)) < len(attempts) or {id for _, id in mine} != {ids[order]} or not known:
                found.append(f"{name} had {order} in attempts {attempts}, and it is {state}")
    return found


def doubled(chain: Chain) -> int:
    """Effects beyond the first of their order, in all services."""
    return sum(len(chain.rows(name)) - chain.orders(name) for name in chain.stores)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "etcd", "redis"])
def test_a_chain_of_three_services_with_kill_9(
    kind: str, request: pytest.FixtureRequest, amqp_url: str, unique: str, tmp_path: Path
) -> None:
    """With transactions each ledger has every order exactly once; without, none is lost, see `wrong`.

    `python -m tests.test_outbox 60` does it for longer.
    """
    chain = chain_on(kind, new_place(kind, request, unique), unique, tmp_path)
    orders, kills = under_kills(chain, amqp_url, 10.0)
    assert kills >= 5
    assert wrong(chain, orders) == []


def new_place(kind: str, request: pytest.FixtureRequest, unique: str) -> Callable[[], str]:
    """Makes URLs of empty places in a store of the shared server."""
    if kind == "sqlite":
        return lambda: ""
    server = request.getfixturevalue(kind)
    return namespaces(server, unique) if kind == "etcd" else server.database


def namespaces(server: Etcd, prefix: str) -> Callable[[], str]:
    numbers = itertools.count()
    return lambda: f"{server.url}{prefix}-{next(numbers)}"


def test_the_judge_of_a_chain_finds_what_is_planted(
    new_database: Callable[[str], str], tmp_path: Path
) -> None:
    """A lost one, one from nowhere, a doubled one; without an inbox, one whose doubt is not on record."""
    url = new_database("app")
    sql(url, "CREATE TABLE ledger (id TEXT, attempt INT, message TEXT)")
    for row in ("'a', 1, 'x'", "'a', 2, 'x'", "'c', 1, 'y'"):
        sql(url, f"INSERT INTO ledger VALUES ({row})")
    inbox = Chain(_INBOX_SERVICE, {"s": url}, {"s": url})
    assert wrong(inbox, ["a", "b"]) == ["s lost b", "s invented c", "s had a 2 times"]
    plain = Chain(_PLAIN_SERVICE, {"s": url}, {"s": url})
    assert doubled(plain) == 1
    assert wrong(plain, ["a", "c"]) == [f"s had a in attempts [1, 2], and it is {Free(0)}"]


def _by_hand(seconds: float, kinds: Sequence[str]) -> None:
    """The same on each store."""
    with ExitStack() as stack:
        broker = stack.enter_context(RabbitMQ())
        folder = Path(stack.enter_context(TemporaryDirectory()))
        makers: dict[str, Callable[[], str]] = {"sqlite": lambda: ""}
        if "postgresql" in kinds:
            makers["postgresql"] = stack.enter_context(PostgreSQL()).database
        if "redis" in kinds:
            makers["redis"] = stack.enter_context(Redis()).database
        if "etcd" in kinds:
            makers["etcd"] = namespaces(stack.enter_context(Etcd()), "chain")
        for kind in kinds:
            chain = chain_on(kind, makers[kind], kind, folder)
            began = time.monotonic()
            orders, kills = under_kills(chain, broker.url, seconds)
            took, found = time.monotonic() - began, wrong(chain, orders)
            said = f"{len(orders)} orders, {len(orders) // 5} sent again, {kills} kills in {seconds:g} s"
            print(f"{kind}: {said}, all there after {took:.0f} s:")
            more = "" if chain.service is _INBOX_SERVICE else ", each with its doubt on record"
            print(f"  {found[:20] or f'none missing, {doubled(chain)} doubled{more}'}", flush=True)


if __name__ == "__main__":
    _by_hand(float(sys.argv[1]), sys.argv[2:] or ["postgresql", "sqlite", "etcd", "redis"])
