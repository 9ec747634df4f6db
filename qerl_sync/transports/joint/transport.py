"""Transports of several trainer ranks: each call is made on all of them."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from qerl_sync.errors import StaleBaseError, SyncError
from qerl_sync.meta import ParamMeta, metas_to_json
from qerl_sync.options import MapOptions, SyncOptions
from qerl_sync.plan.adapter import Adapter
from qerl_sync.plan.joint_map import joint_map
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.sync_plan import Chunk, SyncPlan
from qerl_sync.transports.base import EngineFacts, ProbeResult, SyncResult, Transport
from qerl_sync.transports.joint.ranks import TrainerRanks
from qerl_sync.wire.messages import Failure, error_of, failure

if TYPE_CHECKING:
    import torch

_RESULT = TypeAdapter(SyncResult)


class JointTransport(Transport):
    """Each trainer rank to an engine of its own, all in one sync.

    Example:
        transport = JointTransport(InProcessTransport(llm), TrainerRanks())
        with SyncSession(ShardedSource(model), transport, SyncConfig()) as session:
            session.push(step=1)  # on every rank

    A sync that fails on one rank fails on all of them, and poisons all engines that have begun.

    Several ranks may have one engine together, each with a worker of it in its process (vLLM's
    external launcher, `tensor_parallel_size` > 1). Each then loads its own part of each tensor.

    Args:
        own: this rank's way to its engine.
        ranks: all ranks.
    """

    def __init__(self, own: Transport, ranks: TrainerRanks) -> None:
        self._own = own
        self._ranks = ranks
        self.by_reference = own.by_reference
        # Ranks meet before each chunk. With a single chunk, a rank that fails would be noticed only
        # after everything was gathered.
        self.chunk_bytes = own.chunk_bytes or Transport.chunk_bytes
        self.leads = ranks.rank == 0
        self.shares_engine = own.shares_engine
        self._own_map: LayerMap | None = None
        self._committing = False

    def together(self) -> AbstractContextManager[None]:
        return self._ranks.together()

    def meet(self, what: str) -> None:
        self._ranks.meet(what)

    def agree_on(self, metas: Sequence[ParamMeta]) -> None:
        parts = metas_to_json(metas)
        self._ranks.require_same("the tensors to send", _digest(parts), lambda: parts)

    @property
    def versions(self) -> Mapping[str, int]:
        return self._own.versions

    @property
    def num_poisoned(self) -> int:
        return self._own.num_poisoned

    @property
    def connected(self) -> bool:
        return self._own.connected

    def committed_version(self) -> int:
        return int(max(self._ranks.meet("the version", self._own.committed_version())))

    def holds(self, version: int) -> bool:
        return self._own.holds(version)

    def agree_on_base(self, version: int | None) -> bool:
        mine = version if version is not None and self.holds(version) else None
        versions = self._ranks.meet("what the engines hold", mine)
        return mine is not None and all(one == mine for one in versions)

    def agree_on_unchanged(self, names: Collection[str]) -> Collection[str]:
        # Each rank looks at its own shards. Where they differ, everything travels.
        same = self._ranks.meet("what has not changed", _digest(sorted(names)))
        return names if len(set(same)) == 1 else ()

    def require_adapter(self, adapter: Adapter) -> None:
        parts = adapter.to_json()
        self._ranks.require_same("the adapter", _digest(parts), lambda: [parts])
        self._on_all("serving the adapter", SyncError, lambda: self._own.require_adapter(adapter))

    def _on_all(self, what: str, kind: type[SyncError], call: Callable[[], object]) -> None:
        """Make a call on every rank. What one of them raises of that kind, all ranks raise."""
        refusal = None
        try:
            call()
        except kind as exc:
            refusal = failure(exc).model_dump(mode="json")
        for rank, one in enumerate(self._ranks.meet(what, refusal)):
            if one is not None:
                raise error_of(Failure.model_validate(one), f"trainer rank {rank}")

    def layer_map(self, metas: Sequence[ParamMeta], options: MapOptions = MapOptions()) -> LayerMap:
        self._own.source_device = self.source_device
        layer_map = self._own.layer_map(metas, options)
        parts = layer_map.to_json()
        if self.shares_engine:
            self._own_map = layer_map
            of_all = self._ranks.meet("the layer map", parts)
            return joint_map([LayerMap.from_json(one) for one in of_all])
        self._ranks.require_same(
            "the layer map", layer_map.digest, lambda: sorted(parts.items(), key=str)
        )
        return layer_map

    @property
    def sends_whole(self) -> str:
        return "several trainer ranks send"

    def free_bytes(self) -> int:
        return int(min(self._ranks.meet("free memory", self._own.free_bytes())))

    def start(self, plan: SyncPlan, layer_map: LayerMap, options: SyncOptions) -> None:
        said = f"{plan.digest} for version {options.version}"
        self._ranks.require_same(
            "the plan",
            said,
            lambda: (
                metas_to_json(plan.metas)
                + [f"{len(chunk.names)} tensors in a chunk" for chunk in plan.chunks]
                + [said]
            ),
        )
        self._own.watch = self.watch
        self._committing = False
        layer_map = self._own_map or layer_map
        if options.base is None:
            self._own.start(plan, layer_map, options)
            return

        def start() -> None:
            self._own.start(plan, layer_map, options)
            self._own.await_taken()

        # Where one rank's engine has lost what stays, all ranks must send everything instead.
        self._on_all("what stays", StaleBaseError, start)

    def send(self, chunk: Chunk, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._own.send(chunk, tensors)

    def finish(self) -> SyncResult:
        # A commit cannot be taken back: first all ranks have sent the last chunk.
        self._ranks.meet("committing")
        self._committing = self.shares_engine  # other workers of it may commit where this one fails
        result = self._own.finish()
        self._committing = True
        self._ranks.meet("having committed")
        self._committing = False
        return result

    def abort(self, reason: str) -> None:
        self._own.abort(reason)
        if self._committing:
            # This engine, or workers of it, would generate with weights of a sync that has failed.
            self._own.invalidate(reason)
        self._committing = False

    @property
    def engine_facts(self) -> EngineFacts:
        return self._own.engine_facts

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        return self._own.prompt_logprobs(token_ids)

    def probe(self, token_ids: Sequence[int]) -> ProbeResult:
        # Workers of one engine compute together: if one rank failed before it asks, the others
        # would wait in vLLM's collectives.
        self._ranks.meet("asking the engines")
        return self._own.probe(token_ids)

    def invalidate(self, reason: str) -> None:
        self._own.invalidate(reason)

    def close(self) -> None:
        self._own.close()


class LedTransport(JointTransport):
    """Rank 0 to its engines, for all trainer ranks, which gather with it and learn the outcome.

    Example:
        ranks = TrainerRanks()
        own = RemoteTransport(HTTPClient(url)) if ranks.rank == 0 else None
        transport = LedTransport(own, ranks)

    Args:
        own: rank 0's transport; None on the other ranks, which open no connection.
        ranks: all ranks.
    """

    def __init__(self, own: Transport | None, ranks: TrainerRanks) -> None:
        super().__init__(own or Follower(), ranks)

    def committed_version(self) -> int:
        return int(self._ranks.of_leader("the version", self._own.committed_version))

    def layer_map(self, metas: Sequence[ParamMeta], options: MapOptions = MapOptions()) -> LayerMap:
        self._own.source_device = self.source_device

        def asked() -> dict[str, Any]:
            found = self._own.layer_map(metas, options)
            return {
                "layer_map": found.to_json(),
                "chunk_bytes": self.chunk_bytes,
                "engine_facts": self._own.engine_facts,
            }

        told = self._ranks.of_leader("the layer map", asked)
        self.chunk_bytes = told["chunk_bytes"]
        if isinstance(self._own, Follower):
            self._own.told = told
        return LayerMap.from_json(told["layer_map"])

    def free_bytes(self) -> int:
        return int(self._ranks.of_leader("free memory", self._own.free_bytes))

    def start(self, plan: SyncPlan, layer_map: LayerMap, options: SyncOptions) -> None:
        super().start(plan, layer_map, options)
        self.busy_cores = self._own.busy_cores

    def finish(self) -> SyncResult:
        # A commit cannot be taken back: no rank may have failed since the last chunk.
        self._ranks.meet("committing")

        def finish() -> Any:
            result = self._own.finish()
            self._committing = True
            return _RESULT.dump_python(result, mode="json")

        told = self._ranks.of_leader("having committed", finish)
        self._committing = False
        return _RESULT.validate_python(told)

    def probe(self, token_ids: Sequence[int]) -> ProbeResult:
        told = self._ranks.of_leader("asking the engines", lambda: self._own.probe(token_ids))
        return ProbeResult(*told)


class Follower(Transport):
    """The transport of a trainer rank that sends nothing itself: it takes part in the gathers.

    Attributes:
        told: rank 0's answers about the engines.
    """

    told: dict[str, Any]

    def holds(self, version: int) -> bool:
        return True  # rank 0 knows

    def require_adapter(self, adapter: Adapter) -> None:
        pass  # rank 0 asks the engines

    def layer_map(self, metas: Sequence[ParamMeta], options: MapOptions = MapOptions()) -> LayerMap:
        raise NotImplementedError("rank 0 asks the engines")

    def free_bytes(self) -> int:
        raise NotImplementedError("rank 0 asks the engines")

    def start(self, plan: SyncPlan, layer_map: LayerMap, options: SyncOptions) -> None:
        pass

    def send(self, chunk: Chunk, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        deque(tensors, maxlen=0)  # take part in the gathers, keep nothing

    def finish(self) -> SyncResult:
        raise NotImplementedError("rank 0 commits")

    def abort(self, reason: str) -> None:
        pass

    @property
    def engine_facts(self) -> EngineFacts:
        return EngineFacts(*self.told["engine_facts"])


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
