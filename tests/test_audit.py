"""`idemp audit` as processes on a broker: AuditMQ's topology and messages, bad reports, kills, restarts."""

from __future__ import annotations

import base64
import json
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pika
import pytest

from idemp import open_transport
from idemp.audit import Report, Reporter, Status
from idemp.audit.auditor import Auditor
from idemp.audit.config import Config, configured
from idemp.audit.document import read
from idemp.audit.state import open_state
from idemp.errors import TransportUnavailable, Unroutable
from idemp.message import Properties
from idemp.ports import Delivery, Publication, Sent
from idemp.transports import publish
from idemp.transports.memory import MemoryTransport
from tests.servers import PostgreSQL, RabbitMQ
from tests.service import ROOT, Program, finished, until

PATIENCE = 30.0
SYNCHRONOUS = "S100 B90 S100 B90"
OK = [Status("B", 2), Status("S", 2), Status("all", 2)]
DIFFERENT = [Status("B", 0), Status("S", 0), Status("all", 0)]


class Room:
    """A broker, names of one's own, settings and state in a folder, and the auditors in it."""

    def __init__(self, url: str, folder: Path, name: str, state: str = "") -> None:
        self.url, self.folder, self.name = url, folder, name
        self.state = state or f"{folder}/audit.db"
        self.file = folder / "config.yaml"
        self.programs: list[Program] = []
        self.settings()

    def settings(self, more: str = "", field: str = "", reports: bool = True) -> str:
        """AuditMQ's file, but for a faster tick and names that nobody else uses."""
        text = f"""
dsn: {self.url}
exchange: {self.name}
consumer_queue: {self.name}_in
state: {self.state}
tick: 100ms
{f"report_queue: {self.name}_out" if reports else ""}
{more}
data:
  sales: {{type: int, owner: S, samples: 3, {field} replicas: [B: {{offset: 10}}]}}
  stock: {{type: int, owner: S, samples: 3, replicas: [B: ]}}
"""
        self.file.write_text(text)
        return text

    def run(self, *arguments: str, **settings: str) -> Program:
        """An auditor that takes reports."""
        said = self.folder / f"said-{len(self.programs)}"
        given = arguments or (str(self.file),)
        self.programs.append(Program(said, ["-m", "idemp", "audit", "run", *given], settings))
        self.programs[-1].wait_for("taking reports")
        return self.programs[-1]

    def send(self, *bodies: bytes, timestamp: float | None = None, id: str = "") -> None:
        """As a service does."""
        about = Properties(message_id=id or None, timestamp=timestamp)
        with closing(open_transport(self.url)) as transport:
            publish(transport, [Publication(body, about, self.name, "auditmq") for body in bodies])

    def say(self, reports: str) -> None:
        """``S100 B90``, in this order."""
        self.send(*(Report(told[0], {"sales": int(told[1:])}).encode() for told in reports.split()))

    def taken(self, n: int, queue: str = "out") -> list[Delivery]:
        """The next ``n`` messages of a queue, which loses them."""
        found: list[Delivery] = []
        with closing(open_transport(self.url)) as transport:
            transport.consume(f"{self.name}_{queue}", n)
            end = time.monotonic() + PATIENCE
            while len(found) < n:
                assert time.monotonic() < end, (found, [each.said() for each in self.programs])
                found += [event for event in transport.poll(0.5) if isinstance(event, Delivery)]
            transport.ack([event.tag for event in found])
        return found

    def told(self, n: int) -> list[Status]:
        """The next ``n`` statuses."""
        return [Status.decode(event.body) for event in self.taken(n)]

    def status(self) -> dict[str, Any]:
        """What `idemp audit status` says, and its exit code."""
        done = finished("-m", "idemp", "audit", "status", str(self.file), "--json")
        assert done.returncode in (0, 1), done
        return {"code": done.returncode, **json.loads(done.stdout)}

    def states(self) -> dict[str, str]:
        """Of each field, as it is shown."""
        return {each["field"]: each["state"] for each in self.status()["fields"]}

    def counted(self, **counts: int) -> None:
        """Wait until so many reports were taken."""
        until(lambda: self.status()["counts"] == counts, self.status)

    def depth(self, queue: str) -> int:
        with closing(open_transport(self.url)) as transport:
            return transport.depth(f"{self.name}_{queue}")


