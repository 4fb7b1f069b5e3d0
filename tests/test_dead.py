"""Dead letters: read, grouped, sent back one first, by a process that may be killed in the middle."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from idemp import Consumer, Message, idempotent, open_store, open_transport
from idemp.dead import letters
from idemp.deeds import Book, read
from idemp.ports import Claim, Claimed, Done, Get, Park, Publication
from idemp.resolve import forget, send_all_back
from idemp.transports import publish
from tests.service import PATIENCE, Stand, environment, finished, stand, until
from tests.test_deeds import typed

HANDLER = """
import pathlib, sys
from idemp import PermanentFailure
from svc.__main__ import main

def new_order(message):
    if message.args.get("bad") and not pathlib.Path(sys.argv[1]).exists():
        raise PermanentFailure(f"no customer {message.args['bad']}")

sys.exit(main({"new_order": new_order}))
"""


@pytest.fixture(params=["sqlite", "rabbitmq", "redis"])
def desk(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[Stand]:
    """A broker of each kind that outlives a process; a reader that is killed is missed soon."""
    if request.param == "rabbitmq":
        url = request.getfixturevalue("rabbitmq").url
    elif request.param == "redis":
        url = f"{request.getfixturevalue('redis').database()}?namespace={unique}&idle=2s"
    else:
        url = f"sqlite:///{tmp_path}/queues.db?visibility=2s"
    with stand(url, tmp_path) as built:
        yield built


def idemp(desk: Stand, *arguments: str, store: bool = True) -> subprocess.CompletedProcess[str]:
    settings = {"IDEMP_TRANSPORT": desk.url, **({"IDEMP_STORE": desk.store} if store else {})}
    return finished("-m", "idemp", *arguments, settings=settings)


def order(id: str, **args: Any) -> bytes:
    return json.dumps({"type": "new_order", "id": id, "args": args}).encode()


def fails(desk: Stand, unique: str) -> str:
    """A service that sets bad orders aside until ``mended``; three died, one is not even a message."""
    queue = f"{unique}-queue"
    desk.service(unique, "-c", HANDLER, str(desk.folder / "mended"), IDEMP_STORE=desk.store)
    desk.publish(order("1", bad=17), order("2", bad=18), order("3", bad=19), b"no JSON", to=queue)
    desk.counted(**{f"{unique}_new_order_parked": 3, f"{unique}_rejected": 1})
    until(lambda: desk.depth(f"{queue}.dead") == 4, lambda: desk.depth(f"{queue}.dead"))
    return queue


def test_the_dead_are_grouped_and_stay(desk: Stand, unique: str) -> None:
    """By what they died of, whatever names and numbers are in it; reading takes nothing out."""
    queue = fails(desk, unique)
    for _ in range(2):
        found = [
            json.loads(line) for line in idemp(desk, "dead", "list", queue, "--json").stdout.splitlines()
        ]
        assert [(each["messages"], each["outcome"]) for each in found] == [(3, "parked"), (1, "rejected")]
        assert found[0]["reason"] == "permanent failure: PermanentFailure: no customer 17"
        assert found[0]["key"] == f"{unique}.new_order/1"
        assert found[1]["reason"].startswith("the body is not JSON")
    text = idemp(desk, "dead", "list", f"{queue}.dead").stdout
    assert "     3  parked: permanent failure: PermanentFailure: no customer 17\n" in text
    assert text.endswith(f"4 messages in {queue}.dead\n")
    only = idemp(desk, "dead", "list", queue, "--reason-has", "not JSON", "--json").stdout
    assert only.count("\n") == 1
    assert idemp(desk, "dead", "list", f"{unique}-nowhere").stdout == f"{unique}-nowhere.dead is empty\n"


def test_one_is_shown_whole(desk: Stand, unique: str) -> None:
    """Body, reason and headers; exit code 1 if there is none."""
    queue = fails(desk, unique)
    shown = idemp(desk, "dead", "show", queue, "--key", f"{unique}.new_order/2", "--json")
    record = json.loads(shown.stdout)
    assert record["body"] == order("2", bad=18).decode()
    assert (record["outcome"], record["attempt"], record["queue"]) == ("parked", 1, queue)
    assert "no customer 18" in idemp(desk, "dead", "show", queue, "--reason-has", "18").stdout
    none = idemp(desk, "dead", "show", queue, "--key", "no/such")
    assert (none.returncode, none.stderr) == (1, f"idemp: {queue}.dead has no such message\n")


def test_one_first_then_the_rest(desk: Stand, unique: str) -> None:
    """While it is not mended the first dies again and the rest stay; once it is, all go and run."""
    queue = fails(desk, unique)
    arguments = ("dead", "send", queue, "--reason-has", "no customer", "--yes")

    # When nothing was mended
    done = idemp(desk, *arguments)
    assert done.returncode == 1, done
    assert "1 messages went back" in done.stdout
    assert "the rest stay, for the first is dead again" in done.stdout
    desk.counted(**{f"{unique}_new_order_parked": 4})
    until(lambda: desk.depth(f"{queue}.dead") == 4, lambda: desk.depth(f"{queue}.dead"))

    # When it is
    (desk.folder / "mended").touch()
    said = json.loads(idemp(desk, *arguments, "--json", "--reason", "mended").stdout)

    # Then
    assert said == {"sent_back": 3, "first": "done"}
    desk.counted(**{f"{unique}_new_order_ok": 3})
    assert desk.depth(f"{queue}.dead") == 1
    with closing(open_store(desk.store)) as store:
        abouts = [deed.about for deed in read(store, pages=True) if deed.about]
    verbs = [about["verb"] for about in abouts if about["why"] == "mended"]
    assert verbs[:2] == ["send back", "retry"]
    freed = [each["key"] for about in abouts for each in about.get("keys", [])]
    assert {f"{unique}.new_order/{number}" for number in "123"} <= set(freed)


def test_what_send_does_not_understand(desk: Stand, unique: str) -> None:
    """None chosen; nobody to be asked; a store that is not named: each is one sentence, and all stay."""
    queue = fails(desk, unique)
    for arguments, sentence, store in (
        ([], "Say which: --key, --reason-has, or --all.", True),
        (["--all"], f"Send 4 messages back to {queue}? Say --yes", True),
        (["--all", "--yes"], "3 of these messages are parked in a store and would be parked again", False),
    ):
        done = idemp(desk, "dead", "send", queue, *arguments, store=store)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert sentence in done.stderr
    assert desk.depth(f"{queue}.dead") == 4
    nobody = idemp(desk, "dead", "send", queue, "--key", "no/such", "--yes")
    assert (nobody.returncode, nobody.stdout) == (1, f"{queue}.dead has no such message\n")


def test_the_first_waits_where_nobody_takes_it(desk: Stand, unique: str) -> None:
    """No consumer: the rest stay, unless it is said not to wait."""
    queue = fails(desk, unique)
    assert desk.programs[0].stop() == 0
    done = idemp(desk, "dead", "send", queue, "--all", "--yes", "--wait", "1s")
    assert done.returncode == 1
    assert "is waiting (--no-first does not wait)" in done.stdout
    assert (desk.depth(queue), desk.depth(f"{queue}.dead")) == (1, 3)
    done = idemp(desk, "dead", "send", queue, "--all", "--yes", "--no-first")
    assert (done.returncode, done.stdout) == (0, f"3 messages went back to {queue}\n")
    assert (desk.depth(queue), desk.depth(f"{queue}.dead")) == (4, 0)


N = 1000
PADDING = "x" * 40_000
"""Makes a thousand messages more than any broker hands out at once."""


def test_killed_in_the_middle(desk: Stand, unique: str) -> None:
    """A thousand go back, the sender is killed on the way and started again: each has its effect, once."""
    # Given
    queue = f"{unique}-queue"
    keys = [f"{unique}.new_order/{number}" for number in range(N)]
    with closing(open_store(desk.store)) as store, closing(open_transport(desk.url)) as transport:
        transport.declare(queue)
        transport.declare(f"{queue}.dead")
        claims = store.apply([Claim(key) for key in keys])
        parks = [
            Park(key, claim.token, "permanent failure: no customer")
            for key, claim in zip(keys, claims, strict=True)
            if isinstance(claim, Claimed)
        ]
        store.apply(parks)
        publish(transport, [_dead_letter(queue, key, PADDING) for key in keys])

    # When
    command = [sys.executable, "-m", "idemp", "dead", "send", queue, "--all", "--yes", "--no-first"]
    settings = {"IDEMP_TRANSPORT": desk.url, "IDEMP_STORE": desk.store}
    with closing(open_transport(desk.url)) as transport:
        with subprocess.Popen(command, env=environment(settings), stdout=subprocess.PIPE) as process:
            until(lambda: transport.depth(queue) > 100 or process.poll() is not None, process.poll)
            process.send_signal(signal.SIGKILL)
            assert process.wait(PATIENCE) == -signal.SIGKILL, "it was too fast to be killed"
        went = transport.depth(queue)
        assert 0 < went < N
        # Who was killed is missed; then the rest is there again.
        until(lambda: transport.depth(f"{queue}.dead") >= N - went, lambda: transport.depth(f"{queue}.dead"))
        again = finished(*command[1:], settings=settings)
        assert again.returncode == 0, again.stderr
        assert transport.depth(queue) >= N
        assert transport.depth(f"{queue}.dead") == 0

    # Then
    desk.service(unique, IDEMP_STORE=desk.store)
    desk.counted(**{f"{unique}_new_order_ok": N})
    until(lambda: desk.depth(queue) == 0, lambda: desk.depth(queue))
    desk.exactly(**{f"{unique}_new_order_ok": N, f"{unique}_new_order_parked": 0})
    with closing(open_store(desk.store)) as store:
        assert all(isinstance(state, Done) for state in store.apply([Get(key) for key in keys]))
        pages = [deed.about for deed in read(store, pages=True) if deed.about]
        freed = {each["key"] for about in pages for each in about.get("keys", [])}
        assert freed == set(keys)


def _dead_letter(queue: str, key: str, args: str = "") -> Publication:
    message = Message(key.rpartition("/")[2], "new_order", args, published=time.time())
    headers = {"idemp-key": key, "idemp-queue": queue, "idemp-outcome": "parked", "idemp-reason": "why"}
    return Publication(message.encode(), replace(message.properties(), headers=headers), "", f"{queue}.dead")


def test_after_a_forget_a_stale_replica_does_not_call_it_done(etcd: Any, unique: str) -> None:
    """A replica that has not heard of the forget asks before it answers to a message that was sent back."""
    # Given a consumer whose watch has gone deaf after it has heard that the key is done
    url, queue, key = f"{etcd.url}{unique}", f"{unique}-queue", f"{unique}.new_order/1"
    broker = f"memory://{unique}"
    with closing(open_store(url)) as theirs, closing(open_store(url)) as operators:
        ran: list[str] = []
        consumer = Consumer(open_transport(broker), service=unique)

        @consumer.on("new_order")
        @idempotent(theirs, name=f"{unique}.new_order")
        def new_order(message: Message) -> None:
            ran.append(message.id)

        with _running(consumer), closing(open_transport(broker)) as transport:
            publish(transport, [_plain(queue)])
            until(lambda: isinstance(theirs.apply([Get(key)])[0], Done), lambda: ran)
            replica = theirs._session._replica  # type: ignore[attr-defined]
            replica._hear = lambda *_: None
            publish(transport, [_dead_letter(queue, key)])

            # When
            [found] = operators.apply([Get(key)])
            assert isinstance(found, Done)
            assert forget([(key, found)], Book(operators, "ada")) == 1
            [stale] = theirs.apply([Claim(key)])
            assert isinstance(stale, Done), "the replica is not stale, so this shows nothing"
            with closing(open_transport(broker)) as sender:
                assert send_all_back(sender, queue, lambda _: True) == 1

            # Then it is run anew
            until(lambda: ran == ["1", "1"], lambda: ran)


def _plain(queue: str) -> Publication:
    message = Message("1", "new_order")
    return Publication(message.encode(), message.properties(), "", queue)


class _running:
    """The consumer in a thread, as long as the block lasts."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer, self._ready = consumer, threading.Event()
        self._thread = threading.Thread(target=lambda: consumer.run(ready=self._ready.set))

    def __enter__(self) -> None:
        self._thread.start()
        assert self._ready.wait(PATIENCE)

    def __exit__(self, *_: object) -> None:
        self._consumer.stop()
        self._thread.join(PATIENCE)


