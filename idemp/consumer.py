"""The consumer: threads and drivers around pipeline.py.

The calling thread owns the connection and steps the pipeline.  One thread a store sends its
batches; ``workers`` threads run handlers, and with one of them handlers run in order.  Handlers in
transactions have threads of their own, one for each transaction that is open at a time.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple, TypeVar

import tenacity

from idemp.causality import current
from idemp.errors import (
    ConfigError,
    IdempError,
    StoreUnavailable,
    TransportUnavailable,
    Unavailable,
    Unroutable,
)
from idemp.inbox import HELD, Job
from idemp.once import Context, ask, policy_of, run, run_in, running, transact_in
from idemp.pipeline import (
    SEND_AGAIN,
    Acknowledge,
    Apply,
    Cancel,
    Command,
    Confirmed,
    Delivered,
    Disconnected,
    Event,
    Flight,
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
from idemp.policy import Happened, Policy, is_async
from idemp.ports import (
    OUTCOMES,
    Claim,
    Claimed,
    Clock,
    Complete,
    Delivery,
    Inbox,
    Meter,
    NoMeter,
    Op,
    Progress,
    Publication,
    Ran,
    Sent,
    Store,
    Tallier,
    Transport,
)
from idemp.protocol import (
    Ask,
    NotStarted,
    Ok,
    Protocol,
    Raised,
    Returned,
    Run,
    Skipped,
    describe,
    doubled,
)
from idemp.signals import stopped_by_signals
from idemp.tracking.tracker import Tracker

log = logging.getLogger(__name__)

Handler = TypeVar("Handler", bound=Callable[..., Any])

EXCHANGE = "events"
POLL = 0.5
"""Seconds: the longest that the connection is left alone."""
REPORT = 1.0
"""Seconds between two summary lines."""
TOGETHER = 256
"""Operations that are worth a batch, also while more follows at once."""
FEW = 4
"""Operations that are asked at once, as those of an idle queue."""
CONFIRM = 30.0
"""Seconds that the broker has to confirm what a handler published."""
LEVELS = 5.0
"""Seconds between two looks at what waits in the queue, where the broker tells."""
LASTED = 5.0
"""Seconds after which a connection was not in vain, though nothing was acknowledged on it."""
COLLECT = (20_000, 20, 50)
"""What Python's collector waits for while messages come: see `_collected_seldom`."""
_PYTHONS_OWN = (700, 10, 10)
_USUAL = ("ok", "skipped")
_HAND_BACK = 0.005
_LOOK = 0.02
_HURRY = 1.0
"""Seconds that are left to record what has ended when somebody wants the process to end at once."""


Begun = tuple[Flight, Callable[[], Protocol]]
"""A flight, and what begins its protocol."""


class _Letter(NamedTuple):
    """What a handler published, and the broker's word on it, when it comes."""

    publication: Publication
    word: Future[Sent]


class _Published(NamedTuple):
    """A handler returned, and is done when all that it published is safe."""

    came: Returned
    letters: Sequence[_Letter]


class _Broken(NamedTuple):
    """A thread met an error that is nobody's normal outcome."""

    error: BaseException


