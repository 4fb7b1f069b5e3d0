"""A replay that is killed at every step, two at once, one that pauses; on a real broker.  Row U13."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from idemp import Message, open_event_log, open_store, open_transport, publish
from idemp.deeds import HOLDS, read
from idemp.message import Properties
from idemp.ports import Claim, Claimed, Clock, Complete, Park, Publication, Query, Release, Store, Transport
from idemp.resolve import set_free
from idemp.tracking import pace, replay
from idemp.tracking.hold import ReplayHeld, holding
from idemp.tracking.pace import Pace
from idemp.tracking.plan_queue import PlanQueue
from idemp.tracking.replay import Desk, Mark, Planned, Released, staging
from tests.replay_killed import Replays
from tests.service import ROOT, environment, until
from tests.test_tracking import service

N = 4
"""Messages; two at a time are staged, and released."""


@dataclass
class Case:
    """One replay of dead letters, or of a file, to a service of its own."""

    url: str
    folder: Path
    name: str
    source: str

    @property
    def queue(self) -> str:
        return f"{self.name}-queue"

    @property
    def store(self) -> str:
        return f"sqlite:///{self.folder}/{self.name}.db?session=1s"

    @property
    def arguments(self) -> list[str]:
        if self.source == "dead":
            return ["--dead", self.queue]
        return ["--file", str(self.folder / f"{self.name}.jsonl"), "--to", self.name]

    @property
    def settings(self) -> dict[str, str]:
        return {"IDEMP_TRANSPORT": self.url, "IDEMP_STORE": self.store}

    def add(self, *ids: str) -> None:
        """What a replay would choose."""
        messages = [Message(id, "order") for id in ids]
        if self.source == "file":
            with (self.folder / f"{self.name}.jsonl").open("ab") as file:
                file.writelines(message.encode() + b"\n" for message in messages)
            with closing(open_store(self.store)) as store:
                store.apply([])
        with closing(open_transport(self.url)) as broker:
            broker.declare(self.queue)
            broker.declare(f"{self.queue}.dead")
            if self.source == "dead":
                self._bury(messages, broker)

    def _bury(self, messages: Sequence[Message], broker: Transport) -> None:
        letters = []
        with closing(open_store(self.store)) as store:
            for message in messages:
                key = f"{self.name}.order/{message.id}"
                [claim] = store.apply([Claim(key)])
                assert isinstance(claim, Claimed)
                store.apply([Park(key, claim.token, "no customer")])
                headers: dict[str, Any] = {"idemp-key": key, "idemp-queue": self.queue}
                properties = Properties(message.id, "order", headers=headers)
                letters.append(Publication(message.encode(), properties, "", f"{self.queue}.dead"))
        publish(broker, letters)

    def began(self) -> str:
        """The replay's name; "" if it did not come so far."""
        with closing(open_store(self.store)) as store:
            told = [deed.about for deed in read(store) if deed.about and deed.about["verb"] == "replay"]
        return str(told[-1]["replay"]) if told else ""

    @contextmanager
    def receiver(self) -> Iterator[Counter[str]]:
        """The service, and what ran."""
        ran: Counter[str] = Counter()
        with service(self.url, self.folder, self.name, {"order": lambda m, _: ran.update([m.id])}):
            yield ran

    def waiting(self, queue: str = "") -> int:
        with closing(open_transport(self.url)) as broker:
            return broker.depth(queue or self.queue)


