"""Export the cost of syncs as Ray metrics: on each node's metrics port, and in the dashboard."""

from __future__ import annotations

from collections.abc import Mapping

from qerl_sync.integrations.ray.cluster import require_ray
from qerl_sync.session import SyncReport


class SyncMetrics:
    """The metrics of one trainer. Make it where Ray runs.

    qerl_sync_seconds (phase), qerl_sync_bytes_total, qerl_sync_peak_pinned_bytes,
    qerl_sync_weight_version, qerl_sync_version_skew (worker): how many versions a worker is behind.
    """

    def __init__(self) -> None:
        require_ray()
        from ray.util.metrics import Counter, Gauge

        self._seconds = Gauge("qerl_sync_seconds", "Seconds of the last sync.", ("phase",))
        self._bytes = Counter("qerl_sync_bytes_total", "Bytes of weights sent.")
        self._peak = Gauge("qerl_sync_peak_pinned_bytes", "Most that tensors held on a worker.")
        self._version = Gauge("qerl_sync_weight_version", "The version last committed.")
        self._skew = Gauge("qerl_sync_version_skew", "Versions that it is behind.", ("worker",))

    def record(self, report: SyncReport, versions: Mapping[str, int]) -> None:
        for phase, seconds in report.seconds.items():
            self._seconds.set(seconds, {"phase": phase})
        self._bytes.inc(report.sent_bytes)
        self._peak.set(report.peak_pinned_bytes_measured)
        self._version.set(report.version)
        for worker, version in versions.items():
            self._skew.set(report.version - version, {"worker": worker})
