"""Why a sync would buffer several layers at once, in words a person can act on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from qerl_sync.buffers.trace import Trace
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.policies import by_parent_layer
from qerl_sync.plan.replay import OpenLayer, open_layers_at, replay

SHOWN_LAYERS = 8


class Cause(Enum):
    """The causes of buffering, of which order cures only the first."""

    OUT_OF_ORDER = "the tensors of a parent layer do not arrive next to each other"
    SHARED_TENSOR = "one tensor lands in several parent layers, which are then open together"
    FULL_TENSORS = "full tensors are kept although this rank loads only its shard of them"
    PINNED_VIEWS = "the buffered tensors are views that keep larger storages alive"


@dataclass(frozen=True)
class Diagnosis:
    """The worst moment of a stream, what is open then, and why.

    Attributes:
        at: the tensor that is handed over at that moment, and its place in the stream.
        open_layers: what is open then, in the order of opening.
        causes: those that apply, the most important first.
        peak_buffered_bytes, peak_pinned_bytes, max_open_layers: over the whole stream.
        ordered: the trace that ordering by parent layer would give.
    """

    at: str
    index: int
    num_tensors: int
    open_layers: tuple[OpenLayer, ...]
    causes: tuple[Cause, ...]
    total_bytes: int
    trace: Trace
    ordered: Trace

    def text(self, source_order: str) -> str:
        """The warning: what, where, how much, why, and the line of YAML that cures it."""
        trace, ordered = self.trace, self.ordered
        share = 100 * trace.peak_buffered_bytes / max(self.total_bytes, 1)
        lines = [
            f"This sync would buffer {trace.max_open_layers} parent layers at once: "
            f"{_mb(trace.peak_buffered_bytes)} buffered ({share:.0f}% of the model) and "
            f"{_mb(trace.peak_pinned_bytes)} pinned, at tensor {self.index + 1} of "
            f"{self.num_tensors} ({self.at}). Open then:"
        ]
        largest = sorted(self.open_layers, key=lambda layer: -layer.buffered_bytes)
        lines += [
            f"  {layer.name} ({layer.kind}): {layer.loaded_numel:,}/{layer.total_numel:,} "
            f"elements, {_mb(layer.buffered_bytes)}"
            for layer in largest[:SHOWN_LAYERS]
        ]
        if len(largest) > SHOWN_LAYERS:
            rest = largest[SHOWN_LAYERS:]
            lines.append(
                f"  and {len(rest)} more: {_mb(sum(layer.buffered_bytes for layer in rest))}"
            )
        lines += [f"Cause: {cause.value}." for cause in self.causes]
        lines.append(f"Source order: {source_order}.")
        if Cause.OUT_OF_ORDER in self.causes:
            lines.append(
                f"Cure: `sync: {{policy: reorder}}` makes it {ordered.max_open_layers} open "
                f"layer{'s' * (ordered.max_open_layers != 1)} and "
                f"{_mb(ordered.peak_buffered_bytes)} buffered."
            )
        return "\n".join(lines)


def diagnose(
    metas: Sequence[ParamMeta],
    trace: Trace,
    layer_map: LayerMap,
    storages: Mapping[str, Storage] | None = None,
) -> Diagnosis | None:
    """None if at most one parent layer is ever open; else the worst moment of the stream.

    Args:
        metas: the stream in the order in which it will arrive.
        trace: its predicted trace.
    """
    if trace.max_open_layers < 2:
        return None
    index = trace.peak_index
    ordered = replay(by_parent_layer(metas, layer_map), layer_map, storages)
    return Diagnosis(
        at=metas[index].name,
        index=index,
        num_tensors=len(metas),
        open_layers=tuple(open_layers_at(index, metas, layer_map, storages)),
        causes=_causes(metas, trace, ordered, layer_map),
        total_bytes=sum(meta.nbytes for meta in metas),
        trace=trace,
        ordered=ordered,
    )


def _causes(
    metas: Sequence[ParamMeta], trace: Trace, ordered: Trace, layer_map: LayerMap
) -> tuple[Cause, ...]:
    contributions = [c for meta in metas for c in layer_map.contributions[meta.name]]
    found = {
        Cause.OUT_OF_ORDER: ordered.max_open_layers < trace.max_open_layers
        or ordered.peak_buffered_bytes < trace.peak_buffered_bytes,
        Cause.SHARED_TENSOR: ordered.max_open_layers > 1,
        Cause.FULL_TENSORS: _is_sharded(metas, layer_map),
        Cause.PINNED_VIEWS: trace.peak_pinned_bytes > trace.peak_buffered_bytes
        and any(c.aliases_source for c in contributions),
    }
    return tuple(cause for cause, applies in found.items() if applies)


def _is_sharded(metas: Sequence[ParamMeta], layer_map: LayerMap) -> bool:
    """Does the rank load fewer elements than the stream carries?"""
    carried = sum(meta.numel for meta in metas if layer_map.contributions[meta.name])
    loaded = sum(c.loaded_numel for meta in metas for c in layer_map.contributions[meta.name])
    return loaded < carried


def _mb(nbytes: int) -> str:
    """MB of 10^6 bytes, as vLLM's own warning counts them."""
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e6:.4f} MB"
