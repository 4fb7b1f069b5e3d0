"""Event logs, each held to the same; and the recorder before them.  Rows U4, U8, U9, U10, U14, U15."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from idemp import open_event_log
from idemp.errors import Closed, ConfigError, StoreUnavailable
from idemp.eventlogs.sql import LAYOUT, SqlEventLog
from idemp.ports import Batch, Edge, Event, EventLog, Query
from idemp.tracking import flow, trace
from idemp.tracking.envelope import Envelope, configure, read_line
from idemp.tracking.recorder import Recorder
from tests.servers import PostgreSQL
from tests.service import until
from tests.test_tracking_envelope import LINE

Open = Callable[[str], EventLog]


@pytest.fixture(params=["sqlite", "postgresql"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the same log again and again; all are closed at the end."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/events.db"
    else:
        url = request.getfixturevalue("postgresql").database()
    logs: list[EventLog] = []

    def another(query: str = "") -> EventLog:
        logs.append(open_event_log(url + query))
        return logs[-1]

    yield another
    for log in logs:
        log.close()


def received(uuid: str, service: str, sender: str, at: float = 1000.0, **more: Any) -> Event:
    return Event(
        uuid, "ok", service, at, "receiver", sender=sender, took=0.25, **{"conversation": uuid, **more}
    )


def test_u8_all_services_in_one_log(opened: Open) -> None:
    """U8: what one process appended another finds, whole; the same batch again changes nothing."""
    odd = Event("é\u2028", "note", "s", 1.5, why="nul \0 and half \ud800", body="base64:AA==", took=0.1)
    batch = Batch("w", 1, [odd, received("1", "billing", "shop", type="order", business="A-1")])
    opened("").append(batch)
    opened("").append(batch)
    opened("").append(Batch("w", 2, [received("2", "billing", "shop", 2000.0, type="ban")]))
    log = opened("")
    assert [event.uuid for event in log.find(Query(), limit=10)] == ["2", "1", "é\u2028"]
    assert log.find(Query(uuid="1"), limit=9) == [batch.events[1]]
    [kept] = log.find(Query(uuid="é\u2028"), limit=9)
    assert (kept.why, kept.body, kept.took, kept.sent_at) == (
        "nul \ufffd and half ?",
        "base64:AA==",
        0.1,
        None,
    )


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        (Query(service="billing"), ["2", "1"]),
        (Query(type="order"), ["3", "1"]),
        (Query(kinds=("failed", "parked")), ["3"]),
        (Query(business="A-1"), ["1"]),
        (Query(conversation="1"), ["3", "1"]),
        (Query(since=1000.0, until=3000.0), ["2", "1"]),
        (Query(uuid="nobody"), []),
    ],
)
def test_u8_events_are_found(opened: Open, query: Query, ids: list[str]) -> None:
    """U8: by service, type, outcome, business key, conversation and time; the newest first."""
    events = [
        received("1", "billing", "shop", 1000.0, type="order", business="A-1"),
        received("2", "billing", "shop", 2000.0, type="ban"),
        Event("3", "failed", "post", 3000.0, "receiver", "1", "1", "billing", "order"),
    ]
    opened("").append(Batch("w", 1, events))
    log = opened("")
    assert [event.uuid for event in log.find(query, limit=10)] == ids
    assert [event.uuid for event in log.find(query, limit=10, newest=False)] == ids[::-1]
    assert [event.uuid for event in log.find(query, limit=1)] == ids[:1]


def test_u9_the_flow_of_recorded_roles(opened: Open) -> None:
    """U9: arrows from the sender to every handler, whatever the clocks say; names are quoted."""
    events = [
        received("1", "billing", "sales-service", 1000.0, type="order"),
        received("1", "post", "sales-service", 1.0, type="order"),
        received("2", 'a "b"\\', "billing", 5000.0, type="paid"),
        received("3", "billing", "billing", 5000.0, type="loop"),
    ]
    log = opened("")
    log.append(Batch("w", 1, events[:2]))
    log.append(Batch("w", 2, [*events[2:], events[0]]))
    edges = log.edges()
    assert Edge("sales-service", "billing", "order", "ok", 2, 0.5, 0.25, 960.0, 960.0) in edges
    assert [(each.sender, each.service, each.n) for each in flow.arrows(edges)] == [
        ("billing", 'a "b"\\', 1),
        ("sales-service", "billing", 2),
        ("sales-service", "post", 1),
    ]
    assert flow.dot(edges) == (
        "digraph message_flow {\n  node [style=filled fillcolor=white]\n  rankdir=LR\n"
        '  "a \\"b\\"\\\\"\n  "billing"\n  "billing" -> "a \\"b\\"\\\\"\n  "post"\n  "sales-service"\n'
        '  "sales-service" -> "billing"\n  "sales-service" -> "post"\n}\n'
    )
    assert [edge.service for edge in log.edges(since=4000.0)] == ['a "b"\\', "billing"]


def test_u9_envelopes_whose_receiver_was_first_by_the_clock(opened: Open) -> None:
    """U9, U16: the role that was recorded wins; lines without roles fall back on the first."""
    log = opened("")
    first, second, other = Envelope.pack(1), Envelope.pack(2), read_line(LINE)
    events = [
        Event(first.uuid or "", "note", "alice", 5000.0, "sender"),
        Event(first.uuid or "", "note", "bob", 1.0, "receiver"),
        Event(second.uuid or "", "note", "bob", 5000.0, "sender", first.uuid or ""),
        Event(second.uuid or "", "note", "carl", 4999.0, "receiver", first.uuid or ""),
        other,
        Event(other.uuid, "note", "alice", other.at + 1),
        Event(other.uuid, "note", "carl", other.at + 2),
    ]
    log.append(Batch("w", 1, events))
    found = [(each.sender, each.service) for each in flow.arrows(log.edges())]
    assert found == [("alice", "bob"), ("bob", "alice"), ("bob", "carl")]


def test_u10_the_story_of_a_conversation(opened: Open) -> None:
    """U10: asked for any message of it: the whole tree, parents and children."""
    log = opened("")
    made = {"1": "", "2": "1", "3": "1", "4": "3", "other": ""}
    for number, (uuid, parent) in enumerate(made.items()):
        whole = "other" if uuid == "other" else "1"
        sent = Event(uuid, "sent", "shop", 10.0 + number, "sender", parent, whole, "shop", "order")
        log.append(Batch(f"s{number}", 1, [sent]))
        log.append(Batch(f"r{number}", 1, [received(uuid, "b", "shop", parent=parent, conversation=whole)]))
    for asked in ("1", "2", "3", "4"):
        [root] = trace.stories(log.story(asked, limit=100))
        assert [node.uuid for node in root.walk()] == ["1", "3", "4", "2"]
        assert all(node.sent is not None and node.receipts[0].outcome == "ok" for node in root.walk())
    assert [root.uuid for root in trace.stories(log.story("other", limit=9))] == ["other"]
    assert log.story("nobody", limit=9) == []


def test_u10_the_story_of_envelopes(opened: Open) -> None:
    """U10, U4: with nothing but parents: up to the first, down to the last; unknown ones are named."""
    log = opened("")
    events: list[Event] = []
    configure(service_name="bob", logger=type("Kept", (), {"write": lambda _, event: events.append(event)})())
    root = Envelope.pack("root", "forgotten")
    children = [root.child(n) for n in range(3)]
    grandchildren = [child.child(n) for child in children for n in range(2)]
    for message in (root, *children, *grandchildren, Envelope.pack("other")):
        message.log("seeding")
    configure()
    log.append(Batch("w", 1, events))
    for asked in (root, children[1], grandchildren[5]):
        [found] = trace.stories(log.story(asked.uuid or "", limit=1000))
        assert found.uuid == "forgotten"
        assert "nobody told of it" in "\n".join(trace.lines(found))
        assert len(list(found.walk())) == 1 + 1 + 3 + 6


NOTES = [
    Event("1", "note", "alice", 100.0, "sender"),
    Event("1", "note", "bob", 90.0, "receiver"),
    Event("1", "note", "bob", 200.0, "receiver"),
    Event("1", "note", "carl", 130.0, "receiver"),
    Event("2", "note", "carl", 70.0),
    Event("2", "note", "bob", 60.0),
    Event("2", "note", "alice", 10.0),
    Event("3", "note", "bob", 400.0, "receiver"),
    Event("3", "note", "carl", 500.0),
    Event("4", "note", "alice", 300.0, "sender"),
    Event("", "note", "alice", 1.0, "sender"),
    Event("", "note", "bob", 2.0, "receiver"),
]
"""Of four messages, and of none: with roles, without, only with a receiver, and told of once."""
NOTED = [
    Edge("alice", "bob", "", "note", 2, 0.0, 0.0, 60.0, 60.0),
    Edge("alice", "carl", "", "note", 2, 0.0, 0.0, 60.0, 120.0),
]


@pytest.mark.parametrize("seed", range(4))
def test_u9_notes_in_any_order(opened: Open, seed: int) -> None:
    """U9: each counts once for each who told of it, however the batches come; also one that comes twice."""
    events = NOTES[:]
    random.Random(seed).shuffle(events)
    log = opened("")
    for start in range(0, len(events), 1 + seed):
        batch = Batch("w", start, events[start : start + 1 + seed])
        log.append(batch)
        log.append(batch)
    assert log.edges() == NOTED
    log.append(Batch("v", 1, [Event("3", "note", "carl", 9.0, "sender"), received("9", "b", "a")]))
    assert [tuple(each)[:5] for each in log.edges()] == [
        ("a", "b", "", "ok", 1),
        ("alice", "bob", "", "note", 2),
        ("alice", "carl", "", "note", 2),
        ("carl", "bob", "", "note", 1),
    ]
    assert [edge.service for edge in log.edges(since=150.0)] == ["b", "carl", "bob"]


def test_u9_notes_of_many_who_tell_at_once(opened: Open) -> None:
    """U9: sender and receiver record in the same moment, each into its own batch."""
    both = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        for service, role in (("alice", "sender"), ("bob", "receiver")):
            told = [Event(str(n), "note", service, 100.0, role) for n in range(40)]
            pool.submit(_one_by_one, opened(""), service, told, both)
    assert sum(edge.n for edge in opened("").edges()) == 40


def _one_by_one(log: EventLog, writer: str, events: list[Event], both: threading.Barrier) -> None:
    for number, event in enumerate(events):
        both.wait(30)
        while True:
            try:
                log.append(Batch(writer, number, [event]))
                break
            except StoreUnavailable:  # as the recorder does
                continue


@pytest.mark.parametrize("many", [1, 2, 99, 100, 101, 250])
@pytest.mark.parametrize("kind", ["the same", "others", "mixed"])
def test_u8_what_is_appended_is_found(opened: Open, many: int, kind: str) -> None:
    """U8: each field of each event, whatever the events of a batch have in common."""
    alike = received("1", "b", "a", 1.0)
    events = [alike if kind == "the same" or (kind == "mixed" and n % 3) else _odd(n) for n in range(many)]
    log = opened("")
    log.append(Batch("w", 1, events))
    assert sorted(log.find(Query(), limit=1000), key=repr) == sorted(events, key=repr)


def test_numbers_that_no_column_holds(opened: Open) -> None:
    """The event is kept, with the greatest number that there is, and so are its neighbours."""
    log = opened("")
    log.append(Batch("w", 1, [received(str(n), "b", "a", attempt=n) for n in (1, 2**31, 2**63, -(10**30))]))
    kept = {event.uuid: event.attempt for event in log.find(Query(), limit=9)}
    assert sorted(kept.values()) == [-(2**31) + 1, 1, 2**31 - 1, 2**31 - 1]


def _odd(n: int) -> Event:
    """Another one for each ``n``, with something missing here and there."""
    fields: list[Any] = []
    for place, name in enumerate(Event.__struct_fields__):
        if (n + place) % 5 == 0 and name in ("sent_at", "took", "body", "properties"):
            fields.append(None)
        else:
            number = name in ("at", "sent_at", "took", "attempt")
            fields.append(n + place if number else f"{name} {n}")
    return Event(*fields)


# ------------------------------------------------------------------ logs of an older layout

_COLUMNS = ", ".join(f"{name} {{{name}}}" for name in Event.__struct_fields__)
FIRST = (
    f"CREATE TABLE event (n {{serial}}, {_COLUMNS})",
    "CREATE INDEX event_uuid ON event (uuid)",
    "CREATE INDEX event_note ON event (uuid, role) WHERE kind = 'note'",
    "CREATE TABLE batch (writer TEXT, number INTEGER, at {at}, PRIMARY KEY (writer, number))",
    "CREATE TABLE edge (sender TEXT, service TEXT, type TEXT, kind TEXT, minute {at},"
    " n BIGINT, seconds {at}, longest {at}, PRIMARY KEY (sender, service, type, kind, minute))",
)
"""The first layout."""


@pytest.fixture(params=["sqlite", "postgresql"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a log of the first layout, with all notes but the last four, and an event."""
    fields = Event.__struct_fields__
    rows = [[getattr(event, name) for name in fields] for event in [*NOTES[:-4], received("5", "b", "a")]]
    floats = dict.fromkeys(("at", "sent_at", "took"), "DOUBLE PRECISION")
    types = {**dict.fromkeys(fields, "TEXT"), **floats, "attempt": "INTEGER"}
    insert = f"INSERT INTO event ({', '.join(fields)}) VALUES ({', '.join(['%s'] * len(fields))})"
    edge = "INSERT INTO edge VALUES ('a', 'b', '', 'ok', 960, 1, 0.25, 0.25)"
    if request.param == "sqlite":
        with closing(sqlite3.connect(tmp_path / "old.db", isolation_level=None)) as file:
            for text in FIRST:
                file.execute(text.format(serial="INTEGER PRIMARY KEY", **types))
            file.executemany(insert.replace("%s", "?"), rows)
            file.execute(edge)
        return f"sqlite:///{tmp_path}/old.db"
    url: str = request.getfixturevalue("postgresql").database()
    with psycopg.connect(url) as server:
        server.execute("CREATE SCHEMA idemp_events")
        server.execute("SET search_path = idemp_events")
        for text in FIRST:
            server.execute(text.format(serial="BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY", **types))
        server.cursor().executemany(insert, rows)
        server.execute(edge)
    return url


