"""The journal's state machine: its text, the agreement of replicas, the laws, bounded memory."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import astuple, replace

from idemp.laws import Entry
from idemp.ports import (
    Abandon,
    Applied,
    Busy,
    Claim,
    Claimed,
    Complete,
    Done,
    Doubt,
    Forget,
    Free,
    Lost,
    Park,
    Parked,
    Release,
    Takeover,
)
from idemp.stores.journal import HOT, Append, Journal, OutOfOrder
from idemp.stores.records import (
    LINES,
    Begin,
    Declare,
    Finish,
    Opened,
    Raise,
    Seed,
    decode,
    decode_open,
    encode,
    encode_open,
    encode_pages,
)
from idemp.stores.seen import PLACES

keys = st.text(min_size=1, max_size=30).filter(lambda text: text.isprintable() or text.isascii())
blobs = st.one_of(st.none(), st.just(b"null"), st.binary(max_size=40))
prints = st.one_of(st.none(), st.binary(min_size=1, max_size=16))
tokens = st.integers(0, 2**60)
records = st.one_of(
    st.builds(Claim, keys),
    st.builds(Complete, keys, tokens, blobs, prints),
    st.builds(lambda k, n: Release(k, 0, n), keys, st.integers(0, 99)),
    st.builds(lambda k, n: Abandon(k, 0, n), keys, st.none() | st.integers(0, 9)),
    st.builds(lambda k, r: Park(k, 0, r), keys, st.text(max_size=20)),
    st.builds(Takeover, keys, tokens),
    st.builds(Forget, keys, tokens),
    st.builds(Seed, keys),
    st.builds(Declare, st.just("5e551011"), st.integers(0, 9)),
    st.builds(Begin, st.integers(0, 99)),
    st.builds(Raise, st.integers(0, 99)),
)


@given(st.lists(records, max_size=8))
def test_what_is_written_is_read(written: list[Any]) -> None:
    """Any key, result and reason, one readable line each; of what is done only the token."""
    text = encode(1234.5, written)
    read = [Finish(*astuple(record)[1:]) if isinstance(record, Complete) else record for record in written]
    assert decode(text) == (1234.5, read)
    assert len(text.split(b"\n")) == len(written) + 1
    assert text.decode().isprintable() or "\n" in text.decode()


entries = st.builds(
    lambda token, attempt, session, reason: Entry("claimed", token, attempt, session, 5.0, reason),
    tokens,
    st.integers(1, 9),
    st.sampled_from(["", "s1"]),
    st.text(max_size=9),
)
opened_keys = st.builds(Opened, keys, entries, st.integers(0, 9))


@given(st.lists(opened_keys, max_size=5))
def test_snapshots_are_read_as_written(opened: list[Opened]) -> None:
    """Page by page, of few keys or of few bytes."""
    assert decode_open(encode_open(opened)) == opened
    assert [each for page in encode_pages(opened) for each in decode_open(page)] == opened


def test_a_page_of_a_snapshot_is_small() -> None:
    """By the number of keys, and by their size: what one key says may fill a page, and is not cut."""
    entry = Entry("parked", 7, 1, "", 5.0, "why")
    many = [Opened(f"k/{number:04}", entry, 0) for number in range(1200)]
    assert [len(decode_open(page)) for page in encode_pages(many)] == [500, 500, 200]
    wordy = [
        Opened(key, replace(entry, reason=reason), 0)
        for key, reason in [("a", " " * 100_000), ("b", "x" * 100_000), ("c", " " * 300_000), ("d", "why")]
    ]
    assert [len(decode_open(page)) for page in encode_pages(wordy)] == [2, 1, 1]
    assert [each for page in encode_pages(wordy) for each in decode_open(page)] == wordy


def test_the_lines_are_readable() -> None:
    """What a person sees with etcdctl."""
    written: list[Any] = [
        Claim("orders.new_order/a b"),
        Complete("k", 1234 * LINES + 5, b"null"),
        Complete("k", 7, b'{"n": 1}', b"\1"),
    ]
    assert encode(7, written) == b'7.000\nC orders.new_order/a%20b\nd 1234.5\nd 0.7 ={"n":%201} 01'
    claims = [Claim(key) for key in ("o/a", "o/b", "p/c", "p/d")]
    assert encode(7, claims) == b"7.000\nC o/a\nc b\nC p/c\nc d"
    done = [Complete("k", token, b"null") for token in (3, 4, 5, 7)]
    assert encode(7, done) == b"7.000\nd 0.3-5\nd 0.7"


class Log:
    """A log that writers append to and replicas read."""

    def __init__(self) -> None:
        self.appends: list[Append] = []
        self.seqs: dict[str, int] = {}

    def append(self, session: str, *written: Any, wall: float = 0.0) -> Append:
        self.seqs[session] = self.seqs.get(session, 0) + 1
        append = Append(len(self.appends) + 1, session, self.seqs[session], wall, written)
        self.appends.append(append)
        return append


def replay(appends: list[Append]) -> Journal:
    journal = Journal()
    for append in appends:
        journal.apply(append)
    return journal


def test_the_first_in_the_order_wins() -> None:
    """And the token is the place in the order."""
    log, journal = Log(), Journal()
    [won] = journal.apply(log.append("s", Claim("k")))
    assert won == Claimed(1 * LINES, 1)
    [lost, other] = journal.apply(log.append("z", Claim("k"), Claim("l")))
    assert isinstance(lost, Busy)
    assert other == Claimed(2 * LINES + 1, 1)
    assert (
        journal.apply(log.append("z", Complete("k", 0), Release("k", 0, 1), Park("k", 0, "x")))
        == [Lost(lost)] * 3
    )
    assert journal.apply(log.append("s", Complete("k", won.token, b"1"))) == [Applied()]
    assert isinstance(journal.state("k"), Done)


def test_an_append_is_applied_once_and_in_its_place() -> None:
    """What is missing, late or doubled is noticed."""
    log, journal = Log(), Journal()
    first, second, third = (log.append("s", Claim(str(n))) for n in range(3))
    other = log.append("z", Claim("z"))
    assert len(journal.apply(first)) == 1
    assert journal.apply(first) == []
    with pytest.raises(OutOfOrder):
        journal.apply(third)
    journal.apply(other)
    with pytest.raises(OutOfOrder):
        journal.apply(second)


def test_a_declared_sessions_claims_are_in_doubt() -> None:
    """From that line on, for everybody; its late records are void; one taker wins."""
    log, journal = Log(), Journal()
    journal.apply(log.append("s", Claim("k"), Claim("parked"), Park("parked", 0, "x")))
    journal.apply(log.append("z", Declare("s", 1)))
    doubt = journal.state("k")
    assert isinstance(doubt, Doubt)
    assert journal.apply(Append(3, "s", 2, 0.0, [Complete("k", 0)])) == []
    taken, late, parked = journal.apply(
        Append(
            3,
            "z",
            2,
            0.0,
            [Takeover("k", doubt.token), Takeover("k", doubt.token), Takeover("parked", 65537)],
        )
    )
    assert isinstance(taken, Claimed)
    assert taken.attempt == 2
    assert isinstance(late, Busy)
    assert isinstance(parked, Parked), "the token is that of its claim, which is over"
    assert parked.token == 65538
    with pytest.raises(OutOfOrder):
        journal.apply(Append(4, "z", 3, 0.0, [Declare("z", 9)]))


def test_abandoned_and_forgotten() -> None:
    """Q leaves a doubt that its holder may not complete by D any more, but by T; F never hits a claim."""
    log, journal = Log(), Journal()
    [claim] = journal.apply(log.append("s", Claim("k")))
    assert isinstance(claim, Claimed)
    assert isinstance(journal.apply(log.append("s", Forget("k", claim.token)))[0], Lost)
    assert journal.apply(log.append("s", Abandon("k", 0))) == [Applied()]
    [taken] = journal.apply(log.append("s", Takeover("k", claim.token)))
    assert isinstance(taken, Claimed)
    assert journal.apply(log.append("s", Complete("k", taken.token))) == [Applied()]
    assert journal.apply(log.append("s", Forget("k", taken.token))) == [Applied()]
    assert journal.state("k") == Free(0)


def test_what_was_asked_for_is_ready_until_it_is_forgotten() -> None:
    """By a person, or with its bucket; and it is never more than so many."""
    log, journal = Log(), Journal()
    keys = [f"k{n}" for n in range(HOT + 2)]
    claims = journal.apply(log.append("s", *map(Claim, keys)))
    tokens = [claim.token for claim in claims if isinstance(claim, Claimed)]
    journal.apply(log.append("s", *(Complete(key, token) for key, token in zip(keys, tokens, strict=True))))
    assert journal.unheard("other")
    assert not journal.unheard("k0")
    known = journal.done("k0")
    assert known is not None
    assert journal.hot == {"k0": known}
    journal.apply(log.append("s", Forget("k0", known.token)))
    assert journal.hot == {}
    assert journal.done("k0") is None
    for key in keys:
        journal.done(key)
    assert 0 < len(journal.hot) <= HOT
    journal.apply(log.append("s", Begin(1)))
    journal.apply(log.append("s", Raise(1)))
    assert journal.hot == {}
    assert journal.done("k1") is None


def test_an_importer_drops_what_was_freed_where_the_others_do() -> None:
    """A snapshot says in which bucket a key was set free: that bucket's end may be yet to be read."""
    log, live = Log(), Journal()
    log.append("s", Claim("old"), Release("old", 0, 3))
    log.append("s", Begin(1))
    log.append("s", Claim("new"), Release("new", 0, 2))
    log.append("s", Begin(2))
    log.append("s", Raise(1))
    log.append("s", Raise(2))
    for append in log.appends[:4]:
        live.apply(append)
    imported = {bucket: Journal() for bucket in (1, 2)}
    for bucket, journal in imported.items():
        journal.restore(bucket, decode_open(encode_open(live.opens[bucket])))
        for append in log.appends[2 * bucket - 1 : 4]:
            reread(journal, append)
    for append, old, new in ((log.appends[4], 0, 2), (log.appends[5], 0, 0)):
        for journal in (live, *imported.values()):
            reread(journal, append)
            assert (journal.state("old"), journal.state("new")) == (Free(old), Free(new))


