"""Who calls: tokens by PyJWT, passwords by argon2, and the seed's SHA-1 hashes accepted once."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable

import jwt
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from fastapi import Header, HTTPException

LIFE = 15 * 60
"""Seconds that a token is good for."""
_ALGORITHMS = ["HS256", "HS384", "HS512"]
_hasher = PasswordHasher()
_NOBODY = _hasher.hash("nobody")  # so that an unknown name takes as long as a wrong password


def token(username: str, key: str) -> str:
    """A token for ``username``."""
    claims = {"username": username, "exp": int(time.time()) + LIFE}
    return jwt.encode(claims, key, algorithm="HS256")


def caller(key: str) -> Callable[..., str]:
    """A dependency: the user of the request.  400 without a token, 403 with one that is no good."""

    def user(authorization: str | None = Header(default=None)) -> str:
        parts = (authorization or "").split(" ")
        if len(parts) != 2 or not all(parts):
            raise HTTPException(400, "Missing Bearer token in request")
        try:
            claims = jwt.decode(parts[1], key, algorithms=_ALGORITHMS, options={"require": ["exp"]})
        except (jwt.PyJWTError, ValueError):
            raise HTTPException(403, "Forbidden") from None
        name = claims.get("username")
        if not isinstance(name, str) or not name:
            raise HTTPException(403, "Forbidden")
        return name

    return user


def hashed(password: str) -> str:
    """What is kept of a password."""
    return _hasher.hash(password)


def old_hash(password: str) -> str:
    """What the seed kept of it; only to be recognised."""
    return hashlib.sha1(password.encode(errors="surrogatepass"), usedforsecurity=False).hexdigest()


def check(password: str, kept: str | None) -> tuple[bool, bool]:
    """Whether it is the one that ``kept`` was made of; and whether ``kept`` should be made anew."""
    if kept is not None and len(kept) == 40 and not kept.startswith("$"):
        return hmac.compare_digest(old_hash(password), kept), True
    try:
        _hasher.verify(kept or _NOBODY, password.encode(errors="surrogatepass"))
    except (VerificationError, InvalidHashError):
        return False, False
    return kept is not None, kept is not None and _hasher.check_needs_rehash(kept)
