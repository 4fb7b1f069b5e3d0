"""The reader: follows a log without the broker's help; where it stands is its own database's word.

The position is a row that is written in the transaction of the effects: both commit, or neither does.  So it
begins where its last transaction ended, whatever was killed; an empty database reads the log from the first
entry, and rebuilds its state.  One reader at a time gets on by itself; with more of a name nothing happens
twice, for each entry is a key in the store as well.

An entry that can never be handled is put into the outbox as a dead letter for ``<name>-queue.dead``, in the
same transaction, and the log goes on behind it.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import tenacity
from msgspec.structs import replace

from idemp.errors import BadMessage, ConfigError, Unavailable
from idemp.inbox import HELD, Job
from idemp.message import Message, decode
from idemp.once import Context, ask, policy_of, run_in, transact_in
from idemp.policy import Policy
from idemp.ports import (
    Claim,
    Claimed,
    Inbox,
    Log,
    LogEntry,
    Meter,
    NoMeter,
    Publication,
    Release,
    Transaction,
)
from idemp.protocol import (
    Conflict,
    Failed,
    NotStarted,
    Ok,
    Refused,
    Skipped,
    Verdict,
    describe,
    doubled,
    protocol,
    spelled,
)

log = logging.getLogger(__name__)

Handler = TypeVar("Handler", bound=Callable[..., Any])

TOGETHER = 200
"""Entries that share one transaction."""
WAIT = 0.5
"""Seconds that the log is asked to wait for a new entry: the longest that `stop` takes to be seen."""
AGAIN = (0.2, 30.0)
"""Seconds before a failed entry is tried again: at first, and at most."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
_POSITION = re.compile(r"[0-9-]{1,50}")
_TABLE = "CREATE TABLE IF NOT EXISTS idemp_position (reader TEXT PRIMARY KEY, position TEXT NOT NULL)"


class _Step(NamedTuple):
    """An entry on its way.

    job: None for what can never be handled, as ``wrong`` says, and for the same message as one before it.
    """

    entry: LogEntry
    job: Job | None
    kind: str
    wrong: str = ""


