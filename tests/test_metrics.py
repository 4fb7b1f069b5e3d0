"""Metrics: what a statsd gets, over a real UDP socket, what a missing one costs, what Prometheus reads."""

from __future__ import annotations

import re
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from idemp import ConfigError, Message
from idemp.metrics import FLUSH, Lamp, Meters, PrometheusMeter, StatsdLamps, StatsdMeter
from idemp.ports import OUTCOMES, NoMeter
from svc.settings import read
from tests.servers import free_port
from tests.service import finished, stand, until


class Listener:
    """A UDP port and every line that came to it."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.settimeout(10)
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"

    def lines(self) -> list[str]:
        """The lines of the next packet."""
        return self._socket.recv(65536).decode().splitlines()

    def waiting(self) -> list[str]:
        """The lines of all packets that are here already."""
        lines: list[str] = []
        self._socket.setblocking(False)
        try:
            while True:
                lines += self._socket.recv(65536).decode().splitlines()
        except BlockingIOError:
            return lines

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def statsd() -> Iterator[Listener]:
    """A statsd of this test's own."""
    listener = Listener()
    yield listener
    listener.close()


def test_counters_are_summed_and_sent_together(statsd: Listener) -> None:
    """N8: a thousand counts from four threads are one line of the counter's name and sum."""
    # Given
    meter = StatsdMeter(statsd.address)

    # When
    def count() -> None:
        for _ in range(250):
            meter.count("orders_new_order_ok")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    meter.close()

    # Then
    counts: Counter[str] = Counter()
    lines = statsd.waiting()
    for line in lines:
        name, n = re.fullmatch(r"(\w+):(\d+)\|c", line).groups()  # type: ignore[union-attr]
        counts[name] += int(n)
    assert counts == {"orders_new_order_ok": 1000}
    assert len(lines) <= 2  # one, unless a second went by in between


def test_zero_makes_a_counter_exist(statsd: Listener) -> None:
    """N8: a counter of nothing yet is sent as 0, so that graphs have it."""
    meter = StatsdMeter(statsd.address)
    meter.count("orders_new_order_ok", 0)
    assert statsd.lines() == ["orders_new_order_ok:0|c"]
    meter.close()


def test_a_timer_is_sent_in_milliseconds(statsd: Listener) -> None:
    """Seconds come in, milliseconds go out, each as an observation."""
    meter = StatsdMeter(statsd.address)
    meter.time("orders_handler", 0.25)
    meter.close()
    assert statsd.waiting() == ["orders_handler:250.000000|ms"]


def test_a_busy_timer_is_sampled(statsd: Listener) -> None:
    """Ten thousand observations in a second do not become ten thousand lines."""
    meter = StatsdMeter(statsd.address)
    for _ in range(10_000):
        meter.time("orders_handler", 0.001)
    meter.close()
    assert 0 < len(statsd.waiting()) <= 200


def test_close_sends_what_is_left(statsd: Listener) -> None:
    """The last second of a service is counted, too."""
    meter = StatsdMeter(statsd.address)
    meter.count("orders_new_order_ok", 3)
    began = time.monotonic()
    meter.close()
    assert time.monotonic() - began < FLUSH
    assert statsd.waiting() == ["orders_new_order_ok:3|c"]


def test_a_name_that_statsd_has_no_letters_for(statsd: Listener) -> None:
    """It is counted under one that it has, and neither hides nor splits another."""
    meter = StatsdMeter(statsd.address)
    meter.count("orders_größe_ok", 2)
    meter.time("orders_größe", 0.25)
    meter.level("orders_größe", 7)
    meter.count("orders_a:1|c b\n_ok")
    meter.count("orders.eu_com.example/made@home-1_ok")
    meter.close()
    assert statsd.waiting() == [
        "orders_gr__e_ok:2|c",
        "orders_a_1_c_b__ok:1|c",
        "orders.eu_com.example/made@home-1_ok:1|c",
        "orders_gr__e:250.000000|ms",
        "orders_gr__e:7|g",
    ]


