"""The audit of messages: tallies in buckets of time, between processes that share a broker and no file."""

from __future__ import annotations

import json
import random
import re
import shlex
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idemp import Consumer, Message, idempotent, open_event_log, open_store, open_transport
from idemp.audit import Tallier
from idemp.audit.buckets import Buckets, Pair
from idemp.audit.explain import Asker
from idemp.audit.judge import Field, Judge, Row, State
from idemp.audit.messages import Status, TallyReport, decoded
from idemp.audit.questions import Question, asked_queue
from idemp.audit.tallies import Changed, Tallies
from idemp.audit.tally import ANY, Tally, hashed, together
from idemp.errors import BadMessage, ConfigError, PermanentFailure
from idemp.message import Properties
from idemp.ports import Delivery, Publication, Ran
from idemp.tracking.tracker import tracking
from idemp.transports import publish
from tests.servers import RabbitMQ
from tests.service import Program, finished, until

PATIENCE = 30.0
LENGTH = 2
SERVICE = """
import sys
from idemp import Consumer, idempotent, open_event_log, open_store, open_transport
from idemp.audit import Tallier
from idemp.audit.tallies import Tallies

url, service, folder, exchange, once, log = sys.argv[1:7]
tallies = Tallies(f"{folder}/{service}-tallies.db", length=2)
audit = Tallier(tallies, open_transport(url), exchange=exchange, every=0.2)
consumer = Consumer(
    open_transport(url),
    service=f"{exchange}-{service}",
    exchange=f"{exchange}-events",
    audit=audit,
    tracking=open_event_log(log) if log else None,
)
if not log:
    consumer.service = service

def new_order(message):
    with open(f"{folder}/{service}-effects", "a") as effects:
        effects.write(message.id + "\\n")

if once == "once":
    store = open_store(f"sqlite:///{folder}/{service}.db")
    new_order = idempotent(store, name=f"{consumer.service}.new_order")(new_order)
consumer.on("new_order")(new_order)
consumer.run(ready=lambda: print("ready", flush=True))
"""


# ------------------------------------------------------------------ the checksum


@given(st.lists(st.text()), st.integers(0, 2**32))
def test_the_order_and_the_process_do_not_matter(ids: list[str], seed: int) -> None:
    """Shuffled and counted in two places it is the same."""
    whole = Tally()
    for id in ids:
        whole = whole.plus(hashed(id))
    chance = random.Random(seed)
    parts = [Tally(), Tally()]
    for id in chance.sample(ids, len(ids)):
        place = chance.randrange(2)
        parts[place] = parts[place].plus(hashed(id))
    assert together(parts) == whole


@given(st.sets(st.text(), min_size=2), st.integers(1, 4))
def test_one_lost_and_one_doubled_is_not_the_same(ids: set[str], times: int) -> None:
    """Nor is one that came three times in the place of two others, which an exclusive or would not see."""
    lost, doubled, *_ = sorted(ids)
    whole = Tally()
    for id in ids:
        whole = whole.plus(hashed(id))
    other = whole.plus(hashed(lost), -1).plus(hashed(doubled))
    assert other.count == whole.count
    assert not other.same(whole)
    assert other.plus(hashed(lost)).plus(hashed(doubled), -1).same(whole)
    assert not whole.plus(hashed(doubled), 2 * times).same(whole.plus(hashed(lost), 2 * times))


@given(st.lists(st.sampled_from("abcd")), st.lists(st.sampled_from("abcd")), st.data())
def test_what_may_be_the_same(one: list[str], other: list[str], data: st.DataObject) -> None:
    """Never refused when it is, whichever of the unsure took effect once more."""
    unsure = [data.draw(st.integers(0, 3)) for _ in range(2)]
    more = [data.draw(st.lists(st.sampled_from("abcd"), max_size=n)) for n in unsure]
    tallies = []
    for ids, n in zip((one, other), unsure, strict=True):
        tally = Tally(unsure=n)
        for id in ids:
            tally = tally.plus(hashed(id))
        tallies.append(tally)
    if sorted(one + more[0]) == sorted(other + more[1]):
        assert tallies[0].may_be(tallies[1])
    if not any(unsure):
        assert tallies[0].may_be(tallies[1]) == (sorted(one) == sorted(other))
    assert tallies[0].may_be(tallies[1]) == tallies[1].may_be(tallies[0])


# ------------------------------------------------------------------ the judge

