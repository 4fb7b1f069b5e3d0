"""Every command that asks a server: wrong port, no server, wrong password are one sentence each."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis as redis_py

from idemp import open_store, open_transport, publish
from idemp.cli import main
from idemp.eventlogs import open_event_log
from idemp.ports import Batch, Claim, Event
from tests.servers import Etcd, PostgreSQL, RabbitMQ, Redis, need
from tests.service import environment, finished
from tests.test_dead import _dead_letter
from tests.test_deeds import as_loud_as_before
from tests.test_tracking_envelope import LINE

OF_A_STORE: dict[str, list[str]] = {
    "ls": [],
    "stats": [],
    "deeds": [],
    "doubt": [],
    "get": ["k"],
    "resolve": ["k", "--retry"],
    "forget": ["k", "--yes"],
    "doctor": [],
}
OF_A_BROKER: dict[str, list[str]] = {
    "publish": ['{"type":"new_order","id":"1"}'],
    "dead list": ["orders-queue"],
    "dead show": ["orders-queue"],
    "dead send": ["orders-queue", "--all", "--yes"],
    "doctor": ["--service", "orders"],
}


def one_sentence(command: str, *arguments: str, part: str) -> None:
    """On stderr, exit code 2; the password is not in it."""
    done = finished("-m", "idemp", *command.split(), *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert done.stderr.startswith("idemp: ")
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert "tellnobody" not in done.stderr


@pytest.mark.parametrize("command", OF_A_STORE)
@pytest.mark.parametrize(
    "url", ["etcd://me:tellnobody@127.0.0.1:9/x", "etcd://me:tellnobody@no.such.invalid/x"]
)
def test_no_etcd(command: str, url: str) -> None:
    """A port where nobody is; a name that nobody has."""
    one_sentence(command, *OF_A_STORE[command], "--store", url, part="--store (IDEMP_STORE): ")


@pytest.mark.parametrize("command", OF_A_STORE)
def test_a_port_of_another_server(command: str, rabbitmq: RabbitMQ) -> None:
    """It is a RabbitMQ."""
    url = f"etcd://127.0.0.1:{rabbitmq.port}/x"
    one_sentence(command, *OF_A_STORE[command], "--store", url, part="--store (IDEMP_STORE): ")


@pytest.mark.parametrize("command", OF_A_STORE)
def test_no_sqlite_file(command: str) -> None:
    """A file that is not there is not made."""
    url = "sqlite:////no/such/seen.db"
    one_sentence(command, *OF_A_STORE[command], "--store", url, part="there is no file /no/such/seen.db")


@pytest.fixture(scope="module")
def guarded() -> Iterator[Etcd]:
    """An etcd that wants a password."""
    need("etcd")
    with Etcd() as etcd:
        store = open_store(f"{etcd.url}x")
        store.apply([])
        store.close()
        member = etcd.members[0]
        member.call("/v3/auth/user/add", name="root", password="right")
        member.call("/v3/auth/role/add", name="root")
        member.call("/v3/auth/user/grant", user="root", role="root")
        member.call("/v3/auth/enable")
        yield etcd


@pytest.mark.parametrize("command", OF_A_STORE)
@pytest.mark.parametrize("login", ["root:tellnobody@", ""])
def test_a_wrong_password_for_etcd(command: str, login: str, guarded: Etcd) -> None:
    """A wrong one, and none."""
    url = f"etcd://{login}{guarded.endpoints[0]}/x"
    one_sentence(command, *OF_A_STORE[command], "--store", url, part="--store (IDEMP_STORE): ")


@pytest.mark.parametrize("command", OF_A_BROKER)
@pytest.mark.parametrize("where", ["127.0.0.1:9", "no.such.invalid"])
def test_no_rabbitmq(command: str, where: str) -> None:
    """A port where nobody is; a name that nobody has."""
    url = f"amqp://me:tellnobody@{where}/"
    arguments = [*OF_A_BROKER[command], "--transport", url]
    one_sentence(command, *arguments, part="--transport (IDEMP_TRANSPORT): ")


@pytest.mark.parametrize("command", OF_A_BROKER)
def test_a_wrong_password_for_rabbitmq(command: str, rabbitmq: RabbitMQ) -> None:
    """It refuses."""
    url = rabbitmq.url.replace("guest:guest", "guest:tellnobody")
    one_sentence(command, *OF_A_BROKER[command], "--transport", url, part="refuses user 'guest'")


@pytest.mark.parametrize("command", OF_A_BROKER)
def test_an_etcd_is_no_rabbitmq(command: str, etcd: Etcd) -> None:
    """Another server's port."""
    arguments = [*OF_A_BROKER[command], "--transport", f"amqp://{etcd.endpoints[0]}/"]
    one_sentence(command, *arguments, part="--transport (IDEMP_TRANSPORT): ")


# ------------------------------------------------------------------ every command on every kind of server

OF_ANY_STORE = {
    **OF_A_STORE,
    "forget --prefix k/": ["--yes"],
    "relay": ["--once", "--transport", "memory://x"],
    "replay": ["--dead", "orders-queue", "--transport", "sqlite:///{folder}/queues.db"],
    "dead send": ["orders-queue", "--all", "--yes", "--transport", "sqlite:///{folder}/queues.db"],
}
OF_ANY_BROKER = {
    **OF_A_BROKER,
    "resolve": ["k", "--retry", "--queue", "orders-queue", "--store", "sqlite:///{folder}/seen.db"],
    "relay": ["--once", "--store", "sqlite:///{folder}/seen.db"],
    "replay": ["--dead", "orders-queue", "--store", "sqlite:///{folder}/seen.db"],
    "advise": ["--service", "orders", "--tracking", "sqlite:///{folder}/events.db"],
    "watch": ["--tracking", "sqlite:///{folder}/events.db"],
    "track": ["--tracking", "sqlite:///{folder}/events.db"],
}
OF_AN_EVENT_LOG = {
    "trace": ["1"],
    "flow": [],
    "events": [],
    "advise": ["--backlog", "0"],
    "watch": ["--transport", "memory://x"],
    "track": ["--transport", "memory://x"],
    "replay": ["--id", "1", "--transport", "memory://x"],
}

