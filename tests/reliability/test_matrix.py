"""The kill matrix once, each cell a test; and what a judge is worth that never finds anything."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from idemp.ports import Done, Parked
from tests.proxy import Proxy, Way
from tests.reliability import matrix, witness
from tests.reliability.history import Line
from tests.reliability.judge import Evidence, doubled, doubts, judge, windows
from tests.reliability.matrix import Cell, Run, Servers, Verdict, cells, in_suite, play
from tests.reliability.nursery import Nursery
from tests.servers import Etcd, PostgreSQL, RabbitMQ, Redis

SIDE_BY_SIDE = 8
"""Cells at a time: most of each is waiting for a session to be over."""

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def shared(
    rabbitmq: RabbitMQ,
    etcd: Etcd,
    postgresql: PostgreSQL,
    redis: Redis,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Servers]:
    """What all cells share."""
    with Nursery() as nursery:
        folder = tmp_path_factory.mktemp("matrix")
        yield Servers(
            nursery=nursery,
            amqp=rabbitmq.port,
            etcd=etcd.members[0].port,
            postgresql=postgresql.port,
            redis=redis.port,
            folder=folder,
        )


@pytest.fixture(scope="module")
def played(shared: Servers, request: pytest.FixtureRequest) -> Iterator[Mapping[Cell, Future[Verdict]]]:
    """The cells that this run has selected, side by side, in the order of their tests."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    selected = [each["cell"] for each in params if isinstance(each.get("cell"), Cell)]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        yield {cell: pool.submit(play, shared, cell) for cell in selected}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("cell", [cell for cell in cells() if in_suite(cell)], ids=str)
def test_cell(cell: Cell, played: Mapping[Cell, Future[Verdict]]) -> None:
    """Struck at this step, nothing is lost, and every effect beyond the first has a name."""
    verdict = played[cell].result()
    assert not verdict.violations, "\n".join(verdict.violations)


def test_every_place_is_run_or_explained() -> None:
    """No step of the witness is missing, and no reason is given for what is run."""
    steps = re.findall(r"\b[a-z]+\.[a-z_]+\b", (witness.__doc__ or "").partition("life:")[2])
    assert tuple(steps) == matrix.STEPS
    run = {str(cell) for cell in cells()}
    explained = {name for name, _ in matrix.explained()}
    assert not run & explained
    places = len(matrix.STEPS) * len(matrix.ACTIONS) * len(matrix.STORES) * len(matrix.BROKERS)
    assert len({name for name in run if not name.endswith("-park")}) + len(explained) == places
    assert all(cell.action in ("raise", "cut") for cell in _all_places() if matrix.unfit(cell))


def _all_places() -> list[Cell]:
    return [Cell(step, action, "etcd", "rabbitmq") for step in matrix.STEPS for action in matrix.ACTIONS]


# ------------------------------------------------------------------ more than one step at a time


@pytest.mark.parametrize("store", matrix.STORES)
def test_a_poison_message_takes_no_innocent_with_it(shared: Servers, store: str) -> None:
    """F34: it kills whoever runs it, so that two replicas are started anew again and again."""
    ids = [f"m{n}" for n in range(60)]
    with Run(shared, store, "rabbitmq") as run:
        run.send([*ids[:30], "poison", *ids[30:]], poison={"poison": True})
        replicas, deaths = [run.start(), run.start()], 0

        def over() -> bool:
            nonlocal deaths
            for place, pid in enumerate(replicas):
                if shared.nursery.ended(pid) is not None:
                    deaths += 1
                    run.alive.remove(pid)
                    replicas[place] = run.start()
            return run.at_rest()

        run.until(over, "the poison is set aside and all others are done", 90)
        run.end()
        evidence = run.evidence()

    assert judge(evidence) + run.checked(evidence, overlaps=False) == []
    assert isinstance(evidence.states["poison"], Parked)
    parked = {id for id, state in evidence.states.items() if isinstance(state, Parked)}
    assert parked == {"poison"} == evidence.dead.keys()
    effects = [effect for effect in evidence.effects if effect["k"] == "poison"]
    assert len(effects) == deaths <= run.attempts


