"""Finding: what `idemp doctor` tells of a server or a file, why, and what to do."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """One thing that is not as it should be.

    where: which server or file.  what: in a sentence.  evidence: what was seen.  fix: what to do, exactly.
    fault: false for what is only worth knowing.
    """

    where: str
    what: str
    evidence: str
    fix: str
    fault: bool = True


class Looked(NamedTuple):
    """What a look found.  retention: seconds that ids are kept there, where that was seen."""

    findings: list[Finding]
    retention: float | None = None


def too_old(queue: str, published: float | None, retention: float | None, now: float) -> list[Finding]:
    """Of the message at the head of ``queue``: whether it is older than the seconds that ids are kept.

    published, now: seconds since 1970.  None, or no retention: nobody can tell.
    """
    if retention is None or not published or now - published <= retention:
        return []
    evidence = (
        f"the oldest message was published {now - published:.0f} s ago, ids are kept for {retention:.0f} s"
    )
    what = "messages older than the retention wait: they will be parked, not run"
    fix = (
        f"see them afterwards: idemp dead list {queue} (the messages), idemp doubt (their keys); "
        f"let them run: idemp dead send {queue} --reason-has 'older than the retention'"
    )
    return [Finding(queue, what, evidence, fix)]
