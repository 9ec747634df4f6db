"""Put parameters into shared memory: workers on the same host load them without a copy."""

from __future__ import annotations

import torch

from qerl_sync.buffers.detect import dtype_name
from qerl_sync.errors import ConfigError
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.staging import offsets
from qerl_sync.wire.segments import SharedSegment


@torch.no_grad()
def share_parameters(model: torch.nn.Module) -> SharedSegment:
    """Move `model`'s parameters, as they are, into shared memory.

    Example:
        model = AutoModelForCausalLM.from_pretrained(path)
        memory = share_parameters(model)  # keep it as long as the model
        optimizer = torch.optim.AdamW(model.parameters())

    Call it before an optimizer is made; parameter objects stay the same. A sync over `shm` then
    sends where they lie instead of what they are; the model must not change before the sync has
    returned. Tensors that a checkpoint has in another form (converted experts) are copied as ever.

    Returns:
        The memory, which must be kept for as long as the model is used.

    Raises:
        ConfigError: a parameter is on an accelerator.
        TransportError: /dev/shm has not that much room.
    """
    unique = {id(p): (name, p) for name, p in model.named_parameters()}
    for name, parameter in unique.values():
        if parameter.device.type != "cpu":
            raise ConfigError(
                f"{name!r} is on {parameter.device}; only parameters in host memory can be shared"
            )
    metas = [ParamMeta(n, dtype_name(p.dtype), tuple(p.shape)) for n, p in unique.values()]
    places, nbytes = offsets(metas)
    segment = SharedSegment(nbytes, parameters=True)
    for (_, parameter), offset in zip(unique.values(), places, strict=True):
        shared = segment.tensor(offset, tuple(parameter.shape), parameter.dtype)
        parameter.data = shared.copy_(parameter)
    return segment
