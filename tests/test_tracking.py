"""Tracked services on a real broker: flows, stories, causality, a log that goes away.  U4, U8-U11, U14."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from idemp import (
    ConfigError,
    Consumer,
    Message,
    Relay,
    context,
    idempotent,
    open_event_log,
    open_store,
    open_transport,
    publish,
)
from idemp.causality import SENT
from idemp.message import Properties
from idemp.pipeline import Flight
from idemp.ports import Batch, Clock, Delivery, Event, EventLog, Publication, Query, Transport
from idemp.tracking import flow, trace
from idemp.tracking.tracker import Tracker, body_of, pack, text_of, tracking, unpack
from tests.service import finished, until

Handle = Callable[[Message, Transport], Any]
FAR = {"billing": 420.0, "post": -300.0, "ledger": 60.0}
"""Seconds that the services' clocks are off."""


def off(seconds: float) -> Clock:
    return Clock(wall=lambda: time.time() + seconds)


def to(queue: str, *messages: Message) -> list[Publication]:
    return [Publication(each.encode(), each.properties(), "", queue) for each in messages]


@contextmanager
def service(
    url: str, folder: Path, name: str, handlers: Mapping[str, Handle], log: Any = None, **options: Any
) -> Iterator[Consumer]:
    """A tracked service in threads of this process."""
    store = open_store(f"sqlite:///{folder}/{name}.db")
    out = open_transport(url)
    own = log if log is not None else open_event_log(f"sqlite:///{folder}/events.db")
    broker = open_transport(url)
    consumer = Consumer(broker, service=name, tracking=own, **{"backoff": 0.05, **options})
    for kind, handle in handlers.items():

        @consumer.on(kind)
        @idempotent(store, name=f"{name}.{kind}")
        def run(message: Message, handle: Handle = handle) -> Any:
            return handle(message, out)

    ready = threading.Event()
    thread = threading.Thread(target=lambda: consumer.run(ready=ready.set))
    thread.start()
    assert ready.wait(30)
    try:
        yield consumer
    finally:
        consumer.stop()
        thread.join(30)
        assert not thread.is_alive()
        for each in (store, out, broker):
            each.close()
        if log is None:
            own.close()


@pytest.fixture
def events(tmp_path: Path) -> Iterator[EventLog]:
    with closing(open_event_log(f"sqlite:///{tmp_path}/events.db")) as log:
        yield log


