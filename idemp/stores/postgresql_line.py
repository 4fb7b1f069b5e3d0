"""Connections to PostgreSQL: checked when they are made, made anew when they broke, cut when they hang."""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import SplitResult, unquote

import psycopg
from psycopg import errors, sql
from psycopg.conninfo import make_conninfo

from idemp.errors import ConfigError, StoreUnavailable
from idemp.ports import Clock
from idemp.settings import switch
from idemp.stores.postgresql_sql import GRANTS, MIGRATIONS
from idemp.tls import for_libpq, tls_fix

log = logging.getLogger(__name__)

CONNECT = 5
"""Seconds for one attempt to connect."""
_WATCH = 0.5

Connection = psycopg.Connection[tuple[Any, ...]]

_ABOUT = (
    "SELECT current_setting('synchronous_commit'), current_setting('fsync'),"
    " current_setting('full_page_writes'), pg_is_in_recovery(), pg_backend_pid(), to_regclass(%s) IS NOT NULL"
)
_REFUSED = re.compile(
    r"password|authentication|role \".*\" does not exist|database \".*\" does not exist|pg_hba"
    r"|permission denied for database|certificate|does not support SSL|server does not support"
)


class IsReplica(ConfigError):
    """It takes no writes."""


class Tables(NamedTuple):
    """Of one kind.

    prefix: of the schemas' names.  migrations: version by version, statements with ``{s}`` for the schema.
    init: the command that makes them.
    """

    prefix: str
    migrations: Sequence[Sequence[str]]
    init: str


STORE = Tables("idemp_", MIGRATIONS, "idemp init URL")


class Place(NamedTuple):
    """A namespace in a database.

    shown: its URL without login and options.  unsafe: whether the server may forget what it confirmed.
    """

    conninfo: Mapping[str, Any]
    shown: str
    namespace: str
    unsafe: bool = False
    tables: Tables = STORE

    @property
    def schema(self) -> str:
        """Of the namespace's tables, quoted."""
        return sql.Identifier(f"{self.tables.prefix}{self.namespace}").as_string(None)


def place(
    parts: SplitResult, found: Mapping[str, str], namespace: str, tables: Tables | None = None
) -> Place:
    """What a URL's parts and options name.  Several hosts are written ``host1:5432,host2:5432``."""
    login, _, hosts = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    names = [re.fullmatch(r"(.*?)(?::(\d+))?", host) for host in hosts.split(",")]
    conninfo: dict[str, Any] = {
        "host": ",".join(name[1].strip("[]") for name in names if name),
        "port": ",".join(name[2] or "5432" for name in names if name),
        "user": unquote(user),
        "password": unquote(password),
        "dbname": unquote(parts.path.strip("/")),
    }
    conninfo |= for_libpq(found)
    if len(names) > 1:
        conninfo["target_session_attrs"] = "read-write"
    shown = f"postgresql://{hosts}{parts.path}"
    unsafe = switch(found.get("unsafe_durability", ""))
    given = {name: value for name, value in conninfo.items() if value}
    return Place(given, shown, namespace, unsafe, tables or STORE)


class Line:
    """One connection, used by one thread at a time.  Made at its first use, and again after `drop`."""

    def __init__(
        self, place: Place, clock: Clock, kind: type[psycopg.Connection[Any]] = psycopg.Connection
    ) -> None:
        self.pooled = False
        self.given: list[str] = []  # settings, as they are without ours; filled in by who changes them
        self._place, self._clock, self._kind = place, clock, kind
        self._connection: Connection | None = None
        self._plug: socket.socket | None = None
        self._until: float | None = None

    @contextmanager
    def use(self, seconds: float) -> Iterator[Connection]:
        """The connection, which is cut if this lasts longer; after an error it is dropped."""
        self._until = self._clock.steady() + seconds
        try:
            yield self._connection or self._connect()
        except BaseException:
            self.drop()
            raise
        finally:
            self._until = None

    def _connect(self) -> Connection:
        try:
            return self._connected()
        except OSError as error:  # without descriptors psycopg raises it as it is
            raise StoreUnavailable(f"{self._place.shown}: {error}") from None

    def _connected(self) -> Connection:
        connection = connect(self._place, self._kind)
        try:
            # Before the first question: a pooler without a free connection lets it wait for minutes.
            self._plug = socket.socket(fileno=socket.dup(connection.fileno()))
            self.pooled = check(connection, self._place)
            if self.pooled:
                # The next transaction may meet another server process, which knows no statement of mine.
                connection.prepare_threshold = None
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def limit(self, seconds: float) -> None:
        """From now on, the connection in use is cut if what is done with it lasts longer than this."""
        self._until = self._clock.steady() + seconds

    def cut_if_late(self) -> None:
        """From the watching thread: a server that stands still never answers, and never hangs up either."""
        until, plug = self._until, self._plug
        if until is not None and plug is not None and self._clock.steady() > until:
            with suppress(OSError):
                plug.shutdown(socket.SHUT_RDWR)

    def drop(self) -> None:
        """Let the connection go."""
        connection, plug = self._connection, self._plug
        self._connection = self._plug = None
        self.given = []
        if connection is not None:
            connection.close()
        if plug is not None:
            plug.close()


def watch(lines: list[Line], ended: threading.Event) -> None:
    """Cut what is late, until the end."""
    while not ended.wait(_WATCH):
        for line in lines:
            line.cut_if_late()


