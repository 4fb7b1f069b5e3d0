"""Redis Streams, beyond the contract: streams that are shared, the abandoned, trimming, the commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis as driver

from idemp import Consumer, Message, idempotent, open_store, open_transport, publish
from idemp.dead import letters
from idemp.errors import ConfigError, TransportUnavailable
from idemp.message import Properties, decode
from idemp.ports import Delivery, NoMeter, Publication
from idemp.redis_server import Met
from idemp.transports import open_log
from idemp.transports.redis_streams import RedisStreamsTransport
from idemp.transports.shared_stream import entry, message
from tests.servers import Redis

SECONDS = 30.0


@pytest.fixture
def url(redis: Redis) -> str:
    """A database of one's own."""
    return redis.database()


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    """What an old program uses."""
    with driver.Redis.from_url(url) as client:
        yield client


def streams(url: str) -> RedisStreamsTransport:
    transport = open_transport(url)
    assert isinstance(transport, RedisStreamsTransport)
    return transport


def take(transport: RedisStreamsTransport, n: int) -> list[Delivery]:
    got: list[Delivery] = []
    end = time.monotonic() + SECONDS
    while len(got) < n:
        assert time.monotonic() < end, f"{len(got)} of {n} came"
        got += [event for event in transport.poll(0.2) if isinstance(event, Delivery)]
    return got


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def event(n: int, kind: str = "InvoiceCreated") -> Publication:
    sent = Message(f"i{n}", kind, {"id": str(n), "text": "a < b & c > d"}, headers={"traceparent": "00-1"})
    return Publication(sent.encode(), sent.properties(), "event-stream", kind)


# ------------------------------------------------------------------ entries


def test_an_old_reader_finds_its_two_fields(url: str, client: Any) -> None:
    """R5: an event type, and a payload that is escaped as the old writer does it."""
    with closing(streams(f"{url}?stream=event-stream")) as transport:
        publish(transport, [event(1)])
    [(_, fields)] = client.xrange("event-stream")
    assert fields[b"EventTypeName"] == b"InvoiceCreated"
    assert b"\\u003c" in fields[b"Payload"]
    assert not set(fields[b"Payload"]) & set(b"<>&")
    assert json.loads(fields[b"Payload"]) == {"id": "1", "text": "a < b & c > d"}


def test_we_read_what_an_old_writer_wrote(url: str, client: Any) -> None:
    """R5: in any order of the fields, from the first entry on; the entry is its identity."""
    id = client.xadd("event-stream", {"Payload": '{"id":"7","name":"\\u003cb\\u003e"}', "EventTypeName": "A"})
    with closing(streams(f"{url}?stream=event-stream")) as transport:
        transport.declare("q", "event-stream")
        transport.consume("q", 10)
        [came] = take(transport, 1)
    read = decode(came.body, came.properties)
    assert (read.type, read.args) == ("A", {"id": "7", "name": "<b>"})
    assert read.id == f"event-stream/{id.decode()}"


def test_an_entry_of_ours_comes_as_it_was_sent() -> None:
    """With its id, its headers and what caused it."""
    sent = Message("m1", "T", {"ž": [1, None]}, correlation_id="c", headers={"h": b"\xff"})
    fields = entry(Publication(sent.encode(), sent.properties(app_id="a"), "s", "T"))
    body, properties, _ = message("s", "1-1", fields)
    read = decode(body, properties)
    assert (read.id, read.type, read.args) == ("m1", "T", {"ž": [1, None]})
    assert (read.correlation_id, read.headers, properties.app_id) == ("c", {"h": b"\xff"}, "a")


