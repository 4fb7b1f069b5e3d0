"""Redis Streams: a queue is a stream and a consumer group, a connection one of its consumers.

`ack` and `send` only collect: each `poll` is one call of one script (redis_streams.lua) that acknowledges
(XACK, and XDEL: what is acknowledged takes no room), publishes and takes (XREADGROUP).  While there is
nothing to take, a second connection waits in a blocking XREAD, which only tells that there is something.

What a consumer took stays its own as long as it polls.  When nothing was heard of it for the idle time,
others take it (XAUTOCLAIM); whether a handler's effect has happened says the store, never that time.

A queue may follow streams that are shared with other programs (`?stream=event-stream`): such a stream is an
exchange, read by a group of the queue's name, with entries as in shared_stream.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import select
import socket
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from idemp.errors import Closed, ConfigError, IdempError, MissingExtra, TransportUnavailable
from idemp.message import Properties
from idemp.ports import Clock, Delivery, Publication, Sent
from idemp.redis_server import Met, Server, explain
from idemp.transports import shared_stream
from idemp.transports.envelope import describe, read
from idemp.transports.topic import matches, no_queue

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.exceptions import NoScriptError, RedisError
    from redis.retry import Retry
except ImportError:
    raise MissingExtra("redis://", "redis") from None

log = logging.getLogger(__name__)

TIMEOUT = 10.0
"""Seconds for one answer."""
_LOOK = 0.01  # seconds between two looks while the caller has other things to do
_TRIM = 1.0  # seconds between two trims of what is shared
_MOST = 16 * 1024 * 1024  # bytes in one call, or a single message that is bigger
_SCRIPT = Path(__file__).with_name("redis_streams.lua").read_text()
_NAME = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()
_READABLE = "idemp-"


class Waiting(NamedTuple):
    """Of a queue: messages that are ready, out with consumers, delayed; and how many consumers live."""

    ready: int
    out: int
    delayed: int
    consumers: int


class RedisStreamsTransport:
    """The broker in the namespace ``at``.

    idle: seconds after the last `poll` of a consumer when others get what it has not acknowledged.
    shared: streams that other programs write and read too; each is an exchange here.
    keep: entries that these keep at least; older ones that everybody has read go.  None: nothing goes.
    """

    def __init__(
        self,
        at: Server,
        *,
        idle: float = 30.0,
        shared: Sequence[str] = (),
        keep: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._met, self._idle, self.shared, self.keep = Met(at), idle, tuple(shared), keep
        self._clock = clock or Clock()
        self._link: _Link | None = None
        self._inherited: list[_Link] = []
        self._owed: list[tuple[str, str, str]] = []  # consumers of mine that could not give back
        self._tags = count(1)
        self._numbers = count(1)
        self._closed = False
        self._woken = False
        self.claimed = 0
        """Messages that were taken over from consumers that are gone."""

    def connect(self) -> None:
        """Connect anew; what was taken and not acknowledged is anybody's."""
        if self._closed:
            raise Closed("this transport was closed")
        self._end()
        link = _Link(self._met, self._idle, self.shared, self.keep, self._clock, self._tags)
        try:
            link.open()
            link.give_back(self._owed)
        except IdempError:
            link.hang_up()
            raise
        self._owed = []
        self._link = link

    def _end(self) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        if link.pid == os.getpid():
            self._owed += link.end()
        else:
            # A fork's copy of its parent's connection: to end it would end the parent's.
            self._inherited.append(link)

    def _connected(self) -> _Link:
        if self._closed or self._link is None or self._link.pid != os.getpid():
            if self._link is not None and self._link.pid != os.getpid():
                self._owed = []
            self.connect()
        assert self._link is not None
        self._link.check()
        return self._link

    def declare(
        self,
        queue: str,
        exchange: str = "",
        binding: str = "#",
        *,
        kind: str = "topic",
        expires: float | None = None,
    ) -> None:
        """Make ``queue`` and bind it; a shared stream is read from its first entry on.

        expires: is not used; a stream stays.
        """
        self._connected().declare(queue, exchange, binding)

    def consume(self, queue: str, prefetch: int, *, name: str = "") -> None:
        """Start deliveries from ``queue``; they end from the one before.

        name: is not used: a consumer that was killed must not have the name of the next.
        """
        self._connected().consume(queue, prefetch)

    def cancel(self) -> None:
        """Stop new deliveries."""
        self._connected().prefetch = 0

    def poll(self, timeout: float) -> list[Delivery | Sent]:
        """Acknowledge, publish, and what came."""
        link = self._connected()
        came = link.poll(timeout, lambda: self._woken)
        self.claimed += link.claimed
        link.claimed = 0
        self._woken = False
        return came

    def ack(self, tags: Iterable[int]) -> None:
        """Acknowledge with the next `poll`, or `close`."""
        self._connected().ack(tags)

    def send(self, publications: Sequence[Publication]) -> list[int]:
        """Publish with the next `poll`, or `close`."""
        if any(each.delay and each.exchange for each in publications):
            raise ConfigError('a publication with a delay needs exchange ""')
        link = self._connected()
        numbers = [next(self._numbers) for _ in publications]
        link.unsent.extend(zip(numbers, publications, strict=True))
        return numbers

    def depth(self, queue: str) -> int:
        """Messages in ``queue`` that are ready for delivery."""
        found = self.look(queue)
        return found.ready if found else 0

    def taken(self, queue: str) -> bool:
        """Whether messages of ``queue`` are out with consumers that live, or did in the last idle time."""
        found = self.look(queue)
        return found is not None and found.out > 0

    def look(self, queue: str) -> Waiting | None:
        """What waits in ``queue``, with the lag of the streams that it follows; None if there is none."""
        return self._connected().look(queue)

    def oldest(self, queue: str) -> float | None:
        """When the first message that is in ``queue`` was published, in seconds since 1970, if it says so."""
        return self._connected().oldest(queue)

    def levels(self, queue: str) -> dict[str, float]:
        """`look` as gauges: ``ready`` is the lag, ``out`` what is pending."""
        found = self.look(queue)
        return {name: float(value) for name, value in found._asdict().items()} if found else {}

    def readers(self, stream: str) -> tuple[int, list[tuple[str, str]]]:
        """How many entries a shared stream has; its groups and readers, and up to where each has read."""
        length, *flat = self._connected().readers(stream)
        texts = [text.decode(errors="backslashreplace") for text in flat]
        return int(length), list(zip(texts[::2], texts[1::2], strict=True))

    def wake(self) -> None:
        """From any thread; free until the next `poll` has returned."""
        if not self._woken:
            self._woken = True
            link = self._link
            if link is not None and link.pid == os.getpid():
                link.ring()

    def close(self) -> None:
        """Let go, when what was acknowledged and sent is safe."""
        self._closed = True
        self._end()


