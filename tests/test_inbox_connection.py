"""The connection that a handler gets on PostgreSQL: psycopg's, with a savepoint that costs no round trip."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import errors, sql
from psycopg.rows import dict_row

from idemp import context, idempotent, open_store
from idemp.errors import PermanentFailure
from idemp.inbox import Job, transact
from idemp.policy import make_policy
from idemp.ports import Claimed, Done, Free, Get
from idemp.protocol import Failed, Ok, Raised, Returned, Verdict, protocol
from idemp.stores import postgresql_handlers
from idemp.stores.postgresql_handlers import HandlersConnection, plain
from tests.proxy import Proxy
from tests.servers import PostgreSQL, need
from tests.servers.pgbouncer import PgBouncer

ROOT = Path(__file__).resolve().parent.parent

Handler = Callable[[Any], object]


class Batch:
    """A store, and handlers that share one of its transactions."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.store: Any = open_store(url)
        self.store.apply([])
        self.verdicts: dict[str, Verdict] = {}

    def run(self, handlers: Mapping[str, Handler]) -> list[str]:
        """All of them, in order; the effects that there are then."""
        jobs = [self._job(key, handler) for key, handler in handlers.items()]
        self.verdicts = dict(zip(handlers, transact(self.store, jobs), strict=True))
        return self.effects()

    def _job(self, key: str, handler: Handler) -> Job:
        policy = make_policy(
            lambda message: None, self.store, name="a", key=None, fingerprint=None, on_busy="wait", wait=2.0,
            in_doubt="retry", attempts=3, permanent=(), codec=None, transaction=True,
        )  # fmt: skip

        def run(claim: Claimed, connection: Any) -> Any:
            try:
                handler(connection)
            except Exception as error:
                return Raised(error)
            return Returned(None, None)

        return Job(key, partial(protocol, policy, key, None), run, lambda _: None, 2.0, 3)

    def effects(self) -> list[str]:
        with psycopg.connect(self.url, autocommit=True) as line:
            return [row[0] for row in line.execute("SELECT id FROM effect ORDER BY id")]

    def state(self, key: str) -> Any:
        return self.store.apply([Get(key)])[0]


@pytest.fixture
def url(postgresql: PostgreSQL) -> str:
    """A database with a table of effects."""
    made = postgresql.database()
    with psycopg.connect(made, autocommit=True) as line:
        line.execute("CREATE TABLE effect (id TEXT)")
    return made


@pytest.fixture
def batch(url: str) -> Iterator[Batch]:
    made = Batch(url)
    yield made
    made.store.close()


def write(id: str) -> Handler:
    return lambda connection: connection.execute("INSERT INTO effect VALUES (%s)", [id])


def goes_wrong(connection: Any) -> None:
    connection.execute("INSERT INTO nowhere VALUES (1)")


def nothing(connection: Any) -> None:
    """A handler that has no effect."""


def fail(connection: Any) -> None:
    raise LookupError("no")


# ------------------------------------------------------------------ round trips


def traced(batch: Batch, handlers: Sequence[Handler], path: Path) -> str:
    """The messages to and from the server from the first of these handlers to the last."""
    with path.open("w+") as file:

        def trace(connection: Any) -> None:
            connection.pgconn.trace(file.fileno())

        def untrace(connection: Any) -> None:
            connection.pgconn.untrace()

        batch.run({f"{path} {n}": each for n, each in enumerate((write("first"), trace, *handlers, untrace))})
        file.seek(0)
        return file.read()


def trips(batch: Batch, handlers: Sequence[Handler], path: Path) -> int:
    """How often the server was waited for."""
    return traced(batch, handlers, path).count("ReadyForQuery")


@pytest.mark.parametrize(
    "handler",
    [
        write("a"),
        lambda connection: connection.execute("INSERT INTO effect VALUES ('a')"),
        lambda connection: connection.cursor(row_factory=dict_row).execute("SELECT 1 AS a").fetchall(),
    ],
    ids=["values", "no values", "cursor"],
)
def test_a_statement_a_handler_is_one_round_trip(batch: Batch, tmp_path: Path, handler: Handler) -> None:
    """The savepoint before it goes along, also when psycopg prepares the statement."""
    assert trips(batch, [handler] * 20, tmp_path / "trace") == 20