S, B = "S", "B"
ORDERS = Field("orders", "messages", S, 2, {B: 0}, bucket=10, settle=30.0, stale_after=100.0)  # type: ignore[dict-item]


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Every file that the test opened."""
    yield
    for two in Two.made:
        for file in two.files.values():
            file.close()
    Two.made.clear()


class Two:
    """A judge of two services, told by their own files, and their clock."""

    made: ClassVar[list[Two]] = []

    def __init__(self, folder: Path, field: Field = ORDERS) -> None:
        self.now = 1000.0
        self.judge = Judge([field], self.now, owner_reports=False)
        self.files = {
            who: Tallies(str(folder / who), length=10, wall=lambda: self.now) for who in field.holders()
        }
        self.started = dict.fromkeys(self.files, self.now)
        self.made.append(self)

    def ran(self, who: str, *ids: str, at: float | None = None, **how: bool) -> None:
        at = self.now if at is None else at
        self.files[who].add([Ran("orders", id, at, **how) for id in ids])

    def report(self, who: str, *, arrives: bool = True, ended: bool = False) -> TallyReport:
        file = self.files[who]
        changed = file.changed(ending=ended)
        told = TallyReport(  # B2 is another instance of B
            who[0], file.instance, changed.number, file.born, self.started[who], file.length, changed.through,
            ended, changed.first, changed.untimed, changed.tallies,
        )  # fmt: skip
        report = decoded(told.encode())
        assert report == told
        if arrives:
            file.told(changed.versions)
            self.judge.tally(told, self.now, self.now)
        return told

    def found(self) -> tuple[list[Status], State, str]:
        told = self.judge.tick(self.now, self.now)
        [(_, _, verdict)] = self.judge.verdicts()
        return told, verdict.state, verdict.reason

    def all_reports(self, now: float) -> tuple[list[Status], State, str]:
        self.now = now
        for who in self.files:
            self.report(who)
        return self.found()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    built = Two(tmp_path)
    yield built
    for file in built.files.values():
        file.close()


def test_a_counter_that_always_moves_is_judged(two: Two) -> None:
    """Bucket by closed bucket; what is under way in the open one does not matter."""
    assert two.found()[1:] == (State.STALE, "S has never reported; B has never reported")
    assert two.all_reports(1001.0)[1:] == (State.SETTLING, "no bucket is closed yet")
    for now in range(1002, 1040):
        two.now = float(now)
        two.ran(S, f"id-{now}")
        if now > 1002:
            two.ran(B, f"id-{now - 1}", at=now - 1.0)
        if now == 1021:  # the bucket up to 1020 is the same, the one from 1020 on is open
            assert two.all_reports(1021.0)[:2] == ([Status(B, 2), Status("all", 2)], State.OK)
    assert two.all_reports(1041.0)[:2] == ([], State.SETTLING)
    two.ran(B, "id-1039", at=1039.0)
    assert two.all_reports(1052.0)[:2] == ([], State.OK)


def test_a_lost_one_and_a_doubled_one_are_broken(two: Two) -> None:
    """After the time to settle, not before; mended it is green again."""
    two.all_reports(1001.0)
    two.now = 1010.0
    two.ran(S, "a", "b", "c")
    two.ran(B, "a", "b", "b")
    assert two.all_reports(1021.0)[1] is State.SETTLING
    assert two.all_reports(1050.0)[1] is State.SETTLING
    told, state, reason = two.all_reports(1051.0)
    assert (told, state) == ([Status(B, 0), Status("all", 0)], State.BROKEN)
    assert reason == "B has as many messages as S, 3, but not the same: bucket 1970-01-01T00:16:50Z, 10 s"
    two.ran(B, "c", at=1010.0)
    two.ran(B, "c", at=1010.0)
    two.all_reports(1052.0)
    assert "B has 5 messages, and S has 3" in two.all_reports(1082.0)[2]
    assert two.files[B].correct("orders", "b", 1) == (2, 1010)
    assert two.files[B].correct("orders", "c", 1) == (2, 1010)
    assert two.all_reports(1083.0)[:2] == ([Status(B, 2), Status("all", 2)], State.OK)


def test_what_is_not_compared_is_told(two: Two) -> None:
    """A message without a timestamp is in no bucket: what is ok says so."""
    two.all_reports(1001.0)
    two.files[B].add([Ran("orders", "a", None), Ran("orders", "b", 1010.0)])
    two.ran(S, "b", at=1010.0)
    told, state, reason = two.all_reports(1021.0)
    assert (told, state) == ([Status(B, 2), Status("all", 2)], State.OK)
    assert reason == "1 messages of B had no timestamp, and are in no bucket"


def test_a_report_that_is_lost_is_no_difference(two: Two) -> None:
    """Until who counts has told all, its bucket is not judged; what was not confirmed is told again."""
    two.all_reports(1001.0)
    two.now = 1010.0
    two.ran(S, "a")
    two.ran(B, "a")
    two.now = 1060.0
    two.report(S)
    lost = two.report(B, arrives=False)
    assert two.found()[1] is State.SETTLING
    assert two.report(B).tallies == lost.tallies
    assert two.found()[1] is State.OK
    two.judge.tally(lost, two.now, two.now)  # it came after all, late
    two.judge.tally(lost, two.now, two.now)
    assert two.found()[1] is State.OK


def test_silence_of_one_who_counts(two: Two) -> None:
    """Is noticed; an orderly end is none."""
    two.all_reports(1001.0)
    two.all_reports(1021.0)
    two.now = 1100.0
    two.report(S)
    assert two.found()[1] is State.OK
    two.now = 1122.0
    two.report(S)
    told, state, reason = two.found()
    assert (told, state) == ([Status(B, 0), Status("all", 0)], State.STALE)
    assert reason.startswith("B (")
    two.report(B, ended=True)
    assert two.all_reports(1123.0)[1] is State.OK


def test_who_comes_back_has_time_to_catch_up(two: Two) -> None:
    """What waited in its queue while it was away is no difference until then."""
    two.all_reports(1001.0)
    two.now = 1010.0
    two.ran(S, "a")
    two.all_reports(1021.0)
    two.now = 1090.0
    two.report(S)
    path = two.files[B].path
    two.files[B].close()
    two.files[B] = Tallies(path, length=10, wall=lambda: two.now)
    two.started[B] = 1091.0
    assert two.all_reports(1091.0)[1] is State.SETTLING
    assert two.all_reports(1121.0)[1] is State.BROKEN
    for now in (1200.0, 1210.0):  # what was broken before it went is broken while it comes back
        two.started[B] = now
        assert two.all_reports(now)[1] is State.BROKEN


def test_who_starts_twice_has_time_to_catch_up(two: Two) -> None:
    """The time between the two starts was too short for it."""
    two.all_reports(1001.0)
    two.ran(S, "a", at=1150.0)
    assert two.all_reports(1165.0)[1] is State.SETTLING
    for now in (1200.0, 1215.0):
        two.started[B] = now
        assert two.all_reports(now)[1] is State.SETTLING
    assert two.all_reports(1244.0)[1] is State.SETTLING
    assert two.all_reports(1245.0)[1] is State.BROKEN


@pytest.mark.parametrize("restarted", [False, True])
def test_nothing_is_late_because_the_auditor_was_away(two: Two, restarted: bool) -> None:
    """What its broker kept for it meanwhile comes first; what was late before is late all the time."""
    two.all_reports(1001.0)
    two.now = 1010.0
    two.ran(S, "a")
    two.all_reports(1021.0)
    two.now = 1500.0
    if restarted:
        rows = [row for row in two.judge.changes() if row.text is not None]
        two.judge = Judge([ORDERS], two.now, owner_reports=False)
        assert two.judge.restore(rows) == []
    two.judge.listening(two.now)
    assert two.found()[1] is State.SETTLING
    two.ran(B, "a", at=1010.0)
    assert two.all_reports(1501.0)[1] is State.OK
    two.ran(S, "b", at=1490.0)
    assert two.all_reports(1532.0)[1] is State.SETTLING
    assert two.all_reports(1562.0)[1] is State.BROKEN
    for now in (1600.0, 1605.0):  # away twice, and not for long enough in between
        two.now = now
        two.judge.listening(now)
        assert two.found()[1] is State.BROKEN


def test_what_nobody_can_say_is_never_equal(two: Two) -> None:
    """A handler that ran again after a kill: what is unsure is not green, nor red for it alone."""
    two.all_reports(1001.0)
    two.now = 1010.0
    two.ran(S, "a", "b")
    two.ran(B, "a")
    two.ran(B, "b", unsure=True)
    _, state, reason = two.all_reports(1060.0)
    assert (state, "1 may have taken effect once more" in reason) == (State.STALE, True)
    two.ran(S, *(f"x{n}" for n in range(5)), at=1012.0)
    assert two.all_reports(1061.0)[1] is State.SETTLING
    assert two.all_reports(1091.0)[1] is State.BROKEN


def test_what_was_counted_before_the_kill_is_known(two: Two) -> None:
    """A resolver finds the effect, or the handler runs again: the file says which it was."""
    two.ran(B, "a", "b")
    two.ran(B, "a", found=True)
    two.ran(B, "b", unsure=True)
    two.ran(B, "c", found=True)
    assert two.files[B].ids("orders", 1000, range(256), "", 10) == (
        [("a", 1, 0), ("b", 2, 0), ("c", 0, 1)],
        False,
    )


@pytest.mark.parametrize(
    ("counted", "lost", "state"),
    [
        (True, False, State.STALE),
        (True, True, State.STALE),
        (False, False, State.STALE),
        (False, True, State.BROKEN),  # one may be there, and two are not
    ],
)
def test_what_is_found_may_have_been_counted_elsewhere(
    two: Two, tmp_path: Path, counted: bool, lost: bool, state: State
) -> None:
    """It is there once, and who made it counted it or was killed before: no loss is ever ok."""
    with closing(Tallies(str(tmp_path / "B2"), length=10, wall=lambda: two.now)) as other:
        two.files["B2"], two.started["B2"] = other, two.now
        two.all_reports(1001.0)
        two.now = 1010.0
        two.ran(S, "a", "found", *["lost"][:lost])
        two.ran("B2", "a", *["found"][:counted])
        for _ in range(2):
            two.ran(B, "found", found=True)
        two.all_reports(1021.0)
        assert two.all_reports(1060.0)[1] is state
        two.files[B].correct("orders", "found", int(not counted))
        two.all_reports(1061.0)
        assert two.all_reports(1100.0)[1] is (State.BROKEN if lost else State.OK)
        del two.files["B2"]


def test_types_that_differ_in_case_are_added_up(two: Two) -> None:
    """As a field has its type in any case of letters; whichever of them is told later takes nothing away."""
    two.all_reports(1001.0)
    two.now = 1010.0
    for file in two.files.values():
        file.add([Ran("orders", "a", 1010.0), Ran("Orders", "b", 1010.0)])
    assert two.all_reports(1021.0)[1] is State.OK
    for who, id in ((S, "c"), (B, "c"), (S, "d")):
        two.files[who].add([Ran("ORDERS", id, 1010.0)])
    two.all_reports(1022.0)
    _, state, reason = two.all_reports(1060.0)
    assert (state, "B has 3 messages, and S has 4" in reason) == (State.BROKEN, True)
    assert two.files[B].ids("oRders", 1010, range(256), "", 10)[0] == [("a", 1, 0), ("b", 1, 0), ("c", 1, 0)]
    assert sum(each.count for each in two.files[B].slices("Orders", 1010).values()) == 3
    assert two.files[B].correct("Orders", "d", 1, 1010.0) == (0, 1010)
    assert two.all_reports(1061.0)[1] is State.OK


def test_a_report_of_types_that_differ_in_case_is_refused(two: Two) -> None:
    """Of an older service: one of them would take the other's place."""
    two.ran(B, "a")
    two.now = 1021.0
    report = two.report(B, arrives=False)
    [(kind, tallies)] = report.tallies.items()
    with pytest.raises(BadMessage, match="orders and Orders differ in the case of letters only"):
        two.judge.tally(report._replace(tallies={kind: tallies, "Orders": tallies}), two.now, two.now)
    assert two.judge.changes() == []


