"""The consumer's decisions: ``step(event, now) -> commands``.  Pure; consumer.py carries them out.

A delivery is a `Flight`: it is decoded, gets a claim protocol (protocol.py), and is moved along it
until its verdict settles it.  What the flights ask of a store goes out at once; whatever gathers
while its last batch is under way is its next; nothing ever waits for a batch to fill.

    verdict              settled by                                            outcome
    Ok                   ack                                                   ok
    Skipped              ack                                                   skipped
    Failed               delayed copy to the queue, confirmed, then ack        failed
    Deferred             delayed copy to the queue, confirmed, then ack        deferred
    Refused              copy to the dead-letter queue, confirmed, then ack    parked
    Conflict             copy to the dead-letter queue, confirmed, then ack    conflict
    undecodable, no id   copy to the dead-letter queue, confirmed, then ack    rejected
    Overtaken            looked up again                                       lost
    NotRun               looked up again; left unacknowledged when stopping

A second delivery of a key that is in flight here waits for the first.

A handler with ``transaction=True`` is not moved along here: a batch of its flights is handed over as one
transaction (inbox.py) and comes back with verdicts.  What waits is shared by those that may begin: one, or
as many as there are workers where the store takes several side by side.  What gathers meanwhile is the next
batch; a full one is handed over at once, to begin when one before it has ended.

Keys are claimed ahead of their handlers, so a message that kills its process leaves its neighbours in
doubt too, an attempt each.  A key that was in doubt before, or has one attempt left, is therefore a
suspect: it is taken over when nothing else is claimed here, and run alone.  Then only the guilty one
uses up its attempts.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isqrt
from typing import Any, NamedTuple, cast

import msgspec
from msgspec.structs import replace

from idemp.errors import BadMessage, PermanentFailure, RetryLater
from idemp.message import Message, Properties, decode
from idemp.policy import Policy, replay_refused
from idemp.ports import Claim, Claimed, Delivery, Done, Doubt, Inbox, Op, Publication, Reply, Store, Takeover
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
    describe,
    doubled,
    protocol,
    repeated,
    spelled,
)

TOGETHER = 256
"""Calls that one transaction takes at most: it holds their keys, and all run again if it fails."""
CALM = 30.0
"""Seconds without a deadlock, after which a transaction takes twice as many calls again."""
MAX_DELAY = 300.0
"""Seconds: the longest backoff."""
ATTEMPTS = 5
"""Of a handler without a policy."""
CONFLICT = "done already, with another payload"
_WRITTEN = tuple(
    f"idemp-{name}" for name in ("outcome", "reason", "key", "attempt", "queue", "exchange", "routing-key")
)  # on each dead letter
LOOK_AGAIN = (0.02, 1.0)
"""Seconds between looks at a busy key: the first, and the longest."""
SEND_AGAIN = 1.0
"""Seconds until a publication that was not confirmed is sent again."""


class Route(NamedTuple):
    """What handles a message type.  ``policy`` is None for a handler that runs at least once."""

    function: Callable[..., Any]
    policy: Policy | None
    is_async: bool = False


class Flight(msgspec.Struct, eq=False):
    """One delivery on its way.  ``tag`` is None once its connection is gone.

    attempt: the one under which its handler was begun, or its resolver asked.
    ran: what tracking knows of its handler's run.
    """

    delivery: Delivery
    tag: int | None
    message: Message | None = None
    route: Route | None = None
    key: str = ""
    fingerprint: bytes | None = None
    steps: Protocol | None = None
    since: float = 0.0
    looks: int = 0
    attempt: int = 0
    ran: Any = None

    def unguarded(self) -> bool:
        """Whether its handler, if it has one, runs at least once."""
        return self.route is None or self.route.policy is None

    def unsure(self) -> bool:
        """Whether it may have taken effect before, in an attempt whose end nobody saw."""
        if self.unguarded():
            return self.delivery.redelivered
        return self.attempt > _attempts(self.delivery) + 1

    @property
    def policy(self) -> Policy:
        """The handler's, which only a flight with a claim protocol asks for."""
        assert self.route is not None
        assert self.route.policy is not None
        return self.route.policy


