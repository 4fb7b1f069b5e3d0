"""Everything that a run needs: a store's servers, a broker, proxies before them, consumers, a publisher."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from idemp import open_transport
from tests.chaos.ground import GROUNDS, NAMESPACE, OnEtcd
from tests.chaos.publisher import Publishing, Settings
from tests.proxy import Proxy
from tests.reliability.history import History
from tests.reliability.nursery import Nursery, Spec
from tests.servers import RabbitMQ
from tests.servers.catalog import SERVERS

T = TypeVar("T")
SERVICE = NAMESPACE
QUEUE = f"{SERVICE}-queue"
DEAD = f"{QUEUE}.dead"
EXCHANGE = "events"
HANDLER = f"{SERVICE}.new_order"
CONSUMERS = 3
PREFETCH = 64
ATTEMPTS = 5
CTL = SERVERS["rabbitmq"].places
_WATCH = 0.1
_AGAIN = 0.5
_READY = 30.0


def until(what: Callable[[], T], seconds: float = 10.0) -> T | None:
    """What it returns as soon as that is true; None if it is not in time."""
    end = time.monotonic() + seconds
    while True:
        if found := what():
            return found
        if time.monotonic() > end:
            return None
        time.sleep(0.05)


def listener(port: int) -> int:
    """The process that listens on a port of this machine."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == "0A":
            socket = f"socket:[{fields[9]}]"
            for process in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    if any(os.readlink(file) == socket for file in (process / "fd").iterdir()):
                        return int(process.name)
    raise ProcessLookupError(f"nobody listens on port {port}")


