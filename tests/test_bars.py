"""Bars: how far long work is, on a terminal; nothing in a pipe."""

from __future__ import annotations

import itertools
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from idemp import open_store
from idemp.bars import reading
from idemp.ports import Claim, Claimed, Complete, Progress, Store
from idemp.stores.etcd import EtcdStore
from idemp.stores.etcd_replica import PAGE
from tests.contract.backends import BACKENDS, Backend
from tests.proxy import Proxy
from tests.servers import Etcd
from tests.service import PATIENCE, environment, until

APPENDS = 3 * PAGE
RATE = 200_000
"""Bytes a second: a slow line to the store."""


class Terminal:
    """A program whose stdout and stderr are a terminal, or only stderr."""

    def __init__(
        self, command: Sequence[str], settings: Mapping[str, str] | None = None, *, whole: bool = True
    ) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env=environment({"TERM": "xterm", "COLUMNS": "120", **(settings or {})}),
            stdin=theirs,
            stdout=theirs if whole else subprocess.DEVNULL,
            stderr=theirs,
        )
        os.close(theirs)
        self._said = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with open(self._ours, "rb", buffering=0) as reader:
            try:
                while chunk := reader.read(4096):
                    self._said += chunk
            except OSError:  # EIO is how a terminal says that it ended
                pass

    def end(self, how: signal.Signals | None = None) -> tuple[int, str]:
        """Its exit code, and everything that was shown."""
        if how is not None:
            self.process.send_signal(how)
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code, self.said()

    def said(self) -> str:
        """What was shown so far, without colours."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self._said.decode(errors="replace"))

    def wait_for(self, text: str) -> None:
        """Return when it has shown ``text``."""
        try:
            until(lambda: re.search(text, self.said()) is not None, self.said)
        except AssertionError:
            self.process.kill()
            self.process.wait()
            raise


# ------------------------------------------------------------------ what a store tells


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_store_knows_its_size(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """About; and it reads nothing just now."""
    backend: Backend = BACKENDS[kind](request, tmp_path)
    with closing(backend.open()) as store:
        assert store.progress() is None
        keys = [f"k/{number:03}" for number in range(300)]
        claims = store.apply([Claim(key) for key in keys])
        done = [Complete(k, c.token) for k, c in zip(keys, claims, strict=True) if isinstance(c, Claimed)]
        store.apply(done[:200])
        if kind == "postgresql":
            import psycopg

            with psycopg.connect(backend.url.partition("?")[0], autocommit=True) as connection:
                connection.execute("ANALYZE")
        assert 300 <= store.size() <= 310  # Redis counts its own few keys too
        assert store.progress() is None


@pytest.fixture(scope="module")
def full(etcd: Etcd) -> str:
    """The URL of a namespace whose journal has `APPENDS` appends and some, half of them of 4 KB."""
    url = f"{etcd.url}bars{os.getpid()}"
    with closing(open_store(url)) as store:
        for number in range(APPENDS // 2):
            key = f"k/{number:04}/" + "x" * 4000
            [claim] = store.apply([Claim(key)])
            assert isinstance(claim, Claimed)
            store.apply([Complete(key, claim.token)])
    return url


def test_an_import_tells_how_far_it_is(full: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page by page, of a number that etcd counted; and the reading of the names as well."""
    told: list[Progress | None] = []
    monkeypatch.setattr(EtcdStore, "_tell", lambda self, progress: told.append(progress))
    with closing(open_store(full)) as store:
        store.apply([])
        assert len(store.scan("k/", limit=10)) == 10
    imported, listed = told[: told.index(None)], told[told.index(None) + 1 :]
    for each in (imported, listed[: listed.index(None)]):
        far = [progress for progress in each if progress is not None]
        total = far[0].total
        assert APPENDS <= total < APPENDS + 20
        assert far[0].done == 0
        assert far[-1] == Progress(total, total)
        steps = [later.done - before.done for before, later in itertools.pairwise(far)]
        assert all(0 < step <= PAGE for step in steps)
        assert len(far) > 3


# ------------------------------------------------------------------ on a terminal, and in a pipe

SERVICE = """
from idemp import Consumer, idempotent, open_store, open_transport

@idempotent(open_store({store!r}), name="{name}.new_order")
def new_order(message):
    pass

consumer = Consumer(open_transport({broker!r}), service={name!r})
consumer.on("new_order")(new_order)
"""


