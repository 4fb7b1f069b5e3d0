"""What PostgreSQL refuses, in a sentence that names the setting and the fix."""

from __future__ import annotations

import psycopg
from psycopg import errors

from idemp.errors import ConfigError, StoreUnavailable
from idemp.stores import postgresql_line
from idemp.stores.postgresql_line import Place, connect, forbidden, one_line

_READ_ONLY, _CANCELLED, _DISK_FULL = "25006", "57014", "53100"
_FIXES = {
    _READ_ONLY: "it takes no writes: set its default_transaction_read_only to off, or name the primary",
    _CANCELLED: "raise the statement_timeout of this user or database, as with"
    " ALTER ROLE THIS_USER SET statement_timeout = '30s'",
    _DISK_FULL: "make room on its disk",
}


def explain(place: Place, error: psycopg.Error) -> Exception:
    """What the caller is told of an error that repeating does not mend, or has not mended in time."""
    if isinstance(error, errors.InsufficientPrivilege):
        return forbidden(place, error)
    if isinstance(error, errors.UndefinedTable | errors.InvalidSchemaName):
        return ConfigError(f"{place.shown}: {said(error)}; run: {place.tables.init}")
    if fix := _fix(error):
        return StoreUnavailable(f"{place.shown}: {said(error)}; {fix}")
    return StoreUnavailable(f"{place.shown}: {one_line(error)}")


def said(error: psycopg.Error) -> str:
    """What the server said, without the line of its statement."""
    return error.diag.message_primary or one_line(error)


def _fix(error: psycopg.Error) -> str | None:
    if error.sqlstate == _CANCELLED and "statement timeout" not in said(error):
        return None  # somebody cancelled it by hand
    return _FIXES.get(error.sqlstate or "")


def outside(error: psycopg.Error, *, begun: bool) -> bool:
    """Whether ``error`` says what the server lacks, not what is wrong with a statement.

    begun: whether a handler may have run in the transaction, and set bounds for it.
    """
    state = error.sqlstate or ""
    return state[:2] in ("53", "58") or (not begun and state in (_READ_ONLY, _CANCELLED))


# ------------------------------------------------------------------ before the first use


def init(place: Place, grant: str = "") -> list[int]:
    """Make or renew the tables; the versions that were new.  ``grant``: the role that may use them."""
    try:
        with connect(place) as connection:
            # What others make meanwhile must be seen, whatever the default is.
            connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            with connection.transaction():
                new = postgresql_line.migrate(connection, place, grant)
                _check_sound(connection, place)
                return new
    except (errors.DuplicateTable, errors.DuplicateObject) as error:
        raise ConfigError(_damaged(place, said(error))) from None
    except psycopg.Error as error:
        if _fix(error):
            raise ConfigError(str(explain(place, error))) from None
        raise ConfigError(
            f"{place.shown}: {one_line(error)}; use a user who may create a schema and grant rights on it"
        ) from None


def exists(place: Place) -> bool:
    """Whether the namespace has its tables.  Makes nothing."""
    try:
        return postgresql_line.exists(place)
    except psycopg.Error as error:
        raise explain(place, error) from None


_TABLES = ("meta", "token", "session", "open", "done_0", "done_1", "done_2", "outbox")


def _check_sound(connection: postgresql_line.Connection, place: Place) -> None:
    """Raise `ConfigError` for tables that this version of idemp cannot work with."""

    def ask(text: str, *values: object) -> list[tuple[object, ...]]:
        return connection.execute(text.encode(), values or None, prepare=False).fetchall()

    newest = len(place.tables.migrations)
    for (version,) in ask(f"SELECT version FROM {place.schema}.migration WHERE version > {newest}"):
        raise ConfigError(f"{place.shown} has tables of a newer idemp (version {version}); upgrade idemp")
    if place.tables.prefix != postgresql_line.STORE.prefix:
        return
    names = [f"{place.schema}.{name}" for name in _TABLES]
    for (name,) in ask("SELECT n FROM unnest(%s::text[]) AS t(n) WHERE to_regclass(n) IS NULL", names):
        raise ConfigError(_damaged(place, f"there is no {name}"))
    if not ask(f"SELECT 1 FROM {place.schema}.meta"):
        raise ConfigError(_damaged(place, "the table meta is empty"))


def _damaged(place: Place, what: str) -> str:
    return (
        f"{place.shown}: {what}, so somebody has changed the tables; restore the schema, or, to begin anew"
        f" with nothing remembered, DROP SCHEMA {place.schema} CASCADE and run this again"
    )
