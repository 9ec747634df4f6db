"""Orders and policies side by side: what each would cost, before a byte has moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from qerl_sync.buffers.trace import Trace
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.plan.diagnosis import Cause, StreamFacts, causes_of
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.orders import Reorder
from qerl_sync.plan.policies import as_given, by_parent_layer
from qerl_sync.plan.simulator import Simulator, Span, open_at
from qerl_sync.plan.sync_plan import build_plan

Order = Callable[[Sequence[ParamMeta], LayerMap], list[ParamMeta]]

POLICIES: Mapping[str, Order] = {"as_given": as_given, "by_parent_layer": by_parent_layer}

# The order in which vLLM gets a stream that nobody can change. It is looked at where it is asked
# for: what vLLM holds is what it holds with `by_parent_layer`.
SPILL = "spill"

# vLLM's NCCL engine packs tensors into buffers of this many bytes and rotates this many of them
# (vllm/distributed/weight_transfer/packed_tensor.py).
VLLM_CHUNK_BYTES = 1024**3
VLLM_CHUNK_BUFFERS = 2


@dataclass(frozen=True)
class Transport:
    """How a stream travels, as far as it decides what stays in memory.

    Attributes:
        chunk_bytes: size of the chunk buffers; None: each tensor has memory of its own.
        chunk_buffers: how many of them the receiver rotates.
        packing: where the stream is cut into chunks. `stream`: when one is full, as vLLM's NCCL
            engine does. `layers`: between parent layers, as our plans do. `auto`: `stream` for the
            order as given, `layers` for all others.
        budget_bytes: chunks cut between layers are no larger than this either, as in `build_plan`.
    """

    chunk_bytes: int | None = None
    chunk_buffers: int = VLLM_CHUNK_BUFFERS
    packing: str = "auto"
    budget_bytes: int | None = None

    def storages(
        self, metas: Sequence[ParamMeta], layer_map: LayerMap, *, by_layers: bool
    ) -> dict[str, Storage]:
        """The memory behind each tensor of this stream; empty if it is not packed."""
        if self.chunk_bytes is None:
            return {}
        if self.packing == "layers" or (self.packing == "auto" and by_layers):
            chunk_bytes = min(self.chunk_bytes, self.budget_bytes or self.chunk_bytes)
            return layered_storages(metas, layer_map, chunk_bytes)
        return packed_storages(metas, self.chunk_bytes)


UNPACKED = Transport()


@dataclass(frozen=True)
class Moment:
    """One tensor of a stream: when it has been buffered and before any layer closes by it.

    Attributes:
        held: (parent layer, held bytes) of every layer that holds any, largest first.
    """

    index: int
    name: str
    buffered_bytes: int
    pinned_bytes: int
    open_layers: int
    held: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Scenario:
    """One order under one policy.

    Attributes:
        order: name of the source's order.
        policy: name of what was done about it.
        metas: the stream in the order in which it arrives.
        trace: its predicted trace.
        ordered: the trace of the same source by parent layer.
        facts: what does not depend on the order.
        receive: `trace` with the transport's chunk buffers counted as pinned.
        storages: the memory behind each tensor; empty: each has its own.
        peak_staged_bytes: what waits in host memory, if vLLM gets the stream in another order than
            it arrives in.
        budget_bytes: the most that may be pinned; None: there is no budget.
    """

    order: str
    policy: str
    metas: Sequence[ParamMeta]
    layer_map: LayerMap
    trace: Trace
    ordered: Trace
    facts: StreamFacts
    receive: Trace
    storages: Mapping[str, Storage] = field(default_factory=dict)
    peak_staged_bytes: int = 0
    budget_bytes: int | None = None

    @property
    def within_budget(self) -> bool | None:
        """Are no more bytes pinned than the budget allows? None without a budget.

        Receive buffers and host memory do not count, as in a sync's own judgement.
        """
        return None if self.budget_bytes is None else self.peak_pinned_bytes <= self.budget_bytes

    @property
    def peak_buffered_bytes(self) -> int:
        return self.trace.peak_buffered_bytes

    @property
    def peak_pinned_bytes(self) -> int:
        return self.trace.peak_pinned_bytes

    @property
    def peak_receive_bytes(self) -> int:
        return self.receive.peak_pinned_bytes

    @property
    def max_open_layers(self) -> int:
        return self.trace.max_open_layers

    @property
    def total_bytes(self) -> int:
        return sum(meta.nbytes for meta in self.metas)

    @cached_property
    def spans(self) -> list[Span]:
        """When each layer is open, in the order of opening."""
        return Simulator(self.metas, self.layer_map).walk().spans

    @cached_property
    def causes(self) -> tuple[Cause, ...]:
        """What the peak is made of beyond the one layer that must be held, the most important
        first. Nothing needs a cure within a budget (see `diagnose`)."""
        if self.within_budget:
            return ()
        return causes_of(
            self.metas,
            self.trace,
            self.layer_map,
            self.storages,
            ordered=self.ordered,
            facts=self.facts,
        )

    @cached_property
    def most_buffered(self) -> Moment:
        return self.moment(self.trace.peak_index)

    @cached_property
    def most_pinned(self) -> Moment:
        steps = self.trace.steps
        return self.moment(max(range(len(steps)), key=lambda i: (steps[i].pinned_bytes, -i)))

    @cached_property
    def most_open(self) -> Moment:
        steps = self.trace.steps
        return self.moment(max(range(len(steps)), key=lambda i: (steps[i].open_layers, -i)))

    def moment(self, index: int) -> Moment:
        """What is held when tensor `index` has been buffered."""
        step = self.trace.steps[index]
        return Moment(
            index=index,
            name=step.name,
            buffered_bytes=step.buffered_bytes,
            pinned_bytes=step.pinned_bytes,
            open_layers=step.open_layers,
            held=tuple(open_at(self.spans, index)),
        )


def scenarios(
    metas: Sequence[ParamMeta],
    layer_map: LayerMap,
    orders: Mapping[str, Reorder],
    policies: Mapping[str, Order] = POLICIES,
    *,
    transport: Transport = UNPACKED,
) -> list[Scenario]:
    """Every order under every policy, in that order. Touches no tensor and no device.

    Args:
        metas: the stream as the trainer's model yields it.
        orders, policies: by name.

    Raises:
        ConfigError: an order does not fit the model.
        PlanError: a policy cannot do what is asked of it.
    """
    walker = Simulator(metas, layer_map)
    facts = StreamFacts.of(metas, layer_map)
    places = {meta.name: place for place, meta in enumerate(metas)}
    result = []
    for order, reorder in orders.items():
        given = reorder(metas)
        grouped = by_parent_layer(given, layer_map)
        ordered = walker.trace([places[meta.name] for meta in grouped])
        for policy, arrange in policies.items():
            stream = grouped if arrange is by_parent_layer else arrange(given, layer_map)
            spilled = policy == SPILL
            storages = (  # what is staged has memory of its own
                {}
                if spilled
                else transport.storages(stream, layer_map, by_layers=policy != "as_given")
            )
            if storages:
                trace = Simulator(stream, layer_map, storages).trace()
                receive = _receive(stream, layer_map, storages, transport.chunk_buffers)
            elif stream is grouped or stream == grouped:
                trace = receive = ordered
            else:
                trace = receive = walker.trace([places[meta.name] for meta in stream])
            if spilled and transport.chunk_bytes is not None:
                receive = _beside(trace, transport.chunk_buffers * transport.chunk_bytes)
            result.append(
                Scenario(
                    order=order,
                    policy=policy,
                    metas=stream,
                    layer_map=layer_map,
                    trace=trace,
                    ordered=ordered,
                    facts=facts,
                    receive=receive,
                    storages=storages,
                    peak_staged_bytes=_staged(given, layer_map, transport) if spilled else 0,
                    budget_bytes=transport.budget_bytes,
                )
            )
    return result


def _beside(trace: Trace, nbytes: int) -> Trace:
    """The trace with so many bytes held beside it all the time."""
    return Trace(s._replace(pinned_bytes=s.pinned_bytes + nbytes) for s in trace.steps)


def _staged(metas: Sequence[ParamMeta], layer_map: LayerMap, transport: Transport) -> int:
    return build_plan(metas, layer_map, SPILL, chunk_bytes=transport.chunk_bytes).peak_staged_bytes


def _receive(
    metas: Sequence[ParamMeta],
    layer_map: LayerMap,
    storages: Mapping[str, Storage],
    chunk_buffers: int,
) -> Trace:
    """The trace with the receiver's chunk buffers held beside the layers."""
    chunks = {storage.key: storage for storage in storages.values()}
    # A second name for each chunk: the receiver holds it too, even if it has one tensor only.
    held_twice = {**storages, **{f"chunk buffer {key}": chunk for key, chunk in chunks.items()}}
    walker = Simulator(metas, layer_map, held_twice)
    return walker.trace(chunks=[storages[meta.name] for meta in metas], chunk_buffers=chunk_buffers)


