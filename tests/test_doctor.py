"""Doctor: every fault that is planted is found, with evidence and fix; where all is well nothing is."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pika
import psycopg
import pytest

from idemp import Message, open_store, open_transport
from idemp.cli.doctor import horizon
from idemp.findings import Finding
from idemp.graphite import Series, examine, examine_files, examine_statsd, regular
from idemp.ports import Claim, Claimed, Clock, Complete, Delivery
from idemp.stores import (
    etcd_doctor,
    etcd_health,
    etcd_of,
    postgresql_doctor,
    postgresql_of,
    redis_doctor,
    redis_of,
)
from idemp.stores.etcd_client import Client, NoSpace
from idemp.stores.sqlite_doctor import examine as examine_sqlite
from idemp.transports.rabbitmq_doctor import Management
from tests.servers import Etcd, Graphite, PostgreSQL, RabbitMQ, Redis, Statsd, need
from tests.servers.ports import free_port
from tests.service import Stand, finished, stand, until

ROOT = Path(__file__).resolve().parent.parent


def doctor(*arguments: str, code: int | None = 0, **settings: str) -> list[dict[str, Any]]:
    """The findings that are faults, and the exit code is as it should be."""
    done = finished("-m", "idemp", "doctor", "--json", *arguments, settings=settings)
    assert done.returncode in ((0, 1) if code is None else (code,)), done
    found = json.loads(done.stdout)
    faults = [each for each in found["findings"] if each["fault"]]
    assert found["faults"] == len(faults)
    assert done.returncode == bool(faults)
    assert all(each["evidence"] and each["fix"] for each in found["findings"])
    return faults


# ------------------------------------------------------------------ RabbitMQ


@pytest.fixture(scope="module")
def broker() -> Iterator[RabbitMQ]:
    """One with its management API."""
    need("rabbitmq")
    with RabbitMQ(management=True) as running:
        yield running


@pytest.fixture
def desk(broker: RabbitMQ, tmp_path: Path) -> Iterator[Stand]:
    """A vhost of its own, so that one test's faults are not the other's."""
    vhost = tmp_path.name
    api = Management(broker.management_url, "")
    _put(api, f"vhosts/{vhost}", {})
    _put(api, f"permissions/{vhost}/guest", {"configure": ".*", "write": ".*", "read": ".*"})
    with stand(f"{broker.url}{vhost}", tmp_path) as built:
        yield built


def _put(api: Management, path: str, body: object) -> None:
    import urllib.request

    request = urllib.request.Request(
        f"{api._base}/{path}",
        json.dumps(body).encode(),
        {"Authorization": api._login, "Content-Type": "application/json"},
        method="PUT",
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    direct.open(request, timeout=10).close()


Look = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def look(broker: RabbitMQ, desk: Stand, unique: str) -> Look:
    """`doctor` on the service ``unique``."""

    def looked(*more: str, code: int | None = None) -> list[dict[str, Any]]:
        management = ("--management", broker.management_url)
        return doctor("--transport", desk.url, "--service", unique, *management, *more, code=code)

    return looked


@contextmanager
def connected(desk: Stand) -> Iterator[Any]:
    """A channel of pika's."""
    with pika.BlockingConnection(pika.URLParameters(desk.url)) as connection:
        yield connection.channel()


def found(look: Look, what: str, evidence: str) -> None:
    """The fault is found, perhaps some seconds later: the API's figures are so old."""
    seen: list[Any] = []

    def there() -> bool:
        seen[:] = look()
        return any(what in each["what"] and evidence in each["evidence"] for each in seen)

    until(there, lambda: seen)


def test_a_good_stack(look: Look, desk: Stand, unique: str) -> None:
    """A service that runs, on a store that keeps ids for a day: nothing."""
    desk.service(unique, IDEMP_STORE=desk.store)
    desk.publish(Message("1", "new_order"))
    desk.counted(**{f"{unique}_new_order_ok": 1})
    assert look("--store", desk.store, "--statsd", _heard(desk), code=0) == []


def _heard(desk: Stand) -> str:
    return desk.statsd.address