def test_a_file_of_before_has_its_types_renewed(tmp_path: Path) -> None:
    """What was counted as Orders is told once more, with what was counted as orders."""
    path = str(tmp_path / "tallies.db")
    with closing(Tallies(path, length=10)) as file:
        file.add([Ran("orders", "a", 1010.0), Ran("orders", "b", 1010.0), Ran("orders", "c", 1020.0)])
        whole = file.buckets("orders")
        file.told(file.changed().versions)
        assert file.changed().tallies == {}
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE ran SET kind = 'Orders' WHERE id <> 'a'")
        db.execute("UPDATE tally SET kind = 'Orders'")
        for kind, id in (("orders", "a"), ("Orders", "b")):
            row = (kind, 1010, 1, f"{hashed(id):x}", 0, 1, 1)
            db.execute("INSERT OR REPLACE INTO tally VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        db.commit()
    with closing(Tallies(path, length=10)) as file:
        assert file.buckets("orders") == whole
        assert file.changed().tallies == {"orders": whole}


def test_buckets_of_before_are_nobodys(tmp_path: Path) -> None:
    """A replica that began later, and an auditor that lost its state, judge what they can know."""
    two = Two(tmp_path)
    two.now = 1010.0
    two.ran(S, "a")
    two.all_reports(1021.0)
    fresh = Judge([ORDERS], 1021.0, owner_reports=False)
    two.judge = fresh
    two.now = 1022.0
    two.ran(B, "late", at=1011.0)
    assert two.all_reports(1023.0)[1] is State.SETTLING
    assert two.all_reports(1100.0)[1] is State.OK


def test_a_restart_of_the_auditor_changes_nothing(two: Two) -> None:
    """A judge made anew from what was kept says the same, at each step."""
    kept: dict[str, str] = {}
    for step in range(40):
        two.now += 3.0
        two.ran(S, f"s{step}")
        if step % 7:
            two.ran(B, f"s{step}")
        for who in (S, B):
            two.report(who)
        fresh = Judge([ORDERS], two.now - ORDERS.settle, owner_reports=False)
        for row in two.judge.changes():
            if row.text is None:
                del kept[row.name]
            else:
                kept[row.name] = row.text
        assert fresh.restore([Row(*row) for row in kept.items()]) == []
        assert two.judge.tick(two.now, two.now) == fresh.tick(two.now, two.now)
        assert list(two.judge.verdicts()) == list(fresh.verdicts())


def test_a_flap_is_no_change(tmp_path: Path) -> None:
    """With looks: 2 a status is told when it is found twice in a row."""
    two = Two(tmp_path, ORDERS._replace(looks=2))
    two.all_reports(1001.0)
    assert two.all_reports(1021.0)[1:] == (State.SETTLING, "ok in 1 of 2 looks")
    assert two.found()[:2] == ([Status(B, 2), Status("all", 2)], State.OK)
    two.ran(S, "a", at=1012.0)
    two.all_reports(1030.0)
    told, state, reason = two.all_reports(1060.0)
    assert (told, state) == ([], State.SETTLING)
    assert reason.startswith("broken in 1 of 2 looks: B has 0 messages, and S has 1")
    two.ran(B, "a", at=1012.0)
    assert two.all_reports(1061.0)[:2] == ([], State.OK)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"length": 60}, "60 s long at B, and 10 s"),
        ({"through": 5000.0}, "which is not yet"),
        ({"born": 5000.0}, "which is not yet"),
        ({"started": 5000.0}, "which is not yet"),
    ],
)
def test_a_report_that_cannot_be_is_refused(two: Two, change: dict[str, Any], part: str) -> None:
    """With a reason, and without a trace."""
    two.ran(B, "a")
    two.now = 1021.0
    report = two.report(B, arrives=False)
    with pytest.raises(BadMessage, match=part):
        two.judge.tally(report._replace(**change), two.now, two.now)
    assert two.judge.changes() == []