# ------------------------------------------------------------------ connecting


def connect(place: Place, kind: type[psycopg.Connection[Any]] = psycopg.Connection) -> Connection:
    """A connection in autocommit, unchecked.  Raises `ConfigError` if the server refuses this user."""
    defaults = {
        "connect_timeout": CONNECT,
        "application_name": "idemp",
        "keepalives_idle": 10,
        "keepalives_interval": 3,
        "keepalives_count": 3,
    }
    try:
        return kind.connect(make_conninfo(**{**defaults, **place.conninfo}), autocommit=True)
    except (psycopg.OperationalError, psycopg.ProgrammingError) as error:
        said = one_line(error)
        fix = tls_fix(said, over="sslmode" in place.conninfo)
        if _REFUSED.search(said) or isinstance(error, psycopg.ProgrammingError):
            advice = fix or "; check the user, the password and the database in the URL"
            raise ConfigError(f"{place.shown} refuses: {said}{advice}") from None
        raise StoreUnavailable(f"{place.shown}: {said}{fix}") from None


def check(connection: Connection, place: Place) -> bool:
    """Whether the server can keep the promise, and has the tables; true if a pooler is in between."""
    found = connection.execute(_ABOUT, [f"{place.schema}.migration"], prepare=False).fetchone()
    assert found is not None
    synchronous, fsync, full_pages, replica, process, there = found
    if replica:
        raise IsReplica(f"{place.shown} is a read-only replica; name the primary")
    if not place.unsafe:
        _check_durable(place, synchronous, fsync, full_pages)
    version = _version(connection, place) if there else 0
    if version == 0:
        _create(connection, place)
    elif version < len(place.tables.migrations):
        raise ConfigError(f"{place.shown} has tables of an older idemp; run: {place.tables.init}")
    elif version > len(place.tables.migrations):
        raise ConfigError(f"{place.shown} has tables of a newer idemp (version {version}); upgrade idemp")
    return bool(process != connection.info.backend_pid)


def _check_durable(place: Place, synchronous: str, fsync: str, full_pages: str) -> None:
    """What is told as done must be on the disk: the server's crash would undo it otherwise."""
    wrong = {"synchronous_commit": synchronous, "fsync": fsync, "full_page_writes": full_pages}
    for setting, value in wrong.items():
        if value == "off":
            raise ConfigError(
                f"{place.shown} has {setting} = off, with which a crash of the server undoes what was told;"
                " set it to on, or say unsafe_durability=true in the URL if that may happen"
            )


def _version(connection: Connection, place: Place) -> int:
    try:
        query = f"SELECT coalesce(max(version), 0) FROM {place.schema}.migration"
        row = connection.execute(query.encode(), prepare=False).fetchone()
    except errors.InsufficientPrivilege as error:
        raise forbidden(place, error) from None
    assert row is not None
    return int(row[0])


def exists(place: Place) -> bool:
    """Whether the namespace has its tables.  Makes nothing."""
    with connect(place) as connection:
        query = "SELECT to_regclass(%s) IS NOT NULL"
        row = connection.execute(query, [f"{place.schema}.migration"], prepare=False).fetchone()
    return row == (True,)


# ------------------------------------------------------------------ the tables


def _create(connection: Connection, place: Place) -> None:
    """The tables of a namespace that is used for the first time."""
    try:
        migrate(connection, place)
    except errors.InsufficientPrivilege:
        raise ConfigError(
            f"{place.shown} has no tables for namespace {place.namespace!r}, and this user may not make them;"
            f" run: {place.tables.init} --grant THIS_USER, with the URL of a user who may create a schema"
        ) from None


def migrate(connection: Connection, place: Place, grant: str = "") -> list[int]:
    """Make or renew the tables, in one transaction; the versions that were new.  ``grant``: to this role."""
    schema = place.schema

    def run(text: str, *values: Any) -> psycopg.Cursor[tuple[Any, ...]]:
        return connection.execute(text.encode(), values or None, prepare=False)

    with connection.transaction():
        run("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", schema)
        if run("SELECT to_regclass(%s)", f"{schema}.migration").fetchone() == (None,):
            run(f"CREATE SCHEMA IF NOT EXISTS {schema}")
            # It may have come about while we waited, which this process need not have noticed yet.
            columns = "(version int PRIMARY KEY, at timestamptz NOT NULL)"
            run(f"CREATE TABLE IF NOT EXISTS {schema}.migration {columns}")
        before = _version(connection, place)
        new = list(range(before + 1, len(place.tables.migrations) + 1))
        for version in new:
            for statement in place.tables.migrations[version - 1]:
                run(statement.replace("{s}", schema))
            run(f"INSERT INTO {schema}.migration VALUES (%s, now())", version)
        for statement in GRANTS if grant else ():
            run(statement.format(s=schema, role=sql.Identifier(grant).as_string(None)))
    if new:
        log.info("%s: made the tables of %s, version %d", place.shown, schema, new[-1])
    return new


# ------------------------------------------------------------------ errors


def forbidden(place: Place, error: psycopg.Error) -> ConfigError:
    """For a user who may not use the tables."""
    return ConfigError(
        f"{place.shown}: {one_line(error)}; run: {place.tables.init} --grant THIS_USER, as the tables' owner"
    )


def one_line(error: BaseException) -> str:
    """An error of the driver in one line."""
    return " ".join(str(error).split())[:400]
