"""The Redis store: one call of one script a batch, all laws in it (redis.lua), by the server's clock.

A key is one value: open ones stay, done ones expire by themselves after the retention.  The session is a
key that expires, too; its value is the number of its last batch and what that answered.  So a batch
whose reply was lost is sent again and answered, not done twice; and a server that names an earlier
batch than it had confirmed has forgotten something.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from idemp.errors import BadMessage, Closed, ConfigError, MissingExtra, StoreUnavailable
from idemp.laws import Entry, undoing, view
from idemp.ports import (
    Abandon,
    Applied,
    Busy,
    Claim,
    Claimed,
    Clock,
    Complete,
    Forget,
    Get,
    Lost,
    Op,
    Park,
    Release,
    Reply,
    State,
    Takeover,
)
from idemp.redis_server import Server, check, explain
from idemp.stores.door import Confirmed, SessionStore
from idemp.stores.group import GroupCommit

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.exceptions import NoScriptError, RedisError
    from redis.retry import Retry
except ImportError:
    raise MissingExtra("redis://", "redis") from None

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that a batch tries to get through before `StoreUnavailable`."""
TIMEOUT = 5.0
"""Seconds for one answer."""
_POLL = (0.01, 0.25, 2.0)  # at first, at most, and at most while notifications come
_PAGE = 1000
_SCRIPT = Path(__file__).with_name("redis.lua").read_text()
_NAME = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()


class RedisStore(SessionStore):
    """The store in the namespace ``at``.

    retention: seconds that done is remembered (the longest that any opener named is in force).
    session_ttl: seconds without a heartbeat after which this process's claims are in doubt.
    """

    def __init__(
        self, at: Server, *, retention: float, session_ttl: float, clock: Clock | None = None
    ) -> None:
        super().__init__(partial(_Session, at, retention, session_ttl, clock or Clock()), retention)
        self.at = at

    def apply(self, ops: Sequence[Op]) -> list[Reply]:
        """See `idemp.ports.Store`.  Raises `BadMessage` for a key that is no Unicode."""
        for op in ops:
            try:
                op.key.encode()
            except UnicodeEncodeError:
                raise BadMessage(f"the key {op.key!r} is not valid Unicode") from None
        return super().apply(ops)


# ------------------------------------------------------------------ operations and answers as Redis has them


def _words(op: Op) -> tuple[Any, ...]:
    """The eight fields of an operation."""
    match op:
        case Claim(key):
            return ("claim", key, "", "", "", "", "", "")
        case Get(key):
            return ("get", key, "", "", "", "", "", "")
        case Complete(key, token, result, fingerprint):
            flags = ("" if result is None else "r") + ("" if fingerprint is None else "f")
            return ("complete", key, token, "", "", result or b"", fingerprint or b"", flags)
        case Takeover(key, token):
            return ("takeover", key, token, "", "", "", "", "")
        case Release(key, token, attempts):
            return ("release", key, token, attempts, "", "", "", "")
        case Abandon(key, token, left):
            return ("abandon", key, token, "" if left is None else left, "", "", "", "")
        case Park(key, token, reason):
            return ("park", key, token, "", reason.encode(errors="backslashreplace"), "", "", "")
        case Forget(key, token):
            return ("forget", key, token, "", "", "", "", "")


def _reply(op: Op, code: bytes, state: bytes, first: int) -> Reply:
    """What a code of the script, and the state that stood against it, mean."""
    if code == b"A":
        return Applied()
    if code:
        number, attempt = code[1:].split(b" ")
        return Claimed(first + int(number), int(attempt))
    now = _state(state)
    return now if isinstance(op, Claim | Takeover | Get) else Lost(now)


def _state(text: bytes) -> State:
    """What everybody is told."""
    return view(*_entry(text))