@pytest.mark.parametrize("store", matrix.STORES)
def test_all_replicas_are_killed_at_once(shared: Servers, store: str) -> None:
    """F25: with several hundred messages in flight; everything drains, and every doubt is on record."""
    ids = [f"m{n}" for n in range(600)]
    with Run(shared, store, "rabbitmq") as run:
        victims = [run.start(prefetch=200) for _ in range(3)]
        for pid in victims:
            run.ready(pid)
        run.send(ids, **{id: {"seconds": 0.005} for id in ids})
        run.until(lambda: len({effect["p"] for effect in run.ledger()}) == 3, "all three are at work")
        run.kill(*victims)
        under_way = len(run.published) - len(run.over())
        for _ in range(3):
            run.start(prefetch=200)
        found = run.finish()
        evidence = run.evidence()

    assert found + judge(evidence) + run.checked(evidence, overlaps=False) == []
    assert under_way >= 300
    assert all(isinstance(state, Done) for state in evidence.states.values())
    assert all(again.named for again in doubled(evidence))


@pytest.mark.parametrize("way", ["questions", "answers"])
@pytest.mark.parametrize("server", ["etcd", "rabbitmq"])
def test_a_garbled_frame_is_no_answer(shared: Servers, server: str, way: Way) -> None:
    """The first byte of what comes next is turned over: the connection is given up, and nothing else.

    It belongs to a frame of HTTP/2 or AMQP.  Of a byte inside a body nobody could tell without TLS.
    """
    ids = [f"m{n}" for n in range(100)]
    with Run(shared, "etcd", "rabbitmq") as run, Proxy(getattr(shared, _PORTS[server])) as proxy:
        run.send(ids, **{id: {"seconds": 0.005} for id in ids})
        run.start(
            store=run.store_at(proxy.port) if server == "etcd" else "",
            transport=run.transport_at(proxy.port) if server == "rabbitmq" else "",
            prefetch=10,
        )
        run.until(lambda: len(run.ledger()) >= 10, "it is at work")
        before = proxy.counts.connections
        proxy.flip(way, 1)
        found = run.finish()
        run.start()
        evidence = run.evidence()

    assert found + judge(evidence) == []
    assert proxy.counts.flipped == 1
    assert proxy.counts.connections > before, "the connection is still in use"
    assert all(isinstance(state, Done) for state in evidence.states.values())


_PORTS = {"etcd": "etcd", "rabbitmq": "amqp"}

# ------------------------------------------------------------------ the judge is judged


def _line(t: int, p: int, f: str, k: str, type: str = "ok", **more: Any) -> Line:
    return {"t": t, "p": p, "f": f, "k": k, "type": type, "op": t, **more}


def _effect(t: int, p: int, k: str, att: int, tok: int) -> Line:
    return {"t": t, "p": p, "k": k, "att": att, "tok": tok}


def clean() -> Evidence:
    """Process 1 is killed after the effect of "a"; 2 takes it over; "b" fails for good and is parked."""
    lines = [
        _line(1, 1, "claim", "a", r="claimed", att=1, tok=1),
        _line(2, 1, "run", "a", "invoke", att=1, tok=1),
        _line(4, 1, "failpoint", "a", action="kill"),
        _line(10, 2, "takeover", "a", r="claimed", att=2, tok=2),
        _line(11, 2, "run", "a", "invoke", att=2, tok=2),
        _line(13, 2, "run", "a", att=2, tok=2),
        _line(14, 2, "complete", "a", r="applied", tok=2, sha="x"),
        _line(15, 2, "ack", "a", "invoke"),
        _line(16, 3, "claim", "a", r="done", tok=2, att=2, sha="x"),
        _line(17, 3, "ack", "a", "invoke"),
        _line(20, 3, "claim", "b", r="claimed", att=1, tok=3),
        _line(21, 3, "run", "b", "invoke", att=1, tok=3),
        _line(23, 3, "run", "b", "fail", att=1, tok=3),
        _line(24, 3, "park", "b", r="applied", tok=3),
        _line(25, 3, "dead", "b", "invoke"),
        _line(26, 3, "dead", "b"),
        _line(27, 3, "ack", "b", "invoke"),
    ]
    return Evidence(
        published={"a": 2, "b": 1},
        lines=lines,
        effects=[_effect(3, 1, "a", 1, 1), _effect(12, 2, "a", 2, 2), _effect(22, 3, "b", 1, 3)],
        states={"a": Done(2, b"", None, 0.0, 2), "b": Parked(3, 1, "failed", 0.0)},
        dead={"b": 1},
    )


