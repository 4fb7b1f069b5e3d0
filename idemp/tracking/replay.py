"""Replay: messages to their receivers once more, after asking the store what that would do.

A plan comes first: what becomes of each message at each receiver, by the receiver's dedup store and by
nothing else.  Then the messages are staged in a queue of the replay's own, and released from there to the
receivers' queues at a rate.  Each step is confirmed before the one before it is let go of, so that a kill in
between leaves a message twice at most, which its receiver skips; the replay goes on from its queue.
"""

from __future__ import annotations

import uuid as uuids
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from msgspec.structs import replace

from idemp.causality import CONFIRMED, REPLAY
from idemp.errors import BadMessage, ConfigError, TransportUnavailable, Unroutable
from idemp.message import Message, Properties, decode
from idemp.policy import Policy
from idemp.ports import (
    Busy,
    Clock,
    Delivery,
    Done,
    Doubt,
    Event,
    EventLog,
    Free,
    Get,
    Parked,
    Publication,
    Query,
    Store,
    Transport,
)
from idemp.resolve import CONFIRM, MOST, QUIET
from idemp.tracking.tracker import body_of, unpack

SENDS = ("run", "doubt", "parked", "busy", "done")
"""Verdicts of what is sent; the others are left out."""
VERDICTS = (*SENDS, "expired", "confirm", "never", "unknown", "no body")
BACK = 120.0
"""Seconds to wait for what a killed process had: more than a broker leaves it that by itself."""
TOGETHER = 500
"""Keys, or messages, at a time."""
_TO, _KEY, _TOKEN, _PLAN, _FROM = (
    "x-replay-to",
    "x-replay-key",
    "x-replay-token",
    "x-replay-plan",
    "x-replay-from",
)
_OURS = ("x-death", "x-replay-")


class Item(NamedTuple):
    """One message for one receiver.  ``body`` is None where nobody kept it.

    tag: of its dead letter, which is taken out once it is staged.  published: seconds since 1970.
    """

    uuid: str
    type: str
    service: str
    key: str
    body: bytes | None
    properties: Properties
    published: float | None
    tag: int | None = None

    @property
    def queue(self) -> str:
        """Where it goes."""
        return f"{self.service}-queue"


class Planned(NamedTuple):
    """What becomes of an item.  ``token``: of the state that the store told."""

    item: Item
    verdict: str
    why: str
    token: int = 0


class Released(NamedTuple):
    """One that went to its receiver."""

    key: str
    service: str
    verdict: str
    token: int


class Desk:
    """A transport on which a replay takes and sends; what comes while it waits for a confirm is kept."""

    def __init__(self, transport: Transport, clock: Clock | None = None) -> None:
        self.transport, self.clock = transport, clock or Clock()
        self._came: deque[Delivery] = deque()

    def consume(self, queue: str, n: int) -> None:
        """Take from ``queue``, up to ``n`` at a time; what else came is left alone."""
        self.transport.consume(queue, n)
        self._came.clear()

    def take(self) -> list[Delivery]:
        """What came; [] when nothing more comes."""
        if not self._came:
            self._came.extend(each for each in self.transport.poll(QUIET) if isinstance(each, Delivery))
        taken, self._came = list(self._came), deque()
        return taken

    def send(self, publications: Sequence[Publication]) -> None:
        """Until all are confirmed.  Raises `Unroutable`, `TransportUnavailable`."""
        waiting = set(self.transport.send(publications))
        end = self.clock.steady() + CONFIRM
        while waiting:
            if self.clock.steady() > end:
                raise TransportUnavailable(f"{len(waiting)} messages were not confirmed within {CONFIRM:g} s")
            for event in self.transport.poll(QUIET):
                if isinstance(event, Delivery):
                    self._came.append(event)
                elif event.number in waiting:
                    if event.error:
                        raise (Unroutable if event.unroutable else TransportUnavailable)(event.error)
                    waiting.discard(event.number)

    def settle(self, tags: Sequence[int]) -> None:
        """They are done with, and the broker hears of it."""
        self.transport.ack(tags)
        self._came.extend(each for each in self.transport.poll(0.0) if isinstance(each, Delivery))


def new_id() -> str:
    """A replay's name."""
    return uuids.uuid4().hex[:12]


def staging(replay: str) -> str:
    """Its queue."""
    return f"idemp.replay.{replay}"


# ------------------------------------------------------------------ which messages


Names = Callable[[str, Message], str]
"""The key that a receiver has for a message."""
Handlers = Mapping[str, Mapping[str, Policy | None]]
"""Of services that are known: the policy of each type's handler, None where it runs at least once."""


