"""The checker finds every falsification, under its name, and none where nothing is false."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.checker import Change, Dead, Kept, Limits, Verdict, check, lines_of, merged, worst
from tests.reliability.history import History, digest
from tests.reliability.stories import LIMITS, NEMESIS, Bundle, tell

CLEAN = range(250)
FALSIFIED = range(8)
Falsify = Callable[[Bundle], object]


def of(bundle: Bundle, f: str, fate: str = "", type: str = "ok") -> list[dict[str, Any]]:
    """The lines of a verb, of the messages with that fate."""
    return [x for x in bundle.lines if x["f"] == f and x["type"] == type and x.get("k", "").startswith(fate)]


def id_of(bundle: Bundle, fate: str) -> str:
    return next(str(line["k"]) for line in bundle.lines if line.get("k", "").startswith(fate + "/"))


def after(bundle: Bundle, line: dict[str, Any], **other: Any) -> dict[str, Any]:
    """A line right after another, like it but for ``other``."""
    new = {**line, "t": line["t"] + 1, **other}
    bundle.lines.append(new)
    return new


def last(bundle: Bundle) -> int:
    return max(int(line["t"]) for line in bundle.lines)


# ------------------------------------------------------------------ falsifications


def ack_before_done(bundle: Bundle) -> None:
    [done] = of(bundle, "complete", id_of(bundle, "plain"))
    ack = of(bundle, "ack", done["k"], "invoke")[0]
    ack["t"] = done["t"] - 1


def ack_without_a_copy(bundle: Bundle) -> None:
    copy = of(bundle, "retry", id_of(bundle, "failed"))[0]
    copy["type"] = "info"


def lost(bundle: Bundle) -> None:
    id = id_of(bundle, "plain")
    bundle.lines = [x for x in bundle.lines if x.get("k") != id or x["f"] == "publish"]
    bundle.ledger = [x for x in bundle.ledger if x["k"] != id]
    bundle.changes = [x for x in bundle.changes if x.k != id]
    del bundle.dump[id]


def dead_letter_missing(bundle: Bundle) -> None:
    id = id_of(bundle, "parked")
    bundle.dead = [letter for letter in bundle.dead if letter.k != id]


def malformed_lost(bundle: Bundle) -> None:
    id = id_of(bundle, "malformed")
    bundle.dead = [letter for letter in bundle.dead if letter.k != id]


def retry_copy_lost(bundle: Bundle) -> None:
    """Free, with an attempt behind it, and nothing will ever bring it again."""
    lost(bundle)
    bundle.dump["plain/0"] = Kept("free", 0, 1)


def invented_key(bundle: Bundle) -> None:
    bundle.dump["nobody's"] = Kept("done", 1 << 40, 1)


def invented_effect(bundle: Bundle) -> None:
    bundle.ledger.append({"t": last(bundle), "p": 1001, "k": "nobody's", "att": 1, "tok": 1})


def done_twice(bundle: Bundle) -> None:
    [done] = of(bundle, "complete", id_of(bundle, "plain"))
    asked = after(bundle, done, op=-1, type="invoke", tok=done["tok"] + 1000, sha=digest(b"other"))
    after(bundle, asked, type="ok", r="applied")


def other_bytes(bundle: Bundle) -> None:
    told = [x for x in of(bundle, "claim", id_of(bundle, "twice")) if x["r"] == "done"]
    told[0]["sha"] = digest(b"other")


def other_bytes_in_the_end(bundle: Bundle) -> None:
    id = id_of(bundle, "plain")
    bundle.dump[id] = bundle.dump[id]._replace(sha=digest(b"other"))


def done_undone(bundle: Bundle) -> None:
    told = [x for x in of(bundle, "claim", id_of(bundle, "twice")) if x["r"] == "done"]
    told[0].update(r="busy", tok=told[0]["tok"] + 1000)


def done_freed(bundle: Bundle) -> None:
    told = [x for x in of(bundle, "claim", id_of(bundle, "twice")) if x["r"] == "done"]
    told[0].update(r="free")


def recorded_late_with_other_bytes(bundle: Bundle) -> None:
    told = [x for x in of(bundle, "claim", id_of(bundle, "recorded_late")) if x["r"] == "done"]
    told[0]["sha"] = digest(b"other")


def recorded_late_and_run_again(bundle: Bundle) -> None:
    """Its own holder's takeover is for the record alone: whoever runs under it does it twice."""
    id = id_of(bundle, "recorded_late")
    run = of(bundle, "run", id, "invoke")[0]
    after(bundle, run, tok=bundle.dump[id].tok, att=2)


