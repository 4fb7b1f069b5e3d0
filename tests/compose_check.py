"""`make compose-check`: docker-compose.yaml for real, by hand and not in CI.

Where a Docker engine runs, it is asked, and brings the images as it always does.  Where none runs, as root
on a Debian with docker.io, docker-compose and mmdebstrap, one is started for the check alone; it can fetch
nothing, so images made of Debian's packages stand in for those that are named, under the same names.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[1]
PROJECT = "idemp-check"
DEBIAN = "idemp-check-debian"
PACKAGES = "rabbitmq-server,etcd-server,etcd-client,python3-pip,python3-venv,busybox"
MOVED = 32_000
"""Added to every port on this machine's side."""
PATIENCE = 180.0
"""Seconds until what is waited for must be there."""
SETTLE = 3.0
"""Seconds in which nothing more may be counted; services send once a second."""

STAND_INS = {
    "rabbitmq": r"""
        RUN echo '[rabbitmq_management].' > /etc/rabbitmq/enabled_plugins \
            && echo 'loopback_users.guest = false' > /etc/rabbitmq/rabbitmq.conf
        USER rabbitmq
        CMD ["/usr/lib/rabbitmq/bin/rabbitmq-server"]
        """,
    "etcd": """
        RUN ln -s /usr/bin/etcdctl /usr/local/bin/
        CMD ["/usr/bin/etcd"]
        """,
    "graphite": """
        RUN ln -s /bin/busybox /usr/local/bin/wget && ln -s /bin/busybox /usr/local/bin/nc
        COPY compose_graphite.py /
        CMD ["python3", "/compose_graphite.py"]
        """,
    # pip asks its own folder, and so nobody.
    "python": r"""
        RUN ln -s /usr/bin/python3 /usr/local/bin/python
        COPY wheels /locked
        RUN printf '[global]\nno-index = true\nfind-links = /locked\n' > /etc/pip.conf
        """,
}
"""By a word in the name of the image: what makes it of DEBIAN."""


class Wrong(Exception):
    """The stack is not as it should be."""


def main() -> int:
    began = time.monotonic()
    try:
        with ExitStack() as ends:
            folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="idemp-compose-")))
            if not answers("docker", "info"):
                ends.enter_context(engine(folder))
                build_stand_ins(folder)
            stack = ends.enter_context(up(folder))
            check_confinement(stack)
            check_story(stack)
            check_outage(stack)
    except Wrong as wrong:
        print(f"compose-check: {wrong}", file=sys.stderr)
        return 1
    print(f"compose-check: all is as it should be, after {time.monotonic() - began:.0f} seconds")
    return 0


# ------------------------------------------------------------------ what is checked


def check_confinement(stack: "Stack") -> None:
    """Neither service can become more than it is, or write where it should not."""
    for service in ("orders", "notify"):
        say(f"{service}: no root, no capability, nothing to write to but /tmp")
        stack.inside(service, "touch", "/tmp/x")
        expect(f"{service}: its user", stack.inside(service, "id", "-u"), "10001")
        status = stack.inside(service, "cat", "/proc/1/status")
        for name, value in {"CapBnd": "0" * 16, "NoNewPrivs": "1"}.items():
            expect(f"{service}: {name}", re.findall(rf"^{name}:\s*(\S+)", status, re.M), [value])
        for place in ("/x", "/app/x"):
            written = answers(*stack.command, "exec", "-T", service, "touch", place)
            expect(f"{service}: {place} could be written", written, False)


def check_story(stack: "Stack") -> None:
    """What the README's demo tells, in containers."""
    say("an event reaches both")
    stack.publish("A")
    stack.counted(orders_ok=1, notify_ok=1)
    for service in ("orders", "notify"):
        known = json.loads(stack.inside(service, "idemp", "get", f"{service}.new_order/A", "--json"))
        expect(f"{service}: state of A", known["state"], "done")
    say("again: skipped")
    stack.publish("A")
    stack.counted(orders_skipped=1, notify_skipped=1)

    say("notify is down, and catches up")
    stack.compose("stop", "notify")
    expect("notify's exit code", stack.inspect("notify", "{{.State.ExitCode}}"), "0")
    stack.publish("B")
    stack.counted(orders_ok=2)
    stack.compose("start", "notify")
    stack.counted(notify_ok=2)

    say("without a store, one event five times has five effects")
    stack.compose("up", "-d", "orders", "notify", ENABLE_ETCD="")
    stack.wait_healthy()
    stack.publish("C", times=5)
    stack.counted(orders_ok=7, notify_ok=7)
    say("with one again, both still know the first")
    stack.compose("up", "-d", "orders", "notify")
    stack.wait_healthy()
    stack.publish("A")
    stack.counted(orders_skipped=2, notify_skipped=2)


