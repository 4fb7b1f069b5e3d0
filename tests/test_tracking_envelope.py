"""Envelopes on the wire, in the log, configured, and as others write them.  Rows U1 to U7, U15, U16."""

from __future__ import annotations

import io
import json
import re
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from idemp.errors import BadMessage, ConfigError
from idemp.ports import Clock, Event
from idemp.tracking.envelope import Envelope, StdoutLogger, configuration, configure, line, read_line

WIRE = (
    '{"uuid":"ceec2889-77ab-451b-a119-0dc717551a6c","parent_uuid":"7603cd5a-d5bb-4524-a1f8-3ac8f7177592",'
    '"content":{"command":"list","target":"posts"}}'
)
LINE = (
    '{"datetime":"2015-03-07 17:53:28 +0100","service":"bob","description":"seeding",'
    '"uuid":"7603cd5a-d5bb-4524-a1f8-3ac8f7177592","parent_uuid":null,'
    '"payload":"Let me tell you a secret:<hidden>"}'
)


@dataclass
class Kept:
    """A user's own logger: one method is enough."""

    events: list[Event] = field(default_factory=list)

    def write(self, event: Event) -> None:
        self.events.append(event)


@pytest.fixture(autouse=True)
def unconfigured() -> Iterator[None]:
    """Each test begins and ends without settings."""
    configure()
    yield
    configure()


@pytest.mark.parametrize("content", [{"a": [1, None]}, "text", 7, None, [], {"ü": "\u2028"}])
def test_u1_pack(content: Any) -> None:
    """U1: a new v4 id in lower case, the content as it was, no parent."""
    packed = Envelope.pack(content)
    assert uuid.UUID(packed.uuid).version == 4
    assert packed.uuid == str(uuid.UUID(packed.uuid))
    assert (packed.content, packed.parent_uuid) == (content, None)
    assert Envelope.pack(content).uuid != packed.uuid


def test_u2_there_and_back() -> None:
    """U2: the three names in their order; identity, parent and content survive the trip."""
    sent = Envelope.pack({"command": "list"}, "a-parent")
    assert list(json.loads(sent.to_json())) == ["uuid", "parent_uuid", "content"]
    came = Envelope.unpack(sent.to_json())
    assert (came.uuid, came.parent_uuid, came.content) == (sent.uuid, "a-parent", {"command": "list"})
    assert came.to_json() == sent.to_json()


def test_u3_a_child_knows_its_parent() -> None:
    """U3: also after the trip, and one generation only."""
    first = Envelope.pack("hello")
    child = Envelope.unpack(first.to_json()).child("hi")
    again = Envelope.unpack(child.to_json()).child("bye")
    assert Envelope.unpack(child.to_json()).parent_uuid == first.uuid
    assert again.parent_uuid == child.uuid
    assert len({first.uuid, child.uuid, again.uuid}) == 3


def test_u4_log() -> None:
    """U4: time, service, description, ids, payload; and which of the two this service is."""
    kept = Kept()
    configure(service_name="bob", logger=kept, clock=Clock(wall=lambda: 1425747208.25))
    sent = Envelope.pack("x")
    sent.log("seeding")
    answer = Envelope.unpack(sent.to_json())
    answer.log("handle")
    first, second = kept.events
    assert first == Event(sent.uuid or "", "note", "bob", 1425747208.25, "sender", why="seeding", body='"x"')
    assert (second.uuid, second.role, second.why) == (sent.uuid, "receiver", "handle")


def test_u5_the_filter_touches_the_log_only() -> None:
    """U5: the formatter sees what is logged, hide_payload logs null, the wire has all."""
    kept = Kept()
    configure(
        service_name="bob",
        logger=kept,
        formatter=lambda content: re.sub(r"secret:\d+", "secret:<hidden>", content),
    )
    message = Envelope.pack("a secret:42")
    message.log("seeding")
    message.log("handle", hide_payload=True)
    assert [event.body for event in kept.events] == ['"a secret:<hidden>"', None]
    assert "secret:42" in message.to_json()


