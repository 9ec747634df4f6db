"""vLLM's own weight transfer engines in this process, without a GPU."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch


def worker_of(llm: Any) -> Any:
    """The one worker of a vLLM `LLM` whose engine is in this process."""
    driver = llm.llm_engine.model_executor.driver_worker
    return getattr(driver, "worker", driver)


@contextmanager
def backend(llm: Any, name: str) -> Iterator[Any]:
    """The engine as if it had been started with weight_transfer_config={"backend": name}.

    Yields the worker's weight transfer engine."""
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from qerl_sync.worker.protocol import plugin

    plugin.register()
    worker = worker_of(llm)
    before = worker.weight_transfer_engine
    worker.weight_transfer_engine = WeightTransferEngineFactory.create_engine(
        WeightTransferConfig(backend=name),
        worker.vllm_config,
        torch.device(worker.device),
        worker.model_runner.get_model(),
    )
    try:
        yield worker.weight_transfer_engine
    finally:
        worker.weight_transfer_engine.shutdown()
        worker.weight_transfer_engine = before
        worker._weight_update_active = False


class Broadcast:
    """Stands in for PyNcclCommunicator: ranks are threads, tensors are in host memory.

    `broadcast` of rank 0 returns when the tensor may be changed, as a stream's synchronisation
    would tell on a GPU; that of the others when it is there.
    """

    def __init__(self, timeout_seconds: float = 20.0) -> None:
        self._timeout_seconds = timeout_seconds
        self._sent: queue.Queue[torch.Tensor] = queue.Queue()
        self.sizes: list[int] = []

    def rank(self, rank: int) -> Any:
        return SimpleNamespace(
            broadcast=self._send if rank == 0 else self._receive, destroy=lambda: None
        )

    def _send(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        assert tensor.is_contiguous()
        self.sizes.append(tensor.nbytes)
        self._sent.put(tensor.clone())

    def _receive(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        sent = self._sent.get(timeout=self._timeout_seconds)
        assert (sent.shape, sent.dtype) == (tensor.shape, tensor.dtype), "ranks cut differently"
        tensor.copy_(sent)


class _Stream:
    def synchronize(self) -> None: ...


class HostTorch:
    """`torch` for those modules of vLLM that would use CUDA: streams and devices that are not."""

    def __init__(self) -> None:
        stream = _Stream()
        self.cuda = SimpleNamespace(
            Stream=lambda device=None: stream,
            stream=lambda stream: nullcontext(),
            current_stream=lambda: stream,
            is_available=lambda: False,
            ipc_collect=lambda: None,
            get_device_properties=lambda index: SimpleNamespace(uuid="GPU-0"),
        )
        self.accelerator = SimpleNamespace(current_device_index=lambda: 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.empty(*shape, **options)


def without_cuda(monkeypatch: Any) -> Broadcast:
    """vLLM's nccl and ipc engines, both sides, in this process and on host memory.

    Replaced: torch's streams and devices, the communicator, and how memory of another process is
    opened. All else is vLLM's code."""
    from torch.multiprocessing import reductions
    from vllm.distributed.weight_transfer import ipc_engine, nccl_engine, packed_tensor

    host = HostTorch()
    for module in (ipc_engine, nccl_engine, packed_tensor):
        monkeypatch.setattr(module, "torch", host)
    packed_tensor._get_streams.cache_clear()
    group = Broadcast()
    monkeypatch.setattr(nccl_engine, "worker_init_process_group", lambda *args: group.rank(1))
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: group.rank(0))

    shown: dict[int, torch.Tensor] = {}

    def reduce_tensor(tensor: torch.Tensor) -> tuple[None, tuple[int, ...]]:
        shown[tensor.data_ptr()] = tensor
        return None, (tensor.data_ptr(), *range(10))

    def rebuild(*arguments: int) -> torch.Tensor:
        return shown[arguments[0]]

    for module in (ipc_engine, packed_tensor):
        monkeypatch.setattr(module, "reduce_tensor", reduce_tensor)
    monkeypatch.setattr(ipc_engine, "rebuild_cuda_tensor", rebuild)
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", rebuild)
    return group
