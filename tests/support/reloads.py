"""What checks, and nothing else, need of vLLM's internals: see `compat` for the rest."""

from __future__ import annotations

import torch

from qerl_sync.worker.compat import _layerwise, layer_state


def unfinished(model: torch.nn.Module) -> list[str]:
    """What a reload has left open: tensors on meta, layers half loaded, loading wrappers. Empty for
    a model that was restored, or never reloaded."""
    layerwise = _layerwise()
    found = []
    for path, layer in model.named_modules():
        info = layerwise.LAYERWISE_INFO.get(layer)
        if info is not None and info.can_load():
            state = layer_state(layer)
            found.append(f"{path}: {state.loaded_numel:,} of {state.total_numel} elements")
        for name, tensor in layerwise.get_layer_tensors(layer).items():
            if tensor.is_meta:
                found.append(f"{path}.{name} is on meta")
            if layerwise._get_weight_loader(tensor).__name__ == "online_process_loader":
                found.append(f"{path}.{name} has a loading wrapper")
    return found + [f"{len(layerwise.LOADING_LAYERS)} loading"] * bool(layerwise.LOADING_LAYERS)


def use_plain_kernels() -> None:
    """From here on, CPU layers of this process keep their parameters as they are, as unquantised
    GPU kernels do, instead of packing them. vLLM decides when it processes a layer."""
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *arguments, **options: False
