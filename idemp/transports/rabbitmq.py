"""RabbitMQ, through pika's SelectConnection driven from `poll`.

One channel consumes and one publishes, so that a refused publish takes no delivery with it.
Heartbeats are served inside `poll`, which must therefore be called more often than they are due.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from idemp.errors import Closed, ConfigError, MissingExtra, TransportUnavailable
from idemp.message import Properties
from idemp.ports import Clock, Delivery, Publication, Sent
from idemp.settings import split
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
HEARTBEAT = 30
"""Seconds, unless the URL names another."""
BLOCKED = 60
"""Seconds that the broker may refuse publishing before the connection counts as lost."""
_PERSISTENT = 2
_EPOCH = 1 << 48
_MOST = 65535


class RabbitMQTransport:
    """The broker at ``url``: ``amqp://user:password@host:port/vhost``, with pika's options."""

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        self._parameters = _parameters(url)
        self._clock = clock or Clock()
        self._link: _Link | None = None
        self._inherited: list[_Link] = []
        self._connections = 0
        self._closed = False

    def connect(self) -> None:
        """See `idemp.ports.Transport`."""
        self._check_open()
        link, self._link = self._link, None
        if link is not None and link.pid == os.getpid():
            link.end()
        elif link is not None:
            # A fork's copy of the parent's socket is kept, never used and never closed.
            self._inherited.append(link)
        self._connections += 1
        self._link = _Link(self._parameters, self._clock, self._connections * _EPOCH)
        self._link.open()

    def declare(self, queue: str, exchange: str = "", binding: str = "#") -> None:
        """See `idemp.ports.Transport`."""
        self._mine().declare(queue, exchange, binding)

    def consume(self, queue: str, prefetch: int) -> None:
        """See `idemp.ports.Transport`."""
        self._mine().consume(queue, prefetch)

    def cancel(self) -> None:
        """See `idemp.ports.Transport`."""
        self._mine().cancel()

    def poll(self, timeout: float) -> list[Delivery | Sent]:
        """See `idemp.ports.Transport`."""
        return self._mine().poll(timeout)

    def ack(self, tags: Iterable[int]) -> None:
        """See `idemp.ports.Transport`."""
        self._mine().ack(tags)

    def send(self, publications: Sequence[Publication]) -> list[int]:
        """See `idemp.ports.Transport`."""
        return self._mine().send(publications)

    def depth(self, queue: str) -> int:
        """See `idemp.ports.Transport`."""
        return self._mine().depth(queue)

    def wake(self) -> None:
        """See `idemp.ports.Transport`."""
        link = self._link
        if link is not None and link.pid == os.getpid():
            link.wake()

    def close(self) -> None:
        """See `idemp.ports.Transport`."""
        link, self._link, self._closed = self._link, None, True
        if link is not None and link.pid == os.getpid():
            link.end()

    def _mine(self) -> _Link:
        """This process's connection; the first call makes it."""
        self._check_open()
        if self._link is None or self._link.pid != os.getpid():
            self.connect()
        assert self._link is not None
        self._link.check()
        return self._link

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("this transport was closed")


