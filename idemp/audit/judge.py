"""The judge: which copies agree, which do not, and which cannot be told.  Pure: it is given the time.

Each holder of a field has a window of its newest values.  A report puts its value into the
reporter's window, and into each other holder's window that holder's own newest value again; so
windows of ``samples`` values are the last ``samples`` reports of the field, by whomever.  Two
windows are compared when both are full and neither changes any more.

A field of messages has no windows: see buckets.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as having
from decimal import Context, Decimal
from enum import StrEnum
from typing import Any, NamedTuple

from idemp.audit.buckets import Buckets, Pair
from idemp.audit.messages import (
    DIFFERENT,
    EVERYBODY,
    LARGEST,
    SYNCHRONIZED,
    UNKNOWN,
    Status,
    TallyReport,
    Unfit,
    number,
)
from idemp.errors import BadMessage

NUMBERS = ("int", "float", "decimal")
STRING = "string"
MESSAGES = "messages"
"""Not a value: which messages a service has handled."""

Value = Decimal | str

_EXACT = Context(prec=4 * LARGEST + 10)  # the sum or product of any two numbers that are let in
_NUMERIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class State(StrEnum):
    """Of a replica's copy of a field, as a lamp shows it."""

    OK = "ok"
    SETTLING = "settling"
    STALE = "stale"
    BROKEN = "broken"


class Tolerance(NamedTuple):
    """How far a replica may be from its owner; ``percent`` of the owner's value, or as it stands."""

    amount: Decimal = Decimal(0)
    percent: bool = False


class Field(NamedTuple):
    """What is audited.  replicas: service -> the offset that is added to its values.

    samples: values in a window, 2 or more.  stale_after: seconds that a holder may be silent; None
    lets it be silent for ever.  looks: in how many judgements in a row a status must be new before it is.
    bucket, settle: of messages, seconds in a bucket, and after its end until what differs is broken.
    """

    name: str
    kind: str
    owner: str
    samples: int
    replicas: Mapping[str, Decimal]
    tolerance: Tolerance = Tolerance()
    stale_after: float | None = None
    looks: int = 1
    bucket: int = 60
    settle: float = 60.0

    def holders(self) -> list[str]:
        """The owner first."""
        return [self.owner, *self.replicas]


class Verdict(NamedTuple):
    """On a replica's copy of a field.

    since: when it came into this state, in seconds since 1970.  status: what is told of it, None while
    nothing is known.  expected, actual: what was compared last, the replica's with its offset.
    """

    state: State
    reason: str
    since: float
    status: int | None = None
    expected: Value | None = None
    actual: Value | None = None

    @property
    def difference(self) -> Decimal | None:
        """What the replica has more than it should have; None for strings."""
        match self.expected, self.actual:
            case Decimal() as expected, Decimal() as actual:
                return _EXACT.subtract(actual, expected)
        return None


@dataclass(slots=True)
class _Window:
    """heard: when the holder last reported, on the clock that never jumps; at: the same since 1970.

    overdue: it was silent for too long, and has not reported since.
    """

    heard: float
    values: list[Value] = having(default_factory=list)
    at: float | None = None
    overdue: bool = False

    def stable(self) -> bool:
        return len(set(self.values)) == 1


class Row(NamedTuple):
    """A part of what the judge knows, to be kept: ``text`` replaces what was kept under ``name``."""

    name: str
    text: str | None
    """None: to be forgotten."""


