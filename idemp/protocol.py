"""The claim protocol: from a key to a verdict, as a generator of commands.  Pure.

`protocol` yields what it wants done and is sent what came of it:

    an operation of ports.py   sent its reply
    `Run`                      sent `Returned`, `Raised` or `NotStarted`
    `Ask`                      sent a resolver's answer, or `Raised`
    `Await`                    sent True to look again, False when the wait is over

It returns a `Verdict`.  A direct call (once.py), the consumer (pipeline.py) and a simulator drive
this same code; it has no thread, socket, clock or sleep.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import msgspec

from idemp.errors import InDoubt, PermanentFailure, RetryLater
from idemp.policy import Happened, NotHappened, Policy, Unknown
from idemp.ports import (
    Abandon,
    Applied,
    Busy,
    Claim,
    Claimed,
    Complete,
    Done,
    Doubt,
    Free,
    Get,
    Op,
    Park,
    Parked,
    Release,
    Reply,
    State,
    Takeover,
)

# ------------------------------------------------------------------ commands


class Run(msgspec.Struct, frozen=True):
    """Call the handler under this claim, if the session is fresh."""

    claim: Claimed


class Ask(msgspec.Struct, frozen=True):
    """Ask the policy's resolver what became of the effect."""

    claim: Claimed


class Await(msgspec.Struct, frozen=True):
    """Wait until the key may have changed."""

    busy: Busy


# ------------------------------------------------------------------ what came of them


class Returned(msgspec.Struct, frozen=True):
    """The handler returned ``value``; ``result`` is what is kept of it."""

    value: Any
    result: bytes | None


class Raised(msgspec.Struct, frozen=True):
    """The handler, or the resolver, raised."""

    error: BaseException


class NotStarted(msgspec.Struct, frozen=True):
    """The handler's first instruction was not reached: stale session, or stopping."""


# ------------------------------------------------------------------ verdicts


class Ok(msgspec.Struct, frozen=True):
    """Ran, and done is durable."""

    value: Any
    claim: Claimed


class Skipped(msgspec.Struct, frozen=True):
    """Done already."""

    done: Done


class Conflict(msgspec.Struct, frozen=True):
    """Done already, with another payload."""


class Failed(msgspec.Struct, frozen=True):
    """Raised; the key is free again, or in doubt with the error `InDoubt`.  ``after``: seconds."""

    error: BaseException
    attempt: int
    after: float | None


class Deferred(msgspec.Struct, frozen=True):
    """Busy for longer than the policy waits."""


class Refused(msgspec.Struct, frozen=True):
    """Parked, now or before.  ``error``: what the handler raised just now, if it did."""

    reason: str
    attempt: int
    error: BaseException | None = None


class Overtaken(msgspec.Struct, frozen=True):
    """The claim was lost while the handler ran."""

    claim: Claimed


class NotRun(msgspec.Struct, frozen=True):
    """The claim was given back before the handler started."""


Command = Op | Run | Ask | Await
Verdict = Ok | Skipped | Conflict | Failed | Deferred | Refused | Overtaken | NotRun
Protocol = Generator[Command, Any, Verdict]


def _of_any_age() -> str:
    """No message is too old."""
    return ""


def protocol(
    policy: Policy,
    key: str,
    fingerprint: bytes | None,
    too_old: Callable[[], str] = _of_any_age,
    *,
    sent_back: bool = False,
) -> Protocol:
    """Take one call of ``key`` to its verdict.

    too_old: why this message must not be run if it is not done already ("" if it may).  It is asked once
    the key is mine: what was done before may have been remembered until then.
    sent_back: a person sent this message back, perhaps after its key was forgotten.  A replica that has
    not heard of that would call it done; `Get` is answered from what the store knows now.
    """
    if sent_back:
        yield Get(key)
    state: State = yield Claim(key)
    while True:
        match state:
            case Claimed():
                if reason := too_old():
                    return (yield from _park(key, state, reason))
                return (yield from _run(policy, key, state, fingerprint))
            case Done():
                return repeated(state, fingerprint)
            case Busy():
                if policy.on_busy != "wait" or not (yield Await(state)):
                    return Deferred()
                state = yield Claim(key)
            case Doubt(token):
                state = yield Takeover(key, token)
                if isinstance(state, Claimed):
                    return (yield from _after_doubt(policy, key, state, fingerprint, too_old()))
            case Parked(_, attempt, reason):
                return Refused(reason, attempt)
            case Free():
                state = yield Claim(key)


