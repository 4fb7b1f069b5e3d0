"""The Redis store: one call of one script a batch, all laws in it (redis.lua), by the server's clock.

A key is one value: open ones stay, done ones expire by themselves after the retention.  The session is a
key that expires, too; its value is the number of its last batch and what that answered.  So a batch
whose reply was lost is sent again and answered, not done twice; and a server that names an earlier
batch than it had confirmed has forgotten something.

The script tells on a channel what is done and what is forgotten.  Who asked `recall` once listens, and
answers duplicates from memory (recall.py) as long as everything is heard.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from idemp.errors import BadMessage, Closed, ConfigError, IdempError, MissingExtra, StoreUnavailable
from idemp.laws import Entry, undoing, view
from idemp.ports import (
    Abandon,
    Applied,
    Claim,
    Claimed,
    Clock,
    Complete,
    Done,
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
from idemp.redis_server import Met, Server, explain
from idemp.stores.door import SessionStore
from idemp.stores.group import GroupCommit
from idemp.stores.listening import Listening
from idemp.stores.recall import VOUCH

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.exceptions import MasterDownError, NoScriptError, ReadOnlyError, RedisError
    from redis.retry import Retry
except ImportError:
    raise MissingExtra("redis://", "redis") from None

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that a batch tries to get through before `StoreUnavailable`."""
TIMEOUT = 5.0
"""Seconds for one answer."""
_PAGE = 1000


class _Script(NamedTuple):
    """A script, and the name by which a server knows it once it has run it."""

    text: str
    name: str


def _script(file: str) -> _Script:
    text = Path(__file__).with_name(file).read_text()
    return _Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


_BATCH, _BEAT = _script("redis.lua"), _script("redis_beat.lua")


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
    """The fields of an operation, as the script wants them."""
    match op:
        case Claim(key):
            return ("claim", key)
        case Complete(key, token, result, fingerprint):
            flags = ("" if result is None else "r") + ("" if fingerprint is None else "f")
            return ("complete", key, token, result or b"", fingerprint or b"", flags)
        case Get(key):
            return ("get", key)
        case Takeover(key, token):
            return ("takeover", key, token)
        case Release(key, token, attempts):
            return ("release", key, token, attempts)
        case Abandon(key, token, left):
            return ("abandon", key, token, "" if left is None else left)
        case Park(key, token, reason):
            return ("park", key, token, reason.encode(errors="backslashreplace"))
        case Forget(key, token):
            return ("forget", key, token)


def _reply(op: Op, code: bytes, state: bytes, first: int) -> Reply:
    """What a code of the script, and the state that stood against it, mean."""
    if code[:1] in (b"A", b"D"):
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


def _learned(
    ops: Sequence[Op], replies: Sequence[Reply], codes: Sequence[bytes], now: bytes
) -> Iterator[tuple[str, Done]]:
    """Keys and what is done, as the answer to a batch tells; ``now``: of the server, if it was the first."""
    for op, reply, code in zip(ops, replies, codes, strict=True):
        if type(reply) is Done:
            yield op.key, reply
        elif type(op) is Complete and now and code[:1] == b"D":
            yield op.key, Done(op.token, op.result, op.fingerprint, int(now) / 1000, int(code[1:]))


def _forgotten(lines: bytes, texts: bytes) -> list[tuple[str, int]]:
    """Keys and tokens, as the channel tells them."""
    found, at = [], 0
    for line in lines.split(b","):
        token, size = map(int, line.split(b" "))
        found.append((texts[at : at + size].decode(), token))
        at += size
    return found


def _done(now: bytes, lines: bytes, texts: bytes) -> list[tuple[str, Done]]:
    """Keys and what is done, as the channel tells them."""
    found, place, at = [], 0, int(now) / 1000
    for line in lines.split(b",") if lines else ():
        token, attempt, size, result, fingerprint = map(int, line.split(b" "))
        key = texts[place : place + size].decode()
        place += size
        kept = texts[place : place + result] if result >= 0 else None
        place += max(0, result)
        mark = texts[place : place + fingerprint] if fingerprint >= 0 else None
        place += max(0, fingerprint)
        found.append((key, Done(token, kept, mark, at, attempt)))
    return found


# ------------------------------------------------------------------ the session


class _Restarted(Exception):
    """The server is another than the one that this session began with, or began anew."""

    def __init__(self, epoch: str) -> None:
        super().__init__("it began anew, or is another")
        self.epoch = epoch


class _Unsure(NamedTuple):
    """A call whose answer has not come."""

    batch: int
    ops: Sequence[Op]
    tail: int  # how many of them, at the end, the caller asked for


