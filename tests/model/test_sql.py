"""The SQL protocol holds in small worlds, no sentence of it can be left out, and its table is the laws.

Bounded search, not proof.  The journal's sessions are here too, at the same grain: see tests/model/sql.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from idemp.laws import Entry, Ledger
from idemp.ports import Abandon, Applied, Claim, Claimed, Complete, Forget, Lost, Park, Release, Takeover
from tests.model import sql
from tests.model.sql import RETENTION, Config, Op, Reply, Row, World, decide, search

SMALL = (
    Config("race", acts=(2, 2), ticks=4),
    Config("reply lost", acts=(2, 1), ticks=4, lost=1),
    Config("crash", acts=(1, 2), ticks=3, crashes=1),
    Config("parked, forgotten", ("CP", "CTF"), (2, 2), ticks=3),
    Config("declared dead", acts=(1, 2), ticks=3, declared=True),
    Config("declared dead, reply lost", acts=(1, 1), ticks=3, lost=1, declared=True),
)


@pytest.mark.parametrize("config", SMALL, ids=lambda config: config.name)
def test_the_protocol_holds(config: Config) -> None:
    """Every world within the budgets was seen, and all that must hold holds in it."""
    result = search(config)
    print(f"{config.name}: {result.states} states, depth {result.depth}, {result.seconds:.2f} s")
    assert result.violation is None, "\n".join((*result.trace, str(result.violation)))
    assert result.exhausted


MUTANTS = (
    # The holder alone completes: the token is compared.
    ("done", Config("done_by_anybody", acts=(2, 2), ticks=3)),
    # Only a dead session's claim is taken over.
    ("start", Config("takes_the_living", acts=(1, 2), ticks=3)),
    # A batch whose caller was told nothing gives its claims back.
    ("held", Config("no_undo", acts=(2, 1), ticks=2, lost=1)),
    # A takeover that nobody heard of leaves the doubt.
    ("doubt", Config("undo_frees_doubt", acts=(1, 4), ticks=3, lost=1)),
    # A batch is looked up before it is sent again.
    ("held", Config("sent_again_blindly", acts=(2, 1), ticks=2, lost=1)),
    # What cannot be told goes in doubt, not free.
    ("doubt", Config("abandon_frees", acts=(2, 2), ticks=2)),
    # Attempts count on after a release.
    ("attempts", Config("attempts_forgotten", acts=(3, 0), ticks=1)),
    # Tokens are of the store, not of the row, which may be gone.
    ("tokens", Config("token_of_row", ("CD", "F"), (3, 1), ticks=1)),
    # Done lasts for the retention.
    ("done", Config("done_dropped_early", acts=(2, 1), ticks=3)),
    # Only done and parked are forgotten.
    ("claim", Config("forget_claim", ("C", "F"), (1, 1), ticks=1)),
    # A handler does not start under a claim of an earlier session.
    ("start", Config("fresh_without_token", acts=(2, 1), ticks=4)),
    # Nor when the session was not heard of for long.
    ("start", Config("always_fresh", acts=(1, 1), ticks=4)),
    # A look and what follows from it are one transaction.
    ("start", Config("read_then_write", acts=(1, 1), ticks=1)),
    # The journal: the same two, and only a session that is gone is declared dead.
    ("start", Config("fresh_without_token", acts=(2, 1), ticks=4, declared=True)),
    ("start", Config("always_fresh", acts=(1, 1), ticks=4, declared=True)),
    ("start", Config("declares_the_living", acts=(1, 2), ticks=2, declared=True)),
)


@pytest.mark.parametrize(("prop", "config"), MUTANTS, ids=[f"{c.name}-{c.declared}" for _, c in MUTANTS])
def test_no_sentence_can_be_left_out(prop: str, config: Config) -> None:
    """The weakened protocol breaks, in the way that is named; run with -s for the shortest trace."""
    result = search(config._replace(mutant=config.name))
    print(
        "\n    ".join(
            (f"without {config.name}: {result.states} states", *result.trace, str(result.violation))
        )
    )
    assert result.violation is not None, f"nothing broke: {config.name}, {result.states} states"
    assert result.violation.prop == prop


# ------------------------------------------------------------------ the table is the shipped one


OPS: dict[str, Any] = {
    "C": lambda op: Claim("k"),
    "T": lambda op: Takeover("k", op.token),
    "D": lambda op: Complete("k", op.token),
    "R": lambda op: Release("k", op.token, op.attempt),
    "Q": lambda op: Abandon("k", op.token),
    "P": lambda op: Park("k", op.token, "reason"),
    "F": lambda op: Forget("k", op.token),
}
ROWS: tuple[Row | None, ...] = (
    None,
    *(Row(state, 5, 2, -1, 9) for state in ("free", "done", "parked")),
    *(Row("claimed", 5, 2, session, 9) for session in (-1, 0, 1, 2)),
)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("verb", "CTDRQPF")
@pytest.mark.parametrize("token", [4, 5])
def test_the_models_table_is_that_of_the_laws(row: Row | None, verb: str, token: int) -> None:
    """Any operation on any row: the same reply, and the same row.  Session 1 is dead, 2 asks."""
    now = 10
    assert row is None or row.at + RETENTION > now
    world = World(clock=now, token=7, row=row, expires=(now + 1, now, now + 3))
    after, last, reply = decide(Config(""), world, 2, Op(verb, token, 1))
    entries = {} if row is None else {"k": _entry(row)}
    ledger = Ledger(entries, lambda s: s in ("s0", "s2"), "s2", 7, now)
    said = ledger.apply(OPS[verb](Op(verb, token, 1)))
    assert reply == _reply(said)
    assert last == ledger.token
    assert (None if after is None else _entry(after)) == _plain(ledger.entries.get("k"))


def _entry(row: Row) -> Entry:
    return Entry(row.state, row.token, row.attempt, "" if row.session < 0 else f"s{row.session}", row.at)


def _plain(entry: Entry | None) -> Entry | None:
    """Without the reason, which the model has no use for."""
    return None if entry is None else replace(entry, reason="", at=float(entry.at))


def _reply(said: Any) -> Reply:
    match said:
        case Applied():
            return Reply("applied")
        case Lost():
            return Reply("lost")
        case Claimed(token, attempt):
            return Reply("claimed", token, attempt)
    word = type(said).__name__.lower()
    if word == "free":
        return Reply("free", *(() if not said.attempts else (5, said.attempts)))
    return Reply(word, said.token, said.attempt)


def test_a_trace_is_shortest() -> None:
    """Breadth first: the trace of a claim that is forgotten has its two steps and no more."""
    result = search(Config("", ("C", "F"), (1, 1), ticks=1, mutant="forget_claim"))
    assert len(result.trace) == 2
    assert sql.search(Config("", ("C", "F"), (1, 1), ticks=1)).exhausted
