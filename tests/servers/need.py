"""The one place that says what a missing server means: a skipped test on a laptop, a failed one in CI."""

import os

import pytest

from tests.servers.catalog import SERVERS


def need(server: str) -> None:
    """Go on only if a test can start this server of the table."""
    if SERVERS[server].here():
        return
    missing(f"{server} is not on this machine: `make servers` brings it")


def missing(reason: str) -> None:
    """Skip this test, or in CI fail it."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
