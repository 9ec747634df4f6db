"""Export what the guard knows of a server's weights, in vLLM's own `/metrics`.

With several API servers for one engine, prometheus_client adds up counters and takes the largest of
each gauge.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any

from qerl_sync.telemetry.prometheus import SERVER_METRICS


@cache  # a registry takes a name once
def _metrics() -> dict[str, Any]:
    """Return the metrics by name, in prometheus_client's default registry, which vLLM serves."""
    from prometheus_client import Counter, Gauge

    found: dict[str, Any] = {}
    for name, (kind, label, text) in SERVER_METRICS.items():
        labels = (label,) if label else ()
        found[name] = (
            Counter(name, text, labels)
            if kind == "counter"
            else Gauge(name, text, labels, multiprocess_mode="livemax")
        )
    return found


def committed(version: object) -> None:
    _metrics()["qerl_sync_server_syncs"].inc()
    with suppress(TypeError, ValueError):  # another library's trainer may give it a name
        _metrics()["qerl_sync_server_weight_version"].set(float(str(version)))


def denied(status: int) -> None:
    _metrics()["qerl_sync_server_denied_requests"].labels(str(status)).inc()


def resumed(paused_seconds: float) -> None:
    _metrics()["qerl_sync_server_paused_seconds"].inc(paused_seconds)


def set_states(*, refusing: bool, paused: bool) -> None:
    _metrics()["qerl_sync_server_refusing"].set(refusing)
    _metrics()["qerl_sync_server_paused"].set(paused)
