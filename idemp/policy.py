"""Policy: what `@idempotent` was told, checked at decoration, and how a call is read with it.

The store holds none of this: two handlers on one store never share a setting.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import functools
import hashlib
import inspect
import json
import logging
import re
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from idemp.causality import CONFIRMED, REPLAY
from idemp.errors import BadMessage, ConfigError
from idemp.message import MAX_ID, Message
from idemp.ports import Store

log = logging.getLogger(__name__)

MAX_RESULT = 64 * 1024
"""Bytes of a result that are kept; a larger one is done without its result."""
RESERVED = "idemp.deeds"
"""The name under which a store keeps what people changed in it: see deeds.py."""
REPLAYS = ("safe", "confirm", "never")
"""Whether a message may be brought back to a handler; ``confirm``: if a person said so."""
_MAX_BITS = 3400  # a number of `MAX_ID` digits
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")

Read = Callable[[tuple[Any, ...], Mapping[str, Any]], Any]
"""Reads something out of a call's arguments."""


# ------------------------------------------------------------------ a resolver's answers


@dataclasses.dataclass(frozen=True, slots=True)
class Happened:
    """A resolver's answer: the effect is there.  ``result`` is what the handler would have returned."""

    result: Any = None


class NotHappened(NamedTuple):
    """A resolver's answer: the effect is not there, and cannot come any more."""


class Unknown(NamedTuple):
    """A resolver's answer: nobody can say."""

    reason: str = "the resolver cannot say"


InDoubtPolicy = Literal["retry", "park"] | Callable[..., Any]


# ------------------------------------------------------------------ results as bytes


class Codec(NamedTuple):
    """How results become bytes and come back."""

    dump: Callable[[Any], bytes]
    load: Callable[[bytes], Any]


