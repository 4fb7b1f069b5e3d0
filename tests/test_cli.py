"""The command line as a process: what it prints, its exit codes, and one sentence for what goes wrong."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from idemp import open_store, open_transport
from idemp.ports import Abandon, Busy, Claim, Claimed, Complete, Done, Doubt, Free, Get, Park, Release, Store
from idemp.stores import namespace_of
from tests.service import PATIENCE, Stand, environment, finished, stand

Run = subprocess.CompletedProcess[str]


@pytest.fixture(params=["sqlite", "rabbitmq"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stand]:
    """A broker of each kind."""
    if request.param == "rabbitmq":
        url = request.getfixturevalue("rabbitmq").url
    else:
        url = f"sqlite:///{tmp_path}/queues.db"
    with stand(url, tmp_path) as built:
        yield built


def idemp(*arguments: str, **options: Any) -> Run:
    """``idemp`` with arguments, run to its end."""
    return finished("-m", "idemp", *arguments, **options)


def printed(done: Run) -> list[Any]:
    """What ``--json`` printed, line by line."""
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def one_sentence(done: Run, *parts: str, code: int = 2) -> None:
    """It failed with one line on stderr, which has ``parts`` in it."""
    assert done.returncode == code, done
    assert done.stdout == ""
    assert done.stderr.startswith("idemp: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


# ------------------------------------------------------------------ publish


@pytest.fixture
def bound(desk: Stand, unique: str) -> str:
    """A queue that gets everything that is published to the exchange ``unique``."""
    with closing(open_transport(desk.url)) as transport:
        transport.declare(unique, unique, "#")
    return unique


def publish(desk: Stand, exchange: str, *arguments: str, **options: Any) -> Run:
    return idemp("publish", "--transport", desk.url, "--exchange", exchange, *arguments, **options)


def test_publish_one_message(desk: Stand, bound: str) -> None:
    """N14: exchange, routing key and JSON; the broker gets it as it was given, with AMQP's properties."""
    event = '{"type": "new_order", "id": "123", "args": {"cents": 5}, "extra": true}'
    done = publish(desk, bound, "--routing-key", "a.b", event)
    assert (done.returncode, done.stdout) == (0, f"sent message '123' to {bound}\n"), done.stderr
    [delivery] = desk.taken(bound, 1)
    assert delivery.body == event.encode()
    assert (delivery.exchange, delivery.routing_key) == (bound, "a.b")
    about = delivery.properties
    assert (about.message_id, about.type, about.app_id) == ("123", "new_order", "idemp")
    assert about.content_type == "application/json"
    assert about.timestamp is not None
    assert abs(about.timestamp - time.time()) < 60


def test_publish_by_environment_and_for_programs(desk: Stand, bound: str) -> None:
    """N14: IDEMP_TRANSPORT names the broker, --json answers a program, foo is the routing key."""
    event = '{"type": "new_order", "id": "123"}'
    done = idemp("publish", "--json", "--exchange", bound, event, settings={"IDEMP_TRANSPORT": desk.url})
    assert printed(done) == [{"sent": 1, "exchange": bound, "routing_key": "foo", "id": "123"}]
    assert desk.taken(bound, 1)[0].routing_key == "foo"


@pytest.mark.parametrize("way", ["file", "stdin", "dash", "file-dash"])
def test_publish_lines(desk: Stand, bound: str, tmp_path: Path, way: str) -> None:
    """N14: JSON lines from a file or a pipe, in their order; empty lines mean nothing; no bar in a pipe."""
    lines = [json.dumps({"type": "new_order", "id": str(n)}) for n in range(3000)]
    text = "\n".join([lines[0], "", *lines[1:]])
    file = tmp_path / "lines"
    file.write_text(text)
    arguments = {"file": ["--file", str(file)], "stdin": [], "dash": ["-"], "file-dash": ["--file", "-"]}[way]
    done = publish(desk, bound, *arguments, input=text)
    assert (done.stdout, done.stderr) == (f"sent 3000 messages to {bound}\n", "")
    assert [delivery.body.decode() for delivery in desk.taken(bound, 3000)] == lines


