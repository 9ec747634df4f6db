"""Tell whether a worker holds the version that a sync of a part of the model builds on."""

from __future__ import annotations

from collections.abc import Collection

import torch

from qerl_sync.verify.changes import fingerprint
from qerl_sync.worker.compat import engine as compat


@torch.no_grad()
def sample_kernels(model: torch.nn.Module, layers: Collection[str]) -> dict[str, int]:
    """Hash a few thousand bytes of each parameter of these layers, where it lies.

    It tells whether something else has written to them as a whole: a reload by another way, or an
    engine that slept and dropped its weights.
    """
    return {
        f"{path}.{name}": hash(tuple(fingerprint(_memory(one)) for one in parts))
        for path, layer in modules_at(model, layers).items()
        for name, parameter in layer._parameters.items()
        if parameter is not None and (parts := compat.tensors_of(parameter))
    }


def emptied_layers(model: torch.nn.Module, layers: Collection[str]) -> list[str]:
    """Return those of these layers that an attention layer has taken the weights of.

    It takes them again at the end of each reload, and finds nothing unless they have arrived in it
    (MLA on CPUs with AMX empties `kv_b_proj`).
    """
    empty = {
        path: layer
        for path, layer in modules_at(model, layers).items()
        if any(p is not None and not p.numel() for p in layer._parameters.values())
    }
    if not empty:
        return []
    within = {part for one in model.modules() if compat.is_deferred(one) for part in one.modules()}
    return [path for path, layer in empty.items() if layer in within]


def modules_at(model: torch.nn.Module, paths: Collection[str]) -> dict[str, torch.nn.Module]:
    """Return the modules by path. One walk: torch's `get_submodule` takes one for each path."""
    known = dict(model.named_modules())
    # A module that has two paths is listed under one.
    return {path: known[path] if path in known else model.get_submodule(path) for path in paths}


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes behind a tensor, whatever its dtype and strides."""
    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return raw.set_(tensor.untyped_storage())
