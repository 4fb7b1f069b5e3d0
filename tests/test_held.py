"""What becomes of an SQLite file that is open when the process is forked, or the file replaced."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from idemp import Consumer, idempotent
from idemp.errors import ConfigError, TransportUnavailable
from idemp.message import Message, Properties
from idemp.ports import Applied, Claim, Complete, Done, Get, Publication, Sent
from idemp.stores import open_store
from idemp.stores.sqlite import SqliteStore
from idemp.transports import open_transport

ROOT = Path(__file__).parents[1]
PARTS = """
import os, signal, sqlite3, sys, threading
from idemp.audit.state import open_state
from idemp.audit.tallies import Tallies
from idemp.errors import ConfigError
from idemp.eventlogs import open_event_log
from idemp.message import Properties
from idemp.ports import *
from idemp.stores import open_store
from idemp.transports import open_transport

url, path = sys.argv[1], sys.argv[1].removeprefix("sqlite:///")

def do(store, key):
    [claim] = store.apply([Claim(key)])
    return store.apply([Complete(key, claim.token)])

def publish(transport):
    transport.send([Publication(b"body", Properties(), "", "queue")])
    return [came for came in transport.poll(1.0) if isinstance(came, Sent)]

def child(work):
    number = os.fork()
    if number:
        return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    signal.alarm(20)
    try:
        work()
    except ConfigError as error:
        print(error, flush=True)
        os._exit(3)
    finally:
        sys.stdout.flush()
        os._exit(0)
"""
USES = {
    "store": "store = open_store(url); use = lambda: store.apply([])",
    "another store": "store = open_store(url); store.apply([]); use = lambda: open_store(url).apply([])",
    "broker": "t = open_transport(url); use = lambda: t.declare('queue')",
    "event log": "log = open_event_log(url); use = lambda: log.append(Batch('me', next(count), ()))",
    "audit state": "state = open_state(url); use = lambda: state.transact(lambda execute: None)",
    "tallies": "tallies = Tallies(path); use = lambda: tallies.add(())",
    "its user": "db = sqlite3.connect(path); db.execute('PRAGMA journal_mode=WAL').fetchall();"
    " use = lambda: do(open_store(url), str(next(count)))",
}


def run(code: str, url: str, *, killed: bool = False) -> str:
    """What the program says, in a process of its own."""
    command = [sys.executable, "-c", PARTS + code, url]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert ran.returncode == (-signal.SIGKILL if killed else 0), ran.stderr
    return ran.stdout


@pytest.mark.parametrize("what", USES)
def test_a_file_that_is_open_at_a_fork_is_refused_in_the_child(tmp_path: Path, what: str) -> None:
    """At once, in a sentence; the parent goes on."""
    code = f"""
from itertools import count
count = count()
{USES[what]}
use()
assert child(use) == 3
use()
"""
    said = run(code, f"sqlite:///{tmp_path}/it.db")
    assert f"{tmp_path}/it.db was open when this process was forked" in said


def test_a_child_of_a_parent_in_a_transaction_is_told_at_once(tmp_path: Path) -> None:
    """It said "database is locked" before, for ever."""
    code = """
store = open_store(url)
inside, over = threading.Event(), threading.Event()
thread = threading.Thread(target=store.transaction, args=(lambda _: (inside.set(), over.wait(20)), 1.0))
thread.start()
assert inside.wait(20)
assert child(lambda: do(store, "a")) == 3
over.set()
thread.join()
assert do(store, "a") == [Applied()]
"""
    assert "was forked" in run(code, f"sqlite:///{tmp_path}/seen.db")


def test_what_was_closed_before_the_fork_may_be_opened_in_the_child(tmp_path: Path) -> None:
    """And what is done in parent and child, each by itself, is seen by others."""
    code = """
store, transport = open_store(url), open_transport(url.replace("seen", "queues"))
do(store, "before")
transport.declare("queue")
store.close()
transport.close()
unused = open_store(url)

def work():
    assert do(unused, "child") == [Applied()]
    transport = open_transport(url.replace("seen", "queues"))
    assert [sent.error for sent in publish(transport)] == [""]
    transport.close()
    unused.close()
    os._exit(7)

assert child(work) == 7
assert do(unused, "parent") == [Applied()]
"""
    run(code, f"sqlite:///{tmp_path}/seen.db")
    store = open_store(f"sqlite:///{tmp_path}/seen.db")
    states = store.apply([Get(key) for key in ("before", "child", "parent")])
    store.close()
    assert [type(state) for state in states] == [Done] * 3
    transport = open_transport(f"sqlite:///{tmp_path}/queues.db")
    assert transport.depth("queue") == 1
    transport.close()


def test_a_child_that_ends_leaves_the_logs_of_others_alone(tmp_path: Path) -> None:
    """Python closed what it had inherited; SQLite, which found nobody there, deleted the file's log."""
    code = """
store, transport = open_store(url), open_transport(url.replace("seen", "queues"))
do(store, "before")
transport.declare("queue")
reading, writing = os.pipe()
if os.fork() == 0:
    os.close(writing)
    os.read(reading, 1)
    sys.exit()
store.close()
transport.close()
import subprocess
subprocess.run([sys.executable, "-c", sys.orig_argv[2].split("# then")[0] + '''
transport = open_transport(url.replace("seen", "queues"))
print([sent.error for sent in publish(transport)], do(open_store(url), "after"), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
''', url])
os.close(writing)
os.wait()
"""
    url = f"sqlite:///{tmp_path}/seen.db"
    assert run("# then" + code, url) == "[''] [Applied()]\n"
    store, transport = open_store(url), open_transport(f"sqlite:///{tmp_path}/queues.db")
    assert isinstance(store.apply([Get("after")])[0], Done)
    assert transport.depth("queue") == 1
    store.close()
    transport.close()