def test_publish_a_slow_pipe(desk: Stand, bound: str) -> None:
    """A line is sent when it comes, not when the pipe ends."""
    command = [sys.executable, "-m", "idemp", "publish", "--transport", desk.url, "--exchange", bound]
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        for id in ("1", "2"):
            process.stdin.write(json.dumps({"type": "new_order", "id": id}).encode() + b"\n")
            process.stdin.flush()
            assert desk.taken(bound, 1)[0].properties.message_id == id
        process.stdin.close()
        assert process.wait(PATIENCE) == 0
        assert process.stdout is not None
        assert process.stdout.read() == f"sent 2 messages to {bound}\n".encode()


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("not json", "line 3: the body is not JSON"),
        ('{"type":"new_order"}', "line 3: the message has no id; --new-id gives it one"),
        ("[]", "line 3: the body is JSON, but not an object"),
        ('{"id":"3"}', "line 3: the message has no type"),
    ],
)
def test_a_bad_line_is_named(desk: Stand, bound: str, bad: str, why: str) -> None:
    """N14: with its number; what stands before it was sent, what stands behind it was not."""
    good = [json.dumps({"type": "new_order", "id": id}) for id in "124"]
    done = publish(desk, bound, input="\n".join([*good[:2], bad, good[2]]))
    one_sentence(done, why, "; 2 messages were sent before it")
    assert len(desk.taken(bound, 2)) == 2
    assert desk.depth(bound) == 0


def test_a_new_id_only_when_asked(desk: Stand, bound: str) -> None:
    """N13: a message without an id is refused; --new-id gives it one and leaves an id that is there."""
    bare = '{"type":"new_order","user_id":"u"}'
    one_sentence(publish(desk, bound, bare), "the message has no id; --new-id gives it one")
    [sent] = printed(publish(desk, bound, "--json", "--new-id", bare))
    assert re.fullmatch(r"[0-9a-f-]{36}", sent["id"])
    [kept] = printed(publish(desk, bound, "--json", "--new-id", '{"type":"new_order","ID":"mine"}'))
    assert kept["id"] == "mine"
    new, old = desk.taken(bound, 2)
    assert json.loads(new.body) == {"type": "new_order", "user_id": "u", "id": sent["id"]}
    assert old.properties.message_id == "mine"
    one_sentence(publish(desk, bound, "--new-id", '{"type":"new_order","id":""}'), "the id is empty")


def test_the_longest_id(desk: Stand, bound: str) -> None:
    """Longer than a property of AMQP may be: the body has it."""
    event = json.dumps({"type": "t" * 1024, "id": "x" * 1024})
    assert publish(desk, bound, event).returncode == 0
    [delivery] = desk.taken(bound, 1)
    assert delivery.body == event.encode()


def test_nobody_takes_it(desk: Stand, bound: str) -> None:
    """N14: a message that no queue takes is not sent."""
    with closing(open_transport(desk.url)) as transport:
        transport.declare(f"{bound}-2", f"{bound}-2", "only.this")
    event = '{"type":"new_order","id":"1"}'
    one_sentence(publish(desk, f"{bound}-2", event), "no queue takes routing key 'foo' of exchange")


def test_what_publish_does_not_understand(tmp_path: Path) -> None:
    """Two sources at once, a file that is not there."""
    one_sentence(idemp("publish", "{}", "--file", __file__), "Give either JSON or --file.")
    one_sentence(idemp("publish", "--file", str(tmp_path / "none")), "No such file")


def test_a_progress_bar_on_a_terminal(desk: Stand, bound: str, tmp_path: Path) -> None:
    """N14: for many lines, on stderr; a few lines need none."""
    many, few = tmp_path / "many", tmp_path / "few"
    lines = [json.dumps({"type": "new_order", "id": str(n), "args": "x" * 1000}) for n in range(1000)]
    many.write_text("\n".join(lines))
    few.write_text("\n".join(lines[:10]))
    for file, bar in ((many, True), (few, False)):
        arguments = ["publish", "--transport", desk.url, "--exchange", bound, "--file", str(file)]
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "idemp", *arguments]
        with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=theirs) as process:
            os.close(theirs)
            shown = _everything(ours)
            assert process.wait(PATIENCE) == 0
        assert ("100%" in shown) == bar, shown


