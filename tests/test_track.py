"""The collector of events on a real broker, log lines of others, the MongoDB logger.  U8, U14, U16."""

from __future__ import annotations

import signal
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pymongo.errors import ServerSelectionTimeoutError

from idemp import ConfigError, Message, open_event_log, open_transport, publish
from idemp.errors import StoreUnavailable
from idemp.eventlogs.collector import QUEUE, PublishingLog, collect
from idemp.eventlogs.mongodb import MongoLogger
from idemp.message import Properties
from idemp.ports import Batch, Event, Publication, Query
from idemp.tracking.envelope import Envelope, configure
from idemp.tracking.recorder import Recorder
from tests.servers import RabbitMQ
from tests.service import Program, finished, until
from tests.test_bars import Terminal
from tests.test_tracking import service, to
from tests.test_tracking_envelope import LINE


def test_u8_u14_services_publish_and_one_collector_keeps(
    own_rabbitmq: RabbitMQ, tmp_path: Path, unique: str
) -> None:
    """U8, U14: killed in the middle and started again, the collector has each event once."""
    url, log_url = own_rabbitmq.url, f"sqlite:///{tmp_path}/collected.db"
    settings = {"IDEMP_TRACKING": log_url, "IDEMP_TRANSPORT": url}

    def collector() -> Program:
        program = Program(tmp_path / "said", ["-m", "idemp", "track"], settings)
        program.wait_for("collecting from idemp.track")
        return program

    def kept() -> Counter[str]:
        with closing(open_event_log(log_url)) as log:
            return Counter(event.uuid for event in log.find(Query(kinds=("ok",)), limit=100_000))

    n = 2000
    first = collector()
    with (
        closing(open_event_log(url)) as log,
        service(url, tmp_path, unique, {"order": lambda *_: None}, log),
        closing(open_transport(url)) as out,
    ):
        publish(out, to(f"{unique}-queue", *(Message(str(i), "order") for i in range(n // 2))))
        until(lambda: len(kept()) > 0, kept)
        first.stop(signal.SIGKILL)
        publish(out, to(f"{unique}-queue", *(Message(str(i), "order") for i in range(n // 2, n))))
        publish(out, [Publication(b"no batch", Properties(), "", QUEUE)])
        second = collector()
        until(lambda: len(kept()) == n, lambda: len(kept()))
        until(lambda: out.depth(f"{QUEUE}.dead") == 1, lambda: out.depth(f"{QUEUE}.dead"))
    assert second.stop() == 0
    assert set(kept().values()) == {1}
    assert "set aside in idemp.track.dead: this is no batch of events" in second.said()


def test_u14_a_batch_that_came_twice_is_kept_once(tmp_path: Path, unique: str) -> None:
    """U14: published again because the confirm was lost, delivered again because the ack was."""
    batch = Batch("w", 1, [Event("1", "ok", "s", 1.0), Event("half \ud800", "note", "s", 2.0)])
    with (
        closing(open_transport(f"memory://{unique}")) as sender,
        closing(open_transport(f"memory://{unique}")) as taker,
        closing(open_event_log(f"sqlite:///{tmp_path}/e.db")) as log,
    ):
        log_of_service = PublishingLog(sender)
        for _ in range(3):
            log_of_service.append(batch)
        seen: list[int] = []
        collect(taker, log, lambda: len(seen) < 3, told=lambda n, _: seen.append(n))
        assert taker.depth(QUEUE) == 0
        assert [event.uuid for event in log.find(Query(), limit=9)] == ["half ?", "1"]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_batches_with_odd_numbers_do_not_end_the_collector(
    request: pytest.FixtureRequest, tmp_path: Path, unique: str, kind: str
) -> None:
    """What a log cannot hold is clipped or set aside, and what comes behind is kept; all can be shown."""
    url = f"sqlite:///{tmp_path}/e.db"
    if kind == "postgresql":
        url = request.getfixturevalue("postgresql").database()
    event = '["%s","ok","s",%s,"","","","","","",%s,null,%s,"","","","",null,null%s]'
    huge = "9" * 23
    bodies = [
        f'["w",1,[{event % ("attempt", 1.0, "null", huge, "")}]]',
        f'["w",2,[{event % ("at", "1e300", "1e300", 1, "")}]]',
        f'["w",{huge},[{event % ("number", 1.0, "null", 1, "")}]]',
        f'["w",3,[{event % ("deep", 1.0, "null", 1, "," + "[" * 100_000)}]]',
        f'["w",4,[{event % ("last", 1.0, "null", 1, "")}]]',
    ]
    seen: list[tuple[int, str]] = []
    with (
        closing(open_transport(f"memory://{unique}")) as out,
        closing(open_transport(f"memory://{unique}")) as taker,
        closing(open_event_log(url)) as log,
    ):
        out.declare(QUEUE)
        publish(out, [Publication(body.encode(), Properties(), "", QUEUE) for body in bodies])
        collect(taker, log, lambda: len(seen) < 5, told=lambda n, why: seen.append((n, why)))
    assert [n for n, _ in seen] == [1, 1, 0, 0, 1]
    assert all(why.startswith("this is no batch of events: ") for n, why in seen if not n)
    shown = finished("-m", "idemp", "events", "--tracking", url)
    assert (shown.returncode, shown.stdout.count("\n")) == (0, 3), shown.stderr
    assert finished("-m", "idemp", "trace", "at", "--tracking", url).returncode == 0


def test_a_publishing_log_is_not_looked_into() -> None:
    """It says where to look."""
    with closing(open_event_log("amqp://localhost/?payloads=off")) as log:
        assert not log.payloads
        for look in (
            lambda: log.find(Query(), limit=1),
            lambda: log.story("1", limit=1),
            lambda: log.edges(),
        ):
            with pytest.raises(ConfigError, match="where the collector keeps them"):
                look()


def test_u16_log_lines_are_read_into_the_event_log(tmp_path: Path) -> None:
    """U16: from a file; a bad line is named, and what stands before it is kept."""
    settings = {"IDEMP_TRACKING": f"sqlite:///{tmp_path}/e.db"}
    lines = tmp_path / "lines"
    lines.write_text(f"{LINE}\n\n{LINE.replace('bob', 'alice').replace('seeding', 'handle')}\n")
    done = finished("-m", "idemp", "track", "--lines", str(lines), settings=settings)
    assert (done.returncode, done.stdout) == (0, "kept 2 events\n"), done.stderr
    drawn = finished("-m", "idemp", "flow", "--dot", settings=settings).stdout
    assert '"bob" -> "alice"' in drawn
    lines.write_text(f"{LINE}\nnonsense\n{LINE}\n")
    bad = finished("-m", "idemp", "track", "--lines", str(lines), settings=settings)
    assert bad.returncode == 2
    assert bad.stderr.startswith("idemp: line 2: this is no log line of a message")
    assert bad.stderr.endswith("; 1 lines before it were kept\n")


# ------------------------------------------------------------------ MongoDB, without a server


class Documents:
    """Stands for a collection: this is a test without a server."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []
        self.away = False

    def insert_one(self, document: dict[str, Any]) -> None:
        if self.away:
            raise ServerSelectionTimeoutError("no server")
        self.kept.append(document)


def test_u8_the_mongodb_logger_without_a_server() -> None:
    """U8: the six names, a native time; not tried against a MongoDB."""
    documents = Documents()
    configure(service_name="bob", logger=MongoLogger(collection=documents))
    message = Envelope.pack({"a": 1}, "p")
    message.log("seeding")
    configure()
    [kept] = documents.kept
    assert list(kept) == ["datetime", "service", "description", "uuid", "parent_uuid", "payload"]
    assert abs((datetime.now(UTC) - kept["datetime"]).total_seconds()) < 60
    assert list(kept.values())[1:] == ["bob", "seeding", message.uuid, "p", {"a": 1}]


def test_u14_the_mongodb_logger_behind_a_recorder_without_a_server() -> None:
    """U14: away, it keeps nobody waiting; a client of nothing says so in time."""
    documents = Documents()
    documents.away = True
    recorder = Recorder(MongoLogger(collection=documents), "s", every=0.01)
    recorder.add([Event("1", "note", "s", 1.0)])
    documents.away = False
    until(lambda: recorder.delivered == 1, lambda: recorder.delivered)
    recorder.close()
    nowhere = MongoLogger("mongodb://127.0.0.1:9/?serverSelectionTimeoutMS=100")
    with closing(nowhere), pytest.raises(StoreUnavailable, match="MongoDB: "):
        nowhere.write(Event("1", "note", "s", 1.0))


def test_a_bar_on_a_terminal_while_lines_are_kept(tmp_path: Path) -> None:
    """Many take a while; a few do not."""
    file = tmp_path / "lines"
    for times, bar in ((1_000_000 // len(LINE) + 1, True), (2, False)):
        file.write_text(f"{LINE}\n" * times)
        url = f"sqlite:///{tmp_path}/{times}.db"
        code, shown = Terminal(["-m", "idemp", "track", "--lines", str(file), "--tracking", url]).end()
        assert ("100%" in shown) == bar, shown
        assert code == 0, shown
