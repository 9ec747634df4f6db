"""What the suite asks of a vLLM worker: what its kernels hold, and whether it is in order."""

from __future__ import annotations

import copy
import os
import threading
from pathlib import Path
from typing import Any

from support.reloads import unfinished

from qerl_sync.worker import compat
from qerl_sync.worker.kernel_weights import kernel_digests
from qerl_sync.worker.receiver import Receiver

NAME = f"{__name__}.Inspector"


class Inspector:
    """A base that vLLM gives to its worker class (`worker_extension_cls`)."""

    model_runner: Any
    vllm_config: Any

    def fault_held(self) -> dict[str, str]:
        """What this rank's kernels hold."""
        return kernel_digests(self.model_runner.model)

    def fault_fresh(self, path: str) -> dict[str, str]:
        """What they would hold, had this rank been started with the checkpoint at `path`."""
        return kernel_digests(fresh_model(self.vllm_config, path))

    def fault_state(self) -> dict[str, Any]:
        return state_of(self.model_runner.model, self.vllm_config)

    def fault_break(self, rank: int, path: str) -> None:
        """Make vLLM fail when it processes a layer, on rank `rank` alone; -1 on all.

        Args:
            path: what the layer's name ends with; "": one in the middle.
        """
        if rank in (-1, self.vllm_config.parallel_config.rank):
            break_loader(self.model_runner.model, path)

    def fault_mend(self) -> None:
        mend_loader(self.model_runner.model)


def fresh_model(vllm_config: Any, path: str) -> Any:
    """This rank's model, had it been started with the checkpoint at `path`."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    config = copy.copy(vllm_config)
    config.model_config = copy.copy(config.model_config)
    config.model_config.model = path
    # Where layers register by name, each once.
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.static_forward_context = {}
    config.compilation_config.static_all_moe_layers = []
    with set_current_vllm_config(config):
        return get_model(vllm_config=config)


def state_of(model: Any, vllm_config: Any) -> dict[str, Any]:
    """Of this process: why it does not serve (or ""), what a reload left open, what it has open."""
    import torch

    parts = compat.EngineParts(model, vllm_config, torch.device("cpu"))
    receiver = Receiver(parts)
    return {
        "poisoned": receiver.poisoned or "",
        "version": receiver.version,
        "unfinished": unfinished(model),
        "hooks": len(model._forward_pre_hooks),
        **own_inventory(),
    }


def own_inventory() -> dict[str, int]:
    """What this process has open that belongs to a sync, or may."""
    names = [thread.name for thread in threading.enumerate()]
    return {
        "threads": sum(name.startswith("qerl-sync") for name in names),
        "sockets": sum(_link(fd).startswith("socket:") for fd in os.listdir("/proc/self/fd")),
        "mapped segments": Path("/proc/self/maps").read_text().count("/qerl_sync-"),
    }


def _link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # it was the one that lists the others
        return ""


# In the middle, of those that vLLM processes when they are whole.
BREAKABLE = ("layers.1.mlp.gate_up_proj", "layers.1.mlp.experts.routed_experts")


def break_loader(model: Any, path: str = "") -> None:
    layers = [m for p, m in model.named_modules() if p.endswith((path,) if path else BREAKABLE)]
    if not layers:
        raise LookupError(f"the model has no layer {path or BREAKABLE} to break")

    def fail(layer: Any) -> None:
        others = sum(_has_begun(one) for one in model.modules() if one is not layers[0])
        raise RuntimeError(f"no kernel for this shape; {others} other layers have begun")

    layers[0].quant_method.process_weights_after_loading = fail


def mend_loader(model: Any) -> None:
    for layer in model.modules():
        if (method := getattr(layer, "quant_method", None)) is not None:
            vars(method).pop("process_weights_after_loading", None)


def _has_begun(layer: Any) -> bool:
    """Whether a reload has brought some of its elements and not all."""
    state = compat.layer_state(layer)
    return state.total_numel is not None and 0 < state.loaded_numel < state.total_numel
