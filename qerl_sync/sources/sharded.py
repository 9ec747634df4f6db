"""Gather the weights of a model that several trainer ranks hold in shards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from qerl_sync.errors import TransportError
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.options import FiniteCheck
from qerl_sync.sources.fsdp1 import FlatUnits, unwrapped
from qerl_sync.sources.hf import HFSource, reshard
from qerl_sync.sources.lora import AdapterSource
from qerl_sync.sources.peft import PEFTSource


class _Gathered(HFSource):
    """Gathers each tensor that a source reads when it is due; in front of that source's class.

    Attributes:
        _due: names of the chunk that is being materialized, of which this rank has yet to gather
            what it reads.
        _ahead: what of the chunk was gathered with other tensors of its FSDP1 unit, by identity.
    """

    collective = True
    stamps_content = False  # each rank has a shard, and all must send the same
    _why_unreadable = (
        ", and its parameters cannot be told apart; keep the model's own (use_orig_params=True; "
        "accelerate: fsdp_use_orig_params: true), and give this source the wrapped model"
    )

    def __init__(
        self, model: Any, *, root: Callable[[], torch.nn.Module] | None = None, **options: Any
    ) -> None:
        self._due: deque[str] = deque()
        self._ahead: dict[int, torch.Tensor] = {}
        self._wrapped = model  # with PEFT's wrapper, which may be FSDP2's root
        self._root = root or (lambda: model)
        self._units = FlatUnits(self._root())
        super().__init__(unwrapped(model), **options)

    def metadata(self) -> list[ParamMeta]:
        # What a forward pass has left gathered are plain tensors, in the dtype of the computation.
        reshard(self._wrapped)
        self._units = FlatUnits(self._root())
        return super().metadata()

    def materialize(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        self._ahead.clear()
        # What `end_chunk` gathers with the other ranks where this rank's receiver fails midway.
        self._due = deque(dict.fromkeys(one for name in names for one in self._inputs_of(name)))
        return super().materialize(names)

    def end_chunk(self) -> None:
        with torch.no_grad():
            while self._due:
                self._value(self._due[0])

    def _memory(self, name: str) -> Storage:
        parameter = self._parameters[name]
        if self._is_gathered(parameter):
            return Storage(f"gathered {name}", self._shape(parameter).numel() * parameter.itemsize)
        return super()._memory(name)

    def _value(self, name: str) -> torch.Tensor:
        # Collectives have no names: on a rank that gathers another parameter than the others do,
        # shards would be put together from two.
        due = self._due.popleft()
        assert due == name, f"{name} is gathered where {due} is due"
        return super()._value(name)

    def _whole(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not self._is_gathered(tensor):
            return tensor.detach()
        try:
            if tensor not in self._units:
                return _gathered(tensor)
            if id(tensor) not in self._ahead:
                chunk = (one for due in (name, *self._due) for one in self._parts(due))
                self._ahead |= self._units.gather(tensor, chunk)
            return self._ahead.pop(id(tensor))
        except RuntimeError as exc:
            # The other ranks are no longer where this one is.
            self._due.clear()
            raise TransportError(
                f"gathering {name!r} from the trainer ranks failed: {exc}", tensor=name
            ) from exc

    def _shape(self, tensor: torch.Tensor) -> torch.Size:
        return self._units.shape(tensor) if tensor in self._units else super()._shape(tensor)

    def _is_gathered(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, DTensor) or hasattr(tensor, "ds_tensor") or tensor in self._units


class ShardedSource(_Gathered):
    """Yields what `HFSource` would yield of the whole model, each tensor gathered when it is due.

    Example:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        ranks = TrainerRanks()
        transport = LedTransport(RemoteTransport(client) if ranks.rank == 0 else None, ranks)
        with SyncSession(ShardedSource(model), transport, SyncConfig()) as session:
            session.push(step=1)  # on every rank

    Takes models that are sharded by torch's `fully_shard` (FSDP2) or tensor parallelism (DTensor),
    by DeepSpeed's ZeRO-3, or by FSDP1 with `use_orig_params`, and whole ones (DDP, ZeRO-1 and 2).
    The model may become sharded later: what it is is found out at each sync.

    A gather is a collective: every rank makes the same calls in the same order. A rank holds, on
    top of its shards, what the receiver holds of the chunks in flight, and one more parameter. Of
    FSDP1's units, which are gathered as a whole, it holds one in its place, and the chunk that is
    being sent.

    Args:
        model: a `PreTrainedModel`, sharded alike on all ranks. Its weights are read, never changed.
        root: returns the module that FSDP1 wraps the model with, where that happens later.
        convert: see `HFSource`.

    Raises:
        ConfigError: the model is sharded in another way (`parameter` and `sharding` say which and
            how), or carries adapters; `metadata` raises it too.
    """


class ShardedAdapterSource(_Gathered, AdapterSource):
    """Yields what `AdapterSource` would yield of the whole model, gathered as `ShardedSource` does.

    Nothing of the base is gathered where it does not travel.
    """


class ShardedPEFTSource(_Gathered, PEFTSource):
    """Yields what `PEFTSource` would yield of the whole model: of each parameter the base and its
    factors are gathered when it is due, and merged.
    """

    def finite_check(self, wanted: bool) -> FiniteCheck:
        # What may become infinite in the merge itself is seen only where it is whole. The check
        # runs in a thread beside the gathers, and must not gather.
        for name, merge in self._merges.items():
            if wanted and merge.may_overflow(self._parameters[name]):
                return "worker"
        return super().finite_check(wanted)

    def _to_check(self, name: str) -> Iterable[torch.Tensor]:
        return HFSource._to_check(self, name)  # the parts that are here, unmerged


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
