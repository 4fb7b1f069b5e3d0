"""Deeds: what a person changed, recorded with the change: who, when, why, and what was there before.

A deed is a parked key of the store itself, named `DEEDS` and the time, whose reason is its JSON: what is
parked is kept whatever the retention of ids is, until somebody drops it.  `sweep` does, after `KEPT`
seconds or behind the newest `MOST`.  It is parked in the batch that makes the change, before it, and a
batch is durable as one: whatever is killed where, no change is without its deed.  A change that came
second is told by its reply; its deed is then written anew without it.  Who is killed right there leaves a
deed of a key that somebody else had changed at that moment: the token in both deeds, or the key itself,
tells.

A deed of many keys is a note of what is about to be done, which is kept like any deed, and pages with what
each key was, which are done keys: they are remembered as long as the ids that they tell of.

Who is killed before the change leaves a key that is claimed and soon in doubt: something was begun here,
and changed nothing.
"""

from __future__ import annotations

import json
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple

from msgspec.structs import asdict

from idemp.errors import StoreUnavailable
from idemp.policy import RESERVED
from idemp.ports import (
    Busy,
    Claim,
    Claimed,
    Clock,
    Complete,
    Done,
    Doubt,
    Forget,
    Free,
    Get,
    Lost,
    Op,
    Park,
    Parked,
    Release,
    Reply,
    State,
    Store,
    Takeover,
)

DEEDS = f"{RESERVED}/"
"""What the keys of deeds begin with."""
HOLDS = f"{DEEDS}~replay/"
"""What the keys begin with that say who replays to a service; behind all deeds."""
PAGE = 1000
TOGETHER = 90
"""Changes in one deed: less than any store splits into two."""
MOST_BYTES = 128 * 1024
"""Bytes of one deed; an etcd takes no more than 1.5 MiB at a time, and a byte may become three there."""
KEPT = 365 * 86400.0
"""Seconds that a deed is kept."""
MOST = 5000
"""Deeds that are kept."""
MOST_KEPT = 4 * 1024 * 1024
"""Bytes of all deeds that are kept: an etcd writes them into each of its nine snapshots."""
SWEPT = 64
"""Of so many deeds one drops what is over; to look at all of them each time would take long."""
UNFINISHED = 3600.0
"""Seconds after which nobody comes back to a deed that was begun: far more than a session lives."""
_KEPT = 4096
"""Bytes of a result that a deed repeats."""

WORDS: dict[type, str] = {Done: "done", Busy: "busy", Doubt: "doubt", Parked: "parked", Free: "free"}


class Deed(NamedTuple):
    """One deed as it was recorded.  ``about`` is None where something was begun and changed nothing.

    A page of a deed has the id of that deed as ``of``.
    """

    id: str
    about: Mapping[str, Any] | None

    @property
    def of(self) -> str:
        """Of what deed it is a page; "" for a deed."""
        return "" if self.about is None else str(self.about.get("of", ""))


class Change(NamedTuple):
    """``op`` on a key that is in the state ``before``."""

    op: Complete | Release | Forget
    before: State


class Book:
    """Where the deeds of ``who`` go: into ``store``, with the reason ``why``.

    of: the changes are pages of what has this id.  So they are, too, after a `note` in this book.
    """

    def __init__(
        self, store: Store, who: str, why: str = "", *, of: str = "", clock: Clock | None = None
    ) -> None:
        self._store, self._who, self._why, self._clock = store, who, why, clock or Clock()
        self._of = of

    def change(self, verb: str, changes: Sequence[Change], **more: Any) -> list[Reply]:
        """Make all ``changes``, recorded; one reply each: `Applied`, or `Lost` to who came first.

        Raises `StoreUnavailable`: then each is made and recorded, or neither.
        """
        replies: list[Reply] = []
        for part in _parts(changes):
            replies += self._change(verb, part, more)
        return replies

    def note(self, verb: str, **about: Any) -> None:
        """Record what is about to be done: where the store has no part in it, or to many keys."""
        key, token = self._begin()
        self._of = ""
        self._store.apply([self._written(key, token, self._text(verb, [], about))])
        self._of = key[len(DEEDS) :]
        self._sweep(key)

    def _change(self, verb: str, changes: Sequence[Change], more: Mapping[str, Any]) -> list[Reply]:
        key, token = self._begin()
        deed = self._written(key, token, self._text(verb, changes, more))
        written, *replies = self._store.apply([deed, *(change.op for change in changes)])
        made = [change for change, reply in zip(changes, replies, strict=True) if not isinstance(reply, Lost)]
        if isinstance(written, Lost) or len(made) < len(changes):
            self._correct(key, verb, made, more)
        self._sweep(key)
        return replies

    def _correct(self, wrong: str, verb: str, made: Sequence[Change], more: Mapping[str, Any]) -> None:
        """Somebody was first with some of it: the deed is only what was ``made``."""
        [state] = self._store.apply([Get(wrong)])
        ops: list[Op] = [Forget(wrong, state.token)] if isinstance(state, Done | Parked) else []
        if made:
            key, token = self._begin()
            ops.append(self._written(key, token, self._text(verb, made, more)))
        self._store.apply(ops)

    def _begin(self) -> tuple[str, int]:
        """A key of this moment, mine.  It says nothing yet."""
        at = datetime.fromtimestamp(self._clock.wall(), UTC).isoformat(timespec="microseconds")
        key = f"{DEEDS}{at.replace('+00:00', 'Z')}-{uuid.uuid4().hex[:8]}"
        claim = self._store.apply([Claim(key)])[0]
        if not isinstance(claim, Claimed):
            raise StoreUnavailable(f"the store does not take a deed: {claim!r}")
        return key, claim.token

    def _written(self, key: str, token: int, text: str) -> Op:
        return Complete(key, token, text.encode()) if self._of else Park(key, token, text)

    def _sweep(self, key: str) -> None:
        """Now and then, by the random end of the name; what was done is done if it fails."""
        if int(key[-8:], 16) % SWEPT == 0:
            with suppress(StoreUnavailable):
                sweep(self._store, clock=self._clock)

    def _text(self, verb: str, changes: Sequence[Change], more: Mapping[str, Any]) -> str:
        at = datetime.fromtimestamp(self._clock.wall(), UTC).isoformat(timespec="milliseconds")
        about: dict[str, Any] = {"at": at, "who": self._who, "why": self._why, "verb": verb, **more}
        if self._of:
            about["of"] = self._of
        if changes:
            about["keys"] = [_was(change) for change in changes]
        return json.dumps(about, separators=(",", ":"))


