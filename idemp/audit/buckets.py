"""Tallies of messages, compared bucket by bucket.  Pure: it is given the time.

A service counts in one or more instances, whose tallies add up.  A bucket is closed when it has ended
for each instance of both services; it differs when count or checksum do.  What differs is given the
field's ``settle`` seconds since it ended, since anything came to it, and since an instance started: a
message may be on its way.  While the auditor was away, or its broker was, nothing is late.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from idemp.audit.messages import TallyReport
from idemp.audit.tally import ANY, Tally, together
from idemp.errors import BadMessage


class Pair(NamedTuple):
    """A field, its owner, and one replica.  length, settle: seconds."""

    field: str
    owner: str
    replica: str
    length: int
    settle: float


class Found(NamedTuple):
    """Of two services.

    finding: ``same``, ``differs``, ``unsure``, ``settling``, ``silent``, or ``unheard`` if it never reported.

    start: of the bucket that shows it, the first if there are several.
    """

    finding: str
    reason: str
    start: int = 0
    expected: int | None = None
    actual: int | None = None


@dataclass(slots=True)
class _Instance:
    """A process that counts.

    heard: on the clock that never jumps; since: what it has told from then on.  before: until when it went
    on undisturbed, before it started; 0 if nobody knows.
    """

    number: int
    through: float
    since: float
    born: float
    started: float
    ended: bool
    at: float
    heard: float
    untimed: int
    before: float


class Buckets:
    """What services have counted.  pairs: what is compared with what; keep: seconds until it is forgotten."""

    def __init__(self, pairs: Sequence[Pair], now: float, keep: float) -> None:
        self._listened, self._keep = now, keep
        self._longest = max((pair.settle for pair in pairs), default=0.0)
        self._judged: float | None = None  # until when it listened for long enough, in seconds since 1970
        self._pairs: dict[tuple[str, str], list[Pair]] = defaultdict(list)
        self._fields = {pair.field.lower(): pair for pair in pairs}
        for pair in pairs:
            self._pairs[pair.field, pair.owner].append(pair)
            self._pairs[pair.field, pair.replica].append(pair)
        self._instances: dict[str, dict[str, _Instance]] = defaultdict(dict)
        self._parts: dict[tuple[str, str], dict[int, dict[str, Tally]]] = defaultdict(dict)
        self._moved: dict[str, dict[int, float]] = defaultdict(dict)
        self._odd: dict[tuple[str, str], set[int]] = defaultdict(set)
        self.changed: dict[tuple[str, ...], None] = {}
        """Names of what is to be kept anew, or forgotten if it is not there any more."""

    # ---------------------------------------------------------------- reports

    def report(self, report: TallyReport, now: float, at: float) -> None:
        """Take it.  at: ``now``, in seconds since 1970.  Raises `BadMessage`, and then nothing has changed.

        One that came before, or is older than one that came, changes nothing.
        """
        kinds = {kind: pair for kind in report.tallies if (pair := self._pair(kind, report.service))}
        spelled: dict[str, str] = {}
        for kind, pair in kinds.items():
            if (other := spelled.setdefault(pair.field, kind)) != kind:
                raise BadMessage(f"the types {other} and {kind} differ in the case of letters only")
            if pair.length != report.length:
                raise BadMessage(
                    f"the buckets of {kind} are {report.length} s long at {report.service},"
                    f" and {pair.length} s in the auditor's settings"
                )
        if (newest := max(report.born, report.started, report.through)) > at + report.length:
            raise BadMessage(f"the report is of {moment(newest)}, which is not yet")
        instances = self._instances[report.service]
        known = instances.get(report.instance)
        if known is not None and report.number <= known.number:
            return
        first = report.born if report.first else report.through
        since = first if known is None else known.since
        through = max(report.through, known.through if known else 0.0)
        before = known.before if known else 0.0
        if known and report.started != known.started and report.started >= known.started + self._longest:
            before = known.through
        instances[report.instance] = _Instance(
            report.number,
            through,
            since,
            report.born,
            report.started,
            report.ended,
            at,
            now,
            report.untimed,
            before,
        )
        self.changed["instance", report.service, report.instance] = None
        for kind, pair in kinds.items():
            for start, tally in report.tallies[kind].items():
                self._put(pair.field, report.service, report.instance, start, tally, at)

    def _pair(self, kind: str, service: str) -> Pair | None:
        pair = self._fields.get(kind.lower())
        return pair if pair and (pair.field, service) in self._pairs else None

    def _put(self, field: str, service: str, instance: str, start: int, tally: Tally, at: float) -> None:
        self._parts[field, service].setdefault(start, {})[instance] = tally
        moved = self._moved[field]
        moved[start] = max(at, moved.get(start, 0.0))
        self.changed["tally", field, service, instance, str(start)] = None
        self._look(field, service, start)

    def _look(self, field: str, service: str, start: int) -> None:
        """Which buckets deserve a look; the others are the same on both sides."""
        for pair in self._pairs[field, service]:
            owners, replicas = self._both(pair, start)
            odd = self._odd[field, pair.replica]
            (odd.add if not owners.same(replicas) or owners.unsure or replicas.unsure else odd.discard)(start)

    def _both(self, pair: Pair, start: int) -> tuple[Tally, Tally]:
        return self._sum(pair.field, pair.owner, start), self._sum(pair.field, pair.replica, start)

    def _sum(self, field: str, service: str, start: int) -> Tally:
        return together(self._parts[field, service].get(start, {}).values())

    def listening(self, now: float) -> None:
        """Silence before counts for nobody, and what is late has its time to settle from now on."""
        self._listened = now
        for instances in self._instances.values():
            for each in instances.values():
                each.heard = max(each.heard, now)

    def look(self, now: float, wall: float) -> None:
        """All is compared now; what is too old is forgotten, and who was not heard for as long."""
        if self._fields and now - self._listened >= self._longest:
            self._judged = wall
            self.changed["judged",] = None
        over = wall - self._keep
        for (field, service), starts in self._parts.items():
            for start in [start for start in starts if start < over]:
                for instance in starts.pop(start):
                    self.changed["tally", field, service, instance, str(start)] = None
                self._look(field, service, start)
                self._moved[field].pop(start, None)
        for service, instances in self._instances.items():
            for name in [name for name, each in instances.items() if each.at < over]:
                del instances[name]
                self.changed["instance", service, name] = None

    # ---------------------------------------------------------------- judgement

    def compared(self, pair: Pair, now: float, wall: float, limit: float | None) -> Found:
        """Of this moment.  limit: seconds that an instance may be silent."""
        both = (pair.owner, pair.replica)
        if unheard := [f"{who} has never reported" for who in both if not self._instances[who]]:
            return Found("unheard", "; ".join(unheard))
        if silent := [why for who in both for why in self._silence(who, now, limit)]:
            return Found("silent", "; ".join(silent))
        lower, upper = self._between(pair)
        last = int((upper - pair.length) // pair.length) * pair.length
        if last < lower:
            return Found("settling", "no bucket is closed yet")
        odd = sorted(start for start in self._odd[pair.field, pair.replica] if lower <= start <= last)
        differ = [start for start in odd if not Tally.may_be(*self._both(pair, start))]
        judged = wall if now - self._listened >= pair.settle else self._judged or 0.0
        calm = judged - pair.settle
        instances = [each for who in both for each in self._instances[who].values()]
        calm = min([calm, *(each.before - pair.settle for each in instances if each.started > calm)])
        moved = self._moved[pair.field]
        late = [start for start in differ if max(start + pair.length, moved.get(start, 0.0)) <= calm]
        for finding, starts in (("differs", late), ("unsure", [x for x in odd if x not in differ])):
            if starts:
                return self._found(finding, pair, starts)
        if differ:
            return self._found("settling", pair, differ)
        return self._found("same", pair, [last])._replace(reason=self._untimed(pair))

    def _untimed(self, pair: Pair) -> str:
        """What is not compared."""
        both = (pair.owner, pair.replica)
        untimed = {who: sum(each.untimed for each in self._instances[who].values()) for who in both}
        return "; ".join(
            f"{n} messages of {who} had no timestamp, and are in no bucket" for who, n in untimed.items() if n
        )

    def _found(self, finding: str, pair: Pair, starts: Sequence[int]) -> Found:
        owners, replicas = self._both(pair, starts[0])
        when = f"{moment(starts[0])}, {pair.length} s"
        others = f", and in {len(starts) - 1} more" if starts[1:] else ""
        match finding:
            case "same":
                reason = ""
            case "unsure":
                n = owners.unsure + replicas.unsure
                reason = f"{n} may have taken effect once more"
                if n >= ANY:
                    reason = "what was counted before a power loss may be lost"
            case _ if owners.count == replicas.count:
                reason = (
                    f"{pair.replica} has as many messages as {pair.owner}, {owners.count}, but not the same"
                )
            case _:
                reason = f"{pair.replica} has {replicas.count} messages, and {pair.owner} has {owners.count}"
        place = f": bucket {when}{others}" if reason else ""
        return Found(finding, reason + place, starts[0], owners.count, replicas.count)

    def _silence(self, who: str, now: float, limit: float | None) -> Iterator[str]:
        for name, each in self._instances[who].items():
            if limit is not None and not each.ended and now - each.heard > limit:
                yield f"{who} ({name[:8]}) has been silent for more than {limit:g} s"

    def _between(self, pair: Pair) -> tuple[float, float]:
        """From when on, and until when, everything is told."""
        both = [self._instances[who].values() for who in (pair.owner, pair.replica)]
        lower = max(min(each.born for each in instances) for instances in both)
        known = [each.since for instances in both for each in instances if each.since > each.born]
        live = [each.through for instances in both for each in instances if not each.ended]
        return max([lower, *known]), min(live, default=max(e.through for group in both for e in group))

    def asked(self, service: str) -> list[str]:
        """The instances that have counted."""
        return sorted(self._instances[service])

    def told(self, pair: Pair) -> tuple[float, float]:
        """From when on, and until when, both have told all, in seconds since 1970; both must have told."""
        return self._between(pair)

    # ---------------------------------------------------------------- to be kept

    def kept(self, kind: str, *about: str) -> Any:
        """For JSON; None if it is to be forgotten."""
        match kind, about:
            case "instance", (service, name):
                each = self._instances[service].get(name)
                return each and [
                    each.number,
                    each.through,
                    each.since,
                    each.born,
                    each.started,
                    each.ended,
                    each.at,
                    each.untimed,
                    each.before,
                ]
            case "tally", (field, service, name, start):
                part = self._parts[field, service].get(int(start), {}).get(name)
                moved = self._moved[field].get(int(start), 0.0)
                return part and [part.count, f"{part.checksum:x}", part.unsure, moved]
            case "judged", ():
                return self._judged
        raise ValueError(kind)

    def restore(self, kind: str, about: Sequence[str], kept: Any) -> bool:
        """Whether anybody asks for it."""
        match kind, about:
            case "instance", [service, name] if any(service == who for _, who in self._pairs):
                number, through, since, born, started, ended, at, untimed, before = kept
                self._instances[service][name] = _Instance(
                    number, through, since, born, started, ended, at, self._listened, untimed, before
                )
                return True
            case "judged", []:
                self._judged = kept
                return bool(self._fields)
            case "tally", [field, service, name, start] if (field, service) in self._pairs:
                count, checksum, unsure, moved = kept
                tally = Tally(count, int(checksum, 16), unsure)
                self._put(field, service, name, int(start), tally, moved)
                del self.changed["tally", field, service, name, start]
                return True
        return False


def moment(at: float) -> str:
    """For people."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
