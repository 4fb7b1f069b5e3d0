"""``audit run`` and ``audit status``: the auditor, and what it found."""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from idemp.audit.auditor import Auditor, described, judge_of
from idemp.audit.config import Config, configured
from idemp.audit.judge import Judge, Row, State, Verdict, shown
from idemp.audit.state import AuditState
from idemp.cli.keys import age
from idemp.cli.options import about, escaped, json_option
from idemp.errors import ConfigError
from idemp.transports import open_transport

FILES = ("config.json", "config.yaml", "config.yml")
MISSED = 2.0
"""Ticks that the auditor may be late before nothing it said counts any more."""


@click.group()
def audit() -> None:
    """Are the copies that services keep of one thing still equal?"""


@audit.command()
@click.argument("file", metavar="[CONFIG.YAML]", required=False)
@json_option
def run(file: str | None, as_json: bool) -> None:
    """Audit until stopped, as CONFIG.YAML says.

    Without a file: the environment variable CONFIG, which is the file in base64, else config.json,
    config.yaml or config.yml of this folder.  DEBUG, if it is set at all, logs every report.
    """
    config = settings(file)
    if logging.root.level > logging.INFO:
        logging.getLogger("idemp").setLevel(logging.DEBUG if "DEBUG" in os.environ else logging.INFO)
    with about("dsn"):
        transport = open_transport(config.dsn)
    with closing(transport), closing(_state(config)) as state:
        with about("dsn"):
            transport.connect()
        auditor = Auditor(transport, config, state, say=_line if as_json else None)
        auditor.run(ready=lambda: _ready(config, as_json))


@audit.command()
@click.argument("file", metavar="[CONFIG.YAML]", required=False)
@json_option
def status(file: str | None, as_json: bool) -> int:
    """Show what the auditor found; exit code 1 unless all is ok.

    Reads the state file only: no broker is asked.
    """
    config = settings(file)
    with closing(_state(config, reading=True)) as state:
        judge = judge_of(config, 0.0)
        judge.restore([Row(*row) for row in state.rows()])
        looked, counts, unsent = state.looked(), state.counts(), state.unsent()
    now = time.time()
    found = [(field, who, _honest(verdict, looked, now)) for field, who, verdict in judge.verdicts()]
    if as_json:
        fields = [
            {**described(field.name, who, verdict), "owner": field.owner, **_reported(judge, field.name, who)}
            for field, who, verdict in found
        ]
        check = None if looked is None else sum(looked)
        whole = {"looked": looked and looked[0], "next_check": check, "counts": counts, "unsent": unsent}
        click.echo(json.dumps({**whole, "fields": fields}))
    else:
        _show([(field.name, field.owner, who, verdict) for field, who, verdict in found], now)
        next_check = "" if looked is None else f"; next check {_in(sum(looked) - now)}"
        rejected = counts.get("rejected", 0)
        click.echo(
            f"{counts.get('reports', 0)} reports, {rejected} rejected, {unsent} statuses unsent{next_check}"
        )
    return 0 if all(verdict.state is State.OK for *_, verdict in found) else 1


# ------------------------------------------------------------------ settings


def settings(file: str | None) -> Config:
    """Of the file, of CONFIG, or of the file that is there.  Raises `ConfigError`."""
    from idemp.audit.document import read

    text, source = _text(file)
    return configured(read(text, source), source)


def _text(file: str | None) -> tuple[str, str]:
    """The settings, and what they are called."""
    if file is None and "CONFIG" in os.environ:
        try:
            return base64.b64decode("".join(os.environ["CONFIG"].split()), validate=True).decode(), "CONFIG"
        except (binascii.Error, UnicodeDecodeError):
            raise ConfigError("CONFIG is not base64 of YAML; make it with: base64 -w0 config.yaml") from None
    there = [name for name in FILES if Path(name).exists()]
    if file is None and not there:
        raise ConfigError("there are no settings: name a file, set CONFIG, or put config.yaml here")
    name = file if file is not None else there[0]
    try:
        return Path(name).read_text(encoding="utf-8"), name
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is no text in UTF-8") from None


def _state(config: Config, *, reading: bool = False) -> AuditState:
    with about("state"):
        return AuditState(config.state, reading=reading)


# ------------------------------------------------------------------ what is shown


def _ready(config: Config, as_json: bool) -> None:
    if as_json:
        _line({"event": "ready", "queue": config.consumer_queue, "exchange": config.exchange})
    else:
        click.echo(f"audit: taking reports from {config.consumer_queue}; Ctrl-C ends it", err=True)


def _line(told: Mapping[str, Any]) -> None:
    click.echo(json.dumps(told))


def _honest(verdict: Verdict, looked: tuple[float, float] | None, now: float) -> Verdict:
    """What the auditor said, unless it is no longer there to say it."""
    if looked is None:
        return verdict
    last, tick = looked
    if now - last <= MISSED * tick:
        return verdict
    return verdict._replace(
        state=State.STALE, reason=f"the auditor last looked {age(now - last)} ago", since=last
    )


def _reported(judge: Judge, name: str, who: str) -> dict[str, Any]:
    value, at = judge.reported(name, who)
    return {"reported": None if value is None else str(value), "reported_at": at}


def _in(seconds: float) -> str:
    return f"in {age(seconds)}" if seconds >= 0 else f"was due {age(-seconds)} ago"


COLOURS = {State.OK: "green", State.SETTLING: "yellow", State.STALE: "bright_black", State.BROKEN: "red"}
COLUMNS = ("state", "for", "field", "owner", "replica", "expected", "actual", "difference", "reason")


def _show(found: list[tuple[str, str, str, Verdict]], now: float) -> None:
    """As wide as what is in it: the reason, which is the longest, comes last."""
    lines = [COLUMNS, *(_cells(*each, now) for each in found)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(COLUMNS))]
    colours = ["", *(COLOURS[verdict.state] for *_, verdict in found)]
    for line, colour in zip(lines, colours, strict=True):
        first, *rest = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join([click.style(first, fg=colour or None), *rest]).rstrip())


def _cells(name: str, owner: str, replica: str, verdict: Verdict, now: float) -> tuple[str, ...]:
    values = (shown(value) for value in (verdict.expected, verdict.actual, verdict.difference))
    since = age(now - verdict.since) if verdict.since else "-"
    return (
        str(verdict.state),
        since,
        *(escaped(cell) for cell in (name, owner, replica)),
        *values,
        escaped(verdict.reason),
    )
