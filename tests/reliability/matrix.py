"""The kill matrix: every step of the protocol x what may happen there x store x broker.

    python -m tests.reliability.matrix [--rounds N] [--kills N] [--json FILE] [--actions A] [--stores S]
    python -m tests.reliability.matrix --explain

A cell is a small run of its own: some thirty messages, each sent twice, one of them three times; that
one is aimed at.  A consumer is struck when it comes to the step with it; another finishes.  Then two
judges that share no rule look at what the witnesses have (judge.py; checker.py, which is made for long
runs), and how often the aimed message took effect is asserted exactly.

    kill    kill -9
    stop    SIGSTOP, until another has taken over and the session is past, then SIGCONT
    raise   what may be raised there: the handler's error, `StoreUnavailable`, `TransportUnavailable`
    cut     the request reaches the server, and its reply is lost with the connection: see tests/proxy.py

What cannot be done at a step is explained instead: `unfit` has a reason for each such cell.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from idemp import Message, open_store, open_transport, publish
from idemp.bars import bar
from idemp.ports import Delivery, Done, Parked, Publication, State
from idemp.transports.redis_streams import RedisStreamsTransport
from tests.proxy import Proxy
from tests.reliability import judge
from tests.reliability.checker import Dead, Kept, Limits, check
from tests.reliability.history import History, digest
from tests.reliability.judge import Evidence
from tests.reliability.nursery import Nursery, Spec, Strike
from tests.servers import Etcd, PostgreSQL, RabbitMQ, Redis
from tests.servers.postgresql import url_of

SESSION = 2.0
"""Seconds: the shortest that etcd has."""
PAST = SESSION * 1.25
"""Seconds of a pause after which the session is over."""
PATIENCE = 45.0
"""Seconds that any single thing may take."""
AIMED = "aimed"
IDS = [AIMED, *(f"m{n}" for n in range(29))]

STEPS = (
    "deliver.after",
    "claim.before",
    "claim.sent",
    "claim.after",
    "takeover.before",
    "takeover.sent",
    "takeover.after",
    "handler.before",
    "effect.mid",
    "effect.after",
    "mark.before",
    "mark.sent",
    "mark.after",
    "release.before",
    "release.sent",
    "release.after",
    "park.before",
    "park.sent",
    "park.after",
    "retry.publish",
    "retry.after_publish",
    "dlq.publish",
    "dlq.after_publish",
    "ack.before",
    "ack.after",
    "ack.sent",
)
ACTIONS = ("kill", "stop", "raise", "cut")
STORES = ("sqlite", "etcd", "postgresql", "redis")
BROKERS = ("rabbitmq", "sqlite", "redis_streams")

OF_STORE = ("claim", "takeover", "mark", "release", "park")
OF_BROKER = ("deliver", "ack", "retry", "dlq")
UNFINISHED = ("handler.before", "effect.mid", "effect.after", "mark.before")
"""Steps at which the aimed claim is open and its effect not on record."""


class Cell(NamedTuple):
    """One place of the matrix.  ``in_doubt``: the handler's policy."""

    step: str
    action: str
    store: str
    broker: str
    in_doubt: str = "retry"

    @property
    def word(self) -> str:
        """The first of the step's."""
        return self.step.partition(".")[0]

    def __str__(self) -> str:
        policy = "" if self.in_doubt == "retry" else f"-{self.in_doubt}"
        return f"{self.step}-{self.action}-{self.store}-{self.broker}{policy}"


# ------------------------------------------------------------------ which cells there are


