"""idemp: a message handler takes effect once, or the message it cannot be sure of is named."""

from idemp.consumer import Consumer
from idemp.errors import (
    BadMessage,
    ClaimLost,
    ConfigError,
    FingerprintConflict,
    IdempError,
    InDoubt,
    KeyBusy,
    KeyParked,
    PermanentFailure,
    RetryLater,
    SessionLost,
    StoreUnavailable,
    TransportUnavailable,
)
from idemp.eventlogs import open_event_log
from idemp.message import Message
from idemp.once import Context, context, idempotent, once
from idemp.policy import Codec, Happened, NotHappened, Unknown
from idemp.reader import Reader
from idemp.relay import Relay
from idemp.stores import open_store
from idemp.transports import open_log, open_transport, publish

__all__ = [
    "BadMessage",
    "ClaimLost",
    "Codec",
    "ConfigError",
    "Consumer",
    "Context",
    "FingerprintConflict",
    "Happened",
    "IdempError",
    "InDoubt",
    "KeyBusy",
    "KeyParked",
    "Message",
    "NotHappened",
    "PermanentFailure",
    "Reader",
    "Relay",
    "RetryLater",
    "SessionLost",
    "StoreUnavailable",
    "TransportUnavailable",
    "Unknown",
    "context",
    "idempotent",
    "once",
    "open_event_log",
    "open_log",
    "open_store",
    "open_transport",
    "publish",
]

__version__ = "0.1.0"
