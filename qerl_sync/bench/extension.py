"""vLLM worker extension for the benchmarks, passed as `worker_extension_cls`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
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
    "use_tqdm_on_load": False,
    "worker_extension_cls": f"{__name__}.BenchExtension",
}


# "plain": CPU kernels use parameters as they are, as unquantised GPU kernels do, in place of packed
# copies. Read where the worker is started, before it loads its model.
KERNELS_VARIABLE = "QERL_SYNC_BENCH_KERNELS"


def use_plain_kernels() -> None:
    """Have vLLM's CPU layers of this process keep their parameters as they are."""
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *args, **kwargs: False


if os.environ.get(KERNELS_VARIABLE) == "plain":
    use_plain_kernels()


class BenchExtension:
    """Add the benchmark's methods to the vLLM worker, for `collective_rpc`."""

    def bench_kernels(self) -> dict[str, str]:
        """Return digests of the kernels' weights."""
        from qerl_sync.worker.load.kernel_check import kernel_digests

        return kernel_digests(self._engine.model)

    def bench_load_alone(self, checkpoint: str, order: list[str]) -> float:
        """Return the seconds that vLLM needs to reload this checkpoint from memory.

        The time includes rebuilding derived state: without that, tied heads and experts keep old
        weights on a CPU.
        """
        if getattr(self, "_bench_checkpoint", "") != checkpoint:
            from safetensors.torch import load_file

            self._bench_tensors: dict[str, torch.Tensor] = {}  # the memory of the last, first
            found = load_file(checkpoint)
            self._bench_tensors = {name: found[name].clone() for name in order}
            self._bench_checkpoint = checkpoint
        from qerl_sync.worker.compat import engine as compat
        from qerl_sync.worker.load import refresh

        model, config = self._engine.model, self._engine.vllm_config
        started = time.perf_counter()
        with compat.loading_context(config):
            compat.begin_reload(model)
            for layer in model.modules():
                compat.forget_packed_experts(layer)
            model.load_weights(iter(self._bench_tensors.items()))
            compat.finish_reload(model, config)
            refresh.after_reload(model)
        return time.perf_counter() - started

    def bench_load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load the tensors by vLLM's layerwise reload."""
        from qerl_sync.worker.compat import engine as compat

        model, config = self._engine.model, self._engine.vllm_config
        with compat.loading_context(config):
            compat.begin_reload(model)
            model.load_weights(iter(tensors))
            compat.finish_reload(model, config)

    def bench_join(self, host: str, port: int) -> None:
        """Join a Gloo group with the trainer, which is its rank 0."""
        self._bench_group = gloo_group(host, port, 1)

    def bench_broadcast(self, metas: list[tuple[str, str, list[int]]]) -> None:
        """Receive one broadcast per tensor, into vLLM's layerwise reload."""

        def arriving() -> Any:
            for name, dtype, shape in metas:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
                self._bench_group.broadcast(tensor, 0).wait()
                yield name, tensor

        self.bench_load(arriving())

    @property
    def _engine(self) -> Any:
        worker: Any = self
        assert isinstance(worker.weight_transfer_engine.model, torch.nn.Module)
        return worker.weight_transfer_engine


def gloo_group(host: str, port: int, rank: int) -> Any:
    """Return a Gloo group of the trainer (rank 0) and one worker (rank 1). Both block until the
    other has come, for at most five minutes."""
    from vllm.distributed.utils import stateless_init_torch_distributed_process_group

    return stateless_init_torch_distributed_process_group(host, port, rank, 2, "gloo")
