"""docs/metrics says what is served: page, dashboard and alert rules."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from qerl_sync import errors
from qerl_sync.telemetry.document import table
from qerl_sync.telemetry.prometheus import METRICS, SERVER_METRICS

DOCS = Path(__file__).parents[2] / "docs/metrics"
ALL = METRICS | SERVER_METRICS
SERVED = {f"{name}{'_total' * (metric.kind == 'counter')}" for name, metric in ALL.items()}
# A server's version and syncs are those of its trainer.
NOT_DRAWN = {"qerl_sync_server_weight_version", "qerl_sync_server_syncs_total"}
UNITS = ("_bytes", "_seconds", "_bytes_total", "_seconds_total")


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\bqerl_sync_\w+", expression))


def test_the_page_is_up_to_date():
    page, printed = (DOCS / "README.md").read_text(), "python -m qerl_sync.telemetry.document"
    for metrics in (METRICS, SERVER_METRICS):
        assert f"\n\n{table(metrics)}\n" in page, printed
    assert page.count("\n| `qerl_sync_") == len(ALL), printed


def test_units_are_in_the_names():
    for name, metric in ALL.items():
        if metric.text.startswith(("Seconds", "Bytes", "Most bytes")):
            assert name.endswith(UNITS), name


def test_the_dashboard_shows_metrics_that_are_served():
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    assert all(names_in(expression) for expression in expressions)
    assert set().union(*map(names_in, expressions)) == SERVED - NOT_DRAWN
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                (name,) = names_in(target["expr"])
                assert label in ("instance", ALL[name.removesuffix("_total")].label)
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)


def test_the_alert_rules_are_of_metrics_that_are_served():
    (group,) = yaml.safe_load((DOCS / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]:
        assert names_in(rule["expr"])
        assert names_in(rule["expr"]) <= SERVED
        assert {"summary"} <= rule["annotations"].keys()
        assert rule["labels"]["severity"] in ("warning", "critical")
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"])


def test_each_label_is_bounded():
    assert {metric.label for metric in ALL.values()} == {
        "",
        "phase",
        "error",
        "worker",
        "part",
        "status",
    }
    assert len([n for n in vars(errors) if n.endswith("Error")]) < 40
