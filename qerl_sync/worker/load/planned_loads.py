"""Check each load while code of others (vLLM's own engines) receives the weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import AgreementError
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.options import FiniteCheck, SyncOptions
from qerl_sync.plan.diagnosis import diagnose
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.simulator import replay
from qerl_sync.plan.sync_plan import Chunk, SyncPlan, build_plan
from qerl_sync.worker.load.memory import PeakMemory
from qerl_sync.worker.load.receiver import Receiver

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """Report what one worker measured in one sync."""

    version: int  # that it committed
    plan_digest: str
    num_loads: int  # calls of vLLM's `load_weights`
    seconds: float  # from the first tensor to the commit
    predicted: Trace  # from the plan, this worker's layer map and the memory that tensors share
    trace: Trace
    peak_extra_bytes: int | None  # on top of what the worker holds anyway; None: not measured

    def to_json(self) -> dict[str, Any]:
        """Return all but the traces, which are as long as the model has tensors."""
        marks = {}
        for mark in ("peak_buffered_bytes", "peak_pinned_bytes", "max_open_layers"):
            marks[f"{mark}_predicted"] = getattr(self.predicted, mark)
            marks[f"{mark}_measured"] = getattr(self.trace, mark)
        return {
            "version": self.version,
            "plan_digest": self.plan_digest,
            "num_loads": self.num_loads,
            "seconds": self.seconds,
            **marks,
            "prediction_exact": self.trace == self.predicted,
            "first_difference": self.predicted.first_difference(self.trace),
            "peak_extra_bytes": self.peak_extra_bytes,
        }


class PlannedLoads:
    """The plan of a sync whose bytes vLLM's own engine receives, and loads in pieces of its own.

        agree --> start --> load_weights, as often as there are pieces --> finish

    Tensors must stay as they are until `finish`: nothing is copied out.

    Attributes:
        plan: that was agreed on, and waits for its tensors.
        outstanding: how many of them have not been loaded yet; None: no sync has begun.
        last_report: of the last sync that was finished.
    """

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._memory = PeakMemory(receiver.device)
        self._layer_map: LayerMap | None = None
        self._probed: list[ParamMeta] = []
        self.plan: SyncPlan | None = None
        self._finite_check: FiniteCheck = "worker"
        self.outstanding: int | None = None
        self._said: set[str] = set()
        self.last_report: LoadReport | None = None

    def agree(self, plan: SyncPlan, *, finite_check: FiniteCheck = "worker") -> None:
        """Check that this model takes that stream. Raises as `Receiver.layer_map`."""
        self._probe(list(plan.metas))
        self.plan, self._finite_check = plan, finite_check

    def agree_as_given(self, metas: list[ParamMeta]) -> None:
        """Agree to a stream without a plan, in the order given. Raises PlanError, too."""
        self.agree(build_plan(metas, self._probe(metas), "warn"))

    def start(self, storages: Mapping[str, Storage]) -> None:
        """Open the sync that was agreed on. `storages`: the memory behind tensors that share it."""
        plan, layer_map = self.plan, self._layer_map
        if plan is None or layer_map is None:
            raise AgreementError("tensors arrive that no plan was agreed on for")
        self._predicted = replay(plan.metas, layer_map, storages)
        diagnosis = diagnose(plan.metas, self._predicted, layer_map, storages)
        if diagnosis is not None and plan.digest not in self._said:
            logger.warning(diagnosis.text("as it arrives"))
        self._memory.start()
        self._clock, self._num_loads = time.perf_counter(), 0
        self._receiver.start(plan, layer_map, SyncOptions(finite_check=self._finite_check))
        self.outstanding = len(plan.metas)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load a piece, in place of the model's method. Raises as `Receiver.receive`."""
        assert self.outstanding is not None
        piece = list(weights)
        names, nbytes = tuple(name for name, _ in piece), sum(t.nbytes for _, t in piece)
        self._receiver.receive(Chunk(names, nbytes), piece)
        self.outstanding -= len(piece)
        self._num_loads += 1

    def finish(self) -> LoadReport:
        """Commit the next version. Raises CoverageError if tensors are outstanding."""
        assert self.plan is not None
        trace = self._receiver.finish()
        self._receiver.commit(self._receiver.version + 1)
        self.last_report = LoadReport(
            version=self._receiver.version,
            plan_digest=self.plan.digest,
            num_loads=self._num_loads,
            seconds=time.perf_counter() - self._clock,
            predicted=self._predicted,
            trace=trace,
            peak_extra_bytes=self._memory.extra_bytes(),
        )
        self.plan = self.outstanding = None
        # Once for each plan, and once for each difference from its prediction.
        reported = self.last_report.to_json()
        digest, difference = reported["plan_digest"], reported["first_difference"]
        if digest not in self._said:
            logger.info("the first sync with plan %s: %s", digest[:12], reported)
        if difference is not None and difference not in self._said:
            logger.warning("the measured trace differs from the predicted one: %s", difference)
        self._said |= {digest, str(difference)}
        return self.last_report

    def abort(self, reason: str) -> None:
        """Forget what was agreed; a sync that has begun leaves the model poisoned. Idempotent."""
        if self.outstanding is not None:
            self._receiver.abort(reason)
        self.plan = self.outstanding = None

    def _probe(self, metas: list[ParamMeta]) -> LayerMap:
        if self._layer_map is None or metas != self._probed:
            found = self._receiver.layer_map(metas)
            if found.elsewhere:
                raise AgreementError(
                    f"this worker is a pipeline stage that has no place for "
                    f"{min(found.elsewhere)!r}. Whether another stage takes it is not known here: "
                    "vLLM's own engines have no channel between trainer and workers. Start the "
                    "engine with the backend qerl, or with pipeline_parallel_size: 1"
                )
            self._layer_map, self._probed = found, metas
        return self._layer_map