def test_no_queue(look: Look) -> None:
    """The service never ran here."""
    assert [each["what"] for each in look()] == ["there is no such queue"]


def test_nobody_consumes(look: Look, desk: Stand, unique: str) -> None:
    """It ran once, and does not now; messages wait."""
    assert desk.service(unique).stop() == 0
    desk.publish(Message("1", "new_order"), Message("2", "new_order"))
    [fault] = look()
    assert (fault["what"], fault["evidence"]) == (
        "nobody consumes it",
        "2 messages are ready, and 0 consumers",
    )
    assert fault["fix"] == f"start the service: SERVICE_NAME={unique} python -m svc"


def test_no_dead_letter_queue(look: Look, desk: Stand, unique: str) -> None:
    """Somebody deleted it."""
    desk.service(unique)
    with connected(desk) as channel:
        channel.queue_delete(f"{unique}-queue.dead")
    found(look, "the dead-letter path is broken", f"does not know {unique}-queue.dead")


def test_no_binding(look: Look, desk: Stand, unique: str) -> None:
    """Somebody unbound it."""
    desk.service(unique)
    with connected(desk) as channel:
        channel.queue_unbind(f"{unique}-queue", "events", "#")
    found(look, "no event reaches it", "none from 'events'")


@pytest.mark.parametrize(
    ("definition", "what", "evidence"),
    [
        ({"message-ttl": 60000}, "the queue drops messages unseen", "policy 'theirs': message-ttl=60000"),
        ({"max-length": 10}, "the queue drops messages unseen", "policy 'theirs': max-length=10"),
        ({"dead-letter-exchange": "gone"}, "path leads nowhere", "dead-letter-exchange=gone"),
    ],
)
def test_a_policy_of_somebody_else(
    look: Look, broker: RabbitMQ, desk: Stand, unique: str, definition: Any, what: str, evidence: str
) -> None:
    """One that drops messages, or sends them where nothing is."""
    desk.service(unique)
    api = Management(broker.management_url, urlsplit(desk.url).path)
    policy = {"pattern": f"^{unique}-queue$", "definition": definition, "apply-to": "queues"}
    _put(api, f"policies/{api.vhost}/theirs", policy)
    found(look, what, evidence)


def test_a_delivery_limit(look: Look, desk: Stand, unique: str) -> None:
    """A quorum queue that drops what it delivered three times."""
    with connected(desk) as channel:
        arguments = {"x-queue-type": "quorum", "x-delivery-limit": 3}
        channel.queue_declare(f"{unique}-queue", durable=True, arguments=arguments)
    found(look, "what is redelivered too often is dropped", "delivery-limit=3")


@pytest.mark.parametrize(
    ("no_ack", "what", "evidence"),
    [
        (False, "one consumer takes the whole queue into its memory", "prefetch 0"),
        (True, "a crash loses messages", "acknowledges before it has worked"),
    ],
)
def test_a_consumer_of_somebody_else(
    look: Look, desk: Stand, unique: str, no_ack: bool, what: str, evidence: str
) -> None:
    """Without a prefetch, without acknowledgements."""
    assert desk.service(unique).stop() == 0
    with connected(desk) as channel:
        channel.basic_consume(f"{unique}-queue", lambda *_: None, auto_ack=no_ack)
        found(look, what, evidence)


def test_a_publisher_without_confirms(look: Look, desk: Stand, unique: str) -> None:
    """It does not know what the broker lost."""
    desk.service(unique)
    with connected(desk) as channel:
        seen: list[Any] = []

        def there() -> bool:
            channel.basic_publish("", f"{unique}-queue", b"{}")
            channel.connection.process_data_events()
            seen[:] = look()
            return any("publishes without confirms" in each["what"] for each in seen)

        until(there, lambda: seen)


def test_messages_older_than_the_retention(look: Look, desk: Stand, unique: str) -> None:
    """They will be parked, not run: said before it happens, where the publisher told the time."""
    assert desk.service(unique, IDEMP_STORE=f"{desk.store}?retention=1h").stop() == 0
    desk.publish(Message("1", "new_order", published=time.time() - 7200))
    seen: list[Any] = []

    def there() -> bool:
        seen[:] = look("--store", desk.store)
        return any("older than the retention wait" in each["what"] for each in seen)

    until(there, lambda: seen)


