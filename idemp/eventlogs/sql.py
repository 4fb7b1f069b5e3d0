"""What the event logs in SQL databases share: tables, statements, rows.

One row an event, found by message, conversation, time, service, and business key; and beside them what went
from whom to whom, minute by minute, so that the flow of any number of messages is a look at a small table.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from idemp.errors import ConfigError
from idemp.ports import OUTCOMES, Batch, Clock, Edge, Event, Events, Query

COLUMNS = Event.__struct_fields__
TOGETHER = 100
"""Rows in a statement."""
PRUNE = 60.0
"""Seconds between two looks at what is too old or too much."""
PART = 20_000
"""Events that go at a time."""
_EDGE = 8
"""Columns of an edge."""
_MOST = (1 << 31) - 1
"""What a column of whole numbers holds."""
_BEHIND = 1 << 62
"""More than any place in the log."""
_DEPTH = 10_000
"""Messages that a story has at most."""

TYPES = {"at": "{real}", "sent_at": "{real}", "took": "{real}", "attempt": "INTEGER"}
"""Of the columns that are no text."""
TABLES = (
    "CREATE TABLE IF NOT EXISTS event (n {serial}, "
    + ", ".join(f"{name} {TYPES.get(name, 'TEXT')}" for name in COLUMNS)
    + ")",
    "CREATE INDEX IF NOT EXISTS event_uuid ON event (uuid)",
    "CREATE INDEX IF NOT EXISTS event_conversation ON event (conversation) WHERE conversation <> uuid",
    "CREATE INDEX IF NOT EXISTS event_parent ON event (parent) WHERE conversation = ''",
    "CREATE INDEX IF NOT EXISTS event_at ON event (at)",
    "CREATE INDEX IF NOT EXISTS event_service ON event (service, at)",
    "CREATE INDEX IF NOT EXISTS event_business ON event (business) WHERE business <> ''",
    "CREATE TABLE IF NOT EXISTS batch (writer TEXT, number INTEGER, at {real}, PRIMARY KEY (writer, number))",
    "CREATE TABLE IF NOT EXISTS edge (sender TEXT, service TEXT, type TEXT, kind TEXT, minute {real},"
    " n BIGINT, seconds {real}, longest {real}, PRIMARY KEY (sender, service, type, kind, minute))",
    "CREATE TABLE IF NOT EXISTS event_layout (version INTEGER)",
)
LAYOUT = 2
"""Of the tables.  The first counted no notes, and had no table of its number."""
EVENT = f"event ({', '.join(COLUMNS)})"
_SELECT = f"SELECT {', '.join('e.' + name for name in COLUMNS)} FROM event e".replace(
    "e.conversation", "coalesce(e.conversation, e.uuid)"
)
_EDGES = (
    "SELECT sender, service, type, kind, sum(n), sum(seconds), max(longest), min(minute), max(minute)"
    " FROM edge WHERE minute >= :since AND minute <= :until GROUP BY sender, service, type, kind"
    " HAVING sum(n) > 0 ORDER BY sender, service, type, kind"
)
_NOTES = "SELECT e.uuid, e.service, e.role, e.at, e.n FROM event e WHERE e.kind = 'note' AND "
_NOTED = "SELECT DISTINCT uuid FROM event WHERE kind = 'note' AND uuid > :after ORDER BY uuid LIMIT :part"
_UNANSWERED = (
    f"{_SELECT} WHERE e.kind = 'sent' AND e.type = :type AND e.at >= :since AND e.at <= :until AND NOT EXISTS"
    " (SELECT 1 FROM event r WHERE r.uuid = e.uuid AND r.service = :service AND r.kind <> 'sent')"
    " ORDER BY e.at LIMIT :limit"
)
_FOREVER = 1e12

Place = tuple[str, str, str, str, float]
Edges = dict[Place, list[float]]
"""(sender, service, type, kind, minute) -> number, seconds, longest."""
Notes = dict[str, list[tuple[str, str, float, int]]]
"""Message -> (service, role, when, place in the log)."""
Rows = list[tuple[Any, ...]]
Execute = Callable[[str, Mapping[str, Any] | Sequence[Any]], Rows]


class SqlEventLog(ABC):
    """An `idemp.ports.EventLog` over a database that speaks SQL; the subclass has the connection."""

    GREATEST = "max"
    UNFIT: tuple[type[Exception], ...] = (UnicodeEncodeError, OverflowError)
    """What a database says of a text or a number that it does not take."""

    def __init__(
        self,
        *,
        retention: float,
        rows: int,
        payloads: bool,
        business: str,
        reading: bool = False,
        clock: Clock | None = None,
    ) -> None:
        self.retention, self.rows, self.reading = retention, rows, reading
        self.payloads, self.business = payloads, business
        self._clock = clock or Clock()
        self._lock = threading.Lock()
        self._pruned = self._clock.steady()
        upsert = (
            f"n = edge.n + excluded.n, seconds = edge.seconds + excluded.seconds, longest = {self.GREATEST}"
        )
        key = "(sender, service, type, kind, minute)"
        self._upsert = f" ON CONFLICT {key} DO UPDATE SET {upsert}(edge.longest, excluded.longest)"

    @abstractmethod
    def transact(self, work: Callable[[Execute], Any], *, writes: bool = True) -> Any:
        """Do ``work`` in a transaction; `StoreUnavailable` if it may not have been committed."""

    @abstractmethod
    def alone(self, execute: Execute) -> None:
        """Let nobody else record notes until this transaction ends."""

    @abstractmethod
    def among(self, column: str) -> str:
        """Whether ``column`` is one of ``:ids``."""

    @abstractmethod
    def ids(self, ids: Iterable[str]) -> Any:
        """The value of ``:ids``."""

    # ---------------------------------------------------------------- writing

    def insert(self, execute: Execute, events: Sequence[Any]) -> None:
        """Insert events, given as the fields of all."""
        _insert(execute, EVENT, len(COLUMNS), events)

    def append(self, batch: Batch) -> None:
        """See `idemp.ports.EventLog`."""
        events = batch.events if isinstance(batch.events, Events) else Events(batch.events)
        try:
            self._append(batch, events)
        except self.UNFIT:
            self._append(batch, plain(events))
        if self._clock.steady() - self._pruned > PRUNE:
            self._pruned = self._clock.steady()
            self.prune(self._clock.wall())

    def _append(self, batch: Batch, events: Events) -> None:
        edges = edges_of(events)
        notes = _notes(events)

        def work(execute: Execute) -> None:
            named = {"writer": batch.writer, "number": batch.number, "at": self._clock.wall()}
            new = "INSERT INTO batch VALUES (:writer, :number, :at) ON CONFLICT DO NOTHING RETURNING number"
            if execute(new, named):
                if notes:
                    edges.update(self._paired(execute, notes))
                self.insert(execute, events.fields)
                self._count(execute, edges)

        with self._lock:
            self.transact(work)

    def _count(self, execute: Execute, edges: Edges) -> None:
        values = [each for place, sums in edges.items() for each in (*place, *sums)]
        _insert(execute, "edge", _EDGE, values, self._upsert)

    def _paired(self, execute: Execute, notes: Notes) -> Edges:
        """What ``notes``, which are about to be inserted, change in who sent to whom."""
        self.alone(execute)
        known: Notes = defaultdict(list)
        text = f"{_NOTES}{self.among('e.uuid')}"
        for uuid, *note in execute(text, {"ids": self.ids(notes)}):
            known[uuid].append(tuple(note))
        found: Edges = defaultdict(lambda: [0, 0.0, 0.0])
        for uuid, new in notes.items():
            before, after = pairs(known[uuid]), pairs(known[uuid] + new)
            if before != after:
                for change, each in ((-1, before), (1, after)):
                    for (sender, service), at in each.items():
                        found[sender, service, "", "note", at // 60.0 * 60.0][0] += change
        return found

    def prepare(self, execute: Execute, old: bool, **types: str) -> None:
        """Make the tables; ``old``: or renew those of the first layout."""
        for table in TABLES:
            execute(table.format(**types), ())
        if old:
            self._count_notes(execute)
            execute("DROP INDEX IF EXISTS event_note", ())
        execute("INSERT INTO event_layout VALUES (?)", [LAYOUT])

    def check(self, layout: int, shown: str) -> int:
        """``layout``; `ConfigError` if it is one of a newer idemp, or there is none and I only look."""
        if self.reading and not layout:
            raise ConfigError(f"there is no event log {shown}; a tracked service makes it")
        if layout > LAYOUT:
            raise ConfigError(f"the event log {shown} is of a newer idemp (layout {layout}); upgrade idemp")
        return layout

    def _count_notes(self, execute: Execute) -> None:
        """Of a log of the first layout, which looked at all of them each time."""
        after: Sequence[Any] = [""]
        while uuids := execute(_NOTED, {"after": after[0], "part": PART}):
            asked = {"ids": self.ids([uuid for (uuid,) in uuids])}
            found: Edges = defaultdict(lambda: [0, 0.0, 0.0])
            known: Notes = defaultdict(list)
            for uuid, *note in execute(f"{_NOTES}{self.among('e.uuid')}", asked):
                known[uuid].append(tuple(note))
            for notes in known.values():
                for (sender, service), at in pairs(notes).items():
                    found[sender, service, "", "note", at // 60.0 * 60.0][0] += 1
            self._count(execute, found)
            after = uuids[-1]

    def prune(self, now: float) -> int:
        """See `idemp.ports.EventLog`; in parts, so that nobody waits long for it."""
        over = now - self.retention
        old = (
            "DELETE FROM event WHERE n IN (SELECT n FROM event WHERE at < :over ORDER BY at LIMIT :part)"
            " RETURNING n"
        )
        much = (
            "DELETE FROM event WHERE n IN (SELECT n FROM event WHERE n <= (SELECT max(n) FROM event) - :rows"
            " ORDER BY n LIMIT :part) RETURNING n"
        )
        gone = 0
        for statement in (old, much):
            part = PART
            while part == PART:
                with self._lock:
                    named = {"over": over, "rows": self.rows, "part": PART}
                    part = len(self.transact(_asking(statement, named)))
                gone += part
        with self._lock:
            for rest in ("DELETE FROM batch WHERE at < :over", "DELETE FROM edge WHERE minute < :over - 60"):
                self.transact(_asking(rest, {"over": over}))
        return gone

    # ---------------------------------------------------------------- looking

    def _ask(self, statement: str, named: Mapping[str, Any]) -> Rows:
        with self._lock:
            found: Rows = self.transact(lambda execute: execute(statement, named), writes=False)
        return found

    def find(self, query: Query, *, limit: int, newest: bool = True) -> list[Event]:
        """See `idemp.ports.EventLog`."""
        where, named = _where(query)
        if query.kinds:
            where.append(self.among("e.kind"))
            named["ids"] = self.ids(query.kinds)
        text = f" WHERE {' AND '.join(where)}" if where else ""
        order = "DESC" if newest else "ASC"
        rows = self._ask(
            f"{_SELECT}{text} ORDER BY e.at {order}, e.n {order} LIMIT :limit",
            {**named, "limit": min(limit, _BEHIND)},
        )
        return [Event(*row) for row in rows]

    def story(self, uuid: str, *, limit: int) -> list[Event]:
        """See `idemp.ports.EventLog`."""
        mine = self._ask(f"{_SELECT} WHERE e.uuid = :uuid ORDER BY e.n LIMIT :limit", _named(uuid, limit))
        conversation = next((row[_AT["conversation"]] for row in mine if row[_AT["conversation"]]), "")
        if mine and not conversation:
            return self._by_parents(uuid, limit)
        text = (
            f"{_SELECT} WHERE e.conversation = :uuid AND e.conversation <> e.uuid UNION ALL "
            f"{_SELECT} WHERE e.uuid = :uuid LIMIT :limit"
        )
        rows = self._ask(text, _named(conversation or uuid, limit))
        return [Event(*row) for row in rows]

    def _by_parents(self, uuid: str, limit: int) -> list[Event]:
        """Up to the first message and down to all that came of it, where no conversation is known."""
        found: dict[str, list[Event]] = {}
        ask: set[str] = {uuid}
        while ask and len(found) < _DEPTH:
            named = {"ids": self.ids(sorted(ask)), "limit": limit}
            own = self._ask(f"{_SELECT} WHERE {self.among('e.uuid')} ORDER BY e.n LIMIT :limit", named)
            children = self._ask(
                f"SELECT DISTINCT e.uuid FROM event e WHERE {self.among('e.parent')} AND e.conversation = ''"
                " LIMIT :limit",
                named,
            )
            found.update((each, []) for each in ask)
            following = {row[0] for row in children}
            for row in own:
                event = Event(*row)
                found[event.uuid].append(event)
                following.add(event.parent)
            ask = following - found.keys() - {""}
        return [event for events in found.values() for event in events][:limit]

    def edges(self, since: float | None = None, until: float | None = None) -> list[Edge]:
        """See `idemp.ports.EventLog`."""
        start, end = since or 0.0, _FOREVER if until is None else until
        counted = self._ask(_EDGES, {"since": start - start % 60.0, "until": end})
        return [_edge(*row) for row in counted]

    def unanswered(self, service: str, type: str, since: float, until: float, *, limit: int) -> list[Event]:
        """See `idemp.ports.EventLog`."""
        named = {"service": service, "type": type, "since": since, "until": until, "limit": limit}
        return [Event(*row) for row in self._ask(_UNANSWERED, named)]

    @abstractmethod
    def close(self) -> None:
        """See `idemp.ports.EventLog`."""


def _edge(sender: str, service: str, type: str, kind: str, n: Any, *sums: float) -> Edge:
    return Edge(sender, service, type, kind, int(n), sums[0], sums[1], sums[2], sums[3])


def _asking(statement: str, named: Mapping[str, Any]) -> Callable[[Execute], Rows]:
    return lambda execute: execute(statement, named)


_AT = {name: place for place, name in enumerate(COLUMNS)}


def _named(uuid: str, limit: int) -> dict[str, Any]:
    return {"uuid": uuid, "limit": limit}


def _where(query: Query) -> tuple[list[str], dict[str, Any]]:
    where: list[str] = []
    named: dict[str, Any] = {}
    for name in ("uuid", "service", "type", "business"):
        if value := getattr(query, name):
            where.append(f"e.{name} = :{name}")
            named[name] = value
    if query.business:
        where.append("e.business <> ''")  # which the index asks for
    if query.conversation:
        where.append(
            "((e.conversation = :conversation AND e.conversation <> e.uuid) OR e.uuid = :conversation)"
        )
        named["conversation"] = query.conversation
    for name, sign in (("since", ">="), ("until", "<")):
        if (at := getattr(query, name)) is not None:
            where.append(f"e.at {sign} :{name}")
            named[name] = at
    return where, named


def plain(events: Events) -> Events:
    """``events`` without what no database takes in a text, or as a number."""
    cleaned = Events()
    cleaned.fields = [_plain(each) for each in events.fields]
    return cleaned


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
    return max(-_MOST, min(value, _MOST)) if isinstance(value, int) else value


def _insert(execute: Execute, into: str, columns: int, values: Sequence[Any], rest: str = "") -> None:
    """Many rows a statement: each statement lets a busy thread beside this one go first."""
    for start in range(0, len(values), TOGETHER * columns):
        part = values[start : start + TOGETHER * columns]
        execute(_insertion(into, len(part) // columns, columns, rest), part)


@lru_cache(maxsize=256)
def _insertion(into: str, rows: int, columns: int, rest: str) -> str:
    one = f"({', '.join('?' * columns)})"
    return f"INSERT INTO {into} VALUES {', '.join([one] * rows)}{rest}"


def _notes(events: Events) -> Notes:
    """Message -> its notes in ``events``, as those that come behind all others."""
    found: Notes = defaultdict(list)
    if "note" in events.column("kind"):
        for n, event in enumerate(events):
            if event.kind == "note" and event.uuid:
                found[event.uuid].append((event.service, event.role, event.at, _BEHIND + n))
    return found


def pairs(notes: Iterable[tuple[str, str, float, int]]) -> dict[tuple[str, str], float]:
    """Who sent the message to whom, and when that one first told of it.

    By hand nobody says who sent it: that is the service whose note has the role.  Where no note has one, as
    in those of other libraries, it is the service that was first by its clock.
    """
    ordered = sorted(notes, key=lambda note: note[2:])
    senders = {service for service, role, *_ in ordered if role == "sender"}
    if ordered and not senders and ordered[0][1] == "":
        senders = {ordered[0][0]}
    told: dict[str, float] = {}
    for service, _, at, _ in ordered:
        told.setdefault(service, at)
    return {(sender, service): at for sender in senders for service, at in told.items() if service != sender}


def edges_of(events: Events) -> Edges:
    """(sender, service, type, kind, minute) -> number, seconds, longest; of what was sent, service is ""."""
    runs: dict[Place, list[float]] = defaultdict(list)
    minutes = [at // 60.0 * 60.0 for at in events.column("at")]
    columns = [events.column(name) for name in ("sender", "service", "type", "kind")]
    for place, took in zip(zip(*columns, minutes, strict=True), events.column("took"), strict=True):
        runs[place].append(took or 0.0)
    found: Edges = {}
    for (sender, service, type, kind, minute), took in runs.items():
        if kind == "sent":
            sums = found.setdefault((service, "", type, kind, minute), [0, 0.0, 0.0])
        elif kind in OUTCOMES:
            sums = found.setdefault((sender, service, type, kind, minute), [0, 0.0, 0.0])
        else:
            continue
        sums[:] = sums[0] + len(took), sums[1] + sum(took), max(sums[2], *took)
    return found
