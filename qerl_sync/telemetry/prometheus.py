"""Prometheus metrics of a session's syncs. prometheus_client is imported when they are served.

`METRICS` and `updated` say what they are; Ray's metrics (integrations/ray/metrics.py) are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from qerl_sync import errors
from qerl_sync.errors import ConfigError, SyncError
from qerl_sync.telemetry.observers import Push

# Workers that have a label of their own: the first by name. Gauges without it count all.
LABELLED_WORKERS = 64
OTHER = "other"
# The values of the label `error`: our own classes are known to be few.
ERRORS = (
    *(n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, SyncError)),
    OTHER,
)

Values = dict[str, dict[str, float]]  # by metric, by label; "" where it has none


class Metric(NamedTuple):
    """A metric's kind, label and text; docs/metrics is made of them."""

    kind: str
    label: str
    text: str


# Units are in the names. Gauges are of the last sync, and none is set before the first.
METRICS = {
    "qerl_sync_syncs": Metric("counter", "", "Syncs that were committed."),
    "qerl_sync_failures": Metric(
        "counter", "error", "Syncs that failed, by the class of their error in qerl_sync.errors."
    ),
    "qerl_sync_phase_seconds": Metric(
        "counter", "phase", "Seconds of all syncs on the trainer, by phase; total is all of them."
    ),
    "qerl_sync_seconds": Metric("gauge", "phase", "Seconds of the last sync, by phase."),
    "qerl_sync_bytes": Metric("counter", "", "Bytes of weights sent, to each worker."),
    "qerl_sync_skipped_bytes": Metric(
        "counter",
        "",
        "Bytes of weights that were not sent because they could not have changed, "
        "or have not (sync.delta).",
    ),
    "qerl_sync_peak_buffered_bytes": Metric(
        "gauge", "", "Most bytes that vLLM held for open parent layers, on the fullest worker."
    ),
    "qerl_sync_peak_pinned_bytes": Metric(
        "gauge", "", "Most bytes that they kept alive, on the fullest worker: the budget's measure."
    ),
    "qerl_sync_budget_bytes": Metric("gauge", "", "sync.budget_bytes, where there is one."),
    "qerl_sync_open_layers": Metric("gauge", "", "Most parent layers that were open at once."),
    "qerl_sync_prediction_exact": Metric(
        "gauge", "", "1: every worker held what was predicted, tensor by tensor. 0: it did not."
    ),
    "qerl_sync_mismatch": Metric(
        "gauge",
        "part",
        "With sync.verify: full: the largest difference between a prompt's log-probabilities on "
        "the trainer and on an engine, by what makes it; total is all of it.",
    ),
    "qerl_sync_weight_version": Metric("gauge", "", "The version that was committed last."),
    "qerl_sync_worker_version": Metric(
        "gauge", "worker", f"The version of each of the first {LABELLED_WORKERS} workers known."
    ),
    "qerl_sync_version_skew": Metric(
        "gauge", "", "Versions that the worker furthest behind is behind; unknown ones count as 0."
    ),
    "qerl_sync_workers": Metric("gauge", "", "Workers whose version is known."),
    "qerl_sync_lost_workers": Metric("gauge", "", "Workers that the last sync went without."),
    "qerl_sync_poisoned_workers": Metric(
        "gauge", "", "Workers known to refuse to generate until a sync succeeds."
    ),
    "qerl_sync_last_success_timestamp_seconds": Metric(
        "gauge", "", "When the last committed sync began, in seconds since the epoch."
    ),
}

# Of a vLLM server with our middleware (serving/metrics.py), in its own /metrics.
SERVER_METRICS = {
    "qerl_sync_server_syncs": Metric("counter", "", "Syncs that the server has committed."),
    "qerl_sync_server_weight_version": Metric(
        "gauge", "", "The version that was committed last, where it is a number."
    ),
    "qerl_sync_server_refusing": Metric(
        "gauge", "", "1: the weights are invalid, and requests that generate get 503. Else 0."
    ),
    "qerl_sync_server_paused": Metric("gauge", "", "1: the engine is paused, and requests wait."),
    "qerl_sync_server_paused_seconds": Metric(
        "counter", "", "Seconds for which it was paused, as of its last resume."
    ),
    "qerl_sync_server_denied_requests": Metric(
        "counter", "status", "Requests that were denied: 503 while refusing, 403 without a proof."
    ),
}