_PATIENT = """
import threading
from idemp.bars import watching
from idemp.ports import Progress
with watching("reading a store", lambda: Progress(3, 4), 0.1):
    threading.Event().wait({seconds})
"""


@pytest.mark.parametrize(("seconds", "told"), [(0.6, True), (0.0, False)])
def test_a_bar_on_a_terminal_while_a_store_is_read(seconds: float, told: bool) -> None:
    """Not if it comes at once, and never in a pipe."""
    command = [sys.executable, "-c", _PATIENT.format(seconds=seconds)]
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, env=environment(), stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = _everything(ours)
        assert [word in shown for word in ("reading a store", "75%", "3/4")] == [told] * 3
        assert process.wait(PATIENCE) == 0
    assert subprocess.run(command, env=environment(), capture_output=True, check=True).stderr == b""


def _everything(terminal: int) -> str:
    """What is written to a terminal until nobody has it open."""
    shown = b""
    with open(terminal, "rb", buffering=0) as reader:
        try:
            while chunk := reader.read(4096):
                shown += chunk
        except OSError:  # EIO is how a terminal says that it ended
            pass
    return shown.decode(errors="replace")


# ------------------------------------------------------------------ ls, get, doubt


@pytest.fixture(params=["sqlite", "etcd"])
def kept(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[tuple[str, Store]]:
    """A store with a key in each state, and its URL."""
    url = f"sqlite:///{tmp_path}/seen.db"
    if request.param == "etcd":
        url = f"{request.getfixturevalue('etcd').url}{unique}"
    store = open_store(url)

    def claim(key: str) -> int:
        reply = store.apply([Claim(key)])[0]
        assert isinstance(reply, Claimed)
        return reply.token

    store.apply([Complete("a/done", claim("a/done"), b'{"receipt": 7}')])
    store.apply([Complete("a/raw", claim("a/raw"), b"\xff\x00")])
    claim("b/busy")
    store.apply([Abandon("b/doubt", claim("b/doubt"))])
    store.apply([Park("b/parked", claim("b/parked"), "attempts used up (5): ValueError: no")])
    store.apply([Release("b/free", claim("b/free"), 2)])
    store.apply([Complete(ODD, claim(ODD), None)])
    yield url, store
    store.close()


ODD = "c/line\nbreak\x1b[31m\x00\\ \u202eü"
SHOWN = r"c/line\nbreak\x1b[31m\x00\\ \u202eü"


def test_ls_shows_states_in_order(kept: tuple[str, Store]) -> None:
    """One line a key: state, age, key, why."""
    done = idemp("ls", "--store", kept[0])
    assert done.returncode == 0, done.stderr
    lines = [re.sub(r" +(\d+ s)? +", " - ", line, count=1) for line in done.stdout.splitlines()]
    assert lines == [
        "done - a/done",
        "done - a/raw",
        "busy - b/busy",
        "doubt - b/doubt  (attempt 1 may have taken effect)",
        "free - b/free  (2 attempts so far)",
        "parked - b/parked  (attempts used up (5): ValueError: no)",
        f"done - {SHOWN}",
    ]


def test_ls_for_programs(kept: tuple[str, Store]) -> None:
    """A JSON object a line, with the key as it is."""
    found = printed(idemp("ls", "--json", settings={"IDEMP_STORE": kept[0]}))
    assert [(each["key"], each["state"]) for each in found] == [
        ("a/done", "done"),
        ("a/raw", "done"),
        ("b/busy", "busy"),
        ("b/doubt", "doubt"),
        ("b/free", "free"),
        ("b/parked", "parked"),
        (ODD, "done"),
    ]
    assert found[0]["result"] == {"receipt": 7}
    assert found[1]["result_hex"] == "ff00"
    assert found[5]["reason"] == "attempts used up (5): ValueError: no"
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", found[0]["at"])


def test_ls_narrows_and_pages(kept: tuple[str, Store]) -> None:
    """By prefix and state; the end of a page says how to go on."""
    store = ("--store", kept[0])
    assert [each["key"] for each in printed(idemp("ls", "b/", "--json", *store))] == [
        "b/busy",
        "b/doubt",
        "b/free",
        "b/parked",
    ]
    assert [each["key"] for each in printed(idemp("ls", "--state", "doubt", "--json", *store))] == ["b/doubt"]
    first = idemp("ls", "--limit", "6", *store)
    assert first.stderr == f"showing 6 of 7 in {namespace_of(kept[0])}; continue with --after b/parked\n"
    rest = idemp("ls", "--limit", "6", "--after", "b/parked", *store)
    assert (rest.stdout.count("\n"), rest.stderr) == (1, "")
    assert idemp("ls", "--limit", "7", *store).stderr == ""
    assert idemp("ls", "nothing", *store).stdout == ""


def test_ls_finds_few_among_many(tmp_path: Path) -> None:
    """A page of a rare state may be spread over many pages of the store."""
    url = f"sqlite:///{tmp_path}/seen.db"
    store = open_store(url)
    keys = [f"k/{n:05}" for n in range(2500)]
    claims = store.apply([Claim(key) for key in keys])
    tokens = [claim.token for claim in claims if isinstance(claim, Claimed)]
    for start in range(0, 2500, 1250):
        store.apply([Park(keys[start], tokens[start], "why")])
    store.close()
    found = printed(idemp("ls", "--state", "parked", "--json", "--store", url))
    assert [each["key"] for each in found] == ["k/00000", "k/01250"]
    more = idemp("ls", "--limit", "2000", "--store", url)
    assert more.stdout.count("\n") == 2000
    assert more.stderr == f"showing 2000 of 2500 in {tmp_path}/seen.db; continue with --after k/01999\n"
    assert {each["namespace"] for each in found} == {f"{tmp_path}/seen.db"}


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    """``idemp ls | head -1`` is no error."""
    url = f"sqlite:///{tmp_path}/seen.db"
    with closing(open_store(url)) as store:
        store.apply([Claim(f"k/{n:05}" + "x" * 100) for n in range(2000)])
    ls = f"'{sys.executable}' -m idemp ls --limit 2000 --store {url}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {ls} | head -1"], env=environment(), capture_output=True, text=True
    )
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("key", "state", "fields"),
    [
        ("a/done", "done", {"result": {"receipt": 7}}),
        ("b/busy", "busy", {"attempt": 1}),
        ("b/doubt", "doubt", {"attempt": 1}),
        ("b/parked", "parked", {"reason": "attempts used up (5): ValueError: no"}),
        ("b/free", "free", {"attempts": 2}),
        (SHOWN, "done", {}),
    ],
)
def test_get(kept: tuple[str, Store], key: str, state: str, fields: dict[str, Any]) -> None:
    """Everything about one key, which is named as `ls` prints it."""
    [found] = printed(idemp("get", key, "--json", "--store", kept[0]))
    assert found["state"] == state
    assert found["key"] == (ODD if key == SHOWN else key)
    assert fields.items() <= found.items()
    plain = idemp("get", key, "--store", kept[0])
    assert plain.returncode == 0
    assert re.search(rf"^state: +{state}$", plain.stdout, re.MULTILINE)
    assert f"key:         {key}\n" in plain.stdout