@pytest.mark.parametrize(
    "body",
    [
        b'{"service":"B","tallies":{}}',
        b'{"service":"B","instance":"i","number":1.5,"born":0,"started":0,"length":1,"through":0,"ended":false,'
        b'"first":true,"tallies":{}}',
        b'{"service":"B","instance":"i","number":1,"born":0,"started":0,"length":1,"through":0,"ended":false,'
        b'"first":true,"tallies":{"a":[[1,2,"no hexadecimal",0]]}}',
        b'{"service":"B","instance":"i","number":1,"born":NaN,"started":0,"length":1,"through":0,"ended":false,'
        b'"first":true,"tallies":[1]}',
        b'{"service":"B","instance":"'
        + b"i" * 201
        + b'","number":1,"born":0,"started":0,"length":1,"through":0,'
        b'"ended":false,"first":true,"tallies":{}}',
        *(
            b'{"service":"B","instance":"i","number":1,"born":%b,"started":%b,"length":1,"through":%b,'
            b'"ended":false,"first":true,"tallies":{"a":[[1,%b,"0",%b]]}}' % numbers
            for numbers in (
                (b"-1e399", b"0", b"0", b"1", b"0"),
                (b"0", b"1e399", b"0", b"1", b"0"),
                (b"0", b"0", b"-1e399", b"1", b"0"),
                (b"0", b"0", b"NaN", b"1", b"0"),
                (b"0", b"0", b"0", b"-1", b"0"),
                (b"0", b"0", b"0", b"1", b"-1"),
                (b"0", b"0", b"0", b"1e99", b"0"),
            )
        ),
        b'{"service":"B","instance":"nul \\u0000","number":1,"born":0,"started":0,"length":1,"through":0,'
        b'"ended":false,"first":true,"tallies":{}}',
    ],
)
def test_what_is_no_report_of_tallies(body: bytes) -> None:
    """Says so."""
    with pytest.raises(BadMessage, match="no report of tallies"):
        decoded(body)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": ["orders"]},
        {"after": 5},
        {"reply_to": None},
        {"start": 2**63},
        {"start": 1e400},
        {"slices": [None]},
        {"slices": 5},
        {"more": 1},
        {"kind": "\ud800"},
        {"kind": ""},
        {"reply_to": "\ud800"},
        {"reply_to": ""},
        {"reply_to": "q" * 256},
        {"after": "\ud800"},
    ],
)
def test_what_is_no_question(change: dict[str, Any]) -> None:
    """Says so, and who is asked lives on."""
    question = {**Question("ids", "orders", "q", 1)._asdict(), **change}
    with pytest.raises(BadMessage, match="no question of an audit"):
        Question.decode(json.dumps(question).encode())
    assert Question.decode(Question("ids", "orders", "q", 1).encode()) == Question(
        "ids", "orders", "q", 1, slices=[]
    )