class _Topology(NamedTuple):
    """Who gets what, as it stood at ``version``."""

    version: bytes = b""
    queues: frozenset[str] = frozenset()
    bindings: Mapping[str, Sequence[tuple[str, str]]] = {}
    followed: Mapping[str, Sequence[str]] = {}

    def takers(self, publication: Publication) -> set[str]:
        """The queues that take it."""
        if not publication.exchange:
            return {publication.routing_key} & self.queues
        bound = self.bindings.get(publication.exchange, ())
        return {queue for pattern, queue in bound if matches(pattern, publication.routing_key)}


def _topology(answer: Sequence[Any]) -> _Topology:
    _, version, queues, bindings, shared = answer
    bound: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for exchange, pattern, queue in map(json.loads, bindings):
        bound[exchange].append((pattern, queue))
    followed: dict[str, list[str]] = defaultdict(list)
    for stream, queue in sorted(map(json.loads, shared)):
        followed[queue].append(stream)
    return _Topology(version, frozenset(queue.decode() for queue in queues), bound, followed)


class _Source(NamedTuple):
    """A stream that is read by a group.  shared: an acknowledgement deletes nothing there."""

    key: str
    group: str
    shared: bool


class _Link:
    """One process's connection to the server, and what it holds of it."""

    def __init__(
        self,
        met: Met,
        idle: float,
        shared: tuple[str, ...],
        keep: int | None,
        clock: Clock,
        tags: Iterator[int],
    ) -> None:
        self.pid = os.getpid()
        self.unsent: list[tuple[int, Publication]] = []
        self.prefetch = 0
        self.claimed = 0
        self._at, self._idle, self._shared, self._keep = met.at, idle, shared, keep
        self._clock, self._tags = clock, tags
        self._me = f"{socket.gethostname()}-{self.pid}-{uuid.uuid4().hex[:12]}"
        self._lost: IdempError | None = None
        self._line = connection(met)
        self._bell = connection(met)
        self._listening: tuple[str, ...] = ()  # the streams of the XREAD that is under way
        self._ring, self._rung = socket.socketpair()
        self._queue = ""
        self._followed: list[str] = []
        self._sources: list[_Source] = []  # of the queue: its own stream, then those it follows
        self._consumed: set[_Source] = set()  # all that have me as a consumer
        self._topology = _Topology()
        self._out: dict[int, tuple[_Source, bytes]] = {}
        self._settled: dict[_Source, list[bytes]] = defaultdict(list)
        self._sent: list[Sent] = []
        self._behind: list[bytes] = []
        self._look_at = self._trim_at = 0.0
        self._renew_at = float("inf")
        self._due = float("inf")

    # ---------------------------------------------------------------- life

    def open(self) -> None:
        """Connect.  Raises `ConfigError` or `TransportUnavailable`."""
        for blocking in (self._ring, self._rung):
            blocking.setblocking(False)
        try:
            self._line.connect()
        except RedisError as error:
            raise explain(self._at, error, TransportUnavailable) from None

    def check(self) -> None:
        """Raise what the connection was lost by."""
        if self._lost is not None:
            raise type(self._lost)(str(self._lost))  # another each time: a traceback grows

    def _lose(self, error: RedisError) -> IdempError:
        self._lost = self._lost or explain(self._at, error, TransportUnavailable)
        return self._lost

    def hang_up(self) -> None:
        """Without a word."""
        for end in (self._line.disconnect, self._bell.disconnect, self._ring.close, self._rung.close):
            end()

    def end(self) -> list[tuple[str, str, str]]:
        """Say what is to be said and give back the rest; the consumers that could not be let go."""
        mine = [(source.key, source.group, self._me) for source in self._consumed]
        try:
            if self._lost is None:
                if self._settled or self.unsent:
                    self.prefetch = 0
                    self._exchange()
                self.give_back(mine)
                mine = []
        except IdempError as error:
            log.warning("closing: %s", error)
        finally:
            self.hang_up()
        return mine

    def give_back(self, consumers: Sequence[tuple[str, str, str]]) -> None:
        """Streams, groups and names of consumers that are no more."""
        if consumers:
            self._call("leave", len(consumers), *(word for each in consumers for word in each))

    def ring(self) -> None:
        """From any thread: let `poll` look again."""
        try:
            self._ring.send(b".")
        except OSError:
            log.debug("the bell is full, or gone")

    def _call(self, *words: Any) -> Any:
        """The script's answer."""
        self.check()
        try:
            try:
                return self._ask("EVALSHA", _NAME, *words)
            except NoScriptError:
                return self._ask("EVAL", _SCRIPT, *words)
        except RedisError as error:
            raise self._lose(error) from None
        except UnicodeEncodeError as error:
            raise ConfigError(f"{error.object!r} is not valid Unicode") from None

    def _ask(self, command: str, script: str, *words: Any) -> Any:
        self._line.send_command(command, script, 1, self._at.prefix, *words)
        return self._line.read_response()

    # ---------------------------------------------------------------- queues

    def _own(self, queue: str) -> str:
        return f"{self._at.prefix}queue:{queue}"

    def declare(self, queue: str, exchange: str, binding: str) -> None:
        """Every connection learns of it with what it publishes next."""
        kind, kept = "", ""
        if exchange in self._shared:
            if binding != "#":
                raise ConfigError(f"{exchange!r} is a shared stream without routing keys; bind it with '#'")
            kind, kept = "shared", json.dumps([exchange, queue])
        elif exchange:
            kind, kept = "exchange", json.dumps([exchange, binding, queue])
        self._topology = _topology(self._call("declare", queue, kind, exchange, kept))

    def look(self, queue: str) -> Waiting | None:
        """Behind what was acknowledged and sent."""
        if self._settled or self.unsent:
            prefetch, self.prefetch = self.prefetch, 0
            self._exchange()
            self.prefetch = prefetch
        streams = self._streams(queue)
        answer = self._call("look", queue, int(self._idle * 1000), len(streams), *streams)
        return Waiting(*map(int, answer[1:])) if answer[0] == b"ok" else None

    def oldest(self, queue: str) -> float | None:
        """Of its own stream; what is acknowledged is in it no more."""
        self.check()
        try:
            self._line.send_command("XRANGE", self._own(queue), "-", "+", "COUNT", 1)
            entries = self._line.read_response()
        except RedisError as error:
            raise self._lose(error) from None
        if not entries:
            return None
        id, fields = entries[0]
        try:
            return read(dict(zip(fields[::2], fields[1::2], strict=True))[b"envelope"])[0].timestamp
        except Exception:  # somebody else wrote it, at this time
            return float(id.split(b"-")[0]) / 1000

    def readers(self, stream: str) -> Any:
        """The length, then names and positions."""
        return self._call("readers", stream)

    def _streams(self, queue: str) -> Sequence[str]:
        self._topology = _topology(self._call("topology"))
        return self._topology.followed.get(queue, ())

    # ---------------------------------------------------------------- consuming

    def consume(self, queue: str, prefetch: int) -> None:
        """From now on `poll` takes what is in ``queue``."""
        streams = self._streams(queue)
        if queue not in self._topology.queues:
            missing = TransportUnavailable(f"{self._at.shown}: {no_queue('', queue)}")
            self._lost = self._lost or missing
            raise missing
        self._queue, self._followed, self.prefetch = queue, list(streams), prefetch
        self._sources = [
            _Source(self._own(queue), queue, False),
            *(_Source(stream, queue, True) for stream in streams),
        ]
        self._consumed.update(self._sources)
        self._behind = []
        self._look_at = self._renew_at = 0.0

    def ack(self, tags: Iterable[int]) -> None:
        """Tags of other connections are not out here."""
        for tag in tags:
            if (found := self._out.pop(tag, None)) is not None:
                self._settled[found[0]].append(found[1])

    def poll(self, timeout: float, woken: Callable[[], bool]) -> list[Delivery | Sent]:
        """What came."""
        until = self._clock.steady() + timeout
        while True:
            taken = self._exchange() if self._has_work() else []
            now = self._clock.steady()
            if taken or self._sent or woken() or now >= until:
                sent, self._sent = self._sent, []
                return [*sent, *taken]
            due = self._due if self._room() > 0 else until
            self._wait(min(until, due, self._renew_at) - now)

    def _has_work(self) -> bool:
        now = self._clock.steady()
        if self._settled or self.unsent or now >= self._renew_at:
            return True
        return self._room() > 0 and now >= self._look_at

    def _room(self) -> int:
        return self.prefetch - len(self._out)

    def _wait(self, seconds: float) -> None:
        """Until something may have come, or `ring`."""
        bell = self._listen() if self._room() > 0 and self._behind else None
        waits = [self._rung] if bell is None else [self._rung, bell]
        looker = select.poll()  # select() itself takes no descriptor above 1023
        for each in waits:
            looker.register(each, select.POLLIN)
        readable = {descriptor for descriptor, _ in looker.poll(max(0.0, seconds) * 1000)}
        if self._rung.fileno() in readable:
            self._drain()
        if bell is not None and bell.fileno() in readable:
            self._heard()
        self._look_at = 0.0

    def _drain(self) -> None:
        try:
            self._rung.recv(4096)
        except BlockingIOError:
            return

    def _listen(self) -> Any:
        """Ask to be told of entries behind what the group has got, unless that is asked already: a socket."""
        streams = (self._own(self._queue), *self._followed)
        try:
            if self._listening not in ((), streams):
                self._bell.disconnect()
                self._listening = ()
            if not self._listening:
                self._bell.connect()
                words = ("XREAD", "COUNT", 1, "BLOCK", 0, "STREAMS", *streams, *self._behind)
                self._bell.send_command(*words)
                self._listening = streams
        except RedisError as error:
            raise self._lose(error) from None
        return self._bell._sock  # there is no public way to wait for two things

    def _heard(self) -> None:
        try:
            self._bell.read_response()
            self._listening = ()
        except RedisError as error:
            raise self._lose(error) from None

    # ---------------------------------------------------------------- one turn

    def _exchange(self) -> list[Delivery]:
        """Settle, publish, take: one call, or several for what is very big."""
        while True:
            words, numbers = self._publications()
            more = bool(self.unsent)
            answer = self._turn(words, room=0 if more else self._room())
            if answer[0] == b"topology":
                self._topology = _topology(answer)
                self.unsent[:0] = numbers
                continue
            self._settled.clear()
            self._sent += [Sent(number, "") for number, _ in numbers]
            if not more:
                return self._taken(answer)

    def _turn(self, publications: Sequence[Sequence[Any]], room: int) -> Any:
        now = self._clock.steady()
        idle = 0
        if self._queue and (now >= self._renew_at or self._trims(now)):
            idle = int(self._idle * 1000)
            self._renew_at, self._trim_at = now + self._idle / 3, now + _TRIM
        settled = [
            (source.key, source.group, "" if source.shared else "gone", b" ".join(ids))
            for source, ids in self._settled.items()
        ]
        held = [(source.key, source.group) for source in self._consumed] if idle else []
        return self._call(
            *("turn", self._topology.version, self._queue, self._me, max(room, 0), idle),
            *(-1 if self._keep is None else self._keep, len(settled), *_flat(settled)),
            *(len(held), *_flat(held), len(self._followed), *self._followed),
            *(len(publications), *_flat(publications)),
        )

    def _publications(self) -> tuple[list[Sequence[Any]], list[tuple[int, Publication]]]:
        """As many as go into one call, in the script's words; and what they are."""
        words: list[Sequence[Any]] = []
        numbers: list[tuple[int, Publication]] = []
        refused: list[Sent] = []
        size = done = 0
        for number, publication in self.unsent:
            if size >= _MOST:
                break
            done += 1
            try:
                some = self._words(publication)
            except (TypeError, ValueError, RecursionError) as unfit:
                refused.append(Sent(number, f"the message cannot be kept: {unfit}", True, True))
                continue
            if not some:
                if not self._up_to_date():
                    return self._publications()
                where = no_queue(publication.exchange, publication.routing_key)
                refused.append(Sent(number, where, True))
                continue
            words += some
            size += len(publication.body) * len(some)
            numbers.append((number, publication))
        del self.unsent[:done]
        self._sent += refused
        return words, numbers

    def _words(self, publication: Publication) -> list[Sequence[Any]]:
        """One publication for each stream that takes it."""
        if publication.exchange in self._shared:
            fields: Sequence[Any] = shared_stream.entry(publication)
            return [("shared", publication.exchange, 0, len(fields), *fields)]
        queues = self._topology.takers(publication)
        if not queues:
            return []
        fields = ["envelope", describe(publication), "body", publication.body]
        for name, value in publication.properties.headers.items():
            if str(name).startswith(_READABLE):  # for whoever looks with redis-cli
                fields += [str(word).encode(errors="backslashreplace") for word in (name, value)]
        delay = int(publication.delay * 1000 + 0.999)
        return [("queue", queue, delay, len(fields), *fields) for queue in sorted(queues)]

    def _up_to_date(self) -> bool:
        """Whether the topology, which is read again now, is as it was."""
        before, self._topology = self._topology.version, _topology(self._call("topology"))
        return before == self._topology.version

    def _trims(self, now: float) -> bool:
        return self._keep is not None and bool(self._followed) and now >= self._trim_at

    def _taken(self, answer: Sequence[Any]) -> list[Delivery]:
        _, ids, sizes, texts, others, due, claimed, behind = answer
        now = self._clock.steady()
        deliveries = [*self._unpacked(ids.split(), sizes.split(), texts), *map(self._other, others)]
        self._due = now + due / 1000 if due >= 0 else float("inf")
        if behind:
            self._behind = behind
        self._look_at = 0.0 if deliveries else now + _LOOK
        if claimed:
            self.claimed += claimed
            log.info("%s: took over %d messages of consumers that are gone", self._queue, claimed)
        return deliveries

    def _unpacked(self, ids: list[bytes], sizes: list[bytes], texts: bytes) -> Iterator[Delivery]:
        numbers = [int(size) for size in sizes]
        start = 0
        for n, id in enumerate(ids):
            again, head, body = numbers[3 * n : 3 * n + 3]
            middle, end = start + head, start + head + body
            head_text, body_text = texts[start:middle], texts[middle:end]
            try:
                properties, exchange, key = read(head_text)
            except Exception:  # somebody else wrote it, and may have written anything
                yield self._foreign(id, (b"envelope", head_text, b"body", body_text), again)
            else:
                yield self._delivery(0, id, body_text, properties, exchange, key, again)
            start = end

    def _foreign(self, id: bytes, fields: Sequence[bytes], again: int) -> Delivery:
        """An entry of its own stream that no idemp wrote."""
        known = Properties(message_id=f"{self._queue}/{id.decode()}")
        return self._delivery(0, id, shared_stream.no_event(fields), known, "", self._queue, again)

    def _other(self, entry: Sequence[Any]) -> Delivery:
        n, id, again, fields = entry
        if n < 0:
            return self._foreign(id, fields, again)
        stream = self._followed[n]
        body, properties, key = shared_stream.message(stream, id.decode(), fields)
        return self._delivery(n + 1, id, body, properties, stream, key, again)

    def _delivery(
        self, place: int, id: bytes, body: bytes, properties: Properties, exchange: str, key: str, again: int
    ) -> Delivery:
        tag = next(self._tags)
        self._out[tag] = self._sources[place], id
        return Delivery(tag, body, properties, exchange, key, bool(again))


def _flat(words: Iterable[Iterable[Any]]) -> Iterator[Any]:
    return (word for some in words for word in some)


def connection(met: Met) -> Any:
    """One that checks the server first; it connects with its first use."""
    options = dict(met.at.options)
    kind = redis.SSLConnection if options.pop("ssl", False) else redis.Connection

    def begin(new: Any) -> None:
        try:
            new.on_connect()
            met.check(new)
        except BaseException:
            new.disconnect()
            raise

    return kind(
        **options,
        protocol=2,
        socket_timeout=TIMEOUT,
        socket_connect_timeout=TIMEOUT,
        retry=Retry(NoBackoff(), 0),
        redis_connect_func=begin,
    )