class Reader:
    """Runs handlers with ``transaction=True`` for the entries of ``log``, in order.

    name: of the reader; its position is kept under it, and its dead letters go to ``<name>-queue.dead``.
    Counts ``<name>_<type>_ok``, ``_skipped``, ``_failed``, ``_parked``, and ``<name>_rejected``.
    """

    def __init__(self, log: Log, store: Inbox, *, name: str, meter: Meter | None = None) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"name={name!r}: up to 100 letters, digits, dots, dashes and underscores")
        if not callable(getattr(store, "transaction", None)):
            raise ConfigError(f"{store!r} has no transactions; open one with sqlite:/// or postgresql://")
        self.name = name
        self._log, self._store = log, store
        self._meter: Meter = meter or NoMeter()
        self._routes: dict[str, tuple[Callable[..., Any], Policy]] = {}
        self._stopping = threading.Event()
        self._position: str | None = None
        self._failures = 0
        self._proven = False  # until a turn is over: what is read first may have killed who read it before

    def on(self, type: str) -> Callable[[Handler], Handler]:
        """Handle entries of ``type`` with the decorated function, which has ``transaction=True``."""

        def register(function: Handler) -> Handler:
            policy = policy_of(function)
            if policy is None or not policy.transaction or policy.store is not self._store:
                raise ConfigError(
                    f"{type!r}: a reader's handlers are idempotent(store, transaction=True), of its own store"
                )
            self._routes[type] = function.__wrapped__, policy  # type: ignore[attr-defined]
            return function

        return register

    def stop(self) -> None:
        """From any thread: let `run` return, behind the entries that are under way."""
        self._stopping.set()

    def position(self) -> str:
        """The last entry whose effect is on record; "" if none is.  Raises `StoreUnavailable`."""
        if self._position is None:
            self._store.transaction(self._prepare, HELD)
            self._position = self._store.transaction(self._read_position, HELD)
        return self._position

    def run(self, *, until: str | None = None) -> None:
        """Follow the log until `stop`, or to the position ``until``; losses are waited out."""
        while not self._stopping.is_set():
            try:
                self._persistent(until)
                if until is not None and not self._log.behind(until, self.position()):
                    return
            except Unavailable as error:
                log.warning("%s: %s", self.name, error)

    def _persistent(self, until: str | None) -> int:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unavailable),
            wait=tenacity.wait_random_exponential(0.2, max=10),
            stop=tenacity.stop_when_event_set(self._stopping),
            sleep=tenacity.sleep_using_event(self._stopping),
            reraise=True,
        )
        return retrying(self.turn, 0.0 if until is not None else WAIT)

    def turn(self, wait: float = 0.0) -> int:
        """One transaction: read what is next, handle it, move on; how many entries are behind it now.

        wait: seconds for a first entry.  Raises `StoreUnavailable`, `TransportUnavailable`.
        """
        entries = self._log.read(self.position(), TOGETHER, wait)
        if not entries:
            return 0
        batch = _Batch(self, self._steps(entries))
        jobs = [step.job for step in batch.steps if step.job is not None]
        if jobs:
            transact_in(self._policy(), jobs, batch.also)
        else:
            self._store.transaction(lambda transaction: batch.also(transaction, [], []), HELD)
        return self._moved(batch)

    def _moved(self, batch: _Batch) -> int:
        passed, self._proven = batch.passed(), True
        for name, n in batch.counts(passed).items():
            self._meter.count(f"{self.name}_{name}", n)
        if passed:
            self._failures = 0
            self._position = batch.steps[passed - 1].entry.position
            self._log.tell(self.name, self._position)
        if passed < len(batch.steps):
            self._hold_on(batch, passed)
        return passed

    def _hold_on(self, batch: _Batch, place: int) -> None:
        """An entry is to be tried again, and the order is kept: nothing behind it goes on."""
        step = batch.steps[place]
        verdict = batch.verdicts.get(step.entry.position)
        self._failures += 1
        delay = doubled(AGAIN[0], self._failures - 1, AGAIN[1])
        if isinstance(verdict, Failed):
            self._meter.count(f"{self.name}_{step.kind}_failed")
            log.warning("%s: %s failed: %s", self.name, step.entry.position, describe(verdict.error))
            delay = delay if verdict.after is None else verdict.after
        self._stopping.wait(delay)

    # ---------------------------------------------------------------- entries

    def _policy(self) -> Policy:
        return next(iter(self._routes.values()))[1]

    def _steps(self, entries: Sequence[LogEntry]) -> list[_Step]:
        seen: set[str] = set()
        steps = [self._step(entry) for entry in entries]
        for place, step in enumerate(steps):
            if step.job is not None and step.job.key in seen:
                steps[place] = step._replace(job=None)
            elif step.job is not None:
                seen.add(step.job.key)
        return steps

    def _step(self, entry: LogEntry) -> _Step:
        try:
            message = decode(entry.body, entry.properties)
            route = self._routes.get(message.type)
            if route is None:
                raise BadMessage(f"no handler for type {message.type!r}")
            return _Step(entry, self._job(message, *route), message.type)
        except BadMessage as error:
            return _Step(entry, None, "", str(error))

    def _job(self, message: Message, function: Callable[..., Any], policy: Policy) -> Job:
        key, fingerprint = _identity(policy, message)
        letters: list[Publication] = []

        def call(claim: Claimed, connection: Any) -> Any:
            if self._stopping.is_set():
                return NotStarted()
            known = (key, claim.token, claim.attempt)
            current = Context(*known, message=message, connection=connection, letters=letters)
            return run_in(policy, function, current, (message,), {})

        def ask_it(claim: Claimed) -> Any:
            context = Context(key, claim.token, claim.attempt, message=message)
            return ask(policy, context, (message,), {})

        begin = partial(protocol, policy, key, fingerprint)
        return Job(key, begin, call, ask_it, HELD, policy.attempts, letters, again=not self._proven)

    # ---------------------------------------------------------------- the position

    def _prepare(self, transaction: Transaction) -> None:
        # One at a time: who makes the table meanwhile would fail.  The claim is held until the commit.
        [claim] = transaction.apply([Claim("idemp_position")])
        transaction.connection.execute(_TABLE)
        if isinstance(claim, Claimed):
            transaction.apply([Release("idemp_position", claim.token, 0)])

    def _read_position(self, transaction: Transaction) -> str:
        found = transaction.connection.execute(
            f"SELECT position FROM idemp_position WHERE reader = '{self.name}'"
        ).fetchone()
        return str(found[0]) if found else ""

    def move(self, transaction: Transaction, position: str) -> None:
        """Write the position, unless another reader of this name has read more."""
        if not _POSITION.fullmatch(position):
            raise ConfigError(f"{position!r} is no position of a log")
        if self._log.behind(position, self._read_position(transaction)):
            transaction.connection.execute(
                f"INSERT INTO idemp_position VALUES ('{self.name}', '{position}')"
                " ON CONFLICT (reader) DO UPDATE SET position = excluded.position"
            )


