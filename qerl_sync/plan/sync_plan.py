"""The plan of a sync: order, chunks and predicted trace, made before any byte moves."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import PlanError
from qerl_sync.meta import ParamMeta, Storage, format_bytes, metas_from_json, metas_to_json
from qerl_sync.plan.adapter import Adapter
from qerl_sync.plan.budget import order_within_budget
from qerl_sync.plan.chunks import Chunk as Chunk
from qerl_sync.plan.chunks import cut_anywhere, cut_between_layers
from qerl_sync.plan.layer_map import LayerMap, Loading
from qerl_sync.plan.policies import by_parent_layer
from qerl_sync.plan.simulator import Simulator, replay
from qerl_sync.plan.spill import CHUNK_BYTES, Spill, plan_spill

PLAN_FORMAT = 1


@dataclass(frozen=True)
class SyncPlan:
    """An immutable value; it holds no tensor. Trainer and worker agree on its `digest`.

    Attributes:
        policy: the policy that made the order.
        metas: the stream in the order in which it will be sent.
        chunks: `metas`, cut.
        predicted: the trace of the order in which vLLM gets it, which is this one but for `spill`.
        as_given: the trace of the source's own order, for comparison.
        layer_map_digest: the layer map that it was planned with.
        budget_bytes: the budget that it was planned with.
        spill: with the policy `spill`, what the worker stages and when it loads.
        adapter: a LoRA adapter whose tensors are the last of `metas`, in chunks of their own.
            vLLM's loaders do not see them, and no trace has them.
        loading: of each parent layer that the stream fills, how it is loaded. Deferred ones are not
            in it.
        storages: the memory behind each tensor as it arrives, where several share one. Of the
            trainer's process alone: neither in the digest nor in the JSON.
    """

    policy: str
    metas: tuple[ParamMeta, ...]
    chunks: tuple[Chunk, ...]
    predicted: Trace
    as_given: Trace
    layer_map_digest: str
    budget_bytes: int | None = None
    spill: Spill | None = None
    adapter: Adapter | None = None
    loading: Mapping[str, Loading] = field(default_factory=dict)
    storages: Mapping[str, Storage] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def base_metas(self) -> tuple[ParamMeta, ...]:
        """Return the tensors that vLLM's loaders get, in the order in which they will be sent."""
        return self.metas[: len(self.metas) - (len(self.adapter.metas) if self.adapter else 0)]

    @cached_property
    def base_chunks(self) -> tuple[Chunk, ...]:
        """Return the chunks that hold `base_metas`."""
        last = self.base_metas[-1].name if self.base_metas else None
        ends = [i + 1 for i, chunk in enumerate(self.chunks) if chunk.names[-1] == last]
        return self.chunks[: ends[0] if ends else 0]

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(meta.name for meta in self.metas)

    @property
    def nbytes(self) -> int:
        return sum(meta.nbytes for meta in self.metas)

    @cached_property
    def chunk_metas(self) -> tuple[tuple[ParamMeta, ...], ...]:
        """Return `metas`, cut as `chunks` are."""
        rest = iter(self.metas)
        return tuple(tuple(islice(rest, len(chunk.names))) for chunk in self.chunks)

    @cached_property
    def load_metas(self) -> tuple[ParamMeta, ...]:
        """Return the stream in the order in which vLLM gets it."""
        if self.spill is None:
            return self.base_metas
        return tuple(self.metas[place] for place in self.spill.load_order)

    @cached_property
    def chunk_loads(self) -> tuple[tuple[str, ...], ...]:
        """Return the names that vLLM gets with each chunk."""
        if self.spill is None:
            return tuple(chunk.names for chunk in self.base_chunks)
        order = self.order
        return tuple(tuple(order[place] for place in places) for places in self.spill.loads)

    @cached_property
    def peak_staged_bytes(self) -> int:
        """Return the most bytes that the worker will stage in host memory at once."""
        return max(self.staged_bytes, default=0)

    @property
    def staged_bytes(self) -> list[int]:
        """Return the bytes that are staged after each chunk, which is when most are."""
        if self.spill is None:
            return [0] * len(self.chunks)
        staged = self.spill.staged_bytes(self.base_metas, self.base_chunk_lengths)
        return staged + [0] * (len(self.chunks) - len(staged))

    def predicted_with(self, layer_map: LayerMap) -> Trace:
        """Return the predicted trace of a worker with that layer map: where the plan was made for
        several workers, each may hold another part of the model."""
        if layer_map.digest not in self._predicted:
            self._predicted[layer_map.digest] = replay(self.load_metas, layer_map, self.storages)
        return self._predicted[layer_map.digest]

    @cached_property
    def _predicted(self) -> dict[str, Trace]:
        # By layer map: a plan is sent many times.
        return {self.layer_map_digest: self.predicted}

    @property
    def base_chunk_lengths(self) -> list[int]:
        return [len(chunk.names) for chunk in self.base_chunks]

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 of the stream and its cuts, not of the predicted cost."""
        agreed = {
            "format": PLAN_FORMAT,
            "metas": metas_to_json(self.metas),
            "chunks": [len(chunk.names) for chunk in self.chunks],
            "layer_map": self.layer_map_digest,
        }
        if self.spill is not None:
            agreed["spill"] = self.spill.to_json()
        if self.adapter is not None:
            agreed["adapter"] = self.adapter.to_json()
        return hashlib.sha256(json.dumps(agreed, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "format": PLAN_FORMAT,
            "digest": self.digest,
            "policy": self.policy,
            "budget_bytes": self.budget_bytes,
            "spill": None if self.spill is None else self.spill.to_json(),
            "adapter": None if self.adapter is None else self.adapter.to_json(),
            "layer_map_digest": self.layer_map_digest,
            "metas": metas_to_json(self.metas),
            "chunks": [asdict(chunk) for chunk in self.chunks],
            "predicted": self.predicted.to_json(),
            "as_given": self.as_given.to_json(),
            "loading": dict(self.loading),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SyncPlan:
        """Read a plan. Raise PlanError for another format, a digest that does not hold, or tensors
        that cannot be staged as it says."""
        if data.get("format") != PLAN_FORMAT:
            raise PlanError(
                f"plan format {data.get('format')!r} cannot be read here, only {PLAN_FORMAT}; "
                "make the plan again with this version of qerl-sync"
            )
        plan = cls(
            policy=data["policy"],
            metas=tuple(metas_from_json(data["metas"])),
            chunks=tuple(Chunk(**{**c, "names": tuple(c["names"])}) for c in data["chunks"]),
            predicted=Trace.from_json(data["predicted"]),
            as_given=Trace.from_json(data["as_given"]),
            layer_map_digest=data["layer_map_digest"],
            budget_bytes=data.get("budget_bytes"),
            spill=None if data.get("spill") is None else Spill.from_json(data["spill"]),
            adapter=None if data.get("adapter") is None else Adapter.from_json(data["adapter"]),
            loading=data.get("loading", {}),
        )
        if plan.digest != data["digest"]:
            raise PlanError(
                f"the plan was changed after it was made: its digest is {plan.digest[:12]}, "
                f"the file says {str(data['digest'])[:12]}; make the plan again"
            )
        if plan.spill is not None:
            plan.spill.require_possible(plan.base_chunk_lengths)
            plan.spill.require_within_budget(plan.base_metas, plan.base_chunk_lengths)
        return plan

    @cached_property
    def emptied(self) -> SyncPlan:
        """Return the plan that sends nothing, with the same layer map."""
        none = Trace.of_columns((), (), (), ())
        return replace(
            self, metas=(), chunks=(), predicted=none, as_given=none, spill=None, loading={}
        )

    def with_adapter(self, adapter: Adapter, chunk_bytes: int | None) -> SyncPlan:
        """Return the plan that sends the adapter after this one's tensors, which may be none.

        Args:
            chunk_bytes: upper bound of a chunk, as in `build_plan`.
        """
        chunks = cut_anywhere(adapter.metas, chunk_bytes or CHUNK_BYTES)
        return replace(
            self,
            metas=(*self.metas, *adapter.metas),
            chunks=(*self.chunks, *chunks),
            adapter=adapter,
        )


def build_plan(
    metas: Sequence[ParamMeta],
    layer_map: LayerMap,
    policy: str,
    *,
    chunk_bytes: int | None = None,
    storages: Mapping[str, Storage] | None = None,
    budget_bytes: int | None = None,
    spill_budget_bytes: int | None = None,
    spill_directory: str | None = None,
) -> SyncPlan:
    """Plan the stream `metas` (in source order). Touches no tensor and no device.

    Args:
        policy: `sync.policy`. `warn` and `error` keep the source's order; so does `spill`, and the
            worker loads in another one.
        chunk_bytes: upper bound of a chunk's bytes where layers can be kept whole; None: one chunk
            (with the policy `spill`: chunks of 64 MiB).
        storages: the memory behind each tensor, where several share one.
        budget_bytes: with the policy `reorder` the order is that of `within_budget`; the others
            leave the order alone, and `diagnose` tells whether it stays within the budget.
        spill_budget_bytes, spill_directory: see `Spill`; for the policy `spill` alone.

    Raises:
        PlanError: the stream names a tensor twice, or no order can be kept within the budget, or
            (policy `spill`) one of the two budgets is too small.
    """
    counts = Counter(meta.name for meta in metas)
    if len(counts) != len(metas):
        doubled = [name for name, count in counts.items() if count > 1]
        raise PlanError(
            f"the source yields {doubled[0]!r} {counts[doubled[0]]} times"
            + (f" ({len(doubled)} names are doubled)" if len(doubled) > 1 else "")
            + "; vLLM would count it twice and close its layer on memory that was never written. "
            "Yield each checkpoint name once",
            tensor=doubled[0],
        )
    storages = storages or {}
    simulator = Simulator(metas, layer_map, storages)
    given = simulator.trace()
    ordered = list(metas)
    spill: Spill | None = None
    if policy == "spill":
        chunks = cut_anywhere(metas, chunk_bytes or CHUNK_BYTES)
        lengths = [len(chunk.names) for chunk in chunks]
        spill = plan_spill(
            metas,
            layer_map,
            lengths,
            budget_bytes=spill_budget_bytes,
            directory=spill_directory,
        )
        # Staged tensors are copies: they no longer keep the source's storages alive.
        copied = {metas[place].name for place in spill.staged(lengths)}
        storages = {name: storage for name, storage in storages.items() if name not in copied}
        predicted = Simulator(metas, layer_map, storages).trace(spill.load_order)
        needed = predicted.peak_pinned_bytes
        if budget_bytes is not None and needed > budget_bytes:
            at = predicted.steps[predicted.peak_pinned_index].name
            raise PlanError(
                f"sync.budget_bytes is {budget_bytes:,} ({format_bytes(budget_bytes)}), and vLLM "
                f"holds {needed:,} bytes ({format_bytes(needed)}) for the layer of {at!r} alone "
                f"when it loads it; raise sync.budget_bytes to at least {needed}",
                needed_bytes=needed,
            )
    else:
        order: Sequence[int] = range(len(metas))
        if policy == "reorder" and budget_bytes is not None:
            order = order_within_budget(
                metas, layer_map, budget_bytes, chunk_bytes, simulator, given
            )
            chunk_bytes = chunk_bytes and min(chunk_bytes, budget_bytes)
        elif policy == "reorder":
            place = {name: place for place, name in enumerate(simulator.names)}
            order = [place[meta.name] for meta in by_parent_layer(metas, layer_map)]
        ordered = [metas[place] for place in order]
        chunks = cut_between_layers(ordered, layer_map, chunk_bytes)
        predicted = given if ordered == list(metas) else simulator.trace(order)
    landed = (c.parent_layer for meta in metas for c in layer_map.contributions[meta.name])
    layers = (layer_map.layers[name] for name in dict.fromkeys(landed))
    return SyncPlan(
        policy=policy,
        metas=tuple(ordered),
        chunks=chunks,
        predicted=predicted,
        as_given=given,
        layer_map_digest=layer_map.digest,
        budget_bytes=budget_bytes,
        spill=spill,
        loading={layer.name: layer.loading for layer in layers if not layer.deferred},
        storages=storages,
    )