def test_memory_is_made_anew_before_its_places_run_out() -> None:
    """A done key names its append by 32 bits."""
    log, journal = Log(), Journal()
    journal._applied = PLACES - 2
    journal.apply(log.append("s", Claim("k")))
    with pytest.raises(OutOfOrder):
        journal.apply(log.append("s", Claim("l")))


def test_memory_is_bounded_by_the_buckets() -> None:
    """B drops what was done before its bucket, and what was set free; open keys stay."""
    log, journal = Log(), Journal()
    for bucket in range(1, 40):
        names = [f"{bucket}/{n}" for n in range(10)]
        claims = journal.apply(log.append("s", *map(Claim, names)))
        done = [Complete(n, c.token) for n, c in zip(names[:8], claims, strict=False) if type(c) is Claimed]
        journal.apply(log.append("s", *done, Release(names[8], 0, 1), Seed(f"seed/{bucket}")))
        journal.apply(log.append("s", Begin(bucket), wall=float(bucket)))
        if bucket >= 4:
            journal.apply(log.append("s", Raise(bucket - 3)))
            # An open key of every bucket stays; of the others those of the last four buckets.
            assert len(journal.opened()) == bucket + 3
            assert journal.remembered() == 3 * 9
            remembered = {f"{n}/0" for n in range(1, 40) if journal.entry(f"{n}/0") is not None}
            assert remembered == {f"{n}/0" for n in range(bucket - 2, bucket + 1)}
    assert journal.began.keys() == {36, 37, 38, 39}
    assert journal.opens.keys() == {36, 37, 38, 39}


