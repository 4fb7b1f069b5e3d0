"""Who replays to a service just now: a claim in the service's own store, which ends with the process.

One that died is in doubt like any other claim, and the next takes it over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from idemp.deeds import HOLDS, read
from idemp.errors import IdempError, Unavailable
from idemp.ports import Busy, Claim, Claimed, Clock, Doubt, Get, Release, Store, Takeover

_LOOK = 1.0
"""Seconds between two looks at who holds it."""
_NEAR = 5.0
"""Seconds that the store's clock and this one may differ."""


class ReplayHeld(IdempError):
    """Somebody else replays to the same service; nothing was sent."""


@contextmanager
def holding(
    store: Store, service: str, *, wait: float = 0.0, clock: Clock | None = None
) -> Iterator[Callable[[], bool]]:
    """Nobody else replays to ``service`` inside; called, what it gives says whether that still holds.

    wait: seconds for somebody who may be dead.  Raises `ReplayHeld`.
    """
    key = f"{HOLDS}{service}"
    token = _take(store, key, service, (clock or Clock()), wait)
    try:
        yield lambda: store.fresh(token)
    finally:
        with suppress(Unavailable):  # then it ends with this process
            store.apply([Release(key, token, 0)])


def _take(store: Store, key: str, service: str, clock: Clock, wait: float) -> int:
    end = clock.steady() + wait
    while True:
        state = store.apply([Claim(key)])[0]
        if isinstance(state, Doubt):
            state = store.apply([Takeover(key, state.token)])[0]
        if isinstance(state, Claimed):
            return state.token
        if isinstance(state, Busy):
            left = end - clock.steady()
            if left <= 0:
                raise ReplayHeld(_told(store, service, state))
            store.wait(key, state.token, min(left, _LOOK))


def check(store: Store, service: str) -> None:
    """Raise `ReplayHeld` if somebody replays to ``service`` now."""
    state = store.apply([Get(f"{HOLDS}{service}")])[0]
    if isinstance(state, Busy):
        raise ReplayHeld(_told(store, service, state))


def _told(store: Store, service: str, busy: Busy) -> str:
    since = datetime.fromtimestamp(busy.at, UTC)
    who = "somebody"
    for deed in read(store):
        about = deed.about or {}
        if about.get("verb") == "replay" and about.get("service") == service:
            late = (datetime.fromisoformat(about["at"]) - since).total_seconds()
            who = f"replay {about['replay']} of {about['who']}" if late >= -_NEAR else who
    return f"{who} holds {service} since {since:%Y-%m-%d %H:%M:%S} UTC: wait for its end, or stop it"
