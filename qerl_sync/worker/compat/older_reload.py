"""Make the layerwise reload of an older vLLM (0.25) behave as that of 0.31.

Each function asks for the feature, not for the version, and does nothing where vLLM has it.

Coupling points, all in vLLM's `model_executor/model_loader/reload`:

    meta.SKIP_LOAD_TENSORS                 0.25 has one set, SKIP_TENSORS, for both purposes
    layerwise.is_deferred_attention_layer  0.25 tests for Attention and MLAAttention in place, and
                                           asks `has_device_tensors` of a layer that is neither
    LayerReloadingInfo.kernel_non_persistent_buffers
                                           0.25 does not tell derived buffers from loaded ones
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

# Of each layer, the buffers that no checkpoint has, as they were before its first reload.
_DERIVED: WeakKeyDictionary[torch.nn.Module, frozenset[str]] = WeakKeyDictionary()


def is_deferred(layerwise: Any, layer: torch.nn.Module) -> bool:
    """Return whether vLLM processes this layer at the end of the reload, whatever arrives."""
    if hasattr(layerwise, "is_deferred_attention_layer"):
        return bool(layerwise.is_deferred_attention_layer(layer))
    return isinstance(layer, layerwise.Attention | layerwise.MLAAttention)


def begin_reload(layerwise: Any, model: torch.nn.Module) -> None:
    """Call `initialize_layerwise_reload`, and keep derived buffers non-persistent.

    0.25 makes every buffer that it restores a persistent one, as if a checkpoint filled it.
    """
    derived = {layer: frozenset(layer._non_persistent_buffers_set) for layer in model.modules()}
    layerwise.initialize_layerwise_reload(model)
    for layer, names in derived.items():
        info = layerwise.LAYERWISE_INFO.get(layer)
        if info is None or _knows_derived(info):
            continue
        info.kernel_non_persistent_buffers = _DERIVED.setdefault(layer, names) | names
        _stay_derived(layer, info)


def keep_derived_buffers(layer: torch.nn.Module, info: Any) -> None:
    """Keep the values of derived buffers, which 0.25 would overwrite with uninitialised memory.

    Call it before a processed layer is copied into its live tensors.
    """
    if _knows_derived(info):
        return
    loaded = {name for name, _ in info.loaded_weights}
    _, buffers = info.kernel_tensors
    for name in info.kernel_non_persistent_buffers - loaded:
        if name in layer._buffers and name in buffers:
            layer._buffers[name] = buffers[name]
    # What a quantiser made anew has the global rank; a layer that is replicated has another.
    update = getattr(layer, "update_param_tp_status", None)
    if callable(update):
        update()


def placed_back(layer: torch.nn.Module, info: Any) -> None:
    """Mark derived buffers non-persistent again, once vLLM has put a layer's live tensors back."""
    if not _knows_derived(info):
        _stay_derived(layer, info)


def place_empty_layers(layerwise: Any, model: torch.nn.Module) -> None:
    """Put back the live buffers, which 0.25 would not, of layers that nothing can be loaded into.
    Call it before the reload is finished."""
    for layer in model.modules():
        info = layerwise.LAYERWISE_INFO.get(layer)
        if info is None or _knows_derived(info) or info.kernel_tensors is None:
            continue
        if info.can_load() and not info.load_numel_total:
            layerwise._place_kernel_tensors(layer, info)


def _knows_derived(info: Any) -> bool:
    return "kernel_non_persistent_buffers" in type(info).__dataclass_fields__


def _stay_derived(layer: torch.nn.Module, info: Any) -> None:
    layer._non_persistent_buffers_set |= info.kernel_non_persistent_buffers & layer._buffers.keys()
