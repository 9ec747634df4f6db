"""Ask the simulator what a stream would hold, and which layers are open in its middle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qerl_sync.buffers.trace import Trace
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.simulator import Simulator


@dataclass(frozen=True)
class OpenLayer:
    """A parent layer in the middle of a stream. `loaded_numel` of `total_numel` have arrived."""

    name: str
    kind: str
    loaded_numel: int
    total_numel: int
    buffered_bytes: int


def replay(
    metas: Iterable[ParamMeta],
    layer_map: LayerMap,
    storages: Mapping[str, Storage] | None = None,
) -> Trace:
    """Predict the trace of a stream. Linear in the number of tensors.

    Args:
        metas: the stream, in order. Every name must be in `layer_map`.
        layer_map: where each tensor lands.
        storages: the memory behind each tensor; a name that is not in it has a storage of its own.
    """
    return Simulator(list(metas), layer_map, storages).trace()


def open_layers_at(index: int, metas: Sequence[ParamMeta], layer_map: LayerMap) -> list[OpenLayer]:
    """Return the layers that are open when tensor `index` has been buffered, before any closes by
    it, in the order in which they opened."""
    found = []
    for span in Simulator(metas[: index + 1], layer_map).walk().spans:
        layer = layer_map.layers[span.layer]
        if layer.deferred or not span.covers(index):
            continue
        loaded_numel = sum(
            c.loaded_numel
            for at in dict.fromkeys(span.arrivals)  # a tensor may land in a layer more than once
            for c in layer_map.contributions[metas[at].name]
            if c.parent_layer == layer.name
        )
        found.append(
            OpenLayer(layer.name, layer.kind, loaded_numel, layer.total_numel, span.peak_bytes)
        )
    return found