def test_get_of_an_unknown_key(kept: tuple[str, Store]) -> None:
    """Exit code 1, for scripts."""
    one_sentence(idemp("get", "no/such", "--store", kept[0]), "knows nothing of no/such", code=1)
    done = idemp("get", "no/such", "--json", "--store", kept[0])
    assert (done.returncode, json.loads(done.stdout)["state"]) == (1, "free")


def test_doubt(kept: tuple[str, Store]) -> None:
    """Only what waits for a person, with the reason."""
    lines = idemp("doubt", "--store", kept[0]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["doubt", "parked"]
    assert "(attempts used up (5): ValueError: no)" in lines[1]
    assert [each["key"] for each in printed(idemp("doubt", "--json", "--store", kept[0]))] == [
        "b/doubt",
        "b/parked",
    ]


# ------------------------------------------------------------------ resolve


@pytest.mark.parametrize("key", ["b/doubt", "b/parked"])
def test_resolve_done(kept: tuple[str, Store], key: str) -> None:
    """The key is done, with the result that was given."""
    url, store = kept
    [said] = printed(idemp("resolve", key, "--done", "--result", '{"receipt": 9}', "--json", "--store", url))
    assert said == {"key": key, "was": key[2:], "now": "done"}
    done = store.apply([Get(key)])[0]
    assert isinstance(done, Done)
    assert done.result == b'{"receipt": 9}'


def test_resolve_retry(kept: tuple[str, Store]) -> None:
    """The key is free, with all its attempts."""
    url, store = kept
    done = idemp("resolve", "b/doubt", "--retry", "--store", url)
    assert done.stdout == ("b/doubt was in doubt (attempt 1 may have taken effect), and is free now\n"), (
        done.stderr
    )
    assert store.apply([Get("b/doubt")])[0] == Free(0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["b/busy", "--done"], "'b/busy' is being run by another live session"),
        (["b/busy", "--retry"], "'b/busy' is being run by another live session"),
        (["a/done", "--retry"], "'a/done' is done, so there is nothing to resolve"),
        (["b/free", "--done"], "'b/free' is free or unknown, so there is nothing to resolve"),
        (["no/such", "--retry"], "'no/such' is free or unknown, so there is nothing to resolve"),
        (["b/doubt"], "Say --done or --retry."),
        (["b/doubt", "--retry", "--result", "1"], "--result goes with --done."),
        (["b/doubt", "--done", "--queue", "q"], "--queue goes with --retry."),
        (["b/doubt", "--done", "--result", "{"], "--result is not JSON"),
    ],
)
def test_what_cannot_be_resolved(kept: tuple[str, Store], arguments: list[str], sentence: str) -> None:
    """One sentence, and nothing has changed."""
    url, store = kept
    before = store.scan()
    one_sentence(idemp("resolve", *arguments, "--store", url), sentence)
    assert store.scan() == before