@pytest.mark.parametrize(
    "fields",
    [
        [b"EventTypeName", b"A", b"Payload", b"{not json"],
        [b"EventTypeName", b"A", b"Payload", b""],
        [b"EventTypeName", b"A", b"Payload", b"\xff"],
        [b"EventTypeName", b"A"],
        [b"Payload", b"{}"],
        [b"something", b"\xff\x00"],
        [b"EventTypeName", b"", b"Payload", b"{}"],
    ],
)
def test_what_is_no_event_is_a_bad_message(fields: list[bytes]) -> None:
    """R12: and never an error of ours."""
    body, properties, _ = message("s", "1-1", fields)
    with pytest.raises(ValueError, match=r"\w"):
        decode(body, properties)


def test_what_is_no_event_cannot_be_published(url: str) -> None:
    """Nobody could read it."""
    with closing(streams(f"{url}?stream=event-stream")) as transport:
        number = transport.send([Publication(b"x", Properties(), "event-stream", "")])[0]
        [said] = transport.poll(1.0)
        assert (said.number, "not JSON" in said.error) == (number, True)  # type: ignore[union-attr]


def test_a_dead_letter_has_its_reason_in_fields(url: str, client: Any) -> None:
    """For whoever looks with redis-cli."""
    headers = {"idemp-reason": "no such customer", "idemp-outcome": "parked", "other": 1}
    with closing(streams(url)) as transport:
        transport.declare("q.dead")
        publish(transport, [Publication(b"{}", Properties("m", headers=headers), "", "q.dead")])
    [(_, fields)] = client.xrange("idemp:{default}:queue:q.dead")
    assert fields[b"idemp-reason"] == b"no such customer"
    assert fields[b"idemp-outcome"] == b"parked"
    assert b"other" not in fields


# ------------------------------------------------------------------ shared streams


def test_each_group_gets_every_entry_once(url: str) -> None:
    """Consumers of one queue share them; another queue gets them all; nothing is deleted by an ack."""
    shared = f"{url}?stream=event-stream"
    with closing(streams(shared)) as one, closing(streams(shared)) as two, closing(streams(shared)) as three:
        one.declare("q", "event-stream")
        three.declare("r", "event-stream")
        publish(three, [event(n) for n in range(40)])
        one.consume("q", 20)
        two.consume("q", 20)
        three.consume("r", 100)
        first, second = take(one, 20), take(two, 20)
        ids = sorted(int(each.properties.message_id[1:]) for each in (*first, *second))  # type: ignore[index]
        assert ids == list(range(40))
        one.ack([each.tag for each in first])
        assert one.depth("q") == 0
        assert len(take(three, 40)) == 40
        assert one.readers("event-stream")[0] == 40


def test_what_is_out_of_the_queue_before_stays_mine(url: str) -> None:
    """Law 1: its consumer goes on with another queue, and acknowledges it then."""
    with closing(streams(url)) as transport, closing(streams(url)) as other:
        for queue in ("a", "b"):
            transport.declare(queue)
            publish(other, [Publication(queue.encode(), Properties(), "", queue)])
        transport.consume("a", 10)
        [first] = take(transport, 1)
        transport.consume("b", 10)
        [second] = take(transport, 1)
        other.consume("a", 10)
        assert other.poll(0.3) == []
        transport.ack([first.tag, second.tag])
        transport.poll(0.0)
        waiting = [transport.look(queue) for queue in ("a", "b")]
        assert [each and (each.ready, each.out) for each in waiting] == [(0, 0), (0, 0)]


@pytest.mark.parametrize("prefetch", [0, 1])
def test_waiting_costs_nothing(url: str, prefetch: int) -> None:
    """Without a queue, and with the prefetch used up while a delayed message is due."""
    with closing(streams(url)) as transport:
        transport.declare("q")
        if prefetch:
            transport.consume("q", prefetch)
        numbers = transport.send(
            [Publication(b"", Properties(), "", "q", delay) for delay in (0.0, *(0.1,) * prefetch)]
        )
        got = len(transport.poll(SECONDS)) + len(transport.poll(0.2))
        assert got >= len(numbers)
        began = time.process_time()
        transport.poll(1.0)
        assert time.process_time() - began < 0.3


