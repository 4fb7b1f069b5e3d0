"""example1: the bare producer and consumer, as their docstrings say to start them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service import Stand, finished, stand, until


@pytest.fixture(params=["sqlite", "rabbitmq"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stand]:
    """A broker of each kind, of which nobody else uses ``my-queue``."""
    if request.param == "rabbitmq":
        url = request.getfixturevalue("own_rabbitmq").url
    else:
        url = f"sqlite:///{tmp_path}/queues.db"
    with stand(url, tmp_path) as built:
        yield built


@pytest.mark.parametrize("first", ["producer", "consumer"])
def test_the_consumer_prints_what_the_producer_sends(desk: Stand, first: str) -> None:
    """Whichever starts first: every event is printed, once, in order."""
    # Given
    start = {
        "producer": lambda: desk.run("-m", "example1.producer", desk.url, "0.05"),
        "consumer": lambda: desk.run("-m", "example1.consumer", desk.url),
    }
    second = "consumer" if first == "producer" else "producer"

    # When
    programs = {first: start[first]()}
    if first == "producer":
        programs[first].wait_for("published")
    programs[second] = start[second]()

    # Then
    until(lambda: programs["consumer"].said().count("\n") >= 5, programs["consumer"].said)
    programs["producer"].stop()
    sent = [line.removeprefix("published ") for line in programs["producer"].said().splitlines()]
    until(lambda: sent[-1] in programs["consumer"].said(), programs["consumer"].said)
    events = [json.loads(line) for line in programs["consumer"].said().splitlines()]
    # Who is stopped between publishing and saying so has sent one more than it says.
    assert [event["id"] for event in events][: len(sent)] == sent
    assert len(sent) <= len(events) <= len(sent) + 1
    for event in events:
        assert event["type"] == "new_order"
        assert uuid.UUID(event["user_id"])
    assert desk.depth("my-queue") == 0


@pytest.mark.parametrize("program", ["producer", "consumer"])
def test_no_broker_is_one_sentence(program: str) -> None:
    """Even the barest program says what is wrong."""
    done = finished("-m", f"example1.{program}", "amqp://guest:secret@127.0.0.1:9/")
    assert done.returncode == 1
    assert done.stderr.startswith(f"{program}: ")
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr
