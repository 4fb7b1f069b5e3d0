"""Every command that asks a server: wrong port, no server, wrong password are one sentence each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from idemp import open_store
from tests.servers import Etcd, RabbitMQ, need
from tests.service import finished

OF_A_STORE: dict[str, list[str]] = {
    "ls": [],
    "stats": [],
    "deeds": [],
    "doubt": [],
    "get": ["k"],
    "resolve": ["k", "--retry"],
    "forget": ["k", "--yes"],
    "doctor": [],
}
OF_A_BROKER: dict[str, list[str]] = {
    "publish": ['{"type":"new_order","id":"1"}'],
    "dead list": ["orders-queue"],
    "dead show": ["orders-queue"],
    "dead send": ["orders-queue", "--all", "--yes"],
    "doctor": ["--service", "orders"],
}


def one_sentence(command: str, *arguments: str, part: str) -> None:
    """On stderr, exit code 2; the password is not in it."""
    done = finished("-m", "idemp", *command.split(), *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert done.stderr.startswith("idemp: ")
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert "tellnobody" not in done.stderr


@pytest.mark.parametrize("command", OF_A_STORE)
@pytest.mark.parametrize(
    "url", ["etcd://me:tellnobody@127.0.0.1:9/x", "etcd://me:tellnobody@no.such.invalid/x"]
)
def test_no_etcd(command: str, url: str) -> None:
    """A port where nobody is; a name that nobody has."""
    one_sentence(command, *OF_A_STORE[command], "--store", url, part="--store (IDEMP_STORE): ")


@pytest.mark.parametrize("command", OF_A_STORE)
def test_a_port_of_another_server(command: str, rabbitmq: RabbitMQ) -> None:
    """It is a RabbitMQ."""
    url = f"etcd://127.0.0.1:{rabbitmq.port}/x"
    one_sentence(command, *OF_A_STORE[command], "--store", url, part="--store (IDEMP_STORE): ")


@pytest.mark.parametrize("command", OF_A_STORE)
def test_no_sqlite_file(command: str) -> None:
    """A file that is not there is not made."""
    url = "sqlite:////no/such/seen.db"
    one_sentence(command, *OF_A_STORE[command], "--store", url, part="there is no file /no/such/seen.db")


@pytest.fixture(scope="module")
def guarded() -> Iterator[Etcd]:
    """An etcd that wants a password."""
    need("etcd")
    with Etcd() as etcd:
        store = open_store(f"{etcd.url}x")
        store.apply([])
        store.close()
        member = etcd.members[0]
        member.call("/v3/auth/user/add", name="root", password="right")
        member.call("/v3/auth/role/add", name="root")
        member.call("/v3/auth/user/grant", user="root", role="root")
        member.call("/v3/auth/enable")
        yield etcd


@pytest.mark.parametrize("command", OF_A_STORE)
@pytest.mark.parametrize("login", ["root:tellnobody@", ""])
def test_a_wrong_password_for_etcd(command: str, login: str, guarded: Etcd) -> None:
    """A wrong one, and none."""
    url = f"etcd://{login}{guarded.endpoints[0]}/x"
    one_sentence(command, *OF_A_STORE[command], "--store", url, part="--store (IDEMP_STORE): ")


@pytest.mark.parametrize("command", OF_A_BROKER)
@pytest.mark.parametrize("where", ["127.0.0.1:9", "no.such.invalid"])
def test_no_rabbitmq(command: str, where: str) -> None:
    """A port where nobody is; a name that nobody has."""
    url = f"amqp://me:tellnobody@{where}/"
    arguments = [*OF_A_BROKER[command], "--transport", url]
    one_sentence(command, *arguments, part="--transport (IDEMP_TRANSPORT): ")


@pytest.mark.parametrize("command", OF_A_BROKER)
def test_a_wrong_password_for_rabbitmq(command: str, rabbitmq: RabbitMQ) -> None:
    """It refuses."""
    url = rabbitmq.url.replace("guest:guest", "guest:tellnobody")
    one_sentence(command, *OF_A_BROKER[command], "--transport", url, part="refuses user 'guest'")


@pytest.mark.parametrize("command", OF_A_BROKER)
def test_an_etcd_is_no_rabbitmq(command: str, etcd: Etcd) -> None:
    """Another server's port."""
    arguments = [*OF_A_BROKER[command], "--transport", f"amqp://{etcd.endpoints[0]}/"]
    one_sentence(command, *arguments, part="--transport (IDEMP_TRANSPORT): ")
