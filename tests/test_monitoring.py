"""What Prometheus and Grafana are told to ask for is there, and the dashboard is one that can be read."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.metrics import Metrics
from tests.services import prometheus_rule
from tests.test_metrics import instruments

DEPLOY = Path(__file__).parents[1] / "deploy"
CONFIGURATION = DEPLOY / "prometheus/prometheus.yml"
RULES = sorted((DEPLOY / "prometheus/rules").glob("*.yml"))
DASHBOARD = DEPLOY / "grafana/dashboards/letta-gateway.json"
PROVISIONING = DEPLOY / "grafana/provisioning"


def exposed_names() -> set[str]:
    """Return all names that a scrape may hold: of an instrument with labels nothing is there before its first event."""
    metrics = Metrics()
    for part in instruments(metrics).values():
        if part._labelnames:
            part.labels(*("some",) * len(part._labelnames))
    families = text_string_to_metric_families(metrics.expose().decode())
    return {sample.name for family in families for sample in family.samples}


def names_in(text: str) -> set[str]:
    """Return the metrics that are named: ours, those that rules record, and the process's."""
    found: set[str] = set(
        re.findall(r"\b(?:[a-z_]+:[a-z_0-9]+:[a-z_0-9]+|(?:letta_gateway|process|python_gc)_[a-z_]+)", text)
    )
    return found - {"python_gc_"}


def recorded() -> set[str]:
    return set(re.findall(r"- record: (\S+)", "".join(rules.read_text("utf-8") for rules in RULES)))


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    return found


def expressions() -> str:
    return "\n".join(target["expr"] for panel in panels() for target in panel.get("targets", []))


@pytest.mark.parametrize("rules", RULES, ids=lambda path: path.name)
def test_rules_ask_for_what_is_there(rules: Path) -> None:
    asked = names_in(rules.read_text("utf-8"))
    assert len(asked) > 10
    assert asked <= exposed_names() | recorded()


def test_rules_for_the_prometheus_operator_are_the_same() -> None:
    assert prometheus_rule.MANIFEST.read_text("utf-8") == prometheus_rule.made(), "run: make prometheus-rules"


def test_dashboard_asks_for_what_is_there() -> None:
    asked = names_in(expressions())
    assert len(asked) > 30
    assert asked <= exposed_names() | recorded()


def test_every_instrument_is_asked_for_by_somebody() -> None:
    asked = names_in(expressions() + "".join(rules.read_text("utf-8") for rules in RULES))
    unseen = [
        family.name
        for part in instruments(Metrics()).values()
        for family in part.describe()
        if not any(name.startswith(family.name) for name in asked)
    ]
    assert unseen == []


# The dashboard -------------------------------------------------------------------------------------------------------


def test_every_panel_says_what_it_shows() -> None:
    shown = [panel for panel in panels() if panel["type"] != "row"]
    assert len(shown) > 30
    for panel in shown:
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"], panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["targets"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


def test_panels_are_told_apart_and_do_not_overlap() -> None:
    titles = [panel["title"] for panel in panels() if panel["type"] == "row"]
    assert titles == [
        "Traffic",
        "Latency and first token",
        "Streams, turns and queue",
        "Upstream",
        "Users, billing and ledger",
        "Process",
    ]
    assert len({panel["id"] for panel in panels()}) == len(panels())
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells


def test_dashboard_asks_for_one_job_by_variables_that_it_has() -> None:
    variables = {one["name"] for one in json.loads(DASHBOARD.read_text("utf-8"))["templating"]["list"]}
    assert variables == {"datasource", "job", "instance"}
    for panel in panels():
        for target in panel.get("targets", []):
            assert 'job="$job"' in target["expr"] or "ALERTS" in target["expr"], panel["title"]
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables | {"__rate_interval"}, panel["title"]


# Provisioning --------------------------------------------------------------------------------------------------------


def read(path: Path) -> Any:
    return importlib.import_module("yaml").safe_load(path.read_text("utf-8"))


def test_grafana_asks_as_often_as_prometheus_does() -> None:
    (source,) = read(PROVISIONING / "datasources/letta-gateway.yml")["datasources"]
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == read(CONFIGURATION)["global"]["scrape_interval"]


def test_grafana_finds_the_dashboard() -> None:
    (provider,) = read(PROVISIONING / "dashboards/letta-gateway.yml")["providers"]
    assert (provider["type"], provider["allowUiUpdates"]) == ("file", False)
    board = json.loads(DASHBOARD.read_text("utf-8"))
    assert board["uid"] == DASHBOARD.stem
    assert board["schemaVersion"] >= 36, "of Grafana 10"
    assert "id" not in board, "Grafana gives it one"