@pytest.mark.parametrize("source", ["dead", "file"])
def test_u13_killed_at_every_step_and_resumed(
    amqp_url: str, tmp_path: Path, unique: str, source: str
) -> None:
    """U13: before, between and after each message that is staged or sent, and each write of its state.

    Nothing is lost, nothing is sent that was not planned, what goes twice runs once; and where it is killed
    again while it is resumed, the same.
    """
    first = Case(amqp_url, tmp_path, f"{unique}-0", source)
    first.add(*map(str, range(N)))
    pool: SimpleQueue[Replays] = SimpleQueue()
    skipped = Counter[str]()

    def killed(kill: int) -> str:
        case = Case(amqp_url, tmp_path, f"{unique}-{kill}", source)
        case.add(*map(str, range(N)))
        replays = pool.get()
        try:
            return _killed_and_resumed(replays, case, kill, skipped)
        finally:
            pool.put(replays)

    with ThreadPoolExecutor(4) as threads:
        nurseries = [Replays(tmp_path).__enter__() for _ in range(4)]
        try:
            whole = nurseries[0].run(*first.arguments, "--yes", "--wait", "1ms", settings=first.settings)
            assert whole.status == 1, whole  # nobody received them
            for each in nurseries:
                pool.put(each)
            at = list(threads.map(killed, _moments(whole.steps)))
        finally:
            for each in nurseries:
                each.__exit__(None, None, None)
    assert {"before send", "after send", "confirmed", "after apply", "after ack"} <= set(at)
    assert skipped["skipped"] > 0  # the kill between a confirm and an acknowledgement was met


def _moments(steps: Sequence[str]) -> list[int]:
    """The steps at which to kill: right after one is right before the next, unless that sends."""
    return [
        n
        for n, step in enumerate(steps, 1)
        if n == 1 or step in ("before send", "confirmed") or "after" in step
    ]


