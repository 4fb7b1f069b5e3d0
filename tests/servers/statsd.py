"""statsd for tests: the daemon itself, on its own ports, from 127.0.0.1 only."""

import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

from tests.servers.catalog import SERVERS
from tests.servers.graphite import CONFIGURATION
from tests.servers.lent import Lent
from tests.servers.ports import free_port
from tests.servers.processes import Processes

DEADLINE = 60.0  # seconds; a start takes about 0.2


class Statsd(Lent):
    """A statsd with assets/graphite/udp.js that sends to the carbon at ``carbon_port``."""

    def __init__(self, carbon_port: int) -> None:
        self._port, self._management = free_port(), free_port()
        folder = Path(tempfile.mkdtemp(prefix="idemp-statsd-"))
        shutil.copy(CONFIGURATION / "udp.js", folder)
        # statsd evaluates its configuration, so this one can take ours and change where things are.
        (folder / "here.js").write_text(f"""
Object.assign(eval("(" + fs.readFileSync("udp.js") + ")"), {{
  servers: [{{ server: "./servers/udp", address: "127.0.0.1", port: {self._port} }}],
  mgmt_address: "127.0.0.1", mgmt_port: {self._management}, graphitePort: {carbon_port}
}})
""")
        environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(folder)}
        program = SERVERS["statsd"].path() or "statsd"
        self._runs = Processes(folder, environment, [program, str(folder / "here.js")])

    @property
    def address(self) -> str:
        """Where services send to."""
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        """Return when it takes counters."""
        self._runs.start()
        end = time.monotonic() + DEADLINE
        while not self._healthy():
            if not self._runs.alive() or time.monotonic() > end:
                raise RuntimeError(f"statsd did not start:\n{self._runs.log()}")
            time.sleep(0.02)

    def close(self) -> None:
        """The end of it."""
        self._runs.remove()

    def _healthy(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._management), timeout=5) as wire:
                wire.sendall(b"health\n")
                return wire.recv(100).startswith(b"health: up")
        except OSError:
            return False