def packed_storages(metas: Sequence[ParamMeta], chunk_bytes: int) -> dict[str, Storage]:
    """The memory behind each tensor of a packed stream, cut as vLLM's NCCL engine cuts it.

    A chunk is closed by the tensor with which it exceeds `chunk_bytes`: it is larger than that by
    up to one tensor, and a tensor larger than a buffer still shares its chunk with what came
    before. The tensors handed to the model are views of the chunk, so each keeps all of it alive.
    """
    runs: list[list[ParamMeta]] = [[]]
    filled = 0
    for meta in metas:
        runs[-1].append(meta)
        filled += meta.nbytes
        if filled > chunk_bytes:
            runs.append([])
            filled = 0
    return _shared(runs)


def layered_storages(
    metas: Sequence[ParamMeta], layer_map: LayerMap, chunk_bytes: int
) -> dict[str, Storage]:
    """The memory behind each tensor of a stream that is cut between parent layers."""
    by_name = {meta.name: meta for meta in metas}
    chunks = build_plan(metas, layer_map, "warn", chunk_bytes=chunk_bytes).chunks
    return _shared([[by_name[name] for name in chunk.names] for chunk in chunks])


def _shared(chunks: Iterable[Sequence[ParamMeta]]) -> dict[str, Storage]:
    storages: dict[str, Storage] = {}
    for number, chunk in enumerate(chunks):
        storage = Storage(f"chunk {number}", sum(meta.nbytes for meta in chunk))
        storages |= {meta.name: storage for meta in chunk}
    return storages
