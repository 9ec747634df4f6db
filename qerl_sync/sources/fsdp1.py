"""Read parameters that torch's FSDP1 (FullyShardedDataParallel) keeps flattened and in shards."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch


class FlatUnits:
    """The units of a model: modules whose parameters FSDP1 has flattened into one, of which each
    rank holds a part.

    With `use_orig_params` the model keeps its own parameters, one-dimensional views of what of them
    lies in this rank's part. Without, nothing of them is left, and this knows none of them.

    Args:
        root: the outermost module that may be wrapped.
    """

    def __init__(self, root: Any) -> None:
        fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # takes 2 s to import
        self._root = root
        self._held: dict[int, tuple[Any, torch.nn.Parameter, torch.Size]] = {}
        for unit in root.modules() if fsdp is not None else ():
            if not isinstance(unit, fsdp.FullyShardedDataParallel) or unit._handle is None:
                continue
            flat = unit._handle.flat_param
            # None where the model's own parameters are gone.
            for parameter, shape in zip(flat._params or (), flat._shapes, strict=False):
                self._held[id(parameter)] = (unit, parameter, shape)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._held

    def shape(self, tensor: torch.Tensor) -> torch.Size:
        return self._held[id(tensor)][2]

    def gather(
        self, tensor: torch.Tensor, beside: Iterable[torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Return copies of that parameter and of those beside it that are in its unit, by identity.

        A unit is gathered as a whole. Every rank makes the same calls.
        """
        unit = self._held[id(tensor)][0]
        if self._root._is_root is None:
            # FSDP1 takes the first unit that gathers for the root of all.
            with unit.summon_full_params(self._root, recurse=False, writeback=False):
                pass
        with unit.summon_full_params(unit, recurse=False, writeback=False):
            return {
                id(one): one.detach().clone()
                for one in (tensor, *beside)
                if one in self and self._held[id(one)][0] is unit
            }


def unwrapped(model: Any) -> Any:
    """Return the model that FSDP1 wraps, or the model."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    wrapped = fsdp is not None and isinstance(model, fsdp.FullyShardedDataParallel)
    return model.module if wrapped else model
