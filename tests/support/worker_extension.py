"""What tests ask of a vLLM worker in another process, over vLLM's own `collective_rpc`."""

from __future__ import annotations

import copy
import os
import threading
from pathlib import Path
from typing import Any

import torch

from qerl_sync.worker.compat import engine as compat
from qerl_sync.worker.compat import lora as vllm_lora
from qerl_sync.worker.load.receiver import Receiver
from support.cuda_stand_in import CudaStandIn
from support.fingerprint import fingerprint

NAME = f"{__name__}.WorkerExtension"
# In the middle, of the layers that vLLM processes when they are whole.
BREAKABLE = ("layers.1.mlp.gate_up_proj", "layers.1.mlp.experts.routed_experts")


async def ask_every_worker(engine: Any, method: str, *arguments: str) -> list[Any]:
    """Call a method of `WorkerExtension` on all data parallel replicas of an `AsyncLLM`, whose own
    `collective_rpc` returns what the first one answers."""
    core = engine.engine_core
    reported = ("collective_rpc", method, None, list(arguments), {})
    return [
        answer
        for replica in core.core_engines
        for answer in await core._call_utility_async(*reported, engine=replica)
    ]


class WorkerExtension:
    """A base that vLLM gives to its worker class (`worker_extension_cls`)."""

    model_runner: Any
    vllm_config: Any

    def held_weights(self) -> dict[str, str]:
        """What this rank's kernels hold."""
        return fingerprint(self.model_runner.model)

    def fresh_weights(self, path: str) -> dict[str, str]:
        """What they would hold, had this rank been started with the checkpoint at `path`."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import get_model

        config = copy.copy(self.vllm_config)
        config.model_config = copy.copy(config.model_config)
        config.model_config.model = path
        # Where layers register by name, each once.
        config.compilation_config = copy.copy(config.compilation_config)
        config.compilation_config.static_forward_context = {}
        config.compilation_config.static_all_moe_layers = []
        with set_current_vllm_config(config):
            return fingerprint(get_model(vllm_config=config))

    def sync_state(self) -> dict[str, Any]:
        """Why this rank does not serve (or ""), its version, what a reload left open, what it has
        open."""
        model, receiver = self.model_runner.model, self._receiver()
        return {
            "poisoned": receiver.poisoned or "",
            "version": receiver.version,
            "unfinished": unfinished(model),
            "resources": {**open_resources(), "hooks": len(model._forward_pre_hooks)},
        }

    def spoil(self, name: str) -> None:
        """Write zeros to a parameter, as an engine has them that dropped its weights."""
        self.model_runner.model.get_parameter(name).data.zero_()

    def break_loader(self, rank: int, path: str) -> None:
        """Make vLLM fail when it processes a layer, on rank `rank` alone; -1 on all.

        Args:
            path: what the layer's name ends with; "": one in the middle.
        """
        if rank not in (-1, self.vllm_config.parallel_config.rank):
            return
        model, ends = self.model_runner.model, (path,) if path else BREAKABLE
        layer = next(module for name, module in model.named_modules() if name.endswith(ends))

        def fail(_: Any) -> None:
            states = [compat.layer_state(one) for one in model.modules() if one is not layer]
            begun = sum(0 < state.loaded_numel < (state.total_numel or 0) for state in states)
            raise RuntimeError(f"no kernel for this shape; {begun} other layers have begun")

        layer.quant_method.process_weights_after_loading = fail

    def mend_loader(self) -> None:
        for layer in self.model_runner.model.modules():
            if (method := getattr(layer, "quant_method", None)) is not None:
                vars(method).pop("process_weights_after_loading", None)

    def fail_to_activate(self, rank: int) -> None:
        """Make vLLM fail, once, when rank `rank` takes an adapter into its slot."""
        if rank != self.vllm_config.parallel_config.rank:
            return
        own = vllm_lora.serve

        def fail(*given: Any) -> None:
            vllm_lora.serve = own
            raise RuntimeError("no slot")

        vllm_lora.serve = fail

    def set_variable(self, name: str, value: str) -> None:
        """Set an environment variable of this worker; "" removes it."""
        os.environ[name] = value
        if not value:
            del os.environ[name]

    def use_cuda_stand_in(self, uuid: str) -> None:
        """Let this worker take its host memory for that of the GPU `uuid`; "": for none."""
        CudaStandIn(uuid).install()

    def lose_view(self) -> None:
        """Give an attention a buffer that was a view of a norm's weight until that moved, as if the
        model had been loaded so."""
        attention = self._attention()
        attention.register_buffer("lost", attention.q_norm.weight.data, persistent=False)
        attention.q_norm.weight.data = attention.q_norm.weight.data.clone()
        self._lost = attention.lost.clone()
        self._receiver()._state.lost_views = None  # they are looked for once, in the first sync

    def view_is_renewed(self) -> bool:
        """Whether that buffer has changed, and holds what the weight holds."""
        attention = self._attention()
        changed = not attention.lost.equal(self._lost)
        return bool(changed and attention.lost.equal(attention.q_norm.weight))

    def drop_view(self) -> None:
        del self._attention().lost
        self._receiver()._state.lost_views = None

    def _receiver(self) -> Receiver:
        model = self.model_runner.model
        device = torch.device(self.model_runner.device)
        return Receiver(compat.EngineParts(model, self.vllm_config, device))

    def _attention(self) -> Any:
        return self.model_runner.model.model.layers[0].self_attn


def open_resources() -> dict[str, int]:
    """What this process has open that belongs to a sync, or may."""
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return {
        "threads": sum(thread.name.startswith("qerl-sync") for thread in threading.enumerate()),
        "sockets": sum("/socket:[" in link for link in links),
        "mapped segments": Path("/proc/self/maps").read_text().count("/qerl_sync-"),
    }


def unfinished(model: torch.nn.Module) -> list[str]:
    """What a reload has left open: tensors on meta, layers half loaded, loading wrappers. Empty for
    a model that was restored, or never reloaded."""
    from vllm.model_executor.model_loader.reload import layerwise

    found = []
    for path, layer in model.named_modules():
        info = layerwise.LAYERWISE_INFO.get(layer)
        if info is not None and info.can_load():
            found.append(f"{path}: {info.load_numel} of {info.load_numel_total} elements")
        for name, tensor in layerwise.get_layer_tensors(layer).items():
            if tensor.is_meta:
                found.append(f"{path}.{name} is on meta")
            if layerwise._get_weight_loader(tensor).__name__ == "online_process_loader":
                found.append(f"{path}.{name} has a loading wrapper")
    return found + [f"{len(layerwise.LOADING_LAYERS)} loading"] * bool(layerwise.LOADING_LAYERS)
