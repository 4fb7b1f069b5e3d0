"""`make servers`: makes sure that every server the suite needs is on this machine."""

import sys

from tests.servers.catalog import SERVERS
from tests.servers.install import Missing, ensure


def main() -> int:
    missing = False
    for name, server in SERVERS.items():
        try:
            print(f"{name}: {ensure(server)}", flush=True)
        except Missing as sentence:
            missing = True
            print(f"{name}: {sentence}", file=sys.stderr)
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
