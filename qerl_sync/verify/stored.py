"""Compute with weights as an engine keeps them: rounded to its dtype, and quantised."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

# Of a module's path and its weight to what the engine computes with in its place.
Stored = Callable[[str, torch.nn.Module, torch.Tensor], torch.Tensor]

_INDEX = re.compile(r"\.\d+(?=\.|$)")
_FP8_MAX = 448.0


def stored_by(quantisation: Mapping[str, Any], dtype: str) -> Stored | None:
    """Return how an engine with this `SyncReport.quantisation` that computes in `dtype` keeps
    weights; None: that is not known here.
    """
    scheme, rounded = quantisation.get("scheme"), getattr(torch, dtype, None)
    if rounded is None or quantisation.get("from_checkpoint"):
        return None
    if scheme not in (None, "fp8_per_channel"):
        return None
    kept = quantisation.get("high_precision", {})

    def stored(path: str, module: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
        value = weight.detach().to(rounded)
        plain = _INDEX.sub(".*", path)
        if scheme is not None and isinstance(module, torch.nn.Linear) and plain not in kept:
            value = fp8_per_channel(value)
        return value.to(weight.dtype)

    return stored


def fp8_per_channel(weight: torch.Tensor) -> torch.Tensor:
    """Return in float32 what vLLM's `fp8_per_channel` holds: float8_e4m3fn, a scale an output."""
    exact = weight.float()
    scale = exact.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / _FP8_MAX
    held = (exact / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    return held.float() * scale


@contextmanager
def weights_as_stored(modules: Mapping[str, torch.nn.Module], stored: Stored) -> Iterator[None]:
    """Have each of these modules compute with what the engine keeps of its weight, in this context.

    One module's at a time is made, for its call; the weights themselves are only read.
    """

    lent: dict[str, torch.nn.Parameter] = {}

    def swap(path: str, module: torch.nn.Module, inputs: Any) -> None:
        own = module._parameters["weight"]
        assert own is not None
        lent[path] = own
        held = stored(path, module, own)
        module._parameters["weight"] = torch.nn.Parameter(held, requires_grad=False)

    def put_back(path: str, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        module._parameters["weight"] = lent.pop(path)

    with ExitStack() as hooks:
        for path, module in modules.items():
            handles = (
                module.register_forward_pre_hook(partial(swap, path)),
                # Also where the call fails: no module may be left with another's weight. And before
                # the hooks that release a gathered weight (ZeRO-3), as it was taken after theirs.
                module.register_forward_hook(
                    partial(put_back, path), prepend=True, always_call=True
                ),
            )
            for handle in handles:
                hooks.callback(handle.remove)
        yield
