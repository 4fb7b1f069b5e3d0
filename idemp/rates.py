"""Rates: how many messages a second have which outcome, from what services tell anyway.

Graphite has the counters of all services; a service with a metrics port can be asked itself.  Nothing
here listens, and no service has to be started for it.
"""

from __future__ import annotations

import http.client
import re
import urllib.request
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

from idemp.errors import ConfigError, Unavailable
from idemp.graphite import Series, counters
from idemp.ports import OUTCOMES, Clock
from idemp.settings import hidden

TIMEOUT = 5.0
"""Seconds that a service has to answer."""
WINDOW = 10
"""Seconds over which Graphite's points are averaged; the last may not have come yet."""
_LINE = re.compile(r"^idemp_messages_total\{(.*)\} (\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Counter(NamedTuple):
    """What is counted.  ``type`` is "" where a message had none that is known."""

    service: str
    type: str
    outcome: str


Rates = Mapping[Counter, float]
"""A second."""


class Source(Protocol):
    """Something that knows rates."""

    def read(self) -> Rates:
        """Those of now.  Raises `Unavailable`, or `ConfigError` if it is no such source."""
        ...


class NoAnswer(Unavailable):
    """A service does not tell its metrics."""


class FromGraphite:
    """The counters of the Graphite at ``url``."""

    def __init__(self, url: str) -> None:
        self._url = url

    def read(self) -> Rates:
        """The average of the last `WINDOW` seconds."""
        found = {each.name: each for each in counters(self._url, "*", WINDOW + 2)}
        services = _services(found)
        return {place: _rate(found[name]) for name in found if (place := _place(name, services))}


def _services(names: Mapping[str, object]) -> list[str]:
    """A service counts ``<service>_rejected`` and no ``<service>_ok``, which its types do.  Longest first."""
    ends = {name.removesuffix("_rejected") for name in names if name.endswith("_rejected")}
    return sorted((name for name in ends if f"{name}_ok" not in names), key=len, reverse=True)


def _place(name: str, services: Sequence[str]) -> Counter | None:
    """What a counter of Graphite's is about; None if it is not one of ours."""
    outcome = next((each for each in OUTCOMES if name.endswith(f"_{each}")), None)
    if outcome is None:
        return None
    rest = name.removesuffix(f"_{outcome}")
    for service in services:
        if rest == service or rest.startswith(f"{service}_"):
            return Counter(service, rest[len(service) + 1 :], outcome)
    return None


def _rate(series: Series) -> float:
    known = [value for value in series.points.values() if value is not None]
    return sum(known) / (len(known) * series.step) if known else 0.0


class FromMetrics:
    """The ``/metrics`` of services, each at its own URL."""

    def __init__(self, urls: Sequence[str], *, clock: Clock | None = None) -> None:
        self._urls, self._clock = urls, clock or Clock()
        self._last: dict[str, tuple[float, dict[Counter, float]]] = {}

    def read(self) -> Rates:
        """What was counted since the last time, which is nothing the first time."""
        found: dict[Counter, float] = {}
        for url in self._urls:
            now, counts = self._clock.steady(), _counts(url)
            before, last = self._last.get(url, (now, counts))
            self._last[url] = now, counts
            for place, count in counts.items():
                # One that went back was started again.
                new = count - last.get(place, 0.0) if count >= last.get(place, 0.0) else count
                found[place] = found.get(place, 0.0) + (new / (now - before) if now > before else 0.0)
        return found


def _counts(url: str) -> dict[Counter, float]:
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise ConfigError(
            f"{hidden(url)!r} is no URL of metrics; write it like http://localhost:9100/metrics"
        )
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(url, timeout=TIMEOUT) as answer:
            text = answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        why = getattr(reason, "strerror", None) or reason
        raise NoAnswer(f"no metrics answer at {hidden(url)}: {why}") from None
    found = {}
    for labels, value in _LINE.findall(text):
        told = dict(_LABEL.findall(labels))
        place = Counter(told.get("service", ""), told.get("type", ""), told.get("outcome", ""))
        found[place] = float(value)
    return found
