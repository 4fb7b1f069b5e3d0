"""The walk-through of example2/README.md, typed into a shell as it is written, on ports of this test."""

from __future__ import annotations

import re
import sys
from contextlib import closing
from pathlib import Path

from tests.pair import ROOT
from tests.servers import need
from tests.servers.ports import free_port
from tests.test_readme_demo import Shell, typed

README = (ROOT / "example2" / "README.md").read_text()
SECTION = README.partition("\n## See it work\n")[2].partition("\n## ")[0]
DEFAULTS = {"redis": 6379, "accounts": 8090, "customers": 8080}


def test_the_walk_through(tmp_path: Path) -> None:
    """R8, R10: the revenue, a kill, more invoices, a start: it catches up; each line says what is written."""
    need("redis")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (programs / "python").chmod(0o755)
    ports = {name: free_port() for name in DEFAULTS}
    instead = {
        **{f"localhost:{DEFAULTS[name]}": f"localhost:{port}" for name, port in ports.items()},
        **{
            f"python -m example2.{name}": f"PORT={port} python -m example2.{name}"
            for name, port in ports.items()
        },
        "--port 6379": f"--port {ports['redis']}",
        "-p 6379": f"-p {ports['redis']}",
    }
    anywhere = re.compile("|".join(re.escape(there) for there in instead))
    settings = {"PYTHONPATH": str(ROOT), "REDIS_URL": f"redis://localhost:{ports['redis']}/0"}
    steps = typed(SECTION)
    assert len(steps) > 15
    with closing(Shell(tmp_path, settings)) as shell:
        shell.run(f'export PATH="{programs}:$PATH"')
        for step in steps:
            if step.command.startswith("pip install"):
                continue
            command = anywhere.sub(lambda found: instead[found[0]], step.command)
            assert shell.run(command) == step.seen, (command, logs(tmp_path))


def logs(folder: Path) -> str:
    return "\n".join(file.read_text()[-1500:] for file in folder.glob("*.log"))