def test_u6_configuration() -> None:
    """U6: a missing name is one sentence; an instance wins over a class; each configure starts anew."""
    with pytest.raises(ConfigError, match="service_name is not set; say configure"):
        Envelope.pack("x").log("seeding")
    made: list[Kept] = []

    def make() -> Kept:
        made.append(Kept())
        return made[-1]

    configure(service_name="bob", logger_class=make)
    assert made == []
    Envelope.pack("x").log("one")
    Envelope.pack("x").log("two")
    assert [len(each.events) for each in made] == [2]
    instance = Kept()
    configure(service_name="bob", logger_class=make, logger=instance)
    Envelope.pack("x").log("three")
    assert (len(instance.events), len(made)) == (1, 1)
    configure(logger=instance)
    with pytest.raises(ConfigError, match="service_name"):
        Envelope.pack("x").log("four")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"service": "bob"}, "knows no 'service'; it knows service_name"),
        ({"service_name": 7}, "service_name=7: a text"),
        ({"logger": object()}, "has no write"),
    ],
)
def test_u6_wrong_settings_are_named(settings: dict[str, Any], said: str) -> None:
    """U6: when they are given, and not when the first message logs."""
    with pytest.raises(ConfigError, match=said):
        configure(**settings)


def test_u6_threads_may_differ() -> None:
    """U6: one setting for the process, and one of its own for who wants it."""
    configure(service_name="all")
    names: list[str] = []

    def bot() -> None:
        names.append(configuration().service)
        configure(service_name="own", everywhere=False)
        names.append(configuration().service)

    thread = threading.Thread(target=bot)
    thread.start()
    thread.join()
    assert (names, configuration().service) == (["all", "own"], "all")


def test_u7_the_line_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    """U7: the default logger; six names in their order, whole seconds, the zone."""
    configure(service_name="bob", clock=Clock(wall=lambda: 1425747208.9))
    message = Envelope.pack("é")
    message.log("seeding")
    said = capsys.readouterr().out
    told = json.loads(said)
    assert list(told) == ["datetime", "service", "description", "uuid", "parent_uuid", "payload"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}", told["datetime"])
    assert (
        said == line(Event(message.uuid or "", "note", "bob", 1425747208.0, why="seeding", body='"é"')) + "\n"
    )
    assert told["payload"] == "é"


def test_u15_any_object_with_write() -> None:
    """U15: nothing to inherit from; the stdout logger is one too."""
    output = io.StringIO()
    configure(service_name="bob", logger=StdoutLogger(output))
    Envelope.pack("x").log("seeding")
    assert json.loads(output.getvalue())["service"] == "bob"


def test_u16_an_envelope_of_another_library() -> None:
    """U16: read, and written again byte for byte."""
    came = Envelope.unpack(WIRE)
    assert came.uuid == "ceec2889-77ab-451b-a119-0dc717551a6c"
    assert came.content == {"command": "list", "target": "posts"}
    assert came.to_json() == WIRE
    assert Envelope.unpack('{"content":1,"extra":2}').uuid is None


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"uuid":7}', '{"parent_uuid":{}}', "[" * 100_000])
def test_u16_what_is_no_envelope_raises(text: str) -> None:
    """U16: and says why."""
    with pytest.raises(BadMessage, match="envelope"):
        Envelope.unpack(text)


def test_u16_a_log_line_of_another_library() -> None:
    """U16: read into an event, whose role nobody recorded; written again it is the same moment."""
    event = read_line(LINE)
    assert event == Event(
        "7603cd5a-d5bb-4524-a1f8-3ac8f7177592",
        "note",
        "bob",
        1425747208.0,
        why="seeding",
        body='"Let me tell you a secret:<hidden>"',
    )
    assert read_line(line(event)) == event
    assert json.loads(line(event)).items() - json.loads(LINE).items() <= {
        ("datetime", json.loads(line(event))["datetime"])
    }


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"datetime":"x"}', LINE.replace('"bob"', "7")])
def test_u16_what_is_no_log_line_raises(text: str) -> None:
    """U16: and says so."""
    with pytest.raises(BadMessage, match="no log line"):
        read_line(text)