def test_older_than_the_retention_shows_among_the_dead(desk: Stand, unique: str) -> None:
    """It was parked, not run; `dead list` and `doubt` say why, and sending it back lets it run."""
    queue = f"{unique}-queue"
    store = f"{desk.store}?retention=1h"
    desk.service(unique, IDEMP_STORE=store)
    old = Message("1", "new_order", published=time.time() - 7200)
    desk.publish(old, to=queue)
    desk.counted(**{f"{unique}_new_order_parked": 1})
    until(lambda: desk.depth(f"{queue}.dead") == 1, lambda: desk.depth(f"{queue}.dead"))
    for command in (["dead", "list", queue], ["doubt"]):
        assert "older than the retention: published 72" in idemp(desk, *command).stdout
    assert idemp(desk, "dead", "send", queue, "--all", "--yes").returncode == 0
    desk.counted(**{f"{unique}_new_order_ok": 1})


def test_letters_are_read_in_their_order(desk: Stand, unique: str) -> None:
    """Up to as many as are asked for; they are there again afterwards."""
    queue = f"{unique}-queue"
    with closing(open_transport(desk.url)) as transport:
        transport.declare(f"{queue}.dead")
        publish(transport, [_dead_letter(queue, f"k/{number}") for number in range(10)])
    for most, keys in ((3, ["k/0", "k/1", "k/2"]), (99, [f"k/{number}" for number in range(10)])):
        with closing(open_transport(desk.url)) as transport:
            assert [letter.key for letter in letters(transport, queue, most)] == keys


def test_a_bar_on_a_terminal_and_none_in_a_pipe(tmp_path: Path, unique: str) -> None:
    """For as many as take a while."""
    url, queue = f"sqlite:///{tmp_path}/queues.db", f"{unique}-queue"
    arguments = ["dead", "send", queue, "--all", "--yes", "--no-first", "--transport", url]
    with closing(open_transport(url)) as transport:
        transport.declare(queue)
        transport.declare(f"{queue}.dead")
        for terminal in (True, False):
            letters_ = [_dead_letter(queue, f"delivery {number}") for number in range(600)]
            publish(transport, letters_)
            shown = typed("", *arguments) if terminal else finished("-m", "idemp", *arguments).stderr
            assert ("100%" in shown) == terminal, shown
            assert transport.depth(f"{queue}.dead") == 0
