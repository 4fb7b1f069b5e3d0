"""Several real consumer processes on one real broker and one store, and what is done to them."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import pytest

from idemp import Message, open_store, open_transport, publish
from idemp.ports import Busy, Done, Doubt, Free, Get, Parked, Publication, Store
from tests.proxy import Proxy
from tests.servers import RabbitMQ
from tests.service import Program

SESSION = "2s"


class Effect(NamedTuple):
    """A line of the ledger."""

    attempt: int
    token: int
    pid: int


class Stage:
    """A folder, a store, a service name, and the replicas that run there."""

    def __init__(self, folder: Path, url: str, service: str, store: str = "", policy: str = "retry") -> None:
        self.folder, self.url, self.service, self.policy = folder, url, service, policy
        self.store_url = f"{store or f'sqlite:///{folder}/seen.db'}?session={SESSION}"
        self.store: Store = open_store(self.store_url)
        self.replicas: list[Program] = []
        with closing(open_transport(url)) as transport:
            transport.declare(f"{service}-queue", "events")

    def start(self) -> Program:
        said = self.folder / f"said.{len(self.replicas)}"
        arguments = [self.service, self.url, self.store_url, str(self.folder), self.policy]
        program = Program(said, ["-m", "tests.replica", *arguments], {})
        self.replicas.append(program)
        ready = self.folder / f"ready.{program.process.pid}"
        self.until(ready.exists, program)
        return program

    def until(
        self, what: Callable[[], object], program: Program | None = None, seconds: float = 60.0
    ) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, "".join(p.said()[-2000:] for p in self.replicas)
            assert program is None or program.process.poll() is None, program.said()
            time.sleep(0.02)

    def publish(self, ids: list[str], **args: object) -> None:
        messages = [Message(id, "new_order", args) for id in ids]
        queue = f"{self.service}-queue"
        publications = [Publication(m.encode(), m.properties(), "", queue) for m in messages]
        with closing(open_transport(self.url)) as transport:
            publish(transport, publications, timeout=60)

    def arm(self, moment: str) -> None:
        """The next handler that comes to ``moment`` walks into a trap."""
        partial = self.folder / "trap.new"
        partial.write_text(moment)
        partial.rename(self.folder / "trap")

    def caught(self) -> Program:
        """The replica that is in the trap."""
        self.until(self.trapped)
        [found] = self.trapped()
        return found

    def trapped(self) -> list[Program]:
        alive = [program for program in self.replicas if program.process.poll() is None]
        traps = [(self.folder / f"trap.{program.process.pid}", program) for program in alive]
        return [program for trap, program in traps if trap.exists() and trap.read_text()]

    def key_in_trap(self, program: Program) -> str:
        return (self.folder / f"trap.{program.process.pid}").read_text()

    def effects(self) -> dict[str, list[Effect]]:
        """id -> its effects, in order."""
        found: dict[str, list[Effect]] = defaultdict(list)
        ledger = self.folder / "ledger"
        for line in ledger.read_text().splitlines() if ledger.exists() else []:
            _, id, *numbers = line.split()
            found[id].append(Effect(*map(int, numbers)))
        return found

    def states(self) -> dict[str, object]:
        """id -> its state in the store."""
        found: dict[str, object] = {}
        after = ""
        while page := self.store.scan(f"{self.service}.new_order/", after=after):
            found.update((key.partition("/")[2], state) for key, state in page)
            after = page[-1][0]
        return found

    def counts(self) -> Counter[str]:
        """What the replicas that ended in good order added up."""
        total: Counter[str] = Counter()
        for file in self.folder.glob("counts.*"):
            total.update(json.loads(file.read_text()))
        return Counter({name.rpartition("_")[2]: n for name, n in total.items() if n})

    def at_rest(self) -> bool:
        """Nothing waits in the queue, and no claim is open."""
        with closing(open_transport(self.url)) as transport:
            depth = transport.depth(f"{self.service}-queue")
        return depth == 0 and all(isinstance(state, Done | Parked) for state in self.states().values())

    def close(self) -> None:
        for program in self.replicas:
            program.stop(signal.SIGKILL)
        self.store.close()


@pytest.fixture(params=["sqlite", "etcd"])
def store(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> str:
    """The URL of an empty store."""
    if request.param == "etcd":
        return f"{request.getfixturevalue('etcd').url}{unique}"
    return f"sqlite:///{tmp_path}/seen.db"


@pytest.fixture
def stage(tmp_path: Path, unique: str, rabbitmq: RabbitMQ, store: str) -> Iterator[Stage]:
    """On the shared broker, with each store."""
    made = Stage(tmp_path, rabbitmq.url, unique, store)
    yield made
    made.close()


def three_times(count: int, seed: int = 0) -> list[str]:
    ids = [f"order/{n}" for n in range(count)] * 3
    random.Random(seed).shuffle(ids)
    return ids


def test_two_replicas_process_each_id_once_and_count_exactly(stage: Stage) -> None:
    """N5, N8: 10 000 ids three times each in random order, without kills: every counter exact."""
    first, second = stage.start(), stage.start()
    stage.publish(three_times(10_000))
    stage.until(lambda: len(stage.effects()) == 10_000)
    stage.until(stage.at_rest)

    assert [first.stop(), second.stop()] == [0, 0]

    assert stage.counts() == {"ok": 10_000, "skipped": 20_000}
    effects = stage.effects()
    assert sum(map(len, effects.values())) == 10_000
    assert all(isinstance(state, Done) and state.attempt == 1 for state in stage.states().values())
    assert len({effect.pid for [effect] in effects.values()}) == 2, "both did their part"


def test_kill_9_ten_times_with_a_claim_open(stage: Stage) -> None:
    """N11: nothing lost, and every doubled effect belongs to a recorded doubt.

    Two replicas, 10 000 ids three times each; ten kills, five right before the effect, five right after.
    """
    stage.start()
    stage.start()
    deliveries = three_times(10_000)
    trapped: list[tuple[str, str]] = []  # a message that comes again may be trapped again
    for kill in range(10):
        moment = "after" if kill % 2 else "before"
        stage.arm(moment)
        stage.publish(deliveries[kill::10])
        victim = stage.caught()
        trapped.append((stage.key_in_trap(victim).partition("/")[2], moment))
        victim.stop(signal.SIGKILL)
        stage.start()
    stage.until(lambda: len(stage.effects()) == 10_000)
    stage.until(stage.at_rest)

    effects, states = stage.effects(), stage.states()
    assert len(trapped) == 10
    assert len(states) == 10_000
    for id, state in states.items():
        assert isinstance(state, Done), f"{id} ended as {state}"
        assert len(effects[id]) <= state.attempt, f"{id} took effect more often than it was attempted"
        assert state.token == effects[id][-1].token, "the last effect is the one on record"
        tokens = [effect.token for effect in effects[id]]
        assert tokens == sorted(set(tokens))
    takeovers = sum(state.attempt - 1 for state in states.values() if isinstance(state, Done))
    assert takeovers >= 10
    doubled = {id for id, found in effects.items() if len(found) > 1}
    after = {id for id, moment in trapped if moment == "after"}
    assert after <= doubled
    assert all(states[id].attempt > 1 for id in doubled | {id for id, _ in trapped})  # type: ignore[attr-defined]


def test_in_doubt_park_never_doubles(tmp_path: Path, unique: str, rabbitmq: RabbitMQ, store: str) -> None:
    """N11 for who must not run twice: after a kill the message is parked, and at hand in the dead letters."""
    stage = Stage(tmp_path, rabbitmq.url, unique, store, "park")
    stage.start()
    stage.arm("after")
    stage.publish([f"{n}" for n in range(50)])
    victim = stage.caught()
    stage.publish(["last"])
    key = stage.key_in_trap(victim)
    victim.stop(signal.SIGKILL)
    stage.start()
    stage.until(lambda: len(stage.states()) == 51 and stage.at_rest())

    effects, states = stage.effects(), stage.states()
    assert all(len(found) == 1 for found in effects.values())
    parked = {id for id, state in states.items() if isinstance(state, Parked)}
    assert key.partition("/")[2] in parked
    assert effects.keys() | parked == states.keys()
    assert states["last"].__class__ in (Done, Parked)
    with closing(open_transport(stage.url)) as transport:
        stage.until(lambda: transport.depth(f"{unique}-queue.dead") == len(parked))
    stage.close()


def test_a_paused_owner_loses_its_claim(stage: Stage) -> None:
    """Stopped past its session, overtaken, resumed: its record is refused, and the taker's stands."""
    owner = stage.start()
    stage.arm("after")
    stage.publish(["a"])
    stage.caught()
    owner.process.send_signal(signal.SIGSTOP)
    taker = stage.start()
    # The broker still counts the delivery as the owner's, so the duplicates are the publisher's; of two
    # the broker gives each replica one.
    stage.publish(["a", "a"])
    stage.until(lambda: isinstance(stage.states().get("a"), Done))
    before = stage.states()["a"]
    (stage.folder / f"trap.{owner.process.pid}").unlink()
    owner.process.send_signal(signal.SIGCONT)
    stage.until(lambda: "lost" in owner.said())

    assert [owner.stop(), taker.stop()] == [0, 0]

    assert stage.states()["a"] == before
    first, second = stage.effects()["a"]
    assert first.token < second.token == before.token  # type: ignore[attr-defined]
    assert stage.counts() == {"ok": 1, "lost": 1, "skipped": 2}