def test_a_log_of_the_first_layout_is_renewed_once(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its notes are counted; one that was interrupted begins again; who comes later finds it done."""
    whole = SqlEventLog._count_notes

    def interrupted(*given: Any) -> None:
        whole(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr("idemp.eventlogs.sql.PART", 2)
    with monkeypatch.context() as patch, closing(open_event_log(old)) as log:
        patch.setattr(SqlEventLog, "_count_notes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            log.edges()
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(_edges, [old] * 3):
            assert found == [Edge("a", "b", "", "ok", 1, 0.25, 0.25, 960.0, 960.0), *NOTED]
    with closing(open_event_log(old)) as log:
        log.append(Batch("w", 1, NOTES[-4:]))
        log.append(Batch("w", 2, [received("6", "b", "a")]))
        assert log.edges() == [Edge("a", "b", "", "ok", 2, 0.5, 0.25, 960.0, 960.0), *NOTED]
        assert {event.uuid for event in log.find(Query(), limit=99)} == {"", "1", "2", "3", "4", "5", "6"}


def _edges(url: str) -> list[Edge]:
    with closing(open_event_log(url)) as log:
        return log.edges()


def test_a_log_of_a_newer_layout_is_left_alone(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sentence that says what to do."""
    opened("").append(Batch("w", 1, []))
    monkeypatch.setattr("idemp.eventlogs.sql.LAYOUT", LAYOUT - 1)
    with pytest.raises(ConfigError, match=f"of a newer idemp .layout {LAYOUT}.; upgrade idemp"):
        opened("").append(Batch("w", 2, []))


def test_retention_by_age_and_by_rows(opened: Open) -> None:
    """What is too old or too much goes, of the small tables too; the newest stays."""
    log = opened("?retention=100s&rows=10")
    log.append(Batch("w", 1, [received(f"old{n}", "b", "a", 1000.0 + n) for n in range(5)]))
    log.append(Batch("w", 2, [received(f"new{n}", "b", "a", 2000.0 + n) for n in range(30)]))
    assert log.prune(2050.0) == 25
    found = log.find(Query(), limit=100)
    assert [event.uuid for event in found] == [f"new{n}" for n in range(29, 19, -1)]
    assert log.prune(2050.0) == 0
    assert sum(edge.n for edge in log.edges()) == 30


def test_u11_what_a_receiver_never_told_of(opened: Open) -> None:
    """U11: sent, and nothing from that service; the others do not matter."""
    log = opened("")
    for n in range(4):
        sent = Event(str(n), "sent", "shop", 100.0 + n, "sender", type="order", conversation=str(n))
        log.append(Batch("w", n, [sent, received(str(n), "post", "shop", type="order")]))
    log.append(Batch("b", 1, [received("1", "billing", "shop", type="order")]))
    log.append(Batch("b", 2, [Event("2", "started", "billing", 101.0, "receiver", conversation="2")]))
    missing = log.unanswered("billing", "order", 0.0, 200.0, limit=10)
    assert [event.uuid for event in missing] == ["0", "3"]
    assert log.unanswered("billing", "order", 0.0, 102.0, limit=10)[0].uuid == "0"
    assert log.unanswered("post", "order", 0.0, 200.0, limit=10) == []


def test_after_close_it_says_so(opened: Open) -> None:
    """Once and for all."""
    log = opened("")
    log.append(Batch("w", 1, []))
    log.close()
    with pytest.raises(Closed):
        log.append(Batch("w", 2, []))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("events.db", "is no URL"),
        ("mysql://u:secret@h/d", "use sqlite:///events.db, postgresql:// or amqp://"),
        ("sqlite:///e.db?rows=0", "rows='0': a whole number from 1"),
        ("sqlite:///e.db?retention=soon", "retention='soon' is no duration"),
        ("sqlite:///e.db?row=7", "no option 'row'"),
    ],
)
def test_a_wrong_url_is_one_sentence(url: str, said: str) -> None:
    """Which names the setting, and no password."""
    with pytest.raises(ConfigError, match=said) as caught:
        open_event_log(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://127.0.0.1:9/d?password=tellnobody",
        "postgresql://127.0.0.1:9/d?sslpassword=tell&nobody&nope=1",
        "postgresql://u:tellnobody@127.0.0.1:9/d?password=tellnobody%00",
        "postgresql://u:tellnobody%zz@127.0.0.1:9/d",
        "postgresql://u:tellnobody%00@127.0.0.1:9/d",
        "postgresql://u:tellnobody x@127.0.0.1:9/d",
        "postgresql://u:se@tellnobody@127.0.0.1:9/d",
        "postgresql://u:tellnobody@[::1]x/d",
        "redis://127.0.0.1:9/0?password=tellnobody",
        "postgresql:u:tellnobody@127.0.0.1:9/d",
        "u:tellnobody@127.0.0.1:9/d",
    ],
)
def test_a_password_is_not_shown(url: str) -> None:
    """Wherever it stands in a URL, and whatever the driver says of it."""
    with pytest.raises((ConfigError, StoreUnavailable)) as caught, closing(open_event_log(url)) as log:
        log.find(Query(), limit=1)
    assert "nobody" not in str(caught.value)


