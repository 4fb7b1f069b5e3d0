"""``doctor``: is the broker, the store, statsd and Graphite as idemp needs them?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import click

from idemp.cli.options import about, escaped, json_option
from idemp.errors import ConfigError
from idemp.findings import Finding, Looked
from idemp.graphite import examine as look_at_graphite
from idemp.graphite import examine_files, examine_statsd
from idemp.pipeline import ATTEMPTS, MAX_DELAY
from idemp.ports import Clock
from idemp.settings import hidden, split, sqlite_path
from idemp.stores import etcd_of, open_store, postgresql_of, redis_of
from idemp.transports import open_transport

CLOCK = Clock()
TIMEOUT_OF_ACKS = 1800.0
"""Seconds until RabbitMQ gives a delivery without acknowledgement to another, unless told otherwise."""


@click.command()
@click.option(
    "--service", "services", multiple=True, envvar="SERVICE_NAME", show_envvar=True, help="Its queues."
)
@click.option("--transport", metavar="URL", envvar="IDEMP_TRANSPORT", show_envvar=True, help="The broker.")
@click.option("--management", metavar="URL", help="RabbitMQ's management API, if not at port 15672.")
@click.option("--store", metavar="URL", envvar="IDEMP_STORE", show_envvar=True, help="The store.")
@click.option(
    "--statsd", metavar="HOST:PORT", envvar="IDEMP_STATSD", show_envvar=True, help="Where counters go."
)
@click.option(
    "--graphite", metavar="URL", envvar="IDEMP_GRAPHITE", show_envvar=True, help="Graphite's pages."
)
@click.option("--graphite-conf", metavar="FOLDER", help="With storage-schemas.conf and statsd's udp.js.")
@json_option
def doctor(
    services: tuple[str, ...],
    transport: str | None,
    management: str | None,
    store: str | None,
    statsd: str | None,
    graphite: str | None,
    graphite_conf: str | None,
    as_json: bool,
) -> int:
    """Look for what would break the promise, or hide that it broke: finding, evidence, fix.

    Looks at what is named, and changes nothing.  Exit code 0 if there is no fault, 1 if there is, 2 if
    something named cannot be looked at.
    """
    looked = [name for name, named in _named(transport, store, statsd, graphite, graphite_conf) if named]
    if not looked:
        raise click.UsageError(
            "Name what to look at: --transport, --store, --statsd, --graphite or --graphite-conf."
        )
    found: list[Finding] = []
    retention = None
    if store is not None:
        with about("--store (IDEMP_STORE)"):
            seen = _store(store)
        retention = seen.retention
        found += seen.findings
    if transport is not None:
        with about("--transport (IDEMP_TRANSPORT)"):
            found += _broker(transport, management, services, retention)
    if retention is not None:
        found += horizon(retention, amqp=transport is not None and transport.startswith("amqp"))
    if statsd is not None:
        with about("--statsd (IDEMP_STATSD)"):
            found += examine_statsd(statsd)
    if graphite is not None:
        with about("--graphite (IDEMP_GRAPHITE)"):
            found += look_at_graphite(graphite, list(services))
    if graphite_conf is not None:
        with about("--graphite-conf"):
            found += examine_files(graphite_conf)
    return _tell(found, looked, as_json)


def _named(*values: str | None) -> Iterator[tuple[str, str | None]]:
    yield from zip(("broker", "store", "statsd", "graphite", "graphite's files"), values, strict=True)


def _store(url: str) -> Looked:
    parts = split(url)
    open_store(url)  # which says what is wrong with the URL, and connects to nothing
    match parts.scheme:
        case "sqlite":
            from idemp.stores.sqlite_doctor import examine as of_sqlite

            return of_sqlite(sqlite_path(parts))
        case "etcd":
            from idemp.stores.etcd_doctor import examine as of_etcd

            endpoints, connect, namespace = etcd_of(url)
            return of_etcd(endpoints, connect, namespace, CLOCK)
        case "postgresql" | "postgres":
            from idemp.stores.postgresql_doctor import examine as of_postgresql

            return of_postgresql(postgresql_of(url), CLOCK)
        case "redis" | "rediss":
            from idemp.stores.redis_doctor import examine as of_redis

            return of_redis(redis_of(url), CLOCK)
    raise ConfigError(f"nothing is known here of how a {hidden(url)} should be")


def _broker(
    url: str, management: str | None, services: tuple[str, ...], retention: float | None
) -> list[Finding]:
    parts = split(url)
    if parts.scheme == "sqlite":
        from idemp.stores.sqlite_doctor import examine as of_sqlite
        from idemp.transports.sqlite_doctor import examine as of_queues

        open_transport(url)
        path = sqlite_path(parts)
        return [*of_sqlite(path).findings, *of_queues(path, services, retention, CLOCK)]
    if parts.scheme in ("redis", "rediss"):
        return _redis_streams(url, services, retention)
    if parts.scheme not in ("amqp", "amqps"):
        raise ConfigError(f"nothing is known here of how a {hidden(url)} should be")
    if not services:
        raise ConfigError("say whose queues to look at: --service orders (SERVICE_NAME)")
    from idemp.transports.rabbitmq import RabbitMQTransport
    from idemp.transports.rabbitmq_doctor import examine as of_rabbitmq

    with closing(RabbitMQTransport(url)) as transport:
        transport.connect()
        return of_rabbitmq(transport, url, management, services, retention, CLOCK)


def _redis_streams(url: str, services: tuple[str, ...], retention: float | None) -> list[Finding]:
    if not services:
        raise ConfigError("say whose queues to look at: --service orders (SERVICE_NAME)")
    transport = open_transport(url)
    from idemp.transports.redis_doctor import examine as of_redis
    from idemp.transports.redis_streams import RedisStreamsTransport

    assert isinstance(transport, RedisStreamsTransport)
    with closing(transport):
        transport.connect()
        return of_redis(transport, services, retention, CLOCK)


def horizon(retention: float, *, amqp: bool) -> list[Finding]:
    """Whether a message may come again after its id was forgotten."""
    longest = ATTEMPTS * MAX_DELAY + (TIMEOUT_OF_ACKS if amqp else 0.0)
    if retention >= longest:
        return []
    held = f", and a broker that holds one back for {TIMEOUT_OF_ACKS:.0f} s" if amqp else ""
    evidence = (
        f"ids are kept for {retention:.0f} s; {ATTEMPTS} attempts with up to {MAX_DELAY:.0f} s before each"
        f"{held} make {longest:.0f} s"
    )
    what = "a message may come again after its id was forgotten: it is then parked, not run"
    fix = (
        "name a longer one at any process: ?retention=24h in IDEMP_STORE; the longest is in force. "
        "What was parked shows in idemp dead list QUEUE (the message) and idemp doubt (its key)"
    )
    return [Finding("store", what, evidence, fix)]


def _tell(found: list[Finding], looked: list[str], as_json: bool) -> int:
    faults = sum(each.fault for each in found)
    if as_json:
        record: dict[str, Any] = {"looked_at": looked, "faults": faults}
        click.echo(json.dumps({**record, "findings": [each._asdict() for each in found]}))
        return 1 if faults else 0
    for each in sorted(found, key=lambda each: not each.fault):
        mark = "fault" if each.fault else "note"
        click.echo(f"{mark:<6} {escaped(each.where)}: {escaped(each.what)}")
        click.echo(f"       seen: {escaped(each.evidence)}")
        click.echo(f"       fix:  {escaped(each.fix)}")
    notes = len(found) - faults
    click.echo(f"{faults} faults, {notes} notes; looked at {', '.join(looked)}")
    return 1 if faults else 0
