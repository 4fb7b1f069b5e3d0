"""`@idempotent` and `once`: direct calls, on a real store."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
import time
import typing
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import fastapi
import httpx
import pytest
from fastapi import Header

import idemp
from idemp import (
    BadMessage,
    ClaimLost,
    ConfigError,
    FingerprintConflict,
    Happened,
    IdempError,
    InDoubt,
    KeyBusy,
    KeyParked,
    Message,
    NotHappened,
    PermanentFailure,
    SessionLost,
    Unknown,
    context,
    idempotent,
    once,
    open_store,
)
from idemp.errors import StoreUnavailable
from idemp.policy import MAX_RESULT
from idemp.ports import Abandon, Claim, Claimed, Complete, Doubt, Free, Get, Parked, Store, Takeover


@pytest.fixture(params=["memory://", "sqlite:///{}/seen.db"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """Each embedded store."""
    opened = open_store(request.param.format(tmp_path))
    yield opened
    opened.close()


def state(store: Store, key: str) -> Any:
    return store.apply([Get(key)])[0]


def ran(k: str) -> Any:
    return "ran"


def in_doubt(store: Store, key: str) -> None:
    """Leave ``key`` as a crash between effect and record leaves it."""
    claim = store.apply([Claim(key)])[0]
    assert isinstance(claim, Claimed)
    store.apply([Abandon(key, claim.token)])


# ------------------------------------------------------------------ once


def test_the_second_call_gets_the_first_answer(store: Store) -> None:
    """The quickstart of the README."""
    calls = []

    @idempotent(store, name="billing.charge", key="order_id")
    def charge(order_id: str, cents: int) -> dict[str, Any]:
        calls.append(cents)
        return {"receipt": order_id}

    assert charge("A-1", 500) == {"receipt": "A-1"}
    assert not context().replayed
    assert charge("A-1", 500) == {"receipt": "A-1"}
    assert context().replayed
    assert charge(order_id="A-2", cents=7) == {"receipt": "A-2"}
    assert calls == [500, 7]


@pytest.mark.parametrize("value", [None, 0, "", [], {}, False, 0.0, "text", [1, {"a": None}]])
def test_a_falsy_result_is_a_result(store: Store, value: Any) -> None:
    """Nothing is confused with no answer."""
    calls = []

    @idempotent(store, name="n", key="k")
    def handler(k: str) -> Any:
        calls.append(k)
        return value

    assert [handler("a"), handler("a")] == [value, value]
    assert type(handler("a")) is type(value)
    assert calls == ["a"]


def test_two_handlers_do_not_share_a_key(store: Store) -> None:
    """The name is part of the key."""

    def handler(k: str) -> str:
        return context().key

    first, second = (idempotent(store, name=name, key="k")(handler) for name in ("a.x", "a.y"))
    assert (first("1"), second("1")) == ("a.x/1", "a.y/1")


def test_simultaneous_calls_run_once_and_all_get_the_answer(store: Store) -> None:
    """A duplicate waits for the one that runs."""
    runs: Counter[str] = Counter()

    @idempotent(store, name="n", key="k")
    def slow(k: str) -> int:
        runs[k] += 1
        time.sleep(0.05)
        return 42

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(slow, ["a", "b", "c", "d"] * 8))
    assert answers == [42] * 32
    assert set(runs.values()) == {1}


def test_a_handler_that_raises_runs_again_up_to_its_attempts(store: Store) -> None:
    """The error is the caller's; then the key is parked and the handler is left alone."""
    attempts = []

    @idempotent(store, name="n", key="k", attempts=3)
    def handler(k: str) -> None:
        attempts.append(context().attempt)
        raise ValueError("no\nluck")

    for _ in range(3):
        with pytest.raises(ValueError, match="luck"):
            handler("a")
    for _ in range(2):
        with pytest.raises(KeyParked, match=r"attempts used up \(3\): ValueError: no luck"):
            handler("a")
    assert attempts == [1, 2, 3]


