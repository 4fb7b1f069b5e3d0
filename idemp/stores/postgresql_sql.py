"""What the PostgreSQL store says to its server: the tables, how they came about, and each statement.

Every namespace has a schema of its own, ``idemp_<namespace>``.  Keys are their UTF-8 bytes, which may
hold anything and sort as Python sorts.  Times are seconds since 1970, by the server's clock.
"""

from __future__ import annotations

from typing import Any, NamedTuple

SLICES = range(3)
"""Of the done keys, by time: see `idemp.stores.postgresql`."""

MIGRATIONS = (
    (
        "CREATE TABLE {s}.meta (retention float8 NOT NULL, slice int NOT NULL, began float8 NOT NULL,"
        " ended float8 NOT NULL)",
        "INSERT INTO {s}.meta VALUES (0, 0, extract(epoch FROM clock_timestamp()), 0)",
        "CREATE SEQUENCE {s}.token AS bigint",
        "CREATE TABLE {s}.session (id text PRIMARY KEY, expires timestamptz NOT NULL, batch bigint NOT NULL)"
        " WITH (fillfactor = 50)",
        # Rows come and go with every claim: vacuum by their number, not by a share of the table.
        "CREATE TABLE {s}.open (key bytea PRIMARY KEY, state text NOT NULL, token bigint, attempt int,"
        " session text, at float8, reason bytea, awaited bool NOT NULL DEFAULT false)"
        " WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000)",
        *(
            f"CREATE TABLE {{s}}.done_{n} (key bytea PRIMARY KEY, token bigint NOT NULL,"
            " attempt int NOT NULL, at float8 NOT NULL, result bytea, fingerprint bytea)"
            for n in SLICES
        ),
    ),
    (
        "CREATE TABLE {s}.outbox (number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, key bytea NOT NULL,"
        " at float8 NOT NULL, letter bytea NOT NULL)",
    ),
)
"""Version by version, from 1.  A version that was once published is never changed."""
VERSION = len(MIGRATIONS)

GRANTS = (
    "GRANT USAGE ON SCHEMA {s} TO {role}",
    "GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA {s} TO {role}",
    "GRANT USAGE, SELECT, UPDATE ON ALL SEQUENCES IN SCHEMA {s} TO {role}",
)

# The plans are known: by key, through the index, whatever the tables' sizes were when a plan was made.
# A ban counts as a huge cost, for which PostgreSQL would compile the plan each time.
_PLANS = ("enable_seqscan", "enable_hashjoin", "enable_mergejoin", "jit")


def settings(patience: float) -> str:
    """For one transaction: how to look keys up, and how long it waits for others and holds them up."""
    bounds = {"lock_timeout": patience, "idle_in_transaction_session_timeout": patience}
    calls = [f"set_config('{name}', 'off', true)" for name in _PLANS]
    calls += [f"set_config('{name}', '{int(seconds * 1000)}', true)" for name, seconds in bounds.items()]
    return f"SELECT {', '.join(calls)}"


_MINE = (*_PLANS, "lock_timeout")
GIVEN = "SELECT " + ", ".join(f"current_setting('{name}')" for name in _MINE)
"""What handlers find, which takes turns with the store's own in one transaction."""
TAKE_TURNS = "SELECT " + ", ".join(f"set_config('{name}', %s, true)" for name in _MINE)


def own(wait: float) -> list[str]:
    """The store's own of `TAKE_TURNS`.  ``wait``: seconds for others' keys."""
    return [*("off" for _ in _PLANS), str(max(1, int(wait * 1000)))]  # 0 would be no bound


CLOCK = "SELECT extract(epoch FROM clock_timestamp())::float8"
"""The server's, in seconds since 1970."""

_OVER = "(SELECT extract(epoch FROM now())::float8 - retention FROM {s}.meta)"
_NEWEST = (
    "(SELECT * FROM ("
    + " UNION ALL ".join(f"SELECT * FROM {{s}}.done_{n} d WHERE d.key = k.key" for n in SLICES)
    + f") every WHERE every.at > {_OVER} ORDER BY every.token DESC LIMIT 1)"
)
_DONE = "'done', d.token, d.attempt, '', d.at, NULL::bytea, d.result, d.fingerprint, false, false"
_ALIVE = "coalesce(s.expires > clock_timestamp(), false)"
_OPEN = (
    f"o.state, o.token, o.attempt, o.session, o.at, o.reason, NULL::bytea, NULL::bytea, o.awaited, {_ALIVE}"
)