def _parts(changes: Sequence[Change]) -> Iterator[Sequence[Change]]:
    """As many at a time as one deed holds."""
    part: list[Change] = []
    size = 0
    for change in changes:
        weight = len(json.dumps(_was(change)))
        if part and (len(part) == TOGETHER or size + weight > MOST_BYTES):
            yield part
            part, size = [], 0
        part.append(change)
        size += weight
    if part:
        yield part


def _was(change: Change) -> dict[str, Any]:
    known = described(change.op.key, change.before)
    result = change.before.result if isinstance(change.before, Done) else None
    if result is not None and len(result) > _KEPT:
        known.pop("result", None)
        known.pop("result_hex", None)
        known["result_bytes"] = len(result)
    return known


# ------------------------------------------------------------------ reading


def read(store: Store, *, pages: bool = False) -> Iterator[Deed]:
    """All deeds that are kept, in the order of time; with their ``pages``, as long as there are some."""
    for key, state in keys(store, DEEDS):
        if key.startswith(HOLDS):
            return
        deed = _deed(key[len(DEEDS) :], state)
        if deed is not None and (pages or not deed.of):
            yield deed


def _deed(id: str, state: State) -> Deed | None:
    match state:
        case Parked(_, _, text) | Done(_, bytes() as text):
            return Deed(id, json.loads(text))
        case Doubt():
            return Deed(id, None)
    return None


def sweep(store: Store, *, clock: Clock | None = None) -> int:
    """Drop deeds that are too old or too many, and what was begun and never came to be; how many."""
    now = (clock or Clock()).wall()
    dropped, kept, size = 0, deque[tuple[Forget, int]](), 0
    over: list[Forget] = []
    for key, state in list(keys(store, DEEDS)):
        if isinstance(state, Doubt):
            dropped += state.at < now - UNFINISHED and _drop_unfinished(store, key, state)
        elif isinstance(state, Parked) and state.at < now - KEPT:
            over.append(Forget(key, state.token))
        elif isinstance(state, Parked):
            kept.append((Forget(key, state.token), len(state.reason)))
            size += len(state.reason)
    while len(kept) > MOST or size > MOST_KEPT:
        oldest, bytes_ = kept.popleft()
        size -= bytes_
        over.append(oldest)
    for start in range(0, len(over), TOGETHER):
        store.apply(over[start : start + TOGETHER])
    return dropped + len(over)


def _drop_unfinished(store: Store, key: str, state: Doubt) -> bool:
    """So old that nobody comes back to it."""
    taken = store.apply([Takeover(key, state.token)])[0]
    if isinstance(taken, Claimed):
        store.apply([Release(key, taken.token, 0)])
    return isinstance(taken, Claimed)


def keys(store: Store, prefix: str = "", after: str = "", page: int = PAGE) -> Iterator[tuple[str, State]]:
    """All keys that start with ``prefix``, behind ``after``, page by page."""
    while found := store.scan(prefix, after=after, limit=page):
        yield from found
        after = found[-1][0]


# ------------------------------------------------------------------ a key in words


def described(key: str, state: Any) -> dict[str, Any]:
    """What is known of ``key``, for JSON."""
    found: dict[str, Any] = {"key": key, "state": WORDS[type(state)]}
    for name, value in asdict(state).items():
        if name == "at":
            found[name] = datetime.fromtimestamp(value, UTC).isoformat(timespec="milliseconds")
        elif isinstance(value, bytes):
            found.update(_readable(name, value))
        elif value is not None:
            found[name] = value
    return found


def _readable(name: str, value: bytes) -> dict[str, Any]:
    """Stored bytes: a JSON result as itself, everything else in hexadecimal digits."""
    if name == "result":
        try:
            return {name: json.loads(value)}
        except (ValueError, RecursionError):
            pass
    return {f"{name}_hex": value.hex()}