def test_an_option_that_the_driver_does_not_know() -> None:
    """Is named."""
    said = 'invalid URI query parameter: "nope"'
    url = "postgresql://127.0.0.1:9/d?nope=1"
    with closing(open_event_log(url)) as log, pytest.raises(ConfigError, match=said):
        log.find(Query(), limit=1)


def test_a_password_of_which_nothing_is_escaped(postgresql: PostgreSQL) -> None:
    """The event log takes it, as the store does."""
    for number, password in enumerate(("100%zz", "a@b", "two words")):
        role = f"odd_{number}"
        postgresql.psql(f"CREATE ROLE {role} LOGIN SUPERUSER PASSWORD '{password}'")
        host = postgresql.database().rpartition("@")[2]
        url = f"postgresql://{role}:{password}@{host}"
        with closing(open_event_log(url)) as log:
            log.append(Batch("w", 1, [received("1", "billing", "shop")]))
            assert len(log.find(Query(), limit=9)) == 1


def test_a_file_that_is_none(tmp_path: Path) -> None:
    """Is said when it is first used."""
    (tmp_path / "text").write_text("this is no database, by no means at all" * 100)
    with (
        closing(open_event_log(f"sqlite:///{tmp_path}/text")) as log,
        pytest.raises(ConfigError, match="text"),
    ):
        log.append(Batch("w", 1, []))
    with closing(open_event_log(f"sqlite:///{tmp_path}/no/such.db")) as log, pytest.raises(ConfigError):
        log.append(Batch("w", 1, []))


