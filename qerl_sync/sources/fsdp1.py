"""Read parameters that torch's FSDP1 (FullyShardedDataParallel) keeps flattened and in shards."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch


class FlatUnits:
    """The units of a model: modules whose parameters FSDP1 has flattened into one, of which each
    rank holds a part.

    With `use_orig_params` the model keeps its own parameters, one-dimensional views of what of them
    lies in this rank's part. Without, nothing of them is left, and this knows none of them.

    Args:
        model: the outermost module that may be wrapped, or that has wrapped ones in it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._held: dict[int, _Held] = {}
        for root in _outermost(model):
            for unit in root.fsdp_modules(root):
                if unit._handle is None:  # it has no parameters of its own
                    continue
                flat = unit._handle.flat_param
                # None where the model's own parameters are gone.
                for parameter, shape in zip(flat._params or (), flat._shapes, strict=False):
                    self._held[id(parameter)] = _Held(parameter, shape, unit, root)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._held

    def shape(self, tensor: torch.Tensor) -> torch.Size:
        return self._held[id(tensor)].shape

    def gather(
        self, tensor: torch.Tensor, beside: Iterable[torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Return copies of that parameter and of those beside it that are in its unit, by identity.

        A unit is gathered as a whole. Every rank makes the same calls.
        """
        held = self._held[id(tensor)]
        if held.root._is_root is None:
            # FSDP1 takes the first unit that gathers for the root of all.
            with held.root.summon_full_params(held.root, recurse=False, writeback=False):
                pass
        with held.unit.summon_full_params(held.unit, recurse=False, writeback=False):
            return {
                id(one): one.detach().clone()
                for one in (tensor, *beside)
                if one in self and self._held[id(one)].unit is held.unit
            }


class _Held(NamedTuple):
    """A parameter of a unit, with the whole one's shape, and the outermost unit around both.

    It keeps the parameter, so that nothing else can get its identity.
    """

    parameter: torch.nn.Parameter
    shape: torch.Size
    unit: Any
    root: Any


def _outermost(model: Any) -> Iterator[Any]:
    """Yield the modules that FSDP1 wraps and that are in no other such module."""
    if unwrapped(model) is not model:
        yield model
        return
    for child in model.children():
        yield from _outermost(child)


def unwrapped(model: Any) -> Any:
    """Return the model that FSDP1 wraps, or the model."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # takes 2 s to import
    wrapped = fsdp is not None and isinstance(model, fsdp.FullyShardedDataParallel)
    return model.module if wrapped else model
