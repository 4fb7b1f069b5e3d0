"""What every process of a run saw, as JSON lines: one file a process, one clock for all.

    {"t":123456789012,"p":4711,"role":"consumer","f":"claim","type":"invoke","op":81,"k":"42"}
    {"t":123456801234,"p":4711,"role":"consumer","f":"claim","type":"ok","op":81,"k":"42","r":"claimed","att":1,"tok":901}

t: CLOCK_MONOTONIC in nanoseconds.  op: pairs a completion with its invoke, within one process.
k: the message's id.  sha: of its body, or of a result.  f: publish, deliver, connect, claim, takeover,
complete, release, abandon, park, forget, run, effect, ack, retry (a delayed copy), dead (a copy to the
dead letters), failpoint, and the faults' own.
type: invoke, before the call; then ok, fail (it certainly did not happen) or info (nobody knows: a
time-out, a lost connection, a crash).  What has an invoke only ended in a crash: info.

A line is written before what it announces, with one system call: kill -9 loses none that was written,
and may tear the last one, which then never counted.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]


class History:
    """Where one process writes; safe to use from its threads."""

    def __init__(self, folder: Path, role: str) -> None:
        self._role, self._pid = role, os.getpid()
        self._numbers = itertools.count(1)
        file = folder / f"{role}.{self._pid}.jsonl"
        self._file = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)

    def close(self) -> None:
        """For a process that writes many."""
        os.close(self._file)

    def number(self) -> int:
        """The next ``op``."""
        return next(self._numbers)

    def note(self, f: str, type: str, **facts: Any) -> None:
        """One line."""
        self.note_all([{"f": f, "type": type, **facts}])

    def note_all(self, lines: Iterable[Line]) -> None:
        """Lines of the same moment."""
        head = {"t": time.monotonic_ns(), "p": self._pid, "role": self._role}
        text = "".join(json.dumps({**head, **line}, separators=(",", ":")) + "\n" for line in lines)
        if text:
            os.write(self._file, text.encode())


def digest(data: bytes) -> str:
    """What stands for a body or a result in a line."""
    return hashlib.sha256(data).hexdigest()[:16]


def read(folder: Path) -> list[dict[str, Any]]:
    """Every line of a run, in the order of time."""
    lines = itertools.chain.from_iterable(_whole_lines(file) for file in folder.glob("*.jsonl"))
    return sorted(lines, key=lambda line: line["t"])


def _whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    text = file.read_bytes()
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        yield json.loads(line)
