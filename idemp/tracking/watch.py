"""Watching services: which is broken, why, with what numbers, and which message has waited longest.

`judge` is pure: what was seen of one service goes in, findings come out.  `look` asks the event log and the
broker for what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from idemp.ports import OUTCOMES, Event, EventLog, Query

IDS = 20
"""Ids that a finding names; it tells how many there are beyond."""
SAMPLE = 2000
"""Events of a service that are looked at."""
STEP = 0.2
"""The rise of the failure share that is a step."""
LEAST = 30
"""Messages without which a share, or a rhythm, is none."""
_BAD = ("failed", "parked", "rejected", "conflict", "lost")


class Limits(NamedTuple):
    """Seconds.  deadline: for an expected receiver.  stuck: for a handler, and for a queue without progress.

    recent: what is compared with the time before it.  back: how far back is looked.
    """

    deadline: float = 30.0
    stuck: float = 60.0
    recent: float = 120.0
    back: float = 86_400.0


class Seen(NamedTuple):
    """What is known of one service.  ready, consumers: of its queue; None where nobody can say.

    events: its newest, the newest first.  missing: sent to it, as far as its past tells, and it told of
    nothing.  absent: there is no such queue.
    """

    service: str
    events: Sequence[Event]
    missing: Sequence[Event] = ()
    ready: int | None = None
    consumers: int | None = None
    absent: bool = False


class Finding(NamedTuple):
    """One thing that is wrong.  ``oldest``: since when, seconds since 1970; ``ids``: some of the messages."""

    kind: str
    service: str
    why: str
    oldest: float | None = None
    ids: tuple[str, ...] = ()


KINDS = ("no consumer", "no progress", "never finished", "failing", "missing", "silence")


def judge(seen: Seen, now: float, limits: Limits) -> list[Finding]:
    """All that is wrong with a service."""
    found = [
        _no_consumer(seen),
        _no_progress(seen, now, limits),
        _never_finished(seen, now, limits),
        _failing(seen, now, limits),
        _missing(seen, now, limits),
        _silence(seen, now, limits),
    ]
    return [each for each in found if each is not None]


def _no_consumer(seen: Seen) -> Finding | None:
    queue = f"{seen.service}-queue"
    if seen.absent:
        return _waiting("no consumer", seen, f"there is no queue {queue}")
    if seen.consumers != 0:
        return None
    return _waiting("no consumer", seen, f"nobody consumes {queue}; {seen.ready} messages are ready")


def _waiting(kind: str, seen: Seen, why: str) -> Finding:
    """With the oldest message that it got and told nothing of, where the publisher was tracked."""
    if not seen.missing:
        return Finding(kind, seen.service, why, _last(seen))
    oldest = min(seen.missing, key=lambda event: event.at)
    return Finding(kind, seen.service, f"{why}; the oldest is {oldest.uuid}", oldest.at, _ids(seen.missing))


def _last(seen: Seen) -> float | None:
    return max((_end(event) for event in seen.events if event.kind in OUTCOMES), default=None)


def _end(event: Event) -> float:
    return event.at + (event.took or 0.0)


def _no_progress(seen: Seen, now: float, limits: Limits) -> Finding | None:
    last = _last(seen)
    if not seen.ready or not seen.consumers or last is None or now - last <= limits.stuck:
        return None
    error = next((f"; last error {event.why}" for event in seen.events if event.kind in _BAD), "")
    told = f"{seen.consumers} consumers, {seen.ready} messages ready, and no outcome for {now - last:.0f} s"
    return _waiting("no progress", seen, told + error)


def _never_finished(seen: Seen, now: float, limits: Limits) -> Finding | None:
    ended = {event.uuid for event in seen.events if event.kind in OUTCOMES}
    open_ = [
        event
        for event in seen.events
        if event.kind == "started" and event.uuid not in ended and now - event.at > limits.stuck
    ]
    if not open_:
        return None
    oldest = min(open_, key=lambda event: event.at)
    told = f"{len(open_)} handlers began and did not end; {oldest.uuid} for {now - oldest.at:.0f} s"
    return Finding("never finished", seen.service, told, oldest.at, _ids(open_))


def _failing(seen: Seen, now: float, limits: Limits) -> Finding | None:
    done = [event for event in seen.events if event.kind in OUTCOMES]
    recent = [event for event in done if now - _end(event) <= limits.recent]
    before = [event for event in done if now - _end(event) > limits.recent]
    if len(recent) < LEAST:
        return None
    bad = [event for event in recent if event.kind in _BAD]
    share, was = len(bad) / len(recent), _share(before)
    if share < was + STEP:
        return None
    told = f"{share:.0%} of {len(recent)} messages fail since {limits.recent:.0f} s, {was:.0%} before"
    return Finding("failing", seen.service, f"{told}; last error {bad[0].why}", bad[-1].at, _ids(bad))


def _share(events: Sequence[Event]) -> float:
    return sum(event.kind in _BAD for event in events) / len(events) if events else 0.0


def _missing(seen: Seen, now: float, limits: Limits) -> Finding | None:
    late = [event for event in seen.missing if now - event.at > limits.deadline]
    if not late or seen.ready:  # they may be among those that wait
        return None
    oldest = min(late, key=lambda event: event.at)
    queue = f"{seen.service}-queue"
    told = (
        f"{len(late)} messages that {queue} used to get did not come in {limits.deadline:.0f} s, the oldest "
        f"{now - oldest.at:.0f} s ago from {oldest.service}; is {queue} still bound?"
    )
    return Finding("missing", seen.service, told, oldest.at, _ids(late))


def _silence(seen: Seen, now: float, limits: Limits) -> Finding | None:
    times = sorted(_end(event) for event in seen.events if event.kind in OUTCOMES)
    if len(times) < LEAST:
        return None
    gap = max((times[-1] - times[0]) / (len(times) - 1), 0.001)
    quiet = now - times[-1]
    if quiet <= max(limits.stuck, 30 * gap):
        return None
    told = f"nothing for {quiet:.0f} s, where a message came every {gap:.1f} s"
    return Finding("silence", seen.service, told, times[-1])


def _ids(events: Sequence[Event]) -> tuple[str, ...]:
    ordered = sorted(events, key=lambda event: event.at)
    return tuple(dict.fromkeys(event.uuid for event in ordered))[:IDS]


# ------------------------------------------------------------------ asking


Queue = Callable[[str], tuple[int | None, int | None, bool]]
"""Of a queue: messages ready, consumers, and whether it is absent; None where nobody can say."""


def look(
    log: EventLog, queue: Queue, now: float, limits: Limits, services: Sequence[str] = ()
) -> list[Finding]:
    """What is wrong with ``services``; of all that ever received something, if none is named."""
    takes: dict[str, set[str]] = {}
    for edge in log.edges(now - limits.back):
        if edge.service and edge.kind in ("ok", "skipped", "failed", "parked"):
            takes.setdefault(edge.service, set()).add(edge.type)
    found: list[Finding] = []
    for service in services or sorted(takes):
        ready, consumers, absent = queue(f"{service}-queue")
        events = log.find(Query(service=service, since=now - limits.back), limit=SAMPLE)
        missing = [
            event
            for kind in sorted(takes.get(service, ()))
            for event in log.unanswered(service, kind, now - limits.back, now - limits.deadline, limit=SAMPLE)
            if event.queue in ("", f"{service}-queue") and event.at >= _first(log, service, kind)
        ]
        found += judge(Seen(service, events, missing, ready, consumers, absent), now, limits)
    return found


def _first(log: EventLog, service: str, kind: str) -> float:
    """When the service first received this type: what was sent before was not for it."""
    found = log.find(Query(service=service, type=kind, kinds=OUTCOMES), limit=1, newest=False)
    return found[0].sent_at or found[0].at if found else float("inf")