def status_of(pid: int, name: str) -> str:
    """A line of /proc/<pid>/status; "" if there is no such process."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            found, _, value = line.partition(":")
            if found == name:
                return value.strip()
    return ""


def rabbitmqctl() -> str | None:
    """The program itself: the one on PATH may be a wrapper that becomes another user first."""
    return shutil.which("rabbitmqctl", path=os.pathsep.join(CTL)) or shutil.which("rabbitmqctl")


def stopped(pid: int) -> bool:
    """Whether SIGSTOP holds it."""
    return status_of(pid, "State").startswith("T")


@dataclass
class Replica:
    """One place for a consumer, and who is in it."""

    pid: int
    again_at: float = 0.0


def _some(code: int | None) -> list[int]:
    """An exit code, which may be 0, as something to wait for."""
    return [] if code is None else [code]


class Replicas:
    """Keeps so many consumers alive, as a supervisor does; notes how each ended."""

    def __init__(self, nursery: Nursery, spec: Spec, count: int) -> None:
        self._nursery, self._spec = nursery, spec
        self._places = [Replica(nursery.start(spec)) for _ in range(count)]
        self._ended = threading.Event()
        self.ends: Counter[str] = Counter()
        self.crashed: list[int] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def pids(self) -> list[int]:
        return [place.pid for place in self._places]

    def pick(self, number: int) -> int:
        """One that is ready; which, ``number`` says."""
        ready = until(lambda: [pid for pid in self.pids() if self.is_ready(pid)], _READY)
        if not ready:
            raise RuntimeError("no consumer is ready")
        return ready[number % len(ready)]

    def is_ready(self, pid: int) -> bool:
        return self._was_ready(pid) and self.status(pid) is None

    def _was_ready(self, pid: int) -> bool:
        return (Path(self._spec.folder) / f"ready.{pid}").exists()

    def all_ready(self) -> bool:
        return all(map(self.is_ready, self.pids()))

    def status(self, pid: int) -> int | None:
        return self._nursery.ended(pid)

    def signal(self, pid: int, number: signal.Signals) -> int | None:
        """Send a signal that ends it; its exit code, None if it does not end."""
        os.kill(pid, number)
        code = until(lambda: _some(self.status(pid)), 40)
        return code[0] if code else None

    def stop(self) -> list[int | None]:
        """All of them, in good order, for good."""
        self._ended.set()
        self._thread.join()
        pids = [pid for pid in self.pids() if self.status(pid) is None]
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
            os.kill(pid, signal.SIGTERM)
        codes = {pid: until(lambda pid=pid: _some(self.status(pid)), 40) for pid in pids}  # type: ignore[misc]
        # Who had not begun yet knows no SIGTERM.
        return [code[0] if code else None for pid, code in codes.items() if self._was_ready(pid)]

    def _watch(self) -> None:
        while not self._ended.wait(_WATCH):
            for place in self._places:
                self._look_at(place)

    def _look_at(self, place: Replica) -> None:
        status = self.status(place.pid)
        if status is None:
            return
        if not place.again_at:
            self.ends[str(status)] += 1
            was_ready = self._was_ready(place.pid)
            if was_ready and status not in (-signal.SIGKILL, 0):
                self.crashed.append(place.pid)
            # One that could not start, for want of a server, is not started again at once.
            place.again_at = time.monotonic() + (0.0 if was_ready else _AGAIN)
        if time.monotonic() >= place.again_at:
            place.pid, place.again_at = self._nursery.start(self._spec), 0.0


class Stage:
    """Started by `with`; nothing of it is left at the end, however that comes."""

    def __init__(self, folder: Path, seed: int, rate: float, store: str) -> None:
        self.folder, self._seed, self._rate = folder, seed, rate
        self.ground = GROUNDS[store]()
        self._stack = ExitStack()
        self.nemesis = History(folder, "nemesis")

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.ground)
            self.broker = stack.enter_context(RabbitMQ())
            self.doors = [stack.enter_context(Proxy(port, seed=self._seed)) for port in self.ground.ports()]
            self.broker_door = stack.enter_context(Proxy(self.broker.port, seed=self._seed))
            self.publisher_door = stack.enter_context(Proxy(self.broker.port, seed=self._seed))
            self._declare()
            nursery = stack.enter_context(Nursery())
            self.replicas = Replicas(nursery, self._spec(), CONSUMERS)
            stack.callback(self.replicas.stop)
            if not until(self.replicas.all_ready, 60):
                raise RuntimeError("the consumers did not start")
            self.publisher = Publishing(self._publishing())
            stack.callback(self.publisher.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._stack.close()

    def url(self, *, direct: bool = False) -> str:
        """The store's, for consumers through the proxies."""
        return self.ground.url(self.ground.ports() if direct else [door.port for door in self.doors])

    def _amqp(self, door: Proxy) -> str:
        return f"amqp://guest:guest@127.0.0.1:{door.port}/"

    def _spec(self) -> Spec:
        return Spec(
            service=SERVICE,
            transport=self._amqp(self.broker_door),
            store=self.url(),
            folder=str(self.folder),
            attempts=ATTEMPTS,
            prefetch=PREFETCH,
            fingerprint="message.args",
        )

    def _publishing(self) -> Settings:
        return Settings(
            transport=self._amqp(self.publisher_door),
            folder=str(self.folder),
            rate=self._rate,
            seed=self._seed,
            name="p",
            exchange=EXCHANGE,
        )

    def _declare(self) -> None:
        """The queue is there before the first message is."""
        transport = open_transport(self.broker.url)
        transport.declare(QUEUE, EXCHANGE)
        transport.close()

    # ---------------------------------------------------------------- what faults ask

    @property
    def etcd(self) -> OnEtcd:
        """The members, for what befalls only them."""
        assert isinstance(self.ground, OnEtcd)
        return self.ground

    def effects(self) -> int:
        """Bytes of the ledger: it grows with every effect."""
        ledger = self.folder / "ledger"
        return ledger.stat().st_size if ledger.exists() else 0

    def term(self) -> int:
        """The highest that a member tells of: it grows with every election."""
        terms = [0]
        for member in self.etcd.cluster.members:
            with suppress(OSError):
                terms.append(int(member.call("/v3/maintenance/status").get("raftTerm", 0)))
        return max(terms)

    def rabbitmqctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Of the broker's own node, which says itself who it is."""
        pid = listener(self.broker.port)
        pairs = Path(f"/proc/{pid}/environ").read_text().rstrip("\0").split("\0")
        environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        command = [rabbitmqctl() or "rabbitmqctl", "--timeout", "20", *arguments]
        kept = ("PATH", "HOME", "LANG", "RABBITMQ_NODENAME", "RABBITMQ_CONF_ENV_FILE", "ERL_EPMD_PORT")
        environment = {name: environment[name] for name in kept if name in environment}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=30, check=False
        )
