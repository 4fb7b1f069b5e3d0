"""Everything that idemp raises.  A class's docstring is its default message.

    IdempError
    ├── ConfigError             a setting is wrong; the sentence names it and the fix
    │   └── MissingExtra        an optional driver is not installed
    ├── Unavailable             a server does not answer
    │   ├── StoreUnavailable
    │   └── TransportUnavailable
    ├── Closed                  used after close()
    ├── Unroutable              no queue takes what was published
    ├── BadMessage              the message can never be handled
    ├── FingerprintConflict     same key, other payload
    ├── KeyBusy                 another live session is running this key
    ├── KeyParked               the key is set aside for a person
    ├── NothingToResolve        a key needs no decision (resolve.py)
    ├── SessionLost             this process was away too long to start a handler
    ├── ClaimLost               another consumer took the claim over
    ├── InDoubt                 raised by a handler: the effect may or may not have happened
    ├── PermanentFailure        raised by a handler: never try this message again
    └── RetryLater              raised by a handler: try again, after so many seconds

Normal outcomes are values (see ports.py), not exceptions: these are for the caller of a
handler and for wrong settings.
"""


class IdempError(Exception):
    """Something went wrong in idemp."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class ConfigError(IdempError, ValueError):
    """A setting is wrong."""


class MissingExtra(ConfigError, ImportError):
    """An optional driver is not installed."""

    def __init__(self, needed_for: str, extra: str) -> None:
        super().__init__(f"{needed_for} needs an extra package: pip install 'idemp[{extra}]'")


class Unavailable(IdempError):
    """A server does not answer."""


class StoreUnavailable(Unavailable):
    """The store does not answer."""


class Contended(StoreUnavailable):
    """A transaction and others waited for each other's rows, and this one was rolled back."""


class TransportUnavailable(Unavailable):
    """The broker does not answer."""


class Closed(IdempError):
    """This was closed already."""


class Unroutable(IdempError):
    """No queue takes this message."""


class BadMessage(IdempError, ValueError):
    """The message can never be handled."""


class FingerprintConflict(IdempError):
    """This key is done already, with another payload."""

    def __init__(self, key: str) -> None:
        super().__init__(f"key {key!r} is done already, with another payload; the first result stands")
        self.key = key


class KeyBusy(IdempError):
    """Another live session is running this key."""

    def __init__(self, key: str) -> None:
        super().__init__(f"key {key!r} is being run by another live session")
        self.key = key


class KeyParked(IdempError):
    """The key is set aside for a person."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"key {key!r} is parked: {reason}")
        self.key = key
        self.reason = reason


class SessionLost(IdempError):
    """The store was not heard for too long to start a handler safely."""


class ClaimLost(IdempError):
    """Another consumer took this claim over while the handler ran."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the claim of key {key!r} was taken over while its handler ran")
        self.key = key


class InDoubt(IdempError):
    """The effect may or may not have happened."""


class PermanentFailure(IdempError):
    """This message must never be tried again."""


class RetryLater(IdempError):
    """Try this message again later.

    after: seconds to wait; None leaves it to the backoff.
    """

    def __init__(self, message: str = "try again later", *, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after
