"""PostgreSQL, Redis and RabbitMQ behind TLS: who is known is served, and a stranger is told why not.

etcd's is in test_etcd_client.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from idemp import Message, open_store, open_transport, publish
from idemp.errors import ConfigError, IdempError
from idemp.eventlogs import open_event_log
from idemp.ports import Claim, Claimed, Complete, Done, Get
from tests.servers import PostgreSQL, RabbitMQ, Redis, need
from tests.servers.ports import free_port
from tests.service import finished, until
from tests.test_tracking import service, to


@dataclass(frozen=True)
class Place:
    """A server that wants a client's certificate, and the option of a command that it is for."""

    base: str
    papers: Path
    option: str

    def url(self, ca: str = "ca", cert: str | None = "client") -> str:
        """With these papers."""
        files = {"ca": self.papers / f"{ca}.pem"}
        if cert is not None:
            files |= {"cert": self.papers / f"{cert}.pem", "key": self.papers / f"{cert}.key"}
        return f"{self.base}?{urlencode(files)}"


@contextmanager
def redis_of(papers: Path, name: str) -> Iterator[Place]:
    """``name``: of its certificate."""
    need("redis")
    port = free_port()
    files = {"tls-cert-file": f"{name}.pem", "tls-key-file": f"{name}.key", "tls-ca-cert-file": "ca.pem"}
    options = {option: str(papers / file) for option, file in files.items()}
    with Redis(options={"tls-port": str(port), "tls-auth-clients": "yes", **options}):
        yield Place(f"rediss://127.0.0.1:{port}/0", papers, "--store")


@contextmanager
def postgresql_of(papers: Path, name: str) -> Iterator[Place]:
    """The same."""
    need("postgresql")
    folder = Path(tempfile.mkdtemp(prefix="idemp-postgresql-"))
    files = {"ssl_cert_file": f"{name}.pem", "ssl_key_file": f"{name}.key", "ssl_ca_file": "ca.pem"}
    for file in files.values():
        shutil.copy(papers / file, folder)
    (folder / f"{name}.key").chmod(0o600)
    options = {"ssl": "on", **{option: str(folder / file) for option, file in files.items()}}
    with PostgreSQL(folder=folder, options=options) as server:
        hba = server.data / "pg_hba.conf"
        hba.write_text("hostssl all all 127.0.0.1/32 scram-sha-256 clientcert=verify-ca\n")
        server.restart()
        yield Place(server.url, papers, "--store")


@contextmanager
def rabbitmq_of(papers: Path, name: str) -> Iterator[Place]:
    """The same."""
    need("rabbitmq")
    port = free_port()
    files = {"certfile": f"{name}.pem", "keyfile": f"{name}.key", "cacertfile": "ca.pem"}
    options = {f"ssl_options.{option}": str(papers / file) for option, file in files.items()}
    options |= {"ssl_options.verify": "verify_peer", "ssl_options.fail_if_no_peer_cert": "true"}
    with RabbitMQ(options={"listeners.ssl.1": f"127.0.0.1:{port}", **options}):
        yield Place(f"amqps://guest:guest@127.0.0.1:{port}/", papers, "--transport")


@pytest.fixture(scope="module")
def redis_tls(papers: Path) -> Iterator[Place]:
    with redis_of(papers, "server") as place:
        yield place


@pytest.fixture(scope="module")
def postgresql_tls(papers: Path) -> Iterator[Place]:
    with postgresql_of(papers, "server") as place:
        yield place


@pytest.fixture(scope="module")
def rabbitmq_tls(papers: Path) -> Iterator[Place]:
    with rabbitmq_of(papers, "server") as place:
        yield place


@pytest.fixture(params=["postgresql_tls", "redis_tls"])
def store_place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["rabbitmq_tls", "redis_tls"])
def broker_place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(request.param)
    return found


def test_a_store(store_place: Place, unique: str) -> None:
    """Small batches and large, and a word from another process as soon as it is said."""
    url = f"{store_place.url()}&namespace={unique}"
    with closing(open_store(url)) as mine, closing(open_store(url)) as theirs:
        for size in (1, 300):
            keys = [f"{size}/{n}" for n in range(size)]
            claims = mine.apply([Claim(key) for key in keys])
            assert all(isinstance(each, Claimed) for each in claims)
            result = os.urandom(3000)
            mine.apply([Complete(key, each.token, result) for key, each in zip(keys, claims, strict=True)])  # type: ignore[union-attr]
            for each in theirs.apply([Get(key) for key in keys]):
                assert isinstance(each, Done)
                assert each.result == result
        [claim] = mine.apply([Claim("slow")])
        assert isinstance(claim, Claimed)
        heard = threading.Event()

        def listen() -> None:
            theirs.wait("slow", claim.token, 30.0)
            heard.set()

        threading.Thread(target=listen, daemon=True).start()
        time.sleep(0.5)
        mine.apply([Complete("slow", claim.token, None)])
        assert heard.wait(20)


