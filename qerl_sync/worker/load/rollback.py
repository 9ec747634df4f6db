"""The old weights of a sync in progress, kept in host memory so that a failed one can go back."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from qerl_sync.errors import PlanError
from qerl_sync.worker.compat import engine as compat
from qerl_sync.worker.load import memory

HOST = torch.device("cpu")


class Rollback:
    """Keep what layers have before a sync writes to them, layer by layer.

    `begin` when the reload is open and nothing has been written. `keep` before vLLM processes a
    layer: its live tensors are copied to host memory, and what kernels keep besides (packed handles
    in closures, experts' kernels) is kept as it is, where it is. `put_back` after `compat.restore`:
    the model is what it was, to the bit and at the same addresses.

    Attributes:
        nbytes: memory that is kept.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._attributes: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._packings: dict[int, Any] = {}

    def begin(self, model: torch.nn.Module, filled: Collection[str]) -> None:
        """Keep what a sync that fills these layers writes to without processing its layer.

        Raises:
            PlanError: there is not enough host memory for all that a sync may write to.
        """
        needed_bytes, free_bytes = compat.weight_bytes(model, filled), memory.free_bytes(HOST)
        if needed_bytes > free_bytes:
            raise PlanError(
                f"sync.on_failure: rollback keeps the old weights in host memory, {needed_bytes:,} "
                f"bytes, and {free_bytes:,} are free on this worker's host; free some, or choose "
                "sync.on_failure: poison"
            )
        for layer in model.modules():
            # Biases and a few more are written on arrival, attention layers at the end.
            if compat.is_deferred(layer):
                self.keep(layer)
            for tensor in compat.tensors_written_live(layer):
                self._copy(tensor)

    def keep(self, layer: torch.nn.Module) -> None:
        """Keep what this layer has, unless it is kept already."""
        if id(layer) in self._attributes:
            return
        for tensor in compat.live_tensors(layer).values():
            self._copy(tensor)
        for part in compat.parts_of(layer):
            found = {name: v for name, v in vars(part).items() if name not in compat.NOT_KEPT}
            self._attributes.setdefault(id(part), (part, found))
            for value in found.values():
                if isinstance(value, torch.Tensor) and not value.is_meta:
                    self._copy(value)
        packing = getattr(layer, "cpu_linear", None)
        if id(packing) not in self._packings:  # a tied head may share it with the embeddings
            self._packings[id(packing)] = packing
            self.nbytes += compat.packed_bytes(layer)

    def put_back(self) -> None:
        """Restore the model as it was, and drop the copies."""
        for owner, before in self._attributes.values():
            now = vars(owner)
            for name in now.keys() - before.keys() - compat.NOT_KEPT:
                del now[name]
            now.update(before)
        with torch.no_grad():
            for tensor, copy in self._copies.values():
                if tensor.shape == copy.shape:
                    tensor.data.copy_(copy)
                else:  # it was empty, and was given memory to be loaded into
                    tensor.data = copy.to(tensor.device)
        self._copies, self._attributes, self._packings = {}, {}, {}

    def _copy(self, tensor: torch.Tensor) -> None:
        if id(tensor) not in self._copies:
            copy = tensor.detach().to(HOST, copy=True)
            self._copies[id(tensor)] = (tensor, copy)
            self.nbytes += copy.nbytes
