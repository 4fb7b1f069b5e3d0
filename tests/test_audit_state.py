"""What the auditor knows, in SQLite and in PostgreSQL, each held to the same; and what is each one's own."""

from __future__ import annotations

import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from idemp.audit.state import SqlState, open_state, sql
from idemp.audit.state import postgresql as on_postgresql
from idemp.errors import Closed, ConfigError, StoreUnavailable
from tests.servers import PostgreSQL, need
from tests.servers.pgbouncer import PgBouncer
from tests.service import finished

Open = Callable[..., SqlState]
ODD = ["", "nul \0", "half \ud800", "é", "x" * 100_000, "'; DROP TABLE kept; --", "%s ? :name"]
SILENT = """
import os, signal, sys
from idemp.audit.state import open_state

state = open_state(sys.argv[1])

def work(execute):
    execute("INSERT INTO kept VALUES ('half', '')", ())
    os.kill(os.getpid(), signal.SIGKILL)

state.save([("whole", "")], [b"told"])
state.transact(work)
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where there is no state yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/audit.db"
    return str(request.getfixturevalue("postgresql").database())


@pytest.fixture
def opened(place: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens the same state again and again; all are closed at the end."""
    monkeypatch.setattr(on_postgresql, "WAIT", 1)
    states: list[SqlState] = []

    def another(**how: bool) -> SqlState:
        states.append(open_state(place, **how))
        return states[-1]

    yield another
    for state in states:
        state.close()


def test_what_is_saved_is_known_again(opened: Open) -> None:
    """Rows by their newest text, counts summed, what is not told yet in its order and with its id."""
    first = opened()
    first.save([("a", "1"), ("b", "2"), ("c", "3")], [b"one", b"\0two"], at=5.5, counts={"reports": 2})
    first.save(
        [("a", "4"), ("b", None), ("no such", None)], [b"three"], at=6.0, counts={"reports": 1, "rejected": 1}
    )
    first.save([])
    first.forget([])
    first.forget(["c"])
    one = first.oldest()
    assert one is not None
    first.close()

    again = opened()
    assert again.rows() == [("a", "4")]
    assert again.counts() == {"rejected": 1, "reports": 3}
    assert again.unsent() == 3
    told = []
    while waiting := again.oldest():
        told.append(waiting)
        again.told(waiting[0])
    assert told[0] == one
    assert [(body, at) for _, body, at in told] == [(b"one", 5.5), (b"\0two", 5.5), (b"three", 6.0)]
    assert len({name for name, *_ in told}) == 3
    again.save([], [b"four"])
    later = again.oldest()
    assert later is not None
    assert later[0] not in {name for name, *_ in told}


def test_when_it_looked(opened: Open) -> None:
    """Of the last look, and only of looks."""
    state = opened()
    assert state.looked() is None
    state.save([], at=10.0, tick=5.0)
    state.save([], at=12.0)
    assert opened(reading=True).looked() == (10.0, 5.0)


def test_many_rows_at_once(opened: Open) -> None:
    """More than one statement takes."""
    state = opened()
    rows = [(f"row {n}", str(n)) for n in range(2 * sql.TOGETHER + 3)]
    state.save(rows)
    assert sorted(state.rows()) == sorted(rows)
    state.save([(name, None) for name, _ in rows[3:]])
    assert sorted(state.rows()) == rows[:3]


