"""A LoRA adapter on its way into a live engine: gathered, built aside, swapped in at the commit."""

from __future__ import annotations

from typing import Any

import torch

from qerl_sync.errors import CoverageError
from qerl_sync.plan.adapter import Adapter
from qerl_sync.worker.compat import engine as compat
from qerl_sync.worker.compat import lora as vllm_lora


class AdapterLoad:
    """One sync's adapter. `take` each tensor, `build`, `swap` at the commit.

    Until `swap` the engine's own state is not touched: an adapter that does not arrive, or cannot
    be right, leaves the one before it serving.
    """

    def __init__(self, parts: compat.EngineParts, adapter: Adapter) -> None:
        self._parts = parts
        self._adapter = adapter
        self._names = {meta.name for meta in adapter.metas}
        self._tensors: dict[str, torch.Tensor] = {}
        self._built: Any = None

    def __contains__(self, name: str) -> bool:
        """Return whether this is one of its tensors, and not of the base model."""
        return name in self._names

    def take(self, name: str, tensor: torch.Tensor) -> None:
        """Copy a tensor, into vLLM's dtype: its memory is used again, or stepped by the trainer."""
        dtype = self._parts.vllm_config.lora_config.lora_dtype
        self._tensors[name] = tensor.detach().to("cpu", dtype, copy=True)

    def build(self) -> None:
        """Make vLLM's form of the adapter, which `require_servable` has let pass."""
        self._built = vllm_lora.build_adapter(self._parts, self._adapter, self._tensors)
        self._tensors = {}

    def swap(self, *, verify: bool) -> None:
        """Serve it from now on. If vLLM fails in the middle, serve the one before it again.

        Args:
            verify: read back what vLLM's layers hold.

        Raises:
            CoverageError: it is not the adapter; `layer`.
        """
        runner = self._parts.runner
        before = vllm_lora.served_adapter(runner)
        try:
            vllm_lora.serve(runner, self._built)
            if verify and (layer := vllm_lora.wrongly_held(runner, self._built)):
                raise CoverageError(
                    f"vLLM's layer {layer!r} does not hold the adapter that arrived; report it, "
                    "with the model's architecture, and choose sync.lora: merge",
                    layer=layer,
                )
        except BaseException:
            vllm_lora.serve(runner, before)
            raise
