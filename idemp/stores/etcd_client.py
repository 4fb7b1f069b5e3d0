"""etcd for the journal: small values in and out, a deadline on every call, and nothing guessed.

The driver is grpc itself with the message classes that etcd-sdk-python (``pyetcd``) carries, and nobody
else imports it.  pyetcd's own client is not used: a transaction's revision does not come out of it, an
endpoint that failed once stays out for five minutes, and its token is never renewed.

A call ends in one of four ways:

- its result.  A transaction whose comparisons were false, or a lease that is gone, is a result.
- `Refused`: etcd said no, and nothing was changed.
- `Unreachable`: no endpoint took it, so that nothing was changed.
- `Unsure`: it may or may not have taken effect, now or later.  Only who sent it can find out.

What was not sent, or only reads, is tried at each endpoint in turn; what may have been sent is not.

grpc and fork: fork first, then work.  A child whose parent had made a call before would hang in its own
first one, so that it gets a `ConfigError` instead; one that leaves etcd alone is not disturbed.
"""

from __future__ import annotations

import http.client
import logging
import os
import random
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn

from idemp.errors import Closed, ConfigError, IdempError, MissingExtra, StoreUnavailable
from idemp.tls import trust

# Without this grpc's own fork handlers abort a child that never meant to speak to etcd.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
try:
    import grpc
    from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped]
    from pyetcd.etcdrpc import rpc_pb2 as pb
    from pyetcd.etcdrpc import rpc_pb2_grpc as stubs
except ImportError:
    raise MissingExtra("etcd://", "etcd") from None

log = logging.getLogger(__name__)

_spoken = 0  # the process that opened the first connection

TIMEOUT = 5.0
"""Seconds that a call may take, unless told otherwise."""
CONNECT = 2.0
"""Seconds that an endpoint has to take a connection."""
SILENCE = 10.0
"""Seconds without a sign before a connection in use is asked for one; etcd forbids less than 5."""
PATIENCE = 3.0
"""Seconds that it then has for the answer."""
BACKOFF = (0.1, 1.0)
"""Seconds between attempts to connect anew to an endpoint: at first, and at most."""
_METRICS_MOST = 4 * 1024 * 1024
"""Bytes of metrics that are read; a member has some 150 000."""


# ---------------------------------------------------------------- what goes in


class Created(NamedTuple):
    """Compares the revision that made a key; 0: there is no such key."""

    key: str
    revision: int = 0
    equal: bool = True


class Modified(NamedTuple):
    """Compares the revision that last put a key; 0: there is no such key."""

    key: str
    revision: int = 0
    equal: bool = True


class Value(NamedTuple):
    """Compares a key's value.  Of a key that is not there it is false, with ``equal`` and without."""

    key: str
    value: bytes
    equal: bool = True


Compare = Created | Modified | Value


class Put(NamedTuple):
    key: str
    value: bytes
    lease: int = 0


class Delete(NamedTuple):
    """One key, or with ``end`` all from ``key`` up to, not with, ``end``, or all that begin with ``key``."""

    key: str
    end: str = ""
    prefix: bool = False


class Sort(Enum):
    """What a `Range` goes by."""

    KEY = "key"
    CREATED = "create_revision"
    MODIFIED = "mod_revision"


class Range(NamedTuple):
    """Read one key, or several as in `Delete`, of these only those beyond ``after``.

    revision: 0 is the newest.  limit: 0 is none.  min_mod_revision: older ones do not count for the limit.
    """

    key: str
    end: str = ""
    prefix: bool = False
    after: str = ""
    revision: int = 0
    limit: int = 0
    keys_only: bool = False
    min_mod_revision: int = 0
    sort: Sort = Sort.KEY
    descending: bool = False


Request = Put | Delete | Range


# ---------------------------------------------------------------- what comes out


class Header(NamedTuple):
    """Who answered, and at which revision of the whole store."""

    cluster_id: int
    member_id: int
    revision: int
    term: int