def test_a_permanent_failure_parks_at_once(store: Store) -> None:
    """By the handler's word, or by an exception named in ``permanent``."""

    @idempotent(store, name="n", key="k", permanent=(ZeroDivisionError,))
    def handler(k: str) -> float:
        if k == "a":
            raise PermanentFailure("card declined")
        return 1 / 0

    with pytest.raises(PermanentFailure):
        handler("a")
    with pytest.raises(ZeroDivisionError):
        handler("b")
    assert state(store, "n/a").reason == "permanent failure: PermanentFailure: card declined"
    with pytest.raises(KeyParked):
        handler("b")


# ------------------------------------------------------------------ keys


@dataclass
class Order:
    id: str
    lines: dict[str, str]


def test_keys_by_name_path_and_function(store: Store) -> None:
    """Positional, by keyword, by default; through mappings and attributes."""

    def handler(order: Any, n: int = 5, *rest: Any, tag: str = "t", **more: Any) -> str:
        return context().key

    def keyed(key: Any) -> Callable[..., str]:
        return idempotent(store, name=f"n{uuid.uuid4().hex}", key=key)(handler)

    def name(key: str) -> str:
        return key.partition("/")[2]

    assert name(keyed("order.id")(Order("A", {}))) == "A"
    assert name(keyed("order.lines.x")(order=Order("A", {"x": "X"}))) == "X"
    assert name(keyed("n")(None)) == "5"
    assert name(keyed("n")(None, 6)) == "6"
    assert name(keyed("tag")(None, 6, 7, tag="z")) == "z"
    assert name(keyed("tag")(None)) == "t"
    assert name(keyed(lambda order, n: f"{order}-{n}")("o", 3)) == "o-3"
    assert name(keyed(lambda order: order)(uuid.UUID(int=1))) == "00000000-0000-0000-0000-000000000001"
    assert name(keyed("order")("../..//x\n")) == "../..//x\n"


@pytest.mark.parametrize("bad", [None, "", 1.5, True, b"x", ["x"], "\ud800", "x" * 3000])
def test_a_key_that_is_none_is_refused(store: Store, bad: Any) -> None:
    """Nothing runs, so nothing runs unprotected."""
    calls = []
    handler = idempotent(store, name="n", key="k")(lambda k: calls.append(k))

    with pytest.raises(BadMessage):
        handler(bad)
    assert calls == []


@pytest.mark.parametrize("digits", [1025, 5000])
def test_a_number_of_too_many_digits_is_no_key(store: Store, digits: int) -> None:
    """Of more than Python turns into text, too."""
    handler = idempotent(store, name="n", key="k")(lambda k: None)
    with pytest.raises(BadMessage, match="a number of more than 1024 digits"):
        handler(-(10 ** (digits - 1)))


def test_a_missing_path_names_itself(store: Store) -> None:
    """The error says what was looked for."""
    handler = idempotent(store, name="n", key="order.customer.id")(lambda order: None)

    with pytest.raises(BadMessage, match=r"no order\.customer\.id in this call: 'customer' is missing"):
        handler({"id": "A"})


def test_without_key_the_message_is_it(store: Store) -> None:
    """The form that consumers use works as a plain call too."""
    handler = idempotent(store, name="n")(lambda message: message.id)

    assert handler(Message("1", "t")) == "1"
    assert state(store, "n/1").result == b'"1"'
    with pytest.raises(ConfigError, match="say which argument is its key="):
        handler("1")


# ------------------------------------------------------------------ what may be decorated


def test_the_signature_is_kept(store: Store) -> None:
    """For people, tools and type checkers; and the policy can be read."""

    def handler(order_id: str, cents: int = 3) -> dict[str, int]:
        """Charge."""
        return {order_id: cents}

    wrapped = idempotent(store, name="n", key="order_id")(handler)

    assert inspect.signature(wrapped) == inspect.signature(handler)
    assert (wrapped.__name__, wrapped.__doc__) == ("handler", "Charge.")
    assert typing.get_type_hints(wrapped) == typing.get_type_hints(handler)
    assert wrapped.policy.attempts == 5  # type: ignore[attr-defined]


