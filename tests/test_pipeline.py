"""The consumer's decisions, stepped by hand and through a simulated world."""

from __future__ import annotations

from collections import Counter
from math import inf
from typing import Any

import pytest
from msgspec.structs import replace

from idemp.errors import PermanentFailure
from idemp.message import Message, Properties
from idemp.pipeline import (
    MAX_DELAY,
    Acknowledge,
    Apply,
    Cancel,
    Confirmed,
    Delivered,
    Disconnected,
    Pipeline,
    Replied,
    Route,
    Send,
    Stop,
    Tell,
    Tick,
    Transact,
    Transacted,
    Work,
    Worked,
)
from idemp.policy import fingerprint, make_policy
from idemp.ports import (
    Abandon,
    Applied,
    Busy,
    Claim,
    Claimed,
    Complete,
    Delivery,
    Done,
    Doubt,
    Free,
    Get,
    Lost,
    Park,
    Release,
    Takeover,
)
from idemp.protocol import NotStarted, Raised, Returned, Skipped
from tests.simulator import World


class Store:
    retention = 3600.0
    transactions = 1

    def __init__(self) -> None:
        self.known: dict[str, Done] = {}

    def apply(self, ops: Any) -> Any:
        raise AssertionError("the pipeline is pure")

    def recall(self, key: str, since: float = inf) -> Done | None:
        return self.known.get(key)


STORE: Any = Store()


def pipeline(**options: Any) -> Pipeline:
    given = {
        "name": "h", "key": None, "fingerprint": None, "on_busy": "wait", "wait": 2.0, "in_doubt": "retry",
        "attempts": 3, "permanent": (), "codec": None, **options,
    }  # fmt: skip
    policy = make_policy(lambda message: None, STORE, **given)
    return Pipeline("q", {"t": Route(print, policy), "bare": Route(print, None)}, chance=lambda: 0.0)


def delivery(tag: int, id: str = "1", type: str = "t", **properties: Any) -> Delivery:
    message = Message(id, type)
    return Delivery(
        tag, message.encode(), replace(message.properties(), **properties), "events", "foo", False
    )


def deliver(line: Pipeline, *deliveries: Delivery, now: float = 0.0) -> list[Any]:
    return [c for c in line.step(Delivered(deliveries, 1000.0), now) if not isinstance(c, Tell)]


def step(line: Pipeline, event: Any, now: float = 0.0) -> list[Any]:
    return [command for command in line.step(event, now) if not isinstance(command, Tell)]


def test_a_message_goes_claim_run_complete_ack() -> None:
    """Nothing is acknowledged before done is durable."""
    line = pipeline()
    assert deliver(line, delivery(7)) == [Apply(STORE, [Claim("h/1")])]
    [work] = step(line, Replied(STORE, [Claimed(5, 1)]))
    [(flight, run)] = work.items
    assert run.claim == Claimed(5, 1)
    assert step(line, Worked([(flight, Returned(None, b"null"))])) == [
        Apply(STORE, [Complete("h/1", 5, b"null")])
    ]
    assert not line.idle()
    assert step(line, Replied(STORE, [Applied()])) == [Acknowledge([7])]
    assert line.idle()


def test_what_memory_knows_to_be_done_is_acknowledged_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another payload it is a dead letter; one that a person sent back is looked up."""
    monkeypatch.setattr(STORE, "known", {"h/1": Done(9, b"null", fingerprint({}), 0.0)})
    line = pipeline()
    assert deliver(line, delivery(7)) == [Acknowledge([7])]
    assert line.idle()
    assert not line.names()
    assert deliver(line, delivery(8, headers={"idemp-retry": "r"})) == [Apply(STORE, [Get("h/1")])]

    line = pipeline(fingerprint=lambda message: {"other": True})
    [send] = deliver(line, delivery(9))
    [(_, copy)] = send.items
    assert copy.properties.headers["idemp-reason"] == "done already, with another payload"


def test_a_transaction_that_comes_again_is_looked_up_to_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who made it may have been killed before he counted it: the consumer counts what it skips of these."""
    monkeypatch.setattr(Store, "transaction", lambda *_: None, raising=False)
    line = pipeline(transaction=True)
    again = replace(delivery(2), redelivered=True)
    [transact] = deliver(line, delivery(1))
    assert deliver(line, again) == []
    [(flight, _)] = transact.items
    skipped = Skipped(Done(9, None, None, 0.0))
    commands = step(line, Transacted(STORE, [(flight, skipped)]))
    assert [type(command) for command in commands] == [Transact, Acknowledge]
    assert commands[1] == Acknowledge([1])

    monkeypatch.setattr(STORE, "known", {"h/1": Done(9, None, None, 0.0)})
    line = pipeline(transaction=True)
    assert deliver(line, delivery(1)) == [Acknowledge([1])]
    assert [type(command) for command in deliver(line, again)] == [Transact]
    line = pipeline()
    assert deliver(line, again) == [Acknowledge([2])]