def test_a_duplicate_is_not_acknowledged_before_the_first_is_done(stage: Stage) -> None:
    """Held while the first runs: when its holder dies, the broker still has it, and hands it on."""
    runs, holds = stage.start(), stage.start()
    stage.arm("before")
    stage.publish(["a"])
    owner = stage.caught()
    other = holds if owner is runs else runs
    stage.publish(["a", "a"])  # of two the broker gives each replica one
    time.sleep(1.0)  # both have been looked at several times by now
    other.stop(signal.SIGKILL)
    (stage.folder / f"trap.{owner.process.pid}").unlink()
    stage.until(stage.at_rest)

    assert owner.stop() == 0
    assert stage.counts() == {"ok": 1, "skipped": 2}, "one of the duplicates was gone with its holder"


def test_a_handler_that_raises_runs_again_while_duplicates_arrive(stage: Stage) -> None:
    """No duplicate is lost to the failure of its first, and none runs it twice."""
    replicas = [stage.start(), stage.start()]
    stage.publish([str(n) for n in range(30)] * 3, fails=2)
    stage.until(lambda: len(stage.states()) == 30 and stage.at_rest())
    stage.until(lambda: all(isinstance(state, Done) for state in stage.states().values()))
    time.sleep(2)  # the delayed copies come back and are skipped

    assert [replica.stop() for replica in replicas] == [0, 0]
    assert {len(found) for found in stage.effects().values()} == {3}
    counts = stage.counts()
    assert counts["ok"] == 30
    assert counts["failed"] == 60
    assert counts["skipped"] == 60
    assert set(counts) <= {"ok", "failed", "skipped", "deferred"}