class Shop:
    def __init__(self, store: Store) -> None:
        self.calls: list[str] = []
        self.partial = idempotent(store, name="shop.partial", key="b")(functools.partial(self.add, "x"))
        self.object = idempotent(store, name="shop.object", key="k")(Callable_(self.calls))

    def add(self, a: str, b: str) -> str:
        self.calls.append(a + b)
        return a + b


class Callable_:
    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def __call__(self, k: str) -> str:
        self.calls.append(k)
        return k


def test_any_callable(store: Store) -> None:
    """Methods, partials, objects with ``__call__``, builtins."""
    shop = Shop(store)
    assert [shop.partial("1"), shop.partial("1"), shop.object("2"), shop.object("2")] == [
        "x1",
        "x1",
        "2",
        "2",
    ]
    assert shop.calls == ["x1", "2"]

    class Counting:
        n = 0

        @idempotent(store, name="counting.up", key="k")
        def up(self, k: str) -> int:
            self.n += 1
            return self.n

        @staticmethod
        @idempotent(store, name="counting.static", key="k")
        def static(k: str) -> str:
            return k

    counting = Counting()
    assert [counting.up("a"), counting.up("a"), counting.up(k="b"), counting.static("s")] == [1, 1, 2, "s"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": ""}, "name=''"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"key": "nope"}, "has no argument 'nope'; it has k, v"),
        ({"key": 3}, "key=3"),
        ({"fingerprint": "nope.x"}, "fingerprint='nope.x'"),
        ({"on_busy": "skip"}, "on_busy='skip': choose"),
        ({"in_doubt": "rerun"}, "in_doubt='rerun': choose"),
        ({"attempts": 0}, "attempts=0"),
        ({"attempts": "3"}, "attempts='3'"),
        ({"wait": -1}, "wait=-1"),
        ({"permanent": (3,)}, "permanent="),
        ({"store": "sqlite:///seen.db"}, "is no store; open one with open_store"),
    ],
)
def test_a_wrong_option_fails_at_decoration(options: dict[str, Any], sentence: str) -> None:
    """Not at the first message."""
    given = {"store": open_store("memory://"), "name": "n", "key": "k", **options}

    with pytest.raises(ConfigError, match=sentence.replace("(", r"\(")):
        idempotent(**given)(lambda k, v: None)


def test_what_cannot_be_recorded_is_refused_at_decoration() -> None:
    """Generators return before they do anything; a handler without key needs a message."""
    store = open_store("memory://")

    def generator(k: str) -> Iterator[str]:
        yield k

    with pytest.raises(ConfigError, match="generator"):
        idempotent(store, name="n", key="k")(generator)
    with pytest.raises(ConfigError, match="takes no message"):
        idempotent(store, name="n")(lambda: None)
    with pytest.raises(TypeError):
        idempotent(store, name="n", retries=3)  # type: ignore[call-arg]


# ------------------------------------------------------------------ fingerprints and results


def test_the_same_key_with_another_payload_is_a_conflict(store: Store) -> None:
    """And the first result stays what it was."""

    @idempotent(store, name="n", key="k", fingerprint="order")
    def handler(k: str, order: Any) -> int:
        return len(order)

    assert handler("a", {"x": 1, "y": Decimal("2.5")}) == 2
    assert handler("a", {"y": Decimal("2.5"), "x": 1}) == 2
    with pytest.raises(FingerprintConflict, match="'n/a' is done already, with another payload"):
        handler("a", {"x": 1})
    assert handler("a", {"x": 1, "y": Decimal("2.5")}) == 2


