"""Settings: the service's environment, read once and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from idemp import ConfigError
from idemp.settings import switch

TRANSPORT = "amqp://guest:guest@localhost:5672/"
STATSD = "127.0.0.1:8125"
SWITCHES = ("ENABLE_ETCD", "ENABLE_STATE")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Settings:
    """What one service was told.

    ``store`` is None when every delivery is to be processed, ``metrics_port`` when Prometheus gets nothing,
    ``health_port`` when nobody asks for its health, ``tracking`` when no events are recorded.
    """

    service: str
    transport: str
    store: str | None
    statsd: str
    metrics_port: int | None
    health_port: int | None
    tracking: str | None = None


def read(environment: Mapping[str, str]) -> Settings:
    """The settings in ``environment``.  Raises `ConfigError`, which names the variable and the fix."""
    return Settings(
        service=_service(environment.get("SERVICE_NAME", "")),
        transport=environment.get("IDEMP_TRANSPORT") or TRANSPORT,
        store=_store(environment),
        statsd=environment.get("IDEMP_STATSD") or STATSD,
        metrics_port=_port("IDEMP_METRICS_PORT", environment.get("IDEMP_METRICS_PORT", "")),
        health_port=_port("IDEMP_HEALTH_PORT", environment.get("IDEMP_HEALTH_PORT", "")),
        tracking=environment.get("IDEMP_TRACKING") or None,
    )


def _service(name: str) -> str:
    if not name:
        raise ConfigError("SERVICE_NAME is not set; name the service, like SERVICE_NAME=orders")
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"SERVICE_NAME={name!r}: up to 100 letters, digits, dots, dashes and underscores, "
            "the first a letter or digit, like orders"
        )
    return name


def _port(variable: str, text: str) -> int | None:
    if not text:
        return None
    if not re.fullmatch("[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise ConfigError(f"{variable}={text!r}: a port is a number from 1 to 65535, like 9100")
    return int(text)


def _store(environment: Mapping[str, str]) -> str | None:
    """A store that was named is used unless a switch is there and says no; the default is an etcd here."""
    url = environment.get("IDEMP_STORE") or None
    said = [name for name in SWITCHES if name in environment]
    on = any(switch(environment[name]) for name in said)
    if not on:
        return None if said else url
    return url or f"etcd://localhost:2379/{environment['SERVICE_NAME']}"
