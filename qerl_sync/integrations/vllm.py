"""vLLM's trainer contract: a trainer engine of ours, and our plans for vLLM's own engines.

    init = QerlTrainerInitInfo(rank=0, sync=SyncConfig.of(chunk_bytes="64MiB"))
    engine = WeightTransferTrainerFactory.trainer_init(init, client=client, source=source)
    engine.send_weights()
    engine.last_report

`client` is any `VLLMWeightSyncClient`, `source` any `WeightSource`. Importing this module makes our
engines known to vLLM's factories.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from typing_extensions import Self

from qerl_sync.buffers.detect import dtype_name
from qerl_sync.build import remote_transport
from qerl_sync.config import SyncConfig
from qerl_sync.errors import ConfigError, CoverageError, PlanError
from qerl_sync.integrations.weight_source import (
    DECLARES_OWNERS,
    as_declared,
    base,
    held_by,
    metas_of,
    whole_tensors,
)
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.sync_plan import SyncPlan
from qerl_sync.session import SyncReport, SyncSession
from qerl_sync.sources.base import Source
from qerl_sync.transports.remote import RemoteTransport
from qerl_sync.worker.protocol import plugin

# vLLM loads its plugins in engines' processes only, not in a trainer's.
plugin.register()


@dataclass
class QerlTrainerInitInfo(base.TrainerInitInfo):
    """Parameters of one trainer rank. `rank` is keyword-only and rank 0 has the client, as
    everywhere in vLLM.

    Attributes:
        sync: how weights go; the `sync` section of the YAML.
        endpoints: `host:port` of each trainer rank, where there are several: each listens on its
            own, and the workers connect to all. QERL_SYNC_TOKEN must then be set for trainer ranks
            and workers alike. Empty: one rank, on a port of its own choice.
        num_workers: worker ranks in all; trainer ranks other than 0 must know it.
    """

    backend: ClassVar[str] = "qerl"

    sync: SyncConfig = field(default_factory=SyncConfig)
    endpoints: Sequence[str] = ()
    num_workers: int = 0


class QerlTrainerWeightTransferEngine(base.TrainerWeightTransferEngine):
    """Sends a `WeightSource` to workers with the backend `qerl`: planned, bounded, reported.

    Called on every trainer rank alike.

    Attributes:
        session: plans, sends and reports; it has the plan and the layer map of the last sync.
        last_report: of the last `send_weights`; None before it.
    """

    init_info_cls = QerlTrainerInitInfo

    def __init__(self, init_info: QerlTrainerInitInfo, *, client: Any, source: base.WeightSource):
        super().__init__(client=client, source=source, is_sender=init_info.is_sender)
        self.rank = init_info.rank  # an argument since vLLM 0.33 only
        self._weights = VLLMSource(source, init_info.rank)
        self._transport = _transport(init_info, client)
        self.session = SyncSession(self._weights, self._transport, init_info.sync)
        self.last_report: SyncReport | None = None
        self._sends = 0

    @classmethod
    def trainer_init(
        cls,
        init_info: QerlTrainerInitInfo,
        *,
        client: Any,
        source: base.WeightSource | None = None,
    ) -> Self:
        """Connect to the workers. Called on every trainer rank, concurrently.

        Args:
            client: of rank 0; other ranks may give None.

        Raises:
            ConfigError: the source is missing, or the ranks cannot find each other.
            TransportError, AgreementError: the workers do not connect, or are not alike.
        """
        if source is None:
            raise ConfigError("the qerl trainer engine sends a WeightSource; give it as source=")
        engine = cls(init_info, client=client, source=source)
        try:
            engine._transport.open()
        except BaseException:
            engine.shutdown()  # else the listener's port and thread would stay
            raise
        return engine

    def send_weights(self) -> None:
        """Push the source's weights to all workers. Raises as `SyncSession.push` does."""
        self.last_report = self.session.push(self._sends)
        self._sends += 1
        self._weights.end_pass()

    def shutdown(self) -> None:
        self.session.close()


def _transport(info: QerlTrainerInitInfo, client: Any) -> RemoteTransport:
    sync = info.sync
    if sync.transport == "inproc":
        raise ConfigError(
            "sync.transport: inproc is for InProcessTransport; workers with the backend qerl are "
            "reached over shm or tcp, whatever process they are in"
        )
    if info.endpoints and info.rank >= len(info.endpoints):
        raise ConfigError(
            f"trainer rank {info.rank} has no endpoint: there are {len(info.endpoints)}, one for "
            "each rank is needed"
        )
    if info.rank and not (info.endpoints and info.num_workers):
        raise ConfigError(
            f"trainer rank {info.rank} needs `endpoints`, those of all trainer ranks, and "
            "`num_workers`, to know for whom to wait"
        )
    return remote_transport(
        sync,
        client if info.is_sender else None,
        endpoints=info.endpoints,
        rank=info.rank,
        num_workers=info.num_workers,
    )


