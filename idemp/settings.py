"""Settings: durations and the options in a store's or broker's URL, with errors that name them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import SplitResult, parse_qsl, urlsplit

from idemp.errors import ConfigError

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# To the last @, for a password may have anything in it that nobody escaped.
# The second way is that of a URL whose scheme, or the slashes behind it, are missing.
_PASSWORD = re.compile(r"^([^:/?#@]*://[^:/?#@]*|(?:[^:/?#@]*:)?[^:/?#@]*(?=:(?!//))):.*@", re.DOTALL)
_OPTION = re.compile(r"([?&]\w*(?:password|secret)\w*=).*", re.DOTALL | re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?")


def duration(text: str, setting: str) -> float:
    """Seconds in ``text``: ``500ms``, ``10s``, ``30m``, ``24h``, ``7d``, or a plain number of seconds."""
    match = _DURATION.fullmatch(text.strip())
    if not match or float(match[1]) == 0:
        raise ConfigError(f"{setting}={text!r} is no duration; write it like 10s, 30m or 24h")
    return float(match[1]) * _UNITS[match[2] or "s"]


def switch(text: str) -> bool:
    """Whether an environment variable means on: anything but empty, 0, false, no, off."""
    return text.strip().lower() not in {"", "0", "false", "no", "off"}


def split(url: str) -> SplitResult:
    """The parts of ``url``; `ConfigError` if it has none."""
    try:
        parts = urlsplit(url)
        torn = bool(parts.netloc) and "@" in parts.path + parts.query + parts.fragment
        _ = torn or "," in parts.netloc or parts.port  # several hosts have several ports
    except ValueError as error:
        raise ConfigError(f"{hidden(url)!r} is no URL: {error}") from None
    if torn:  # most often a password's end, of which more would be shown
        raise ConfigError(
            f"{hidden(url)!r} has an @ behind its host; in a user, a password or a name write %40 for @,"
            " %2F for /, %3F for ? and %23 for #"
        )
    if not parts.scheme or "://" not in url:
        raise ConfigError(f"{hidden(url)!r} is no URL; write it like sqlite:///seen.db")
    return parts


def address(host: str, port: int) -> str:
    """Both in one, as a URL has them: IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def options(parts: SplitResult, known: Mapping[str, str]) -> dict[str, str]:
    """The query of a URL.  ``known``: option -> an example; another one is a `ConfigError`."""
    found = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name in found:
        if name not in known:
            offer = ", ".join(f"{option}={example}" for option, example in known.items())
            raise ConfigError(f"{parts.scheme}:// has no option {name!r}; it has {offer}")
    return found


def namespace_in(found: Mapping[str, str]) -> str:
    """Of a URL's options, as servers have it that name nothing longer; ``default`` if it names none."""
    name = found.get("namespace", "default")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,50}", name):
        raise ConfigError(f"namespace={name!r}: up to 50 letters, digits, dots, dashes, underscores")
    return name


def sqlite_path(parts: SplitResult) -> str:
    """The file of ``sqlite:///relative.db`` or ``sqlite:////absolute.db``."""
    path = parts.path[1:]
    if parts.netloc or not path:
        raise ConfigError(
            "a SQLite URL has three slashes and a file: sqlite:///seen.db, sqlite:////var/lib/seen.db"
        )
    return path


def hidden(url: str) -> str:
    """``url`` without its password, fit for a log; also one that is no good URL."""
    return _OPTION.sub(r"\1***", _PASSWORD.sub(r"\1:***@", url))
