"""Prometheus for tests: it asks one program each second, from 127.0.0.1 only."""

import json
import os
import tempfile
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlencode

from tests.servers.catalog import SERVERS
from tests.servers.lent import Lent
from tests.servers.ports import free_port
from tests.servers.processes import Processes

DEADLINE = 60.0  # seconds; a start takes about 1


class Prometheus(Lent):
    """Scrapes what serves /metrics at ``target``."""

    def __init__(self, target: int) -> None:
        self._port = free_port()
        folder = Path(tempfile.mkdtemp(prefix="idemp-prometheus-"))
        (folder / "prometheus.yml").write_text(f"""
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
  - job_name: audit
    static_configs: [{{targets: ["127.0.0.1:{target}"]}}]
""")
        command = [
            SERVERS["prometheus"].path() or "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{self._port}",
        ]
        self._runs = Processes(folder, {"PATH": os.environ.get("PATH", "")}, command)

    def start(self) -> None:
        """Return when it answers."""
        self._runs.start()
        end = time.monotonic() + DEADLINE
        while True:
            try:
                self.query("up")
                return
            except OSError:
                if not self._runs.alive() or time.monotonic() > end:
                    raise RuntimeError(f"Prometheus did not start:\n{self._runs.log()}") from None
            time.sleep(0.02)

    def query(self, asked: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series, as it is now."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        url = f"http://127.0.0.1:{self._port}/api/v1/query?{urlencode({'query': asked})}"
        with direct.open(url, timeout=10) as answer:
            found = json.load(answer)["data"]["result"]
        return [(each["metric"], float(each["value"][1])) for each in found]

    def close(self) -> None:
        """The end of it and of everything it wrote."""
        self._runs.remove()