def names_of(handlers: Handlers) -> Names:
    """Keys by the handlers themselves, or as the sample service names them: ``<service>.<type>/<id>``."""

    def name(service: str, message: Message) -> str:
        if service not in handlers:
            return f"{service}.{message.type}/{message.id}"
        policy = handlers[service].get(message.type)
        return "" if policy is None else policy.key((message,), {})

    return name


def from_events(log: EventLog, query: Query, to: Sequence[str], names: Names, *, most: int) -> list[Item]:
    """What the event log has: each message for those who received it, or for ``to``.

    Raises `ConfigError` if there are ``most`` events, or more.
    """
    found = log.find(query, limit=most, newest=False)
    if len(found) == most:
        raise ConfigError(f"these are {most} events or more; choose fewer, by --since and --until")
    events: dict[str, list[Event]] = {}
    for event in found:
        if event.uuid and event.kind not in ("note", "dropped"):
            events.setdefault(event.uuid, []).append(event)
    takers: dict[str, set[str]] = {}
    for edge in log.edges():
        if edge.service:
            takers.setdefault(edge.type, set()).add(edge.service)
    items = []
    for uuid, some in events.items():
        receivers, kept = set(to) or _receivers(some), _kept(some)
        told = some if receivers and kept else log.find(Query(uuid=uuid), limit=1000, newest=False)
        services = sorted(
            receivers or _receivers(told) or _addressed(told) or takers.get(some[0].type, set())
        )
        items += [_from_event(uuid, service, kept or _kept(told), some[0], names) for service in services]
    return items


def _receivers(events: Sequence[Event]) -> set[str]:
    return {each.service for each in events if each.role == "receiver"}


def _addressed(events: Sequence[Event]) -> set[str]:
    """Whose queue it was sent to, where it was sent to one."""
    return {each.queue.removesuffix("-queue") for each in events if each.kind == "sent" and each.queue}


def _kept(events: Sequence[Event]) -> Event | None:
    """Who has its body, the earliest first.  What came in conflict with it is another message's."""
    having = [each for each in events if each.body is not None and each.properties]
    good = [each for each in having if each.kind not in ("conflict", "rejected")]
    return next((each for each in (*good, *having) if each.kind != "conflict"), None)


def _from_event(uuid: str, service: str, kept: Event | None, event: Event, names: Names) -> Item:
    if kept is None or kept.body is None or kept.properties is None:
        return Item(uuid, event.type, service, "", None, Properties(), event.sent_at)
    properties, _, _ = unpack(kept)
    return item(body_of(kept.body), properties, service, names)


def item(body: bytes, properties: Properties, service: str, names: Names, tag: int | None = None) -> Item:
    """One message for one receiver; its key is "" where nobody can tell it."""
    stamp: object = properties.timestamp
    published = stamp if isinstance(stamp, int | float) else None
    try:
        message = decode(body, properties)
        return Item(
            message.id,
            message.type,
            service,
            names(service, message),
            body,
            properties,
            published,
            tag,
        )
    except BadMessage:
        identity, kind = properties.message_id or "", properties.type or ""
        return Item(identity, kind, service, "", body, properties, published, tag)


def from_dead(desk: Desk, queue: str) -> Iterator[Item]:
    """What is in ``<queue>.dead``, to where it came from.  It is everybody's again when it is not staged."""
    dead = f"{queue}.dead"
    left = min(desk.transport.depth(dead), MOST)
    if not left:
        return
    desk.consume(dead, left)
    while left > 0 and (came := desk.take()):
        for delivery in came:
            left -= 1
            yield _from_letter(delivery, queue)


def _from_letter(delivery: Delivery, queue: str) -> Item:
    headers = delivery.properties.headers
    service = str(headers.get("idemp-queue", queue)).removesuffix("-queue")
    key = str(headers.get("idemp-key", ""))
    made = item(delivery.body, delivery.properties, service, lambda *_: key, delivery.tag)
    return made if key else made._replace(key="")


# ------------------------------------------------------------------ the plan


def plan(
    items: Iterable[Item],
    stores: Callable[[str], Store],
    now: float,
    *,
    handlers: Handlers = MappingProxyType({}),
    force: bool = False,
    confirmed: bool = False,
) -> list[Planned]:
    """What would become of each, by the store of its receiver.  Twice the same item is one.

    stores: the dedup store of a service.  force: run again what may have been done and forgotten.
    """
    once = list({(each.service, each.key or each.uuid): each for each in items}.values())
    planned: list[Planned] = []
    for start in range(0, len(once), TOGETHER):
        some = once[start : start + TOGETHER]
        for service in dict.fromkeys(each.service for each in some):
            mine = [each for each in some if each.service == service]
            planned += _judged(mine, stores(service), now, handlers.get(service), force, confirmed)
    return planned