def test_what_cannot_be_sent_does_not_end_the_sender(
    statsd: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once, and what is counted next goes out."""
    meter = StatsdMeter(statsd.address)
    for _ in range(2):
        meter.level("orders_ready", "many")  # type: ignore[arg-type]
        time.sleep(FLUSH + 0.3)
    meter.count("orders_new_order_ok", 3)
    meter.close()
    assert statsd.waiting() == ["orders_new_order_ok:3|c"]
    [said] = [each for each in caplog.records if each.name == "idemp.metrics"]
    assert said.getMessage() == f"statsd at {statsd.address}: what was counted could not be sent"


def test_lamps_that_cannot_be_asked_once_are_asked_again(
    statsd: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    """The same of an auditor's gauges."""
    asked: list[int] = []

    def lamps() -> tuple[float | None, list[Lamp]]:
        asked.append(1)
        if len(asked) == 1:
            raise RuntimeError("not yet")
        return 5.0, []

    sender = StatsdLamps(statsd.address, ["equal"], lamps)
    assert statsd.lines() == ["idemp_audit.looked:5|g"]
    sender.close()
    assert [each.name for each in caplog.records] == ["idemp.metrics"]


@pytest.mark.parametrize("address", ["127.0.0.1:9", "no-such-host.invalid:8125"])
def test_a_statsd_that_is_not_there_costs_nothing(address: str) -> None:
    """Counting goes on at full speed, raises nothing, and closing does not hang."""
    meter = StatsdMeter(address)
    began = time.monotonic()
    for _ in range(100_000):
        meter.count("orders_new_order_ok")
    assert time.monotonic() - began < 5
    time.sleep(FLUSH + 0.2)  # a send to the closed port lies between, and its refusal
    meter.count("orders_new_order_ok")
    meter.close()


@pytest.mark.parametrize("address", ["", "127.0.0.1:x", "127.0.0.1:99999", "host:1/path", ":8125"])
def test_a_wrong_address_is_a_sentence(address: str) -> None:
    """The error shows the address and how to write one."""
    with pytest.raises(ConfigError, match=r"write it like 127\.0\.0\.1:8125") as error:
        StatsdMeter(address)
    assert repr(address) in str(error.value)


def test_the_port_may_be_left_out() -> None:
    """8125 is statsd's own."""
    meter = StatsdMeter("localhost")
    meter.close()


# ------------------------------------------------------------------ Prometheus


def scraped(port: int) -> dict[tuple[str, ...], float]:
    """What ``/metrics`` says: a name and the values of its labels, in the order of the labels' names."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }


def test_prometheus_gets_the_parts_of_a_name_as_labels() -> None:
    """N8: the same names as statsd's; a type may have underscores, and a bad message has no type."""
    port = free_port()
    with closing(PrometheusMeter("shop_eu", port)) as meter:
        for _ in range(3):
            meter.count("shop_eu_new_order_ok", 2)
        meter.count("shop_eu_new_order_skipped", 0)
        meter.count("shop_eu_rejected")
        seen = scraped(port)
    # By name: outcome, service, type.
    assert seen["idemp_messages_total", "ok", "shop_eu", "new_order"] == 6
    assert seen["idemp_messages_total", "skipped", "shop_eu", "new_order"] == 0
    assert seen["idemp_messages_total", "rejected", "shop_eu", ""] == 1


def test_prometheus_gets_any_name_as_it_is() -> None:
    """Labels have room for every letter."""
    meter = PrometheusMeter("größen", port := free_port())
    meter.count("größen_a:1|c b\n_ok", 2)
    assert scraped(port)[("idemp_messages_total", "ok", "größen", "a:1|c b\n")] == 2
    meter.close()


def test_prometheus_gets_timers_as_histograms() -> None:
    """In seconds, with buckets fine enough for a store's milliseconds."""
    port = free_port()
    with closing(PrometheusMeter("orders", port)) as meter:
        for seconds in (0.0007, 0.004, 0.004, 2.0):
            meter.time("orders_claim", seconds)
        seen = scraped(port)
    bucket = {float(le): n for (name, le, *_), n in seen.items() if name == "idemp_duration_seconds_bucket"}
    assert [bucket[le] for le in (0.0005, 0.001, 0.005, 1, 2.5)] == [0, 1, 3, 3, 4]
    assert seen["idemp_duration_seconds_count", "orders", "claim"] == 4
    assert seen["idemp_duration_seconds_sum", "orders", "claim"] == pytest.approx(2.0087)


def test_closing_lets_go_of_the_port() -> None:
    """The next one may have it at once; two at a time may not."""
    port = free_port()
    for _ in range(2):
        with closing(PrometheusMeter("orders", port)), pytest.raises(ConfigError, match=f"port {port}: "):
            PrometheusMeter("orders", port)


def test_several_meters_are_one(statsd: Listener) -> None:
    """Each gets everything."""
    port = free_port()
    meter = Meters(StatsdMeter(statsd.address), PrometheusMeter("orders", port))
    meter.count("orders_new_order_ok", 2)
    meter.time("orders_handler", 0.25)
    seen = scraped(port)
    meter.close()
    assert sorted(statsd.waiting()) == ["orders_handler:250.000000|ms", "orders_new_order_ok:2|c"]
    assert seen["idemp_messages_total", "ok", "orders", "new_order"] == 2
    assert seen["idemp_duration_seconds_count", "orders", "handler"] == 1


def test_a_service_counts_for_both(tmp_path: Path) -> None:
    """N8 N10: statsd and Prometheus at the same time, the same numbers, zeros at start."""
    port = free_port()
    with stand(f"sqlite:///{tmp_path}/queues.db", tmp_path) as desk:
        desk.service("orders", IDEMP_STORE=desk.store, IDEMP_METRICS_PORT=str(port))

        def numbers() -> dict[str, float]:
            """By statsd's names."""
            return {
                "_".join(filter(None, [service, kind, outcome])): n
                for (name, outcome, service, *rest), n in scraped(port).items()
                for kind in rest
                if name == "idemp_messages_total"
            }

        zeros = {f"orders_{kind}_{each}": 0 for kind in ("new_order", "ban_user") for each in OUTCOMES}
        assert numbers() == {**zeros, "orders_rejected": 0}
        desk.publish(*[Message("1", "new_order")] * 3, b"no message")
        desk.counted(orders_new_order_ok=1, orders_new_order_skipped=2, orders_rejected=1)
        until(lambda: numbers() == desk.statsd.counts(), lambda: (numbers(), desk.statsd.counts()))
        assert scraped(port)["idemp_duration_seconds_count", "orders", "handler"] == 1


@pytest.mark.parametrize("port", ["x", "0", "65536", "-1", "1.5", " 9100", "9100 ", "٩١٠٠", "123456"])
def test_a_wrong_port_is_a_sentence(port: str) -> None:
    """It shows the variable and how to write one."""
    with pytest.raises(ConfigError, match="a port is a number from 1 to 65535, like 9100") as error:
        read({"SERVICE_NAME": "orders", "IDEMP_METRICS_PORT": port})
    assert f"IDEMP_METRICS_PORT={port!r}" in str(error.value)


@pytest.mark.parametrize("environment", [{}, {"IDEMP_METRICS_PORT": ""}])
def test_without_a_port_prometheus_gets_nothing(environment: dict[str, str]) -> None:
    """Nothing listens unless somebody asks for it."""
    assert read({"SERVICE_NAME": "orders", **environment}).metrics_port is None


def test_a_port_that_cannot_be_had_is_a_sentence() -> None:
    """Wrong or taken: exit code 2."""
    with closing(PrometheusMeter("other", port := free_port())):
        for text, sentence in (
            ("high", "svc: IDEMP_METRICS_PORT='high': a port is "),
            (str(port), f"svc: IDEMP_METRICS_PORT: port {port}: "),
        ):
            done = finished("-m", "svc", settings={"SERVICE_NAME": "orders", "IDEMP_METRICS_PORT": text})
            assert done.returncode == 2
            [said] = done.stderr.splitlines()
            assert said.startswith(sentence)


def test_a_missing_extra_is_a_sentence() -> None:
    """With the line to type."""
    code = (
        "import sys; sys.modules['prometheus_client'] = None; from svc.__main__ import main; sys.exit(main())"
    )
    done = finished("-c", code, settings={"SERVICE_NAME": "orders", "IDEMP_METRICS_PORT": str(free_port())})
    assert done.returncode == 2
    assert done.stderr.startswith("svc: IDEMP_METRICS_PORT: ")
    assert "pip install 'idemp[prometheus]'" in done.stderr


def test_no_meter_counts_nothing() -> None:
    """It takes everything that a meter takes."""
    meter = NoMeter()
    meter.count("a")
    meter.time("b", 1.0)
    meter.level("c", 2.0)
    meter.close()
