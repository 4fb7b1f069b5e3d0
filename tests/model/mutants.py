"""Weakened forms of the protocol: each has one sentence less, and one configuration that shows why.

The name is the flag that `machine` and `journal` look at.  Each is tried with tails and with ``head``
unless it only makes sense with one of them.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.model.journal import Config, Faults
from tests.model.machine import LINES, Line

NONE = Faults()


class Mutant(NamedTuple):
    """``removed``: the sentence, in short.  ``prop``: what the search finds broken first."""

    name: str
    removed: str
    prop: str
    config: Config
    heads: tuple[bool, ...] = (False, True)

    def weakened(self, head: bool) -> Config:
        """The configuration with the flag set."""
        name = f"{self.name}{', head' if head else ''}"
        return self.config._replace(name=name, mutants=frozenset({self.name}), head=head)


def _roll(*verbs: str, appends: tuple[int, ...] = (2, 3), faults: Faults = NONE, buckets: int = 1) -> Config:
    return Config("", verbs=verbs, appends=appends, faults=faults, buckets=buckets, ticks=1)


C0, E1 = Line("C", 0), Line("E", 1)
DONE = ((0, (C0,)), (0, (Line("D", 0, LINES),)))  # key 0, by p0
RACE = Config("", verbs=("C", "C"), appends=(2, 2))
RUNS = _roll("", "ESB", appends=(1, 3))._replace(history=((0, (C0,)),))  # p0 runs key 0

MUTANTS = (
    # The append compares tail/<me> = seq-1.
    Mutant(
        "no_tail_guard",
        "a sent append is applied at most once",
        "IV",
        RACE._replace(faults=Faults(copy=1)),
    ),
    # The guard is the tail, not that the log key is absent: it is absent again after the deletes (V3).
    Mutant(
        "key_absent_guard",
        "the tail tells what was applied, not the log key",
        "IV",
        _roll("C", "ESB", appends=(1, 3), faults=Faults(lost=1)),
    ),
    # An own append is applied in its place, never at its reply (V2).
    Mutant("own_at_reply", "the own append is applied in its place", "V", RACE),
    # What comes late goes to its place: memory is rolled back and replayed (V2).
    Mutant(
        "late_at_end",
        "memory is a fold in order of revision",
        "III",
        RACE._replace(verbs=("C", "C", "C"), appends=(1, 1, 1), faults=Faults(drop=1)),
    ),
    # The append compares `bucket`: none lands in a bucket that has ended (V5, V8).
    Mutant("no_bucket_guard", "an append is of the bucket that the order is in", "III", _roll("C", "ESB")),
    # Composing for a bucket waits until everything before it is applied (sentence 10).
    Mutant(
        "compose_ahead",
        "all before E b is applied before composing for b",
        "III",
        _roll("CESB", "C", appends=(5, 1)),
        (True,),
    ),
    # Deletes mean nothing to memory; B drops, at its line (V9).
    Mutant("delete_is_state", "deletes mean nothing to memory", "III", RUNS),
    # There is no clock but that of the journal: B drops, at its line.
    Mutant("own_clock", "done is dropped at B, nowhere else", "III", RUNS),
    # The snapshot is the open set as of E, not of now.
    Mutant("snapshot_elsewhere", "the snapshot is of the place of E", "III", RUNS),
    # The snapshot is written by who is complete up to E.
    Mutant(
        "snapshot_with_gaps",
        "who writes a snapshot is complete to E",
        "III",
        _roll("CE", "SB", appends=(2, 2), faults=Faults(drop=1)),
    ),
    # All pages of an import are of one revision, and that is where the watch begins (V10, sentence 19).
    Mutant(
        "import_mixed",
        "an import is of one revision",
        "III",
        RACE._replace(faults=Faults(imports=1)),
    ),
    # An import reads nothing below the floor: it may be half deleted.
    Mutant(
        "import_below_floor",
        "an import reads nothing below the floor",
        "III",
        _roll("TESB", "", appends=(5, 0))._replace(history=((1, (C0,)), (1, (Line("P", 0, LINES),)))),
    ),
    # Who is idle reads sessions and tails (V10).
    Mutant(
        "no_look",
        "an idle replica looks",
        "VII",
        RACE._replace(verbs=("C", "T"), appends=(1, 1), faults=Faults(expiry=1)),
    ),
    # F is void on a claim (V11).
    Mutant("forget_claim", "F only of done or parked", "V", RACE._replace(verbs=("C", "CF"))),
    # A message sent back carries the revision of its F (V12).
    Mutant(
        "replay_without_since",
        "memory answers a replay when complete to its F",
        "V",
        RACE._replace(verbs=("CF", ""), appends=(3, 0)),
    ),
    # The writer acts on the outcome of its line, not on a look at memory (V13).
    Mutant(
        "look_not_outcome",
        "act on the outcome of the line",
        "I",
        Config("", verbs=("C", ""), appends=(1, 0), batch=2),
    ),
    # A parked key is taken before D or R: so a D is true by itself (V14).
    Mutant(
        "void_done",
        "a parked key is resolved by T first",
        "V",
        RACE._replace(verbs=("CP", "", ""), appends=(2, 1, 1), faults=Faults(drop=1)),
    ),
    # T wins only after X (or Q): what looks dead may live.
    Mutant("take_without_x", "T only after X or Q", "V", RACE),
    # X names the last seq, so that who lacks an append knows (V1).  With head it need not.
    Mutant(
        "x_without_last",
        "X names the last append",
        "VIII",
        RACE._replace(appends=(2, 1), faults=Faults(crash=1, drop=1), restart=True),
        (False,),
    ),
    # An unknown result is asked for with the same append again; its seq is not used for another.
    Mutant(
        "unknown_is_never",
        "what is unsure is sent again, its seq not used for another",
        "IV",
        Config("", keys=2, verbs=("C", ""), appends=(2, 0), faults=Faults(lost=1)),
    ),
    # Session and tail both gone do not say never: another has written X.
    Mutant(
        "gone_is_never",
        "session gone and tail gone say nothing about an append",
        "IV",
        RACE._replace(verbs=("C", ""), appends=(1, 1), faults=Faults(lost=1, expiry=1)),
    ),
    # D and R only of the claim that the writer holds.
    Mutant(
        "overtaken",
        "D and R only by the current holder",
        "II",
        RACE._replace(verbs=("CQ", "T"), appends=(3, 1)),
    ),
    # Q only by the holder.
    Mutant("q_by_others", "Q only by the current holder", "V", RACE._replace(verbs=("C", "CT"))),
    # D names the token on the wire: a late one must not hit the takeover before it in the same append.
    Mutant(
        "tokenless",
        "D, R, P, Q name the token on the wire",
        "II",
        Config("", verbs=("CQT", ""), appends=(3, 0), batch=2),
    ),
    # A D after the own Q may be void; it is marked, and believed only in its place.
    Mutant(
        "late_done_believed",
        "a late D is believed only in its place",
        "V",
        RACE._replace(verbs=("CQ", "T"), appends=(3, 1), faults=Faults(drop=1)),
    ),
    # Log keys are deleted only below the floor (V4).
    Mutant("delete_above_floor", "log keys are deleted only below the floor", "III", _roll("C", "E")),
    # E b compares bucket = b-1: there is one.
    Mutant(
        "e_twice", "E b compares bucket = b-1", "III", _roll("E", "ESB", appends=(1, 4), buckets=2), (True,)
    ),
    # The floor rises only to a bucket whose snapshot exists.
    Mutant("b_without_snapshot", "B only after S", "III", _roll("C", "ESB", appends=(1, 2))),
    # ... and the writer of B knows that before: a compare that can become true makes a ghost.
    Mutant(
        "b_unsure",
        "every compare, once false, stays false",
        "IV",
        _roll("", "ESB", "B", appends=(0, 2, 1), faults=Faults(copy=1)),
    ),
    # The floor only rises: B compares the floor that its writer saw.
    Mutant(
        "floor_back",
        "B compares the floor",
        "III",
        _roll("SB", "B", appends=(2, 1), buckets=2)._replace(
            history=((0, (E1,)), (0, (C0,)), (0, (Line("E", 2),)), (0, (Line("S", 1),)))
        ),
    ),
    # B comes a retention after S.
    Mutant("b_early", "B a whole retention after S", "II", RUNS),
    # The retention counts from an append composed after E was applied, not from the clock in E.
    Mutant(
        "retention_from_e",
        "the retention counts from S, not from E",
        "II",
        RUNS,
    ),
)