def test_without_the_management_api(rabbitmq: RabbitMQ, tmp_path: Path, unique: str) -> None:
    """What AMQP tells is told; that the rest was not looked at is a note, with the way to have it."""
    with stand(rabbitmq.url, tmp_path) as desk:
        desk.service(unique)
        done = finished("-m", "idemp", "doctor", "--transport", desk.url, "--service", unique)
    assert done.returncode == 0, done
    assert "arguments, policies, prefetch and confirms were not looked at" in done.stdout
    assert "rabbitmq-plugins enable rabbitmq_management" in done.stdout
    assert done.stdout.endswith("0 faults, 1 notes; looked at broker\n")
    assert "guest:guest" not in done.stdout


def test_what_was_set_aside_is_a_note(look: Look, desk: Stand, unique: str) -> None:
    """Dead letters are work for a person, no fault of the broker."""
    desk.service(unique)
    desk.publish(b"no JSON")
    desk.counted(**{f"{unique}_rejected": 1})
    until(lambda: desk.depth(f"{unique}-queue.dead") == 1, lambda: desk.depth(f"{unique}-queue.dead"))
    # The API may tell for some seconds that a channel published, and not yet that it asks for confirms.
    until(lambda: look() == [], look)


# ------------------------------------------------------------------ etcd


def _filled(url: str, number: int, size: int = 0) -> None:
    """A namespace with ``number`` batches, each of one id."""
    with closing(open_store(url)) as store:
        for each in range(number):
            [claim] = store.apply([Claim(f"k/{each}")])
            assert isinstance(claim, Claimed)
            store.apply([Complete(f"k/{each}", claim.token, b"1" * size)])


def examined(url: str, clock: Clock | None = None) -> list[Finding]:
    endpoints, connect, namespace = etcd_of(url)
    looked = etcd_doctor.examine(endpoints, connect, namespace, clock or Clock())
    return [each for each in looked.findings if each.fault]


def test_a_good_etcd(etcd: Etcd, unique: str) -> None:
    """Nothing, and the namespace is as it was."""
    _filled(f"{etcd.url}{unique}", 3)
    assert doctor("--store", f"{etcd.url}{unique}") == []


def test_no_namespace(etcd: Etcd, unique: str) -> None:
    """It is said, and not made."""
    for _ in range(2):
        [fault] = doctor("--store", f"{etcd.url}{unique}", code=1)
        assert fault["what"] == f"there is no namespace '{unique}'"


def _fill(client: Client) -> None:
    for number in range(200):
        client.put(f"/fill/{number}", b"x" * 1_000_000)
        time.sleep(0.1)  # it looks at its size now and then


def test_an_etcd_that_is_full() -> None:
    """Alarm and room, with what to type."""
    need("etcd")
    with Etcd(quota_bytes=4 * 1024 * 1024) as etcd:
        _filled(f"{etcd.url}x", 1)
        with closing(Client(etcd.endpoints)) as client, pytest.raises(NoSpace):
            _fill(client)
        faults = doctor("--store", f"{etcd.url}x", code=1)
    assert any("alarm NOSPACE" in each["what"] and "etcdctl defrag" in each["fix"] for each in faults), faults
    assert any("at which it takes nothing more" in each["what"] for each in faults)
    assert all("alarms: NOSPACE" in each["evidence"] for each in faults if "alarm" in each["what"])