class Faulty(Tallies):
    """With two defects: it knows no slices, and now and then it has no report."""

    calls = 0

    def slices(self, kind: str, start: int) -> dict[int, Tally]:
        raise RuntimeError("a defect in slices")

    def changed(self, *, ending: bool = False) -> Changed:
        self.calls += 1
        if self.calls % 2:
            raise RuntimeError("a defect in changed")
        return super().changed(ending=ending)


def test_whoever_counts_outlives_what_is_odd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A question that is none, and a defect: both are logged, none is asked twice, and the reports go on."""
    monkeypatch.setattr("idemp.audit.tallier.AGAIN", 0.05)
    url, tallies = f"sqlite:///{tmp_path}/broker.db", Faulty(str(tmp_path / "tallies.db"))
    queue = asked_queue("audit", tallies.instance)
    audit = Tallier(tallies, open_transport(url), exchange="audit", every=0.2)
    with closing(open_transport(url)) as desk, closing(open_transport(url)) as mine:
        desk.declare("audit_in", "audit", "auditmq")
        desk.declare(queue)
        asker = Asker(mine, "audit", patience=PATIENCE)
        audit.start("billing")
        good = Question("buckets", "orders", "nobody", 0)
        for odd in (good._replace(kind="\ud800"), good._replace(about="slices")):
            publish(desk, [Publication(odd.encode(), Properties(), "", queue)])
            assert asker.ask("billing", [tallies.instance], good)[0].tallies == {}
        seen = desk.depth("audit_in")
        until(lambda: desk.depth("audit_in") >= seen + 2, lambda: caplog.text)
        audit.stop()
        assert desk.depth(queue) == 0
    for said in ("no question of an audit", "a defect in slices", "a defect in changed"):
        assert said in caplog.text


# ------------------------------------------------------------------ the file


def test_a_power_loss_is_never_equal(tmp_path: Path) -> None:
    """Of buckets begun before one, nobody can say any more what was counted; a kill changes nothing."""
    path = str(tmp_path / "tallies.db")
    now = 1000.0
    first = Tallies(path, length=10, wall=lambda: now)
    first.add([Ran("orders", "a", 1000.0)])
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE meta SET boot = 'another'")
        db.commit()
    first._let_go()  # as a kill does
    now = 1015.0
    with closing(Tallies(path, length=10, wall=lambda: now)) as second:
        second.add([Ran("orders", "b", 1020.0)])
        assert {place: each.unsure for place, each in second.buckets("orders").items()} == {
            1000: ANY,
            1020: 0,
        }
    with closing(Tallies(path, length=10)) as third:
        assert third.buckets("orders")[1000].unsure == ANY


def test_the_file_has_one_process_and_one_length(tmp_path: Path) -> None:
    """Else a sentence."""
    path = str(tmp_path / "tallies.db")
    with closing(Tallies(path)), pytest.raises(ConfigError, match="another process counts in"):
        Tallies(path)
    with pytest.raises(ConfigError, match="has buckets of 60 s, not of 10 s"):
        Tallies(path, length=10)
    (tmp_path / "text").write_text("no database " * 100)
    with pytest.raises(ConfigError, match="no SQLite file"):
        Tallies(str(tmp_path / "text"))


def test_what_is_old_is_forgotten(two: Two) -> None:
    """In the file and in the judge."""
    two.all_reports(1001.0)
    two.ran(S, *(f"id-{n}" for n in range(100)), at=1010.0)
    two.all_reports(1060.0)
    two.files[S].forget(2000.0)
    assert two.files[S].buckets("orders") == {}
    assert two.files[S].ids("orders", 1010, range(256), "", 10) == ([], False)
    two.judge.changes()
    two.now = 1060.0 + 2 * 86400
    assert two.found()[1] is State.STALE
    assert {row.text for row in two.judge.changes() if "tally" in row.name or "instance" in row.name} == {
        None
    }


def test_buckets_alone_know_who_never_reported() -> None:
    """Both are named."""
    found = Buckets([Pair("orders", S, B, 10, 0.0)], 0.0, 100.0).compared(
        Pair("orders", S, B, 10, 0.0), 0.0, 0.0, None
    )
    assert found.finding == "unheard"


# ------------------------------------------------------------------ what a consumer counts


class Counting:
    """A tallier that only remembers."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.runs: list[Ran] = []

    def start(self, service: str) -> None:
        self.calls.append(f"start {service}")

    def ran(self, runs: Sequence[Ran]) -> None:
        self.runs += runs

    def stop(self) -> None:
        self.calls.append("stop")


