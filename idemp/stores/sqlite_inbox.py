"""A transaction of the SQLite store that handlers write in: the file is theirs and the store's."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from idemp.errors import PermanentFailure
from idemp.laws import Ledger
from idemp.ports import Op, Publication, Reply
from idemp.stores.sqlite_known import Loaded

ME = "in this transaction"
"""The session of its claims, which nobody ever sees."""
_ENDED = "the handler ended the transaction that it was given; leave commit and rollback to idemp"


class HandlersConnection(sqlite3.Connection):
    """What a handler gets: all of a connection, but its transaction is not the handler's to end."""

    def commit(self) -> None:
        """Refuse."""
        raise PermanentFailure(_ENDED)

    rollback = close = commit

    def __enter__(self) -> HandlersConnection:
        """Refuse: its exit commits."""
        raise PermanentFailure("a with statement on the connection commits at its end; leave it out")

    def executescript(self, script: str) -> sqlite3.Cursor:
        """Refuse: it begins with a commit."""
        raise PermanentFailure("executescript() commits; call execute() for each statement")

    def end(self) -> None:
        """Close it."""
        super().close()


class SqliteTransaction:
    """See `idemp.ports.Transaction`.  Other writers of the file wait until it ends.

    load: reads keys on the connection.  wall: seconds since 1970.
    """

    def __init__(
        self, connection: HandlersConnection, load: Callable[[set[str]], Loaded], wall: Callable[[], float]
    ) -> None:
        self.connection = connection
        self.lost = False
        self._load, self._wall = load, wall
        self._known: set[str] = set()
        self._ledger: Ledger | None = None
        self.outgoing: list[tuple[str, Publication]] = []
        self.meta: dict[str, Any] = {}
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("SAVEPOINT idemp")

    def apply(self, ops: Sequence[Op]) -> list[Reply]:
        """See `idemp.ports.Transaction`."""
        ledger = self.ledger
        if ledger is None or not all(op.key in self._known for op in ops):
            ledger = self._look({op.key for op in ops} - self._known)
        return [ledger.apply(op) for op in ops]

    def _look(self, keys: set[str]) -> Ledger:
        found = self._load(keys)
        self._known |= keys
        if self._ledger is None:
            self.meta = found.meta
            alive = {*found.sessions, ME}
            token = found.meta.get("token", 0)
            self._ledger = Ledger({}, alive.__contains__, ME, token, self._wall())
        self._ledger.entries.update(found.entries)
        return self._ledger

    def put(self, key: str, publications: Sequence[Publication]) -> None:
        """See `idemp.ports.Transaction`."""
        self.outgoing += [(key, publication) for publication in publications]

    @property
    def ledger(self) -> Ledger | None:
        """The laws over what was loaded; None before the first `apply`."""
        return self._ledger

    def keep(self) -> None:
        """See `idemp.ports.Transaction`."""
        db = self.connection
        self._reset()
        if not db.in_transaction:
            raise PermanentFailure(_ENDED)
        db.execute("RELEASE idemp")
        db.execute("SAVEPOINT idemp")
        if self._ledger is not None:
            self._ledger.now = self._wall()

    def undo(self, error: BaseException) -> bool:
        """See `idemp.ports.Transaction`.  SQLite itself rolls all back when the disk is full or fails."""
        self._reset()
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK TO idemp")
        else:
            self.lost = True
        return not self.lost

    def _reset(self) -> None:
        """What the handler may have set for its own rows."""
        self.connection.row_factory = None
        self.connection.text_factory = str