def _plain(value: Any) -> Any:
    """What JSON has no word for: models and dataclasses as objects, the rest of the usual as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, datetime.date | datetime.time | decimal.Decimal | uuid.UUID):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


_encode = json.JSONEncoder(default=_plain, separators=(",", ":")).encode  # `dumps` would make one each time


def _dump(value: Any) -> bytes:
    return b"null" if value is None else _encode(value).encode()


def _load(result: bytes) -> Any:
    try:
        return msgspec.json.decode(result)
    except msgspec.DecodeError:  # what Python writes and JSON has no word for, like NaN
        return json.loads(result)


JSON = Codec(_dump, _load)


def fingerprint(value: Any) -> bytes:
    """16 bytes that tell payloads apart: SHA-256 of canonical JSON, cut."""
    text = json.dumps(value, default=_plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()[:16]


# ------------------------------------------------------------------ the policy


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What one handler was told.  The fields are `idempotent`'s options."""

    store: Store
    name: str
    read_key: Read | None
    read_fingerprint: Read | None
    on_busy: str
    wait: float
    in_doubt: InDoubtPolicy
    attempts: int
    permanent: tuple[type[BaseException], ...]
    codec: Codec | None
    transaction: bool = False
    replay: str = "safe"

    def key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """The key of a call: the handler's name and the identity.  Raises `BadMessage`."""
        if self.read_key is not None:
            identity = self.read_key(args, kwargs)
        elif args and isinstance(args[0], Message):
            identity = args[0].id
        else:
            raise ConfigError(f"{self.name} is not called with a Message; say which argument is its key=")
        return f"{self.name}/{_identity(self.name, identity)}"

    def fingerprint(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes | None:
        """The fingerprint of a call, if the handler asked for one."""
        return None if self.read_fingerprint is None else fingerprint(self.read_fingerprint(args, kwargs))

    def encode(self, value: Any) -> bytes | None:
        """The bytes kept of a result; None if it has none.  Success never becomes failure here."""
        if self.codec is None:
            return None
        try:
            result = self.codec.dump(value)
        except Exception as error:
            log.warning("%s: done without its result, which cannot be encoded: %s", self.name, error)
            return None
        if len(result) > MAX_RESULT:
            log.warning(
                "%s: done without its result of %d bytes; %d are kept", self.name, len(result), MAX_RESULT
            )
            return None
        return result

    def decode(self, result: bytes | None) -> Any:
        """The value of a kept result; None if none was kept."""
        return None if result is None or self.codec is None else self.codec.load(result)


def make_policy(
    function: Callable[..., Any],
    store: Store,
    *,
    name: str,
    key: str | Callable[..., Any] | None,
    fingerprint: str | Callable[..., Any] | None,
    on_busy: str,
    wait: float,
    in_doubt: InDoubtPolicy,
    attempts: int,
    permanent: type[BaseException] | tuple[type[BaseException], ...],
    codec: Codec | None,
    transaction: bool = False,
    replay: str = "safe",
) -> Policy:
    """The checked policy of ``function``.  Raises `ConfigError` with one sentence."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"name={name!r}: letters, digits, dots, dashes and underscores, like 'billing.charge'"
        )
    if name == RESERVED:
        raise ConfigError(f"name={name!r} is where idemp keeps what people changed; choose another")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError(f"{name} is a generator; only a function that returns its answer can be recorded")
    if on_busy not in ("wait", "defer", "raise"):
        raise ConfigError(f"on_busy={on_busy!r}: choose 'wait', 'defer' or 'raise'")
    if not callable(in_doubt) and in_doubt not in ("retry", "park"):
        raise ConfigError(f"in_doubt={in_doubt!r}: choose 'retry', 'park', or give a resolver function")
    if replay not in REPLAYS:
        raise ConfigError(f"replay={replay!r}: choose 'safe', 'confirm' or 'never'")
    if not isinstance(attempts, int) or attempts < 1:
        raise ConfigError(f"attempts={attempts!r}: a whole number from 1")
    if not wait >= 0:
        raise ConfigError(f"wait={wait!r}: seconds, from 0")
    failures = permanent if isinstance(permanent, tuple) else (permanent,)
    if not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in failures):
        raise ConfigError(f"permanent={permanent!r}: an exception class, or a tuple of them")
    if not callable(getattr(store, "apply", None)):
        raise ConfigError(f"{store!r} is no store; open one with open_store('sqlite:///seen.db')")
    if transaction and not callable(getattr(store, "transaction", None)):
        raise ConfigError(
            f"transaction=True: {name} and its store must share a database;"
            " open the store with sqlite:///app.db or postgresql://host/database"
        )
    if key is None:
        _takes_message(function, name)
    return Policy(
        store=store,
        name=name,
        read_key=None if key is None else _reader(function, "key", key),
        read_fingerprint=None if fingerprint is None else _reader(function, "fingerprint", fingerprint),
        on_busy=on_busy,
        wait=wait,
        in_doubt=in_doubt,
        attempts=attempts,
        permanent=failures,
        codec=codec,
        transaction=transaction,
        replay=replay,
    )


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling ``function`` gives something to await."""
    if isinstance(function, functools.partial):
        return is_async(function.func)
    call = getattr(function, "__call__", None)  # noqa: B004 - the method is wanted, not the question
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def replay_refused(policy: Policy | None, headers: Mapping[str, Any]) -> str:
    """Why a message that was replayed must not come to this handler; "" if it may, or was not replayed."""
    if REPLAY not in headers:
        return ""
    if policy is not None and policy.replay == "never":
        return f"replay {headers[REPLAY]}: {policy.name} has replay='never'"
    if headers.get(CONFIRMED) or (policy is not None and policy.replay == "safe"):
        return ""
    who = (
        "a handler without @idempotent would run it again"
        if policy is None
        else f"{policy.name} has replay='confirm'"
    )
    return f"replay {headers[REPLAY]}: {who}, and nobody confirmed it"


def _takes_message(function: Callable[..., Any], name: str) -> None:
    parameters = list(inspect.signature(function).parameters.values())
    first = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not parameters or parameters[0].kind not in (*first, inspect.Parameter.VAR_POSITIONAL):
        raise ConfigError(f"{name} takes no message; say which argument is its key=")


def _reader(function: Callable[..., Any], option: str, spec: str | Callable[..., Any]) -> Read:
    """Reads what ``spec`` names: an argument, a path in one, or a function of the arguments."""
    if callable(spec):
        return lambda args, kwargs: spec(*args, **kwargs)
    if not isinstance(spec, str) or not spec:
        raise ConfigError(f"{option}={spec!r}: the name of an argument, a path in it, or a function")
    name, *path = spec.split(".")
    parameters = list(inspect.signature(function).parameters.values())
    named = [p for p in parameters if p.name == name and p.kind is not p.VAR_POSITIONAL]
    if not named:
        offer = ", ".join(parameter.name for parameter in parameters)
        raise ConfigError(
            f"{option}={spec!r}: {function!r} has no argument {name!r}; it has {offer or 'none'}"
        )
    parameter, place = named[0], parameters.index(named[0])

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if name in kwargs:
            value = kwargs[name]
        elif place < len(args) and parameter.kind is not parameter.KEYWORD_ONLY:
            value = args[place]
        else:
            value = parameter.default
        return _follow(value, path, spec) if path else value

    return read


def _follow(value: Any, path: list[str], spec: str) -> Any:
    for step in path:
        try:
            value = value[step] if isinstance(value, Mapping) else getattr(value, step)
        except (KeyError, AttributeError):
            raise BadMessage(f"there is no {spec} in this call: {step!r} is missing") from None
    return value


def _identity(name: str, value: Any) -> str:
    if isinstance(value, str) and value.isascii() and 0 < len(value) <= MAX_ID:
        return value
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if value.bit_length() > _MAX_BITS:
            raise BadMessage(f"the key of {name} is a number of more than {MAX_ID} digits")
        return str(value)
    if not isinstance(value, str):
        raise BadMessage(f"the key of {name} must be a string, not {type(value).__name__}")
    if not value:
        raise BadMessage(f"the key of {name} is empty")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise BadMessage(f"the key of {name} is not valid Unicode") from None
    # A CloudEvents identity is a source and an id, each within the limit.
    if size > 2 * MAX_ID + 1:
        raise BadMessage(f"the key of {name} has {size} bytes; {2 * MAX_ID + 1} are allowed")
    return value
