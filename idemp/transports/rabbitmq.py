"""RabbitMQ, through pika's SelectConnection driven from `poll`.

One channel consumes and one publishes, so that a refused publish takes no delivery with it.
Heartbeats are served inside `poll`, which must therefore be called more often than they are due;
what `ack` and `send` wrote goes out with the next `poll` too, or with `close`.
"""

from __future__ import annotations

import logging
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlunsplit

from msgspec.structs import replace

from idemp.errors import Closed, ConfigError, IdempError, MissingExtra, TransportUnavailable
from idemp.message import Properties
from idemp.ports import Delivery, Publication, Sent
from idemp.settings import address, split
from idemp.tls import files_in, tls_fix, trust
from idemp.transports.amqp import Outstanding, Unconfirmed, waiting_queue
from idemp.transports.amqp_wire import Reader, encode
from idemp.transports.topic import no_queue

try:
    import pika
    from pika import exceptions
    from pika.adapters.select_connection import IOLoop
except ImportError:
    raise MissingExtra("amqp://", "rabbitmq") from None

log = logging.getLogger(__name__)

PATIENCE = 15.0
"""Seconds that the broker has to answer a request."""
FAREWELL = 5.0
"""Seconds that the broker has to answer the end of a connection."""
HEARTBEAT = 30
"""Seconds, unless the URL names another."""
BLOCKED = 60
"""Seconds that the broker may hold up publishing before the connection counts as lost."""
RECEIVE = 1 << 16
"""Bytes that are taken from the socket at once.  pika takes 4096, a dozen small messages."""

_MOST = 65535  # deliveries that AMQP can count for basic.qos
_CONNECTION = 1 << 48  # the tags of one connection and those of the next are so far apart
_AROUND = 8 + 12  # bytes of a frame, and of a content header, that are no properties
# For a property, header or name that AMQP has no place for.
_UNFIT = (exceptions.ShortStringTooLong, ValueError, TypeError, AttributeError, RecursionError, struct.error)


class RabbitMQTransport:
    """The broker at ``url``: ``amqp://user:password@host:port/vhost``, with pika's options."""

    def __init__(self, url: str) -> None:
        self._parameters = _parameters(url)
        self._link: _Link | None = None
        self._inherited: list[_Link] = []
        self._connections = count(1)
        self._numbers = count(1)
        self._closed = False
        self._woken = False

    def connect(self) -> None:
        """Connect anew.  Raises `ConfigError` if the broker refuses the user or the vhost."""
        if self._closed:
            raise Closed("this transport was closed")
        self._end()
        self._link = _Link(self._parameters, next(self._connections) * _CONNECTION, self._numbers)
        self._link.open()

    def _end(self) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        if link.pid == os.getpid():
            link.end()
        else:
            # A fork's copy of its parent's connection: to end it would end the parent's.
            self._inherited.append(link)

    @contextmanager
    def _connected(self) -> Iterator[_Link]:
        """This process's connection, which the first call makes; lost if it ends in the middle of a call."""
        if self._closed or self._link is None or self._link.pid != os.getpid():
            self.connect()
        link = self._link
        assert link is not None
        link.check()
        try:
            yield link
        except exceptions.AMQPError as error:
            link.lose(error)
            link.check()

    def declare(
        self,
        queue: str,
        exchange: str = "",
        binding: str = "#",
        *,
        kind: str = "topic",
        expires: float | None = None,
    ) -> None:
        """Make ``queue`` without other arguments, so that one that was made so before is welcome."""
        with self._connected() as link:
            link.declare(queue, exchange, binding, kind, expires)

    def consume(self, queue: str, prefetch: int, *, name: str = "") -> None:
        """Start deliveries from ``queue``; they end from the one before."""
        with self._connected() as link:
            link.consume(queue, prefetch, name)

    def cancel(self) -> None:
        """Stop new deliveries; those that `poll` has not handed out go back."""
        with self._connected() as link:
            link.cancel()

    def poll(self, timeout: float) -> list[Delivery | Sent]:
        """Serve the connection, and what came."""
        came: list[Delivery | Sent] = []
        with self._connected() as link:
            came = link.poll(timeout, lambda: self._woken)
        self._woken = False
        return came

    def ack(self, tags: Iterable[int]) -> None:
        """Acknowledge all up to the first that is not settled at once, what is beyond singly."""
        with self._connected() as link:
            link.ack(tags)

    def send(self, publications: Sequence[Publication]) -> list[int]:
        """Start publishing."""
        numbers: list[int] = []
        with self._connected() as link:
            numbers = link.send(publications)
        return numbers

    def depth(self, queue: str) -> int:
        """Messages in ``queue`` that are ready for delivery."""
        found: int | None = 0
        with self._connected() as link:
            found = link.depth(queue)
        return found or 0

    def taken(self, queue: str) -> bool:
        """Whether somebody consumes ``queue``: who does may have taken of it."""
        return bool(self.consumers(queue))

    def consumers(self, queue: str) -> int | None:
        """How many consume ``queue``; None if there is no such queue."""
        found: tuple[int, int] | None = None
        with self._connected() as link:
            found = link.look(queue)
        return None if found is None else found[1]

    def drop(self, queue: str) -> None:
        """Delete ``queue``, if nothing is in it and nobody consumes it."""
        with self._connected() as link:
            link.drop(queue)

    def wake(self) -> None:
        """From any thread; free until the next `poll` has returned."""
        if not self._woken:
            self._woken = True
            link = self._link
            if link is not None and link.pid == os.getpid():
                link.interrupt()

    def close(self) -> None:
        """Let go, when the broker has heard what was acknowledged."""
        self._closed = True
        self._end()


