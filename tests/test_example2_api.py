"""What a fuzzer finds in the two APIs, from their own OpenAPI descriptions: no answer of 500 or more."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.pair import Service, login, until
from tests.servers import PostgreSQL, Redis

EXAMPLES = "15"


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_no_request_is_an_error_of_ours(
    redis: Redis, postgresql: PostgreSQL, tmp_path: Path, database: str
) -> None:
    """R2, R3, R4, R9: with a good token, on each operation of both services."""
    place = redis.database()
    urls = {
        name: f"sqlite:///{tmp_path}/{name}.db" if database == "sqlite" else postgresql.database()
        for name in ("accounts", "customers")
    }
    with (
        closing(Service("accounts", place, urls["accounts"], tmp_path)) as accounts,
        closing(Service("customers", place, urls["customers"], tmp_path)) as customers,
    ):
        accounts.start()
        customers.start()
        headers = login(accounts)
        for service in (accounts, customers):
            fuzz(service, headers["Authorization"], tmp_path)
            assert "Traceback" not in service.said(), service.said()
            until(service.ready)


def fuzz(service: Service, token: str, folder: Path) -> None:
    """schemathesis, against everything that its description names."""
    words = ["run", f"{service.url}/openapi.json", "--header", f"Authorization: {token}"]
    words += ["--checks", "not_a_server_error", "--max-examples", EXAMPLES, "--seed", "1"]
    words += ["--phases", "examples,coverage,fuzzing"]
    program = Path(sys.executable).with_name("schemathesis")
    done = subprocess.run(
        [program, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env={**os.environ, "SCHEMATHESIS_HOOKS": ""},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
