"""Redis for tests: a server of one's own, on its own port and data, from 127.0.0.1 only."""

import itertools
import os
import signal
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from tests.servers.catalog import SERVERS
from tests.servers.lent import Lent
from tests.servers.ports import free_port
from tests.servers.processes import Processes, hold

DEADLINE = 60.0  # seconds; a start takes a tenth of one
SAFE = {"appendonly": "yes", "appendfsync": "always"}
"""What keeps every write that was confirmed; Debian's own settings do not."""


class Redis(Lent):
    """A server: started by `with`, gone with its data at the end of it.

    options: of redis.conf, beside `SAFE`.  folder: where its data lies, else one of its own.
    """

    def __init__(self, *, options: Mapping[str, str] | None = None, folder: Path | None = None) -> None:
        self.port = free_port()
        program = SERVERS["redis"].path()
        assert program is not None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="idemp-redis-"))
        settings = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.folder),
            "save": "",
            "daemonize": "no",
            "databases": "512",
            **SAFE,
            **(options or {}),
        }
        flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
        environment = {"PATH": os.environ.get("PATH", "")}
        self._pid = self.folder / "pid"
        # A shell that becomes the server: the number stays.
        command = ["/bin/sh", "-c", 'echo $$ > pid; exec "$0" "$@"', program, *flags]
        self._databases = itertools.count(1)
        self._runs = Processes(self.folder, environment, command)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def database(self) -> str:
        """The URL of a database that nobody uses yet."""
        return f"redis://127.0.0.1:{self.port}/{next(self._databases)}"

    def start(self) -> None:
        """Return when it serves: at first, and again on the same data after stop or kill."""
        self._runs.start()
        end = time.monotonic() + DEADLINE
        while not self.serves():
            if not self._runs.alive() or time.monotonic() > end:
                raise RuntimeError(f"Redis did not start:\n{self._runs.log()}")
            time.sleep(0.01)

    def serves(self) -> bool:
        """Does it answer?  While it loads its data it does not."""
        try:
            return self.call("PING") == "PONG"
        except (OSError, RuntimeError):
            return False

    def call(self, *words: str) -> str:
        """One command, and the first line of its answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as wire:
            parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
            wire.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())
            with wire.makefile("rb") as answer:
                line = answer.readline().decode().rstrip()
                if line.startswith("-"):
                    raise RuntimeError(line)
                if line.startswith("$") and line != "$-1":
                    return answer.read(int(line[1:])).decode()
                return line[1:]

    def stop(self) -> None:
        """End in good order."""
        self.resume()
        self._runs.stop()

    def kill(self) -> None:
        """SIGKILL."""
        self._runs.kill()

    def restart(self) -> None:
        self.stop()
        self.start()

    def pause(self) -> None:
        """Stand still, with every connection open."""
        hold(int(self._pid.read_text()))

    def resume(self) -> None:
        if self._runs.alive():
            os.kill(int(self._pid.read_text()), signal.SIGCONT)

    def close(self) -> None:
        """The end of the server and of everything it wrote."""
        self._runs.remove()
