"""What the auditor's states in SQL databases share: tables, statements, rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, TypeVar
from uuid import uuid4

from idemp.audit.tally import hashed

T = TypeVar("T")

REMEMBERED = 100_000
"""Ids of reports that are remembered, so that one that comes again is known."""
TOGETHER = 500
"""Rows in a statement."""

MIGRATIONS = (
    (
        "CREATE TABLE {s}kept (name TEXT PRIMARY KEY, text TEXT NOT NULL)",
        "CREATE TABLE {s}unsent (number {serial}, body {bytes} NOT NULL, at {real} NOT NULL)",
        "CREATE TABLE {s}counted (name TEXT PRIMARY KEY, n BIGINT NOT NULL)",
        "CREATE TABLE {s}taken (number {serial}, id TEXT NOT NULL UNIQUE)",
        "CREATE TABLE {s}audit (id TEXT NOT NULL, looked {real}, tick {real})",
    ),
)
"""Version by version, from 1.  A version that was once published is never changed."""

Rows = list[tuple[Any, ...]]
Execute = Callable[[str, Sequence[Any]], Rows]


def migrations(schema: str, **types: str) -> list[list[str]]:
    """`MIGRATIONS` for one database.  schema: before each table's name; types: what it calls them."""
    return [[text.format(s=schema, **types) for text in version] for version in MIGRATIONS]


class SqlState(ABC):
    """What the auditor knows: rows, counts, what is not told yet.  The subclass has the connection.

    One auditor uses it at a time; a second is a `ConfigError` at its first call.  Every call raises
    `StoreUnavailable` if the database does not answer; what was being saved is there whole then, or not at
    all.
    """

    @abstractmethod
    def transact(self, work: Callable[[Execute], T], *, writes: bool = True) -> T:
        """Do ``work`` in a transaction, durably.  Without ``writes`` it is a single statement."""

    @abstractmethod
    def among(self, column: str) -> str:
        """Whether ``column`` is one of the texts in the parameter."""

    @abstractmethod
    def texts(self, texts: Iterable[str]) -> Any:
        """That parameter."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it."""

    def _ask(self, statement: str, *given: Any) -> Rows:
        return self.transact(lambda execute: execute(statement, given), writes=False)

    # ---------------------------------------------------------------- rows

    def rows(self) -> list[tuple[str, str]]:
        """All that was kept: name, text."""
        return [(name, text) for name, text in self._ask("SELECT name, text FROM kept")]

    def save(
        self,
        rows: Sequence[tuple[str, str | None]],
        reports: Sequence[bytes] = (),
        *,
        at: float = 0.0,
        counts: Mapping[str, int] | None = None,
        taken: Sequence[str] = (),
        tick: float | None = None,
    ) -> None:
        """All of it durably, or nothing: rows replace those of their name, reports wait to be sent.

        A row without text is forgotten.  at: now, in seconds since 1970.  counts: added to.  taken: ids of
        what came.  tick: seconds to the next look, if this was one.
        """
        replaced = "ON CONFLICT (name) DO UPDATE SET text = excluded.text"
        added = "ON CONFLICT (name) DO UPDATE SET n = counted.n + excluded.n"

        def work(execute: Execute) -> None:
            kept = [(name, text) for name, text in rows if text is not None]
            _insert(execute, "kept (name, text)", kept, replaced)
            self._drop(execute, [name for name, text in rows if text is None])
            _insert(execute, "taken (id)", [(_known_as(id),) for id in taken], "ON CONFLICT DO NOTHING")
            _insert(execute, "unsent (body, at)", [(body, at) for body in reports])
            _insert(execute, "counted (name, n)", list((counts or {}).items()), added)
            if tick is not None:
                oldest = "(SELECT max(number) FROM taken)"
                execute(f"DELETE FROM taken WHERE number <= {oldest} - ?", [REMEMBERED])
                execute("UPDATE audit SET looked = ?, tick = ?", [at, tick])

        self.transact(work)

    def known(self, ids: Sequence[str]) -> set[str]:
        """Those of ``ids`` that were taken before."""
        if not ids:
            return set()
        names = {_known_as(id): id for id in ids}
        found = self._ask(f"SELECT id FROM taken WHERE {self.among('id')}", self.texts(names))
        return {names[name] for (name,) in found}

    def forget(self, names: Sequence[str]) -> None:
        """Rows that nobody asks for any more."""
        self.transact(lambda execute: self._drop(execute, names))

    def _drop(self, execute: Execute, names: Sequence[str]) -> None:
        if names:
            execute(f"DELETE FROM kept WHERE {self.among('name')}", [self.texts(names)])

    def counts(self) -> dict[str, int]:
        """All counters."""
        return {name: int(n) for name, n in self._ask("SELECT name, n FROM counted ORDER BY name")}

    def looked(self) -> tuple[float, float] | None:
        """When the auditor last judged, in seconds since 1970, and its tick; None if it never did."""
        found = self._ask("SELECT looked, tick FROM audit WHERE looked IS NOT NULL")
        return (found[0][0], found[0][1]) if found else None

    # ---------------------------------------------------------------- what is not told yet

    def oldest(self) -> tuple[str, bytes, float] | None:
        """Of what is not told yet: an id that stays its own, the body, and when that was."""
        found = self._ask("SELECT id, number, body, at FROM unsent, audit ORDER BY number LIMIT 1")
        return next(((f"{id}-{number}", bytes(body), at) for id, number, body, at in found), None)

    def told(self, name: str) -> None:
        """The one with this id is safe in a queue."""
        number = int(name.rpartition("-")[2])
        self.transact(lambda execute: execute("DELETE FROM unsent WHERE number = ?", [number]))

    def unsent(self) -> int:
        """How many are not told yet."""
        return int(self._ask("SELECT count(*) FROM unsent")[0][0])


def be_born(execute: Execute) -> None:
    """Give a new state its name, which is in the ids of what is told."""
    if not execute("SELECT id FROM audit", ()):
        execute("INSERT INTO audit (id) VALUES (?)", [uuid4().hex])


def _known_as(id: str) -> str:
    """Any id, however long and of whatever characters, as a text that every index takes."""
    return f"{hashed(id):032x}"


def _insert(execute: Execute, into: str, rows: Sequence[tuple[Any, ...]], rest: str = "") -> None:
    for start in range(0, len(rows), TOGETHER):
        part = rows[start : start + TOGETHER]
        execute(_insertion(into, len(part), len(part[0]), rest), list(chain.from_iterable(part)))


@lru_cache(maxsize=2000)
def _insertion(into: str, rows: int, columns: int, rest: str) -> str:
    one = f"({', '.join('?' * columns)})"
    return f"INSERT INTO {into} VALUES {', '.join([one] * rows)} {rest}"
