"""``audit run`` and ``audit status``: the auditor, and what it found."""

from __future__ import annotations

import base64
import binascii
import json
import logging
import math
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import click

from idemp.audit.auditor import Auditor, Shown, described, judge_of
from idemp.audit.buckets import Pair, moment
from idemp.audit.config import Config, configured
from idemp.audit.explain import Asker, Difference, NoAnswer, differences
from idemp.audit.judge import MESSAGES, Judge, Row, State, Verdict, shown
from idemp.audit.state import SqlState, init_state, open_state
from idemp.audit.tallies import Tallies
from idemp.cli.keys import age
from idemp.cli.options import Duration, about, escaped, json_option, key
from idemp.errors import ConfigError
from idemp.metrics import Lamp, PrometheusLamps, StatsdLamps
from idemp.signals import ended_once
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
@click.option("--influx", is_flag=True, help="For Telegraf: each judgement on stdout as InfluxDB has it.")
def run(file: str | None, as_json: bool, influx: bool) -> None:
    """Audit until stopped, as CONFIG.YAML says.

    Without a file: the environment variable CONFIG, which is the file in base64, else config.json,
    config.yaml or config.yml of this folder.  DEBUG, if it is set at all, logs every report.
    """
    if as_json and influx:
        raise click.UsageError("--json and --influx both write to stdout; choose one.")
    config = settings(file)
    if logging.root.level > logging.INFO:
        logging.getLogger("idemp").setLevel(logging.DEBUG if "DEBUG" in os.environ else logging.INFO)
    with about("dsn"):
        transport = open_transport(config.dsn)
    board = _Board(config.tick, influx)
    with closing(transport), _state(config) as state, _lamps(config, board):
        with about("dsn"):
            transport.connect()
        auditor = Auditor(transport, config, state, say=_line if as_json else None, show=board.show)
        with ended_once() as running:

            def ready() -> None:
                running()
                _ready(config, as_json)

            auditor.run(ready=ready)


@audit.command()
@click.argument("file", metavar="[CONFIG.YAML]", required=False)
@json_option
def status(file: str | None, as_json: bool) -> int:
    """Show what the auditor found; exit code 1 unless all is ok.

    Reads the state only: no broker is asked.
    """
    config = settings(file)
    with _state(config, reading=True) as state:
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
        taken = ", ".join(f"{counts.get(name, 0)} {name}" for name in ("reports", "rejected", "repeated"))
        click.echo(f"{taken}, {unsent} statuses unsent{next_check}")
    return 0 if all(verdict.state is State.OK for *_, verdict in found) else 1


@audit.command()
@click.argument("field")
@click.argument("file", metavar="[CONFIG.YAML]", required=False)
@click.option("--wait", type=Duration(), default="10s", show_default=True, help="How long who is asked has.")
@json_option
def explain(field: str, file: str | None, wait: float, as_json: bool) -> int:
    """Name the messages in which the copies of FIELD differ; exit code 1 if there are any.

    Asks the services over the broker.  FIELD is of type messages.
    """
    config = settings(file)
    judge = judge_of(config, 0.0)
    pairs = judge.pairs(field)
    if not pairs:
        raise ConfigError(_no_messages(config, field))
    with _state(config, reading=True) as state:
        judge.restore([Row(*row) for row in state.rows()])
    with about("dsn"):
        transport = open_transport(config.dsn)
    with closing(transport):
        with about("dsn"):
            transport.connect()
            asker = Asker(transport, config.exchange, patience=wait)
        found = [(pair, each) for pair in pairs for each in _asked(pair, judge, asker)]
    if as_json:
        click.echo(
            json.dumps({"field": pairs[0].field, "differences": [_difference(*each) for each in found]})
        )
    else:
        _explain(pairs, found)
    return 1 if found else 0


@audit.command()
@click.argument("tallies", metavar="FILE")
@click.argument("kind", metavar="TYPE")
@click.argument("id", type=key)
@click.argument("times", type=click.IntRange(min=0))
@click.option("--length", type=Duration(), default="60s", show_default=True, help="Of the file's buckets.")
@click.option(
    "--at", type=float, help="When it was published, in seconds since 1970, if FILE has no such id."
)
def correct(tallies: str, kind: str, id: str, times: int, length: float, at: float | None) -> None:
    """Say how often the effect of a message is there, after it was mended by hand.

    FILE is the one in which the service counts.  A service that runs tells the auditor by itself.
    """
    if not Path(tallies).exists():
        raise ConfigError(f"there is no file {tallies}; name the one that the service's Tallies were given")
    counted = Tallies(tallies, length=int(length), alone=False)
    with closing(counted):
        before, _ = counted.correct(kind, id, times, at)
    click.echo(f"{escaped(id)} counts {times} times; before it were {before}")


@audit.command()
@click.argument("url")
@click.option("--grant", metavar="ROLE", default="", help="Let this role use the tables.")
def init(url: str, grant: str) -> None:
    """Make the tables of the state at URL, or renew them for this version of idemp.

    An auditor makes them by itself if its user may; this is for a user who may not, and for a new version.
    """
    with about("URL"):
        click.echo(f"{init_state(url, grant)}.")


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


@contextmanager
def _state(config: Config, *, reading: bool = False) -> Iterator[SqlState]:
    """The state, connected."""
    with about("state"):
        state = open_state(config.state, reading=reading)
    with closing(state):
        with about("state"):
            state.looked()
        yield state


# ------------------------------------------------------------------ what is published