def test_what_waits_for_its_twin_waits_though_memory_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its twin's handler may be under way here: both end together."""
    line = pipeline()
    deliver(line, delivery(1))
    monkeypatch.setattr(STORE, "known", {"h/1": Done(9, None, None, 0.0)})
    assert deliver(line, delivery(2)) == []
    assert step(line, Replied(STORE, [Done(9, None, None, 0.0)])) == [Acknowledge([1, 2])]


def test_what_is_asked_goes_out_at_once_and_is_answered_in_order() -> None:
    """Claims and completions together; one answer may be for several batches, or for a part of one."""
    line = pipeline()
    assert deliver(line, delivery(1, "a")) == [Apply(STORE, [Claim("h/a")])]
    assert deliver(line, delivery(2, "b"), delivery(3, "c")) == [Apply(STORE, [Claim("h/b"), Claim("h/c")])]
    [work] = step(line, Replied(STORE, [Claimed(1, 1), Claimed(2, 1)]))
    assert step(line, Worked([(work.items[0][0], Returned(None, None))])) == [
        Apply(STORE, [Complete("h/a", 1)])
    ]
    assert not line.idle()
    assert step(line, Replied(STORE, [Done(9, None, None, 0.0), Applied()])) == [Acknowledge([3, 1])]


def test_a_duplicate_in_flight_waits_for_its_first() -> None:
    """It is acknowledged only once the first is done."""
    line = pipeline()
    deliver(line, delivery(1), delivery(2))
    [work] = step(line, Replied(STORE, [Claimed(1, 1)]))
    [_] = step(line, Worked([(work.items[0][0], Returned(None, None))]))
    assert step(line, Replied(STORE, [Applied()])) == [Acknowledge([1, 2])]


def test_a_message_that_was_sent_back_is_looked_up_anew() -> None:
    """Its key may have been forgotten: memory may not call it done, neither for it nor for its first."""
    line = pipeline()
    sent_back = delivery(2, headers={"idemp-retry": "x"})
    assert asked(deliver(line, sent_back)) == [Get]
    assert asked(step(line, Replied(STORE, [Free()]))) == [Claim]

    line = pipeline()
    assert asked(deliver(line, delivery(1), sent_back)) == [Claim]
    commands = step(line, Replied(STORE, [Done(9, None, None, 0.0)]))
    assert Acknowledge([1]) in commands
    assert asked(commands) == [Get]
    assert asked(step(line, Replied(STORE, [Free()]))) == [Claim]


def asked(commands: list[Any]) -> list[type]:
    """Kinds of operations: two of one key are equal as tuples."""
    return [type(op) for command in commands if isinstance(command, Apply) for op in command.ops]


def test_a_duplicate_goes_later_when_its_first_fails() -> None:
    """Both come back as delayed copies, confirmed before the ack."""
    line = pipeline()
    deliver(line, delivery(1), delivery(2))
    [work] = step(line, Replied(STORE, [Claimed(1, 1)]))
    assert step(line, Worked([(work.items[0][0], Raised(ValueError()))])) == [
        Apply(STORE, [Release("h/1", 1, 1)])
    ]
    [send] = step(line, Replied(STORE, [Applied()]))
    assert [copy.delay for _, copy in send.items] == [0.5, 0.5]
    assert {copy.routing_key for _, copy in send.items} == {"q"}
    assert step(line, Confirmed([(send.items[1][0], "", False)])) == [Acknowledge([2])]
    assert step(line, Confirmed([(send.items[0][0], "nack", False)])) == []
    assert line.due() == 1.0
    [again] = step(line, Tick(), 1.0)
    assert again.items == [send.items[0]]
    assert step(line, Confirmed([(send.items[0][0], "", False)])) == [Acknowledge([1])]


