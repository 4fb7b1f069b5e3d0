"""Graphite: what its render API tells of counters, and whether its settings keep them.

statsd's counters are ``stats_counts.<service>_<type>_<outcome>``.
"""

from __future__ import annotations

import configparser
import http.client
import itertools
import json
import re
import socket
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode, urlsplit

from idemp.errors import ConfigError, Unavailable
from idemp.findings import Finding
from idemp.settings import hidden

TIMEOUT = 5.0
"""Seconds that it has to answer."""
ROOT = "stats_counts."
_SAMPLE = "stats_counts.orders_new_order_ok"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800, "y": 31536000}


class Series(NamedTuple):
    """A counter's points.  step: seconds between them.  points: by their time, None where there is none."""

    name: str
    step: float
    points: Mapping[float, float | None]


class GraphiteUnavailable(Unavailable):
    """Graphite does not answer."""


def counters(url: str, pattern: str, seconds: int) -> list[Series]:
    """The counters that match ``pattern`` in the last ``seconds``.  Raises `GraphiteUnavailable`."""
    query = {"target": f"{ROOT}{pattern}", "from": f"-{seconds}s", "format": "json", "noCache": "1"}
    address = f"{_base(url)}/render?{urlencode(query)}"
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(address, timeout=TIMEOUT) as answer:
            found = json.load(answer)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise GraphiteUnavailable(
            f"no Graphite answers at {hidden(url)}: {getattr(reason, 'strerror', None) or reason}"
        ) from None
    return [_series(each["target"], each["datapoints"]) for each in found]


def _base(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{hidden(url)!r} is no URL of a Graphite; write it like http://localhost:80")
    return url.rstrip("/")


def _series(name: str, points: list[tuple[float | None, float]]) -> Series:
    times = [at for _, at in points]
    step = float(times[1] - times[0]) if len(times) > 1 else 1.0
    return Series(name.removeprefix(ROOT), step, {at: value for value, at in points})


# ---------------------------------------------------------------- what doctor asks


def examine(url: str, services: list[str]) -> list[Finding]:
    """Whether the counters of ``services`` arrive, each time that a point is due."""
    found = []
    for service in services:
        series = counters(url, f"{service}_rejected", 120)
        points = [value for each in series for value in each.points.values()]
        if not any(value is not None for value in points):
            what = f"no counter of {service} has arrived in the last two minutes"
            fix = "start the service; see that IDEMP_STATSD is this Graphite's statsd, UDP"
            found.append(Finding("graphite", what, f"{ROOT}{service}_rejected has no point", fix))
            continue
        found += regular(series[0])
    return found


def regular(series: Series) -> list[Finding]:
    """Holes between points: statsd flushes more seldom than Graphite's finest retention."""
    known = sorted(at for at, value in series.points.items() if value is not None)
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(known))
    typical = gaps[len(gaps) // 2] if gaps else series.step
    if typical <= series.step:
        return []
    evidence = f"points of {series.name} come every {typical:g} s, places for them every {series.step:g} s"
    flush = f"statsd's flushInterval to {series.step * 1000:g}"
    fix = f"let storage-schemas.conf begin with {typical:g}s, or set {flush}"
    return [Finding("graphite", "statsd's flush and Graphite's retention differ", evidence, fix)]


def examine_files(folder: str) -> list[Finding]:
    """storage-schemas.conf and storage-aggregation.conf against statsd's flushInterval, in ``folder``."""
    schemas, rules = _sections(folder, "storage-schemas.conf"), _sections(folder, "storage-aggregation.conf")
    flush, where = _flush(folder)
    found = []
    schema = _matching(schemas)
    finest = _seconds(schema["retentions"].split(",")[0].split(":")[0]) if schema else 60.0
    named = f"retentions = {schema['retentions']}" if schema else "no pattern, so carbon's default 60s:1d"
    if finest != flush:
        lost = "counts overwrite each other" if finest > flush else "most places for points stay empty"
        evidence = f"flushInterval {flush * 1000:g} ms ({where}); {named}"
        fix = f"let the first entry be {flush:g}s, and delete or whisper-resize the files that are there"
        found.append(
            Finding("graphite", f"the finest retention is not statsd's flush: {lost}", evidence, fix)
        )
    rule = _matching(rules)
    method, factor = (rule or {}).get("aggregationmethod", "average"), (rule or {}).get("xfilesfactor", "0.5")
    if method != "sum":
        what = "counts are not summed when they move on: they shrink"
        fix = (
            "storage-aggregation.conf: pattern = ^stats_counts\\., aggregationMethod = sum, xFilesFactor = 0"
        )
        found.append(Finding("graphite", what, f"aggregationMethod = {method} for {_SAMPLE}", fix))
    elif float(factor) > 0:
        what = "counts of a service that was idle vanish when they move on"
        found.append(
            Finding("graphite", what, f"xFilesFactor = {factor}", "xFilesFactor = 0 for ^stats_counts")
        )
    return found


def _sections(folder: str, name: str) -> list[Mapping[str, str]]:
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read_string((Path(folder) / name).read_text())
    except OSError as error:
        raise ConfigError(f"{folder}/{name} cannot be read: {error.strerror}") from None
    except configparser.Error as error:
        raise ConfigError(f"{folder}/{name}: {' '.join(str(error).split())}") from None
    return [dict(parser[each]) for each in parser.sections()]


def _matching(sections: list[Mapping[str, str]]) -> Mapping[str, str] | None:
    """The first pattern that fits counts."""
    return next((each for each in sections if re.search(each.get("pattern", "(?!)"), _SAMPLE)), None)


def _flush(folder: str) -> tuple[float, str]:
    """Seconds between two flushes of statsd, and where that is said."""
    for name in ("udp.js", "config.js", "localConfig.js"):
        file = Path(folder) / name
        if file.exists() and (found := re.search(r"flushInterval\"?\s*:\s*(\d+)", file.read_text())):
            return int(found[1]) / 1000, name
    return 10.0, "statsd's default"


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)([a-z]?)[a-z]*", text.strip())
    return int(match[1]) * _UNITS.get(match[2] or "s", 1) if match else 60.0


def examine_statsd(address: str) -> list[Finding]:
    """Whether anybody hears at ``address``: not every machine says that a port is closed.

    Raises `ConfigError` if it is no address.
    """
    host, port = _address(address)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.settimeout(0.3)
            probe.connect((host, port))
            for _ in range(2):  # the second send, or the wait, hears of the first
                probe.send(b"idemp.doctor:0|c")
                time.sleep(0.05)
            probe.recv(1)
    except TimeoutError:
        return []
    except OSError as error:
        what = "statsd does not hear: every counter is lost, and nothing else happens"
        evidence = f"{address}: {getattr(error, 'strerror', None) or error}"
        return [Finding("statsd", what, evidence, "start it, or name another: IDEMP_STATSD=host:8125")]
    return []


def _address(address: str) -> tuple[str, int]:
    parts = urlsplit(f"//{address}")
    try:
        port = parts.port or 8125
    except ValueError:
        port = 0
    if not parts.hostname or not port:
        raise ConfigError(f"statsd address {address!r}: write it like 127.0.0.1:8125")
    return parts.hostname, port