@pytest.fixture
def slow(full: str, etcd: Etcd) -> Iterator[str]:
    """The same namespace behind a slow line."""
    host = etcd.endpoints[0]
    with Proxy(int(host.rpartition(":")[2])) as proxy:
        proxy.limit(RATE)
        yield full.replace(host, f"127.0.0.1:{proxy.port}")


def faces(face: str, store: str, folder: Path, unique: str) -> tuple[list[str], dict[str, str]]:
    """What opens the store, and its environment."""
    broker = f"sqlite:///{folder}/queues.db"
    if face == "command":
        return ["-m", "idemp", "get", "no/such", "--store", store], {}
    if face == "svc":
        settings = {"SERVICE_NAME": unique, "IDEMP_STORE": store, "IDEMP_TRANSPORT": broker}
        return ["-m", "svc"], settings
    (folder / f"{unique}.py").write_text(SERVICE.format(store=store, broker=broker, name=unique))
    code = f"import os; os.chdir({str(folder)!r}); from idemp.cli import main; main()"
    return ["-c", code, "consume", f"{unique}:consumer"], {}


@pytest.mark.parametrize("face", ["command", "svc", "consume"])
def test_who_opens_a_large_store_sees_how_far_it_is(
    face: str, slow: str, tmp_path: Path, unique: str
) -> None:
    """A command, the sample service, a consumer: a bar with numbers, which goes when all is read."""
    command, settings = faces(face, slow, tmp_path, unique)
    program = Terminal(command, settings)
    program.wait_for(rf"\d\d% +{PAGE}/3\d\d|\d\d% +{2 * PAGE}/3\d\d")
    if face == "command":
        code, shown = program.end()
        assert code == 1
        assert "reading etcd://127.0.0.1:" in shown
        assert "the store knows nothing of no/such" in shown
    else:
        program.wait_for("ready" if face == "svc" else "taking from")
        code, shown = program.end(signal.SIGTERM)
        assert code == 0, shown


def test_no_bar_in_a_pipe(slow: str) -> None:
    """However long it takes."""
    done = subprocess.run(
        [sys.executable, "-m", "idemp", "get", "no/such", "--store", slow, "--json"],
        env=environment({"TERM": "xterm"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")


def test_what_is_printed_goes_where_it_went_without_a_bar(tmp_path: Path) -> None:
    """Only stderr is a terminal: JSON on stdout is not touched, and a word on stderr stands above the bar."""
    out = tmp_path / "out"
    code = f"""
import sys
sys.stdout = open({str(out)!r}, "w")
from idemp.bars import bar
with bar(3, "working", least=1) as step:
    for number in range(3):
        print("x" * 300)
        print("a word", number, file=sys.stderr)
        step(1)
"""
    _, shown = Terminal(["-c", code], whole=False).end()
    assert out.read_text() == ("x" * 300 + "\n") * 3
    assert [f"a word {number}" in shown for number in range(3)] == [True] * 3
    assert "working" in shown
    assert "3/3" in shown


def test_a_bar_of_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys on their way, of as many as the store has; it is closed with who stops in between."""
    seen: list[Progress | None] = []

    class Watching:
        def __init__(self, what: str, progress: Any) -> None:
            self.progress = progress

        def __enter__(self) -> None:
            seen.append(self.progress())

        def __exit__(self, *_: Any) -> None:
            seen.append(self.progress())

    monkeypatch.setattr("idemp.bars.watching", Watching)
    store: Store = open_store(f"sqlite:///{tmp_path}/seen.db")
    with closing(store):
        store.apply([Claim(f"k/{number}") for number in range(30)])
        assert len(list(reading(store, iter(store.scan())))) == 30
        assert seen == [Progress(0, 30), Progress(30, 30)]
        assert len(list(reading(store, iter(store.scan() * 2)))) == 60
        assert seen[-1] == Progress(60, 60)  # an estimate may be too low


@pytest.mark.parametrize("whole", [True, False])
def test_a_bench_shows_a_bar(whole: bool, tmp_path: Path) -> None:
    """On a terminal; in a pipe the lines alone."""
    command = ["-m", "bench", "streams", "--messages", "300", "--rounds", "1"]
    command += ["--json", str(tmp_path / "streams.json")]
    if whole:
        code, shown = Terminal(command).end()
        assert code == 0, shown
        assert "100% 3/3" in re.sub(" +", " ", shown)
    else:
        done = subprocess.run(
            [sys.executable, *command], env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "%" not in done.stderr
        shown = done.stdout + done.stderr
    assert "round 1/1" in shown
