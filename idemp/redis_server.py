"""A Redis server, for the store and for the transport: what a URL names, and what the server must be.

What was confirmed must be on the disk: a server that may forget it is refused, unless it is said that it may.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import SplitResult, unquote

from idemp.errors import ConfigError, IdempError, MissingExtra, Unavailable
from idemp.settings import address, switch
from idemp.tls import files_in, tls_fix, trust

try:
    from redis.exceptions import (
        AuthenticationError,
        ConnectionError,
        NoPermissionError,
        RedisError,
        ResponseError,
    )
except ImportError:
    raise MissingExtra("redis://", "redis") from None


_REFUSED = ("NOAUTH", "WRONGPASS")
_TLS = {"ca": "ssl_ca_certs", "cert": "ssl_certfile", "key": "ssl_keyfile"}
_FIXES = {
    "OOM ": "; raise its maxmemory, or name a shorter ?retention= at every process",
    "'maxmemory'": "; raise its maxmemory, or name a shorter ?retention= at every process",
    "MISCONF": "; see its log: most often its disk is full, so make room",
    "max number of clients": "; raise its maxclients",
    "NOREPLICAS": "; see why it has too few replicas for its min-replicas-to-write",
}


class IsReplica(ConfigError):
    """It takes no writes."""


class Server(NamedTuple):
    """A namespace in a Redis.

    options: for the driver.  shown: its URL without login and options.  unsafe: whether it may forget
    what it confirmed.
    """

    options: Mapping[str, Any]
    shown: str
    namespace: str
    unsafe: bool = False

    @property
    def prefix(self) -> str:
        """Of every key; the braces keep them on one node of a cluster."""
        return f"idemp:{{{self.namespace}}}:"

    @property
    def channel(self) -> str:
        """Where its changes are told; channels are the same for all databases of a server."""
        return f"{self.prefix}told:{self.options['db']}"


def server(parts: SplitResult, found: Mapping[str, str], namespace: str) -> Server:
    """What a URL's parts and options name.  Raises `ConfigError`."""
    if "," in parts.netloc.rpartition("@")[2]:
        raise ConfigError(f"{parts.scheme}:// has one host, not {parts.netloc.rpartition('@')[2]!r}")
    database = parts.path.strip("/") or "0"
    if not database.isdecimal():
        raise ConfigError(
            f"redis:// has a database's number behind the host, not {database!r}; write it like /0"
        )
    options: dict[str, Any] = {
        "host": parts.hostname or "localhost",
        "port": parts.port or 6379,
        "db": int(database),
        "username": unquote(parts.username) if parts.username else None,
        "password": unquote(parts.password) if parts.password else None,
    }
    files = files_in(found)
    if parts.scheme == "rediss":
        trust(**files)
        # Of the server's name too, which older drivers do not look at by themselves.
        options |= {"ssl": True, "ssl_check_hostname": True}
        options |= {_TLS[option]: file for option, file in files.items()}
    elif files:
        raise ConfigError(f"{', '.join(files)}: for TLS; write the URL with rediss://")
    shown = f"{parts.scheme}://{address(options['host'], options['port'])}/{database}"
    return Server(options, shown, namespace, switch(found.get("unsafe_durability", "")))


def check(connection: Any, at: Server) -> str:
    """What tells one run of a server from another.  Raises `ConfigError` if it cannot keep the promise."""
    about = {**_info(connection, "server"), **_info(connection, "replication")}
    version = about.get("redis_version", "0")
    if int(version.partition(".")[0]) < 7:
        raise ConfigError(f"{at.shown} is Redis {version}; idemp needs 7 or newer")
    if about.get("role") != "master":
        raise IsReplica(f"{at.shown} is a read-only replica; name its master")
    if not at.unsafe:
        _check_durable(connection, at)
    return f"{about.get('run_id')}/{about.get('master_replid')}"


class Met:
    """What is known of a server: whether it was ever a master."""

    def __init__(self, at: Server) -> None:
        self.at = at
        self._as_master = False

    def check(self, connection: Any) -> str:
        """See `check`.  Raises redis's ConnectionError of one that was a master, and is a replica now."""
        try:
            found = check(connection, self.at)
        except IsReplica:
            if not self._as_master:
                raise
            # Another is the master now, or will soon be, or this one again: to wait for, not to give up.
            raise ConnectionError("it is a read-only replica now") from None
        self._as_master = True
        return found


def _info(connection: Any, section: str) -> dict[str, str]:
    connection.send_command("INFO", section)
    lines = connection.read_response().decode().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _check_durable(connection: Any, at: Server) -> None:
    try:
        connection.send_command("CONFIG", "GET", "appendonly", "appendfsync", "maxmemory-policy")
        flat = [word.decode() for word in connection.read_response()]
    except ResponseError as error:
        if isinstance(error, AuthenticationError):
            raise
        raise ConfigError(
            f"{at.shown} does not let this user see its settings ({error}); allow it CONFIG GET, or say"
            " unsafe_durability=true in the URL if you know that it has appendfsync always and noeviction,"
            " or that it may forget"
        ) from None
    found = dict(zip(flat[::2], flat[1::2], strict=True))
    safe = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
    wrong = {name: found.get(name, "nothing") for name, value in safe.items() if found.get(name) != value}
    if wrong:
        has = ", ".join(f"{name} {value}" for name, value in wrong.items())
        want = ", ".join(f"{name} {safe[name]}" for name in wrong)
        raise ConfigError(
            f"{at.shown} may forget what it confirmed: it has {has}; set {want}, or say"
            " unsafe_durability=true in the URL if that may happen"
        )


def explain(at: Server, error: RedisError, unavailable: type[Unavailable]) -> IdempError:
    """What the caller is told of an error that repeating does not mend, or has not mended in time."""
    said = " ".join(str(error).split())
    inside = "The user executing the script can't" in said
    if inside or isinstance(error, AuthenticationError | NoPermissionError) or said.startswith(_REFUSED):
        return ConfigError(f"{at.shown} refuses: {said}; check the user, the password and its rights")
    if "DB index is out of range" in said:
        return ConfigError(f"{at.shown}: {said}; name a database that the server has")
    over = bool(at.options.get("ssl"))
    fix = next((fix for word, fix in _FIXES.items() if word in said), tls_fix(said, over=over))
    if over and said.startswith("Timeout connecting"):
        fix = "; if there is no TLS at that port, write redis://"
    return unavailable(f"{at.shown}: {said}{fix}")