def test_busy_is_looked_at_again_and_then_deferred() -> None:
    """Never acknowledged against busy."""
    line = pipeline(wait=0.03)
    deliver(line, delivery(1))
    busy = Busy(4, 1, "other", 0.0)
    assert step(line, Replied(STORE, [busy])) == []
    assert line.due() == pytest.approx(0.02)
    assert step(line, Tick(), 0.02) == [Apply(STORE, [Claim("h/1")])]
    assert step(line, Replied(STORE, [busy]), 0.02) == []
    assert step(line, Tick(), 0.1) == [Apply(STORE, [Claim("h/1")])]
    [send] = step(line, Replied(STORE, [busy]), 0.1)
    assert isinstance(send, Send)
    assert send.items[0][1].routing_key == "q"


def test_a_lost_claim_is_looked_up_again() -> None:
    """Its message is not acknowledged as ok."""
    line = pipeline()
    deliver(line, delivery(1))
    [work] = step(line, Replied(STORE, [Claimed(1, 1)]))
    step(line, Worked([(work.items[0][0], Returned(None, None))]))
    assert step(line, Replied(STORE, [Lost(Free())])) == [Apply(STORE, [Claim("h/1")])]
    assert step(line, Replied(STORE, [Done(2, None, None, 0.0)])) == [Acknowledge([1])]


@pytest.mark.parametrize(
    ("body", "properties", "reason"),
    [
        (b"\xff\xfe", {}, "not JSON"),
        (b"[1]", {}, "not an object: list"),
        (b"[" * 100_000, {}, "not JSON"),
        (b'{"type":"t"}', {"message_id": None}, "no id"),
        (b'{"type":"t","id":""}', {}, "the id is empty"),
        (b'{"type":"t","id":7}', {}, "the id must be a string, not int"),
        (b'{"type":"t","id":"\\ud800"}', {}, "not valid Unicode"),
        (b'{"type":"t","id":"' + b"x" * 1025 + b'"}', {}, "the id has 1025 bytes; 1024 are allowed"),
        (b'{"type":"nope","id":"1"}', {}, "no handler for type 'nope'"),
        (b'{"id":"1"}', {"type": None}, "no type"),
        (b'{"type":["t"],"id":"1"}', {}, "the type must be a string, not list"),
        (b'{"type":"t","id":"1","args":"' + b"x" * 5_000_000 + b'"}', {}, "4194304 are allowed"),
    ],
)
def test_bad_messages_are_set_aside_with_the_reason(body: bytes, properties: Any, reason: str) -> None:
    """N10: copied to the dead-letter queue, confirmed, then acknowledged; no store is asked."""
    line = pipeline()
    given = replace(Properties(headers={"mine": 1}), **properties)
    [send] = deliver(line, Delivery(1, body, given, "events", "foo", False))
    flight, copy = send.items[0]
    assert copy.routing_key == "q.dead"
    assert reason in copy.properties.headers["idemp-reason"]
    assert copy.properties.headers["mine"] == 1
    assert copy.body == body
    assert step(line, Confirmed([(flight, "", False)])) == [Acknowledge([1])]


def test_a_copy_that_cannot_be_carried_goes_without_its_headers() -> None:
    """Set aside it must be, whatever the publisher put on it."""
    line = pipeline()
    odd = delivery(1, type="nope", headers={"odd": object()})
    [send] = deliver(line, odd)
    flight, copy = send.items[0]
    assert "odd" in copy.properties.headers
    assert step(line, Confirmed([(flight, "no place for it", True)])) == []
    [send] = step(line, Tick(), 1.0)
    flight, copy = send.items[0]
    assert copy.body == odd.body
    assert set(copy.properties.headers) >= {"idemp-reason", "idemp-queue"}
    assert "odd" not in copy.properties.headers
    assert step(line, Confirmed([(flight, "", False)])) == [Acknowledge([1])]


