"""The judge of the audit: the vectors of the seed AuditMQ, row by row, and what goes beyond it."""

from __future__ import annotations

import random
from contextlib import suppress
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idemp.audit import Report, Status
from idemp.audit.judge import Field, Judge, Row, State, Tolerance, agree, cast, shifted
from idemp.audit.messages import Unfit
from idemp.errors import BadMessage

B2 = [Status("B", 2), Status("all", 2)]
S, B = "S", "B"
SALES = Field("sales", "int", S, 3, {B: Decimal(10)})


def judge(*fields: Field, **options: Any) -> Judge:
    """Of the field of the vectors, with reports for replicas only, as the seed's program has them."""
    return Judge(fields or (SALES,), 0.0, **{"owner_reports": False, **options})


def say(judge: Judge, reports: str, field: str = "sales", now: float = 0.0) -> None:
    """``S100 B90``: who has what, in this order; a JSON value stands as it is."""
    for told in reports.split():
        body = f'{{"service": "{told[0]}", "data": {{"{field}": {told[1:]}}}}}'
        report = Report.decode(body.encode())
        for name, value in report.data.items():
            judge.report(report.service, name, value, now, now)


def state(judge: Judge, replica: str = B) -> State:
    return {who: verdict.state for _, who, verdict in judge.verdicts()}[replica]


def reason(judge: Judge, replica: str = B) -> str:
    return {who: verdict.reason for _, who, verdict in judge.verdicts()}[replica]


# ------------------------------------------------------------------ the vectors

VECTORS: list[tuple[str, bool, list[tuple[str, list[Status]]]]] = [
    ("A7 not full: nothing", False, [("S100 B90 S100", [])]),
    ("A7, A8, A9 full and constant", False, [("S100 B90 S100", []), ("B90", B2)]),
    (
        "A10 as documented: what was known stands while it changes",
        False,
        [("S100 B90 S100 B90", B2), ("S105", []), ("B95 S105", []), ("B95", [])],
    ),
    (
        "A10 by option: unknown is told, and nothing of all",
        True,
        [("S100 B90 S100 B90", B2), ("S105", [Status("B", -1)]), ("B95 S105", []), ("B95", B2)],
    ),
    ("a dead replica stays as it was", False, [("S100 B90 S100 B90", B2), ("S100 S100 S100", [])]),
    (
        "A9 only on change",
        False,
        [
            ("S100 B90 S100 B90", B2),
            ("S100 B90", []),
            ("B91 B91 B91", [Status("B", 0), Status("all", 0)]),
            ("B91", []),
            ("B90 B90 B90", B2),
        ],
    ),
    ("A12 text that is a number", False, [('S"100" B"90" S"1e2" B9e1', B2)]),
    ("A12 true is 1", False, [("Strue B-9 Strue B-9", B2)]),
    ("A12 false is 0", False, [("Sfalse B-10 Sfalse B-10", B2)]),
]


@pytest.mark.parametrize(("unknown", "steps"), [row[1:] for row in VECTORS], ids=[row[0] for row in VECTORS])
def test_vectors(unknown: bool, steps: list[tuple[str, list[Status]]]) -> None:
    """What is told after each step."""
    judged = judge(publish_unknown=unknown)
    for now, (reports, told) in enumerate(steps):
        say(judged, reports)
        assert judged.tick(float(now), float(now)) == told, reports


@pytest.mark.parametrize(
    "value", ["null", '"abc"', "[1]", '{"a":1}', "NaN", "-Infinity", "1e401", "9" * 401, '"NaN"']
)
def test_a12_what_is_no_number_is_refused(value: str) -> None:
    """With a reason that names the field, and without a trace in any window; then all goes on."""
    judged = judge()
    say(judged, "S100 B90 S100")
    before = judged.changes()
    with pytest.raises(BadMessage, match="sales"):
        say(judged, f"B{value}")
    assert before
    assert judged.changes() == []
    say(judged, "B90")
    assert judged.tick(1.0, 1.0) == B2


def test_a6_the_oldest_goes_and_the_others_are_copied() -> None:
    """Who never reported gets no copy; who did has its newest value again."""
    judged = judge()
    say(judged, "S1 S2 S3 S4")
    rows = {row.name: row.text or "" for row in judged.changes()}
    assert list(rows) == ['["window", "sales", "S"]']
    assert '["2", "3", "4"]' in rows['["window", "sales", "S"]']
    say(judged, "B7 S5")
    rows = {row.name: row.text or "" for row in judged.changes()}
    assert '["4", "4", "5"]' in rows['["window", "sales", "S"]']
    assert '["7", "7"]' in rows['["window", "sales", "B"]']


