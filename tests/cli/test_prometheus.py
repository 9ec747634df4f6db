"""The expressions of the dashboard and the alert rules, asked of a real Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import yaml
from support.ports import free_port
from support.prometheus import DOCS, Prometheus, needs_prometheus, wait_until
from support.streams_by_hand import QKV, HandMadeTransport, ListSource, interleave

from qerl_sync import SyncConfig, SyncSession
from qerl_sync.serving import metrics
from qerl_sync.telemetry.observers import Push
from qerl_sync.telemetry.prometheus import MetricsServer

start_http_server = pytest.importorskip("prometheus_client").start_http_server

DASHBOARD = json.loads((DOCS / "grafana.json").read_text())
ALERTS = {
    rule["alert"]: rule
    for rule in yaml.safe_load((DOCS / "alerts.yml").read_text())["groups"][0]["rules"]
}
# An alert waits for so long before it fires; a test does not.
AT_ONCE = [name for name, rule in ALERTS.items() if "for" not in rule]

pytestmark = [pytest.mark.slow, needs_prometheus]


class Recorded(list[Push]):
    """An observer that keeps each push."""

    __call__ = list.append

    def close(self) -> None:
        pass


def pushes() -> tuple[Push, Push]:
    """Return a sync that was committed, and one that failed, of a real session."""
    transport = HandMadeTransport()
    config = SyncConfig.of(policy="warn", budget_bytes="1KiB")
    found = Recorded()
    session = SyncSession(ListSource(interleave(QKV)), transport, config, observers=[found])
    transport.versions_now = {"worker 0": 1, "worker 1": 1}
    session.push(step=1)
    transport.fail_at = 2
    with pytest.raises(ConnectionError):
        session.push(step=2)
    # `sync.verify: full` asks a real engine for it.
    mismatch = {"total": 1e-4, "sync": 0.0, "noise": 0.0, "quantisation": None, "kernels": 1e-4}
    committed = replace(found[0], report={**(found[0].report or {}), "mismatch": mismatch})
    return committed, found[1]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[MetricsServer, int]]:
    port = free_port()
    server = MetricsServer("127.0.0.1", port)
    yield server, port
    server.close()


@pytest.fixture(scope="module")
def prometheus(served, tmp_path_factory) -> Iterator[Prometheus]:
    """A Prometheus that has scraped two syncs, and nothing that is wrong."""
    server, port = served
    # The registry that vLLM serves as its own `/metrics`.
    metrics.set_states(refusing=False, paused=False)
    metrics.denied(403)
    vllm = free_port()
    http, thread = start_http_server(vllm, "127.0.0.1")
    found = Prometheus(tmp_path_factory.mktemp("prometheus"), grpo=port, vllm=vllm)
    try:
        found.await_series("qerl_sync_server_refusing == 0")
        found.await_series("qerl_sync_syncs_total == 0")  # before the first sync
        for number in (1, 2):
            server(pushes()[0])
            found.await_series(f"qerl_sync_syncs_total == {number}")
        yield found
    finally:
        found.close()
        http.shutdown()
        http.server_close()
        thread.join()


def dashboard() -> list[tuple[str, str]]:
    return [
        (panel["title"], target["expr"].replace("$job", ".*"))
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
    ]


def test_prometheus_takes_the_rules(prometheus):
    (group,) = prometheus.get("rules")["groups"]
    assert {rule["name"] for rule in group["rules"]} == set(ALERTS)

    def evaluated() -> bool:
        (group,) = prometheus.get("rules")["groups"]
        return {rule["health"] for rule in group["rules"]} == {"ok"}

    wait_until(evaluated, "every rule was evaluated without an error")


@pytest.mark.parametrize(("title", "expression"), dashboard())
def test_each_panel_shows_something(prometheus, title, expression):
    prometheus.await_series(expression)
    job = "vllm" if "_server_" in expression else "grpo"
    assert {series["metric"].get("job") for series in prometheus.ask(expression)} == {job}


def test_the_dashboard_finds_the_job(prometheus):
    (variable,) = (v for v in DASHBOARD["templating"]["list"] if v["name"] == "job")
    series = re.fullmatch(r"label_values\((.*), job\)", variable["query"])[1]
    assert prometheus.get("label/job/values", **{"match[]": series}) == ["grpo", "vllm"]


# The last of this file: from here on something is wrong.
def test_alerts_fire_for_what_is_wrong_and_for_nothing_else(served, prometheus):
    assert prometheus.firing() == set()
    assert [name for name, rule in ALERTS.items() if prometheus.ask(rule["expr"])] == []
    server, _ = served
    committed, failed = pushes()
    # The first failure of a run: its counter must not begin with it.
    server(replace(failed, num_poisoned=1))
    wait_until(
        lambda: prometheus.firing() == {"QerlSyncFailing", "QerlSyncWorkersPoisoned"},
        "the failed sync is told",
    )
    report = {
        **committed.report,
        "lost": {"worker 1": "gone"},
        "prediction_exact": False,
        "peak_pinned_bytes_measured": 2 * committed.report["budget_bytes"],
    }
    metrics.set_states(refusing=True, paused=True)
    long_ago = committed.started - 3600
    behind = {"worker 0": committed.version, "worker 1": committed.version - 3}
    server(replace(committed, report=report, versions=behind, started=long_ago, num_poisoned=1))
    wait_until(lambda: prometheus.firing() == set(ALERTS), "every alert")
    found = prometheus.get("alerts")["alerts"]
    firing = {a["labels"]["alertname"] for a in found if a["state"] == "firing"}
    assert set(AT_ONCE) <= firing
    (alert,) = (a for a in found if a["labels"]["alertname"] == "QerlSyncFailing")
    assert alert["annotations"]["summary"] == "A weight sync failed with other"
