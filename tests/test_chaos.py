"""A series of faults on real servers, in a few minutes, and the parts of what plans, judges and draws it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.chaos import tally
from tests.chaos.dump import kept
from tests.chaos.faults import KINDS
from tests.chaos.minimise import minimise
from tests.chaos.picture import Bar, Timeline, draw, timeline
from tests.chaos.run import Left, kinds, left_in, preflight
from tests.chaos.schedule import PROFILES, BadSchedule, Planned, Schedule, Span, make, read
from tests.chaos.stage import until
from tests.reliability.checker import Change, Dead, Finding, Kept, lines_of
from tests.servers import need
from tests.service import ROOT, finished

SPANS = {
    "one": Span("a", (1.0, 2.0)),
    "two": Span("a", (1.0, 3.0), 10.0),
    "three": Span("b", (0.5, 0.5)),
    "four": Span("c", (2.0, 4.0)),
}
EVERYTHING = {"strace", "rabbitmqctl"}


def chaos(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return finished("-m", "tests.chaos", *arguments, timeout=timeout)


# ------------------------------------------------------------------ the run itself


@pytest.mark.timeout(420)
def test_forty_faults_in_minutes(tmp_path: Path) -> None:
    """I1 to I17 hold: 30 000 messages, 40 faults of 15 kinds, kill -9 among them."""
    need("etcd")
    need("rabbitmq")
    need("strace")
    out = tmp_path / "run"
    ran = chaos("run", "--seed", "7", "--minutes", "3.3", "--tries", "0", "--out", str(out), timeout=400)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-3000:]

    verdict = json.loads((out / "verdict.json").read_text())
    counts, faults = verdict["counts"], verdict["faults"]
    assert verdict["result"] == "valid"
    assert verdict["findings"] == []
    assert counts["attempted"] >= 30_000
    assert sum(faults.values()) >= 40
    assert len(faults) >= 15
    assert counts["lost"] == counts["unexpected"] == counts.get("doubled and unnamed", 0) == 0
    assert counts["ok"] == counts["acknowledged"]
    assert verdict["recall"] == 1.0
    assert "| I17 | 0 |" in (out / "report.md").read_text()
    assert ET.parse(out / "timeline.svg").getroot().tag.endswith("svg")
    assert tally.line_of(out)["verdict"] == "valid"
    assert chaos("check", str(out)).returncode == 0, "what it left can be judged again"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("store", ["postgresql", "redis"])
def test_some_faults_on_another_store(store: str, tmp_path: Path) -> None:
    """The same invariants on one server: its kill -9, restart and pause, locks, a full memory, cut lines."""
    need(store)
    need("rabbitmq")
    plan = ["kill", "restart", "pause", *(["terminate", "lock"] if store == "postgresql" else ["full"])]
    faults = [Planned(2.0 + 6.0 * n, f"{store}.{kind}", 1.5, n) for n, kind in enumerate(plan)]
    others = ("consumer.kill", "store-net.reply-lost", "broker.kill", "store-net.mute-answers")
    faults += [Planned(3.0 + 7.0 * n, kind, 1.0, n) for n, kind in enumerate(others)]
    Schedule(seed=11, minutes=0.7, profile="quick", faults=faults, store=store).write(tmp_path / "plan.json")

    out = tmp_path / "run"
    ran = chaos(
        "run", "--schedule", str(tmp_path / "plan.json"), "--tries", "0", "--out", str(out), timeout=220
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-3000:]
    verdict = json.loads((out / "verdict.json").read_text())
    counts = verdict["counts"]
    assert (verdict["result"], verdict["findings"]) == ("valid", [])
    assert sum(verdict["faults"].values()) == len(faults)
    assert counts["attempted"] >= 4_000
    assert counts["lost"] == counts["unexpected"] == counts.get("doubled and unnamed", 0) == 0
    assert tally.line_of(out)["store"] == store


@pytest.mark.timeout(300)
def test_nothing_is_left_when_it_is_killed(tmp_path: Path) -> None:
    """kill -9 for the harness, with a member's disk held by strace and other processes at work."""
    for server in ("etcd", "rabbitmq", "strace"):
        need(server)
    plan = [Planned(0.5, "etcd.leader-stall", 60.0, 0), Planned(0.5, "machine.starved", 60.0, 0)]
    file = tmp_path / "plan.json"
    Schedule(seed=1, minutes=2.0, profile="quick", faults=plan).write(file)
    command = [
        sys.executable,
        "-m",
        "tests.chaos",
        "run",
        "--schedule",
        str(file),
        "--out",
        str(tmp_path / "run"),
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as harness:
        assert until(lambda: _begun(tmp_path / "run") == {each.kind for each in plan}, 150)
        assert until(
            lambda: {"strace", "etcd"} <= _names(family := _family(harness.pid)) and len(family) > 15, 60
        )
        family = _family(harness.pid)
        harness.kill()
    assert until(lambda: not _alive(family), 60), _said(_alive(family))


def _begun(folder: Path) -> set[str]:
    files = folder.glob("nemesis.*.jsonl")
    return {line["f"] for file in files for line in lines_of(file) if line["type"] == "invoke"}


def _family(pid: int) -> dict[int, str]:
    """Process -> when it began, of all that descend from it."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(
                int(stat.parent.name)
            )
    found, left = {}, [pid]
    while left:
        each = left.pop()
        left += parents.get(each, [])
        with suppress(OSError):
            found[each] = _began(each)
    return found


def _began(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def _alive(family: dict[int, str]) -> dict[int, str]:
    """Those that are there still: the same number may be another's by now, and a zombie does nothing."""
    found = {}
    for pid, began in family.items():
        with suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if _began(pid) == began and state != "Z":
                found[pid] = began
    return found


def _said(family: dict[int, str]) -> list[str]:
    """What they were started with."""
    found = []
    for pid in family:
        with suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
    return found


def _names(family: dict[int, str]) -> set[str]:
    names = set()
    for pid in family:
        with suppress(OSError):
            names.add(Path(f"/proc/{pid}/comm").read_text().strip())
    return names


# ------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--minutes", "0"], "--minutes"),
        (["run", "--profile", "hard"], "--profile"),
        (["run", "--seed", "x"], "--seed"),
        (["run", "--schedule", "/nowhere/plan.json"], "is no schedule"),
        (["check", "."], "has no run that came to its end"),
        (["tally", "add", "."], "has no verdict that can be read"),
        (["dance"], "No such command"),
    ],
)
def test_asked_in_a_way_that_makes_no_sense(arguments: Sequence[str], says: str) -> None:
    ran = chaos(*arguments)
    assert ran.returncode == 2
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr


# ------------------------------------------------------------------ the plan


def test_a_seed_is_a_plan(tmp_path: Path) -> None:
    means, _ = preflight()
    one, two = (make(7, 3.0, "quick", kinds("quick", means)) for _ in "12")
    assert one == two
    assert make(8, 3.0, "quick", kinds("quick", means)).faults != one.faults
    one.write(tmp_path / "plan.json")
    assert read(tmp_path / "plan.json") == Schedule(**{**one.__dict__, "faults": list(one.faults)})


@pytest.mark.parametrize("profile", PROFILES)
def test_the_plan_has_many_kinds_and_times_without_a_fault(profile: str) -> None:
    found = kinds(profile, EVERYTHING)
    assert len(found) >= (15 if profile == "quick" else 30)
    for seed in range(20):
        plan = make(seed, 10.0, profile, found)
        assert len(plan.faults) > 40
        assert {fault.kind for fault in plan.faults} == found.keys(), "every kind has its turn"
        busy, end, overlaps = 0.0, 0.0, 0
        for fault in sorted(plan.faults):
            overlaps += fault.at < end
            busy += max(0.0, fault.at + fault.seconds - max(end, fault.at))
            end = max(end, fault.at + fault.seconds)
        assert busy <= 0.76 * 600
        assert overlaps >= 5
        assert end <= 600