# ------------------------------------------------------------------ the recorder


class Away:
    """A log that can be away, or slow; keeps what it was given."""

    def __init__(self) -> None:
        self.here = threading.Event()
        self.batches: list[Batch] = []
        self.tries = 0

    def append(self, batch: Batch) -> None:
        self.tries += 1
        if not self.here.is_set():
            raise StoreUnavailable("the disk is full")
        self.batches.append(batch)

    def events(self) -> list[Event]:
        return [event for batch in self.batches for event in batch.events]


def notes(start: int, n: int) -> list[Event]:
    return [Event(str(number), "note", "s", float(number)) for number in range(start, start + n)]


def test_u14_the_log_is_away_and_comes_back() -> None:
    """U14: recording takes no time meanwhile; all is delivered later, in order."""
    log = Away()
    recorder = Recorder(log, "s", every=0.01)
    began = time.monotonic()
    for n in range(100):
        recorder.add(notes(n * 10, 10))
    assert time.monotonic() - began < 1.0
    until(lambda: log.tries >= 2, lambda: log.tries)
    log.here.set()
    until(lambda: recorder.delivered == 1000, lambda: recorder.delivered)
    recorder.close()
    assert [event.uuid for event in log.events()] == [str(n) for n in range(1000)]
    assert recorder.dropped == 0


