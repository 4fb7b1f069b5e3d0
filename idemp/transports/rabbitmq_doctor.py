"""What `idemp doctor` asks a RabbitMQ: by AMQP what any user may know, the rest of its management API.

It declares nothing and takes no message.  What the API tells of channels is up to five seconds old.
"""

from __future__ import annotations

import base64
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from idemp.errors import TransportUnavailable
from idemp.findings import Finding, too_old
from idemp.ports import Clock
from idemp.settings import hidden
from idemp.transports.rabbitmq import RabbitMQTransport

TIMEOUT = 5.0
"""Seconds that each question may take."""
EXCHANGE = "events"

_SHOULD_GO = (
    "x-message-ttl",
    "x-max-length",
    "x-max-length-bytes",
    "x-expires",
    "message-ttl",
    "max-length",
    "max-length-bytes",
    "expires",
)
"""Arguments and policies under which a queue drops messages, or itself."""


def examine(
    transport: RabbitMQTransport,
    url: str,
    management: str | None,
    services: Sequence[str],
    retention: float | None,
    clock: Clock,
) -> list[Finding]:
    """Look at the queues of ``services``.  retention: seconds that their store keeps ids."""
    found = [each for service in services for each in _by_amqp(transport, service)]
    api = Management(management or _management_of(url), urlsplit(url).path)
    try:
        api.get("overview")
    except (OSError, http.client.HTTPException, ValueError) as error:
        evidence = f"{hidden(api.where)}: {_why(error)}"
        fix = "rabbitmq-plugins enable rabbitmq_management, and name it: --management http://user:pass@host:15672"
        what = "arguments, policies, prefetch and confirms were not looked at"
        return [*found, Finding("broker", what, evidence, fix, fault=False)]
    exchanges = {each["name"] for each in api.of_vhost("exchanges")}
    for service in services:
        for name in (f"{service}-queue", f"{service}-queue.dead"):
            if (queue := api.queue(name)) is not None:
                found += of_queue(queue, exchanges, is_dead=name.endswith(".dead"))
            if queue is not None and not name.endswith(".dead"):
                found += too_old(name, queue.get("head_message_timestamp"), retention, clock.wall())
        if api.queue(f"{service}-queue") is not None:
            found += _bound(service, api.bindings(f"{service}-queue"))
    return [*found, *of_channels(api.get("channels"), api.vhost)]


def _by_amqp(transport: RabbitMQTransport, service: str) -> list[Finding]:
    queue, dead = f"{service}-queue", f"{service}-queue.dead"
    start = f"start the service: SERVICE_NAME={service} python -m svc"
    consumers = transport.consumers(queue)
    if consumers is None:
        return [Finding(queue, "there is no such queue", "the broker does not know it", start)]
    found = []
    if not consumers:
        evidence = f"{transport.depth(queue)} messages are ready, and 0 consumers"
        found.append(Finding(queue, "nobody consumes it", evidence, start))
    if transport.consumers(dead) is None:
        what = "the dead-letter path is broken: what is set aside has nowhere to go"
        found.append(Finding(queue, what, f"the broker does not know {dead}", f"{start}, which declares it"))
    elif waiting := transport.depth(dead):
        fix = f"idemp dead list {queue}"
        found.append(
            Finding(dead, "messages were set aside", f"{waiting} messages are ready", fix, fault=False)
        )
    return found


def of_queue(queue: Mapping[str, Any], exchanges: set[str], *, is_dead: bool) -> list[Finding]:
    """What its arguments, its policy and its consumers say."""
    name, found = queue["name"], list[Finding]()
    policy: Mapping[str, Any] = queue.get("effective_policy_definition") or {}
    given = {**policy, **queue.get("arguments", {})}
    drops = {key: given[key] for key in _SHOULD_GO if key in given}
    if drops:
        told = ", ".join(f"{key}={value}" for key, value in drops.items())
        where = f"policy {queue.get('policy')!r}" if drops.keys() & policy.keys() else "its arguments"
        fix = (
            f"rabbitmqctl clear_policy {queue.get('policy')}"
            if drops.keys() & policy.keys()
            else "stop the service, move its messages, delete the queue, start the service"
        )
        found.append(Finding(name, "the queue drops messages unseen", f"{where}: {told}", fix))
    letter = given.get("x-dead-letter-exchange", given.get("dead-letter-exchange"))
    if letter and letter not in exchanges:
        evidence = f"dead-letter-exchange={letter}, which does not exist"
        fix = f"declare exchange {letter!r} and bind a queue to it, or take the setting away"
        found.append(Finding(name, "the broker's dead-letter path leads nowhere", evidence, fix))
    limit = given.get("x-delivery-limit", given.get("delivery-limit"))
    if queue.get("type") == "quorum" and limit != -1 and letter is None and not is_dead:
        evidence = f"a quorum queue, delivery-limit={'20 since RabbitMQ 4' if limit is None else limit}"
        what = "what is redelivered too often is dropped: the queue has no dead-letter exchange"
        fix = f"rabbitmqctl set_policy keep '^{name}$' '{{\"delivery-limit\":-1}}' --apply-to queues"
        found.append(Finding(name, what, evidence, fix, fault=limit is not None))
    for consumer in queue.get("consumer_details", []):
        found += _of_consumer(name, consumer)
    return found


