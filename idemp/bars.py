"""Bars: how far long work is, for who watches a terminal; nothing in a pipe."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from idemp.ports import Progress, Store

T = TypeVar("T")

LONG = 500
"""Steps that are worth a bar."""
AFTER = 1.0
"""Seconds after which a person wonders."""
_LOOK = 0.1


@contextmanager
def bar(length: int, what: str, *, least: int = LONG) -> Iterator[Callable[[int], None]]:
    """Called with the steps that were made: a bar on a terminal, if there are at least ``least``."""
    if length < least or not sys.stderr.isatty():
        yield lambda _: None
        return
    with _drawn(what, length) as shown:
        yield lambda steps: shown.advance(shown.task_ids[0], steps)


@contextmanager
def watching(
    what: str, progress: Callable[[], Progress | None], after: float = AFTER
) -> Iterator[Callable[[], None]]:
    """A bar of what ``progress`` tells, if the work takes longer than ``after`` seconds.

    While it tells nothing the bar only moves.  What is yielded ends it early.
    """
    ended = threading.Event()
    if not sys.stderr.isatty():
        yield ended.set
        return
    watcher = threading.Thread(target=_watch, args=(what, progress, after, ended), name="idemp-bar")

    def end() -> None:
        ended.set()
        watcher.join()

    watcher.start()
    try:
        yield end
    finally:
        end()


def _watch(what: str, progress: Callable[[], Progress | None], after: float, ended: threading.Event) -> None:
    if ended.wait(after):
        return
    with _drawn(what, None, transient=True) as shown:
        while not ended.wait(_LOOK):
            if (far := progress()) is not None:
                shown.update(shown.task_ids[0], total=far.total, completed=far.done)


def reading(store: Store, found: Iterable[T], what: str = "reading") -> Iterator[T]:
    """``found``, which are the keys of ``store`` one by one, with a bar of how many have come."""
    done, total = 0, 0

    def progress() -> Progress:
        nonlocal total
        if (far := store.progress()) is not None:
            return far
        total = total or store.size()
        return Progress(done, max(done, total))

    with watching(what, progress):
        for each in found:
            done += 1
            yield each


@contextmanager
def _drawn(what: str, total: int | None, *, transient: bool = False) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn())
    # What is said meanwhile on the same terminal stands above the bar; a pipe gets it as it is.
    with Progress(
        *columns,
        console=Console(stderr=True),
        transient=transient,
        redirect_stdout=sys.stdout.isatty(),
    ) as shown:
        shown.add_task(what, total=total)
        yield shown
