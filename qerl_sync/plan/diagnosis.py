"""Say why a sync would hold more than it should, and what would help."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import PlanError
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.plan.budget import within_budget
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.policies import by_parent_layer
from qerl_sync.plan.simulator import OpenLayer, Simulator, open_layers_at, replay
from qerl_sync.plan.spill import peak_staged_bytes

SHOWN_LAYERS = 8


class Cause(Enum):
    """The causes of buffering, of which order cures only the first: what each is, and its cure."""

    OUT_OF_ORDER = (
        "the tensors of a parent layer do not arrive next to each other",
        "let `sync.policy: reorder` send them together",
    )
    NEVER_COMPLETES = (
        "a layer is held to the end of the sync: it is deferred or never gets all its elements",
        "let the source yield what is missing; deferred layers are small",
    )
    SHARED_TENSOR = (
        "one tensor lands in several parent layers, which are then open together",
        "none in the order; they are sent next to each other",
    )
    FULL_TENSORS = (
        "full tensors are kept although this rank loads only its shard of them",
        "none in the order; vLLM slices a tensor when its layer is whole",
    )
    PINNED_VIEWS = (
        "the buffered tensors are views that keep larger storages alive",
        "cut chunks between parent layers, or make them smaller (sync.chunk_bytes)",
    )

    def __init__(self, text: str, cure: str) -> None:
        self.text, self.cure = text, cure


@dataclass(frozen=True)
class Diagnosis:
    """The worst moment of a stream, what is open then, and why.

    Attributes:
        at: the tensor that is handed over at that moment, and its place in the stream.
        open_layers: what is open then, in the order of opening.
        causes: those that apply, the most important first.
        total_bytes: of the stream.
        trace: of the stream.
        ordered: the trace that `policy: reorder` would give.
        budget_bytes: the budget that is broken, if there is one.
        refusal: why no order would keep it.
        staged_bytes: the most that `policy: spill` would stage in host memory instead.
    """

    at: str
    index: int
    num_tensors: int
    open_layers: tuple[OpenLayer, ...]
    causes: tuple[Cause, ...]
    total_bytes: int
    trace: Trace
    ordered: Trace
    budget_bytes: int | None = None
    refusal: str | None = None
    staged_bytes: int = 0

    def text(self, source_order: str) -> str:
        """Return the warning: what, where, how much, why, and the line of YAML that cures it."""
        trace, most = self.trace, self.trace.max_open_layers
        share = 100 * trace.peak_buffered_bytes / max(self.total_bytes, 1)
        what = f"buffer up to {most} parent layer{'s' * (most != 1)} at once"
        if self.budget_bytes is not None:
            what = f"exceed sync.budget_bytes ({_mb(self.budget_bytes)}) and {what}"
        # Most layers, most buffered and most pinned bytes may fall on different tensors.
        lines = [
            f"This sync would {what}, and hold at most {_mb(trace.peak_buffered_bytes)} buffered "
            f"({share:.0f}% of the model) and {_mb(trace.peak_pinned_bytes)} pinned. Most is "
            f"buffered at tensor {self.index + 1} of {self.num_tensors} ({self.at}); open then:"
        ]
        largest = sorted(self.open_layers, key=lambda layer: -layer.buffered_bytes)
        lines += [
            f"  {layer.name} ({layer.kind}): {layer.loaded_numel:,}/{layer.total_numel:,} "
            f"elements, {_mb(layer.buffered_bytes)}"
            for layer in largest[:SHOWN_LAYERS]
        ]
        rest = [layer.buffered_bytes for layer in largest[SHOWN_LAYERS:]]
        if rest:
            lines.append(f"  and {len(rest)} more: {_mb(sum(rest))}")
        lines += [f"Cause: {cause.text}." for cause in self.causes]
        lines.append(f"Source order: {source_order}.")
        if self.refusal is not None:
            lines.append(f"No order cures it: {self.refusal}")
        elif Cause.OUT_OF_ORDER in self.causes:
            most = self.ordered.max_open_layers
            lines.append(
                f"Cure: `sync: {{policy: reorder}}` makes it {most} open "
                f"layer{'s' * (most != 1)} and {_mb(self.ordered.peak_buffered_bytes)} buffered."
            )
            lines.append(
                "A source that cannot be reordered: `sync: {policy: spill}` does the same on the "
                f"worker, with up to {_mb(self.staged_bytes)} of host memory."
            )
        return "\n".join(lines)


def diagnose(
    metas: Sequence[ParamMeta],
    trace: Trace,
    layer_map: LayerMap,
    storages: Mapping[str, Storage] | None = None,
    budget_bytes: int | None = None,
) -> Diagnosis | None:
    """Return the worst moment of a stream that should not run as it is; None if it may.

    Without a budget, what is wrong is a second open parent layer; with one, more pinned bytes than
    that, however many layers are open.

    Args:
        metas: the stream in the order in which it will arrive.
        trace: its predicted trace.
    """
    if budget_bytes is None and trace.max_open_layers < 2:
        return None
    if budget_bytes is not None and trace.peak_pinned_bytes <= budget_bytes:
        return None
    index = trace.peak_index if budget_bytes is None else trace.peak_pinned_index
    refusal = None
    ordered = by_parent_layer(metas, layer_map)
    if budget_bytes is not None:
        try:
            ordered = within_budget(metas, layer_map, budget_bytes, storages)
        except PlanError as exc:
            refusal = str(exc)
    return Diagnosis(
        at=metas[index].name,
        index=index,
        num_tensors=len(metas),
        open_layers=tuple(open_layers_at(index, metas, layer_map)),
        causes=causes_of(metas, trace, layer_map, storages),
        total_bytes=sum(meta.nbytes for meta in metas),
        trace=trace,
        ordered=replay(ordered, layer_map, storages),
        budget_bytes=budget_bytes,
        refusal=refusal,
        staged_bytes=peak_staged_bytes(metas, layer_map),
    )


@dataclass(frozen=True)
class StreamFacts:
    """The facts a cause may rest on that are the same in every order.

    Attributes:
        is_sharded: the rank loads fewer elements than the stream carries.
        has_views: some tensors are held as views of the source's memory.
        has_stuck_layers: some layers are held to the end of the sync.
    """

    is_sharded: bool
    has_views: bool
    has_stuck_layers: bool

    @classmethod
    def of(cls, metas: Sequence[ParamMeta], layer_map: LayerMap) -> StreamFacts:
        landings = [(meta, layer_map.contributions[meta.name]) for meta in metas]
        contributions = [c for _, lands in landings for c in lands]
        received: Counter[str] = Counter()
        for c in contributions:
            received[c.parent_layer] += c.loaded_numel
        return cls(
            is_sharded=sum(received.values())
            < sum(meta.numel for meta, lands in landings if lands),
            has_views=any(c.aliases_source for c in contributions),
            has_stuck_layers=any(
                layer_map.layers[name].deferred or numel < layer_map.layers[name].closes_at_numel
                for name, numel in received.items()
            ),
        )


def causes_of(
    metas: Sequence[ParamMeta],
    trace: Trace,
    layer_map: LayerMap,
    storages: Mapping[str, Storage] | None = None,
    *,
    ordered: Trace | None = None,
    facts: StreamFacts | None = None,
) -> tuple[Cause, ...]:
    """Say why a stream's peak exceeds the one parent layer that must be held, the most important
    cause first.

    Args:
        metas, trace, layer_map, storages: as for `diagnose`.
        ordered: the trace of the same tensors by parent layer, where it is known.
        facts: those of the same tensors, where they are known.
    """
    facts = facts or StreamFacts.of(metas, layer_map)
    if ordered is None:
        ordered = replay(by_parent_layer(metas, layer_map), layer_map, storages)
    stuck_bytes, peak = 0, trace.peak_index  # of layers that are held to the end of the sync
    if facts.has_stuck_layers:
        spans = Simulator(metas, layer_map).spans()
        stuck = (span for span in spans if span.closed is None and span.covers(peak))
        stuck_bytes = sum(span.held_at(peak) for span in stuck)
    found = {
        Cause.OUT_OF_ORDER: ordered.max_open_layers < trace.max_open_layers
        or ordered.peak_buffered_bytes < trace.peak_buffered_bytes,
        Cause.NEVER_COMPLETES: stuck_bytes > trace.peak_buffered_bytes / 100,
        Cause.SHARED_TENSOR: ordered.max_open_layers > 1,
        Cause.FULL_TENSORS: facts.is_sharded,
        Cause.PINNED_VIEWS: trace.peak_pinned_bytes > trace.peak_buffered_bytes and facts.has_views,
    }
    return tuple(cause for cause, applies in found.items() if applies)


def _mb(nbytes: int) -> str:
    """Format bytes as MB of 10^6, as vLLM's own warning does."""
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e6:.4f} MB"