def test_a_parked_message_is_sent_back_and_runs(desk: Stand, unique: str) -> None:
    """The whole way of an operator: doubt says why, resolve --retry --queue, and the message runs."""
    # Given a handler that fails for good until it is mended
    code = """
import pathlib, sys
from idemp import PermanentFailure
from svc.__main__ import main

def new_order(message):
    if not pathlib.Path(sys.argv[1]).exists():
        raise PermanentFailure("no such customer")

sys.exit(main({"new_order": new_order}))
"""
    mended = desk.folder / "mended"
    queue, key = f"{unique}-queue", f"{unique}.new_order/1"
    service = desk.service(unique, "-c", code, str(mended), IDEMP_STORE=desk.store)
    desk.publish(b'{"type":"new_order","id":"1"}', b'{"type":"new_order","id":"2"}', to=queue)
    desk.counted(**{f"{unique}_new_order_parked": 2})
    doubts = idemp("doubt", "--store", desk.store).stdout
    assert f"{key}  (permanent failure: PermanentFailure: no such customer)" in doubts

    # When
    mended.touch()
    arguments = ("resolve", key, "--retry", "--queue", queue, "--transport", desk.url, "--store", desk.store)
    [said] = printed(idemp(*arguments, "--json"))

    # Then
    assert said == {"key": key, "was": "parked", "now": "free", "queue": queue, "sent_back": 1}
    desk.counted(**{f"{unique}_new_order_ok": 1})
    assert desk.depth(f"{queue}.dead") == 1
    assert service.stop() == 0
    one_sentence(idemp(*arguments), "is done, so there is nothing to resolve")


