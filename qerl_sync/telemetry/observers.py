"""Describe a push to the observers of a session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.sync_plan import SyncPlan
from qerl_sync.stopwatch import Span
from qerl_sync.transports.base import WorkerReport


@dataclass(frozen=True)
class Push:
    """One call of `SyncSession.push`.

    Attributes:
        number: of this push, counted from 1 in this session.
        version: the last that the session has committed, also if this push failed.
        started: in seconds since the epoch.
        failed_in: the phase in which it failed.
        plan: what was sent; None if it failed before anything was.
        report: `SyncReport.to_json()`; None if the push failed.
        error: why it failed.
        spans: of the trainer; empty unless `sync.trace` asks for them.
        versions: the weight version of each worker, as far as known.
        num_poisoned: how many workers are known to refuse to generate.
    """

    number: int
    step: int
    version: int
    started: float
    seconds: Mapping[str, float]
    failed_in: str
    plan: SyncPlan | None
    layer_map: LayerMap | None
    source_order: str
    report: Mapping[str, Any] | None
    error: BaseException | None
    workers: Sequence[WorkerReport]
    spans: Sequence[Span]
    versions: Mapping[str, int]
    num_poisoned: int


class Observer(Protocol):
    """Takes each push of a session, in the thread that pushes."""

    def __call__(self, push: Push) -> None: ...

    def close(self) -> None: ...
