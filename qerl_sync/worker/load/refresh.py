"""Packed copies of tied heads, which vLLM's CPU kernels compute with and a reload leaves old."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from qerl_sync.worker.compat import engine as compat


def after_reload(model: torch.nn.Module) -> None:
    """Give tied heads the packed copy of the new embeddings, or have them packed once more.

    No tensor arrives for a head that shares its parameter with the embeddings, so the reload puts
    the shared parameter back (already new) and leaves the head's packed copy old.
    """
    for path, (owner, _) in tied_parameters(model).items():
        layer = model.get_submodule(path)
        method = getattr(layer, "quant_method", None)
        if method is not None and not compat.lend_packing(model.get_submodule(owner), layer):
            method.process_weights_after_loading(layer)


def heads_of(
    model: torch.nn.Module, tied: Mapping[str, tuple[str, str]], layer: torch.nn.Module
) -> list[torch.nn.Module]:
    """Return the modules that share a parameter of `layer`. Args as `packed_anew_bytes`."""
    return [
        model.get_submodule(path)
        for path, (owner, _) in tied.items()
        if model.get_submodule(owner) is layer
    ]


def packed_anew_bytes(
    model: torch.nn.Module,
    tied: Mapping[str, tuple[str, str]],
    working_bytes: Mapping[str, int],
) -> int:
    """Return the bytes that `after_reload` needs: a new packed head, beside the old one.

    Args:
        tied: see `tied_parameters`; in an open reload nothing is tied.
        working_bytes: see `compat.working_bytes`; of a layer that is packed, two copies.
    """
    found = 0
    for path, (owner, _) in tied.items():
        layer = model.get_submodule(path)
        if compat.packs(layer) and not compat.can_lend_packing(model.get_submodule(owner), layer):
            found = max(found, working_bytes[path] // 2)
    return found


def tied_parameters(model: torch.nn.Module) -> dict[str, tuple[str, str]]:
    """Return the modules that share a parameter object with an earlier one, in module order: by
    path, which module has it first, and its name.

    What no loader fills (a router's correction, which vLLM 0.25 hands to the experts as well) is
    shared without being packed: the experts are no tied head for that.
    """
    modules = dict(model.named_modules())
    uses = Counter(id(p) for module in modules.values() for p in module._parameters.values())
    owners: dict[int, tuple[str, str]] = {}
    tied: dict[str, tuple[str, str]] = {}
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            # Of most models none is shared, and asking vLLM of each layer costs more than a walk.
            if parameter is None or uses[id(parameter)] == 1:
                continue
            if name not in compat.loadable_tensors(module):
                continue
            if owners.setdefault(id(parameter), (path, name))[0] != path:
                tied.setdefault(path, owners[id(parameter)])
    return tied