def test_a_handler_that_asks_nothing_costs_none(batch: Batch, tmp_path: Path) -> None:
    """Nor does one that fails before it has asked anything."""
    assert trips(batch, [nothing, fail, nothing, fail, write("a")], tmp_path / "trace") == 1
    assert batch.effects() == ["a", "first"]


def test_the_savepoint_is_prepared(batch: Batch, tmp_path: Path) -> None:
    """From the second transaction on.  Psycopg forgets it at a rollback, which leaves one to the next."""
    wanted = [write("a")] * 5
    assert traced(batch, wanted, tmp_path / "first").count("RELEASE SAVEPOINT") == 5
    assert traced(batch, wanted, tmp_path / "second").count("SAVEPOINT idemp") == 0
    said = traced(batch, [goes_wrong, *wanted], tmp_path / "third")
    assert (said.count("ROLLBACK TO SAVEPOINT idemp"), said.count("RELEASE SAVEPOINT idemp")) == (1, 4)
    assert traced(batch, wanted, tmp_path / "fourth").count("SAVEPOINT idemp") == 0
    assert batch.effects() == [*"a" * 20, *["first"] * 4]


def test_other_statements_have_it_sent_before(batch: Batch, tmp_path: Path) -> None:
    """That takes two."""

    def two(connection: Any) -> None:
        connection.execute("INSERT INTO effect VALUES ('a'); INSERT INTO effect VALUES ('b')")

    assert trips(batch, [two] * 3, tmp_path / "trace") == 6
    assert batch.effects() == [*"aaabbb", "first"]


