"""The reader: position and effect in one transaction, on SQLite and on PostgreSQL."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
import redis as driver

from idemp import (
    ConfigError,
    Message,
    PermanentFailure,
    Reader,
    Relay,
    context,
    idempotent,
    open_log,
    open_store,
    open_transport,
)
from idemp.dead import letters
from idemp.errors import Closed, TransportUnavailable
from idemp.ports import Inbox
from tests.pair import until
from tests.servers import PostgreSQL, Redis


class Place:
    """A stream of one's own and a database of one's own."""

    def __init__(self, redis: str, database: str) -> None:
        self.redis, self.database = redis, database
        self.url = f"{redis}?stream=s"
        self.client: Any = driver.Redis.from_url(redis)
        self.runs: list[str] = []

    def add(self, *names: str, kind: str = "T", **more: str) -> None:
        for name in names:
            self.client.xadd("s", {"EventTypeName": kind, "Payload": json.dumps({"name": name}), **more})

    def reader(self, store: Inbox, handler: Callable[[Message], None] | None = None) -> Reader:
        reader = Reader(open_log(self.url), store, name="r")

        @reader.on("T")
        @idempotent(store, name="r.T", transaction=True, attempts=2)
        def take(message: Message) -> None:
            self.runs.append(message.args["name"])
            connection = context().connection
            mark = "?" if isinstance(connection, sqlite3.Connection) else "%s"
            connection.execute(f"INSERT INTO effect VALUES ({mark})", [message.args["name"]])
            if handler is not None:
                handler(message)

        return reader

    def effects(self, store: Inbox) -> list[str]:
        rows = store.transaction(
            lambda t: t.connection.execute("SELECT name FROM effect ORDER BY name").fetchall(), 5.0
        )
        return [name for (name,) in rows]


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, redis: Redis, tmp_path: Path) -> Iterator[Place]:
    if request.param == "sqlite":
        database = f"sqlite:///{tmp_path}/app.db"
    else:
        server: PostgreSQL = request.getfixturevalue("postgresql")
        database = server.database()
    place = Place(redis.database(), database)
    with closing(opened(place)) as store:
        store.transaction(lambda t: t.connection.execute("CREATE TABLE effect (name TEXT)"), 5.0)
    yield place
    place.client.close()


def opened(place: Place) -> Inbox:
    return cast(Inbox, open_store(place.database))


def test_it_goes_on_where_its_last_transaction_ended(place: Place) -> None:
    """R10, R11: with another process, that knows nothing but the database."""
    with closing(opened(place)) as store:
        place.add("a", "b", "c")
        reader = place.reader(store)
        assert reader.position() == ""
        assert reader.turn() == 3
        assert reader.turn() == 0
    with closing(opened(place)) as store:
        place.add("d")
        reader = place.reader(store)
        assert reader.turn() == 1
        assert place.effects(store) == ["a", "b", "c", "d"]
    assert place.runs == ["a", "b", "c", "d"]


def test_the_same_message_twice_has_one_effect(place: Place) -> None:
    """R11: in one batch, and later."""
    with closing(opened(place)) as store:
        place.add("a", "b", Id="one")
        place.add("c", Id="two")
        reader = place.reader(store)
        assert reader.turn() == 3
        place.add("d", Id="one")
        assert reader.turn() == 1
        assert place.effects(store) == ["a", "c"]


def test_what_fails_is_tried_again_in_its_place(place: Place) -> None:
    """R12: what is behind it waits; used up, it is a dead letter and the rest goes on."""
    failing = True

    def fail(message: Message) -> None:
        if message.args["name"] == "b" and failing:
            raise RuntimeError("not now")

    with closing(opened(place)) as store:
        place.add("a", "b", "c")
        reader = place.reader(store, fail)
        assert reader.turn() == 1
        failing = False
        until(lambda: reader.turn() == 0)
        assert place.effects(store) == ["a", "b", "c"]


def test_what_can_never_be_handled_is_a_dead_letter(place: Place) -> None:
    """R12: bad JSON, an unknown type, a handler's no: with its reason, once, and the position behind it."""

    def refuse(message: Message) -> None:
        if message.args["name"] == "bad":
            raise PermanentFailure("no such thing")

    with closing(opened(place)) as store, closing(open_transport(place.redis)) as transport:
        place.client.xadd("s", {"EventTypeName": "T", "Payload": "{"})
        place.add("a", "bad", "z")
        place.add("x", kind="U")
        reader = place.reader(store, refuse)
        until(lambda: reader.turn() == 0)
        assert place.effects(store) == ["a", "z"]
        transport.declare("r-queue.dead")
        relay = Relay(store, transport)
        while relay.turn():
            pass
        with closing(open_transport(place.redis)) as other:
            found = [(letter.outcome, letter.reason) for letter in letters(other, "r-queue")]
    assert sorted(outcome for outcome, _ in found) == ["parked", "rejected", "rejected"]
    reasons = " ".join(reason for _, reason in found)
    for reason in ("no such thing", "not JSON", "no handler for type 'U'"):
        assert reason in reasons


