"""Colocated: trainer and vLLM worker share a process, tensors are passed by reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qerl_sync.engines.llm import LLMClient
from qerl_sync.errors import PlanError
from qerl_sync.meta import ParamMeta
from qerl_sync.options import MapOptions, SyncOptions
from qerl_sync.plan.adapter import Adapter
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.sync_plan import Chunk, SyncPlan
from qerl_sync.transports.base import (
    EngineFacts,
    SyncResult,
    Transport,
    WorkerReport,
    require_emptied,
    still_cached,
)
from qerl_sync.worker.compat.caches import connector_of

if TYPE_CHECKING:
    import torch


class InProcessTransport(Transport):
    """Hands chunks to the model of a vLLM `LLM` that runs in this process. Copies nothing.

    Example:
        llm = LLM(path, enforce_eager=True)  # with VLLM_ENABLE_V1_MULTIPROCESSING=0
        with SyncSession(HFSource(model), InProcessTransport(llm), SyncConfig()) as session:
            session.push(step=1)

    Args:
        llm: the engine. After each sync its caches are emptied: cached keys, values and
            embeddings belong to the old weights.

    Raises:
        CompatError: the engine's model is in another process, or vLLM lacks layerwise reload.
        StaleCacheError: the engine has a cache connector that cannot be emptied.
    """

    by_reference = True
    chunk_bytes = None

    def __init__(self, llm: Any) -> None:
        from qerl_sync.worker.compat import cpu_segments
        from qerl_sync.worker.compat import engine as compat
        from qerl_sync.worker.load.receiver import Receiver

        self._client = LLMClient(llm)
        parts = compat.in_process_parts(llm)
        self._connector, keeps = connector_of(parts.vllm_config)
        require_emptied(self._connector, keeps)
        self._receiver = Receiver(parts)
        # vLLM's external launcher: each process has an engine of its own, with one worker of all.
        self.shares_engine = parts.vllm_config.parallel_config.world_size > 1
        if self.shares_engine:
            cpu_segments.unlink_exchange_segments()
        self._committed: int | None = None

    @property
    def connected(self) -> bool:
        """Return False if another session has synced this model since."""
        return self._committed in (None, self._receiver.version)

    @property
    def versions(self) -> dict[str, int]:
        return {"worker 0": self._receiver.version}

    @property
    def num_poisoned(self) -> int:
        return int(self._receiver.poisoned is not None)

    def require_adapter(self, adapter: Adapter) -> None:
        self._receiver.require_adapter(adapter)

    def layer_map(self, metas: Sequence[ParamMeta], options: MapOptions = MapOptions()) -> LayerMap:
        return self._receiver.layer_map(metas, options)

    def free_bytes(self) -> int:
        return self._receiver.free_bytes()

    def committed_version(self) -> int:
        return self._receiver.version

    @property
    def sends_whole(self) -> str:
        return "the engine is in this process, and nothing travels"

    def holds(self, version: int) -> bool:
        return self._committed == version == self._receiver.version and not self._receiver.poisoned

    def start(self, plan: SyncPlan, layer_map: LayerMap, options: SyncOptions) -> None:
        if options.held is not None and not options.held.issuperset(plan.order):
            raise PlanError(
                "a trainer rank in the engine's own process must hold every tensor itself; "
                "several ranks, each with a part, need RemoteTransport"
            )
        # Between two calls of `generate` only those can be left that a failed one never finished.
        # vLLM keeps them as scheduled, and the next call would wait for them for ever.
        self._client.pause("abort")
        self._version = options.version
        self._predicted = plan.predicted_with(layer_map)
        self._receiver.start(plan, layer_map, options)

    def send(self, chunk: Chunk, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._receiver.receive(chunk, tensors)

    def finish(self) -> SyncResult:
        trace = self._receiver.finish()
        quantisation = self._receiver.quantisation  # an error after the commit would fail a sync
        # Before the commit: a model that would compute with old keys and values must not run.
        if not self._client.reset_caches(running=False):
            raise still_cached(self._connector)
        self._receiver.commit(self._version)
        self._committed = self._version
        costs = self._receiver.costs
        report = WorkerReport(
            worker="worker 0",
            trace=trace,
            predicted=self._predicted,
            seconds={"verify": costs.verify_seconds},
            peak_staged_bytes=costs.peak_staged_bytes,
            kept_bytes=costs.kept_bytes,
            spans=costs.processed_layers,
            quantisation=quantisation,
        )
        return SyncResult(
            workers=[report],
            kind="inproc: the engine's model is in this process",
            verify_seconds=costs.verify_seconds,
        )

    @property
    def engine_facts(self) -> EngineFacts:
        return EngineFacts(*self._receiver.precision, self._receiver.context_tokens)

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        return self._client.prompt_logprobs(token_ids)

    def invalidate(self, reason: str) -> None:
        self._receiver.poison(reason)

    def abort(self, reason: str) -> None:
        self._receiver.abort(reason)
