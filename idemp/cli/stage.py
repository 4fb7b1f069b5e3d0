"""The stage of the demo: services as processes, and a statsd that only counts."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from idemp.errors import ConfigError, IdempError

PATIENCE = 20.0
"""Seconds that a service has to start or to end."""
_OURS = (
    "SERVICE_NAME",
    "ENABLE_ETCD",
    "ENABLE_STATE",
    "IDEMP_STORE",
    "IDEMP_TRANSPORT",
    "IDEMP_STATSD",
    "IDEMP_METRICS_PORT",
)


class ServiceFailed(IdempError):
    """A service did not start, or ended otherwise than it should."""

    def __init__(self, what: str, lines: list[str]) -> None:
        said = "".join(f"\n  {line}" for line in lines)
        super().__init__(f"{what}; the last it said:{said}" if said else f"{what} and said nothing")


class Statsd:
    """Sums the counters that arrive on a UDP port of this machine."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._changed = threading.Condition()
        self._counts: dict[str, int] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._receive, name="idemp-demo-statsd", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Where services send to."""
        return f"127.0.0.1:{self._socket.getsockname()[1]}"

    def counts(self) -> dict[str, int]:
        """All counters that were ever heard of."""
        with self._changed:
            return dict(self._counts)

    def wait(self, until: Callable[[Mapping[str, int]], bool], timeout: float) -> bool:
        """Wait for counters that satisfy ``until``; whether they came."""
        with self._changed:
            return self._changed.wait_for(lambda: until(self._counts), timeout)

    def close(self) -> None:
        """Let go of the port."""
        self._closed = True
        self._socket.sendto(b"", self._socket.getsockname())  # closing alone would not wake the receiver
        self._thread.join()

    def _receive(self) -> None:
        with self._socket:
            while not self._closed:
                packet = self._socket.recv(65536)
                with self._changed:
                    for line in packet.decode(errors="replace").splitlines():
                        self._add(line)
                    self._changed.notify_all()

    def _add(self, line: str) -> None:
        name, _, value = line.partition(":")
        if value.endswith("|c"):
            self._counts[name] = self._counts.get(name, 0) + int(value[:-2])


class Service:
    """One ``python -m svc`` after another, under one name."""

    def __init__(self, name: str, transport: str, statsd: str) -> None:
        self.name = name
        kept = {name: value for name, value in os.environ.items() if name not in _OURS}
        path = os.pathsep.join([str(checkout()), *filter(None, [kept.get("PYTHONPATH")])])
        told = {"SERVICE_NAME": name, "IDEMP_TRANSPORT": transport, "IDEMP_STATSD": statsd}
        self._environment = {**kept, **told, "PYTHONPATH": path}
        self._process: subprocess.Popen[str] | None = None
        self._said: deque[str] = deque(maxlen=12)
        self._ready = threading.Event()

    def start(self, store: str | None) -> None:
        """Start it with ``store``, or without; `wait_ready` says when it takes messages."""
        self._said.clear()
        self._ready.clear()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "svc"],
            env={**self._environment, **({"IDEMP_STORE": store} if store else {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()

    def wait_ready(self) -> None:
        """Return when it takes messages."""
        if not self._ready.wait(PATIENCE):
            raise ServiceFailed(f"{self.name} is not ready after {PATIENCE:g} s", self.last())
        self.check()

    def check(self) -> None:
        """Raise `ServiceFailed` if it ended by itself."""
        if self._process is not None and (code := self._process.poll()) is not None:
            raise ServiceFailed(f"{self.name} ended with exit code {code}", self.last())

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        process, self._process = self._process, None
        assert process is not None
        process.terminate()
        try:
            return process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise ServiceFailed(f"{self.name} did not end within {PATIENCE:g} s", self.last()) from None

    def last(self) -> list[str]:
        """The last lines it logged."""
        return list(self._said)

    def end(self) -> None:
        """Whatever state it is in, end it."""
        if self._process is not None and self._process.poll() is None:
            self.stop()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self._said.append(line.rstrip())
                if line.rstrip().endswith(f" {self.name}: ready"):
                    self._ready.set()
        process.wait()
        self._ready.set()  # it ended; `check` tells


def checkout() -> Path:
    """The folder that has svc/ in it; `ConfigError` if there is none."""
    found = importlib.util.find_spec("svc")
    if found is None or found.origin is None:
        raise ConfigError("the demo runs the sample service svc/ of the checkout: run it there")
    return Path(found.origin).parent.parent
