"""Replay: the plan is the stores', the messages run once, and a kill anywhere loses nothing.  Row U13."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from idemp import (
    Consumer,
    Message,
    PermanentFailure,
    idempotent,
    open_event_log,
    open_store,
    open_transport,
    publish,
)
from idemp.cli.options import store_at
from idemp.deeds import read
from idemp.errors import ConfigError
from idemp.message import Properties
from idemp.ports import (
    Abandon,
    Batch,
    Claim,
    Claimed,
    Complete,
    Delivery,
    Event,
    Free,
    Get,
    Park,
    Parked,
    Publication,
    Query,
    Store,
)
from idemp.tracking import replay
from idemp.tracking.tracker import pack, tracking
from tests.service import ROOT, Stand, environment, finished, stand, until
from tests.test_tracking import service, to

BILLING = """
import sqlite3, sys, time
from idemp import *

url, store_url, log_url, effects, name, other, seconds = sys.argv[1:]
db = sqlite3.connect(effects, isolation_level=None, check_same_thread=False, timeout=30)
db.execute("CREATE TABLE IF NOT EXISTS effect (service TEXT, id TEXT)")
out = open_transport(url)
consumer = Consumer(open_transport(url), service=name, tracking=open_event_log(log_url), prefetch=20)

def look(message):
    found = db.execute("SELECT 1 FROM effect WHERE service = ? AND id = ?", (name, message.id)).fetchone()
    return Happened() if found else NotHappened()

@consumer.on("order")
@idempotent(open_store(store_url), name=f"{name}.order", in_doubt=look)
def order(message):
    time.sleep(float(seconds))
    if other != "-":
        child = Message(f"{message.id}-paid", "order", {})
        from idemp.ports import Publication
        publish(out, [Publication(child.encode(), child.properties(), "", f"{other}-queue")])
    db.execute("INSERT INTO effect VALUES (?, ?)", (name, message.id))

