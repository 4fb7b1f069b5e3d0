"""What pyproject.toml asks of other packages at the least: `make oldest` runs with just that."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_oldest_are_those_that_are_allowed() -> None:
    """Somebody who changes a bound makes the second lock anew: `make lock`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    [drivers] = [each.removeprefix("idemp[").removesuffix("]").split(",") for each in extras["all"]]
    asked = [*project["dependencies"], *(each for driver in drivers for each in extras[driver])]
    found = [re.match(r"([a-z-]+)(?:\[.*\])?>=([0-9.]+)", each) for each in asked]
    bounds = {each[1]: each[2] for each in found if each}
    assert len(bounds) == len(asked)
    locked = dict(
        re.findall(r"^([a-z-]+)==([0-9.]+)", (ROOT / "requirements.oldest.lock").read_text(), re.MULTILINE)
    )
    for name, bound in bounds.items():
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", locked[name]), (name, bound, locked[name])


def test_every_module_and_command_starts() -> None:
    """With the packages that are first on the path."""
    code = """
import importlib, pkgutil
import click
import idemp
from idemp.cli import cli

for module in pkgutil.walk_packages(idemp.__path__, "idemp."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

def help(command, parents):
    context = click.Context(command, parent=parents)
    assert command.get_help(context)
    for name in command.list_commands(context) if isinstance(command, click.Group) else ():
        help(command.get_command(context, name), context)

help(cli, None)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
