"""Ways to hold a model in parts: torch's FSDP2 and FSDP1, DeepSpeed's ZeRO-3."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy


def fsdp2(model: Any) -> Any:
    """Shard a model, or PEFT's of one, in place."""
    for layer in find_layers(model):
        fully_shard(layer)
    return fully_shard(model)


def partitioned(model: Any, threshold: int) -> Any:
    """An engine of DeepSpeed's. Parameters of up to `threshold` elements stay whole."""
    import deepspeed

    # It would compile one for shared memory, for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": threshold},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=config,
    )
    return engine


class FSDP1:
    """What `partitioned` gives, of a model that torch's FullyShardedDataParallel wraps."""

    def __init__(self, model: Any, *, original: bool = True) -> None:
        self.module = FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({type(find_layers(model)[0])}),
            use_orig_params=original,
            device_id=torch.device("cpu"),
        )
        self._optimizer = torch.optim.Adam(self.module.parameters(), lr=1e-2)

    def __call__(self, **given: Any) -> Any:
        return self.module(**given)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


def find_layers(model: Any) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model.layers