def _without(f: str, k: str, **more: Any) -> Evidence:
    evidence = clean()
    gone = {"f": f, "k": k, **more}
    kept = [line for line in evidence.lines if not gone.items() <= line.items()]
    assert len(kept) == len(evidence.lines) - 1
    return replace(evidence, lines=kept)


def _with(*lines: Line, effects: tuple[Line, ...] = ()) -> Evidence:
    evidence = clean()
    lines = tuple(sorted([*evidence.lines, *lines], key=lambda line: line["t"]))
    return replace(evidence, lines=lines, effects=[*evidence.effects, *effects])


PLANTED = {
    "an ack without its cause": ("acknowledged_after_its_end", _without("complete", "a")),
    "an ack before its copy is confirmed": ("acknowledged_after_its_end", _without("dead", "b", type="ok")),
    "more acks than copies": ("acknowledged_after_its_end", _with(_line(28, 3, "ack", "b", "invoke"))),
    "a message is gone": ("nothing_lost", replace(clean(), states={"b": clean().states["b"]})),
    "a parked one is in no queue": ("nothing_lost", replace(clean(), dead={})),
    "an id from nowhere": ("nothing_invented", _with(effects=(_effect(30, 2, "c", 1, 9),))),
    "a dead letter of a done one": ("nothing_invented", replace(clean(), dead={"a": 1, "b": 1})),
    "too many dead letters": ("nothing_invented", replace(clean(), dead={"b": 2})),
    "completed twice": ("done_once", _with(_line(30, 3, "complete", "a", r="applied", tok=4, sha="x"))),
    "another result": ("done_once", _with(_line(30, 3, "claim", "a", r="done", tok=2, att=2, sha="y"))),
    "an old attempt's late effect": ("numbers_grow", _with(effects=(_effect(30, 1, "a", 1, 1),))),
    "a doubt that nobody named": ("effects_are_named", _without("takeover", "a")),
    "more effects than attempts": (
        "effects_are_named",
        replace(clean(), states={**clean().states, "a": Done(2, b"", None, 0.0, 1)}),
    ),
    "a run after its end": (
        "never_run_again",
        _with(
            _line(30, 3, "claim", "a", r="claimed", att=3, tok=5),
            _line(31, 3, "run", "a", "invoke", att=3, tok=5),
        ),
    ),
    "a run without a claim": ("never_run_again", _without("claim", "a", p=1)),
    "two at a time": ("one_at_a_time", _with(_line(12, 1, "deliver", "a"))),
}


def test_the_judge_finds_nothing_in_a_clean_history() -> None:
    assert judge(clean()) == []
    assert [(doubt.k, doubt.att, doubt.true) for doubt in doubts(clean())] == [("a", 2, True)]
    assert [(again.k, again.named) for again in doubled(clean())] == [("a", True)]
    assert windows(clean()) == [2e-9]


@pytest.mark.parametrize("name", PLANTED)
def test_the_judge_finds_what_is_planted(name: str) -> None:
    rule, evidence = PLANTED[name]
    assert rule in {found.partition(":")[0] for found in judge(evidence)}


def test_a_pause_allows_an_overlap_and_nothing_else() -> None:
    """Who was stopped past its session may finish late: its effect has the older token."""
    late = _with(_line(12, 1, "deliver", "a"))
    assert judge(replace(late, paused=frozenset({1}))) == []
    assert judge(replace(_without("complete", "a"), paused=frozenset({1})))