def test_two_of_one_scope_never_overlap_and_what_takes_long_comes_early() -> None:
    for seed in range(50):
        plan = make(seed, 2.0, "full", SPANS)
        ends: dict[str, float] = {}
        for fault in sorted(plan.faults):
            scope = SPANS[fault.kind].scope
            assert fault.at >= ends.get(scope, 0.0)
            ends[scope] = fault.at + fault.seconds
            assert fault.kind != "two" or fault.at + 10.0 < 120
    assert make(1, 2.0, "full", {}).faults == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"faults": [1]}', '{"faults": [], "seed": 1}'])
def test_what_is_no_plan(tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(BadSchedule, match="is no schedule"):
        read(file)


def test_a_part_of_a_plan_begins_at_once() -> None:
    plan = Schedule(
        seed=1, minutes=60.0, profile="full", faults=[Planned(n * 100.0, "one", 5.0, 0) for n in range(20)]
    )
    part = plan.only(plan.faults[10:12])
    assert [fault.at for fault in part.faults] == [2.0, 102.0]
    assert part.minutes < 2.1
    assert plan.only([]).faults == ()


def test_every_kind_says_what_it_needs() -> None:
    assert {need for kind in KINDS.values() for need in kind.needs} <= EVERYTHING
    assert len(KINDS) >= 45
    assert sum(kind.quick for kind in KINDS.values()) >= 25
    without = kinds("full", set())
    assert "etcd.leader-stall" not in without
    assert "broker.alarm" not in without
    assert {name.partition(".")[0] for name in kinds("full", set(), "redis")}.isdisjoint(
        {"etcd", "postgresql"}
    )


# ------------------------------------------------------------------ its shortest form


def test_the_shortest_series_that_breaks_it() -> None:
    faults = [Planned(float(n), f"{n}", 1.0, 0) for n in range(32)]
    runs = 0

    def fails(some: Sequence[Planned]) -> bool:
        nonlocal runs
        runs += 1
        return {"5", "20"} <= {fault.kind for fault in some}

    assert {fault.kind for fault in minimise(faults, fails, 200, 60.0)} == {"5", "20"}
    assert runs < 100
    assert minimise(faults, fails, 0, 60.0) == faults, "no run is left"
    assert minimise(faults, fails, 100, -1.0) == faults, "no time is left"
    assert [
        fault.kind for fault in minimise(faults, lambda some: any(f.kind == "9" for f in some), 50, 60.0)
    ] == ["9"]
    assert minimise([], fails, 5, 60.0) == []


def test_it_is_shorter_whatever_it_takes() -> None:
    dice = random.Random(3)
    faults = [Planned(float(n), f"{n}", 1.0, 0) for n in range(20)]
    for _ in range(50):
        wanted = {f"{dice.randrange(20)}" for _ in range(dice.randrange(1, 5))}
        found = minimise(faults, lambda some, wanted=wanted: wanted <= {f.kind for f in some}, 500, 60.0)  # type: ignore[misc]
        assert {fault.kind for fault in found} == wanted


# ------------------------------------------------------------------ the picture, the record


def test_the_picture_has_every_fault() -> None:
    lines = [
        {"t": 10**9, "p": 1, "role": "nemesis", "f": "etcd.full", "type": "invoke", "op": 1},
        {"t": 2 * 10**9, "p": 2, "role": "publisher", "f": "publish", "type": "ok"},
        {"t": 3 * 10**9, "p": 3, "role": "consumer", "f": "ack", "type": "invoke"},
        {
            "t": 4 * 10**9,
            "p": 1,
            "role": "nemesis",
            "f": "etcd.full",
            "type": "ok",
            "op": 1,
            "healed": 3 * 10**9,
        },
    ]
    found = timeline(lines, [{"t": 3 * 10**9}])
    assert found.bars == [Bar("etcd.full", 0.0, 2.0)]
    assert found.rates == {"published": [0, 1, 0, 0], "effects": [0, 0, 1, 0], "acknowledged": [0, 0, 1, 0]}
    picture = draw(found, "a < b")
    assert ET.fromstring(picture) is not None
    assert "etcd.full" in picture
    assert "a &lt; b" in picture


def test_bars_do_not_lie_upon_each_other() -> None:
    bars = [Bar(f"etcd.{n}", float(n), n + 5.0) for n in range(20)]
    drawn = ET.fromstring(draw(Timeline(30, bars, {"effects": [1] * 30}), "many"))
    boxes = [
        tuple(float(each.get(name, "0")) for name in ("y", "x", "width"))
        for each in drawn
        if each.get("height") == "11"
    ]
    assert len(boxes) == len(bars)
    for (y1, x1, w1), (y2, x2, _) in zip(sorted(boxes), sorted(boxes)[1:], strict=False):
        assert y1 != y2 or x1 + w1 <= x2


def test_the_record_is_added_up(tmp_path: Path) -> None:
    run = {
        "seed": 7,
        "minutes": 2.5,
        "profile": "quick",
        "store": "etcd",
        "commit": "abc",
        "result": "valid",
        "drained": 3.456,
        "faults": {"etcd.leader-kill": 3, "consumer.kill": 2, "etcd.full": 1},
        "counts": {
            **dict.fromkeys(("attempted", "publications", "deliveries", "effects"), 1000),
            **{"lost": 0, "unexpected": 0, "doubled and named": 4},
        },
    }
    (tmp_path / "verdict.json").write_text(json.dumps(run))
    file = tmp_path / "tally.jsonl"
    tally.add(tmp_path, file)
    (tmp_path / "verdict.json").write_text(
        json.dumps({**run, "result": "unknown", "faults": {"broker.kill": 1}})
    )
    tally.add(tmp_path, file)
    total = tally.total(tally.runs(file))
    assert total["runs"] == 2
    assert total["messages"] == 2000
    assert total["faults"] == 7
    assert total["kinds"] == 4
    assert total["kills"] == 6
    assert total["doubles_named"] == 8
    assert total["valid"] == total["unknown"] == 1
    assert total["worst drain_p99"] == 3.46
    assert tally.total([])["runs"] == 0


def test_the_committed_record_is_one_of_good_runs() -> None:
    total = tally.total(tally.runs())
    assert total["runs"] == total["valid"] + total["unknown"]
    for bad in ("lost", "invented", "doubles_unnamed"):
        assert total.get(bad, 0) == 0
    assert chaos("tally").returncode == 0


# ------------------------------------------------------------------ what is left of a run


def test_what_a_run_left_is_read_again(tmp_path: Path) -> None:
    left = Left(
        {"a": Kept("done", 7, 2, "x")},
        [Dead("b", "parked", "y")],
        [Change("claim", "a", 7, 1)],
        [Finding("I16", "a", "late")],
    )
    left.write(tmp_path)
    assert left_in(tmp_path) == left


def test_a_state_is_kept_in_the_words_of_a_history() -> None:
    from idemp.ports import Done, Doubt, Free

    assert kept(Free(3)) == Kept("free", 0, 3)
    assert kept(Doubt(5, 2, "s", 0.0)) == Kept("doubt", 5, 2)
    assert kept(Done(9, b"1", None, 0.0, 4)).state == "done"
    assert kept(Done(9, b"1", None, 0.0, 4)).sha != ""


def test_until_gives_up() -> None:
    began = time.monotonic()
    assert until(lambda: 0, 0.1) is None
    assert time.monotonic() - began < 2
    assert until(os.getpid) == os.getpid()


FULL = """
import time
from pathlib import Path
from types import SimpleNamespace
from tests.chaos import run
run.SAMPLE, run.DISK = 0.01, 0
Path("x").write_text("one byte and more")
replicas, nemesis = SimpleNamespace(pids=lambda: []), SimpleNamespace(note=lambda *_, **__: None)
with run._sampling(SimpleNamespace(folder=Path("."), replicas=replicas, nemesis=nemesis)):
    time.sleep(60)
"""


def test_a_full_folder_ends_it(tmp_path: Path) -> None:
    """With nothing known; whatever the main thread waits for."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", FULL], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (2, "chaos: the run's folder is full\n")