def test_a_result_that_cannot_be_kept_never_fails_the_call(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """Done is recorded without it, and a log line says so."""
    calls = []

    @idempotent(store, name="n", key="k")
    def handler(k: str) -> Any:
        calls.append(k)
        return {"object": object(), "big": "x" * (MAX_RESULT + 1), "model": Order("A", {})}[k]

    for k in ("object", "big"):
        first, again = handler(k), handler(k)
        assert first is not None
        assert again is None
    assert handler("model") == Order("A", {})
    assert handler("model") == {"id": "A", "lines": {}}
    assert calls == ["object", "big", "model"]
    assert "cannot be encoded" in caplog.text
    assert "without its result of 65539 bytes" in caplog.text


# ------------------------------------------------------------------ busy


def test_on_busy_raise_and_wait_time_out(store: Store) -> None:
    """`KeyBusy` at once, or when the wait is over."""
    entered, leave = threading.Event(), threading.Event()

    def slow(k: str) -> str:
        entered.set()
        leave.wait(20)
        return "first"

    first = idempotent(store, name="n", key="k")(slow)
    impatient = idempotent(store, name="n", key="k", on_busy="raise")(slow)
    waiting = idempotent(store, name="n", key="k", wait=0.1)(slow)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(first, "a")
        assert entered.wait(10)
        for duplicate in (impatient, waiting):
            with pytest.raises(KeyBusy, match="'n/a'"):
                duplicate("a")
        leave.set()
        assert future.result() == "first"
    assert impatient("a") == "first"


# ------------------------------------------------------------------ in doubt


def test_in_doubt_retry_runs_again(store: Store) -> None:
    """The default; the attempt counts."""
    in_doubt(store, "n/a")
    handler = idempotent(store, name="n", key="k")(lambda k: context().attempt)

    assert handler("a") == 2


def test_in_doubt_park_waits_for_a_person(store: Store) -> None:
    """The handler is not run; the reason names the attempt."""
    in_doubt(store, "n/a")
    calls = []
    handler = idempotent(store, name="n", key="k", in_doubt="park")(lambda k: calls.append(k))

    for _ in range(2):
        with pytest.raises(KeyParked, match="in doubt: attempt 1 may have taken effect"):
            handler("a")
    assert calls == []


@pytest.mark.parametrize(
    "answer", [Happened({"id": 7}), NotHappened(), Unknown("the bank is closed"), "yes", None]
)
def test_a_resolver_decides(store: Store, answer: Any) -> None:
    """Done with the result, run, park; an answer that is none leaves the key in doubt."""
    in_doubt(store, "n/a")
    asked = []

    def resolver(k: str) -> Any:
        asked.append((k, context().idempotency_key, context().attempt))
        return answer

    handler = idempotent(store, name="n", key="k", in_doubt=resolver)(ran)

    match answer:
        case Happened():
            assert [handler("a"), handler("a")] == [{"id": 7}, {"id": 7}]
        case NotHappened():
            assert [handler("a"), handler("a")] == ["ran", "ran"]
        case Unknown():
            with pytest.raises(KeyParked, match="in doubt: the bank is closed"):
                handler("a")
        case _:
            with pytest.raises(TypeError, match="Happened, NotHappened or Unknown"):
                handler("a")
            assert isinstance(state(store, "n/a"), Doubt)
    assert [k for k, _, _ in asked] == ["a"]


def test_a_resolver_that_raises_leaves_the_doubt(store: Store) -> None:
    """The effect's system is down: ask it again with the next call."""
    in_doubt(store, "n/a")
    answers: list[Any] = [ConnectionError("no"), Happened(1)]

    def resolver(k: str) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    handler = idempotent(store, name="n", key="k", in_doubt=resolver)(ran)
    with pytest.raises(ConnectionError):
        handler("a")
    assert isinstance(state(store, "n/a"), Doubt)
    assert handler("a") == 1


def test_crashes_use_up_attempts(store: Store) -> None:
    """A message that kills its process is parked in the end."""
    handler = idempotent(store, name="n", key="k", attempts=2)(lambda k: "ran")
    token = store.apply([Claim("n/a")])[0].token  # type: ignore[union-attr]
    for _ in range(1):
        store.apply([Abandon("n/a", token)])
        token = store.apply([Takeover("n/a", token)])[0].token  # type: ignore[union-attr]
    store.apply([Abandon("n/a", token)])

    with pytest.raises(KeyParked, match="attempts used up: 2 began"):
        handler("a")


def test_a_handler_can_say_in_doubt(store: Store) -> None:
    """And so can an interrupt: half-way is as uncertain."""

    @idempotent(store, name="n", key="k", in_doubt="park")
    def handler(k: str) -> None:
        raise InDoubt("the bank did not answer") if k == "a" else KeyboardInterrupt

    with pytest.raises(InDoubt):
        handler("a")
    with pytest.raises(KeyboardInterrupt):
        handler("b")
    for k in "ab":
        assert isinstance(state(store, f"n/{k}"), Doubt)
        with pytest.raises(KeyParked):
            handler(k)


def test_a_claim_taken_over_while_it_ran_is_lost(store: Store) -> None:
    """The late one changes nothing: the record is the taker's."""

    @idempotent(store, name="n", key="k")
    def handler(k: str) -> str:
        token = context().fencing_token
        store.apply([Abandon("n/a", token)])
        taken = store.apply([Takeover("n/a", token)])[0]
        assert isinstance(taken, Claimed)
        assert taken.token > token
        store.apply([Complete("n/a", taken.token, b'"taker"')])
        return "late"

    with pytest.raises(ClaimLost):
        handler("a")
    assert handler("a") == "taker"


class Stale:
    """A store whose session has not been confirmed for too long when the handler would start."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def fresh(self, token: int = 0) -> bool:
        return False


def test_a_stale_session_starts_no_handler(store: Store) -> None:
    """The claim goes back as if it had not been; a doubt stays a doubt."""
    calls = []
    handler = idempotent(Stale(store), name="n", key="k")(lambda k: calls.append(k))

    with pytest.raises(SessionLost):
        handler("a")
    assert state(store, "n/a") == Free(0)
    in_doubt(store, "n/b")
    with pytest.raises(SessionLost):
        handler("b")
    assert isinstance(state(store, "n/b"), Doubt)
    assert calls == []


# ------------------------------------------------------------------ context


def test_the_context_of_a_call(store: Store) -> None:
    """A key for other people's APIs that is the same in each attempt, and a token that grows."""
    seen = []

    @idempotent(store, name="n", key="k")
    def handler(k: str) -> None:
        seen.append(context())
        if len(seen) == 1:
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - it is the handler's own
        handler("a")
    handler("a")
    assert seen[0].idempotency_key == seen[1].idempotency_key
    assert uuid.UUID(seen[0].idempotency_key)
    assert seen[0].fencing_token < seen[1].fencing_token
    assert [c.attempt for c in seen] == [1, 2]


def test_a_nested_call_does_not_disturb_the_context(store: Store) -> None:
    """After an inner call the outer handler still has its own key."""
    inner = idempotent(store, name="inner", key="k")(lambda k: context().key)

    @idempotent(store, name="outer", key="k")
    def outer(k: str) -> list[str]:
        return [context().key, inner(k), context().key]

    assert outer("1") == ["outer/1", "inner/1", "outer/1"]


def test_there_is_no_context_elsewhere() -> None:
    """The error says where it is."""

    def look() -> str:
        with pytest.raises(IdempError, match="inside of an idempotent handler"):
            context()
        return "fine"

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(look).result() == "fine"


# ------------------------------------------------------------------ async


def test_async_runs_once(store: Store) -> None:
    """A hundred tasks, one run; it stays a coroutine function."""
    runs = []

    @idempotent(store, name="n", key="k")
    async def handler(k: str) -> int:
        runs.append(k)
        await asyncio.sleep(0.05)
        return context().attempt

    async def main() -> list[int]:
        return await asyncio.gather(*(handler("a") for _ in range(100)))

    assert inspect.iscoroutinefunction(handler)
    assert asyncio.run(main()) == [1] * 100
    assert runs == ["a"]


def test_a_cancelled_call_is_in_doubt(store: Store) -> None:
    """And the policy decides at the next one."""
    started = asyncio.Event()

    @idempotent(store, name="n", key="k")
    async def handler(k: str) -> int:
        if context().attempt == 1:
            started.set()
            await asyncio.sleep(30)
        return context().attempt

    async def main() -> int:
        task = asyncio.create_task(handler("a"))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert isinstance(state(store, "n/a"), Doubt)
        return await handler("a")

    assert asyncio.run(main()) == 2


class Slow:
    """A store that answers late."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def apply(self, ops: Any) -> Any:
        replies = self._store.apply(ops)
        time.sleep(0.2)
        return replies


@pytest.mark.parametrize("before", ["free", "doubt"])
def test_cancelled_while_claiming_gives_the_claim_back(store: Store, before: str) -> None:
    """The claim was won in another thread when nobody listened any more."""
    calls = []
    if before == "doubt":
        in_doubt(store, "n/a")

    @idempotent(Slow(store), name="n", key="k")
    async def handler(k: str) -> None:
        calls.append(k)

    async def main() -> None:
        task = asyncio.create_task(handler("a"))
        await asyncio.sleep(0.1 if before == "free" else 0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.4)

    asyncio.run(main())
    assert calls == []
    assert state(store, "n/a") == Free(0) if before == "free" else isinstance(state(store, "n/a"), Doubt)


def test_async_resolver_and_errors(store: Store) -> None:
    """A resolver may be async too."""
    in_doubt(store, "n/a")

    async def resolver(k: str) -> Any:
        await asyncio.sleep(0)
        return Happened("found")

    @idempotent(store, name="n", key="k", in_doubt=resolver, attempts=1)
    async def handler(k: str) -> None:
        raise ValueError(k)

    async def main() -> Any:
        with pytest.raises(ValueError, match="b"):
            await handler("b")
        return await handler("a")

    assert asyncio.run(main()) == "found"
    assert isinstance(state(store, "n/b"), Parked)


def test_fastapi(store: Store) -> None:
    """The quickstart of the README, served for real."""
    app = fastapi.FastAPI()
    placed = []

    @app.post("/orders")
    @idempotent(store, name="orders.create", key="idempotency_key", fingerprint="order", on_busy="raise")
    async def create(order: dict[str, Any], idempotency_key: str = Header()) -> dict[str, Any]:
        placed.append(order)
        return {"number": len(placed)}

    async def main() -> None:
        headers = {"Idempotency-Key": "K"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
            posts = [client.post("/orders", json={"sku": 1}, headers=headers) for _ in range(2)]
            answers = [await post for post in posts]
            assert [answer.json() for answer in answers] == [{"number": 1}] * 2
            assert (await client.post("/orders", json={"sku": 1})).status_code == 422
            with pytest.raises(FingerprintConflict):
                await client.post("/orders", json={"sku": 2}, headers=headers)

    asyncio.run(main())
    assert placed == [{"sku": 1}]


# ------------------------------------------------------------------ the block form


def test_a_block_takes_effect_once(store: Store) -> None:
    """``with once(...)``: the same promise without a function."""
    ran = []
    results = []
    for _ in range(2):
        with once(store, "billing.charge", "A-1") as step:
            if not step.done:
                ran.append(context().attempt)
                step.result = {"receipt": 1}
        results.append(step.result)

    assert results == [{"receipt": 1}] * 2
    assert ran == [1]


def test_a_block_that_raises_is_an_attempt(store: Store) -> None:
    """And an interrupted one is in doubt."""
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), once(store, "n", "a", attempts=2):
            _ = 1 / 0
    with pytest.raises(KeyParked), once(store, "n", "a"):
        raise AssertionError("not reached")
    with pytest.raises(KeyboardInterrupt), once(store, "n", "b"):
        raise KeyboardInterrupt
    assert isinstance(state(store, "n/b"), Doubt)
    with pytest.raises(ConfigError), once(store, "n", "c", attempts=0):
        raise AssertionError("not reached")


# ------------------------------------------------------------------ a store that is away


def test_a_store_that_is_away_runs_nothing(tmp_path: Path) -> None:
    """Closed is the only failure mode: no protection, no effect."""
    broken = tmp_path / "no" / "seen.db"
    calls = []
    handler = idempotent(open_store(f"sqlite:///{broken}"), name="n", key="k")(lambda k: calls.append(k))

    with pytest.raises(ConfigError, match=r"the folder of .* does not exist"):
        handler("a")
    assert calls == []


def test_public_names_are_whole() -> None:
    """Everything offered exists, sorted."""
    assert sorted(idemp.__all__) == idemp.__all__
    assert all(hasattr(idemp, name) for name in idemp.__all__)
    assert StoreUnavailable in (idemp.StoreUnavailable,)
