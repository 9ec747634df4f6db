"""Tensors of a model that share memory with a parameter, or did so before vLLM packed it.

vLLM writes a reload into the parameters. What is a view of one has the new weights at once; what
has become a tensor of its own keeps the old ones, without an error. Mamba-2 is an example: its
kernel reads a buffer `conv_weights`, made as a view of `conv1d.weight`, and CPUs with AVX512_BF16
give that parameter other memory when they pack it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qerl_sync.buffers.detect import storage_key
from qerl_sync.errors import LayerMapError, LoadError
from qerl_sync.worker.compat import engine as compat

_Find = Callable[[], Any]


@dataclass(frozen=True)
class LostView:
    """A buffer that was a view of a parameter when the model was built, and is none any more."""

    path: str  # of the module that has the buffer
    name: str
    owner: torch.nn.Module
    source_path: str  # of the module that has the parameter
    parameter: str
    source: torch.nn.Module

    def renew(self) -> None:
        """Copy what arrived for the parameter, before it is packed.

        Call it when `source` is whole and not yet processed.
        """
        loaded = compat.arrived_value(self.source, self.parameter)
        buffer = compat.live_tensors(self.owner)[self.name]
        view = loaded.as_strided(buffer.shape, buffer.stride(), buffer.storage_offset())
        buffer.copy_(view)


def lost_views(model: torch.nn.Module) -> list[LostView]:
    """Find the buffers that were views of parameters. Call it outside of a reload.

    vLLM's record of the model as it was built leaves buffers out that were views of parameters.
    Such a buffer still holds the parameter's first memory, so its size says which parameter it was;
    of several with that size, the one whose present values are the same, rearranged.

    Raises:
        LayerMapError: of several parameters none is certain. Nothing has been touched.
    """
    found = []
    for path, owner in model.named_modules():
        for name, buffer in compat.unrecorded_buffers(owner):
            if storage_key(buffer) in {storage_key(p) for p in owner.parameters()}:
                continue
            candidates = list(_candidates(owner, path, buffer))
            if len(candidates) > 1:
                named = " or ".join(f"{at}.{parameter}" for at, parameter, _ in candidates)
                raise LayerMapError(
                    f"the buffer {path}.{name} was a view of {named} when the model was built and "
                    "has memory of its own now. Which one is unknown, so that a sync would "
                    "leave old weights in it. This architecture cannot be synced with these "
                    "kernels; start the engine with another quantization or on another device"
                )
            found += [LostView(path, name, owner, *candidate) for candidate in candidates]
    return found


def _candidates(
    owner: torch.nn.Module, path: str, buffer: torch.Tensor
) -> Iterator[tuple[str, str, torch.nn.Module]]:
    nbytes = buffer.untyped_storage().nbytes()
    whole = buffer.detach().as_strided((nbytes // buffer.itemsize,), (1,), 0)
    for below, module in owner.named_modules():
        for name, shape in compat.recorded_parameters(module).items():
            if shape.dtype != buffer.dtype or shape.nbytes != nbytes:
                continue
            live: Any = getattr(module, name, None)
            # A parameter that was emptied when it was packed has no values to compare.
            compares = isinstance(live, torch.Tensor) and live.numel() == shape.numel()
            if not compares or _sum_of_bits(live) == _sum_of_bits(whole):
                yield ".".join(filter(None, (path, below))), name, module


def _sum_of_bits(tensor: torch.Tensor) -> int:
    """Return a sum that is equal for two tensors with the same values in another order."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return int(tensor.detach().contiguous().view(-1).view(integer).sum(dtype=torch.int64))


@dataclass(frozen=True)
class _View:
    """A tensor in a module that shares memory with a parameter."""

    place: str
    tensor: torch.Tensor
    find: _Find  # returns its container: attributes, buffers, a list
    key: Any
    module: torch.nn.Module  # the parameter's
    parameter: str
    path: str
    data: torch.Tensor


class Views:
    """The tensors of a model that share memory with its parameters when a sync begins.

    Buffers and attributes of modules are looked at, and the elements of lists and dictionaries that
    are attributes.

    Args:
        stay: layers whose parameters keep their memory throughout the sync.
    """

    def __init__(self, model: torch.nn.Module, stay: Collection[torch.nn.Module] = ()) -> None:
        staying = set(map(id, stay))
        owners = {
            storage_key(parameter): (module, name, f"{path}.{name}")
            for path, module in model.named_modules()
            if id(module) not in staying
            for name, parameter in module._parameters.items()
            if parameter is not None and not parameter.is_meta and parameter.numel()
        }
        # Mostly there are none on a GPU, and to look for them is a walk over all attributes.
        self._views = [
            _View(place, tensor, find, key, *owner, owner[0]._parameters[owner[1]].data)
            for place, tensor, find, key in (_reachable(model) if owners else ())
            if (owner := owners.get(storage_key(tensor))) is not None
        ]

    def restore(self) -> None:
        """Make each of them a view of its parameter again. Call it when the reload is finished.

        vLLM processes a layer in new memory and copies the result to the live parameter. A kernel
        that takes a view while it processes a layer is left with one of that new memory.

        Raises:
            LoadError: one of them cannot be a view of the parameter as it is now.
        """
        for view in self._views:
            container, live = view.find(), view.module._parameters.get(view.parameter)
            try:
                now = container[view.key]
            except (KeyError, IndexError, TypeError):  # the kernel has dropped it
                continue
            if live is None or not isinstance(now, torch.Tensor):
                continue
            memory, same_layout = storage_key(live), _layout(now) == _layout(view.tensor)
            if storage_key(now) == memory:
                continue
            if same_layout and storage_key(view.tensor) == memory:
                container[view.key] = view.tensor
            elif same_layout and _layout(live) == _layout(view.data):
                offset = view.tensor.storage_offset() - view.data.storage_offset()
                offset += live.storage_offset()
                container[view.key] = live.data.as_strided(now.shape, now.stride(), offset)
            else:
                raise LoadError(
                    f"{view.place} shared the memory of {view.path} before the sync and does not "
                    f"after it: {now.dtype} {list(now.shape)}, and the parameter is {live.dtype} "
                    f"{list(live.shape)}. It may hold old weights. This architecture cannot be "
                    "synced with these kernels; report it, and restart the engine to get new "
                    "weights"
                )


def _reachable(
    model: torch.nn.Module,
) -> Iterator[tuple[str, torch.Tensor, _Find, Any]]:
    """Yield each tensor with its name, what finds its container, and its key in that.

    A kernel may replace a container as a whole, so that it is found anew each time.
    """
    for path, module in model.named_modules():
        finders = {path: partial(getattr, module, "_buffers"), f"{path} ": partial(vars, module)}
        for name, value in vars(module).items():
            if isinstance(value, list | dict) and name not in compat.TORCHS_OWN:
                finders[f"{path}.{name}"] = partial(getattr, module, name, {})
        for place, find in finders.items():
            container = find()
            items = enumerate(container) if isinstance(container, list) else container.items()
            for key, value in items:
                if isinstance(value, torch.Tensor) and not value.is_meta and value.numel():
                    yield f"{place.rstrip()}.{key}", value, find, key


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
