"""PostgreSQL for tests: a server of one's own, on its own port and data, from 127.0.0.1 only."""

import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from tests.servers.catalog import SERVERS
from tests.servers.lent import Lent
from tests.servers.ports import free_port
from tests.servers.processes import Processes

DEADLINE = 60.0  # seconds; a start takes less than 1
USER = "nobody"
PASSWORD = "secret word"


def url_of(port: int, user: str = "postgres", password: str = PASSWORD, database: str = "idemp") -> str:
    """Of what is at ``port``: a server of these, or a proxy before it."""
    return f"postgresql://{user}:{quote(password)}@127.0.0.1:{port}/{database}"


class PostgreSQL(Lent):
    """A server: started by `with`, gone with its data at the end of it.

    options: of postgresql.conf: ``{"synchronous_commit": "off"}``.  folder: where its data lies, else one
    of its own.
    """

    def __init__(self, *, options: Mapping[str, str] | None = None, folder: Path | None = None) -> None:
        self.port = free_port()
        program = SERVERS["postgresql"].path()
        assert program is not None
        self.programs = Path(os.path.realpath(program)).parent
        self.folder = folder or Path(tempfile.mkdtemp(prefix="idemp-postgresql-"))
        self.data = self.folder / "data"
        self._options = dict(options or {})
        environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(self.folder)}
        settings = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.folder),
            "max_connections": "100",
            "shared_buffers": "32MB",
            **self._options,
        }
        flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._command = as_user([str(self.programs / "postgres"), "-D", str(self.data), *flags])
        self._runs = Processes(self.folder, environment, self._command)

    @property
    def url(self) -> str:
        """Of the database ``idemp``, for its owner."""
        return url_of(self.port)

    def url_of(self, user: str, password: str, database: str) -> str:
        return url_of(self.port, user, password, database)

    def database(self) -> str:
        """The URL of a new database, for its owner."""
        name = f"d{uuid.uuid4().hex[:12]}"
        self.psql(f"CREATE DATABASE {name} STRATEGY wal_log")
        return self.url_of("postgres", PASSWORD, name)

    def start(self) -> None:
        """Return when it serves: at first, and again on the same data after stop or kill."""
        if first := not self.data.exists():
            self._make()
        # Of one that was killed; a process that has its number now would keep this one from starting.
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        self._runs.start()
        self._wait()
        if first:
            self.psql("CREATE DATABASE idemp", database="postgres")

    def _wait(self) -> None:
        ready = [str(self.programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        end = time.monotonic() + DEADLINE
        while subprocess.run(ready, check=False).returncode != 0:
            if not self._runs.alive() or time.monotonic() > end:
                raise RuntimeError(f"PostgreSQL did not start:\n{self._runs.log()}")
            time.sleep(0.02)

    def _make(self) -> None:
        """A fresh cluster with a password for everybody."""
        secret = self.folder / "password"
        secret.write_text(PASSWORD + "\n")
        give(self.folder)
        command = [str(self.programs / "initdb"), "-D", str(self.data), "-U", "postgres", "--no-sync"]
        command += ["-A", "scram-sha-256", f"--pwfile={secret}", "--locale=C.UTF-8", "-E", "UTF8"]
        done = subprocess.run(as_user(command), cwd=self.folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"initdb failed: {done.stderr}")

    def psql(self, statement: str, *, database: str = "idemp") -> str:
        """What ``psql`` answers, rows as lines."""
        command = [str(self.programs / "psql"), "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", statement]
        place = {"PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": "postgres"}
        environment = {**os.environ, **place, "PGPASSWORD": PASSWORD, "PGDATABASE": database}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def stop(self) -> None:
        """End at once and in good order, without waiting for clients to leave."""
        self._control("stop", "-m", "fast", "-w")
        self._runs.stop()

    def kill(self) -> None:
        """SIGKILL; what the server had forked ends by itself as soon as it notices."""
        self._runs.kill()

    def restart(self) -> None:
        self.stop()
        self.start()

    @classmethod
    def copy(cls, other: "PostgreSQL") -> "PostgreSQL":
        """A replica that follows ``other``, which is stopped at this moment and may start again."""
        (other.data / "pg_hba.conf").write_text("host all,replication all 127.0.0.1/32 scram-sha-256\n")
        primary = f"host=127.0.0.1 port={other.port} user=postgres password='{PASSWORD}'"
        replica = cls(options={"primary_conninfo": primary})
        shutil.copytree(other.data, replica.data)
        (replica.data / "standby.signal").touch()
        give(replica.folder)
        replica.data.chmod(0o700)
        return replica

    def promote(self) -> None:
        """Let a replica become a primary."""
        self._control("promote", "-w")

    def _control(self, *words: str) -> None:
        command = [str(self.programs / "pg_ctl"), "-D", str(self.data), *words]
        subprocess.run(as_user(command), cwd=self.folder, capture_output=True, check=False)

    def close(self) -> None:
        """The end of the server and of everything it wrote."""
        if self._runs.alive():
            self._control("stop", "-m", "immediate", "-w")
        self._runs.remove()


def as_user(command: Sequence[str]) -> list[str]:
    """``command`` as somebody who is not root, which PostgreSQL insists on."""
    if os.geteuid() != 0:
        return list(command)
    return ["setpriv", f"--reuid={USER}", "--regid=nogroup", "--clear-groups", "--", *command]


def give(folder: Path) -> None:
    """To that user."""
    if os.geteuid() == 0:
        folder.chmod(0o755)
        for path in (folder, *folder.rglob("*")):
            shutil.chown(path, USER, "nogroup")