def idemp(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """The command line in a process of its own."""
    done = finished("-m", "idemp", *arguments, settings={"IDEMP_TRACKING": f"sqlite:///{folder}/events.db"})
    return done.returncode, done.stdout, done.stderr


def printed(folder: Path, *arguments: str) -> list[Any]:
    code, out, err = idemp(folder, *arguments, "--json")
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


# ------------------------------------------------------------------ flows and stories


def test_u9_u10_the_flow_found_is_the_flow_made(amqp_url: str, tmp_path: Path, unique: str) -> None:
    """U8, U9, U10: three services whose clocks are minutes apart, 2000 messages in 500 chains."""
    names = {name: f"{unique}-{name}" for name in FAR}
    chains, out = 500, Counter[str]()

    def onward(kind: str, receiver: str) -> Handle:
        def handle(message: Message, transport: Transport) -> None:
            out[message.type] += 1
            child = Message(f"{message.args['chain']}-{kind}", kind, message.args)
            publish(transport, to(f"{names[receiver]}-queue", child))

        return handle

    last = {"booked": lambda message, transport: out.update([message.type])}
    with ExitStack() as stack:
        for name, handlers in (
            ("billing", {"order": onward("paid", "post"), **last}),
            ("post", {"paid": onward("shipped", "ledger")}),
            ("ledger", {"shipped": onward("booked", "billing")}),
        ):
            stack.enter_context(service(amqp_url, tmp_path, names[name], handlers, clock=off(FAR[name])))
        log = stack.enter_context(closing(open_event_log(f"sqlite:///{tmp_path}/events.db")))
        transport = stack.enter_context(closing(open_transport(amqp_url)))
        with tracking(log, f"{unique}-shop"):
            orders = [Message(f"{n}-order", "order", {"chain": n}) for n in range(chains)]
            publish(transport, to(f"{names['billing']}-queue", *orders))
        until(lambda: out["booked"] == chains, lambda: out)

    with closing(open_event_log(f"sqlite:///{tmp_path}/events.db")) as log:
        found = {(each.sender, each.service): each.outcomes for each in flow.arrows(log.edges())}
        made = {
            (f"{unique}-shop", names["billing"]): {"ok": chains},
            (names["billing"], names["post"]): {"ok": chains},
            (names["post"], names["ledger"]): {"ok": chains},
            (names["ledger"], names["billing"]): {"ok": chains},
        }
        assert found == made
        for n in range(chains):
            [root] = trace.stories(
                log.story(f"{n}-{('order', 'paid', 'shipped', 'booked')[n % 4]}", limit=100)
            )
            line = [(node.type, node.sender, node.receipts[0].service) for node in root.walk()]
            assert [kind for kind, _, _ in line] == ["order", "paid", "shipped", "booked"]
            assert [(sender, receiver) for _, sender, receiver in line] == list(made)
            for node in root.walk():
                assert node.sent is not None
                assert [event.kind for event in node.receipts[0].events] == ["ok"]
        text = "\n".join(trace.lines(root))
        assert "waited ? (the clocks differ)" in text
        assert "-" not in text.split("took")[1].split(" ms")[0]
    assert len(printed(tmp_path, "flow")) == 4
    assert len(printed(tmp_path, "trace", "7-paid")) == 4


def test_a_message_published_in_a_handler_is_its_child(amqp_url: str, tmp_path: Path, unique: str) -> None:
    """Parent, conversation and trace are on the wire, without a word of code; from async handlers too."""
    queue = f"{unique}-out"
    with closing(open_transport(amqp_url)) as transport:
        transport.declare(queue)
        consumer_out = open_transport(amqp_url)

        async def handle(message: Message) -> None:
            await asyncio.sleep(0)
            told = Properties("kept", "answer", "their own", timestamp=5.0, headers={"n": 1})
            publish(consumer_out, [Publication(b'{"args":{}}', told, "", queue)])
            await asyncio.to_thread(publish, consumer_out, to(queue, Message("2", "answer")))

        with closing(open_event_log(f"sqlite:///{tmp_path}/events.db")) as log:
            broker = open_transport(amqp_url)
            consumer = Consumer(broker, service=unique, tracking=log)
            consumer.on("order")(handle)
            ready = threading.Event()
            thread = threading.Thread(target=lambda: consumer.run(ready=ready.set))
            thread.start()
            assert ready.wait(30)
            with tracking(log, "shop"):
                publish(transport, to(f"{unique}-queue", Message("1", "order")))
            got: list[Delivery] = []
            with closing(open_transport(amqp_url)) as reader:
                reader.consume(queue, 10)
                until(lambda: bool(got.extend(reader.poll(0.2)) or len(got) == 2), lambda: got)  # type: ignore[arg-type, func-returns-value]
            consumer.stop()
            thread.join(30)
            consumer_out.close()
            broker.close()
            [order] = log.find(Query(uuid="1", kinds=("ok",)), limit=9)
    first, second = (each.properties for each in got)
    assert (first.correlation_id, first.headers["x-conversation-id"], first.headers["n"]) == (
        "their own",
        "1",
        1,
    )
    assert (second.correlation_id, second.app_id, second.message_id) == ("1", unique, "2")
    assert first.headers["x-parent-id"] == second.headers["x-parent-id"] == "1"
    traces = {each.headers["traceparent"].split("-")[1] for each in (first, second)}
    spans = {each.headers["traceparent"].split("-")[2] for each in (first, second)}
    assert (len(traces), len(spans)) == (1, 2)
    assert order.properties is not None
    assert unpack(order)[0].headers["traceparent"].split("-")[1] in traces


@pytest.mark.parametrize("relay", ["relay", "command line", "at once"])
def test_what_goes_through_an_outbox_is_a_child_too(
    amqp_url: str, tmp_path: Path, unique: str, events: EventLog, relay: str
) -> None:
    """What a handler publishes by its context is recorded as sent by the service, whoever brings it out."""
    url, post = f"sqlite:///{tmp_path}/seen.db", f"{unique}-post"
    store = open_store(url)
    broker, out = open_transport(amqp_url), open_transport(amqp_url)
    consumer = Consumer(broker, service=unique, tracking=events)

    @consumer.on("order")
    @idempotent(store, name=f"{unique}.order", transaction=relay != "at once")
    def order(message: Message) -> None:
        context().publish("paid", {"order": message.id}, exchange="", routing_key=f"{post}-queue")
        message.log("charged")

    def known() -> dict[str, list[Event]]:
        kinds: dict[str, list[Event]] = {}
        for event in events.find(Query(), limit=99):
            kinds.setdefault(event.kind, []).append(event)
        return kinds

    with service(amqp_url, tmp_path, post, {"paid": lambda *_: None}):
        ready = threading.Event()
        thread = threading.Thread(target=lambda: consumer.run(ready=ready.set))
        thread.start()
        assert ready.wait(30)
        message = Message("1", "order")
        told = Properties("1", "order", "theirs")
        publish(out, [Publication(message.encode(), told, "", f"{unique}-queue")])
        began = time.time()
        if relay != "at once":
            until(lambda: store.backlog().letters == 1, lambda: known())  # type: ignore[attr-defined]
        if relay == "relay":
            with closing(open_transport(amqp_url)) as own:
                outbox = Relay(store, own, tracking=events)  # type: ignore[arg-type]
                assert outbox.turn() == 1
                outbox.close()
        elif relay == "command line":
            arguments = ("relay", "--once", "--store", url, "--transport", amqp_url)
            assert idemp(tmp_path, *arguments) == (0, "1 sent, 0 left\n", "")
        until(lambda: len(known().get("ok", [])) == 2 and "sent" in known(), known)
        consumer.stop()
        thread.join(30)
    for each in (store, broker, out):
        each.close()
    [sent] = known()["sent"]
    assert (sent.service, sent.role, sent.parent, sent.conversation) == (unique, "sender", "1", "theirs")
    assert (sent.type, sent.queue) == ("paid", f"{post}-queue")
    assert sent.sent_at is not None
    assert began - 1 < sent.sent_at <= sent.at + 0.001  # when it was written, and when it went out
    [root] = trace.stories(events.story(sent.uuid, limit=99))
    assert [(node.type, node.sender) for node in root.walk()] == [("order", ""), ("paid", unique)]
    [run] = events.find(Query(uuid="1", kinds=("ok",)), limit=9)
    assert (run.attempt, run.key, run.took is not None) == (1, f"{unique}.order/1", True)
    assert [(each.sender, each.service) for each in flow.arrows(events.edges())][-1] == (unique, post)


def test_a_letter_of_a_service_that_is_not_tracked(tmp_path: Path, unique: str, events: EventLog) -> None:
    """A relay that is says what it knows; what is on the wire is what was written."""
    with (
        closing(open_store(f"sqlite:///{tmp_path}/seen.db")) as store,
        closing(open_transport(f"memory://{unique}")) as out,
        closing(open_transport(f"memory://{unique}")) as reader,
    ):
        out.declare("post-queue")

        @idempotent(store, name="billing.order", transaction=True)
        def order(message: Message) -> None:
            context().publish("paid", {}, exchange="", routing_key="post-queue")

        order(Message("1", "order"))
        [letter] = store.letters(9)  # type: ignore[attr-defined]
        outbox = Relay(store, out, tracking=events)  # type: ignore[arg-type]
        assert outbox.turn() == 1
        outbox.close()
        reader.consume("post-queue", 1)
        [came] = [event for event in reader.poll(5.0) if isinstance(event, Delivery)]
        assert came.properties == letter.publication.properties
        assert [(each.kind, each.service, each.parent) for each in events.find(Query(), limit=9)] == [
            ("sent", "idemp", "")
        ]


def test_without_tracking_nothing_is_added(amqp_url: str, unique: str) -> None:
    """Off is off: what is on the wire is what the user made."""
    message = Message("1", "order")
    with closing(open_transport(amqp_url)) as transport:
        transport.declare(unique)
        properties = message.properties()
        publish(transport, [Publication(message.encode(), properties, "", unique)])
        message.log("nobody hears this")
        transport.consume(unique, 1)
        [came] = [event for event in transport.poll(10) if isinstance(event, Delivery)]
    assert came.properties.headers == {}
    assert came.properties.app_id is None


def test_every_outcome_is_an_event(amqp_url: str, tmp_path: Path, unique: str, events: EventLog) -> None:
    """U4: with attempt, reason, key, business key, and what was said by hand."""
    tries = Counter[str]()

    def handle(message: Message, transport: Transport) -> None:
        tries[message.id] += 1
        message.log("charging", hide_payload=message.id == "ok")
        if message.id == "bad" or (message.id == "flaky" and tries["flaky"] == 1):
            raise ValueError(f"no customer for {message.id}")

    log = open_event_log(f"sqlite:///{tmp_path}/events.db?business=order.id")
    with (
        service(amqp_url, tmp_path, unique, {"order": handle}, log),
        closing(open_transport(amqp_url)) as out,
    ):
        args = {"order": {"id": 17}}
        ids = ["ok", "ok", "flaky", "bad"]
        publish(out, to(f"{unique}-queue", *(Message(id, "order", args) for id in ids)))
        publish(out, [Publication(b"\xff", Properties("none", app_id="odd"), "", f"{unique}-queue")])
        until(lambda: tries["bad"] == 5, lambda: tries)
        until(lambda: len(events.find(Query(kinds=("parked",)), limit=9)) == 1, lambda: tries)
    log.close()
    kinds = Counter((event.uuid, event.kind) for event in events.find(Query(), limit=100))
    assert kinds == {
        ("ok", "ok"): 1,
        ("ok", "skipped"): 1,
        ("ok", "note"): 1,
        ("flaky", "failed"): 1,
        ("flaky", "ok"): 1,
        ("flaky", "note"): 2,
        ("bad", "failed"): 4,
        ("bad", "parked"): 1,
        ("bad", "note"): 5,
        ("none", "rejected"): 1,
    }
    [parked] = events.find(Query(kinds=("parked",)), limit=9)
    assert (parked.attempt, parked.key, parked.business) == (5, f"{unique}.order/bad", "17")
    assert parked.why == "attempts used up (5): ValueError: no customer for bad"
    assert parked.took is not None
    [rejected] = events.find(Query(kinds=("rejected",)), limit=9)
    assert rejected.body is not None
    assert (rejected.sender, body_of(rejected.body)) == ("odd", b"\xff")
    said = events.find(Query(uuid="ok", kinds=("note",)), limit=9)
    assert [(event.why, event.role, event.body) for event in said] == [("charging", "receiver", None)]
    listed = printed(tmp_path, "events", "--outcome", "failed", "--service", unique, "--business", "17")
    assert len(listed) == 5
    assert listed[0]["why"] == "ValueError: no customer for bad"


def test_a_handler_that_does_not_end_is_seen(
    amqp_url: str, tmp_path: Path, unique: str, events: EventLog
) -> None:
    """U11: what is at it for long is told as started, once; its end is told too."""
    go_on = threading.Event()
    with service(amqp_url, tmp_path, unique, {"order": lambda *_: go_on.wait(30)}):
        with closing(open_transport(amqp_url)) as out:
            publish(out, to(f"{unique}-queue", Message("1", "order")))
        until(lambda: bool(events.find(Query(kinds=("started",)), limit=9)), lambda: "nothing")
        go_on.set()
        until(lambda: bool(events.find(Query(kinds=("ok",)), limit=9)), lambda: "nothing")
    assert Counter(event.kind for event in events.find(Query(), limit=9)) == {"started": 1, "ok": 1}


def test_u14_an_event_log_that_is_away_disturbs_no_handler(
    amqp_url: str, tmp_path: Path, unique: str, events: EventLog
) -> None:
    """U14: somebody holds the log's lock; handlers go on, and later each event is there or counted."""
    ran = Counter[str]()
    n = 3000
    with service(amqp_url, tmp_path, unique, {"order": lambda m, _: ran.update([m.id])}):
        held = sqlite3.connect(tmp_path / "events.db", isolation_level=None)
        held.execute("CREATE TABLE IF NOT EXISTS held (n)")
        held.execute("BEGIN IMMEDIATE")
        with closing(open_transport(amqp_url)) as out:
            publish(out, to(f"{unique}-queue", *(Message(str(i), "order") for i in range(n))))
        until(lambda: len(ran) == n, lambda: len(ran))
        held.execute("COMMIT")
        held.close()
        until(lambda: _told(events) == n, lambda: _told(events))
    assert set(ran.values()) == {1}


def _told(log: EventLog) -> int:
    found = log.find(Query(kinds=("ok", "dropped")), limit=100_000)
    return sum(event.attempt if event.kind == "dropped" else 1 for event in found)


def test_a_log_that_was_never_there(amqp_url: str, tmp_path: Path, unique: str) -> None:
    """The service runs, stops in time, and says how many events were not recorded."""
    ran: list[str] = []
    log = open_event_log("postgresql://nobody@127.0.0.1:9/none")
    with service(amqp_url, tmp_path, unique, {"order": lambda m, _: ran.append(m.id)}, log):
        with closing(open_transport(amqp_url)) as out:
            publish(out, to(f"{unique}-queue", Message("1", "order")))
        until(lambda: ran == ["1"], lambda: ran)
    log.close()


def test_a_wrong_log_is_refused_at_once() -> None:
    """With the fix."""
    with pytest.raises(ConfigError, match="open_event_log"):
        Consumer(open_transport("memory://x"), service="s", tracking="sqlite:///events.db")


# ------------------------------------------------------------------ the command line


def test_look_ups(tmp_path: Path, events: EventLog) -> None:
    """U9, U10: trace, flow in four forms, events; for people and for programs."""
    with tracking(events, "sales-service") as tracker:
        tracker.note(Message("1", "order", {"n": 1}), 'said "so"')
        sent = tracker.stamp(to("q", Message("1", "order", {"n": 1})))
        tracker.sent(sent)
    got = Event("1", "ok", "billing", time.time(), "receiver", "", "1", "sales-service", "order", took=0.5)
    events.append(Batch("b", 1, [got]))
    code, out, _ = idemp(tmp_path, "trace", "1")
    assert code == 0
    assert out.startswith("* 1  order  sent by sales-service at 20")
    assert "    billing: ok  at 20" in out
    assert "sales-service: note 'said \"so\"'" in out
    _, out, _ = idemp(tmp_path, "flow")
    assert out.startswith("sales-service -> billing  1 ok; 0.02/s, 0.0% failing, 500.0 ms on average")
    assert '"sales-service" -> "billing"' in idemp(tmp_path, "flow", "--dot")[1]
    assert '-->|"1"|' in idemp(tmp_path, "flow", "--mermaid")[1]
    assert idemp(tmp_path, "flow", "--svg")[1].startswith("<svg ")
    assert printed(tmp_path, "events", "--id", "1")[0]["kind"] == "ok"
    assert "showing 1; there are more" in idemp(tmp_path, "events", "--limit", "1")[2]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("trace", "nobody"), 1, "knows nothing of nobody"),
        (("flow", "--since", "1m", "--until", "2m"), 2, "--since must be longer ago"),
        (("flow", "--dot", "--json"), 2, "Say --dot or --json."),
        (("events", "--since", "soon"), 2, "is no duration"),
        (("events", "--tracking", "sqlite:////nowhere/e.db"), 2, "there is no event log /nowhere/e.db"),
        (("trace", "1", "--tracking", "postgresql://u:secret@127.0.0.1:9/d"), 2, "u:***@127.0.0.1:9"),
    ],
)
def test_errors_are_one_sentence(
    tmp_path: Path, events: EventLog, arguments: tuple[str, ...], code: int, said: str
) -> None:
    """With exit code 2; a question that is answered with no has 1."""
    events.append(Batch("w", 1, []))
    found, out, err = idemp(tmp_path, *arguments)
    assert (found, out) == (code, "")
    assert said in err
    assert err.count("\n") == 1
    assert "secret" not in err