class Judge:
    """Judges ``fields``.

    now: on a clock that never jumps, in seconds.  publish_unknown: a service none of whose fields can
    be compared is told to be `UNKNOWN`; else what was known last stands.  owner_reports: an owner is told
    of too, as the worst of its replicas.  keep: seconds that buckets are remembered.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        now: float,
        *,
        publish_unknown: bool = False,
        owner_reports: bool = True,
        keep: float = 86400.0,
    ) -> None:
        self._fields = {each.name.lower(): each for each in fields}
        self._publish_unknown, self._owner_reports = publish_unknown, owner_reports
        self._holders = {(each.name, who) for each in fields for who in each.holders()}
        valued = [each for each in fields if each.kind != MESSAGES]
        self._windows = {(each.name, who): _Window(now) for each in valued for who in each.holders()}
        self._pairs = {
            (each.name, who): Pair(each.name, each.owner, who, each.bucket, each.settle)
            for each in fields
            if each.kind == MESSAGES
            for who in each.replicas
        }
        self.buckets = Buckets([*self._pairs.values()], now, keep)
        self._new: dict[tuple[str, str], tuple[int, int]] = {}
        self._verdicts: dict[tuple[str, str], Verdict] = {}
        self._told: dict[str, int] = {}
        self._changed: dict[str, None] = {}

    def services(self) -> set[str]:
        """Everybody who holds a field."""
        return {who for _, who in self._holders}

    # ---------------------------------------------------------------- reports

    def report(self, service: str, name: str, value: Any, now: float, at: float) -> None:
        """``service`` has ``value`` for the field ``name``.  at: ``now``, in seconds since 1970.

        Raises `BadMessage`, and then nothing has changed.
        """
        field = self._fields.get(name.lower())
        if field is None:
            raise BadMessage(f"no field {name!r} is audited")
        if field.kind == MESSAGES:
            raise BadMessage(f"{field.name!r} is counted in messages, and has no value")
        window = self._windows.get((field.name, service))
        if window is None:
            raise BadMessage(f"{service!r} holds no {field.name!r}: it is neither its owner nor a replica")
        self._put(field, service, cast(field.kind, name, value))
        window.heard, window.at, window.overdue = max(window.heard, now), at, False
        for other in field.holders():
            held = self._windows[field.name, other].values
            if other != service and held:
                self._put(field, other, held[-1])

    def tally(self, report: TallyReport, now: float, at: float) -> None:
        """As `report`; message types that are no field are nobody's business."""
        self.buckets.report(report, now, at)

    def _put(self, field: Field, service: str, value: Value) -> None:
        held = self._windows[field.name, service].values
        held.append(value)
        del held[: -field.samples]
        self._changed[_name("window", field.name, service)] = None

    def listening(self, now: float) -> None:
        """From now on reports arrive again: silence before counts for nobody."""
        for window in self._windows.values():
            window.heard = max(window.heard, now)
        self.buckets.listening(now)

    # ---------------------------------------------------------------- judgement

    def tick(self, now: float, wall: float) -> list[Status]:
        """Judge everything; what is to be told, because it has changed.  wall: seconds since 1970."""
        self.buckets.look(now, wall)
        for field in self._fields.values():
            for replica in field.replicas:
                self._judge(field, replica, now, wall)
        worst, unknown = self._worst(), UNKNOWN if self._publish_unknown else None
        told = [new for who in self._order() for new in self._tell(who, worst.get(who, unknown))]
        if told and self._known():
            told.append(Status(EVERYBODY, min(self._known())))
        return told

    def verdicts(self) -> Iterator[tuple[Field, str, Verdict]]:
        """Field, replica, and the judgement of the last tick."""
        for field in self._fields.values():
            for replica in field.replicas:
                yield field, replica, self._verdicts.get((field.name, replica), _UNSEEN)

    def pairs(self, name: str) -> list[Pair]:
        """Who is compared in a field of messages; none if it is no such field."""
        return [pair for pair in self._pairs.values() if pair.field.lower() == name.lower()]

    def reported(self, name: str, service: str) -> tuple[Value | None, float | None]:
        """What a holder said last, and when, in seconds since 1970."""
        window = self._windows.get((name, service))
        if window is None:
            return None, None
        return (window.values[-1] if window.values else None), window.at

    def _judge(self, field: Field, replica: str, now: float, wall: float) -> None:
        before = self._verdicts.get((field.name, replica), _UNSEEN)
        if field.kind == MESSAGES:
            found = self._counted(field, replica, now, wall)
        else:
            found = self._compared(field, replica, now)
        found = self._steady(field, replica, before, found)
        known = found.status
        if self._publish_unknown:
            known = None if found.state is State.STALE else known
        elif known is None:
            known = before.status
        since = before.since if before.state is found.state and before is not _UNSEEN else wall
        after = found._replace(status=known, since=since)
        if after != before:
            self._verdicts[field.name, replica] = after
            self._changed[_name("verdict", field.name, replica)] = None

    def _steady(self, field: Field, replica: str, before: Verdict, found: Verdict) -> Verdict:
        """A status that is new must be found ``looks`` times in a row."""
        place = field.name, replica
        if found.status is None or found.status == before.status:
            self._new.pop(place, None)
            return found
        status, times = self._new.get(place, (found.status, 0))
        times = times + 1 if status == found.status else 1
        if times >= field.looks:
            self._new.pop(place, None)
            return found
        self._new[place] = found.status, times
        why = f": {found.reason}" if found.reason else ""
        reason = f"{found.state} in {times} of {field.looks} looks{why}"
        return Verdict(State.SETTLING, reason, 0.0, before.status, found.expected, found.actual)

    def _counted(self, field: Field, replica: str, now: float, wall: float) -> Verdict:
        found = self.buckets.compared(self._pairs[field.name, replica], now, wall, field.stale_after)
        state, status = _OF_BUCKETS[found.finding]
        expected, actual = (None if n is None else Decimal(n) for n in (found.expected, found.actual))
        return Verdict(state, found.reason, 0.0, status, expected, actual)

    def _compared(self, field: Field, replica: str, now: float) -> Verdict:
        """Of this moment alone."""
        silent = [why for who in (field.owner, replica) if (why := self._silence(field, who, now))]
        overdue = any(self._windows[field.name, who].overdue for who in (field.owner, replica))
        if silent:
            return Verdict(State.STALE, "; ".join(silent), 0.0, DIFFERENT if overdue else None)
        owners, replicas = self._windows[field.name, field.owner], self._windows[field.name, replica]
        for who, window in ((field.owner, owners), (replica, replicas)):
            if len(window.values) < field.samples:
                reason = f"{who} has {len(window.values)} of {field.samples} samples"
                return Verdict(State.SETTLING, reason, 0.0)
        for who, window in ((field.owner, owners), (replica, replicas)):
            if not window.stable():
                first, last = shown(window.values[0]), shown(window.values[-1])
                return Verdict(State.SETTLING, f"{who} is changing: {first} .. {last}", 0.0)
        expected, actual = owners.values[-1], shifted(replicas.values[-1], field.replicas[replica])
        if agree(expected, actual, field.tolerance):
            return Verdict(State.OK, "", 0.0, SYNCHRONIZED, expected, actual)
        reason = f"{replica} has {shown(actual)}, and {field.owner} has {shown(expected)}"
        return Verdict(State.BROKEN, reason, 0.0, DIFFERENT, expected, actual)

    def _silence(self, field: Field, who: str, now: float) -> str:
        """Why nothing can be said of this holder; "" if it has been heard."""
        window, limit = self._windows[field.name, who], field.stale_after
        if limit is not None and not window.overdue and now - window.heard > limit:
            window.overdue = True
            self._changed[_name("window", field.name, who)] = None
        if not window.values and (limit is None or window.overdue):
            return f"{who} has never reported"
        return f"{who} has been silent for more than {limit:g} s" if window.overdue else ""

    # ---------------------------------------------------------------- what is told

    def _order(self) -> list[str]:
        """Replicas, then those who only own."""
        fields = self._fields.values()
        replicas = [who for field in fields for who in field.replicas]
        owners = [field.owner for field in fields] if self._owner_reports else []
        return list(dict.fromkeys(replicas + owners))

    def _worst(self) -> dict[str, int]:
        """Of each service the worst of its fields, as far as they are known."""
        worst: dict[str, int] = {}
        for field, replica, verdict in self.verdicts():
            for who in (replica, field.owner) if self._owner_reports else (replica,):
                if verdict.status is not None:
                    worst[who] = min(verdict.status, worst.get(who, verdict.status))
        return worst

    def _tell(self, service: str, status: int | None) -> Iterator[Status]:
        if status is not None and status != self._told.get(service, UNKNOWN):
            self._told[service] = status
            self._changed[_name("told", service)] = None
            yield Status(service, status)

    def _known(self) -> list[int]:
        services = self._order()
        return [code for who, code in self._told.items() if code != UNKNOWN and who in services]

    # ---------------------------------------------------------------- to be kept

    def changes(self) -> list[Row]:
        """What has changed since the last call."""
        changed, self._changed = self._changed, {}
        rows = [Row(name, json.dumps(self._kept(*json.loads(name)))) for name in changed]
        counted, self.buckets.changed = self.buckets.changed, {}
        for about in counted:
            kept = self.buckets.kept(*about)
            rows.append(Row(_name(*about), None if kept is None else json.dumps(kept)))
        return rows

    def _kept(self, kind: str, *about: str) -> Any:
        match kind:
            case "window":
                window = self._windows[about[0], about[1]]
                return {
                    "values": [str(value) for value in window.values],
                    "at": window.at,
                    "overdue": window.overdue,
                }
            case "verdict":
                verdict = self._verdicts[about[0], about[1]]
                compared = [None if value is None else str(value) for value in verdict[4:]]
                return [*verdict[:4], *compared]
        return self._told[about[0]]

    def restore(self, rows: Sequence[Row]) -> list[str]:
        """Know again what was kept; the names of rows that nobody asks for any more."""
        unused = []
        for row in rows:
            kind, *about = json.loads(row.name)
            text = json.loads(row.text or "null")
            match kind, about:
                case "window", [name, who] if (name, who) in self._windows:
                    self._restore_window(self._fields[name.lower()], who, text)
                case "verdict", [name, who] if (name, who) in self._holders:
                    kinds = self._fields[name.lower()].kind
                    state, reason, since, status, *compared = text
                    expected, actual = (_read(kinds, value) for value in compared)
                    self._verdicts[name, who] = Verdict(State(state), reason, since, status, expected, actual)
                case "told", [who] if who in self.services():
                    self._told[who] = text
                case _ if not self.buckets.restore(kind, about, text):
                    unused.append(row.name)
        return unused

    def _restore_window(self, field: Field, who: str, kept: Mapping[str, Any]) -> None:
        """As many as a window has now; values of another kind are forgotten."""
        values = [_read(field.kind, value) for value in kept["values"]]
        window = self._windows[field.name, who]
        window.at, window.overdue = kept["at"], kept["overdue"] and field.stale_after is not None
        window.values = [value for value in values if value is not None][-field.samples :]


