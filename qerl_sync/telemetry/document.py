"""Print the tables of docs/metrics/README.md: `python -m qerl_sync.telemetry.document`."""

from __future__ import annotations

from collections.abc import Mapping

from qerl_sync.telemetry.prometheus import METRICS, SERVER_METRICS, Metric

HEAD = """\
| metric | kind | label | |
|---|---|---|---|
"""


def table(metrics: Mapping[str, Metric]) -> str:
    """Return a table of these metrics in Markdown, with the names under which they are served."""
    rows = [
        f"| `{name}{'_total' * (metric.kind == 'counter')}` | {metric.kind} | "
        f"{metric.label and f'`{metric.label}`'} | {metric.text} |\n"
        for name, metric in metrics.items()
    ]
    return HEAD + "".join(rows)


if __name__ == "__main__":
    print(table(METRICS), table(SERVER_METRICS), sep="\n", end="")
