"""The ports: what the heart asks of a store, a broker, a meter and a clock, and their laws.

Adapters live in `idemp.stores`, `idemp.transports` and `idemp.metrics`;
the suites in tests/contract/ hold every one of them to what these docstrings say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import starmap
from math import inf
from typing import Any, NamedTuple, Protocol, TypeVar, overload

from msgspec.structs import astuple

from idemp.message import Properties, Value

T = TypeVar("T")

# ------------------------------------------------------------------ the state of a key


class Claimed(Value, frozen=True, gc=False):
    """Mine now.  ``attempt`` counts from 1; ``token`` fences every later write."""

    token: int
    attempt: int


class Done(Value, frozen=True, gc=False):
    """The handler returned.  ``result`` is opaque; None means none was kept.  ``at``: since 1970.

    attempt: the one that was recorded; more than 1 tells of failures or doubts before it.
    """

    token: int
    result: bytes | None
    fingerprint: bytes | None
    at: float
    attempt: int = 1


class Busy(Value, frozen=True, gc=False):
    """Claimed by a live session."""

    token: int
    attempt: int
    session: str
    at: float


class Doubt(Value, frozen=True, gc=False):
    """Claimed by a dead session, or left in doubt by its holder: the effect may have happened."""

    token: int
    attempt: int
    session: str
    at: float


class Parked(Value, frozen=True, gc=False):
    """Set aside for a person."""

    token: int
    attempt: int
    reason: str
    at: float


class Free(Value, frozen=True, gc=False):
    """Nobody's.  ``attempts`` were made so far."""

    attempts: int = 0


State = Claimed | Done | Busy | Doubt | Parked | Free

# ------------------------------------------------------------------ operations and replies


class Claim(Value, frozen=True, gc=False):
    """Make a free key mine.  Reply: its state, `Claimed` if I won."""

    key: str


class Takeover(Value, frozen=True, gc=False):
    """Make a key in doubt, or parked, mine.  ``token``: the one seen.  Reply: its state."""

    key: str
    token: int


class Complete(Value, frozen=True, gc=False):
    """My claim's handler returned.  Reply: `Applied` or `Lost`.  Repeating it is harmless."""

    key: str
    token: int
    result: bytes | None = None
    fingerprint: bytes | None = None


class Release(Value, frozen=True, gc=False):
    """My claim goes free, remembering so many ``attempts``.  Reply: `Applied` or `Lost`."""

    key: str
    token: int
    attempts: int


class Abandon(Value, frozen=True, gc=False):
    """I cannot say what became of my claim: it is in doubt.  Reply: `Applied` or `Lost`.

    attempts: how many to remember; None counts this one.  One that took a doubt over and did not start
    leaves as many as there were.
    """

    key: str
    token: int
    attempts: int | None = None


class Park(Value, frozen=True, gc=False):
    """My claim is set aside for a person.  Reply: `Applied` or `Lost`."""

    key: str
    token: int
    reason: str


class Forget(Value, frozen=True, gc=False):
    """Drop a done or parked key, never a claim.  Reply: `Applied` or `Lost`."""

    key: str
    token: int


class Get(Value, frozen=True, gc=False):
    """Look only, at what holds now and not at what was heard before.

    Reply: its state, `Busy` also for my own claims.
    """

    key: str


Op = Claim | Takeover | Complete | Release | Abandon | Park | Forget | Get


class Applied(Value, frozen=True, gc=False):
    """The token was current and the change is durable."""


class Lost(Value, frozen=True, gc=False):
    """The token was not current; nothing changed.  ``now``: the key's state."""

    now: State


Reply = State | Applied | Lost

# ------------------------------------------------------------------ the store


class Progress(NamedTuple):
    """How far something is: ``done`` of ``total``, in whatever it counts."""

    done: int
    total: int