def test_with_a_psycopg_that_is_not_known_it_is_sent_before(
    batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two round trips, and nothing of the cursor's inside is relied on."""
    monkeypatch.setattr(postgresql_handlers, "_KNOWN", False)
    assert trips(batch, [write("a"), write("b"), fail, write("c")], tmp_path / "trace") == 6
    assert batch.effects() == ["a", "b", "c", "first"]


# ------------------------------------------------------------------ whatever a handler does first


def copies(connection: Any) -> None:
    with connection.cursor().copy("COPY effect FROM STDIN") as copy:
        copy.write_row(["way"])


def streams(connection: Any) -> None:
    query = "INSERT INTO effect VALUES ('way') RETURNING id"
    assert list(connection.cursor().stream(query)) == [("way",)]


def declares(connection: Any) -> None:
    """A server-side cursor, over what was written before it."""
    with connection.cursor("named") as cursor:
        assert cursor.execute("SELECT id FROM effect").fetchall() == [("a",)]
    write("way")(connection)


def blocks(connection: Any) -> None:
    with connection.transaction():
        write("way")(connection)
    with suppress(LookupError), connection.transaction():
        write("not this")(connection)
        raise LookupError


def pipes(connection: Any) -> None:
    with connection.pipeline():
        write("way")(connection)


def goes_on(connection: Any) -> None:
    """After a statement that failed, in a block of its own."""
    with suppress(errors.UndefinedTable), connection.transaction():
        connection.execute("INSERT INTO nowhere VALUES (1)")
    write("way")(connection)


def mistakes(connection: Any) -> None:
    """A statement that is never sent, and one that is."""
    with pytest.raises(psycopg.ProgrammingError):
        connection.execute("INSERT INTO effect VALUES (%s)", ["one", "too many"])
    with pytest.raises(psycopg.ProgrammingError):
        connection.execute("INSERT INTO effect VALUES (%s)", [object()])
    write("way")(connection)


def ends_a_cursor(connection: Any) -> None:
    cursor = connection.cursor()
    cursor.close()
    with pytest.raises(psycopg.InterfaceError):
        cursor.execute("INSERT INTO effect VALUES ('not this')")
    write("way")(connection)


def has_its_own_kinds(connection: Any) -> None:
    """Of rows and cursors; the next handler has what it is used to."""
    connection.row_factory = dict_row
    connection.cursor_factory = psycopg.ClientCursor
    write("way")(connection)
    assert connection.execute("SELECT id FROM effect WHERE id = %s", ["way"]).fetchone() == {"id": "way"}


INSERT = "INSERT INTO effect VALUES (%s)"
WAYS: dict[str, Handler] = {
    "text": lambda line: line.execute("INSERT INTO effect VALUES ('way')"),
    "values": lambda line: line.execute(INSERT, ["way"]),
    "bytes": lambda line: line.execute(INSERT.encode(), ["way"]),
    "composed": lambda line: line.execute(
        sql.SQL("INSERT INTO {} VALUES (%s)").format(sql.Identifier("effect")), ["way"]
    ),
    "prepared": lambda line: line.execute(INSERT, ["way"], prepare=True),
    "binary": lambda line: line.cursor(binary=True).execute(INSERT, ["way"]),
    "with": lambda line: line.execute("WITH w AS (SELECT 'way') INSERT INTO effect SELECT * FROM w;"),
    "comment": lambda line: line.execute("/* one */ INSERT INTO effect VALUES ('way')"),
    "semicolon": lambda line: line.execute("INSERT INTO effect VALUES (replace('w;y', ';', 'a'))"),
    "several": lambda line: line.execute("SELECT 1; INSERT INTO effect VALUES ('way')"),
    "do": lambda line: line.execute("DO $$ BEGIN INSERT INTO effect VALUES ('way'); END $$"),
    "many": lambda line: line.cursor().executemany(INSERT, [["way"]]),
    "many returning": lambda line: line.cursor().executemany(
        f"{INSERT} RETURNING id", [["way"]], returning=True
    ),
    "no cursor of ours": lambda line: psycopg.Cursor(line).execute(INSERT, ["way"]),
    "copy": copies,
    "stream": streams,
    "server-side cursor": declares,
    "block": blocks,
    "pipeline": pipes,
    "goes on": goes_on,
    "mistakes": mistakes,
    "closed cursor": ends_a_cursor,
    "own kinds": has_its_own_kinds,
}


@pytest.mark.parametrize("way", WAYS)
def test_what_it_does_is_undone_alone(batch: Batch, way: str) -> None:
    """If it fails in the end; what others did stays, and so does its own if it is well."""

    def fails(connection: Any) -> None:
        WAYS[way](connection)
        fail(connection)

    assert batch.run({"a": write("a"), "way": fails, "b": fail, "c": write("c")}) == ["a", "c"]
    kinds = [type(each) for each in batch.verdicts.values()]
    assert kinds == [Ok, Failed, Failed, Ok]
    batch.store.transaction(lambda transaction: transaction.connection.execute("TRUNCATE effect"), 5.0)
    handlers = {"d": write("a"), "way": WAYS[way], "e": fail, "f": nothing, "g": write("c")}
    assert batch.run(handlers) == ["a", "c", "way"]
    assert isinstance(batch.state("way"), Done)


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO nowhere VALUES (1)",
        "INSERT INTO effect VALUES ('a', 'b')",
        "SELECT 1 / (SELECT count(*) FROM effect WHERE id = 'none')",
        "SELEC 1",
        "SELECT 1; SELECT * FROM nowhere",
    ],
)
def test_the_first_statement_fails_as_anywhere(batch: Batch, statement: str) -> None:
    """With the error that it has on any connection, its place in the statement as well."""

    def error(connection: Any) -> psycopg.Error:
        with pytest.raises(psycopg.Error) as caught:
            connection.execute(statement)
        return caught.value

    def fails(connection: Any) -> None:
        found = error(connection)
        assert str(found) == str(expected)
        assert (type(found), found.sqlstate) == (type(expected), expected.sqlstate)
        assert found.diag.statement_position == expected.diag.statement_position
        raise found

    with psycopg.connect(batch.url) as line:
        expected = error(line)
    assert batch.run({"a": write("a"), "b": fails, "c": write("c")}) == ["a", "c"]
    verdict = batch.verdicts["b"]
    assert isinstance(verdict, Failed)
    assert type(verdict.error) is type(expected)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(
    ("statement", "values"),
    [
        ("SELECT n, n::text AS word FROM generate_series(1, %s) n", [3]),
        ("SELECT 7 AS n, now() > '2000-01-01' AS late, NULL AS none", None),
        ("INSERT INTO effect SELECT %s FROM generate_series(1, 4) RETURNING id", ["x"]),
        ("INSERT INTO effect VALUES ('x'), ('y')", None),
        ("UPDATE effect SET id = 'z' WHERE id = 'none'", None),
        ("DELETE FROM effect", None),
        ("SELECT FROM generate_series(1, 2)", None),
    ],
)
def test_the_first_statement_answers_as_anywhere(
    batch: Batch, statement: str, values: list[Any] | None, binary: bool
) -> None:
    """Rows, their number and kinds, and what psycopg tells of them."""

    def told(connection: Any) -> list[Any]:
        cursor = connection.cursor(binary=binary, row_factory=dict_row)
        assert cursor.execute(statement, values) is cursor
        rows = cursor.fetchall() if cursor.description else None
        columns = [(each.name, each.type_code) for each in cursor.description or ()]
        status = connection.info.transaction_status
        return [rows, columns, cursor.rowcount, cursor.statusmessage, cursor.nextset(), status]

    found: list[Any] = []
    with psycopg.connect(batch.url) as line:
        line.execute("INSERT INTO effect VALUES ('a')")
        expected = told(line)
        line.rollback()
    batch.run({"a": write("a"), "b": lambda connection: found.extend(told(connection)), "c": nothing})
    assert found == expected


