"""What `idemp doctor` asks a Redis that is a broker.  It declares nothing and takes no message."""

from __future__ import annotations

from collections.abc import Sequence

from idemp.findings import Finding, too_old
from idemp.ports import Clock
from idemp.transports.redis_streams import RedisStreamsTransport


def examine(
    transport: RedisStreamsTransport, services: Sequence[str], retention: float | None, clock: Clock
) -> list[Finding]:
    """Look at the queues of ``services``.  retention: seconds that their store keeps ids.

    What the server must be was checked when it was connected.
    """
    found = [each for service in services for each in _of_service(transport, service)]
    for service in services:
        queue = f"{service}-queue"
        found += too_old(queue, transport.oldest(queue), retention, clock.wall())
    return [*found, *(each for stream in transport.shared for each in _of_stream(transport, stream))]


def _of_service(transport: RedisStreamsTransport, service: str) -> list[Finding]:
    queue, dead = f"{service}-queue", f"{service}-queue.dead"
    start = f"start the service {service}, with the same namespace in its IDEMP_TRANSPORT"
    waiting, letters = transport.look(queue), transport.look(dead)
    if waiting is None:
        return [Finding(queue, "there is no such queue", "no stream of that name was declared", start)]
    found = []
    if not waiting.consumers:
        evidence = f"{waiting.ready} messages are ready, {waiting.delayed} delayed, and 0 consumers"
        found.append(Finding(queue, "nobody consumes it", evidence, start))
    if letters is None:
        what = "the dead-letter path is broken: what is set aside has nowhere to go"
        found.append(Finding(dead, what, "there is no such queue", start))
    elif letters.ready:
        fix = f"idemp dead list {queue}, then idemp dead send {queue}"
        found.append(Finding(dead, "messages are set aside", f"{letters.ready} are ready", fix, fault=False))
    return found


def _of_stream(transport: RedisStreamsTransport, stream: str) -> list[Finding]:
    """Who holds up its trimming, and whether anything is trimmed at all."""
    length, readers = transport.readers(stream)
    if transport.keep is None:
        fix = "say ?keep=100000 in IDEMP_TRANSPORT, if no program reads it without a group"
        what = "it grows without end"
        return [Finding(stream, what, f"{length} entries, and no keep in the URL", fix, fault=False)]
    slow = [f"{name} has read up to {position}" for name, position in readers]
    if length > 2 * transport.keep + 1000 and slow:
        what = "entries that are no longer wanted stay, for somebody has not read them"
        evidence = f"{length} entries; {'; '.join(slow)}"
        fix = f"start that reader, or forget it: redis-cli XGROUP DESTROY {stream} NAME"
        return [Finding(stream, what, evidence, fix)]
    return []