def test_a8_the_offset_is_added_once() -> None:
    """Also where it is negative and has fractions, and to copies too."""
    judged = judge(SALES._replace(kind="decimal", replicas={B: Decimal("-0.1")}))
    say(judged, "S0.2 B0.3 S0.2 S0.2 S0.2")
    assert judged.tick(1.0, 1.0) == B2


def test_a9_a_service_is_as_good_as_its_worst_field() -> None:
    """And all as its worst service."""
    fields = [SALES._replace(name=name, replicas={B: Decimal(0), "C": Decimal(0)}) for name in ("one", "two")]
    judged = judge(*fields)
    say(judged, "S1 B1 C1 S1 S1", "one")
    assert judged.tick(1.0, 1.0) == [Status("B", 2), Status("C", 2), Status("all", 2)]
    say(judged, "S1 B1 C5 S1 S1", "two")
    assert judged.tick(2.0, 2.0) == [Status("C", 0), Status("all", 0)]
    # A field that is changing does not make a field that differs forgotten.
    say(judged, "C6", "two")
    assert judged.tick(3.0, 3.0) == []
    assert state(judged, "C") is State.SETTLING


def test_a11_the_owner_is_told_of_too() -> None:
    """By default, and as the worst of its replicas."""
    judged = Judge([SALES._replace(replicas={B: Decimal(0), "C": Decimal(0)})], 0.0)
    say(judged, "S1 B1 S1 S1")
    assert judged.tick(1.0, 1.0) == [Status("B", 2), Status("S", 2), Status("all", 2)]
    say(judged, "C7 C7 C7")
    assert judged.tick(2.0, 2.0) == [Status("C", 0), Status("S", 0), Status("all", 0)]


def test_an_unknown_field_and_a_stranger_are_refused() -> None:
    """A field is meant in any case of letters, a service is not."""
    judged = judge()
    judged.report(S, "SALES", Decimal(1), 0.0, 0.0)
    for who, name in ((S, "nosuch"), ("s", "sales"), ("X", "sales")):
        with pytest.raises(BadMessage):
            judged.report(who, name, Decimal(1), 0.0, 0.0)
    assert judged.services() == {S, B}


# ------------------------------------------------------------------ four states


def test_the_four_states() -> None:
    """With a reason, and since when."""
    judged = judge(SALES._replace(stale_after=60.0))
    assert (judged.tick(0.0, 1000.0), state(judged)) == ([], State.SETTLING)
    assert reason(judged) == "S has 0 of 3 samples"
    say(judged, "S100 B90 S100 B90", now=1.0)
    judged.tick(5.0, 1005.0)
    assert state(judged) is State.OK
    say(judged, "S105", now=6.0)
    judged.tick(10.0, 1010.0)
    assert (state(judged), reason(judged)) == (State.SETTLING, "S is changing: 100 .. 105")
    say(judged, "S105 S105", now=11.0)
    judged.tick(15.0, 1015.0)
    assert (state(judged), reason(judged)) == (State.BROKEN, "B has 100, and S has 105")
    judged.tick(20.0, 1020.0)
    [(_, _, verdict)] = judged.verdicts()
    assert (verdict.since, verdict.difference) == (1015.0, Decimal(-5))


def test_a18_silence_is_noticed() -> None:
    """Of replica and owner, at the limit and not before; a report ends it."""
    judged = judge(SALES._replace(stale_after=60.0))
    say(judged, "S100 B90 S100 B90", now=0.0)
    assert judged.tick(5.0, 5.0) == B2
    say(judged, "S100", now=50.0)
    assert judged.tick(60.0, 60.0) == []
    assert judged.tick(60.5, 60.5) == [Status("B", 0), Status("all", 0)]
    assert (state(judged), reason(judged)) == (State.STALE, "B has been silent for more than 60 s")
    say(judged, "B90", now=61.0)
    assert judged.tick(65.0, 65.0) == B2
    judged.tick(200.0, 200.0)
    assert reason(judged).count("silent") == 2


def test_silence_is_unknown_where_unknown_is_told() -> None:
    """Not different, which nobody has seen."""
    judged = judge(SALES._replace(stale_after=60.0), publish_unknown=True)
    say(judged, "S100 B90 S100 B90")
    assert judged.tick(5.0, 5.0) == B2
    assert judged.tick(70.0, 70.0) == [Status("B", -1)]


def test_who_never_reported_is_stale() -> None:
    """Named, never ignored; without a limit at once, with one after it."""
    judged = judge()
    judged.tick(0.0, 0.0)
    assert (state(judged), reason(judged)) == (State.STALE, "S has never reported; B has never reported")
    judged = judge(SALES._replace(stale_after=60.0))
    judged.tick(61.0, 61.0)
    assert (state(judged), reason(judged)) == (State.STALE, "S has never reported; B has never reported")


