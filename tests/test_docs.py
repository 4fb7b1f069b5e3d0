"""What the documents name is there: tests, files, steps; and their figures are those on record."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCS, ids=lambda document: document.name)
def test_every_test_and_file_that_is_named_is_there(document: Path) -> None:
    """A test by its file and name, anything else of ours by its path."""
    text = document.read_text()
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        source = (ROOT / file).read_text()
        assert not name or f"def {name}(" in source, f"{document.name} names {file}::{name}"
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