class Statements(NamedTuple):
    """Of one namespace; each is made for a batch, whatever its size.

    lock: holds the row of every key in ``open``, and makes an empty one where there is none, in the keys'
    order, so that of two transactions one waits for the other; answers the keys that are done and
    need no hold, which those that are ``firm`` do.  holders: holds the sessions that may be declared dead,
    and mine.  head: what the batch needs to know.  load: the keys' rows.

    claim, known, finish: the short way of `idemp.stores.postgresql_batch.Quick`.  vanish: tells it that a
    key has left nothing behind, for it looks at who wrote ``meta`` last.

    turn: if it is time for another slice, and no other process is at it: the present one, the time, whether
    it is late already, and whether nobody uses the table that comes next.  clear: empties that.  wipe:
    deletes what is over from some of its pages; answers how many it has.
    """

    claim: str
    known: str
    finish: tuple[str, ...]
    lock: str
    holders: str
    head: str
    load: str
    save_open: str
    drop_open: str
    save_done: tuple[str, ...]
    drop_done: tuple[str, ...]
    vanish: str
    confirm: str
    beat: str
    born: str
    died: str
    retention: str
    ahead: str
    await_key: str
    scan: str
    size: str
    sweep: tuple[str, ...]
    turn: str
    turned: str
    clear: tuple[tuple[str, str], ...]
    wipe: tuple[str, ...]
    listen: str
    tell: str
    tell_forgotten: str
    put: str
    letters: str
    sent: str
    backlog: str


_NOW = "extract(epoch FROM statement_timestamp())::float8"
_VANISH = "UPDATE {s}.meta SET retention = retention"
_DO_UPDATE = (
    " ON CONFLICT (key) DO UPDATE SET token = excluded.token, attempt = excluded.attempt,"
    " at = excluded.at, result = excluded.result, fingerprint = excluded.fingerprint"
)