def test_silence_of_the_auditor_is_nobodys() -> None:
    """Away from the broker it hears nothing."""
    judged = judge(SALES._replace(stale_after=60.0))
    say(judged, "S100 B90 S100 B90")
    judged.tick(5.0, 5.0)
    judged.listening(1000.0)
    assert judged.tick(1005.0, 1005.0) == []
    assert state(judged) is State.OK


# ------------------------------------------------------------------ values


def test_integers_beyond_floats_are_exact() -> None:
    """2**53 + 1 is no float."""
    judged = judge(SALES._replace(replicas={B: Decimal(0)}))
    say(judged, f"S{2**53 + 1} B{2**53} S{2**53 + 1} B{2**53}")
    assert judged.tick(1.0, 1.0) == [Status("B", 0), Status("all", 0)]
    [(_, _, verdict)] = judged.verdicts()
    assert verdict.difference == -1


def test_strings_are_compared_letter_by_letter() -> None:
    """A number is none."""
    judged = judge(SALES._replace(kind="string", replicas={B: Decimal(0)}))
    say(judged, 'S"1.0" B"1" S"1.0" B"1"')
    assert judged.tick(1.0, 1.0) == [Status("B", 0), Status("all", 0)]
    with pytest.raises(BadMessage, match="sales is a number, and its type is string"):
        say(judged, "S1")


@pytest.mark.parametrize(
    ("expected", "actual", "tolerance", "agrees"),
    [
        ("100", "100", Tolerance(), True),
        ("100", "100.0", Tolerance(), True),
        ("0.3", "0.30000000000000004", Tolerance(), False),
        ("0.3", "0.30000000000000004", Tolerance(Decimal("1e-9")), True),
        ("100", "95", Tolerance(Decimal(5)), True),
        ("100", "94.9", Tolerance(Decimal(5)), False),
        ("-200", "-198", Tolerance(Decimal(1), True), True),
        ("-200", "-197.9", Tolerance(Decimal(1), True), False),
        ("0", "0.001", Tolerance(Decimal(50), True), False),
        ("1e400", "1e-400", Tolerance(Decimal("9.9e399")), False),
    ],
)
def test_tolerance(expected: str, actual: str, tolerance: Tolerance, agrees: bool) -> None:
    """As it stands, or percent of the owner's."""
    assert agree(Decimal(expected), Decimal(actual), tolerance) is agrees


finite = st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**50), max_value=10**50)


@given(finite, finite)
def test_an_offset_is_exact(value: Decimal, offset: Decimal) -> None:
    """There and back again."""
    moved = shifted(value, offset)
    assert isinstance(moved, Decimal)
    assert shifted(moved, offset.copy_negate()) == value


@given(st.one_of(st.none(), st.booleans(), st.text(), finite, st.lists(st.none()), st.just(Unfit("no"))))
def test_any_value_is_taken_or_refused(value: Any) -> None:
    """With `BadMessage` and nothing else."""
    for kind in ("int", "float", "decimal", "string"):
        with suppress(BadMessage):
            assert isinstance(cast(kind, "f", value), Decimal | str)


# ------------------------------------------------------------------ a restart


@pytest.mark.parametrize("seed", range(20))
def test_a14_a_restart_changes_nothing(seed: int) -> None:
    """One judge lives on, the other is made anew from what was kept before each step: both tell the same."""
    chance = random.Random(seed)
    field = SALES._replace(stale_after=60.0)
    lives, now = judge(field), 0.0
    kept: dict[str, Row] = {}
    for _ in range(200):
        fresh = judge(field)
        assert fresh.restore([*kept.values()]) == []
        fresh.listening(now)
        lives.listening(now)
        told = chance.choice(["S100", "B90", "S100", "B90", "B91", ""])
        now += chance.choice([1.0, 1.0, 1.0, 61.0])
        for each in (lives, fresh):
            say(each, told, now=now)
        assert lives.tick(now, now) == fresh.tick(now, now)
        assert list(lives.verdicts()) == list(fresh.verdicts())
        changed = fresh.changes()
        assert {row.name: row.text for row in lives.changes()} == {row.name: row.text for row in changed}
        kept |= {row.name: row for row in changed}


def test_what_was_kept_of_a_field_that_is_gone_is_named() -> None:
    """And a smaller window takes the newest of a larger one."""
    judged = judge()
    say(judged, "S1 S2 S3")
    rows = judged.changes()
    assert judge(SALES._replace(name="other")).restore(rows) == [rows[0].name]
    smaller = judge(SALES._replace(samples=2, replicas={B: Decimal(0)}))
    assert smaller.restore(rows) == []
    say(smaller, "B3 B3 B3")
    assert smaller.tick(1.0, 1.0) == B2
