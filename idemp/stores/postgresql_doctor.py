"""What `idemp doctor` asks a PostgreSQL and a namespace in it.  It writes nothing and opens no session."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import psycopg

from idemp.findings import Finding, Looked
from idemp.ports import Clock
from idemp.stores.postgresql_errors import explain
from idemp.stores.postgresql_line import Connection, Place, connect
from idemp.stores.postgresql_sql import VERSION

SKEW = 5.0
"""Seconds between two clocks that are worth a word."""
LONG = 300.0
"""Seconds after which a transaction of anybody's is worth a word: it keeps dead rows in every table."""
SHORT = 10.0
"""Seconds for a statement, below which it is worth a word: a batch waits for up to five."""
OLD = 1_200_000_000
"""Transactions since the oldest that is not frozen; at two thousand million PostgreSQL stops."""
NEARLY_FULL = 0.8
"""Of its connections; a process of ours takes up to four."""
DEAD = 200_000
"""Rows of ``open`` that are gone and not cleaned up: ten times what autovacuum is told to leave."""


def examine(place: Place, clock: Clock) -> Looked:
    """Look at the server, then at the namespace.  Raises `ConfigError`, `StoreUnavailable`."""
    try:
        with closing(connect(place)) as connection:
            found = [
                *_settings(place, connection),
                *_load(place, connection),
                *_clock(place, connection, clock),
            ]
            return _namespace(place, connection, found)
    except psycopg.Error as error:
        raise explain(place, error) from None


