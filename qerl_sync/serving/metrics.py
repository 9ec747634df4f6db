"""Export what the guard knows of a server's weights, in vLLM's own `/metrics`."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any

from qerl_sync.telemetry.prometheus import SERVER_METRICS


class ServingMetrics:
    """Counters and gauges in prometheus_client's default registry, which vLLM serves.

    With several API servers for one engine, prometheus_client adds up counters and takes the
    largest of each gauge.
    """

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge

        self._metrics: dict[str, Any] = {}
        for name, (kind, label, text) in SERVER_METRICS.items():
            labels = (label,) if label else ()
            self._metrics[name] = (
                Counter(name, text, labels)
                if kind == "counter"
                else Gauge(name, text, labels, multiprocess_mode="livemax")
            )

    def committed(self, version: object) -> None:
        self._metrics["qerl_sync_server_syncs"].inc()
        with suppress(TypeError, ValueError):  # a trainer of somebody else's may name it by words
            self._metrics["qerl_sync_server_weight_version"].set(float(str(version)))

    def denied(self, status: int) -> None:
        self._metrics["qerl_sync_server_denied_requests"].labels(str(status)).inc()

    def resumed(self, paused_seconds: float) -> None:
        self._metrics["qerl_sync_server_paused_seconds"].inc(paused_seconds)

    def set_states(self, *, refusing: bool, paused: bool) -> None:
        self._metrics["qerl_sync_server_refusing"].set(refusing)
        self._metrics["qerl_sync_server_paused"].set(paused)


@cache
def serving_metrics() -> ServingMetrics:
    """Return those of this process: a registry takes a name once."""
    return ServingMetrics()
