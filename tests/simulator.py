"""A world for the shipped pipeline: broker, store, clock and workers simulated, faults by chance.

Everything follows from the seed.  The laws are checked while it runs and when it has come to rest.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from idemp.errors import InDoubt
from idemp.laws import Entry, Ledger, view
from idemp.message import Message
from idemp.pipeline import (
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
    Work,
    Worked,
)
from idemp.policy import Happened, NotHappened, make_policy
from idemp.ports import Delivery, Done, Parked, Publication
from idemp.protocol import Ask, NotStarted, Raised, Returned

QUEUE = "orders-queue"


class World:
    """One queue, one store, ``count`` consumers; ``keys`` messages, each published ``copies`` times."""

    def __init__(
        self, seed: int, *, in_doubt: Any = "retry", keys: int = 6, copies: int = 3, count: int = 2
    ) -> None:
        self.chance = random.Random(seed)
        self.in_doubt = self.ask if in_doubt == "ask" else in_doubt
        self.now = 0.0
        self.faults = 60
        self.entries: dict[str, Entry] = {}
        self.token = 0
        self.alive: set[str] = set()
        self.queue: list[Publication] = []
        self.delayed: list[tuple[float, Publication]] = []
        self.dead: list[Publication] = []
        self.tags = 0
        self.effects: Counter[str] = Counter()
        self.excused: Counter[str] = Counter()  # effects that a crash or the handler left unrecorded
        self.overlapped: Counter[str] = Counter()  # runs that went on after their session was dead
        self.did: Counter[str] = Counter()
        messages = [Message(str(n), "t") for n in range(keys)] * copies
        self.chance.shuffle(messages)
        self.keys = [f"h/{n}" for n in range(keys)]
        for message in messages:
            copy = Publication(message.encode(), message.properties()._replace(timestamp=None), "", QUEUE)
            self.queue.append(copy)
        self.born = 0
        self.consumers = [Consumer(self) for _ in range(count)]

    def ask(self, message: Message) -> Any:
        return Happened("found") if self.effects[f"h/{message.id}"] else NotHappened()

    # ------------------------------------------------------------ the run

    def run(self) -> None:
        """Until every message is settled."""
        for _ in range(200_000):
            self.now += self.chance.random() * 0.05
            for due, copy in self.delayed[:]:
                if due <= self.now:
                    self.delayed.remove((due, copy))
                    self.queue.append(copy)
            self.chance.choice(self.consumers).move()
            if self.faults and self.chance.random() < 0.06:
                self.faults -= 1
                self.fault()
            if self.at_rest():
                self.check()
                return
        raise AssertionError("it never came to rest")

    def fault(self) -> None:
        place = self.chance.randrange(len(self.consumers))
        match self.chance.choice(["kill", "kill", "pause", "disconnect", "stop"]):
            case "pause":
                self.did["pause"] += 1
                self.consumers[place].lose_session()
            case "kill":
                self.did["kill"] += 1
                self.consumers[place].die()
                self.consumers[place] = Consumer(self)
            case "disconnect":
                self.did["disconnect"] += 1
                self.consumers[place].disconnect()
            case "stop":
                self.did["stop"] += 1
                self.consumers[place].step(Stop())

    def at_rest(self) -> bool:
        waiting = self.queue or self.delayed or any(consumer.out for consumer in self.consumers)
        return not waiting and all(consumer.pipeline.idle() for consumer in self.consumers)

    def state(self, key: str) -> Any:
        return view(self.entries.get(key), self.alive.__contains__)

    def settled(self, publication: Publication) -> None:
        """A delivery was acknowledged outright: its key must be done."""
        key = f"h/{_id(publication)}"
        assert isinstance(self.state(key), Done), f"acknowledged {key} against {self.state(key)}"

    def check(self) -> None:
        """Nothing lost, nothing doubled without a cause on record."""
        for key in self.keys:
            state = self.state(key)
            assert isinstance(state, Done | Parked), f"{key} ended as {state}"
            if isinstance(state, Parked):
                assert any(f"h/{_id(copy)}" == key for copy in self.dead), f"{key} is parked, but not at hand"
            # A resolver cannot know of a run that is still to have its effect.
            excused = self.overlapped[key] + (0 if callable(self.in_doubt) else self.excused[key])
            allowed = 1 if self.in_doubt == "park" else 1 + excused
            assert self.effects[key] <= allowed, f"{key}: {self.effects[key]} effects, {allowed} explained"


def _id(publication: Publication) -> str:
    assert publication.properties.message_id is not None
    return publication.properties.message_id


class Consumer:
    """One process: a pipeline, and what it asked for that is not done yet."""

    def __init__(self, world: World) -> None:
        self.world = world
        world.born += 1
        self.session = f"s{world.born}"
        world.alive.add(self.session)
        self.retention = 3600.0
        policy = make_policy(
            _handler,
            self,  # type: ignore[arg-type]
            name="h",
            key=None,
            fingerprint=None,
            on_busy="wait",
            wait=2.0,
            in_doubt=world.in_doubt,
            attempts=50,
            permanent=(),
            codec=None,
        )
        self.pipeline = Pipeline(QUEUE, {"t": Route(_handler, policy)}, chance=world.chance.random)
        self.out: dict[int, Publication] = {}
        self.copied: set[int] = set()
        self.todo: list[Callable[[], None]] = []
        self.asked: deque[tuple[Any, Any]] = deque()
        self.stopping = False

    def apply(self, ops: Any) -> Any:
        """Carry out a batch under this session."""
        world = self.world
        ledger = Ledger(world.entries, world.alive.__contains__, self.session, world.token, world.now)
        replies = [ledger.apply(op) for op in ops]
        world.token = ledger.token
        return replies

    # ------------------------------------------------------------ moves

    def move(self) -> None:
        """One thing that could happen next."""
        chance = self.world.chance
        due = self.pipeline.due()
        if due is not None and due <= self.world.now:
            self.step(Tick())
        elif self.todo and chance.random() < 0.7:
            self.todo.pop(chance.randrange(len(self.todo)))()
        elif self.world.queue and len(self.out) < 5 and not self.stopping:
            self.deliver()
        elif self.stopping and self.pipeline.idle():
            self.die()
            self.world.consumers[self.world.consumers.index(self)] = Consumer(self.world)

    def deliver(self) -> None:
        batch = []
        for _ in range(self.world.chance.randint(1, 4)):
            if self.world.queue:
                self.world.tags += 1
                copy = self.world.queue.pop(0)
                self.out[self.world.tags] = copy
                batch.append(Delivery(self.world.tags, copy.body, copy.properties, "", QUEUE, False))
        self.step(Delivered(batch, self.world.now))

    def step(self, event: Any) -> None:
        for command in self.pipeline.step(event, self.world.now):
            self.perform(command)

    def perform(self, command: Any) -> None:
        match command:
            case Apply(store, ops):
                self.asked.append((store, ops))
                self.todo.append(self.answer)
            case Work(items):
                for item in items:
                    self.todo.append(lambda item=item: self.work(*item))  # type: ignore[misc]
            case Send(items):
                for flight, copy in items:
                    self.todo.append(lambda flight=flight, copy=copy: self.send(flight, copy))  # type: ignore[misc]
            case Acknowledge(tags):
                for tag in tags:
                    self.acknowledge(tag)
            case Cancel():
                self.stopping = True
            case Tell(counts):
                self.world.did.update({outcome: n for (_, outcome), n in counts.items()})

    def answer(self) -> None:
        """One or more of the batches that were asked first, as one."""
        if self.asked:
            batches = [self.asked.popleft() for _ in range(self.world.chance.randint(1, len(self.asked)))]
            replies = self.apply([op for _, ops in batches for op in ops])
            self.step(Replied(batches[0][0], replies))

    def work(self, flight: Any, command: Any) -> None:
        world, chance = self.world, self.world.chance
        if isinstance(command, Ask):
            self.step(Worked([(flight, world.ask(flight.message))]))
            return
        what = chance.random()
        entry = world.entries.get(flight.key)
        stale = entry is None or entry.session != self.session
        if self.stopping or stale or what < 0.05:
            self.step(Worked([(flight, NotStarted())]))
        elif what < 0.15:
            self.step(Worked([(flight, Raised(ValueError("before the effect")))]))
        else:
            world.effects[flight.key] += 1
            if what < 0.2:
                world.excused[flight.key] += 1
                world.did["InDoubt"] += 1
                self.step(Worked([(flight, Raised(InDoubt()))]))
            else:
                self.todo.append(lambda: self.step(Worked([(flight, Returned(None, None))])))

    def send(self, flight: Any, copy: Publication) -> None:
        if self.world.chance.random() < 0.1:
            self.step(Confirmed([(flight, "no confirm", False)]))
            return
        if copy.routing_key.endswith(".dead"):
            self.world.dead.append(copy)
        else:
            self.world.delayed.append((self.world.now + copy.delay, copy))
        if flight.tag is not None:
            self.copied.add(flight.tag)
        self.step(Confirmed([(flight, "", False)]))

    def acknowledge(self, tag: int) -> None:
        assert tag in self.out, "acknowledged on a connection that is gone"
        publication = self.out.pop(tag)
        if tag not in self.copied:
            self.world.settled(publication)

    # ------------------------------------------------------------ faults

    def requeue(self) -> None:
        self.world.queue[:0] = self.out.values()
        self.out.clear()

    def disconnect(self) -> None:
        self.requeue()
        # Unsent copies go down with the connection; what the threads do goes on.
        self.step(Disconnected())

    def die(self) -> None:
        """kill -9: the session ends; what ran and was not recorded is excused, because it is in doubt."""
        for key in self.lose_session():
            self.world.excused[key] += 1
            self.world.overlapped[key] -= 1
        self.requeue()

    def lose_session(self) -> list[str]:
        """Paused for too long: its claims are in doubt, its handlers go on, and a new session begins."""
        world = self.world
        mine = ("claimed", self.session)
        claims = [key for key, entry in world.entries.items() if (entry.state, entry.session) == mine]
        world.overlapped.update(claims)
        world.alive.discard(self.session)
        world.born += 1
        self.session = f"s{world.born}"
        world.alive.add(self.session)
        return claims


def _handler(message: Message) -> None:
    """Never called: the world decides what handlers do."""
