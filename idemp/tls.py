"""The files of TLS that a server's URL names, called alike for every server: ``ca``, ``cert`` and ``key``."""

from __future__ import annotations

import ssl
from collections.abc import Mapping

from idemp.errors import ConfigError

FILES = {"ca": "ca.pem", "cert": "client.pem", "key": "client.key"}
"""The options, and how they look."""
_LIBPQ = {"ca": "sslrootcert", "cert": "sslcert", "key": "sslkey"}
_CA = "; name the authority of its certificate: ?ca=ca.pem"
_MINE = "; it wants a certificate that it knows: ?cert=client.pem&key=client.key"
_FIXES = {
    "self-signed certificate": _CA,
    "unable to get local issuer": _CA,
    "SSL error: certificate verify failed": _CA,  # PostgreSQL's library does not say why
    "valid client certificate": _MINE,
    " alert ": _MINE,
    "wrong version number": "; if there is no TLS at that port, leave it out of the URL",
    "does not support SSL": "; if there is no TLS at that port, leave it out of the URL",
}
"""Of what OpenSSL and servers say."""
_LOST = ("reset by peer", "Broken pipe", "closed by server", "EOF occurred", "EOF detected", "hung up")


def files_in(found: Mapping[str, str]) -> dict[str, str]:
    """Those of a URL's options that are named."""
    return {option: found[option] for option in FILES if found.get(option)}


def for_libpq(found: Mapping[str, str]) -> dict[str, str]:
    """``sslmode`` and the files among a URL's options, in the words of PostgreSQL's library.

    Who names papers wants them looked at, which that library does only if ``sslmode`` says so.  Raises like
    `trust`, but for the ``system`` that newer ones know.
    """
    files = files_in(found)
    if files and files.get("ca") != "system":
        trust(**files)
    asked = "verify-full" if "ca" in files else "require" if files else ""
    mode = found.get("sslmode") or asked
    return ({"sslmode": mode} if mode else {}) | {_LIBPQ[option]: file for option, file in files.items()}


def trust(ca: str | None = None, cert: str | None = None, key: str | None = None) -> ssl.SSLContext:
    """Whom to trust, the system's authorities if ``ca`` is none, and who I am.

    Raises `ConfigError` for a file that is not what it should be: drivers do so late, and some not at all.
    """
    if (cert is None) != (key is None):
        raise ConfigError("TLS needs cert and key, or neither")
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise ConfigError(f"ca={ca!r} is no file of authorities' certificates: {_line(error)}") from None
    if cert is not None:
        try:
            # A password, so that nobody is asked for one who is not there.
            context.load_cert_chain(cert, key, password="")
        except OSError as error:
            said = f"cert={cert!r} and key={key!r} are no certificate and its key, without a password"
            raise ConfigError(f"{said}: {_line(error)}") from None
    return context


def tls_fix(said: str, *, over: bool) -> str:
    """What to do about an error of TLS, if it is one, to be put behind it.

    over: whether it was spoken at all; who refuses a client's certificate often just hangs up.
    """
    found = next((fix for word, fix in _FIXES.items() if word in said), "")
    if not found and over and any(word in said for word in _LOST):
        return "; if it wants a certificate that it knows: ?cert=client.pem&key=client.key"
    return found


def _line(error: OSError) -> str:
    return error.strerror or " ".join(str(error).split())