def test_a_reason_can_be_carried_whatever_it_quotes() -> None:
    """JSON lets half of a character through."""
    line = pipeline()
    [work] = deliver(line, delivery(1, type="bare"))
    error = PermanentFailure("no customer Bj\ud800rn")
    [send] = step(line, Worked([(work.items[0][0], Raised(error))]))
    reason = send.items[0][1].properties.headers["idemp-reason"]
    assert reason.encode().endswith(b"Bj\\ud800rn")


def test_a_copy_is_made_poorer_only_as_far_as_it_must_be() -> None:
    """Not when no queue takes it; else its headers go first, whatever their names are, and then the rest."""
    line = pipeline()
    odd = delivery(1, type="nope", headers={b"caf\xe9": object(), "tenant": "acme", "idemp-mine": object()})
    [send] = deliver(line, odd)
    flight, first = send.items[0]
    step(line, Confirmed([(flight, "no queue takes it", False)]))
    [send] = step(line, Tick(), 1.0)
    assert send.items == [(flight, first)]
    step(line, Confirmed([(flight, "it cannot be carried", True)]), 1.0)
    [send] = step(line, Tick(), 2.0)
    [(_, copy)] = send.items
    assert copy.properties == replace(first.properties, headers=copy.properties.headers)
    assert not {b"caf\xe9", "tenant"} & copy.properties.headers.keys()
    step(line, Confirmed([(flight, "it cannot be carried", True)]), 2.0)
    [send] = step(line, Tick(), 3.0)
    [(_, copy)] = send.items
    assert copy.properties.message_id is None
    assert len(copy.properties.headers) == 7
    assert "idemp-mine" not in copy.properties.headers
    assert step(line, Confirmed([(flight, "", False)])) == [Acknowledge([1])]


def test_a_retry_that_cannot_be_carried_is_set_aside() -> None:
    """It is not run without its headers; and is acknowledged once, when the letter is safe."""
    line = pipeline()
    [work] = deliver(line, delivery(1, type="bare", headers={"tenant": "acme"}))
    [send] = step(line, Worked([(work.items[0][0], Raised(ValueError("x")))]))
    [(flight, copy)] = send.items
    assert copy.routing_key == "q"
    [send] = step(line, Confirmed([(flight, "too big", True)]))
    [(_, letter)] = send.items
    assert (letter.routing_key, letter.properties.headers["tenant"]) == ("q.dead", "acme")
    assert letter.properties.headers["idemp-attempt"] == 1
    assert letter.properties.headers["idemp-reason"] == "failed, and cannot be tried again: too big"
    assert step(line, Confirmed([(flight, "", False)])) == [Acknowledge([1])]
    assert step(line, Tick(), 100.0) == []
    assert line.idle()


def test_a_message_older_than_the_retention_is_parked_not_run() -> None:
    """It may have been done and forgotten.  One that is still known as done is skipped."""
    line = pipeline()
    deliver(line, delivery(1, timestamp=1000.0 - 3601))
    [apply] = step(line, Replied(STORE, [Claimed(1, 1)]))
    assert isinstance(apply.ops[0], Park)
    assert "older than the retention" in apply.ops[0].reason
    [send] = step(line, Replied(STORE, [Applied()]))
    assert send.items[0][1].routing_key == "q.dead"
    deliver(line, delivery(2, "2", timestamp=0.0, headers={"idemp-retried-at": 999.0}))
    [work] = step(line, Replied(STORE, [Claimed(2, 1)]))
    assert isinstance(work, Work)


def test_age_is_judged_once_the_key_is_mine() -> None:
    """It may have been young when it came, and done until just before the claim; a doubt excuses nothing."""
    line = pipeline()
    deliver(line, delivery(1, timestamp=1000.0), now=10.0)
    [apply] = step(line, Replied(STORE, [Claimed(1, 1)]), now=10.0 + Store.retention + 1)
    assert isinstance(apply.ops[0], Park)
    deliver(line, delivery(2, "2", timestamp=-5000.0))
    step(line, Replied(STORE, [Applied(), Doubt(7, 1, "dead", 0.0)]))
    [apply] = step(line, Replied(STORE, [Claimed(8, 2)]))
    [park] = apply.ops
    assert park.key == "h/2"
    assert park.reason.startswith("in doubt: attempt 1 may have taken effect; older than the retention")


