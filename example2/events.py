"""Fields of events, checked: what is not as it must be can never be applied."""

from __future__ import annotations

from idemp import Message, PermanentFailure

_MOST = 2**63 - 1


def text(message: Message, name: str) -> str:
    """A text.  Raises `PermanentFailure`."""
    value = message.args.get(name) if isinstance(message.args, dict) else None
    if not isinstance(value, str) or "\x00" in value or not _encodes(value):
        raise PermanentFailure(f"{message.type}: {name} must be a text, not {_shown(value)}")
    return value


def integer(message: Message, name: str) -> int:
    """An id: digits in a text, as the events have them."""
    value = text(message, name)
    if not value.isascii() or not value.isdecimal() or int(value) > _MOST:
        raise PermanentFailure(f"{message.type}: {name} must be a number, not {_shown(value)}")
    return int(value)


def cents(message: Message, name: str) -> int:
    """An amount, in 64 bits."""
    value = message.args.get(name) if isinstance(message.args, dict) else None
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _MOST:
        raise PermanentFailure(f"{message.type}: {name} must be a number of cents, not {_shown(value)}")
    return value


def _encodes(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    return ascii(value)[:80]
