"""`python -m tests.chaos`: run a series of faults, or sum up the runs so far.

Exit code 0: valid; 1: invalid; 2: unknown, or asked in a way that makes no sense.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from tests.chaos import report, tally
from tests.chaos.ground import GROUNDS
from tests.chaos.minimise import minimise
from tests.chaos.run import Outcome, Say, give_up, judge, kinds, left_in, preflight, run
from tests.chaos.schedule import PROFILES, BadSchedule, Planned, Schedule, make, read
from tests.service import ROOT

NAME = "python -m tests.chaos"
CODES = {"valid": 0, "invalid": 1, "unknown": 2}
WALL = 480.0
"""Seconds that a run may take beyond its load and half as much again for the check; then it ends itself."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Faults upon faults, and nothing lost, doubled in silence or invented."""
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(levelname)s %(message)s")


@cli.command("run")
@click.option(
    "--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of the plan and the load."
)
@click.option("--minutes", type=click.FloatRange(min=0.1, max=24 * 60), default=3.0, show_default=True)
@click.option("--profile", type=click.Choice(list(PROFILES)), default="quick", show_default=True)
@click.option("--store", type=click.Choice(list(GROUNDS)), default="etcd", show_default=True)
@click.option("--schedule", type=click.Path(path_type=Path), help="Replay the plan in this file.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Where everything is written.")
@click.option("--tries", type=click.IntRange(min=0), default=4, show_default=True,
              help="Runs that may be spent on a shorter plan, if it is invalid.")  # fmt: skip
def run_command(
    seed: int,
    minutes: float,
    profile: str,
    store: str,
    schedule: Path | None,
    out: Path | None,
    tries: int,
) -> None:
    """Boot, load, break, heal, drain, check."""
    means, missing = preflight(store)
    for sentence in missing:
        click.echo(f"{sentence}; the kinds that need it are left out")
    try:
        drawn = kinds(profile, means, store)
        plan = read(schedule) if schedule else make(seed, minutes, profile, drawn, store)
    except BadSchedule as error:
        raise click.UsageError(str(error)) from None
    unknown = {fault.kind for fault in plan.faults} - kinds("full", means, plan.store).keys()
    if unknown:
        raise click.UsageError(f"this plan has kinds that cannot be had here: {', '.join(sorted(unknown))}")
    folder = out or Path(tempfile.mkdtemp(prefix="idemp-chaos-"))
    outcome = _run(plan, folder)
    if outcome.verdict.result == "invalid":
        file = _shorter(plan, folder, tries)
        click.echo(f"to see it again: python -m tests.chaos run --schedule {file}")
    sys.exit(CODES[outcome.verdict.result])


@cli.command("check")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
def check_command(folder: Path) -> None:
    """Judge anew what a run left in FOLDER."""
    try:
        plan, left = read(folder / "schedule.json"), left_in(folder)
    except (BadSchedule, OSError, ValueError) as error:
        raise click.UsageError(f"{folder} has no run that came to its end: {error}") from None
    verdict = judge(folder, left, PROFILES[plan.profile])
    sys.exit(CODES[_told(Outcome(verdict, folder, plan), click.echo).verdict.result])


def _run(plan: Schedule, folder: Path) -> Outcome:
    begun = time.monotonic()

    def say(what: str) -> None:
        click.echo(f"{time.monotonic() - begun:6.1f} {what}")

    wall = threading.Timer(plan.minutes * 90 + WALL, give_up, ["the run does not come to an end"])
    wall.daemon = True
    wall.start()
    try:
        return _told(run(plan, folder, say), say)
    except Exception as error:
        (folder / "error.txt").write_text(traceback.format_exc())
        _fail(f"the run broke off, so nothing is known: {error} See {folder / 'error.txt'}.")
    finally:
        wall.cancel()


def _told(outcome: Outcome, say: Say) -> Outcome:
    """Write everything, and say the most important."""
    folder = outcome.folder
    report.write(outcome, _commit())
    verdict = outcome.verdict
    shown = ("attempted", "acknowledged", "effects", "lost", "unexpected", "doubled", "doubled and named")
    say(", ".join(f"{verdict.counts.get(name, 0)} {name}" for name in shown))
    for finding in verdict.findings[:10]:
        say(f"{finding.invariant} {finding.id} {finding.what}")
    say(f"{verdict.result}: {folder / 'report.md'}")
    return outcome


def _shorter(plan: Schedule, folder: Path, tries: int) -> Path:
    """The file of a plan that is still invalid."""
    count = 0

    def fails(faults: Sequence[Planned]) -> bool:
        nonlocal count
        count += 1
        return _run(plan.only(faults), folder / f"less-{count}").verdict.result == "invalid"

    found = minimise(plan.faults, fails, tries, 2 * plan.minutes * 60)
    file = folder / "shortest.json"
    (plan.only(found) if len(found) < len(plan.faults) else plan).write(file)
    return file


def _commit() -> str:
    asked = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or "unknown"


@cli.group("tally", invoke_without_command=True)
@click.pass_context
def tally_command(context: click.Context) -> None:
    """The sum of all runs on record; `add` puts one there."""
    if context.invoked_subcommand is None:
        for name, value in tally.total(tally.runs()).items():
            click.echo(f"{name:>18} {value}")


@tally_command.command("add")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
def tally_add(folder: Path) -> None:
    """Put the run in FOLDER on record."""
    try:
        tally.add(folder)
    except (OSError, ValueError, KeyError) as error:
        raise click.UsageError(f"{folder} has no verdict that can be read: {error!r}") from None


def main() -> NoReturn:
    """Run the command; what goes wrong is one sentence."""
    try:
        cli.main(prog_name=NAME, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(CODES["unknown"])
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else NAME
        _fail(f"{error.format_message()} See '{where} --help'.")
    except click.Abort:
        sys.exit(130)
    sys.exit(0)


def _fail(sentence: str) -> NoReturn:
    click.echo(f"chaos: {sentence}", err=True)
    sys.exit(CODES["unknown"])


if __name__ == "__main__":
    main()
