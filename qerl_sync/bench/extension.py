"""vLLM worker extension for the benchmarks, passed as `worker_extension_cls`."""

from __future__ import annotations

import time
from typing import Any

import torch

# vLLM's engine arguments for a benchmark: nothing that is not measured.
ENGINE_ARGUMENTS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 64,
    "max_num_seqs": 8,
    "dtype": "bfloat16",
    "num_gpu_blocks_override": 64,
    "disable_log_stats": True,
    "worker_extension_cls": f"{__name__}.BenchExtension",
}


class BenchExtension:
    """Add the benchmark's methods to the vLLM worker, for `collective_rpc`."""

    def bench_kernels(self) -> dict[str, str]:
        """Return digests of the kernels' weights."""
        from qerl_sync.worker.load.kernel_weights import kernel_digests

        return kernel_digests(self._engine.model)

    def bench_load_alone(self, checkpoint: str, order: list[str]) -> float:
        """Return the seconds that vLLM needs to reload this checkpoint from memory.

        The time includes rebuilding derived state: without that, tied heads and experts keep old
        weights on a CPU.
        """
        if not hasattr(self, "_bench_tensors"):
            from safetensors.torch import load_file

            found = load_file(checkpoint)
            self._bench_tensors = {name: found[name].clone() for name in order}
        from qerl_sync.worker.compat import engine as compat
        from qerl_sync.worker.load import refresh

        model, config = self._engine.model, self._engine.vllm_config
        started = time.perf_counter()
        with compat.loading_context(config):
            compat.begin_reload(model)
            for layer in model.modules():
                refresh.before_processing(layer)
            model.load_weights(iter(self._bench_tensors.items()))
            compat.finish_reload(model, config)
            refresh.after_reload(model)
        return time.perf_counter() - started

    @property
    def _engine(self) -> Any:
        worker: Any = self
        assert isinstance(worker.weight_transfer_engine.model, torch.nn.Module)
        return worker.weight_transfer_engine
