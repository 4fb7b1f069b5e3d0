"""The table of the servers: where each is found.  A new one is an entry here, and a class to run it."""

import os
import shutil
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from tests.servers import container

NPM = Path(__file__).with_name("npm")
"""What comes from npm, with its pins."""
FROM_NPM = Path(__file__).parents[2] / ".venv" / "npm"


@dataclass(frozen=True)
class Server:
    program: str
    package: str  # of Debian and Ubuntu
    image: str = ""  # for a machine with a Docker engine and without the program
    places: tuple[str, ...] = ()  # patterns: where the program is when PATH does not say, or says it wrong
    service: str = ""  # what the package starts, if that has another name
    npm: bool = False  # comes from npm, which is what ``package`` brings

    def path(self) -> str | None:
        """The program itself, if it is installed."""
        if self.npm and not _pinned():
            return None
        places = [found for place in self.places for found in sorted(glob(place), reverse=True)]
        return shutil.which(self.program, path=os.pathsep.join([*places, os.environ.get("PATH", "")]))

    def here(self) -> bool:
        """Can a test start one now?"""
        return self.path() is not None or container.has_image(self.image)


def _pinned() -> bool:
    """Whether what is here from npm is what the lock says."""
    lock = FROM_NPM / "package-lock.json"
    return lock.exists() and lock.read_bytes() == (NPM / lock.name).read_bytes()


SERVERS = {
    "rabbitmq": Server(
        program="rabbitmq-server",
        package="rabbitmq-server",
        image="rabbitmq:3.13-management",
        # Debian's /usr/sbin/rabbitmq-server is a wrapper that insists on the user rabbitmq.
        places=("/usr/lib/rabbitmq/bin", "/usr/local/sbin", "/opt/homebrew/sbin", "/usr/sbin"),
    ),
    "etcd": Server(
        program="etcd",
        package="etcd-server",
        service="etcd",
        image="quay.io/coreos/etcd:v3.4.37",
        places=("/usr/local/bin", "/opt/homebrew/bin"),
    ),
    # Debian keeps PostgreSQL's programs out of PATH, a folder for each version.
    "postgresql": Server(program="postgres", package="postgresql", places=("/usr/lib/postgresql/*/bin",)),
    "redis": Server(program="redis-server", package="redis-server"),
    "pgbouncer": Server(program="pgbouncer", package="pgbouncer"),
    "carbon": Server(program="carbon-cache", package="graphite-carbon", service="carbon-cache"),
    "graphite-web": Server(program="graphite-manage", package="graphite-web"),
    "statsd": Server(
        program="statsd", package="npm", npm=True, places=(str(FROM_NPM / "node_modules/.bin"),)
    ),
    "prometheus": Server(program="prometheus", package="prometheus"),
    # No servers: it saves and restores one's data; it makes the disk of one stand still.
    "etcdctl": Server(program="etcdctl", package="etcd-client"),
    "strace": Server(program="strace", package="strace"),
}