class VLLMSource(Source):
    """Adapt a vLLM `WeightSource`.

    A WeightSource yields in its own order. Where more is possible it is used: a plain
    `ModuleSource` has its module's parameters, and any other source may have a method
    `tensor(name)` that returns one whole tensor (a collective, where its iteration is one). Others
    have `any_order` False: one pass over them serves a sync, tensors that are not sent are passed
    over, and a plan in another order is refused before anything is sent.
    """

    def __init__(self, source: base.WeightSource, rank: int = 0) -> None:
        self._source = source
        self._rank = rank
        self._lookup = _lookup(source)
        self.any_order = self._lookup is not None
        self._pass: Iterator[tuple[str, torch.Tensor | None]] | None = None

    def metadata(self) -> list[ParamMeta]:
        self._pass = None
        return [
            ParamMeta(meta.name, dtype_name(meta.dtype), tuple(meta.shape))
            for meta in metas_of(self._source)
        ]

    def held_names(self) -> Collection[str] | None:
        return held_by(self._source, self._rank)

    def owners(self) -> dict[str, tuple[int, ...] | None]:
        """Return the trainer ranks that own each tensor, where vLLM knows; None: all."""
        return {m.name: getattr(m, "owners", None) for m in metas_of(self._source)}

    @torch.no_grad()
    def materialize(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            tensor = self._lookup(name) if self._lookup else self._seek(name)
            yield name, tensor.detach()

    @torch.no_grad()
    def end_pass(self) -> None:
        """Iterate to the end of the pass: other ranks run the collectives of the rest too."""
        for _ in self._pass or ():
            pass
        self._pass = None

    def _seek(self, name: str) -> torch.Tensor:
        if self._pass is None:
            self._pass = whole_tensors(self._source)
        for found, tensor in self._pass:
            if found == name and tensor is not None:
                return tensor
            if found == name:
                raise CoverageError(
                    f"the source yields None for {name!r}, which this rank holds by its "
                    "held_names(); both must say the same"
                )
        raise CoverageError(
            f"the source's iteration has ended and {name!r} has not come, or not where its "
            "metadata() has it; both must enumerate the same tensors in the same order"
        )


def _lookup(source: base.WeightSource) -> Callable[[str], torch.Tensor] | None:
    """Return a function that gets one tensor by its name, if the source can."""
    tensor: Callable[[str], torch.Tensor] | None = getattr(source, "tensor", None)
    # A subclass may yield something else than the parameters.
    if type(source) is base.ModuleSource:
        module: torch.nn.Module = source._module
        return lambda name: base.materialize_full_tensor(module.get_parameter(name))
    return tensor


class PlannedSource(base.WeightSource):
    """Put a source in the order of a plan, for vLLM's own trainer engines (nccl, ipc, ...).

    All of vLLM's engines send a `WeightSource` in the order of its metadata, so the plan's order is
    what the worker gets, whichever engine carries it. Before vLLM 0.33 `groups()` are vLLM's own,
    by decoder layer (its consumers compute them from the metadata and number them), each in plan
    order.

    Args:
        plan: made of this source's metadata, on every trainer rank alike. Where no worker can be
            asked, `offline.layer_map.offline_map` has the layer map to make it with.

    Raises:
        PlanError: the source does not have what the plan sends, or not in any order.
    """

    def __init__(self, source: Source, plan: SyncPlan) -> None:
        if plan.policy == "spill":
            raise PlanError(
                "vLLM's own engines load tensors as they arrive, and a plan with the policy spill "
                "needs workers with the backend qerl, which put them in order; make it with the "
                "policy reorder or warn"
            )
        if (
            DECLARES_OWNERS
            and source.held_names() is not None
            and not isinstance(source, VLLMSource)
        ):
            raise PlanError(
                f"{type(source).__name__} holds a part of the tensors, and this vLLM asks every "
                "rank for the owners of each; give it a VLLMSource of a WeightSource that "
                "declares them (ParamMeta.owners)"
            )
        self.source = source
        self.plan = plan
        self._require_current()

    @as_declared
    def metadata(self) -> list[base.ParamMeta]:
        self._require_current()
        owners = self.source.owners() if isinstance(self.source, VLLMSource) else {}
        # As they are gathered, whole, they have no placements.
        return [
            base.ParamMeta(
                m.name,
                getattr(torch, m.dtype),
                m.shape,
                **({"owners": owners[m.name]} if owners.get(m.name) else {}),
            )
            for m in self.plan.metas
        ]

    def held_names(self) -> Collection[str] | None:
        return self.source.held_names()

    def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        # vLLM caches the metadata: a model that has changed since would go unnoticed.
        self._require_current()
        for name, tensor in self:
            if tensor is not None:
                yield name, tensor

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for chunk in self.plan.chunks:
            yield from self._all(chunk.names)

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        for group in self.groups():
            yield group, [tensor for _, tensor in self._all(group)]

    def _all(self, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """Yield these tensors; None for those that other ranks hold."""
        held = self.held_names()
        own = names if held is None else [name for name in names if name in held]
        tensors = self.source.materialize(own)
        for name in names:
            yield name, next(tensors)[1] if held is None or name in held else None

    def _require_current(self) -> None:
        metas = self.source.metadata()
        here = {meta.name: meta for meta in metas}
        for planned in self.plan.metas:
            found = here.get(planned.name)
            if found != planned:
                raise PlanError(
                    f"the plan sends {planned}, the source has {found or 'no such tensor'}; make "
                    "the plan of this source's metadata()"
                )
        rest = iter(metas)  # which `in` consumes: all are found only if they come in its order
        if not self.source.any_order and not all(meta in rest for meta in self.plan.metas):
            raise PlanError(
                "the plan has another order than the source, which yields in its own only; make "
                "the plan with the policy warn"
            )
