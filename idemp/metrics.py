"""Meters, and the names that they know.

    <service>_<type>_<outcome>                       a counter for each type of message
    <service>_rejected                               one for messages without a known type
    <service>_claim, _complete, _handler             timers
    idemp_audit.<field>.<replica>.<state>            a gauge for each state, 1 or 0
    idemp_audit.<field>.<replica>.difference         a gauge
    idemp_audit.looked                               when the auditor last judged, in seconds since 1970
    <service>_outbox_letters, _outbox_age            of a relay: how many wait, and the oldest for how long
    <service>_ready, _out, _delayed, _consumers      of its queue on Redis Streams: lag, pending, and whose

statsd gets the names from counters that are summed in the process and sent once a second; what a name of its
own cannot have (other letters than ASCII's, spaces, ``:``, ``|``) becomes an underscore.
Prometheus gets their parts as labels, which have room for everything.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from idemp.errors import ConfigError, MissingExtra
from idemp.ports import Meter

log = logging.getLogger(__name__)

FLUSH = 1.0
"""Seconds between two sends."""
_SAMPLES = 50
"""Observations of one timer that are sent a flush; more would say no more."""


_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""Seconds: a batch of claims takes milliseconds, a handler what it takes."""


class Meters:
    """Several meters as one."""

    def __init__(self, *meters: Meter) -> None:
        self._meters = meters

    def count(self, name: str, n: int = 1) -> None:
        """See `idemp.ports.Meter`."""
        for meter in self._meters:
            meter.count(name, n)

    def time(self, name: str, seconds: float) -> None:
        """See `idemp.ports.Meter`."""
        for meter in self._meters:
            meter.time(name, seconds)

    def level(self, name: str, value: float) -> None:
        """See `idemp.ports.Meter`."""
        for meter in self._meters:
            meter.level(name, value)

    def close(self) -> None:
        """See `idemp.ports.Meter`."""
        for meter in self._meters:
            meter.close()


class PrometheusMeter:
    """``idemp_messages_total``, ``idemp_duration_seconds``, ``idemp_level`` of ``service`` at ``/metrics``.

    Whoever scrapes comes from elsewhere: it listens on every address of this machine.
    """

    def __init__(self, service: str, port: int) -> None:
        try:
            import prometheus_client as library
        except ImportError:
            raise MissingExtra("the Prometheus meter", "prometheus") from None
        self._prefix = f"{service}_"
        registry = library.CollectorRegistry()
        labels = ("service", "type", "outcome")
        self._messages = library.Counter(
            "idemp_messages", "Outcomes of deliveries.", labels, registry=registry
        )
        self._durations = library.Histogram(
            "idemp_duration_seconds",
            "A batch of claims, a batch of completions, a handler.",
            ("service", "step"),
            buckets=_BUCKETS,
            registry=registry,
        )
        self._levels = library.Gauge(
            "idemp_level", "What there is now: letters, seconds.", ("service", "what"), registry=registry
        )
        self._service = service
        # Looking a child up by its labels takes longer than counting.
        self._counters: dict[str, Any] = {}
        self._timers: dict[str, Any] = {}
        try:
            self._server, self._thread = library.start_http_server(port, registry=registry)
        except OSError as error:
            raise ConfigError(f"port {port}: {error.strerror}") from None

    def count(self, name: str, n: int = 1) -> None:
        """See `idemp.ports.Meter`."""
        counter = self._counters.get(name)
        if counter is None:
            kind, _, outcome = name.removeprefix(self._prefix).rpartition("_")
            counter = self._counters[name] = self._messages.labels(self._service, kind, outcome)
        counter.inc(n)

    def time(self, name: str, seconds: float) -> None:
        """See `idemp.ports.Meter`."""
        timer = self._timers.get(name)
        if timer is None:
            step = name.removeprefix(self._prefix)
            timer = self._timers[name] = self._durations.labels(self._service, step)
        timer.observe(seconds)

    def level(self, name: str, value: float) -> None:
        """See `idemp.ports.Meter`."""
        self._levels.labels(self._service, name.removeprefix(self._prefix)).set(value)

    def close(self) -> None:
        """Let go of the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Lamp(NamedTuple):
    """How a replica's copy of a field stands.  difference: None where there is none."""

    field: str
    owner: str
    replica: str
    state: str
    difference: float | None


Lamps = Callable[[], tuple[float | None, Sequence[Lamp]]]
"""From any thread: when the auditor last judged, in seconds since 1970, and what it found.

Asked when something is to be shown, so that it can say that its auditor is stuck.
"""


