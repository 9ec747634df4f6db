"""Watches a sync on the worker: a ledger fed by what vLLM really holds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any

import torch

from qerl_sync.buffers.detect import storages_of
from qerl_sync.buffers.ledger import BufferLedger
from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import CoverageError
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.stopwatch import Span
from qerl_sync.verify.alias_guard import AliasGuard
from qerl_sync.worker.compat import engine as compat


class SyncMonitor:
    """Accounts for one sync of one model. Implements `compat.ProcessObserver`.

    It also closes, with the last tensor that they will get, the layers that the stream cannot
    fill (padded vocabularies), which vLLM would keep open until the end. Of `borrowed` memory it
    copies out what deferred layers keep; memory that belongs to the source it guards against
    writes while it is held.

    Args:
        filled: the parent layers that the stream fills; all others stay as they are.
        before, after: called with each layer before vLLM processes it, and afterwards.

    Attributes:
        processed_layers: when vLLM processed which layer. On a GPU, the time it took to launch.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layer_map: LayerMap,
        filled: Collection[str],
        *,
        before: Callable[[torch.nn.Module], None] = lambda layer: None,
        after: Callable[[torch.nn.Module], None] = lambda layer: None,
        borrowed: bool = False,
    ) -> None:
        self._model = model
        self._layers = layer_map.layers
        self._filled = filled
        self._ledger = BufferLedger()
        self._before, self._after = before, after
        self._borrowed = borrowed
        self._aliases = AliasGuard()
        self._received: Counter[str] = Counter()
        self._closings: Counter[str] = Counter()
        self._loads: Counter[str] = Counter()
        self._name = ""
        self.processed_layers: list[Span] = []
        self._processing_since = 0.0

    @cached_property
    def _paths(self) -> dict[int, str]:
        # When a layer is loaded first, which none is in a sync of an adapter alone.
        return {id(module): path for path, module in self._model.named_modules()}

    def begin(self, name: str) -> None:
        """Record that the next tensor that vLLM gets is `name`."""
        self._name = name
        self._ledger.begin(name)

    def held(
        self, layer: torch.nn.Module, parameter: str, arguments: dict[str, Any], loaded_numel: int
    ) -> None:
        path = self._paths[id(layer)]
        planned = self._layers[path]
        self._received[path] += loaded_numel
        for key, value in arguments.items():
            # In host memory, too: there lies what a GPU's worker gets over shared memory or a
            # socket, and vLLM holds it as well, although its own figure leaves it out.
            holds = isinstance(value, torch.Tensor) and value.device.type != "meta"
            if key != "param" and holds:
                if self._borrowed and planned.deferred:
                    arguments[key] = value.clone()
                self._ledger.hold(path, value.nbytes, storages_of(value), deferred=planned.deferred)
                if not self._borrowed:
                    self._aliases.hold(path, self._name, value)
        # Padding never arrives: vLLM would keep the layer open to the end of the sync.
        fills = planned.deferred or planned.expected_numel == planned.total_numel
        if not fills and compat.layer_state(layer).loaded_numel >= planned.expected_numel:
            compat.credit_padding(layer)

    def loaded(self, path: str) -> None:
        """Count a tensor that a loader has written to a layer that is not loaded layerwise."""
        self._loads[path] += 1

    def processing(self, layer: torch.nn.Module) -> None:
        self._aliases.release(self._paths[id(layer)])
        self._before(layer)
        compat.forget_packed_experts(layer)
        self._processing_since = time.time()

    def processed(self, layer: torch.nn.Module) -> None:
        path = self._paths[id(layer)]
        since = self._processing_since
        self.processed_layers.append(Span("process", path, since, time.time() - since))
        self._closings[path] += 1
        self._ledger.release(path)
        self._after(layer)

    def path_of(self, layer: torch.nn.Module) -> str:
        return self._paths[id(layer)]

    def require_filled(self) -> None:
        """Check, at the end of the stream, that each parent layer got exactly what it was to get.

        Layers that the stream fills got their elements and were processed once (those that are not
        loaded layerwise: they got as many loads as the dry run counted); all others got nothing.
        Deferred layers are processed at the end.

        Raises:
            CoverageError: it names the first layer for which that is not so.
        """
        wrong = []
        for path, layer in self._layers.items():
            if layer.deferred or not layer.expected_numel:
                continue
            times = int(path in self._filled)
            numel, loads = layer.expected_numel * times, layer.num_loads * times
            if layer.loading == "layerwise":
                if (self._received[path], self._closings[path]) != (numel, times):
                    wrong.append(
                        f"{path} ({layer.kind}) got {self._received[path]:,} of {numel:,} elements "
                        f"and was processed {self._closings[path]} times"
                    )
            elif self._loads[path] != loads:
                wrong.append(
                    f"{path} ({layer.kind}) was written to by {self._loads[path]:,} calls of its "
                    f"weight loaders instead of {loads:,}"
                )
        if wrong:
            raise CoverageError(
                f"{len(wrong)} parent layers were not filled as planned: {wrong[0]}. vLLM counted "
                "otherwise than in the dry run; sync.verify: off goes on in spite of it"
            )

    def forget(self) -> None:
        """Drop the references to tensors that are held. The trace stays."""
        self._aliases = AliasGuard()

    @property
    def parent_layers(self) -> Collection[str]:
        """Return the parent layers that the stream is to fill."""
        return {path for path in self._filled if self._layers[path].expected_numel}

    def trace(self) -> Trace:
        return self._ledger.trace()