class _Link:
    """One connection of one process.  ``epoch`` keeps its tags and numbers apart from all others'."""

    def __init__(self, parameters: pika.URLParameters, clock: Clock, epoch: int) -> None:
        self.pid = os.getpid()
        self._parameters, self._clock, self._epoch = parameters, clock, epoch
        self._where = f"amqp://{parameters.host}:{parameters.port}"
        self._loop = IOLoop()
        self._loop.activate_poller()
        self._lost: Exception | None = None
        self._events: list[Delivery | Sent] = []
        self._connection: Any = None
        self._publishing = _Publishing(epoch, self._events)
        self._consuming: Any = None
        self._consumer = ""
        self._acks = _Acks()
        self._waking = False
        self._woken = False
        self._delays: set[str] = set()

    # ---------------------------------------------------------------- life

    def open(self) -> None:
        """Connect, or raise `ConfigError` or `TransportUnavailable`."""
        self._connection = pika.SelectConnection(
            self._parameters,
            on_open_error_callback=lambda _, error: self._lose(self._explain(error)),
            on_close_callback=lambda _, reason: self._lose(TransportUnavailable(f"{self._where}: {reason}")),
            custom_ioloop=self._loop,
        )
        self._connection.add_on_connection_blocked_callback(
            lambda _, frame: log.warning("%s takes no messages now: %s", self._where, frame.method.reason)
        )
        self._until(lambda: self._connection.is_open)
        self._open_publishing()

    def end(self) -> None:
        """Close in order, so that acknowledgements that are still on their way arrive."""
        try:
            if self._connection is not None and self._connection.is_open:
                self._connection.close()
                self._until(lambda: self._connection.is_closed, seconds=5.0)
        except (TransportUnavailable, exceptions.AMQPError) as error:
            log.debug("closing %s: %s", self._where, error)
        self._loop.close()

    def check(self) -> None:
        """Raise what the connection was lost by."""
        if self._lost is not None:
            raise self._lost

    def _lose(self, error: Exception) -> None:
        self._lost = self._lost or error

    def _explain(self, error: BaseException) -> Exception:
        """A failure to connect, in one sentence without the password."""
        user = self._parameters.credentials.username
        for cause in _causes(error):
            if isinstance(cause, exceptions.ProbableAuthenticationError | exceptions.AuthenticationError):
                return ConfigError(f"{self._where} refuses user {user!r}: check user and password in the URL")
            if isinstance(cause, exceptions.ProbableAccessDeniedError | exceptions.ConnectionClosedByBroker):
                vhost = self._parameters.virtual_host
                return ConfigError(
                    f"{self._where} gives user {user!r} no access to vhost {vhost!r}: check the URL"
                )
            if isinstance(cause, OSError):
                return TransportUnavailable(f"no broker answers at {self._where}: {cause}")
        return TransportUnavailable(f"no broker answers at {self._where}: {error!r}")

    # ---------------------------------------------------------------- the loop

    def _turn(self) -> None:
        self._loop.poll()
        self._loop.process_timeouts()

    def _until(self, what: Callable[[], Any], seconds: float = PATIENCE) -> None:
        """Serve the connection until ``what`` is true."""
        late: list[bool] = []
        timer = self._loop.call_later(seconds, lambda: late.append(True))
        try:
            while not what():
                self.check()
                if late:
                    raise TransportUnavailable(f"{self._where} did not answer within {seconds:g} s")
                self._turn()
        finally:
            self._loop.remove_timeout(timer)

    def poll(self, timeout: float) -> list[Delivery | Sent]:
        """What came."""
        late: list[bool] = []
        timer = self._loop.call_later(0 if self._events else timeout, lambda: late.append(True))
        try:
            while True:
                self._turn()
                if self._events or late or self._woken:
                    break
                self.check()
        finally:
            self._loop.remove_timeout(timer)
            self._woken = False
        self.check()
        came, self._events[:] = self._events[:], []
        return came

    def wake(self) -> None:
        """From any thread; calls that come before the loop has heard of the first are free."""
        if not self._waking:
            self._waking = True
            try:
                self._loop.add_callback_threadsafe(self._hear)
            except (OSError, ValueError, AttributeError, AssertionError):
                log.debug("woken after the end")

    def _hear(self) -> None:
        self._waking = False
        self._woken = True

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A channel or connection that closes while it is written to is lost."""
        try:
            yield
        except exceptions.AMQPError as error:
            self._lose(TransportUnavailable(f"{self._where}: {error!r}"))
            self.check()

    # ---------------------------------------------------------------- queues

    def _channel(self) -> Any:
        """A new channel, open."""
        channel = self._connection.channel(on_open_callback=lambda _: None)
        self._until(lambda: channel.is_open or channel.is_closed)
        return channel

    def _ask(self, channel: Any, ask: Callable[[Callable[[Any], None]], Any]) -> Any:
        """Send a request; its answer.  A broker that closes the channel over it has a reason."""
        answers: list[Any] = []
        reasons: list[Any] = []
        channel.add_on_close_callback(lambda _, reason: reasons.append(reason))
        ask(answers.append)
        self._until(lambda: answers or reasons)
        if not answers:
            raise ConfigError(f"{self._where} refuses: {getattr(reasons[0], 'reply_text', reasons[0])}")
        return answers[0].method

    def declare(self, queue: str, exchange: str, binding: str) -> None:
        """Durable, and without arguments, so that queues that were there before are welcome."""
        channel = self._channel()
        self._ask(channel, lambda then: channel.queue_declare(queue, durable=True, callback=then))
        if exchange:
            self._ask(
                channel, lambda then: channel.exchange_declare(exchange, "topic", durable=True, callback=then)
            )
            self._ask(channel, lambda then: channel.queue_bind(queue, exchange, binding, callback=then))
        channel.close()

    def depth(self, queue: str) -> int:
        """By a passive declaration, on a channel that its failure may close."""
        channel = self._channel()
        try:
            found = self._ask(channel, lambda then: channel.queue_declare(queue, passive=True, callback=then))
        except ConfigError:
            return 0
        channel.close()
        return int(found.message_count)

    # ---------------------------------------------------------------- consuming

    def consume(self, queue: str, prefetch: int) -> None:
        """Start deliveries."""
        channel = self._consuming = self._channel()
        channel.add_on_close_callback(
            lambda _, reason: self._lose(TransportUnavailable(f"{self._where}: {reason}"))
        )
        channel.add_on_cancel_callback(
            lambda _: self._lose(
                TransportUnavailable(f"{self._where} ended the deliveries: is {queue} gone?")
            )
        )
        self._ask(channel, lambda then: channel.basic_qos(prefetch_count=min(prefetch, _MOST), callback=then))
        consumer: list[str] = []
        self._ask(
            channel, lambda then: consumer.append(channel.basic_consume(queue, self._deliver, callback=then))
        )
        self._consumer = consumer[0]

    def cancel(self) -> None:
        """Stop deliveries."""
        if self._consumer and self._consuming.is_open:
            channel, self._consumer = self._consuming, ""
            tag = next(iter(channel.consumer_tags))
            self._ask(channel, lambda then: channel.basic_cancel(tag, callback=then))

    def _deliver(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        tag = method.delivery_tag
        self._acks.delivered = tag
        self._events.append(
            Delivery(
                self._epoch + tag,
                body,
                Properties(
                    properties.message_id,
                    properties.type,
                    properties.correlation_id,
                    properties.app_id,
                    properties.timestamp,
                    properties.content_type,
                    properties.headers or {},
                ),
                method.exchange,
                method.routing_key,
                method.redelivered,
            )
        )

    def ack(self, tags: Iterable[int]) -> None:
        """Acknowledge; tags of other connections are not ours any more."""
        upto, singly = self._acks.settle([tag - self._epoch for tag in tags])
        with self._writing():
            if upto:
                self._consuming.basic_ack(upto, multiple=True)
            for tag in singly:
                self._consuming.basic_ack(tag)

    # ---------------------------------------------------------------- publishing

    def _open_publishing(self) -> None:
        """A channel with confirms.  When the broker closes it, what is unconfirmed has failed."""
        channel = self._channel()
        self._publishing.use(channel)
        self._ask(channel, lambda then: channel.confirm_delivery(self._publishing.confirmed, callback=then))

    def send(self, publications: Sequence[Publication]) -> list[int]:
        """Start publishing."""
        if not self._publishing.channel.is_open:
            self._open_publishing()
            self._delays.clear()
        with self._writing():
            return [self._publishing.publish(copy, self._route(copy)) for copy in publications]

    def _route(self, copy: Publication) -> tuple[str, str]:
        """Where to publish: a delayed copy waits in a queue of its own kind first.

        A queue lets out expired messages only at its head, so one queue takes delays of one magnitude.
        """
        if not copy.delay:
            return copy.exchange, copy.routing_key
        bucket = 1 << max(0, math.ceil(math.log2(copy.delay)))
        queue = f"{copy.routing_key}.delay.{bucket}"
        if queue not in self._delays:
            arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": copy.routing_key}
            # Without a callback nothing is awaited: on one channel it comes before the publish.
            self._publishing.channel.queue_declare(queue, durable=True, arguments=arguments)
            self._delays.add(queue)
        return "", queue


class _Acks:
    """Which of a channel's deliveries are settled: one command for all up to the first that is not."""

    def __init__(self) -> None:
        self.delivered = 0
        self._first = 1  # the first that is not settled
        self._beyond: set[int] = set()

    def settle(self, tags: Sequence[int]) -> tuple[int, list[int]]:
        """(acknowledge all up to this one, or 0; and these one by one)."""
        new = [tag for tag in tags if self._first <= tag <= self.delivered and tag not in self._beyond]
        self._beyond.update(new)
        while self._first in self._beyond:
            self._beyond.remove(self._first)
            self._first += 1
        prefix = [tag for tag in new if tag < self._first]
        return (max(prefix) if prefix else 0), [tag for tag in new if tag > self._first]


