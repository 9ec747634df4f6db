"""The one cost model: what a stream would hold in memory, without a tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qerl_sync.buffers.ledger import BufferLedger
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


class Replay:
    """Walks a stream through a ledger, event by event, as vLLM's layerwise reload would.

    The rules are those of `plan.walk`, which does the same in one flat loop; this one can stop in
    the middle and account for more than layers.

    Args:
        storages: the memory behind each tensor; a name that is not in it has a storage of its own.
        ledger: accounts for the stream; one that records more than the trace may be given.
    """

    def __init__(
        self,
        layer_map: LayerMap,
        storages: Mapping[str, Storage],
        ledger: BufferLedger | None = None,
    ) -> None:
        self._map = layer_map
        self._storages = storages
        self._ledger = ledger or BufferLedger()
        self._loaded: Counter[str] = Counter()
        self._closed: set[str] = set()

    def feed(self, meta: ParamMeta, *, release: bool = True) -> None:
        """Hand over one tensor. `release=False` stops before the layers it completes are freed."""
        name = meta.name
        self._ledger.begin(name)
        source = self._storages.get(name) or Storage(name, meta.nbytes)
        for i, c in enumerate(self._map.contributions[name]):
            if c.parent_layer in self._closed:
                continue  # vLLM drops what arrives for a layer that is done ("excessive loading")
            layer = self._map.layers[c.parent_layer]
            storage = source if c.aliases_source else Storage(f"{name}#{i}", c.held_bytes)
            self._ledger.hold(layer.name, c.held_bytes, (storage,), deferred=layer.deferred)
            self._loaded[layer.name] += c.loaded_numel
            whole = self._loaded[layer.name] >= layer.closes_at_numel
            if whole and release and not layer.deferred:
                self._ledger.release(layer.name)
                self._closed.add(layer.name)

    def open_layers(self) -> list[OpenLayer]:
        """The layers that hold bytes now, in the order in which they opened."""
        layers = self._map.layers
        return [
            OpenLayer(name, layers[name].kind, self._loaded[name], layers[name].total_numel, nbytes)
            for name, nbytes in self._ledger.held_bytes().items()
            if not layers[name].deferred
        ]

    def trace(self) -> Trace:
        return self._ledger.trace()


def replay(
    metas: Iterable[ParamMeta],
    layer_map: LayerMap,
    storages: Mapping[str, Storage] | None = None,
) -> Trace:
    """The trace of a stream, predicted. Linear in the number of tensors.

    Args:
        metas: the stream, in order. Every name must be in `layer_map`.
        layer_map: where each tensor lands.
        storages: the memory behind each tensor; a name that is not in it has a storage of its own.
    """
    return Simulator(list(metas), layer_map, storages).trace()


def open_layers_at(
    index: int,
    metas: Sequence[ParamMeta],
    layer_map: LayerMap,
    storages: Mapping[str, Storage] | None = None,
) -> list[OpenLayer]:
    """The layers that are open when tensor `index` has been buffered, before any closes by it."""
    run = Replay(layer_map, storages or {})
    for meta in metas[:index]:
        run.feed(meta)
    run.feed(metas[index], release=False)
    return run.open_layers()