def check_outage(stack: "Stack") -> None:
    """Health says what is; new containers find the data of the old ones; services go on by themselves."""
    began = stack.inspect("orders", "{{.State.StartedAt}}")
    say("without broker and store, a service is not healthy")
    stack.compose("rm", "--stop", "--force", "rabbitmq", "etcd")
    stack.wait("orders", "unhealthy")
    say("with new ones in their place it goes on, and still knows the first")
    stack.compose("up", "-d", "rabbitmq", "etcd")
    stack.wait_healthy()
    stack.publish("A")
    stack.counted(orders_skipped=3, notify_skipped=3)
    expect("orders ran on since", stack.inspect("orders", "{{.State.StartedAt}}"), began)


# ------------------------------------------------------------------ the stack


class Stack:
    """The containers, and what services and Graphite say."""

    def __init__(self, folder: Path) -> None:
        # Beside a stack that is up already, and whatever else has these ports.
        moved, ports = re.subn(r"127\.0\.0\.1:([-\d]+):", _moved, (ROOT / "docker-compose.yaml").read_text())
        expect("ports", ports, 8)
        (folder / "docker-compose.yaml").write_text(moved)
        v2 = answers("docker", "compose", "version")
        self.command = [*(["docker", "compose"] if v2 else ["docker-compose"]), "-p", PROJECT]
        self.command += ["-f", f"{folder}/docker-compose.yaml", "--project-directory", str(ROOT)]
        names = [f"{service}_{outcome}" for service in ("orders", "notify") for outcome in ("ok", "skipped")]
        self._expected = dict.fromkeys(names, 0)

    def compose(self, *arguments: str, **settings: str) -> str:
        """Compose on our file; what it printed."""
        return run(*self.command, *arguments, **settings)

    def inside(self, service: str, *command: str) -> str:
        """What a program in the container printed."""
        return self.compose("exec", "-T", service, *command).strip()

    def inspect(self, service: str, form: str) -> str:
        """What the engine says of the container."""
        container = self.compose("ps", "-a", "-q", service).strip()
        return run("docker", "inspect", "--format", form, container).strip()

    def wait_healthy(self) -> None:
        """Return when all are."""
        for service in self.compose("config", "--services").split():
            self.wait(service, "healthy")

    def wait(self, service: str, health: str) -> None:
        """Return when it is healthy, or unhealthy."""
        until(f"{service} is {health}", lambda: self.inspect(service, "{{.State.Health.Status}}") == health)

    def publish(self, name: str, times: int = 1) -> None:
        """An event with this id."""
        event = json.dumps({"type": "new_order", "id": name, "args": {}})
        for _ in range(times):
            self.inside("orders", "idemp", "publish", event)

    def counted(self, **changed: int) -> None:
        """Graphite has, and keeps, what it had, but for what is named."""
        self._expected |= changed
        until(f"counted: {self._expected}", lambda: self._seen() == self._expected)
        time.sleep(SETTLE)
        expect("counted", self._seen(), self._expected)

    def _seen(self) -> dict[str, float]:
        return {name: self._sum(name.replace("_", "_new_order_")) for name in self._expected}

    def _sum(self, counter: str) -> float:
        target = quote(f"stats_counts.{counter}")
        page = f"http://127.0.0.1:{MOVED + 80}/render?target={target}&format=json&from=-30min&noCache=1"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(page, timeout=10) as answer:
            return sum(point[0] or 0 for series in json.load(answer) for point in series["datapoints"])


def _moved(ports: re.Match[str]) -> str:
    outside = "-".join(str(MOVED + int(port)) for port in ports[1].split("-"))
    return f"127.0.0.1:{outside}:"


