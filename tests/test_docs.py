"""What the documents name is there: tests, files, steps; and their figures are those on record."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import picture, tables
from bench.tables import spaced
from tests.service import environment, finished

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCS, ids=lambda document: document.name)
def test_every_test_and_file_that_is_named_is_there(document: Path) -> None:
    """A test by its file and name, anything else of ours by its path."""
    text = document.read_text()
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        source = (ROOT / file).read_text()
        assert not name or f"def {name}(" in source, f"{document.name} names {file}::{name}"
    for file in re.findall(r"`(bench/[\w/.]+)`", text):
        assert (ROOT / file).exists(), f"{document.name} names {file}"
    for folder in re.findall(r"`(tests/[\w/]+/)`", text):
        assert (ROOT / folder).is_dir(), f"{document.name} names {folder}"
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (document.parent / link).exists(), f"{document.name} links to {link}"


def test_every_step_of_the_matrix_is_in_the_table_of_crashes() -> None:
    """What the reader looks up is what is killed."""
    from tests.reliability.matrix import STEPS

    text = (ROOT / "docs/reliability.md").read_text()
    named = set(re.findall(r"`([a-z]+\.[a-z_]+)`", text))
    assert set(STEPS) <= named


def test_the_figures_are_those_on_record() -> None:
    """Chaos is added up run by run; of the matrix and of power losses the last long run counts."""
    text = (ROOT / "docs/reliability.md").read_text()
    runs = [json.loads(line) for line in (ROOT / "tests/chaos/tally.jsonl").read_text().splitlines()]
    doubles = ("doubles_named", "doubles_unnamed")
    for name in ("messages", "effects", "faults", "kills", *doubles, "lost", "invented"):
        total = spaced(sum(run[name] for run in runs))
        assert re.search(rf"\| {name.replace('_', ' ')} \| {total} \|", text), f"chaos: {name} is {total}"
    matrix = json.loads((ROOT / "tests/reliability/record.json").read_text())["all"]
    for name in ("cells", "kills", "messages", "effects", "doubled", "named", "violations"):
        total = spaced(matrix[name])
        assert re.search(rf"\| {name} \| {total} \|", text), f"the matrix: {name} is {total}"
    for row in json.loads((ROOT / "tests/power/record.json").read_text())["rows"]:
        line = " | ".join((row["setting"], *(spaced(row[n]) for n in ("images", "acknowledged", "lost"))))
        assert f"| {line} |" in text, line


def test_the_speeds_are_those_on_record(tmp_path: Path) -> None:
    """Every row: written anew, the documents are the same."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    tables.renew_all(ROOT / "bench/record", tmp_path / "docs")
    for file in (tmp_path / "docs").glob("*.md"):
        assert file.read_text() == (ROOT / "docs" / file.name).read_text(), f"{file.name}: bench docs"


def test_the_figures_of_tracking_are_those_on_record() -> None:
    """What it costs; how long look-ups take, which is within what was promised."""
    text = (ROOT / "docs/tracking.md").read_text()
    found = json.loads((ROOT / "bench/record/tracking.json").read_text())
    for store, each in found["cost"].items():
        rates = " | ".join(spaced(round(each[name])) for name in ("off", "on"))
        assert f"| {store} | {rates} | {each['ratio']:.2f} |" in text
    for name, log in found["looks"].items():
        for what, times in log["milliseconds"].items():
            shares = " | ".join(f"{times[share]:.2f}" for share in ("p50", "p99", "worst"))
            assert f"| {what} | {name} | {spaced(log['events'])} | {shares} |" in text
        assert log["milliseconds"]["trace"]["p99"] < 50
        assert log["milliseconds"]["flow"]["worst"] < 2000
    assert found["looks"]["sqlite"]["events"] == 10_000_000


def test_the_pictures_are_of_the_record(tmp_path: Path) -> None:
    """Drawn anew they are the same."""
    picture.draw_all(ROOT / "bench/record", tmp_path)
    for name in ("speed.svg", "growth.svg"):
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text(), f"{name}: bench docs"


def table(text: str, heading: str) -> dict[str, list[str]]:
    """The rows of the first table under a heading, by their first cell."""
    part = text.partition(f"\n## {heading}\n")[2]
    lines = [line for line in part.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    return {name: rest for name, *rest in cells}


NOWHERE = ("no server", "no such limit", "nothing")
"""What needs no test, for there is no such thing."""


def test_the_page_to_choose_by_names_its_evidence() -> None:
    """Each cell of what a failure does has its test, or says that it was not run; each rate its record."""
    text = (ROOT / "docs/stores.md").read_text()
    failures = table(text, "What each failure does")
    assert len(failures) >= 15
    for failure, cells in failures.items():
        assert len(cells) == 4, failure
        for cell in cells:
            named = re.search(r"`tests/[\w/]+\.py::\w+`", cell)
            assert named or cell in NOWHERE or cell.endswith("not run"), f"{failure}: {cell}"
    record = {
        name: json.loads((ROOT / f"bench/record/{name}.json").read_text())
        for name in ("factors", "latency", "growth")
    }
    rows = table(text, "Rate and memory")
    stores = ("sqlite", "postgresql", "redis", "etcd")
    base = [record["factors"]["cells"][f"base: {store}"] for store in stores]
    told = {name.partition(":")[0]: cells for name, cells in rows.items()}
    assert told["fresh messages a second, median"] == [spaced(round(each["median"])) for each in base]
    ceiling = "of what a consumer could do that remembers nothing (the ceiling)"
    assert told[ceiling] == [f"{each['ratios']['base: ceiling']:.2f}" for each in base]
    one = "one message on an idle machine, until it is acknowledged, ms, median"
    settled = [record["latency"]["latencies"][store]["settled"]["p50"] for store in stores]
    assert told[one] == [f"{each:.2f}" for each in settled]
    taken = told["a done key with an id of 32 characters and no result takes"]
    for store, cell in (("sqlite", taken[0]), ("etcd", taken[3])):
        assert cell.startswith(f"{record['growth']['growth'][store]['1000000']['bytes']:.0f} bytes")
    for name, cells in rows.items():
        for cell in cells if "`" not in name else ():
            assert "`" in cell or "](" in cell or cell in NOWHERE or "of its" in cell, f"{name}: {cell}"


@pytest.mark.parametrize(("mark", "said"), [("Consumer(", "['A-1', 'A-1-paid']"), ("configure(", '"handle"')])
def test_the_python_of_tracking(tmp_path: Path, mark: str, said: str) -> None:
    """As it stands."""
    text = (ROOT / "docs/tracking.md").read_text()
    [code] = [each for each in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) if mark in each]
    done = finished("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_the_session_of_tracking(tmp_path: Path) -> None:
    """Each line works, one after the other."""
    text = (ROOT / "docs/tracking.md").read_text()
    [session] = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    shims = f'set -e\nidemp() {{ "{sys.executable}" -m idemp "$@"; }}\n'
    shims += 'timeout() { shift; "$(type -P timeout)" --preserve-status "$1" "$PYTHON" "${@:3}"; }\n'
    done = subprocess.run(
        ["bash", "-c", shims + session],
        cwd=tmp_path,
        env={**environment(), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "* A-1  new_order  sent by idemp" in done.stdout
    assert "orders: 1 done already, will be skipped" in done.stdout
