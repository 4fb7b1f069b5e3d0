"""A consumer whose broker goes away, takes the user's access away, or its patience: real RabbitMQ."""

from __future__ import annotations

import base64
import json
import signal
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from idemp import ConfigError, Consumer, Message, idempotent, open_store, open_transport, publish
from idemp.ports import Done, Free, Get, Publication, Store
from tests.servers import RabbitMQ, need
from tests.service import Program, until

SLOW = """
import os, sys, time
from idemp import Consumer, idempotent, open_store, open_transport
url, folder, name = sys.argv[1:]
store = open_store(f"sqlite:///{folder}/seen.db")
consumer = Consumer(open_transport(url), service=name)
ran = os.open(f"{folder}/ran", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

@consumer.on("t")
@idempotent(store, name=f"{name}.t")
def handle(message):
    time.sleep(0.1)
    os.write(ran, f"{message.id}\\n".encode())

consumer.run(ready=lambda: print("ready"))
"""


def fill(url: str, queue: str, ids: list[str]) -> None:
    with closing(open_transport(url)) as transport:
        transport.declare(queue)
        copies = [Message(each, "t") for each in ids]
        publish(transport, [Publication(copy.encode(), copy.properties(), "", queue) for copy in copies])


def done(store: Store, name: str, ids: list[str]) -> set[str]:
    replies = store.apply([Get(f"{name}.t/{each}") for each in ids])
    return {each for each, reply in zip(ids, replies, strict=True) if isinstance(reply, Done)}


def test_killed_while_the_broker_is_away(own_rabbitmq: RabbitMQ, tmp_path: Path, unique: str) -> None:
    """What had ended by then is done: afterwards only what ran at the kill may run twice."""
    ids = [str(n) for n in range(60)]
    fill(own_rabbitmq.url, f"{unique}-queue", ids)
    program = ["-c", SLOW, own_rabbitmq.url, str(tmp_path), unique]

    def ran() -> list[str]:
        path = tmp_path / "ran"
        return path.read_text().split() if path.exists() else []

    first = Program(tmp_path / "said", program, {})
    try:
        first.wait_for("ready")
        until(lambda: len(ran()) >= 5, first.said)
        own_rabbitmq.stop()
        before = len(ran())
        until(lambda: len(ran()) >= before + 15, first.said)
    finally:
        first.stop(signal.SIGKILL)
    ended = ran()
    with closing(open_store(f"sqlite:///{tmp_path}/seen.db")) as store:
        # A turn of the loop, and a batch of the store, after each handler.
        assert len(ended) - len(done(store, unique, ids)) <= 2
        own_rabbitmq.start()
        second = Program(tmp_path / "said", program, {})
        try:
            until(lambda: done(store, unique, ids) == set(ids), second.said)
        finally:
            assert second.stop() == 0
    assert sum(Counter(ran()).values()) - len(ids) <= 2


def test_a_broker_that_refuses_the_user_when_it_is_back(tmp_path: Path, unique: str) -> None:
    """`run` ends with that; what ran is done, and what was claimed ahead is free at once."""
    need("rabbitmq")
    ids = [str(n) for n in range(100)]
    with RabbitMQ(management=True) as broker, closing(open_store(f"sqlite:///{tmp_path}/seen.db")) as store:
        manage = _manager(broker)
        manage("PUT", "users/someone", {"password": "p", "tags": ""})
        manage("PUT", "permissions/%2F/someone", {"configure": ".*", "write": ".*", "read": ".*"})
        fill(broker.url, f"{unique}-queue", ids)
        url = broker.url.replace("guest:guest", "someone:p")
        runs: list[str] = []
        with closing(open_transport(url)) as transport:
            consumer = Consumer(transport, service=unique)

            @consumer.on("t")
            @idempotent(store, name=f"{unique}.t")
            def handle(message: Message) -> None:
                runs.append(message.id)
                if len(runs) == 5:
                    manage("DELETE", "users/someone", None)  # which ends its connections
                time.sleep(0.1)

            with pytest.raises(ConfigError, match="refuses user 'someone'"):
                consumer.run()
        ran = list(runs)
        assert 5 <= len(ran) < 100
        assert done(store, unique, ids) == set(ran)
        rest = store.apply([Get(f"{unique}.t/{each}") for each in ids if each not in ran])
        assert {type(state) for state in rest} == {Free}
        time.sleep(0.5)
        assert runs == ran, "handlers began after the end"


def _manager(broker: RabbitMQ) -> Callable[[str, str, Any], None]:
    def ask(method: str, what: str, body: Any) -> None:
        request = urllib.request.Request(
            f"http://127.0.0.1:{broker.management_port}/api/{what}",
            data=None if body is None else json.dumps(body).encode(),
            method=method,
            headers={
                "Authorization": "Basic " + base64.b64encode(b"guest:guest").decode(),
                "Content-Type": "application/json",
            },
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10):
            pass

    return ask


def test_a_line_that_is_longer_than_the_broker_waits_for(unique: str) -> None:
    """Without a policy: each time the broker takes them back some more are acknowledged, until all are."""
    need("rabbitmq")
    often = "-rabbit channel_tick_interval 1000"  # it looks each minute else
    with RabbitMQ(options={"consumer_timeout": "2000"}, erlang=often) as broker:
        queue, ids = f"{unique}-queue", [str(n) for n in range(60)]
        fill(broker.url, queue, ids)
        runs: list[str] = []

        def all_and_no_more() -> bool:
            n = len(runs)
            time.sleep(3.5)  # the broker took back what was not acknowledged: it would run again meanwhile
            return set(runs) == set(ids) and len(runs) == n

        with closing(open_transport(broker.url)) as transport:
            consumer = Consumer(transport, service=unique, prefetch=60, grace=1)

            @consumer.on("t")
            def handle(message: Message) -> None:
                runs.append(message.id)
                time.sleep(0.1)

            thread = threading.Thread(target=consumer.run)
            thread.start()
            try:
                until(all_and_no_more, lambda: f"{len(runs)} runs of {len(ids)} messages")
            finally:
                consumer.stop()
                thread.join(20)
        with closing(open_transport(broker.url)) as look:
            look.declare(queue)
            assert look.depth(queue) == 0
        assert len(runs) < 90
