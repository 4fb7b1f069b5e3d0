"""A consumer whose broker goes away, takes the user's access away, or its patience: real RabbitMQ."""

from __future__ import annotations

import threading
import time
from contextlib import closing

from idemp import Consumer, Message, open_transport, publish
from idemp.ports import Publication
from tests.servers import RabbitMQ, need
from tests.service import until


def fill(url: str, queue: str, ids: list[str]) -> None:
    with closing(open_transport(url)) as transport:
        transport.declare(queue)
        copies = [Message(each, "t") for each in ids]
        publish(transport, [Publication(copy.encode(), copy.properties(), "", queue) for copy in copies])


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
