"""What is put on a disk whose power is cut: stores and brokers, each with what it promises."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from enum import Enum
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from idemp import open_store, open_transport
from idemp.message import Properties
from idemp.ports import (
    Busy,
    Claim,
    Claimed,
    Complete,
    Done,
    Doubt,
    Parked,
    Publication,
    Reply,
    Sent,
    Transport,
)
from tests.pair import until
from tests.power.disk import Disk
from tests.servers import Etcd, PostgreSQL, RabbitMQ, Redis

Note = Callable[[Sequence[str]], None]

RABBITMQ_SAVES = 3.0
"""Seconds after which RabbitMQ has handed a new queue to the system: Erlang's logs keep it for two."""


class Subject(Protocol):
    """Something that promises.  `start` on what is left, `write` until it is killed."""

    def start(self) -> None:
        """Return when it can be used: at first, and again after the cut."""
        ...

    def settle(self, disk: Disk) -> None:
        """What was done long before the cut: nothing, or it says why."""
        ...

    def write(self, note: Note) -> None:
        """For ever, in a process of its own: do something, and when it is acknowledged, note it."""
        ...

    def kill(self) -> None:
        """Power is gone."""
        ...

    def lost(self, promised: Sequence[str]) -> list[str]:
        """Which of what was noted is not so."""
        ...


# ------------------------------------------------------------------ stores


class StoreSubject:
    """A store of idemp, which promises claims and completions."""

    def __init__(self, url: str) -> None:
        self._url = url

    def start(self) -> None:
        """It has no server."""

    def settle(self, disk: Disk) -> None:
        """What it promises it promises from the very beginning."""

    def kill(self) -> None:
        """It has no server."""

    def write(self, note: Note) -> None:
        """Claim some keys, complete some of these."""
        store = open_store(self._url)
        numbers = count()
        while True:
            keys = [f"k{number}" for number in islice(numbers, random.randint(1, 20))]
            claims = store.apply([Claim(key) for key in keys])
            note([f"claimed {key}" for key in keys])
            finished = [
                Complete(key, claim.token, _result(key))
                for key, claim in zip(keys, claims, strict=True)
                if isinstance(claim, Claimed) and random.random() < 0.7
            ]
            store.apply(finished)
            note([f"done {op.key}" for op in finished])

    def lost(self, promised: Sequence[str]) -> list[str]:
        """Who claims such a key again must not get it."""
        store = open_store(self._url)
        missing = []
        for some in _portions(promised, 500):
            replies = store.apply([Claim(note.split()[1]) for note in some])
            missing += [note for note, now in zip(some, replies, strict=True) if not _kept(note, now)]
        store.close()
        return missing


def _result(key: str) -> bytes:
    return f"result of {key}".encode()


def _kept(note: str, now: Reply) -> bool:
    """A claim may have been completed since: of that no word had come yet."""
    what, key = note.split()
    match now:
        case Done(result=result):
            return result == _result(key)
        case Busy() | Doubt() | Parked():
            return what == "claimed"
        case _:
            return False


class SqliteStoreSubject(StoreSubject):
    """Its file."""

    def __init__(self, folder: Path, cheat: str = "") -> None:
        self._file, self._cheat = folder / "seen.db", cheat
        super().__init__(f"sqlite:///{self._file}")

    def write(self, note: Note) -> None:
        """See `StoreSubject`."""
        _cheat_sqlite(self._cheat)
        super().write(note)

    def lost(self, promised: Sequence[str]) -> list[str]:
        """A file that is damaged keeps nothing."""
        return list(promised) if _damaged(self._file) else super().lost(promised)


class EtcdSubject(StoreSubject):
    """One member, which promises for the whole cluster."""

    def __init__(self, folder: Path, lying_disk: bool = False) -> None:
        with _writing_to(folder):
            self._server = Etcd()
        self._lying_disk = lying_disk
        super().__init__(f"{self._server.url}power")

    def start(self) -> None:
        """Return when it serves."""
        self._server.start()

    def kill(self) -> None:
        """At once."""
        self._server.kill()

    def write(self, note: Note) -> None:
        """See `StoreSubject`."""
        if self._lying_disk:
            _let_fsync_lie("etcd")
        super().write(note)


class PostgresqlSubject(StoreSubject):
    """One server.  ``synchronous_commit``: its setting."""

    def __init__(self, folder: Path, synchronous_commit: str = "on") -> None:
        with _writing_to(folder):
            self._server = PostgreSQL(options={"synchronous_commit": synchronous_commit})
        unsafe = "?unsafe_durability=true" if synchronous_commit == "off" else ""
        super().__init__(f"{self._server.url}{unsafe}")

    def start(self) -> None:
        """Return when it serves."""
        self._server.start()

    def settle(self, disk: Disk) -> None:
        """A new cluster is made without a flush."""
        disk.flush()

    def kill(self) -> None:
        """At once."""
        self._server.kill()


