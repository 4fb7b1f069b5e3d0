"""The kill matrix of the inbox, each cell a test: exactly once, and nothing is ever in doubt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.reliability import inbox
from tests.reliability.inbox import Cell, cells, play
from tests.reliability.matrix import Servers
from tests.reliability.nursery import Nursery
from tests.servers import PostgreSQL, RabbitMQ

SIDE_BY_SIDE = 6

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


@pytest.mark.parametrize("cell", cells(), ids=str)
def test_cell(cell: Cell, played: Mapping[Cell, Future[list[str]]]) -> None:
    """Struck at this step, every message takes effect once, whole, and the rest goes on."""
    assert played[cell].result() == []


def test_every_step_is_named() -> None:
    """Those of the module's docstring are those that are run."""
    told = (inbox.__doc__ or "").partition("A cell is")[0]
    assert {step for step in inbox.STEPS if step in told} == {*inbox.STEPS} == {cell.step for cell in cells()}