class _Session(Listening):
    """One process's presence: connections, heartbeat, group commit."""

    def __init__(self, at: Server, retention: float, ttl: float, clock: Clock) -> None:
        super().__init__("redis", clock)
        self.retention = retention
        self.group = GroupCommit(self._commit)
        self._named = retention
        self._at, self._met, self._ttl = at, Met(at), ttl
        self._epoch: str | None = None
        self._id = ""
        self._batch = 0
        self._last = 0  # the batch that the session's key names, if the server forgot nothing
        self._token = 0  # the highest that came
        self._confirmed = -ttl
        self._born = 0  # the last token before the session
        self._unsure: _Unsure | None = None
        self._undo: list[Op] = []  # what gives back claims that nobody heard of
        self._client = self._connects(self._connected)
        self._ear = self._connects(self._connected_to_listen)
        self._heard_epoch = ""
        self._start("heartbeat", self._beat)

    # ---------------------------------------------------------------- one call

    def _connects(self, begin: Callable[[Any], Any]) -> Any:
        return redis.Redis(
            **self._at.options,
            protocol=2,
            socket_timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            retry=Retry(NoBackoff(), 0),
            redis_connect_func=begin,  # type: ignore[arg-type]  # it gets the connection
        )

    def _connected(self, connection: Any) -> str:
        """What each new connection begins with: the login, and what the server says of itself."""
        try:
            connection.on_connect()
            epoch = self._met.check(connection)
            if self._epoch is not None and self._epoch != epoch:
                raise _Restarted(epoch)
            self._epoch = epoch
        except BaseException:
            connection.disconnect()
            raise
        return epoch

    def _connected_to_listen(self, connection: Any) -> None:
        self._heard_epoch = self._connected(connection)

    def _call(self, *words: Any) -> Any:
        """What redis.lua answers.  Raises redis's errors and `_Restarted`."""
        return self._run(_BATCH, self._at.prefix, *words)

    def _run(self, script: _Script, key: str, *words: Any) -> Any:
        try:
            try:
                return self._client.execute_command("EVALSHA", script.name, 1, key, *words)
            except NoScriptError:
                return self._client.execute_command("EVAL", script.text, 1, key, *words)
        except (ReadOnlyError, MasterDownError):
            # It became a replica, which ends no connection: the next one finds who is the master now, and
            # what is forgotten there is not heard here.
            self._client.connection_pool.disconnect(inuse_connections=False)
            self._recall.lose()
            raise

    # ---------------------------------------------------------------- one batch

    def _commit(self, ops: Sequence[Op]) -> list[Reply]:
        """One call, repeated until its fate is known or `PATIENCE` is over."""
        if self._ended.is_set():
            raise Closed("this store was closed")
        deadline = self._clock.steady() + PATIENCE
        failed: Exception
        self._batch += 1
        anew = False
        while True:
            try:
                return self._attempt(ops)
            except _Restarted as restarted:
                # Whether it forgot anything of mine, the next call finds out; until then nothing is fresh.
                self._epoch, self._confirmed = restarted.epoch, -self._ttl
                self._recall.lose()
                if not anew:
                    log.warning("%s began anew", self._at.shown)
                    anew = True
                    continue
                # Again and again: an address behind which there are two.
                failed = StoreUnavailable(f"{self._at.shown}: {restarted}")
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
        head = (int(self._ttl * 1000), self._batch, self._last, self._at.channel, int(self._recall.follows))
        words = [word for op in whole for word in _words(op)]
        era = self._recall.era()
        kind, *answer = self._call("apply", self._id, *head, *words)
        self._unsure = None
        if kind in (b"dead", b"forgotten"):
            self._begin_anew(kind, *answer)
            return self._attempt(ops)
        self._undo = []
        return self._answered(whole, kind, answer, sent, era)[len(whole) - len(ops) :]

    def _answered(
        self, ops: Sequence[Op], kind: bytes, answer: list[bytes], sent: float, era: int
    ) -> list[Reply]:
        now = b""
        if kind == b"again":
            codes, *states = answer
            first, _, said = codes.partition(b" ")
        else:
            said, first, *states, retention, told, now, since = answer
            self.retention = int(retention) / 1000
            self._recall.told(self.retention, int(now) / 1000, sent, int(since) / 1000)
            if told == b"1":
                self._wake()
        each = said.split(b",")
        replies = [_reply(*one, int(first)) for one in zip(ops, each, states, strict=True)]
        if self._recall.follows:
            self._recall.learn(era, _learned(ops, replies, each, now))
        if gone := [
            (op.key, op.token) for op, code in zip(ops, each, strict=True) if code and type(op) is Forget
        ]:
            self._recall.forget(gone)
        if any(each):
            self._last, self._confirmed = self._batch, max(sent, self._confirmed)
            self._token = max(self._token, int(first) + len(ops))
        return replies

    def _with_undo(self, ops: Sequence[Op]) -> Sequence[Op]:
        """``ops`` behind what gives back the claims of a call whose caller was told that it failed."""
        unsure = self._unsure
        if unsure is not None:
            if unsure.batch == self._batch:
                return unsure.ops
            self._settle(unsure)
        return [*self._undo, *ops]

    def _settle(self, unsure: _Unsure) -> None:
        """What became of that call; if it took no effect, it never will, nor did it give anything back."""
        kind, *answer = self._call("void", self._id, unsure.batch)
        if kind == b"dead":
            return
        self._last, self._unsure = unsure.batch, None
        if kind == b"void":
            return
        first, _, said = answer[0].partition(b" ")
        told = [_reply(*one, b"-", int(first)) for one in zip(unsure.ops, said.split(b","), strict=True)]
        self._undo = undoing(unsure.ops, told)

    # ---------------------------------------------------------------- the session

    def _be_born(self) -> None:
        """A new session; the claims of the one before are in doubt."""
        new, sent = uuid.uuid4().hex, self._clock.steady()
        ttl, named = int(self._ttl * 1000), int(self._named * 1000)
        if self._id:
            self._client.delete(f"{self._at.prefix}s:{self._id}")
        token, retention = self._call("born", new, ttl, named, self._token, self._at.channel)
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
        self._recall.lose()
        self._be_born()

    def _confirm(self) -> list[bytes] | None:
        """None: my session lives on; else what the server says instead."""
        mine, sent = self._id, self._clock.steady()
        key = f"{self._at.prefix}s:{mine}"
        answer: list[bytes] = self._run(_BEAT, key, int(self._ttl * 1000), self._last)
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
            except Exception:  # without it every handler that takes longer would be in doubt, from now on
                log.exception("heartbeat of %s", self._at.shown)

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
        for client in (self._client, self._ear):
            client.close()
            client.connection_pool.disconnect()

    # ---------------------------------------------------------------- reading

    def _peek(self, key: str) -> State:
        return _state(self._ask("look", "", key)[0])

    def _await(self, key: str, token: int) -> None:
        self._ask("await", "", key, token)

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

    def size(self) -> int:
        """See `idemp.ports.Store`.  All keys of the database, whoever they belong to."""
        return int(self._asked(self._client.dbsize))

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

    def _hear_once(self) -> bool:
        try:
            with self._ear.pubsub() as line:
                self._hear_on(line)
        except (RedisError, _Restarted, ConfigError) as error:
            log.info("%s: not listening: %s", self._at.shown, error)
            if isinstance(error, _Restarted):
                self._find_out()
            return False
        return True

    def _find_out(self) -> None:
        """That it is another is seen on a new connection only, and those of who asks are perhaps older."""
        self._client.connection_pool.disconnect(inuse_connections=False)
        with suppress(IdempError):  # the next attempt to listen says so
            self.group.apply([])

    def _hear_on(self, line: Any) -> None:
        """Until something may go unheard.  The answer to a ping comes behind all that was told before."""
        pinged, there = self._clock.steady(), self._time()
        waits = True  # for the answer
        line.subscribe(self._at.channel)
        while not self._ended.is_set() and (waits or self._recall.follows):
            said, now = line.get_message(timeout=VOUCH), self._clock.steady()
            if said is not None:
                kind = said["type"]
                if kind == "subscribe":
                    self._recall.begin(pinged)
                    if self._heard_epoch != self._epoch:
                        return
                    self._listens, waits = True, False
                    self._wake()  # what was said before goes unheard
                elif kind == "pong":
                    self._recall.vouch(pinged, there)
                    waits = False
                else:
                    self._told(said["data"])
            if now - pinged >= (TIMEOUT if waits else VOUCH):
                if waits:
                    raise redis.TimeoutError("it does not answer")
                pinged, there, waits = now, self._time(), True
                line.ping()

    def _time(self) -> float:
        """The server's clock, for which a line that listens cannot ask."""
        seconds, microseconds = self._client.time()
        return float(seconds + microseconds / 1e6)

    def _told(self, said: bytes) -> None:
        kind, _, rest = said.partition(b"\n")
        if kind == b"F":
            self._recall.forgotten(_forgotten(*rest.split(b"\n", 1)))
        elif kind == b"D":
            session, now, lines, texts = rest.split(b"\n", 3)
            if session.decode() != self._id:
                self._recall.learn(self._recall.era(), _done(now, lines, texts))
        else:
            self._wake()


def looking(at: Server) -> Any:
    """A client that asks once: who looks at a server wants to hear soon that it is not there."""
    return redis.Redis(
        **at.options,
        protocol=2,  # the newer one's login takes any password where there is none
        socket_timeout=TIMEOUT,
        socket_connect_timeout=TIMEOUT,
        retry=Retry(NoBackoff(), 0),
    )


def exists(at: Server) -> bool:
    """Whether the namespace was ever used.  Makes nothing."""
    client = looking(at)
    try:
        return bool(client.exists(f"{at.prefix}retention"))
    except RedisError as error:
        raise explain(at, error, StoreUnavailable) from None
    finally:
        client.close()
