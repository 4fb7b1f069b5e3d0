"""Every verb of the command line on every store, what is recorded of it, and who is first."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from idemp import ConfigError, Consumer, KeyBusy, Message, idempotent, open_store, open_transport, publish
from idemp.cli import main
from idemp.deeds import DEEDS, KEPT, UNFINISHED, Book, Change, read, sweep
from idemp.errors import StoreUnavailable
from idemp.ports import (
    Abandon,
    Applied,
    Busy,
    Claim,
    Claimed,
    Clock,
    Complete,
    Done,
    Doubt,
    Forget,
    Free,
    Get,
    Op,
    Park,
    Parked,
    Publication,
    Reply,
    State,
    Store,
    Takeover,
)
from idemp.resolve import NothingToResolve, forget, mark_done, set_all_free, set_free
from idemp.stores import namespace_of
from tests.contract.backends import BACKENDS, SHARED, Backend
from tests.service import PATIENCE, environment, finished, until


class Ran(NamedTuple):
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str

    def printed(self) -> list[Any]:
        """The JSON objects of ``--json``."""
        assert self.code == 0, self.err
        return [json.loads(line) for line in self.out.splitlines()]


class Desk:
    """One store with a key in each state, and the command line on it."""

    def __init__(self, backend: Backend, run: Callable[[Sequence[str]], Ran]) -> None:
        self.url, self._run = backend.url, run
        self.store = backend.open()
        self.hold("a/done", lambda token: Complete("a/done", token, b'{"receipt": 7}'))
        self.hold("a/raw", lambda token: Complete("a/raw", token, b"\xff"))
        self.busy = self.hold("b/busy")
        self.hold("b/doubt", lambda token: Abandon("b/doubt", token))
        self.hold("b/parked", lambda token: Park("b/parked", token, "attempts used up"))

    def hold(self, key: str, then: Callable[[int], Op] | None = None) -> int:
        """Claim ``key``, and do ``then`` with the claim."""
        [claim] = self.store.apply([Claim(key)])
        assert isinstance(claim, Claimed)
        if then is not None:
            self.store.apply([then(claim.token)])
        return claim.token

    def state(self, key: str) -> Reply:
        """What the store says of it now."""
        return self.store.apply([Get(key)])[0]

    def __call__(self, *arguments: str) -> Ran:
        """``idemp`` on this store."""
        return self._run([*arguments, "--store", self.url])

    def deeds(self) -> list[dict[str, Any]]:
        """What `idemp deeds` tells."""
        return self("deeds", "--json").printed()


class Lent:
    """A memory store that a command may not close."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def close(self) -> None:
        """It is the test's."""


