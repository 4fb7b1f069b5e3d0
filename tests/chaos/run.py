"""One run: boot, load, faults by the plan, heal, drain, dump, check.  Everything it saw is in its folder."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec

from idemp import open_transport
from idemp.bars import watching
from idemp.errors import IdempError
from idemp.ports import Progress, Store, Transport
from tests.chaos import dump
from tests.chaos.faults import KINDS, Fault
from tests.chaos.ground import GROUNDS
from tests.chaos.schedule import PROFILES, Planned, Profile, Schedule
from tests.chaos.stage import (
    ATTEMPTS,
    DEAD,
    HANDLER,
    PREFETCH,
    QUEUE,
    Stage,
    listener,
    rabbitmqctl,
    status_of,
)
from tests.reliability.checker import (
    Change,
    Dead,
    Finding,
    Kept,
    Limits,
    Verdict,
    check,
    lines_of,
    merged,
    worst,
)
from tests.servers.catalog import SERVERS

WARM = 40.0
"""Seconds that the load may take to reach its floor."""
DRAIN = 15.0
"""Seconds from the last heal until 99 of 100 messages have ended."""
REST = 90.0
"""Seconds until the last has, or it never will."""
RSS = 1 << 30
FDS = 256
DISK = 8 << 30
LOG = 1 << 20
SAMPLE = 2.0
HEAL = 60.0
"""Seconds that one fault may take beyond its own, with its heal."""

TRIES = 2
"""How often a fault is tried that met nothing: another may have left nobody there to meet."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    verdict: Verdict
    folder: Path
    schedule: Schedule


def preflight(store: str = "etcd") -> tuple[set[str], list[str]]:
    """The means that are here, and a sentence for each that is missing."""
    here = {"strace": SERVERS["strace"].path(), "rabbitmqctl": rabbitmqctl()}
    means = {name for name, path in here.items() if path}
    missing = [f"{name} is not here" for name in here.keys() - means]
    if os.geteuid() != 0:
        means.discard("strace")
        missing.append("not root, so no process can be traced")
    if not all(SERVERS[server].path() for server in (store, "rabbitmq")):
        missing.append(f"{store} or rabbitmq is not here: `make servers` brings them")
    return means, missing


def kinds(profile: str, means: set[str], store: str = "etcd") -> dict[str, Any]:
    """The kinds that a profile draws from, the means allow, and ``store`` can meet."""
    others = GROUNDS.keys() - {store}
    return {
        name: kind.span
        for name, kind in KINDS.items()
        if kind.needs <= means and (kind.quick or profile != "quick") and name.partition(".")[0] not in others
    }


def run(schedule: Schedule, folder: Path, say: Say) -> Outcome:
    """Carry out a plan, and judge."""
    folder.mkdir(parents=True, exist_ok=True)
    schedule.write(folder / "schedule.json")
    profile = PROFILES[schedule.profile]
    left: Left
    with ExitStack() as stack:
        say(f"boot: {schedule.store}, a broker, consumers")
        stage = stack.enter_context(Stage(folder, schedule.seed, profile.rate, schedule.store))
        stack.enter_context(_sampling(stage))
        if not _warm(stage, profile):
            say("the load never reached its floor")
        stage.nemesis.note("phase", "ok", phase="load")
        say(f"{len(schedule.faults)} faults in {schedule.minutes:g} minutes")
        begun = time.monotonic()
        seconds = int(schedule.minutes * 60)
        with watching("load", lambda: Progress(min(seconds, int(time.monotonic() - begun)), seconds)):
            _carry_out(stage, schedule, say)
            stage.nemesis.note("phase", "ok", phase="heal")
            time.sleep(max(0.0, begun + schedule.minutes * 60 - time.monotonic()))
        say("drain")
        with watching("drain", lambda: None):
            left = _end(stage, say)
        left.write(folder)
        _keep_logs(stage, folder)
    return Outcome(judge(folder, left, profile), folder, schedule)


