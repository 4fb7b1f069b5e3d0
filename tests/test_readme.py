"""Every block of the README is run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from idemp import Message, open_transport, publish
from idemp.ports import Publication
from tests.servers import RabbitMQ
from tests.service import Program, environment, finished, until

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHELL = [text for language, text in BLOCKS if language == "sh"]

PSP = "class psp:\n    @staticmethod\n    def charge(args, idempotency_key): "
PSP += "print('charged', args, flush=True)\n"
PLACE = "import asyncio, httpx\nasync def place(order): return {'placed': order}\n"
POST = """
async def main():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        for _ in range(2):
            answer = await client.post("/orders", json={"sku": 1}, headers={"Idempotency-Key": "K"})
            print(answer.json())
asyncio.run(main())
"""


def block(mark: str) -> str:
    [found] = [text for text in PYTHON if mark in text]
    return found


def test_all_python_blocks_are_known() -> None:
    """A new one needs its test."""
    assert len(PYTHON) == 4


@pytest.mark.parametrize(
    ("mark", "before", "after", "said"),
    [
        ("billing.charge", "", "print(charge('A-1', 500))", "{'receipt': 'A-1'}\n"),
        ("billing.invoice", "", "", "{'invoice': 17}\n"),
        ("FastAPI", PLACE, POST, "{'placed': {'sku': 1}}\n" * 2),
    ],
)
def test_python_blocks(tmp_path: Path, mark: str, before: str, after: str, said: str) -> None:
    """As they stand, twice: the second run remembers the first."""
    for _ in range(2):
        done = finished("-c", before + block(mark) + after, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, said), done.stderr


def test_the_consumer_block(tmp_path: Path, rabbitmq: RabbitMQ, unique: str) -> None:
    """Against a real broker: an order sent twice is charged once; SIGTERM ends it."""
    code = block("Consumer(").replace("amqp://localhost", rabbitmq.url).replace('"orders"', f'"{unique}"')
    code = code.replace("sqlite:///seen.db", f"sqlite:///{tmp_path}/seen.db")
    code = code.replace("consumer.run()", "consumer.run(ready=lambda: print('ready', flush=True))")
    program = Program(tmp_path / "said", ["-c", PSP + code], {})
    program.wait_for("ready")
    order = Message("1", "new_order", {"cents": 5})
    transport = open_transport(rabbitmq.url)
    publish(transport, [Publication(order.encode(), order.properties(), "", f"{unique}-queue")] * 2)
    program.wait_for("charged {'cents': 5}")
    until(lambda: transport.depth(f"{unique}-queue") == 0, program.said)
    transport.close()
    assert program.stop(signal.SIGTERM) == 0
    assert program.said().count("charged") == 1


def test_shell_blocks(tmp_path: Path) -> None:
    """Each line works, one after the other."""
    text = "".join(text for text in SHELL if "make" not in text and "pip" not in text)
    shims = (
        f'set -e\nidemp() {{ "{sys.executable}" -m idemp "$@"; }}\npython() {{ "{sys.executable}" "$@"; }}\n'
    )
    shims += 'timeout() { shift; "$(type -P timeout)" --preserve-status "$1" "$PYTHON" "${@:3}"; }\n'
    done = subprocess.run(
        ["bash", "-c", shims + text],
        cwd=tmp_path,
        env={**environment(), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "verb", [line for text in SHELL for line in text.splitlines() if line.startswith("make")]
)
def test_the_verbs_exist(verb: str) -> None:
    """What they do is tested elsewhere; here, that make knows them."""
    plan = subprocess.run(
        [*verb.split(), "-n"], cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ
    )
    assert plan.returncode == 0, plan.stderr


def test_the_extras_exist() -> None:
    """Those of the line to type."""
    [line] = [text for text in SHELL if "pip install" in text]
    extras = re.search(r"idemp\[(.*)\]", line)
    assert extras is not None
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras[1].split(",")) <= known.keys()
