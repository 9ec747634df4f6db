"""The part of a sharded parameter that this process holds."""

from __future__ import annotations

from typing import Any

import torch


def part_here(parameter: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a parameter: a view of it, or of its shard."""
    if hasattr(parameter, "to_local"):
        local: torch.Tensor = parameter.to_local()
        return local.detach()
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    # DeepSpeed pads the last ranks' partitions, with memory that it does not write.
    partitioned: Any = parameter
    shard: torch.Tensor = partitioned.ds_tensor.detach()
    before = torch.distributed.get_rank(partitioned.ds_process_group) * shard.numel()
    return shard[: max(0, int(partitioned.ds_numel) - before)]
