"""The plan of a sync: order, chunks and predicted trace, made before any byte moves."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import PlanError
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.plan.budget import order_within_budget
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.policies import as_given, by_parent_layer
from qerl_sync.plan.walk import Walker

PLAN_FORMAT = 1

Order = Callable[[Sequence[ParamMeta], LayerMap], list[ParamMeta]]

# What each `sync.policy` does to the source's order.
POLICIES: Mapping[str, Order] = {
    "warn": as_given,
    "error": as_given,
    "reorder": by_parent_layer,
}


@dataclass(frozen=True)
class Chunk:
    """The unit of transfer: consecutive tensors of the plan that leave no parent layer open.

    Attributes:
        names: checkpoint names, in plan order.
        nbytes: bytes of these tensors.
        oversized: larger than the chunk size, because it cannot be cut without opening a layer.
    """

    names: tuple[str, ...]
    nbytes: int
    oversized: bool = False


@dataclass(frozen=True)
class SyncPlan:
    """An immutable value; it holds no tensor. Trainer and worker agree on its `digest`.

    Attributes:
        policy: the policy that made the order.
        metas: the stream in the order in which it will be sent.
        chunks: `metas`, cut.
        predicted: the trace of this order.
        as_given: the trace of the source's own order, for comparison.
        layer_map_digest: the layer map that it was planned with.
        budget_bytes: the budget that it was planned with.
    """

    policy: str
    metas: tuple[ParamMeta, ...]
    chunks: tuple[Chunk, ...]
    predicted: Trace
    as_given: Trace
    layer_map_digest: str
    budget_bytes: int | None = None

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(meta.name for meta in self.metas)

    @property
    def nbytes(self) -> int:
        return sum(meta.nbytes for meta in self.metas)

    @cached_property
    def digest(self) -> str:
        """Of what is sent and how it is cut, not of what it is predicted to cost."""
        agreed = {
            "format": PLAN_FORMAT,
            "metas": [[m.name, m.dtype, m.shape] for m in self.metas],
            "chunks": [len(c.names) for c in self.chunks],
            "layer_map": self.layer_map_digest,
        }
        return hashlib.sha256(json.dumps(agreed, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "format": PLAN_FORMAT,
            "digest": self.digest,
            "policy": self.policy,
            "budget_bytes": self.budget_bytes,
            "layer_map_digest": self.layer_map_digest,
            "metas": [[m.name, m.dtype, list(m.shape)] for m in self.metas],
            "chunks": [asdict(chunk) for chunk in self.chunks],
            "predicted": self.predicted.to_json(),
            "as_given": self.as_given.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SyncPlan:
        """Raises PlanError if the format is not this one's or the digest does not hold."""
        if data.get("format") != PLAN_FORMAT:
            raise PlanError(
                f"plan format {data.get('format')!r} cannot be read here, only {PLAN_FORMAT}; "
                "make the plan again with this version of qerl-sync"
            )
        plan = cls(
            policy=data["policy"],
            metas=tuple(ParamMeta(n, d, tuple(s)) for n, d, s in data["metas"]),
            chunks=tuple(
                Chunk(tuple(c["names"]), c["nbytes"], c["oversized"]) for c in data["chunks"]
            ),
            predicted=Trace.from_json(data["predicted"]),
            as_given=Trace.from_json(data["as_given"]),
            layer_map_digest=data["layer_map_digest"],
            budget_bytes=data.get("budget_bytes"),
        )
        if plan.digest != data["digest"]:
            raise PlanError(
                f"the plan was changed after it was made: its digest is {plan.digest[:12]}, "
                f"the file says {str(data['digest'])[:12]}; make the plan again"
            )
        return plan