class KeyValue(NamedTuple):
    """deleted: only in a watch; then the value is empty, and mod_revision that of the deletion."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """What came of a `Range`, or of a `Delete`: then ``count`` is all there is.

    count: of all keys in the range, beyond the limit too.
    header: the store's revision, also where an older one was read.
    """

    header: Header
    pairs: tuple[KeyValue, ...] = ()
    more: bool = False
    count: int = 0

    @property
    def revision(self) -> int:
        """Of the store, when this was read."""
        return self.header.revision


class TxnResult(NamedTuple):
    """responses: one for each request of the branch that was taken, an empty one for a `Put`."""

    succeeded: bool
    header: Header
    responses: tuple[Found, ...]

    @property
    def revision(self) -> int:
        """Of this transaction if it changed something, else the store's."""
        return self.header.revision


class Status(NamedTuple):
    """One member's word.  leader: 0 while it knows of none.  alarms: such as ``NOSPACE``."""

    header: Header
    version: str
    db_size: int
    db_size_in_use: int
    leader: int
    alarms: tuple[str, ...]


class WatchBatch(NamedTuple):
    """One message of a watch, with all events of each transaction in it.  Without any: a sign of life.

    created: the first message, which says that the watch stands.
    broken: why it ended, in the last message; empty before.
    canceled: it was etcd that ended it, and not the connection that broke.
    compact_revision: not 0 if what was asked for is gone; this is the oldest revision to be had.
    """

    header: Header
    events: tuple[KeyValue, ...] = ()
    created: bool = False
    broken: str = ""
    canceled: bool = False
    compact_revision: int = 0

    @property
    def revision(self) -> int:
        """Of the store, when etcd sent this; 0 if it did not."""
        return self.header.revision


# ---------------------------------------------------------------- what goes wrong


class EtcdError(IdempError):
    """etcd did not do it."""


class Unreachable(EtcdError, StoreUnavailable):
    """No endpoint took the request: nothing was changed."""


class Unsure(EtcdError, StoreUnavailable):
    """No answer came: it may have taken effect, or still will."""


class WentBack(EtcdError, StoreUnavailable):
    """This is not the cluster that it was, and may have forgotten what it acknowledged.

    From then on a client answers nothing else: to go on is for a person to decide, by a new start.
    """


class Refused(EtcdError):
    """etcd said no: nothing was changed."""


class NoSpace(Refused, StoreUnavailable):
    """The database is full: until it has room and the alarm is off, it takes only reads and deletes."""


class Overloaded(Refused, StoreUnavailable):
    """Too many requests wait at etcd."""


class Compacted(Refused):
    """The revision is gone."""


class FutureRevision(Refused):
    """The revision is yet to come: this store is older than one that was seen before."""


class LeaseNotFound(Refused):
    """The lease ran out or was revoked."""


class TooLarge(Refused):
    """The request has too many bytes or operations."""


class Denied(Refused, ConfigError):
    """The user, the password or the rights do not do."""


class _OldToken(Denied):
    """To be had anew, with the password; or for the first time, if none was needed before."""


_REFUSALS = {
    "database space exceeded": NoSpace,
    "too many requests": Overloaded,
    "has been compacted": Compacted,
    "is a future revision": FutureRevision,
    "requested lease not found": LeaseNotFound,
    "request is too large": TooLarge,
    "received message larger than max": TooLarge,
    "too many operations": TooLarge,
    "invalid auth token": _OldToken,
    "revision of auth store is old": _OldToken,
    "authentication failed": Denied,
    "user name is empty": _OldToken,
    "user name not found": Denied,
    "permission denied": Denied,
    "authentication is not enabled": Denied,
}
_REFUSING = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
# With these texts, and no others, a call that failed as UNAVAILABLE did not leave, or was not looked at.
_NOT_TAKEN = ("failed to connect to all addresses", "DNS resolution failed", "etcdserver: no leader")


def _failure(endpoint: str, error: grpc.RpcError) -> EtcdError:
    code, text = error.code(), error.details() or ""
    message = f"etcd at {endpoint}: {text or code.name}"
    # grpc gives some of these codes of its own accord, when a connection breaks: that is no answer of etcd.
    if code in _REFUSING and text.startswith(("etcdserver: ", "grpc: received message larger")):
        return next((kind for part, kind in _REFUSALS.items() if part in text), Refused)(message)
    if code is grpc.StatusCode.UNAVAILABLE and text.startswith(_NOT_TAKEN):
        return Unreachable(message)
    return Unsure(message)


# ---------------------------------------------------------------- the client