def done_forgotten(bundle: Bundle) -> None:
    id = id_of(bundle, "plain")
    bundle.dump[id] = Kept("free", 0, 1)


def journal_takes_done_twice(bundle: Bundle) -> None:
    id = id_of(bundle, "plain")
    bundle.changes.append(Change("complete", id, bundle.dump[id].tok + 1000, 2))


def journal_goes_on_after_done(bundle: Bundle) -> None:
    id = id_of(bundle, "plain")
    bundle.changes.append(Change("claim", id, bundle.dump[id].tok + 1000, 2))


def run_after_done(bundle: Bundle) -> None:
    run = of(bundle, "run", id_of(bundle, "plain"), "invoke")[0]
    after(bundle, {**run, "t": last(bundle)}, att=2, tok=run["tok"] + 1000)


def attempt_reused(bundle: Bundle) -> None:
    id = id_of(bundle, "failed")
    for line in bundle.lines:
        if line.get("k") == id and line.get("att") == 2:
            line["att"] = 1


def token_going_back(bundle: Bundle) -> None:
    id, [first, second] = (lambda i: (i, [x["tok"] for x in of(bundle, "claim", i)]))(id_of(bundle, "failed"))
    other = {first: second, second: first}
    for line in [*bundle.lines, *bundle.ledger]:
        if line.get("k") == id and "tok" in line:
            line["tok"] = other.get(line["tok"], line["tok"])
    bundle.dump[id] = bundle.dump[id]._replace(tok=other[bundle.dump[id].tok])


def journal_token_going_back(bundle: Bundle) -> None:
    id = id_of(bundle, "failed")
    given = [place for place, x in enumerate(bundle.changes) if x.k == id and x.f == "claim"]
    bundle.changes[given[-1]] = bundle.changes[given[-1]]._replace(tok=0)


def too_many_attempts(bundle: Bundle) -> None:
    id = id_of(bundle, "failed")
    for line in [*bundle.lines, *bundle.ledger]:
        if line.get("k") == id and line.get("att") == 2:
            line["att"] = LIMITS.attempts + 1


def run_without_claim(bundle: Bundle) -> None:
    [claim] = of(bundle, "claim", id_of(bundle, "plain"))
    claim.update(r="busy")


def two_hold_one_claim(bundle: Bundle) -> None:
    [claim] = of(bundle, "claim", id_of(bundle, "plain"))
    other = 1001 if claim["p"] != 1001 else 1002
    after(bundle, claim, p=other, op=-1)


def effect_without_run(bundle: Bundle) -> None:
    effect = next(x for x in bundle.ledger if x["k"].startswith("plain"))
    bundle.ledger.append({**effect, "tok": effect["tok"] - 1, "att": 0})


def effect_twice(bundle: Bundle) -> None:
    bundle.ledger.append(next(x for x in bundle.ledger if x["k"].startswith("plain")))


def done_without_effect(bundle: Bundle) -> None:
    id = id_of(bundle, "plain")
    bundle.ledger = [x for x in bundle.ledger if x["k"] != id]


def doubled_without_doubt(bundle: Bundle) -> None:
    """The taker claimed it as if nobody had been there."""
    id = id_of(bundle, "overtaken")
    for line in bundle.lines:
        if line.get("k") == id and line["f"] == "takeover":
            line["f"] = "claim"
    bundle.changes = [x._replace(f="claim") if x.k == id and x.f == "takeover" else x for x in bundle.changes]


def fenced_sink_ends_with_a_stale_effect(bundle: Bundle) -> None:
    id = id_of(bundle, "overtaken")
    bundle.dump[id] = bundle.dump[id]._replace(tok=bundle.ledger[0]["tok"] - 1)
    first = next(x for x in bundle.ledger if x["k"] == id)
    bundle.dump[id] = bundle.dump[id]._replace(tok=first["tok"])
    for line in bundle.lines:
        if line.get("k") == id and line["f"] in ("complete", "claim") and line.get("r") != "claimed":
            line["tok"] = first["tok"]


def doubt_without_a_name(bundle: Bundle) -> None:
    """It ran, without an effect yet, and its taker knew nothing of it."""
    id = id_of(bundle, "overtaken")
    doubled_without_doubt(bundle)
    first = next(x for x in bundle.ledger if x["k"] == id)
    bundle.ledger.remove(first)


def attempts_do_not_tell(bundle: Bundle) -> None:
    id = id_of(bundle, "overtaken")
    bundle.dump[id] = bundle.dump[id]._replace(att=1)


