"""PgBouncer for tests: a pooler in transaction mode before a PostgreSQL, from 127.0.0.1 only."""

import os
import socket
import tempfile
import time
from pathlib import Path

from tests.servers.catalog import SERVERS
from tests.servers.lent import Lent
from tests.servers.ports import free_port
from tests.servers.postgresql import PASSWORD, as_user, give
from tests.servers.processes import Processes

DEADLINE = 30.0


class PgBouncer(Lent):
    """Before the server at ``port``, with fewer connections to it than its clients have to the pooler."""

    def __init__(self, port: int) -> None:
        self.port = free_port()
        self._target = port
        program = SERVERS["pgbouncer"].path()
        assert program is not None
        self.folder = Path(tempfile.mkdtemp(prefix="idemp-pgbouncer-"))
        (self.folder / "users").write_text(f'"postgres" "{PASSWORD}"\n')
        config = [
            "[databases]",
            f"* = host=127.0.0.1 port={port} user=postgres password='{PASSWORD}'",
            "[pgbouncer]",
            "listen_addr = 127.0.0.1",
            f"listen_port = {self.port}",
            "unix_socket_dir =",
            "pool_mode = transaction",
            "default_pool_size = 3",
            "auth_type = scram-sha-256",
            f"auth_file = {self.folder}/users",
        ]
        (self.folder / "pgbouncer.ini").write_text("\n".join(config) + "\n")
        give(self.folder)
        command = as_user([program, str(self.folder / "pgbouncer.ini")])
        self._runs = Processes(self.folder, {"PATH": os.environ.get("PATH", "")}, command)

    def through(self, url: str) -> str:
        """The server's ``url``, by way of the pooler."""
        return url.replace(f":{self._target}/", f":{self.port}/")

    def start(self) -> None:
        """Return when it takes connections."""
        self._runs.start()
        end = time.monotonic() + DEADLINE
        while not _open(self.port):
            if not self._runs.alive() or time.monotonic() > end:
                raise RuntimeError(f"PgBouncer did not start:\n{self._runs.log()}")
            time.sleep(0.02)

    def close(self) -> None:
        """The end of it and of everything it wrote."""
        self._runs.remove()


def _open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
