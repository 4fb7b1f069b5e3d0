"""Envelopes: ``{"uuid", "parent_uuid", "content"}``, and a log line of what a service did with each.

They are what services of other libraries and languages pack, unpack and log, on any transport.  Which service
packed a message and which unpacked it is recorded with the line, so that no clock has to tell.
"""

from __future__ import annotations

import json
import sys
import threading
import uuid as uuids
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import IO, Any, Protocol, cast

from idemp.errors import BadMessage, ConfigError
from idemp.ports import Clock, Event

_LINE_TIME = "%Y-%m-%d %H:%M:%S %z"


class Logger(Protocol):
    """Takes events.  Any object with ``write`` will do."""

    def write(self, event: Event) -> None:
        """Keep ``event``."""
        ...


class StdoutLogger:
    """A JSON object a line, times in whole seconds of this machine's zone."""

    def __init__(self, output: IO[str] | None = None) -> None:
        self._output = output
        self._lock = threading.Lock()

    def write(self, event: Event) -> None:
        """Print it."""
        with self._lock:
            print(line(event), file=self._output or sys.stdout, flush=True)


def line(event: Event) -> str:
    """The event as the log line of the six names."""
    told = {
        "datetime": datetime.fromtimestamp(event.at).astimezone().strftime(_LINE_TIME),
        "service": event.service,
        "description": event.why if event.kind == "note" else event.kind,
        "uuid": event.uuid,
        "parent_uuid": event.parent or None,
        "payload": None if event.body is None else json.loads(event.body),
    }
    return json.dumps(told, separators=(",", ":"), ensure_ascii=False)


def read_line(text: str) -> Event:
    """The event in a log line; nobody recorded its role.  Raises `BadMessage`."""
    try:
        text.encode()
        told = json.loads(text)
        at = datetime.strptime(told["datetime"], _LINE_TIME).timestamp()
        said = [told["uuid"], told["service"], told["description"]]
        parent = told.get("parent_uuid") or ""
    except UnicodeEncodeError:
        raise BadMessage("this is no log line of a message: it is not UTF-8") from None
    except RecursionError:
        raise BadMessage("this is no log line of a message: it is nested too deeply") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadMessage(f"this is no log line of a message: {error!r}") from None
    if not all(isinstance(each, str) for each in (*said, parent)):
        raise BadMessage("this is no log line of a message: uuid, service and description are text")
    payload = told.get("payload")
    body = None if payload is None else json.dumps(payload, separators=(",", ":"), ensure_ascii=False)
    return Event(said[0], "note", said[1], at, parent=parent, why=said[2], body=body)


# ------------------------------------------------------------------ configuration


def _unset() -> Any:
    raise ConfigError("service_name is not set; say configure(service_name='billing') before a message logs")


@dataclass(frozen=True)
class Configuration:
    """What `configure` was told; `clock` is for tests."""

    service_name: str = ""
    logger_class: Callable[[], Logger] = StdoutLogger
    logger: Logger | None = None
    formatter: Callable[[Any], Any] = lambda content: content
    clock: Clock = field(default_factory=Clock)
    _made: list[Logger] = field(default_factory=list)

    @property
    def service(self) -> str:
        """The name; `ConfigError` if there is none."""
        return self.service_name or cast(str, _unset())

    def writer(self) -> Logger:
        """The logger, made on first use if only its class was named."""
        if self.logger is not None:
            return self.logger
        if not self._made:
            self._made.append(self.logger_class())
        return self._made[0]


_default = Configuration()
_here: ContextVar[Configuration | None] = ContextVar("idemp_envelopes", default=None)


def configure(*, everywhere: bool = True, **settings: Any) -> Configuration:
    """Say who logs, and where.  Anew each time: what is not named has its default.

    service_name: put into each event; an event without it is a `ConfigError`.  logger: an object with
    ``write(event)``; or logger_class: called without arguments on first use; by default a line on stdout.
    formatter: applied to the content that is logged, never to what is sent.
    everywhere: for the whole process; else for this thread or task only, where it wins.
    """
    global _default
    known = ("service_name", "logger_class", "logger", "formatter", "clock")
    for name in settings:
        if name not in known:
            raise ConfigError(f"configure() knows no {name!r}; it knows {', '.join(known)}")
    if not isinstance(settings.get("service_name", ""), str):
        raise ConfigError(f"service_name={settings['service_name']!r}: a text, like 'billing'")
    logger = settings.get("logger")
    if logger is not None and not callable(getattr(logger, "write", None)):
        raise ConfigError(f"logger={logger!r} has no write(event)")
    made = Configuration(**settings)
    if everywhere:
        _default = made
    else:
        _here.set(made)
    return made


def configuration() -> Configuration:
    """What holds here."""
    return _here.get() or _default


# ------------------------------------------------------------------ the envelope


class Envelope:
    """A message with an identity.  Made by `pack`, `unpack` and `child` only."""

    __slots__ = ("_role", "content", "parent_uuid", "uuid")

    def __init__(self, uuid: str | None, parent_uuid: str | None, content: Any, role: str) -> None:
        self.uuid, self.parent_uuid, self.content, self._role = uuid, parent_uuid, content, role

    @classmethod
    def pack(cls, content: Any, parent_uuid: str | None = None) -> Envelope:
        """A new message."""
        return cls(str(uuids.uuid4()), parent_uuid, content, "sender")

    @classmethod
    def unpack(cls, text: str | bytes) -> Envelope:
        """The message in ``text``, with the identity it was sent with.  Raises `BadMessage`."""
        try:
            told = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadMessage(f"the envelope is not JSON: {error}") from None
        if not isinstance(told, Mapping):
            raise BadMessage(f"the envelope is JSON, but not an object: {type(told).__name__}")
        for name in ("uuid", "parent_uuid"):
            if not isinstance(told.get(name), str | None):
                raise BadMessage(f"the envelope's {name} must be a string or null")
        return cls(told.get("uuid"), told.get("parent_uuid"), told.get("content"), "receiver")

    def child(self, content: Any) -> Envelope:
        """A new message that answers this one."""
        return Envelope.pack(content, self.uuid)

    def to_json(self) -> str:
        """What is sent: the three names, in this order."""
        told = {"uuid": self.uuid, "parent_uuid": self.parent_uuid, "content": self.content}
        return json.dumps(told, separators=(",", ":"), ensure_ascii=False)

    def log(self, description: str, *, hide_payload: bool = False) -> None:
        """Record what this service did with it.  Raises `ConfigError` without a service name."""
        settings = configuration()
        shown = None if hide_payload else settings.formatter(self.content)
        body = None if shown is None else json.dumps(shown, separators=(",", ":"), ensure_ascii=False)
        event = Event(
            self.uuid or "",
            "note",
            settings.service,
            settings.clock.wall(),
            self._role,
            self.parent_uuid or "",
            why=description,
            body=body,
        )
        settings.writer().write(event)