def doubt_of_what_never_was(bundle: Bundle) -> None:
    id = id_of(bundle, "overtaken")
    for line in [*bundle.lines, *bundle.ledger]:
        if line.get("k") == id and line.get("att") == 2:
            line["att"] = 3
    bundle.changes = [x._replace(att=3) if x.k == id and x.att == 2 else x for x in bundle.changes]
    bundle.dump[id] = bundle.dump[id]._replace(att=3)


def overlap(bundle: Bundle) -> None:
    """It is in every true run; here it is forbidden."""


def other_payload_run(bundle: Bundle) -> None:
    of(bundle, "run", id_of(bundle, "plain"), "invoke")[0]["sha"] = digest(b"other")


def conflict_without_a_dead_letter(bundle: Bundle) -> None:
    id = id_of(bundle, "conflicting")
    bundle.dead = [letter for letter in bundle.dead if letter.k != id]


def conflict_acknowledged_as_skipped(bundle: Bundle) -> None:
    of(bundle, "dead", id_of(bundle, "conflicting"))[0]["type"] = "info"


def too_many_out(bundle: Bundle) -> None:
    line = of(bundle, "deliver", id_of(bundle, "plain"))[0]
    for number in range(LIMITS.prefetch + 1):
        after(bundle, line, op=-number - 1)


def too_much_memory(bundle: Bundle) -> None:
    of(bundle, "sample")[0]["rss"] = LIMITS.rss + 1


def too_many_files(bundle: Bundle) -> None:
    of(bundle, "sample")[0]["fds"] = LIMITS.fds + 1


def claim_open_in_the_end(bundle: Bundle) -> None:
    id = id_of(bundle, "plain")
    bundle.dump[id] = Kept("busy", bundle.dump[id].tok, 1)


def never_at_rest(bundle: Bundle) -> None:
    bundle.lines = [x for x in bundle.lines if x.get("phase") != "drained"]


def slow_to_rest(bundle: Bundle) -> None:
    heal = next(x for x in bundle.lines if x.get("phase") == "heal")
    for line in bundle.lines:
        if line["f"] == "complete" and line["type"] == "ok":
            line["t"] += 60_000_000_000
        elif line["f"] == "ack":
            line["t"] += 61_000_000_000
    heal["t"] = min(x["t"] for x in bundle.lines) + 1


def fault_without_witness(bundle: Bundle) -> None:
    of(bundle, "etcd.leader-kill")[0]["witness"] = None


def fault_without_end(bundle: Bundle) -> None:
    bundle.lines.remove(of(bundle, "etcd.leader-kill")[0])


def load_below_the_floor(bundle: Bundle) -> None:
    heal = next(x for x in bundle.lines if x.get("phase") == "heal")
    heal["t"] += 3_600_000_000_000
    next(x for x in bundle.lines if x.get("phase") == "drained")["t"] = heal["t"] + 1


FALSE: dict[str, list[Falsify]] = {
    "I1": [lost, dead_letter_missing, malformed_lost, retry_copy_lost],
    "I2": [invented_key, invented_effect],
    "I3": [ack_before_done, ack_without_a_copy, conflict_acknowledged_as_skipped],
    "I4": [
        done_twice,
        other_bytes,
        other_bytes_in_the_end,
        done_undone,
        done_freed,
        recorded_late_with_other_bytes,
        recorded_late_and_run_again,
        done_forgotten,
        journal_takes_done_twice,
        journal_goes_on_after_done,
        run_after_done,
    ],
    "I5": [
        attempt_reused,
        token_going_back,
        journal_token_going_back,
        too_many_attempts,
        run_without_claim,
        two_hold_one_claim,
    ],
    "I6": [
        effect_without_run,
        effect_twice,
        done_without_effect,
        doubled_without_doubt,
        fenced_sink_ends_with_a_stale_effect,
    ],
    "I7": [doubt_without_a_name, attempts_do_not_tell, doubt_of_what_never_was],
    "I8": [overlap],
    "I9": [other_payload_run, conflict_without_a_dead_letter],
    "I10": [too_many_out, too_much_memory, too_many_files],
    "I16": [claim_open_in_the_end, never_at_rest, slow_to_rest],
    "I17": [fault_without_witness, fault_without_end, load_below_the_floor],
}
UNKNOWN = {fault_without_witness, fault_without_end, load_below_the_floor}
ONLY_IN_THE_JOURNAL = {journal_takes_done_twice, journal_goes_on_after_done, journal_token_going_back}
EACH = [(name, falsify) for name, several in FALSE.items() for falsify in several]