@pytest.mark.parametrize("asked", ["key", "fingerprint"])
def test_an_entry_that_the_handlers_own_functions_cannot_read_is_a_dead_letter(
    place: Place, asked: str
) -> None:
    """As in a consumer; the log goes on behind it."""

    def read(message: Message) -> Any:
        return message.args["invoice"]["id"]

    own: dict[str, Any] = {asked: read}
    with closing(opened(place)) as store, closing(open_transport(place.redis)) as transport:
        reader = Reader(open_log(place.url), store, name="r")
        runs: list[str] = []

        @reader.on("T")
        @idempotent(store, name="r.T", transaction=True, **own)
        def take(message: Message) -> None:
            runs.append(read(message))

        for payload in ('{"invoice": null}', '{"invoice": {"id": "7"}}'):
            place.client.xadd("s", {"EventTypeName": "T", "Payload": payload})
        until(lambda: reader.turn() == 0)
        assert runs == ["7"]
        transport.declare("r-queue.dead")
        relay = Relay(store, transport)
        while relay.turn():
            pass
        with closing(open_transport(place.redis)) as other:
            [letter] = letters(other, "r-queue")
    assert letter.outcome == "rejected"
    assert "not subscriptable" in letter.reason


def test_an_entry_may_fail_for_as_long_as_it_takes(place: Place) -> None:
    """Each half a minute, through days."""
    with closing(opened(place)) as store:
        place.add("a")
        reader = place.reader(store)
        reader._failures = 5000
        reader.stop()  # so that nobody waits
        assert reader.turn() == 0


def test_a_reason_that_is_no_unicode_can_be_sent(place: Place) -> None:
    """JSON lets half of a character through, and a handler may quote it; no broker would take that."""

    def refuse(message: Message) -> None:
        raise PermanentFailure(f"no customer {message.args['name']}")

    with closing(opened(place)) as store, closing(open_transport(place.redis)) as transport:
        reader = Reader(open_log(place.url), store, name="r")
        reader.on("T")(idempotent(store, name="r.T", transaction=True)(refuse))
        place.client.xadd("s", {"EventTypeName": "T", "Payload": '{"name": "Bj\\ud800rn"}'})
        until(lambda: reader.turn() == 0)
        transport.declare("r-queue.dead")
        assert Relay(store, transport).turn()
        with closing(open_transport(place.redis)) as other:
            [letter] = letters(other, "r-queue")
    assert letter.reason.encode().endswith(b"Bj\\ud800rn")


