"""What a vLLM model computes with, as hashes: parameters, buffers, what CPU kernels packed, and the
tensors that quantisation methods and their kernels keep beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch


def fingerprint(model: torch.nn.Module) -> dict[str, str]:
    """Equal for two models if and only if their kernels hold the same weights.

    CPU linear layers keep their weight in a packed handle and leave an empty parameter behind; the
    product with the identity matrix gives it back exactly.
    """
    hashes = {}
    for name, tensor in named_tensors(model):
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


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor that the model's kernels read: parameters, buffers, and those that layers
    and their quantisation methods hold as attributes (scales, packed experts)."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for path, module in model.named_modules():
        own = {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
        yield from _held(own, path, depth=10, seen=set())


# Parameters and buffers are yielded by name. What lies in caches is computed, not loaded, and so is
# what a forward pass leaves for the layers (Gemma 4's `per_layer_embeddings`).
_OF_TORCH = {"_parameters", "_buffers", "_modules"}
_COMPUTED = {"kv_cache", "static_forward_context", "per_layer_embeddings"}


def _held(
    value: object, path: str, depth: int, seen: set[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors reachable from `value` through vLLM's own objects, but not through modules,
    which are walked by name, nor through configurations and process groups, which all share."""
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    if depth == 0 or id(value) in seen or isinstance(value, torch.nn.Module | type):
        return
    seen.add(id(value))
    home = type(value).__module__
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    elif home.startswith("vllm.model_executor."):
        parts = getattr(value, "__dict__", {}).items()
    else:
        return
    for name, part in list(parts):
        if name not in _COMPUTED:
            yield from _held(part, f"{path}.{name}", depth - 1, seen)


def _input_size(module: torch.nn.Module) -> int:
    for name in ("input_size_per_partition", "input_size", "embedding_dim"):
        size = getattr(module, name, None)
        if size:
            return int(size)
    raise AssertionError(f"no input size on {type(module).__name__}")


def _hash(tensor: torch.Tensor) -> str:
    """Of dtype, shape, order in memory and bytes: a kernel reads a transposed weight otherwise."""
    layout = f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}".encode()
    raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(layout + raw, digest_size=8).hexdigest()