def test_depth_is_the_lag_of_what_is_followed(url: str) -> None:
    """R18: what the group has not read yet, and what was given back."""
    with closing(streams(f"{url}?stream=event-stream")) as transport:
        transport.declare("q", "event-stream")
        publish(transport, [event(n) for n in range(10)])
        assert transport.depth("q") == 10
        transport.consume("q", 4)
        take(transport, 4)
        waiting = transport.look("q")
        assert waiting is not None
        assert (waiting.ready, waiting.out, waiting.consumers) == (6, 4, 1)
        transport.connect()
        assert transport.depth("q") == 10


def test_a_consumer_tells_lag_and_pending(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As gauges, now and then: two that wait behind the one whose handler is at work."""
    monkeypatch.setattr("idemp.consumer.LEVELS", 0.0)
    levels: dict[str, float] = {}

    class Gauges(NoMeter):
        def level(self, name: str, value: float) -> None:
            levels[name] = value

    go_on = threading.Event()
    with closing(streams(url)) as transport, closing(streams(url)) as other:
        consumer = Consumer(transport, service="s", prefetch=1, meter=Gauges())

        @consumer.on("t")
        def handle(message: Message) -> None:
            assert go_on.wait(SECONDS)

        thread = threading.Thread(target=consumer.run)
        thread.start()
        until(lambda: "s_ready" in levels)
        messages = [Message(f"{n}", "t", {}) for n in range(3)]
        publish(other, [Publication(m.encode(), m.properties(), "events", "t") for m in messages])
        until(lambda: (levels["s_ready"], levels["s_out"], levels["s_consumers"]) == (2.0, 1.0, 1.0))
        go_on.set()
        until(lambda: levels["s_ready"] == levels["s_out"] == 0.0)
        consumer.stop()
        thread.join(SECONDS)


def test_a_shared_stream_has_no_routing_keys(url: str) -> None:
    """One sentence."""
    with (
        closing(streams(f"{url}?stream=event-stream")) as transport,
        pytest.raises(ConfigError, match="bind it with '#'"),
    ):
        transport.declare("q", "event-stream", "orders.*")


def test_what_is_not_read_is_never_trimmed(url: str, client: Any) -> None:
    """R21: bounded by what is kept, but for what a group has not read or not settled."""
    shared = f"{url}?stream=event-stream&keep=50"
    with closing(streams(shared)) as fast, closing(streams(shared)) as slow:
        fast.declare("q", "event-stream")
        slow.declare("r", "event-stream")
        slow.consume("r", 300)
        publish(fast, [event(n) for n in range(400)])
        fast.consume("q", 1000)
        fast.ack([each.tag for each in take(fast, 400)])
        fast.poll(0.0)
        held = take(slow, 300)
        slow.ack([each.tag for each in held[:100]])
        held += take(slow, 100)
        until(lambda: fast.poll(0.1) == [] and client.xlen("event-stream") <= 300)
        assert client.xlen("event-stream") == 300  # the 101st is not settled
        slow.ack([each.tag for each in held[100:]])
        slow.poll(0.0)
        until(lambda: fast.poll(0.1) == [] and client.xlen("event-stream") <= 51)
        assert client.xlen("event-stream") >= 50
        assert fast.depth("q") == slow.depth("r") == 0


# ------------------------------------------------------------------ the abandoned


def test_what_a_killed_consumer_held_is_taken_over(url: str) -> None:
    """After the idle time, and it says so; in its place, before what is new."""
    with closing(streams(f"{url}?idle=1s")) as transport:
        transport.declare("q")
        publish(transport, [Publication(str(n).encode(), Properties(), "", "q") for n in range(6)])
        hold = (
            "import sys\nfrom idemp import open_transport\n"
            "t = open_transport(sys.argv[1]); t.consume('q', 3); n = 0\n"
            "while n < 3: n += len(t.poll(1))\nprint('held', flush=True)\nwhile True: t.poll(1)\n"
        )
        holder = subprocess.Popen(
            [sys.executable, "-c", hold, f"{url}?idle=1s"], stdout=subprocess.PIPE, text=True
        )
        assert holder.stdout is not None
        with holder.stdout:
            assert holder.stdout.readline() == "held\n"
            transport.consume("q", 10)
            assert [each.body for each in take(transport, 3)] == [b"3", b"4", b"5"]
            end = time.monotonic() + 2.5
            while time.monotonic() < end:  # it lives and polls: what it has is its own
                assert transport.poll(0.2) == []
            holder.send_signal(signal.SIGKILL)
            holder.wait()
        again = take(transport, 3)
        assert [(each.body, each.redelivered) for each in again] == [(b"0", True), (b"1", True), (b"2", True)]
        assert transport.claimed == 3


def test_a_slow_handler_is_nobody_elses(url: str) -> None:
    """A handler that takes three times the idle time keeps its message, for its consumer polls."""
    runs: list[str] = []
    consumers = []
    with closing(open_store(f"{url}?namespace=slow")) as store:

        @idempotent(store, name="slow.wait")
        def wait(message: Message) -> None:
            runs.append(message.id)
            time.sleep(1.5)

        threads = []
        for _ in range(2):
            consumer = Consumer(open_transport(f"{url}?idle=500ms"), service="slow")
            consumer.on("wait")(wait)
            consumers.append(consumer)
            threads.append(threading.Thread(target=consumer.run))
            threads[-1].start()
        with closing(streams(url)) as publisher:
            publisher.declare("slow-queue")
            sent = Message("m", "wait")
            publish(publisher, [Publication(sent.encode(), sent.properties(), "", "slow-queue")])
            until(lambda: runs)
            until(lambda: (w := publisher.look("slow-queue")) and w.ready + w.out + w.delayed == 0)
        for consumer in consumers:
            consumer.stop()
        for thread in threads:
            thread.join(SECONDS)
        for consumer in consumers:
            consumer._transport.close()
    assert runs == ["m"]
    assert [getattr(consumer._transport, "claimed", 0) for consumer in consumers] == [0, 0]


def test_a_paused_server_is_unavailable_and_then_there_again(own_redis: Redis) -> None:
    """Law 7, by time: and what was out comes again."""
    with closing(streams(own_redis.url)) as transport:
        transport.declare("q")
        publish(transport, [Publication(b"a", Properties(), "", "q")])
        transport.consume("q", 10)
        take(transport, 1)
        own_redis.kill()
        with pytest.raises(TransportUnavailable, match=str(own_redis.port)):
            transport.poll(SECONDS)
        own_redis.start()
        transport.connect()
        transport.consume("q", 10)
        [came] = take(transport, 1)
        assert came.redelivered


# ------------------------------------------------------------------ a master that becomes a replica


NOBODY = ("127.0.0.1", "1")
"""A master that is not there, so that nothing is copied from it."""


def test_a_consumer_waits_until_its_server_is_a_master_again(
    own_redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ended meanwhile is not acknowledged, comes again, and is skipped."""
    real = Met.check
    refused: list[str] = []

    def check(met: Met, line: Any) -> str:
        try:
            return real(met, line)
        except Exception as error:
            refused.append(str(error))
            raise

    monkeypatch.setattr(Met, "check", check)
    runs: list[str] = []
    ended: list[BaseException | None] = []
    began, go = threading.Event(), threading.Event()
    store = open_store("memory://")

    @idempotent(store, name="app.order")
    def order(message: Message) -> None:
        runs.append(message.id)
        if message.id == "2":
            began.set()
            assert go.wait(SECONDS)

    consumer = Consumer(open_transport(own_redis.url), service="app")
    consumer.on("order")(order)

    def run() -> None:
        try:
            consumer.run()
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    def send(id: str) -> None:
        with closing(streams(own_redis.url)) as publisher:
            publisher.declare("app-queue")
            publish(publisher, [Publication(Message(id, "order").encode(), Properties(), "", "app-queue")])

    def left() -> str:
        return own_redis.call("XLEN", "idemp:{default}:queue:app-queue")

    thread = threading.Thread(target=run)
    thread.start()
    send("1")
    until(lambda: runs == ["1"] and left() == "0")
    send("2")
    assert began.wait(SECONDS)
    own_redis.call("REPLICAOF", *NOBODY)
    go.set()
    until(lambda: ended or refused)
    assert (ended, left()) == ([], "1")

    own_redis.call("REPLICAOF", "NO", "ONE")
    until(lambda: ended or left() == "0")
    send("3")
    until(lambda: ended or len(runs) == 3)
    consumer.stop()
    thread.join(SECONDS)
    consumer._transport.close()
    assert (runs, ended) == (["1", "2", "3"], [None])


def test_a_server_that_is_full_can_be_emptied(own_redis: Redis) -> None:
    """By who starts now, or connects again: it asks for nothing that is there already."""
    with closing(streams(own_redis.url)) as transport:
        transport.declare("q", "events")
        body = b"x" * 10_000
        publish(transport, [Publication(body, Properties(), "", "q") for _ in range(100)])
        publish(transport, [Publication(b"later", Properties(), "", "q", 0.2)])
        time.sleep(0.3)
        with driver.Redis.from_url(own_redis.url) as client:
            client.config_set("maxmemory", client.info("memory")["used_memory"] - 500_000)
            with pytest.raises(TransportUnavailable, match="maxmemory"):
                publish(transport, [Publication(body, Properties(), "", "q")])
            with closing(streams(own_redis.url)) as fresh:
                fresh.declare("q", "events")
                fresh.consume("q", 10)
                left = [b"later", *[body] * 100]
                end = time.monotonic() + SECONDS
                while left:
                    assert time.monotonic() < end, f"{len(left)} are left"
                    for came in fresh.poll(0.1):
                        assert isinstance(came, Delivery)
                        left.remove(came.body)
                        fresh.ack([came.tag])


def test_nothing_is_published_on_a_replica(own_redis: Redis) -> None:
    """Not confirmed, unavailable on each new connection, and there again with the master."""
    letter = Publication(b"a", Properties(), "", "q")
    with closing(streams(own_redis.url)) as transport:
        transport.declare("q")
        own_redis.call("REPLICAOF", *NOBODY)
        transport.send([letter])
        with pytest.raises(TransportUnavailable, match="against a read only replica"):
            transport.poll(SECONDS)
        for _ in range(2):
            with pytest.raises(TransportUnavailable, match="it is a read-only replica now"):
                transport.connect()
        own_redis.call("REPLICAOF", "NO", "ONE")
        transport.connect()
        assert transport.depth("q") == 0
        publish(transport, [letter])
        assert transport.depth("q") == 1


def test_a_log_of_a_server_that_is_a_replica_for_a_while(own_redis: Redis) -> None:
    """Its reader waits, too."""
    with closing(open_log(f"{own_redis.url}?stream=event-stream")) as log:
        assert log.read("", 10, 0.0) == []
        own_redis.call("REPLICAOF", *NOBODY)
        with pytest.raises(TransportUnavailable, match="against a read only replica"):
            log.tell("me", "0-0")
        with pytest.raises(TransportUnavailable, match="it is a read-only replica now"):
            log.read("", 10, 0.0)
        own_redis.call("REPLICAOF", "NO", "ONE")
        assert log.read("", 10, 0.0) == []


def test_a_replica_is_refused_at_the_start(own_redis: Redis) -> None:
    """It was never anything else."""
    own_redis.call("REPLICAOF", *NOBODY)
    with (
        closing(streams(own_redis.url)) as transport,
        pytest.raises(ConfigError, match="is a read-only replica; name its master"),
    ):
        transport.connect()


# ------------------------------------------------------------------ settings and commands


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("redis://h/x", "database's number"),
        ("redis://h/0?keep=many", "keep='many' is no number"),
        ("redis://h/0?idle=never", "idle='never' is no duration"),
        ("redis://h/0?namespace=a b", "namespace='a b'"),
        ("redis://h/0?streams=a", "no option 'streams'"),
    ],
)
def test_a_wrong_url_is_one_sentence(url: str, sentence: str) -> None:
    """That names the setting."""
    with pytest.raises(ConfigError) as caught:
        open_transport(url)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_no_unicode_is_one_sentence(url: str) -> None:
    """And the connection goes on."""
    with closing(streams(url)) as transport:
        for call in (lambda: transport.declare("\ud800"), lambda: transport.depth("\ud800")):
            with pytest.raises(ConfigError, match="not valid Unicode"):
                call()
        odd = Properties("m", headers={"idemp-\ud800": "\ud800"})
        transport.declare("q")
        publish(transport, [Publication(b"", odd, "", "q")])
        transport.consume("q", 1)
        assert take(transport, 1)[0].properties == odd


