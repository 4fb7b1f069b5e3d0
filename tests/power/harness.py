"""Many cuts, counted and judged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from tests.power.disk import isolated
from tests.power.settings import SETTINGS, Expect

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0
"""Seconds that one image may take."""


class Verdict(IntEnum):
    """What a run is worth; also how its process ends."""

    VALID = 0
    INVALID = 1
    UNKNOWN = 2


class Image(NamedTuple):
    """One cut.  ``trouble``: why there was none, or what went wrong before it.

    broken: why nothing could be asked of what was left, so that all counts as lost.
    """

    acknowledged: int = 0
    lost: Sequence[str] = ()
    broken: str = ""
    trouble: str = ""


class Row(NamedTuple):
    """All cuts of a setting."""

    setting: str
    images: Sequence[Image]

    @property
    def expect(self) -> Expect:
        return SETTINGS[self.setting].expect

    @property
    def acknowledged(self) -> int:
        return sum(image.acknowledged for image in self.images)

    @property
    def lost(self) -> int:
        return sum(len(image.lost) for image in self.images)

    @property
    def hit(self) -> int:
        """Images in which something was lost."""
        return sum(bool(image.lost) for image in self.images)

    def verdict(self) -> tuple[Verdict, str]:
        """And why, if it is not valid."""
        if self.expect is Expect.KEEPS and self.lost:
            some = next(image.lost for image in self.images if image.lost)
            return Verdict.INVALID, f"{self.lost} of {self.acknowledged} are lost, such as {some[0]!r}"
        if troubles := [image.trouble for image in self.images if image.trouble]:
            return Verdict.UNKNOWN, troubles[0]
        if not self.images or not all(image.acknowledged for image in self.images):
            return Verdict.UNKNOWN, "nothing was promised"
        if self.expect is Expect.LOSES and not self.lost:
            return Verdict.UNKNOWN, "a control that lost nothing: the cut is no cut"
        return Verdict.VALID, ""


def with_controls(settings: Sequence[str]) -> list[str]:
    """And what shows that these could have lost something."""
    families = {family(name) for name in settings}
    controls = [name for name, each in SETTINGS.items() if each.expect is Expect.LOSES]
    return list(dict.fromkeys([*settings, *(name for name in controls if family(name) in families)]))


def family(setting: str) -> str:
    """What is put on the disk: its first word."""
    return setting.split()[0]


def verdict(rows: Sequence[Row]) -> Verdict:
    """Of the whole run.  Without a control nobody knows that a setting could have lost at all."""
    found = {row.verdict()[0] for row in rows}
    controlled = {family(row.setting) for row in rows if row.expect is Expect.LOSES}
    if Verdict.INVALID in found:
        return Verdict.INVALID
    if found != {Verdict.VALID} or not {family(row.setting) for row in rows} <= controlled:
        return Verdict.UNKNOWN
    return Verdict.VALID


def run(setting: str, images: int, *, jobs: int = 1, tell: Callable[[], object] = lambda: None) -> Row:
    """So many cuts; ``tell`` is called after each."""
    with ThreadPoolExecutor(jobs) as pool:
        return Row(setting, list(_told(pool.map(_image, [setting] * images), tell)))


def _told(images: Iterator[Image], tell: Callable[[], object]) -> Iterator[Image]:
    for image in images:
        tell()
        yield image


def _image(setting: str) -> Image:
    """In a room of its own, which ends with the thread that waits for it here."""
    command = isolated([sys.executable, "-m", "tests.power.cut", setting])
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return Image(trouble=f"an image took longer than {PATIENCE:g} s")
    last = done.stdout.strip().rpartition("\n")[2]
    try:
        return Image(**json.loads(last))
    except ValueError:
        said = done.stderr.strip().rpartition("\n")[2]
        return Image(trouble=said or f"it ended with {done.returncode} and without a word")