@contextmanager
def up(folder: Path) -> Iterator[Stack]:
    """The whole of docker-compose.yaml, healthy; gone at the end with its volumes."""
    stack = Stack(folder)
    try:
        say("docker-compose.yaml is brought up")
        stack.compose("up", "-d", "--build")
        stack.wait_healthy()
        yield stack
    except Exception:
        print(stack.compose("ps"), stack.compose("logs", "--no-color", "--tail", "20"), file=sys.stderr)
        raise
    finally:
        stack.compose("down", "--volumes", "--timeout", "60")


# ------------------------------------------------------------------ an engine, and its images


@contextmanager
def engine(folder: Path) -> Iterator[None]:
    """A Docker engine of our own; all that it keeps is in ``folder``."""
    if os.geteuid() or (missing := [each for each in ("dockerd", "mmdebstrap") if not shutil.which(each)]):
        needs = "root" if os.geteuid() else " and ".join(missing)
        raise Wrong(f"no Docker engine answers, and to start one it needs {needs}")
    say("a Docker engine is started")
    os.environ["DOCKER_HOST"] = f"unix://{folder}/socket"
    command = ["dockerd", "--host", os.environ["DOCKER_HOST"], "--pidfile", str(folder / "pid")]
    command += ["--bridge", "none", "--data-root", str(folder / "data"), "--exec-root", str(folder / "exec")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        until("the engine answers", lambda: answers("docker", "info") or process.poll() is not None)
        if process.poll() is not None:
            raise Wrong(f"dockerd did not start:\n{(folder / 'log').read_text()[-2000:]}")
        yield
    finally:
        process.terminate()
        process.wait()


def build_stand_ins(folder: Path) -> None:
    """Every image that is named, made of Debian's packages."""
    if sys.version_info[:2] != (3, 11):
        raise Wrong("Debian's Python is 3.11, and the wheels must be for it: make PYTHON=python3.11")
    say("Debian's packages are fetched")
    run("mmdebstrap", "--quiet", "--variant=apt", f"--include={PACKAGES}", "bookworm", f"{folder}/debian.tar")
    run("docker", "import", f"{folder}/debian.tar", DEBIAN)
    (folder / "debian.tar").unlink()
    say("wheels are fetched")
    # Debian's 3.11 is an early one: what the lock has for such only, this Python would leave out.
    lock = re.sub(r" ; python_full_version [^\\]*", " ", (ROOT / "requirements.lock").read_text())
    context = folder / "context"
    context.mkdir()
    (context / "lock").write_text(lock)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--no-deps"]
    run(*pip, "--only-binary", ":all:", "--dest", f"{context}/wheels", "-r", f"{context}/lock")
    shutil.copy(Path(__file__).with_name("compose_graphite.py"), context)
    for image in named_images():
        say(f"{image} is made")
        [lines] = [lines for word, lines in STAND_INS.items() if word in image.rpartition("/")[2]]
        (context / "Dockerfile").write_text(f"FROM {DEBIAN}\n{lines}")
        run("docker", "build", "--quiet", "--tag", image, str(context), DOCKER_BUILDKIT="0")


def named_images() -> list[str]:
    """Those of docker-compose.yaml but for ours, and the one that ours is made of."""
    images: list[str] = re.findall(r"^    image: (\S+)", (ROOT / "docker-compose.yaml").read_text(), re.M)
    bases: list[str] = re.findall(r"^FROM (\S+:\S+)", (ROOT / "Dockerfile").read_text(), re.M)
    return images + bases


# ------------------------------------------------------------------ small things


def say(what: str) -> None:
    print(f"compose-check: {what}", flush=True)


def expect(what: str, seen: object, expected: object) -> None:
    if seen != expected:
        raise Wrong(f"{what}: {seen!r}, should be {expected!r}")


def until(what: str, holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > end:
            raise Wrong(f"waited in vain until {what}")
        time.sleep(0.5)


def answers(*command: str) -> bool:
    """Whether it is there, and ends well."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def run(*command: str, **settings: str) -> str:
    """What it printed."""
    env = {**os.environ, **settings}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Wrong(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
