"""Describe a worker to the trainer."""

from __future__ import annotations

import os
from typing import Any

import torch

from qerl_sync import __version__
from qerl_sync.wire import cuda_memory
from qerl_sync.wire.host import host_id, own_cores
from qerl_sync.wire.messages import PROTOCOL, Hello
from qerl_sync.worker.compat.caches import connector_of
from qerl_sync.worker.compat.coupling import vllm_version
from qerl_sync.worker.load.receiver import Receiver

PARALLEL_SIZES = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "enable_expert_parallel",
)


def hello_of(receiver: Receiver, vllm_config: Any, *, update_open: bool = False) -> Hello:
    """Describe the worker rank of that receiver. Call it in the thread that loads: `cores` are
    those of the calling thread."""
    parallel = vllm_config.parallel_config
    dtype, quantization = receiver.precision
    connector, connector_keeps = connector_of(vllm_config)
    return Hello(
        protocol=PROTOCOL,
        packages={
            "torch": str(torch.__version__),
            "vllm": vllm_version(),
            "qerl-sync": __version__,
        },
        engine=str(vllm_config.instance_id),
        # Not data_parallel_rank: vLLM sets that to 0 on every replica of a model without experts.
        replica=parallel.data_parallel_index,
        rank=parallel.rank,
        world_size=parallel.world_size,
        server_is_partial=parallel.local_engines_only,
        layout={name: int(getattr(parallel, name)) for name in PARALLEL_SIZES},
        model=type(receiver.model).__name__,
        dtype=dtype,
        quantization=quantization,
        context_tokens=receiver.context_tokens,
        host=host_id(),
        pid=os.getpid(),
        cores=sorted(own_cores()) if receiver.device.type == "cpu" else [],
        device_uuid=cuda_memory.device_uuid(receiver.device),
        version=receiver.version,
        instance=receiver.instance,
        poisoned=receiver.poisoned,
        connector=connector,
        connector_keeps=connector_keeps,
        update_open=update_open,
    )