class Consumer:
    """Takes messages of ``exchange`` from ``<service>-queue`` and runs their handlers.

    workers: threads that run handlers; 1 keeps the order.  prefetch: deliveries out at a time.
    grace: seconds that running handlers get when it is stopped.
    backoff: seconds before the first retry of a handler that raised, doubling up to 300.
    audit: keeps the tally of what takes effect here; if it cannot, `run` raises `StoreUnavailable`.
    tracking: where the events of messages go: an event log, or any object with ``write(event)``.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        service: str,
        exchange: str = EXCHANGE,
        workers: int = 1,
        prefetch: int = 512,
        grace: float = 30.0,
        backoff: float = 1.0,
        meter: Meter | None = None,
        audit: Tallier | None = None,
        clock: Clock | None = None,
        tracking: Any = None,
    ) -> None:
        if not service:
            raise ConfigError("service='': a consumer needs the name of its service")
        if workers < 1 or prefetch < 1:
            raise ConfigError(f"workers={workers}, prefetch={prefetch}: each must be 1 or more")
        self.service = service
        self.queue = f"{service}-queue"
        self._transport = transport
        self._exchange = exchange
        self._workers, self._prefetch, self._grace, self._backoff = workers, prefetch, grace, backoff
        self._meter: Meter = meter or NoMeter()
        self._audit = audit
        self._clock = clock or Clock()
        self._tracking = tracking
        if tracking is not None and not (hasattr(tracking, "append") or hasattr(tracking, "write")):
            raise ConfigError(
                f"tracking={tracking!r}: an event log, like open_event_log('sqlite:///events.db')"
            )
        self._routes: dict[str, Route] = {}
        self._stopping = threading.Event()
        self._given_up = threading.Event()
        self._delivering = False
        self._turned: float | None = None  # None while the broker is waited for
        self._stop_at: float | None = None  # when the grace time is over, once it is stopping
        self._levels_at = 0.0
        self._connected_at = 0.0
        self._in_vain = 0  # connections in a row that ended soon, with nothing acknowledged

    def on(self, type: str) -> Callable[[Handler], Handler]:
        """Handle messages of ``type`` with the decorated function; without `idempotent`, at least once."""

        def register(function: Handler) -> Handler:
            if type in self._routes:
                raise ConfigError(f"type {type!r} has a handler already")
            bare = inspect.unwrap(function, stop=_plain)
            self._routes[type] = Route(bare, policy_of(function), is_async(bare))
            return function

        return register

    def policies(self) -> dict[str, Policy | None]:
        """The policy of each type's handler; None where it runs at least once."""
        return {kind: route.policy for kind, route in self._routes.items()}

    def stop(self) -> None:
        """From any thread: take no more, finish what runs, return from `run`."""
        self._stopping.set()
        self._transport.wake()

    def trouble(self) -> str:
        """From any thread: why no message is taken just now; "" while all is well."""
        if self._stopping.is_set():
            return "it is stopping"
        if not self._delivering:
            return "the broker does not deliver"
        try:
            fresh = all(store.fresh() for store in self._stores())
        except IdempError as error:
            return str(error)
        return "" if fresh else "the store does not answer"

    def silent(self) -> float:
        """From any thread: seconds since the loop last turned; 0 while it waits for the broker."""
        turned = self._turned
        return 0.0 if turned is None else float(self._clock.steady() - turned)

    def progress(self) -> Progress | None:
        """From any thread: how far the first of its stores that reads what it remembers is with it."""
        return next((far for store in self._stores() if (far := store.progress()) is not None), None)

    def run(self, *, ready: Callable[[], None] | None = None) -> None:
        """Consume until `stop`, SIGTERM or SIGINT.

        ready: called once, when the queue is declared, the stores answer and deliveries start.
        Raises `ConfigError`, `TransportUnavailable` or `StoreUnavailable` if it cannot start; later
        losses are waited out.  Whatever it raises later, what ran is recorded first, in the grace time.
        """
        self._zero()
        for store in self._stores():
            store.apply([])
        if self._audit is not None:
            self._audit.start(self.service)
        try:
            self._run(ready)
        finally:
            if self._audit is not None:
                self._audit.stop()

    def _run(self, ready: Callable[[], None] | None) -> None:
        self._start_consuming()
        tracker = None
        if self._tracking is not None:
            tracker = Tracker(
                self._tracking, self.service, queue=self.queue, meter=self._meter, clock=self._clock
            )
        shell = _Shell(
            self.service, self._workers, self._meter, self._stopping, self._given_up, self._transport, tracker
        )
        pipeline = Pipeline(self.queue, self._routes, workers=self._workers, backoff=self._backoff)
        report = _Report(self.service, self._meter, self._clock, tracker)
        with stopped_by_signals(self.stop), _collected_seldom():
            if ready is not None:
                ready()
            what = "was still running after the grace time"
            try:
                self._loop(pipeline, shell, report)
            except BaseException as error:
                what = "may have taken effect and is not recorded"
                self._wind_up(pipeline, shell, report, error)
                raise
            finally:
                self._given_up.set()
                shell.end()
                report.flush()
                if tracker is not None:
                    tracker.close()
                for key in pipeline.names() if not pipeline.idle() else ():
                    log.error("%s: %s %s; it is in doubt", self.service, key, what)

    # ---------------------------------------------------------------- the loop

    def _loop(self, pipeline: Pipeline, shell: _Shell, report: _Report) -> None:
        self._stop_at = None
        connected = True
        while True:
            now = self._turned = self._clock.steady()
            if self._stopping.is_set() and self._stop_at is None:
                self._stop_at = now + self._grace
                shell.inbox.append(Stop())
            if self._stop_at is not None and not shell.inbox and (pipeline.idle() or now >= self._stop_at):
                with suppress(TransportUnavailable):
                    self._transport.poll(0.0)  # the last acknowledgements go out
                return
            try:
                self._turn(pipeline, shell, report, now, connected)
                if connected and now >= self._levels_at:
                    self._levels_at = now + LEVELS
                    self._tell_levels()
            except TransportUnavailable as error:
                log.warning("%s: %s; connecting again", self.service, error)
                self._delivering, self._turned = False, None
                self._perform(pipeline.step(Disconnected(), self._clock.steady()), shell, report)
                shell.ask_now()  # what has ended is recorded while the broker is away
                shell.numbers.clear()
                shell.unsent(str(error))
                connected = self._connect_again(
                    lambda seconds: self._meanwhile(seconds, pipeline, shell, report)
                )

    def _wind_up(self, pipeline: Pipeline, shell: _Shell, report: _Report, error: BaseException) -> None:
        """Because of ``error``: begin no more, give back what has not begun, and record what ran.

        It takes the grace time at most; an interrupt waits for no handler.  What goes wrong meanwhile is
        logged only: it must not hide ``error``.
        """
        now = self._clock.steady()
        until = now + self._grace if self._stop_at is None else self._stop_at
        if isinstance(error, Exception):
            log.error("%s: %s; it ends when what runs is recorded", self.service, describe(error))
        else:
            until = min(until, now + _HURRY)
        self._delivering = False
        shell.begin_no_more()
        said = {describe(error)}
        try:
            for event in (Disconnected(), Stop()):
                with self._unless_said(said):
                    for command in pipeline.step(event, now):
                        with self._unless_said(said):
                            self._perform([command], shell, report)
            while shell.inbox or not pipeline.idle():
                now = self._turned = self._clock.steady()
                if now >= until or shell.hopeless():
                    return
                shell.ask_now()
                with self._unless_said(said):
                    self._turn(pipeline, shell, report, now, False)
        except BaseException as other:
            log.error("%s: while it ends: %s; it ends at once", self.service, describe(other))

    @contextmanager
    def _unless_said(self, said: set[str]) -> Iterator[None]:
        """Log what goes wrong, each once, and go on."""
        try:
            yield
        except Exception as error:
            if (what := describe(error)) not in said:
                log.error("%s: while it ends: %s", self.service, what)
                said.add(what)
            self._clock.sleep(_LOOK)

    def _turn(self, pipeline: Pipeline, shell: _Shell, report: _Report, now: float, connected: bool) -> None:
        """Take what came, from the broker and from the threads, and do what follows."""
        due = pipeline.due()
        wait = POLL if due is None else min(POLL, max(0.0, due - now))
        if shell.outgoing:
            self._publish(shell, connected)
        came: list[Delivery | Sent] = []
        if connected:
            came = self._transport.poll(0.0 if shell.inbox or shell.unasked or shell.outgoing else wait)
        elif not (shell.inbox or shell.unasked):
            self._clock.sleep(_LOOK)  # stopping: what runs is still waited for and recorded
        now = self._clock.steady()
        if not (came or shell.inbox):
            shell.ask_now()
        deliveries = [event for event in came if type(event) is Delivery]
        if deliveries:
            self._perform(pipeline.step(Delivered(deliveries, self._clock.wall()), now), shell, report)
        words = [event for event in came if type(event) is Sent] if len(came) > len(deliveries) else []
        for word in words if shell.published else ():
            if (letter := shell.published.pop(word.number, None)) is not None:
                letter.set_result(word)
        copies = [(flight, word) for word in words
                  if (flight := shell.numbers.pop(word.number, None)) is not None]  # fmt: skip
        if copies:
            if any(word.unroutable and not word.unfit for _, word in copies):
                self._declare()  # somebody may have deleted a queue of ours
            confirmed = [(flight, word.error, word.unfit) for flight, word in copies]
            self._perform(pipeline.step(Confirmed(confirmed), now), shell, report)
        self._hear(pipeline, shell, report, now)

    def _hear(self, pipeline: Pipeline, shell: _Shell, report: _Report, now: float) -> None:
        """Take what came from the threads, or with the time, and do what follows."""
        due = pipeline.due()
        while shell.inbox:
            event = shell.inbox.popleft()
            if isinstance(event, _Broken):
                raise event.error
            if self._audit is not None and isinstance(event, Worked | Transacted):
                self._count(self._audit, event, shell)
            self._perform(pipeline.step(event, now), shell, report)
        if due is not None and due <= now:
            self._perform(pipeline.step(Tick(), now), shell, report)
        shell.ask_few()
        report.maybe(now)

    def _count(self, audit: Tallier, event: Worked | Transacted, shell: _Shell) -> None:
        """Before it is recorded, so that what is done is never missing there."""
        try:
            audit.ran(_effects(event))
        except BaseException:
            shell.inbox += _apart(event)  # asked again while it ends, behind what needs no audit
            raise

    def _tell_levels(self) -> None:
        levels: Callable[[str], Mapping[str, float]] | None = getattr(self._transport, "levels", None)
        for name, value in levels(self.queue).items() if levels is not None else ():
            self._meter.level(f"{self.service}_{name}", value)

    def _publish(self, shell: _Shell, connected: bool) -> None:
        """Send what handlers publish.  What is not sent, because it cannot be, is told so at once."""
        if not connected:
            shell.unsent("the connection is lost")
            return
        letters = [shell.outgoing.popleft() for _ in range(len(shell.outgoing))]
        shell.published.update((-n, future) for n, (_, future) in enumerate(letters, 1))  # if it raises
        numbers = self._transport.send([letter for letter, _ in letters])
        for n, number in enumerate(numbers, 1):
            shell.published[number] = shell.published.pop(-n)

    def _perform(self, commands: Sequence[Command], shell: _Shell, report: _Report) -> None:
        for command in commands:
            match command:
                case Apply(store, ops):
                    shell.ask(store, ops)
                case Work(items):
                    shell.work(items)
                case Transact(store, flights):
                    shell.transact(store, flights)
                case Acknowledge(tags):
                    self._transport.ack(tags)
                    self._in_vain = 0
                case Send(items):
                    numbers = self._transport.send([copy for _, copy in items])
                    shell.numbers.update(zip(numbers, (flight for flight, _ in items), strict=True))
                case Cancel():
                    with suppress(TransportUnavailable):  # the next poll says so
                        self._transport.cancel()
                case Tell(counts, lines):
                    report.add(counts, lines)

    # ---------------------------------------------------------------- start and connection

    def _declare(self) -> None:
        self._transport.declare(f"{self.queue}.dead")
        self._transport.declare(self.queue, self._exchange, "#")

    def _start_consuming(self) -> None:
        self._declare()
        self._transport.consume(self.queue, self._prefetch)
        self._delivering, self._connected_at = True, self._clock.steady()

    def _meanwhile(self, seconds: float, pipeline: Pipeline, shell: _Shell, report: _Report) -> None:
        """While the broker is away what runs goes on, and is recorded; what it publishes waits."""
        until = self._clock.steady() + seconds
        while (now := self._clock.steady()) < until and not self._stopping.is_set():
            if not shell.inbox:
                shell.ask_now()
                self._clock.sleep(_LOOK)
            self._hear(pipeline, shell, report, now)

    def _connect_again(self, sleep: Callable[[float], None]) -> bool:
        """Until the broker is back (true), or the service is told to stop (false).

        sleep: what to do for so many seconds between two tries.
        """
        try:
            self._try_again(sleep)
        except TransportUnavailable:
            if not self._stopping.is_set():
                raise
            return False
        return True

    def _try_again(self, sleep: Callable[[float], None]) -> None:
        """At once after a connection that was of use; after others in vain slower and slower."""
        in_vain = self._in_vain if self._clock.steady() - self._connected_at < LASTED else 0
        self._in_vain = in_vain + 1
        for attempt in tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unavailable),
            wait=tenacity.wait_random_exponential(doubled(0.2, in_vain, 10), max=10),
            stop=tenacity.stop_when_event_set(self._stopping),
            sleep=sleep,
            reraise=True,
        ):
            with attempt:
                if in_vain and attempt.retry_state.attempt_number == 1 and not self._stopping.is_set():
                    raise TransportUnavailable("the connection before was in vain")  # so that it waits first
                self._transport.connect()
                if not self._stopping.is_set():
                    self._start_consuming()

    def _stores(self) -> list[Store]:
        stores = {
            id(route.policy.store): route.policy.store for route in self._routes.values() if route.policy
        }
        return list(stores.values())

    def _zero(self) -> None:
        """Make every counter exist."""
        for kind in self._routes:
            for outcome in OUTCOMES:
                self._meter.count(f"{self.service}_{kind}_{outcome}", 0)
        self._meter.count(f"{self.service}_rejected", 0)