def test_a_server_that_may_forget_is_refused() -> None:
    """Unless it is said that it may."""
    with Redis(options={"appendfsync": "everysec"}) as server:
        with closing(streams(server.url)) as transport, pytest.raises(ConfigError, match="appendfsync"):
            transport.connect()
        with closing(streams(f"{server.url}?unsafe_durability=true")) as transport:
            transport.declare("q")
            assert transport.depth("q") == 0


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "idemp", *words], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_commands_work_on_it(url: str, tmp_path: Path) -> None:
    """publish, consume, dead, doctor: from a message that cannot be handled back to one that is."""
    store = f"sqlite:///{tmp_path}/seen.db"
    (tmp_path / "handlers.py").write_text(
        "import os\nfrom idemp import idempotent, open_store, PermanentFailure\n"
        f"store = open_store('{store}')\n"
        "@idempotent(store, name='shop.order')\n"
        "def order(message):\n"
        "    if not os.path.exists('fixed'): raise PermanentFailure('no such thing')\n"
        "    open('done', 'a').write(message.id)\n"
    )
    nobody = cli("doctor", "--transport", url, "--service", "shop")
    assert nobody.returncode == 1
    assert "there is no such queue" in nobody.stdout
    consume = subprocess.Popen(
        [sys.executable, "-m", "idemp", "consume", "handlers:order", "--service", "shop", "--transport", url],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    try:
        with closing(streams(url)) as broker:
            until(lambda: (w := broker.look("shop-queue")) and w.consumers)
            sent = cli("publish", '{"type": "order", "id": "o1"}', "--transport", url)
            assert sent.returncode == 0, sent.stderr
            until(lambda: broker.depth("shop-queue.dead") == 1)
        listed = cli("dead", "list", "shop-queue", "--transport", url)
        assert "no such thing" in listed.stdout, listed
        looked = cli("doctor", "--transport", url, "--service", "shop")
        assert (looked.returncode, "1 are ready" in looked.stdout) == (0, True), looked.stdout
        (tmp_path / "fixed").touch()
        words = ("dead", "send", "shop-queue", "--all", "--yes", "--store", store, "--transport", url)
        back = cli(*words)
        assert back.returncode == 0, back
        until(lambda: (tmp_path / "done").exists())
        assert (tmp_path / "done").read_text() == "o1"
    finally:
        consume.send_signal(signal.SIGTERM)
        assert consume.wait(SECONDS) == 0
    with closing(streams(url)) as broker:
        assert list(letters(broker, "shop-queue")) == []


def test_a_password_is_in_no_message() -> None:
    """Of a broker that does not answer."""
    said = cli("dead", "list", "q", "--transport", "redis://me:secret@127.0.0.1:1/0")
    assert said.returncode == 2
    assert "127.0.0.1:1" in said.stderr
    assert "secret" not in said.stderr
