"""State that vLLM derives from weights and does not derive again when they are reloaded.

Both cases leave the old weights in use without an error; both are of vLLM's CPU kernels, which
compute with packed copies of the parameters.
"""

from __future__ import annotations

import torch

from qerl_sync.worker import compat


def before_processing(layer: torch.nn.Module) -> None:
    """Unquantised experts on CPU: make vLLM pack the new weights.

    `UnquantizedFusedMoEMethod` packs only while it has no kernel, and takes every later load for
    an update in place, which the packed copy does not see. Without its kernel it packs and builds
    a new one. On GPUs the kernel reads the parameters themselves and captured graphs hold their
    addresses, so nothing is touched there.
    """
    compat.forget_packed_experts(layer)


def after_reload(model: torch.nn.Module) -> list[str]:
    """Tied heads: pack the new embeddings again. Returns the modules that were refreshed.

    No tensor arrives for a head that shares its parameter with the embeddings, so the reload puts
    the shared parameter back (already new) and leaves the head's packed copy old.
    """
    refreshed = []
    for path in tied_layers(model):
        layer = model.get_submodule(path)
        method = getattr(layer, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(layer)
            refreshed.append(path)
    return refreshed


def tied_layers(model: torch.nn.Module) -> list[str]:
    """Modules that share a parameter object with an earlier module, in module order."""
    seen: set[int] = set()
    tied = []
    for path, module in model.named_modules():
        parameters = {id(p) for p in module._parameters.values() if p is not None}
        if parameters & seen:
            tied.append(path)
        seen |= parameters
    return tied