def test_ids_that_came_before_are_known(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they are made of; the oldest are forgotten at last."""
    monkeypatch.setattr(sql, "REMEMBERED", len(ODD))
    state = opened()
    assert state.known(ODD) == state.known([]) == set()
    state.save([], taken=ODD)
    state.save([], taken=ODD[:3])
    assert state.known([*ODD, "new"]) == set(ODD)
    new = [f"new {n}" for n in range(len(ODD) + 10)]
    state.save([], taken=new, tick=1.0)
    assert new[-1] in state.known(new)
    assert not state.known(ODD)


def test_all_or_nothing_when_it_is_killed(place: str, opened: Open) -> None:
    """Before the commit: nothing of it is there, and what was saved before is."""
    done = finished("-c", SILENT, place)
    assert done.returncode == -signal.SIGKILL, done
    state = opened()
    assert state.rows() == [("whole", "")]
    assert state.unsent() == 1


def test_one_auditor_of_a_state(opened: Open) -> None:
    """A second is refused while the first lives; who only looks is not."""
    first, second = opened(), opened()
    first.save([("a", "1")])
    with pytest.raises(ConfigError, match="another auditor is using"):
        second.rows()
    assert opened(reading=True).rows() == [("a", "1")]
    first.close()
    assert second.rows() == [("a", "1")]


def test_who_only_looks_changes_nothing(opened: Open) -> None:
    """It makes no state, and writes into none."""
    with pytest.raises(ConfigError, match="has `idemp audit run` been started"):
        opened(reading=True).rows()
    opened().save([("a", "1")])
    looking = opened(reading=True)
    with pytest.raises((StoreUnavailable, ConfigError)):
        looking.save([("a", "2")])
    assert looking.rows() == [("a", "1")]


def test_a_state_that_is_closed_says_so(opened: Open) -> None:
    """And can be closed again."""
    for state in (opened(), opened(reading=True)):
        state.close()
        state.close()
        with pytest.raises(Closed, match="was closed"):
            state.rows()


@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("redis://user:tellnobody@h/0", "there is no state for 'redis://user:\\*\\*\\*@h/0'"),
        ("sqlite://audit.db", "three slashes"),
        ("sqlite:///audit.db?retention=1h", "has no option 'retention'"),
        ("postgresql://h/d?retention=1h", "has no option 'retention'"),
        ("postgresql://h/d?namespace=a%20b", "namespace='a b'"),
    ],
)
def test_no_place_for_a_state(place: str, part: str) -> None:
    """A sentence, before anything is connected to."""
    with pytest.raises(ConfigError, match=part):
        open_state(place)


def test_a_missing_extra_is_one_sentence() -> None:
    """With the line to type; nothing of it is needed for a file."""
    code = "import sys; sys.modules['psycopg'] = None\nfrom idemp.audit.state import open_state\n"
    done = finished("-c", code + "open_state('audit.db').close(); open_state('postgresql://h/d')")
    assert done.returncode == 1
    assert "pip install 'idemp[postgresql]'" in done.stderr.splitlines()[-1]


# ------------------------------------------------------------------ SQLite


def test_a_file_that_is_no_state(tmp_path: Path) -> None:
    """Text, somebody else's database, a newer idemp's: each is left as it is."""
    file = tmp_path / "audit.db"
    file.write_text("this is no database, and it is long enough to be seen as none" * 20)
    with closing(open_state(str(file))) as state, pytest.raises(ConfigError, match="no SQLite file"):
        state.rows()
    other = str(tmp_path / "other.db")
    with closing(sqlite3.connect(other)) as db:
        db.execute("CREATE TABLE mine (n)")
    for reading in (False, True):
        with closing(open_state(other, reading=reading)) as state, pytest.raises(ConfigError, match="is not"):
            state.rows()
    newer = str(tmp_path / "newer.db")
    with closing(sqlite3.connect(newer)) as db:
        db.execute("PRAGMA user_version=99")
    with closing(open_state(newer)) as state, pytest.raises(ConfigError, match="of a newer idemp"):
        state.rows()


def test_a_place_where_no_file_can_be(tmp_path: Path) -> None:
    """Is told with what to do, and nothing is made."""
    for path, part in ((tmp_path / "no" / "audit.db", "make it, or name another"), (tmp_path, "is a folder")):
        with closing(open_state(str(path))) as state, pytest.raises(ConfigError, match=part):
            state.rows()
    assert list(tmp_path.iterdir()) == []
    assert not Path(f"{tmp_path}.lock").exists()


# ------------------------------------------------------------------ PostgreSQL


def test_the_server_dies_and_comes_back(own_postgresql: PostgreSQL) -> None:
    """What was saved is there; meanwhile a sentence without the password."""
    with closing(open_state(own_postgresql.url)) as state:
        state.save([("a", "1")], [b"told"])
        own_postgresql.kill()
        for _ in range(2):
            with pytest.raises(StoreUnavailable) as refused:
                state.rows()
            assert "secret" not in str(refused.value)
        own_postgresql.start()
        assert state.rows() == [("a", "1")]
        assert state.unsent() == 1


def test_one_that_was_cut_off_writes_nothing_beside_another(
    postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock went with its connection, and no other connection writes."""
    monkeypatch.setattr(on_postgresql, "WAIT", 1)
    url = postgresql.database()
    with closing(open_state(url)) as first, closing(open_state(url)) as second:
        first.save([("a", "1")])
        postgresql.psql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            f" WHERE datname = '{url.rpartition('/')[2]}' AND pid <> pg_backend_pid()"
        )
        second.save([("a", "2")])
        with pytest.raises(StoreUnavailable):
            first.save([("a", "3")])
        with pytest.raises(ConfigError, match="another auditor is using"):
            first.save([("a", "3")])
        assert second.rows() == [("a", "2")]


def test_namespaces_are_apart_and_beside_stores(postgresql: PostgreSQL) -> None:
    """Of one database, each has a schema of its own."""
    url = postgresql.database()
    with (
        closing(open_state(url)) as one,
        closing(open_state(f"{url}?namespace=two")) as two,
    ):
        one.save([("a", "1")])
        two.save([("a", "2")])
        assert (one.rows(), two.rows()) == ([("a", "1")], [("a", "2")])
    schemas = postgresql.psql(
        "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'idemp%' ORDER BY 1",
        database=url.rpartition("/")[2],
    )
    assert schemas.split() == ["idempaudit_default", "idempaudit_two"]


def test_a_user_who_may_not_make_tables(postgresql: PostgreSQL, unique: str) -> None:
    """Is told the command; after it, it may use them, and no more."""
    url = postgresql.database()
    postgresql.psql(f"CREATE ROLE {unique} LOGIN PASSWORD 'theirs'")
    theirs = postgresql.url_of(unique, "theirs", url.rpartition("/")[2])
    with closing(open_state(theirs)) as state, pytest.raises(ConfigError, match="run: idemp audit init URL"):
        state.rows()
    done = finished("-m", "idemp", "audit", "init", url, "--grant", unique)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"its tables are at version 1 now; {unique} may use them.\n"
    with closing(open_state(theirs)) as state:
        state.save([("a", "1")], [b"told"], counts={"reports": 1}, taken=["x"], tick=1.0)
        assert state.rows() == [("a", "1")]
    again = finished("-m", "idemp", "audit", "init", url)
    assert again.stdout == "its tables were there already.\n"
    refused = finished("-m", "idemp", "audit", "init", "sqlite:///audit.db")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "only postgresql://" in refused.stderr


def test_a_pooler_is_refused(postgresql: PostgreSQL) -> None:
    """Its connections are nobody's own, so that nobody would be alone."""
    need("pgbouncer")
    url = postgresql.database()
    with (
        PgBouncer(postgresql.port) as pooler,
        closing(open_state(pooler.through(url))) as state,
        pytest.raises(ConfigError, match="is a pooler"),
    ):
        state.rows()