_QUORUM = {"x-queue-type": "quorum"}


class _Connection(pika.SelectConnection):  # type: ignore[misc]
    """pika's, but for deliveries, which are the most of what comes: they are read here.

    If another pika calls this no more, then it reads them itself, as before.
    """

    def __init__(self, arrived: list[Delivery], first: int, *args: Any, **named: Any) -> None:
        self._reader = Reader(arrived, super()._on_data_available, first)
        super().__init__(*args, **named)

    def _proto_connection_made(self, transport: Any) -> None:
        transport._MAX_RECV_BYTES = RECEIVE  # a wish: another pika may have no such number
        super()._proto_connection_made(transport)

    def _on_data_available(self, data_in: bytes) -> None:
        # The heartbeat looks at this number, to which pika adds what is handed on to it.
        self.bytes_received += self._reader.feed(data_in)


class _Properties(pika.BasicProperties):  # type: ignore[misc]
    """Encoded already."""

    def __init__(self, wire: bytes) -> None:
        super().__init__()
        self._wire, self.size = wire, len(wire)

    def encode(self) -> list[bytes]:
        return [self._wire]


class _Link:
    """One connection of one process.  ``first`` is where its tags begin."""

    def __init__(self, parameters: pika.URLParameters, first: int, numbers: Iterator[int]) -> None:
        self.pid = os.getpid()
        self._parameters, self._first, self._numbers = parameters, first, numbers
        scheme = "amqps" if parameters.ssl_options else "amqp"
        self._where = f"{scheme}://{address(parameters.host, parameters.port)}"
        self._lost: IdempError | None = None
        self._loop = IOLoop()
        self._loop.activate_poller()
        self._connection: Any = None
        self._consuming: Any = None
        self._consumer = ""
        self._came: list[Delivery] = []
        self._outstanding = Outstanding()
        self._publishing: Any = None
        self._unconfirmed = Unconfirmed()
        self._sent: list[Sent] = []
        self._targets: set[str] = set()  # of delayed publications: they exist
        self._waiting_queues: set[str] = set()
        self._room = 0  # for the properties of a message, in bytes

    # ---------------------------------------------------------------- life

    def open(self) -> None:
        """Connect, or raise `ConfigError` or `TransportUnavailable`."""
        self._connection = _Connection(
            self._came,
            self._first,
            self._parameters,
            on_open_error_callback=lambda _, error: self._lose(self._explain(error)),
            on_close_callback=lambda _, reason: self._lose(self._gone(reason)),
            custom_ioloop=self._loop,
        )
        self._connection.add_on_connection_blocked_callback(
            lambda _, frame: log.warning("%s holds up publishing: %s", self._where, frame.method.reason)
        )
        # pika has a time limit of its own for each step of this: see its socket_ and stack_timeout.
        attempt = self._parameters.socket_timeout + self._parameters.stack_timeout
        try:
            self._until(lambda: self._connection.is_open, attempt * self._parameters.connection_attempts)
        except IdempError:
            self.end()
            raise
        # A greater frame would end the connection, and again whenever the message comes back.
        self._room = self._connection.params.frame_max - _AROUND

    def end(self) -> None:
        """Close in order, so that acknowledgements that are still on their way arrive."""
        try:
            if not self._connection.is_closed:
                self._connection.close()
                self._until(lambda: self._connection.is_closed, FAREWELL, lost=False)
        except (TransportUnavailable, exceptions.AMQPError) as error:
            log.info("%s: closed without a farewell: %s", self._where, error)
            self._connection._terminate_stream(error)  # there is no public way to just hang up
            self._turn()
        self._loop.close()

    def check(self) -> None:
        """Raise what the connection was lost by."""
        if self._lost is not None:
            raise type(self._lost)(str(self._lost))  # another each time: a traceback grows

    def lose(self, reason: object) -> None:
        """It is of no use any more."""
        self._lose(self._gone(reason))

    def _lose(self, error: IdempError) -> None:
        self._lost = self._lost or error

    def _gone(self, reason: object) -> TransportUnavailable:
        return TransportUnavailable(f"{self._where} is gone: {_text(reason)}")

    def _explain(self, error: BaseException) -> IdempError:
        """A failure to connect, in one sentence without the password."""
        user, vhost = self._parameters.credentials.username, self._parameters.virtual_host
        cause = _cause(error)
        # pika takes any end of the handshake for a refusal; a broker that refuses says so by number.
        if isinstance(cause, exceptions.ProbableAuthenticationError) and "(403)" in str(cause):
            return ConfigError(f"{self._where} refuses user {user!r}: check user and password in the URL")
        denied = isinstance(cause, exceptions.ProbableAccessDeniedError) and "(530)" in str(cause)
        if denied and "limit" not in str(cause):  # on connections: it may soon have room
            return ConfigError(f"{self._where} has no vhost {vhost!r} for user {user!r}: check the URL")
        over = self._parameters.ssl_options is not None
        match cause:
            case exceptions.ConnectionOpenAborted():  # by pika, at the end of stack_timeout
                why = "it did not answer in time"
            case exceptions.IncompatibleProtocolError():
                why = "it hung up on the greeting" + ("" if over else "; does it speak AMQP 0-9-1?")
            case _:
                why = _text(cause)
        fix = tls_fix(why, over=over)
        return TransportUnavailable(f"no broker answers at {self._where}: {why}{fix}")

    # ---------------------------------------------------------------- the loop

    def _turn(self) -> None:
        self._loop.poll()
        self._loop.process_timeouts()

    @contextmanager
    def _alarm(self, seconds: float) -> Iterator[list[bool]]:
        """A list that is empty until ``seconds`` have passed."""
        rung: list[bool] = []
        timer = self._loop.call_later(max(0.0, seconds), lambda: rung.append(True))
        try:
            yield rung
        finally:
            self._loop.remove_timeout(timer)

    def _until(self, what: Callable[[], Any], seconds: float = PATIENCE, *, lost: bool = True) -> None:
        """Serve the connection until ``what`` is true, or if ``lost`` until it is lost."""
        with self._alarm(seconds) as late:
            while not what():
                if lost:
                    self.check()
                if late:
                    silent = TransportUnavailable(f"{self._where} did not answer within {seconds:g} s")
                    self._lose(silent)
                    raise silent
                self._turn()

    def poll(self, timeout: float, woken: Callable[[], bool]) -> list[Delivery | Sent]:
        """What came."""
        ready = self._came or self._sent or woken()
        with self._alarm(0.0 if ready else timeout) as late:
            while True:
                self._turn()
                self.check()
                if self._came or self._sent or woken() or late:
                    break
        sent, self._sent = self._sent, []
        deliveries = self._came.copy()
        self._came.clear()
        self._outstanding.add([delivery.tag for delivery in deliveries])
        return [*sent, *deliveries]

    def interrupt(self) -> None:
        """From any thread: let the loop turn."""
        self._loop.add_callback_threadsafe(_nothing)

    # ---------------------------------------------------------------- queues

    def _channel(self) -> Any:
        """A new channel, open."""
        channel = self._connection.channel(on_open_callback=_nothing)
        self._until(lambda: channel.is_open or channel.is_closed)
        return channel

    def _ask(self, channel: Any, ask: Callable[[Callable[[Any], None]], object]) -> Any:
        """The broker's answer, or None: then it has closed the channel over the question."""
        answers: list[Any] = []
        ask(answers.append)
        self._until(lambda: answers or channel.is_closed)
        self.check()  # a lost connection closes its channels too
        return answers[0].method if answers else None

    def declare(self, queue: str, exchange: str, binding: str, kind: str, expires: float | None) -> None:
        """Without other arguments; a quorum queue that somebody made is as good."""
        ours = {} if expires is None else {"x-expires": math.ceil(expires * 1000)}
        refusal = self._declare(queue, exchange, binding, kind, ours)
        if "x-queue-type" in refusal and not self._declare(queue, exchange, binding, kind, _QUORUM | ours):
            return
        if refusal:
            raise ConfigError(f"{self._where} refuses to declare queue {queue!r}: {refusal}")

    def _declare(
        self, queue: str, exchange: str, binding: str, kind: str, arguments: Mapping[str, Any]
    ) -> str:
        """The broker's refusal, or "".  On a channel of its own, which a refusal closes."""
        channel = self._channel()
        refusals: list[str] = []
        channel.add_on_close_callback(lambda _, reason: refusals.append(_text(reason)))
        done = self._ask(
            channel,
            lambda then: channel.queue_declare(queue, durable=True, arguments=arguments, callback=then),
        )
        if exchange and done:
            channel.exchange_declare(exchange, kind, durable=True)
            done = self._ask(
                channel, lambda then: channel.queue_bind(queue, exchange, binding, callback=then)
            )
        if not done:
            return refusals[0]
        channel.close()
        return ""

    def depth(self, queue: str) -> int | None:
        """How many messages are ready; None if there is no such queue."""
        found = self.look(queue)
        return None if found is None else found[0]

    def look(self, queue: str) -> tuple[int, int] | None:
        """Messages and consumers, by a passive declaration; None, if no such queue, closes the channel."""
        channel = self._channel()
        found = self._ask(channel, lambda then: channel.queue_declare(queue, passive=True, callback=then))
        if found is None:
            return None
        channel.close()
        return int(found.message_count), int(found.consumer_count)

    def drop(self, queue: str) -> None:
        """A refusal closes the channel, and the queue stays."""
        channel = self._channel()
        if self._ask(
            channel,
            lambda then: channel.queue_delete(queue, if_unused=True, if_empty=True, callback=then),
        ):
            channel.close()

    # ---------------------------------------------------------------- consuming

    def consume(self, queue: str, prefetch: int, name: str) -> None:
        """Start deliveries.  If the broker ends them, the connection counts as lost."""
        if self._consuming is None:
            self._consuming = self._channel()
            self._consuming.add_on_close_callback(lambda _, reason: self._lose(self._gone(reason)))
            self._consuming.add_on_cancel_callback(
                lambda _: self._lose(self._gone("it ended the deliveries; was the queue deleted?"))
            )
        self.cancel()
        channel = self._consuming
        channel.basic_qos(prefetch_count=min(prefetch, _MOST), callback=_nothing)
        tag = name or f"idemp-{next(self._numbers)}"
        self._ask(
            channel,
            lambda then: channel.basic_consume(queue, self._deliver, False, False, tag, callback=then),
        )
        self.check()
        self._consumer = tag

    def cancel(self) -> None:
        """Stop deliveries, and give back those that nobody has seen."""
        tag, self._consumer = self._consumer, ""
        if not tag:
            return
        channel = self._consuming
        self._ask(channel, lambda then: channel.basic_cancel(tag, callback=then))
        self.check()
        for arrived in self._came:
            channel.basic_reject(arrived.tag - self._first)
        self._came.clear()

    def _deliver(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        """One that pika has read."""
        given = Properties(
            properties.message_id,
            properties.type,
            properties.correlation_id,
            properties.app_id,
            properties.timestamp,
            properties.content_type,
            properties.headers or {},
        )
        tag = self._first + method.delivery_tag
        self._came.append(Delivery(tag, body, given, method.exchange, method.routing_key, method.redelivered))

    def ack(self, tags: Iterable[int]) -> None:
        """Tags of other connections are not outstanding here."""
        upto, singly = self._outstanding.settle(tags)
        if upto:
            self._consuming.basic_ack(upto - self._first, multiple=True)
        for tag in singly:
            self._consuming.basic_ack(tag - self._first)

    # ---------------------------------------------------------------- publishing

    def send(self, publications: Sequence[Publication]) -> list[int]:
        """Publish; each gets its number, and its `Sent` later."""
        delayed = [each for each in publications if each.delay]
        if any(each.exchange for each in delayed):
            raise ConfigError('a publication with a delay needs exchange ""')
        for queue in {each.routing_key for each in delayed} - self._targets:
            # The broker would confirm it, and drop it at the end of its delay.
            if self.depth(queue) is not None:
                self._targets.add(queue)
        if self._publishing is None:
            self._open_publishing()
        return [self._publish(publication) for publication in publications]

    def _open_publishing(self) -> None:
        """A channel with confirms.  When the broker closes it, what is unconfirmed has failed."""
        channel = self._channel()
        unconfirmed = self._unconfirmed = Unconfirmed()

        def answered(frame: Any) -> None:
            refused = isinstance(frame.method, pika.spec.Basic.Nack)
            tag, multiple = frame.method.delivery_tag, frame.method.multiple
            self._sent.extend(unconfirmed.answered(tag, multiple, refused=refused))

        def returned(channel: Any, method: Any, properties: Any, body: bytes) -> None:
            unconfirmed.returned(method.exchange, method.routing_key, body)
            self._waiting_queues.discard(method.routing_key)

        def closed(channel: Any, reason: Any) -> None:
            self._sent.extend(unconfirmed.closed(_text(reason)))
            self._publishing = None
            self._waiting_queues.clear()  # perhaps it was one of them that was refused

        channel.add_on_return_callback(returned)
        channel.add_on_close_callback(closed)
        channel.confirm_delivery(answered)
        self._publishing = channel

    def _publish(self, publication: Publication) -> int:
        number = next(self._numbers)
        if publication.delay:
            if publication.routing_key not in self._targets:
                self._sent.append(Sent(number, no_queue("", publication.routing_key), True))
                return number
            publication = publication._replace(routing_key=self._waiting_queue(publication))
        body, _, exchange, key, _ = publication
        try:
            properties = _properties(publication)
            if properties.size > self._room:
                raise ValueError(f"{properties.size} bytes of properties, and {self._room} are allowed")
            self._publishing.basic_publish(exchange, key, body, properties, mandatory=True)
        except _UNFIT as error:
            # pika encodes all of it before it writes anything.
            self._sent.append(Sent(number, f"AMQP cannot carry the message: {error!r}", True, True))
        else:
            self._unconfirmed.add(number, publication)
        return number

    def _waiting_queue(self, publication: Publication) -> str:
        """The queue where a delayed publication waits, made if need be."""
        queue = publication.routing_key
        waiting = waiting_queue(queue, publication.delay)
        if waiting not in self._waiting_queues:
            arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": queue}
            # Without a callback nothing is awaited: on one channel it comes before the publish.
            self._publishing.queue_declare(waiting, durable=True, arguments=arguments)
            self._waiting_queues.add(waiting)
        return waiting


def _properties(publication: Publication) -> _Properties:
    properties, delay = publication.properties, publication.delay
    if not delay:
        return _Properties(encode(properties))
    # With the history of earlier delays in it, the broker may take this one for a loop and drop it.
    headers = {name: value for name, value in properties.headers.items() if name != "x-death"}
    return _Properties(encode(replace(properties, headers=headers), str(math.ceil(delay * 1000))))


def _parameters(url: str) -> pika.URLParameters:
    parts = split(url)
    given = parse_qsl(parts.query, keep_blank_values=True)
    options = dict(given)
    files = files_in(options)
    if files:
        rest = [(name, value) for name, value in given if name not in files]
        url = urlunsplit(parts._replace(query=urlencode(rest)))
    try:
        parameters = pika.URLParameters(url)
    except (ValueError, TypeError, SyntaxError, OSError) as error:
        raise ConfigError(f"pika does not take the options of the amqp:// URL: {error}") from None
    if files:
        if parts.scheme != "amqps":
            raise ConfigError(f"{', '.join(files)}: for TLS; write the URL with amqps://")
        parameters.ssl_options = pika.SSLOptions(trust(**files))
    if "heartbeat" not in options:
        parameters.heartbeat = HEARTBEAT
    if "blocked_connection_timeout" not in options:
        parameters.blocked_connection_timeout = BLOCKED
    return parameters


def _cause(error: BaseException) -> BaseException:
    """What pika wrapped; of several addresses tried, what the last one said."""
    wrapped = getattr(error, "exceptions", None) or [getattr(error, "exception", None), *error.args]
    inner = [each for each in wrapped if isinstance(each, BaseException)]
    return _cause(inner[-1]) if inner else error


def _text(reason: object) -> str:
    """A reason of pika's or of the system's for a person."""
    if isinstance(reason, OSError):
        return reason.strerror or str(reason) or type(reason).__name__
    return str(getattr(reason, "reply_text", "")) or str(reason) or type(reason).__name__


def _nothing(*_: Any) -> None:
    pass