def build_plan(
    metas: Sequence[ParamMeta],
    layer_map: LayerMap,
    policy: str,
    *,
    chunk_bytes: int | None = None,
    storages: Mapping[str, Storage] | None = None,
    budget_bytes: int | None = None,
) -> SyncPlan:
    """Plan the stream `metas` (in source order). Touches no tensor and no device.

    Args:
        policy: a key of `POLICIES`.
        chunk_bytes: upper bound of a chunk's bytes where layers can be kept whole; None: one chunk.
        storages: the memory behind each tensor, where several share one.
        budget_bytes: with the policy `reorder` the order is that of `within_budget`; the others
            leave the order alone, and `diagnose` tells whether it stays within the budget.

    Raises:
        PlanError: the stream names a tensor twice, or no order can be kept within the budget.
    """
    _refuse_doubled_names(metas)
    walker = Walker(metas, layer_map, storages)
    given = walker.trace()
    if policy == "reorder" and budget_bytes is not None:
        order = order_within_budget(metas, layer_map, budget_bytes, chunk_bytes, walker, given)
        chunk_bytes = chunk_bytes and min(chunk_bytes, budget_bytes)
    else:
        place = {name: place for place, name in enumerate(walker.names)}
        order = [place[meta.name] for meta in POLICIES[policy](metas, layer_map)]
    ordered = [metas[place] for place in order]
    unchanged = ordered == list(metas)
    return SyncPlan(
        policy=policy,
        metas=tuple(ordered),
        chunks=_cut(ordered, layer_map, chunk_bytes),
        predicted=given if unchanged else walker.trace(order),
        as_given=given,
        layer_map_digest=layer_map.digest,
        budget_bytes=budget_bytes,
    )


def _refuse_doubled_names(metas: Sequence[ParamMeta]) -> None:
    names = [meta.name for meta in metas]
    if len(set(names)) == len(names):
        return
    counts = Counter(names)
    doubled = [name for name, count in counts.items() if count > 1]
    raise PlanError(
        f"the source yields {doubled[0]!r} {counts[doubled[0]]} times"
        + (f" ({len(doubled)} names are doubled)" if len(doubled) > 1 else "")
        + "; vLLM would count it twice and close its layer on memory that was never written. "
        "Yield each checkpoint name once"
    )


def _cut(
    metas: Sequence[ParamMeta], layer_map: LayerMap, chunk_bytes: int | None
) -> tuple[Chunk, ...]:
    """Cut where no parent layer is open, into chunks of up to `chunk_bytes`."""
    if chunk_bytes is None:
        return (_chunk(metas, None),) if metas else ()
    chunks: list[Chunk] = []
    waiting: list[ParamMeta] = []
    nbytes = 0
    for segment in _segments(metas, layer_map):
        segment_bytes = sum(meta.nbytes for meta in segment)
        if waiting and nbytes + segment_bytes > chunk_bytes:
            chunks.append(_chunk(waiting, chunk_bytes))
            waiting, nbytes = [], 0
        waiting += segment
        nbytes += segment_bytes
    return (*chunks, _chunk(waiting, chunk_bytes)) if waiting else tuple(chunks)


def _chunk(metas: Sequence[ParamMeta], chunk_bytes: int | None) -> Chunk:
    nbytes = sum(meta.nbytes for meta in metas)
    oversized = chunk_bytes is not None and nbytes > chunk_bytes
    return Chunk(tuple(meta.name for meta in metas), nbytes, oversized)


def _segments(metas: Sequence[ParamMeta], layer_map: LayerMap) -> list[list[ParamMeta]]:
    """The smallest runs of the stream after which no parent layer is open."""
    parents = [layer_map.parents(meta.name) for meta in metas]
    awaited = Counter(chain.from_iterable(parents))
    started: set[str] = set()
    segments: list[list[ParamMeta]] = [[]]
    for meta, layers in zip(metas, parents, strict=True):
        segments[-1].append(meta)
        for layer in layers:
            awaited[layer] -= 1
            (started.add if awaited[layer] else started.discard)(layer)
        if not started:
            segments.append([])
    return [segment for segment in segments if segment]