def test_a_doubt_whose_handler_did_not_start_costs_no_attempt() -> None:
    """However often the session was stale; and a resolver that raises waits longer each time."""
    line = pipeline(attempts=5)
    deliver(line, delivery(1))
    step(line, Replied(STORE, [Doubt(7, 1, "dead", 0.0)]))
    [work] = step(line, Replied(STORE, [Claimed(8, 2)]))
    assert step(line, Worked([(work.items[0][0], NotStarted())])) == [Apply(STORE, [Abandon("h/1", 8, 1)])]

    line = pipeline(in_doubt=lambda message: None)
    deliver(line, delivery(1, headers={"idemp-attempt": 3}))
    step(line, Replied(STORE, [Doubt(7, 1, "dead", 0.0)]))
    [work] = step(line, Replied(STORE, [Claimed(8, 2)]))
    assert step(line, Worked([(work.items[0][0], Raised(OSError()))])) == [
        Apply(STORE, [Abandon("h/1", 8, 1)])
    ]
    [send] = step(line, Replied(STORE, [Applied()]))
    [(_, copy)] = send.items
    assert (copy.properties.headers["idemp-attempt"], copy.delay) == (4, 4.0)


def test_what_is_too_old_and_lost_its_connection_is_given_back() -> None:
    """Parked here, its message would perhaps be nowhere."""
    line = pipeline()
    deliver(line, delivery(1, timestamp=-5000.0))
    step(line, Disconnected())
    [apply] = step(line, Replied(STORE, [Claimed(1, 1)]))
    assert apply.ops == [Release("h/1", 1, 0)]


def test_attempts_used_up_go_to_the_dead_letters() -> None:
    """With the reason of the last."""
    line = pipeline()
    deliver(line, delivery(1))
    [work] = step(line, Replied(STORE, [Claimed(1, 3)]))
    [apply] = step(line, Worked([(work.items[0][0], Raised(ValueError("no")))]))
    assert apply.ops == [Park("h/1", 1, "attempts used up (3): ValueError: no")]
    [send] = step(line, Replied(STORE, [Applied()]))
    headers = send.items[0][1].properties.headers
    assert (headers["idemp-outcome"], headers["idemp-key"], headers["idemp-attempt"]) == ("parked", "h/1", 3)
    assert (headers["idemp-exchange"], headers["idemp-routing-key"]) == ("events", "foo")


def test_nothing_is_acknowledged_on_a_connection_that_is_gone() -> None:
    """What ran is recorded; the message that comes again waits for it, and is skipped."""
    line = pipeline()
    deliver(line, delivery(1), delivery(2, "2"))
    [work] = step(line, Replied(STORE, [Claimed(1, 1), Claimed(2, 1)]))
    assert step(line, Disconnected()) == []
    [apply] = step(line, Worked([(work.items[0][0], Returned(None, None))]))
    assert apply.ops == [Complete("h/1", 1, None)]
    assert deliver(line, delivery(11), delivery(12, "2")) == []
    assert step(line, Replied(STORE, [Applied()])) == [Acknowledge([11])]
    [apply] = step(line, Worked([(work.items[1][0], NotStarted())]))
    assert apply.ops == [Release("h/2", 2, 0)]
    assert step(line, Replied(STORE, [Applied()])) == [Apply(STORE, [Claim("h/2")])]


def test_a_claim_that_comes_after_the_connection_went_is_given_back() -> None:
    """Nobody would acknowledge it."""
    line = pipeline()
    deliver(line, delivery(1))
    step(line, Disconnected())
    assert step(line, Replied(STORE, [Claimed(1, 1)])) == [Apply(STORE, [Release("h/1", 1, 0)])]
    assert step(line, Replied(STORE, [Applied()])) == []
    assert line.idle()