def test_u14_what_does_not_fit_is_counted_and_told() -> None:
    """U14: the oldest go; how many stands in the log once it is back: delivered and dropped are all."""
    log = Away()
    recorder = Recorder(log, "s", room=100, every=0.01)
    for n in range(500):
        recorder.add(notes(n * 10, 10))
    log.here.set()
    until(lambda: any(event.kind == "dropped" for event in log.events()), log.events)
    recorder.close()
    told = sum(event.attempt for event in log.events() if event.kind == "dropped")
    kept = [event for event in log.events() if event.kind == "note"]
    assert told == recorder.dropped
    assert len(kept) + told == 5000
    assert kept[-1].uuid == "4999"


def test_u14_at_the_end_what_stays_behind_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """U14: the end waits a little for an absent log, and no longer."""
    monkeypatch.setattr("idemp.tracking.recorder.FAREWELL", 0.5)
    recorder = Recorder(Away(), "s", every=0.01)
    recorder.add(notes(0, 30))
    began = time.monotonic()
    recorder.close()
    assert time.monotonic() - began < 5.0
    assert recorder.dropped == 30
    recorder.add(notes(30, 1))
    assert recorder.dropped == 30


def test_u14_an_ambiguous_batch_is_sent_again_and_kept_once(tmp_path: Path) -> None:
    """U14: the log took it, and its reply was lost."""
    with closing(open_event_log(f"sqlite:///{tmp_path}/events.db")) as log:

        class Lossy:
            lost = 0

            def append(self, batch: Batch) -> None:
                log.append(batch)
                if self.lost < 2:
                    self.lost += 1
                    raise StoreUnavailable("no reply")

        recorder = Recorder(Lossy(), "s", every=0.01)
        recorder.add(notes(0, 7))
        until(lambda: recorder.delivered == 7, lambda: recorder.delivered)
        recorder.close()
        assert len(log.find(Query(), limit=100)) == 7


