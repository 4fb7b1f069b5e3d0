"""What every test may ask for: a shared broker, a broker of its own, a name that nobody else uses."""

import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import pytest

from tests.servers import Etcd, Graphite, PostgreSQL, RabbitMQ, Redis, Statsd, need
from tests.servers.need import missing

# It tells of every connection, many lines each: a failed test's report is for what idemp says.
logging.getLogger("pika").setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[RabbitMQ]:
    """The broker that the whole run shares, started on first use.  Not to be stopped: see `own_rabbitmq`."""
    need("rabbitmq")
    with RabbitMQ() as broker:
        yield broker


@pytest.fixture
def amqp_url(rabbitmq: RabbitMQ) -> str:
    """Where the shared broker is.  Tests keep apart by names: see `unique`."""
    return rabbitmq.url


@pytest.fixture
def own_rabbitmq() -> Iterator[RabbitMQ]:
    """A broker for this test alone, which may stop, kill and restart it."""
    need("rabbitmq")
    with RabbitMQ() as broker:
        yield broker


@pytest.fixture(scope="session")
def etcd() -> Iterator[Etcd]:
    """One member that the whole run shares.  Tests keep apart by namespaces: see `unique`."""
    need("etcd")
    with Etcd() as cluster:
        yield cluster


@pytest.fixture
def own_etcd() -> Iterator[Etcd]:
    """One member for this test alone, which may stop, kill and restart it."""
    need("etcd")
    with Etcd() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """The server that the whole run shares.  Tests keep apart by namespaces: see `unique`."""
    need("postgresql")
    with PostgreSQL() as server:
        yield server


@pytest.fixture
def own_postgresql() -> Iterator[PostgreSQL]:
    """A server for this test alone, which may stop, kill and restart it."""
    need("postgresql")
    with PostgreSQL() as server:
        yield server


@pytest.fixture(scope="session")
def redis() -> Iterator[Redis]:
    """The server that the whole run shares.  Tests keep apart by namespaces: see `unique`."""
    need("redis")
    with Redis() as server:
        yield server


@pytest.fixture
def own_redis() -> Iterator[Redis]:
    """A server for this test alone, which may stop, kill and restart it."""
    need("redis")
    with Redis() as server:
        yield server


@pytest.fixture(scope="session")
def graphite() -> Iterator[Graphite]:
    """Carbon and graphite-web for the whole run."""
    need("carbon")
    need("graphite-web")
    with Graphite() as server:
        yield server


@pytest.fixture(scope="session")
def statsd(graphite: Graphite) -> Iterator[Statsd]:
    """The statsd before it."""
    need("statsd")
    with Statsd(graphite.carbon_port) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority, a server's and a client's certificate, and a stranger's authority."""
    if not shutil.which("openssl"):
        missing("openssl is not on this machine")
    folder = tmp_path_factory.mktemp("papers")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    for name in ("ca", "stranger"):
        openssl(
            *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"),
            *("-keyout", f"{name}.key", "-out", f"{name}.pem"),
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        )
    own = {
        "server": "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth",
        "elsewhere": "subjectAltName=IP:127.0.0.9\nextendedKeyUsage=serverAuth",
        "client": "extendedKeyUsage=clientAuth",
    }
    for name, extensions in own.items():
        # Python 3.13 looks for all that the standard (RFC 5280) wants to be there.
        (folder / f"{name}.ext").write_text(f"{extensions}\nauthorityKeyIdentifier=keyid,issuer\n")
        openssl(
            *("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}"),
            *("-keyout", f"{name}.key", "-out", f"{name}.csr"),
        )
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-days", "2", "-out", f"{name}.pem", "-extfile", f"{name}.ext"),
        )
    return folder


@pytest.fixture
def unique() -> str:
    """A short name that no other test uses, for services, exchanges and queues."""
    return f"t{uuid4().hex[:10]}"


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A disk of 200 MB, where the server's user may go too."""
    if os.geteuid() != 0:
        missing("only root can make a small disk")
    with TemporaryDirectory(prefix="idemp-disk-") as folder:
        place = Path(folder)
        place.chmod(0o755)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m,mode=755", "tmpfs", folder], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
