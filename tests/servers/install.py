"""Brings a server to this machine: through Debian's packages as root or npm, else as an image for Docker."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers import container
from tests.servers.catalog import FROM_NPM, NPM, Server


class Missing(Exception):
    """No way to have the server; the message says what a person can do."""


def ensure(server: Server) -> str:
    """Have the server, and say how; raise Missing when there is no way."""
    if path := server.path():
        return path
    if container.has_image(server.image):
        return f"{server.image} in Docker"
    if server.npm and shutil.which("npm") and _npm_install() and (path := server.path()):
        return f"{path}, installed now"
    if shutil.which("apt-get") and os.geteuid() == 0 and _apt_install(server) and (path := server.path()):
        return f"{path}, installed now"
    if server.image and container.pull(server.image):
        return f"{server.image} in Docker, pulled now"
    instead = "or start a Docker engine, " if server.image else ""
    raise Missing(
        f"install {server.program} (on Debian and Ubuntu: apt-get install {server.package}), "
        f"{instead}then try again."
    )


def _npm_install() -> bool:
    """Exactly what the lock names; nothing in it gets to run a script."""
    FROM_NPM.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(NPM / name, FROM_NPM)
    options = ("--omit=optional", "--ignore-scripts", "--no-audit", "--no-fund")
    return _run("npm", "ci", "--prefix", str(FROM_NPM), *options)


def _run(*command: str) -> bool:
    print("+", *command, flush=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(command, env=quiet, stdin=subprocess.DEVNULL, check=False).returncode == 0


def _apt_install(server: Server) -> bool:
    apt = ("apt-get", "-qq", "-o", "DPkg::Lock::Timeout=600")
    _run(*apt, "update")  # some source may be out of reach, and another have the package all the same
    with services_stay_down():
        installed = _run(*apt, "install", "-y", "--no-install-recommends", server.package)
    if server.npm:
        return installed and _npm_install()
    if installed:
        _run(
            "update-rc.d", server.service or server.package, "disable"
        )  # the tests run their own, so none at the next boot
    return installed


@contextmanager
def services_stay_down(policy: Path = Path("/usr/sbin/policy-rc.d")) -> Iterator[None]:
    """Debian starts a service as soon as it is installed, unless this file exits with 101."""
    before = policy.with_name(policy.name + ".before-idemp")
    if policy.exists():
        policy.rename(before)
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()
        if before.exists():
            before.rename(policy)
