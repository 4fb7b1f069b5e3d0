"""The kill matrix of the inbox, each cell a test: exactly once, and nothing is ever in doubt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from idemp.ports import Done, Doubt, State
from tests.reliability import inbox
from tests.reliability.inbox import Cell, cells, play
from tests.reliability.matrix import IDS, Servers
from tests.reliability.nursery import Nursery
from tests.servers import PostgreSQL, RabbitMQ

SIDE_BY_SIDE = 8

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def played(
    rabbitmq: RabbitMQ,
    postgresql: PostgreSQL,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Mapping[Cell, Future[list[str]]]]:
    """The cells that this run has selected, side by side, in the order of their tests."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    selected = [each["cell"] for each in params if isinstance(each.get("cell"), Cell)]
    with Nursery() as nursery, ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        folder = tmp_path_factory.mktemp("inbox")
        shared = Servers(
            nursery=nursery, amqp=rabbitmq.port, etcd=0, postgresql=postgresql.port, redis=0, folder=folder
        )
        yield {cell: pool.submit(play, shared, cell) for cell in selected}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("cell", list(cells()), ids=str)
def test_cell(cell: Cell, played: Mapping[Cell, Future[list[str]]]) -> None:
    """Struck at this step, every message takes effect once, whole, and the rest goes on."""
    assert played[cell].result() == []


def test_every_step_is_named() -> None:
    """Those of the module's docstring are those that are run."""
    told = (inbox.__doc__ or "").partition("A cell is")[0]
    assert {step for step in inbox.STEPS if step in told} == {*inbox.STEPS} == {cell.step for cell in cells()}


# ------------------------------------------------------------------ the judge is judged


def judged(
    one: Mapping[str, int], two: Mapping[str, int], state: State, lines: list[Any], times: int = 1
) -> list[str]:
    """Of tables that have these ids with these attempts; all states are the same."""
    tables = {
        "one": [(id, 1, attempt) for id, attempt in one.items()] * times,
        "two": [(id, 1, attempt) for id, attempt in two.items()] * times,
    }
    run: Any = SimpleNamespace(
        states=lambda: dict.fromkeys(IDS, state), tail=SimpleNamespace(look=lambda: lines),
        dead=list, said=str,
    )  # fmt: skip
    place: Any = SimpleNamespace(effects=lambda table="one": tables[table])
    return list(inbox.judged(run, place, 1))


def test_the_judge_finds_what_is_planted() -> None:
    """A doubled effect, half of one, a doubt, one that is not done, an attempt of another effect."""
    whole, done = dict.fromkeys(IDS, 1), Done(1, None, None, 0.0, 1)
    assert judged(whole, whole, done, []) == []
    assert len(judged(whole, whole, done, [], times=2)) == len(IDS)
    [half] = judged(whole, {**whole, IDS[3]: 2}, done, [])
    assert half.startswith("half of an effect")
    assert judged(whole, whole, done, [{"r": "doubt", "k": "m1"}]) == ["in doubt: {'r': 'doubt', 'k': 'm1'}"]
    assert len(judged(whole, whole, Doubt(1, 1, "s", 0.0), [])) == len(IDS)
    assert len(judged(whole, whole, Done(1, None, None, 0.0, 2), [])) == len(IDS)
    assert len(judged(dict.fromkeys(IDS, 3), dict.fromkeys(IDS, 3), Done(1, None, None, 0.0, 3), [])) == len(
        IDS
    )
