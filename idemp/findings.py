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
