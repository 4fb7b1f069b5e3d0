"""A store's operations off the event loop: those of all the loop's tasks go together.

As in stores/group.py the batches of many become one.  But here nobody needs to be put to sleep and woken:
the loop gathers what its tasks ask while a batch is under way, and one thread carries it at a time.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import AbstractEventLoop, Future
from collections.abc import Mapping, Sequence
from functools import partial
from weakref import WeakKeyDictionary

from idemp.laws import undoing
from idemp.ports import Claim, Get, Op, Reply, Store, Takeover

log = logging.getLogger(__name__)

_ASKING = (Claim, Takeover, Get)
"""What need not be sent any more when who asks is gone."""


class _Gathered:
    """What a loop's tasks ask of a store.  under_way: a batch is, or will be after the tasks' turn."""

    __slots__ = ("under_way", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[Future[Reply], Op] = {}
        self.under_way = False


# It refers to neither, so that both can go.
_loops: WeakKeyDictionary[AbstractEventLoop, WeakKeyDictionary[Store, _Gathered]] = WeakKeyDictionary()


async def apply_async(store: Store, op: Op) -> Reply:
    """The reply to ``op``.  If the caller is cancelled a claim is given back, and all else is applied."""
    loop = asyncio.get_running_loop()
    gathered = _of(loop, store)
    future: Future[Reply] = loop.create_future()
    gathered.waiting[future] = op
    if not gathered.under_way:
        gathered.under_way = True
        loop.call_soon(_carry, loop, store, gathered)
    try:
        return await future
    except asyncio.CancelledError:
        # At once: a loop that ends cancels its tasks, and then has no time for another batch.
        if gathered.waiting.pop(future, None) is not None and not isinstance(op, _ASKING):
            _tell(loop, store, [op])
        raise


def _of(loop: AbstractEventLoop, store: Store) -> _Gathered:
    stores = _loops.get(loop)
    if stores is None:
        stores = _loops[loop] = WeakKeyDictionary()
    gathered = stores.get(store)
    if gathered is None:
        gathered = stores[store] = _Gathered()
    return gathered


def _carry(loop: AbstractEventLoop, store: Store, gathered: _Gathered) -> None:
    """Send off what waits."""
    batch, gathered.waiting = gathered.waiting, {}
    gathered.under_way = bool(batch)
    if not batch:
        return
    try:
        replies = loop.run_in_executor(None, store.apply, list(batch.values()))
    except RuntimeError as error:  # the loop is being shut down
        gathered.under_way = False
        _fail(batch, error)
        return
    replies.add_done_callback(partial(_deliver, loop, store, gathered, batch))


def _deliver(
    loop: AbstractEventLoop,
    store: Store,
    gathered: _Gathered,
    batch: Mapping[Future[Reply], Op],
    replies: Future[list[Reply]],
) -> None:
    if (error := replies.exception()) is not None:
        _fail(batch, error)
    else:
        unheard = []
        for (future, op), reply in zip(batch.items(), replies.result(), strict=True):
            if future.cancelled():
                unheard += undoing([op], [reply])
            else:
                future.set_result(reply)
        if unheard:
            _tell(loop, store, unheard)
    # Behind the tasks that wake now: what they ask next goes along.
    loop.call_soon(_carry, loop, store, gathered)


def _fail(batch: Mapping[Future[Reply], Op], error: BaseException) -> None:
    for future in batch:
        if not future.cancelled():
            future.set_exception(error)
    if unheard := [op for future, op in batch.items() if future.cancelled() and not isinstance(op, _ASKING)]:
        _warn(unheard, error)


def _tell(loop: AbstractEventLoop, store: Store, ops: Sequence[Op]) -> None:
    """Apply what nobody waits for."""
    try:
        loop.run_in_executor(None, _apply, store, ops)
    except RuntimeError:  # the loop is being shut down: it has nothing else to do
        _apply(store, ops)


def _apply(store: Store, ops: Sequence[Op]) -> None:
    try:
        store.apply(ops)
    except Exception as error:
        _warn(ops, error)


def _warn(ops: Sequence[Op], error: BaseException) -> None:
    keys = ", ".join(repr(op.key) for op in ops)
    log.warning("the last word of calls that were cancelled was perhaps not taken: %s: %s", keys, error)