def at_start() -> Values:
    """Return the metrics before the first push.

    Counters begin at 0: Prometheus cannot see the increase of one that begins with the first
    failure, and an alert on failures would miss it.
    """
    found: Values = {
        name: {"": 0.0} if metric.kind == "counter" and not metric.label else {}
        for name, metric in METRICS.items()
    }
    return found | {"qerl_sync_failures": dict.fromkeys(ERRORS, 0.0)}


class MetricsServer:
    """An HTTP server with the metrics of one session, until the session is closed.

    Raises:
        ConfigError: prometheus_client is missing, or the port cannot be opened.
    """

    def __init__(self, address: str, port: int) -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError as exc:
            raise ConfigError(
                "sync.metrics_port needs prometheus_client, which is not installed; "
                "pip install prometheus-client"
            ) from exc
        self._values = at_start()
        # A registry of our own: the default one is vLLM's where it runs in this process.
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, address, registry)
        except OSError as exc:
            raise ConfigError(
                f"sync.metrics_port: {address}:{port} cannot be opened ({exc}); choose another port"
            ) from exc

    def __call__(self, push: Push) -> None:
        # Replaced as a whole: the server's thread may be reading.
        self._values = updated(self._values, push)

    def collect(self) -> Iterator[Any]:
        """Yield the metrics, as prometheus_client asks for them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, values in self._values.items():
            metric = METRICS[name]
            family = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}[metric.kind]
            found = family(name, metric.text, labels=[metric.label] if metric.label else [])
            for label, value in values.items():
                found.add_metric([label] if metric.label else [], value)
            yield found

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def updated(values: Values, push: Push) -> Values:
    """Return the metrics after a push."""
    found = {name: dict(labelled) for name, labelled in values.items()}

    def count(name: str, amount: float, label: str = "") -> None:
        found[name][label] = found[name].get(label, 0.0) + amount

    for phase, seconds in push.seconds.items():
        count("qerl_sync_phase_seconds", seconds, phase)
    if push.error is not None:
        name = type(push.error).__name__
        count("qerl_sync_failures", 1, name if name in ERRORS else OTHER)
    report, versions = push.report, dict(sorted(push.versions.items()))
    if report is not None:
        count("qerl_sync_syncs", 1)
        count("qerl_sync_bytes", report["sent_bytes"])
        count("qerl_sync_skipped_bytes", report["unsent_bytes"])
        budget, mismatch = report["budget_bytes"], report["mismatch"] or {}
        found |= {
            "qerl_sync_seconds": dict(push.seconds),
            "qerl_sync_peak_buffered_bytes": {"": report["peak_buffered_bytes_measured"]},
            "qerl_sync_peak_pinned_bytes": {"": report["peak_pinned_bytes_measured"]},
            "qerl_sync_budget_bytes": {} if budget is None else {"": budget},
            "qerl_sync_open_layers": {"": report["max_open_layers_measured"]},
            "qerl_sync_prediction_exact": {"": int(report["prediction_exact"])},
            "qerl_sync_mismatch": {p: gap for p, gap in mismatch.items() if gap is not None},
            "qerl_sync_lost_workers": {"": len(report["lost"])},
            "qerl_sync_last_success_timestamp_seconds": {"": push.started},
        }
    behind = (push.version - version for version in versions.values())
    return found | {
        "qerl_sync_poisoned_workers": {"": push.num_poisoned},
        "qerl_sync_weight_version": {"": push.version},
        "qerl_sync_workers": {"": len(versions)},
        "qerl_sync_worker_version": dict(list(versions.items())[:LABELLED_WORKERS]),
        "qerl_sync_version_skew": {"": max(behind, default=0)},
    }