class _Publishing:
    """The publishing channel and what is not confirmed on it."""

    def __init__(self, epoch: int, events: list[Delivery | Sent]) -> None:
        self.channel: Any = None
        self._number = epoch
        self._events = events
        self._sequence = 0
        self._waiting: dict[int, tuple[int, Publication]] = {}
        self._returned: set[int] = set()

    def use(self, channel: Any) -> None:
        """Publish on ``channel`` from now on."""
        self.channel, self._sequence = channel, 0
        channel.add_on_return_callback(self._unroutable)
        channel.add_on_close_callback(self._refused)

    def publish(self, copy: Publication, route: tuple[str, str]) -> int:
        """Send one; its number."""
        self._sequence += 1
        self._number += 1
        self._waiting[self._sequence] = (self._number, copy)
        exchange, key = route
        self.channel.basic_publish(exchange, key, copy.body, _properties(copy), mandatory=True)
        return self._number

    def confirmed(self, frame: Any) -> None:
        """The broker answers for one publication, or for all up to one."""
        method = frame.method
        tag = method.delivery_tag
        tags = [seen for seen in self._waiting if seen <= tag] if method.multiple else [tag]
        nack = "" if isinstance(method, pika.spec.Basic.Ack) else "the broker refused it"
        for tag in tags:
            number, copy = self._waiting.pop(tag)
            if tag in self._returned:
                self._returned.remove(tag)
                self._events.append(Sent(number, no_queue(copy.exchange, copy.routing_key), unroutable=True))
            else:
                self._events.append(Sent(number, nack))

    def _unroutable(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        """A return comes before the confirm of the same publication, and does not say which that is."""
        for tag, (_, copy) in self._waiting.items():
            same = copy.body == body and copy.properties.message_id == properties.message_id
            if same and copy.routing_key == method.routing_key and tag not in self._returned:
                self._returned.add(tag)
                return

    def _refused(self, channel: Any, reason: Any) -> None:
        text = str(getattr(reason, "reply_text", reason))
        for number, copy in self._waiting.values():
            missing = "NOT_FOUND" in text and copy.exchange != ""
            error = no_queue(copy.exchange, copy.routing_key) if missing else f"the broker refused it: {text}"
            self._events.append(Sent(number, error, unroutable=missing))
        self._waiting.clear()
        self._returned.clear()


def _properties(copy: Publication) -> pika.BasicProperties:
    given = copy.properties
    return pika.BasicProperties(
        message_id=given.message_id,
        type=given.type,
        correlation_id=given.correlation_id,
        app_id=given.app_id,
        timestamp=None if given.timestamp is None else int(given.timestamp),
        content_type=given.content_type,
        headers=dict(given.headers) or None,
        delivery_mode=_PERSISTENT,
        expiration=str(max(1, round(copy.delay * 1000))) if copy.delay else None,
    )


def _parameters(url: str) -> pika.URLParameters:
    parts = split(url)
    try:
        parameters = pika.URLParameters(url if parts.path not in ("", "/") else _default_vhost(url))
    except (ValueError, TypeError, SyntaxError) as error:
        raise ConfigError(f"the amqp:// URL has an option that pika does not take: {error}") from None
    if "heartbeat" not in parts.query:
        parameters.heartbeat = HEARTBEAT
    if "blocked_connection_timeout" not in parts.query:
        parameters.blocked_connection_timeout = BLOCKED
    return parameters


def _default_vhost(url: str) -> str:
    """An empty path is the vhost "/" by custom."""
    return split(url)._replace(path="/%2F").geturl()


def _causes(error: BaseException) -> Iterable[BaseException]:
    """What pika wrapped, innermost first."""
    inner = [*getattr(error, "exceptions", ()), getattr(error, "exception", None), *error.args]
    for cause in inner:
        if isinstance(cause, BaseException):
            yield from _causes(cause)
    yield error