def unfit(cell: Cell) -> str:
    """Why a cell cannot be run; "" if it can."""
    word, _, moment = cell.step.partition(".")
    match cell.action:
        case "raise" if word in OF_STORE and moment != "before":
            return "a store that has answered does not raise; its answer lost on the way is the cut at 'sent'"
        case "cut" if word in OF_STORE and moment != "sent":
            return "no request is on its way; the cut is at 'sent'"
        case "cut" if word in OF_STORE and cell.store == "sqlite":
            return "a file has no wire; a commit of unknown fate is in tests/test_sqlite_store.py"
        case "cut" if word not in (*OF_STORE, *OF_BROKER):
            return "inside the handler nothing of ours is on a wire"
        case "cut" if cell.step not in (*(f"{word}.sent" for word in OF_STORE), *CUT_AT):
            return "no request is on its way; a connection lost here is 'raise'"
        case "cut" if word in OF_BROKER and cell.broker == "sqlite":
            return "a file has no wire; a transaction that fails is in tests/test_sqlite_transport.py"
    return ""


CUT_AT = {
    **{f"{word}.sent": f"{word}.before" for word in (*OF_STORE, "ack")},
    "retry.publish": "retry.publish",
    "dlq.publish": "dlq.publish",
}
"""Where the proxy is told to let the next request pass and its reply be lost."""


def cells() -> Iterator[Cell]:
    """All that can be run."""
    for step, action, store, broker in itertools.product(STEPS, ACTIONS, STORES, BROKERS):
        cell = Cell(step, action, store, broker)
        if not unfit(cell):
            yield cell
    for step, store, broker in itertools.product(("claim.sent", *UNFINISHED), STORES, BROKERS):
        yield Cell(step, "kill", store, broker, "park")


FEW = (
    *((step, "kill") for step in ("claim.sent", "takeover.sent", "effect.mid", "effect.after", "mark.sent")),
    *((step, "stop") for step in ("claim.after", "effect.mid", "mark.before")),
    *((step, "cut") for step in ("claim.sent", "mark.sent", "release.sent", "park.sent")),
)
"""With PostgreSQL and Redis the suite runs these; the command runs all."""


STREAMS = (
    *((step, "kill") for step in ("deliver.after", "effect.mid", "mark.after", "ack.before", "ack.after")),
    *((step, "kill") for step in ("retry.after_publish", "dlq.publish", "dlq.after_publish")),
    *((step, "stop") for step in ("deliver.after", "effect.mid", "ack.before")),
    *((step, "cut") for step in ("ack.sent", "retry.publish", "dlq.publish")),
)
"""With Redis Streams the suite runs these."""


def in_suite(cell: Cell) -> bool:
    """Whether the cell is a test."""
    if cell.broker == "redis_streams":
        return cell.store == "redis" and cell.in_doubt == "retry" and (cell.step, cell.action) in STREAMS
    if cell.store in ("sqlite", "etcd"):
        return True
    return cell.broker == "rabbitmq" and cell.in_doubt == "retry" and (cell.step, cell.action) in FEW


def effects(cell: Cell) -> int:
    """How often the aimed message takes effect."""
    if cell.in_doubt == "park":
        return 1 if cell.step in UNFINISHED[1:] else 0
    if cell.word in ("release", "retry", "park", "dlq", "takeover"):
        return 2  # it fails once, or its first consumer is killed right after the effect
    match cell.action:
        case "kill":
            return 2 if cell.step in UNFINISHED[1:] else 1
        case "stop":
            return 2 if cell.step in UNFINISHED else 1
        case "raise":
            return 2 if cell.word == "effect" else 1
    return 1


def end(cell: Cell) -> type[State]:
    """What the aimed message ends as."""
    return Parked if cell.in_doubt == "park" or cell.word in ("park", "dlq") else Done


# ------------------------------------------------------------------ a run


@dataclass(frozen=True, kw_only=True)
class Servers:
    """What all cells share: they keep apart by names."""

    nursery: Nursery
    amqp: int
    etcd: int
    postgresql: int
    redis: int
    folder: Path

    def port(self, store: str) -> int:
        """Where that store's server is; 0 if it has none."""
        return int(getattr(self, store, 0))

    def broker(self, name: str) -> int:
        """Where that broker is."""
        return self.redis if name == "redis_streams" else self.amqp