class _Board:
    """The last judgement, for those who show it from other threads."""

    def __init__(self, tick: float, influx: bool) -> None:
        self._tick, self._influx = tick, influx
        self._last: tuple[float | None, Sequence[Shown]] = None, ()

    def show(self, looked: float, found: Sequence[Shown]) -> None:
        """Take a judgement."""
        self._last = looked, found
        if self._influx:
            for each in found:
                click.echo(line_protocol(looked, *each))

    def lamps(self) -> tuple[float | None, list[Lamp]]:
        """How it stands now; stale if the auditor is stuck."""
        looked, found = self._last
        since = None if looked is None else (looked, self._tick)
        lamps = []
        for field, owner, replica, verdict in found:
            state = _honest(verdict, since, time.time()).state
            lamps.append(Lamp(field, owner, replica, str(state), _float(verdict.difference)))
        return looked, lamps


@contextmanager
def _lamps(config: Config, board: _Board) -> Iterator[None]:
    states = [str(state) for state in State]
    with ExitStack() as opened:
        if config.statsd:
            with about("statsd"):
                opened.enter_context(closing(StatsdLamps(config.statsd, states, board.lamps)))
        if config.prometheus is not None:
            with about("prometheus"):
                opened.enter_context(closing(PrometheusLamps(config.prometheus, states, board.lamps)))
        yield


def line_protocol(looked: float, field: str, owner: str, replica: str, verdict: Verdict) -> str:
    """InfluxDB's: a measurement with tags, fields, and the time in nanoseconds."""
    tags = "".join(
        f",{name}={_tag(value)}" for name, value in (("field", field), ("owner", owner), ("replica", replica))
    )
    fields = [f'state="{verdict.state}"']
    if verdict.status is not None:
        fields.append(f"status={verdict.status}i")
    if (apart := _float(verdict.difference)) is not None:
        fields.append(f"difference={apart!r}")
    return f"idemp_audit{tags} {','.join(fields)} {int(looked * 1000) * 1_000_000}"


def _float(value: Decimal | None) -> float | None:
    """As time series have it; None if it is too large for them."""
    read = None if value is None else float(value)
    return None if read is None or math.isinf(read) else read


def _tag(value: str) -> str:
    """No line of its own; what separates tags is escaped."""
    plain = " ".join(value.split()).rstrip("\\") or "_"
    return re.sub(r"([,= ])", r"\\\1", plain)


# ------------------------------------------------------------------ what is shown


def _ready(config: Config, as_json: bool) -> None:
    if as_json:
        _line({"event": "ready", "queue": config.consumer_queue, "exchange": config.exchange})
    else:
        click.echo(f"audit: taking reports from {config.consumer_queue}; Ctrl-C ends it", err=True)


def _no_messages(config: Config, field: str) -> str:
    kinds = {each.name.lower(): each.kind for each in config.fields}
    if field.lower() in kinds:
        return f"{field} is of type {kinds[field.lower()]}; only a field of type messages has ids to name"
    counted = [each.name for each in config.fields if each.kind == MESSAGES]
    return f"no field {field!r} is audited; of type messages are: {', '.join(counted) or 'none'}"


def _asked(pair: Pair, judge: Judge, asker: Asker) -> Iterator[Difference]:
    """Of the buckets that are not settling any more."""
    for who in (pair.owner, pair.replica):
        if not judge.buckets.asked(who):
            raise NoAnswer(f"{who} has never reported a tally, so it cannot be asked")
    lower, upper = judge.buckets.told(pair)
    between = lower, min(upper, time.time() - pair.settle)
    return differences(pair, judge.buckets.asked, asker, between)


def _difference(pair: Pair, found: Difference) -> dict[str, Any]:
    return {
        "owner": pair.owner,
        "replica": pair.replica,
        "start": found.start,
        "length": pair.length,
        "expected": found.expected.count,
        "actual": found.actual.count,
        "missing": found.missing,
        "extra": found.extra,
        "unsure": found.unsure,
        "plans": [_plan(pair, id) for id in found.missing],
    }


def _plan(pair: Pair, id: str) -> str:
    """What tells how a replay would bring the replica a message that it has not."""
    return f"idemp replay --id {shlex.quote(id)} --to {pair.replica} --dry-run"


def _explain(pairs: Sequence[Pair], found: Sequence[tuple[Pair, Difference]]) -> None:
    """The ids as they can be given to other commands."""
    for pair in pairs:
        if not any(each is pair for each, _ in found):
            click.echo(f"{pair.field} of {pair.replica}: every closed bucket is that of {pair.owner}")
    for pair, each in found:
        counts = f"{each.actual.count} messages, {pair.owner} has {each.expected.count}"
        where = f"bucket {moment(each.start)}, {pair.length} s"
        click.echo(f"{pair.field} of {pair.replica}, {where}: {counts}")
        for what, ids in (("missing", each.missing), ("extra", each.extra)):
            for id, n in ids.items():
                click.echo(f"  {what}  {escaped(id)}" + (f"  {n} times" if n > 1 else ""))
        for id in each.unsure:
            click.echo(f"  unsure   {escaped(id)}")
    missing = [(pair, id) for pair, each in found for id in each.missing]
    if missing:
        pair, id = missing[0]
        click.echo("look a missing one up in the service's store: idemp get --store URL HANDLER/ID")
        click.echo(f"its story, where services are tracked: idemp trace {shlex.quote(id)}")
        click.echo(f"what a replay would do: {_plan(pair, id)}")


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