def _effects(ended: Worked | Transacted) -> list[Ran]:
    """Of these, what took effect."""
    runs = []
    for flight, result in ended.results:
        match result:
            case Returned():
                unsure, found = flight.unsure(), False
            case Ok():  # in a transaction, which nothing half done survives
                unsure, found = False, False
            case Happened():
                unsure, found = flight.unsure(), True
            case Skipped() if flight.delivery.redelivered:  # a kill may have come after the transaction
                unsure, found = False, True
            case _:
                continue
        assert flight.message is not None
        at = flight.delivery.properties.timestamp
        runs.append(Ran(flight.message.type, flight.message.id, at, unsure, found))
    return runs


def _apart(ended: Worked | Transacted) -> list[Worked | Transacted]:
    """What took effect, behind the rest, which has nothing to count; a transaction stays one."""
    if isinstance(ended, Transacted):
        return [ended]
    parts: tuple[list[tuple[Flight, Any]], ...] = [], []
    for each in ended.results:
        parts[isinstance(each[1], Returned | Happened)].append(each)
    return [Worked(part) for part in parts if part]


def _plain(function: Callable[..., Any]) -> bool:
    """Where unwrapping stops: below the policy."""
    return policy_of(function) is None


class _Shell:
    """The threads, and what passes between them and the loop."""

    def __init__(
        self,
        service: str,
        workers: int,
        meter: Meter,
        stopping: threading.Event,
        given_up: threading.Event,
        transport: Transport,
        tracker: Tracker | None = None,
    ) -> None:
        self._tracker = tracker
        self.inbox: deque[Event | _Broken] = deque()
        self.numbers: dict[int, Flight] = {}
        self.outgoing: deque[_Letter] = deque()
        self.published: dict[int, Future[Sent]] = {}
        self._service, self._meter = service, meter
        self._stopping, self._given_up = stopping, given_up
        self._wake = transport.wake
        self.unasked: dict[int, tuple[Store, list[Op]]] = {}
        self._lanes: dict[int, queue.SimpleQueue[Sequence[Op] | None]] = {}
        self._halls: dict[int, queue.SimpleQueue[Sequence[Begun] | None]] = {}
        self._dangerous = threading.Lock()
        self._broken: set[int] = set()  # stores for which a thread has ended
        self._jobs: queue.SimpleQueue[Sequence[tuple[Flight, Run | Ask]] | None] = queue.SimpleQueue()
        self._workers = workers
        for number in range(workers):
            threading.Thread(target=self._worker, name=f"idemp-worker-{number}", daemon=True).start()

    def post(self, event: Event | _Broken) -> None:
        """Hand ``event`` to the loop."""
        self.inbox.append(event)
        self._wake()

    def begin_no_more(self) -> None:
        """From now on what is in line comes back as not started, though nobody told the service to stop."""
        over = threading.Event()
        over.set()
        self._stopping = over

    def hopeless(self) -> bool:
        """Whether no store is left in which anything could be recorded."""
        return bool(self._broken) and self._broken >= {*self._lanes, *self._halls}

    def end(self) -> None:
        """Let the threads go when they are done."""
        self.ask_now()
        self.unsent("the consumer has ended")
        for lane in self._lanes.values():
            lane.put(None)
        for _ in range(self._workers):
            for hall in self._halls.values():
                hall.put(None)
            self._jobs.put(None)

    # ---------------------------------------------------------------- what handlers publish

    def publish(self, publication: Publication) -> _Letter:
        """From a handler: let it go out at once."""
        letter = _Letter(publication, Future())
        self.outgoing.append(letter)
        self._wake()
        return letter

    def unsent(self, why: str) -> None:
        """Nobody knows what became of what was published; who published it is to do it again."""
        waiting = [*self.published.values()]
        self.published.clear()
        while self.outgoing:
            waiting.append(self.outgoing.popleft().word)
        for future in waiting:
            future.set_exception(TransportUnavailable(f"what the handler published may be lost: {why}"))

    # ---------------------------------------------------------------- stores

    def ask(self, store: Store, ops: Sequence[Op]) -> None:
        """With what follows at once: the fewer batches, the less each of their operations costs."""
        _, unasked = self.unasked.setdefault(id(store), (store, []))
        unasked += ops
        if len(unasked) >= TOGETHER:
            self.ask_now()

    def ask_few(self) -> None:
        """Where few came together few follow: to look for more would only take time."""
        if self.unasked and sum(len(ops) for _, ops in self.unasked.values()) <= FEW:
            self.ask_now()

    def ask_now(self) -> None:
        """Nothing follows at once."""
        for store, ops in self.unasked.values():
            self._lane(store).put(ops)
        self.unasked.clear()

    def _lane(self, store: Store) -> queue.SimpleQueue[Sequence[Op] | None]:
        """The queue to ``store``'s thread."""
        lane = self._lanes.get(id(store))
        if lane is None:
            lane = self._lanes[id(store)] = queue.SimpleQueue()
            threading.Thread(target=self._serve, args=(store, lane), name="idemp-store", daemon=True).start()
        return lane

    def _serve(self, store: Store, lane: queue.SimpleQueue[Sequence[Op] | None]) -> None:
        try:
            while ops := _gathered(lane):
                began = time.perf_counter()
                replies = self._apply(store, ops)
                if len(replies) != len(ops):
                    raise RuntimeError(f"{store!r} answered {len(replies)} of {len(ops)} operations")
                took = time.perf_counter() - began
                for kind, name in ((Claim, "claim"), (Complete, "complete")):
                    if any(type(op) is kind for op in ops):
                        self._meter.time(f"{self._service}_{name}", took)
                self.post(Replied(store, replies))
        except StoreUnavailable as error:
            log.error("the store did not come back in the grace time: %s", error)
        except BaseException as error:
            self._broken.add(id(store))
            self.post(_Broken(error))

    def _apply(self, store: Store, ops: Sequence[Op]) -> Any:
        """The replies, however long the store is away: the deliveries are kept meanwhile."""
        return self._persistent(store.apply, ops)

    def _persistent(self, ask: Callable[..., Any], *what: Any) -> Any:
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(StoreUnavailable),
            wait=tenacity.wait_random_exponential(0.2, max=5),
            stop=tenacity.stop_when_event_set(self._given_up),
            sleep=tenacity.sleep_using_event(self._given_up),
            before_sleep=_say_unavailable,
            reraise=True,
        )(ask, *what)

    # ---------------------------------------------------------------- transactions

    def transact(self, store: Inbox, items: Sequence[Begun]) -> None:
        """Hand a batch to the threads in which ``store``'s transactions are."""
        hall = self._halls.get(id(store))
        if hall is None:
            hall = self._halls[id(store)] = queue.SimpleQueue()
            for _ in range(min(self._workers, store.transactions)):
                threading.Thread(
                    target=self._host, args=(store, hall), name="idemp-inbox", daemon=True
                ).start()
        hall.put(items)

    def _host(self, store: Store, hall: queue.SimpleQueue[Sequence[Begun] | None]) -> None:
        current.set(self._tracker)  # of this thread
        try:
            with asyncio.Runner() as runner:
                while items := hall.get():
                    jobs = [self._job(flight, begin, runner) for flight, begin in items]
                    # Of those that may kill the process, one store's at a time: an attempt counts for each.
                    with self._dangerous if any(job.again for job in jobs) else nullcontext():
                        verdicts = self._persistent(transact_in, items[0][0].policy, jobs)
                    flights = [flight for flight, _ in items]
                    lost = max((job.lost for job in jobs), default=0)
                    self.post(Transacted(store, list(zip(flights, verdicts, strict=True)), lost))
        except StoreUnavailable as error:
            log.error("the store did not come back in the grace time: %s", error)
        except BaseException as error:
            self._broken.add(id(store))
            self.post(_Broken(error))

    def _job(self, flight: Flight, begin: Callable[[], Protocol], runner: asyncio.Runner) -> Job:
        assert flight.route is not None
        function, policy = flight.route.function, flight.policy
        if flight.route.is_async:
            function = _blocking(function, runner)
        letters: list[Publication] = []

        def context(claim: Claimed, connection: Any = None) -> Context:
            known = (flight.key, claim.token, claim.attempt)
            out = None if connection is None else letters
            return Context(*known, message=flight.message, connection=connection, letters=out)

        def call(claim: Claimed, connection: Any) -> Any:
            if self._stopping.is_set() or flight.tag is None:
                return NotStarted()
            began = time.perf_counter()
            if self._tracker is not None:
                self._tracker.running[threading.get_ident()] = flight, began, claim.attempt
            came = run_in(policy, function, context(claim, connection), (flight.message,), {})
            took = time.perf_counter() - began
            self._meter.time(f"{self._service}_handler", took)
            if self._tracker is not None:
                self._tracker.ends()
                flight.ran = began + self._tracker.since(), took, claim.attempt
            return came

        def ask_it(claim: Claimed) -> Any:
            return ask(policy, context(claim), (flight.message,), {})

        again = flight.delivery.redelivered
        return Job(flight.key, begin, call, ask_it, HELD, policy.attempts, letters, again=again)

    # ---------------------------------------------------------------- handlers

    def work(self, items: Sequence[tuple[Flight, Run | Ask]]) -> None:
        """Hand handlers to the workers."""
        if self._workers == 1:
            self._jobs.put(items)
        else:
            for item in items:
                self._jobs.put((item,))

    def _worker(self) -> None:
        current.set(self._tracker)  # of this thread
        with asyncio.Runner() as runner:
            while (items := self._jobs.get()) is not None:
                try:
                    self._run_all(items, runner)
                except BaseException as error:
                    self.post(_Broken(error))  # what is in line comes back before this thread ends

    def _run_all(self, items: Sequence[tuple[Flight, Run | Ask]], runner: asyncio.Runner) -> None:
        """Run in order; hand results back when the last is there, or every few milliseconds."""
        results: list[tuple[Flight, Any]] = []
        last = now = time.perf_counter()
        tell, name = self._meter.time, f"{self._service}_handler"
        tracker, thread = self._tracker, threading.get_ident()
        since = 0.0 if tracker is None else tracker.since()
        line = iter(items)
        try:
            for flight, step in line:
                began = now
                if tracker is not None:
                    tracker.running[thread] = flight, began, step.claim.attempt
                results.append((flight, self._run(flight, step, runner)))
                now = time.perf_counter()
                if tracker is not None:
                    flight.ran = since + began, now - began, step.claim.attempt
                tell(name, now - began)
                if now - last > _HAND_BACK:
                    self._hand_back(results)
                    results = []
                    last = now = time.perf_counter()
        except BaseException:  # a meter or tracking that breaks takes no result with it
            self._hand_back(results + [(flight, _not_begun(step)) for flight, step in line])
            raise
        if tracker is not None:
            tracker.ends()
        if results:
            self._hand_back(results)

    def _hand_back(self, results: list[tuple[Flight, Any]]) -> None:
        safe = [(flight, self._safe(came) if type(came) is _Published else came) for flight, came in results]
        self.post(Worked(safe))

    def _safe(self, published: _Published) -> Returned | Raised:
        """What the handler returned, or why what it published is not safe."""
        try:
            for letter in published.letters:
                self._wait_for(letter)
        except (TransportUnavailable, Unroutable) as error:
            return Raised(error)
        if self._tracker is not None:
            self._tracker.sent([letter.publication for letter in published.letters])
        return published.came

    def _wait_for(self, letter: _Letter) -> None:
        """Until it is safe.  What the broker did not take is sent again, unless that would not help."""
        until = time.perf_counter() + CONFIRM
        while True:
            try:
                sent = letter.word.result(max(0.0, until - time.perf_counter()))
            except TimeoutError:
                why = f"what the handler published was not confirmed within {CONFIRM:g} s"
                raise TransportUnavailable(why) from None
            if not sent.error:
                return
            if sent.unroutable:
                raise Unroutable(f"what the handler published: {sent.error}")
            if self._given_up.wait(SEND_AGAIN) or time.perf_counter() > until:
                raise TransportUnavailable(f"what the handler published: {sent.error}")
            letter = self.publish(letter.publication)

    def _run(self, flight: Flight, step: Run | Ask, runner: asyncio.Runner) -> Any:
        assert flight.route is not None
        function, policy, awaited = flight.route
        claim = step.claim
        if self._stopping.is_set() and type(step) is Run:
            return NotStarted()
        if awaited:
            function = _blocking(function, runner)
        if policy is None:
            if flight.tag is None:
                return NotStarted()  # it comes again, and must not be late again behind itself
            current = Context(flight.key, claim.token, claim.attempt, message=flight.message)
            return _run_unguarded(function, current, flight.message)
        if type(step) is Ask:
            current = Context(flight.key, claim.token, claim.attempt, message=flight.message)
            return ask(policy, current, (flight.message,), {})
        letters: list[_Letter] = []
        current = Context(
            flight.key,
            claim.token,
            claim.attempt,
            message=flight.message,
            letters=letters,
            send=self.publish,
        )
        came = run(policy, function, current, (flight.message,), {})
        return _Published(came, letters) if letters and type(came) is Returned else came