def _ask(connection: Connection, text: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    return connection.execute(text.encode(), values, prepare=False).fetchall()


def _settings(place: Place, connection: Connection) -> list[Finding]:
    """Whether what it confirms is on its disk by then, and what becomes of its copies."""
    found = []
    for name in ("synchronous_commit", "fsync", "full_page_writes"):
        [(value,)] = _ask(connection, "SELECT current_setting(%s)", [name])
        if value == "off":
            what = "a crash of the server undoes what it confirmed"
            fix = f"ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf()"
            found.append(Finding(place.shown, what, f"{name} = off", fix))
    [(autovacuum,)] = _ask(connection, "SELECT current_setting('autovacuum')")
    if autovacuum == "off":
        fix = "ALTER SYSTEM SET autovacuum = on; SELECT pg_reload_conf()"
        found.append(Finding(place.shown, "nothing cleans its tables up", "autovacuum = off", fix))
    [(read_only,)] = _ask(connection, "SELECT current_setting('default_transaction_read_only')")
    if read_only == "on":
        fix = "ALTER DATABASE or ALTER ROLE ... SET default_transaction_read_only = off, where it was set"
        what = "it takes no writes, hence no claim"
        found.append(Finding(place.shown, what, "default_transaction_read_only = on", fix))
    [(bound, seconds)] = _ask(
        connection,
        "SELECT b, extract(epoch FROM b::interval)::float8 FROM current_setting('statement_timeout') AS t(b)",
    )
    if 0 < seconds < SHORT:
        what = "a batch that waits for keys that another one holds may be cut off, and is then tried again"
        fix = "ALTER ROLE THIS_USER SET statement_timeout = '30s'"
        found.append(Finding(place.shown, what, f"statement_timeout = {bound}", fix, fault=False))
    [(replica,)] = _ask(connection, "SELECT pg_is_in_recovery()")
    if replica:
        what, fix = "it is a replica, which takes no claim", "name the primary"
        found.append(Finding(place.shown, what, "pg_is_in_recovery() = true", fix))
    [(copies, waits)] = _ask(
        connection,
        "SELECT count(*), count(*) FILTER (WHERE sync_state IN ('sync', 'quorum')) FROM pg_stat_replication",
    )
    if copies and not waits:
        what = "a failover to a replica may forget what was confirmed: it does not wait for its replicas"
        fix = "set synchronous_standby_names, if the place of the primary may be taken"
        found.append(Finding(place.shown, what, f"{copies} replicas, none synchronous", fix, fault=False))
    return found


def _load(place: Place, connection: Connection) -> list[Finding]:
    found = []
    for process, who, age in _ask(
        connection,
        "SELECT pid, coalesce(nullif(application_name, ''), 'unnamed') || ', ' || state,"
        " extract(epoch FROM now() - xact_start)::float8 FROM pg_stat_activity"
        " WHERE xact_start < now() - make_interval(secs => %s) AND backend_type = 'client backend'",
        [LONG],
    ):
        what = "a transaction stays open, so dead rows pile up in every table"
        evidence = f"process {process} ({who}) since {age:.0f} s"
        found.append(Finding(place.shown, what, evidence, f"SELECT pg_terminate_backend({process})"))
    [(used, most)] = _ask(
        connection,
        "SELECT count(*), current_setting('max_connections')::int FROM pg_stat_activity"
        " WHERE backend_type = 'client backend'",
    )
    if used > NEARLY_FULL * most:
        fix = "raise max_connections, or put a pooler in between (pgbouncer, pool_mode = transaction)"
        what = "its connections are nearly used up; a process of idemp takes up to four"
        found.append(Finding(place.shown, what, f"{used} of {most}", fix))
    [(age,)] = _ask(
        connection, "SELECT age(datfrozenxid) FROM pg_database WHERE datname = current_database()"
    )
    if age > OLD:
        fix = "end old transactions and prepared ones, then VACUUM (FREEZE) of the whole database"
        what = "it will stop for want of transaction numbers"
        found.append(Finding(place.shown, what, f"the oldest is {age} transactions old", fix))
    return found


def _clock(place: Place, connection: Connection, clock: Clock) -> list[Finding]:
    [(theirs,)] = _ask(connection, "SELECT extract(epoch FROM clock_timestamp())::float8")
    ahead = clock.wall() - theirs
    if abs(ahead) <= SKEW:
        return []
    evidence = f"this machine is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} it"
    what = "its clock and this machine's differ, and the retention goes by clocks"
    return [Finding(place.shown, what, evidence, "run chronyd or ntpd on both")]


def _namespace(place: Place, connection: Connection, found: list[Finding]) -> Looked:
    schema = place.schema
    [(there,)] = _ask(connection, "SELECT to_regclass(%s) IS NOT NULL", [f"{schema}.migration"])
    if not there:
        what = f"there is no namespace {place.namespace!r}"
        fix = "name the namespace of the service's IDEMP_STORE, or run: idemp init URL"
        return Looked([*found, Finding(place.shown, what, f"no schema {schema}", fix)])
    [(version,)] = _ask(connection, f"SELECT coalesce(max(version), 0) FROM {schema}.migration")
    if version != VERSION:
        fix = "run: idemp init URL" if version < VERSION else "upgrade idemp here"
        what = "its tables are of another version of idemp"
        found.append(Finding(place.shown, what, f"version {version}, and this idemp has {VERSION}", fix))
    [(dead,)] = _ask(
        connection,
        "SELECT coalesce(max(n_dead_tup), 0) FROM pg_stat_user_tables WHERE relid = %s::regclass",
        [f"{schema}.open"],
    )
    if dead > DEAD:
        what = "what is done is not cleaned up, so each claim reads more"
        fix = (
            f"VACUUM {schema}.open; and see what keeps autovacuum from it: old transactions, or its settings"
        )
        found.append(Finding(place.shown, what, f"{dead} dead rows in {schema}.open", fix))
    [(retention,)] = _ask(connection, f"SELECT retention FROM {schema}.meta")
    return Looked(found, float(retention) or None)


ENOUGH = 1000
"""Ids that must be remembered, for what one takes to be more than a page that is nearly empty."""


def taken(place: Place) -> tuple[float, int] | None:
    """Bytes that a done id takes, tables and indexes, and of how many that was seen; None: of too few."""
    try:
        with closing(connect(place)) as connection:
            [(size, ids)] = _ask(
                connection,
                "SELECT coalesce(sum(pg_total_relation_size(relid)), 0)::float8,"
                " coalesce(sum(n_live_tup), 0)::bigint FROM pg_stat_user_tables"
                " WHERE schemaname = %s AND relname LIKE 'done%%'",
                [f"idemp_{place.namespace}"],
            )
    except psycopg.Error as error:
        raise explain(place, error) from None
    return None if ids < ENOUGH else (size / ids, ids)
