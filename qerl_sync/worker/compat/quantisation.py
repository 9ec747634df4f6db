"""How a live engine holds its weights: which layers are quantised, and why the others are not."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch

from qerl_sync.worker.compat.engine import tensors_of

# Parameters that hold a layer's weights, by vLLM's names for all its quantisation methods.
_WEIGHTS = re.compile(r"^(q?weight|w13|w2)(_|$)")
_BESIDE = re.compile(r"scale|zero|shape|_zp|g_idx|bias")
_INDEX = re.compile(r"\.\d+(?=\.|$)")


def quantisation_of(model: torch.nn.Module, vllm_config: Any) -> dict[str, Any]:
    """Return how the engine's layers hold their weights, in plain values.

    scheme: vLLM's name, None without one. from_checkpoint: the checkpoint was quantised, and vLLM
    does not quantise what arrives. bits: the number of layers, by the bits of a weight.
    high_precision: why a layer is not quantised, by its path, with `*` for numbers.
    """
    scheme = vllm_config.model_config.quantization
    layers = _layers(model)
    bits = {path: _bits(layer) for path, layer in layers.items()}
    return {
        "scheme": scheme,
        "from_checkpoint": scheme is not None and is_from_checkpoint(vllm_config),
        "bits": {str(n): count for n, count in sorted(Counter(bits.values()).items())},
        "high_precision": {
            _INDEX.sub(".*", path): _why_not(layer, vllm_config.quant_config)
            for path, layer in layers.items()
            if scheme is not None and bits[path] >= 16
        },
    }


def quantised_layers(model: torch.nn.Module) -> frozenset[str]:
    """Return the layers whose weights have fewer than 16 bits."""
    return frozenset(path for path, layer in _layers(model).items() if _bits(layer) < 16)


def slow_layer(model: torch.nn.Module) -> str | None:
    """Return a layer whose fp8 products this CPU computes with oneDNN's reference loop, if any."""
    if not multiplies_fp8_by_reference():
        return None
    for path, layer in _layers(model).items():
        for one in (layer.quant_method, getattr(layer, "scheme", None)):
            if "TorchFP8ScaledMM" in type(getattr(one, "fp8_linear", None)).__name__:
                return path
    return None


def multiplies_fp8_by_reference() -> bool:
    """Return whether torch's `_scaled_mm` of fp8 takes oneDNN's reference loop on this CPU.

    torch hands it to oneDNN on every CPU with AMX, and oneDNN has fp8 kernels only for those with
    AMX-FP16, which Sapphire and Emerald Rapids lack. Measured on one of these, with torch 2.13, for
    256 x 128 x 256: 363 ms, and 0.9 ms where torch computes it itself.
    """
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # none in older torch
    return able.get("amx_tile", False) and not able.get("amx_fp16", False)


def is_from_checkpoint(vllm_config: Any) -> bool:
    """Return whether the engine was loaded from a checkpoint that was quantised before."""
    config = vllm_config.model_config
    parts = (config.hf_config, config.hf_text_config)
    return any(getattr(part, "quantization_config", None) for part in parts)


def _layers(model: torch.nn.Module) -> dict[str, Any]:
    """Return the layers with weights that vLLM may quantise. LoRA wraps them."""
    return {
        path.removesuffix(".base_layer"): module
        for path, module in model.named_modules()
        if (method := getattr(module, "quant_method", None)) is not None
        and hasattr(method, "create_weights")
        and "KVCache" not in type(method).__name__  # of attention: scales, and no weights
    }


def _bits(layer: Any) -> int:
    """Return the bits of one weight of the layer; 16 and more: it is not quantised."""
    held = [
        tensor
        for name, parameter in layer.named_parameters(recurse=False)
        if _WEIGHTS.match(name) and not _BESIDE.search(name)
        for tensor in tensors_of(parameter)
    ]
    floating = [p for p in held if p.is_floating_point() and p.itemsize > 1]
    if type(layer.quant_method).__name__.startswith("Unquantized") or (held and floating == held):
        return 8 * max((p.itemsize for p in held), default=4)
    told = _told_bits(layer)
    return told or min((8 * p.itemsize for p in held if p.itemsize == 1), default=8)


def _told_bits(layer: Any) -> int | None:
    """Return the bits that a method says it packs weights with, several to a number."""
    method = layer.quant_method
    scheme = getattr(layer, "scheme", None)
    for one in (scheme, method, getattr(method, "quant_config", None)):
        for name in ("num_bits", "weight_bits"):
            if isinstance(bits := getattr(one, name, None), int):
                return bits
    kind = type(method if scheme is None else scheme).__name__
    found = re.search(r"(?:[Ff][Pp]|[Ii]nt|INT|W)(\d+)", kind)
    return int(found[1]) if found else None


def _why_not(layer: Any, quant_config: Any) -> str:
    method, kind = type(layer.quant_method).__name__, type(layer).__name__
    if not method.startswith("Unquantized"):
        return f"{method} has left it as it was"
    if hasattr(layer, "num_embeddings"):
        return f"vLLM does not quantise {kind} with this scheme"
    if hasattr(layer, "quant_config") and layer.quant_config is None:
        return "the model makes it without quantisation"
    names = ("ignored_layers", "ignore", "modules_to_not_convert")
    if any(getattr(quant_config, name, None) for name in names):
        return "the configuration names it among the layers to ignore"
    return f"the scheme has nothing for {kind}"
