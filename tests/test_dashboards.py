"""The dashboards: every metric they name is one that idemp sends, and none that it sends is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from idemp.audit.judge import State
from idemp.ports import OUTCOMES, TIMERS

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "dashboards"
DASHBOARDS = {"graphite": FOLDER / "graphite.json", "grafana": FOLDER / "grafana.json"}
PATH = re.compile(r"\bstats(?:_counts|\.timers)?\.(?:\{[^}]*\}|[^\s,(){}'])+")


def targets(name: str, service: str) -> list[str]:
    """Everything that a dashboard asks Graphite for."""
    board = json.loads(DASHBOARDS[name].read_text())
    if name == "graphite":
        return [target for _, graph in board["graphs"] for target in graph["target"]]
    asked = [target["target"] for panel in board["panels"] for target in panel.get("targets", [])]
    return [target.replace("${service}", service) for target in asked]


def service_variable() -> tuple[str, re.Pattern[str]]:
    """Where Grafana looks for services, and what of a name is the service's."""
    _, variable = json.loads(DASHBOARDS["grafana"].read_text())["templating"]["list"]
    return variable["query"], re.compile(variable["regex"].strip("/"))


def metrics(name: str) -> Iterator[str]:
    """The metrics in them, with ``orders`` and ``new_order`` for the stars and braces written out."""
    for target in targets(name, service="orders"):
        for path in PATH.findall(target):
            full = path.replace("orders_*", "orders_new_order").replace("*", "orders_new_order")
            start, brace, rest = full.partition("{")
            choices, _, end = rest.partition("}")
            yield from (f"{start}{each}{end}" for each in choices.split(",")) if brace else [full]


COUNTER = re.compile(rf"stats_counts\.orders(?:_new_order)?_({'|'.join(OUTCOMES)})")
TIMER = re.compile(rf"stats\.timers\.orders(?:_new_order)?_({'|'.join(TIMERS)})(?:\.(?:median|upper_99))?")


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_metric_is_known(name: str) -> None:
    """N8: an outcome or a timer of idemp.ports, and each of them is on the dashboard."""
    seen = set()
    for metric in metrics(name):
        known = COUNTER.fullmatch(metric) or TIMER.fullmatch(metric)
        assert known, metric
        seen.add(known[1])
    assert seen == {*OUTCOMES, *TIMERS}


def test_the_graphite_dashboard_is_what_its_page_saves() -> None:
    """A graph is a query string and the same as parameters."""
    board: dict[str, Any] = json.loads(DASHBOARDS["graphite"].read_text())
    assert {"name", "timeConfig", "refreshConfig", "graphSize", "defaultGraphParams", "graphs"} == set(board)
    for query, graph in board["graphs"]:
        assert parse_qs(query)["target"] == graph["target"]


def test_the_grafana_dashboard_is_for_any_service_and_any_graphite() -> None:
    """Both are variables; what Graphite lists for the second ends as services' names."""
    board: dict[str, Any] = json.loads(DASHBOARDS["grafana"].read_text())
    source, service = board["templating"]["list"]
    assert (source["name"], source["query"], service["name"]) == ("datasource", "graphite", "service")
    query, regex = service_variable()
    assert TIMER.fullmatch(query.replace("*", "orders"))
    assert [match[1] for match in regex.finditer("shop_eu-1_handler")] == ["shop_eu-1"]
    graphs = [panel for panel in board["panels"] if panel["type"] == "timeseries"]
    assert all(panel["datasource"] == {"type": "graphite", "uid": "${datasource}"} for panel in graphs)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def audit_targets() -> list[str]:
    """Everything that the audit's dashboard asks Graphite for."""
    board = json.loads((FOLDER / "audit.json").read_text())
    return [target["target"] for panel in board["panels"] for target in panel["targets"]]


def test_the_audits_dashboard_asks_for_what_is_sent() -> None:
    """Each state, the difference and the time of the last look, and nothing else."""
    asked = {
        name
        for target in audit_targets()
        for name in re.findall(r"stats\.gauges\.idemp_audit\.(?:\*\.\*\.)?(\w+)", target)
    }
    assert asked == {*State, "difference", "looked"}


def test_the_audits_dashboard_is_for_any_graphite_and_shows_stale() -> None:
    """Where nothing is sent any more it is stale, never what it was."""
    board: dict[str, Any] = json.loads((FOLDER / "audit.json").read_text())
    assert [each["query"] for each in board["templating"]["list"]] == ["graphite"]
    assert all(
        panel["datasource"] == {"type": "graphite", "uid": "${datasource}"} for panel in board["panels"]
    )
    [lamps] = [panel for panel in board["panels"] if panel["type"] == "state-timeline"]
    by_value, nothing = lamps["fieldConfig"]["defaults"]["mappings"]
    names = {code: shown["text"] for code, shown in by_value["options"].items()}
    [target] = [each["target"] for each in lamps["targets"]]
    codes = {code: state for state, code in re.findall(r"\*\.\*\.(\w+),(\d)\)", target)}
    assert names == codes == {str(n): state for n, state in enumerate(State, 1)}
    assert nothing["options"]["result"]["text"] == names["3"] == "stale"
    assert re.search(r"transformNull\(keepLastValue\(.*,5\),3\)", target)
    assert "),'max')" in target  # of several points in one of the picture the worst: no mean of two states