def test_stop_gives_back_what_did_not_start() -> None:
    """Claims without a start count no attempt; what ran is settled; the rest stays the broker's."""
    line = pipeline()
    deliver(line, delivery(1, "a"), delivery(2, "b"), delivery(3, "b"))
    [work] = step(line, Replied(STORE, [Claimed(1, 1), Claimed(2, 1)]))
    deliver(line, delivery(4, "c"))
    assert step(line, Stop()) == [Cancel()]
    assert deliver(line, delivery(5, "d")) == []
    assert step(line, Replied(STORE, [Claimed(3, 1)])) == [Apply(STORE, [Release("h/c", 3, 0)])]
    first, second = (flight for flight, _ in work.items)
    [apply] = step(line, Worked([(first, Returned(None, None)), (second, NotStarted())]))
    assert apply.ops == [Complete("h/a", 1), Release("h/b", 2, 0)]
    assert step(line, Replied(STORE, [Applied()])) == []
    assert step(line, Replied(STORE, [Applied(), Applied()])) == [Acknowledge([1])]
    assert line.idle()


def test_a_handler_without_policy_runs_at_least_once() -> None:
    """No store; attempts travel in a header."""
    line = pipeline()
    [work] = deliver(line, delivery(1, type="bare"), delivery(2, type="bare", headers={"idemp-attempt": 4}))
    one, two = (flight for flight, _ in work.items)
    [send, ack] = step(line, Worked([(one, Returned(None, None)), (two, Raised(ValueError("x")))]))
    assert ack == Acknowledge([1])
    assert send.items[0][1].routing_key == "q.dead"
    [work] = deliver(line, delivery(3, type="bare"))
    [send] = step(line, Worked([(work.items[0][0], Raised(ValueError("x")))]))
    assert send.items[0][1].properties.headers["idemp-attempt"] == 1
    assert send.items[0][1].delay == 0.5


def test_no_number_of_tries_is_too_big_to_wait_for() -> None:
    """What comes in a header is anybody's, and a resolver that raises uses up no attempt."""
    line = pipeline(attempts=5000)
    assert line._delay(1) < line._delay(10**6) <= MAX_DELAY
    for tag, tried in enumerate((1024, 1 << 31, (1 << 63) - 1), 1):
        [work] = deliver(line, delivery(tag, f"{tag}", type="bare", headers={"idemp-attempt": tried}))
        [send] = step(line, Worked([(work.items[0][0], Raised(ValueError("x")))]))
        assert send.items[0][1].properties.headers["idemp-attempt"] < 1 << 63
    deliver(line, delivery(8, "8", headers={"idemp-attempt": (1 << 63) - 1}))
    [work] = step(line, Replied(STORE, [Claimed(1, 1)]))
    step(line, Worked([(work.items[0][0], Raised(ValueError("x")))]))
    [send] = step(line, Replied(STORE, [Applied()]))
    [(_, copy)] = send.items
    assert copy.delay <= MAX_DELAY
    assert copy.properties.headers["idemp-attempt"] < 1 << 63


def test_a_busy_key_is_looked_at_for_as_long_as_it_takes() -> None:
    """Each second, through days."""
    line = pipeline(wait=1e6)
    deliver(line, delivery(1))
    now = 0.0
    for _ in range(1100):
        step(line, Replied(STORE, [Busy(9, 1, "other", 0.0)]), now)
        now += 1.0
        assert step(line, Tick(), now)


def test_a_key_function_that_raises_rejects_its_message() -> None:
    """The service goes on."""
    line = pipeline(key=lambda message: message.args["order"])
    [send] = deliver(line, delivery(1))
    assert send.items[0][1].properties.headers["idemp-reason"] == "KeyError: 'order'"


def suspects(line: Pipeline) -> list[Any]:
    """Three claims: of a key that is free, and of two that were in doubt twice."""
    deliver(line, delivery(1, "free"), delivery(2, "a"), delivery(3, "b"))
    twice = [Doubt(token, 2, "dead", 0.0) for token in (7, 8)]
    return step(line, Replied(STORE, [Claimed(1, 1), *twice]))


