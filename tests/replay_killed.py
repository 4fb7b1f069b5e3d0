"""`idemp replay` in processes that are killed at a step: ``python -m tests.replay_killed`` forks them.

Orders come as JSON lines, ``{"arguments": [...], "settings": {...}, "kill": 7}``, any number at a time; each
is answered by ``{"pid": 4711}``, and ``{"ended": 4711}`` waits for the end: ``{"status": -9, "steps": 7}``.
A step is a moment right before or right after something that may change the broker or the store; the
process is killed at step ``kill``, or at none.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from idemp.cli import main, options
from idemp.ports import Delivery
from idemp.tracking import pace, plan_queue, replay
from tests.orders import Forker


class Ended(NamedTuple):
    """How a replay ended: its exit code or minus the signal, the steps that it came to, what it said."""

    status: int
    steps: Sequence[str]
    out: str
    err: str


# ------------------------------------------------------------------ in the process that is killed


class Steps:
    """Counts steps, names them in a file, and kills at one."""

    def __init__(self, file: Path, kill: int) -> None:
        self._file, self._kill, self._n = file, kill, 0
        self._lock = threading.Lock()

    def __call__(self, name: str) -> None:
        with self._lock:
            self._n += 1
            with self._file.open("a") as file:
                file.write(f"{name}\n")
            if self._n == self._kill:
                os.kill(os.getpid(), signal.SIGKILL)


class Stepping:
    """A transport or a store, whose ``verbs`` are steps."""

    def __init__(self, inner: Any, step: Steps, verbs: Sequence[str]) -> None:
        self._inner, self._step, self._verbs = inner, step, verbs

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return self._stepping(name, found) if name in self._verbs else found

    def _stepping(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*given: Any, **more: Any) -> Any:
            self._step(f"before {name}")
            came = call(*given, **more)
            self._step(f"after {name}")
            return came

        return stepping

    def poll(self, timeout: float) -> Any:
        """A step is when the broker has confirmed."""
        came = self._inner.poll(timeout)
        if any(not isinstance(event, Delivery) for event in came):
            self._step("confirmed")
        return came


def _run(arguments: Sequence[str], settings: Mapping[str, str], kill: int, folder: Path) -> None:
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(settings)
    step = Steps(folder / "steps", kill)
    doors: Any = options
    opened, stored = doors.open_transport, doors.open_store
    doors.open_transport = lambda url: Stepping(opened(url), step, ("declare", "send", "ack"))
    doors.open_store = lambda url: Stepping(stored(url), step, ("apply",))
    sizes: Any = replay, pace
    for module in sizes:
        module.TOGETHER = 2
    plan_queue.TOGETHER = 3
    sys.argv = ["idemp", "replay", *arguments]
    main()


# ------------------------------------------------------------------ who forks it


def _serve() -> None:
    folders: dict[int, Path] = {}
    for line in sys.stdin:
        match json.loads(line):
            case {"ended": pid}:
                _, status = os.waitpid(pid, 0)
                folder = folders.pop(pid)
                answer: dict[str, Any] = {"status": os.waitstatus_to_exitcode(status)}
                for name in ("steps", "out", "err"):
                    file = folder / name
                    answer[name] = file.read_text() if file.exists() else ""
            case {"arguments": arguments, "settings": settings, "kill": kill}:
                folder = Path(tempfile.mkdtemp(dir=settings["TMPDIR"]))
                pid = os.fork()
                if not pid:
                    code = 70
                    try:
                        _run(arguments, settings, kill, folder)
                    except SystemExit as end:
                        code = end.code if isinstance(end.code, int) else 0
                    finally:
                        sys.stdout.flush()
                        sys.stderr.flush()
                        os._exit(code)
                folders[pid] = folder
                answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


class Replays(Forker):
    """The process that forks them."""

    def __init__(self, folder: Path) -> None:
        super().__init__("tests.replay_killed")
        self._folder = folder

    def begin(self, *arguments: str, settings: Mapping[str, str], kill: int = 0) -> int:
        """Start one; its process id."""
        told = {"TMPDIR": str(self._folder), **settings}
        return int(self._order(arguments=arguments, settings=told, kill=kill)["pid"])

    def end(self, pid: int) -> Ended:
        """Wait for it."""
        told = self._order(ended=pid)
        return Ended(told["status"], told["steps"].splitlines(), told["out"], told["err"])

    def run(self, *arguments: str, settings: Mapping[str, str], kill: int = 0) -> Ended:
        """From its start to its end."""
        return self.end(self.begin(*arguments, settings=settings, kill=kill))


if __name__ == "__main__":
    _serve()
