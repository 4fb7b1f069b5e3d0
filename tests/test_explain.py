"""Explain: the guarantee of a handler in words, and what its ids take, by what was measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from idemp import open_store
from idemp.ports import Claim, Claimed, Complete
from tests.service import environment

HANDLERS = """
from idemp import Consumer, NotHappened, idempotent, open_store, open_transport

def asked(message):
    return NotHappened()

sqlite = open_store("sqlite:///seen.db?retention=2h")
memory = open_store("memory://")
etcd = open_store("etcd://nowhere.invalid/orders")

@idempotent(sqlite, name="orders.new_order", in_doubt="park", attempts=3, fingerprint="message.args")
def new_order(message):
    pass

@idempotent(memory, name="orders.small", key="order_id", on_busy="raise", permanent=KeyError)
def small(order_id):
    pass

@idempotent(etcd, name="orders.big", in_doubt=asked)
def big(message):
    pass

@idempotent(sqlite, name="orders.booked", transaction=True)
def booked(message):
    pass

def every_time(message):
    pass

consumer = Consumer(open_transport("memory://x"), service="orders")
consumer.on("new_order")(new_order)
consumer.on("ping")(every_time)
number = 7
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a module of handlers is."""
    (tmp_path / "explained.py").write_text(HANDLERS)
    return tmp_path


def explain(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "idemp", "explain", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )


def told(folder: Path, name: str, *more: str) -> dict[str, Any]:
    done = explain(folder, f"explained:{name}", "--json", *more)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return {key: " ".join(value) if isinstance(value, list) else value for key, value in found.items()}


def test_a_handler_on_sqlite(folder: Path) -> None:
    """What holds, at which crash, for how long, by which policy; nothing is opened for it."""
    found = told(folder, "new_order")
    assert found["handler"] == "orders.new_order"
    assert "Effectively once, for all processes of this host; it survives kill -9" in found["guarantee"]
    assert "in doubt once the session is dead; then it is parked for a person" in found["crashes"]
    assert "Ids are remembered for 2 h (7200 s)" in found["memory"]
    assert "An older message is parked, not run" in found["memory"]
    assert "attempts: 3, then parked" in found["policy"]
    assert "another payload under the same key is a conflict" in found["policy"]
    assert "cost" not in found
    assert not (folder / "seen.db").exists()


def test_a_handler_in_memory(folder: Path) -> None:
    """Its restart forgets, and that is said."""
    found = told(folder, "small")
    assert "in this process only: a restart forgets everything" in found["guarantee"]
    assert "a restart forgets it, so the message comes again and runs again" in found["crashes"]
    assert "a duplicate of one that runs raises KeyBusy" in found["policy"]
    assert "KeyError park at once" in found["policy"]


def test_a_handler_with_a_transaction(folder: Path) -> None:
    """It is never in doubt; what else it does, and what it publishes, is said."""
    found = told(folder, "booked")
    assert "Exactly once for what it writes on context().connection, for all processes" in found["guarantee"]
    assert "may happen again" in found["guarantee"]
    assert "before the commit: nothing of it is left" in found["crashes"]
    assert "in doubt" not in found["crashes"]
    assert "kills its process each time" in found["crashes"]
    assert "into the outbox, in the same transaction" in found["publishing"]
    assert "sends at once, in a consumer" in told(folder, "new_order")["publishing"]


def test_a_handler_on_etcd_without_an_etcd(folder: Path) -> None:
    """Nothing is connected to; its resolver is named, and the limit of a replica's memory."""
    found = told(folder, "big")
    assert "for all hosts" in found["guarantee"]
    assert "in doubt: asked" in found["policy"]
    assert "Each replica carries all ids" in found["memory"]


@pytest.mark.parametrize(
    ("name", "least", "most"), [("new_order", 60, 400), ("small", 200, 2000), ("big", 30, 100)]
)
def test_what_it_costs(folder: Path, name: str, least: int, most: int) -> None:
    """By a measurement on a store of the kind; the sum is that of rate and retention."""
    cost = told(folder, name, "--rate", "10")["cost"]
    hours = 2 if name == "new_order" else 24
    ids = 10 * hours * 3600
    assert f"{ids:,} ids".replace(",", " ") in cost
    found = re.search(r"(\d+) bytes an id .*: (\d+) MiB when", cost)
    assert found is not None, cost
    assert least < int(found[1]) < most
    assert abs(int(found[2]) - ids * int(found[1]) / 1024**2) <= 1


@pytest.mark.parametrize(("kind", "least", "most"), [("postgresql", 80, 600), ("redis", 80, 400)])
def test_what_it_costs_on_a_server(
    kind: str, least: int, most: int, request: pytest.FixtureRequest, folder: Path
) -> None:
    """By what the server remembers already; before it does, that is said."""
    url = request.getfixturevalue(kind).database()
    (folder / "served.py").write_text(
        f"from idemp import idempotent, open_store\n@idempotent(open_store({url!r}), name='orders.new')\n"
        "def handle(message):\n    pass\n"
    )
    with closing(open_store(url)) as store:
        store.apply([])
        nothing = explain(folder, "served:handle", "--rate", "10", "--json")
        assert "is not known before it remembers some" in " ".join(json.loads(nothing.stdout)["cost"])
        keys = [f"orders.new/{uuid4()}" for _ in range(3000)]
        claims = store.apply([Claim(key) for key in keys])
        tokens = [claim.token for claim in claims if isinstance(claim, Claimed)]
        store.apply([Complete(key, token) for key, token in zip(keys, tokens, strict=True)])

    def cost() -> str:
        done = explain(folder, "served:handle", "--rate", "10", "--json")
        return " ".join(json.loads(done.stdout)["cost"])

    # PostgreSQL counts a moment later.
    end = time.monotonic() + 30
    while (found := re.search(r"(\d+) bytes an id .* remembered now", cost())) is None:
        assert time.monotonic() < end
    assert least < int(found[1]) < most


def test_a_consumer_and_a_handler_without_a_policy(folder: Path) -> None:
    """Each handler on its own; one that is not idempotent is told so."""
    text = explain(folder, "explained:consumer").stdout
    assert "new_order: orders.new_order" in text
    assert "ping\n" in text
    assert "At least once: it has no @idempotent" in text
    assert "At least once" in explain(folder, "explained:every_time").stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nonsense"], "write it like orders.handlers:new_order"),
        (["explained:number"], "is neither a Consumer nor a function"),
        (["no_such:x"], "cannot be imported"),
        (["explained:new_order", "--rate", "0"], "--rate"),
    ],
)
def test_what_cannot_be_explained(folder: Path, arguments: list[str], sentence: str) -> None:
    """One sentence, exit code 2."""
    done = explain(folder, *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert sentence in done.stderr