_OF_BUCKETS = {
    "same": (State.OK, SYNCHRONIZED),
    "differs": (State.BROKEN, DIFFERENT),
    "unsure": (State.STALE, None),
    "settling": (State.SETTLING, None),
    "silent": (State.STALE, DIFFERENT),
    "unheard": (State.STALE, None),
}
_UNSEEN = Verdict(State.STALE, "it was not judged yet", 0.0)


def _name(kind: str, *about: str) -> str:
    return json.dumps([kind, *about])


def _read(kind: str, text: str | None) -> Value | None:
    if text is None or kind == STRING:
        return text
    read = number(text)
    return None if isinstance(read, Unfit) else read


# ------------------------------------------------------------------ values


def cast(kind: str, name: str, value: Any) -> Value:
    """``value`` as its field's kind has it.  Raises `BadMessage`.

    Numbers may be text; true and false are 1 and 0; null, lists, objects and other text are refused.
    """
    match value:
        case Unfit(why):
            raise BadMessage(f"{name}: {why}")
        case None:
            raise BadMessage(f"{name} is null, which is no value")
        case str() if kind == STRING:
            return value
        case bool() if kind in NUMBERS:
            return Decimal(int(value))
        case Decimal() if kind in NUMBERS:
            return value
        case str() if _NUMERIC.fullmatch(value):
            return cast(kind, name, number(value))
    what = {str: "text", bool: "true or false", list: "a list", dict: "an object"}.get(
        type(value), "a number"
    )
    raise BadMessage(f"{name} is {what}, and its type is {kind}")


def shifted(value: Value, offset: Decimal) -> Value:
    """A replica's value as its owner would have it; exact."""
    return _EXACT.add(value, offset) if isinstance(value, Decimal) else value


def agree(expected: Value, actual: Value, tolerance: Tolerance) -> bool:
    """Whether the two are equal, or near enough."""
    if isinstance(expected, str) or isinstance(actual, str):
        return expected == actual
    apart = _abs(_EXACT.subtract(actual, expected))
    if tolerance.percent:
        return _EXACT.multiply(apart, Decimal(100)) <= _EXACT.multiply(_abs(expected), tolerance.amount)
    return apart <= tolerance.amount


def _abs(value: Decimal) -> Decimal:
    """`abs` would round to the digits of the context."""
    return value.copy_abs()


def shown(value: Value | None) -> str:
    """For people: a number without exponent unless it is long, text in quotes."""
    match value:
        case None:
            return "-"
        case str():
            return repr(value if len(value) <= 60 else f"{value[:60]}...")
    plain = format(value, "f")
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return plain if len(plain) <= 60 else str(value)