class RedisSubject(StoreSubject):
    """One server.  ``appendfsync``: its setting."""

    def __init__(self, folder: Path, appendfsync: str = "always") -> None:
        with _writing_to(folder):
            self._server = Redis(options={"appendfsync": appendfsync})
        unsafe = "?unsafe_durability=true" if appendfsync != "always" else ""
        super().__init__(f"{self._server.url}{unsafe}")

    def start(self) -> None:
        """Return when it serves."""
        self._server.start()

    def settle(self, disk: Disk) -> None:
        """The file that names its log is older than any promise."""
        disk.flush()

    def kill(self) -> None:
        """At once."""
        self._server.kill()


# ------------------------------------------------------------------ brokers


class BrokerSubject:
    """A transport of idemp, which promises the messages that it confirmed."""

    QUEUE = "power"

    def __init__(self, url: str) -> None:
        self._url = url

    def start(self) -> None:
        """It has no server."""

    def settle(self, disk: Disk) -> None:
        """What it promises it promises from the very beginning."""

    def kill(self) -> None:
        """It has no server."""

    def write(self, note: Note) -> None:
        """Publish some, and wait for the word on them."""
        transport = open_transport(self._url)
        self._declare(transport)
        numbers = count()
        while True:
            names = [f"m{number}" for number in islice(numbers, random.randint(1, 50))]
            sent = transport.send([_publication(name, self.QUEUE) for name in names])
            waiting = dict(zip(sent, names, strict=True))
            while waiting:
                said = [event for event in transport.poll(5.0) if isinstance(event, Sent)]
                confirmed = [waiting.pop(event.number) for event in said if not event.error]
                if len(confirmed) < len(said) or not said:
                    raise RuntimeError("the broker did not confirm a message")
                note(confirmed)

    def _declare(self, transport: Transport) -> None:
        transport.declare(self.QUEUE)

    def lost(self, promised: Sequence[str]) -> list[str]:
        """Those that do not come out of the queue."""
        transport = open_transport(self._url)
        transport.consume(self.QUEUE, 1000)
        missing = set(promised)
        while missing and (came := transport.poll(5.0)):
            deliveries = [event for event in came if not isinstance(event, Sent)]
            missing -= {each.body.split()[0].decode() for each in deliveries}
            transport.ack([each.tag for each in deliveries])
        transport.close()
        return sorted(missing)


def _publication(name: str, queue: str) -> Publication:
    """Small ones and big ones: RabbitMQ keeps these in another place, from 4 KiB on."""
    body = f"{name} ".encode() + b"x" * random.choice((10, 10, 10, 6000))
    return Publication(body, Properties(message_id=name), "", queue)


class SqliteTransportSubject(BrokerSubject):
    """Its file."""

    def __init__(self, folder: Path, cheat: str = "") -> None:
        self._file, self._cheat = folder / "broker.db", cheat
        super().__init__(f"sqlite:///{self._file}")

    def write(self, note: Note) -> None:
        """See `BrokerSubject`."""
        _cheat_sqlite(self._cheat)
        super().write(note)

    def lost(self, promised: Sequence[str]) -> list[str]:
        """A file that is damaged keeps nothing."""
        return list(promised) if _damaged(self._file) else super().lost(promised)


class RabbitMQSubject(BrokerSubject):
    """One node.  young: its queue is declared right before the first message."""

    def __init__(self, folder: Path, kind: str, *, young: bool = False, lying_disk: bool = False) -> None:
        with _writing_to(folder):
            self._server = RabbitMQ()
        self._folder, self._kind, self._young, self._lying_disk = folder, kind, young, lying_disk
        super().__init__(self._server.url)

    def start(self) -> None:
        """Return when it serves."""
        self._server.start()

    def settle(self, disk: Disk) -> None:
        """RabbitMQ leaves what it needs to start, and to know its queues, to the system to write some day."""
        if not self._young:
            child = in_child(lambda: self._declare(open_transport(self._url)))
            if os.waitpid(child, 0)[1]:
                raise RuntimeError("the queue was not declared")
            until(self._handed_over, "RabbitMQ keeps the new queue to itself")
        time.sleep(RABBITMQ_SAVES)
        disk.flush()

    def _handed_over(self) -> bool:
        """Whether the system has the queue's name, on a busy machine too."""
        for file in [*self._folder.rglob("LATEST.LOG"), *self._folder.rglob("rabbit_durable_queue.*")]:
            with suppress(FileNotFoundError):  # the log becomes a table meanwhile
                if self.QUEUE.encode() in file.read_bytes():
                    return True
        return False

    def kill(self) -> None:
        """At once."""
        self._server.kill()

    def write(self, note: Note) -> None:
        """See `BrokerSubject`."""
        if self._lying_disk:
            _let_fsync_lie("beam.smp")
        super().write(note)

    def _declare(self, transport: Transport) -> None:
        if self._kind == "classic":
            transport.declare(self.QUEUE)
            return
        import pika

        with closing(pika.BlockingConnection(pika.URLParameters(self._url))) as connection:
            arguments = {"x-queue-type": self._kind}
            connection.channel().queue_declare(self.QUEUE, durable=True, arguments=arguments)


