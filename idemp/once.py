"""The heart: `@idempotent`.  Claim, run, complete; a repeated call gets the first answer.

The decisions are in protocol.py; here are the two shells that carry them out for a direct call,
one for ``def`` and one for ``async def``.  The consumer has a third, in batches.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import msgspec

from idemp.causality import current as tracked
from idemp.errors import (
    ClaimLost,
    ConfigError,
    FingerprintConflict,
    IdempError,
    KeyBusy,
    KeyParked,
    SessionLost,
)
from idemp.inbox import Also, Job, transact
from idemp.message import Message, decode
from idemp.offloop import apply_async
from idemp.policy import JSON, Codec, InDoubtPolicy, Policy, Unknown, is_async, make_policy
from idemp.ports import (
    Busy,
    Claimed,
    Clock,
    Done,
    Get,
    Inbox,
    Publication,
    Store,
)
from idemp.protocol import (
    Ask,
    Await,
    Conflict,
    Deferred,
    Failed,
    NotRun,
    NotStarted,
    Ok,
    Overtaken,
    Protocol,
    Raised,
    Refused,
    Returned,
    Run,
    Skipped,
    Verdict,
    protocol,
    repeated,
)

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_IDS = uuid.UUID("6b1f7c52-6f3b-5d0e-9d0a-6d1f4f0e6a11")


class _Pools(NamedTuple):
    """Threads that only wait.

    waiters: waiting duplicates must not take the threads that the ones they wait for need.  transactions: a
    transaction's thread waits for the loop that runs its handler, and for other transactions.
    """

    waiters: ThreadPoolExecutor
    transactions: ThreadPoolExecutor


def _make_pools() -> None:
    """Also in a forked child, where its parent's threads are not, but their pool would count on them."""
    global _pools
    _pools = _Pools(ThreadPoolExecutor(64, "idemp-wait"), ThreadPoolExecutor(64, "idemp-transaction"))


_pools: _Pools
_make_pools()
os.register_at_fork(after_in_child=_make_pools)


# ------------------------------------------------------------------ what a handler can know


class Context(msgspec.Struct, frozen=True):
    """One call.  ``key`` is the handler's name and the message's id; ``attempt`` counts from 1.

    fencing_token: grows with every claim of the key; for stores that can compare it.
    replayed: the handler did not run; this is the first answer again.
    message: the message, in a consumer.
    connection: with ``transaction=True``, the driver's connection with the open transaction.
    letters: what was published so far, where that can be.  send: how it goes out at once, and what stands
    for it; None where it goes with the transaction.
    """

    key: str
    fencing_token: int
    attempt: int
    replayed: bool = False
    message: Message | None = None
    connection: Any = None
    letters: list[Any] | None = None
    send: Callable[[Publication], Any] | None = None

    @property
    def idempotency_key(self) -> str:
        """A UUID made from the key, the same in every attempt: for other people's APIs."""
        return str(uuid.uuid5(_IDS, self.key))

    def publish(
        self, type: str, args: Any, *, exchange: str = "events", routing_key: str | None = None
    ) -> str:
        """Publish a message that follows from this call; its id.

        With ``transaction=True`` it goes out if, and only if, the transaction commits.  Without, in a
        consumer, it is sent at once, and the call is done only when the broker has it safe; what was sent
        by an attempt that raised or died stays sent.  The id is made of the key and the number of the
        message, the same in every attempt, so that a receiver with a store skips the repeat.
        routing_key: the type, if left out.  Raises `ConfigError` in a direct call without a transaction,
        and `BadMessage` for what no consumer would take.
        """
        if self.letters is None:
            raise ConfigError(
                "publish() needs a handler with transaction=True, or one with @idempotent in a consumer;"
                " elsewhere publish by yourself, with an id that is made of context().idempotency_key"
            )
        id = str(uuid.uuid5(_IDS, f"{self.key}/{len(self.letters) + 1}"))
        cause = None if self.message is None else self.message.correlation_id or self.message.id
        message = Message(id, type, args, correlation_id=cause)
        tracker = tracked.get()
        body, properties = message.encode(), message.properties(app_id=None if tracker else "idemp")
        decode(body, properties)
        letter = Publication(body, properties, exchange, type if routing_key is None else routing_key)
        if tracker is not None:
            [letter] = tracker.stamp([letter])
        self.letters.append(letter if self.send is None else self.send(letter))
        return id


