"""What the writer of the SQLite store knows of its file without asking, until another connection writes.

SQLite numbers what a connection sees of the others' commits (PRAGMA data_version).  While that number
stays, the file holds what this connection read or wrote last: its own claims need not be loaded to be
completed, nor what was done lately to answer a duplicate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from idemp.laws import Entry, Ledger

MOST = 25_000
"""Keys in a generation; two are kept."""
LARGE = 1_000
"""Bytes of a result and its fingerprint together, above which a key is not kept."""


class Loaded(NamedTuple):
    """What a transaction knows of the file and of some keys.  ``sessions``: when each expires, steady."""

    meta: dict[str, Any]
    sessions: dict[str, float]
    entries: dict[str, Entry]


class Known:
    """What one connection knows while its number is ``version``.  Only who holds the connection may use it.

    meta: empty when it is not known.  stamp: the number of another connection, for all to look at, from
    its first look after the last commit of this one.
    """

    def __init__(self, version: int = -1) -> None:
        self.version = version
        self.stamp: int | None = None
        self.meta: dict[str, Any] = {}
        self._sessions: dict[str, float] = {}
        self._young: dict[str, Entry] = {}
        self._old: dict[str, Entry] = {}

    def alive(self, now: float) -> dict[str, float]:
        """The sessions that have not expired; ``now`` is steady."""
        return {each: expires for each, expires in self._sessions.items() if expires > now}

    def find(self, key: str) -> Entry | None:
        """What is stored of ``key``, also when it is over; None: nothing is known."""
        return self._young.get(key) or self._old.get(key)

    def keep(self, key: str, entry: Entry) -> None:
        """This is stored of ``key``."""
        if len(entry.result or b"") + len(entry.fingerprint or b"") > LARGE:
            self._drop(key)
            return
        if len(self._young) >= MOST:
            self._old, self._young = self._young, {}
        self._young[key] = entry

    def wrote(self, meta: dict[str, Any], sessions: dict[str, float], ledger: Ledger) -> None:
        """This was committed."""
        self.meta, self._sessions, self.stamp = meta, sessions, None
        for key in ledger.changed:
            entry = ledger.entries.get(key)
            if entry is None:
                self._drop(key)
            else:
                self.keep(key, entry)

    def _drop(self, key: str) -> None:
        self._young.pop(key, None)
        self._old.pop(key, None)