consumer.run(ready=lambda: print(f"{name}: ready", flush=True))
"""


@pytest.fixture
def desk(amqp_url: str, tmp_path: Path) -> Iterator[Stand]:
    with stand(amqp_url, tmp_path) as built:
        yield built


def run(desk: Stand, *arguments: str, **settings: str) -> tuple[int, list[Any], str]:
    """Exit code, JSON lines, stderr."""
    told = {"IDEMP_TRANSPORT": desk.url, "IDEMP_TRACKING": f"sqlite:///{desk.folder}/events.db", **settings}
    done = finished("-m", "idemp", "replay", *arguments, "--json", settings=told)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def plan_of(rows: Sequence[Any]) -> dict[str, str]:
    return {row["key"]: row["plan"] for row in rows}


# ------------------------------------------------------------------ the whole story


def test_u13_killed_in_the_middle_planned_and_replayed_twice(desk: Stand, unique: str) -> None:
    """U13: a service is killed and its queue lost; what the store says happens; nothing runs twice."""
    names = [f"{unique}-{name}" for name in ("billing", "post", "ledger")]
    effects = desk.folder / "effects.db"
    log_url = f"sqlite:///{desk.folder}/events.db"
    stores = {name: f"sqlite:///{desk.folder}/{name}.db?session=2s" for name in names}

    def start(place: int, seconds: float) -> Any:
        name, other = names[place], [*names, "-"][place + 1]
        arguments = ("-c", BILLING, desk.url, stores[name], log_url, str(effects), name, other, str(seconds))
        return desk.service(name, *arguments)

    def count(name: str) -> list[int]:
        with closing(sqlite3.connect(effects, timeout=30)) as db:
            rows = db.execute("SELECT count(*), count(DISTINCT id) FROM effect WHERE service = ?", (name,))
            return list(rows.fetchone())

    # Given: a chain of three, whose first was killed at work and lost what waited
    n = 300
    programs = [start(place, 0.01 if place == 0 else 0.0) for place in range(3)]
    orders = [Message(f"o{i}", "order", {"n": i}) for i in range(n)]
    with closing(open_event_log(log_url)) as log, closing(open_transport(desk.url)) as out:
        with tracking(log, "shop"):
            publish(out, to(f"{names[0]}-queue", *orders))
        until(lambda: count(names[0])[0] >= n // 3, lambda: count(names[0]))
        programs[0].stop(signal.SIGKILL)
    until(lambda: desk.depth(f"{names[0]}-queue") > 0, lambda: "no queue")
    with closing(open_transport(desk.url)) as out:
        out.consume(f"{names[0]}-queue", 10_000)
        while lost := [event for event in out.poll(1.0) if isinstance(event, Delivery)]:
            out.ack([each.tag for each in lost])

    # When: it is planned, from the event log, from a file, and from a file with the log emptied
    choice = ("--type", "order", "--to", names[0], "--store", stores[names[0]])
    file = desk.folder / "orders.jsonl"
    file.write_bytes(b"\n".join(order.encode() for order in orders))
    from_file = ("--file", str(file), "--to", names[0], "--store", stores[names[0]])
    until(lambda: "busy" not in plan_of(run(desk, *from_file, "--dry-run")[1]).values(), lambda: "still busy")
    _, rows, _ = run(
        desk, *(part for order in orders[:3] for part in ("--id", order.id)), *choice, "--dry-run"
    )
    assert len(rows) == 3
    first = plan_of(run(desk, "--conversation", orders[0].id, *choice, "--dry-run")[1])
    _, rows, _ = run(desk, "--since", "1h", *choice, "--dry-run")
    planned = {key: verdict for key, verdict in plan_of(rows).items() if not key.endswith("-paid")}
    assert first.items() <= plan_of(rows).items()
    with closing(sqlite3.connect(desk.folder / "events.db", timeout=30)) as db:
        db.executescript("DELETE FROM event; DELETE FROM edge;")
    emptied = plan_of(run(desk, *from_file, "--dry-run")[1])
    assert emptied == planned
    verdicts = Counter(emptied.values())
    assert sum(verdicts.values()) == n
    assert verdicts["done"] >= n // 3 - 1
    assert verdicts["run"] > 0
    assert verdicts.keys() <= {"done", "run", "doubt"}

    # Then: it runs what is missing, and the second time nothing
    start(0, 0.0)
    for ran in (n - verdicts["done"], 0):
        code, rows, err = run(desk, *from_file, "--yes")
        assert code == 0, err
        assert (rows[-1]["sent"], rows[-1]["left"], rows[-1]["ran"]) == (n, 0, ran)
        assert (
            Counter(row["outcome"] for row in rows[:-1])
            == Counter({"ok": ran, "skipped": n - ran}) - Counter()
        )
    for name in names:
        until(lambda name=name: count(name)[1] == n, lambda name=name: count(name))  # type: ignore[misc]
        assert count(name) == [n, n]


def test_u13_a_killed_replay_goes_on(desk: Stand, unique: str, tmp_path: Path) -> None:
    """U13: killed while it releases: the rest is still staged, and resumed; each ran once."""
    ran: list[str] = []
    n = 200
    with service(desk.url, tmp_path, unique, {"order": lambda message, _: ran.append(message.id)}):
        orders = tmp_path / "orders.jsonl"
        orders.write_bytes(b"\n".join(Message(f"{i}", "order").encode() for i in range(n)))
        arguments = ["--file", str(orders), "--to", unique, "--yes", "--rate", "100"]
        store = f"sqlite:///{tmp_path}/{unique}.db?session=1s"
        process = subprocess.Popen(
            [sys.executable, "-m", "idemp", "replay", *arguments, "--json", "--store", store],
            cwd=ROOT,
            env=environment({"IDEMP_TRANSPORT": desk.url}),
        )
        until(lambda: len(ran) >= 20, lambda: ran)
        process.kill()
        process.wait()
        with store_at(store) as opened:
            [deed] = list(read(opened))
        assert deed.about is not None
        name = deed.about["replay"]
        until(lambda: desk.depth(replay.staging(name)) > 0, lambda: "nothing staged")
        code, rows, err = run(desk, "--resume", name, "--store", store)
        assert code == 0, err
        assert rows[-1]["left"] == 0
        until(lambda: len(ran) == n, lambda: len(ran))
        assert len(set(ran)) == n
        code, _, err = run(desk, "--resume", name, "--store", store)
        assert (code, err) == (2, f"idemp: replay {name} has nothing staged\n")


def test_ctrl_c_leaves_the_rest_staged_and_cancel_drops_it(desk: Stand, unique: str, tmp_path: Path) -> None:
    """It says how to go on; what was sent is told."""
    ran: list[str] = []
    with service(desk.url, tmp_path, unique, {"order": lambda message, _: ran.append(message.id)}):
        orders = tmp_path / "orders.jsonl"
        orders.write_bytes(b"\n".join(Message(f"{i}", "order").encode() for i in range(500)))
        arguments = ["--file", str(orders), "--to", unique, "--yes", "--rate", "50"]
        arguments += ["--store", f"sqlite:///{tmp_path}/{unique}.db"]
        process = subprocess.Popen(
            [sys.executable, "-m", "idemp", "replay", *arguments],
            cwd=ROOT,
            env=environment({"IDEMP_TRANSPORT": desk.url}),
            stdout=subprocess.PIPE,
            text=True,
        )
        until(lambda: len(ran) >= 10, lambda: ran)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "are still staged: idemp replay --resume " in out
        name = out.strip().rpartition("--cancel ")[2]
        code, rows, _ = run(desk, "--cancel", name)
        assert code == 0
        assert rows[0]["back_to_dead"] == 0
        assert rows[0]["dropped"] + len(ran) == 500
        assert desk.depth(replay.staging(name)) == 0


def test_u13_dead_letters_are_set_free_and_run(desk: Stand, unique: str, tmp_path: Path) -> None:
    """U13: moved out of the dead-letter queue, never lost; cancelled, they are there again."""
    mended = tmp_path / "mended"

    def handle(message: Message, _: Any) -> None:
        if not mended.exists():
            raise PermanentFailure("no customer")

    store = f"sqlite:///{tmp_path}/{unique}.db"
    queue = f"{unique}-queue"
    with service(desk.url, tmp_path, unique, {"order": handle}):
        desk.publish(*(Message(str(i), "order") for i in range(5)), to=queue)
        until(lambda: desk.depth(f"{queue}.dead") == 5, lambda: desk.depth(f"{queue}.dead"))
        _, rows, _ = run(desk, "--dead", queue, "--dry-run", "--store", store)
        assert Counter(row["plan"] for row in rows) == {"parked": 5}
        assert desk.depth(f"{queue}.dead") == 5

        # When one is staged and then given up
        with closing(open_store(store)) as opened, closing(open_transport(desk.url)) as broker:
            staged = replay.Desk(broker)
            found = [each for each in replay.from_dead(staged, queue) if each.uuid == "3"]
            planned = replay.plan(found, lambda _: opened, time.time())
            assert (
                replay.stage(staged, planned, replay.Mark("r1" + unique, "", time.time(), f"{queue}.dead"))
                == 1
            )
        until(lambda: desk.depth(f"{queue}.dead") == 4, lambda: desk.depth(f"{queue}.dead"))
        assert run(desk, "--cancel", "r1" + unique)[1][0]["back_to_dead"] == 1

        # Then all five are there, and run
        mended.touch()
        until(lambda: desk.depth(f"{queue}.dead") == 5, lambda: desk.depth(f"{queue}.dead"))
        code, rows, err = run(desk, "--dead", queue, "--yes", "--store", store)
        assert code == 0, err
        assert (rows[-1]["sent"], rows[-1]["ran"]) == (5, 5)
        assert desk.depth(f"{queue}.dead") == 0
    with closing(open_event_log(f"sqlite:///{tmp_path}/events.db")) as log:
        replayed = [event for event in log.find(Query(kinds=("ok",)), limit=100) if event.replay]
        assert {event.replay for event in replayed} == {rows[-1]["replay"]}


def test_a_replay_goes_to_the_queue_and_not_to_the_others(desk: Stand, unique: str, tmp_path: Path) -> None:
    """Two receivers of one event; the one that is asked for gets it, marked, with the same id."""
    ran: Counter[tuple[str, str]] = Counter()
    mine, other = f"{unique}-a", f"{unique}-b"
    with (
        service(desk.url, tmp_path, mine, {"order": lambda m, _: ran.update([("a", m.id)])}, exchange=unique),
        service(
            desk.url, tmp_path, other, {"order": lambda m, _: ran.update([("b", m.id)])}, exchange=unique
        ),
        closing(open_transport(desk.url)) as out,
    ):
        message = Message("1", "order")
        publish(out, [Publication(message.encode(), message.properties(), unique, "x")])
        until(lambda: len(ran) == 2, lambda: ran)
        with closing(open_event_log(f"sqlite:///{tmp_path}/events.db")) as log:
            until(lambda: len(log.find(Query(), limit=9)) == 2, lambda: log.find(Query(), limit=9))
            stores = [f"--store={name}=sqlite:///{tmp_path}/{name}.db" for name in (mine, other)]
            _, rows, _ = run(desk, "--id", "1", "--dry-run", *stores)
            assert {(row["service"], row["plan"]) for row in rows} == {(mine, "done"), (other, "done")}
            code, rows, _ = run(desk, "--id", "1", "--to", mine, "--yes", *stores)
            assert (code, rows[-1]["skipped"], rows[-1]["ran"]) == (0, 1, 0)
            until(lambda: len(log.find(Query(), limit=9)) == 3, lambda: log.find(Query(), limit=9))
            skipped = log.find(Query(kinds=("skipped",)), limit=9)
            assert [(each.uuid, each.service, each.replay) for each in skipped] == [
                ("1", mine, rows[-1]["replay"])
            ]
    assert set(ran.values()) == {1}


# ------------------------------------------------------------------ who may be replayed


@pytest.mark.parametrize(
    ("how", "confirmed", "runs"),
    [
        ("safe", False, 1),
        ("confirm", False, 0),
        ("confirm", True, 1),
        ("never", True, 0),
        (None, False, 0),
        (None, True, 1),
    ],
)
def test_the_receiver_enforces_who_may_be_replayed(
    desk: Stand, unique: str, tmp_path: Path, how: str | None, confirmed: bool, runs: int
) -> None:
    """Whatever the operator says: what it does not take is rejected, and kept as a dead letter."""
    ran: list[str] = []
    broker = open_transport(desk.url)
    store = open_store(f"sqlite:///{tmp_path}/seen.db")
    consumer = Consumer(broker, service=unique)

    def order(message: Message) -> None:
        ran.append(message.id)

    once = idempotent(store, name=f"{unique}.order", replay=how) if how else lambda handler: handler
    consumer.on("order")(once(order))
    ready = threading.Event()
    thread = threading.Thread(target=lambda: consumer.run(ready=ready.set))
    thread.start()
    assert ready.wait(30)
    headers: dict[str, Any] = {"x-replay-id": "r"} | ({"x-replay-confirmed": "me"} if confirmed else {})
    properties = Properties("1", "order", headers=headers)
    desk.publish(Message("1", "order").encode(), to=f"{unique}-queue", properties=properties)
    until(lambda: len(ran) + desk.depth(f"{unique}-queue.dead") == 1, lambda: ran)
    consumer.stop()
    thread.join(30)
    for each in (broker, store):
        each.close()
    assert len(ran) == runs
    # The plan says the same before.
    found = [
        replay.item(Message("2", "order").encode(), Properties(), unique, lambda *_: f"{unique}.order/2")
    ]
    with closing(open_store("memory://")) as empty:
        [planned] = replay.plan(
            found, lambda _: empty, time.time(), handlers={unique: consumer.policies()}, confirmed=confirmed
        )
    assert (planned.verdict in replay.SENDS) == bool(runs), planned


# ------------------------------------------------------------------ the plan


def hold(store: Store, key: str) -> int:
    [claim] = store.apply([Claim(key)])
    assert isinstance(claim, Claimed)
    return claim.token


def test_a_plan_says_what_the_store_says() -> None:
    """Each state of a key; what may have expired, and what nobody kept."""
    with closing(open_store("memory://?retention=100s")) as store:
        store.apply([Complete("s.t/done", hold(store, "s.t/done"))])
        store.apply([Abandon("s.t/doubt", hold(store, "s.t/doubt"))])
        store.apply([Park("s.t/parked", hold(store, "s.t/parked"), "broken")])
        hold(store, "s.t/busy")
        names = replay.names_of({})
        made = [
            replay.item(Message(id, "t").encode(), Properties(timestamp=at), "s", names)
            for id, at in (
                ("done", 1.0),
                ("doubt", 1.0),
                ("parked", 1.0),
                ("busy", 1.0),
                ("new", 950.0),
                ("old", 800.0),
                ("ageless", None),
            )
        ]
        made += [made[0], replay.item(b"no JSON", Properties("odd"), "s", names)]
        made.append(replay.Item("gone", "t", "s", "", None, Properties(), None))
        planned = {each.item.uuid: each.verdict for each in replay.plan(made, lambda _: store, 1000.0)}
        forced = {
            each.item.uuid: each.verdict for each in replay.plan(made, lambda _: store, 1000.0, force=True)
        }
    assert planned == {
        "done": "done",
        "doubt": "doubt",
        "parked": "parked",
        "busy": "busy",
        "new": "run",
        "old": "expired",
        "ageless": "run",
        "odd": "unknown",
        "gone": "no body",
    }
    assert forced == {**planned, "old": "run"}


def test_what_was_done_is_as_old_as_it_is(tmp_path: Path) -> None:
    """Its record may be gone when its copy comes, which is not younger for having been replayed."""
    url = f"sqlite:///{tmp_path}/queues.db"
    ran: list[str] = []
    with closing(open_store("memory://?retention=2s")) as store, closing(open_transport(url)) as broker:
        consumer = Consumer(open_transport(url), service="s")

        @consumer.on("t")
        @idempotent(store, name="s.t")
        def handle(message: Message) -> None:
            ran.append(message.id)

        broker.declare("s-queue")
        store.apply([Complete("s.t/done", hold(store, "s.t/done"))])
        made = [
            replay.item(Message(id, "t").encode(), Properties(timestamp=at), "s", replay.names_of({}))
            for id, at in (("done", time.time()), ("new", time.time()))
        ]
        now = time.time()
        planned = replay.plan(made, lambda _: store, now)
        assert [each.verdict for each in planned] == ["done", "run"]
        replay_desk = replay.Desk(broker)
        replay.stage(replay_desk, planned, replay.Mark("r", "", now + 3600))
        assert replay.release(replay_desk, "r") == 2
        until(lambda: isinstance(store.apply([Get("s.t/done")])[0], Free), lambda: "it is kept")
        until(lambda: time.time() > now + 3, lambda: "")
        thread = threading.Thread(target=consumer.run)
        thread.start()
        until(lambda: len(ran) + broker.depth("s-queue.dead") == 2, lambda: ran)
        consumer.stop()
        thread.join(30)
        parked = store.apply([Get("s.t/done")])[0]
        assert isinstance(parked, Parked)
        assert "older than the retention" in parked.reason
    assert ran == ["new"]


def test_who_is_known_speaks_for_itself_only() -> None:
    """Keys and refusals of one receiver are not those of another that takes the same type."""
    log_of = {"notify": Message("1", "t"), "orders": Message("1", "t")}
    with closing(open_store("memory://")) as store:
        consumer = Consumer(open_transport("memory://nobody"), service="orders")

        @consumer.on("t")
        @idempotent(store, name="orders.by_number", key="message.id", replay="never")
        def handle(message: Message) -> None:
            raise AssertionError(message)

        handlers = {"orders": consumer.policies()}
        names = replay.names_of(handlers)
        made = [replay.item(each.encode(), Properties(), service, names) for service, each in log_of.items()]
        assert [each.key for each in made] == ["notify.t/1", "orders.by_number/1"]
        verdicts = {
            each.item.service: each.verdict
            for each in replay.plan(made, lambda _: store, 0.0, handlers=handlers)
        }
    assert verdicts == {"notify": "run", "orders": "never"}


def event(uuid: str, kind: str, service: str, at: float, **more: Any) -> Event:
    stored = pack(Properties(uuid, "t"), "", more.get("queue", ""))
    return Event(uuid, kind, service, at, type="t", properties=stored, **more)


def test_a_message_goes_to_whom_it_was_sent(tmp_path: Path) -> None:
    """Not to all who take its type, also where only what was sent is chosen."""
    with closing(open_event_log(f"sqlite:///{tmp_path}/events.db")) as log:
        now = time.time()
        sent = (("A", "eu-queue"), ("B", "us-queue"), ("C", "us-queue"), ("D", ""))
        told = [event(id, "sent", "shop", now, role="sender", queue=queue, body="{}") for id, queue in sent]
        took = (("A", "eu"), ("B", "us"))
        told += [event(id, "ok", name, now + 1, role="receiver", body="{}") for id, name in took]
        log.append(Batch("w", 1, told))
        query = Query(service="shop")
        found = replay.from_events(log, query, (), replay.names_of({}), most=100)
        with pytest.raises(ConfigError, match="these are 4 events or more; choose fewer"):
            replay.from_events(log, query, (), replay.names_of({}), most=4)
    assert [(each.uuid, each.service) for each in found] == [
        ("A", "eu"),
        ("B", "us"),
        ("C", "us"),
        ("D", "eu"),
        ("D", "us"),
    ]


def test_what_came_in_conflict_is_not_the_message(tmp_path: Path) -> None:
    """Of two bodies with one id it is the one that took effect, whatever was chosen."""
    good, bad = '{"cents": 500}', '{"cents": 999}'
    with closing(open_event_log(f"sqlite:///{tmp_path}/events.db")) as log:
        now = time.time()
        told = [
            event("1", "ok", "pay", now, role="receiver", body=good),
            event("1", "conflict", "pay", now + 1, role="receiver", body=bad),
            event("1", "skipped", "pay", now + 2, role="receiver"),
            event("2", "conflict", "pay", now + 3, role="receiver", body=bad),
        ]
        log.append(Batch("w", 1, told))
        names = replay.names_of({})
        for kinds in ((), ("skipped",), ("conflict",)):
            found = replay.from_events(log, Query(service="pay", kinds=kinds), (), names, most=100)
            assert {each.uuid: each.body for each in found}.get("1", good.encode()) == good.encode()
            assert {each.uuid: each.body for each in found}.get("2") is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Choose: --id, --conversation"),
        (("--dead", "q", "--file", "pyproject.toml"), "Say --dead or --file."),
        (("--file", "pyproject.toml"), "Say --to, for a file"),
        (("--id", "1", "--rate", "0"), "--rate"),
        (("--id", "1", "--tracking", "sqlite:////nowhere/e.db"), "there is no event log"),
        (("--file", "pyproject.toml", "--to", "s"), "name the store of s: --store s=URL"),
        (("--resume", "nobody"), "replay nobody has nothing staged"),
        (("--id", "1", "--consumer", "svc:nothing"), "svc has no nothing"),
    ],
)
def test_errors_are_one_sentence(desk: Stand, arguments: Sequence[str], said: str) -> None:
    """With exit code 2, and nothing sent."""
    with closing(open_event_log(f"sqlite:///{desk.folder}/events.db")) as log:
        log.find(Query(), limit=1)
    code, rows, err = run(desk, *arguments)
    assert (code, rows) == (2, []), err
    assert said in err
    assert err.count("\n") == 1
