"""What a vLLM model computes with, as hashes: parameters, buffers and what CPU kernels packed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch


def fingerprint(model: torch.nn.Module) -> dict[str, str]:
    """Equal for two models if and only if their kernels hold the same weights.

    CPU linear layers keep their weight in a packed handle and leave an empty parameter behind; the
    product with the identity matrix gives it back exactly.
    """
    hashes = {}
    for name, tensor in _named_tensors(model):
        assert not tensor.is_meta, f"{name} is on meta: the model is in the middle of a reload"
        hashes[f"tensor {name}"] = _hash(tensor)
    for name, module in model.named_modules():
        linear, weight = getattr(module, "cpu_linear", None), getattr(module, "weight", None)
        packed = getattr(linear, "__closure__", None) is not None
        emptied = weight is not None and not weight.numel() and not packed
        if linear is not None and weight is not None and not emptied:
            eye = torch.eye(_input_size(module), dtype=weight.dtype)
            hashes[f"linear {name}"] = _hash(linear(eye, weight, None))
    return hashes


def difference(a: dict[str, str], b: dict[str, str]) -> list[str]:
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def _named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for path, module in model.named_modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        experts: Any = getattr(kernel, "fused_experts", None)
        for name, value in vars(experts).items() if experts is not None else ():
            if isinstance(value, torch.Tensor):
                yield f"{path}.moe_kernel.{name}", value


def _input_size(module: torch.nn.Module) -> int:
    for name in ("input_size_per_partition", "input_size", "embedding_dim"):
        size = getattr(module, name, None)
        if size:
            return int(size)
    raise AssertionError(f"no input size on {type(module).__name__}")


def _hash(tensor: torch.Tensor) -> str:
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(raw, digest_size=8).hexdigest()