class StatsdLamps:
    """Gauges over UDP to ``host:port`` once a second.  states: the names that a state may have."""

    def __init__(self, address: str, states: Sequence[str], lamps: Lamps) -> None:
        self._host, self._port = _address(address)
        try:
            import statsd
        except ImportError:
            raise MissingExtra("the statsd meter", "statsd") from None
        self._library, self._states, self._lamps = statsd, states, lamps
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send_regularly, name="idemp-lamps", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the sender."""
        self._ended.set()
        self._thread.join(2 * FLUSH)

    def _send_regularly(self) -> None:
        client, errors = None, _Errors(self._host, self._port)
        while not self._ended.wait(FLUSH):
            with errors:
                try:
                    client = client or self._library.StatsClient(self._host, self._port)
                except OSError as error:
                    log.warning("statsd at %s:%d: %s", self._host, self._port, error)
                    continue
                pipe = client.pipeline()
                for name, value in self._gauges():
                    pipe.gauge(name, value)
                pipe.send()
        if client is not None:
            client.close()

    def _gauges(self) -> Iterator[tuple[str, float]]:
        looked, lamps = self._lamps()
        for lamp in lamps:
            place = f"idemp_audit.{_part(lamp.field)}.{_part(lamp.replica)}"
            for state in self._states:
                yield f"{place}.{state}", int(lamp.state == state)
            if lamp.difference is not None:
                yield f"{place}.difference", lamp.difference
        if looked is not None:
            yield "idemp_audit.looked", round(looked)


def _part(name: str) -> str:
    """Of a metric's name: what would end it, or make it two, becomes an underscore."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def _whole(name: str) -> str:
    """A metric's name: what would end it, or has no place in it, becomes an underscore."""
    return re.sub(r"[^!-~]|[:|]", "_", name)


class _Errors:
    """What a sender to ``host:port`` did not expect does not end it, and is logged once."""

    def __init__(self, host: str, port: int) -> None:
        self._where, self._told = f"{host}:{port}", False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        if not self._told:
            log.error("statsd at %s: what was counted could not be sent", self._where, exc_info=error)
        self._told = True
        return True


class PrometheusLamps:
    """``idemp_audit_state``, ``_difference``, ``_looked_timestamp_seconds``: at ``/metrics`` of ``port``."""

    def __init__(self, port: int, states: Sequence[str], lamps: Lamps) -> None:
        try:
            import prometheus_client as library
            from prometheus_client.core import GaugeMetricFamily
        except ImportError:
            raise MissingExtra("the Prometheus meter", "prometheus") from None
        self._family, self._states, self._lamps = GaugeMetricFamily, states, lamps
        registry = library.CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = library.start_http_server(port, registry=registry)
        except OSError as error:
            raise ConfigError(f"port {port}: {error.strerror}") from None

    def describe(self) -> list[Any]:
        """Nothing is asked at registration."""
        return []

    def collect(self) -> Iterator[Any]:
        """For the library: how it stands at this moment."""
        family = self._family
        looked, lamps = self._lamps()
        labels = ("field", "owner", "replica")
        states = family("idemp_audit_state", "1 for the state of a copy.", labels=(*labels, "state"))
        apart = family("idemp_audit_difference", "What a replica has more than it should.", labels=labels)
        for lamp in lamps:
            for state in self._states:
                states.add_metric((*lamp[:3], state), int(lamp.state == state))
            if lamp.difference is not None:
                apart.add_metric(lamp[:3], lamp.difference)
        yield states
        yield apart
        if looked is not None:
            name = "idemp_audit_looked_timestamp_seconds"
            yield family(name, "When the auditor last judged.", value=looked)

    def close(self) -> None:
        """Let go of the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class StatsdMeter:
    """Counters ``name:n|c``, timers ``name:ms|ms`` and gauges ``name:n|g`` over UDP to ``host:port``.

    A statsd that is down, or a name that does not resolve, costs nothing but a log line.
    """

    def __init__(self, address: str) -> None:
        self._host, self._port = _address(address)
        try:
            import statsd
        except ImportError:
            raise MissingExtra("the statsd meter", "statsd") from None
        self._library = statsd
        self._begin()
        _meters.add(self)

    def _begin(self) -> None:
        """Nothing is counted yet.  Also in a forked child, in which there is no sender."""
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._times: defaultdict[str, list[float]] = defaultdict(list)
        self._levels: dict[str, float] = {}
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

    def level(self, name: str, value: float) -> None:
        """See `idemp.ports.Meter`."""
        with self._lock:
            self._levels[name] = value

    def close(self) -> None:
        """Send what is left and end the sender."""
        self._ended.set()
        self._thread.join(2 * FLUSH)

    def _send_regularly(self) -> None:
        client, errors = None, _Errors(self._host, self._port)
        ended = False
        while not ended:
            ended = self._ended.wait(FLUSH)
            with errors:
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
            levels, self._levels = self._levels, {}
        pipe = client.pipeline()
        for name, n in counts.items():
            pipe.incr(_whole(name), n)
        for name, observed in times.items():
            for milliseconds in observed:
                pipe.timing(_whole(name), milliseconds)
        for name, value in levels.items():
            pipe.gauge(_whole(name), value)
        pipe.send()


_meters: weakref.WeakSet[StatsdMeter] = weakref.WeakSet()


def _forked() -> None:
    for meter in list(_meters):
        if not meter._ended.is_set():
            meter._begin()


os.register_at_fork(after_in_child=_forked)


def _address(address: str) -> tuple[str, int]:
    parts = urlsplit(f"//{address}")
    try:
        port = parts.port or 8125
    except ValueError:
        port = 0
    if not parts.hostname or not port or parts.path:
        raise ConfigError(f"statsd address {address!r}: write it like 127.0.0.1:8125")
    return parts.hostname, port
