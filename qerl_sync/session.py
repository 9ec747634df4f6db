"""A sync session: plans once, pushes every step, reports what it cost."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import PlanError
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.plan.diagnosis import diagnose
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.orders import parse_order
from qerl_sync.plan.sync_plan import SyncPlan, build_plan
from qerl_sync.sources.base import Source
from qerl_sync.transports.base import Transport

if TYPE_CHECKING:
    import torch

    from qerl_sync.config import SyncConfig

logger = logging.getLogger(__name__)

# The share of a worker's free memory that `budget_bytes: auto` takes. vLLM makes a second copy of a
# layer while it processes it, in which the other half goes.
AUTO_SHARE = 0.5

PHASES = ("plan", "start", "gather", "load", "finish", "total")


@dataclass
class SyncReport:
    """What one sync did and cost.

    Attributes:
        version: the weight version that this sync committed, counted from 1.
        step: the trainer's global step.
        seconds: by phase. plan: metadata, layer map, order. start: opening the reload. gather:
            waiting for the source's tensors. load: vLLM's loaders. finish: what is left, derived
            state, caches. total: all of it.
        budget_bytes: what the plan was allowed to pin (`sync.budget_bytes`), in bytes.
        prediction_exact: predicted and measured traces are equal, tensor by tensor.
        first_difference: if not, where they differ first.
    """

    version: int
    step: int
    policy: str
    plan_digest: str
    num_tensors: int
    num_chunks: int
    sent_bytes: int
    seconds: dict[str, float]
    peak_buffered_bytes_predicted: int
    peak_buffered_bytes_measured: int
    peak_pinned_bytes_predicted: int
    peak_pinned_bytes_measured: int
    max_open_layers_predicted: int
    max_open_layers_measured: int
    prediction_exact: bool
    first_difference: str | None
    budget_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Stopwatch:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start


class SyncSession:
    """Pushes a source's weights to vLLM, as often as wanted.

    Called on every trainer rank, in the same order. Not thread-safe.

    Args:
        source: the trainer's weights.
        transport: the way to the workers.
        config: the `sync` section.
        version: the version of the weights that the workers hold now; it only moves forwards.
    """

    def __init__(
        self, source: Source, transport: Transport, config: SyncConfig, *, version: int = 0
    ) -> None:
        self._source = source
        self._transport = transport
        self._config = config
        self._order = parse_order(config.source_order)
        self._metas: list[ParamMeta] | None = None
        self._warned: set[str] = set()
        self.version = version
        self.plan: SyncPlan | None = None
        self.layer_map: LayerMap | None = None
        self.last_trace: Trace | None = None

    def push(self, step: int = 0) -> SyncReport:
        """Send the current weights and commit a new version.

        Raises:
            PlanError, LayerMapError, CoverageError: before the first byte; the workers keep their
                weights and go on.
            CoverageError, LoadError: in the middle; the workers are poisoned and
                refuse to generate until a later push succeeds. The version has not moved.
        """
        watch = _Stopwatch()
        with watch("total"):
            with watch("plan"):
                plan, layer_map = self._agree()
                checked = self._config.check_finite and self._source.check_finite()
            try:
                trace = self._send(plan, layer_map, watch, checked=checked)
            except BaseException as exc:
                self._transport.abort(f"a sync failed: {exc}")
                raise
        self.version += 1
        self.last_trace = trace
        return self._report(plan, trace, step, watch.seconds)

    def storages(self) -> Mapping[str, Storage]:
        """The memory behind each of the source's tensors, where several share one."""
        return self._source.storages()

    def _agree(self) -> tuple[SyncPlan, LayerMap]:
        """The plan for what the source has now: the last one, unless names or shapes changed."""
        metas = self._order([m for m in self._source.metadata() if not self._is_ignored(m.name)])
        if self.plan is None or self.layer_map is None or metas != self._metas:
            layer_map = self._transport.layer_map(
                metas, allow_incomplete=self._config.allow_incomplete
            )
            self.plan = build_plan(
                metas,
                layer_map,
                self._config.policy,
                chunk_bytes=self._config.chunk_bytes,
                storages=self._source.storages(),
                budget_bytes=self._budget_bytes(),
            )
            self.layer_map, self._metas = layer_map, metas
            self._judge(self.plan, layer_map)
        return self.plan, self.layer_map

    def _budget_bytes(self) -> int | None:
        asked = self._config.budget_bytes
        if asked != "auto":
            return asked
        free_bytes = int(self._transport.free_bytes() * AUTO_SHARE)
        return free_bytes + self._source.resident_bytes()

    def _is_ignored(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self._config.ignore_names)

    def _judge(self, plan: SyncPlan, layer_map: LayerMap) -> None:
        """Warn of a plan that opens several layers, once for each distinct one, or refuse it."""
        diagnosis = diagnose(
            plan.metas, plan.predicted, layer_map, self._source.storages(), plan.budget_bytes
        )
        if diagnosis is None or plan.digest in self._warned:
            return
        text = diagnosis.text(self._config.source_order)
        if plan.policy == "error":
            self.plan = None
            raise PlanError(f"{text}\nRefused by `sync: {{policy: error}}`; nothing was sent.")
        self._warned.add(plan.digest)
        logger.warning(text)

    def _send(
        self, plan: SyncPlan, layer_map: LayerMap, watch: _Stopwatch, *, checked: bool
    ) -> Trace:
        with watch("start"):
            check_finite = self._config.check_finite and not checked
            self._transport.start(plan, layer_map, check_finite=check_finite)
        with watch("load"):
            for chunk in plan.chunks:
                tensors = self._source.materialize(chunk.names)
                self._transport.send(chunk, _timed(tensors, watch))
        watch.seconds["load"] -= watch.seconds["gather"]
        with watch("finish"):
            return self._transport.finish()

    def _report(
        self, plan: SyncPlan, trace: Trace, step: int, seconds: dict[str, float]
    ) -> SyncReport:
        difference = plan.predicted.first_difference(trace)
        if difference is not None and difference not in self._warned:
            self._warned.add(difference)
            logger.warning("the measured trace differs from the predicted one: %s", difference)
        return SyncReport(
            version=self.version,
            step=step,
            policy=plan.policy,
            plan_digest=plan.digest,
            num_tensors=len(plan.metas),
            num_chunks=len(plan.chunks),
            sent_bytes=plan.nbytes,
            seconds=seconds,
            peak_buffered_bytes_predicted=plan.predicted.peak_buffered_bytes,
            peak_buffered_bytes_measured=trace.peak_buffered_bytes,
            peak_pinned_bytes_predicted=plan.predicted.peak_pinned_bytes,
            peak_pinned_bytes_measured=trace.peak_pinned_bytes,
            max_open_layers_predicted=plan.predicted.max_open_layers,
            max_open_layers_measured=trace.max_open_layers,
            prediction_exact=difference is None,
            first_difference=difference,
            budget_bytes=plan.budget_bytes,
        )


def _timed(
    tensors: Iterator[tuple[str, torch.Tensor]], watch: _Stopwatch
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same stream; the time spent waiting for it is the phase "gather"."""
    while True:
        with watch("gather"):
            item = next(tensors, None)
        if item is None:
            return
        yield item
