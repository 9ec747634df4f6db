"""The entry point `vllm.general_plugins`: vLLM calls it in every process that it starts.

It only names modules; nothing of ours or of vLLM's engines is imported before one is used.
"""

from __future__ import annotations

from typing import Any

# vLLM's backend names -> where the worker's engine is, and where the trainer's.
WORKER_ENGINES = {
    "qerl": ("qerl_sync.worker.protocol.engine", "QerlWeightTransferEngine"),
    "qerl_nccl": ("qerl_sync.worker.protocol.native", "QerlNCCLWeightTransferEngine"),
    "qerl_ipc": ("qerl_sync.worker.protocol.native", "QerlIPCWeightTransferEngine"),
}
TRAINER_ENGINES = {
    "qerl": ("qerl_sync.integrations.vllm", "QerlTrainerWeightTransferEngine"),
    "qerl_nccl": ("qerl_sync.integrations.vllm_native", "QerlNCCLTrainerWeightTransferEngine"),
    "qerl_ipc": ("qerl_sync.integrations.vllm_native", "QerlIPCTrainerWeightTransferEngine"),
}


def register() -> None:
    """Make our weight transfer engines known to vLLM. Idempotent; silent where vLLM has none."""
    try:
        from vllm.distributed.weight_transfer import factory
    except ImportError:
        return
    _add(getattr(factory, "WeightTransferEngineFactory", None), WORKER_ENGINES)
    _add(getattr(factory, "WeightTransferTrainerFactory", None), TRAINER_ENGINES)


def _add(registry: Any, engines: dict[str, tuple[str, str]]) -> None:
    """Register once: vLLM refuses a second time. `registry` is None if vLLM has no such factory."""
    for name, (module, engine) in engines.items():
        if registry is not None and name not in registry._registry:
            registry.register_engine(name, module, engine)