class Store(Protocol):
    """Remembers keys.  Safe to use from many threads; a forked child opens its own session.

    Where a driver does not survive a fork after its first use, the child is told by `ConfigError`.

    1. Of any number of simultaneous claims of a key exactly one wins.
    2. After `Complete`, every `Claim` answers `Done` with the same bytes, and is never given the key; a
       replica that has not heard yet may call it `Busy` for a moment longer.
    3. After `Release` the key is free, and its attempts count on.
    4. Tokens of a key only grow; a claim has one of its own, and so has a parking.
    5. An operation that names a token which is not current answers `Lost` and changes nothing.
    6. A dead session's claims are `Doubt` to everybody, after restarts too.
    7. Of any number of takers of a doubt exactly one wins.
    8. `Done` lasts for the retention, then goes; space is bounded by rate times retention.
    9. `apply` takes any mix of operations, also on one key, in one round trip.
    10. An ambiguous reply (time-out, lost connection) is resolved inside, never guessed.
    11. A store holds no policy.
    12. After `close` every call raises `Closed`.

    Nothing connects before the first call.
    """

    @property
    def retention(self) -> float:
        """Seconds that done is remembered; the longest that any opener named."""
        ...

    def apply(self, ops: Sequence[Op]) -> list[Reply]:
        """Apply ``ops`` in order, all durable together; one reply each.

        Raises `StoreUnavailable` if the store does not answer in time: then no claim of this
        batch is held, and a completion in it may be repeated.
        """
        ...

    def recall(self, key: str, since: float = inf) -> Done | None:
        """The answer that a `Claim` would get, if this process's memory is sure that ``key`` is done.

        Asks nobody else and does not wait.  None: ask with `apply`.  since: steady seconds; an answer
        will do that held then or later, so that one look may serve all messages that came before it.
        """
        ...

    def wait(self, key: str, token: int, timeout: float) -> None:
        """Return when ``key`` is no longer busy with ``token``, after ``timeout`` seconds at the latest."""
        ...

    def fresh(self, token: int = 0) -> bool:
        """Whether the session was confirmed less than two thirds of its time to live ago.

        Asked right before a handler's first instruction: false means do not start it.  ``token``: of
        the handler's claim, which must not be of an earlier session.
        """
        ...

    def scan(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> list[tuple[str, State]]:
        """Up to ``limit`` keys that start with ``prefix``, in order, from the first one > ``after``."""
        ...

    def progress(self) -> Progress | None:
        """From any thread, also while another waits in a call: how far it is with reading what it remembers.

        None: it is not reading, or it does not know.  Connects to nothing.
        """
        ...

    def size(self) -> int:
        """About how many keys there are, for who reads them all; 0 if nobody knows."""
        ...

    def close(self) -> None:
        """End the session; claims it still holds are in doubt."""
        ...


class Letter(NamedTuple):
    """What waits in an outbox.  Of one ``key`` they go out by ``number``.  ``at``: seconds since 1970."""

    number: int
    key: str
    at: float
    publication: Publication


class Backlog(NamedTuple):
    """Of an outbox.  ``age``: seconds for which the oldest letter has waited."""

    letters: int
    age: float


class Transaction(Protocol):
    """An open transaction of a database that has a store in it, used by one thread.

    What is applied in it and what is done on ``connection`` commit together or not at all.
    """

    @property
    def connection(self) -> Any:
        """The driver's own connection.  Whoever gets it must not end the transaction."""
        ...

    def apply(self, ops: Sequence[Op]) -> list[Reply]:
        """Hold the keys of ``ops`` until the end, and apply them in order; one reply each.

        Whoever else claims such a key waits for the end.  Raises `KeyBusy` if another transaction
        holds one of them for longer than was to be waited.
        """
        ...

    def keep(self) -> None:
        """What was done since the last `keep` or `undo` is not undone any more.

        Raises `PermanentFailure` if the transaction was ended by somebody.
        """
        ...

    def put(self, key: str, publications: Sequence[Publication]) -> None:
        """Into the outbox, behind what is there, once this commits.  ``key``: of the call that publishes."""
        ...

    def undo(self, error: BaseException) -> bool:
        """Go back to the last `keep`.  False: ``error`` ended the whole transaction, so let it rise."""
        ...


class Inbox(Store, Protocol):
    """A store in a database that handlers can write to as well."""

    @property
    def transactions(self) -> int:
        """How many may be open side by side."""
        ...

    def transaction(self, work: Callable[[Transaction], T], wait: float, *, divisible: bool = False) -> T:
        """Call ``work`` in a transaction and commit; what it returned.

        Called again, in a new transaction, when the server rolled this one back, when the connection was
        lost, and when it is not known whether it committed: what ``work`` claims first tells.
        ``wait``: seconds for keys that another transaction holds.  ``divisible``: the caller would do less
        in one rather than all again where others wait for the same rows, and raises `Contended` for that.
        Raises `StoreUnavailable` if it does not get through in time; what ``work`` raises; and what the
        driver says if the commit is refused for what was done in it.  After any of these but
        `StoreUnavailable` nothing of it happened.
        """
        ...

    def letters(self, limit: int, after: int = 0) -> list[Letter]:
        """The oldest that wait in the outbox, in order.  ``after``: of those with a greater number."""
        ...

    def sent(self, numbers: Sequence[int]) -> None:
        """Take these letters out of the outbox; one that is not there is ignored."""
        ...

    def backlog(self) -> Backlog:
        """How much waits in the outbox."""
        ...


# ------------------------------------------------------------------ the broker


class Publication(NamedTuple):
    """A message to send.  Exchange ``""`` sends straight to the queue named ``routing_key``.

    delay: seconds that it is held back first; only with exchange ``""``.
    """

    body: bytes
    properties: Properties
    exchange: str
    routing_key: str
    delay: float = 0.0


class Delivery(Value, frozen=True, gc=False):
    """A message that came.  ``tag`` names it until it is acknowledged or the connection ends."""

    tag: int
    body: bytes
    properties: Properties
    exchange: str
    routing_key: str
    redelivered: bool


class Sent(Value, frozen=True, gc=False):
    """The broker's word on publication ``number``.  ``error`` is "" when it is safe in a queue.

    unroutable: no queue takes it, so sending it again would not help.
    unfit: because the broker cannot carry it as it is; another queue would not help either.
    """

    number: int
    error: str
    unroutable: bool = False
    unfit: bool = False


class Transport(Protocol):
    """A connection to a broker, used by one thread; only `wake` may be called from others.

    1. A delivery that is not acknowledged comes again, after the consumer's end or connection's.
    2. An acknowledged delivery never comes again; a stale tag is ignored.
    3. At most ``prefetch`` deliveries are out at a time.
    4. A publication is confirmed (`Sent` with no error) only once it is in a queue, durably;
       one that no queue takes is `Sent` with an error.
    5. Each queue bound to an exchange gets each matching message; they wait while nobody consumes.
    6. A delayed publication comes not before its delay.
    7. Every call but `close` raises `TransportUnavailable` when the connection is lost; `connect` makes a
       new one, and deliveries and unconfirmed publications of the old one are forgotten.
    8. After `close` every call raises `Closed`, except `wake` and `close`, which do nothing.

    Nothing connects before `connect`, which the other calls make by themselves the first time; a forked
    child makes its own, or is told by `ConfigError` that it cannot.
    """

    def connect(self) -> None:
        """Connect anew, ending what was there."""
        ...

    def declare(
        self,
        queue: str,
        exchange: str = "",
        binding: str = "#",
        *,
        kind: str = "topic",
        expires: float | None = None,
    ) -> None:
        """Make ``queue`` (durable) and, if named, ``exchange``, and bind them.

        kind: ``topic``, or ``direct``; an embedded broker has topics only, which do the same for a
        binding without wildcards.  expires: seconds without a consumer after which the queue may go.
        """
        ...

    def consume(self, queue: str, prefetch: int, *, name: str = "") -> None:
        """Start deliveries from ``queue``, at most ``prefetch`` unacknowledged at a time.

        name: of the consumer, where a broker shows one.
        """
        ...

    def cancel(self) -> None:
        """Stop new deliveries; those out stay mine."""
        ...

    def poll(self, timeout: float) -> list[Delivery | Sent]:
        """What came, waiting up to ``timeout`` seconds for the first; [] after a `wake`."""
        ...

    def ack(self, tags: Iterable[int]) -> None:
        """Acknowledge deliveries, in as few commands as the broker allows."""
        ...

    def send(self, publications: Sequence[Publication]) -> list[int]:
        """Start publishing; the numbers that the `Sent` events will carry."""
        ...

    def depth(self, queue: str) -> int:
        """Messages in ``queue`` that are ready for delivery; 0 if there is no such queue."""
        ...

    def taken(self, queue: str) -> bool:
        """Whether messages of ``queue`` may be out: delivered, and neither acknowledged nor given back."""
        ...

    def wake(self) -> None:
        """From any thread: let `poll` return."""
        ...

    def close(self) -> None:
        """Let go; what was not acknowledged comes again elsewhere."""
        ...


# ------------------------------------------------------------------ who keeps the tally


class Ran(NamedTuple):
    """A message took effect: its handler returned, or its effect was found.

    at: when it was published, in seconds since 1970; None if it does not say.  unsure: it may have taken
    effect once more, in an attempt whose end nobody saw.  found: by a resolver, or done when the message
    came again, so whoever made it happen may have counted it.
    """

    type: str
    id: str
    at: float | None
    unsure: bool = False
    found: bool = False


class Tallier(Protocol):
    """Keeps the tally of what took effect, for an audit."""

    def start(self, service: str) -> None:
        """Before the first message.  Raises `ConfigError` or `StoreUnavailable`."""
        ...

    def ran(self, runs: Sequence[Ran]) -> None:
        """These are counted, and a kill does not undo it.  Before they are recorded as done.

        Raises `StoreUnavailable`; then none of them is counted.
        """
        ...

    def stop(self) -> None:
        """After the last message."""
        ...


# ------------------------------------------------------------------ the event log


class Event(Value, frozen=True, gc=False, array_like=True):
    """One step of a message's life, as the service that made it saw it.  Times: seconds since 1970.

    kind: ``sent``, ``started`` (a handler that is taking its time), an outcome of `OUTCOMES`, ``note`` (said
    by hand; ``why`` says it), or ``dropped`` (``attempt`` events of ``service`` were not recorded).
    uuid: the message's id.  parent: of the message whose handler published it.  conversation: the id of
    the first message of all.  role: ``sender`` or ``receiver``; "" where nobody recorded it.
    at: when it happened; of an outcome with ``took``, when the handler began.  sent_at: by the sender's
    clock.  took: seconds that the handler ran.  body: of the message, as text; ``base64:...`` if it is none.
    """

    uuid: str
    kind: str
    service: str
    at: float
    role: str = ""
    parent: str = ""
    conversation: str = ""
    sender: str = ""
    type: str = ""
    queue: str = ""
    sent_at: float | None = None
    took: float | None = None
    attempt: int = 0
    why: str = ""
    key: str = ""
    replay: str = ""
    business: str = ""
    body: str | None = None
    properties: str | None = None


_FIELDS = Event.__struct_fields__


class Events(Sequence[Event]):
    """Events as one list of the fields of all, in order: for many that hardly anybody looks at singly."""

    __slots__ = ("fields",)

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.fields: list[Any] = []
        self.extend(events)

    def extend(self, events: Iterable[Event]) -> None:
        """Put ``events`` at the end."""
        if isinstance(events, Events):
            self.fields += events.fields
        else:
            for event in events:
                self.fields += astuple(event)

    def column(self, name: str) -> list[Any]:
        """One field of all."""
        return self.fields[_FIELDS.index(name) :: len(_FIELDS)]

    def __len__(self) -> int:
        return len(self.fields) // len(_FIELDS)

    def __iter__(self) -> Iterator[Event]:
        return starmap(Event, zip(*[iter(self.fields)] * len(_FIELDS), strict=True))

    @overload
    def __getitem__(self, place: int) -> Event: ...
    @overload
    def __getitem__(self, place: slice) -> list[Event]: ...
    def __getitem__(self, place: int | slice) -> Event | list[Event]:
        return list(self)[place]


class Batch(NamedTuple):
    """What one writer hands over together.  ``writer`` and ``number`` name it for ever."""

    writer: str
    number: int
    events: Sequence[Event]


class Query(Value, frozen=True, gc=False):
    """Which events; "" and None ask for nothing.  ``since`` and ``until``: seconds since 1970."""

    uuid: str = ""
    conversation: str = ""
    service: str = ""
    type: str = ""
    kinds: tuple[str, ...] = ()
    business: str = ""
    since: float | None = None
    until: float | None = None


class Edge(NamedTuple):
    """What went from ``sender`` to ``service``: ``n`` events of a ``kind``.

    seconds, longest: of their handlers.  first, last: the minutes that they fell in, seconds since 1970.
    """

    sender: str
    service: str
    type: str
    kind: str
    n: int
    seconds: float
    longest: float
    first: float
    last: float


class EventLog(Protocol):
    """Keeps events for look-ups.  Safe to use from many threads.  Nobody's effect depends on it.

    1. `append` of a batch that is there already changes nothing: who did not hear sends it again.
    2. What is older than the retention, or more than the rows, goes; the newest stays.
    3. Nothing connects before the first call.
    """

    @property
    def payloads(self) -> bool:
        """Whether bodies are to be recorded too, for a replay."""
        ...

    @property
    def business(self) -> str:
        """Where in the ``args`` of a message its business key stands, like ``order.id``; "": nowhere."""
        ...

    def append(self, batch: Batch) -> None:
        """Keep ``batch``.  Raises `StoreUnavailable`: it may be kept or not, and is to be sent again."""
        ...

    def find(self, query: Query, *, limit: int, newest: bool = True) -> list[Event]:
        """Up to ``limit`` events, the newest or the oldest first."""
        ...

    def story(self, uuid: str, *, limit: int) -> list[Event]:
        """All events of the conversation that the message, or conversation, ``uuid`` belongs to."""
        ...

    def edges(self, since: float | None = None, until: float | None = None) -> list[Edge]:
        """Who sent to whom, in whole minutes."""
        ...

    def unanswered(self, service: str, type: str, since: float, until: float, *, limit: int) -> list[Event]:
        """``sent`` events of a type of which ``service`` recorded nothing at all, the oldest first."""
        ...

    def prune(self, now: float) -> int:
        """Let go of what is too old or too much; how many events went."""
        ...

    def close(self) -> None:
        """Let go."""
        ...


# ------------------------------------------------------------------ a log that is read by position


class LogEntry(NamedTuple):
    """One entry of a log.  ``position``: behind it the next one is read."""

    position: str
    body: bytes
    properties: Properties


class Log(Protocol):
    """A log that is read from any place, as often as one likes, by whoever remembers where he stands.

    Used by one thread.  Raises `TransportUnavailable` when its server does not answer; the next call
    tries anew.  After `close` every call raises `Closed`.
    """

    def read(self, after: str, most: int, wait: float) -> list[LogEntry]:
        """Up to ``most`` entries behind ``after`` ("": from the first), waiting ``wait`` seconds for one."""
        ...

    def behind(self, a: str, b: str) -> bool:
        """Whether ``a`` is behind ``b``: that is, whether who stands at ``a`` has read more."""
        ...

    def end(self) -> str:
        """The position of the newest entry; "" while there is none."""
        ...

    def tell(self, reader: str, position: str) -> None:
        """Let whoever trims the log know up to where ``reader`` has read."""
        ...

    def close(self) -> None:
        """Let go."""
        ...


# ------------------------------------------------------------------ meter and clock


OUTCOMES = ("ok", "skipped", "failed", "deferred", "parked", "lost", "conflict", "rejected")
"""Of one delivery, as they are counted."""
TIMERS = ("claim", "complete", "handler")
"""What is timed."""


class Meter(Protocol):
    """Counts and times.  Never raises, never blocks."""

    def count(self, name: str, n: int = 1) -> None:
        """Add ``n`` to a counter; 0 makes it exist."""
        ...

    def time(self, name: str, seconds: float) -> None:
        """One observation of a duration."""
        ...

    def level(self, name: str, value: float) -> None:
        """How much of something there is now."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class NoMeter:
    """Counts nothing."""

    def count(self, name: str, n: int = 1) -> None:
        """See `Meter`."""

    def time(self, name: str, seconds: float) -> None:
        """See `Meter`."""

    def level(self, name: str, value: float) -> None:
        """See `Meter`."""

    def close(self) -> None:
        """See `Meter`."""


def boottime() -> float:
    """Seconds that go on through a suspend and never jump; the same for all processes of a host."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(frozen=True, slots=True)
class Clock:
    """Time as a parameter.  ``wall``: seconds since 1970; ``steady``: seconds that never jump."""

    wall: Any = time.time
    steady: Any = boottime
    sleep: Any = time.sleep
