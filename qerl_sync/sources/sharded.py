"""Gather the weights of a model that several trainer ranks hold in shards."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from qerl_sync.buffers.detect import plain_tensors, storages_of
from qerl_sync.errors import ConfigError, TransportError
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.sources.hf import HFSource, parameters_of, sharding_of


class ShardedSource(HFSource):
    """Yields what `HFSource` would yield of the whole model, each tensor gathered when it is due.

    Example:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        ranks = TrainerRanks()
        transport = LedTransport(RemoteTransport(client) if ranks.rank == 0 else None, ranks)
        with SyncSession(ShardedSource(model), transport, SyncConfig()) as session:
            session.push(step=1)  # on every rank

    Takes models that are sharded by torch's `fully_shard` (FSDP2) or tensor parallelism (DTensor)
    or by DeepSpeed's ZeRO-3, and whole ones (DDP, ZeRO-1 and 2). The model may become sharded
    later: what it is is found out at each sync.

    A gather is a collective: every rank makes the same calls in the same order. A rank holds, on
    top of its shards, what the receiver holds of the chunks in flight, and one more parameter.

    Args:
        model: a `PreTrainedModel`, sharded alike on all ranks. Its weights are read, never changed.
        convert: see `HFSource`.

    Raises:
        ConfigError: the model is sharded in another way (`parameter` and `sharding` say which and
            how), or carries adapters; `metadata` raises it too.
    """

    collective = True
    stamps_content = False  # each rank has a shard, and all must send the same

    def __init__(self, model: torch.nn.Module, *, convert: bool = True) -> None:
        # Parameters of the chunk that is being materialized, which this rank has yet to gather.
        self._due: deque[str] = deque()
        super().__init__(model, convert=convert)

    def metadata(self) -> list[ParamMeta]:
        # A forward pass leaves FSDP2's root gathered: then its parameters are plain tensors, in the
        # dtype of the computation, and not those that the optimizer steps.
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return super().metadata()

    def resident_bytes(self) -> int:
        whole = [p for p in self._parameters.values() if not _is_sharded(p)]
        own = {s.key: s for p in whole for s in storages_of(p)}
        return sum(storage.nbytes for storage in own.values())

    def materialize(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        groups = dict.fromkeys(self._group_of[name] for name in names)
        self._due = deque(name for group in groups for name in group.parameters)
        return super().materialize(names)

    def end_chunk(self) -> None:
        with torch.no_grad():
            while self._due:
                self._value(self._due[0])

    def _find_parameters(self, *, since: str = "") -> dict[str, torch.Tensor]:
        if hasattr(self._model, "peft_config"):
            raise ConfigError(
                f"the model carries PEFT adapters{since}, which this source does not merge; give "
                "the model to a PEFTSource, which takes whole models"
            )
        for name, parameter in self._model.named_parameters():
            sharding = sharding_of(name, parameter)
            if sharding and not _is_sharded(parameter):
                raise ConfigError(
                    f"{name!r} is sharded by {sharding}{since}, which this source does not gather; "
                    "shard with fully_shard (accelerate: fsdp_version: 2), or train in one "
                    "process",
                    parameter=name,
                    sharding=sharding,
                )
        return parameters_of(self._model)

    def _memory(self, name: str) -> Storage:
        parameter = self._parameters[name]
        if _is_sharded(parameter):
            return Storage(f"gathered {name}", self._shape(name).numel() * parameter.itemsize)
        (memory,) = storages_of(parameter)
        return memory

    def _shape(self, name: str) -> torch.Size:
        parameter = self._parameters[name]
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape))

    def _read_for(self, name: str) -> Iterable[torch.Tensor]:
        parameter = self._parameters[name]
        return plain_tensors(getattr(parameter, "ds_tensor", parameter).detach())

    def _value(self, name: str) -> torch.Tensor:
        due = self._due.popleft()
        assert due == name, f"{name} is gathered where {due} is due"
        parameter = self._parameters[name]
        if not _is_sharded(parameter):
            return parameter.detach()
        try:
            return _gathered(parameter)
        except RuntimeError as exc:
            # The other ranks are no longer where this one is.
            self._due.clear()
            raise TransportError(
                f"gathering {name!r} from the trainer ranks failed: {exc}", tensor=name
            ) from exc


def _is_sharded(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_tensor")


def _gathered(parameter: torch.Tensor) -> torch.Tensor:
    """Return a copy of the whole parameter, in memory of its own and no more of it."""
    if isinstance(parameter, DTensor):
        whole: torch.Tensor = parameter.full_tensor().detach()
        # Uneven shards are gathered with padding, which a view would keep alive.
        return whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # ZeRO-3 keeps small parameters whole on every rank, and would no longer after the context.
    if getattr(parameter, "ds_status", None) == ZeroParamStatus.AVAILABLE:
        return parameter.detach().clone()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()