def test_sigterm_finishes_what_runs_and_gives_back_the_rest(stage: Stage) -> None:
    """Exit 0; no claim stays open; what was not run is the next one's."""
    first = stage.start()
    stage.arm("before")
    stage.publish([str(n) for n in range(500)])
    stage.caught()
    first.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert first.process.poll() is None, "a handler is still running"
    (stage.folder / f"trap.{first.process.pid}").unlink()
    assert first.process.wait(20) == 0
    open_claims = [s for s in stage.states().values() if isinstance(s, Busy | Doubt)]
    assert open_claims == []
    done = sum(isinstance(state, Done) for state in stage.states().values())
    assert 1 <= done < 500

    second = stage.start()
    stage.until(lambda: len(stage.states()) == 500 and stage.at_rest())
    assert second.stop() == 0
    assert {len(found) for found in stage.effects().values()} == {1}
    assert stage.counts() == {"ok": 500}


# ------------------------------------------------------------------ the broker goes away


def check_all_once(stage: Stage, count: int) -> None:
    effects, states = stage.effects(), stage.states()
    assert len(states) == count
    assert all(isinstance(state, Done) for state in states.values())
    assert {len(found) for found in effects.values()} == {1}
    said = "".join(program.said() for program in stage.replicas)
    assert "PRECONDITION" not in said, "an acknowledgement on a stale channel"
    assert "Traceback" not in said


