"""Brings a server to this machine: through Debian's packages as root, else as an image for Docker."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers import container
from tests.servers.catalog import Server


class Missing(Exception):
    """No way to have the server; the message says what a person can do."""


def ensure(server: Server) -> str:
    """Have the server, and say how; raise Missing when there is no way."""
    if path := server.path():
        return path
    if container.has_image(server.image):
        return f"{server.image} in Docker"
    if shutil.which("apt-get") and os.geteuid() == 0 and _apt_install(server) and (path := server.path()):
        return f"{path}, installed now"
    if container.pull(server.image):
        return f"{server.image} in Docker, pulled now"
    raise Missing(
        f"install {server.program} (on Debian and Ubuntu: apt-get install {server.package}), "
        "or start a Docker engine, then try again."
    )


def _apt_install(server: Server) -> bool:
    def run(*command: str) -> bool:
        print("+", *command, flush=True)
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        return subprocess.run(command, env=quiet, stdin=subprocess.DEVNULL, check=False).returncode == 0

    apt = ("apt-get", "-qq", "-o", "DPkg::Lock::Timeout=600")
    run(*apt, "update")  # some source may be out of reach, and another have the package all the same
    with services_stay_down():
        installed = run(*apt, "install", "-y", "--no-install-recommends", server.package)
    if installed:
        run(
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