def _judged(
    items: Sequence[Item],
    store: Store,
    now: float,
    policies: Mapping[str, Policy | None] | None,
    force: bool,
    confirmed: bool,
) -> list[Planned]:
    asked = [each for each in items if each.key]
    states = dict(
        zip((each.key for each in asked), store.apply([Get(each.key) for each in asked]), strict=True)
    )
    kept = store.retention
    return [
        _barred(each, policies, confirmed) or _judge(each, states.get(each.key), now, kept, force)
        for each in items
    ]


def _barred(each: Item, policies: Mapping[str, Policy | None] | None, confirmed: bool) -> Planned | None:
    """What the handler itself refuses; see `idemp.policy.replay_refused`."""
    if each.body is None:
        return Planned(
            each, "no body", "nobody kept its body: record payloads, or replay the dead-letter queue"
        )
    if policies is None:
        return None
    policy = policies.get(each.type)
    if policy is not None and policy.replay == "never":
        return Planned(each, "never", f"{policy.name} has replay='never'")
    if not confirmed and (policy is None or policy.replay == "confirm"):
        name = f"{each.service}.{each.type}" if policy is None else policy.name
        return Planned(each, "confirm", f"{name} wants to be confirmed: --confirm")
    if policy is None:
        return Planned(
            each, "run", f"{each.service} has no @idempotent handler for {each.type}: it runs again"
        )
    return None


def _judge(each: Item, state: object, now: float, retention: float, force: bool) -> Planned:
    match state:
        case Done(token):
            return Planned(each, "done", "done already: it will be skipped", token)
        case Doubt(token, attempt):
            return Planned(
                each, "doubt", f"attempt {attempt} may have taken effect: its policy decides", token
            )
        case Parked(token, _, reason):
            return Planned(each, "parked", f"it is set free and will run: {reason}", token)
        case Busy(token):
            return Planned(each, "busy", "it is running just now", token)
        case Free(attempts):
            if each.published is None or now - each.published <= retention:
                return Planned(each, "run", f"it will run, {attempts} attempts so far")
            age = f"published {now - each.published:.0f} s ago, ids are kept for {retention:.0f} s"
            if force:
                return Planned(each, "run", f"forced: {age}")
            return Planned(each, "expired", f"it may have been done and forgotten: {age}")
    return Planned(each, "unknown", "nobody can tell its key")


def counts(planned: Sequence[Planned]) -> dict[str, Counter[str]]:
    """Receiver -> verdict -> how many."""
    found: dict[str, Counter[str]] = {}
    for each in planned:
        found.setdefault(each.item.service, Counter())[each.verdict] += 1
    return found


# ------------------------------------------------------------------ staged, released


class Mark(NamedTuple):
    """What a replayed message carries.  ``confirmed``: who said so, "" if nobody did.

    at: from when its age is counted, if it was not done then: before the stores were asked.
    """

    replay: str
    confirmed: str
    at: float
    origin: str = ""


def sends(planned: Sequence[Planned]) -> list[Planned]:
    """Those that are to be sent."""
    return [each for each in planned if each.verdict in SENDS and each.item.body is not None]


def stage(
    desk: Desk,
    planned: Sequence[Planned],
    mark: Mark,
    told: Callable[[int], None] = lambda _: None,
    *,
    safe: Callable[[Sequence[Planned]], None] = lambda _: None,
) -> int:
    """Copy what is to be sent into the replay's queue, confirmed; how many.

    safe: called with those whose copies are.  Only then a dead letter is taken out of its queue.  Raises
    `TransportUnavailable`.
    """
    chosen = sends(planned)
    desk.transport.declare(staging(mark.replay))
    for start in range(0, len(chosen), TOGETHER):
        some = chosen[start : start + TOGETHER]
        desk.send([_staged(each, mark) for each in some])
        safe(some)
        desk.settle([each.item.tag for each in some if each.item.tag is not None])
        told(len(some))
    return len(chosen)


def _staged(planned: Planned, mark: Mark) -> Publication:
    each = planned.item
    assert each.body is not None
    headers = {
        name: value
        for name, value in each.properties.headers.items()
        if not str(name).startswith(("idemp-", *_OURS))
    }
    headers |= {
        REPLAY: mark.replay,
        _TO: each.queue,
        _KEY: each.key,
        _TOKEN: str(planned.token),
        _PLAN: planned.verdict,
        _FROM: mark.origin,
        "idemp-retry": mark.replay,
    }
    if planned.verdict != "done":  # which may have expired when it comes: then it is as old as it is
        headers["idemp-retried-at"] = int(mark.at)
    if mark.confirmed:
        headers[CONFIRMED] = mark.confirmed
    properties = replace(each.properties, headers=headers)
    return Publication(each.body, properties, "", staging(mark.replay))