def test_a_suspect_is_run_alone() -> None:
    """It waits for what is claimed; what comes meanwhile waits for it; the next one waits for the first."""
    line = pipeline(attempts=5)
    [work] = suspects(line)
    assert deliver(line, delivery(4, "new"), delivery(5, type="bare")) == []
    [(free, _)] = work.items
    assert step(line, Worked([(free, Returned(None, None))])) == [Apply(STORE, [Complete("h/free", 1)])]
    assert step(line, Replied(STORE, [Applied()])) == [
        Apply(STORE, [Takeover("h/a", 7)]),
        Acknowledge([1]),
    ]
    [work] = step(line, Replied(STORE, [Claimed(9, 3)]))
    assert len(work.items) == 1
    [apply] = step(line, Worked([(work.items[0][0], Returned(None, None))]))
    assert apply.ops == [Complete("h/a", 9)]
    [apply, ack] = step(line, Replied(STORE, [Applied()]))
    assert (apply.ops, ack) == ([Takeover("h/b", 8)], Acknowledge([2]))
    [apply, work] = step(line, Replied(STORE, [Busy(10, 3, "other", 0.0)]))
    assert apply.ops == [Claim("h/new")], "another was faster, so nothing is held back any more"
    assert [flight.message.type for flight, _ in work.items] == ["bare"]


@pytest.mark.parametrize(
    ("options", "attempt"),
    [({"attempts": 5}, 1), ({"attempts": 5, "in_doubt": "park"}, 2)],
)
def test_who_is_no_suspect_is_taken_over_at_once(options: dict[str, Any], attempt: int) -> None:
    """After the first crash all are run as usual; and what is parked is not run at all."""
    line = pipeline(**options)
    deliver(line, delivery(1, "a"), delivery(2, "b"))
    assert step(line, Replied(STORE, [Doubt(7, attempt, "dead", 0.0), Claimed(1, 1)]))[0].ops == [
        Takeover("h/a", 7)
    ]


def test_the_last_attempt_is_made_alone() -> None:
    """Or a neighbour's crash would use it up."""
    line = pipeline(attempts=2)
    deliver(line, delivery(1, "a"), delivery(2, "b"))
    [work] = step(line, Replied(STORE, [Doubt(7, 1, "dead", 0.0), Claimed(1, 1)]))
    assert [flight.key for flight, _ in work.items] == ["h/b"]


@pytest.mark.parametrize("event", [Stop(), Disconnected()])
def test_suspects_and_what_they_hold_back_are_let_go(event: Any) -> None:
    """They hold no claim; the broker hands them out again."""
    line = pipeline(attempts=5)
    [work] = suspects(line)
    deliver(line, delivery(4, "new"))
    step(line, event)
    [(free, _)] = work.items
    [apply] = step(line, Worked([(free, Returned(None, None))]))
    assert apply.ops == [Complete("h/free", 1)]
    assert [type(command) for command in step(line, Replied(STORE, [Applied()]))] in ([], [Acknowledge])
    assert line.idle()
    assert line.names() == []
    if isinstance(event, Disconnected):
        assert deliver(line, delivery(11, "new")) == [Apply(STORE, [Claim("h/new")])]


# ------------------------------------------------------------------ a simulated world


@pytest.mark.parametrize("in_doubt", ["retry", "park", "ask"])
def test_worlds_of_faults(in_doubt: str) -> None:
    """N2, N11: hundreds of small worlds with kills, cut connections, stops, failures and unsure handlers.

    Every message ends done or at hand in the dead letters; no acknowledgement comes before; every
    effect beyond the first belongs to a recorded doubt, and under ``park`` or a resolver there is none.
    """
    did: Counter[str] = Counter()
    doubled = 0
    for seed in range(500):
        world = World(seed, in_doubt=in_doubt)
        world.run()
        did.update(world.did)
        doubled += sum(n - 1 for n in world.effects.values() if n > 1)
    expected = (
        "kill",
        "pause",
        "disconnect",
        "stop",
        "InDoubt",
        "ok",
        "skipped",
        "failed",
        "deferred",
        "lost",
    )
    for what in expected:
        assert did[what] > 30, f"the worlds hardly saw {what}: {did}"
    assert (did["parked"] > 0) == (in_doubt == "park")
    assert (doubled > 0) == (in_doubt == "retry")
