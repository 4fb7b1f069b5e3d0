"""A server as processes of this machine, in a folder of their own, under a keeper."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

KEEPER = Path(__file__).with_name("keeper.py")
PATIENCE = 10.0  # seconds, to stand still


def hold(pid: int) -> None:
    """SIGSTOP; return when each of its threads stands still, which the signal alone does not wait for."""
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + PATIENCE
    while any(_state(thread) not in "Tt" for thread in Path(f"/proc/{pid}/task").iterdir()):
        if time.monotonic() > end:
            raise RuntimeError(f"process {pid} does not stand still")
        time.sleep(0.001)


def _state(thread: Path) -> str:
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "T"  # it has ended


class Processes:
    """One server and its helpers.  The last command is the server; it must not go into the background."""

    def __init__(self, folder: Path, environment: Mapping[str, str], *commands: Sequence[str]) -> None:
        self._folder = folder
        self._environment = {"LANG": "C.UTF-8", **environment}  # nothing else comes in from outside
        self._commands = commands
        self._keeper: subprocess.Popen[bytes] | None = None

    @property
    def _output(self) -> Path:
        return self._folder / "output"

    def start(self) -> None:
        arguments = (str(os.getpid()), str(self._folder), json.dumps(self._commands))
        with self._output.open("ab") as output:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", str(KEEPER), *arguments],
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C at the terminal is for pytest, which then stops the server
            )

    def stop(self) -> None:
        """Ask the server to end, and wait until it did."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL for the server and its helpers."""
        self._end(signal.SIGINT)

    def _end(self, wish: signal.Signals) -> None:
        if self._keeper is not None:
            self._keeper.send_signal(wish)
            self._keeper.wait(timeout=60)
            self._keeper = None

    def alive(self) -> bool:
        return self._keeper is not None and self._keeper.poll() is None

    def log(self) -> str:
        return self._output.read_text(errors="replace")[-4000:]

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
