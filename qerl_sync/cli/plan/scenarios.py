"""Simulate orders and policies side by side, before any byte moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from qerl_sync.buffers.trace import Trace
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.plan.chunks import chunk_storages, packed_storages
from qerl_sync.plan.diagnosis import Cause, StreamFacts, causes_of
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.orders import Reorder
from qerl_sync.plan.policies import as_given, by_parent_layer
from qerl_sync.plan.simulator import Simulator, Span, open_at
from qerl_sync.plan.sync_plan import build_plan

Order = Callable[[Sequence[ParamMeta], LayerMap], list[ParamMeta]]

POLICIES: Mapping[str, Order] = {"warn": as_given, "reorder": by_parent_layer}

# The order in which vLLM gets a stream that cannot be reordered. Simulated only on request: vLLM
# holds as much as with `reorder`.
SPILL = "spill"

# vLLM's NCCL engine rotates this many chunk buffers
# (vllm/distributed/weight_transfer/packed_tensor.py).
VLLM_CHUNK_BUFFERS = 2

# The layers that JSON names at each moment.
LARGEST_IN_JSON = 10


@dataclass(frozen=True)
class Transport:
    """Describe how a stream travels, as far as that decides what stays in memory.

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
        self, metas: Sequence[ParamMeta], layer_map: LayerMap, policy: str
    ) -> dict[str, Storage]:
        """Return the memory behind each tensor of this stream; {} if each has its own."""
        # The worker copies staged tensors, so that they are no views of a chunk.
        if self.chunk_bytes is None or policy == SPILL:
            return {}
        if self.packing == "layers" or (self.packing == "auto" and policy != "warn"):
            chunk_bytes = min(self.chunk_bytes, self.budget_bytes or self.chunk_bytes)
            plan = build_plan(metas, layer_map, "warn", chunk_bytes=chunk_bytes)
            return chunk_storages(plan.chunk_metas)
        return packed_storages(metas, self.chunk_bytes)


UNPACKED = Transport()


@dataclass(frozen=True)
class Moment:
    """The state when one tensor has been buffered and before any layer closes by it.

    Attributes:
        held: (parent layer, held bytes) of every layer that holds any, largest first.
    """

    index: int
    name: str
    buffered_bytes: int
    pinned_bytes: int
    open_layers: int
    held: tuple[tuple[str, int], ...]

    def largest(self, count: int) -> list[tuple[str, int]]:
        """Return the `count` largest of `held`, and a line for all the others."""
        rest = self.held[count:]
        label = f"and {len(rest):,} more layer{'s' * (len(rest) != 1)}"
        return [*self.held[:count], *([(label, sum(size for _, size in rest))] if rest else [])]

    def to_json(self) -> dict[str, Any]:
        figures = asdict(self)
        held = figures.pop("held")
        largest = [{"layer": name, "held_bytes": size} for name, size in held[:LARGEST_IN_JSON]]
        return {**figures, "num_holding": len(held), "largest": largest}


@dataclass(frozen=True)
class Scenario:
    """One order under one policy.

    Attributes:
        order: name of the source's order.
        policy: name of what was done about it.
        metas: the stream in the order in which it arrives.
        trace: its predicted trace.
        receive: `trace` with the transport's chunk buffers counted as pinned.
        storages: the memory behind each tensor; empty: each has its own.
        peak_staged_bytes: the most that waits in host memory (policy `spill`).
        within_budget: the budget allows what is pinned; None: there is no budget. Receive buffers
            and host memory do not count, as in a sync's own judgement.
        causes: why the peak exceeds the one layer that must be held, the main cause first. Nothing
            needs a cure within a budget (see `diagnose`).
    """

    order: str
    policy: str
    metas: Sequence[ParamMeta]
    layer_map: LayerMap
    trace: Trace
    receive: Trace
    storages: Mapping[str, Storage]
    peak_staged_bytes: int
    within_budget: bool | None
    causes: tuple[Cause, ...]

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
        """Return when each layer is open, in the order of opening."""
        return Simulator(self.metas, self.layer_map).spans()

    @cached_property
    def most_buffered(self) -> Moment:
        return self.moment(self.trace.peak_index)

    @cached_property
    def most_pinned(self) -> Moment:
        return self.moment(self.trace.peak_pinned_index)

    @cached_property
    def most_open(self) -> Moment:
        return self.moment(self.trace.max_open_index)

    def moment(self, index: int) -> Moment:
        """Return what is held when tensor `index` has been buffered."""
        return Moment(index, *self.trace.steps[index], held=tuple(open_at(self.spans, index)))

    def to_json(self) -> dict[str, Any]:
        """Return the figures for programs. Tensors are counted from 0."""
        return {
            "order": self.order,
            "policy": self.policy,
            "max_open_layers": self.max_open_layers,
            "peak_buffered_bytes": self.peak_buffered_bytes,
            "peak_pinned_bytes": self.peak_pinned_bytes,
            "peak_receive_bytes": self.peak_receive_bytes,
            "peak_staged_bytes": self.peak_staged_bytes,
            "within_budget": self.within_budget,
            "causes": [cause.name.lower() for cause in self.causes],
            "most_buffered": self.most_buffered.to_json(),
            "most_pinned": self.most_pinned.to_json(),
            "most_open": self.most_open.to_json(),
        }