def test_an_etcd_that_falls_silent(own_etcd: Etcd, unique: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has answered, and stands still before it has told how it is."""
    url = f"{own_etcd.url}{unique}"
    _filled(url, 1)
    asked = etcd_health.look

    def silent(client: Client, key: str, timeout: float) -> etcd_health.Health | None:
        own_etcd.members[0].pause()
        try:
            return asked(client, key, 0.5)
        finally:
            own_etcd.members[0].resume()

    monkeypatch.setattr("idemp.stores.etcd_doctor.look", silent)
    [fault] = examined(url)
    assert fault.what == "this member answers, but does not tell how it is"
    assert fault.fix == "see its load and its disk, and ask again"


def test_an_etcd_that_is_never_compacted(etcd: Etcd, unique: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first revision can still be read, and there are many."""
    monkeypatch.setattr(etcd_health, "LONG", 10)
    _filled(f"{etcd.url}{unique}", 10)
    [fault] = examined(f"{etcd.url}{unique}")
    assert "has compacted none of its" in fault.what
    assert fault.fix == "start its members with --auto-compaction-retention=1h"


def test_clocks_that_differ(etcd: Etcd, unique: str) -> None:
    """etcd says what time it is; this machine thinks otherwise."""
    _filled(f"{etcd.url}{unique}", 1)
    [fault] = examined(f"{etcd.url}{unique}", Clock(wall=lambda: time.time() - 100))
    assert "the retention goes by clocks" in fault.what
    assert "behind it" in fault.evidence


def test_a_journal_that_outgrows_its_etcd() -> None:
    """A megabyte in two minutes is seven hundred in a day, and a quota of 64 MiB is full before."""
    need("etcd")
    with Etcd(quota_bytes=64 * 1024 * 1024) as etcd:
        _filled(f"{etcd.url}x", 60, 20_000)
        faults = examined(f"{etcd.url}x", Clock(wall=lambda: time.time() + 120))
    [fault] = [each for each in faults if "outgrows" in each.what]
    assert "full are 64 MiB" in fault.evidence


def test_a_member_that_is_down() -> None:
    """The others answer; it is named."""
    need("etcd")
    with Etcd(members=3) as etcd:
        _filled(f"{etcd.url}x", 1)
        etcd.members[0].stop()
        faults = examined(f"{etcd.url}x")
    assert [each.where for each in faults if "does not answer" in each.what] == [f"etcd {etcd.endpoints[0]}"]


# ------------------------------------------------------------------ PostgreSQL and Redis


@pytest.mark.parametrize("kind", ["postgresql", "redis"])
def test_a_good_server(kind: str, request: pytest.FixtureRequest) -> None:
    """Nothing; a namespace that nobody made is said, and not made."""
    url = request.getfixturevalue(kind).database()
    _filled(f"{url}?retention=1h", 3)
    assert doctor("--store", url) == []
    for _ in range(2):
        [fault] = doctor("--store", f"{url}?namespace=nobody", code=1)
        assert fault["what"] == "there is no namespace 'nobody'"


@pytest.mark.parametrize("kind", ["postgresql", "redis"])
def test_a_retention_that_is_too_short_for_the_broker(kind: str, request: pytest.FixtureRequest) -> None:
    """It is read from the server, whatever the URL says."""
    url = request.getfixturevalue(kind).database()
    _filled(f"{url}?retention=60s", 1)
    [fault] = doctor("--store", url, code=1)
    assert fault["evidence"].startswith("ids are kept for 60 s;")


def test_a_postgresql_that_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What undoes what was confirmed, what is not cleaned up, and a clock that is wrong."""
    need("postgresql")
    wrong = dict.fromkeys(("synchronous_commit", "fsync", "full_page_writes", "autovacuum"), "off")
    with PostgreSQL(options={**wrong, "max_connections": "10"}) as server:
        place = postgresql_of(f"{server.url}?unsafe_durability=true")
        _filled(f"{server.url}?unsafe_durability=true", 1)
        server.psql("INSERT INTO idemp_default.migration VALUES (99, now())")
        monkeypatch.setattr(postgresql_doctor, "LONG", 0.0)
        with ExitStack() as open_ones:
            lines = [open_ones.enter_context(psycopg.connect(server.url)) for _ in range(8)]
            for line in lines:
                line.execute("SELECT pg_backend_pid()")
            hung = lines[0].info.backend_pid
            found = postgresql_doctor.examine(place, Clock(wall=lambda: time.time() + 100)).findings
    assert {f"{name} = off" for name in wrong} <= {each.evidence for each in found}
    told = {each.what: each for each in found}
    assert (
        told["its connections are nearly used up; a process of idemp takes up to four"].evidence == "9 of 10"
    )
    assert (
        "ahead of it"
        in told["its clock and this machine's differ, and the retention goes by clocks"].evidence
    )
    assert told["its tables are of another version of idemp"].fix == "upgrade idemp here"
    open_too_long = [each for each in found if each.what.startswith("a transaction stays open")]
    assert f"SELECT pg_terminate_backend({hung})" in [each.fix for each in open_too_long]


def test_a_postgresql_whose_settings_are_in_the_way(postgresql: PostgreSQL) -> None:
    """It takes no writes; and it cuts statements off."""
    url = postgresql.database()
    _filled(url, 1)
    for setting, value, fault in (
        ("default_transaction_read_only", "on", True),
        ("statement_timeout", "9s", False),
        ("statement_timeout", "20s", None),
    ):
        database = url.rpartition("/")[2]
        postgresql.psql(f"ALTER DATABASE {database} SET {setting} = '{value}'")
        found = postgresql_doctor.examine(postgresql_of(url), Clock()).findings
        postgresql.psql(f"ALTER DATABASE {database} RESET ALL")
        told = [(each.evidence, each.fault) for each in found if setting in each.fix]
        assert told == ([] if fault is None else [(f"{setting} = {value}", fault)])


def test_a_postgresql_and_its_replica() -> None:
    """The replica takes no claim; that its primary does not wait for it is a note."""
    need("postgresql")
    with PostgreSQL() as server:
        _filled(server.url, 1)
        server.stop()
        replica = PostgreSQL.copy(server)
        server.start()
        with replica:
            until(
                lambda: server.psql("SELECT count(*) FROM pg_stat_replication") == "1", lambda: "no replica"
            )
            [copied] = postgresql_doctor.examine(postgresql_of(replica.url), Clock()).findings
            [primary] = postgresql_doctor.examine(postgresql_of(server.url), Clock()).findings
    assert (copied.what, copied.fault) == ("it is a replica, which takes no claim", True)
    assert (primary.evidence, primary.fault) == ("1 replicas, none synchronous", False)


def test_a_redis_that_forgets() -> None:
    """Its settings, with what to type; its memory; its clock."""
    need("redis")
    wrong = {"appendonly": "no", "maxmemory-policy": "allkeys-lru"}
    with Redis(options=wrong) as server:
        url = f"{server.url}?unsafe_durability=true"
        _filled(url, 3, 900_000)
        assert server.call("CONFIG", "SET", "maxmemory", str(_used(server) * 11 // 10)) == "OK"
        found = redis_doctor.examine(redis_of(url), Clock(wall=lambda: time.time() - 100)).findings
        told = {each.what: each for each in found}
        assert (
            told["it may forget what it confirmed"].evidence == "appendonly no, maxmemory-policy allkeys-lru"
        )
        fix = told["it may forget what it confirmed"].fix
        for command in fix.removeprefix("redis-cli: ").split("; ")[:2]:
            assert server.call(*command.split()) == "OK"
        assert "MiB are used" in told["its memory is nearly full, and then it takes no claim"].evidence
        assert (
            "behind it"
            in told["its clock and this machine's differ, and the retention goes by clocks"].evidence
        )
        after = redis_doctor.examine(redis_of(url), Clock()).findings
    assert [each.what for each in after] == ["its memory is nearly full, and then it takes no claim"]


def _used(server: Redis) -> int:
    """Bytes."""
    [line] = [line for line in server.call("INFO", "memory").splitlines() if line.startswith("used_memory:")]
    return int(line.split(":")[1])


def test_a_redis_and_its_replica() -> None:
    """The replica takes no claim; that a failover may forget is a note."""
    need("redis")
    with Redis() as server, Redis(options={"replicaof": f"127.0.0.1 {server.port}"}) as replica:
        _filled(server.url, 1)
        until(lambda: "state=online" in server.call("INFO", "replication"), lambda: "no replica")
        [primary] = redis_doctor.examine(redis_of(server.url), Clock()).findings
        copied = redis_doctor.examine(redis_of(replica.url), Clock()).findings
    assert (primary.evidence, primary.fault) == ("1 replicas", False)
    assert "it is a replica, which takes no claim" in [each.what for each in copied]


# ------------------------------------------------------------------ SQLite


def test_a_good_sqlite(tmp_path: Path) -> None:
    """A store and a broker, while they are in use and afterwards."""
    store, queues = f"sqlite:///{tmp_path}/seen.db", f"sqlite:///{tmp_path}/queues.db"
    with stand(queues, tmp_path) as desk:
        desk.service("orders", IDEMP_STORE=store)
        assert doctor("--store", store, "--transport", queues, SERVICE_NAME="orders") == []
    assert doctor("--store", store, "--transport", queues) == []


# ------------------------------------------------------------------ brokers without a management API


@pytest.fixture(params=["sqlite", "redis"])
def embedded(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[Stand]:
    """The broker in a file, and Redis Streams."""
    url = f"sqlite:///{tmp_path}/queues.db"
    if request.param == "redis":
        url = f"{request.getfixturevalue('redis').database()}?namespace={unique}"
    with stand(url, tmp_path) as built:
        yield built


def test_queues_of_the_other_brokers(embedded: Stand, unique: str) -> None:
    """No queue; all as it should be; nobody consumes; no dead-letter queue: the same findings."""
    looking = ("--transport", embedded.url, "--service", unique, "--store", embedded.store)
    embedded.service("another", IDEMP_STORE=embedded.store)
    [fault] = doctor(*looking, code=1)
    assert (fault["where"], fault["what"]) == (f"{unique}-queue", "there is no such queue")
    service = embedded.service(unique, IDEMP_STORE=embedded.store)
    assert doctor(*looking) == []
    assert [program.stop() for program in embedded.programs] == [0, 0]
    assert service.process.returncode == 0
    [fault] = doctor(*looking, code=1)
    assert (fault["what"], "0 consumers" in fault["evidence"]) == ("nobody consumes it", True)
    with closing(open_transport(embedded.url)) as transport:
        transport.declare("half-queue", "events")
    half = doctor("--transport", embedded.url, "--service", "half", code=1)
    assert "the dead-letter path is broken: what is set aside has nowhere to go" in [f["what"] for f in half]


def test_older_than_the_retention_on_the_other_brokers(embedded: Stand, unique: str) -> None:
    """Said before it happens, with where it shows afterwards; and that is where it shows."""
    store = f"{embedded.store}?retention=2h"
    assert embedded.service(unique, IDEMP_STORE=store).stop() == 0
    looking = ("--transport", embedded.url, "--service", unique, "--store", embedded.store)
    embedded.publish(Message("0", "new_order", published=time.time() - 7000))
    assert [each["what"] for each in doctor(*looking, code=1)] == ["nobody consumes it"]
    with closing(open_transport(embedded.url)) as transport:
        transport.consume(f"{unique}-queue", 1)
        [delivery] = [event for event in transport.poll(30) if isinstance(event, Delivery)]
        transport.ack([delivery.tag])
    embedded.publish(Message("1", "new_order", published=time.time() - 7300))
    old = doctor(*looking, code=1)[-1]
    assert old["what"] == "messages older than the retention wait: they will be parked, not run"
    assert "published 73" in old["evidence"]
    for words in (f"idemp dead list {unique}-queue", "idemp doubt"):
        assert words in old["fix"]
    embedded.service(unique, IDEMP_STORE=store)
    embedded.counted(**{f"{unique}_new_order_parked": 1})
    settings = {"IDEMP_TRANSPORT": embedded.url, "IDEMP_STORE": embedded.store}
    for shows in (["dead", "list", f"{unique}-queue"], ["doubt"]):
        told = finished("-m", "idemp", *shows, settings=settings).stdout
        assert "older than the retention" in told
    assert doctor(*looking) == []


def test_a_file_without_queues_is_no_broker(tmp_path: Path) -> None:
    """One sentence."""
    url = kept(tmp_path / "seen.db")
    done = finished("-m", "idemp", "doctor", "--transport", url, "--service", "orders")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is no broker of ours" in done.stderr


def kept(path: Path) -> str:
    _filled(f"sqlite:///{path}", 50)
    return f"sqlite:///{path}"


def test_a_file_that_is_not_in_wal_mode(tmp_path: Path) -> None:
    """Some tool changed it."""
    url = kept(tmp_path / "seen.db")
    with closing(sqlite3.connect(tmp_path / "seen.db")) as db:
        db.execute("PRAGMA journal_mode=DELETE")
    [fault] = doctor("--store", url, code=1)
    assert (fault["evidence"], "PRAGMA journal_mode=WAL" in fault["fix"]) == ("journal_mode=delete", True)


def test_a_damaged_file(tmp_path: Path) -> None:
    """A page was overwritten."""
    path = tmp_path / "seen.db"
    url = kept(path)
    with path.open("r+b") as file:
        file.seek(os.path.getsize(path) - 4096 * 2)
        file.write(b"\xff" * 4096)
    faults = doctor("--store", url, code=1)
    assert any(each["what"] == "the file is damaged" for each in faults)


def test_a_log_that_is_not_folded_in(tmp_path: Path) -> None:
    """Somebody holds an old state."""
    path = tmp_path / "seen.db"
    with closing(open_store(f"sqlite:///{path}")) as store:
        store.apply([Claim("k")])
        os.truncate(f"{path}-wal", 100 * 1024 * 1024)
        [fault] = doctor("--store", f"sqlite:///{path}", code=1)
    assert fault["evidence"] == "seen.db-wal has 100 MiB"


def test_a_file_in_memory(unique: str) -> None:
    """Where a power loss forgets it."""
    folder = Path("/dev/shm") / unique
    folder.mkdir()
    try:
        [fault] = doctor("--store", kept(folder / "seen.db"), code=1)
    finally:
        shutil.rmtree(folder)
    assert (fault["evidence"], fault["fix"]) == ("tmpfs at /dev/shm", "put it on a disk")


def test_a_file_of_another_machine(tmp_path: Path) -> None:
    """By what the kernel says of the place."""
    kept(tmp_path / "seen.db")
    line = f"36 35 98:0 / {tmp_path} rw shared:1 - nfs4 server:/x rw"
    [fault] = examine_sqlite(str(tmp_path / "seen.db"), line).findings
    assert fault.evidence == f"nfs4 at {tmp_path}"


def test_a_file_of_a_newer_idemp(tmp_path: Path) -> None:
    """It would be refused."""
    kept(tmp_path / "seen.db")
    with closing(sqlite3.connect(tmp_path / "seen.db")) as db:
        db.execute("INSERT INTO idemp_layout VALUES (99)")
        db.commit()
    [fault] = [each for each in examine_sqlite(str(tmp_path / "seen.db")).findings if "newer" in each.what]
    assert (fault.fix, fault.fault) == ("upgrade idemp here", True)


def test_a_retention_that_is_too_short(tmp_path: Path) -> None:
    """A message may come again when its id is forgotten."""
    url = f"sqlite:///{tmp_path}/seen.db"
    with closing(open_store(f"{url}?retention=10m")) as store:
        store.apply([])
    [fault] = doctor("--store", url, code=1)
    assert "ids are kept for 600 s" in fault["evidence"]
    assert "?retention=24h" in fault["fix"]
    assert horizon(86400.0, amqp=True) == []
    assert len(horizon(1600.0, amqp=True)) == 1
    assert horizon(1600.0, amqp=False) == []


# ------------------------------------------------------------------ statsd and Graphite


def test_statsd(statsd: Statsd) -> None:
    """The real one hears; a closed port of this machine says so; a name that is none, too."""
    assert examine_statsd(statsd.address) == []
    for address in (f"127.0.0.1:{free_port()}", "no.such.host.invalid"):
        [fault] = doctor("--statsd", address, code=1)
        assert "statsd does not hear" in fault["what"]


def test_our_graphite_files() -> None:
    """assets/graphite is as it should be."""
    assert doctor("--graphite-conf", str(ROOT / "assets/graphite")) == []


@pytest.mark.parametrize(
    ("file", "before", "after", "evidence"),
    [
        (
            "storage-schemas.conf",
            "1s:1h,10s:6h",
            "10s:6h",
            "flushInterval 1000 ms (udp.js); retentions = 10s:6h",
        ),
        ("udp.js", "flushInterval: 1000", "flushInterval: 10000", "flushInterval 10000 ms"),
        ("storage-aggregation.conf", "aggregationMethod = sum", "aggregationMethod = average", "= average"),
        ("storage-aggregation.conf", "xFilesFactor = 0", "xFilesFactor = 0.5", "xFilesFactor = 0.5"),
    ],
)
def test_graphite_files_that_are_wrong(
    tmp_path: Path, file: str, before: str, after: str, evidence: str
) -> None:
    """Retention against flush, sums against averages."""
    folder = tmp_path / "conf"
    shutil.copytree(ROOT / "assets/graphite", folder)
    text = (folder / file).read_text()
    assert before in text
    (folder / file).write_text(text.replace(before, after, 1))
    [fault] = examine_files(str(folder))
    assert evidence in fault.evidence


def test_graphite_for_real(graphite: Graphite, statsd: Statsd, tmp_path: Path, unique: str) -> None:
    """Counters of a service that runs are there each second; those of one that does not are missed."""
    desk_url = f"sqlite:///{tmp_path}/queues.db"
    with stand(desk_url, tmp_path) as desk:
        desk.service(unique, IDEMP_STATSD=statsd.address)
        until(lambda: examine(graphite.url, [unique]) == [], lambda: examine(graphite.url, [unique]))
        [fault] = doctor("--graphite", graphite.url, "--service", f"{unique}-none", code=1)
    assert "no counter of" in fault["what"]


def test_points_with_holes() -> None:
    """A flush of ten seconds in places for one."""
    points = {float(at): 0.0 if at % 10 == 0 else None for at in range(60)}
    [fault] = regular(Series("x", 1.0, points))
    assert fault.evidence == "points of x come every 10 s, places for them every 1 s"
    assert regular(Series("x", 10.0, {at: value for at, value in points.items() if value is not None})) == []


# ------------------------------------------------------------------ what cannot be looked at


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Name what to look at"),
        (["--transport", "amqp://me:secret@127.0.0.1:9/", "--service", "orders"], "no broker answers"),
        (["--transport", "amqp://localhost"], "say whose queues to look at"),
        (["--store", "etcd://me:secret@127.0.0.1:9/x"], "--store (IDEMP_STORE)"),
        (["--store", "sqlite:////no/such.db"], "there is no file /no/such.db"),
        (["--store", f"sqlite:///{__file__}"], "is no SQLite file"),
        (["--store", "memory://"], "nothing is known here"),
        (["--store", "postgresql://me:secret@127.0.0.1:9/x"], "--store (IDEMP_STORE)"),
        (["--store", "redis://me:secret@127.0.0.1:9/0"], "--store (IDEMP_STORE)"),
        (["--graphite", "http://me:secret@127.0.0.1:9", "--service", "orders"], "no Graphite answers"),
        (["--graphite", "nonsense", "--service", "orders"], "is no URL of a Graphite"),
        (["--statsd", "localhost:x"], "--statsd (IDEMP_STATSD): statsd address 'localhost:x'"),
        (["--graphite-conf", "/no/such"], "/no/such/storage-schemas.conf cannot be read"),
    ],
)
def test_what_cannot_be_looked_at_is_one_sentence(arguments: list[str], sentence: str) -> None:
    """Exit code 2, no traceback, no password."""
    done = finished("-m", "idemp", "doctor", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert sentence in done.stderr
    assert "secret" not in done.stderr


def test_a_wrong_password_is_one_sentence(rabbitmq: RabbitMQ) -> None:
    """RabbitMQ refuses it."""
    url = rabbitmq.url.replace("guest:guest", "guest:tellnobody")
    done = finished("-m", "idemp", "doctor", "--transport", url, "--service", "orders")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "tellnobody" not in done.stderr
