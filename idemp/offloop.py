"""A store's operations off the event loop: those of all the loop's tasks go together.

As in stores/group.py the batches of many become one.  But here nobody needs to be put to sleep and woken:
the loop gathers what its tasks ask while a batch is under way, and one thread carries it at a time.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import AbstractEventLoop, Future
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

from idemp.laws import undoing
from idemp.ports import Op, Reply, Store

log = logging.getLogger(__name__)


class _Asked(NamedTuple):
    """One task's operation, and where it waits for the reply."""

    op: Op
    future: Future[Reply]


class _Gathered:
    """What a loop's tasks ask of a store.  under_way: a batch is, or will be after the tasks' turn."""

    __slots__ = ("__weakref__", "under_way", "waiting")

    def __init__(self) -> None:
        self.waiting: list[_Asked] = []
        self.under_way = False


# It refers to neither, so that both can go.
_gathered: WeakKeyDictionary[AbstractEventLoop, WeakKeyDictionary[Store, _Gathered]] = WeakKeyDictionary()


async def apply_async(store: Store, op: Op) -> Reply:
    """The reply to ``op``.  If the caller is cancelled it is applied all the same; a claim is given back."""
    loop = asyncio.get_running_loop()
    gathered = _gathered.setdefault(loop, WeakKeyDictionary()).setdefault(store, _Gathered())
    asked = _Asked(op, loop.create_future())
    gathered.waiting.append(asked)
    if not gathered.under_way:
        gathered.under_way = True
        loop.call_soon(_carry, loop, store, gathered)
    return await asked.future


def _carry(loop: AbstractEventLoop, store: Store, gathered: _Gathered) -> None:
    """Send off what waits."""
    batch, gathered.waiting = gathered.waiting, []
    gathered.under_way = bool(batch)
    if not batch:
        return
    try:
        replies = loop.run_in_executor(None, store.apply, [asked.op for asked in batch])
    except RuntimeError as error:  # the loop is being shut down
        gathered.under_way = False
        _fail(batch, error)
        return
    replies.add_done_callback(partial(_deliver, loop, store, gathered, batch))


def _deliver(
    loop: AbstractEventLoop,
    store: Store,
    gathered: _Gathered,
    batch: Sequence[_Asked],
    replies: Future[list[Reply]],
) -> None:
    if (error := replies.exception()) is not None:
        _fail(batch, error)
    else:
        unheard = []
        for asked, reply in zip(batch, replies.result(), strict=True):
            if asked.future.cancelled():
                unheard += undoing([asked.op], [reply])
            else:
                asked.future.set_result(reply)
        if unheard:
            try:
                loop.run_in_executor(None, _give_back, store, unheard)
            except RuntimeError:  # the loop is being shut down: it has nothing else to do
                _give_back(store, unheard)
    # Behind the tasks that wake now: what they ask next goes along.
    loop.call_soon(_carry, loop, store, gathered)


def _fail(batch: Sequence[_Asked], error: BaseException) -> None:
    for asked in batch:
        if not asked.future.cancelled():
            asked.future.set_exception(error)


def _give_back(store: Store, claims: Sequence[Op]) -> None:
    try:
        store.apply(claims)
    except Exception as error:
        keys = ", ".join(repr(op.key) for op in claims)
        log.warning(
            "claimed for callers that were cancelled, and could not be given back: %s: %s", keys, error
        )
