"""Signals that end a process: the first is heard, a second SIGTERM does no harm, a second SIGINT kills."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT stop; for a second one what was there before holds.

    Only the main thread may say so: in another nothing is heard.
    """
    if not _may():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: Any) -> None:
        for which, handler in before.items():
            signal.signal(which, handler)
        stop()

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ended_once() -> Iterator[Callable[[], None]]:
    """For a process whose work hears SIGTERM itself while it runs; call what is yielded when it does.

    Before, SIGTERM is the end, with exit code 143.  Once it runs another SIGTERM is ignored until the process
    is gone: who sends two, as `timeout` does for one, has been heard, and all is let go of in order.
    """
    if not _may():
        yield lambda: None
        return
    running = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: None if running.is_set() else sys.exit(143))
    yield running.set
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _may() -> bool:
    return threading.current_thread() is threading.main_thread()
