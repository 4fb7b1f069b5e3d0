"""What `idemp doctor` asks an etcd and a namespace in it.  It writes nothing and opens no session."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing

from idemp.errors import ConfigError, IdempError
from idemp.findings import Finding, Looked
from idemp.ports import Clock
from idemp.stores.etcd_client import Client, Sort
from idemp.stores.etcd_health import NEARLY_FULL, QUOTA, Health, findings, look, seen
from idemp.stores.etcd_replica import Layout

SKEW = 5.0
"""Seconds between two clocks that are worth a word; etcd's is read to the second."""
PATIENCE = 10.0
"""Seconds that a member may take for each question: nobody's work waits for it."""
SETTLED = 60.0
"""Seconds that a journal must cover before its growth can be judged."""


def examine(
    endpoints: list[str], connect: Callable[[list[str]], Client], namespace: str, clock: Clock
) -> Looked:
    """Look at every member, then at the namespace.  Raises what the client raises if none answers."""
    layout, found = Layout(namespace), list[Finding]()
    with closing(connect(endpoints)) as client:
        client.range(layout.bucket)  # somebody must answer
        for endpoint in endpoints:
            with closing(connect([endpoint])) as member:
                found += _member(endpoint, member, layout, clock)
        if not client.range(layout.bucket).pairs:
            where = f"etcd namespace {namespace}"
            fix = "name the namespace of the service's IDEMP_STORE, or start the service once"
            found.append(Finding(where, f"there is no namespace {namespace!r}", "no journal in it", fix))
            return Looked(found)
        retention = float(client.range(layout.retention).pairs[0].value)
        health, covered = look(client, layout.floor, PATIENCE), _covered(client, layout, clock)
        if health is not None and covered is not None:
            found += growth(health, covered, retention)
    return Looked(found, retention)


def _member(endpoint: str, member: Client, layout: Layout, clock: Clock) -> list[Finding]:
    where = f"etcd {endpoint}"
    try:
        member.status()
    except ConfigError:
        raise
    except IdempError as error:
        fix = "start it, or take it out of --store and of the cluster"
        return [Finding(where, "this member does not answer", str(error), fix)]
    if (health := look(member, layout.floor, PATIENCE)) is None:
        evidence, fix = f"no answer within {PATIENCE:.0f} s", "see its load and its disk, and ask again"
        return [Finding(where, "this member answers, but does not tell how it is", evidence, fix)]
    found = [_finding(where, each.text, each.level, seen(health)) for each in findings(health, settled=True)]
    if (theirs := member.wall()) is not None and abs(ahead := clock.wall() - theirs) > SKEW:
        evidence = f"this machine is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} it"
        what = "its clock and this machine's differ, and the retention goes by clocks"
        found.append(Finding(where, what, evidence, "run chronyd or ntpd on both"))
    return found


def _finding(where: str, text: str, level: int, evidence: str) -> Finding:
    """What the log says of an etcd: a sentence, a colon, what to do."""
    what, _, fix = text.partition(": ")
    return Finding(where, what, evidence, fix, level > logging.INFO)


def _covered(client: Client, layout: Layout, clock: Clock) -> float | None:
    """Seconds since the oldest append that is still there; None if there is none."""
    pairs = client.range(layout.logs, prefix=True, limit=1, sort=Sort.CREATED).pairs
    try:
        return clock.wall() - float(pairs[0].value.split(b"\n", 1)[0]) if pairs else None
    except ValueError:
        return None


def growth(health: Health, covered: float, retention: float) -> list[Finding]:
    """Whether the database will hold what a whole retention brings.  covered: seconds of journal in it."""
    quota = health.quota or QUOTA
    whole = health.in_use * max(1.0, retention / max(covered, 1.0))
    if covered < SETTLED or whole < NEARLY_FULL * quota:
        return []
    evidence = (
        f"{health.in_use / 1024**2:.0f} MiB in use after {covered:.0f} s of journal make "
        f"{whole / 1024**2:.0f} MiB in a retention of {retention:.0f} s; full are {quota / 1024**2:.0f} MiB"
    )
    fix = "raise --quota-backend-bytes (8 GiB at most), name a shorter ?retention=, or split the namespace"
    return [Finding("etcd", "the journal outgrows the database within the retention", evidence, fix)]