# ------------------------------------------------------------------ events


class Delivered(NamedTuple):
    """Messages came.  ``wall``: seconds since 1970."""

    deliveries: Sequence[Delivery]
    wall: float


class Replied(NamedTuple):
    """A store answered, in the order of what it was asked; one answer may be for many `Apply`."""

    store: Store
    replies: Sequence[Reply]


class Worked(NamedTuple):
    """Handlers or resolvers ended: each flight with `Returned`, `Raised`, `NotStarted` or an answer."""

    results: Sequence[tuple[Flight, Any]]


class Transacted(NamedTuple):
    """A transaction is durable: each of its flights with its verdict.

    lost: how many went together in vain, because others wanted the same rows; 0 for none.
    """

    store: Store
    results: Sequence[tuple[Flight, Verdict]]
    lost: int = 0


class Confirmed(NamedTuple):
    """The broker's word on copies: an error, or "" when the copy is safe.

    The third says that no broker of this kind can carry the copy: the same would be refused again.
    """

    results: Sequence[tuple[Flight, str, bool]]


class Disconnected(NamedTuple):
    """The connection is gone: what was delivered will come again, and must not be acknowledged."""


class Tick(NamedTuple):
    """Time went by."""


class Stop(NamedTuple):
    """Take no more; finish what runs; give back the rest."""


Event = Delivered | Replied | Worked | Transacted | Confirmed | Disconnected | Tick | Stop


# ------------------------------------------------------------------ commands


class Apply(NamedTuple):
    """Send a batch to a store, in order, together with others if it is busy; answer with `Replied`."""

    store: Store
    ops: Sequence[Op]


class Work(NamedTuple):
    """Run handlers (`Run`) or resolvers (`Ask`); answer with `Worked`."""

    items: Sequence[tuple[Flight, Run | Ask]]


class Transact(NamedTuple):
    """Run all of these in one transaction; answer with `Transacted`.  Each with what begins its protocol."""

    store: Inbox
    items: Sequence[tuple[Flight, Callable[[], Protocol]]]


class Send(NamedTuple):
    """Publish copies; answer with `Confirmed`."""

    items: Sequence[tuple[Flight, Publication]]


class Acknowledge(NamedTuple):
    """These deliveries are settled."""

    tags: Sequence[int]


class Cancel(NamedTuple):
    """Let the broker deliver no more."""


class Tell(NamedTuple):
    """Outcomes to count: (message type or "", outcome) -> how many; and what deserves a log line."""

    counts: Mapping[tuple[str, str], int]
    lines: Sequence[tuple[str, Flight, str]]


Command = Apply | Work | Transact | Send | Acknowledge | Cancel | Tell


@dataclass(slots=True)
class _Lane:
    """The way to one store: what waits, and who asked for what is under way."""

    ops: list[Op] = field(default_factory=list)
    flights: list[Flight] = field(default_factory=list)
    under_way: deque[Flight] = field(default_factory=deque)


