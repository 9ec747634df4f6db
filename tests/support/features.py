"""Tests that not every vLLM in the window can run: they ask for the feature, not the version."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from qerl_sync.worker.compat import coupling
from qerl_sync.worker.compat import engine as compat

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed (scripts/deepspeed)"
)


def needs(feature: str) -> pytest.MarkDecorator:
    """Skip where the installed vLLM lacks what this feature of `coupling.FEATURES` uses."""
    absent = [name for name, used in coupling.lookup(feature).items() if not used]
    return pytest.mark.skipif(bool(absent), reason=f"{feature}: vLLM has no {', '.join(absent)}")


def require_kernels(kernels: str) -> None:
    """Skip the test where the installed vLLM has no such kernels for a CPU.

    Call it before the engine starts: vLLM 0.25's `set_default_torch_dtype` does not restore torch's
    default dtype when the start fails, and every later test computes in bfloat16.
    """
    if kernels == "fp8":
        from vllm.model_executor.layers.quantization.online import fp8

        if not hasattr(fp8, "_fp8_quant_per_channel"):
            pytest.skip(
                "this vLLM has no online.fp8._fp8_quant_per_channel: it needs CUDA's kernel"
            )


def require_packed(model: Any, suffix: str) -> None:
    """Skip the test where the kernels of layers whose path ends so compute with the parameters."""
    layers = [layer for path, layer in model.named_modules() if path.endswith(suffix)]
    assert layers, f"the model has no {suffix}"
    if not any(map(compat.packs, layers)):
        pytest.skip(f"this vLLM's CPU kernels keep no packed copy of {suffix}")
