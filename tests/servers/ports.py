"""Ports on 127.0.0.1 for servers that come and go."""

import os
import random
import socket
from contextlib import suppress

_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_LEAST, _EACH = 20_000, 3_000  # of which each process of a test run has its own, so that two never race
_dice = random.SystemRandom()  # a test that seeds `random` must not get another run's ports
_given: set[int] = set()


def free_port() -> int:
    """A port that nobody listens on, given out once.

    Below the range the kernel takes outgoing connections' ports from: a client that keeps knocking
    while its server is down could otherwise get the server's own port, and keep it from coming back.
    """
    while True:
        port = _LEAST + _WORKER % 4 * _EACH + _dice.randrange(_EACH)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port
