"""`make demo STACK=real`: the demo on a RabbitMQ and an etcd that are there for it alone."""

import subprocess
import sys

from tests.servers import Etcd, RabbitMQ
from tests.servers.catalog import SERVERS
from tests.servers.install import Missing, ensure


def main() -> int:
    try:
        for name in ("rabbitmq", "etcd"):
            ensure(SERVERS[name])
    except Missing as sentence:
        print(f"demo: {sentence}", file=sys.stderr)
        return 2
    with RabbitMQ() as broker, Etcd() as store:
        command = [
            "idemp",
            "demo",
            "--stack",
            "real",
            "--transport",
            broker.url,
            "--store",
            f"{store.url}demo",
        ]
        return subprocess.run([sys.executable, "-m", *command], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
