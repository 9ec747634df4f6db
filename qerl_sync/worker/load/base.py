"""Whether a worker holds the version that a sync of a part of the model builds on."""

from __future__ import annotations

from collections.abc import Collection

import torch

from qerl_sync.verify.changes import fingerprint
from qerl_sync.worker.compat import engine as compat


@torch.no_grad()
def sample_kernels(model: torch.nn.Module, layers: Collection[str]) -> dict[str, int]:
    """Hash a few thousand bytes of each parameter of these layers, where it lies.

    It tells whether somebody else has written to them as a whole: a reload by another way, or an
    engine that slept and dropped its weights.
    """
    return {
        f"{path}.{name}": hash(tuple(fingerprint(_memory(one)) for one in parts))
        for path in layers
        for name, parameter in model.get_submodule(path).named_parameters(recurse=False)
        if (parts := compat.tensors_of(parameter))
    }


def emptied_layers(model: torch.nn.Module, layers: Collection[str]) -> list[str]:
    """Return those of these layers whose parameters another layer has taken and emptied.

    That one takes them again at the end of each reload (MLA on CPUs with AMX takes `kv_b_proj`), so
    that they must arrive in each. What a layer has packed for itself stays with it.
    """
    return [
        path
        for path in layers
        if not compat.packs(layer := model.get_submodule(path))
        and any(not p.numel() for p in layer.parameters(recurse=False))
    ]


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes behind a tensor, whatever its dtype and strides."""
    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return raw.set_(tensor.untyped_storage())
