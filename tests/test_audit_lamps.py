"""What the auditor publishes: gauges in Graphite and Prometheus, lines for InfluxDB; and when it is dead."""

from __future__ import annotations

import json
import re
import signal
import time
from decimal import Decimal
from pathlib import Path
from urllib.request import urlopen

import pytest

from idemp.audit.config import Config
from idemp.audit.judge import State, Verdict
from idemp.cli.audit import line_protocol
from tests.servers import Graphite, Prometheus, RabbitMQ, Statsd, free_port, need
from tests.service import Program, finished, until
from tests.test_audit import SYNCHRONOUS, in_room
from tests.test_dashboards import audit_targets

TICK = 2.0
"""Seconds: the auditor's interval, where nobody says another."""


def settings(folder: Path, name: str, more: str, tick: float = TICK) -> Path:
    file = folder / "config.yaml"
    file.write_text(f"""
dsn: sqlite:///{folder}/queues.db
exchange: {name}
consumer_queue: {name}_in
report_queue: {name}_out
state: {folder}/audit.db
tick: {tick:g}s
{more}
data:
  "{name}": {{type: int, owner: S, samples: 3, replicas: [B: {{offset: 10}}]}}
""")
    return file


def test_n5_a16_a_dead_auditor_is_stale_in_graphite(
    graphite: Graphite, statsd: Statsd, tmp_path: Path, unique: str
) -> None:
    """Whoever looks sees it within two intervals of the default after a kill -9; while it lives it is ok."""
    lamps, looked, _ = audit_targets()
    tick = Config("", ()).tick

    def shown() -> float | None:
        """What the dashboard shows of it at this moment."""
        points = graphite.points(lamps, "-30s").get(f"{unique}.B", {})
        return points[max(points)] if points else None

    with in_room(f"sqlite:///{tmp_path}/queues.db", tmp_path, unique) as room:
        room.file = settings(tmp_path, unique, f"statsd: {statsd.address}", tick)
        auditor = room.run()
        room.send(*(f'{{"service":"{who[0]}","data":{{"{unique}":{who[1:]}}}}}'.encode()
                    for who in SYNCHRONOUS.split()))  # fmt: skip
        until(lambda: shown() == 1, lambda: graphite.points(lamps, "-30s"))

        def age() -> float:
            """Of the last look.  In whole seconds, so a point may be of the second before it."""
            [ages] = graphite.points(looked, "-10s").values()
            return ages[max(ages)]

        until(lambda: 0 <= age() <= 3 * tick, age)
        auditor.stop(signal.SIGKILL)
        killed = time.monotonic()
        until(lambda: shown() == 3, shown)
        assert time.monotonic() - killed <= 2 * tick
        told = graphite.get(
            "render", target=lamps, format="json", noCache=1, maxDataPoints=3, **{"from": "-1min"}
        )
        [points] = [each["datapoints"] for each in json.loads(told) if each["target"] == f"{unique}.B"]
        assert {value for value, _ in points} <= {1, 2, 3, 4}  # also where a picture has room for few points


def test_n5_a16_a_dead_auditor_is_stale_in_prometheus(tmp_path: Path, unique: str) -> None:
    """After a kill -9 nothing says ok any more, at the next scrape; one that hangs says itself that it is."""
    need("prometheus")
    port = free_port()
    with in_room(f"sqlite:///{tmp_path}/queues.db", tmp_path, unique) as room, Prometheus(port) as server:
        room.file = settings(tmp_path, unique, f"prometheus: {port}")
        auditor = room.run()
        room.send(*(f'{{"service":"{who[0]}","data":{{"{unique}":{who[1:]}}}}}'.encode()
                    for who in SYNCHRONOUS.split()))  # fmt: skip

        def lit() -> list[str]:
            return [labels["state"] for labels, value in server.query("idemp_audit_state == 1") if value]

        until(lambda: lit() == ["ok"], lit)
        [(labels, difference)] = server.query("idemp_audit_difference")
        assert (labels["field"], labels["owner"], labels["replica"], difference) == (unique, "S", "B", 0)
        [(_, age)] = server.query("time() - idemp_audit_looked_timestamp_seconds")
        assert 0 <= age <= 3 * TICK
        auditor.stop(signal.SIGKILL)
        killed = time.monotonic()
        until(lambda: lit() == [], lit)
        assert time.monotonic() - killed <= 2 * TICK
        [(_, up)] = server.query("up")
        assert up == 0


