"""A server as a Docker container, for machines where its program is not installed.

    container.py PARENT CONTAINER

is the watch over one container: it removes the container when the test run is gone, however that ended.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress

import docker
from docker.errors import DockerException, NotFound


class Container:
    """One container; what the server wrote outlasts `stop` and `kill`, and goes with `remove`."""

    def __init__(self, image: str, environment: Mapping[str, str], ports: Mapping[int, int]) -> None:
        self._container = docker.from_env().containers.create(
            image,
            environment=dict(environment),
            ports={f"{inside}/tcp": ("127.0.0.1", outside) for inside, outside in ports.items()},
        )
        self._watch = subprocess.Popen(
            [sys.executable, __file__, str(os.getpid()), self._container.id],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def start(self) -> None:
        self._container.start()

    def stop(self) -> None:
        self._container.stop(timeout=60)

    def kill(self) -> None:
        if self.alive():
            self._container.kill()
            self._container.wait(timeout=60)

    def alive(self) -> bool:
        self._container.reload()
        return bool(self._container.status == "running")

    def log(self) -> str:
        return str(self._container.logs(tail=50).decode(errors="replace"))

    def remove(self) -> None:
        with suppress(NotFound):
            self._container.remove(force=True, v=True)
        self._watch.terminate()
        self._watch.wait()


def has_image(image: str) -> bool:
    """Is there a Docker engine that can start this image without asking anybody?"""
    try:
        docker.from_env().images.get(image)
    except DockerException:  # also: no engine
        return False
    return True


def pull(image: str) -> bool:
    """Fetch the image; False when there is no Docker engine, or it cannot."""
    try:
        engine = docker.from_env()
        print(f"+ docker pull {image}", flush=True)
        engine.images.pull(image)
    except DockerException:
        return False
    return True


def watch(parent: int, container: str) -> None:
    while os.getppid() == parent:
        time.sleep(0.1)
    with suppress(NotFound):  # the run removed it itself, and then was gone
        docker.from_env().api.remove_container(container, force=True, v=True)


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2])