# ------------------------------------------------------------------ small parts


@pytest.mark.parametrize("body", [b"", b'{"a":1}', b"\xff\x00", b"nul \0", b"base64:AAAA", "é".encode()])
def test_bodies_survive(body: bytes) -> None:
    """Whatever they are."""
    text = text_of(body)
    assert text is not None
    assert "\0" not in text
    assert body_of(text) == body


def test_properties_survive() -> None:
    """All but headers that JSON has no word for."""
    given = Properties("1", "order", "c", "shop", 5.0, "application/json", {"n": 1, "s": "x", "b": True})
    kept = Event("2", "ok", "s", 1.0, properties=pack(given, "events", "foo"))
    assert unpack(kept) == (given, "events", "foo")
    odd = Properties("1", headers={"n": 1, "raw": b"\xff", "deep": {"a": [1]}, "many": object()})
    kept = Event("2", "ok", "s", 1.0, properties=pack(odd, "", "q"))
    assert unpack(kept)[0].headers == {"n": 1}


USUAL = Properties("1", "order", None, "shop", 5.0, "application/json")


@pytest.mark.parametrize(
    ("given", "usual"),
    [
        (USUAL, True),
        (replace(USUAL, app_id=None), True),
        (replace(USUAL, timestamp=None), True),
        (replace(USUAL, message_id="2"), False),
        (replace(USUAL, message_id=None), False),
        (replace(USUAL, type="other"), False),
        (replace(USUAL, correlation_id="1"), False),
        (replace(USUAL, app_id=""), False),
        (replace(USUAL, content_type=None), False),
        (replace(USUAL, headers={"x-sent-ms": 5000}), False),
        (replace(USUAL, headers={"n": 1}), False),
    ],
)
def test_properties_that_an_event_tells_by_itself(events: EventLog, given: Properties, usual: bool) -> None:
    """Are not kept twice, and come back as they were."""
    message = Message("1", "order", {})
    delivery = Delivery(1, message.encode(), given, "events", "shop.order", False)
    tracker = Tracker(events, "s")
    tracker.told([("ok", Flight(delivery, 1, message=message, key="s.order/1"), "")])
    tracker.close()
    [event] = events.find(Query(), limit=9)
    assert unpack(event) == (given, "events", "shop.order")
    assert (event.properties == '["events","shop.order"]') is usual


