"""What is left in the end: every key of the store, what its journal applied, the dead letters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from idemp import open_store, open_transport
from idemp.ports import Applied, Claim, Claimed, Delivery, Done, Reply, State, Store
from idemp.stores.etcd_client import Client, KeyValue
from idemp.stores.etcd_replica import Layout
from idemp.stores.journal import Append, Journal
from idemp.stores.records import Record, decode
from tests.reliability.checker import Change, Dead, Kept
from tests.reliability.history import digest
from tests.reliability.witness import NAMES, id_of

_PAGE = 10_000
_READ = 500


class _Rereading(Journal):
    """Folds the appends anew, and notes what came of each record."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[Change] = []

    def _claim_all(self, fold: Any, keys: Sequence[str], token: int) -> dict[int, Reply]:
        told = {}
        for each, key in enumerate(keys, token):
            fold.token = each - 1
            told[each] = self._apply(fold, Claim(key))
        return told

    def _apply(self, fold: Any, record: Record) -> Reply:
        key = getattr(record, "key", "")
        before = self.entry(key) if key else None
        reply = super()._apply(fold, record)  # a Finish comes back here as a Complete
        name = NAMES.get(type(record))
        if name and isinstance(reply, Claimed):
            self.changes.append(Change(name, id_of(key), reply.token, reply.attempt))
        elif name and isinstance(reply, Applied) and before is not None:
            self.changes.append(Change(name, id_of(key), before.token, before.attempt))
        return reply


def changes(endpoints: Sequence[str], namespace: str) -> list[Change]:
    """What the journal of an etcd namespace applied, in its order.  Nothing of it may have been deleted."""
    layout, client = Layout(namespace), Client(endpoints)
    try:
        pairs: list[KeyValue] = []
        after = ""
        while page := client.range(layout.logs, prefix=True, after=after, limit=_READ).pairs:
            pairs += page
            after = page[-1].key
    finally:
        client.close()
    journal = _Rereading()
    for pair in sorted(pairs, key=lambda each: each.mod_revision):
        wall, records = decode(pair.value)
        journal.apply(Append(pair.mod_revision, *layout.place(pair.key), wall, records))
    return journal.changes


def states(store: Store, handler: str) -> dict[str, Kept]:
    """id -> how the store has it."""
    found: dict[str, Kept] = {}
    after = ""
    while page := store.scan(f"{handler}/", after=after, limit=_PAGE):
        found.update((id_of(key), kept(state)) for key, state in page)
        after = page[-1][0]
    return found


def kept(state: State) -> Kept:
    """A state in the words of a history."""
    return Kept(
        type(state).__name__.lower(),
        getattr(state, "token", 0),
        getattr(state, "attempt", getattr(state, "attempts", 0)),
        digest(state.result or b"") if isinstance(state, Done) else "",
    )


def opened(url: str) -> Store:
    """A store that has imported everything."""
    store = open_store(url)
    store.apply([])
    return store


def dead_letters(url: str, queue: str, patience: float = 30.0) -> list[Dead]:
    """What waits in a dead-letter queue, and goes on waiting there."""
    found: list[Dead] = []
    transport = open_transport(url)
    try:
        count = transport.depth(queue)
        transport.consume(queue, 60_000)
        end = time.monotonic() + patience
        while len(found) < count and time.monotonic() < end:
            found += [_dead(event) for event in transport.poll(0.5) if isinstance(event, Delivery)]
    finally:
        transport.close()
    if len(found) < count:
        raise TimeoutError(f"{queue}: {len(found)} of {count} came")
    return found


def _dead(event: Delivery) -> Dead:
    outcome = str(event.properties.headers.get("idemp-outcome", ""))
    return Dead(event.properties.message_id or "", outcome, digest(event.body))