def release(
    desk: Desk,
    replay: str,
    *,
    rate: float = 0.0,
    free: Callable[[Sequence[Released]], None] = lambda _: None,
    goes_on: Callable[[], bool] = lambda: True,
    told: Callable[[Sequence[Released]], None] = lambda _: None,
) -> int:
    """Send what is staged to its receivers' queues, ``rate`` a second (0: as fast as it goes); how many.

    free: called with those that are parked before they go.  goes_on: asked before some go; what is left stays
    staged.  told: called with those that are safe.  Raises `Unroutable` if a receiver has no queue, and
    `TransportUnavailable`.
    """
    left = total = desk.transport.depth(staging(replay))
    if left:
        desk.consume(staging(replay), min(left, TOGETHER))
    together = max(1, min(TOGETHER, int(rate / 10))) if rate else TOGETHER
    due = desk.clock.steady()
    while left > 0 and (came := desk.take()):
        for start in range(0, len(came), together):
            if not goes_on():
                return total - left
            some = came[start : start + together]
            if rate:
                desk.clock.sleep(max(0.0, due - desk.clock.steady()))
                due = max(due, desk.clock.steady() - 1.0) + len(some) / rate
            ones = [_released(delivery) for delivery in some]
            if parked := [one for one in ones if one.verdict == "parked"]:
                free(parked)
            desk.send([_onward(delivery) for delivery in some])
            desk.settle([delivery.tag for delivery in some])
            left -= len(some)
            told(ones)
    return total - left


def _released(delivery: Delivery) -> Released:
    headers = delivery.properties.headers
    service = str(headers[_TO]).removesuffix("-queue")
    return Released(str(headers[_KEY]), service, str(headers[_PLAN]), int(headers[_TOKEN]))


def _onward(delivery: Delivery) -> Publication:
    properties = delivery.properties
    kept = {
        name: value
        for name, value in properties.headers.items()
        if not str(name).startswith("x-replay-") or name in (REPLAY, CONFIRMED)
    }
    return Publication(delivery.body, replace(properties, headers=kept), "", str(properties.headers[_TO]))


def given_back(desk: Desk, queue: str, patience: float = BACK) -> bool:
    """Wait until all that a killed process had of ``queue`` is ready again; whether it is."""
    end = desk.clock.steady() + patience
    while desk.transport.taken(queue):
        if desk.clock.steady() > end:
            return False
        desk.clock.sleep(QUIET)
    return True


def leave(desk: Desk, replay: str) -> None:
    """Take its queues away, where the broker can, if nothing is in them."""
    drop: Callable[[str], None] | None = getattr(desk.transport, "drop", None)
    if drop is not None:
        desk.transport.cancel()
        for queue in (staging(replay), f"{staging(replay)}.plan"):
            drop(queue)


def cancel(desk: Desk, replay: str) -> tuple[int, int]:
    """Empty the replay's queue: dead letters go back to theirs, copies go; (how many back, how many gone)."""
    left = desk.transport.depth(staging(replay))
    back = gone = 0
    if left:
        desk.consume(staging(replay), min(left, TOGETHER))
    while left > 0 and (came := desk.take()):
        for delivery in came:
            left -= 1
            if origin := str(delivery.properties.headers.get(_FROM, "")):
                desk.send([_returned(delivery, origin)])
                back += 1
            else:
                gone += 1
            desk.settle([delivery.tag])
    return back, gone


def _returned(delivery: Delivery, origin: str) -> Publication:
    """A dead letter as it was, as far as a replay needs it."""
    headers = delivery.properties.headers
    kept = {
        name: value for name, value in headers.items() if not str(name).startswith(("x-replay-", "idemp-"))
    }
    told = {
        "idemp-key": headers[_KEY],
        "idemp-queue": headers[_TO],
        "idemp-outcome": "parked",
        "idemp-reason": f"replay {headers[REPLAY]} was cancelled",
    }
    properties = replace(delivery.properties, headers={**kept, **told})
    return Publication(delivery.body, properties, "", origin)


# ------------------------------------------------------------------ what became of it


def outcome(one: Released, state: object) -> str:
    """``ok`` (it ran), ``skipped`` (it was done), or what it is: parked, in doubt, failed, waiting."""
    match state:
        case Done(token):
            return "skipped" if one.verdict == "done" and token == one.token else "ok"
        case Parked(token) | Doubt(token) if token == one.token:
            return "waiting"  # as it was before
        case Parked():
            return "parked"
        case Doubt():
            return "in doubt"
        case Free(attempts) if attempts:
            return "failed"
    return "waiting"
