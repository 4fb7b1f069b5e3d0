"""The messages of the audit: what services report, and what is told of them.

Other programs may import them: ``Report("sales", {"sales_count": 10}).encode()``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from idemp.audit.tally import MODULUS, Tally
from idemp.errors import BadMessage
from idemp.message import MAX_BODY

SYNCHRONIZED = 2
DIFFERENT = 0
UNKNOWN = -1
EVERYBODY = "all"
"""The service name of the overall status."""

NAME = 200
"""Bytes that the name of a service, a field or a process has at most."""
LARGEST = 400
"""Digits that a number may have, and the power of ten up to which it may go, in either direction."""


class Unfit(NamedTuple):
    """A number in JSON that nothing can be compared with: NaN, infinite, huge."""

    why: str


class Report(NamedTuple):
    """A service says how its copies stand.  data: field -> number or string.

    Numbers that were decoded are exact: `Decimal`, or `Unfit`.
    """

    service: str
    data: Mapping[str, Any]

    def encode(self) -> bytes:
        """As JSON; a `Decimal` keeps all its digits."""
        fields = ",".join(f"{json.dumps(name)}:{_written(value)}" for name, value in self.data.items())
        return f'{{"service":{json.dumps(self.service)},"data":{{{fields}}}}}'.encode()

    @classmethod
    def decode(cls, body: bytes) -> Report:
        """The report in ``body``, its two names in any case of letters.  Raises `BadMessage`."""
        return _report(_object(body))


class Status(NamedTuple):
    """What is told of ``service``, or of `EVERYBODY`: `SYNCHRONIZED`, `DIFFERENT` or `UNKNOWN`."""

    service: str
    status: int

    def encode(self) -> bytes:
        """Exactly these two, in this order, without spaces."""
        told = {"service": self.service, "status": self.status}
        return json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def decode(cls, body: bytes) -> Status:
        """The status in ``body``.  Raises `BadMessage`."""
        told = _object(body)
        match told.get("service"), told.get("status"):
            case str() as service, Decimal() as status if status in (SYNCHRONIZED, DIFFERENT, UNKNOWN):
                return cls(service, int(status))
        raise BadMessage('this is no status; one reads {"service":"sales","status":2}')


class TallyReport(NamedTuple):
    """A process of ``service`` tells its closed buckets that have changed.

    instance: its name, the same after a restart; number: of the report, growing.  born: when it began to
    count; started: when it had its broker anew for the last time, and could go on.  length: seconds in a
    bucket.  through: all its buckets that end before are told, and those that are in no report are empty.
    ended: it counts no more for now.  first: nothing was told before.  untimed: messages so far that did
    not say when they were published, and are in no bucket.  Times in seconds since 1970.
    """

    service: str
    instance: str
    number: int
    born: float
    started: float
    length: int
    through: float
    ended: bool
    first: bool
    untimed: int
    tallies: Mapping[str, Mapping[int, Tally]]
    """Message type -> where the bucket begins -> what is in it."""

    def encode(self) -> bytes:
        """As JSON; checksums are hexadecimal text."""
        told = {kind: written(tallies) for kind, tallies in self.tallies.items()}
        return json.dumps({**self._asdict(), "tallies": told}, separators=(",", ":")).encode()


def written(tallies: Mapping[int, Tally]) -> list[list[Any]]:
    """For JSON."""
    return [[place, each.count, f"{each.checksum:032x}", each.unsure] for place, each in tallies.items()]


def tallied(rows: Any) -> dict[int, Tally]:
    """What `written` wrote.  Raises `ValueError` or `TypeError`."""
    return {
        _whole(place): Tally(_number(count), int(checksum, 16) % MODULUS, _number(unsure))
        for place, count, checksum, unsure in rows
    }


def decoded(body: bytes) -> Report | TallyReport:
    """Either kind of report.  Raises `BadMessage`."""
    told = _object(body)
    if "tallies" not in told:
        return _report(told)
    try:
        return TallyReport(
            _text(told["service"]),
            _text(told["instance"]),
            _whole(told["number"]),
            _moment(told["born"]),
            _moment(told["started"]),
            _whole(told["length"]),
            _moment(told["through"]),
            told["ended"] is True,
            told["first"] is True,
            _number(told.get("untimed", 0)),
            {kind: tallied(rows) for kind, rows in told["tallies"].items()},
        )
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise BadMessage(f"this is no report of tallies: {type(error).__name__}: {error}") from None


def fit(name: str, most: int = NAME) -> bool:
    """Whether anything can be called that, in ``most`` bytes: who keeps a name must be able to show it."""
    return name.isprintable() and 0 < len(name.encode()) <= most


def _text(value: Any) -> str:
    if not isinstance(value, str) or not fit(value):
        raise ValueError(f"{str(value)[:40]!r} is no name")
    return value


def _whole(value: Any) -> int:
    whole = int(value) if isinstance(value, int | Decimal) else None
    if whole is None or whole != value or abs(whole) >= 2**63:
        raise ValueError(f"{value!r} is no whole number")
    return whole


def _number(value: Any) -> int:
    whole = _whole(value)
    if whole < 0:
        raise ValueError(f"{value!r} is less than nothing")
    return whole


def _moment(value: Any) -> float:
    """Seconds since 1970, before the year 10000."""
    at = float(value)
    if not 0 <= at < 2.5e11:
        raise ValueError(f"{at:g} is no time")
    return at


def number(text: str) -> Decimal | Unfit:
    """Exactly what ``text`` says in decimal; `Unfit` if that is too large, too small or no number."""
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    try:
        read = Decimal(text)
    except ArithmeticError:
        return Unfit(f"{shown} is no number that can be compared")
    if not read.is_finite():
        return Unfit(f"{shown} is no number that can be compared")
    if len(read.as_tuple().digits) > LARGEST or abs(read.adjusted()) > LARGEST:
        return Unfit(f"{shown} is too long a number: {LARGEST} digits are allowed")
    return read


def _report(told: Mapping[str, Any]) -> Report:
    service, data = told.get("service"), told.get("data")
    if not isinstance(service, str):
        raise BadMessage('the report names no service; write it like {"service": "sales", "data": {...}}')
    if not isinstance(data, dict):
        raise BadMessage('the report has no data; write it like {"service": "sales", "data": {...}}')
    return Report(service, data)


def _object(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``, the names in it in small letters."""
    if len(body) > MAX_BODY:
        raise BadMessage(f"the body has {len(body)} bytes; {MAX_BODY} are allowed")
    try:
        told = json.loads(body, parse_int=number, parse_float=number, parse_constant=number)
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"the body is not JSON: {error}") from None
    if not isinstance(told, dict):
        raise BadMessage(f"the body is JSON, but not an object: {type(told).__name__}")
    return {name.lower(): value for name, value in told.items()}


def _written(value: Any) -> str:
    return str(value) if isinstance(value, Decimal) else json.dumps(value, allow_nan=False)
