"""Walk a model that carries PEFT's adapters as the base model that the trainer computes with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from qerl_sync.sources.hf import joined, saved_buffers_of


@dataclass(frozen=True)
class Found:
    """A parameter or saved buffer of the base model.

    Attributes:
        name: in the base model, without PEFT's additions.
        origin: the base model's own, where `tensor` is a trained copy of it (`modules_to_save`).
    """

    name: str
    tensor: torch.Tensor
    origin: torch.Tensor
    is_parameter: bool


def walk(module: torch.nn.Module, path: str, meet: Callable[[Any, str], None]) -> Iterator[Found]:
    """Yield what the base model's checkpoint would hold of a module, adapters left out.

    Args:
        meet: called with each of PEFT's modules and its path. It raises for those that are neither
            LoRA layers nor copies of a module.
    """
    from peft.tuners.lora import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        meet(module, path)
        if isinstance(module, ModulesToSaveWrapper):
            copies = module.modules_to_save
            active = next((name for name in module.active_adapters if name in copies), None)
            origins = {one.name: one.origin for one in walk(module.original_module, path, meet)}
            used = module.original_module if active is None else copies[active]
            for one in walk(used, path, meet):
                yield replace(one, origin=origins[one.name])
            return
        module = module.base_layer if isinstance(module, ParamWrapper) else module.get_base_layer()
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield Found(joined(path, name), parameter, parameter, is_parameter=True)
    for name, buffer in saved_buffers_of(module):
        yield Found(joined(path, name), buffer, buffer, is_parameter=False)
    for name, child in module.named_children():
        yield from walk(child, joined(path, name), meet)


def in_checkpoint_order(found: list[Found]) -> dict[str, torch.Tensor]:
    """Return the tensors by name: parameters, then buffers, as `parameters_of` has them."""
    return {one.name: one.tensor for one in sorted(found, key=lambda one: not one.is_parameter)}