def _killed_and_resumed(replays: Replays, case: Case, kill: int, skipped: Counter[str]) -> str:
    ended = replays.run(*case.arguments, "--yes", "--wait", "1ms", kill=kill, settings=case.settings)
    assert ended.status in (-signal.SIGKILL, 1), ended
    case.add("late")
    name = case.began()
    if name and kill % 2:
        again = replays.run("--resume", name, "--wait", "1ms", kill=kill // 2 + 1, settings=case.settings)
        assert again.status in (-signal.SIGKILL, 0, 1, 2), again
    sent, anew = case.waiting(), False
    with case.receiver() as ran:
        if name:
            last = replays.run("--resume", name, settings=case.settings)
            anew = "has nothing staged" in last.err and not sent
            assert last.status == 0 or "has nothing staged" in last.err, (kill, ended, last)
        if anew or not name:
            anew = True
            while "holds" in (last := replays.run(*case.arguments, "--yes", settings=case.settings)).err:
                pass  # for as long as the session of the dead one lives
            assert last.status == 0, (kill, ended, last)
        expected = {str(n) for n in range(N)} | ({"late"} if anew else set())
        until(lambda: set(ran) >= expected, lambda: (kill, ended, ran))
        until(lambda: case.waiting() == 0, lambda: (kill, ended))
        if case.source == "dead":
            left = 0 if anew else 1
            until(lambda: case.waiting(f"{case.queue}.dead") == left, lambda: (kill, ended))
    assert ran == dict.fromkeys(expected, 1), (kill, ended)
    assert not name or anew or _is_gone(case, name)
    with closing(open_event_log(f"sqlite:///{case.folder}/events.db")) as log:
        skipped["skipped"] += len(log.find(Query(service=case.name, kinds=("skipped",)), limit=100))
    return ended.steps[-1]


def _is_gone(case: Case, name: str) -> bool:
    """Whether the queues of the replay went with it."""
    with closing(open_transport(case.url)) as broker:
        return all(
            broker.consumers(queue) is None  # type: ignore[attr-defined]
            for queue in (staging(name), f"{staging(name)}.plan")
        )


@pytest.mark.parametrize("broker", ["sqlite", "redis"])
def test_what_a_killed_replay_had_taken_is_waited_for(
    request: pytest.FixtureRequest, tmp_path: Path, unique: str, broker: str
) -> None:
    """Where a broker gives back only after a while: by whoever goes on, and by whoever gives it up."""
    if broker == "redis":
        url = f"{request.getfixturevalue('redis').database()}?idle=3s"
    else:
        url = f"sqlite:///{tmp_path}/queues.db?visibility=3s"

    def killed(name: str) -> Case:
        """After the first of its messages went."""
        case = Case(url, tmp_path, name, "dead")
        case.add(*map(str, range(N)))
        slow = [*case.arguments, "--yes", "--rate", "0.0001"]
        with subprocess.Popen(
            [sys.executable, "-m", "idemp", "replay", *slow], cwd=ROOT, env=environment(case.settings)
        ) as process:
            until(lambda: case.waiting() == 1, lambda: "nothing was sent")
            process.kill()
        return case

    gone_on, given_up = killed(f"{unique}-on"), killed(f"{unique}-up")
    with gone_on.receiver() as ran:
        code, rows, err = told(gone_on, "--resume", gone_on.began())
        assert (code, rows[-1]["sent"], rows[-1]["left"]) == (0, N - 1, 0), err
        until(lambda: len(ran) == N, lambda: ran)
    _, rows, err = told(given_up, "--cancel", given_up.began())
    assert rows[-1]["back_to_dead"] == N - 1, err


def test_what_somebody_decided_meanwhile_stands(amqp_url: str, tmp_path: Path, unique: str) -> None:
    """A key that is parked for another reason by now is not set free; its message says so."""
    case = Case(amqp_url, tmp_path, unique, "dead")
    case.add("0", "1")
    key = f"{unique}.order/1"
    with subprocess.Popen(
        [sys.executable, "-m", "idemp", "replay", *case.arguments, "--yes", "--rate", "0.0001"],
        cwd=ROOT,
        env=environment(case.settings),
    ) as process:
        until(lambda: case.waiting() == 1, lambda: "nothing was sent")
        process.kill()
    with closing(open_store(case.store)) as store:
        set_free(store, key)
        [claim] = store.apply([Claim(key)])
        assert isinstance(claim, Claimed)
        store.apply([Park(key, claim.token, "in doubt: attempt 1 may have taken effect")])
    with case.receiver() as ran:
        code, _, err = told(case, "--resume", case.began())
        until(lambda: case.waiting(f"{case.queue}.dead") == 1, lambda: ran)
    assert code == 1, err
    assert ran == {"0": 1}


# ------------------------------------------------------------------ two at once


def told(case: Case, *arguments: str) -> tuple[int, list[Any], str]:
    """Exit code, JSON lines, stderr of a replay."""
    done = subprocess.run(
        [sys.executable, "-m", "idemp", "replay", *arguments, "--json"],
        cwd=ROOT,
        env=environment(case.settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.parametrize("source", ["dead", "file"])
def test_u13_the_second_of_two_replays_is_told_who_holds_it(
    amqp_url: str, tmp_path: Path, unique: str, source: str
) -> None:
    """U13: in one sentence; one that is dead holds it no longer than its session lives."""
    case = Case(amqp_url, tmp_path, unique, source)
    case.add(*map(str, range(40)))
    slow = [*case.arguments, "--yes", "--rate", "10", "--who", "alice"]
    first = subprocess.Popen(
        [sys.executable, "-m", "idemp", "replay", *slow], cwd=ROOT, env=environment(case.settings)
    )
    until(lambda: case.waiting() > 0, lambda: "nothing was sent")
    name = case.began()
    for again in (case.arguments, *([["--resume", name]] if source == "file" else [])):
        code, rows, err = told(case, *again, "--yes")
        assert (code, rows) == (2, [])
        assert f"idemp: replay {name} of alice holds {unique} since " in err
        assert err.count("\n") == 1
    first.kill()
    first.wait()
    with case.receiver() as ran:
        code, rows, err = told(case, "--resume", name)
        assert (code, rows[-1]["left"]) == (0, 0), err
        until(lambda: len(ran) == 40, lambda: ran)
    assert set(ran.values()) == {1}
    with closing(open_store(case.store)) as store:
        assert store.scan(HOLDS) == []


def test_a_hold_is_one_claim_for_each_service(tmp_path: Path) -> None:
    """Others are not in its way; it goes with the block, and with the process."""
    url = f"sqlite:///{tmp_path}/seen.db?session=1s"
    with closing(open_store(url)) as mine, closing(open_store(url)) as other:
        with holding(mine, "billing") as holds, holding(other, "post"):
            assert holds()
            with pytest.raises(ReplayHeld, match="somebody holds billing since"), holding(other, "billing"):
                pass
        with holding(other, "billing"):
            pass
        dead = open_store(url)
        [claim] = dead.apply([Claim(f"{HOLDS}billing")])
        assert isinstance(claim, Claimed)
        dead.close()
        with holding(mine, "billing"):
            assert [key for key, _ in mine.scan(HOLDS)] == [f"{HOLDS}billing"]
        assert list(read(mine)) == []


# ------------------------------------------------------------------ it pauses


def test_u13_it_pauses_when_the_receiver_fails_and_goes_on(
    amqp_url: str, tmp_path: Path, unique: str
) -> None:
    """U13: most is kept back while the receiver fails; mended, the rest goes and each runs once."""
    case = Case(amqp_url, tmp_path, unique, "file")
    n = 2000
    case.add(*map(str, range(n)))
    mended = tmp_path / "mended"
    ran: Counter[str] = Counter()

    def handle(message: Message, _: Any) -> None:
        if not mended.exists():
            raise ValueError("no customer")
        ran[message.id] += 1

    with service(amqp_url, tmp_path, unique, {"order": handle}, backoff=0.5):
        code, rows, err = told(case, *case.arguments, "--yes", "--rate", "200")
        assert code == 1, err
        last = rows[-1]
        assert " of the last " in last["paused"]
        assert last["left"] > n / 2
        assert last["sent"] + last["left"] == n
        mended.touch()
        code, rows, err = told(case, "--resume", last["replay"])
        assert (code, rows[-1]["left"], rows[-1]["sent"]) == (0, 0, last["left"]), err
        until(lambda: len(ran) == n, lambda: len(ran))
    assert set(ran.values()) == {1}


def released(n: int, verdict: str = "run") -> list[Released]:
    return [Released(f"s.t/{number}", "s", verdict, 0) for number in range(n)]


def settle(store: Store, some: Sequence[Released], *, ok: bool) -> None:
    for each in some:
        [claim] = store.apply([Claim(each.key)])
        assert isinstance(claim, Claimed)
        store.apply([Complete(each.key, claim.token) if ok else Release(each.key, claim.token, 1)])


@pytest.mark.parametrize(
    ("failed", "n", "verdict", "pauses"),
    [
        (4, 20, "run", True),
        (3, 20, "run", False),
        (19, 19, "run", False),  # too few to tell
        (0, 100, "run", False),
    ],
)
def test_the_share_of_failures_at_which_it_pauses(failed: int, n: int, verdict: str, pauses: bool) -> None:
    """Of the last that came to something; what was done before and is skipped does not count."""
    with closing(open_store("memory://")) as store:
        pace_ = Pace(lambda _: store, limit=0.2, patience=1.0)
        settle(store, done := released(500, "done"), ok=True)
        some = [each._replace(key=f"{each.key}-new", verdict=verdict) for each in released(n)]
        settle(store, some[failed:], ok=True)
        settle(store, some[:failed], ok=False)
        pace_.sent([*some, *done])
        assert bool(pace_.trouble(lambda: True)) == pauses
        never = Pace(lambda _: store, limit=0.0, patience=1.0)
        never.sent(some)
        assert never.trouble(lambda: True) == ""


def test_it_waits_for_receivers_that_are_far_behind() -> None:
    """And pauses if nothing comes of anything; a key that nobody can tell holds nothing up."""
    now = [0.0]
    with closing(open_store("memory://")) as store:

        def sleep(seconds: float) -> None:
            now[0] += seconds

        clock = Clock(steady=lambda: now[0], sleep=sleep)
        behind = Pace(lambda _: store, limit=0.2, patience=30.0, clock=clock)
        behind.sent(released(pace.AHEAD))
        assert behind.trouble(lambda: True) == ""
        behind.sent([Released("s.t/more", "s", "run", 0)])
        said = f"{pace.AHEAD + 1} are on their way, and nothing came of any for 30 s"
        assert behind.trouble(lambda: True) == said
        assert 30 < now[0] < 31
        assert behind.trouble(lambda: False) == ""  # somebody stops it
        settle(store, released(1), ok=True)
        assert behind.trouble(lambda: True) == ""
        nameless = Pace(lambda _: store, limit=0.2, patience=30.0, clock=clock)
        nameless.sent([Released("", "s", "run", n) for n in range(2 * pace.AHEAD)])
        assert nameless.trouble(lambda: True) == ""


# ------------------------------------------------------------------ on a terminal


def on_a_terminal(case: Case, *arguments: str, answer: str = "") -> tuple[int, str]:
    """Exit code, and all that was shown; ``answer`` is typed."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "idemp", *arguments]
    env = environment({**case.settings, "IDEMP_TRACKING": f"sqlite:///{case.folder}/events.db"})
    with subprocess.Popen(command, env=env, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        os.write(ours, f"{answer}\n".encode())
        shown = b""
        with open(ours, "rb", buffering=0) as reader, suppress(OSError):  # which says that it ended
            while chunk := reader.read(4096):
                shown += chunk
        return process.wait(60), shown.decode()


def test_a_person_sees_the_plan_is_asked_and_sees_bars(amqp_url: str, tmp_path: Path, unique: str) -> None:
    """A plan, a question, a bar for what is staged, what is sent, what came to an end; no is no."""
    case = Case(amqp_url, tmp_path, unique, "file")
    n = 600
    case.add(*map(str, range(n)))
    with case.receiver() as ran:
        code, shown = on_a_terminal(case, "replay", *case.arguments, answer="n")
        assert (code, len(ran)) == (130, 0)
        assert f"{unique}: {n} will run" in shown
        assert f"Send {n} messages?" in shown
        code, shown = on_a_terminal(case, "replay", *case.arguments, answer="y")
        assert code == 0, shown
        until(lambda: len(ran) == n, lambda: len(ran))
        lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", shown))
        bars = [line for line in lines if "100%" in line]
        assert {line.split()[0] for line in bars} == {"staged", "sent", "settled"}
        assert f"{n} sent: {n} ok" in shown
        code, shown = on_a_terminal(case, "watch", "--times", "1")
        assert (code, shown.splitlines()[-1]) == (0, "idemp: nothing is wrong"), shown


# ------------------------------------------------------------------ what was planned and is gone


def begun(case: Case, name: str, file: Path) -> None:
    """A replay that was killed before the first message was staged."""
    items = [
        replay.item(Message(str(n), "order").encode(), Properties(), case.name, replay.names_of({}))
        for n in range(N)
    ]
    selection: dict[str, Any] = {"ids": [], "outcomes": [], "kind": "", "service": "", "conversation": ""}
    selection |= {"dead": None, "consumer": None, "force": False, "confirm": False}
    selection |= {"since": None, "until": None, "file": str(file), "to": [case.name]}
    with closing(open_transport(case.url)) as broker:
        planned = [Planned(item, "run", "") for item in items]
        PlanQueue(Desk(broker), name).keep(planned, Mark(name, "", time.time()), selection)


def test_resuming_says_what_is_gone(amqp_url: str, tmp_path: Path, unique: str) -> None:
    """The file, or some of what was in it; the rest goes."""
    case = Case(amqp_url, tmp_path, unique, "file")
    file = tmp_path / f"{unique}.jsonl"
    name = f"r{unique}"
    case.add("1", "3", "not planned")
    begun(case, name, tmp_path / "gone.jsonl")
    code, rows, err = told(case, "--resume", name)
    assert (code, rows) == (2, [])
    assert err == f"idemp: --resume {name}: its messages were in {tmp_path}/gone.jsonl, which is gone\n"
    assert told(case, "--cancel", name)[1] == [{"replay": name, "back_to_dead": 0, "dropped": 0}]
    assert told(case, "--resume", name)[2] == f"idemp: replay {name} has nothing staged\n"

    begun(case, name, file)
    with case.receiver() as ran:
        code, rows, err = told(case, "--resume", name)
        until(lambda: len(ran) == 2, lambda: ran)
    assert (code, rows[-1]["sent"]) == (1, 2)
    assert err == "idemp: 2 of those that were planned are not there any more, or not to be sent now\n"
    assert ran == {"1": 1, "3": 1}
    assert _is_gone(case, name)
