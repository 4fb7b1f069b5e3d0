"""What a service tells the auditor, in one line."""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

from idemp.audit.messages import Report
from idemp.errors import TransportUnavailable, Unroutable
from idemp.message import Properties
from idemp.ports import Publication, Sent, Transport

PATIENCE = 10.0
"""Seconds that the broker has to confirm a report."""


class Reporter:
    """Tells the auditor what ``service`` has: ``Reporter(open_transport(url), "sales").report(count=10)``.

    The transport is the reporter's own, and used by one thread.
    """

    def __init__(
        self,
        transport: Transport,
        service: str,
        *,
        exchange: str = "auditmq_exchange",
        routing_key: str = "auditmq",
    ) -> None:
        self._transport, self._service = transport, service
        self._exchange, self._routing_key = exchange, routing_key

    def report(self, **data: Any) -> None:
        """Return when the report is safe in the auditor's queue.

        data: field -> number or text; a field whose name is no Python name goes in as ``**{"my field": 1}``.
        Raises `Unroutable` if no auditor has ever been started on this exchange, `TransportUnavailable` if
        the broker does not confirm within `PATIENCE`: tell it again then, the newest value is what counts.
        """
        body = Report(self._service, data).encode()
        about = Properties(
            message_id=uuid4().hex,
            app_id=self._service,
            timestamp=time.time(),
            content_type="application/json",
        )
        publication = Publication(body, about, self._exchange, self._routing_key)
        try:
            self._confirmed(publication)
        except TransportUnavailable:
            self._transport.connect()  # it was lost since the last report
            self._confirmed(publication)

    def _confirmed(self, publication: Publication) -> None:
        [number] = self._transport.send([publication])
        until = time.monotonic() + PATIENCE
        while (left := until - time.monotonic()) > 0:
            for event in self._transport.poll(left):
                if isinstance(event, Sent) and event.number == number:
                    if event.error:
                        raise (Unroutable if event.unroutable else TransportUnavailable)(event.error)
                    return
        raise TransportUnavailable(f"the report was not confirmed within {PATIENCE:g} s")