def repeated(done: Done, fingerprint: bytes | None) -> Skipped | Conflict:
    """The verdict of a call whose key is done."""
    conflict = fingerprint and done.fingerprint and fingerprint != done.fingerprint
    return Conflict() if conflict else Skipped(done)


def _after_doubt(
    policy: Policy, key: str, claim: Claimed, fingerprint: bytes | None, too_old: str
) -> Protocol:
    """The effect of an earlier attempt may have happened: the policy decides."""
    if policy.in_doubt == "park" or too_old:
        doubt = f"in doubt: attempt {claim.attempt - 1} may have taken effect"
        return (yield from _park(key, claim, f"{doubt}; {too_old}" if too_old else doubt))
    if policy.in_doubt == "retry":
        return (yield from _run(policy, key, claim, fingerprint, doubtful=True))
    answer: object = yield Ask(claim)
    match answer:
        case Happened(value):
            reply: Reply = yield Complete(key, claim.token, policy.encode(value), fingerprint)
            return Ok(value, claim) if isinstance(reply, Applied) else Overtaken(claim)
        case NotHappened():
            return (yield from _run(policy, key, claim, fingerprint, doubtful=True))
        case Unknown(reason):
            return (yield from _park(key, claim, f"in doubt: {reason}"))
        case Raised(error):
            yield Abandon(key, claim.token, claim.attempt - 1)
            return Failed(error, claim.attempt, None)
    yield Abandon(key, claim.token, claim.attempt - 1)
    expected = "Happened, NotHappened or Unknown"
    wrong = TypeError(f"the resolver of {policy.name} answered {answer!r}; expected is {expected}")
    return Failed(wrong, claim.attempt, None)


def _run(
    policy: Policy, key: str, claim: Claimed, fingerprint: bytes | None, *, doubtful: bool = False
) -> Protocol:
    """The key is mine and nothing speaks against running it, but its attempts may be used up."""
    if claim.attempt > policy.attempts:
        used = f"attempts used up: {policy.attempts} began, none is known to have ended"
        return (yield from _park(key, claim, used))
    came: Returned | Raised | NotStarted = yield Run(claim)
    match came:
        case Returned(value, result):
            reply: Reply = yield Complete(key, claim.token, result, fingerprint)
            return Ok(value, claim) if isinstance(reply, Applied) else Overtaken(claim)
        case NotStarted():
            # An earlier attempt that is in doubt must not be forgotten with this one.
            give_back = Abandon if doubtful else Release
            yield give_back(key, claim.token, claim.attempt - 1)
            return NotRun()
        case Raised(error):
            return (yield from _raised(policy, key, claim, error))


def _raised(policy: Policy, key: str, claim: Claimed, error: BaseException) -> Protocol:
    interrupted = not isinstance(error, Exception) and not policy.transaction
    if isinstance(error, InDoubt) or interrupted:
        # Cancelled or interrupted half-way is as uncertain as the handler's own word for it.
        yield Abandon(key, claim.token)
        return Failed(error, claim.attempt, None)
    if isinstance(error, (PermanentFailure, *policy.permanent)):
        return (yield from _park(key, claim, f"permanent failure: {describe(error)}", error))
    if claim.attempt >= policy.attempts:
        used = f"attempts used up ({claim.attempt}): {describe(error)}"
        return (yield from _park(key, claim, used, error))
    yield Release(key, claim.token, claim.attempt)
    return Failed(error, claim.attempt, error.after if isinstance(error, RetryLater) else None)


def _park(key: str, claim: Claimed, reason: str, error: BaseException | None = None) -> Protocol:
    reply: Reply = yield Park(key, claim.token, reason)
    return Refused(reason, claim.attempt, error) if isinstance(reply, Applied) else Overtaken(claim)


def describe(error: BaseException) -> str:
    """An error in one line, for logs and letters."""
    text = spelled(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


def spelled(reason: str) -> str:
    """``reason`` as every broker can carry it: not too long, and Unicode, which JSON's texts need not be."""
    return reason[:1000].encode(errors="backslashreplace").decode()


def doubled(first: float, times: int, longest: float) -> float:
    """Seconds: ``first``, doubled so many times, up to ``longest``."""
    # More would be no float some day: what is tried each five minutes is tried for the 1024th time.
    return min(longest, first * 2.0 ** min(max(times, 0), 64))
