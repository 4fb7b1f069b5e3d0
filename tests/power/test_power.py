"""What was acknowledged survives a power cut, and the cut is one; a run leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.power import __main__ as command
from tests.power import disk
from tests.power.harness import ROOT, Image, Row, Verdict, run, verdict, with_controls
from tests.power.settings import SETTINGS, Expect
from tests.servers import need
from tests.servers.need import missing

KEEPS = [name for name, each in SETTINGS.items() if each.expect is Expect.KEEPS]
CONTROLS = [name for name, each in SETTINGS.items() if each.expect is Expect.LOSES]


@pytest.fixture(scope="session")
def power() -> None:
    """Go on only where a disk can be made, and its power cut."""
    if reason := disk.why_not():
        missing(reason)


def cuts(setting: str, images: int) -> Row:
    for server in SETTINGS[setting].needs:
        need(server)
    return run(setting, images, jobs=2)


# ------------------------------------------------------------------ real cuts


@pytest.mark.usefixtures("power")
@pytest.mark.parametrize("setting", KEEPS)
def test_nothing_acknowledged_is_lost(setting: str) -> None:
    """Three cuts; `python -m tests.power --images 30` makes more."""
    row = cuts(setting, 3)
    assert row.verdict() == (Verdict.VALID, "")
    assert len(row.images) == 3


@pytest.mark.usefixtures("power")
@pytest.mark.parametrize("setting", CONTROLS)
def test_an_unsafe_setting_is_seen_to_lose(setting: str) -> None:
    """Else the cut is no cut, and the test above proves nothing.

    A cut may strike when all is safe by chance, as while SQLite has just flushed its log to empty it.
    """
    row = next((row for row in (cuts(setting, 1) for _ in range(5)) if row.lost), Row(setting, []))
    assert row.verdict() == (Verdict.VALID, "")


@pytest.mark.usefixtures("power")
def test_a_killed_run_leaves_nothing_behind() -> None:
    """No process, no mount, no loop device, although it had no time to tidy up."""
    need("etcd")
    arguments = [sys.executable, "-m", "tests.power", "--setting", "etcd store", "--images", "9"]
    with subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as harness:
        try:
            until(lambda: any(name(process) == "etcd" for process in below(harness.pid)))
        finally:
            family = list(below(harness.pid))
            devices = {device for process in family for device in loop_devices(process)}
            attached = {device: attachment(device) for device in devices}
            harness.send_signal(signal.SIGKILL)
    assert len(family) >= 4, "the room, the cut in it, etcd's keeper, etcd"
    assert len(devices) == 1
    until(lambda: not any(alive(process) for process in family))
    until(lambda: all(attachment(device) != before for device, before in attached.items()))
    mounts = Path("/proc/mounts").read_text()
    assert not any(f"{device} " in mounts for device in devices)


def below(process: int) -> Iterator[int]:
    """All that it started, and what these did."""
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            numbers = children.read_text().split()
        except OSError:
            continue  # it has ended
        for child in map(int, numbers):
            yield child
            yield from below(child)


def read(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:
        return ""


def name(process: int) -> str:
    return read(f"/proc/{process}/comm").strip()


def alive(process: int) -> bool:
    state = read(f"/proc/{process}/stat").rpartition(")")[2].split()
    return bool(state) and state[0] not in "ZX"


def loop_devices(process: int) -> set[str]:
    """Those that are mounted where that process looks."""
    words = read(f"/proc/{process}/mountinfo").split()
    return {word for word in words if word.startswith("/dev/loop")}


def attachment(device: str) -> str:
    """Which file is behind it, told apart from the one that comes next; "" if none."""
    block = f"/sys/block/{Path(device).name}"
    return read(f"{block}/loop/backing_file") and read(f"{block}/diskseq")


def until(what: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# ------------------------------------------------------------------ the judgement


def row(setting: str, *images: Image) -> Row:
    return Row(setting, images)


STORE, OFF = "sqlite store", "sqlite store, OFF"
KEPT, GONE, NONE = Image(9), Image(9, ["done k1"]), Image(trouble="no loop device")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row(STORE, KEPT), row(OFF, GONE)], Verdict.VALID),
        ([row(STORE, KEPT, GONE), row(OFF, GONE)], Verdict.INVALID),
        ([row(STORE, GONE), row(OFF, KEPT)], Verdict.INVALID),
        ([row(STORE, KEPT), row(OFF, KEPT)], Verdict.UNKNOWN),
        ([row(STORE, KEPT)], Verdict.UNKNOWN),
        ([row(STORE, KEPT), row("etcd store, fsync lies", GONE)], Verdict.UNKNOWN),
        ([row(STORE, KEPT, NONE), row(OFF, GONE)], Verdict.UNKNOWN),
        ([row(STORE, Image()), row(OFF, GONE)], Verdict.UNKNOWN),
        ([row(STORE), row(OFF, GONE)], Verdict.UNKNOWN),
        ([], Verdict.UNKNOWN),
    ],
)
def test_what_a_run_is_worth(rows: list[Row], expected: Verdict) -> None:
    """Loss where there must be none makes it invalid; without a control that lost it says nothing."""
    assert verdict(rows) is expected


def test_a_setting_is_run_with_its_controls() -> None:
    """Those of what is put on the same disk."""
    assert with_controls(["etcd store"]) == ["etcd store", "etcd store, fsync lies"]


def test_the_command_says_what_was_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A table for people, JSON for machines, and a number for the shell."""
    monkeypatch.setattr(command, "why_not", lambda: "")
    monkeypatch.setattr(command, "run", lambda name, *_, **__: row(name, KEPT, GONE))
    figures = tmp_path / "power.json"
    assert command.main(["--setting", STORE, "--json", str(figures)]) == 1
    said = capsys.readouterr().out
    assert "sqlite store: 1 of 18 are lost, such as 'done k1'" in said
    assert said.endswith("this run is invalid\n")
    report = json.loads(figures.read_text())
    assert report["verdict"] == "invalid"
    counted = {
        key: report["rows"][0][key] for key in ("setting", "images", "acknowledged", "lost", "images_hit")
    }
    assert counted == {"setting": STORE, "images": 2, "acknowledged": 18, "lost": 1, "images_hit": 1}


def test_without_root_nothing_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, and the number that means it."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert command.main([]) == 2
    assert capsys.readouterr().err == "only root may mount: run it as root\n"
