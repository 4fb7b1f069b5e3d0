"""The inbox: calls whose mark and effects are one transaction of the handler's own database.

The same claim protocol (protocol.py) as elsewhere, with every operation of it in the transaction in which
the handler writes, so that nobody ever sees a claim of it and nothing of it is ever in doubt:

    the process dies                        what is left
    before or in the handler                nothing: the database rolled back; it runs again
    after the handler, before the commit    nothing: the same
    after the commit                        effects and mark: whoever repeats it gets the first answer
    the commit's reply is lost              either; the key is looked up in a new transaction, which waits
                                            until the old one has ended: done is done, free runs again

Many calls share one transaction, each with a savepoint.  A handler that raises loses its own writes only,
and its attempt is recorded with the rest.

A call that kills its process would leave no attempt, for that rolls back too.  So of one whose message was
delivered before, each attempt is counted in a transaction of its own that commits first: as if it had raised.
They share a transaction once more; those that were counted before, or have one attempt left, go alone.
Then only the guilty one uses up its attempts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from msgspec.structs import replace

from idemp.errors import Contended, IdempError, KeyBusy, PermanentFailure
from idemp.ports import Claim, Claimed, Done, Get, Inbox, Publication, Release, Reply, State, Transaction
from idemp.protocol import Ask, Await, Deferred, Protocol, Raised, Returned, Run, Skipped, Verdict

HELD = 5.0
"""Seconds that a batch waits for a key that another transaction holds, before each goes alone."""


SAME = 0.001
"""Seconds between which no other transaction can have had its turn: a next one waits for longer."""


@dataclass(slots=True, eq=False)
class Job:
    """One call.  ``begin`` makes its protocol, anew for each transaction that it is tried in.

    run: calls the handler with its claim and the transaction's connection: `Returned`, `Raised` or
    `NotStarted`.  ask: calls the resolver.  wait: seconds for a key that another transaction holds.
    letters: where what the handler publishes gathers while it runs.
    attempts: the policy's.  again: it may have killed who ran it before.  counted: the attempt that was
    counted before it began; 0 for none.  lost: how many went together in a transaction that was rolled
    back because others wanted the same rows; 0 for none.
    """

    key: str
    begin: Callable[[], Protocol]
    run: Callable[[Claimed, Any], Any]
    ask: Callable[[Claimed], Any]
    wait: float
    attempts: int
    letters: list[Publication] = field(default_factory=list)
    again: bool = False
    counted: int = 0
    lost: int = 0


class _Ended(NamedTuple):
    """How a call ended in a transaction, and what that left of its key."""

    verdict: Verdict
    mark: Reply


Also = Callable[[Transaction, Sequence[Job], Sequence[Verdict]], None]


def transact(store: Inbox, jobs: Sequence[Job], also: Also | None = None) -> list[Verdict]:
    """All of ``jobs`` in one transaction, in order, but for those that go alone; a verdict each, durable.

    Each is tried alone if together they cannot be.  ``also``: called at the end of each transaction, with
    its jobs and their verdicts, for what is to commit with them.  Raises `StoreUnavailable`: then calling
    again tells what became of them.
    """
    alone = _count(store, [job for job in jobs if job.again], crowd=len(jobs) > 1)
    apart = set(alone)
    together = [job for job in jobs if job not in apart]
    verdicts = dict(zip((job.key for job in together), _together(store, together, also), strict=True))
    for job in alone:
        verdicts[job.key] = transact(store, [job], also)[0]
    return [verdicts[job.key] for job in jobs]


def _count(store: Inbox, jobs: Sequence[Job], *, crowd: bool) -> list[Job]:
    """Count the attempts that begin now, durably; those that are to go alone, and are not counted yet."""

    def work(transaction: Transaction) -> list[Job]:
        alone: list[Job] = []
        claims = transaction.apply([Claim(job.key) for job in jobs])
        for job, claim in zip(jobs, claims, strict=True):
            if not isinstance(claim, Claimed):
                continue
            before = claim.attempt - 1
            if not (job.counted and job.counted == before):  # else a lost reply said so
                job.counted = 0
                if crowd and (1 <= before < job.attempts or job.attempts == 1):
                    alone.append(job)
                elif before < job.attempts:
                    job.counted = claim.attempt
            transaction.apply([Release(job.key, claim.token, job.counted or before)])
        return alone

    try:
        return store.transaction(work, HELD) if jobs else []
    except KeyBusy:
        return []  # it is not free, so it does not begin either


def _together(store: Inbox, jobs: Sequence[Job], also: Also | None) -> list[Verdict]:
    if not jobs:
        return []
    wait = jobs[0].wait if len(jobs) == 1 else HELD
    try:
        return _transact(store, jobs, wait, None, also)
    except Contended:
        if len(jobs) == 1:
            raise
        for job in jobs:
            job.lost = len(jobs)
    except KeyBusy:
        if len(jobs) == 1:
            return [Deferred()]
    except IdempError as error:
        if not isinstance(error, PermanentFailure):
            raise
        if len(jobs) == 1:
            return _transact(store, jobs, wait, error, also)
    except Exception as error:
        # The commit was refused for what the handler had done, as by a constraint that is checked then.
        if len(jobs) == 1:
            return _transact(store, jobs, wait, error, also)
    return [verdict for job in jobs for verdict in _together(store, [job], also)]


def _transact(
    store: Inbox, jobs: Sequence[Job], wait: float, refused: Exception | None, also: Also | None
) -> list[Verdict]:
    before: list[_Ended] = []

    def work(transaction: Transaction) -> list[_Ended]:
        ended = _work(transaction, jobs, refused)
        if before:
            ended = [_same(old, new) for old, new in zip(before, ended, strict=True)]
        before[:] = ended
        if also is not None:
            also(transaction, jobs, [each.verdict for each in ended])
        return ended

    return [ended.verdict for ended in store.transaction(work, wait, divisible=len(jobs) > 1)]


def _same(old: _Ended, new: _Ended) -> _Ended:
    """The old verdict, if what is found done now is what it left: then its commit took effect."""
    if not isinstance(new.verdict, Skipped) or not isinstance(old.mark, Done):
        return new
    found, left = new.verdict.done, old.mark
    # A token may be given out again after a rollback, a time may lose its last digits: together they tell.
    close = abs(found.at - left.at) < SAME
    return old if close and replace(found, at=left.at) == left else new


def _work(transaction: Transaction, jobs: Sequence[Job], refused: Exception | None) -> list[_Ended]:
    calls = [_Call(job, transaction, refused) for job in jobs]
    # The keys of all at once, before any handler.
    while asking := [call for call in calls if call.asks()]:
        replies = transaction.apply([call.step for call in asking])
        for call, reply in zip(asking, replies, strict=True):
            call.advance(reply)
    for call in calls:
        while call.verdict is None:
            call.advance(call.perform())
    marks = transaction.apply([Get(job.key) for job in jobs])
    return [_Ended(call.verdict, mark) for call, mark in zip(calls, marks, strict=True) if call.verdict]


def _counted(job: Job) -> Protocol:
    """Its protocol, in which the attempt that was counted is this one."""
    claim: State = yield Claim(job.key)
    if isinstance(claim, Claimed):
        yield Release(job.key, claim.token, max(0, claim.attempt - 2))
    return (yield from job.begin())


class _Call:
    """A job on its way through one transaction."""

    def __init__(self, job: Job, transaction: Transaction, refused: Exception | None) -> None:
        self.verdict: Verdict | None = None
        self.step: Any = None
        self._job, self._transaction, self._refused = job, transaction, refused
        self._steps = _counted(job) if job.counted else job.begin()
        self.advance(None)

    def asks(self) -> bool:
        """Whether it wants an operation of the store next."""
        return self.verdict is None and not isinstance(self.step, Run | Ask | Await)

    def advance(self, event: Any) -> None:
        """Tell the protocol what came of its step."""
        try:
            self.step = self._steps.send(event)
        except StopIteration as stop:
            self.verdict = stop.value

    def perform(self) -> Any:
        """Carry its step out."""
        match self.step:
            case Run(claim):
                return self._run(claim)
            case Ask(claim):
                return self._job.ask(claim)
            case Await():
                return False  # its owner could not end it while this transaction holds the key
        return self._transaction.apply([self.step])[0]

    def _run(self, claim: Claimed) -> Any:
        if self._refused is not None:
            return Raised(self._refused)
        self._job.letters.clear()  # what gathered in a transaction that was rolled back
        came = self._job.run(claim, self._transaction.connection)
        if isinstance(came, Returned):
            try:
                self._transaction.keep()
            except PermanentFailure:
                raise
            except Exception as error:
                came = Raised(error)  # it went on after a statement that had failed
        if isinstance(came, Returned) and self._job.letters:
            self._transaction.put(self._job.key, tuple(self._job.letters))
        if isinstance(came, Raised) and not self._transaction.undo(came.error):
            raise came.error
        return came
