"""Ports on 127.0.0.1 for servers that come and go."""

import random
import socket
from contextlib import suppress

_dice = random.SystemRandom()  # a test that seeds `random` must not get another run's ports
_given: set[int] = set()


def free_port() -> int:
    """A port that nobody listens on, given out once.

    Below the range the kernel takes outgoing connections' ports from: a client that keeps knocking
    while its server is down could otherwise get the server's own port, and keep it from coming back.
    """
    while True:
        port = _dice.randrange(20_000, 32_000)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port
