"""Export the metrics of syncs through Ray: on each node's metrics port, and in the dashboard."""

from __future__ import annotations

from typing import Any

from qerl_sync.integrations.ray.cluster import require_ray
from qerl_sync.telemetry.observers import Push
from qerl_sync.telemetry.prometheus import METRICS, at_start, updated


class RayMetrics:
    """Observer of one session: the metrics of `telemetry.prometheus`, as Ray's counters and gauges.

    Make it where Ray runs.
    """

    def __init__(self) -> None:
        require_ray()
        from ray.util.metrics import Counter, Gauge

        self._values = at_start()
        self._metrics: dict[str, Any] = {}
        for name, (kind, label, text) in METRICS.items():
            labels = (label,) if label else ()
            # Prometheus wants a counter's name to end so, and Ray does not see to it.
            is_counter = kind == "counter"
            self._metrics[name] = (
                Counter(f"{name}_total", text, labels) if is_counter else Gauge(name, text, labels)
            )

    def __call__(self, push: Push) -> None:
        before, self._values = self._values, updated(self._values, push)
        for name, values in self._values.items():
            metric, (kind, label, _) = self._metrics[name], METRICS[name]
            for value_of_label, value in values.items():
                tags = {label: value_of_label} if label else {}
                if kind == "gauge":
                    metric.set(value, tags)
                elif (more := value - before[name].get(value_of_label, 0.0)) > 0:  # Ray takes no 0
                    metric.inc(more, tags)

    def close(self) -> None:
        pass