@pytest.mark.parametrize(("invariant", "falsify"), EACH, ids=[falsify.__name__ for _, falsify in EACH])
@pytest.mark.parametrize("journal", [True, False])
def test_a_falsification_is_found(invariant: str, falsify: Falsify, journal: bool) -> None:
    limits = Limits(overlaps=False) if falsify is overlap else LIMITS
    for seed in FALSIFIED:
        bundle = tell(seed)
        falsify(bundle)
        verdict = bundle.check(limits, journal=journal)
        found = {finding.invariant for finding in verdict.findings}
        if falsify in ONLY_IN_THE_JOURNAL and not journal:
            assert verdict.result == "valid"
            continue
        assert invariant in found, (seed, verdict.findings)
        assert verdict.result == ("unknown" if falsify in UNKNOWN else "invalid")


@pytest.mark.parametrize("journal", [True, False])
def test_nothing_is_found_where_nothing_is_false(journal: bool) -> None:
    for seed in CLEAN:
        verdict = tell(seed).check(journal=journal)
        assert verdict.result == "valid", (seed, verdict.findings)
        assert verdict.findings == []
        assert verdict.recall == 1.0


def test_the_counters() -> None:
    verdict = tell(0, count=13).check()  # every fate once
    counts = verdict.counts
    assert counts["attempted"] == 13
    assert counts["acknowledged"] == counts["ok"] == 11
    assert counts["recovered"] == 1
    assert counts["lost"] == counts["unexpected"] == 0
    assert counts["parked"] == counts["conflicts"] == 1
    assert counts["takeovers"] == 2
    assert counts["overlaps"] >= 1
    assert counts["doubled"] == counts["doubled and named"] >= 1
    assert 0.0 < verdict.precision <= 1.0
    assert [kind for kind, _ in verdict.drains] == ["etcd.leader-kill"]


def test_without_a_store_nobody_knows() -> None:
    bundle = tell(1)
    bundle.dump = None  # type: ignore[assignment]
    assert bundle.check().result == "unknown"


def test_a_finding_names_the_message_and_the_lines() -> None:
    bundle = tell(2)
    done_twice(bundle)
    [finding] = bundle.check(journal=False).findings
    assert finding.id == id_of(bundle, "plain")
    assert "f=complete" in finding.lines[0]


def test_invalid_is_worse_than_unknown() -> None:
    bundle = tell(3)
    fault_without_witness(bundle)
    lost(bundle)
    assert bundle.check().result == "invalid"
    assert worst([]) == "valid"
    assert worst(["valid", "unknown"]) == worst(["unknown", "valid"]) == "unknown"
    assert worst(["unknown", "invalid", "valid"]) == "invalid"


def test_a_torn_last_line_never_counted(tmp_path: Path) -> None:
    history = History(tmp_path, "consumer")
    history.note("run", "invoke", k="a")
    file = next(tmp_path.glob("*.jsonl"))
    with file.open("ab") as lines:
        lines.write(b'{"t":1,"p"')
    assert [line["k"] for line in merged(tmp_path)] == ["a"]
    assert list(lines_of(tmp_path / "none")) == []


def test_files_are_merged_by_time(tmp_path: Path) -> None:
    for name, times in (("a.1", [1, 4]), ("b.2", [2, 3])):
        text = "".join(json.dumps({"t": t, "p": 1}) + "\n" for t in times)
        (tmp_path / f"{name}.jsonl").write_text(text)
    assert [line["t"] for line in merged(tmp_path)] == [1, 2, 3, 4]


def test_many_lines_take_little_time() -> None:
    """One pass, and one look at each id."""
    bundle = tell(4, count=6_000)
    verdict: Verdict = bundle.check()
    assert verdict.result == "valid"
    assert verdict.counts["attempted"] == 6_000
    assert len(bundle.lines) > 60_000
    assert bundle.dead[0].__class__ is Dead
    assert all(line["p"] != NEMESIS or "k" not in line for line in bundle.lines)


@pytest.mark.parametrize(("stops", "late", "found"), [(0, 1, 1), (1, 1, 0), (1, 2, 1)])
def test_one_late_run_a_stop(stops: int, late: int, found: int) -> None:
    """Stopped right before its handler: once a stop, and only under a claim that was taken over since."""
    lines: list[dict[str, Any]] = []

    def note(p: int, f: str, **facts: Any) -> None:
        lines.append({"t": len(lines), "p": p, "role": "consumer", "f": f, "type": "ok", **facts})

    for number in range(stops):
        note(1, "failpoint", step="x", action="stop", op=number)
    for key in "ab"[:late]:
        note(2, "complete", op=10, k=key, tok=7, sha="s", r="applied")
        note(1, "run", op=11, k=key, tok=5, att=1, sha="s")
        lines[-1]["type"] = "invoke"
    verdict = check(lines, [], None, [])
    assert sum(each.what == "run after it was done" for each in verdict.findings) == found
