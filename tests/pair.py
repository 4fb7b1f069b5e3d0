"""The two services of example2 as processes, and what a client asks them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.servers.ports import free_port

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60.0
KEY = "a key for tests only, of forty-two letters"


def until(what: Callable[[], Any], why: str = "", seconds: float = SECONDS) -> Any:
    """Wait for it; what it said."""
    end = time.monotonic() + seconds
    while not (said := what()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {why}"
        time.sleep(0.03)
    return said


class Service:
    """One process.  ``more``: of its environment."""

    def __init__(self, name: str, redis: str, database: str, folder: Path, **more: str) -> None:
        self.name, self.port = name, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.environment = {
            **{word: os.environ[word] for word in ("PATH", "HOME") if word in os.environ},
            "PYTHONPATH": str(ROOT),
            "REDIS_URL": redis,
            "DATABASE_URL": database,
            "JWT_KEY": KEY,
            "PORT": str(self.port),
            "DEMO_USERS": "yes",
            **more,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client(base_url=self.url, timeout=20)

    def start(self, *, ready: bool = True) -> Service:
        """Return when it is ready."""
        with (self.folder / f"{self.name}-{self.port}.log").open("ab") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"example2.{self.name}"],
                env=self.environment,
                cwd=self.folder,
                stdout=said,
                stderr=said,
            )
        if ready:
            until(self.ready, f"{self.name} is ready: {self.said()}")
        return self

    def said(self) -> str:
        files = self.folder.glob(f"{self.name}-{self.port}.log")
        return "".join(file.read_text(errors="replace")[-3000:] for file in files)

    def look(self) -> dict[str, Any]:
        """What its readiness tells; {} while nobody answers."""
        try:
            found: dict[str, Any] = self.client.get("/ready").json()
        except (httpx.HTTPError, ValueError):
            return {}
        return found

    def ready(self) -> bool:
        assert self.process is None or self.process.poll() is None, self.said()
        return bool(self.look().get("ready"))

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(SECONDS)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SECONDS)

    def close(self) -> None:
        self.client.close()
        if self.process is not None and self.process.poll() is None:
            self.kill()


def login(accounts: Service, user: str = "user1") -> dict[str, str]:
    """The headers of a request by that user."""
    answer = accounts.client.post(
        "/auth/login", json={"username": user, "password": user.replace("user", "password")}
    )
    assert answer.status_code == 200, answer.text
    return {"Authorization": f"Bearer {answer.text}"}


def revenue(accounts: Service, headers: dict[str, str]) -> dict[int, int]:
    """Of each account that the caller sees."""
    answer = accounts.client.get("/accounts", headers=headers)
    assert answer.status_code == 200, answer.text
    return {each["account"]["id"]: each["total_revenue_cents"] for each in answer.json()}