def test_an_auditor_without_its_broker_is_stale(own_rabbitmq: RabbitMQ, tmp_path: Path, unique: str) -> None:
    """It lives and says so itself: it has not looked."""
    port = free_port()
    with in_room(own_rabbitmq.url, tmp_path, unique) as room:
        room.settings(more=f"prometheus: {port}")
        auditor = room.run()
        room.say(SYNCHRONOUS)

        def shown() -> str:
            with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                return str(answer.read().decode())

        def stands(state: str) -> bool:
            return bool(re.search(rf'idemp_audit_state{{field="sales",.*state="{state}"}} 1\.0', shown()))

        until(lambda: stands("ok"), shown)
        own_rabbitmq.kill()
        auditor.wait_for("connecting again")
        until(lambda: stands("stale"), shown)


def test_a16_lines_for_influxdb(tmp_path: Path, unique: str) -> None:
    """One for each copy at each judgement."""
    file = settings(tmp_path, unique, "")
    program = Program(tmp_path / "said", ["-m", "idemp", "audit", "run", str(file), "--influx"], {})
    try:
        program.wait_for(f"idemp_audit,field={unique},owner=S,replica=B ")
    finally:
        assert program.stop() == 0
    [line, *_] = [line for line in program.said().splitlines() if line.startswith("idemp_audit")]
    assert re.fullmatch(rf'idemp_audit,field={unique},owner=S,replica=B state="stale" \d{{19}}', line)


@pytest.mark.parametrize(
    ("names", "verdict", "line"),
    [
        (
            ("a field", "s=1", "b,2"),
            Verdict(State.BROKEN, "", 0.0, 0, Decimal(100), Decimal("90.5")),
            'idemp_audit,field=a\\ field,owner=s\\=1,replica=b\\,2 state="broken",status=0i,difference=-9.5 '
            "1500000000000000000",
        ),
        (
            ("f\nidemp_audit x=1", "\\", "r\\"),
            Verdict(State.STALE, "", 0.0, None, "a", "b"),
            'idemp_audit,field=f\\ idemp_audit\\ x\\=1,owner=_,replica=r state="stale" 1500000000000000000',
        ),
        (
            ("f", "s", "r"),
            Verdict(State.OK, "", 0.0, 2, Decimal("1e400"), Decimal("-1e400")),
            'idemp_audit,field=f,owner=s,replica=r state="ok",status=2i 1500000000000000000',
        ),
    ],
)
def test_a_line_is_one_line(names: tuple[str, str, str], verdict: Verdict, line: str) -> None:
    """Whatever the names are."""
    assert line_protocol(1.5e9, *names, verdict) == line


def test_bad_places_to_publish_are_told(tmp_path: Path, unique: str) -> None:
    """Exit code 2 and the setting's name."""
    for more, part in (("statsd: 'h:x'", "statsd: statsd address"), ("prometheus: 0", "prometheus='0'")):
        done = finished("-m", "idemp", "audit", "run", str(settings(tmp_path, unique, more)))
        assert (done.returncode, done.stdout) == (2, ""), done
        assert part in done.stderr
        assert "Traceback" not in done.stderr
    file = settings(tmp_path, unique, "")
    done = finished("-m", "idemp", "audit", "run", str(file), "--influx", "--json")
    assert (done.returncode, "choose one" in done.stderr) == (2, True)