_TEMPLATE = Statements(
    claim="WITH n AS MATERIALIZED (SELECT nextval('{s}.token') * %(step)s::bigint AS first),"
    " made AS (INSERT INTO {s}.open (key, state, token, attempt, session, at)"
    f" SELECT k.key, 'claimed', n.first + k.place, 1, %(me)s, {_NOW}"
    " FROM unnest(%(keys)b::bytea[]) WITH ORDINALITY AS k(key, place), n ORDER BY k.key"
    " ON CONFLICT (key) DO NOTHING RETURNING 1)"
    " SELECT n.first, (SELECT count(*) FROM made) FROM n",
    known="SELECT EXISTS (SELECT FROM unnest(%(keys)b::bytea[]) AS k(key) CROSS JOIN LATERAL ("
    + " UNION ALL ".join(f"SELECT FROM {{s}}.done_{n} d WHERE d.key = k.key" for n in SLICES)
    + ") every)",
    finish=tuple(
        "WITH held AS MATERIALIZED (SELECT k.*, o.attempt, o.awaited"
        " FROM unnest(%(keys)b::bytea[], %(tokens)b::bigint[], %(results)b::bytea[], %(prints)b::bytea[])"
        " AS k(key, token, result, fingerprint) JOIN {s}.open o ON o.key = k.key"
        " WHERE o.token = k.token AND o.state = 'claimed' ORDER BY o.key FOR UPDATE OF o SKIP LOCKED),"
        " gone AS (DELETE FROM {s}.open o USING held WHERE o.key = held.key),"
        f" ended AS (INSERT INTO {{s}}.done_{n} SELECT key, token, attempt, {_NOW}, result, fingerprint"
        f" FROM held{_DO_UPDATE})"
        f" SELECT count(*), coalesce(bool_or(awaited), false), coalesce(max(attempt), 1), {_NOW} FROM held"
        for n in SLICES
    ),
    lock="WITH k AS (SELECT * FROM unnest(%(keys)b::bytea[], %(firm)b::bool[]) AS k(key, firm)),"
    f" seen AS MATERIALIZED (SELECT d.key, {_DONE} FROM k CROSS JOIN LATERAL {_NEWEST} d WHERE NOT k.firm"
    " AND NOT EXISTS (SELECT FROM {s}.open o WHERE o.key = k.key)),"
    " locked AS (INSERT INTO {s}.open AS o (key, state) SELECT k.key, '' FROM k"
    " WHERE NOT EXISTS (SELECT FROM seen WHERE seen.key = k.key) ORDER BY k.key"
    " ON CONFLICT (key) DO UPDATE SET state = o.state WHERE false) SELECT * FROM seen",
    holders="SELECT id FROM {s}.session WHERE id = %(me)s OR id IN (SELECT o.session FROM {s}.open o"
    " WHERE o.key = ANY(%(taken)b::bytea[])) ORDER BY id FOR UPDATE",
    head="SELECT nextval('{s}.token'), m.retention, m.slice, extract(epoch FROM clock_timestamp())::float8,"
    " s.batch, s.expires > clock_timestamp(), m.xmin::text FROM {s}.meta m"
    " LEFT JOIN {s}.session s ON s.id = %(me)s",
    load="SELECT k.key, "
    + _OPEN
    + " FROM unnest(%(keys)b::bytea[]) AS k(key)"
    + " JOIN {s}.open o ON o.key = k.key LEFT JOIN {s}.session s ON s.id = o.session"
    + f" WHERE o.state <> 'free' OR o.at > {_OVER}"
    + f" UNION ALL SELECT k.key, {_DONE} FROM unnest(%(keys)b::bytea[]) AS k(key)"
    + f" CROSS JOIN LATERAL {_NEWEST} d",
    save_open="UPDATE {s}.open o SET state = u.state, token = u.token, attempt = u.attempt,"
    " session = u.session, at = u.at, reason = u.reason, awaited = false"
    " FROM unnest(%b::bytea[], %b::text[], %b::bigint[], %b::int[], %b::text[], %b::float8[], %b::bytea[])"
    " AS u(key, state, token, attempt, session, at, reason) WHERE o.key = u.key",
    drop_open="DELETE FROM {s}.open WHERE key = ANY(%b::bytea[])",
    save_done=tuple(
        f"INSERT INTO {{s}}.done_{n} SELECT * FROM unnest("
        f"%b::bytea[], %b::bigint[], %b::int[], %b::float8[], %b::bytea[], %b::bytea[]){_DO_UPDATE}"
        for n in SLICES
    ),
    drop_done=tuple(f"DELETE FROM {{s}}.done_{n} WHERE key = ANY(%b::bytea[])" for n in SLICES),
    vanish=_VANISH,
    confirm="UPDATE {s}.session SET expires = clock_timestamp() + %s * interval '1 second', batch = %s"
    " WHERE id = %s",
    beat="UPDATE {s}.session SET expires = clock_timestamp() + %s * interval '1 second'"
    " WHERE id = %s AND batch >= %s AND expires > clock_timestamp()",
    born="INSERT INTO {s}.session VALUES (%s, clock_timestamp() + %s * interval '1 second', 0)"
    " RETURNING nextval('{s}.token')",
    died="DELETE FROM {s}.session WHERE id = %s",
    retention="UPDATE {s}.meta SET retention = greatest(retention, %s)"
    " RETURNING retention, slice, xmin::text",
    ahead="SELECT setval('{s}.token', %s)",
    await_key="UPDATE {s}.open SET awaited = true WHERE key = %b AND token = %s AND NOT awaited",
    scan=f"SELECT * FROM (SELECT o.key, {_OPEN} FROM {{s}}.open o"
    " LEFT JOIN {s}.session s ON s.id = o.session WHERE o.key > %(after)b AND o.key >= %(prefix)b"
    f" AND o.key < %(end)b AND o.state <> '' AND (o.state <> 'free' OR o.at > {_OVER})"
    " ORDER BY o.key LIMIT %(limit)s) opened"
    + "".join(
        f" UNION ALL SELECT * FROM (SELECT d.key, {_DONE} FROM {{s}}.done_{n} d WHERE d.key > %(after)b"
        f" AND d.key >= %(prefix)b AND d.key < %(end)b AND d.at > {_OVER}"
        " ORDER BY d.key LIMIT %(limit)s) done"
        for n in SLICES
    ),
    # By the statistics, which a vacuum or an analyze has left; -1 where there was none yet.
    size="SELECT coalesce(sum(greatest(reltuples, 0)), 0)::bigint FROM pg_class WHERE oid = ANY(ARRAY["
    + ", ".join(f"'{{s}}.{table}'::regclass" for table in ("open", *(f"done_{n}" for n in SLICES)))
    + "]::oid[])",
    sweep=(
        "WITH gone AS (DELETE FROM {s}.open WHERE key IN (SELECT o.key FROM {s}.open o"
        f" WHERE o.state = 'free' AND o.at <= {_OVER} FOR UPDATE SKIP LOCKED) RETURNING 1)"
        f" {_VANISH} WHERE EXISTS (SELECT FROM gone)",
        # Long dead: the row says which batch was its last, to a process that comes back.
        "DELETE FROM {s}.session WHERE id IN (SELECT id FROM {s}.session"
        " WHERE expires < clock_timestamp() - interval '1 hour' FOR UPDATE SKIP LOCKED)",
    ),
    # The slice that comes next was closed when the one before the present began.
    turn="SELECT slice, t.now, t.now - began >= retention * 0.625, NOT EXISTS (SELECT FROM pg_locks l"
    " WHERE l.relation = ('{s}.done_' || mod(slice + 1, 3))::regclass"
    " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
    " FROM {s}.meta, (SELECT extract(epoch FROM clock_timestamp())::float8) AS t(now)"
    " WHERE t.now - began >= retention / 2 AND t.now - ended >= retention + %s"
    " FOR UPDATE OF meta SKIP LOCKED",
    turned="UPDATE {s}.meta SET slice = %s, ended = began, began = %s",
    clear=tuple(
        (f"LOCK TABLE {{s}}.done_{n} IN ACCESS EXCLUSIVE MODE NOWAIT", f"TRUNCATE {{s}}.done_{n}")
        for n in SLICES
    ),
    # By pages, so that one step never walks over what the steps before have left to the vacuum.
    wipe=tuple(
        f"WITH wiped AS (DELETE FROM {{s}}.done_{n} WHERE ctid = ANY(ARRAY(SELECT ctid FROM {{s}}.done_{n}"
        f" WHERE ctid >= %(first)s::tid AND ctid < %(end)s::tid AND at <= {_OVER} FOR UPDATE SKIP LOCKED)))"
        f" SELECT pg_relation_size('{{s}}.done_{n}') / current_setting('block_size')::int"
        for n in SLICES
    ),
    listen="LISTEN {s}",
    tell="NOTIFY {s}",
    tell_forgotten="NOTIFY {s}, 'forgotten'",
    put="INSERT INTO {s}.outbox (key, at, letter)"
    " SELECT u.key, extract(epoch FROM clock_timestamp())::float8, u.letter"
    " FROM unnest(%b::bytea[], %b::bytea[]) WITH ORDINALITY AS u(key, letter, place) ORDER BY u.place",
    letters="SELECT number, key, at, letter FROM {s}.outbox WHERE number > %s ORDER BY number LIMIT %s",
    sent="DELETE FROM {s}.outbox WHERE number = ANY(%b::bigint[])",
    backlog="SELECT count(*), coalesce(extract(epoch FROM clock_timestamp())::float8 - min(at), 0)"
    " FROM {s}.outbox",
)


def statements(schema: str) -> Statements:
    """The statements of the namespace whose quoted schema this is."""

    def named(text: Any) -> Any:
        return text.replace("{s}", schema) if isinstance(text, str) else tuple(map(named, text))

    return Statements(*map(named, _TEMPLATE))
