"""The connection that handlers get on PostgreSQL: a savepoint stands before each, and costs no round trip.

It is owed when a handler begins, and goes out with the handler's first statement, in front of it: two
messages of libpq's pipeline and one wait for the answers.  What is not one plain statement (COPY, a block
of `transaction()`, a server-side cursor, several statements in one) waits until the savepoint was sent by
itself.  A handler that does nothing on the connection leaves it owed.

`psycopg.Pipeline` would take two more waits and more work than a round trip here; so this one does the same
in one go, with the parts that psycopg's cursor has for pipelines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import psycopg
from psycopg import errors, generators
from psycopg.abc import Params, PQGen, Query
from psycopg.pq import ConnStatus, ExecStatus
from psycopg.pq.abc import PGresult
from psycopg.rows import TupleRow

T = TypeVar("T")

NEXT = (b"RELEASE SAVEPOINT idemp", b"SAVEPOINT idemp")
"""What was done is not undone any more, and what comes can be."""
_KNOWN = psycopg.__version__.split(".")[:2] in (["3", "2"], ["3", "3"])
"""Whether psycopg's cursor is one whose parts are known; with another the savepoint goes by itself."""
_PLAIN = r"\s*(?:INSERT|UPDATE|DELETE|MERGE|SELECT|VALUES|WITH)\b[^;]*;?\s*"
_PLAIN_TEXT, _PLAIN_BYTES = re.compile(_PLAIN, re.IGNORECASE), re.compile(_PLAIN.encode(), re.IGNORECASE)


def plain(query: Query) -> bool:
    """Whether this is one statement that may go through a pipeline; in doubt it is not."""
    match query:
        case str():
            return _PLAIN_TEXT.fullmatch(query) is not None
        case bytes():
            return _PLAIN_BYTES.fullmatch(query) is not None
    return False


class _Ahead(psycopg.Pipeline):
    """One statement with the savepoint in front of it.  Psycopg's cursor takes it for a pipeline."""

    def __init__(self, owner: HandlersConnection) -> None:
        super().__init__(owner)
        self._owner = owner

    def _communicate_gen(self) -> PQGen[None]:
        """Send all that is queued, and take all answers: what fails raises as it does by itself."""
        pgconn, commands, asked = self.pgconn, [*self.command_queue], [*self.result_queue, None]
        self.leave()
        self._owner.owes = False
        answers: list[list[Any]] = []
        pgconn.enter_pipeline_mode()
        try:
            for word in NEXT:
                self._send(word)
            for command in commands:
                command()
            pgconn.pipeline_sync()
            yield from generators.send(pgconn)
            for _ in range(len(NEXT) + len(asked)):
                answers.append((yield from generators.fetch_many(pgconn)))  # noqa: PERF401
        finally:
            if pgconn.status != ConnStatus.BAD:
                pgconn.exit_pipeline_mode()
        self._owner.paid(result for answer in answers[: len(NEXT)] for result in answer)
        self._raise_first(asked, answers[len(NEXT) :])

    def _send(self, word: bytes) -> None:
        """As a prepared statement, where the store has it prepared: that is a quarter of the round trip."""
        name = self._owner._prepared._names.get((word, ()))
        if name is None:
            self.pgconn.send_query_params(word, None)
        else:
            self.pgconn.send_query_prepared(name, None)

    def _raise_first(self, asked: Sequence[Any], answers: Sequence[list[Any]]) -> None:
        """Give every answer to who asked."""
        failed: list[psycopg.Error] = []
        for each, answer in zip(asked, answers, strict=True):
            try:
                self._process_results(each, answer)
            except psycopg.Error as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def leave(self) -> None:
        """From here on the cursor asks by itself."""
        self._owner._pipeline = None
        self.command_queue.clear()
        self.result_queue.clear()


class HandlersConnection(psycopg.Connection[TupleRow]):
    """A psycopg connection in all that a handler can see but its ``pgconn``, which knows no savepoints.

    owes: whether the savepoint is yet to be sent.  torn: why it could not be set, so that what is undone
    now would be the work of the handler before.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.owes = False
        self.torn: psycopg.Error | None = None
        self.cursor_factory = HandlersCursor
        self._ahead = _Ahead(self)

    def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        """As psycopg's, for whatever is asked of the server here; what is owed comes first."""
        if self.owes and getattr(gen, "gi_code", None) is not _EXECUTE:
            super().wait(self.pay())
        return super().wait(gen, *args, **kwargs)

    def pay(self) -> PQGen[None]:
        """Send the savepoint by itself."""
        self.owes = False
        self.pgconn.send_query(b"; ".join(NEXT))
        self.paid((yield from generators.execute(self.pgconn)))

    def paid(self, results: Iterable[PGresult]) -> None:
        """What the server said to the savepoint.  Raises its error."""
        for result in results:
            if result.status != ExecStatus.COMMAND_OK:
                self.torn = errors.error_from_result(result, encoding=self.info.encoding)
                raise self.torn

    def ahead(self) -> _Ahead:
        """With the statement that is composed next the savepoint goes out, too."""
        self._pipeline = self._ahead
        return self._ahead


class HandlersCursor(psycopg.Cursor[Any]):
    """Its first statement takes along what the connection owes."""

    def _execute_gen(
        self,
        query: Query,
        params: Params | None = None,
        *,
        prepare: bool | None = None,
        binary: bool | None = None,
    ) -> PQGen[None]:
        connection, ask = self._conn, super()._execute_gen
        assert isinstance(connection, HandlersConnection)
        if not connection.owes:
            yield from ask(query, params, prepare=prepare, binary=binary)
        elif not (_KNOWN and plain(query)):
            yield from connection.pay()
            yield from ask(query, params, prepare=prepare, binary=binary)
        else:
            ahead = connection.ahead()
            try:
                yield from ask(query, params, prepare=prepare, binary=binary)
            finally:
                ahead.leave()


_EXECUTE = HandlersCursor._execute_gen.__code__