@pytest.fixture(params=["sqlite", "rabbitmq"])
def room(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[Room]:
    """On either broker."""
    sqlite = request.param == "sqlite"
    url = f"sqlite:///{tmp_path}/queues.db" if sqlite else request.getfixturevalue("amqp_url")
    with in_room(url, tmp_path, unique) as room:
        yield room


@pytest.fixture(params=["sqlite", "rabbitmq", "postgresql"])
def kept_room(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[Room]:
    """On either broker, and with either state."""
    url = request.getfixturevalue("amqp_url") if request.param == "rabbitmq" else ""
    state = request.getfixturevalue("postgresql").database() if request.param == "postgresql" else ""
    with in_room(url or f"sqlite:///{tmp_path}/queues.db", tmp_path, unique, state) as room:
        yield room


@contextmanager
def in_room(url: str, folder: Path, name: str, state: str = "") -> Iterator[Room]:
    room = Room(url, folder, name, state)
    try:
        yield room
    finally:
        for program in room.programs:
            program.stop(signal.SIGKILL)


# ------------------------------------------------------------------ from reports to statuses


def test_a4_a9_a11_reports_become_statuses(room: Room) -> None:
    """On change, exactly as AuditMQ writes them; a message may have several fields."""
    room.run()
    room.say(SYNCHRONOUS)
    told = room.taken(3)
    assert [each.body for each in told] == [
        b'{"service":"B","status":2}',
        b'{"service":"S","status":2}',
        b'{"service":"all","status":2}',
    ]
    assert {each.routing_key for each in told} == {"auditmq_reports"}
    assert len({each.properties.message_id for each in told}) == 3
    for who, sales in (("S", 100), ("B", 80), ("S", 100), ("B", 80), ("B", 80), ("B", 80)):
        room.send(Report(who, {"sales": sales, "stock": 7}).encode())
    assert room.told(3) == DIFFERENT
    until(lambda: room.states() == {"sales": "broken", "stock": "ok"}, room.status)
    seen = room.status()
    assert (seen["code"], seen["unsent"], seen["fields"][0]["difference"]) == (1, 0, "-10")
    assert room.depth("in") == 0


def test_the_table(room: Room) -> None:
    """For people; exit code 1 while not all is ok."""
    room.run()
    room.say(SYNCHRONOUS)
    room.counted(reports=4)
    until(lambda: room.states()["sales"] == "ok", room.status)
    done = finished("-m", "idemp", "audit", "status", str(room.file))
    assert done.returncode == 1
    assert "sales" in done.stdout
    assert "S has never reported" in done.stdout
    assert "4 reports, 0 rejected, 0 repeated, 0 statuses unsent; next check" in done.stdout


def test_a5_bad_reports_block_nobody(room: Room) -> None:
    """Each is in the dead-letter queue, once, as it came, with the reason; those around it count."""
    bad = {
        b"{": "not JSON",
        b"[]": "not an object",
        b'{"service":"X","data":{"sales":1}}': "service 'X'",
        b'{"service":"S","data":{"nosuch":1}}': "no field 'nosuch'",
        b'{"service":"S","data":{"sales":"abc"}}': "sales is text",
        b'{"service":"S","data":{"sales":null}}': "sales is null",
        b'{"service":"S","data":{"sales":NaN}}': "sales: NaN",
        b'{"service":"S","data":{"sales":1e999999999}}': "sales: 1e999999999",
        b'{"service":"S","data":{"sales":' + b"9" * 5000 + b"}}": "too long a number",
        b'{"service":"S"}': "no data",
        b"[" * 100_000: "not JSON",
        b"\xff\xfe": "not JSON",
    }
    room.run()
    first, *rest = SYNCHRONOUS.split()
    room.say(first)
    room.send(*bad)
    room.say(" ".join(rest))
    room.send(b'{"service":"S","data":{"stock":7}}', timestamp=time.time() + 3600)
    room.send(b'{"service":"S","data":{"stock":7}}', timestamp=1.0)
    assert room.told(3) == OK
    letters = room.taken(len(bad) + 2, "in.dead")
    for letter, (body, part) in zip(letters, bad.items(), strict=False):
        assert letter.body == body
        assert part in letter.properties.headers["idemp-reason"]
    for letter, part in zip(letters[-2:], ("ahead of", "behind"), strict=True):
        assert part in letter.properties.headers["idemp-reason"]
    room.counted(reports=4, rejected=len(bad) + 2)
    assert room.depth("in") == room.depth("in.dead") == 0
    done = finished("-m", "idemp", "dead", "list", f"{room.name}_in", "--transport", room.url)
    assert done.returncode == 0


def test_what_is_good_in_a_report_counts(room: Room) -> None:
    """The letter names what is not."""
    room.run()
    for who, sales in (("S", "100"), ("B", "90"), ("S", "100"), ("B", "90")):
        room.send(f'{{"service":"{who}","data":{{"stock":null,"sales":{sales}}}}}'.encode())
    assert room.told(3) == OK
    assert [each.properties.headers["idemp-reason"] for each in room.taken(4, "in.dead")] == [
        "stock is null, which is no value"
    ] * 4


def test_a_report_that_comes_again_changes_nothing(kept_room: Room) -> None:
    """It is known by its message id, after a kill too, and counted as repeated."""
    room = kept_room
    auditor = room.run()
    owners, replicas = (Report(who, {"sales": n}).encode() for who, n in (("S", 100), ("B", 90)))
    room.send(owners, id="one")
    room.send(replicas, id="two")
    room.send(replicas, replicas, id="two")
    room.counted(reports=2, repeated=2)
    auditor.stop(signal.SIGKILL)
    room.run()
    room.send(replicas, id="two")
    room.counted(reports=2, repeated=3)
    assert room.status()["fields"][0]["reason"] == "S has 2 of 3 samples"
    done = finished("-m", "idemp", "audit", "status", str(room.file))
    assert "2 reports, 0 rejected, 3 repeated, 0 statuses unsent" in done.stdout
    room.say("S100 B90")
    assert room.told(3) == OK


def test_a_service_reports_in_a_line(room: Room) -> None:
    """It is safe in the queue when the call returns; before any auditor, the call says so."""
    with closing(open_transport(room.url)) as transport:
        sales = Reporter(transport, "S", exchange=room.name)
        with pytest.raises(Unroutable):
            sales.report(sales=100)
        room.run().stop()
        sales.report(sales=100)
        assert room.depth("in") == 1
        billing = Reporter(transport, "B", exchange=room.name)
        for _ in range(2):
            billing.report(sales=90)
            sales.report(sales=100)
        room.run()
        assert room.told(3) == OK


def test_the_page_reports(room: Room) -> None:
    """The block of docs/audit.md, as it stands but for where and what."""
    page = (ROOT / "docs/audit.md").read_text()
    block, _ = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    room.run().stop()
    block = block.replace("amqp://guest:guest@localhost:5672/", room.url)
    done = finished("-c", block.replace('"auditmq"', repr(room.name)))
    assert done.returncode == 0, done.stderr
    [came] = room.taken(1, "in")
    assert came.body == b'{"service":"sales-service","data":{"sales_count":10}}'


def test_a16_changes_are_lines_of_json(room: Room) -> None:
    """On stdout, for log collectors."""
    said = room.folder / "said"
    program = Program(said, ["-m", "idemp", "audit", "run", str(room.file), "--json"], {})
    room.programs.append(program)
    program.wait_for('"event": "ready"')
    room.say(SYNCHRONOUS)
    program.wait_for('"service": "all"')
    lines = [json.loads(line) for line in program.said().splitlines() if line.startswith("{")]
    statuses = [Status(line["service"], line["status"]) for line in lines if line["event"] == "status"]
    assert statuses == OK
    states = [(line["field"], line["state"]) for line in lines if line["event"] == "state"]
    assert ("sales", "ok") in states


# ------------------------------------------------------------------ ends and restarts


def test_a14_kill_9_forgets_nothing_and_tells_nothing_twice(kept_room: Room) -> None:
    """In the middle of a window, and after a status."""
    room = kept_room
    first = room.run()
    room.say("S100 B90 S100")
    room.counted(reports=3)
    first.stop(signal.SIGKILL)
    room.say("B90")
    second = room.run()
    assert room.told(3) == OK
    second.stop(signal.SIGKILL)
    third = room.run()
    room.say("S100 B90")
    room.counted(reports=6)
    room.say("B80 B80 B80")
    assert room.told(3) == DIFFERENT  # the very next: nothing was told in between
    assert third.stop() == 0


def test_n5_when_the_auditor_is_dead_all_lamps_are_grey(room: Room) -> None:
    """Within two ticks, though its last word was that all is well."""
    auditor = room.run()
    room.send(*(Report(who, {"sales": n, "stock": 7}).encode() for who, n in [("S", 100), ("B", 90)] * 2))
    until(lambda: room.status()["code"] == 0, room.status)
    assert room.states() == {"sales": "ok", "stock": "ok"}
    auditor.stop(signal.SIGKILL)
    until(lambda: room.states() == {"sales": "stale", "stock": "stale"}, room.status)
    seen = room.status()
    assert seen["code"] == 1
    assert "the auditor last looked" in seen["fields"][0]["reason"]


def test_a18_silence_is_told(room: Room) -> None:
    """Beyond a field's limit."""
    room.settings(field="stale_after: 1s,")
    room.run()
    room.say(SYNCHRONOUS)
    assert room.told(3) == OK
    assert room.told(3) == DIFFERENT
    assert room.states()["sales"] == "stale"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a17_a_signal_ends_it_in_order(room: Room, how: signal.Signals) -> None:
    """With exit code 0."""
    auditor = room.run()
    room.say("S100 B90")
    room.counted(reports=2)
    assert auditor.stop(how) == 0, auditor.said()
    assert "Traceback" not in auditor.said()


def test_told_to_end_more_than_once(room: Room) -> None:
    """Another SIGTERM while it lets go of everything is no end in disorder."""
    auditor = room.run()
    while auditor.process.poll() is None:
        auditor.process.send_signal(signal.SIGTERM)
        time.sleep(0.002)
    assert auditor.process.returncode == 0, auditor.said()


def test_a15_statuses_wait_for_a_queue(kept_room: Room) -> None:
    """Nobody has bound one: they are kept through a kill, and told in order when somebody has."""
    room = kept_room
    room.settings(reports=False)
    auditor = room.run()
    room.say(SYNCHRONOUS)
    auditor.wait_for("bind one with key 'auditmq_reports'")
    assert room.status()["unsent"] == 3
    auditor.stop(signal.SIGKILL)
    room.run()
    room.say("B80 B80 B80")
    until(lambda: room.status()["unsent"] == 6, room.status)
    with closing(open_transport(room.url)) as transport:
        transport.declare(f"{room.name}_out", room.name, "auditmq_reports", kind="direct")
    assert room.told(6) == OK + DIFFERENT
    until(lambda: room.status()["unsent"] == 0, room.status)


def test_a15_the_broker_goes_and_comes(own_rabbitmq: RabbitMQ, tmp_path: Path, unique: str) -> None:
    """Killed: the auditor waits, connects again, and nobody is called silent for that time."""
    with in_room(own_rabbitmq.url, tmp_path, unique) as room:
        room.settings(field="stale_after: 30s,")
        auditor = room.run()
        room.say("S100 B90 S100")
        room.counted(reports=3)
        with closing(open_transport(own_rabbitmq.url)) as transport:
            billing = Reporter(transport, "B", exchange=room.name)
            transport.connect()
            own_rabbitmq.kill()
            auditor.wait_for("connecting again")
            own_rabbitmq.start()
            auditor.wait_for("the broker is back")
            billing.report(sales=90)  # over a connection that was lost meanwhile
        assert room.told(3) == OK
        assert auditor.stop() == 0


def test_a14_a15_the_state_goes_and_comes(own_postgresql: PostgreSQL, tmp_path: Path, unique: str) -> None:
    """Its server is killed: nothing is acknowledged meanwhile, and the same auditor goes on where it was."""
    with in_room(f"sqlite:///{tmp_path}/queues.db", tmp_path, unique, own_postgresql.url) as room:
        auditor = room.run()
        room.say("S100 B90 S100")
        room.counted(reports=3)
        own_postgresql.kill()
        room.say("B90")
        auditor.wait_for("trying again")
        assert auditor.process.poll() is None
        own_postgresql.start()
        auditor.wait_for("the state is back")
        assert room.told(3) == OK
        room.counted(reports=4)
        room.say("B80 B80 B80")
        assert room.told(3) == DIFFERENT
        own_postgresql.kill()
        auditor.wait_for("trying again")
        assert auditor.stop() == 0
        assert "Traceback" not in auditor.said()


# ------------------------------------------------------------------ topology


def test_a3_the_topology_is_auditmqs(amqp_url: str, tmp_path: Path, unique: str) -> None:
    """With plain pika as the witness: declared again as AuditMQ does, nothing is refused."""
    with in_room(amqp_url, tmp_path, unique) as room:
        room.run()
        connection = pika.BlockingConnection(pika.URLParameters(amqp_url))
        channel = connection.channel()
        channel.exchange_declare(unique, "direct", durable=True)
        channel.queue_declare(f"{unique}_in", durable=True)
        for told in SYNCHRONOUS.split():
            channel.basic_publish(unique, "auditmq", Report(told[0], {"sales": int(told[1:])}).encode())
        until(lambda: room.status()["unsent"] == 0 and room.depth("out") == 3, room.status)
        _, seen, body = channel.basic_get(f"{unique}_out", auto_ack=True)
        assert (body, seen.content_type, seen.delivery_mode) == (
            b'{"service":"B","status":2}',
            "application/json",
            2,
        )
        connection.close()


def test_an_exchange_of_another_kind_is_a_sentence(amqp_url: str, tmp_path: Path, unique: str) -> None:
    """And so is a broker that refuses the password, which is not told."""
    with in_room(amqp_url, tmp_path, unique) as room:
        connection = pika.BlockingConnection(pika.URLParameters(amqp_url))
        connection.channel().exchange_declare(unique, "topic", durable=True)
        connection.close()
        done = finished("-m", "idemp", "audit", "run", str(room.file))
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
        assert "inequivalent arg 'type' for exchange" in done.stderr
        room.url = amqp_url.replace("guest:guest", "guest:tellnobody")
        room.settings()
        done = finished("-m", "idemp", "audit", "run", str(room.file))
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
        assert done.stderr.startswith("idemp: dsn: ")
        assert "tellnobody" not in done.stderr


# ------------------------------------------------------------------ settings


def test_a2_config_and_debug_of_the_environment(room: Room) -> None:
    """CONFIG is the file in base64; DEBUG is on when it is there, even empty."""
    text = base64.encodebytes(room.settings().encode()).decode()
    said = room.folder / "said"
    program = Program(said, ["-m", "idemp", "audit", "run"], {"CONFIG": text, "DEBUG": ""})
    room.programs.append(program)
    program.wait_for("taking reports")
    room.say("S100")
    program.wait_for("S reports")
    assert program.stop() == 0


def test_without_debug_reports_are_not_logged(room: Room) -> None:
    """Changes are."""
    program = room.run()
    room.say(SYNCHRONOUS)
    assert room.told(3) == OK
    assert "S reports" not in program.said()
    assert "all: status 2" in program.said()


@pytest.mark.parametrize(
    ("arguments", "text", "part"),
    [
        (["/no/such.yaml"], None, "/no/such.yaml cannot be read: No such file"),
        ([], None, "CONFIG is not base64"),
        (["{file}"], "dsn: amqp://h\ndata:\n  f: {type: x}\n", "line 3: data.f.type='x' is unknown"),
        (["{file}"], "data: {}", "dsn is missing"),
    ],
)
@pytest.mark.parametrize("command", ["run", "status"])
def test_a1_bad_settings_are_told(
    tmp_path: Path, command: str, arguments: Sequence[str], text: str | None, part: str
) -> None:
    """Exit code 2, no traceback."""
    file = tmp_path / "config.yaml"
    file.write_text(text or "")
    given = [each.format(file=file) for each in arguments]
    done = finished("-m", "idemp", "audit", command, *given, settings={"CONFIG": "%%%"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("idemp: ")
    assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_status_of_an_audit_that_never_ran(tmp_path: Path) -> None:
    """No file is made."""
    file = tmp_path / "config.yaml"
    field = "{type: int, owner: S, samples: 2, replicas: [B: ]}"
    file.write_text(f"dsn: amqp://h\nstate: {tmp_path}/none.db\ndata: {{f: {field}}}\n")
    done = finished("-m", "idemp", "audit", "status", str(file))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "has `idemp audit run` been started here?" in done.stderr
    assert not (tmp_path / "none.db").exists()


def test_explain_of_a_field_without_messages(tmp_path: Path) -> None:
    """Says which have some; nothing is connected to."""
    file = tmp_path / "config.yaml"
    field = "{type: int, owner: S, samples: 2, replicas: [B: ]}"
    file.write_text(f"dsn: amqp://h\nstate: {tmp_path}/none.db\ndata: {{sales: {field}}}\n")
    for name, part in (("Sales", "Sales is of type int"), ("nosuch", "of type messages are: none")):
        done = finished("-m", "idemp", "audit", "explain", name, str(file))
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert part in done.stderr


# ------------------------------------------------------------------ a lost confirm, in one process


class Forgetful(MemoryTransport):
    """Loses its connection instead of the first confirm."""

    lost = False

    def poll(self, timeout: float) -> list[Delivery | Sent]:
        came = super().poll(timeout)
        if not self.lost and any(isinstance(event, Sent) for event in came):
            self.lost = True
            raise TransportUnavailable("gone")
        return came


def settled(name: str) -> Config:
    text = f"dsn: memory://{name}\ntick: 50ms\nreport_queue: out\n"
    text += "data: {sales: {type: int, owner: S, samples: 2, replicas: [B: ]}}"
    return configured(read(text, "config"), "config")


def test_a_status_whose_confirm_is_lost_is_told_again_with_its_id(tmp_path: Path, unique: str) -> None:
    """And in order."""
    config = settled(unique)
    state = tmp_path / "audit.db"
    ready = threading.Event()
    auditors: list[Auditor] = []

    def audit() -> None:
        with closing(open_state(str(state))) as kept:
            auditors.append(Auditor(Forgetful(unique), config, kept))
            auditors[0].run(ready=ready.set)

    thread = threading.Thread(target=audit)
    thread.start()
    found: list[Delivery] = []
    with closing(open_transport(config.dsn)) as transport:
        assert ready.wait(PATIENCE)
        bodies = [Report(who, {"sales": 1}).encode() for who in "SBSB"]
        publish(transport, [Publication(body, Properties(), config.exchange, "auditmq") for body in bodies])
        transport.consume("out", 10)
        end = time.monotonic() + PATIENCE
        while len(found) < 4 and time.monotonic() < end:
            found += [event for event in transport.poll(0.2) if isinstance(event, Delivery)]
        transport.ack([event.tag for event in found])
    auditors[0].stop()
    thread.join(PATIENCE)
    assert [Status.decode(each.body) for each in found] == [OK[0], *OK]
    names = [each.properties.message_id for each in found]
    assert names[0] == names[1]
    assert len(set(names)) == 3


# ------------------------------------------------------------------ a crash at each step, in one process


class Crash(BaseException):
    """The process is gone."""


class Steps:
    """What is around an auditor; at step number ``last``, right before or after a call, it crashes."""

    def __init__(self, last: int) -> None:
        self.last, self.done = last, 0
        self.crashed = threading.Event()

    def step(self) -> None:
        self.done += 1
        if self.done >= self.last:
            self.crashed.set()
            raise Crash

    def around(self, inner: Any, *names: str) -> Any:
        """``inner``, with a step before and after each call of ``names``."""
        steps = self

        class Around:
            def __getattr__(self, name: str) -> Any:
                method = getattr(inner, name)
                if name not in names:
                    return method

                def call(*args: Any, **named: Any) -> Any:
                    steps.step()
                    answer = method(*args, **named)
                    steps.step()
                    return answer

                return call

        return Around()


def live(config: Config, path: str, steps: Steps, ready: threading.Event, auditors: list[Auditor]) -> None:
    """One life of an auditor, to its end or its crash; what it held goes back to the broker."""
    with closing(open_transport(config.dsn)) as transport, closing(open_state(path)) as state:
        broken = steps.around(transport, "ack", "send"), steps.around(state, "save", "told")
        auditors.append(Auditor(broken[0], config, broken[1]))
        with suppress(Crash):
            auditors[-1].run(ready=ready.set)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
@pytest.mark.parametrize("last", range(1, 31))
def test_a14_a15_a_crash_at_any_step_loses_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, unique: str, kind: str, last: int
) -> None:
    """Every status is told, in order; one that is told twice has the same id; none is false."""
    config = settled(unique)
    path = str(tmp_path / "audit.db")
    if kind == "postgresql":
        path = f"{request.getfixturevalue('postgresql').url}?namespace={unique}"
    auditors: list[Auditor] = []
    with closing(open_transport(config.dsn)) as transport:
        transport.declare(config.consumer_queue, config.exchange, config.consumer_routing_key)
        told = [("S", 1), ("B", 1), ("S", 2), ("B", 2), ("S", 2), ("B", 2)]
        bodies = [Report(who, {"sales": n}).encode() for who, n in told]
        bodies.insert(3, b"no report")
        publish(transport, [Publication(body, Properties(), config.exchange, "auditmq") for body in bodies])
        steps = Steps(last)
        live(config, path, steps, threading.Event(), auditors)
        assert steps.crashed.is_set()

        ready = threading.Event()
        thread = threading.Thread(target=live, args=(config, path, Steps(10**9), ready, auditors))
        thread.start()
        assert ready.wait(PATIENCE)
        found: dict[str | None, Status] = {}
        transport.consume("out", 100)
        end = time.monotonic() + PATIENCE
        while len(found) < 3 and time.monotonic() < end:
            came = [event for event in transport.poll(0.1) if isinstance(event, Delivery)]
            found |= {event.properties.message_id: Status.decode(event.body) for event in came}
            transport.ack([event.tag for event in came])
        auditors[-1].stop()
        thread.join(PATIENCE)
        assert list(found.values()) == OK
        again = [event for event in transport.poll(0.0) if isinstance(event, Delivery)]
        assert {event.properties.message_id for event in again} <= found.keys()
        assert transport.depth(config.consumer_queue) == 0
        assert transport.depth(f"{config.consumer_queue}.dead") >= 1
    with closing(open_state(path, reading=True)) as state:
        assert state.unsent() == 0