# ------------------------------------------------------------------ phases


def _warm(stage: Stage, profile: Profile) -> bool:
    """Whether effects come at the floor's rate."""
    line = 120  # bytes, about
    end = time.monotonic() + WARM
    while time.monotonic() < end:
        before = stage.effects()
        time.sleep(1.0)
        if (stage.effects() - before) / line >= profile.floor:
            return True
    return False


def _carry_out(stage: Stage, schedule: Schedule, say: Say) -> None:
    """Every fault at its time, each in a thread of its own; of one scope one at a time."""
    begun = time.monotonic()
    scopes: dict[str, threading.Lock] = defaultdict(threading.Lock)
    threads: list[threading.Thread] = []
    for planned in sorted(schedule.faults):
        time.sleep(max(0.0, begun + planned.at - time.monotonic()))
        lock = scopes[KINDS[planned.kind].span.scope]
        thread = threading.Thread(target=_one, args=(stage, planned, lock, say), daemon=True)
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join(HEAL)


def _one(stage: Stage, planned: Planned, lock: threading.Lock, say: Say) -> None:
    kind = KINDS[planned.kind]
    with lock:
        op = stage.nemesis.number()
        args = {"seconds": planned.seconds, "pick": planned.pick}
        stage.nemesis.note(planned.kind, "invoke", op=op, args=args)
        found = _Met()
        for _ in range(TRIES):
            found = _meet(kind.make, stage, planned)
            if found.witness:
                break
        error = {"error": found.error} if found.error else {}
        stage.nemesis.note(planned.kind, "ok", op=op, witness=found.witness, healed=found.healed, **error)
    say(f"{planned.at:7.1f}s {planned.kind}: {found.witness or found.error or 'no witness'}")


class _Met(NamedTuple):
    """What came of a fault."""

    witness: Mapping[str, Any] | None = None
    error: str = ""
    healed: int = 0


def _meet(make: Callable[[Stage, int, float], Fault], stage: Stage, planned: Planned) -> _Met:
    witness: Mapping[str, Any] | None = None
    error = ""
    fault = None
    try:
        fault = make(stage, planned.pick, planned.seconds)
        fault.inject()
        time.sleep(planned.seconds)
        witness = fault.witness()
    except Exception as problem:
        error = repr(problem)
    finally:
        try:
            if fault is not None:
                fault.heal()
            healed = time.monotonic_ns()
            if fault is not None and not error:
                witness = witness or fault.after()
        except Exception as problem:
            witness, healed, error = None, time.monotonic_ns(), f"{error} {problem!r}"
    return _Met(witness, error, healed)


@dataclass
class Left:
    """What the end of a run left, beside its histories."""

    dump: dict[str, Kept] | None = None
    dead: list[Dead] = field(default_factory=list)
    changes: list[Change] | None = None
    findings: list[Finding] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """For `check`, which may be asked again at any time."""
        (folder / "left.json").write_bytes(msgspec.json.encode(self))


def left_in(folder: Path) -> Left:
    """What a run wrote there."""
    return msgspec.json.decode((folder / "left.json").read_bytes(), type=Left)


def _end(stage: Stage, say: Say) -> Left:
    found: list[Finding] = []
    number = stage.publisher.order("finish")
    if stage.publisher.answer(number, REST) is None:
        found.append(Finding("I16", "", "the publisher was not told of all that it sent"))
    left = Left(findings=found)
    with (
        closing(dump.opened(stage.url(direct=True))) as store,
        closing(open_transport(stage.broker.url)) as transport,
    ):
        if _rested(stage, store, transport):
            stage.nemesis.note("phase", "ok", phase="drained")
        else:
            say("it does not come to rest")
        codes = stage.replicas.stop()
        if any(code != 0 for code in codes):
            found.append(Finding("crash", "", f"told to end, consumers ended as {codes}"))
        found += _crashes(stage)
        if waiting := transport.depth(QUEUE):
            found.append(Finding("I16", "", f"{waiting} messages still wait in the queue"))
        left.dump = dump.states(store, HANDLER)
    left.dead = dump.dead_letters(stage.broker.url, DEAD)
    left.changes = stage.ground.changes()
    return left


