"""Make docs/metrics/README.md out of the table of metrics."""

from __future__ import annotations

from collections.abc import Mapping

from qerl_sync.telemetry.prometheus import METRICS, SERVER_METRICS, Metric

HEAD = """\
# Metrics

<!-- Made by `python -m qerl_sync.telemetry.document > docs/metrics/README.md`. -->

```yaml
sync:
  metrics_port: 9400          # of the (main) trainer process
  metrics_address: 0.0.0.0    # 127.0.0.1 unless Prometheus is on another machine
```

`http://TRAINER:9400/metrics` then has these, in Prometheus's text format, until the session is
closed. It takes prometheus_client, which vLLM brings. Metrics need no authentication. Gauges are
of the last sync, and appear with the first one; counters begin at 0. Values of labels are few:
phases are fixed, errors are classes of `qerl_sync.errors` or `other`, and at most 64 workers are
named.

"""
TABLE = """\
| metric | kind | label | |
|---|---|---|---|
"""
TAIL = """\

[grafana.json](grafana.json) is a dashboard of them (import it, choose the data source), and
[alerts.yml](alerts.yml) are alert rules. A test loads the rules into a Prometheus (2.42) that
scrapes syncs, and asks it for every expression of both: each panel has a series, no rule fires
while all is well, and each fires for what it is about. The dashboard was not opened in a Grafana.

A trainer that ends with its failed sync may be gone before it is scraped again: alert on `up` of
its job as well.

## A server

A vLLM server with our middleware (`qerl-sync serve`, or `--middleware`) has these among its own,
at its own `/metrics`:

{server}
## TRL's logger

wandb, TensorBoard, trackio and TRL's console get the numbers of each sync as `sync/*` without any
of this: `sync/seconds/PHASE`, `bytes`, `unsent_bytes`, `wire_bytes`, `peak_buffered_bytes` and
`peak_pinned_bytes` (and both `_predicted`), `open_layers`, `version`, `prediction_exact`,
`workers`, `lost_workers`, and where there is one `noise/*` and `mismatch/*`.

## Ray

`TrainerActor` and `PoolSyncCallback` export the same metrics through Ray, on each node's metrics
port and in its dashboard, where Ray puts `ray_` in front of their names. A counter of Ray's begins
with its first increase.
"""


def page() -> str:
    """Return the page."""
    return HEAD + _table(METRICS) + TAIL.format(server=_table(SERVER_METRICS))


def _table(metrics: Mapping[str, Metric]) -> str:
    rows = [
        f"| `{name}{'_total' * (metric.kind == 'counter')}` | {metric.kind} | "
        f"{metric.label and f'`{metric.label}`'} | {metric.text} |\n"
        for name, metric in metrics.items()
    ]
    return TABLE + "".join(rows)


if __name__ == "__main__":
    print(page(), end="")