def scenarios(
    metas: Sequence[ParamMeta],
    layer_map: LayerMap,
    orders: Mapping[str, Reorder],
    policies: Mapping[str, Order] = POLICIES,
    *,
    transport: Transport = UNPACKED,
) -> list[Scenario]:
    """Simulate every order under every policy, in that order. Touches no tensor and no device.

    Args:
        metas: the stream as the trainer's model yields it.
        orders, policies: by name.

    Raises:
        ConfigError: an order does not fit the model.
        PlanError: a policy cannot do what is asked of it.
    """
    simulator = Simulator(metas, layer_map)
    facts = StreamFacts.of(metas, layer_map)
    places = {meta.name: place for place, meta in enumerate(metas)}
    result = []
    for order, reorder in orders.items():
        given = reorder(metas)
        grouped = by_parent_layer(given, layer_map)
        ordered = simulator.trace([places[meta.name] for meta in grouped])
        for policy, arrange in policies.items():
            stream = grouped if arrange is by_parent_layer else arrange(given, layer_map)
            storages = transport.storages(stream, layer_map, policy)
            staged_bytes = 0
            if storages:
                trace = Simulator(stream, layer_map, storages).trace()
                receive = _receive(stream, layer_map, storages, transport.chunk_buffers)
            elif stream == grouped:
                trace = receive = ordered  # equal streams are simulated once
            else:
                trace = receive = simulator.trace([places[meta.name] for meta in stream])
            if policy == SPILL:
                chunk_bytes = transport.chunk_bytes
                plan = build_plan(given, layer_map, SPILL, chunk_bytes=chunk_bytes)
                staged_bytes = plan.peak_staged_bytes
                if chunk_bytes is not None:  # all chunk buffers exist from the first tensor on
                    buffers = transport.chunk_buffers * chunk_bytes
                    receive = Trace(
                        step._replace(pinned_bytes=step.pinned_bytes + buffers)
                        for step in trace.steps
                    )
            budget = transport.budget_bytes
            within = None if budget is None else trace.peak_pinned_bytes <= budget
            causes = causes_of(stream, trace, layer_map, storages, ordered=ordered, facts=facts)
            result.append(
                Scenario(
                    order=order,
                    policy=policy,
                    metas=stream,
                    layer_map=layer_map,
                    trace=trace,
                    receive=receive,
                    storages=storages,
                    peak_staged_bytes=staged_bytes,
                    within_budget=within,
                    causes=() if within else causes,
                )
            )
    return result


def _receive(
    metas: Sequence[ParamMeta],
    layer_map: LayerMap,
    storages: Mapping[str, Storage],
    chunk_buffers: int,
) -> Trace:
    """Return the trace with the receiver's chunk buffers held beside the layers."""
    chunks = {storage.key: storage for storage in storages.values()}
    # A second name for each chunk: the receiver holds it too, even if it has one tensor only.
    held_twice = {**storages, **{f"chunk buffer {key}": chunk for key, chunk in chunks.items()}}
    simulator = Simulator(metas, layer_map, held_twice)
    order = [storages[meta.name] for meta in metas]
    return simulator.trace(chunks=order, chunk_buffers=chunk_buffers)