def _rested(stage: Stage, store: Store, transport: Transport) -> bool:
    """Whether everything confirmed has ended, and nothing waits or is open; in time."""
    confirmed = {line["k"] for line in _publisher_lines(stage.folder) if line["type"] == "ok"}
    end = time.monotonic() + REST
    quiet = 0
    while time.monotonic() < end:
        with suppress(IdempError):
            found = dump.states(store, HANDLER)
            ended = {id for id, kept in found.items() if kept.state in ("done", "parked")}
            open_ones = len(found) - len(ended)
            rest = len(confirmed - ended) - transport.depth(DEAD)
            quiet = quiet + 1 if not open_ones and rest <= 0 and not transport.depth(QUEUE) else 0
            if quiet > 2:
                return True
        time.sleep(0.4)
    return False


def _publisher_lines(folder: Path) -> Iterator[dict[str, Any]]:
    for file in folder.glob("publisher.*.jsonl"):
        yield from lines_of(file)


def _crashes(stage: Stage) -> Iterator[Finding]:
    """Consumers that had begun and ended otherwise than by SIGKILL or in good order."""
    for pid in stage.replicas.crashed:
        said = (stage.folder / f"said.{pid}").read_text(errors="replace")[-1500:]
        yield Finding("crash", "", f"consumer {pid} ended by itself", (said,))


def _keep_logs(stage: Stage, folder: Path) -> None:
    """What the servers said last, and how consumers ended."""
    (folder / "ends.json").write_text(json.dumps(stage.replicas.ends))
    ports = {f"store-{number}": port for number, port in enumerate(stage.ground.ports())}
    for name, port in {**ports, "rabbitmq": stage.broker.port}.items():
        with suppress(OSError):
            keeper = status_of(listener(port), "PPid")
            said = Path(os.readlink(f"/proc/{keeper}/cwd")) / "output"
            (folder / f"log.{name}").write_bytes(said.read_bytes()[-LOG:])


def give_up(why: str) -> NoReturn:
    """End now, from any thread, with nothing known; the keepers of what was started see to it."""
    print(f"chaos: {why}", file=sys.stderr, flush=True)
    os._exit(2)


def _open_files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:  # it has just ended
        return 0


@contextmanager
def _sampling(stage: Stage) -> Iterator[None]:
    """Memory and files of every consumer and of this process, and the size of the folder."""
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE):
            for pid in [*stage.replicas.pids(), os.getpid()]:
                kilobytes = status_of(pid, "VmRSS").partition(" ")[0]
                if kilobytes:
                    whose = "harness" if pid == os.getpid() else f"consumer {pid}"
                    files = _open_files(pid)
                    stage.nemesis.note("sample", "ok", of=whose, rss=int(kilobytes) * 1024, fds=files)
            if sum(file.stat().st_size for file in stage.folder.iterdir()) > DISK:
                give_up("the run's folder is full")

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# ------------------------------------------------------------------ the judgement


def judge(folder: Path, left: Left, profile: Profile) -> Verdict:
    """The checker's word, and what the harness itself saw."""
    limits = Limits(floor=profile.floor, prefetch=PREFETCH, attempts=ATTEMPTS, drain=DRAIN, rss=RSS, fds=FDS)
    verdict = check(merged(folder), lines_of(folder / "ledger"), left.dump, left.dead, left.changes, limits)
    findings = [*verdict.findings, *left.findings]
    result = worst("unknown" if each.unknown else "invalid" for each in findings)
    return Verdict(**{**verdict.__dict__, "findings": findings, "result": result})