def test_a_broker(broker_place: Place, tmp_path: Path, unique: str) -> None:
    """Many at once, some larger than a record of TLS; then one after the other, each after a silence."""
    ran = Counter[str]()

    def handle(message: Message, _: Any) -> None:
        ran[message.id] += 1

    url = broker_place.url()
    with (
        service(url, tmp_path, unique, {"order": handle}, workers=4),
        closing(open_transport(url)) as out,
    ):
        sizes = (0, 100, 16_384, 70_000)
        messages = [Message(str(n), "order", {"text": "x" * sizes[n % 4]}) for n in range(2000)]
        for start in range(0, len(messages), 500):
            publish(out, to(f"{unique}-queue", *messages[start : start + 500]))
        until(lambda: len(ran) == 2000, lambda: len(ran))
        for n in range(2000, 2005):
            time.sleep(0.3)
            publish(out, to(f"{unique}-queue", Message(str(n), "order")))
            until(lambda n=n: len(ran) == n + 1, lambda: len(ran))  # type: ignore[misc]
        until(lambda: out.depth(f"{unique}-queue") == 0, lambda: out.depth(f"{unique}-queue"))
    assert set(ran.values()) == {1}


COMMANDS = {
    "postgresql_tls": ("init", "ls", "doctor", "events"),
    "redis_tls": ("ls", "doctor"),
    "rabbitmq_tls": ("doctor --service orders",),
}


@pytest.mark.parametrize(
    ("name", "command"), [(name, each) for name, commands in COMMANDS.items() for each in commands]
)
def test_a_command(name: str, command: str, request: pytest.FixtureRequest) -> None:
    """Who is known is let in; a stranger gets one sentence, and so does who trusts a stranger."""
    place: Place = request.getfixturevalue(name)
    if place.option == "--store":
        with closing(open_store(place.url())) as store:
            store.apply([])
    if command == "events":
        with closing(open_event_log(place.url())) as log:
            log.prune(0.0)

    def said(url: str) -> Any:
        option = {"init": (), "events": ("--tracking",)}.get(command, (place.option,))
        where = (*option, url)
        return finished("-m", "idemp", *command.split(), *where)

    done = said(place.url())
    assert done.returncode in (0, 1), done  # a finding or two
    assert "Traceback" not in done.stderr
    for url, part in (
        (place.url(ca="stranger"), "name the authority of its certificate: ?ca=ca.pem"),
        (place.url(cert=None), "certificate"),
        (place.url(cert="stranger"), "certificate"),
        (place.url(ca="none"), "no file of authorities' certificates: No such file or directory"),
        (place.url(cert="none"), "are no certificate and its key"),
    ):
        done = said(url)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), (url, done)
        assert part in done.stderr, (url, done)


@pytest.mark.parametrize("serve", [redis_of, postgresql_of, rabbitmq_of])
def test_a_certificate_for_another_host(serve: Any, papers: Path) -> None:
    """The authority is right, and the server is not who was asked for."""
    with serve(papers, "elsewhere") as place:
        opened: Any = (open_store if place.option == "--store" else open_transport)(place.url())
        connect = partial(opened.apply, []) if place.option == "--store" else opened.connect
        with closing(opened), pytest.raises(IdempError, match=r"127\.0\.0\.1.*certificate"):
            connect()


def test_a_port_without_it(rabbitmq: RabbitMQ, redis: Redis, postgresql: PostgreSQL) -> None:
    """One sentence says so."""
    for option, url in (
        ("--store", redis.url.replace("redis://", "rediss://")),
        ("--store", f"{postgresql.url}?sslmode=require"),
        ("--transport", rabbitmq.url.replace("amqp://", "amqps://")),
    ):
        command = ("ls",) if option == "--store" else ("doctor", "--service", "orders")
        done = finished("-m", "idemp", *command, option, url)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), (url, done)
        assert "if there is no TLS at that port" in done.stderr, done


@pytest.mark.parametrize("option", ["ca", "cert", "key"])
@pytest.mark.parametrize("scheme", ["amqp", "redis"])
def test_papers_and_no_tls(scheme: str, option: str) -> None:
    """They would be of no use, and what they are for would not happen."""
    opened = open_transport if scheme == "amqp" else open_store
    with pytest.raises(ConfigError, match=f"{option}: for TLS; write the URL with {scheme}s://"):
        opened(f"{scheme}://localhost/?{option}=a.pem")


@pytest.mark.parametrize("scheme", ["amqps", "rediss", "postgresql", "etcd"])
def test_half_a_certificate(scheme: str, papers: Path) -> None:
    """A key that is another's, one with a password, and none at all."""
    locked = papers / "locked.key"
    told = ["-aes128", "-passout", "pass:abcd", "-in", str(papers / "client.key"), "-out", str(locked)]
    subprocess.run(["openssl", "rsa", *told], check=True, capture_output=True)

    def use(query: dict[str, Path]) -> None:
        url = f"{scheme}://localhost/x?" if scheme in ("etcd", "postgresql") else f"{scheme}://localhost/?"
        if scheme == "amqps":
            open_transport(url + urlencode(query))
        else:
            with closing(open_store(url + urlencode(query))) as store:
                store.apply([])

    for key in (papers / "server.key", locked):
        with pytest.raises(ConfigError, match="are no certificate and its key, without a password"):
            use({"cert": papers / "client.pem", "key": key})
    with pytest.raises(ConfigError, match="TLS needs cert and key, or neither"):
        use({"cert": papers / "client.pem"})