@contextmanager
def as_loud_as_before() -> Iterator[None]:
    """What the command makes its process silent about is not silent in the tests that follow."""
    loggers = [logging.getLogger(name) for name in ("pika", "idemp.stores")]
    levels = [logger.level for logger in loggers]
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@pytest.fixture(params=list(BACKENDS))
def desk(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Desk]:
    """Each store.  Memory is of one process, so that there the command runs in this one."""
    backend = BACKENDS[request.param](request, tmp_path)

    def process(arguments: Sequence[str]) -> Ran:
        done = finished("-m", "idemp", *arguments)
        return Ran(done.returncode, done.stdout, done.stderr)

    def here(arguments: Sequence[str]) -> Ran:
        monkeypatch.setattr(sys, "argv", ["idemp", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended, as_loud_as_before():
            main()
        out, err = capsys.readouterr()
        return Ran(int(ended.value.code or 0), out, err)

    if not backend.shared:
        monkeypatch.setattr("idemp.cli.options.open_store", lambda url: Lent(backend.open()))
    built = Desk(backend, process if backend.shared else here)
    yield built
    built.store.close()


# ------------------------------------------------------------------ look


def test_ls_tells_how_many_there_are(desk: Desk) -> None:
    """A page, and how to go on; the states are those of the store."""
    first = desk("ls", "--limit", "2")
    where = namespace_of(desk.url)
    assert first.err == f"showing 2 of 5 in {where}; continue with --after a/raw\n"
    assert [line.split()[0] for line in first.out.splitlines()] == ["done", "done"]
    rest = desk("ls", "--after", "a/raw", "--json").printed()
    assert [each["state"] for each in rest] == ["busy", "doubt", "parked"]
    assert desk("ls", "--state", "done", "--limit", "1").err.startswith(f"showing 1 of 2 in {where};")


def test_what_a_namespace_is_called() -> None:
    """A file, or a name on a server."""
    assert namespace_of("sqlite:////var/seen.db?retention=1h") == "/var/seen.db"
    assert namespace_of("etcd://a,b/orders") == "orders"
    assert namespace_of("postgresql://me:secret@host/db?namespace=orders") == "orders"
    assert namespace_of("redis://host/3") == "default"
    assert namespace_of("memory://") == "memory"


def test_ls_by_age(desk: Desk) -> None:
    """What changed just now is not older than an hour."""
    assert desk("ls", "--older-than", "1h").out == ""
    time.sleep(0.01)
    assert len(desk("ls", "--older-than", "1ms", "--json").printed()) == 5
    wrong = desk("ls", "--older-than", "soon")
    assert (wrong.code, "--older-than='soon' is no duration" in wrong.err) == (2, True)


def test_get_and_doubt(desk: Desk) -> None:
    """One key, and those that wait for a person."""
    assert desk("get", "a/done", "--json").printed()[0]["result"] == {"receipt": 7}
    assert [each["key"] for each in desk("doubt", "--json").printed()] == ["b/doubt", "b/parked"]


def test_stats(desk: Desk) -> None:
    """By handler and state, whatever is in an id; deeds are counted apart."""
    [claim] = desk.store.apply([Claim("a/2026/7")])
    assert isinstance(claim, Claimed)
    desk.store.apply([Complete("a/2026/7", claim.token)])
    desk("resolve", "b/doubt", "--done", "--reason", "seen at the bank")
    [found] = desk("stats", "--json").printed()
    assert found["handlers"] == {"a": {"done": 3}, "b": {"busy": 1, "done": 1, "parked": 1}}
    assert (found["keys"], found["deeds"], found["retention"]) == (6, 1, 86400.0)
    assert 0 <= found["oldest_waiting"] < 60
    text = desk("stats").out
    assert re.search(r"^all +4 done +1 busy +1 parked$", text, re.MULTILINE), text
    assert "1 wait for a person" in text


# ------------------------------------------------------------------ change


@pytest.mark.parametrize(("verb", "key"), [("done", "b/doubt"), ("retry", "b/parked")])
def test_resolve_is_recorded(desk: Desk, verb: str, key: str) -> None:
    """Who, when, why, what, and what it was before; and it is hidden where keys are listed."""
    before = desk("get", key, "--json").printed()[0]
    assert desk("resolve", key, f"--{verb}", "--reason", "the bank says so", "--who", "ada").code == 0
    [deed] = desk.deeds()
    assert (deed["who"], deed["why"], deed["verb"]) == ("ada", "the bank says so", verb)
    assert deed["keys"] == [before]
    assert abs(time.time() - _seconds(deed["at"])) < 60
    assert desk("deeds").out.endswith(f"ada  {verb}  {key} (was {key[2:]}): the bank says so\n")
    assert DEEDS not in desk("ls", "--json").out
    assert len(desk("ls", DEEDS, "--json").printed()) == 1


def _seconds(iso: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(iso).timestamp()


def test_what_changes_nothing_is_not_recorded(desk: Desk) -> None:
    """A key that runs, one that is done, one that nobody knows."""
    for key in ("b/busy", "a/done", "no/such"):
        done = desk("resolve", key, "--retry")
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert desk.deeds() == []


def test_forget_a_key(desk: Desk) -> None:
    """It is as if it had never been; what it was is in the deed."""
    refused = desk("forget", "a/done")
    assert (refused.code, desk.deeds()) == (2, [])
    assert "Forget a/done, which is done? Say --yes" in refused.err
    assert desk("forget", "a/done", "--yes", "--reason", "a test order").out == "forgot 1 of 1 keys\n"
    assert desk.state("a/done") == Free()
    [deed] = desk.deeds()
    assert (deed["verb"], deed["why"]) == ("forget", "a test order")
    assert deed["keys"][0]["result"] == {"receipt": 7}


@pytest.mark.parametrize("key", ["b/busy", "b/doubt", "no/such"])
def test_what_is_not_forgotten(desk: Desk, key: str) -> None:
    """What runs and what is in doubt stays."""
    before = desk.state(key)
    done = desk("forget", key, "--yes")
    assert (done.code, done.err) == (1, "idemp: nothing of the kind is done or parked\n")
    assert desk.state(key) == before
    assert desk.deeds() == []


def test_forget_many(desk: Desk) -> None:
    """By prefix, state and age: the number first; deeds are never among them."""
    for number in range(200):
        key = f"many/{number:03}"
        desk.hold(key, lambda token, key=key: Complete(key, token, b"1"))  # type: ignore[misc]
    asked = desk("forget", "--prefix", "")
    assert "Forget 203 keys (202 done, 1 parked)? Say --yes" in asked.err
    assert desk("forget", "--prefix", "many/", "--older-than", "1h", "--yes").code == 1
    [said] = desk("forget", "--prefix", "many/", "--state", "done", "--yes", "--json").printed()
    assert said == {"forgotten": 200, "changed_meanwhile": 0}
    assert desk("ls", "many/").out == ""
    [deed] = desk.deeds()
    assert (deed["number"], deed["states"], deed["prefix"]) == (200, {"done": 200}, "many/")
    pages = desk("deeds", "--keys", "--json").printed()[1:]
    assert sum(len(page["keys"]) for page in pages) == 200
    assert [page["of"] for page in pages] == [deed["id"]] * 3
    told = desk("deeds", "--keys").out
    assert "forget  200 keys (200 done) that start with many/\n" in told
    assert "    many/199 (was done)\n" in told
    assert desk("forget", "--prefix", "", "--yes").out == "forgot 3 of 3 keys\n"
    assert len(desk.deeds()) == 2


def test_a_deed_is_no_key_to_decide_about(desk: Desk) -> None:
    """It is parked like one that waits for a person, and does not."""
    assert desk("forget", "a/done", "--yes").code == 0
    [deed] = desk.deeds()
    refused = desk("resolve", f"{DEEDS}{deed['id']}", "--done")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "is a deed, which needs no decision: see idemp deeds" in refused.err
    assert [each["key"] for each in desk("doubt", "--json").printed()] == ["b/doubt", "b/parked"]
    [found] = desk("stats", "--json").printed()
    assert (found["states"].get("parked"), found["deeds"]) == (1, 1)
    assert desk.deeds() == [deed]


def test_a_key_that_is_too_fresh_stays(desk: Desk) -> None:
    """--older-than narrows a KEY as it does a --prefix."""
    refused = desk("forget", "a/done", "--older-than", "7d", "--yes")
    assert (refused.code, refused.out) == (1, "")
    assert refused.err == "idemp: a/done is done and changed less than 7 d ago, so it stays\n"
    told = desk("forget", "a/done", "--older-than", "7d", "--yes", "--json")
    assert (told.code, json.loads(told.out)) == (
        1,
        {"forgotten": 0, "changed_meanwhile": 0, "too_fresh": "a/done"},
    )
    assert desk("get", "a/done").code == 0
    time.sleep(0.02)
    assert desk("forget", "a/done", "--older-than", "10ms", "--yes").out == "forgot 1 of 1 keys\n"
    assert desk("get", "a/done").code == 1


def test_what_forget_does_not_understand(desk: Desk) -> None:
    """A key and a prefix, or neither."""
    for arguments in (["a/done", "--prefix", "a"], []):
        assert "Say a KEY, or --prefix" in desk("forget", *arguments).err


def test_the_latest_deeds(desk: Desk) -> None:
    """In the order of time, and how many there are."""
    for key in ("a/done", "a/raw", "b/parked"):
        assert desk("forget", key, "--yes").code == 0
    last = desk("deeds", "--limit", "2")
    assert [line.split()[-3] for line in last.out.splitlines()] == ["a/raw", "b/parked"]
    assert last.err == "showing the last 2 of 3; --limit shows more\n"


# ------------------------------------------------------------------ what a look leaves alone


@pytest.mark.parametrize("kind", SHARED)
def test_a_look_does_not_change_the_retention(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The longest that anybody named is in force: a command names none."""
    backend = BACKENDS[kind](request, tmp_path)
    with closing(backend.open("?retention=1h")) as service:
        service.apply([])
        for command in (["ls"], ["stats"], ["deeds"], ["forget", "--prefix", "", "--yes"]):
            finished("-m", "idemp", *command, "--store", backend.url)
        done = finished("-m", "idemp", "stats", "--json", "--store", f"{backend.url}?retention=48h")
        assert json.loads(done.stdout)["retention"] == 3600.0
    with closing(backend.open("?retention=1h")) as service:
        service.apply([])
        assert service.retention == 3600.0


@pytest.mark.parametrize("kind", ["etcd", "postgresql", "redis"])
def test_a_look_does_not_make_a_namespace(kind: str, request: pytest.FixtureRequest, unique: str) -> None:
    """A name that was mistyped is said, and the server has nothing of it afterwards."""
    from idemp.stores import check_exists

    server = request.getfixturevalue(kind)
    url = f"{server.url}{unique}" if kind == "etcd" else f"{server.database()}?namespace={unique}"
    done = finished("-m", "idemp", "ls", "--store", url)
    assert done.returncode == 2
    assert f"has no namespace '{unique}'; name the store that the service uses" in done.stderr
    with pytest.raises(ConfigError, match="has no namespace"):
        check_exists(url)


def test_looking_does_not_disturb_the_replicas(
    etcd: Any, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    """While commands read the namespace its service goes on, and never imports again."""
    url = f"{etcd.url}{unique}"
    with closing(open_store(f"{url}?session=3s")) as service:
        ended, answers = threading.Event(), list[int]()

        def work() -> None:
            number = 0
            while not ended.is_set():
                key = f"{unique}/{number}"
                [claim] = service.apply([Claim(key)])
                assert isinstance(claim, Claimed)
                assert service.fresh(claim.token)
                assert service.apply([Complete(key, claim.token, b"1")]) == [Applied()]
                answers.append(number)
                number += 1

        worker = threading.Thread(target=work)
        worker.start()
        shown = 0
        for _ in range(3):
            before = len(answers)
            done = finished("-m", "idemp", "ls", "--json", "--limit", "100000", "--store", url)
            assert done.returncode == 0, done.stderr
            shown = done.stdout.count("\n")
            assert len(answers) > before
        ended.set()
        worker.join()
        assert shown > 0
    assert "importing again" not in caplog.text


# ------------------------------------------------------------------ who is first


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    """Each store, empty."""
    return BACKENDS[request.param](request, tmp_path)


def leave(store: Store, key: str, how: Callable[[int], Op]) -> None:
    [claim] = store.apply([Claim(key)])
    assert isinstance(claim, Claimed)
    store.apply([how(claim.token)])


class Rival:
    """A store where somebody else is faster: ``ops`` happen right before the first of a kind."""

    def __init__(self, store: Store, before: type, ops: Callable[[], Sequence[Op]]) -> None:
        self._store, self._before, self._ops = store, before, ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def apply(self, ops: Sequence[Op]) -> list[Reply]:
        """As the store, but late."""
        if any(isinstance(op, self._before) for op in ops):
            first, self._ops = self._ops, list
            if todo := first():
                self._store.apply(todo)
        return self._store.apply(ops)


def test_forget_comes_second(backend: Backend) -> None:
    """What a consumer took in between stays, and the deed names only what went."""
    with closing(backend.open()) as store:
        for key in ("k/1", "k/2"):
            leave(store, key, lambda token, key=key: Park(key, token, "why"))  # type: ignore[misc]
        found: list[Any] = store.scan("k/")
        rival = Rival(store, Forget, lambda: [Takeover("k/1", found[0][1].token)])
        assert forget(found, Book(rival, "ada")) == 1
        assert [type(state).__name__ for _, state in store.scan("k/")] == ["Busy"]
        [deed] = read(store)
        assert deed.about is not None
        assert [each["key"] for each in deed.about["keys"]] == ["k/2"]


def test_forget_comes_second_with_all(backend: Backend) -> None:
    """Then there is no deed."""
    with closing(backend.open()) as store:
        leave(store, "k/1", lambda token: Complete("k/1", token, b"1"))
        found: list[Any] = store.scan("k/")
        rival = Rival(store, Forget, lambda: [Forget("k/1", found[0][1].token)])
        assert forget(found, Book(rival, "ada")) == 0
        assert list(read(store)) == []


def test_people_and_consumers_at_once(backend: Backend) -> None:
    """Of ten that decide about a key in doubt at the same time one does; one deed is recorded."""
    with closing(backend.open()) as store:
        for round_ in range(5):
            key = f"k/{round_}"
            leave(store, key, lambda token, key=key: Abandon(key, token))  # type: ignore[misc]
            [seen] = store.apply([Get(key)])
            assert isinstance(seen, Doubt)
            won: list[str] = []
            start = threading.Barrier(10)

            def person(key: str = key, won: list[str] = won, start: threading.Barrier = start) -> None:
                start.wait()
                try:
                    mark_done(store, key, b"1", book=Book(store, "ada"))
                    won.append("person")
                except (KeyBusy, NothingToResolve):
                    pass

            def consumer(
                key: str = key,
                won: list[str] = won,
                start: threading.Barrier = start,
                token: int = seen.token,
            ) -> None:
                start.wait()
                [taken] = store.apply([Takeover(key, token)])
                if isinstance(taken, Claimed):
                    won.append("consumer")
                    store.apply([Complete(key, taken.token, b"2")])

            threads = [threading.Thread(target=each) for each in [person] * 5 + [consumer] * 5]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(won) == 1
            [done] = store.apply([Get(key)])
            assert isinstance(done, Done)
            assert done.result == (b"1" if won == ["person"] else b"2")
            recorded = [deed for deed in read(store) if deed.about and deed.about["keys"][0]["key"] == key]
            assert len(recorded) == (won == ["person"])


def test_all_are_set_free(backend: Backend) -> None:
    """Many at once, each with what it was; what is busy or done is left alone."""
    with closing(backend.open()) as store:
        keys = [f"k/{number:03}" for number in range(250)]
        for key in keys:
            leave(store, key, lambda token, key=key: Park(key, token, "why"))  # type: ignore[misc]
        leave(store, "done", lambda token: Complete("done", token, b"1"))
        store.apply([Claim("busy")])
        assert set_all_free(store, [*keys, "done", "busy", keys[0]], Book(store, "ada")) == 250
        assert [key for key, _ in store.scan("k/")] == []
        abouts = [deed.about for deed in read(store) if deed.about]
        assert sorted(each["key"] for about in abouts for each in about["keys"]) == keys
        assert {each["state"] for about in abouts for each in about["keys"]} == {"parked"}


N = 40


@pytest.fixture
def live(backend: Backend, unique: str) -> Iterator[tuple[Store, Store, Callable[[], None], Counter[str]]]:
    """A consumer that runs, an operator's store, what publishes all messages, and the effects by id."""
    consumers, operators = backend.open(), backend.open()
    broker = f"memory://{unique}"
    effects: Counter[str] = Counter()
    consumer = Consumer(open_transport(broker), service=unique, workers=4)

    @consumer.on("new_order")
    @idempotent(consumers, name="k")
    def new_order(message: Message) -> None:
        effects[message.id] += 1

    ready = threading.Event()
    thread = threading.Thread(target=lambda: consumer.run(ready=ready.set))
    thread.start()
    assert ready.wait(PATIENCE)

    def publish_all() -> None:
        messages = [Message(str(number), "new_order") for number in range(N)]
        copies = [Publication(each.encode(), each.properties(), "", f"{unique}-queue") for each in messages]
        with closing(open_transport(broker)) as transport:
            publish(transport, copies)

    yield consumers, operators, publish_all, effects
    with closing(open_transport(broker)) as transport:
        until(lambda: transport.depth(f"{unique}-queue") == 0, lambda: transport.depth(f"{unique}-queue"))
    consumer.stop()
    thread.join(PATIENCE)
    consumers.close()
    operators.close()


Live = tuple[Store, Store, Callable[[], None], "Counter[str]"]


def test_a_person_resolves_what_a_live_consumer_retries(live: Live) -> None:
    """Each key in doubt is either run by the consumer or marked done by the person, never both."""
    consumers, operators, publish_all, effects = live
    keys = [f"k/{number}" for number in range(N)]
    for key in keys:
        leave(consumers, key, lambda token, key=key: Abandon(key, token))  # type: ignore[misc]
    book, decided = Book(operators, "ada"), set[str]()
    publisher = threading.Thread(target=publish_all)
    publisher.start()
    for key in reversed(keys):
        try:
            mark_done(operators, key, b"1", book=book)
            decided.add(key)
        except (KeyBusy, NothingToResolve):
            pass
    publisher.join()
    until(
        lambda: all(isinstance(each, Done) for each in operators.apply([Get(key) for key in keys])),
        lambda: operators.scan("k/"),
    )
    assert {f"k/{id}" for id in effects} == set(keys) - decided
    assert set(effects.values()) <= {1}
    assert {each["key"] for deed in read(operators) if deed.about for each in deed.about["keys"]} == decided


def test_a_person_forgets_what_a_live_consumer_skips(live: Live) -> None:
    """A duplicate that comes while its key is forgotten is skipped, or runs once: before or after."""
    consumers, operators, publish_all, effects = live
    keys = [f"k/{number}" for number in range(N)]
    for key in keys:
        leave(consumers, key, lambda token, key=key: Complete(key, token, b"1"))  # type: ignore[misc]
    until(lambda: len(operators.scan("k/")) == N, lambda: operators.scan("k/"))
    publisher = threading.Thread(target=publish_all)
    publisher.start()
    gone = forget(
        [(key, state) for key, state in operators.scan("k/") if isinstance(state, Done)],
        Book(operators, "ada"),
    )
    publisher.join()
    assert gone == N
    assert set(effects.values()) <= {1}
    recorded = [each["key"] for deed in read(operators) if deed.about for each in deed.about["keys"]]
    assert sorted(recorded) == sorted(keys)


# ------------------------------------------------------------------ killed in between

CRASH = """
import os, sys
from idemp import open_store
from idemp.deeds import Book
from idemp.resolve import forget, mark_done, set_free

url, what, when, at = sys.argv[1:]

class Killed:
    def __init__(self, store):
        self._store, self._left = store, int(at)
    def __getattr__(self, name):
        return getattr(self._store, name)
    def apply(self, ops):
        self._left -= 1
        if self._left == 0 and when == "before":
            os.kill(os.getpid(), 9)
        replies = self._store.apply(ops)
        if self._left == 0:
            os.kill(os.getpid(), 9)
        return replies

store = open_store(url)
killed = Killed(store)
book = Book(killed, "ada", "why not")
if what == "done":
    mark_done(killed, "k/parked", b"1", book=book)
elif what == "retry":
    set_free(killed, "k/parked", book=book)
else:
    forget([("k/done", killed.apply([__import__("idemp.ports").ports.Get("k/done")])[0])], book)
store.close()
"""


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("what", ["done", "retry", "forget"])
def test_no_change_without_its_deed(
    kind: str, what: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """kill -9 before and after each exchange with the store: what is changed is recorded, no more."""
    url = BACKENDS[kind](request, tmp_path)
    key = "k/done" if what == "forget" else "k/parked"
    seen = []
    with closing(url.open("?session=2s")) as store:
        for at in range(1, 6):
            for when in ("before", "after"):
                for each, state in store.scan("k/"):
                    assert isinstance(state, Done | Parked), (each, state)
                    store.apply([Forget(each, state.token)])
                leave(store, "k/done", lambda token: Complete("k/done", token, b"1"))
                leave(store, "k/parked", lambda token: Park("k/parked", token, "why"))
                [before] = store.apply([Get(key)])
                recorded = sum(deed.about is not None for deed in read(store))
                done = finished("-c", CRASH, f"{url.url}?session=2s", what, when, str(at))
                _settled(store, key)
                [after] = store.apply([Get(key)])
                changed = not isinstance(after, type(before))
                new = sum(deed.about is not None for deed in read(store)) - recorded
                assert new == changed, (at, when, before, after, done.stderr)
                seen.append((changed, done.returncode == -signal.SIGKILL))
    # Killed before the change, killed after it, and not killed at all.
    assert {(False, True), (True, True), (True, False)} <= set(seen)


class Deaf:
    """A store whose reply to the exchange number ``at`` is lost: it was applied, or it was not."""

    def __init__(self, store: Store, at: int, *, applied: bool) -> None:
        self._store, self._left, self._applied = store, at, applied

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def apply(self, ops: Sequence[Op]) -> list[Reply]:
        """As the store, but for the one."""
        self._left -= 1
        if self._left == 0:
            if self._applied:
                self._store.apply(ops)
            raise StoreUnavailable("the reply was lost")
        return self._store.apply(ops)


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("at", range(1, 5))
def test_a_lost_reply_leaves_both_or_neither(backend: Backend, at: int, applied: bool) -> None:
    """Whatever became of an exchange whose reply nobody heard: what changed is recorded, no more."""
    with closing(backend.open()) as store:
        leave(store, "k/1", lambda token: Park("k/1", token, "why"))
        deaf = Deaf(store, at, applied=applied)
        lost = False
        try:
            set_free(deaf, "k/1", book=Book(deaf, "ada"))
        except StoreUnavailable:
            lost = True
        assert lost == (at < 4)
        changed = store.apply([Get("k/1")]) == [Free()]
        assert changed == (at == 4 or (at == 3 and applied))
        assert len([deed for deed in read(store) if deed.about]) == changed


def test_a_deed_that_was_taken_away_is_written_again(backend: Backend) -> None:
    """Its key was given up for dead between its claim and the change: another tells of the change."""
    with closing(backend.open()) as store:
        leave(store, "k/1", lambda token: Complete("k/1", token, b"1"))
        [done] = store.apply([Get("k/1")])
        assert isinstance(done, Done)

        def take() -> list[Op]:
            [(key, state)] = store.scan(DEEDS)
            assert isinstance(state, Busy)
            return [Abandon(key, state.token), Takeover(key, state.token)]

        rival = Rival(store, Forget, take)
        assert forget([("k/1", done)], Book(rival, "ada")) == 1
        told = [deed.about for deed in read(store)]
        assert [about["keys"][0]["key"] for about in told if about] == ["k/1"]


def _settled(store: Store, key: str) -> None:
    """Until the killed session's claim is missed."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        [state] = store.apply([Get(key)])
        if isinstance(state, Free | Done | Parked | Doubt):
            return
        time.sleep(0.05)
    pytest.fail(f"{state} after 20 s")


def test_what_was_begun_is_shown_and_dropped(backend: Backend) -> None:
    """A deed without a change is told apart, and does not stay for ever."""
    with closing(backend.open()) as store:
        key = f"{DEEDS}2026-01-01T00:00:00.000000Z-00000000"
        leave(store, key, lambda token: Abandon(key, token))
        [deed] = read(store)
        assert deed.about is None
        assert sweep(store) == 0
        late = Clock(wall=lambda: time.time() + UNFINISHED + 10)
        assert sweep(store, clock=late) == 1
        assert list(read(store)) == []
        assert store.scan(DEEDS) == []


def test_a_large_result_is_not_repeated(backend: Backend) -> None:
    """A deed of many large results still fits into the store."""
    with closing(backend.open()) as store:
        found: list[tuple[str, State]] = []
        for number in range(100):
            key = f"k/{number:03}" + "x" * 900
            size = 60_000 if number < 5 else 3000
            leave(store, key, lambda token, key=key, size=size: Complete(key, token, b"1" * size))  # type: ignore[misc]
            found.append((key, store.apply([Get(key)])[0]))  # type: ignore[arg-type]
        changes = [Change(Forget(key, state.token), state) for key, state in found if isinstance(state, Done)]
        replies = Book(store, "ada").change("forget", changes)
        assert replies == [Applied()] * 100
        abouts = [deed.about for deed in read(store) if deed.about]
        assert sum(len(about["keys"]) for about in abouts) == 100
        assert len(abouts) > 2
        assert abouts[0]["keys"][0]["result_bytes"] == 60_000


# ------------------------------------------------------------------ how long they are kept


def test_a_deed_outlives_the_ids(backend: Backend) -> None:
    """What was done and its pages go after the retention; who did what stays, for a later process too."""
    with closing(backend.open("?retention=2s&session=2s" if backend.shared else "?retention=2s")) as store:
        for key in ("k/1", "k/2", "k/3"):
            leave(store, key, lambda token, key=key: Complete(key, token, b"1"))  # type: ignore[misc]
        found: list[Any] = store.scan("k/")
        assert forget(found[:1], Book(store, "ada", "a test order")) == 1
        many = Book(store, "bob")
        many.note("forget", number=2)
        assert forget(found[1:], many) == 2
        whole = list(read(store, pages=True))
        assert [deed.of for deed in whole] == ["", "", whole[1].id]
        # A page is a done key, so when it has gone the retention is over.
        until(lambda: len(list(read(store, pages=True))) == 2, lambda: list(read(store, pages=True)))
        assert list(read(store)) == whole[:2]
        if backend.shared:
            with closing(backend.open("?session=2s")) as later:
                assert list(read(later)) == whole[:2]


def test_deeds_are_bounded(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """By age, number and size: the newest stay."""
    with closing(backend.open()) as store:
        book = Book(store, "ada")
        for number in range(12):
            book.note("send back", queue="q", messages=number)

        def left() -> list[int]:
            return [deed.about["messages"] for deed in read(store) if deed.about]

        assert (sweep(store), left()) == (0, list(range(12)))
        monkeypatch.setattr("idemp.deeds.MOST", 10)
        assert (sweep(store), left()) == (2, list(range(2, 12)))
        [(_, newest)] = store.scan(DEEDS, after=store.scan(DEEDS)[-2][0])
        assert isinstance(newest, Parked)
        monkeypatch.setattr("idemp.deeds.MOST_KEPT", 3 * len(newest.reason))
        assert (sweep(store), left()) == (7, [9, 10, 11])
        # Whoever writes one sweeps now and then.
        monkeypatch.setattr("idemp.deeds.SWEPT", 1)
        book.note("send back", queue="q", messages=12)
        assert left() == [10, 11, 12]
        late = Clock(wall=lambda: time.time() + KEPT + 10)
        assert (sweep(store, clock=late), left()) == (3, [])


def test_two_sweep_at_once(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each drops the same: the oldest, and no more."""
    monkeypatch.setattr("idemp.deeds.MOST", 5)
    with closing(backend.open()) as store:
        for number in range(20):
            Book(store, "ada").note("send back", queue="q", messages=number)
        start = threading.Barrier(4)

        def one() -> None:
            start.wait()
            sweep(store)

        threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [deed.about["messages"] for deed in read(store) if deed.about] == list(range(15, 20))


def test_the_name_of_deeds_is_taken() -> None:
    """No handler's keys are among them."""
    with pytest.raises(ConfigError, match="is where idemp keeps what people changed"):
        idempotent(open_store("memory://"), name="idemp.deeds", key="a")(lambda a: a)


# ------------------------------------------------------------------ a person at a terminal


def test_a_person_is_asked(tmp_path: Path) -> None:
    """On a terminal: the number, then the question; no is no, and nothing has changed."""
    url = f"sqlite:///{tmp_path}/seen.db"
    with closing(open_store(url)) as store:
        for number in range(1000):
            leave(store, f"k/{number}", lambda token, n=number: Complete(f"k/{n}", token, b"1"))  # type: ignore[misc]
        for answer, left in (("n", 1000), ("y", 0)):
            shown = typed(answer, "forget", "--prefix", "k/", "--store", url)
            assert "Forget 1000 keys (1000 done)? [y/N]" in shown
            assert ("100%" in shown) == (answer == "y")
            assert len(store.scan("k/", limit=2000)) == left


def typed(answer: str, *arguments: str) -> str:
    """What a terminal shows of ``idemp`` when a person types ``answer``."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "idemp", *arguments]
    with subprocess.Popen(command, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs):
        os.close(theirs)
        os.write(ours, f"{answer}\n".encode())
        shown = b""
        with open(ours, "rb", buffering=0) as reader:
            try:
                while chunk := reader.read(4096):
                    shown += chunk
            except OSError:  # EIO is how a terminal says that it ended
                pass
    return shown.decode()
