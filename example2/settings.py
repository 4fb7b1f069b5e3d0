"""Settings: the environment of a service, read once and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

from idemp import ConfigError
from idemp.settings import duration, split, switch

LEAST = 32
"""Bytes of a key that signs tokens, as RFC 7518 wants them for HS256."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What one service was told.

    port: of HTTP.  database, redis: URLs.  event_stream: of customers and invoices; account_stream: of
    accounts.  jwt_key: signs tokens.  idle: seconds after which a silent consumer's entries are others'.
    keep: entries that a stream keeps at least, or "" for all.  demo_users: make user1 and user2.
    invoice_status: of a new invoice.  unsafe: whether Redis may forget what it confirmed.
    """

    port: int
    host: str
    database: str
    redis: str
    event_stream: str
    account_stream: str
    jwt_key: str
    idle: str
    keep: str
    demo_users: bool
    invoice_status: int
    unsafe: bool

    def transport(self) -> str:
        """The URL of the broker, with both streams."""
        options = {"idle": self.idle, "stream": f"{self.event_stream},{self.account_stream}"}
        return self._with(options | ({"keep": self.keep} if self.keep else {}))

    def log(self, stream: str) -> str:
        """The URL of one of the streams, to be read from its start."""
        return self._with({"stream": stream})

    def _with(self, options: dict[str, str]) -> str:
        options |= {"namespace": "example2"} | ({"unsafe_durability": "true"} if self.unsafe else {})
        return f"{self.redis}?{urlencode(options)}"


def read(environment: Mapping[str, str], service: str, port: int) -> Settings:
    """The settings in ``environment``.  Raises `ConfigError`, which names the variable and the fix."""
    key = environment.get("JWT_KEY", "")
    if len(key.encode()) < LEAST:
        raise ConfigError(
            f"JWT_KEY signs the tokens of both services and needs {LEAST} bytes or more;"
            " make one with: openssl rand -hex 32"
        )
    streams = [
        environment.get("EVENT_STREAM") or "event-stream",
        environment.get("ACCOUNT_STREAM") or "account-stream",
    ]
    if any("," in name for name in streams) or len(set(streams)) < 2:
        raise ConfigError("EVENT_STREAM and ACCOUNT_STREAM are two names, without commas")
    redis = environment.get("REDIS_URL") or "redis://localhost:6379/0"
    if split(redis).scheme not in ("redis", "rediss") or split(redis).query:
        raise ConfigError("REDIS_URL: write it like redis://localhost:6379/0, without options")
    keep, idle = environment.get("KEEP", ""), environment.get("IDLE") or "30s"
    duration(idle, "IDLE")
    if keep and not keep.isdecimal():
        raise ConfigError(f"KEEP={keep!r} is no number of entries; write it like KEEP=100000")
    status = environment.get("INVOICE_STATUS") or "200"
    if status not in ("200", "201"):
        raise ConfigError(f"INVOICE_STATUS={status!r}: a new invoice is answered by 200, or by 201")
    return Settings(
        port=_port(environment.get("PORT", ""), port),
        host=environment.get("HOST") or "127.0.0.1",
        database=environment.get("DATABASE_URL") or f"sqlite:///{service}.db",
        redis=redis,
        event_stream=streams[0],
        account_stream=streams[1],
        jwt_key=key,
        idle=idle,
        keep=keep,
        demo_users=switch(environment.get("DEMO_USERS", "")),
        invoice_status=int(status),
        unsafe=switch(environment.get("UNSAFE_DURABILITY", "")),
    )


def _port(text: str, port: int) -> int:
    if text and not (text.isdecimal() and 0 < int(text) < 65536):
        raise ConfigError(f"PORT={text!r}: a port is a number from 1 to 65535, like {port}")
    return int(text or port)