def test_a_long_body_is_not_kept(events: EventLog) -> None:
    """64 KiB are; the event is there all the same."""
    tracker = Tracker(events, "s")
    tracker.note(Message("1", "t", "x" * 70_000), "big")
    tracker.close()
    [event] = events.find(Query(), limit=9)
    assert (event.uuid, event.body) == ("1", None)


def test_headers_with_numbers_beyond_all_bounds(tmp_path: Path, unique: str) -> None:
    """The message's event is kept, and so are its neighbours'."""
    absurd: list[dict[str, Any]] = [
        {SENT: 10**400},
        {SENT: float("nan")},
        {SENT: -1},
        {"idemp-attempt": 2**70},
        {},
    ]
    url = f"memory://{unique}"
    with (
        closing(open_event_log(f"sqlite:///{tmp_path}/events.db")) as log,
        service(url, tmp_path, unique, {"order": lambda *_: None}, log),
        closing(open_transport(url)) as out,
    ):
        messages = [Message(str(n), "order", headers=headers) for n, headers in enumerate(absurd)]
        publish(out, to(f"{unique}-queue", *messages))
        until(lambda: len(log.find(Query(), limit=9)) == 5, lambda: log.find(Query(), limit=9))
        found = log.find(Query(), limit=9)
    assert all(event.sent_at is None or 0 <= event.sent_at < time.time() + 1 for event in found)
