"""Make docs/metrics/README.md out of the table of metrics."""

from __future__ import annotations

from qerl_sync.telemetry.prometheus import METRICS

HEAD = """\
# Metrics

<!-- Made by `python -m qerl_sync.telemetry.document > docs/metrics/README.md`. -->

    sync:
      metrics_port: 9400          # of the (main) trainer process
      metrics_address: 0.0.0.0    # 127.0.0.1 unless Prometheus is on another machine

`http://TRAINER:9400/metrics` then has these, in Prometheus's text format, until the session is
closed. It takes prometheus_client, which vLLM brings. Metrics need no authentication. Gauges are
of the last sync, and appear with the first one. Values of labels are few: phases are fixed,
errors are classes of `qerl_sync.errors` or `other`, and at most 64 workers are named.

| metric | kind | label | |
|---|---|---|---|
"""
TAIL = """\

[grafana.json](grafana.json) is a dashboard of them (import it, choose the data source),
[alerts.yml](alerts.yml) are alert rules. Both were held against the names above by a test, and
not run in a Grafana or a Prometheus.

TRL's own logger gets the numbers of each sync as `sync/*` without any of this (seconds by phase,
bytes sent and not sent, buffered and pinned bytes predicted and measured, open layers, version,
workers, workers lost). With Ray, `TrainerActor` and `PoolSyncCallback` export some of them on
Ray's metrics port besides, where `qerl_sync_version_skew` has a label `worker`.
"""


def page() -> str:
    """Return the page."""
    rows = [
        f"| `{name}{'_total' * (metric.kind == 'counter')}` | {metric.kind} | "
        f"{metric.label and f'`{metric.label}`'} | {metric.text} |\n"
        for name, metric in METRICS.items()
    ]
    return HEAD + "".join(rows) + TAIL


if __name__ == "__main__":
    print(page(), end="")