# ------------------------------------------------------------------ another file under its name


def remove(path: Path) -> None:
    for end in ("", "-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)


def do(store: Any, key: str) -> Any:
    [claim] = store.apply([Claim(key)])
    return store.apply([Complete(key, claim.token)])[0]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_store_whose_file_is_gone_says_so_and_does_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, replaced: bool
) -> None:
    """Else two processes would run the same keys, each in its own file."""
    path = tmp_path / "seen.db"
    store = SqliteStore(str(path), retention=60.0, session_ttl=1.5)
    assert do(store, "a") == Applied()
    assert store.fresh()
    assert store.recall("a") is not None
    remove(path)
    if replaced:
        run('do(open_store(url), "other")', f"sqlite:///{path}")
    assert not store.fresh()
    assert store.recall("a") is None
    calls: list[Callable[[], Any]] = [
        lambda: store.apply([Claim("b")]),
        lambda: store.apply([Claim("a")]),
        lambda: store.transaction(lambda _: None, 1.0),
        lambda: store.letters(1),
        lambda: store.sent([1]),
        lambda: store.scan(),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=r"seen\.db was deleted or replaced under this process"):
            call()
    assert path.exists() is replaced
    with caplog.at_level(logging.ERROR):
        store.close()


def test_a_heartbeat_finds_out_that_the_file_is_gone(tmp_path: Path) -> None:
    """So what is answered from memory, without a look at the file, is so for a third of the session."""
    path = tmp_path / "seen.db"
    store = SqliteStore(str(path), retention=60.0, session_ttl=1.5)
    do(store, "a")
    path.rename(tmp_path / "away.db")
    for _ in range(100):
        if store.recall("a") is None:
            break
        threading.Event().wait(0.1)
    assert store.recall("a") is None
    # Nobody knows what others did meanwhile.
    (tmp_path / "away.db").rename(path)
    assert not store.fresh()
    with pytest.raises(ConfigError, match="was deleted or replaced"):
        store.apply([Claim("b")])
    store.close()


def test_the_old_process_leaves_the_new_file_alone(tmp_path: Path) -> None:
    """When it ends, the new file's log stays, with what is only there."""
    url = f"sqlite:///{tmp_path}/seen.db"
    old = open_store(url)
    do(old, "a")
    remove(tmp_path / "seen.db")
    run("do(open_store(url), 'b'); os.kill(os.getpid(), signal.SIGKILL)", url, killed=True)
    old.close()
    new = open_store(url)
    assert isinstance(new.apply([Get("b")])[0], Done)
    new.close()


def test_a_process_that_goes_elsewhere_still_finds_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a daemon does."""
    monkeypatch.chdir(tmp_path)
    store = open_store("sqlite:///seen.db")
    store.apply([])
    monkeypatch.chdir("/")
    assert store.fresh()
    assert do(store, "a") == Applied()
    store.close()


def test_a_consumer_whose_store_was_replaced_ends_with_a_sentence(tmp_path: Path) -> None:
    """No message is run or acknowledged after it."""
    path, ran = tmp_path / "seen.db", []
    store = open_store(f"sqlite:///{path}")
    broker = open_transport(f"sqlite:///{tmp_path}/queues.db")
    transport = open_transport(f"sqlite:///{tmp_path}/queues.db")
    consumer = Consumer(transport, service="orders")

    @consumer.on("new_order")
    @idempotent(store, name="orders.new_order")
    def new_order(message: Message) -> None:
        ran.append(message.id)
        remove(path)
        run('do(open_store(url), "other")', f"sqlite:///{path}")

    broker.declare("orders-queue", "events", "#")
    bodies = [f'{{"type": "new_order", "id": "{n}", "args": {{}}}}'.encode() for n in range(2)]
    broker.send([Publication(body, Properties(), "events", "new_order") for body in bodies])
    broker.poll(1.0)
    with pytest.raises(ConfigError, match="was deleted or replaced under this process"):
        consumer.run()
    assert ran == ["0"]
    transport.close()
    assert broker.depth("orders-queue") == 2
    broker.close()
    store.close()


def test_a_broker_whose_file_was_replaced_is_opened_anew(tmp_path: Path) -> None:
    """What is confirmed is where others look."""
    path = tmp_path / "queues.db"
    transport = open_transport(f"sqlite:///{path}")
    transport.declare("queue")
    remove(path)
    transport.send([Publication(b"", Properties(), "", "queue")])
    for _ in range(2):
        with pytest.raises(TransportUnavailable, match=r"queues\.db was deleted or replaced"):
            transport.poll(0.0)
    transport.connect()
    transport.declare("queue")
    transport.send([Publication(b"", Properties(), "", "queue")])
    assert [came.error for came in transport.poll(1.0) if isinstance(came, Sent)] == [""]
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM message").fetchone() == (1,)
    transport.close()
    assert os.listdir(tmp_path) == ["queues.db"]