_running: ContextVar[Context | None] = ContextVar("idemp_running", default=None)
# As the arguments of `Context`, for most are never asked for.
_latest: ContextVar[tuple[str, int, int, bool] | None] = ContextVar("idemp_latest", default=None)


def context() -> Context:
    """The call that runs around this line; outside of handlers, the latest call that was made here.

    Raises `IdempError` where there was none.
    """
    if (found := _running.get()) is not None:
        return found
    if (latest := _latest.get()) is not None:
        return Context(*latest)
    raise IdempError("context() is for the inside of an idempotent handler, or after a call of one")


class running:
    """`context()` is ``current`` inside.  A class, for it costs a third of a generator on the hot path."""

    __slots__ = ("_before", "_current")

    def __init__(self, current: Context) -> None:
        self._current = current

    def __enter__(self) -> None:
        self._before = _running.set(self._current)

    def __exit__(self, *_: object) -> None:
        _running.reset(self._before)


# ------------------------------------------------------------------ the decorator


def idempotent(
    store: Store,
    *,
    name: str,
    key: str | Callable[..., Any] | None = None,
    fingerprint: str | Callable[..., Any] | None = None,
    on_busy: str = "wait",
    wait: float = 30.0,
    in_doubt: InDoubtPolicy = "retry",
    attempts: int = 5,
    permanent: type[BaseException] | tuple[type[BaseException], ...] = (),
    codec: Codec | None = JSON,
    transaction: bool = False,
    replay: str = "safe",
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function, ``def`` or ``async def``, take effect once per key.

    name: stable name of the handler, part of every key; do not change it while ids are remembered.
    key: the identity of a call: an argument's name, a path in one (``"order.id"``), or a function of
        the arguments; left out, the first argument is a `Message` and its id is it.
    fingerprint: the payload, named like ``key``: the same key with another one is a conflict.
    on_busy: a duplicate of a running call waits for its answer up to ``wait`` seconds (``"wait"``), or
        raises `KeyBusy` at once (``"raise"``; ``"defer"``, which a consumer delivers again later).
    in_doubt: a crash came between run and record: ``"retry"`` runs it again, ``"park"`` sets it aside
        for a person, a function (called like the handler) asks the effect's system and answers
        `Happened`, `NotHappened` or `Unknown`.
    attempts: a handler that raises is run again by later calls, this often; then the key is parked.
    permanent: exceptions that park at once.
    codec: how results are kept; None keeps none, and a repeated call gets None.
    transaction: on SQLite and PostgreSQL: the handler writes on ``context().connection``, in the store's
        database, and its writes and the record commit together or not at all.  It must not end that
        transaction, and may be called again when the server rolled it back.  In ``async def`` the
        connection is the same, which blocks the loop while a statement of it runs.
    replay: whether `idemp replay` may bring a message back to this handler: ``"safe"``, ``"confirm"`` (only
        if a person confirmed it), ``"never"``; a consumer rejects the others.

    The decorated function keeps its signature, has the `Policy` as ``.policy``, and raises what the
    handler raises, or `KeyBusy`, `KeyParked`, `FingerprintConflict`, `ClaimLost`, `SessionLost`,
    `StoreUnavailable`, `BadMessage`.  A wrong option raises `ConfigError` here.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        policy = make_policy(
            function,
            store,
            name=name,
            key=key,
            fingerprint=fingerprint,
            on_busy=on_busy,
            wait=wait,
            in_doubt=in_doubt,
            attempts=attempts,
            permanent=permanent,
            codec=codec,
            transaction=transaction,
            replay=replay,
        )
        return _wrap(function, policy)

    return decorate


def around() -> Message | None:
    """The message whose handler runs around this line, in a consumer."""
    found = _running.get()
    return None if found is None else found.message


def _wrap(function: Callable[P, R], policy: Policy) -> Callable[P, R]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return cast(R, direct(function, policy, args, kwargs))

    @functools.wraps(function)
    async def call_async(*args: P.args, **kwargs: P.kwargs) -> Any:
        return await awaited(function, policy, args, kwargs)

    direct = _call_in_transaction if policy.transaction else _call
    awaited = _call_async_in_transaction if policy.transaction else _call_async
    wrapper = cast(Callable[P, R], call_async if is_async(function) else call)
    wrapper.policy = policy  # type: ignore[attr-defined]
    return wrapper


def policy_of(function: Callable[..., Any]) -> Policy | None:
    """The policy that `idempotent` left on ``function``, if it did."""
    found = getattr(function, "policy", None)
    return found if isinstance(found, Policy) else None


# ------------------------------------------------------------------ a direct call


class _Patience:
    """How long a call goes on waiting for a busy key."""

    def __init__(self, policy: Policy, key: str, clock: Clock) -> None:
        self._store, self._key, self._clock = policy.store, key, clock
        self._end = clock.steady() + policy.wait

    def wait(self, token: int) -> bool:
        """Whether to look again at the key that is busy with ``token``."""
        left = self._left()
        if left > 0:
            self._store.wait(self._key, token, left)
        return left > 0

    async def wait_async(self, token: int) -> bool:
        """`wait`, beside the event loop.  Who has stood in line for a thread looks again all the same."""
        left, loop = self._left(), asyncio.get_running_loop()
        if left > 0:
            await loop.run_in_executor(_pools.waiters, self._store.wait, self._key, token, left)
        return left > 0

    def _left(self) -> float:
        left: float = self._end - self._clock.steady()
        return min(left, 1.0)


def _call(function: Callable[..., Any], policy: Policy, args: Any, kwargs: Any) -> Any:
    key, fingerprint = policy.key(args, kwargs), policy.fingerprint(args, kwargs)
    if (done := policy.store.recall(key)) is not None:
        return _again(policy, key, done, fingerprint)
    steps = protocol(policy, key, fingerprint)
    patience = _Patience(policy, key, Clock())
    verdict = drive(steps, lambda step: _perform(step, function, policy, key, args, kwargs, patience))
    return _answer(policy, key, verdict)


def _call_in_transaction(function: Callable[..., Any], policy: Policy, args: Any, kwargs: Any) -> Any:
    key = policy.key(args, kwargs)
    return _answer(policy, key, _transacted(function, policy, key, args, kwargs))


def _transacted(function: Callable[..., Any], policy: Policy, key: str, args: Any, kwargs: Any) -> Verdict:
    patience = _Patience(policy, key, Clock())
    letters: list[Publication] = []

    def handle(claim: Claimed, connection: Any) -> Any:
        current = Context(key, claim.token, claim.attempt, connection=connection, letters=letters)
        return run_in(policy, function, current, args, kwargs)

    job = Job(
        key,
        functools.partial(protocol, policy, key, policy.fingerprint(args, kwargs)),
        handle,
        lambda claim: ask(policy, Context(key, claim.token, claim.attempt), args, kwargs),
        policy.wait if policy.on_busy == "wait" else 0.0,
        policy.attempts,
        letters,
    )
    while True:
        verdict = transact_in(policy, [job])[0]
        if isinstance(verdict, Deferred) and policy.on_busy == "wait":
            busy = policy.store.apply([Get(key)])[0]
            if patience.wait(busy.token if isinstance(busy, Busy) else 0):
                continue
        return verdict


def transact_in(policy: Policy, jobs: Sequence[Job], also: Also | None = None) -> list[Verdict]:
    """See `idemp.inbox.transact`.  Raises `IdempError` inside of another one."""
    around = _running.get()
    if around is not None and around.connection is not None:
        raise IdempError(
            f"{policy.name} has a transaction of its own and cannot be called in that of {around.key};"
            " publish a message for it instead, or call it afterwards"
        )
    return transact(cast(Inbox, policy.store), jobs, also)


def run_in(policy: Policy, function: Callable[..., Any], current: Context, args: Any, kwargs: Any) -> Any:
    """Call the handler in a transaction, whose own locks are all that it needs: `Returned` or `Raised`."""
    try:
        with running(current):
            value = function(*args, **kwargs)
    except BaseException as error:
        return Raised(error)
    return Returned(value, policy.encode(value))


def drive(steps: Protocol, perform: Callable[[Any], Any], event: Any = None) -> Verdict:
    """Run a protocol to its verdict; ``event`` is what came of the command it waits at."""
    while True:
        try:
            step = steps.send(event)
        except StopIteration as stop:
            return cast(Verdict, stop.value)
        event = perform(step)


def _perform(
    step: Any,
    function: Callable[..., Any],
    policy: Policy,
    key: str,
    args: Any,
    kwargs: Any,
    patience: _Patience,
) -> Any:
    match step:
        case Run(claim):
            return run(policy, function, Context(key, claim.token, claim.attempt), args, kwargs)
        case Ask(claim):
            return ask(policy, Context(key, claim.token, claim.attempt), args, kwargs)
        case Await(busy):
            return patience.wait(busy.token)
    return policy.store.apply([step])[0]


def run(policy: Policy, function: Callable[..., Any], current: Context, args: Any, kwargs: Any) -> Any:
    """Call the handler: `Returned`, `Raised`, or `NotStarted` if the session is stale."""
    if not policy.store.fresh(current.fencing_token):
        return NotStarted()
    try:
        with running(current):
            value = function(*args, **kwargs)
    except BaseException as error:
        return Raised(error)
    return Returned(value, policy.encode(value))


def ask(policy: Policy, current: Context, args: Any, kwargs: Any) -> Any:
    """Call the resolver: its answer, or `Raised`."""
    try:
        with running(current):
            answer = cast(Callable[..., Any], policy.in_doubt)(*args, **kwargs)
            return asyncio.run(answer) if inspect.iscoroutine(answer) else answer
    except Exception as error:
        return Raised(error)


def _again(policy: Policy, key: str, done: Done, fingerprint: bytes | None) -> Any:
    """The first answer, which this process remembers: `_answer` in short."""
    if fingerprint is not None:
        return _answer(policy, key, repeated(done, fingerprint))
    _latest.set((key, done.token, 0, True))
    return policy.decode(done.result)


def _answer(policy: Policy, key: str, verdict: Verdict) -> Any:
    """What the caller gets: the value, or an exception."""
    match verdict:
        case Ok(value, claim):
            _latest.set((key, claim.token, claim.attempt, False))
            return value
        case Skipped(done):
            _latest.set((key, done.token, 0, True))
            return policy.decode(done.result)
        case Conflict():
            raise FingerprintConflict(key)
        case Deferred():
            raise KeyBusy(key)
        case Failed(error) | Refused(error=BaseException() as error):
            raise error
        case Refused(reason):
            raise KeyParked(key, reason)
        case Overtaken():
            raise ClaimLost(key)
        case NotRun():
            raise SessionLost(f"{key!r} was not started: the store was not heard for too long")


# ------------------------------------------------------------------ a direct call, async


async def _call_async(function: Callable[..., Any], policy: Policy, args: Any, kwargs: Any) -> Any:
    key, fingerprint = policy.key(args, kwargs), policy.fingerprint(args, kwargs)
    if (done := policy.store.recall(key)) is not None:
        return _again(policy, key, done, fingerprint)
    steps = protocol(policy, key, fingerprint)
    patience = _Patience(policy, key, Clock())
    event: Any = None
    while True:
        try:
            step = steps.send(event)
        except StopIteration as stop:
            return _answer(policy, key, stop.value)
        match step:
            case Run(claim):
                current = Context(key, claim.token, claim.attempt)
                event = await run_async(policy, function, current, args, kwargs)
            case Ask(claim):
                event = await _ask_async(policy, Context(key, claim.token, claim.attempt), args, kwargs)
            case Await(busy):
                event = await patience.wait_async(busy.token)
            case _:
                event = await apply_async(policy.store, step)


async def _call_async_in_transaction(
    function: Callable[..., Any], policy: Policy, args: Any, kwargs: Any
) -> Any:
    """The transaction is a thread's; the handler runs here, on the caller's loop, while that thread waits.

    Being cancelled cancels the handler; the transaction has ended when this returns.
    """
    key = policy.key(args, kwargs)
    visit = _Visit(function, asyncio.get_running_loop())
    call = functools.partial(_transacted, visit, policy, key, args, kwargs)
    future = visit.loop.run_in_executor(_pools.transactions, contextvars.copy_context().run, call)
    try:
        verdict = await asyncio.shield(future)
    except asyncio.CancelledError:
        visit.cancel()
        await asyncio.gather(future, return_exceptions=True)
        raise
    return _answer(policy, key, verdict)


class _Visit:
    """An ``async def`` as a function for another thread, which runs it on ``loop``."""

    def __init__(self, function: Callable[..., Any], loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._function = function
        self._lock = threading.Lock()
        self._cancelled = False
        self._running: Future[Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            if self._cancelled:
                raise asyncio.CancelledError
            self._running = asyncio.run_coroutine_threadsafe(self._function(*args, **kwargs), self.loop)
        try:
            return self._running.result()
        except CancelledError:
            raise asyncio.CancelledError from None

    def cancel(self) -> None:
        """From the loop: end the handler, or do not begin it."""
        with self._lock:
            self._cancelled = True
            if self._running is not None:
                self._running.cancel()


async def run_async(
    policy: Policy, function: Callable[..., Any], current: Context, args: Any, kwargs: Any
) -> Any:
    """`run` for ``async def``.  Being cancelled is `Raised`, so that the claim is left in doubt."""
    if not policy.store.fresh(current.fencing_token):
        return NotStarted()
    try:
        with running(current):
            value = await function(*args, **kwargs)
    except BaseException as error:
        return Raised(error)
    return Returned(value, policy.encode(value))


async def _ask_async(policy: Policy, current: Context, args: Any, kwargs: Any) -> Any:
    try:
        with running(current):
            answer = cast(Callable[..., Any], policy.in_doubt)(*args, **kwargs)
            return await answer if inspect.isawaitable(answer) else answer
    except asyncio.CancelledError:
        return Unknown("cancelled while asking the resolver")
    except Exception as error:
        return Raised(error)


# ------------------------------------------------------------------ without a decorator


class Step:
    """A block that takes effect once.  ``done``: skip it, ``result`` is the first one's."""

    def __init__(self, done: bool, result: Any) -> None:
        self.done = done
        self.result = result


@contextmanager
def once(store: Store, name: str, identity: str | int | uuid.UUID, **options: Any) -> Iterator[Step]:
    """The block below takes effect once per ``name`` and ``identity``; ``options`` as `idempotent`.

        with once(store, "billing.charge", "A-1") as step:
            if not step.done:
                step.result = charge()
        print(step.result)

    Raises like a call of a decorated function; what the block raises counts as an attempt.
    """
    policy = make_policy(_block, store, name=name, key="identity", **{**_DEFAULTS, **options})
    if policy.transaction:
        raise ConfigError("transaction=True: a block cannot be run again; make it a function and decorate it")
    args = (identity,)
    key = policy.key(args, {})
    steps = protocol(policy, key, None)
    patience = _Patience(policy, key, Clock())

    def perform(step: Any) -> Any:
        return _perform(step, _block, policy, key, args, {}, patience)

    event: Any = None
    try:
        while not isinstance(step := steps.send(event), Run):
            event = perform(step)
    except StopIteration as stop:
        yield Step(done=True, result=_answer(policy, key, stop.value))
        return
    block = Step(done=False, result=None)
    event = NotStarted()
    if store.fresh(step.claim.token):
        try:
            with running(Context(key, step.claim.token, step.claim.attempt)):
                yield block
            event = Returned(block.result, policy.encode(block.result))
        except BaseException as error:
            event = Raised(error)
    _answer(policy, key, drive(steps, perform, event))


def _block(identity: str) -> None:
    """Stands for the block of `once` where a policy wants a function."""


_DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(idempotent).parameters.items()
    if name not in ("store", "name", "key")
}
