"""One image, in a room of its own: ``python -m tests.power.cut SETTING``; the result is a line of JSON."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.power.disk import Disk
from tests.power.settings import SETTINGS, Subject, in_child

LOAD = (0.5, 1.5)
"""Seconds from the first promise to the cut: at least, at most."""
FIRST = 30.0
"""Seconds that the first promise may take."""


class Cut(NamedTuple):
    """What was promised before the cut, and what of it is gone."""

    acknowledged: int
    lost: list[str]
    broken: str = ""
    """Why nothing could be asked of what is left."""


def cut(name: str) -> Cut:
    """Write, cut, look."""
    disk = Disk()
    subject = SETTINGS[name].make(disk.place)
    disk.flush()  # folders and files of configuration
    subject.start()
    subject.settle(disk)
    promises = disk.room / "promises"
    writer = _start_writer(subject, promises)
    _wait_for_load(writer, promises)
    # What is noted by now was promised before the cut.
    promised = promises.read_text().splitlines()
    disk.cut()
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    subject.kill()
    disk.restore()
    try:
        subject.start()
        return Cut(len(promised), subject.lost(promised))
    except Exception as error:
        # It does not even start, or not with what it finds: to its user all is gone.
        return Cut(len(promised), promised, f"{type(error).__name__}: {error}")


def _start_writer(subject: Subject, promises: Path) -> int:
    promises.touch()

    def write() -> None:
        notes = os.open(promises, os.O_WRONLY | os.O_APPEND)
        subject.write(lambda what: _note(notes, what))

    return in_child(write)


def _note(notes: int, what: Sequence[str]) -> None:
    os.write(notes, "".join(f"{line}\n" for line in what).encode())


def _wait_for_load(writer: int, promises: Path) -> None:
    end = time.monotonic() + FIRST
    while not promises.stat().st_size:
        if os.waitpid(writer, os.WNOHANG)[0] or time.monotonic() > end:
            raise RuntimeError("nothing was promised")
        time.sleep(0.01)
    time.sleep(random.uniform(*LOAD))
    if os.waitpid(writer, os.WNOHANG)[0]:
        raise RuntimeError("the writer ended before the cut")


def main(name: str) -> None:
    """Say what came of it, or what went wrong before the cut."""
    try:
        result = cut(name)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"trouble": f"{type(error).__name__}: {error}"}))
        return
    print(json.dumps(result._asdict()))


if __name__ == "__main__":
    main(sys.argv[1])
