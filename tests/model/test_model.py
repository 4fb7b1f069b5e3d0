"""The journal protocol holds in small worlds, and no sentence of it can be left out.

Bounded search, not proof.  Larger worlds: ``python -m tests.model --long``.
"""

from __future__ import annotations

import pytest

from tests.model.journal import Config, Faults
from tests.model.machine import LINES, Line, State, apply_append
from tests.model.mutants import DONE, MUTANTS, Mutant
from tests.model.search import search

HELD = (0, (Line("C", 0),))  # p0 runs key 0
PARKED = (0, (Line("P", 0, LINES),))
QUIT = (0, (Line("Q", 0, LINES),))  # and cannot tell what became of it
ROLL = Config("", verbs=("C", "ESB"), appends=(1, 3), buckets=1, ticks=1)

SMALL = (
    Config("race, events lost and late", faults=Faults(drop=1, again=1)),
    Config("race, reply lost, a copy in the net", faults=Faults(lost=1, copy=1)),
    Config("a session expires, its process goes on", ("CT", "T"), (1, 2), faults=Faults(expiry=1, lost=1)),
    Config("expiry, a copy in the net", ("", "T"), (1, 2), faults=Faults(expiry=1, copy=1), history=(HELD,)),
    Config("two takers of a doubt", ("C", "T", "T"), (1, 1, 1), history=(HELD, QUIT)),
    Config("crash and restart, an event lost", ("C", "C"), (1, 1), faults=Faults(1, drop=1), restart=True),
    Config("released, abandoned, late done", ("CQ", "RT"), (3, 2), faults=Faults(drop=1), history=(HELD,)),
    Config(
        "parked, two resolve it", ("", "RT", "T"), (0, 2, 1), faults=Faults(drop=1), history=(HELD, PARKED)
    ),
    Config("forgotten and sent back", ("CR", "CF"), (3, 2), faults=Faults(drop=1)),
    Config("two lines in an append, two keys", ("C", "CT"), (2, 1), keys=2, batch=2),
    ROLL._replace(name="roll, an import at any time", faults=Faults(imports=1)),
    ROLL._replace(name="roll, reply lost", faults=Faults(lost=1), history=(HELD,)),
    ROLL._replace(name="roll, a copy in the net", faults=Faults(copy=1), history=(HELD,)),
    ROLL._replace(name="roll, events lost", faults=Faults(drop=1), history=(HELD,)),
    ROLL._replace(name="two rolls", verbs=("ESB", "B"), appends=(4, 1), buckets=2, history=DONE),
)


@pytest.mark.parametrize("head", [False, True], ids=["tails", "head"])
@pytest.mark.parametrize("config", SMALL, ids=lambda config: config.name)
def test_the_protocol_holds(config: Config, head: bool) -> None:
    """Every world within the budgets was seen, and all that must hold holds in it."""
    result = search(config._replace(head=head))
    print(result)
    assert result.violation is None, str(result)
    assert result.exhausted


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_no_sentence_can_be_left_out(mutant: Mutant) -> None:
    """The weakened protocol breaks, in the way that is named; run with -s for the shortest trace."""
    for head in mutant.heads:
        result = search(mutant.weakened(head), 50_000)
        print(f"without: {mutant.removed}\n{result}")
        assert result.violation is not None, f"nothing broke without: {mutant.removed}\n{result}"
        assert result.violation.prop == mutant.prop, str(result)


def test_the_machine_by_hand() -> None:
    """A claim, an abandon, a takeover, and the former holder's done that comes too late."""
    state, (outcome,) = apply_append(State(), 1, 0, (Line("C", 7),))
    assert outcome == ("claimed", LINES, 1)
    state, (outcome,) = apply_append(state, 2, 0, (Line("Q", 7, LINES),))
    assert outcome.word == "applied"
    state, outcomes = apply_append(state, 3, 1, (Line("C", 7), Line("T", 7, LINES)))
    assert [o.word for o in outcomes] == ["doubt", "claimed"]
    state, (outcome,) = apply_append(state, 4, 0, (Line("D", 7, LINES, late=True),))
    assert outcome.word == "lost"
    entry = state.get(7)
    assert entry is not None
    assert (entry.status, entry.token, entry.attempt) == ("claimed", 3 * LINES + 1, 2)