def test_a_consumer_counts_what_took_effect(tmp_path: Path, unique: str) -> None:
    """Once for each run that returned, in a transaction or not; what is skipped or raises is not counted."""
    audit = Counting()
    store = open_store(f"sqlite:///{tmp_path}/seen.db")
    with closing(store), closing(open_transport(f"memory://{unique}")) as transport:
        consumer = Consumer(transport, service="s", audit=audit)
        for kind in ("once", "inside", "plain", "bad"):

            def handle(message: Message) -> None:
                if message.type == "bad":
                    raise PermanentFailure("no")

            if kind != "plain":
                handle = idempotent(store, name=kind, transaction=kind == "inside")(handle)
            consumer.on(kind)(handle)
        ready = threading.Event()
        thread = threading.Thread(target=lambda: consumer.run(ready=ready.set))
        thread.start()
        assert ready.wait(PATIENCE)
        kinds = ("once", "inside", "plain", "bad", "once", "inside", "plain")
        sent = [Message(f"{kind}-1", kind) for kind in kinds]
        with closing(open_transport(f"memory://{unique}")) as publisher:
            publish(
                publisher,
                [Publication(each.encode(), each.properties(), "events", each.type) for each in sent],
            )
        until(lambda: len(audit.runs) >= 4, lambda: audit.runs)
        consumer.stop()
        thread.join(PATIENCE)
    counted = sorted((run.type, run.id, run.unsure, run.found) for run in audit.runs)
    assert counted == [
        ("inside", "inside-1", False, False),
        ("once", "once-1", False, False),
        ("plain", "plain-1", False, False),
        ("plain", "plain-1", False, False),
    ]
    assert all(run.at is not None and abs(run.at - time.time()) < 60 for run in audit.runs)
    assert audit.calls == ["start s", "stop"]


# ------------------------------------------------------------------ with services on a broker