def test_what_could_not_be_prepared_is_not_taken_for_prepared(batch: Batch) -> None:
    """It is sent anew once it can be."""

    def hide(connection: Any) -> None:
        connection.execute("CREATE SCHEMA hidden; SET LOCAL search_path = hidden")

    def show(connection: Any) -> None:
        connection.execute("SET LOCAL search_path = public")

    handlers = {f"before {n}": write("a") for n in range(5)}
    handlers |= {"hide": hide, "hidden": write("b"), "show": show, "behind": write("c"), "again": write("d")}
    assert batch.run(handlers) == [*"aaaaacd"]
    assert isinstance(batch.verdicts["hidden"], Failed)


def test_who_prepares_much(batch: Batch) -> None:
    """Psycopg lets old ones go; none of them stays behind in the server."""
    handlers: dict[str, Handler] = {
        f"{n}": lambda connection, n=n: connection.execute(  # type: ignore[misc]
            f"INSERT INTO effect SELECT %s WHERE {n} >= 0", [f"{n:03}"], prepare=True
        )
        for n in range(150)
    }
    left: list[Any] = []

    def count(connection: Any) -> None:
        left.extend(connection.execute("SELECT count(*) FROM pg_prepared_statements").fetchone())

    assert batch.run({**handlers, "count": count}) == [f"{n:03}" for n in range(150)]
    assert 100 <= left[0] <= 110


def test_which_statements_go_along() -> None:
    """One that reads or changes rows, and in doubt none."""
    alone = ("SELECT 1", " select 1 ; ", "\nINSERT INTO a VALUES (%s)", b"UPDATE a SET b = 1", "VALUES (1)")
    assert all(plain(each) for each in alone)
    others = ("", ";", "SELECT 1; SELECT 2", b"SELECT ';'", "COPY a TO STDOUT", "-- no\nSELECT 1", "COMMIT")
    assert not any(plain(each) for each in others)
    assert not plain(sql.SQL("SELECT 1"))
    assert not plain("SELECTED")


# ------------------------------------------------------------------ what must not be


def test_who_ends_its_savepoint_is_found_out(batch: Batch) -> None:
    """It is a failed attempt of its own, wherever it stands; the others take effect once."""

    def releases(connection: Any) -> None:
        write("b")(connection)
        connection.execute("RELEASE SAVEPOINT idemp")

    assert batch.run({"a": write("a"), "b": releases, "c": write("c")}) == ["a", "c"]
    assert [type(each) for each in batch.verdicts.values()] == [Ok, Failed, Ok]
    assert batch.state("b") == Free(1)
    assert batch.run({"d": write("d"), "last": releases}) == ["a", "c", "d"]
    assert [type(each) for each in batch.verdicts.values()] == [Ok, Failed]


@pytest.mark.parametrize(
    "first", [write("b"), lambda line: line.cursor().executemany(INSERT, [["b"]])], ids=["along", "before"]
)
def test_a_savepoint_that_could_not_be_set_undoes_nothing_of_others(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, first: Handler
) -> None:
    """As when it is cancelled: the savepoint of the one before is the last.  Each is tried alone."""
    tries: list[str] = []

    def cancelled(connection: Any) -> None:
        tries.append("b")
        if len(tries) == 1:
            monkeypatch.setattr(postgresql_handlers, "NEXT", (b"RELEASE SAVEPOINT none", b"SAVEPOINT idemp"))
        try:
            first(connection)
        except psycopg.Error:
            raise LookupError("no") from None
        finally:
            monkeypatch.undo()

    assert batch.run({"a": write("a"), "b": cancelled, "c": write("c")}) == ["a", "b", "c"]
    assert [type(each) for each in batch.verdicts.values()] == [Ok, Ok, Ok]
    assert tries == ["b", "b"]


