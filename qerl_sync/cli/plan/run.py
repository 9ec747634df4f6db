"""The work of `qerl-sync plan`: read the model, make the layer map, simulate, judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from qerl_sync import __version__
from qerl_sync.cli.plan.assertions import Assertion, parse_assertion
from qerl_sync.cli.plan.input import PlanInput, policy_name, read_input
from qerl_sync.cli.plan.order_specs import by_name, default_orders, resolve_order
from qerl_sync.cli.plan.scenarios import (
    POLICIES,
    SPILL,
    VLLM_CHUNK_BUFFERS,
    Order,
    Scenario,
    Transport,
    scenarios,
)
from qerl_sync.errors import ConfigError, PlanError
from qerl_sync.meta import format_bytes, parse_bytes
from qerl_sync.offline.layer_map import offline_map
from qerl_sync.plan.budget import within_budget
from qerl_sync.plan.offline_map import OfflineMap
from qerl_sync.plan.orders import Reorder
from qerl_sync.plan.record import SyncRecord, first_difference, read_records
from qerl_sync.plan.spill import load_order
from qerl_sync.plan.sync_plan import build_plan

BUDGET_POLICY = "reorder_in_budget"

# Shows what is being done while it takes long.
Status = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Comparison:
    """One record of a run, held against the plan for it."""

    record: SyncRecord
    difference: str | None

    def to_json(self) -> dict[str, Any]:
        return {
            "source_order": self.record.source_order,
            "policy": self.record.plan.policy,
            "plan_digest": self.record.plan.digest,
            "num_tensors": len(self.record.plan.metas),
            "equal": self.difference is None,
            "first_difference": self.difference,
        }


@dataclass(frozen=True)
class Outcome:
    """The figures, and what they are judged by.

    Attributes:
        engine: vLLM's engine arguments.
        refused: why there is no plan within the budget.
    """

    asked: PlanInput
    engine: Mapping[str, Any]
    found: OfflineMap
    scenarios: Sequence[Scenario]
    transport: Transport
    assertions: Sequence[Assertion]
    comparisons: Sequence[Comparison]
    refused: str | None

    @property
    def budget_bytes(self) -> int | None:
        return self.transport.budget_bytes

    @cached_property
    def failures(self) -> list[str]:
        """Describe broken assertions, and recorded runs that differ."""
        broken = [
            f"--assert {assertion.text()}: {failure}"
            for assertion in self.assertions
            for failure in assertion.failures(self.scenarios)
        ]
        differing = [f"--compare: {c.difference}" for c in self.comparisons if c.difference]
        return broken + differing

    @property
    def architecture(self) -> str:
        return ", ".join((self.asked.checkpoint.config or {}).get("architectures") or [])

    @cached_property
    def total_bytes(self) -> int:
        return sum(meta.nbytes for meta in self.found.metas)

    @cached_property
    def dtypes(self) -> str:
        """Return the dtypes of the tensors, the one with the most bytes first."""
        sizes: Counter[str] = Counter()
        for meta in self.found.metas:
            sizes[meta.dtype] += meta.nbytes
        return ", ".join(dtype for dtype, _ in sizes.most_common())

    @cached_property
    def layer_bytes(self) -> dict[str, int]:
        """Return the bytes that each parent layer holds when it is complete, the largest first."""
        sizes: Counter[str] = Counter()
        for contributions in self.found.layer_map.contributions.values():
            for c in contributions:
                sizes[c.parent_layer] += c.held_bytes
        return dict(sizes.most_common())

    @property
    def largest_layer(self) -> tuple[str, int]:
        return next(iter(self.layer_bytes.items()), ("none", 0))

    @property
    def origin(self) -> str:
        """Return where the layer map comes from, notes on it, and how the stream is packed."""
        if self.found.origin == "recorded":
            found = "Layer map recorded from vLLM {}, which is not installed here"
        else:
            earlier = " earlier" if self.found.origin == "cache" else ""
            found = f"Layer map observed{earlier} from vLLM {{}}"
        shards = self.engine.get("tensor_parallel_size", 1)
        rank = f", rank 0 of {shards}" if shards != 1 else ""
        sentences = [
            f"{found.format(self.found.vllm_version)}{rank}.",
            self.found.note,
            self.asked.note,
        ]
        chunk_bytes, buffers = self.transport.chunk_bytes, self.transport.chunk_buffers
        if chunk_bytes is not None:
            sentences.append(f"Chunks of {format_bytes(chunk_bytes)} in {buffers} buffers.")
        return " ".join(filter(None, sentences))

    def to_json(self) -> dict[str, Any]:
        largest = self.largest_layer
        return {
            "qerl_sync": __version__,
            "model": self.asked.name,
            "architecture": self.architecture,
            "layer_map": {
                "origin": self.found.origin,
                "vllm_version": self.found.vllm_version,
                "note": self.found.note,
                "num_layers": len(self.layer_bytes),
                "largest": {"layer": largest[0], "held_bytes": largest[1]},
            },
            "num_tensors": len(self.found.metas),
            "total_bytes": self.total_bytes,
            "dtypes": self.dtypes,
            "chunk_bytes": self.transport.chunk_bytes,
            "chunk_buffers": self.transport.chunk_buffers,
            "budget_bytes": self.budget_bytes,
            "refused": self.refused,
            "scenarios": [scenario.to_json() for scenario in self.scenarios],
            "assertions": [a.to_json(self.scenarios) for a in self.assertions],
            "compare": [comparison.to_json() for comparison in self.comparisons],
        }


def execute(
    model: Path,
    status: Status,
    *,
    orders: Sequence[str] = (),
    policies: Sequence[str] = (),
    budget: str | None = None,
    chunk_bytes: str | None = None,
    chunk_buffers: int = VLLM_CHUNK_BUFFERS,
    packing: str = "auto",
    tensor_parallel_size: int | None = None,
    dtype: str | None = None,
    assertions: Sequence[str] = (),
    compare: Path | None = None,
) -> Outcome:
    """Find what was asked for, given as it was written. No orders or policies: all of them.

    Raises:
        SyncError: what was asked for cannot be right, or vLLM does not take the model.
    """
    # Everything that can be wrong is found before the layer map, which takes long.
    limits = [parse_assertion(text) for text in assertions]
    budget_bytes = None if budget is None else parse_bytes(budget)
    buffer_bytes = None if chunk_bytes is None else parse_bytes(chunk_bytes)
    records = [] if compare is None else read_records(compare)
    asked = read_input(model)
    recorded = next((r.plan.budget_bytes for r in records if r.plan.budget_bytes), None)
    budget_bytes = budget_bytes or asked.budget_bytes or recorded
    transport = Transport(buffer_bytes, chunk_buffers, packing, budget_bytes)
    chosen, arranged = _choose(orders, policies, asked, transport, records, judged=bool(limits))
    engine = dict(asked.engine)
    if tensor_parallel_size is not None:
        engine["tensor_parallel_size"] = tensor_parallel_size
    with status("making the layer map; vLLM takes some seconds when it has not seen this model"):
        found = offline_map(
            asked.checkpoint,
            engine=engine,
            dtype=dtype or asked.dtype,
            ignore_names=asked.ignore_names,
            allow_incomplete=asked.allow_incomplete,
        )
    simulate = partial(scenarios, found.metas, found.layer_map, chosen, transport=transport)
    refused = None
    try:
        result = simulate(arranged)
    except PlanError as exc:
        # The other policies' figures show what a sufficient budget would be.
        if arranged.pop(BUDGET_POLICY, None) is None:
            raise
        refused = str(exc)
        result = simulate(arranged)
    return Outcome(
        asked=asked,
        engine=engine,
        found=found,
        scenarios=result,
        transport=transport,
        assertions=limits,
        comparisons=[Comparison(record, _difference(found, record)) for record in records],
        refused=refused,
    )


def _choose(
    orders: Sequence[str],
    policies: Sequence[str],
    asked: PlanInput,
    transport: Transport,
    records: Sequence[SyncRecord],
    *,
    judged: bool,
) -> tuple[dict[str, Reorder], dict[str, Order]]:
    """Return the orders and policies to simulate: those asked for, else all.

    With assertions to judge it is the one line that would run, with a run to compare those that it
    has run.
    """
    known = dict(POLICIES)
    if transport.budget_bytes is not None:
        known[BUDGET_POLICY] = partial(
            within_budget, budget_bytes=transport.budget_bytes, chunk_bytes=transport.chunk_bytes
        )
    known[SPILL] = load_order
    if not orders and not policies and records:
        # Not strict: if the run is of another model, the comparison says so.
        ran = {r.source_order: by_name(r.source_names, "the run", strict=False) for r in records}
        names = [policy_name(r.plan.policy, r.plan.budget_bytes) for r in records]
        return ran, {name: known[name] for name in names}
    if not orders and not policies and judged:
        orders, policies = [asked.order or "hf"], [asked.policy or "reorder"]
    if not orders:
        orders = default_orders(asked.files)
        if asked.order is not None and asked.order not in orders:
            orders = [*orders, asked.order]
    policies = policies or [name for name in known if name != SPILL or asked.policy == SPILL]
    for name in policies:
        if name == BUDGET_POLICY and name not in known:
            raise ConfigError("--policy reorder_in_budget needs a budget: --budget 2GiB")
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"
            raise ConfigError(f"unknown policy {name!r}; {hint}")
    return (
        {text: resolve_order(text, files=asked.files) for text in orders},
        {name: known[name] for name in policies},
    )


def _difference(found: OfflineMap, record: SyncRecord) -> str | None:
    """Plan for the source order of a recorded run, and return where its measured trace leaves the
    plan."""
    try:
        given = by_name(record.source_names, "the recorded run")(found.metas)
    except ConfigError as exc:  # the run is of another model
        return str(exc)
    # Only the run's live engine could tell how each layer is loaded.
    loading = record.plan.loading
    layers = {
        name: replace(layer, loading=loading.get(name, layer.loading))
        for name, layer in found.layer_map.layers.items()
    }
    planned = build_plan(
        given,
        replace(found.layer_map, layers=layers),
        record.plan.policy,
        chunk_bytes=record.chunk_bytes,
        storages=record.storages,
        budget_bytes=record.plan.budget_bytes,
    )
    return first_difference(planned, record)
