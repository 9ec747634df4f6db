"""Colocated: trainer and vLLM worker share a process, tensors are passed by reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qerl_sync.buffers.trace import Trace
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.sync_plan import Chunk, SyncPlan
from qerl_sync.transports.base import Transport

if TYPE_CHECKING:
    import torch


class InProcessTransport(Transport):
    """Hands chunks to the model of a vLLM `LLM` that runs in this process. Copies nothing.

    Args:
        llm: the engine. After each sync its prefix cache is emptied: cached keys and values belong
            to the old weights.

    Raises:
        CompatError: the engine's model is in another process, or vLLM lacks layerwise reload.
    """

    def __init__(self, llm: Any) -> None:
        from qerl_sync.worker import compat
        from qerl_sync.worker.receiver import Receiver

        self._llm = llm
        self._receiver = Receiver(compat.in_process_parts(llm))

    def layer_map(
        self,
        metas: Sequence[ParamMeta],
        *,
        allow_incomplete: Sequence[str] = (),
    ) -> LayerMap:
        return self._receiver.layer_map(metas, allow_incomplete=allow_incomplete)

    def free_bytes(self) -> int:
        return self._receiver.free_bytes()

    def start(self, plan: SyncPlan, layer_map: LayerMap, *, check_finite: bool) -> None:
        from qerl_sync.worker import compat

        # Between two calls of `generate` only those can be left that a failed one never finished.
        compat.drop_requests(self._llm)
        self._receiver.start(plan, layer_map, check_finite=check_finite)

    def send(self, chunk: Chunk, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._receiver.receive(chunk, tensors)

    def finish(self) -> Trace:
        trace = self._receiver.finish()
        self._llm.reset_prefix_cache()
        return trace

    def abort(self, reason: str) -> None:
        self._receiver.abort(reason)