@dataclass(slots=True)
class _Hall:
    """Before one store's transactions: who waits for the next, and how many are under way.

    doors: transactions side by side.  width: calls that one takes at most.  changed: when that was last
    another.  alone: what is under way bears nothing beside it.
    """

    store: Inbox
    doors: int
    waiting: deque[Flight] = field(default_factory=deque)
    under_way: int = 0
    width: int = TOGETHER
    changed: float = 0.0
    alone: bool = False

    def next(self) -> list[Flight]:
        """Who goes as one transaction now; nobody while they must wait.

        Those that were delivered before may have killed who ran them, and do not mix with others: it would
        not be known who was guilty.  A full one goes ahead, so that nobody waits between two.
        """
        if not self.waiting or (self.under_way and (self.alone or self._again(self.waiting[0]))):
            return []
        self.alone = self._again(self.waiting[0])
        free = 1 if self.alone else self.doors - self.under_way
        if free < 0 or (free == 0 and len(self.waiting) < self.width):
            return []
        share = min(self.width, -(-len(self.waiting) // max(free, 1)))
        alike = itertools.takewhile(lambda each: self._again(each) == self.alone, self.waiting)
        batch = list(itertools.islice(alike, share))
        for _ in batch:
            self.waiting.popleft()
        self.under_way += 1
        return batch

    def end(self, lost: int, now: float) -> None:
        """One is over.  Where others want the same rows the next take fewer calls, until it has been calm.

        A transaction holds the rows of all its handlers, which they took in any order: the more there are,
        the sooner two wait for each other, and PostgreSQL looks for that after a second only.
        """
        self.under_way -= 1
        if lost:
            self.width, self.changed = min(self.width, max(1, isqrt(lost // 2))), now
        elif self.width < TOGETHER and now - self.changed >= CALM:
            self.width, self.changed = min(TOGETHER, self.width * 2), now

    def _again(self, flight: Flight) -> bool:
        return flight.delivery.redelivered


class Pipeline:
    """The consumer of ``queue`` as a state machine.

    routes: message type -> handler.  workers: handlers side by side.  backoff: seconds before the first
    retry; each next one waits twice as long, up to `MAX_DELAY`.  chance: numbers in [0, 1) for the jitter.
    """

    def __init__(
        self,
        queue: str,
        routes: Mapping[str, Route],
        *,
        workers: int = 1,
        backoff: float = 1.0,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._queue = queue
        self._routes = routes
        self._workers = workers
        self._backoff = backoff
        self._chance = chance
        self._lanes: dict[int, _Lane] = {}
        self._stores: dict[int, Store] = {}
        self._halls: dict[int, _Hall] = {}
        self._window: dict[str, list[Flight]] = {}  # each key's first, and those that wait for it
        self._timers: list[tuple[float, int, Flight, Callable[[Flight], None]]] = []
        self._order = itertools.count()
        self._working = 0
        self._solitary = False  # a suspect runs, or waits for its turn: nothing else begins
        self._suspects: deque[tuple[Flight, Takeover]] = deque()
        self._held_back: list[tuple[Flight, Claim | Run]] = []
        self._unconfirmed: dict[Flight, tuple[Publication, str]] = {}
        self._now = 0.0
        self._wall = 0.0  # what the wall clock is ahead of it
        self._stopping = False
        self._clear()

    def _clear(self) -> None:
        """The commands of one step."""
        self._work: list[tuple[Flight, Run | Ask]] = []
        self._sends: list[tuple[Flight, Publication]] = []
        self._acks: list[int] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lines: list[tuple[str, Flight, str]] = []

    # ---------------------------------------------------------------- the step

    def step(self, event: Event, now: float) -> list[Command]:
        """What to do because of ``event``.  ``now``: seconds that never go back."""
        self._now = now
        commands: list[Command] = []
        match event:
            case Delivered(deliveries, wall):
                self._wall = wall - now
                for delivery in deliveries:
                    self._deliver(delivery)
            case Replied(store, replies):
                asked = self._lanes[id(store)].under_way
                for reply in replies:
                    self._advance(asked.popleft(), reply)
            case Worked(results):
                self._working -= len(results)
                for flight, result in results:
                    self._advance(flight, result)
            case Transacted(store, results, lost):
                self._working -= len(results)
                self._halls[id(store)].end(lost, now)
                for flight, verdict in results:
                    self._settle(flight, verdict)
            case Confirmed(results):
                for flight, error, unfit in results:
                    self._confirmed(flight, error, unfit)
            case Disconnected():
                self._disconnected()
            case Tick():
                pass
            case Stop():
                self._stopping = True
                self._drop_waiting()
                commands.append(Cancel())
        self._ring()
        if self._solitary:
            self._isolate()
        return commands + self._commands()

    def due(self) -> float | None:
        """When the next `Tick` is wanted."""
        return self._timers[0][0] if self._timers else None

    def idle(self) -> bool:
        """Whether nothing is under way that would have to be waited for."""
        return not (self._claiming() or self._unconfirmed)

    def _claiming(self) -> bool:
        """Whether a key may be claimed here, or a handler may run."""
        lanes = any(lane.under_way or lane.ops for lane in self._lanes.values())
        return lanes or bool(self._working or self._work)

    def names(self) -> list[str]:
        """The keys whose handlers are under way."""
        return [flights[0].key for flights in self._window.values()]

    def _commands(self) -> list[Command]:
        commands: list[Command] = []
        for place, lane in self._lanes.items():
            if lane.ops:
                commands.append(Apply(self._stores[place], lane.ops))
                lane.under_way.extend(lane.flights)
                lane.ops, lane.flights = [], []
        commands += self._transactions()
        if self._work:
            self._working += len(self._work)
            commands.append(Work(self._work))
        if self._sends:
            commands.append(Send(self._sends))
        if self._acks:
            commands.append(Acknowledge(self._acks))
        if self._counts or self._lines:
            commands.append(Tell(self._counts, self._lines))
        if commands:
            self._clear()
        return commands

    def _transactions(self) -> list[Command]:
        """The next of each store, unless a suspect wants to be alone."""
        commands: list[Command] = []
        for hall in self._halls.values() if not self._solitary else ():
            while batch := hall.next():
                self._working += len(batch)
                commands.append(
                    Transact(hall.store, [(each, partial(self._protocol, each)) for each in batch])
                )
        return commands

    def _ring(self) -> None:
        while self._timers and self._timers[0][0] <= self._now:
            _, _, flight, then = heapq.heappop(self._timers)
            then(flight)

    def _after(self, seconds: float, flight: Flight, then: Callable[[Flight], None]) -> None:
        heapq.heappush(self._timers, (self._now + seconds, next(self._order), flight, then))

    # ---------------------------------------------------------------- a delivery comes

    def _deliver(self, delivery: Delivery) -> None:
        if self._stopping:
            return
        flight = Flight(delivery, delivery.tag)
        try:
            message = decode(delivery.body, delivery.properties)
            route = self._routes.get(message.type)
            if route is None:
                raise BadMessage(f"no handler for type {message.type!r}")
            flight.message, flight.route = message, route
            if refused := replay_refused(route.policy, delivery.properties.headers):
                raise BadMessage(refused)
            self._identify(flight, route.policy, message)
        except BadMessage as error:
            self._dead(flight, "rejected", str(error))
            return
        first = self._window.get(flight.key)
        if first is None and route.policy is not None and not _must_ask(flight):
            done = route.policy.store.recall(flight.key, self._now)
            if done is not None:
                self._repeated(flight, done)
                return
        flight.steps = self._protocol(flight)
        if first is not None:
            first.append(flight)
            return
        self._window[flight.key] = [flight]
        self._start(flight)

    def _repeated(self, flight: Flight, done: Done) -> None:
        """The short way for most duplicates: nothing is asked of the store, and nobody waits for it."""
        if isinstance(repeated(done, flight.fingerprint), Conflict):
            self._dead(flight, "conflict", CONFLICT)
        else:
            self._acknowledge(flight, "skipped")

    def _identify(self, flight: Flight, policy: Policy | None, message: Message) -> None:
        """Find the key and the fingerprint; what the handler's own functions raise rejects the message."""
        try:
            if policy is None:
                flight.key = f"delivery {flight.tag}"
                return
            flight.key = policy.key((message,), {})
            flight.fingerprint = policy.fingerprint((message,), {})
        except Exception as error:
            raise BadMessage(describe(error) if not isinstance(error, BadMessage) else str(error)) from None

    def _protocol(self, flight: Flight) -> Protocol:
        assert flight.route is not None
        policy = flight.route.policy
        if policy is None:
            return unguarded(_attempts(flight.delivery) + 1)
        too_old, sent_back = partial(self._too_old, flight), _sent_back(flight.delivery)
        return protocol(policy, flight.key, flight.fingerprint, too_old, sent_back=sent_back)

    # ---------------------------------------------------------------- along its protocol

    def _start(self, flight: Flight) -> None:
        """Begin its protocol, here or in a transaction."""
        policy = flight.route.policy if flight.route is not None else None
        if policy is None or not policy.transaction:
            self._advance(flight, None)
            return
        hall = self._halls.get(id(policy.store))
        if hall is None:
            store = cast(Inbox, policy.store)
            hall = self._halls[id(store)] = _Hall(store, min(self._workers, store.transactions))
        hall.waiting.append(flight)

    def _advance(self, flight: Flight, event: Any) -> None:
        """Send ``event`` into the flight's protocol and file what it wants next."""
        assert flight.steps is not None
        while True:
            try:
                step = flight.steps.send(event)
            except StopIteration as stop:
                self._settle(flight, stop.value)
                return
            if isinstance(step, (Run, Ask)):
                if flight.tag is None or self._stopping:
                    event = NotStarted() if isinstance(step, Run) else Raised(InterruptedError("stopping"))
                    continue
                flight.attempt = step.claim.attempt
                self._begin(flight, step)
            elif isinstance(step, Await):
                if not self._patient(flight):
                    event = False
                    continue
                first, longest = LOOK_AGAIN
                self._after(doubled(first, flight.looks, longest), flight, self._look_again)
                flight.looks += 1
            elif isinstance(step, Takeover) and _is_suspect(flight.policy, event):
                self._solitary = True
                self._suspects.append((flight, step))
            else:
                self._begin(flight, step)
            return

    def _begin(self, flight: Flight, step: Op | Run | Ask) -> None:
        """File ``step``, unless it would begin something beside a suspect."""
        if self._solitary and (type(step) is Claim or (type(step) is Run and flight.unguarded())):
            self._held_back.append((flight, step))
        elif isinstance(step, (Run, Ask)):
            self._work.append((flight, step))
        else:
            self._ask_store(flight, step)

    def _isolate(self) -> None:
        """The next suspect, once nothing else is claimed; after the last, what was held back."""
        if self._claiming():
            return
        if self._suspects:
            self._ask_store(*self._suspects.popleft())
            return
        self._solitary = False
        held_back, self._held_back = self._held_back, []
        for flight, step in held_back:
            self._begin(flight, step)

    def _ask_store(self, flight: Flight, op: Op) -> None:
        store = flight.policy.store
        lane = self._lanes.get(id(store))
        if lane is None:
            lane = self._lanes[id(store)] = _Lane()
            self._stores[id(store)] = store
        lane.ops.append(op)
        lane.flights.append(flight)

    def _patient(self, flight: Flight) -> bool:
        """Whether a busy key is worth another look."""
        if not flight.looks:
            flight.since = self._now
        in_time = self._now - flight.since < flight.policy.wait
        return in_time and flight.tag is not None and not self._stopping

    def _look_again(self, flight: Flight) -> None:
        self._advance(flight, True)

    def _start_again(self, flight: Flight) -> None:
        """Look the key up anew, with a protocol of its own."""
        flight.looks = 0
        flight.steps = self._protocol(flight)
        self._start(flight)

    # ---------------------------------------------------------------- its end

    def _settle(self, flight: Flight, verdict: Verdict) -> None:
        match verdict:
            case Ok():
                self._acknowledge(flight, "ok")
                self._leave_window(flight, done=True)
            case Skipped():
                self._acknowledge(flight, "skipped")
                self._leave_window(flight, done=True)
            case Failed(error, attempt, after):
                tries = max(attempt, _attempts(flight.delivery) + 1)  # a resolver that raises uses up none
                delay = self._delay(tries) if after is None else after
                self._again_later(flight, "failed", delay, describe(error), tries)
                self._leave_window(flight, delay=delay)
            case Deferred():
                delay = self._delay(1)
                self._again_later(flight, "deferred", delay, "busy", _attempts(flight.delivery))
                self._leave_window(flight, delay=delay)
            case Refused(reason, attempt):
                self._dead(flight, "parked", reason, attempt)
                self._leave_window(flight)
            case Conflict():
                self._dead(flight, "conflict", CONFLICT)
                self._leave_window(flight)
            case Overtaken():
                self._tell(flight, "lost", "the claim was taken over")
                self._start_again(flight)
            case NotRun():
                self._not_run(flight)

    def _not_run(self, flight: Flight) -> None:
        if flight.tag is None or self._stopping:
            self._leave_window(flight)
        else:
            self._after(LOOK_AGAIN[1], flight, self._start_again)

    def _leave_window(self, flight: Flight, *, done: bool = False, delay: float | None = None) -> None:
        """Let the duplicates that waited for ``flight`` go on: skipped, later like it, or on their own."""
        waiting = self._window.pop(flight.key)[1:]
        for place, duplicate in enumerate(waiting):
            if self._stopping:
                continue
            if done and duplicate.fingerprint is None and not _must_ask(duplicate):
                self._acknowledge(duplicate, "skipped")
            elif delay is not None:
                attempts = _attempts(duplicate.delivery)
                self._again_later(duplicate, "deferred", delay, "waited for one that failed", attempts)
            else:
                self._window[flight.key] = waiting[place:]
                self._start(duplicate)
                return

    def _acknowledge(self, flight: Flight, outcome: str) -> None:
        self._tell(flight, outcome)
        if flight.tag is not None:
            self._acks.append(flight.tag)

    def _again_later(self, flight: Flight, outcome: str, delay: float, why: str, attempt: int) -> None:
        self._tell(flight, outcome, why)
        origin = flight.delivery
        headers = {**origin.properties.headers, "idemp-attempt": attempt}
        copy = Publication(origin.body, replace(origin.properties, headers=headers), "", self._queue, delay)
        self._send(flight, copy, outcome)

    def _dead(self, flight: Flight, outcome: str, reason: str, attempt: int = 0) -> None:
        self._tell(flight, outcome, reason)
        origin = flight.delivery
        headers = {
            **origin.properties.headers,
            "idemp-outcome": outcome,
            "idemp-reason": spelled(reason),
            "idemp-key": flight.key,
            "idemp-attempt": attempt,
            "idemp-queue": self._queue,
            "idemp-exchange": origin.exchange,
            "idemp-routing-key": origin.routing_key,
        }
        properties = replace(origin.properties, headers=headers)
        self._send(flight, Publication(origin.body, properties, "", f"{self._queue}.dead"), outcome)

    def _send(self, flight: Flight, copy: Publication, outcome: str) -> None:
        """Publish a copy; the delivery is acknowledged when the copy is safe."""
        if flight.tag is None:
            return
        self._unconfirmed[flight] = (copy, outcome)
        self._sends.append((flight, copy))

    def _confirmed(self, flight: Flight, error: str, unfit: bool) -> None:
        if flight not in self._unconfirmed:
            return
        if error:
            self._lines.append(("not confirmed", flight, error))
            copy, outcome = self._unconfirmed[flight]
            if unfit and copy.routing_key == self._queue:
                # Without what cannot be carried it would be another message, which nobody is to run.
                tried = copy.properties.headers["idemp-attempt"]
                self._dead(flight, "rejected", f"{outcome}, and cannot be tried again: {error}", tried)
                return
            if unfit:
                self._unconfirmed[flight] = (_plain(copy), outcome)
            self._after(SEND_AGAIN, flight, self._send_again)
            return
        del self._unconfirmed[flight]
        if flight.tag is not None:
            self._acks.append(flight.tag)

    def _send_again(self, flight: Flight) -> None:
        if flight in self._unconfirmed:
            self._sends.append((flight, self._unconfirmed[flight][0]))

    def _disconnected(self) -> None:
        """Every delivery will come again.  What runs goes on and is recorded; nothing is acknowledged."""
        self._unconfirmed.clear()
        for flights in self._window.values():
            while len(flights) > 1:
                flights.pop()
            flights[0].tag = None
        self._drop_waiting()

    def _drop_waiting(self) -> None:
        """Let go of the flights that hold no claim and only wait to look again."""
        timers, self._timers = self._timers, []
        for timer in timers:
            flight, then = timer[2:]
            if then == self._send_again and flight in self._unconfirmed:
                heapq.heappush(self._timers, timer)
            elif then != self._send_again:
                self._leave_window(flight)
        waiting = [flight for flight, _ in (*self._suspects, *self._held_back)]
        self._suspects.clear()
        self._held_back.clear()
        for hall in self._halls.values():
            waiting += hall.waiting
            hall.waiting.clear()
        for flight in waiting:
            self._leave_window(flight)

    def _too_old(self, flight: Flight) -> str:
        """Why the message may have been done and forgotten: it is older than the retention."""
        if flight.tag is None:
            return ""  # it will not be run anyway, and comes again to where it can be parked with its key
        headers = flight.delivery.properties.headers
        published = headers.get("idemp-retried-at", flight.delivery.properties.timestamp)
        if not isinstance(published, (int, float)):
            return ""
        age, kept = self._wall + self._now - published, flight.policy.store.retention
        if age <= kept:
            return ""
        return f"older than the retention: published {age:.0f} s ago, ids are kept for {kept:.0f} s"

    def _delay(self, attempt: int) -> float:
        """Doubling, between half and the whole, so that what failed together does not return together."""
        return doubled(self._backoff, attempt - 1, MAX_DELAY) * (0.5 + self._chance() / 2)

    def _tell(self, flight: Flight, outcome: str, why: str = "") -> None:
        kind = flight.message.type if flight.message is not None and flight.route is not None else ""
        self._counts[kind, outcome] += 1
        self._lines.append((outcome, flight, why))


def _is_suspect(policy: Policy, state: object) -> bool:
    """Whether the attempt that a takeover of ``state`` begins should be made alone."""
    return (
        policy.in_doubt != "park"
        and isinstance(state, Doubt)
        and (state.attempt >= 2 or state.attempt + 1 >= policy.attempts)
    )


def unguarded(attempt: int) -> Generator[Any, Any, Verdict]:
    """The protocol of a handler without a policy: run it, at least once.  Attempts travel in a header."""
    claim = Claimed(0, attempt)
    came: Returned | Raised | NotStarted = yield Run(claim)
    match came:
        case Returned(value):
            return Ok(value, claim)
        case NotStarted():
            return NotRun()
        case Raised(error):
            if isinstance(error, PermanentFailure):
                return Refused(f"permanent failure: {describe(error)}", attempt, error)
            if attempt >= ATTEMPTS:
                return Refused(f"attempts used up ({attempt}): {describe(error)}", attempt, error)
            return Failed(error, attempt, error.after if isinstance(error, RetryLater) else None)


def _plain(copy: Publication) -> Publication:
    """A dead letter with less of what nobody can carry: no header of the publisher's; then nothing of his.

    His may be named as ours are, or have a name that is no text.
    """
    headers = copy.properties.headers
    ours = {name: value for name, value in headers.items() if str(name).startswith("idemp-")}
    if len(ours) < len(headers):
        return copy._replace(properties=replace(copy.properties, headers=ours))
    kept = Properties(
        timestamp=copy.properties.timestamp,
        content_type="application/octet-stream",
        headers={name: headers[name] for name in _WRITTEN if name in headers},
    )
    return copy._replace(properties=kept)


def _sent_back(delivery: Delivery) -> bool:
    """Whether a person sent it back: then its key may have been forgotten since it was called done."""
    return "idemp-retry" in delivery.properties.headers


def _must_ask(flight: Flight) -> bool:
    """Whether it goes the whole way to its verdict, though its key is done by all that is known here.

    Also one whose transaction may have been made by who was killed before he counted it: see consumer.py.
    """
    delivery = flight.delivery
    return _sent_back(delivery) or (delivery.redelivered and flight.policy.transaction)


def _attempts(delivery: Delivery) -> int:
    found = delivery.properties.headers.get("idemp-attempt", 0)
    # Anybody may write a header: one more than this is a number too, in AMQP as well.
    return min(found, 1 << 31) if isinstance(found, int) else 0