# ------------------------------------------------------------------ how to be unsafe


def _cheat_sqlite(synchronous: str) -> None:
    """In this process every transaction has that ``synchronous``, whatever was set and read back."""
    if not synchronous:
        return

    class Cheating(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if sql.startswith("BEGIN"):
                super().execute(f"PRAGMA synchronous={synchronous}")
            return super().execute(sql, *values)

    # idemp.stores.sqlite is imported when its URL is opened, and takes what it finds then.
    sqlite3.connect = partial(sqlite3.connect, factory=Cheating)  # type: ignore[assignment]


def _let_fsync_lie(program: str) -> None:
    """From here on a flush of that server does nothing, and says that all is well."""
    number = next(process for process in Path("/proc").glob("[0-9]*") if _name(process) == program).name
    command = ["strace", "-f", "-p", number, "-o", "/dev/null", "-e", "trace=fsync,fdatasync"]
    command += ["-e", "inject=fsync,fdatasync:retval=0"]
    strace = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    if "attached" not in (said := strace.stderr.readline()):
        raise RuntimeError(f"strace cannot hold {program}: {said}")


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return ""  # it has ended


# ------------------------------------------------------------------ helpers


def in_child(work: Callable[[], object]) -> int:
    """Start ``work`` in a process that shares no connection with this one; its number."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


class _writing_to:
    """Servers that are made here write to ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._before = str(folder), tempfile.tempdir

    def __enter__(self) -> None:
        tempfile.tempdir = self._folder

    def __exit__(self, *exception: object) -> None:
        tempfile.tempdir = self._before


def _damaged(file: Path) -> bool:
    with closing(sqlite3.connect(file)) as db:
        try:
            return bool(db.execute("PRAGMA integrity_check").fetchall() != [("ok",)])
        except sqlite3.DatabaseError:
            return True


def _portions(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


# ------------------------------------------------------------------ the table


class Expect(Enum):
    """What a cut does to it."""

    KEEPS = "keeps"
    LOSES = "control"
    UNKNOWN = "measured only"


class Setting(NamedTuple):
    """needs: of the servers' table."""

    make: Callable[[Path], Subject]
    expect: Expect = Expect.KEEPS
    needs: tuple[str, ...] = ()


def _rabbitmq(
    kind: str, expect: Expect = Expect.KEEPS, *, young: bool = False, lying_disk: bool = False
) -> Setting:
    make = partial(RabbitMQSubject, kind=kind, young=young, lying_disk=lying_disk)
    return Setting(make, expect, ("rabbitmq", "strace") if lying_disk else ("rabbitmq",))


SETTINGS: dict[str, Setting] = {
    "sqlite store": Setting(SqliteStoreSubject),
    "sqlite transport": Setting(SqliteTransportSubject),
    "etcd store": Setting(EtcdSubject, needs=("etcd",)),
    "postgresql store": Setting(PostgresqlSubject, needs=("postgresql",)),
    "redis store": Setting(RedisSubject, needs=("redis",)),
    "rabbitmq classic queue": _rabbitmq("classic"),
    "rabbitmq quorum queue": _rabbitmq("quorum"),
    "sqlite store, NORMAL": Setting(partial(SqliteStoreSubject, cheat="NORMAL"), Expect.LOSES),
    "sqlite store, OFF": Setting(partial(SqliteStoreSubject, cheat="OFF"), Expect.LOSES),
    "sqlite transport, OFF": Setting(partial(SqliteTransportSubject, cheat="OFF"), Expect.LOSES),
    "etcd store, fsync lies": Setting(
        partial(EtcdSubject, lying_disk=True), Expect.LOSES, ("etcd", "strace")
    ),
    "postgresql store, synchronous_commit off": Setting(
        partial(PostgresqlSubject, synchronous_commit="off"), Expect.LOSES, ("postgresql",)
    ),
    "redis store, everysec": Setting(partial(RedisSubject, appendfsync="everysec"), Expect.LOSES, ("redis",)),
    "redis store, no": Setting(partial(RedisSubject, appendfsync="no"), Expect.LOSES, ("redis",)),
    "rabbitmq classic queue, fsync lies": _rabbitmq("classic", Expect.LOSES, lying_disk=True),
    "rabbitmq quorum queue, fsync lies": _rabbitmq("quorum", Expect.LOSES, lying_disk=True),
    "rabbitmq classic queue, young": _rabbitmq("classic", Expect.UNKNOWN, young=True),
    "rabbitmq quorum queue, young": _rabbitmq("quorum", Expect.UNKNOWN, young=True),
}