Say = Callable[..., None]


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command in this process, for there are many; what it says is one sentence, and no password."""
    with closing(open_store(f"sqlite:///{tmp_path}/seen.db")) as store:
        store.apply([])
    with closing(open_event_log(f"sqlite:///{tmp_path}/events.db")) as log:
        log.prune(0.0)
    with closing(open_transport(f"sqlite:///{tmp_path}/queues.db")) as transport:
        transport.declare("orders-queue.dead")
        publish(transport, [_dead_letter("orders-queue", "orders.new_order/1")])

    def check(command: str, arguments: list[str], *more: str, part: str) -> None:
        words = [each.replace("{folder}", str(tmp_path)) for each in [*command.split(), *arguments, *more]]
        monkeypatch.setattr(sys, "argv", ["idemp", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended, as_loud_as_before():
            main()
        out, err = capsys.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (2, "", 1), (out, err)
        assert err.startswith("idemp: ")
        assert part in err
        assert "tellnobody" not in err

    return check


@pytest.fixture(scope="module")
def secret_redis() -> Iterator[Redis]:
    """One that wants a password."""
    need("redis")
    with Redis() as server:
        with closing(redis_py.Redis.from_url(server.url)) as client:
            client.config_set("requirepass", "right")  # the server's helper asks without one
        yield server


WRONG = ("a closed port", "no host", "another server", "a wrong password", "no password")


@pytest.fixture(scope="module")
def wrong(
    rabbitmq: RabbitMQ, etcd: Etcd, postgresql: PostgreSQL, guarded: Etcd, secret_redis: Redis
) -> Callable[[str, str], str]:
    """The URL of a server of a kind, with something wrong about it."""

    def url(kind: str, what: str) -> str:
        login = {"redis": ":tellnobody@"}.get(kind, "me:tellnobody@")
        if what == "a closed port":
            return f"{kind}://{login}127.0.0.1:9/0"
        if what == "no host":
            return f"{kind}://{login}no.such.invalid/0"
        if what == "another server":
            other = rabbitmq.port if kind != "amqp" else etcd.endpoints[0].rpartition(":")[2]
            return f"{kind}://{login}127.0.0.1:{other}/0"
        mine = {
            "etcd": f"etcd://root:tellnobody@{guarded.endpoints[0]}/x",
            "postgresql": postgresql.url_of("postgres", "tellnobody", "idemp"),
            "redis": f"redis://:tellnobody@127.0.0.1:{secret_redis.port}/0",
            "amqp": rabbitmq.url.replace("guest:guest", "guest:tellnobody"),
        }[kind]
        if what == "no password":
            scheme, _, rest = mine.partition("://")
            return f"{scheme}://{rest.rpartition('@')[2]}"
        return mine

    return url


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("kind", ["postgresql", "redis", "etcd"])
def test_every_command_of_a_store(kind: str, what: str, wrong: Callable[[str, str], str], said: Say) -> None:
    """It names the option and the variable."""
    for command, arguments in OF_ANY_STORE.items():
        said(command, arguments, "--store", wrong(kind, what), part="--store (IDEMP_STORE): ")


# Without a password it is guest's, which RabbitMQ takes; another server is waited for, see above.
@pytest.mark.parametrize(
    ("kind", "what"),
    [
        *(("redis", what) for what in WRONG),
        *(("amqp", what) for what in ("a closed port", "no host", "a wrong password")),
    ],
)
def test_every_command_of_a_broker(kind: str, what: str, wrong: Callable[[str, str], str], said: Say) -> None:
    """The same of the broker."""
    for command, arguments in OF_ANY_BROKER.items():
        said(command, arguments, "--transport", wrong(kind, what), part="--transport (IDEMP_TRANSPORT): ")


@pytest.mark.parametrize("what", WRONG)
def test_every_command_of_an_event_log(what: str, wrong: Callable[[str, str], str], said: Say) -> None:
    """The same of the event log."""
    for command, arguments in OF_AN_EVENT_LOG.items():
        url = wrong("postgresql", what)
        said(command, arguments, "--tracking", url, part="--tracking (IDEMP_TRACKING): ")


@pytest.mark.parametrize("setting", ["default_transaction_read_only = on", "statement_timeout = '50ms'"])
def test_every_command_on_a_database_that_lets_nothing_through(
    setting: str, postgresql: PostgreSQL, said: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence names the setting of the server and its fix."""
    monkeypatch.setattr("idemp.stores.postgresql.PATIENCE", 0.2)
    url = postgresql.database()
    with closing(open_store(url)) as store:
        store.apply([])
    postgresql.psql(f"ALTER DATABASE {url.rpartition('/')[2]} SET {setting}")
    name, reads = setting.split()[0], "read_only" in setting
    with psycopg.connect(url) as holder:
        if not reads:
            holder.execute("SET statement_timeout = 0")
            holder.execute("LOCK TABLE idemp_default.migration, idemp_default.meta")
        for command, arguments in OF_ANY_STORE.items():
            if command != "doctor" or not reads:  # which answers, with a finding
                said(command, arguments, "--store", url, part=name)
    if reads:
        said("init", [f"{url}?namespace=new"], part=name)


