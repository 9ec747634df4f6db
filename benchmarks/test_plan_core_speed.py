"""The planner's core: time for each tensor does not grow with their number.

    scripts/bench benchmarks/test_plan_core_speed.py

What is asserted are ratios within one run; absolute times depend on the machine. A tensor of a
large stream costs more than one of a small stream where the large one does not fit into the
processor's caches: that is what `ROOM` is for. Quadratic work would cost a hundredfold.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from support.streams import mixture

from qerl_sync.buffers.ledger import BufferLedger
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.orders import parse_order
from qerl_sync.plan.policies import by_parent_layer
from qerl_sync.plan.simulator import replay
from qerl_sync.plan.sync_plan import build_plan

COUNTS = (1_000, 10_000, 65_000, 100_000)
ROOM = 6.0


def seconds(run: Callable[[], Any], rounds: int = 3) -> float:
    """Of the processor, the least of some rounds: what other programs do counts little."""
    least = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        run()
        least = min(least, time.process_time() - start)
    return least


def assert_linear(what: str, each: dict[int, float]) -> None:
    """`each`: seconds for one tensor, by the number of tensors."""
    print(f"\n{what}:", ", ".join(f"{n:,}: {1e6 * s:.2f} us" for n, s in each.items()), "each")
    assert each[max(each)] <= ROOM * each[min(each)]


def arranged(count: int, order: str, experts: int) -> tuple[list[ParamMeta], LayerMap, int]:
    """A stream in that order, and a budget halfway between what it needs and what it takes.

    Metadata and map are made in the stream's order, as a source and a probe make them.
    """
    metas, layer_map = mixture(count, experts)
    given = [ParamMeta(m.name, m.dtype, m.shape) for m in parse_order(order)(metas)]
    contributions = {
        meta.name: tuple(c._replace() for c in layer_map.contributions[meta.name]) for meta in given
    }
    layer_map = LayerMap(layer_map.layers, contributions)
    lowest = replay(by_parent_layer(given, layer_map), layer_map).peak_pinned_bytes
    return given, layer_map, (lowest + replay(given, layer_map).peak_pinned_bytes) // 2


def plan(metas: list[ParamMeta], layer_map: LayerMap, budget: int, chunk: int | None = None) -> Any:
    layer_map.__dict__.pop("digest", None)  # a new stream has a new map
    return build_plan(metas, layer_map, "reorder", budget_bytes=budget, chunk_bytes=chunk)


@pytest.mark.parametrize("order", ["hf", "random:0"])
def test_replay_is_linear(order):
    each = {}
    for count in COUNTS:
        metas, layer_map, _ = arranged(count, order, 128)
        each[count] = seconds(lambda m=metas, lm=layer_map: replay(m, lm)) / len(metas)
    assert_linear(f"replay, {order}", each)


@pytest.mark.parametrize(
    ("order", "experts"), [("hf", 128), ("interleaved:2", 128), ("random:0", 128), ("random:0", 0)]
)
def test_a_plan_within_a_budget_is_linear(order, experts):
    """With 0 experts a random order opens thousands of layers side by side."""
    each = {}
    for count in COUNTS:
        metas, layer_map, budget = arranged(count, order, experts)
        each[count] = seconds(lambda a=(metas, layer_map, budget): plan(*a)) / len(metas)
        made = plan(metas, layer_map, budget)
        assert made.predicted.peak_pinned_bytes <= budget
        assert (made.predicted == made.as_given) == (order == "hf")
    assert_linear(f"plan, {order}, {experts} experts", each)


def test_plan_and_prediction_of_65000_names(benchmark):
    metas, layer_map = mixture(65_000)
    made = benchmark.pedantic(build_plan, (metas, layer_map, "reorder"), rounds=7, warmup_rounds=1)
    assert len(made.predicted.steps) == len(metas) >= 65_000
    assert made.predicted.max_open_layers == 1
    assert benchmark.stats.stats.min <= 0.5


@pytest.mark.parametrize("order", ["hf", "interleaved:2", "random:0"])
def test_65000_names(benchmark, order):
    """The whole plan: two replays, the order within the budget, chunks, the map's digest."""
    metas, layer_map, budget = arranged(65_000, order, 128)
    made = benchmark.pedantic(plan, (metas, layer_map, budget, 2**30), rounds=5)
    assert made.predicted.peak_pinned_bytes <= budget
    assert sum(len(chunk.names) for chunk in made.chunks) == len(metas)


@pytest.mark.parametrize("views", [1, 10, 1000], ids=lambda n: f"{n} to a storage")
def test_the_ledger_costs_the_same_however_much_is_held(views):
    """One tensor arrives and one layer is released, while so many others are held."""
    each = {}
    for held in COUNTS:
        ledger = BufferLedger()
        for i in range(held):
            ledger.hold(f"layer.{i}", 8, (Storage(i // views, 8 * views),))

        def turn(ledger: BufferLedger = ledger) -> None:
            for i in range(10_000):
                ledger.begin("tensor")
                ledger.hold("one", 8, (Storage("one", 8),))
                ledger.hold("one", 8, (Storage(i % 7, 8),))
                ledger.release("one")

        before = ledger.buffered_bytes, ledger.open_layers
        each[held] = seconds(turn) / 10_000
        assert (ledger.buffered_bytes, ledger.open_layers) == before == (8 * held, held)
    assert_linear(f"ledger, {views} views to a storage", each)
