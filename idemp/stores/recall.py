"""What this process knows to be done, so that most duplicates ask nobody: for stores on a server.

It learns from what the server said: a completion of mine, a done that I was told of, what others tell.  A
done leaves only with the retention or by a forget, and everybody hears of a forget.  So memory
answers only while it hears: whoever listens vouches for it, a moment at a time, with what was asked and
answered behind everything that was said before, and what time it is there.  When that ends, all is
forgotten here, and begins anew.

A reply may be overtaken by the news of a forget that came after it.  So each forget that is heard begins
another era, and a reply to what was asked in an earlier one teaches nothing.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from idemp.ports import Clock, Done
from idemp.stores.seen import PLACES, Seen

TRUST = 2.0
"""Seconds for which it answers after the last time that it was vouched for."""
VOUCH = 0.5
"""Seconds between two times."""
LARGE = 10_000
"""Bytes of a result and its fingerprint together, above which a done is not kept here."""
ROOM = 64 << 20
"""Bytes that all of it takes, about."""
_SLICES = 8
_PLAIN, _MORE = 33, 250  # bytes of a done; and of one with a result beside it


class _Slice(NamedTuple):
    """What was learned in some time.  ``times``: of done, place by place, from ``start`` on."""

    start: int
    began: float
    times: array[float]


class Recall:
    """The memory of one session.  Safe to use from many threads.

    room: bytes that it takes, about.
    """

    def __init__(self, clock: Clock, *, room: int = ROOM) -> None:
        self._clock, self._room = clock, room
        self._lock = threading.Lock()
        self._era = 0
        self._follows = False
        self._until = 0.0
        self._timed = False  # whether the next two are this server's
        self._retention, self._ahead = 0.0, 0.0
        self._since = 0.0  # by the server's clock: what was done before is not kept here
        # Forgotten by me: under which token, and when.  A done that comes later may be an older one.
        self._gone: dict[str, tuple[int, float]] = {}
        self._clear()

    def _clear(self) -> None:
        self._seen = Seen()
        self._slices = [_Slice(0, self._clock.steady(), array("d"))]
        self._number = 0  # of the newest slice
        self._place = 0
        self._weights = [0]

    # ---------------------------------------------------------------- who listens

    @property
    def follows(self) -> bool:
        """Whether somebody listens, and everything is heard."""
        return self._follows

    def begin(self, asked: float) -> None:
        """From now on everything is heard.  ``asked``: when the server was asked for that, steady."""
        with self._lock:
            self._clear()
            self._era += 1
            self._follows, self._until = True, asked + TRUST

    def vouch(self, asked: float, now: float) -> None:
        """All that was said before the server answered to what it was ``asked`` then, steady, is heard.

        now: the server's clock, as it said since then.
        """
        with self._lock:
            if self._timed:
                self._tell_time(now - asked)
            self._until = max(self._until, asked + TRUST)

    def lose(self) -> None:
        """Something may go unheard, or the server is another: nothing is known until `begin`."""
        with self._lock:
            self._era += 1
            self._follows = self._timed = False
            self._clear()

    # ---------------------------------------------------------------- what is heard

    def era(self) -> int:
        """To be asked before the server is, and told to `learn`."""
        return self._era

    def told(self, retention: float, now: float, asked: float, since: float = 0.0) -> None:
        """How long done is remembered, and the server's clock, as it said when it was ``asked``, steady.

        since: by that clock, when it began to remember for so long, if what was done before goes sooner.
        """
        if retention != self._retention:
            self._retain(retention, now)
        with self._lock:
            self._since = max(self._since, since)
            self._tell_time(now - asked)

    def _tell_time(self, ahead: float) -> None:
        """The server's clock, which may be set, is so far ahead of the steady one."""
        if self._timed and ahead < self._ahead - TRUST:
            # What was over by its later time is gone there, and does not come back with the earlier one.
            self._era += 1
            self._clear()
        self._ahead, self._timed = ahead, True

    def _retain(self, retention: float, now: float) -> None:
        """What was done under a shorter retention may be gone by that, and was perhaps run anew since."""
        with self._lock:
            if self._retention:
                self._era += 1
                self._clear()
                self._since = now
            self._retention = retention

    def learn(self, era: int, found: Iterable[tuple[str, Done]]) -> None:
        """What was done, in the words of the server to one who asked in that era."""
        with self._lock:
            if era == self._era and self._follows and self._timed:
                for key, done in found:
                    self._add(key, done)

    def forgotten(self, pairs: Iterable[tuple[str, int]]) -> None:
        """Heard: these keys, done under these tokens, were forgotten by somebody."""
        with self._lock:
            self._era += 1
            for key, token in pairs:
                self._remove(key, token)
                if key in self._gone and self._gone[key][0] <= token:
                    del self._gone[key]

    def forget(self, pairs: Iterable[tuple[str, int]]) -> None:
        """The same by myself, and it is still to be heard."""
        with self._lock:
            now = self._clock.steady()
            # Whoever listens is not that far behind, or is not vouched for.
            while self._gone and next(iter(self._gone.values()))[1] + TRUST <= now:
                del self._gone[next(iter(self._gone))]
            for key, token in pairs:
                self._remove(key, token)
                self._gone.pop(key, None)  # the oldest stand first
                self._gone[key] = token, now

    def forget_all(self) -> None:
        """Some were forgotten, by whomever, and it is not said which."""
        with self._lock:
            self._era += 1
            self._clear()

    def find(self, key: str) -> Done | None:
        """Its state, if it is done for sure."""
        with self._lock:
            now = self._clock.steady()
            if not self._follows or now >= self._until:
                return None
            found = self._seen.find(key)
            if found is None:
                return None
            at = self._at(found.place)
            if at + self._retention <= now + self._ahead:
                return None
            return Done(found.token, found.result, found.fingerprint, at, found.attempt)

    # ---------------------------------------------------------------- the table

    def _add(self, key: str, done: Done) -> None:
        kept = len(done.result or b"") + len(done.fingerprint or b"")
        if kept > LARGE or done.at < self._since:
            return
        if key in self._gone and self._gone[key][0] >= done.token:
            return
        found = self._seen.find(key)
        if found is not None:
            if found.token >= done.token:
                return
            self._seen.remove(key)
        self._turn()
        last = self._slices[-1]
        if not last.times or last.times[-1] != done.at:
            last.times.append(done.at)
            self._place += 1
        place = last.start + len(last.times) - 1
        self._seen.add(key, done.token, place, done.result, done.fingerprint, done.attempt)
        plain = done.result == b"null" and done.fingerprint is None and done.attempt == 1
        self._weights[-1] += _PLAIN + (0 if plain else _MORE + kept)

    def _turn(self) -> None:
        """Begin another slice when it is time, and drop what is over or too much."""
        now, last = self._clock.steady(), self._slices[-1]
        full = self._weights[-1] >= self._room / _SLICES
        if not full and now - last.began < self._retention / _SLICES:
            return
        if self._place >= PLACES - 2:
            self._clear()
            return
        self._number += 1
        self._slices.append(_Slice(self._place, now, array("d")))
        self._weights.append(0)
        self._seen.begin(self._number, self._place)
        # The first is over when all that is in it is: the second began when its last was learned.
        while len(self._slices) > 1 and (
            sum(self._weights) > self._room * (1 - 1 / _SLICES)
            or now - self._slices[1].began >= self._retention
        ):
            del self._slices[0], self._weights[0]
        self._seen.drop_before(self._number + 1 - len(self._slices))

    def _at(self, place: int) -> float:
        starts = [each.start for each in self._slices]
        each = self._slices[bisect_right(starts, place) - 1]
        return each.times[place - each.start]

    def _remove(self, key: str, token: int) -> None:
        found = self._seen.find(key)
        if found is not None and found.token <= token:
            self._seen.remove(key)