def test_the_broker_restarts_under_load(tmp_path: Path, unique: str, own_rabbitmq: RabbitMQ) -> None:
    """N16: stopped once and killed once; the replicas go on by themselves."""
    with ExitStack() as stack:
        stage = Stage(tmp_path, own_rabbitmq.url, unique)
        stack.callback(stage.close)
        replicas = [stage.start(), stage.start()]
        stage.publish(three_times(3_000))
        stage.until(lambda: len(stage.effects()) > 500)
        own_rabbitmq.restart()
        stage.until(lambda: len(stage.effects()) > 1_500)
        own_rabbitmq.kill()
        own_rabbitmq.start()
        stage.until(lambda: len(stage.effects()) == 3_000 and stage.at_rest())
        assert [replica.stop() for replica in replicas] == [0, 0]
        check_all_once(stage, 3_000)


def test_sigterm_while_the_broker_is_away(tmp_path: Path, unique: str, own_rabbitmq: RabbitMQ) -> None:
    """What runs is waited for and recorded, exit 0; the broker hands the message out again, to be skipped."""
    with ExitStack() as stack:
        stage = Stage(tmp_path, own_rabbitmq.url, unique)
        stack.callback(stage.close)
        first = stage.start()
        stage.arm("after")
        stage.publish(["a"])
        stage.caught()
        own_rabbitmq.kill()
        stage.until(lambda: "connecting again" in first.said())
        first.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert first.process.poll() is None, "a handler is still running"
        (stage.folder / f"trap.{first.process.pid}").unlink()
        assert first.process.wait(20) == 0
        assert isinstance(stage.states()["a"], Done)
        own_rabbitmq.start()
        second = stage.start()
        stage.until(stage.at_rest)
        assert second.stop() == 0
        check_all_once(stage, 1)


def test_connections_cut_every_200_ms(tmp_path: Path, unique: str, rabbitmq: RabbitMQ) -> None:
    """N16: for 20 s under load; no acknowledgement ever goes to the wrong connection."""
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(rabbitmq.port))
        stage = Stage(tmp_path, f"amqp://guest:guest@127.0.0.1:{proxy.port}/", unique)
        stack.callback(stage.close)
        replicas = [stage.start(), stage.start()]
        stage.url = rabbitmq.url
        ids = three_times(6_000)
        cuts = 0
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if ids:
                stage.publish([ids.pop() for _ in range(min(len(ids), 400))])
            time.sleep(0.2)
            cuts += proxy.cut()
        stage.publish(ids) if ids else None
        stage.until(lambda: len(stage.effects()) == 6_000 and stage.at_rest())
        assert [replica.stop() for replica in replicas] == [0, 0]
        assert cuts >= 20, "the cuts hardly met a connection"
        check_all_once(stage, 6_000)


def test_unused_names_are_free(stage: Stage) -> None:
    """A look at a key that was never seen."""
    assert stage.store.apply([Get("never/seen")]) == [Free(0)]