def _of_consumer(name: str, consumer: Mapping[str, Any]) -> list[Finding]:
    tag = consumer.get("consumer_tag", "")
    where = consumer.get("channel_details", {}).get("peer_host", "somewhere")
    if not consumer.get("ack_required", True):
        evidence = f"consumer {tag} at {where} acknowledges before it has worked (no_ack)"
        return [Finding(name, "a crash loses messages", evidence, "consume with acknowledgements")]
    if not consumer.get("prefetch_count"):
        what = "one consumer takes the whole queue into its memory"
        return [
            Finding(name, what, f"consumer {tag} at {where} has prefetch 0", "basic.qos of 512, as idemp")
        ]
    return []


def of_channels(channels: Sequence[Mapping[str, Any]], vhost: str) -> list[Finding]:
    """Publishers without confirms do not know what the broker lost."""
    found = []
    for channel in channels:
        published = channel.get("message_stats", {}).get("publish", 0)
        # Of a channel that has just ended the API has half a record.
        without = channel.get("confirm") is False and channel.get("state") == "running"
        if published and without and channel.get("vhost") == vhost:
            evidence = f"channel {channel.get('name')} of user {channel.get('user')!r} published {published}"
            what = "somebody publishes without confirms: what the broker does not take is lost"
            fix = "confirm_delivery() on that channel, or publish with idemp"
            found.append(Finding("broker", what, evidence, fix))
    return found


def _bound(service: str, bindings: Sequence[Mapping[str, Any]]) -> list[Finding]:
    queue = f"{service}-queue"
    if any(each["source"] == EXCHANGE for each in bindings):
        return []
    evidence = f"{len(bindings)} bindings, none from {EXCHANGE!r}"
    fix = f"start the service: SERVICE_NAME={service} python -m svc, which binds it"
    return [Finding(queue, "no event reaches it", evidence, fix)]


# ---------------------------------------------------------------- the management API


class Management:
    """Reads the API at ``where`` for the vhost of a broker's URL."""

    def __init__(self, where: str, path: str) -> None:
        self.where = where
        self.vhost = unquote(path[1:]) or "/"
        parts = urlsplit(where)
        host = parts.hostname or "localhost"
        self._base = f"{parts.scheme or 'http'}://{host}:{parts.port or 15672}/api"
        login = f"{unquote(parts.username or 'guest')}:{unquote(parts.password or 'guest')}"
        self._login = "Basic " + base64.b64encode(login.encode()).decode()

    def get(self, path: str) -> Any:
        """What it answers; `OSError` if it does not."""
        request = urllib.request.Request(f"{self._base}/{path}", headers={"Authorization": self._login})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=TIMEOUT) as answer:
            return json.load(answer)

    def of_vhost(self, kind: str) -> list[Mapping[str, Any]]:
        """All exchanges, or queues."""
        found: list[Mapping[str, Any]] = self.get(f"{kind}/{quote(self.vhost, '')}")
        return found

    def queue(self, name: str) -> Mapping[str, Any] | None:
        """All that is known of a queue; None if there is none."""
        found: Mapping[str, Any] | None = self._or_none(f"queues/{quote(self.vhost, '')}/{quote(name, '')}")
        return found

    def bindings(self, name: str) -> Sequence[Mapping[str, Any]]:
        """Those of a queue."""
        found: Sequence[Mapping[str, Any]]
        found = self._or_none(f"queues/{quote(self.vhost, '')}/{quote(name, '')}/bindings") or []
        return found

    def _or_none(self, path: str) -> Any:
        try:
            return self.get(path)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 404:
                    return None
            raise TransportUnavailable(f"{hidden(self.where)}: {error}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise TransportUnavailable(f"{hidden(self.where)}: {_why(error)}") from None


def _management_of(url: str) -> str:
    parts = urlsplit(url)
    login = parts.netloc.rpartition("@")[0]
    return f"http://{login + '@' if login else ''}{parts.hostname or 'localhost'}:15672"


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return str(getattr(reason, "strerror", None) or reason)
