"""No sentence of the product can be left out without a check that notices."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mutants.catalog import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent.parent
Copy = Callable[[Mutant | None], Path]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """Makes a copy of the checkout as far as the checks need it, with one mutant or none."""

    def make(mutant: Mutant | None) -> Path:
        for part in ("idemp", "tests"):
            shutil.copytree(ROOT / part, tmp_path / part)
        shutil.copy(ROOT / "pyproject.toml", tmp_path)
        if mutant is not None:
            file = tmp_path / "idemp" / mutant.file
            file.write_text(_weakened(mutant, file.read_text()))
        return tmp_path

    return make


def _weakened(mutant: Mutant, text: str) -> str:
    assert text.count(mutant.old) == 1, f"{mutant.file} has it {text.count(mutant.old)} times: {mutant.old!r}"
    return text.replace(mutant.old, mutant.new)


def _run(folder: Path, check: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *check], cwd=folder, env=env, capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_is_noticed(mutant: Mutant, copy: Copy) -> None:
    """The check fails, and not because the copy cannot be imported."""
    done = _run(copy(mutant), mutant.check)
    print(done.stdout[-2000:], done.stderr[-2000:])
    said = done.stdout + done.stderr
    assert done.returncode == 1, f"nobody noticed: without {mutant.without}"
    assert "again: python -m tests.simulator" in said or "1 failed" in said
    assert "SyntaxError" not in said


def test_the_clean_copy_passes(copy: Copy) -> None:
    """None of the checks fails by itself: those of pytest run in this suite, and are looked for here."""
    folder = copy(None)
    checks = {mutant.check for mutant in MUTANTS}
    units = [check for check in checks if "pytest" in check]
    others = [check for check in checks if "pytest" not in check]
    tests = dict.fromkeys(word for check in units for word in check if word.startswith("tests/"))
    for check in (*others, (*units[0][:6], "--collect-only", *tests)):
        done = _run(folder, check)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert str(folder) in _run(folder, ("-c", "import idemp; print(idemp.__file__)")).stdout