def _identity(policy: Policy, message: Message) -> tuple[str, bytes | None]:
    """Key and fingerprint; what the handler's own functions raise rejects the entry."""
    try:
        return policy.key((message,), {}), policy.fingerprint((message,), {})
    except BadMessage:
        raise
    except Exception as error:
        raise BadMessage(describe(error)) from None


class _Batch:
    """Entries that were read together, and what is known of each."""

    def __init__(self, reader: Reader, steps: Sequence[_Step]) -> None:
        self.steps = steps
        self.verdicts: dict[str, Verdict] = {}
        self._reader = reader
        self._put: set[str] = set()

    def also(self, transaction: Transaction, jobs: Sequence[Job], verdicts: Sequence[Verdict]) -> None:
        """In the transaction of ``jobs``: the position behind all that is over, and the dead letters."""
        found = dict(zip((job.key for job in jobs), verdicts, strict=True))
        before = self.passed()
        for step in self.steps:
            if step.job is not None and step.job.key in found:
                self.verdicts[step.entry.position] = found[step.job.key]
        passed = self.passed()
        if len(jobs) == len([step for step in self.steps if step.job]):
            before = 0  # the whole batch, perhaps anew: what a rolled back one had put is gone
        for step in self.steps[before:passed]:
            if letter := self._letter(step):
                transaction.put(f"{self._reader.name}@{step.entry.position}", [letter])
        if passed:
            self._reader.move(transaction, self.steps[passed - 1].entry.position)

    def passed(self) -> int:
        """How many entries from the first on are over."""
        for place, step in enumerate(self.steps):
            over = isinstance(self.verdicts.get(step.entry.position), Ok | Skipped | Refused | Conflict)
            if step.job is not None and not over:
                return place
        return len(self.steps)

    def counts(self, passed: int) -> dict[str, int]:
        """Of the first ``passed``: names of counters."""
        counts: dict[str, int] = {}
        for step in self.steps[:passed]:
            name = self._outcome(step)
            counted = name if name == "rejected" else f"{step.kind}_{name}"
            counts[counted] = counts.get(counted, 0) + 1
        return counts

    def _outcome(self, step: _Step) -> str:
        match self.verdicts.get(step.entry.position):
            case None:
                return "rejected" if step.wrong else "skipped"
            case Ok():
                return "ok"
            case Refused():
                return "parked"
            case Conflict():
                return "conflict"
        return "skipped"

    def _letter(self, step: _Step) -> Publication | None:
        """Its dead letter, as a consumer would write it; None if it is done."""
        outcome = self._outcome(step)
        if outcome in ("ok", "skipped"):
            return None
        verdict = self.verdicts.get(step.entry.position)
        reason, attempt = step.wrong, 0
        if isinstance(verdict, Refused):
            reason, attempt = verdict.reason, verdict.attempt
        elif isinstance(verdict, Conflict):
            reason = "done already, with another payload"
        queue = f"{self._reader.name}-queue"
        headers = {
            **step.entry.properties.headers,
            "idemp-outcome": outcome,
            "idemp-reason": spelled(reason),
            "idemp-key": step.job.key if step.job else "",
            "idemp-attempt": attempt,
            "idemp-queue": queue,
        }
        properties = replace(step.entry.properties, headers=headers)
        return Publication(step.entry.body, properties, "", f"{queue}.dead")
