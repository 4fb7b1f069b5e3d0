"""The statsd meter.  Counters are summed in the process and sent once a second."""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict
from typing import Any
from urllib.parse import urlsplit

from idemp.errors import ConfigError, MissingExtra

log = logging.getLogger(__name__)

FLUSH = 1.0
"""Seconds between two sends."""
_SAMPLES = 50
"""Observations of one timer that are sent a flush; more would say no more."""


class StatsdMeter:
    """Counters ``name:n|c`` and timers ``name:ms|ms`` over UDP to ``host:port``.

    A statsd that is down, or a name that does not resolve, costs nothing but a log line.
    """

    def __init__(self, address: str) -> None:
        self._host, self._port = _address(address)
        try:
            import statsd
        except ImportError:
            raise MissingExtra("the statsd meter", "statsd") from None
        self._library = statsd
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._times: defaultdict[str, list[float]] = defaultdict(list)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send_regularly, name="idemp-statsd", daemon=True)
        self._thread.start()

    def count(self, name: str, n: int = 1) -> None:
        """See `idemp.ports.Meter`."""
        with self._lock:
            self._counts[name] += n

    def time(self, name: str, seconds: float) -> None:
        """See `idemp.ports.Meter`."""
        with self._lock:
            if len(self._times[name]) < _SAMPLES:
                self._times[name].append(seconds * 1000)

    def close(self) -> None:
        """Send what is left and end the sender."""
        self._ended.set()
        self._thread.join(2 * FLUSH)

    def _send_regularly(self) -> None:
        client = None
        ended = False
        while not ended:
            ended = self._ended.wait(FLUSH)
            if client is None:
                client = self._client()
            if client is not None:
                self._flush(client)
        if client is not None:
            client.close()

    def _client(self) -> Any:
        """The client looks its host up when it is made, which may fail for a while."""
        try:
            return self._library.StatsClient(self._host, self._port)
        except OSError as error:
            log.warning("statsd at %s:%d: %s", self._host, self._port, error)
            return None

    def _flush(self, client: Any) -> None:
        with self._lock:
            counts, self._counts = self._counts, Counter()
            times, self._times = self._times, defaultdict(list)
        pipe = client.pipeline()
        for name, n in counts.items():
            pipe.incr(name, n)
        for name, observed in times.items():
            for milliseconds in observed:
                pipe.timing(name, milliseconds)
        pipe.send()


def _address(address: str) -> tuple[str, int]:
    parts = urlsplit(f"//{address}")
    try:
        port = parts.port or 8125
    except ValueError:
        port = 0
    if not parts.hostname or not port or parts.path:
        raise ConfigError(f"statsd address {address!r}: write it like 127.0.0.1:8125")
    return parts.hostname, port
