"""Graphite for tests: carbon and graphite-web, on their own ports and data, from 127.0.0.1 only."""

import json
import os
import shutil
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.servers.catalog import SERVERS
from tests.servers.lent import Lent
from tests.servers.ports import free_port
from tests.servers.processes import Processes

DEADLINE = 60.0  # seconds; a start takes about 2
CONFIGURATION = Path(__file__).parents[2] / "assets" / "graphite"


class Graphite(Lent):
    """Carbon and graphite-web with the files of assets/graphite: started by `with`, gone at the end of it."""

    def __init__(self) -> None:
        self.port, self.carbon_port, self._query = free_port(), free_port(), free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="idemp-graphite-"))
        self.whisper = self._folder / "whisper"
        """Where carbon's files are."""
        self._runs = self._processes()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Return when it answers."""
        self._runs.start()
        end = time.monotonic() + DEADLINE
        while not self._answers():
            if not self._runs.alive() or time.monotonic() > end:
                raise RuntimeError(f"Graphite did not start:\n{self._runs.log()}")
            time.sleep(0.02)

    def get(self, path: str, **query: Any) -> bytes:
        """What it answers; a list in ``query`` is a parameter that comes several times."""
        with _direct().open(f"{self.url}{path}?{urlencode(query, doseq=True)}", timeout=10) as answer:
            content: bytes = answer.read()
            return content

    def post(self, path: str, **fields: str) -> Any:
        """What it answers to a form, as JSON."""
        with _direct().open(f"{self.url}{path}", urlencode(fields).encode(), timeout=10) as answer:
            return json.load(answer)

    def points(self, target: str, since: str) -> dict[str, dict[int, float]]:
        """Of each series of ``target`` its points that are there, by their time."""
        series = json.loads(self.get("render", target=target, format="json", noCache=1, **{"from": since}))
        return {
            each["target"]: {at: value for value, at in each["datapoints"] if value is not None}
            for each in series
        }

    def close(self) -> None:
        """The end of it and of everything it wrote."""
        self._runs.remove()

    def _answers(self) -> bool:
        """Both: carbon's own counters come through the web."""
        try:
            return b"carbon" in self.get("metrics/find", query="*")
        except OSError:
            return False

    def _processes(self) -> Processes:
        folder = self._folder
        for file in CONFIGURATION.glob("*.conf"):
            shutil.copy(file, folder)
        with (folder / "carbon.conf").open("a") as conf:
            # For the instance that the cache is when nobody says another: above what the file says for all.
            conf.write(f"""
[cache:a]
LINE_RECEIVER_INTERFACE = 127.0.0.1
LINE_RECEIVER_PORT = {self.carbon_port}
PICKLE_RECEIVER_PORT = 0
CACHE_QUERY_INTERFACE = 127.0.0.1
CACHE_QUERY_PORT = {self._query}
CARBON_METRIC_INTERVAL = 1
""")
        self.whisper.mkdir()
        (folder / "log").mkdir()
        (folder / "local_settings.py").write_text(f"""
SECRET_KEY = "of a test"
CONF_DIR = STORAGE_DIR = {str(folder)!r}
LOG_DIR = {str(folder / "log")!r}
CARBONLINK_HOSTS = ["127.0.0.1:{self._query}"]
FIND_CACHE_DURATION = 0
""")
        environment = {
            "PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/bin", "/bin"]),
            "PYTHONPATH": str(folder),  # before /etc/graphite
            "GRAPHITE_SETTINGS_MODULE": "local_settings",
            "GRAPHITE_STORAGE_DIR": str(folder),
            "GRAPHITE_CONF_DIR": str(folder),
        }
        carbon, web = SERVERS["carbon"].path() or "carbon-cache", SERVERS["graphite-web"].path()
        cache = [carbon, f"--config={folder}/carbon.conf", f"--pidfile={folder}/pid", "--debug", "start"]
        serve = '"$0" migrate --run-syncdb --verbosity 0 && exec "$0" runserver --noreload --insecure "$1"'
        site = ["/bin/sh", "-c", serve, web or "graphite-manage", f"127.0.0.1:{self.port}"]
        return Processes(folder, environment, cache, site)


def _direct() -> urllib.request.OpenerDirector:
    """Without the proxies of the environment: it is this machine."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))
