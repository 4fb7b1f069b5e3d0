"""The world: one queue, a store, processes that run the shipped pipeline, and what strikes them.

One heap of (time, order, event).  Everything follows from the seed, and `World.trace` is a hash of all
that happened, so that the same seed can be seen to give the same run.
"""

from __future__ import annotations

import heapq
import itertools
import random
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from idemp.message import Message, Properties
from idemp.policy import Happened, NotHappened, Unknown
from idemp.ports import Applied, Claimed, Complete, Parked, Publication, Release, Takeover
from tests.simulator.judge import Broken, Judge, must
from tests.simulator.plan import CLASSIC, Plan, swarm
from tests.simulator.process import QUEUE, Process
from tests.simulator.stores import JournalStore, LedgerStore, Place

DAWN = 1_000_000.0
"""The wall clock when the world begins."""
IDLE = ("_look_around", "beat")
"""What goes on when nothing happens: no steps."""
PATIENCE = 100_000
"""Steps after which a world that does not come to rest never will."""


class World:
    """What ``plan`` says, with the chances of ``seed``."""

    def __init__(self, seed: int, *, in_doubt: str = "", plan: Plan | None = None) -> None:
        self.seed = seed
        given = plan or CLASSIC
        self.plan = given._replace(in_doubt=in_doubt) if in_doubt else given
        self.again = f"python -m tests.simulator {seed}"
        if plan is None:
            self.again += f" --classic {self.plan.in_doubt}"
        self.chance = random.Random(seed)
        self.now = 0.0
        self.jumped = 0.0
        self.steps = self.trace = 0
        self.did: Counter[str] = Counter()
        self.blows = self.plan.blows if self.plan.strikes else 0
        self.calm = False
        self.away_until = 0.0
        self.queue: list[Publication] = []
        self.coming = 0  # copies and messages that are on their way to the queue
        self.dead: list[Publication] = []
        self.bodies: set[bytes] = set()
        self.keys: list[str] = []
        self.others: list[bytes] = []  # bodies that no handler gets
        self.poison: set[str] = set()
        self.ran_bare: Counter[str] = Counter()
        self._heap: list[tuple[float, int, Process | None, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self.judge = Judge(self.plan, lambda: self.now)
        place = Place(
            lambda: self.now,
            self.wall,
            self.judge.saw,
            self.judge.retook,
            self.chance.random,
            self.plan.retention,
        )
        self.store: Any = JournalStore(place) if self.plan.store == "journal" else LedgerStore(place)
        self.judge.store = self.store
        self.tags = itertools.count(1)
        self.births = 0
        self._publish()
        self.processes = [Process(self) for _ in range(self.plan.processes)]
        if self.blows:
            self.later(self.chance.random(), None, self._strike)
        self.later(5.0, None, self._look_around)

    @classmethod
    def swarm(cls, seed: int) -> World:
        """With a plan by chance too."""
        return cls(seed, plan=swarm(seed))

    @property
    def effects(self) -> Counter[str]:
        """How many each key had."""
        return Counter({key: record.effects for key, record in self.judge.records.items()})

    # ------------------------------------------------------------ time and chance

    def wall(self) -> float:
        """The wall clock, which may jump."""
        return DAWN + self.now + self.jumped

    def later(self, delay: float, who: Process | None, what: Callable[..., None], *args: Any) -> None:
        """Let ``what`` happen; ``who`` must be there and awake for it."""
        heapq.heappush(self._heap, (self.now + delay, next(self._order), who, what, args))

    def soon(self) -> float:
        """A usual latency."""
        return self.chance.random() * 0.05

    def happens(self, kind: str) -> bool:
        """Whether one of the odds strikes now; never once the world is calm."""
        odds = self.plan.odds.get(kind)
        if odds is None or self.calm or self.chance.random() >= odds:
            return False
        self.did[kind] += 1
        return True

    # ------------------------------------------------------------ the run

    def run(self) -> None:
        """Until every message is settled.  What is broken is raised with a line that runs it again."""
        try:
            while not self._step():
                must(self.steps < PATIENCE, "it never came to rest")
            self._check()
        except Exception as error:
            kind = "" if isinstance(error, Broken) else f"{type(error).__name__}: "
            raise Broken(f"{kind}{error}\n  {self.plan}\n  again: {self.again}") from error

    def _step(self) -> bool:
        """One event; true when all is at rest."""
        at, _, who, what, args = heapq.heappop(self._heap)
        if who is not None:
            if who.dead:
                return False
            if who.paused_until > at:
                heapq.heappush(self._heap, (who.paused_until, next(self._order), who, what, args))
                return False
        self.now = max(self.now, at)
        self.steps += what.__name__ not in IDLE
        name = f"{self.now:.6f} {who.name if who else ''} {what.__name__}"
        self.trace = zlib.crc32(name.encode(), self.trace)
        what(*args)
        return what.__name__ == "_look_around" and self._at_rest()

    def note(self, text: str) -> None:
        """Put it into the trace."""
        self.trace = zlib.crc32(text.encode(), self.trace)

    def _look_around(self) -> None:
        self.later(5.0, None, self._look_around)
        if not self.blows and self.now > self.plan.trouble:
            self.calm = True
        if self.plan.retention < 3600.0 and self.plan.store == "ledger":
            self.store.drop_what_is_over(list(self.store.entries))

    def _at_rest(self) -> bool:
        busy = self.queue or self.coming or not self.calm
        return not busy and all(process.at_rest() for process in self.processes)

    # ------------------------------------------------------------ messages

    def _publish(self) -> None:
        """Every key in some copies, and messages that are odd."""
        plan, odd = self.plan, dict(self.plan.odd)
        messages: list[tuple[bytes, Properties]] = []
        for number in range(plan.keys):
            poison = number < odd.get("poison", 0)
            old = plan.keys - number <= odd.get("old", 0)
            if poison:
                self.poison.add(f"h/{number}")
            self.keys.append(f"h/{number}")
            for copy in range(plan.copies):
                other = copy and number < odd.get("conflict", 0)
                args = {"other": True} if other else {}
                age = 2 * plan.retention if old else 0.0
                messages.append(self._event(str(number), "t", args, age))
        messages += [self._event(f"b{number}", "bare", {}, 0.0) for number in range(odd.get("bare", 0))]
        for number in range(odd.get("garbage", 0)):
            body = f"not JSON {number}".encode()
            self.others.append(body)
            messages.append((body, Properties(timestamp=self.wall())))
        for number in range(odd.get("unknown", 0)):
            messages.append(self._event(f"u{number}", "nobody's", {}, 0.0))
            self.others.append(messages[-1][0])
        for kind, count in odd.items():
            self.did[kind] += count
        self.chance.shuffle(messages)
        self.messages = len(messages)
        for body, properties in messages:
            self.bodies.add(body)
            at = self.chance.random() * plan.spread
            self.send_in(at, Publication(body, properties, "", QUEUE))

    def _event(self, id: str, kind: str, args: Any, age: float) -> tuple[bytes, Properties]:
        message = Message(id, kind, args, published=self.wall() - age)
        return message.encode(), message.properties()

    def send_in(self, delay: float, copy: Publication) -> None:
        """A message comes into the queue after ``delay``."""
        self.coming += 1
        self.later(delay, None, self._arrives, copy)

    def _arrives(self, copy: Publication) -> None:
        self.coming -= 1
        must(copy.body in self.bodies, "a message was invented")
        self.queue.append(copy)
        self.offer()

    def offer(self) -> None:
        """Let somebody take what is in the queue."""
        for process in self.processes:
            process.poll()

    def set_aside(self, copy: Publication) -> None:
        """A copy comes into the dead-letter queue."""
        must(copy.body in self.bodies, "a dead letter was invented")
        self.dead.append(copy)

    # ------------------------------------------------------------ what the effects' system says

    def ask(self, key: str, claim: Claimed) -> Any:
        """A resolver's answer.  Not there means: it cannot come any more either."""
        if self.happens("resolver_raises"):
            raise ConnectionError("the effects' system does not answer")
        if self.happens("resolver_unknown"):
            return Unknown("the effects' system does not know")
        happened = self.judge.had_effect(key)
        self.judge.settle(key, claim.token, happened=happened)
        self.did["Happened" if happened else "NotHappened"] += 1
        return Happened("found") if happened else NotHappened()

    # ------------------------------------------------------------ strikes

    def _strike(self) -> None:
        self.blows -= 1
        if self.blows:
            self.later(self.chance.expovariate(1.0), None, self._strike)
        kinds, weights = zip(*self.plan.strikes.items(), strict=True)
        [kind] = self.chance.choices(kinds, weights)
        busy = [process for process in self.processes if process.busy()]
        if getattr(self, f"_{kind}")(self.chance.choice(busy or self.processes)):
            self.did[kind] += 1
            self.note(kind)

    def _kill(self, process: Process) -> bool:
        process.die()
        return True

    def _pause(self, process: Process) -> bool:
        seconds = self.chance.choice([1.0, 9.0, 12.0, 30.0])
        process.paused_until = max(process.paused_until, self.now + seconds)
        if seconds > 10.0 and self.chance.random() < 0.5:
            self.later(5.0, None, self._dropped, process)
        return True

    def _dropped(self, process: Process) -> None:
        """The broker does not wait for one that does not answer."""
        if not process.dead and process.paused_until > self.now:
            process.disconnect()

    def _mute(self, process: Process) -> bool:
        process.mute_until = self.now + self.chance.choice([5.0, 12.0, 30.0])
        return True

    def _disconnect(self, process: Process) -> bool:
        return process.disconnect()

    def _stop(self, process: Process) -> bool:
        return process.stop()

    def _store_away(self, process: Process) -> bool:
        self.away_until = self.now + self.chance.choice([1.0, 8.0, 25.0])
        return True

    def _duplicate(self, process: Process) -> bool:
        """The broker, or a publisher that was not sure, has a message twice."""
        if not self.queue:
            return False
        self.queue.insert(self.chance.randrange(len(self.queue)), self.chance.choice(self.queue))
        return True

    def _reorder(self, process: Process) -> bool:
        self.chance.shuffle(self.queue)
        return len(self.queue) > 1

    def _clock(self, process: Process) -> bool:
        self.jumped = self.chance.uniform(-300.0, 300.0)
        return True

    def _leap(self, process: Process) -> bool:
        """Everybody sleeps for longer than the retention; no broker waits so long for a connection."""
        until = self.now + 1.2 * self.plan.retention
        for each in self.processes:
            each.disconnect()
            each.paused_until = until
        self.blows = min(self.blows, 3)
        return True

    def _person(self, process: Process) -> bool:
        """Somebody looks at a dead letter, and decides by what happened."""
        parked = [copy for copy in self.dead if copy.properties.headers.get("idemp-outcome") == "parked"]
        if not parked or self.now < self.away_until or process.paused_until > self.now:
            return False
        copy = self.chance.choice(parked)
        key = str(copy.properties.headers["idemp-key"])
        state = self.store.state(key)
        if not isinstance(state, Parked):
            return False
        self.judge.resolving = key
        [taken] = process.session.apply([Takeover(key, state.token)])
        self.judge.resolving = ""
        if not isinstance(taken, Claimed):
            return False
        happened = self.judge.had_effect(key)
        self.judge.settle(key, taken.token, happened=happened)
        self.judge.freed(key)
        if happened:
            [reply] = process.session.apply([Complete(key, taken.token)])
            must(isinstance(reply, Applied), f"a person could not settle {key}: {reply}")
            return True
        [reply] = process.session.apply([Release(key, taken.token, 0)])
        must(isinstance(reply, Applied), f"a person could not set {key} free: {reply}")
        for each in [each for each in self.dead if each.properties.headers.get("idemp-key") == key]:
            self.dead.remove(each)
            headers = {"idemp-retried-at": int(self.wall())}
            again = each._replace(properties=replace(each.properties, headers=headers), routing_key=QUEUE)
            self.send_in(0.1, again)
        return True

    # ------------------------------------------------------------ at rest

    def _check(self) -> None:
        self.store.check()
        letters = Counter(str(copy.properties.headers.get("idemp-key")) for copy in self.dead)
        self.judge.at_rest(self.keys, letters)
        bodies = {copy.body for copy in self.dead}
        for body in self.others:
            must(body in bodies, f"{body!r} is lost")
        for number in range(self.plan.odd.get("bare", 0)):
            body = self._event(f"b{number}", "bare", {}, 0.0)[0]
            must(self.ran_bare[f"b{number}"] or body in bodies, f"b{number} is lost")
        self.note(repr(sorted(self.did.items())))