class Shop:
    """A broker, an auditor, and services that count."""

    def __init__(
        self, url: str, folder: Path, name: str, settle: float, log: str = "", field: str = "new_order"
    ) -> None:
        self.url, self.folder, self.name, self.log, self.field = url, folder, name, log, field
        called = f"{name}-" if log else ""  # a replay knows a service by its queue
        self.file = folder / "config.yaml"
        self.programs: list[Program] = []
        self.last, self.settle = 0.0, settle
        self.file.write_text(f"""
dsn: {url}
exchange: {name}
consumer_queue: {name}_in
report_queue: {name}_out
state: {folder}/audit.db
tick: 100ms
data:
  {field}:
    {{type: messages, bucket: {LENGTH}s, settle: {settle:g}s,
      owner: {called}shop, replicas: [{called}billing: ]}}
""")

    def start(self, *arguments: str, ready: str) -> Program:
        said = self.folder / f"said-{len(self.programs)}"
        self.programs.append(Program(said, arguments, {}))
        self.programs[-1].wait_for(ready)
        return self.programs[-1]

    def auditor(self) -> Program:
        return self.start("-m", "idemp", "audit", "run", str(self.file), ready="taking reports")

    def service(self, name: str, once: str = "once") -> Program:
        where = self.url, name, str(self.folder), self.name, once, self.log
        return self.start("-c", SERVICE, *where, ready="ready")

    def queue(self, service: str) -> str:
        return f"{self.name}-{service}-queue"

    def events(self, n: int) -> list[Publication]:
        """Of one second."""
        now = self.last = float(int(time.time()))
        messages = [Message(uuid4().hex, "new_order", {"n": number}) for number in range(n)]
        return [
            Publication(
                each.encode(),
                Properties(message_id=each.id, type=each.type, timestamp=now),
                f"{self.name}-events",
                "new_order",
            )
            for each in messages
        ]

    def publish(self, publications: Sequence[Publication], to: str = "") -> None:
        moved = [each._replace(exchange="", routing_key=to) if to else each for each in publications]
        with closing(open_transport(self.url)) as transport:
            publish(transport, moved)

    def lose(self, service: str, n: int) -> list[str]:
        """The first ``n`` messages of its queue; their ids."""
        found: list[Delivery] = []
        with closing(open_transport(self.url)) as transport:
            transport.consume(self.queue(service), n)
            end = time.monotonic() + PATIENCE
            while len(found) < n and time.monotonic() < end:
                found += [each for each in transport.poll(0.5) if isinstance(each, Delivery)]
            transport.ack([each.tag for each in found])
        return [json.loads(each.body)["id"] for each in found]

    def state(self) -> dict[str, Any]:
        done = finished("-m", "idemp", "audit", "status", str(self.file), "--json")
        assert done.returncode in (0, 1), done
        [field] = json.loads(done.stdout)["fields"]
        return dict(field)

    def becomes(self, state: str) -> dict[str, Any]:
        until(lambda: self.state()["state"] == state, self.state)
        return self.state()

    def explained(self) -> tuple[int, list[dict[str, Any]]]:
        done = finished("-m", "idemp", "audit", "explain", self.field, str(self.file), "--json")
        assert done.returncode in (0, 1), done
        return done.returncode, json.loads(done.stdout)["differences"]

    def reached(self, service: str, n: int) -> bool:
        return len(set(self.effects(service))) >= n

    def settled(self) -> bool:
        """Whether all that was published is in buckets that are judged for good."""
        return time.time() > self.last + LENGTH + self.settle + 1 and str(self.state()["state"]) != "settling"

    def told(self) -> list[Status]:
        """The statuses that were told."""
        found: list[Status] = []
        with closing(open_transport(self.url)) as transport:
            transport.consume(f"{self.name}_out", 1000)
            while came := [each for each in transport.poll(1.0) if isinstance(each, Delivery)]:
                found += [Status.decode(each.body) for each in came]
        return found

    def effects(self, service: str) -> list[str]:
        file = self.folder / f"{service}-effects"
        return file.read_text().split() if file.exists() else []


@contextmanager
def shop(url: str, folder: Path, name: str, *, settle: float = 1.0, **how: str) -> Iterator[Shop]:
    built = Shop(url, folder, name, settle, **how)
    try:
        yield built
    finally:
        for program in built.programs:
            program.stop(signal.SIGKILL)


def test_n3_three_lost_and_three_doubled_are_named(amqp_url: str, tmp_path: Path, unique: str) -> None:
    """Count equal, checksum not, exactly 3 + 3 ids; green when they are sent again and taken back."""
    with shop(amqp_url, tmp_path, unique) as room:
        room.auditor()
        room.service("shop")
        billing = room.service("billing", "at least once")
        room.becomes("ok")
        assert room.explained() == (0, [])
        assert billing.stop() == 0
        events = room.events(60)
        room.publish(events[:3])
        lost = room.lose("billing", 3)
        room.publish(events[3:])
        doubled = [each.properties.message_id for each in events[-3:]]
        room.publish(events[-3:], to=room.queue("billing"))
        room.service("billing", "at least once")
        seen = room.becomes("broken")
        assert (seen["expected"], seen["actual"]) == ("60", "60")
        assert "billing has as many messages as shop, 60, but not the same" in seen["reason"]
        code, [found] = room.explained()
        assert code == 1
        assert found["missing"] == dict.fromkeys(sorted(lost), 1)
        assert found["extra"] == dict.fromkeys(sorted(filter(None, doubled)), 1)
        assert found["unsure"] == []
        assert found["plans"] == [f"idemp replay --id {id} --to billing --dry-run" for id in sorted(lost)]
        assert found["start"] == int(events[0].properties.timestamp or 0) // LENGTH * LENGTH

        people = finished("-m", "idemp", "audit", "explain", "new_order", str(room.file))
        assert people.returncode == 1
        assert people.stdout.count("\n  missing  ") == people.stdout.count("\n  extra  ") == 3
        assert f"idemp trace {min(lost)}\n" in people.stdout
        assert f"what a replay would do: {found['plans'][0]}\n" in people.stdout

        room.publish(
            [each for each in events if each.properties.message_id in lost], to=room.queue("billing")
        )
        tallies = str(tmp_path / "billing-tallies.db")
        for id in filter(None, doubled):
            done = finished(
                *("-m", "idemp", "audit", "correct", tallies, "new_order", id, "1", "--length", f"{LENGTH}s")
            )
            assert done.stdout == f"{id} counts 1 times; before it were 2\n", done
        room.becomes("ok")
        assert room.explained() == (0, [])