def test_resolve_goes_on_after_a_crash(desk: Stand, unique: str) -> None:
    """The key was freed and the message not sent back: the same command again sends it."""
    queue, key = f"{unique}-queue", f"{unique}.new_order/1"
    code = """
import sys
from idemp import PermanentFailure
from svc.__main__ import main

def new_order(message):
    raise PermanentFailure("never")

sys.exit(main({"new_order": new_order}))
"""
    service = desk.service(unique, "-c", code, IDEMP_STORE=desk.store)
    desk.publish(b'{"type":"new_order","id":"1"}', to=queue)
    desk.counted(**{f"{unique}_new_order_parked": 1})
    assert service.stop() == 0
    assert idemp("resolve", key, "--retry", "--store", desk.store).returncode == 0
    arguments = ("resolve", key, "--retry", "--queue", queue, "--transport", desk.url, "--store", desk.store)
    done = idemp(*arguments)
    assert done.stdout == f"{key} was free, and is free now\n1 of its messages went back to {queue}\n"
    assert (desk.depth(queue), desk.depth(f"{queue}.dead")) == (1, 0)
    one_sentence(idemp(*arguments), "free or unknown, so there is nothing to resolve")


# ------------------------------------------------------------------ consume

HANDLERS = """
import os
from idemp import Consumer, idempotent, open_store, open_transport

store = open_store({store!r})

@idempotent(store, name="{name}.new_order")
def new_order(message):
    os.write(1, b"handled\\n")

def every_time(message):
    os.write(1, b"handled\\n")

consumer = Consumer(open_transport({url!r}), service={name!r}, exchange={name!r})
consumer.on("new_order")(new_order)
number = 7
"""


