"""The layers of one sync whose tensors are written where they stay, by vLLM's own loaders."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from qerl_sync.errors import LayerMapError, LoadError
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.worker.compat import direct
from qerl_sync.worker.load.base import modules_at


class DirectLoad:
    """Load layers that are not loaded layerwise. See `layer_map.Loading`.

        begin for each tensor --> vLLM's loaders write it --> conclude

    Args:
        filled: the parent layers that the sync writes to.
        keep: called with a layer before its first tensor is written.

    Attributes:
        modules: all such layers of the model, also those that get nothing.
        unprocessed: those of them that are not processed.
        working_bytes: what the largest layer needs that is processed in place.

    Raises:
        LayerMapError: a layer is not what it was when the layer map was observed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layer_map: LayerMap,
        filled: Collection[str],
        keep: Callable[[torch.nn.Module], None],
    ) -> None:
        wanted = [p for p, layer in layer_map.layers.items() if layer.loading != "layerwise"]
        layers = modules_at(model, wanted)
        changed = [path for path, layer in layers.items() if direct.changed_since(layer)]
        if changed:
            raise LayerMapError(
                f"{changed[0]} is laid out otherwise than when its layer map was observed: "
                "something has changed it since. Make a new session, or restart the engine"
            )
        self.modules = list(layers.values())
        self.unprocessed = [
            layer for path, layer in layers.items() if layer_map.layers[path].loading == "direct"
        ]
        self._filled = {path: layer for path, layer in layers.items() if path in filled}
        self._in_place = [p for p in self._filled if layer_map.layers[p].loading == "in place"]
        self._addresses = {path: direct.addresses(one) for path, one in self._filled.items()}
        self._map = layer_map
        self._keep = keep
        self._touched: set[str] = set()
        self.working_bytes = max(
            (sum(t.nbytes for t in layers[path].parameters()) for path in self._in_place), default=0
        )

    @contextmanager
    def watching(self, loaded: Callable[[str], None]) -> Iterator[None]:
        """Tell `loaded` the layer's path at each call of one of these layers' weight loaders."""
        with ExitStack() as stack:
            for path, layer in self._filled.items():
                stack.enter_context(direct.count_loads(layer, partial(loaded, path)))
            yield

    def begin(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return what vLLM's loaders get for the next tensor of the stream."""
        for given in self._map.contributions[name]:
            path = given.parent_layer
            if path in self._filled and path not in self._touched:
                self._touched.add(path)
                self._keep(self._filled[path])
        # Such loaders are known to overwrite what they got (GPT-OSS on tensor-parallel ranks).
        return tensor.clone() if name in self._map.past_reload else tensor

    def conclude(self) -> None:
        """Process what kernels want in another layout. All tensors have arrived.

        Raises:
            LoadError: a loader has given a layer other memory.
        """
        for path in self._in_place:
            direct.process_in_place(self._filled[path])
        for path, layer in self._filled.items():
            # CUDA graphs and kernels would go on reading the old memory.
            if direct.addresses(layer) != self._addresses[path]:
                raise LoadError(
                    f"vLLM's loader has given {path} other memory, and kernels may read the old "
                    "one; choose sync.load: layerwise"
                )