def test_who_begins_another_transaction_is_found_out(batch: Batch) -> None:
    """What it committed by force has no record, and it is told."""

    def begins_anew(connection: Any) -> None:
        connection.execute("COMMIT")
        connection.execute("BEGIN")

    batch.run({"b": begins_anew})
    assert isinstance(batch.verdicts["b"], Failed)
    assert batch.state("b") == Free(1)


def test_who_commits_is_set_aside(batch: Batch) -> None:
    """And nothing is owed any more."""

    def commits(connection: Any) -> None:
        connection.execute("COMMIT")

    assert batch.run({"a": write("a")}) == ["a"]
    with pytest.raises(PermanentFailure, match="leave commit and rollback"):
        raise _error(batch, commits)
    assert batch.run({"c": write("c")}) == ["a", "c"]


def _error(batch: Batch, handler: Handler) -> Exception:
    batch.run({"b": handler})
    verdict: Any = batch.verdicts["b"]
    error = verdict.error
    assert isinstance(error, Exception)
    return error


# ------------------------------------------------------------------ lost, killed, pooled


def test_a_lost_reply_to_a_statement_with_its_savepoint(postgresql: PostgreSQL, url: str) -> None:
    """The transaction is tried anew, and everything is there once."""
    with Proxy(postgresql.port) as proxy:
        batch = Batch(url.replace(f":{postgresql.port}", f":{proxy.port}"))
        with closing(batch.store):
            left = [1]

            def lose(connection: Any) -> None:
                if left:
                    left.pop()
                    proxy.lose()
                write("b")(connection)

            batch.run({"warm": nothing})
            handlers = {"a": write("a"), "b": lose, "c": write("c")}
            batch.run(handlers)
            assert proxy.counts.lost == 1
            assert [type(each) for each in batch.verdicts.values()] == [Ok] * 3
    with psycopg.connect(url) as line:
        assert line.execute("SELECT id FROM effect ORDER BY id").fetchall() == [("a",), ("b",), ("c",)]


_VICTIM = """
import os, signal, sys
from idemp.stores import postgresql_handlers
from tests.test_inbox_connection import Batch, write

real = postgresql_handlers.generators.fetch_many

def sent(connection):  # the savepoint is on its way, and the statement behind it
    postgresql_handlers.generators.fetch_many = lambda pgconn: os.kill(os.getpid(), signal.SIGKILL)
    write("b")(connection)

def before(connection):
    os.kill(os.getpid(), signal.SIGKILL)

def behind(connection):
    write("b")(connection)
    os.kill(os.getpid(), signal.SIGKILL)

url, where = sys.argv[1:]
Batch(url).run({"a": write("a"), "b": {"before": before, "sent": sent, "behind": behind}[where]})
"""


@pytest.mark.parametrize("where", ["before", "sent", "behind"])
def test_killed_at_the_savepoint(batch: Batch, where: str) -> None:
    """Nothing is left of either, and nothing is held."""
    command = [sys.executable, "-c", _VICTIM, batch.url, where]
    victim = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert victim.returncode == -signal.SIGKILL
    assert batch.effects() == []
    assert batch.run({"a": write("a"), "b": write("b")}) == ["a", "b"]
    assert [type(each) for each in batch.verdicts.values()] == [Ok, Ok]


def test_behind_a_pooler_in_transaction_mode(postgresql: PostgreSQL, url: str) -> None:
    """The savepoint goes along there, too, and nothing is prepared."""
    need("pgbouncer")
    with PgBouncer(postgresql.port) as pooler:
        batch = Batch(pooler.through(url))
        with closing(batch.store):
            for n in range(8):
                handlers = {f"{n}/{m}": fail if m % 3 == 2 else write(f"{n}/{m}") for m in range(12)}
                batch.run(handlers)
            assert batch.effects() == sorted(f"{n}/{m}" for n in range(8) for m in range(12) if m % 3 != 2)


def test_an_async_handler_has_the_same(batch: Batch) -> None:
    """Its statements go along as well."""
    kinds: list[type] = []

    @idempotent(batch.store, name="app.order", key="order", transaction=True)
    async def order(order: str) -> str:
        connection = context().connection
        kinds.append(type(connection))
        assert isinstance(connection, psycopg.Connection)
        [[found]] = connection.execute(f"{INSERT} RETURNING id", [order]).fetchall()
        return str(found)

    assert asyncio.run(order("A")) == "A"
    assert kinds == [HandlersConnection]
    assert batch.effects() == ["A"]
