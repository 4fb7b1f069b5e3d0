"""One process: the shipped pipeline, its store's session, its workers, its connection."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from idemp.errors import InDoubt, PermanentFailure, RetryLater, StoreUnavailable
from idemp.message import Message, decode
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
from idemp.policy import fingerprint, make_policy
from idemp.ports import Delivery, Op, Publication
from idemp.protocol import Ask, NotStarted, Raised, Returned
from tests.simulator.judge import Attempt, must
from tests.simulator.stores import TTL

if TYPE_CHECKING:
    from tests.simulator.world import World

QUEUE = "orders-queue"


class Process:
    """Threads and drivers are events of the world; each is lost when the process dies."""

    def __init__(self, world: World) -> None:
        self.world, plan = world, world.plan
        world.births += 1
        self.name = f"p{world.births}"
        self.dead = self.stopping = False
        self.paused_until = self.mute_until = 0.0
        self.session = world.store.open()
        policy = make_policy(
            _handler,
            self.session,
            name="h",
            key=None,
            fingerprint=(lambda message: message.args) if plan.fingerprint else None,
            on_busy="wait",
            wait=2.0,
            in_doubt=_handler if plan.in_doubt == "ask" else plan.in_doubt,  # type: ignore[arg-type]
            attempts=plan.attempts,
            permanent=(),
            codec=None,
        )
        routes = {"t": Route(_handler, policy), "bare": Route(_handler, None)}
        self.pipeline = Pipeline(QUEUE, routes, chance=world.chance.random)
        # The connection: what is out on it, which acknowledgements are on their way, which copies are safe.
        self.connection = 0
        self.connected = True
        self.told = True  # false while the connection is gone and nobody here has noticed
        self.polling = False
        self.out: dict[int, Publication] = {}
        self.acking: set[int] = set()
        self.copied: set[int] = set()
        self.too_old: dict[int, bool] = {}  # a tag: whether its message was, when it came
        # The store's thread, and the workers.
        self.asked: deque[tuple[Any, Sequence[Op]]] = deque()
        self.asking = False
        self.jobs: deque[tuple[Any, Any]] = deque()
        self.idle_workers = plan.workers
        self.results: list[tuple[Any, Any]] = []
        self.tick_at = 0.0
        self.later(TTL / 3, self.beat)
        self.poll()

    def later(self, delay: float, what: Any, *args: Any) -> None:
        """An event of this process."""
        self.world.later(delay, self, what, *args)

    def at_rest(self) -> bool:
        """Nothing is out, nothing under way."""
        return not self.out and self.pipeline.idle() and not self.stopping

    def busy(self) -> bool:
        """A handler runs, so that it hurts most to strike now."""
        return self.idle_workers < self.world.plan.workers

    # ------------------------------------------------------------ the pipeline

    def step(self, event: Any) -> None:
        """One step of the shipped code."""
        for command in self.pipeline.step(event, self.world.now):
            self.perform(command)
        due = self.pipeline.due()
        if due is not None and (not self.tick_at or due < self.tick_at):
            self.tick_at = due
            self.later(max(0.0, due - self.world.now), self.tick)
        if self.stopping and self.pipeline.idle():
            self.later(self.world.soon(), self.end)

    def tick(self) -> None:
        """The pipeline wanted to be woken."""
        self.tick_at = 0.0
        self.step(Tick())

    def perform(self, command: Any) -> None:
        """What consumer.py does with threads."""
        match command:
            case Apply(store, ops):
                self.asked.append((store, ops))
                self.ask_store()
            case Work(items):
                self.jobs.extend(items)
                self.later(self.world.soon(), self.work)
            case Send(items):
                for flight, copy in items:
                    self.send(flight, copy)
            case Acknowledge(tags):
                for tag in tags:
                    self.acknowledge(tag)
            case Cancel():
                self.stopping = True
                self.later(30.0 * self.world.chance.random(), self.grace_is_over)
            case Tell(counts):
                for (_, outcome), n in counts.items():
                    self.world.did[outcome] += n
                    self.world.note(outcome)

    # ------------------------------------------------------------ the store's thread

    def ask_store(self) -> None:
        """One or more of the batches that were asked first, as one."""
        if self.asking or not self.asked:
            return
        self.asking = True
        most = len(self.asked) if self.world.chance.random() < 0.8 else 1
        batches = [self.asked.popleft() for _ in range(most)]
        ops = [op for _, batch in batches for op in batch]
        self.later(self.world.soon(), self.request, batches[0][0], ops)

    def request(self, store: Any, ops: Sequence[Op]) -> None:
        """The request reaches the store, or not; it is sent until it is answered."""
        world = self.world
        lost = ""
        if world.now < world.away_until or world.happens("lost_request"):
            lost = "request"
        elif world.happens("lost_reply"):
            lost = "reply"
        try:
            replies = self.session.apply(ops, lost)
        except StoreUnavailable:
            self.later(0.2 + world.chance.random(), self.request, store, ops)
            return
        for reply in replies:
            world.note(type(reply).__name__)
        delay = 12.0 * world.chance.random() if world.happens("slow_reply") else world.soon()
        self.later(delay, self.replied, store, replies)

    def replied(self, store: Any, replies: Any) -> None:
        """The reply is here."""
        self.asking = False
        self.step(Replied(store, replies))
        self.ask_store()

    def beat(self) -> None:
        """A heartbeat; between two of them the watch brings something."""
        world = self.world
        self.later(TTL / 3, self.beat)
        if world.now >= max(world.away_until, self.mute_until):
            self.session.learn()
            self.session.beat()

    # ------------------------------------------------------------ workers

    def work(self) -> None:
        """Free workers take what waits."""
        while self.idle_workers and self.jobs:
            self.idle_workers -= 1
            flight, step = self.jobs.popleft()
            if isinstance(step, Ask):
                self.resolve(flight, step.claim)
            elif flight.route.policy is None:
                self.run_bare(flight)
            else:
                self.run(flight, step.claim)

    def hand_back(self, flight: Any, result: Any) -> None:
        """A worker is through; results that come together are told together."""
        self.idle_workers += 1
        self.results.append((flight, result))
        if len(self.results) == 1:
            self.later(self.world.soon(), self.tell_results)
        self.work()

    def tell_results(self) -> None:
        """To the pipeline."""
        results, self.results = self.results, []
        self.step(Worked(results))

    def resolve(self, flight: Any, claim: Any) -> None:
        """What a resolver says."""
        try:
            answer = self.world.ask(flight.key, claim)
        except ConnectionError as error:
            answer = Raised(error)
        self.hand_back(flight, answer)

    def run_bare(self, flight: Any) -> None:
        """A handler without a policy."""
        if self.world.happens("raises"):
            self.hand_back(flight, Raised(ValueError("before the effect")))
            return
        self.world.ran_bare[flight.message.id] += 1
        self.hand_back(flight, Returned(None, None))

    def run(self, flight: Any, claim: Any) -> None:
        """A handler: it starts, has its effect, and ends, with time in between."""
        world = self.world
        if self.stopping or not self.session.fresh(claim.token) or world.happens("not_started"):
            world.did["NotStarted"] += 1
            self.hand_back(flight, NotStarted())
            return
        attempt = world.judge.starts(flight.key, claim, self.session.id, self.too_old[flight.delivery.tag])
        world.note(f"{flight.key} {claim.attempt}")
        if flight.key in world.poison:
            if world.chance.random() < 0.5:
                world.judge.effect(attempt)
            world.did["poisoned"] += 1
            self.die()
            return
        self.later(self.takes(), self.reach_out, flight, attempt)

    def takes(self) -> float:
        """How long a part of a handler takes."""
        return 20.0 * self.world.chance.random() if self.world.happens("slow_handler") else self.world.soon()

    def reach_out(self, flight: Any, attempt: Attempt) -> None:
        """The effect, or what comes in its place."""
        world = self.world
        if world.happens("raises"):
            self.ends(flight, attempt, ValueError("before the effect"))
        elif world.happens("permanent"):
            self.ends(flight, attempt, PermanentFailure("never"))
        elif world.happens("retry_later"):
            self.ends(flight, attempt, RetryLater(after=world.chance.random() * 5))
        elif world.happens("InDoubt") and world.chance.random() < 0.5:
            self.ends(flight, attempt, InDoubt())
        elif not world.judge.effect(attempt):
            self.ends(flight, attempt, PermissionError("a newer token was here, or somebody asked"))
        else:
            self.later(self.takes(), self.come_back, flight, attempt)

    def come_back(self, flight: Any, attempt: Attempt) -> None:
        """After the effect."""
        world = self.world
        if world.happens("raises_after"):
            self.ends(flight, attempt, ValueError("after the effect"))
        elif world.happens("InDoubt"):
            self.ends(flight, attempt, InDoubt())
        elif world.happens("interrupted"):
            self.ends(flight, attempt, KeyboardInterrupt())
        else:
            attempt.said = "returned"
            self.hand_back(flight, Returned(None, b"1"))

    def ends(self, flight: Any, attempt: Attempt, error: BaseException) -> None:
        """A handler raises."""
        unsure = isinstance(error, InDoubt) or not isinstance(error, Exception)
        attempt.said = "unsure" if unsure else "raised"
        self.hand_back(flight, Raised(error))

    # ------------------------------------------------------------ the connection

    def poll(self) -> None:
        """Ask for deliveries, if there may be some."""
        able = self.connected and not self.stopping and not self.polling
        if able and self.world.queue and len(self.out) < self.world.plan.prefetch:
            self.polling = True
            self.later(self.world.soon(), self.deliver, self.connection)

    def deliver(self, connection: int) -> None:
        """Some messages come."""
        world = self.world
        self.polling = False
        if connection != self.connection or self.stopping:
            return
        room = min(world.plan.prefetch - len(self.out), len(world.queue))
        batch = []
        for _ in range(world.chance.randint(1, room) if room else 0):
            tag, copy = next(world.tags), world.queue.pop(0)
            self.out[tag] = copy
            published = copy.properties.headers.get("idemp-retried-at", copy.properties.timestamp)
            too_old = published is not None and world.wall() - published > world.plan.retention
            self.too_old[tag] = too_old
            batch.append(Delivery(tag, copy.body, copy.properties, "", QUEUE, False))
        if batch:
            self.step(Delivered(batch, world.wall()))
        self.poll()

    def send(self, flight: Any, copy: Publication) -> None:
        """A copy sets out."""
        headers = copy.properties.headers
        if "idemp-outcome" in headers and flight.key in self.world.keys:
            self.world.judge.set_aside(flight.key, str(headers["idemp-outcome"]))
        self.world.coming += 1
        self.world.later(self.world.soon(), None, self.reaches, flight, flight.tag, copy, self.wire())

    def wire(self) -> int:
        """The connection that is written to."""
        return self.connection if self.told else -1

    def reaches(self, flight: Any, tag: int, copy: Publication, connection: int) -> None:
        """The broker has it; or the connection broke on the way, and nobody knows."""
        world = self.world
        world.coming -= 1
        cut = self.dead or connection != self.connection
        error = ""
        if world.happens("unroutable"):
            error = "no queue takes it"
        elif world.happens("unconfirmed") or (cut and world.chance.random() < 0.5):
            error = "no confirm"
        else:
            if copy.routing_key.endswith(".dead"):
                world.set_aside(copy)
            else:
                world.send_in(copy.delay, copy)
            if world.happens("confirm_lost"):
                error = "no confirm"
        if not cut:
            self.later(world.soon(), self.confirmed, flight, tag, error, connection)

    def confirmed(self, flight: Any, tag: int, error: str, connection: int) -> None:
        """The broker's word."""
        if connection == self.connection:
            if not error:
                self.copied.add(tag)
            self.step(Confirmed([(flight, error, False)]))

    def acknowledge(self, tag: int) -> None:
        """Nothing may be lost by it."""
        if not self.told:
            return
        must(tag in self.out and tag not in self.acking, "acknowledged what is not out on this connection")
        copy = self.out[tag]
        if tag not in self.copied:
            self.settled_outright(copy)
        self.acking.add(tag)
        self.later(self.world.soon(), self.acknowledged, tag, self.connection)

    def settled_outright(self, copy: Publication) -> None:
        """Without a copy that is safe: then it is done."""
        message = decode(copy.body, copy.properties)
        if message.type == "bare":
            must(self.world.ran_bare[message.id], f"acknowledged {message.id}, which has not run")
            return
        print_ = fingerprint(message.args) if self.world.plan.fingerprint else None
        self.world.judge.acknowledged(f"h/{message.id}", print_)

    def acknowledged(self, tag: int, connection: int) -> None:
        """The broker has it."""
        if connection == self.connection:
            self.out.pop(tag, None)
            self.acking.discard(tag)
            self.poll()

    # ------------------------------------------------------------ what strikes it

    def cut(self) -> None:
        """Everything out goes back to the queue, but what an acknowledgement reached."""
        world = self.world
        for tag in sorted(self.acking):
            if world.chance.random() < 0.5:
                self.out.pop(tag, None)
        back = list(self.out.values())
        world.queue[:0] = back
        self.out.clear()
        self.acking.clear()
        self.copied.clear()
        self.connection += 1
        self.polling = False

    def disconnect(self) -> bool:
        """What the threads do goes on; who is paused notices when it wakes."""
        if not self.connected:
            return False
        self.cut()
        self.connected = self.told = False
        if self.paused_until > self.world.now:
            self.later(0.0, self.notice)
        else:
            self.notice()
        self.world.offer()
        return True

    def notice(self) -> None:
        """The connection is gone."""
        self.told = True
        self.step(Disconnected())
        self.later(self.world.chance.random() * 3, self.reconnect)

    def reconnect(self) -> None:
        """It is back."""
        self.connected = True
        self.poll()

    def stop(self) -> bool:
        """SIGTERM."""
        if self.stopping:
            return False
        self.step(Stop())
        return True

    def end(self) -> None:
        """All that ran is settled."""
        if self.pipeline.idle():
            self.session.close()
            self.leave()

    def grace_is_over(self) -> None:
        """Some handler took too long; a heartbeat ends what is left."""
        self.world.did["grace over"] += 1
        self.session.close()
        self.leave()

    def die(self) -> None:
        """kill -9: its session stays until its time is over."""
        if hasattr(self.session, "forget"):
            self.session.forget()
        self.leave()

    def leave(self) -> None:
        """Another process comes in its place."""
        if self.dead:
            return
        world = self.world
        self.dead = True
        self.cut()
        world.later(0.1 + world.chance.random() * 3, None, self.replace)
        world.coming += 1
        world.offer()

    def replace(self) -> None:
        """The new one."""
        world = self.world
        world.coming -= 1
        world.processes[world.processes.index(self)] = Process(world)


def _handler(message: Message) -> None:
    """Never called: the world decides what handlers do."""
