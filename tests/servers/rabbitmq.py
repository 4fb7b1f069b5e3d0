"""RabbitMQ brokers for tests: each on its own ports and data, from 127.0.0.1 only."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from tests.servers.catalog import SERVERS
from tests.servers.container import Container
from tests.servers.lent import Lent
from tests.servers.need import missing
from tests.servers.ports import free_port
from tests.servers.processes import Processes

DEADLINE = 60.0  # seconds; a start takes about 2


class RabbitMQ(Lent):
    """A broker of one's own: started by `with`, gone with its data at the end of it.

    options: of rabbitmq.conf, and erlang: arguments for Erlang, which only an installed one takes.
    """

    def __init__(
        self, *, management: bool = False, options: Mapping[str, str] | None = None, erlang: str = ""
    ) -> None:
        self.port = free_port()
        self.management_port = free_port() if management else None
        server = SERVERS["rabbitmq"]
        program = server.path()
        self._options, self._erlang = dict(options or {}), erlang
        if (self._options or erlang) and program is None:
            missing("options of RabbitMQ need it installed, not as an image")
        self._runs = self._processes(program) if program else self._container(server.image)

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    @property
    def management_url(self) -> str:
        if self.management_port is None:
            raise ValueError("this broker has no management plugin: RabbitMQ(management=True) has")
        return f"http://guest:guest@127.0.0.1:{self.management_port}/"

    def start(self) -> None:
        """Return when the broker speaks AMQP: at first, and again on the same data after stop or kill."""
        self._runs.start()
        end = time.monotonic() + DEADLINE
        while not _speaks_amqp(self.port):
            if not self._runs.alive() or time.monotonic() > end:
                raise RuntimeError(f"RabbitMQ did not start:\n{self._runs.log()}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End in good order, as at a restart of its machine."""
        self._runs.stop()

    def kill(self) -> None:
        """SIGKILL, as at a power cut."""
        self._runs.kill()

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        """The end of the broker and of everything it wrote."""
        self._runs.remove()

    def _processes(self, program: str) -> Processes:
        folder = Path(tempfile.mkdtemp(prefix="idemp-rabbitmq-"))
        config = [
            f"listeners.tcp.1 = 127.0.0.1:{self.port}",
            # A test must not be held up because its machine is small or full.
            "vm_memory_high_watermark.relative = 0.9",
            "disk_free_limit.absolute = 1MB",
        ]
        config += [f"{name} = {value}" for name, value in self._options.items()]
        plugins = "[]."
        if self.management_port is not None:
            config += ["management.tcp.ip = 127.0.0.1", f"management.tcp.port = {self.management_port}"]
            plugins = "[rabbitmq_management]."
        (folder / "rabbitmq.conf").write_text("\n".join(config) + "\n")
        (folder / "enabled_plugins").write_text(plugins + "\n")

        path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(program).parent), "/usr/bin", "/bin"])
        environment = {
            "PATH": path,
            "HOME": str(folder),  # and in it the Erlang cookie
            # The script then ends as `exec erl`: the keeper's child is the Erlang machine itself.
            "RUNNING_UNDER_SYSTEMD": "yes",
            # Erlang's own defaults: with those of RabbitMQ's script a start takes twice as long.
            "RABBITMQ_SERVER_ERL_ARGS": "+P 65536",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                f"-kernel inet_dist_use_interface {{127,0,0,1}} {self._erlang}"
            ),
            "RABBITMQ_NODENAME": f"idemp-{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "none"),  # not the one in /etc
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(folder / "generated"),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "ERL_EPMD_PORT": str(free_port()),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }
        # Left to itself, Erlang would start an epmd that goes into the background and stays.
        epmd = shutil.which("epmd", path=path) or "epmd"
        return Processes(folder, environment, [epmd], [program])

    def _container(self, image: str) -> Container:
        environment = {
            "RABBITMQ_SERVER_ERL_ARGS": "+P 65536",
            # Seen from the container, a test's connection comes from outside: let guest in all the same.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-rabbit loopback_users []",
        }
        ports = {5672: self.port}
        if self.management_port is None:
            environment["RABBITMQ_ENABLED_PLUGINS_FILE"] = "/none"  # else the image's: management
        else:
            ports[15672] = self.management_port
        return Container(image, environment, ports)


def _speaks_amqp(port: int) -> bool:
    """Does a broker answer AMQP 0-9-1's greeting with Connection.Start (class 10, method 10)?"""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as wire:
            wire.sendall(b"AMQP\x00\x00\x09\x01")
            return wire.recv(11, socket.MSG_WAITALL)[7:] == b"\x00\x0a\x00\x0a"
    except OSError:
        return False