def test_two_readers_of_one_name_do_nothing_twice(place: Place) -> None:
    """R16: side by side."""
    with closing(opened(place)) as store, closing(opened(place)) as other:
        place.add(*(f"{n:04}" for n in range(600)))
        readers = [place.reader(each) for each in (store, other)]
        end = open_log(place.url).end()
        threads = [threading.Thread(target=reader.run, kwargs={"until": end}) for reader in readers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert place.effects(store) == [f"{n:04}" for n in range(600)]


PROGRAM = """
import sys
from idemp import Reader, context, idempotent, open_log, open_store
store = open_store(sys.argv[2])
reader = Reader(open_log(sys.argv[1]), store, name="r")
@reader.on("T")
@idempotent(store, name="r.T", transaction=True, attempts=1000)
def take(message):
    connection = context().connection
    mark = "?" if "sqlite" in type(connection).__module__ else "%s"
    connection.execute(f"INSERT INTO effect VALUES ({mark})", [message.args["name"]])
    print("one", flush=True)
reader.run()
"""


def test_killed_again_and_again(place: Place) -> None:
    """R11: kill -9 in the middle of batches; each entry has one effect, and the order of none is lost."""
    names = [f"{n:05}" for n in range(500)]
    place.add(*names)
    kills = 0
    with closing(opened(place)) as store:
        while left := len(names) - len(place.effects(store)):
            with subprocess.Popen(
                [sys.executable, "-c", PROGRAM, place.url, place.database],
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
            ) as process:
                assert process.stdout is not None
                for _ in range(min(230, left)):
                    assert process.stdout.readline()
                if left <= 230:  # the last: who is killed at each commit never gets to its end
                    until(lambda: len(place.effects(store)) == len(names))
                process.send_signal(signal.SIGKILL)
                kills += 1
            assert kills < 100
        assert place.effects(store) == names
    assert kills >= 2


KILLER = (
    PROGRAM.replace("attempts=1000", "attempts=2")
    .replace("reader.run()", "reader.run(until=reader._log.end())")
    .replace(
        "    connection = ",
        '    if message.args["name"] == "bad":\n        os.kill(os.getpid(), 9)\n    connection = ',
    )
)


def test_an_entry_that_kills_its_process_each_time_is_set_aside(place: Place) -> None:
    """Its attempts are counted where they survive it; its neighbours take effect once."""
    names = [f"{n:02}" for n in range(20)]
    place.add(*names[:7], "bad", *names[7:])
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        done = subprocess.run(
            [sys.executable, "-c", "import os\n" + KILLER, place.url, place.database],
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
            timeout=60,
            check=False,
        )
        codes.append(done.returncode)
        assert len(codes) < 8, codes
    assert set(codes[:-1]) == {-signal.SIGKILL}
    with closing(opened(place)) as store:
        assert place.effects(store) == names
        [letter] = store.letters(10)
    assert json.loads(letter.publication.body)["args"]["name"] == "bad"
    assert "attempts used up" in letter.publication.properties.headers["idemp-reason"]


def test_a_log_that_is_away_and_closed(own_redis: Redis) -> None:
    """Unavailable in one sentence, then there again; closed is closed."""
    log = open_log(f"{own_redis.url}?stream=s")
    assert log.end() == ""
    assert log.read("", 10, 0.01) == []
    own_redis.kill()
    with pytest.raises(TransportUnavailable, match=str(own_redis.port)):
        log.read("", 10, 0.0)
    own_redis.start()
    assert log.read("", 10, 0.0) == []
    assert log.behind("10-0", "9-5")
    assert not log.behind("", "")
    log.close()
    with pytest.raises(Closed):
        log.end()


@pytest.mark.parametrize("url", ["amqp://h", "redis://h/0", "redis://h/0?stream=a,b"])
def test_a_wrong_log_is_one_sentence(url: str) -> None:
    """That says what is missing."""
    with pytest.raises(ConfigError, match="stream="):
        open_log(url)


def test_a_wrong_reader_is_one_sentence(tmp_path: Path) -> None:
    """Its store, its handlers and its name."""
    log = open_log("redis://h/0?stream=s")
    store = cast(Inbox, open_store(f"sqlite:///{tmp_path}/app.db"))
    with pytest.raises(ConfigError, match="no transactions"):
        Reader(log, cast(Inbox, open_store("memory://")), name="r")
    with pytest.raises(ConfigError, match="name="):
        Reader(log, store, name="r'; DROP TABLE effect")
    with pytest.raises(ConfigError, match="transaction=True"):
        Reader(log, store, name="r").on("T")(lambda message: None)
    store.close()
