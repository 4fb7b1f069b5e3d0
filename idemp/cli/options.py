"""Options that commands share, and the two doors behind them.  The environment is read here only."""

from __future__ import annotations

import getpass
import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import parse_qsl, urlencode

import click

from idemp.bars import watching
from idemp.errors import ConfigError, IdempError
from idemp.eventlogs import open_event_log
from idemp.ports import Store, Transport
from idemp.settings import duration, hidden, split
from idemp.stores import check_exists as check_store
from idemp.stores import open_store
from idemp.tracking.tracker import tracking
from idemp.transports import check_exists as check_broker
from idemp.transports import open_transport

TRANSPORT = "amqp://guest:guest@localhost:5672/"

Decorator = Callable[[Any], Any]

# ------------------------------------------------------------------ options

transport_option: Decorator = click.option(
    "--transport",
    metavar="URL",
    envvar="IDEMP_TRANSPORT",
    default=TRANSPORT,
    show_default=True,
    show_envvar=True,
    help="The broker.",
)
store_option: Decorator = click.option(
    "--store",
    metavar="URL",
    envvar="IDEMP_STORE",
    required=True,
    show_envvar=True,
    help="The store, like sqlite:///seen.db.",
)
who_option: Decorator = click.option(
    "--who",
    envvar="IDEMP_WHO",
    show_envvar=True,
    default=lambda: _who(),
    help="Who does it, for `idemp deeds`; by default this user at this machine.",
)
reason_option: Decorator = click.option("--reason", default="", help="Why, for `idemp deeds`.")
yes_option: Decorator = click.option("--yes", is_flag=True, help="Do not ask.")
json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="For programs: JSON on stdout.")


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's number has no name
        user = "somebody"
    return f"{user}@{socket.gethostname()}"


class Duration(click.ParamType):  # type: ignore[type-arg]  # which an older click cannot be given
    """``90s``, ``30m``, ``24h``, ``7d``: seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds in ``value``."""
        try:
            return duration(str(value), param.opts[0] if param else "duration")
        except ConfigError as error:
            self.fail(f"{error}.", param, ctx)


def agree(question: str, yes: bool, as_json: bool) -> None:
    """Go on only if the person says so; `click.Abort` if not."""
    if yes:
        return
    if as_json or not sys.stdin.isatty():
        raise click.UsageError(f"{question} Say --yes, for nobody can be asked here.")
    click.confirm(question, abort=True, err=True)


def unicode(text: str) -> str:
    """An option's type: what can be sent to a server and kept, which bytes that are no UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise click.BadParameter(f"{hidden(text)!r} is not valid Unicode.") from None
    return text


def only_unicode(command: click.Command) -> None:
    """Let every text that ``command``, and those in it, are given be `unicode`.  Files have any names."""
    for parameter in command.params:
        if parameter.type is click.STRING:
            parameter.type = _Text()
    for inner in getattr(command, "commands", {}).values():
        only_unicode(inner)


class _Text(click.types.StringParamType):
    """Text, as it is called in a command's help."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Checked."""
        try:
            return unicode(str(super().convert(value, param, ctx)))
        except click.BadParameter as error:
            self.fail(error.message, param, ctx)


def key(text: str) -> str:
    """An option's type: a key as `escaped` prints it; text that is no escape stands for itself."""
    try:
        return unicode(_ESCAPE.sub(_unescape, text))
    except ValueError:  # no character has this number
        raise click.BadParameter(f"{text!r} is not valid Unicode.") from None


_ESCAPE = re.compile(r"\\(?:([\\nrt])|x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8}))")
_NAMED = {"\\": "\\", "n": "\n", "r": "\r", "t": "\t"}


def _unescape(match: re.Match[str]) -> str:
    return _NAMED[match[1]] if match[1] else chr(int(match[2] or match[3] or match[4], 16))


def escaped(text: str) -> str:
    """``text`` on one line and harmless to a terminal."""
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(c if c.isprintable() and c != "\\" else repr(c)[1:-1] for c in text)


# ------------------------------------------------------------------ doors


@contextmanager
def about(setting: str) -> Iterator[None]:
    """Let an error inside name the setting that it comes from."""
    try:
        yield
    except IdempError as error:
        raise ConfigError(f"{setting}: {error}") from None


@contextmanager
def store_at(url: str) -> Iterator[Store]:
    """The store that a service uses: it answers, and looking at it neither makes nor changes it."""
    with about("--store (IDEMP_STORE)"):
        open_store(url)  # which says what is wrong with it, and connects to nothing
        check_store(url)
        store = open_store(_without_wishes(url))
    with closing(store):
        with about("--store (IDEMP_STORE)"), watching(f"reading {hidden(url)}", store.progress):
            store.apply([])
        yield store


def _without_wishes(url: str) -> str:
    """``url`` with the least retention: in force is the longest that anybody named, the service's."""
    parts = split(url)
    if parts.scheme == "memory":
        return url
    options = {**dict(parse_qsl(parts.query, keep_blank_values=True)), "retention": "1s"}
    return url.partition("?")[0] + "?" + urlencode(options)


@contextmanager
def transport_at(url: str) -> Iterator[Transport]:
    """The broker, connected."""
    with about("--transport (IDEMP_TRANSPORT)"):
        transport = open_transport(url)
    with closing(transport):
        with about("--transport (IDEMP_TRANSPORT)"):
            transport.connect()
        yield transport


@contextmanager
def broker_at(url: str) -> Iterator[Transport]:
    """The broker that services use, connected; looking at it does not make it."""
    with about("--transport (IDEMP_TRANSPORT)"):
        check_broker(url)
    with transport_at(url) as transport:
        yield transport


@contextmanager
def recording(url: str | None) -> Iterator[None]:
    """What is published inside is recorded in the event log at ``url``, if there is one."""
    if not url:
        yield
        return
    with about("--tracking (IDEMP_TRACKING)"):
        log = open_event_log(url)
    with closing(log), tracking(log, "idemp"):
        yield
