"""What befalls the one server of a store: PostgreSQL's or Redis'."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psycopg

from tests.chaos.faults.kind import Fault, Kind, Witness
from tests.chaos.ground import NAMESPACE, OnPostgresql, OnRedis
from tests.chaos.schedule import Span
from tests.chaos.stage import listener, status_of, stopped, until
from tests.servers import PostgreSQL, Redis


class OfServer(Fault):
    """Meets the server."""

    @property
    def server(self) -> PostgreSQL | Redis:
        ground = self.stage.ground
        assert isinstance(ground, OnPostgresql | OnRedis)
        return ground.server

    @property
    def postgresql(self) -> PostgreSQL:
        assert isinstance(self.server, PostgreSQL)
        return self.server

    @property
    def redis(self) -> Redis:
        assert isinstance(self.server, Redis)
        return self.server


class Restarted(OfServer):
    """Stopped and started in good order."""

    def inject(self) -> None:
        self._before = listener(self.server.port)
        self.server.stop()

    def heal(self) -> None:
        # Whom SIGKILL met leaves children behind, who have to notice first.
        until(self._started, 30)

    def _started(self) -> bool:
        with suppress(RuntimeError):
            self.server.start()
            return True
        return False

    def after(self) -> Witness:
        now = listener(self.server.port)
        return {"pid": [self._before, now]} if now != self._before else None


class Killed(Restarted):
    """kill -9, and a start on the same data."""

    def inject(self) -> None:
        self._before = listener(self.server.port)
        self.server.kill()


class Paused(OfServer):
    """SIGSTOP for a while, of every process that it has."""

    def inject(self) -> None:
        first = listener(self.server.port)
        self._stopped = [first, *children(first)]
        for pid in self._stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def witness(self) -> Witness:
        first = self._stopped[0]
        return {"stopped": len(self._stopped)} if until(lambda: stopped(first), 1) else None

    def heal(self) -> None:
        for pid in self._stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def children(pid: int) -> list[int]:
    """The processes that ``pid`` has started itself."""
    numbers = [int(process.name) for process in Path("/proc").glob("[0-9]*")]
    return [number for number in numbers if status_of(number, "PPid") == str(pid)]


# ------------------------------------------------------------------ PostgreSQL's own


class Terminated(OfServer):
    """An administrator ends every connection of ours, whatever it is at, again and again."""

    def inject(self) -> None:
        self._ended = 0
        for _ in range(1 + self.pick % 5):
            told = self.postgresql.psql(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                " WHERE application_name = 'idemp'"
            )
            self._ended += int(told)
            time.sleep(0.1)

    def witness(self) -> Witness:
        return {"connections": self._ended} if self._ended else None


class Locked(OfServer):
    """Somebody holds a table, as a change of it would."""

    def inject(self) -> None:
        table = ("open", "session", "meta")[self.pick % 3]
        self._line = psycopg.connect(self.postgresql.url)
        self._line.execute("SET lock_timeout = '10s'")
        self._line.execute(f"LOCK TABLE idemp_{NAMESPACE}.{table} IN ACCESS EXCLUSIVE MODE".encode())
        self._since = time.monotonic()

    def witness(self) -> Witness:
        waiting = self.postgresql.psql("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        return {"waiting": int(waiting)} if int(waiting) else None

    def heal(self) -> None:
        self._line.close()


class Vacuumed(OfServer):
    """A table is written anew, which nobody can read meanwhile."""

    def inject(self) -> None:
        before = self._file()
        self.postgresql.psql(f"VACUUM FULL idemp_{NAMESPACE}.open")
        self._files = [before, self._file()]

    def _file(self) -> str:
        return self.postgresql.psql(f"SELECT pg_relation_filepath('idemp_{NAMESPACE}.open')")

    def witness(self) -> Witness:
        return {"files": self._files} if len(set(self._files)) == 2 else None


# ------------------------------------------------------------------ Redis' own


class Disconnected(OfServer):
    """An administrator ends every connection, again and again."""

    def inject(self) -> None:
        self._ended = 0
        for _ in range(1 + self.pick % 5):
            self._ended += int(self.redis.call("CLIENT", "KILL", "TYPE", "normal"))
            time.sleep(0.1)

    def witness(self) -> Witness:
        return {"connections": self._ended} if self._ended else None


class Full(OfServer):
    """Its memory is used up: it takes nothing more, and answers that."""

    def inject(self) -> None:
        self.redis.call("CONFIG", "SET", "maxmemory", "1mb")

    def witness(self) -> Witness:
        try:
            self.redis.call("SET", "chaos:full", "1")
        except RuntimeError as error:
            return {"said": str(error)} if "OOM" in str(error) else None
        return None

    def heal(self) -> None:
        self.redis.call("CONFIG", "SET", "maxmemory", "0")


class Forgot(OfServer):
    """Its scripts are gone, as after a restart."""

    def inject(self) -> None:
        self._said = self.redis.call("SCRIPT", "FLUSH", "SYNC")

    def witness(self) -> Witness:
        return {"said": self._said} if self._said == "OK" else None


class Rewritten(OfServer):
    """Its file is written anew beside the work."""

    def inject(self) -> None:
        self._said = self.redis.call("BGREWRITEAOF")

    def witness(self) -> Witness:
        return {"said": self._said} if "started" in self._said or "scheduled" in self._said else None


def _kinds(name: str) -> dict[str, Kind]:
    """What any server goes through."""
    return {
        f"{name}.kill": Kind(Killed, Span(name, (0.5, 3.0), 2.0), quick=True),
        f"{name}.restart": Kind(Restarted, Span(name, (0.2, 2.0), 2.0), quick=True),
        f"{name}.pause": Kind(Paused, Span(name, (1.0, 6.0), 2.0), quick=True),
    }


KINDS = {
    **_kinds("postgresql"),
    "postgresql.terminate": Kind(Terminated, Span("postgresql", (0.2, 0.5)), quick=True),
    "postgresql.lock": Kind(Locked, Span("postgresql", (1.0, 6.0), 2.0), quick=True),
    "postgresql.vacuum-full": Kind(Vacuumed, Span("postgresql", (0.2, 0.5)), quick=True),
    **_kinds("redis"),
    "redis.disconnect": Kind(Disconnected, Span("redis", (0.2, 0.5)), quick=True),
    "redis.full": Kind(Full, Span("redis", (1.0, 4.0), 2.0), quick=True),
    "redis.no-script": Kind(Forgot, Span("redis", (0.2, 0.5)), quick=True),
    "redis.rewrite": Kind(Rewritten, Span("redis", (0.2, 0.5)), quick=True),
}
