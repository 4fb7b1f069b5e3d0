"""etcd for tests: one member or a cluster, each on its own ports and data, from 127.0.0.1 only."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.servers.catalog import SERVERS
from tests.servers.container import Container
from tests.servers.lent import Lent
from tests.servers.ports import free_port
from tests.servers.processes import KEEPER, Processes, hold

DEADLINE = 60.0  # seconds; a start takes about 1
STALL = 600_000_000  # microseconds: longer than any test
INSIDE = (2379, 2380, 2381)  # where a container's clients, peers and its /health are


class Etcd(Lent):
    """A cluster of one's own: started by `with`, gone with its data at the end of it.

    quota_bytes: size at which its database counts as full.
    options: more of etcd's, by their names: ``{"auto-compaction-retention": "1h"}``.
    """

    def __init__(
        self, *, members: int = 1, quota_bytes: int = 0, options: Mapping[str, str] | None = None
    ) -> None:
        ports = [(free_port(), free_port(), free_port()) for _ in range(members)]
        settings = {
            # A test waits for elections.
            "heartbeat-interval": "50",
            "election-timeout": "500",
            "quota-backend-bytes": str(quota_bytes),
            "auto-compaction-retention": "0",
            "initial-cluster-token": f"idemp-{ports[0][0]}",
            "initial-cluster": ",".join(f"m{port[0]}={_peer(port[1])}" for port in ports),
            "logger": "zap",
            **(options or {}),
        }
        self.members = [Member(each, settings, alone=members == 1) for each in ports]

    @property
    def endpoints(self) -> list[str]:
        """Every member's ``host:port``."""
        return [member.endpoint for member in self.members]

    @property
    def url(self) -> str:
        return f"etcd://{','.join(self.endpoints)}/"

    def start(self) -> None:
        """Return when all members serve: at first, and again on the same data after stop or kill."""
        for member in self.members:
            member.launch()
        for member in self.members:
            member.wait()

    def stop(self) -> None:
        """End in good order, as at a restart of its machines."""
        for member in self.members:
            member.stop()

    def kill(self) -> None:
        """SIGKILL for all, as at a power cut."""
        for member in self.members:
            member.kill()

    def restart(self) -> None:
        self.stop()
        self.start()

    def leader(self) -> int:
        """The index in `members` of the one that leads, as soon as one does."""
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            for index, member in enumerate(self.members):
                if member.leads():
                    return index
            time.sleep(0.02)
        raise RuntimeError("etcd has no leader")

    def close(self) -> None:
        """The end of the cluster and of everything it wrote."""
        for member in self.members:
            member.close()