@contextmanager
def servers() -> Iterator[Servers]:
    """One of each."""
    with ExitStack() as stack:
        nursery = stack.enter_context(Nursery())
        rabbitmq, etcd = stack.enter_context(RabbitMQ()), stack.enter_context(Etcd())
        postgresql, redis = stack.enter_context(PostgreSQL()), stack.enter_context(Redis())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="idemp-matrix-")))
        yield Servers(
            nursery=nursery,
            amqp=rabbitmq.port,
            etcd=etcd.members[0].port,
            postgresql=postgresql.port,
            redis=redis.port,
            folder=folder,
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a cell."""

    cell: Cell
    violations: Sequence[str]
    seconds: float = 0.0
    kills: int = 0
    pauses: int = 0
    overtaken: bool = False
    messages: int = 0
    effects: int = 0
    doubled: Sequence[judge.Again] = ()
    doubts: Sequence[judge.Doubt] = ()
    windows: Sequence[float] = ()
    evidence: Evidence | None = None


class Unfinished(AssertionError):
    """Something that must happen did not, in time."""


class Tail:
    """The histories of a run, as they grow."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}
        self.lines: list[dict[str, Any]] = []

    def look(self) -> list[dict[str, Any]]:
        """All lines so far; of one process in order."""
        for file in self._folder.glob("*.jsonl"):
            with file.open("rb") as open_file:
                open_file.seek(self._read.get(file, 0))
                text = open_file.read()
            whole = text.rfind(b"\n") + 1
            self._read[file] = self._read.get(file, 0) + whole
            self.lines += [json.loads(line) for line in text[:whole].splitlines()]
        return self.lines


class Run:
    """One small run: a queue, a namespace, a folder, and the consumers on them."""

    def __init__(
        self, shared: Servers, store: str, broker: str, *, in_doubt: str = "retry", attempts: int = 5
    ) -> None:
        self.service = f"c{uuid.uuid4().hex[:12]}"
        self.folder = shared.folder / self.service
        self.folder.mkdir()
        self.shared, self.broker, self.kind = shared, broker, store
        self.store = self.store_at(shared.port(store))
        self.transport = self.transport_at(shared.broker(broker))
        self.in_doubt, self.attempts = in_doubt, attempts
        self.published: Counter[str] = Counter()
        self.args: dict[str, Mapping[str, object]] = {}
        self.prefetch = 0
        self.alive: list[int] = []
        self.paused: set[int] = set()
        self.tail = Tail(self.folder)
        self.history = History(self.folder, "publisher")

    def store_at(self, port: int, session: float = SESSION) -> str:
        """Its URL, by way of a proxy at ``port``."""
        place = {
            "sqlite": f"sqlite:///{self.folder}/seen.db?",
            "etcd": f"etcd://127.0.0.1:{port}/{self.service}?",
            "postgresql": f"{url_of(port)}?namespace={self.service}&",
            "redis": f"redis://127.0.0.1:{port}/0?namespace={self.service}&",
        }[self.kind]
        return f"{place}session={session:g}s"

    def transport_at(self, port: int) -> str:
        """Its URL, by way of a proxy at ``port``."""
        if self.broker == "sqlite":
            return f"sqlite:///{self.folder}/queues.db?visibility=2s"
        if self.broker == "redis_streams":
            return f"redis://127.0.0.1:{port}/0?namespace={self.service}&idle=2s"
        return f"amqp://guest:guest@127.0.0.1:{port}/"

    def __enter__(self) -> Self:
        with closing(open_transport(self.transport)) as transport:
            transport.declare(self.queue)
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self.gone(pid)
        self.history.close()

    @property
    def queue(self) -> str:
        return f"{self.service}-queue"

    def start(self, *strikes: Strike, store: str = "", transport: str = "", **more: Any) -> int:
        """A consumer's process id."""
        spec = Spec(
            service=self.service,
            transport=transport or self.transport,
            store=store or self.store,
            folder=str(self.folder),
            in_doubt=self.in_doubt,
            attempts=self.attempts,
            strikes=strikes,
            **more,
        )
        self.prefetch = spec.prefetch
        pid = self.shared.nursery.start(spec)
        self.alive.append(pid)
        return pid

    def ready(self, pid: int, seconds: float = PATIENCE) -> None:
        """Wait until it consumes."""
        self.until((self.folder / f"ready.{pid}").exists, "a consumer gets ready", seconds)

    def send(self, ids: Iterable[str], **args: Mapping[str, object]) -> None:
        """Publish; ``args``: those of some ids, the first time and every time."""
        self.args.update(args)
        messages = [Message(id, "new_order", self.args.get(id, {})) for id in ids]
        lines = [{"f": "publish", "k": m.id, "sha": digest(m.encode())} for m in messages]
        self.history.note_all({**line, "type": "invoke"} for line in lines)
        with closing(open_transport(self.transport)) as transport:
            publish(
                transport,
                [Publication(m.encode(), m.properties(), "", self.queue) for m in messages],
                timeout=PATIENCE,
            )
        self.history.note_all({**line, "type": "ok"} for line in lines)
        self.published.update(message.id for message in messages)

    def until(self, what: Callable[[], object], name: str, seconds: float = PATIENCE) -> None:
        """Wait for it."""
        end = time.monotonic() + seconds
        while not what():
            if time.monotonic() > end:
                raise Unfinished(f"it takes longer than {seconds:g} s until {name}\n{self.said()[-3000:]}")
            time.sleep(0.03)

    def said(self) -> str:
        return "".join(file.read_text(errors="replace")[-1500:] for file in self.folder.glob("said.*"))

    # ---------------------------------------------------------------- what the witnesses say

    def struck(self, pid: int) -> bool:
        """Whether a strike has happened in that process."""
        return any(line["f"] == "failpoint" and line["p"] == pid for line in self.tail.look())

    def killed(self, pid: int) -> None:
        """Wait until the strike has killed it."""
        self.until(lambda: self.struck(pid), "the step is reached")
        status = self.gone(pid)
        self.alive.remove(pid)
        if status != -signal.SIGKILL:
            raise Unfinished(f"ended with {status}, not by kill -9\n{self.said()[-3000:]}")

    def kill(self, *pids: int) -> None:
        """All at once."""
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            self.gone(pid)
            self.alive.remove(pid)

    def gone(self, pid: int) -> int:
        """Wait until a process has ended; how."""
        self.until(lambda: self.shared.nursery.ended(pid) is not None, f"{pid} ends")
        return self.shared.nursery.ended(pid) or 0

    def settled_by(self, pid: int) -> bool:
        """Whether that process has had a final word on the aimed message, or has it."""
        return any(
            line.get("r") in ("claimed", "done", "parked") and line["p"] == pid and line["k"] == AIMED
            for line in self.tail.look()
        )

    def over(self) -> set[str]:
        """The ids that some process knows to be done or parked."""
        return {
            line["k"]
            for line in self.tail.look()
            if line.get("r") in ("done", "parked")
            or (line["f"] in ("complete", "park") and line.get("r") == "applied")
        }

    def at_rest(self) -> bool:
        """Every id is over, every delivery to the living acknowledged, and nothing waits in the queue."""
        if not self.published.keys() <= self.over():
            return False
        if self.left():
            return False
        return not any(self._under_way().values())

    def _under_way(self) -> dict[int, set[tuple[str, int]]]:
        """Living process -> its handlers that run, and what its connection brought and it did not settle."""
        found: dict[int, set[tuple[str, int]]] = {pid: set() for pid in self.alive}
        for line in self.tail.look():
            mine = found.get(line["p"], set())
            match line["f"], line["type"]:
                case "connect", _:
                    mine -= {each for each in mine if each[0] == "deliver"}
                case ("deliver", _) | ("run", "invoke"):
                    mine.add((line["f"], line["op"]))
                case "ack", _:
                    mine.discard(("deliver", line["op"]))
                case "run", _:
                    mine.discard(("run", line["op"]))
        return found

    def left(self) -> int:
        """Messages of the queue that are still to come, as far as the broker tells."""
        if self.broker == "sqlite":
            with closing(sqlite3.connect(self.folder / "queues.db", timeout=PATIENCE)) as db:
                named = "(SELECT id FROM queue WHERE name = ?)"
                counts = (
                    "SELECT (SELECT count(*) FROM message WHERE queue = {0}) + (SELECT count(*) FROM delayed)"
                )
                return int(db.execute(counts.format(named), (self.queue,)).fetchone()[0])
        with closing(open_transport(self.transport)) as transport:
            if isinstance(transport, RedisStreamsTransport):
                waiting = transport.look(self.queue)
                assert waiting is not None
                return waiting.ready + waiting.delayed
            queues = [self.queue]
            if any(line["f"] == "retry" for line in self.tail.look()):
                queues += [f"{self.queue}.delay.{seconds}" for seconds in (1, 2, 4)]
            return sum(map(transport.depth, queues))

    def dead(self) -> list[Dead]:
        """The dead letters."""
        queue = f"{self.queue}.dead"
        found: list[Dead] = []
        with closing(open_transport(self.transport)) as transport:
            count = transport.depth(queue)
            if count:
                transport.consume(queue, 1000)
            end = time.monotonic() + PATIENCE
            while len(found) < count and time.monotonic() < end:
                came = [event for event in transport.poll(1.0) if isinstance(event, Delivery)]
                found += [_dead(delivery) for delivery in came]
        return found

    def states(self) -> dict[str, State]:
        """id -> its state in the store."""
        found: dict[str, State] = {}
        after = ""
        with closing(open_store(self.store_at(self.shared.port(self.kind), session=60))) as store:
            while page := store.scan(f"{self.service}.new_order/", after=after):
                found.update((key.partition("/")[2], state) for key, state in page)
                after = page[-1][0]
        return found

    def ledger(self) -> list[dict[str, Any]]:
        file = self.folder / "ledger"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def finish(self) -> list[str]:
        """Come to rest; a late duplicate of each id changes nothing; end.  Violations of just that."""
        self.until(self.at_rest, "all is at rest")
        before = len(self.ledger())
        self.send(list(self.published))
        self.until(self.at_rest, "all is at rest again")
        found = []
        if len(self.ledger()) != before:
            found.append("late duplicates took effect")
        self.end()
        while self.left():  # what was on its way between broker and consumer at that moment
            self.ready(self.start())
            self.until(self.at_rest, "the last is at rest")
            self.end()
        if "Traceback" in self.said():
            found.append(f"a traceback: {self.said()[-2000:]}")
        return found

    def end(self) -> None:
        """Let all that live end in good order."""
        for pid in self.alive:
            self.ready(pid)
            os.kill(pid, signal.SIGTERM)
        for pid in list(self.alive):
            status = self.gone(pid)
            self.alive.remove(pid)
            if status:
                raise Unfinished(f"a consumer ended with {status}\n{self.said()[-3000:]}")

    def evidence(self) -> Evidence:
        """All that can be known of it."""
        self.letters = self.dead()
        return Evidence(
            published=self.published,
            lines=sorted(self.tail.look(), key=lambda line: line["t"]),
            effects=self.ledger(),
            states=self.states(),
            dead=Counter(letter.k for letter in self.letters),
            paused=frozenset(self.paused),
        )

    def checked(self, evidence: Evidence, *, overlaps: bool) -> list[str]:
        """What the checker of whole runs finds: it shares no rule with the judge of small ones."""
        dump = {id: _kept(state) for id, state in evidence.states.items()}
        limits = Limits(prefetch=self.prefetch, attempts=self.attempts, overlaps=overlaps)
        verdict = check(evidence.lines, evidence.effects, dump, self.letters, limits=limits)
        found = verdict.findings
        return [f"{each.invariant} {each.id}: {each.what} {' | '.join(each.lines)}" for each in found]


def _dead(delivery: Delivery) -> Dead:
    properties = delivery.properties
    outcome = str(properties.headers.get("idemp-outcome", ""))
    return Dead(properties.message_id or "", outcome, digest(delivery.body))


def _kept(state: State) -> Kept:
    result = (state.result or b"") if isinstance(state, Done) else b""
    token, attempt = getattr(state, "token", 0), getattr(state, "attempt", 0)
    return Kept(type(state).__name__.lower(), token, attempt, digest(result))


# ------------------------------------------------------------------ a cell


def play(shared: Servers, cell: Cell, seed: int = 0) -> Verdict:
    """Run a cell and judge it."""
    began = time.monotonic()
    attempts = 2 if end(cell) is Parked and cell.in_doubt == "retry" else 5
    run = Run(shared, cell.store, cell.broker, in_doubt=cell.in_doubt, attempts=attempts)
    try:
        with run:
            try:
                _stage(run, cell, seed)
                found = run.finish()
            except Unfinished as error:
                found = [str(error)]  # and why, the judge may know
            evidence = run.evidence()
    except Exception as error:
        return Verdict(
            cell=cell, violations=[f"{type(error).__name__}: {error}"], seconds=time.monotonic() - began
        )
    found += [*judge.judge(evidence), *_exactly(cell, evidence)]
    found += [f"checker: {each}" for each in run.checked(evidence, overlaps=cell.action == "stop")]
    if not found:
        shutil.rmtree(run.folder)
    strikes = Counter(line["action"] for line in evidence.lines if line["f"] == "failpoint")
    return Verdict(
        cell=cell,
        violations=found,
        seconds=time.monotonic() - began,
        kills=strikes["kill"],
        pauses=strikes["stop"],
        overtaken=_overtaken(evidence),
        messages=run.published.total(),
        effects=len(evidence.effects),
        doubled=judge.doubled(evidence),
        doubts=judge.doubts(evidence),
        windows=judge.windows(evidence),
        evidence=evidence if found else None,
    )


def _stage(run: Run, cell: Cell, seed: int) -> None:
    """Publish, strike, let another finish."""
    args: dict[str, dict[str, object]] = {}
    if cell.word in ("release", "retry"):
        args[AIMED] = {"fails": 1}
    elif cell.word in ("park", "dlq"):
        args[AIMED] = {"fails": 99}
    ids = [*IDS, *IDS, AIMED]
    random.Random(seed).shuffle(ids)
    run.send(ids, **args)
    if cell.word == "takeover":
        run.killed(run.start(Strike(step="effect.after", action="kill", id=AIMED)))
    match cell.action:
        case "kill":
            run.killed(run.start(Strike(step=cell.step, action="kill", id=AIMED)))
            run.start()
        case "stop":
            _pause(run, run.start(Strike(step=cell.step, action="stop", id=AIMED)))
        case "raise":
            pid = run.start(Strike(step=cell.step, action="raise", id=AIMED))
            run.until(lambda: run.struck(pid), "the step is reached")
        case "cut":
            _cut(run, cell)


def _pause(run: Run, pid: int) -> None:
    """Stopped past its session; another takes the message over, if it gets at it; then both go on."""
    run.until(lambda: run.struck(pid), "the step is reached")
    run.until(lambda: _process_state(pid) == "T", "the process is stopped")
    run.paused.add(pid)
    stopped = time.monotonic()
    other = run.start()
    with suppress(Unfinished):  # it may have been stopped with SQLite's lock in its hand: then all wait
        run.ready(other, 3 * SESSION)
        # The broker still counts what it delivered as the stopped one's; of four each gets some.
        run.send([AIMED] * 4)
        run.until(lambda: run.settled_by(other), "another takes over", 3 * SESSION)
    run.until(lambda: time.monotonic() - stopped > PAST, "its session is over")
    os.kill(pid, signal.SIGCONT)


def _process_state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _cut(run: Run, cell: Cell) -> None:
    """The request at this step reaches the server, and its reply is lost with the connection."""
    to_store = cell.word in OF_STORE
    with Proxy(run.shared.port(cell.store) if to_store else run.shared.broker(cell.broker)) as proxy:
        # The smallest request of a batch is bigger than the pings, keepalives and heartbeats of its store.
        least = {"postgresql": 600}.get(cell.store, 200)
        port = proxy.trigger(least=least if to_store else 1)
        strike = Strike(step=CUT_AT[cell.step], action=f"call:{port}", id=AIMED)
        pid = run.start(
            strike,
            store=run.store_at(proxy.port) if to_store else "",
            transport="" if to_store else run.transport_at(proxy.port),
        )
        run.until(lambda: run.struck(pid), "the step is reached")
        run.until(lambda: proxy.counts.lost == 1, "a reply is lost")
        run.until(run.at_rest, "all is at rest, through the proxy")
        run.end()
    run.start()


def _exactly(cell: Cell, evidence: Evidence) -> Iterator[str]:
    aimed = [effect for effect in evidence.effects if effect["k"] == AIMED]
    if cell.action == "stop" and cell.step in UNFINISHED and not _overtaken(evidence):
        return  # it went on before anybody could take over
    if len(aimed) != effects(cell):
        yield f"exactly: the aimed message took effect {len(aimed)} times, not {effects(cell)}"
    if not isinstance(evidence.states.get(AIMED), end(cell)):
        yield f"exactly: the aimed message ended as {evidence.states.get(AIMED)}"


def _overtaken(evidence: Evidence) -> bool:
    """Whether somebody took the aimed message over from who was paused."""
    return any(
        line["f"] == "takeover" and line.get("r") == "claimed" and line["k"] == AIMED
        for line in evidence.lines
        if line["p"] not in evidence.paused
    )


# ------------------------------------------------------------------ the tally


def tally(shared: Servers, wanted: Sequence[tuple[Cell, int]], workers: int) -> Iterator[Verdict]:
    """Play cells side by side, for most of each is waiting for a session to be over."""
    with ThreadPoolExecutor(workers) as pool:
        played = [pool.submit(play, shared, cell, seed) for cell, seed in wanted]
        for future in as_completed(played):
            yield future.result()


def light(shared: Servers, store: str) -> list[float]:
    """The in-doubt windows of 300 messages that come one at a time, and nothing else is going on."""
    with Run(shared, store, "rabbitmq") as run:
        run.ready(run.start())
        with closing(open_transport(run.transport)) as transport:
            for n in range(300):
                message = Message(f"m{n}", "new_order", {})
                publish(transport, [Publication(message.encode(), message.properties(), "", run.queue)])
                run.published[message.id] += 1
                time.sleep(0.02)
        run.until(run.at_rest, "all is at rest")
        run.end()
        return judge.windows(run.evidence())


def figures(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What a set of verdicts adds up to."""
    actions = Counter(verdict.cell.action for verdict in verdicts)
    doubts = [doubt for verdict in verdicts for doubt in verdict.doubts]
    again = [each for verdict in verdicts for each in verdict.doubled]
    return {
        "cells": len(verdicts),
        "kills": sum(verdict.kills for verdict in verdicts),
        "pauses": sum(verdict.pauses for verdict in verdicts),
        "raises": actions["raise"],
        "cuts": actions["cut"],
        "messages": sum(verdict.messages for verdict in verdicts),
        "effects": sum(verdict.effects for verdict in verdicts),
        "doubled": len(again),
        "named": sum(each.named for each in again),
        "doubts": len(doubts),
        "true": sum(doubt.true for doubt in doubts),
        "violations": sum(len(verdict.violations) for verdict in verdicts),
    }


COLUMNS = tuple(figures(()))


def table(verdicts: Sequence[Verdict]) -> str:
    """A line a step, and one for all."""
    by_step = {step: [each for each in verdicts if each.cell.step == step] for step in STEPS}
    rows = [("step", *COLUMNS)]
    rows += [(step, *map(str, figures(each).values())) for step, each in by_step.items() if each]
    rows += [("all", *map(str, figures(verdicts).values()))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        " ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    if len(seconds) < 2:
        return {"n": len(seconds)}
    cuts = statistics.quantiles(seconds, n=100)
    return {"n": len(seconds), "p50": round(cuts[49] * 1e3, 2), "p99": round(cuts[98] * 1e3, 2)}


def report(verdicts: Sequence[Verdict], quiet: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """All of it as data."""
    sound = [verdict for verdict in verdicts if verdict.cell.action == "kill"]
    busy = {store: spread([w for v in sound if v.cell.store == store for w in v.windows]) for store in STORES}
    return {
        "all": figures(verdicts),
        "steps": {step: figures([each for each in verdicts if each.cell.step == step]) for step in STEPS},
        "window_ms": {"light": {store: spread(each) for store, each in quiet.items()}, "busy": busy},
        "held": [str(each.cell) for each in verdicts if each.pauses and not each.overtaken],
        "violations": {str(each.cell): list(each.violations) for each in verdicts if each.violations},
        "slowest": sorted(((round(v.seconds, 1), str(v.cell)) for v in verdicts), reverse=True)[:5],
    }


def explained() -> list[tuple[str, str]]:
    """The cells that are not run: (which, why)."""
    all_cells = [Cell(*place) for place in itertools.product(STEPS, ACTIONS, STORES, BROKERS)]
    return [(str(cell), unfit(cell)) for cell in all_cells if unfit(cell)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.matrix", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--kills", type=int, default=0, help="further rounds of the kills alone")
    parser.add_argument("--actions", default=",".join(ACTIONS), help="some of kill,stop,raise,cut")
    parser.add_argument("--stores", default=",".join(STORES), help="some of them")
    parser.add_argument("--steps", default="", help="the beginning of a step")
    parser.add_argument("--workers", type=int, default=8, help="cells side by side")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--explain", action="store_true", help="say why the other cells are not run")
    asked = parser.parse_args()
    if asked.explain:
        print("\n".join(f"{cell:40} {why}" for cell, why in explained()))
        return
    stores, actions = asked.stores.split(","), asked.actions.split(",")
    chosen = [c for c in cells() if c.store in stores and c.action in actions]
    chosen = [c for c in chosen if c.step.startswith(asked.steps)]
    kills = [cell for cell in chosen if cell.action == "kill"]
    rounds = [chosen] * asked.rounds + [kills] * asked.kills
    wanted = [(cell, seed) for seed, each in enumerate(rounds) for cell in each]
    verdicts: list[Verdict] = []
    began = time.monotonic()
    quiet: dict[str, list[float]] = {}
    with servers() as shared:
        with bar(len(wanted), "cells", least=1) as step:
            for verdict in tally(shared, wanted, asked.workers):
                verdicts.append(verdict)
                step(1)
                if verdict.violations:
                    print(f"\n{verdict.cell}:", *verdict.violations, sep="\n    ", file=sys.stderr)
                if asked.json and not len(verdicts) % 50:
                    asked.json.write_text(json.dumps(report(verdicts, quiet), indent=1))
        quiet = {store: light(shared, store) for store in stores}
    found = report(verdicts, quiet)
    print(table(verdicts))
    print(f"seconds: {time.monotonic() - began:.0f}; in-doubt window in ms: {json.dumps(found['window_ms'])}")
    if asked.json:
        asked.json.write_text(json.dumps({**found, "seconds": time.monotonic() - began}, indent=1))
    sys.exit(bool(found["violations"]))


if __name__ == "__main__":
    main()