def test_u15_a_user_class_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """U15: write(event) is enough; an event that it cannot take is counted, the others are not held up."""

    class Picky:
        def __init__(self) -> None:
            self.seen: list[str] = []
            self.refusals = 0

        def write(self, event: Event) -> None:
            if event.uuid == "3":
                raise ValueError("I do not like threes")
            if event.uuid == "5" and self.refusals < 1:
                self.refusals += 1
                raise ConnectionError("gone for a moment")
            self.seen.append(event.uuid)

    picky = Picky()
    recorder = Recorder(picky, "s", every=0.01)
    recorder.add(notes(0, 8))
    until(lambda: len(picky.seen) == 8, lambda: picky.seen)  # the eighth says that one was dropped
    recorder.close()
    assert picky.seen == ["0", "1", "2", "4", "5", "6", "7", ""]
    assert recorder.dropped == 1
    assert "I do not like threes" in caplog.text


def test_u14_a_postgresql_that_was_restarted(own_postgresql: PostgreSQL) -> None:
    """U14: events made while it was down are there afterwards, each once."""
    with closing(open_event_log(own_postgresql.url)) as log:
        recorder = Recorder(log, "s", every=0.01)
        recorder.add(notes(0, 10))
        until(lambda: recorder.delivered == 10, lambda: recorder.delivered)
        own_postgresql.kill()
        recorder.add(notes(10, 10))
        own_postgresql.start()
        recorder.add(notes(20, 10))
        until(lambda: recorder.delivered == 30, lambda: recorder.delivered)
        recorder.close()
        found = log.find(Query(), limit=100, newest=False)
        assert {event.uuid for event in found} >= {str(n) for n in range(10, 30)}
        assert len(found) == len({event.uuid for event in found})