class Member:
    """One server of a cluster.  ``ports``: for clients, for the other members, for /health."""

    def __init__(self, ports: tuple[int, int, int], settings: Mapping[str, str], *, alone: bool) -> None:
        self.port, peer, self._health = ports
        self._runs: _Processes | _Container
        server = SERVERS["etcd"]
        scheme = "https" if "cert-file" in settings else "http"
        own = {"name": f"m{self.port}", "initial-advertise-peer-urls": _peer(peer)}
        own["advertise-client-urls"] = f"{scheme}://{self.endpoint}"
        if program := server.path():
            listen = _listen(scheme, "127.0.0.1", ports)
            self._runs = _processes(program, _environment([settings, own, listen]))
        elif alone:
            listen = _listen(scheme, "0.0.0.0", INSIDE)
            environment = _environment([settings, own, listen])
            outside = dict(zip(INSIDE, ports, strict=True))
            self._runs = _Container(server.image, environment, outside)
        else:
            raise RuntimeError("containers cannot reach each other at 127.0.0.1: a cluster needs etcd itself")

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Return when it serves, for which a majority must."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Start, without the wait until it serves."""
        self._runs.start()

    def wait(self) -> None:
        end = time.monotonic() + DEADLINE
        while not self.serves():
            if not self._runs.alive() or time.monotonic() > end:
                raise RuntimeError(f"etcd did not start:\n{self._runs.log()}")
            time.sleep(0.02)

    def stop(self) -> None:
        self.resume()
        self._runs.stop()

    def kill(self) -> None:
        self._runs.kill()

    def restart(self) -> None:
        self.stop()
        self.start()

    def pause(self) -> None:
        """Stand still, with every connection open, as a machine that swaps or is being moved."""
        self._runs.pause()

    def resume(self) -> None:
        self._runs.resume()

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Its disk stands still: what it wants durable waits until the end; all else in it goes on.

        Needs `strace`, and the right to trace another process, which root has.
        """
        if not isinstance(self._runs, _Processes):
            raise RuntimeError("strace cannot reach into a container")
        with self._runs.traced("fdatasync", f"delay_enter={STALL}"):
            yield

    def serves(self) -> bool:
        """Does it answer reads?  A full database makes etcd say it is not healthy, but it does."""
        try:
            return bool(_json(f"http://127.0.0.1:{self._health}/health")["health"] == "true")
        except urllib.error.HTTPError as error:
            with error:
                return error.code == 503 and bool(self._status().get("errors"))
        except OSError:
            return False

    def leads(self) -> bool:
        status = self._status()
        return "leader" in status and status["leader"] == status["header"]["member_id"]

    def call(self, path: str, *, patience: float = 1.0, **fields: Any) -> Any:
        """What its JSON gateway answers within ``patience`` seconds: ``call("/v3/auth/enable")``."""
        return _json(f"http://{self.endpoint}{path}", json.dumps(fields).encode(), patience)

    def _status(self) -> dict[str, Any]:
        try:
            status: dict[str, Any] = self.call("/v3/maintenance/status")
            return status
        except OSError:
            return {}

    def close(self) -> None:
        self._runs.remove()


class _Processes(Processes):
    """A member as a process, whose own number is in ``pid``."""

    def __init__(self, folder: Path, environment: Mapping[str, str], program: str) -> None:
        # A shell that becomes the server: the number stays.
        super().__init__(folder, environment, ["/bin/sh", "-c", 'echo $$ > pid; exec "$0"', program])
        self._pid = folder / "pid"

    def start(self) -> None:
        self._pid.unlink(missing_ok=True)
        super().start()

    def pause(self) -> None:
        hold(int(self._pid.read_text()))

    def resume(self) -> None:
        if self.alive():
            os.kill(int(self._pid.read_text()), signal.SIGCONT)

    @contextmanager
    def traced(self, call: str, fault: str) -> Iterator[None]:
        """With strace between it and the kernel, which meets every such ``call`` with ``fault``."""
        command = ["strace", "-f", "-p", self._pid.read_text().strip(), "-o", "/dev/null"]
        command += ["-e", f"trace={call}", "-e", f"inject={call}:{fault}"]
        # Under a keeper, for when this process is killed: what strace holds back cannot be killed either.
        kept = [sys.executable, "-I", "-S", str(KEEPER), str(os.getpid()), "", json.dumps([command])]
        with subprocess.Popen(kept, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr is not None
            if "attached" not in (said := strace.stderr.readline()):
                raise RuntimeError(f"strace cannot hold etcd: {said}")
            try:
                yield
            finally:
                strace.terminate()  # it lets go at once, also of the calls that it held back


class _Container(Container):
    """A member as a container."""

    def pause(self) -> None:
        self._container.pause()

    def resume(self) -> None:
        self._container.reload()
        if self._container.status == "paused":
            self._container.unpause()


def _processes(program: str, environment: dict[str, str]) -> _Processes:
    folder = Path(tempfile.mkdtemp(prefix="idemp-etcd-"))
    environment["ETCD_DATA_DIR"] = str(folder / "data")
    environment["PATH"] = os.environ.get("PATH", "")
    return _Processes(folder, environment, program)


def _environment(settings: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """etcd takes each of its options from the environment, too."""
    merged = {name: value for each in settings for name, value in each.items()}
    return {f"ETCD_{name.upper().replace('-', '_')}": value for name, value in merged.items()}


def _listen(scheme: str, host: str, ports: tuple[int, int, int]) -> dict[str, str]:
    clients, peers, health = ports
    return {
        "listen-client-urls": f"{scheme}://{host}:{clients}",
        "listen-peer-urls": f"http://{host}:{peers}",
        "listen-metrics-urls": f"http://{host}:{health}",
    }


def _peer(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _json(url: str, body: bytes | None = None, patience: float = 1.0) -> Any:
    # Without the proxies of the environment: it is this machine.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, body, timeout=patience) as answer:
        return json.load(answer)