class Client:
    """The cluster at ``endpoints``, each ``host:port``.  From any thread; nothing connects before first use.

    ``tls``: with the system's authorities, or those in the file ``ca``; ``cert`` and ``key``: files that say
    who this client is.  ``timeout``: seconds of every call that names no other.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        user: str | None = None,
        password: str | None = None,
        ca: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        timeout: float = TIMEOUT,
        *,
        tls: bool = False,
    ) -> None:
        if not endpoints:
            raise ConfigError("etcd:// names no host")
        if (user is None) != (password is None):
            raise ConfigError("etcd:// needs user and password, or neither")
        self._endpoints = tuple(endpoints)
        self._login = None if user is None else pb.AuthenticateRequest(name=user, password=password)
        self._files = (ca, key, cert) if tls or ca or cert or key else None
        if self._files is not None:
            trust(ca, cert, key)
        self._timeout = timeout
        self._closed = False
        self._newest = _Place(0, 0)
        self._went_back = ""
        # What a fork inherits stays here unused: to let go of it would reach into its parent's connections.
        self._processes: dict[int, _Process] = {}

    def txn(
        self,
        compares: Iterable[Compare],
        success: Iterable[Request],
        failure: Iterable[Request] = (),
        timeout: float | None = None,
    ) -> TxnResult:
        """All of ``success`` if every comparison holds, else all of ``failure``.  No key may be put twice."""
        request = pb.TxnRequest(
            compare=[_compare(compare) for compare in compares],
            success=[_request(each) for each in success],
            failure=[_request(each) for each in failure],
        )
        newest = self._newest.revision
        answer = self._call("txn", request, timeout)
        header = _header(answer.header)
        # A mere read need not have its place behind all that was told of: see `range`.
        if _writes(request.success) or _writes(request.failure):
            put = any(each.HasField("request_put") for each in _branch(request, answer))
            if header.revision < newest + put:
                self.went_back(f"went back from revision {newest} to {header.revision - put}")
        responses = tuple([_response(header, response) for response in answer.responses])
        return TxnResult(answer.succeeded, header, responses)

    def range(
        self,
        key: str,
        end: str = "",
        *,
        prefix: bool = False,
        after: str = "",
        revision: int = 0,
        limit: int = 0,
        keys_only: bool = False,
        min_mod_revision: int = 0,
        sort: Sort = Sort.KEY,
        descending: bool = False,
        timeout: float | None = None,
    ) -> Found:
        """See `Range`.  As new as what anybody was told of before.

        Not so after a pause of the member, from etcd 3.4.20 to 3.4.41: decide in a transaction.
        """
        what = Range(key, end, prefix, after, revision, limit, keys_only, min_mod_revision, sort, descending)
        answer = self._call("range", _range(what), timeout, repeatable=True)
        return _found(_header(answer.header), answer)

    def put(self, key: str, value: bytes, lease: int = 0, timeout: float | None = None) -> Header:
        """Put one key, whatever it was."""
        request = pb.PutRequest(key=_bytes(key), value=value, lease=lease)
        return _header(self._call("put", request, timeout).header)

    def delete(self, key: str, end: str = "", *, prefix: bool = False, timeout: float | None = None) -> Found:
        """See `Delete`; how many went is the ``count``."""
        answer = self._call("delete", _delete(Delete(key, end, prefix)), timeout)
        return Found(_header(answer.header), count=answer.deleted)

    def lease_grant(self, ttl: int, timeout: float | None = None) -> int:
        """A new lease.  Who is unsure of it asks for another: one that nobody keeps alive goes by itself."""
        return int(self._call("grant", pb.LeaseGrantRequest(TTL=ttl), timeout).ID)

    def lease_keepalive(self, lease: int, timeout: float | None = None) -> int:
        """Begin its time anew: how many seconds it now has, 0 when it is gone.

        A hint: a leader that is cut off still says so of a lease that another has let run out.
        """
        request = pb.LeaseKeepAliveRequest(ID=lease)
        return int(self._call("keepalive", request, timeout, repeatable=True).TTL)

    def lease_revoke(self, lease: int, timeout: float | None = None) -> None:
        """End it now, and the keys on it.  `LeaseNotFound` if it is gone."""
        self._call("revoke", pb.LeaseRevokeRequest(ID=lease), timeout)

    def compact(self, revision: int, timeout: float | None = None) -> None:
        """Forget what was before ``revision``.  `Compacted` if that is done."""
        self._call("compact", pb.CompactionRequest(revision=revision), timeout)

    def status(self, timeout: float | None = None) -> Status:
        """Of the member that this client talks to."""
        answer = self._call("status", pb.StatusRequest(), timeout, repeatable=True)
        in_use, errors = _newer_status(answer)
        # One entry reads: memberID:1234 alarm:NOSPACE
        alarms = tuple(error.partition("alarm:")[2].strip() for error in errors if "alarm:" in error)
        sizes = (answer.dbSize, in_use or answer.dbSize)
        return Status(_header(answer.header), answer.version, *sizes, answer.leader, alarms)

    def quota(self, timeout: float | None = None) -> int:
        """Bytes at which the member that this client talks to is full; 0 if it does not tell.

        Only its metrics know, which it has at the same port, for HTTP.
        """
        try:
            text, _ = self._get("/metrics", timeout)
            found = re.search(r"^etcd_server_quota_backend_bytes (\S+)$", text, re.MULTILINE)
            return int(float(found[1])) if found else 0
        except (OSError, ValueError, http.client.HTTPException):
            return 0

    def wall(self, timeout: float | None = None) -> float | None:
        """The clock of that member, in whole seconds since 1970; None if it does not tell."""
        try:
            return parsedate_to_datetime(self._get("/version", timeout)[1]).timestamp()
        except (OSError, ValueError, TypeError, http.client.HTTPException):
            return None

    def _get(self, path: str, timeout: float | None) -> tuple[str, str]:
        """What the member answers to HTTP, and when it says that it is."""
        endpoint = self._endpoints[self._here().current]
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if self._files is not None:
            ca, key, cert = self._files
            handlers.append(urllib.request.HTTPSHandler(context=trust(ca, cert, key)))
        url = f"{'http' if self._files is None else 'https'}://{endpoint}{path}"
        with urllib.request.build_opener(*handlers).open(url, timeout=timeout or self._timeout) as answer:
            return answer.read(_METRICS_MOST).decode(errors="replace"), answer.headers.get("Date", "")

    def watch(
        self,
        prefix: str,
        start_revision: int,
        deliver: Callable[[WatchBatch], None],
        progress_notify: bool = False,
    ) -> Watch:
        """All that happens to keys that begin with ``prefix``, from ``start_revision`` (0: now) on.

        ``deliver`` is called on the watch's own thread, one batch after the other; it must not raise.
        A watch that is broken stays so: who made it decides what to do.
        """
        key, end = _span(prefix, "", True, "")
        request = pb.WatchCreateRequest(
            key=key, range_end=end, start_revision=start_revision, progress_notify=progress_notify
        )
        return Watch(self, self._here(), request, deliver)

    def went_back(self, why: str) -> NoReturn:
        """Raise `WentBack`, now and whenever this client is asked for something."""
        self._went_back = (
            f"{self} {why}, as after the restore of a snapshot, and may have forgotten what was done:"
            " stop every process that uses it, see what has to be made good, and start again"
        )
        raise WentBack(self._went_back)

    def close(self) -> None:
        """End the watches and the connections of this process."""
        self._closed = True
        here = self._processes.pop(os.getpid(), None)
        if here is not None:
            here.close()

    def __repr__(self) -> str:
        return f"Client({', '.join(self._endpoints)})"

    # ---------------------------------------------------------------- a call

    def _here(self) -> _Process:
        global _spoken
        if self._closed:
            raise Closed("this etcd client was closed")
        if _spoken not in (0, os.getpid()):
            raise ConfigError(
                "etcd was spoken to before this process was forked, which grpc does not survive: "
                "fork first, or start processes with multiprocessing's spawn"
            )
        _spoken = os.getpid()
        process = self._processes.get(os.getpid())
        # Of two threads that are first at once, both get the same.
        return process or self._processes.setdefault(os.getpid(), _Process(self._endpoints, self._files))

    def _call(self, method: str, request: Any, timeout: float | None, *, repeatable: bool = False) -> Any:
        """At each endpoint in turn, until one takes it."""
        if self._went_back:
            raise WentBack(self._went_back)
        here = self._here()
        end = time.monotonic() + (self._timeout if timeout is None else timeout)
        for left in range(len(self._endpoints), 0, -1):
            number, now = here.current, time.monotonic()
            # What can be repeated need not spend all its time on one that is silent.
            until = now + (end - now) / left if repeatable else end
            try:
                answer = self._at(number, method, request, until)
                self._notice(_Place(answer.header.cluster_id, answer.header.revision))
                return answer
            except (Unreachable, Unsure) as failure:
                here.leave(number)
                taken = isinstance(failure, Unsure) and not repeatable
                if taken or left == 1 or time.monotonic() >= end:
                    raise
        raise AssertionError("there is at least one endpoint")

    def _notice(self, now: _Place) -> None:
        newest = self._newest
        if newest.cluster not in (0, now.cluster):
            self.went_back("is another cluster than it was")
        if now.revision > newest.revision:
            self._newest = now

    def _at(self, number: int, method: str, request: Any, end: float, renewed: bool = False) -> Any:
        """At one endpoint, with a new token if it finds ours too old."""
        here = self._here()
        metadata = _LEADER if method == "authenticate" else self._metadata(number, end)
        if method == "status":
            metadata = metadata[1:]  # a member without a leader can say just that
        call = getattr(here.link(number), method)
        try:
            return call(request, timeout=max(0.001, end - time.monotonic()), metadata=metadata)
        except grpc.RpcError as error:
            failure = _failure(self._endpoints[number], error)
        except ValueError:  # so grpc says that the channel was closed
            raise Closed("this etcd client was closed") from None
        if isinstance(failure, _OldToken) and self._login is not None and not renewed:
            here.metadata = None
            return self._at(number, method, request, end, renewed=True)
        raise failure

    def _metadata(self, number: int, end: float) -> _Metadata:
        """With the token, if there is a user; the first call logs in."""
        here = self._here()
        if self._login is None:
            return _LEADER
        if here.metadata is None:
            try:
                answer = self._at(number, "authenticate", self._login, end)
                here.metadata = (*_LEADER, ("token", answer.token))
            except Unsure as failure:
                # A login changes nothing, and the call that needed it was not sent.
                raise Unreachable(str(failure)) from None
            except Denied as failure:
                if "not enabled" not in str(failure):
                    raise
                here.metadata = _LEADER
        return here.metadata


class _Place(NamedTuple):
    """A point in the life of a cluster."""

    cluster: int
    revision: int


_Metadata = tuple[tuple[str, str], ...]
# A member that has lost its leader says so at once instead of waiting for one, and ends its watches.
_LEADER: _Metadata = (("hasleader", "true"),)


class _Process:
    """What belongs to one process: its connections, and where it last had luck."""

    def __init__(self, endpoints: tuple[str, ...], files: tuple[str | None, ...] | None) -> None:
        self.endpoints = endpoints
        self.current = random.randrange(len(endpoints))  # many replicas, spread over the members
        self.metadata: _Metadata | None = None
        self.watches: set[Watch] = set()
        self._files = files
        self._lock = threading.Lock()
        self._links: dict[int, _Link] = {}

    def link(self, number: int) -> _Link:
        link = self._links.get(number)
        if link is None:
            with self._lock:
                if number not in self._links:
                    self._links[number] = _Link(self.open(number))
                link = self._links[number]
        return link

    def open(self, number: int) -> grpc.Channel:
        if self._files is None:
            return grpc.insecure_channel(self.endpoints[number], _OPTIONS)
        return grpc.secure_channel(self.endpoints[number], _credentials(*self._files), _OPTIONS)

    def leave(self, number: int) -> None:
        """The next call goes elsewhere."""
        if self.current == number:
            self.current = (number + 1) % len(self.endpoints)

    def close(self) -> None:
        for watch in list(self.watches):
            watch.cancel()
        with self._lock:
            for link in self._links.values():
                link.channel.close()


_OPTIONS = (
    ("grpc.enable_retries", 0),  # what was sent once is not sent again behind our back
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.use_local_subchannel_pool", 1),  # a channel is a connection
    ("grpc.max_send_message_length", -1),  # etcd has a limit of its own, and says so
    ("grpc.max_receive_message_length", -1),
    ("grpc.min_reconnect_backoff_ms", int(CONNECT * 1000)),
    ("grpc.initial_reconnect_backoff_ms", int(BACKOFF[0] * 1000)),
    ("grpc.max_reconnect_backoff_ms", int(BACKOFF[1] * 1000)),
    ("grpc.keepalive_time_ms", int(SILENCE * 1000)),
    ("grpc.keepalive_timeout_ms", int(PATIENCE * 1000)),
    ("grpc.http2.ping_timeout_ms", int(PATIENCE * 1000)),  # else a minute, whatever keepalive says
    ("grpc.http2.max_pings_without_data", 0),  # no limit
)


class _Link:
    """One connection to one member, and what can be called there."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        kv, lease = stubs.KVStub(channel), stubs.LeaseStub(channel)
        self.txn, self.range, self.put, self.delete = kv.Txn, kv.Range, kv.Put, kv.DeleteRange
        self.compact = kv.Compact
        self.grant, self.revoke = lease.LeaseGrant, lease.LeaseRevoke
        # Etcd has it as a stream only: here one of one.  As a stream grpc would start a thread for it, and
        # where none is left, never answer or close this connection again.
        self.keepalive = channel.unary_unary(
            "/etcdserverpb.Lease/LeaseKeepAlive",
            request_serializer=pb.LeaseKeepAliveRequest.SerializeToString,
            response_deserializer=pb.LeaseKeepAliveResponse.FromString,
        )
        self.status = stubs.MaintenanceStub(channel).Status
        self.authenticate = stubs.AuthStub(channel).Authenticate