def test_a_look_that_is_cut_off(postgresql: PostgreSQL, said: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first question of all, whether there is such a namespace."""

    def cut_off(place: Any) -> bool:
        raise psycopg.errors.QueryCanceled("canceling statement due to statement timeout")

    monkeypatch.setattr("idemp.stores.postgresql_line.exists", cut_off)
    for command, arguments in OF_ANY_STORE.items():
        if command != "doctor":  # which asks otherwise
            said(command, arguments, "--store", postgresql.url, part="raise the statement_timeout")


def test_a_store_without_an_outbox(etcd: Etcd, said: Say, unique: str) -> None:
    """There is nothing to relay; the sentence says which stores have one."""
    url = f"{etcd.url}{unique}"
    with closing(open_store(url)) as store:
        store.apply([])
    part = "--store (IDEMP_STORE): EtcdStore has no outbox; open one with sqlite:///app.db"
    said("relay", ["--once", "--transport", "memory://x"], "--store", url, part=part)


# ------------------------------------------------------------------ a look makes nothing

LOOKS = [
    *(("--store", command, OF_ANY_STORE[command]) for command in OF_ANY_STORE if command != "doctor"),
    *(("--transport", command, OF_ANY_BROKER[command]) for command in OF_ANY_BROKER
      if command not in ("publish", "relay", "track", "doctor")),
    *(("--tracking", command, OF_AN_EVENT_LOG[command]) for command in OF_AN_EVENT_LOG if command != "track"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "command", "arguments"), LOOKS)
def test_a_look_at_the_wrong_file_makes_nothing(
    option: str, command: str, arguments: list[str], tmp_path: Path, said: Say
) -> None:
    """A file that is not there, an empty one, and an application's own."""
    folder = tmp_path / "wrong"
    folder.mkdir()
    names = ("none.db", "empty.db", "theirs.db", "wal.db")
    (folder / "empty.db").touch()
    for name in names[2:]:
        with closing(sqlite3.connect(folder / name)) as db:
            db.execute(f"PRAGMA journal_mode = {'wal' if name == 'wal.db' else 'delete'}")
            db.execute("CREATE TABLE message (body)")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in names:
        said(command, arguments, option, f"sqlite:///{folder}/{name}", part=f" {folder}/{name}")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("command", [command for command in OF_AN_EVENT_LOG if command != "track"])
def test_a_look_at_the_wrong_database_makes_nothing(command: str, postgresql: PostgreSQL, said: Say) -> None:
    """It gets no schema."""
    url = postgresql.database()
    said(command, OF_AN_EVENT_LOG[command], "--tracking", url, part="there is no event log ")
    with psycopg.connect(url) as db:
        assert db.execute("SELECT to_regnamespace('idemp_events')").fetchone() == (None,)


# ------------------------------------------------------------------ what no server is asked

BAD = os.fsdecode(b"tell\xff\xfe")
DEEP = "[" * 100_000
STORE, BROKER, LOG = (
    ["--store", "sqlite:///{folder}/seen.db"],
    ["--transport", "sqlite:///{folder}/queues.db"],
    ["--tracking", "sqlite:///{folder}/events.db"],
)
EVENT = '{"type":"new_order","id":"1"}'


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("trace", [BAD, *LOG]),
        ("events", ["--service", BAD, *LOG]),
        ("events", ["--type", BAD, *LOG]),
        ("events", ["--business", BAD, *LOG]),
        ("events", ["--id", BAD, *LOG]),
        ("events", ["--tracking", f"postgresql://u:tellnobody{BAD}@h/d"]),
        ("ls", [BAD, *STORE]),
        ("get", [BAD, *STORE]),
        ("resolve", ["k", "--done", "--result", f'"{BAD}"', *STORE]),
        ("resolve", ["k", "--retry", "--reason", BAD, *STORE]),
        ("dead list", [BAD, *BROKER]),
        ("dead show", [BAD, *BROKER]),
        ("dead list", ["q", "--reason-has", BAD, *BROKER]),
        ("replay", ["--id", BAD, "--dry-run", *LOG, *BROKER]),
        ("replay", ["--resume", BAD, *BROKER, *STORE]),
        ("replay", ["--cancel", BAD, *BROKER]),
        ("replay", ["--dead", BAD, *BROKER, *STORE]),
        ("publish", [EVENT, "--routing-key", BAD, *BROKER]),
        ("publish", [EVENT, "--exchange", BAD, *BROKER]),
        ("consume", [BAD, *BROKER]),
        ("watch", ["--service", BAD, *LOG, *BROKER]),
        ("advise", ["--service", BAD, *LOG, *BROKER]),
        ("audit status", [BAD]),
        ("init", [f"postgresql://u:tellnobody{BAD}@h/d"]),
    ],
)
def test_what_is_not_valid_unicode(command: str, arguments: list[str], said: Say) -> None:
    """Any argument; the sentence names it."""
    [name] = [each for each, of in zip(["", *arguments], arguments, strict=False) if BAD in of]
    part = f"'{name}'" if name.startswith("--") else "Invalid value for"
    said(command, arguments, part=part)