def _entry(text: bytes) -> tuple[Entry | None, Callable[[str], bool]]:
    """A value, and whether its session lives."""
    busy = text.startswith(b"B ")
    if text == b"-":
        return None, lambda _: busy
    _, state, token, attempt, at, session, _, *sizes, rest = text.split(b" ", 10)
    reason, result, fingerprint = map(int, sizes)
    behind = reason + max(result, 0)
    entry = Entry(
        state.decode(),
        int(token),
        int(attempt),
        "" if session == b"-" else session.decode(),
        int(at) / 1000,
        rest[:reason].decode(),
        None if result < 0 else rest[reason:behind],
        None if fingerprint < 0 else rest[behind:],
    )
    return entry, lambda _: busy


# ------------------------------------------------------------------ the session


class _Restarted(Exception):
    """The server is another than the one that this session began with, or began anew."""

    def __init__(self, epoch: str) -> None:
        super().__init__(epoch)
        self.epoch = epoch


class _Unsure(NamedTuple):
    """A call whose answer has not come."""

    batch: int
    ops: Sequence[Op]
    tail: int  # how many of them, at the end, the caller asked for


class _Session(Confirmed):
    """One process's presence: connections, heartbeat, group commit."""

    def __init__(self, at: Server, retention: float, ttl: float, clock: Clock) -> None:
        self.pid = os.getpid()
        self.retention = retention
        self.group = GroupCommit(self._commit)
        self._named = retention
        self._at, self._ttl, self._clock = at, ttl, clock
        self._epoch: str | None = None
        self._id = ""
        self._batch = 0
        self._last = 0  # the batch that the session's key names, if the server forgot nothing
        self._token = 0  # the highest that came
        self._confirmed = -ttl
        self._born = 0  # the last token before the session
        self._unsure: _Unsure | None = None
        self._client: Any = redis.Redis(
            **at.options,
            protocol=2,
            socket_timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            retry=Retry(NoBackoff(), 0),
            redis_connect_func=self._connected,  # type: ignore[arg-type]  # it gets the connection
        )
        self._changed = threading.Condition()
        self._listens: bool | None = None  # None: nobody has waited yet
        self._ended = threading.Event()
        self._threads = [self._start("heartbeat", self._beat)]

    def _start(self, name: str, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=work, name=f"idemp-redis-{name}", daemon=True)
        thread.start()
        return thread

    # ---------------------------------------------------------------- one call

    def _connected(self, connection: Any) -> None:
        """What each new connection begins with: the login, and what the server says of itself."""
        try:
            connection.on_connect()
            epoch = check(connection, self._at)
            if self._epoch is not None and self._epoch != epoch:
                raise _Restarted(epoch)
            self._epoch = epoch
        except BaseException:
            connection.disconnect()
            raise

    def _call(self, *words: Any) -> Any:
        """The script's answer.  Raises redis's errors and `_Restarted`."""
        try:
            return self._client.execute_command("EVALSHA", _NAME, 1, self._at.prefix, *words)
        except NoScriptError:
            return self._client.execute_command("EVAL", _SCRIPT, 1, self._at.prefix, *words)

    # ---------------------------------------------------------------- one batch

    def _commit(self, ops: Sequence[Op]) -> list[Reply]:
        """One call, repeated until its fate is known or `PATIENCE` is over."""
        if self._ended.is_set():
            raise Closed("this store was closed")
        deadline = self._clock.steady() + PATIENCE
        self._batch += 1
        while True:
            try:
                return self._attempt(ops)
            except _Restarted as restarted:
                # Whether it forgot anything of mine, the next call finds out; until then nothing is fresh.
                log.warning("%s began anew", self._at.shown)
                self._epoch, self._confirmed = restarted.epoch, -self._ttl
                continue
            except RedisError as error:
                failed = explain(self._at, error, StoreUnavailable)
            if isinstance(failed, ConfigError) or self._clock.steady() >= deadline:
                raise failed
            log.debug("%s", failed)
            self._clock.sleep(0.05)

    def _attempt(self, ops: Sequence[Op]) -> list[Reply]:
        """Apply ``ops``, once it is known what became of the call before."""
        if not self._id:
            self._be_born()
        if not ops:
            if (over := self._confirm()) is not None:
                self._begin_anew(*over)
            return []
        whole = self._with_undo(ops)
        self._unsure = _Unsure(self._batch, whole, len(ops))
        sent = self._clock.steady()
        words = [word for op in whole for word in _words(op)]
        kind, *answer = self._call("apply", self._id, int(self._ttl * 1000), self._batch, self._last, *words)
        self._unsure = None
        if kind in (b"dead", b"forgotten"):
            self._begin_anew(kind, *answer)
            return self._attempt(whole)[len(whole) - len(ops) :]
        return self._answered(whole, kind, answer, sent)[len(whole) - len(ops) :]

    def _answered(self, ops: Sequence[Op], kind: bytes, answer: list[bytes], sent: float) -> list[Reply]:
        if kind == b"again":
            codes, *states = answer
            first, _, said = codes.partition(b" ")
        else:
            said, first, *states, retention, told = answer
            self.retention = int(retention) / 1000
            if told == b"1":
                self._wake()
        each = said.split(b",")
        replies = [_reply(*one, int(first)) for one in zip(ops, each, states, strict=True)]
        if any(each):
            self._last, self._confirmed = self._batch, max(sent, self._confirmed)
            self._token = max(self._token, int(first) + len(ops))
        return replies

    def _with_undo(self, ops: Sequence[Op]) -> Sequence[Op]:
        """``ops`` behind what gives back the claims of a call whose caller was told that it failed."""
        unsure = self._unsure
        if unsure is None:
            return ops
        if unsure.batch == self._batch:
            return unsure.ops
        kind, *answer = self._call("void", self._id, unsure.batch)
        if kind == b"dead":
            return ops
        self._last, self._unsure = unsure.batch, None
        if kind == b"void":
            return ops
        first, _, said = answer[0].partition(b" ")
        told = [_reply(*one, b"-", int(first)) for one in zip(unsure.ops, said.split(b","), strict=True)]
        return [*undoing(unsure.ops, told), *ops]

    # ---------------------------------------------------------------- the session

    def _be_born(self) -> None:
        """A new session; the claims of the one before are in doubt."""
        new, sent = uuid.uuid4().hex, self._clock.steady()
        ttl, named = int(self._ttl * 1000), int(self._named * 1000)
        if self._id:
            self._client.delete(f"{self._at.prefix}s:{self._id}")
        token, retention = self._call("born", new, ttl, named, self._token)
        self.retention = int(retention) / 1000
        if self.retention > self._named:
            log.warning(
                "%s remembers for %g s, longer than the %g s named",
                self._at.shown,
                self.retention,
                self._named,
            )
        self._born = int(token)
        self._last, self._unsure = 0, None
        self._id, self._confirmed = new, sent

    def _begin_anew(self, kind: bytes, *named: bytes) -> None:
        """My session is dead, or the server names an earlier batch than it had confirmed."""
        if kind == b"forgotten":
            log.error(
                "%s has forgotten what it had confirmed (batch %d; it names %d), as after a failover:"
                " the claims of this process are in doubt",
                self._at.shown,
                self._last,
                int(named[0]),
            )
        self._be_born()

    def _confirm(self) -> list[bytes] | None:
        """None: my session lives on; else what the server says instead."""
        mine, sent = self._id, self._clock.steady()
        answer: list[bytes] = self._call("beat", mine, int(self._ttl * 1000), self._last)
        if answer != [b"ok"]:
            return answer
        if mine == self._id:
            self._confirmed = max(self._confirmed, sent)
        return None

    def _beat(self) -> None:
        """Confirm the session thrice in its time to live, beside the batches."""
        while not self._ended.wait(self._ttl / 3):
            try:
                if self._id and not self._beaten():
                    self.group.apply([])
            except Closed:
                return
            except (StoreUnavailable, ConfigError) as error:
                log.warning("heartbeat: %s", error)

    def _beaten(self) -> bool:
        try:
            return self._confirm() is None
        except _Restarted:
            return False
        except RedisError as error:
            raise explain(self._at, error, StoreUnavailable) from None

    def close(self) -> None:
        """End the session and let go of the server."""
        self._ended.set()
        with self.group.paused():
            try:
                if self._id:
                    self._client.delete(f"{self._at.prefix}s:{self._id}")
            except (RedisError, _Restarted, ConfigError) as error:
                log.warning("%s: %s", self._at.shown, error)
        self._wake()
        for thread in self._threads:
            thread.join(PATIENCE)
        self._client.close()
        self._client.connection_pool.disconnect()

    # ---------------------------------------------------------------- reading

    def wait(self, key: str, token: int, timeout: float) -> None:
        """Leave word that the key is awaited, and look at it when told, and now and then."""
        deadline = self._clock.steady() + timeout
        pause, told = _POLL[0], False
        while True:
            state = _state(self._ask("look", "", key)[0])
            left = deadline - self._clock.steady()
            if left <= 0 or not (isinstance(state, Busy) and state.token == token):
                return
            if not told:
                self._ask("await", "", key, token)
                self._listen()
                told = True
                continue
            with self._changed:
                self._changed.wait(min(left, pause))
            pause = min(pause * 2, _POLL[2] if self._listens else _POLL[1])

    def scan(self, prefix: str, after: str, limit: int) -> list[tuple[str, State]]:
        """See `idemp.ports.Store`.  Redis has no order: each page walks over all keys of the database."""
        start, least = prefix.encode(), after.encode()
        keys = heapq.nsmallest(limit, {key for key in self._keys() if key.startswith(start) and key > least})
        found: list[tuple[str, State]] = []
        for page in range(0, len(keys), _PAGE):
            some = keys[page : page + _PAGE]
            states = self._ask("look", "", *some)
            found += [(k.decode(), _state(s)) for k, s in zip(some, states, strict=True) if s != b"-"]
        return found

    def _keys(self) -> Iterator[bytes]:
        prefix = f"{self._at.prefix}k:".encode()
        cursor: Any = 0
        while True:
            cursor, names = self._asked(partial(self._client.scan, cursor, prefix + b"*", _PAGE))
            yield from (name[len(prefix) :] for name in names)
            if not cursor:
                return

    def _ask(self, *words: Any) -> Any:
        return self._asked(partial(self._call, *words))

    def _asked(self, what: Callable[[], Any]) -> Any:
        """An answer that changes nothing, hence may be asked for again."""
        if self._ended.is_set():
            raise Closed("this store was closed")
        try:
            return what()
        except _Restarted:
            self.group.apply([])
        except RedisError as error:
            if isinstance(failed := explain(self._at, error, StoreUnavailable), ConfigError):
                raise failed from None
            self.group.apply([])  # returns when the server is there again, or raises
        try:
            return what()
        except (RedisError, _Restarted) as error:
            raise StoreUnavailable(f"{self._at.shown}: {error}") from None

    # ---------------------------------------------------------------- being told

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _listen(self) -> None:
        """Be told from now on, on a connection of its own."""
        with self._changed:
            if self._listens is None:
                self._listens = False
                self._threads.append(self._start("listen", self._hear))

    def _hear(self) -> None:
        while not self._ended.is_set():
            try:
                with self._client.pubsub(ignore_subscribe_messages=True) as heard:
                    heard.subscribe(f"{self._at.prefix}settled")
                    self._listens = True
                    self._wake()  # what was said before goes unheard
                    while not self._ended.is_set():
                        if heard.get_message(timeout=0.5):
                            self._wake()
            except (RedisError, _Restarted, ConfigError) as error:
                log.info("%s: not listening: %s", self._at.shown, error)
                self._listens = False
                self._ended.wait(1.0)


def exists(at: Server) -> bool:
    """Whether the namespace was ever used.  Makes nothing."""
    client: Any = redis.Redis(**at.options, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT)
    try:
        return bool(client.exists(f"{at.prefix}retention"))
    except RedisError as error:
        raise explain(at, error, StoreUnavailable) from None
    finally:
        client.close()