def test_n3_the_commands_that_explain_ends_with_make_it_green(
    amqp_url: str, tmp_path: Path, unique: str
) -> None:
    """The story of what is missing, what a replay would do, and the replay: as they are printed."""
    log = f"sqlite:///{tmp_path}/events.db"
    with shop(amqp_url, tmp_path, unique, log=log) as room:
        room.auditor()
        room.service("shop")
        billing = room.service("billing")
        room.becomes("ok")
        assert billing.stop() == 0
        events = room.events(20)
        with closing(open_event_log(log)) as events_log, tracking(events_log, "desk"):
            room.publish(events[:2])
            lost = room.lose("billing", 2)
            room.publish(events[2:])
        room.service("billing")
        room.becomes("broken")
        _, [found] = room.explained()
        assert found["missing"] == dict.fromkeys(sorted(lost), 1)

        places = {"IDEMP_TRACKING": log, "IDEMP_TRANSPORT": amqp_url}
        people = finished("-m", "idemp", "audit", "explain", "new_order", str(room.file))
        [story] = re.findall(r"idemp (trace \S+)$", people.stdout, re.M)
        told = finished("-m", "idemp", *shlex.split(story), settings=places)
        assert (told.returncode, f"{unique}-shop" in told.stdout, f"{unique}-billing" in told.stdout) == (
            0,
            True,
            False,
        )
        for plan in found["plans"]:
            words = shlex.split(plan.removeprefix("idemp "))
            store = ("--store", f"sqlite:///{tmp_path}/billing.db")
            told = finished("-m", "idemp", *words, *store, settings=places)
            assert (told.returncode, "will run" in told.stdout) == (0, True), told
            assert words.pop() == "--dry-run"
            told = finished("-m", "idemp", *words, *store, "--yes", settings=places)
            assert told.returncode == 0, told
        room.becomes("ok")
        assert room.explained() == (0, [])


def test_explain_says_what_status_says_however_a_type_is_spelled(tmp_path: Path, unique: str) -> None:
    """The field is New_Order, and the messages are of the types new_order and NEW_ORDER."""
    with (
        shop(f"sqlite:///{tmp_path}/broker.db", tmp_path, unique, field="New_Order") as room,
        ExitStack() as on,
    ):
        room.auditor()
        audits = {}
        for name in ("shop", "billing"):
            tallies = Tallies(str(tmp_path / name), length=LENGTH)
            audits[name] = Tallier(tallies, open_transport(room.url), exchange=unique, every=0.2)
            audits[name].start(name)
            on.callback(audits[name].stop)
        room.becomes("ok")
        now = time.time()
        for name, n in (("shop", 10), ("billing", 7)):
            audits[name].ran([Ran(("new_order", "NEW_ORDER")[n % 2], str(n), now) for n in range(n)])
        seen = room.becomes("broken")
        assert (seen["expected"], seen["actual"]) == ("10", "7")
        code, [found] = room.explained()
        assert (code, found["missing"], found["extra"]) == (1, {"7": 1, "8": 1, "9": 1}, {})


def test_who_does_not_answer_is_one_sentence(amqp_url: str, tmp_path: Path, unique: str) -> None:
    """Exit code 2: one that never counted, one that was killed, one whose queue is gone."""
    with shop(amqp_url, tmp_path, unique) as room:
        room.auditor()

        def refused() -> str:
            words = ("explain", "new_order", str(room.file), "--wait", "500ms", "--json")
            done = finished("-m", "idemp", "audit", *words)
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
            return done.stderr

        assert refused() == "idemp: shop has never reported a tally, so it cannot be asked\n"
        room.service("shop")
        billing = room.service("billing")
        room.becomes("ok")
        billing.stop(signal.SIGKILL)
        said = re.fullmatch(
            r"idemp: billing \((\w{8})\) did not answer within 0\.5 s; is it running\?\n", refused()
        )
        assert said
        with closing(Tallies(str(tmp_path / "billing-tallies.db"), length=LENGTH, alone=False)) as tallies:
            assert tallies.instance.startswith(said[1])
            connection = pika.BlockingConnection(pika.URLParameters(amqp_url))
            connection.channel().queue_delete(f"{unique}.asked.{tallies.instance}")
            connection.close()
        assert f"billing ({said[1]}) cannot be asked, for nobody listens" in refused()


def test_kill_9_of_services_auditor_and_broker(own_rabbitmq: RabbitMQ, tmp_path: Path, unique: str) -> None:
    """The effects are the witness: what a kill doubled is named and never ok, and nothing else is broken.

    The time to settle is longer than a start takes and a dead session is waited for.
    """
    with shop(own_rabbitmq.url, tmp_path, unique, settle=20.0) as room:
        auditor = room.auditor()
        services = {name: room.service(name) for name in ("shop", "billing")}
        room.becomes("ok")
        for step, name in enumerate(("billing", "shop", "billing", "shop")):
            reached = len(room.effects(name)) + 40
            room.publish(room.events(150))
            until(partial(room.reached, name, reached), partial(room.effects, name))
            services[name].stop(signal.SIGKILL)
            if step == 1:
                auditor.stop(signal.SIGKILL)
                auditor = room.auditor()
            if step == 2:
                own_rabbitmq.kill()
                own_rabbitmq.start()
                auditor.wait_for("the broker is back")
            services[name] = room.service(name)
        for name in services:
            until(partial(room.reached, name, 600), partial(room.effects, name))
        until(room.settled, room.state)
        counted = {name: Counter(room.effects(name)) for name in services}
        doubled = {id for each in counted.values() for id, n in each.items() if n > 1}
        seen, (_, found) = room.state(), room.explained()
        named = {id for each in found for id in (*each["extra"], *each["missing"], *each["unsure"])}
        assert doubled <= named
        assert not doubled or seen["state"] != "ok", seen
        assert {id for each in found for id in (*each["extra"], *each["missing"])} <= doubled
        assert doubled or 0 not in {told.status for told in room.told()}