KEYS = ("x", "y", "h/a", "h/b", "h/c", "h/c/d", "h%/d")


class OneByOne(Journal):
    """Folds each record by the laws, without the short ways."""

    def _claim_all(self, fold: Any, keys: Sequence[str], token: int) -> dict[int, Any]:
        told = {}
        for each, key in enumerate(keys, token):
            fold.token = each - 1
            told[each] = fold.apply(Claim(key))
        return told

    def _complete(self, fold: Any, record: Any) -> bool:
        return False


def reread(journal: Journal, append: Append, *, importing: bool = True) -> None:
    """As one that reads it, and asks for no outcome."""
    revision, session, seq, wall, written = append
    journal.replay(revision, session, seq, encode(wall, written), importing=importing)


class Replicas(RuleBasedStateMachine):
    """Writers that see only outcomes, replicas that lag, importers: all agree, and the laws hold."""

    def __init__(self) -> None:
        super().__init__()
        self.log = Log()
        self.live = OneByOne()
        self.own = Journal()  # as who wrote them folds them: not from text
        self.lagging = Journal()
        self.snapshots: dict[int, tuple[bytes, int]] = {}
        self.held: dict[str, tuple[str, int]] = {}  # key -> the session and token of its claim
        self.tokens: dict[str, int] = {}
        self.dead: set[str] = set()
        self.bucket = 0
        self.chance = random.Random(0)

    def write(self, session: str, *written: Any) -> list[Any]:
        append = self.log.append(session, *written, wall=float(len(self.log.appends)))
        # What the writer composed is what a replica reads.
        wall, read = decode(encode(append.wall, append.records))
        outcomes = self.live.apply(append._replace(wall=wall, records=read))
        # A loss tells its writer more, who still knows which key it meant.
        own = self.own.apply(append)
        assert [*map(type, own)] == [*map(type, outcomes)]
        assert [each for each in own if type(each) is not Lost] == [
            each for each in outcomes if type(each) is not Lost
        ]
        assert everything(self.own) == everything(self.live)
        for record, outcome in zip(written, outcomes, strict=True):
            if isinstance(outcome, Claimed):
                assert outcome.token > self.tokens.get(record.key, 0)
                assert isinstance(record, Takeover) or record.key not in self.held
                self.tokens[record.key] = outcome.token
                self.held[record.key] = (session, outcome.token)
            elif outcome == Applied() and isinstance(record, Forget):
                self.held.pop(record.key, None)
            elif outcome == Applied() and isinstance(record, Complete | Release | Park | Abandon):
                assert self.held[record.key][0] == session
                if not isinstance(record, Park | Abandon):
                    del self.held[record.key]
        return outcomes

    @rule(session=st.sampled_from("abc"), key=st.sampled_from(KEYS), what=st.integers(0, 8))
    def record(self, session: str, key: str, what: int) -> None:
        if session in self.dead:
            return
        token = self.tokens.get(key, 0)
        made: list[Any] = [
            Claim(key), Claim(key), Complete(key, token, b"1"), Release(key, 0, 2), Abandon(key, 0),
            Park(key, 0, "why"), Takeover(key, token), Forget(key, token), Complete(key, token, b"null"),
        ]  # fmt: skip
        # As the store does: a key that memory answers done is not claimed, so that no claim of this bucket
        # loses against a done of an earlier one.
        known = isinstance(self.live.state(key), Done)
        written = [made[what], Claim(key)] if not known else [made[what]] * (what > 1)
        self.write(session, *written)

    @rule(session=st.sampled_from("abc"), keys=st.lists(st.sampled_from(KEYS)))
    def claim_many(self, session: str, keys: list[str]) -> None:
        if session not in self.dead:
            free = [key for key in keys if not isinstance(self.live.state(key), Done)]
            self.write(session, *map(Claim, free))

    @rule(session=st.sampled_from("abc"), start=st.integers(0, 3), twice=st.booleans())
    def complete_many(self, session: str, start: int, twice: bool) -> None:
        if session in self.dead:
            return
        # In the order of their claims, and also those that are no longer, or never were, its own.
        claims = sorted((token, key) for key, token in self.tokens.items())[start:]
        done = [Complete(key, token, b"null") for token, key in claims]
        self.write(session, *done, *done[:twice])

    @precondition(lambda self: len(self.dead) < 2)
    @rule(session=st.sampled_from("abc"))
    def die(self, session: str) -> None:
        others = [other for other in "abc" if other != session and other not in self.dead]
        if session in self.dead or not others:
            return
        self.dead.add(session)
        self.write(others[0], Declare(session, self.log.seqs.get(session, 0)))

    @rule()
    def begin(self) -> None:
        writer = next(session for session in "abc" if session not in self.dead)
        self.bucket += 1
        self.write(writer, Begin(self.bucket))
        self.snapshots[self.bucket] = (encode_open(self.live.opens[self.bucket]), len(self.log.appends) - 1)

    @precondition(lambda self: self.bucket >= 2)
    @rule()
    def drop(self) -> None:
        writer = next(session for session in "abc" if session not in self.dead)
        if self.bucket - 1 > self.live.floor:
            self.write(writer, Raise(self.bucket - 1))
            self.held = {k: h for k, h in self.held.items() if self.live.entry(k) is not None}

    @rule(count=st.integers(1, 5))
    def lag(self, count: int) -> None:
        for append in self.log.appends[len_applied(self.lagging) :][:count]:
            reread(self.lagging, append, importing=False)

    @invariant()
    def an_importer_agrees(self) -> None:
        imported = Journal()
        start = 0
        if self.live.floor:
            page, start = self.snapshots[self.live.floor]
            imported.restore(self.live.floor, decode_open(page))
        for append in self.log.appends[start:]:
            reread(imported, append)
        assert everything(imported) == everything(self.live)

    def teardown(self) -> None:
        for append in self.log.appends[len_applied(self.lagging) :]:
            reread(self.lagging, append, importing=False)
        assert everything(self.lagging) == everything(self.live)


def len_applied(journal: Journal) -> int:
    return journal.revision


def everything(journal: Journal) -> dict[str, Any]:
    return {"done": journal.remembered(), **{key: journal.entry(key) for key in KEYS}}


TestReplicas = Replicas.TestCase
TestReplicas.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