def _gathered(lane: queue.SimpleQueue[Sequence[Op] | None]) -> list[Op]:
    """All that waits to be asked, and at least one batch; nothing at the end."""
    ops = list(lane.get() or ())
    while ops and not lane.empty():
        more = lane.get()
        if more is None:
            lane.put(None)
            break
        ops += more
    return ops


def _not_begun(step: Run | Ask) -> NotStarted | Raised:
    return NotStarted() if type(step) is Run else Raised(InterruptedError("the resolver was not asked"))


def _blocking(function: Callable[..., Any], runner: asyncio.Runner) -> Callable[..., Any]:
    return lambda message: runner.run(function(message), context=contextvars.copy_context())


def _run_unguarded(function: Callable[..., Any], current: Context, message: Any) -> Any:
    try:
        with running(current):
            return Returned(function(message), None)
    except BaseException as error:
        return Raised(error)


def _say_unavailable(state: tenacity.RetryCallState) -> None:
    if state.attempt_number == 1 and state.outcome is not None:
        log.warning("no store, so nothing runs: %s", state.outcome.exception())


class _Report:
    """Counts outcomes; a line per message at DEBUG, one a second at INFO."""

    def __init__(self, service: str, meter: Meter, clock: Clock, tracker: Tracker | None = None) -> None:
        self._service, self._meter, self._clock = service, meter, clock
        self._tracker = tracker
        self._counts: Counter[str] = Counter()
        self._last = clock.steady()

    def add(self, counts: Any, lines: Sequence[tuple[str, Flight, str]]) -> None:
        """Count, and say what a person would want to know."""
        if self._tracker is not None and lines:
            self._tracker.told(lines)
        for (kind, outcome), n in counts.items():
            self._counts[outcome] += n
            name = f"{self._service}_{kind}_{outcome}" if kind else f"{self._service}_{outcome}"
            self._meter.count(name, n)
        each = log.isEnabledFor(logging.DEBUG)
        for outcome, flight, why in lines:
            if each or outcome not in _USUAL:
                level = logging.DEBUG if outcome in _USUAL else logging.WARNING
                extra = {"action": outcome, "key": flight.key}
                log.log(level, "%s: %s %s %s", self._service, outcome, flight.key, why, extra=extra)

    def maybe(self, now: float) -> None:
        """Flush once a second."""
        if now - self._last >= REPORT:
            self._last = now
            self.flush()

    def flush(self) -> None:
        """One summary line of what happened since the last."""
        if self._counts:
            said = ", ".join(f"{n} {outcome}" for outcome, n in self._counts.items())
            log.info("%s: %s", self._service, said)
            self._counts = Counter()


@contextmanager
def _collected_seldom() -> Iterator[None]:
    """The messages of a window are no garbage: to look through them again and again is a tenth of the time.

    Where the application has set the thresholds itself, they stay.
    """
    if gc.get_threshold() != _PYTHONS_OWN:
        yield
        return
    gc.set_threshold(*COLLECT)
    try:
        yield
    finally:
        if gc.get_threshold() == COLLECT:
            gc.set_threshold(*_PYTHONS_OWN)