def test_a_variable_that_is_not_valid_unicode(said: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the option that it stands for."""
    monkeypatch.setenv("IDEMP_STORE", f"redis://:tellnobody{BAD}@h")
    said("ls", [], part="'--store' (env var: 'IDEMP_STORE'): 'redis://:***@h' is not valid Unicode")


@pytest.mark.parametrize(
    ("command", "arguments", "part"),
    [
        (
            "resolve",
            ["k", "--done", "--result", DEEP, *STORE],
            "--result is not JSON: it is nested too deeply",
        ),
        ("consume", [".a:b", *BROKER], "'.a:b': write it like orders.handlers:new_order"),
        ("consume", ["..:b", *BROKER], "'..:b': write it like orders.handlers:new_order"),
        (
            "replay",
            ["--id", "1", "--consumer", ".a:b", "--dry-run", *LOG, *BROKER],
            "'.a:b': write it like orders.handlers:new_order",
        ),
        ("ls", ["--store", "redis://me:tellnobody@h1:1,h2:2/0"], "redis:// has one host, not 'h1:1,h2:2'"),
    ],
)
def test_what_no_command_understands(command: str, arguments: list[str], part: str, said: Say) -> None:
    """One sentence each."""
    said(command, arguments, part=part)


@pytest.mark.parametrize("line", [b'{"uuid":"\xff"}', DEEP.encode(), b'{"payload":' + DEEP.encode(), b"\0"])
def test_lines_that_are_none(line: bytes, tmp_path: Path, said: Say) -> None:
    """The line is named, and what stands before it is kept."""
    (tmp_path / "lines").write_bytes(f"{LINE}\n".encode() + line + b"\n")
    part = "line 2: this is no log line of a message: "
    said("track", ["--lines", "{folder}/lines", *LOG], part=part)
    said("track", ["--lines", "{folder}/lines", *LOG], part="; 1 lines before it were kept")


def test_more_events_than_there_can_be(tmp_path: Path) -> None:
    """They are all listed."""
    url = f"sqlite:///{tmp_path}/events.db"
    with closing(open_event_log(url)) as log:
        log.append(Batch("w", 1, [Event("1", "ok", "s", 1.0), Event("2", "ok", "s", 2.0)]))
    done = finished("-m", "idemp", "events", "--limit", "9" * 23, "--tracking", url)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 2, "")


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("command", ["--help", "ls --help", "ls", "get k/1"])
@pytest.mark.parametrize(
    ("output", "said"),
    [
        (">/dev/full", "what it prints cannot be written: No space left on device; send it elsewhere"),
        (">&-", "there is no standard output; send it somewhere, like >/dev/null"),
    ],
)
def test_an_output_that_takes_nothing(
    tmp_path: Path, command: str, output: str, said: str, buffered: str
) -> None:
    """That is a sentence too, and no success."""
    url = f"sqlite:///{tmp_path}/seen.db"
    with closing(open_store(url)) as store:
        store.apply([Claim("k/1")])
    shell = f"'{sys.executable}' -m idemp {command} {output}"
    settings = environment({"IDEMP_STORE": url, "PYTHONUNBUFFERED": buffered})
    done = subprocess.run(["sh", "-c", shell], env=settings, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"idemp: {said}\n")