def _credentials(*files: str | None) -> grpc.ChannelCredentials:
    try:
        return grpc.ssl_channel_credentials(*(Path(file).read_bytes() if file else None for file in files))
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename} of the etcd:// URL: {error.strerror}") from None


# ---------------------------------------------------------------- a watch


class Watch:
    """A watch, on a connection and a thread of its own; from `Client.watch`."""

    def __init__(
        self, client: Client, here: _Process, create: Any, deliver: Callable[[WatchBatch], None]
    ) -> None:
        self._client, self._here, self._deliver = client, here, deliver
        self._pid = os.getpid()
        self._requests: SimpleQueue[Any] = SimpleQueue()
        self._requests.put(pb.WatchRequest(create_request=create))
        self._lock = threading.Lock()
        self._call: Any = None
        self._cancelled = False
        here.watches.add(self)
        threading.Thread(target=self._run, name="idemp-etcd-watch", daemon=True).start()

    def request_progress(self) -> None:
        """Ask for a sign of life: a batch without events.

        Its revision proves little before etcd 3.4.25: there it can be ahead of events still to come.
        """
        self._requests.put(pb.WatchRequest(progress_request=pb.WatchProgressRequest()))

    def cancel(self) -> None:
        """Deliver nothing more, except the batch that is being delivered right now."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._cancelled = True
            call = self._call
        if call is not None:
            call.cancel()

    def _run(self) -> None:
        number, channel = self._here.current, None
        try:
            metadata = self._client._metadata(number, time.monotonic() + self._client._timeout)
            channel = self._here.open(number)
            self._follow(channel, metadata)
        except grpc.RpcError as error:
            self._broken(number, str(_failure(self._here.endpoints[number], error)))
        except IdempError as error:
            self._broken(number, str(error))
        except Exception as error:
            log.exception("a watch")
            self._broken(number, str(error))
        finally:
            self._requests.put(None)  # lets grpc's own thread go
            self._here.watches.discard(self)
            if channel is not None:
                channel.close()

    def _follow(self, channel: grpc.Channel, metadata: _Metadata) -> None:
        """Deliver until it ends."""
        with self._lock:
            if self._cancelled:
                return
            requests = iter(self._requests.get, None)
            self._call = stubs.WatchStub(channel).Watch(requests, metadata=metadata)
        for response in self._call:
            if response.canceled:
                self._canceled(response)
                return
            events = tuple([_event(event) for event in response.events])
            if not self._hand_over(WatchBatch(_header(response.header), events, response.created)):
                return
        raise Unsure("etcd ended a watch without a word")

    def _canceled(self, response: Any) -> None:
        compacted = response.compact_revision
        reason = response.cancel_reason or (f"compacted up to {compacted}" if compacted else "canceled")
        if "auth" in reason or "permission" in reason:
            self._here.metadata = None  # perhaps it is only the token: the next call gets another
        header = _header(response.header)
        self._hand_over(WatchBatch(header, (), False, f"etcd: {reason}", True, compacted))

    def _broken(self, number: int, reason: str) -> None:
        self._here.leave(number)
        self._hand_over(WatchBatch(Header(0, 0, 0, 0), broken=reason))

    def _hand_over(self, batch: WatchBatch) -> bool:
        """Whether more is wanted."""
        if not self._cancelled:
            try:
                self._deliver(batch)
                return True
            except Exception:
                log.exception("a batch of a watch could not be delivered; the watch ends")
        return False


# ---------------------------------------------------------------- to and from the wire


_RESULTS = {True: pb.Compare.EQUAL, False: pb.Compare.NOT_EQUAL}
_SORTS = {
    Sort.KEY: pb.RangeRequest.KEY,
    Sort.CREATED: pb.RangeRequest.CREATE,
    Sort.MODIFIED: pb.RangeRequest.MOD,
}
_DELETE = 1  # of mvccpb.Event.EventType


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _text(key: bytes) -> str:
    """Also of keys that somebody else made, who may not have thought of UTF-8."""
    return key.decode("utf-8", "surrogateescape")


def _span(key: str, end: str, prefix: bool, after: str) -> tuple[bytes, bytes]:
    """The first key and the end, as etcd wants them: an end of one zero byte is beyond all keys."""
    first, last = _bytes(key), _bytes(end)
    if prefix:
        stem = first.rstrip(b"\xff")
        last = stem[:-1] + bytes([stem[-1] + 1]) if stem else b"\0"
    return (_bytes(after) if after else first) + (b"\0" if after or not first else b""), last


def _compare(compare: Compare) -> Any:
    key, result = _bytes(compare.key), _RESULTS[compare.equal]
    match compare:
        case Created(_, revision):
            return pb.Compare(key=key, result=result, target=pb.Compare.CREATE, create_revision=revision)
        case Modified(_, revision):
            return pb.Compare(key=key, result=result, target=pb.Compare.MOD, mod_revision=revision)
        case Value(_, value):
            return pb.Compare(key=key, result=result, target=pb.Compare.VALUE, value=value)


def _request(request: Request) -> Any:
    match request:
        case Put(key, value, lease):
            return pb.RequestOp(request_put=pb.PutRequest(key=_bytes(key), value=value, lease=lease))
        case Range():
            return pb.RequestOp(request_range=_range(request))
        case Delete():
            return pb.RequestOp(request_delete_range=_delete(request))


def _writes(requests: Any) -> bool:
    return any(not each.HasField("request_range") for each in requests)


def _branch(request: Any, answer: Any) -> Any:
    """Those that were carried out."""
    return request.success if answer.succeeded else request.failure


def _delete(what: Delete) -> Any:
    key, end = _span(what.key, what.end, what.prefix, "")
    return pb.DeleteRangeRequest(key=key, range_end=end)


def _range(what: Range) -> Any:
    key, end = _span(what.key, what.end, what.prefix, what.after)
    request = pb.RangeRequest(
        key=key,
        range_end=end,
        revision=what.revision,
        limit=what.limit,
        keys_only=what.keys_only,
        min_mod_revision=what.min_mod_revision,
    )
    if what.sort is not Sort.KEY or what.descending:  # ascending keys is etcd's own way
        request.sort_target = _SORTS[what.sort]
        request.sort_order = pb.RangeRequest.DESCEND if what.descending else pb.RangeRequest.ASCEND
    return request


def _header(header: Any) -> Header:
    return Header(header.cluster_id, header.member_id, header.revision, header.raft_term)


def _response(header: Header, response: Any) -> Found:
    match response.WhichOneof("response"):
        case "response_range":
            return _found(header, response.response_range)
        case "response_delete_range":
            return Found(header, count=response.response_delete_range.deleted)
        case _:
            return Found(header)


def _found(header: Header, answer: Any) -> Found:
    return Found(header, tuple([_pair(kv) for kv in answer.kvs]), answer.more, answer.count)


def _pair(kv: Any, deleted: bool = False) -> KeyValue:
    key = _text(kv.key)
    return KeyValue(key, kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease, deleted)


def _event(event: Any) -> KeyValue:
    return _pair(event.kv, event.type == _DELETE)


def _newer_status(answer: Any) -> tuple[int, list[str]]:
    """Two fields that etcd sends and pyetcd has no names for: bytes in use, and what is wrong."""
    known = [(field.field_number, field.data) for field in UnknownFieldSet(answer)]
    in_use = next((data for number, data in known if number == 9), 0)
    return in_use, [data.decode(errors="replace") for number, data in known if number == 8]
