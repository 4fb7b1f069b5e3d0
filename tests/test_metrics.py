"""Metrics: what a statsd gets, over a real UDP socket, and what a missing one costs."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from idemp import ConfigError
from idemp.metrics import FLUSH, StatsdMeter
from idemp.ports import NoMeter


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


def test_no_meter_counts_nothing() -> None:
    """It takes everything that a meter takes."""
    meter = NoMeter()
    meter.count("a")
    meter.time("b", 1.0)
    meter.close()
