"""The work of `qerl-sync plan`: from what was asked to figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
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
from qerl_sync.cli.plan.to_json import scenario_json
from qerl_sync.errors import ConfigError, PlanError
from qerl_sync.meta import format_bytes, parse_bytes
from qerl_sync.offline.layer_map import offline_map
from qerl_sync.plan.budget import within_budget
from qerl_sync.plan.offline_map import OfflineMap
from qerl_sync.plan.orders import Reorder
from qerl_sync.plan.record import Difference, SyncRecord, first_difference, read_records
from qerl_sync.plan.spill import load_order
from qerl_sync.plan.sync_plan import build_plan

BUDGET_POLICY = "within_budget"

# Says what is being done while it takes long.
Status = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Request:
    """What was asked for, as it was written. Empty orders or policies: all."""

    model: Path
    orders: Sequence[str] = ()
    policies: Sequence[str] = ()
    budget: str | None = None
    chunk_bytes: str | None = None
    chunk_buffers: int = VLLM_CHUNK_BUFFERS
    packing: str = "auto"
    tensor_parallel_size: int | None = None
    dtype: str | None = None
    assertions: Sequence[str] = ()
    compare: Path | None = None


@dataclass(frozen=True)
class Comparison:
    """One record of a run, held against the plan for it."""

    record: SyncRecord
    difference: Difference | None

    def to_json(self) -> dict[str, Any]:
        return {
            "source_order": self.record.source_order,
            "policy": self.record.plan.policy,
            "plan_digest": self.record.plan.digest,
            "num_tensors": len(self.record.plan.metas),
            "equal": self.difference is None,
            "first_difference": self.difference and self.difference.text,
        }


@dataclass(frozen=True)
class Outcome:
    """What was found.

    Attributes:
        engine: vLLM's engine arguments.
        refused: why there is no plan within the budget.
    """

    asked: PlanInput
    engine: Mapping[str, Any]
    found: OfflineMap
    scenarios: Sequence[Scenario]
    transport: Transport
    budget_bytes: int | None
    assertions: Sequence[Assertion]
    comparisons: Sequence[Comparison] = field(default_factory=list)
    refused: str | None = None

    @cached_property
    def failures(self) -> list[str]:
        """Broken assertions, and recorded runs that differ, in words."""
        broken = [
            f"--assert {assertion.text()}: {failure}"
            for assertion in self.assertions
            for failure in assertion.failures(self.scenarios)
        ]
        differing = [
            f"--compare: {found.difference.text}"
            for found in self.comparisons
            if found.difference is not None
        ]
        return broken + differing

    @property
    def architecture(self) -> str:
        return ", ".join((self.asked.checkpoint.config or {}).get("architectures") or [])

    @cached_property
    def total_bytes(self) -> int:
        return sum(meta.nbytes for meta in self.found.metas)

    @cached_property
    def dtypes(self) -> str:
        """The dtypes of the tensors, the one with the most bytes first."""
        sizes: Counter[str] = Counter()
        for meta in self.found.metas:
            sizes[meta.dtype] += meta.nbytes
        return ", ".join(dtype for dtype, _ in sizes.most_common())

    @cached_property
    def layer_bytes(self) -> dict[str, int]:
        """What each parent layer holds when it is complete, the largest first."""
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
        """Where the layer map comes from and what to know of it, in sentences."""
        cached = " earlier" if self.found.origin == "cache" else ""
        shards = self.engine.get("tensor_parallel_size", 1)
        rank = f", rank 0 of {shards}" if shards != 1 else ""
        observed = f"Layer map observed{cached} from vLLM {self.found.vllm_version}{rank}."
        return " ".join(filter(None, (observed, self.found.note, self.asked.note)))

    @property
    def packed(self) -> str:
        """How the stream is packed, in a sentence; empty if it is not."""
        chunk_bytes, buffers = self.transport.chunk_bytes, self.transport.chunk_buffers
        if chunk_bytes is None:
            return ""
        return f"Chunks of {format_bytes(chunk_bytes)} in {buffers} buffers."

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
            "scenarios": [scenario_json(s) for s in self.scenarios],
            "assertions": [a.to_json(self.scenarios) for a in self.assertions],
            "compare": [comparison.to_json() for comparison in self.comparisons],
        }


def execute(request: Request, status: Status) -> Outcome:
    """Read, map, replay, judge.

    Raises:
        SyncError: what was asked for cannot be right, or vLLM does not take the model.
    """
    # What can be wrong is found before anything takes long.
    assertions = [parse_assertion(text) for text in request.assertions]
    budget_bytes = parse_bytes(request.budget) if request.budget is not None else None
    chunk_bytes = parse_bytes(request.chunk_bytes) if request.chunk_bytes is not None else None
    records = read_records(request.compare) if request.compare is not None else []
    asked = read_input(request.model)
    recorded = next((r.plan.budget_bytes for r in records if r.plan.budget_bytes), None)
    budget_bytes = budget_bytes or asked.budget_bytes or recorded
    transport = Transport(chunk_bytes, request.chunk_buffers, request.packing, budget_bytes)
    orders, policies = _choose(request, asked, budget_bytes, transport, records)
    engine = dict(asked.engine)
    if request.tensor_parallel_size is not None:
        engine["tensor_parallel_size"] = request.tensor_parallel_size
    with status("making the layer map; vLLM takes some seconds when it has not seen this model"):
        found = offline_map(asked.checkpoint, engine=engine, dtype=request.dtype or asked.dtype)
    refused = None
    try:
        result = scenarios(found.metas, found.layer_map, orders, policies, transport=transport)
    except PlanError as exc:
        if BUDGET_POLICY not in policies:
            raise
        refused = str(exc)
        policies = {name: p for name, p in policies.items() if name != BUDGET_POLICY}
        result = scenarios(found.metas, found.layer_map, orders, policies, transport=transport)
    return Outcome(
        asked=asked,
        engine=engine,
        found=found,
        scenarios=result,
        transport=transport,
        budget_bytes=budget_bytes,
        assertions=assertions,
        comparisons=[_compare(found, record) for record in records],
        refused=refused,
    )


def _choose(
    request: Request,
    asked: PlanInput,
    budget_bytes: int | None,
    transport: Transport,
    records: Sequence[SyncRecord],
) -> tuple[dict[str, Reorder], dict[str, Order]]:
    """Return the orders and policies to look at: those asked for, else all.

    With assertions to judge it is the one line that would run, with a run to compare those that it
    has run.
    """
    known = dict(POLICIES)
    if budget_bytes is not None:
        known[BUDGET_POLICY] = partial(
            within_budget, budget_bytes=budget_bytes, chunk_bytes=transport.chunk_bytes
        )
    orders, policies = list(request.orders), list(request.policies)
    known[SPILL] = load_order
    if not orders and not policies and records:
        # Not strict: if the run is of another model, the comparison says so.
        ran = {r.source_order: by_name(r.source_names, "the run", strict=False) for r in records}
        return ran, {
            name: known[name]
            for name in (policy_name(r.plan.policy, r.plan.budget_bytes) for r in records)
        }
    if not orders and not policies and request.assertions:
        orders = [asked.order or "hf"]
        policies = [asked.policy or "by_parent_layer"]
    orders = orders or default_orders(asked.files)
    if not request.orders and asked.order is not None and asked.order not in orders:
        orders.append(asked.order)
    policies = policies or [p for p in known if p != SPILL or asked.policy == SPILL]
    for name in policies:
        _refuse_unknown_policy(name, known)
    return (
        {text: resolve_order(text, files=asked.files) for text in orders},
        {name: known[name] for name in policies},
    )


def _refuse_unknown_policy(name: str, known: Mapping[str, Order]) -> None:
    if name in known:
        return
    if name == BUDGET_POLICY:
        raise ConfigError("--policy within_budget needs a budget: --budget 2GiB")
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"
    raise ConfigError(f"unknown policy {name!r}; {hint}")


def _compare(found: OfflineMap, record: SyncRecord) -> Comparison:
    """What this model's plan predicts for the order of a recorded run, and what was measured."""
    try:
        given = by_name(record.source_names, "the recorded run")(found.metas)
    except ConfigError as exc:
        return Comparison(record, Difference(str(exc), None))
    planned = build_plan(
        given,
        found.layer_map,
        record.plan.policy,
        chunk_bytes=record.chunk_bytes,
        storages=record.storages,
        budget_bytes=record.plan.budget_bytes,
    )
    return Comparison(record, first_difference(planned, record))
