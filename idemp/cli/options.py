"""Options that commands share, and the two doors behind them.  The environment is read here only."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import click

from idemp.errors import ConfigError, IdempError
from idemp.ports import Store, Transport
from idemp.settings import split, sqlite_path
from idemp.stores import open_store
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
json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="For programs: JSON on stdout.")


def key(text: str) -> str:
    """An option's type: a key as `escaped` prints it; text that is no escape stands for itself."""
    try:
        meant = _ESCAPE.sub(_unescape, text)
        meant.encode()
    except ValueError:
        raise click.BadParameter(f"{text!r} is not valid Unicode.") from None
    return meant


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
    """The store that a service uses: it answers, and looking at it does not make a new file."""
    with about("--store (IDEMP_STORE)"):
        parts = split(url)
        if parts.scheme == "sqlite" and not Path(path := sqlite_path(parts)).exists():
            raise ConfigError(f"there is no file {path}; name the store that the service uses")
        store = open_store(url)
    with closing(store):
        with about("--store (IDEMP_STORE)"):
            store.apply([])
        yield store


@contextmanager
def transport_at(url: str) -> Iterator[Transport]:
    """The broker, connected."""
    with about("--transport (IDEMP_TRANSPORT)"):
        transport = open_transport(url)
    with closing(transport):
        with about("--transport (IDEMP_TRANSPORT)"):
            transport.connect()
        yield transport