@pytest.fixture
def handlers(desk: Stand, unique: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of handlers."""
    text = HANDLERS.format(store=desk.store, url=desk.url, name=unique)
    (desk.folder / f"{unique}.py").write_text(text)
    return unique


def consume(desk: Stand, *arguments: str) -> Any:
    """``idemp consume`` where the module lies, as its author would run it."""
    code = "import os, sys; os.chdir(sys.argv.pop(1)); from idemp.cli import main; main()"
    return desk.run("-c", code, str(desk.folder), "consume", *arguments, IDEMP_TRANSPORT=desk.url)


def test_consume_a_consumer(desk: Stand, handlers: str) -> None:
    """It runs until it is stopped, exit code 0; --json says when it is ready and when it ended."""
    program = consume(desk, f"{handlers}:consumer", "--json")
    program.wait_for('"ready": true')
    desk.publish(*[b'{"type":"new_order","id":"1"}'] * 3, to=f"{handlers}-queue")
    program.wait_for("2 skipped")
    assert program.stop() == 0
    said = program.said()
    assert said.count("handled") == 1
    about = {"service": handlers, "queue": f"{handlers}-queue"}
    objects = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert objects == [{**about, "ready": True}, {**about, "ready": False}]


@pytest.mark.parametrize(("name", "times"), [("new_order", 1), ("every_time", 3)])
def test_consume_a_handler(desk: Stand, handlers: str, name: str, times: int) -> None:
    """Once if it is idempotent, else at least once; its name is the type unless --type says another."""
    kind = [] if name == "new_order" else ["--type", "new_order"]
    options = ["--service", handlers, "--workers", "2", "--prefetch", "10", *kind]
    program = consume(desk, f"{handlers}:{name}", *options)
    program.wait_for(f"{handlers}: taking from {handlers}-queue; Ctrl-C ends it")
    desk.publish(*[b'{"type":"new_order","id":"1"}'] * 3, to=f"{handlers}-queue")
    program.wait_for("2 skipped" if times == 1 else "3 ok")
    assert program.stop(signal.SIGINT) == 0
    assert program.said().count("handled") == times


@pytest.mark.parametrize("how", ["consumer", "new_order"])
def test_consume_is_told_to_end_more_than_once(desk: Stand, handlers: str, how: str) -> None:
    """It was heard: another SIGTERM while it lets go of everything is no end in disorder."""
    options = [] if how == "consumer" else ["--service", handlers]
    program = consume(desk, f"{handlers}:{how}", "--json", *options)
    program.wait_for('"ready": true')
    desk.publish(b'{"type":"new_order","id":"1"}', to=f"{handlers}-queue")
    program.wait_for("handled")
    while program.process.poll() is None:
        program.process.send_signal(signal.SIGTERM)
        time.sleep(0.002)
    assert program.process.returncode == 0, program.said()
    assert '"ready": false' in program.said()


LONG = """
import os, sys, time
from idemp import Consumer, idempotent, open_store, open_transport

def new_order(message):
    os.write(1, b"begun\\n")
    end = time.monotonic() + 60
    while not os.path.exists({file!r}) and time.monotonic() < end:
        time.sleep(0.01)

if __name__ == "__main__":
    from svc.__main__ import main
    sys.exit(main({{"new_order": new_order}}))
store = open_store({store!r})
consumer = Consumer(open_transport({url!r}), service={name!r})
consumer.on("new_order")(idempotent(store, name="{name}.new_order")(new_order))
"""


@pytest.fixture(params=["svc", "consume"])
def long(request: pytest.FixtureRequest, desk: Stand, unique: str) -> Any:
    """The sample service, or `idemp consume`, with a handler that runs; and the file that ends it."""
    file = desk.folder / "enough"
    module = desk.folder / f"{unique}.py"
    module.write_text(LONG.format(file=str(file), store=desk.store, url=desk.url, name=unique))
    if request.param == "svc":
        program = desk.service(unique, str(module), IDEMP_STORE=desk.store)
    else:
        program = consume(desk, f"{unique}:consumer")
        program.wait_for("taking from")
    desk.publish(b'{"type":"new_order","id":"1"}', to=f"{unique}-queue")
    program.wait_for("begun")
    return program, file, f"{unique}.new_order/1", desk.store


def test_a_second_sigterm_does_not_cut_a_handler_short(long: Any) -> None:
    """What runs comes to its end and is recorded: the same for the service and for `idemp consume`."""
    program, file, key, store = long
    for _ in range(5):
        program.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert program.process.poll() is None
    file.touch()
    assert program.process.wait(PATIENCE) == 0, program.said()
    with closing(open_store(store)) as opened:
        assert isinstance(opened.apply([Get(key)])[0], Done)


def test_a_second_sigint_does(long: Any) -> None:
    """A person at a terminal who will not wait: exit code 130, and the key is in doubt, not lost."""
    program, _, key, store = long
    program.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert program.process.poll() is None
    program.process.send_signal(signal.SIGINT)
    assert program.process.wait(PATIENCE) == 130, program.said()
    assert "Traceback" not in program.said()
    with closing(open_store(store)) as opened:
        state = opened.apply([Get(key)])[0]
    assert isinstance(state, Busy | Doubt)


@pytest.mark.parametrize(
    ("target", "options", "sentence"),
    [
        ("{}", [], "write it like orders.handlers:new_order"),
        ("{}:", [], "write it like orders.handlers:new_order"),
        ("no_such_module:f", [], "no_such_module cannot be imported: No module named 'no_such_module'"),
        ("{}:nothing", [], "has no nothing"),
        ("{}:number", ["--service", "s"], "is neither a Consumer nor a function"),
        ("{}:new_order", [], "is a handler; say --service"),
        ("{}:consumer", ["--service", "s"], "is a Consumer, which has its own service"),
        ("{}:new_order", ["--service", "s", "--workers", "0"], "--workers"),
    ],
)
def test_what_cannot_be_consumed(
    desk: Stand, handlers: str, target: str, options: list[str], sentence: str
) -> None:
    """One sentence, and nothing was started."""
    program = consume(desk, target.format(handlers), *options)
    assert program.process.wait(PATIENCE) == 2
    assert sentence in program.said()
    assert program.said().startswith("idemp: ")
    assert program.said().count("\n") == 1


# ------------------------------------------------------------------ what goes wrong

EVENT = '{"type":"new_order","id":"1"}'


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["publish", EVENT, "--transport", "nonsense"], ["--transport (IDEMP_TRANSPORT)", "is no URL"]),
        (["publish", EVENT, "--transport", "kafka://me:secret@h/"], ["--transport", "there is no transport"]),
        (["publish", EVENT, "--transport", "amqp://me:secret@127.0.0.1:9/"], ["--transport", "127.0.0.1:9"]),
        (["publish", EVENT, "--transport", "sqlite:////no/such/q.db"], ["--transport"]),
        (["publish", EVENT, "--transport", "sqlite:///q.db?nope=1"], ["--transport", "no option 'nope'"]),
        (["ls"], ["Missing option '--store'", "IDEMP_STORE", "See 'idemp ls --help'."]),
        (["ls", "--store", "nonsense"], ["--store (IDEMP_STORE)", "is no URL"]),
        (["ls", "--store", "mongodb://me:secret@h/"], ["--store", "there is no store for"]),
        (["ls", "--store", "sqlite:////no/such.db"], ["--store", "there is no file /no/such.db"]),
        (["ls", "--store", f"sqlite:///{__file__}"], ["--store", "is no SQLite file"]),
        (["ls", "--store", "memory://?retention=soon"], ["--store", "retention='soon' is no duration"]),
        (["ls", "--store", "memory://", "--state", "gone"], ["--state", "'gone' is not one of"]),
        (["ls", "--store", "memory://", "--limit", "0"], ["--limit", "0 is not in the range"]),
        *(
            (
                ["ls", "--store", f"{kind}://me:sec{sign}ret@h:1/x"],
                ["--store", "has an @ behind its host", fix],
            )
            for kind, sign, fix in (
                ("postgresql", "/", "%2F for /"),
                ("redis", "?", "%3F for ?"),
                ("etcd", "#", "%23 for #"),
                ("postgresql", "@a/", "%40 for @"),
            )
        ),
        (["ls", "--store", "postgresql://me:12/secret@h/x"], ["--store", "has an @ behind its host"]),
        (["ls", "--store", "postgresql://me:12?secret@h/x"], ["--store", "has an @ behind its host"]),
        (["publish", EVENT, "--transport", "amqp://me:sec/ret@h/"], ["--transport", "has an @ behind"]),
        (["frobnicate"], ["No such command 'frobnicate'"]),
        (["--frobnicate"], ["No such option '--frobnicate'"]),
        (["demo", "--transport", "memory://x"], ["--transport", "memory:// is for one process"]),
        (["demo", "--transport", "amqp://me:secret@127.0.0.1:9/"], ["--transport"]),
        (["demo", "--store", "sqlite:////no/such/seen.db"], ["--store", "the folder of"]),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments: list[str], parts: list[str]) -> None:
    """It names the setting; no traceback, no password, exit code 2."""
    done = idemp(*arguments)
    one_sentence(done, *parts)
    assert not any(word in done.stderr for word in ("secret", "ret@"))


def test_a_wrong_password_is_one_sentence(rabbitmq: Any) -> None:
    """RabbitMQ refuses it; the sentence does not show it."""
    url = rabbitmq.url.replace("guest:guest", "guest:tellnobody")
    done = idemp("publish", EVENT, "--transport", url)
    one_sentence(done, "--transport (IDEMP_TRANSPORT)", "'guest'")
    assert "tellnobody" not in done.stderr


def test_a_missing_extra_is_one_sentence() -> None:
    """With the line to type."""
    code = "import sys; sys.modules['pika'] = None; from idemp.cli import main; main()"
    done = finished("-c", code, "publish", EVENT)
    one_sentence(done, "--transport", "pip install 'idemp[rabbitmq]'")


def test_nothing_to_do_is_help() -> None:
    """Every command has its line."""
    done = idemp()
    assert done.returncode == 2
    for command in ("publish", "consume", "demo", "ls", "get", "doubt", "resolve"):
        assert re.search(rf"^  {command} +\w", done.stderr, re.MULTILINE)


def test_the_demo_needs_the_checkout() -> None:
    """From an installed package there is no sample service to run: one sentence."""
    code = """
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *more: None if name == "svc" else find(name, *more)
from idemp.cli import main
main()
"""
    one_sentence(finished("-c", code, "demo"), "the demo runs the sample service svc/ of the checkout")
