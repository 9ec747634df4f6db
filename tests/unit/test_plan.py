"""Planning is pure: properties of orders, chunks, predictions and their serialised form."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.streams import storages, streams

from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import ConfigError, PlanError
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.diagnosis import Cause, diagnose
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.orders import parse_order
from qerl_sync.plan.part import part_to_send, smallest_part
from qerl_sync.plan.policies import as_given, by_parent_layer
from qerl_sync.plan.simulator import open_layers_at, replay
from qerl_sync.plan.sync_plan import SyncPlan, build_plan

ORDERS = ["hf", "alphabetical", "size", "optimizer", "random:0", "random:7", "interleaved:3"]


@given(streams(), st.sampled_from([as_given, by_parent_layer]))
def test_every_policy_is_a_permutation(stream, policy):
    metas, layer_map = stream
    ordered = policy(metas, layer_map)
    assert sorted(ordered, key=lambda m: m.name) == sorted(metas, key=lambda m: m.name)


@given(streams(), st.sampled_from(ORDERS))
def test_every_source_order_is_a_permutation(stream, order):
    metas, _ = stream
    assert set(parse_order(order)(metas)) == set(metas)
    assert len(parse_order(order)(metas)) == len(metas)


@given(streams(shared=False))
def test_by_parent_layer_never_has_two_layers_open(stream):
    metas, layer_map = stream
    trace = replay(by_parent_layer(metas, layer_map), layer_map)
    assert trace.max_open_layers <= 1


@given(streams())
def test_by_parent_layer_keeps_connected_layers_together(stream):
    """Where tensors land in several layers, the group that they connect is the best one can do:
    no two groups are ever open together."""
    metas, layer_map = stream
    groups = _components(metas, layer_map)
    seen: list[int] = []
    for meta in by_parent_layer(metas, layer_map):
        for parent in layer_map.parents(meta.name):
            if not seen or seen[-1] != groups[parent]:
                seen.append(groups[parent])
    assert len(seen) == len(set(seen))


@given(streams())
def test_by_parent_layer_is_stable(stream):
    """Tensors of a layer stay in source order, and a stream in order is left alone."""
    metas, layer_map = stream
    ordered = by_parent_layer(metas, layer_map)
    assert by_parent_layer(ordered, layer_map) == ordered
    place = {meta.name: i for i, meta in enumerate(metas)}
    by_layer = defaultdict(list)
    for meta in ordered:
        for parent in layer_map.parents(meta.name):
            by_layer[parent].append(place[meta.name])
    assert all(places == sorted(places) for places in by_layer.values())


@given(st.data(), streams(), st.sampled_from(["error", "reorder", "spill", "warn"]))
def test_plan_survives_json(data, stream, policy):
    metas, layer_map = stream
    plan = build_plan(
        metas,
        layer_map,
        policy,
        chunk_bytes=data.draw(st.one_of(st.none(), st.integers(1, 64))),
        storages=data.draw(storages(metas)),
    )
    again = SyncPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.digest == plan.digest
    copied = LayerMap.from_json(json.loads(json.dumps(layer_map.to_json())))
    assert copied == layer_map
    assert copied.digest == layer_map.digest


@given(streams(shared=False), st.integers(1, 64))
def test_chunks_hold_whole_layers(stream, chunk_bytes):
    metas, layer_map = stream
    plan = build_plan(metas, layer_map, "reorder", chunk_bytes=chunk_bytes)
    assert [name for chunk in plan.chunks for name in chunk.names] == list(plan.order)
    homes = defaultdict(set)
    for i, chunk in enumerate(plan.chunks):
        assert chunk.oversized == (chunk.nbytes > chunk_bytes)
        for name in chunk.names:
            for parent in layer_map.parents(name):
                homes[parent].add(i)
        if chunk.oversized:
            assert len({layer_map.parents(name) for name in chunk.names}) == 1
    assert all(len(chunks) == 1 for chunks in homes.values())


def test_digest_tells_what_is_sent_apart():
    metas, layer_map = _two_layers()
    plan = build_plan(metas, layer_map, "reorder")
    cut = build_plan(metas, layer_map, "reorder", chunk_bytes=1)
    other = build_plan([*metas[:-1], ParamMeta("b.1", "float32", (4,))], layer_map, "reorder")
    assert len({plan.digest, cut.digest, other.digest}) == 3
    assert build_plan(metas, layer_map, "reorder").digest == plan.digest


def test_a_changed_plan_is_refused():
    metas, layer_map = _two_layers()
    data = build_plan(metas, layer_map, "warn").to_json()
    data["metas"][0][2] = [5]
    with pytest.raises(PlanError):
        SyncPlan.from_json(data)
    with pytest.raises(PlanError):
        SyncPlan.from_json({**data, "format": 99})


def test_doubled_names_are_refused():
    metas, layer_map = _two_layers()
    with pytest.raises(PlanError) as refused:
        build_plan([*metas, metas[0]], layer_map, "reorder")
    assert refused.value.tensor == "a.0"


def test_diagnosis_names_layers_elements_cause_and_cure():
    metas, layer_map = _two_layers()
    plan = build_plan(metas, layer_map, "warn")
    found = diagnose(plan.metas, plan.predicted, layer_map)
    assert found is not None
    assert found.causes == (Cause.OUT_OF_ORDER,)
    text = found.text("interleaved:2")
    assert "2 parent layers at once" in text
    assert "a (Linear): 8/8 elements" in text
    assert "b (Linear): 4/8 elements" in text
    assert "policy: reorder" in text
    assert "interleaved:2" in text
    ordered = build_plan(metas, layer_map, "reorder")
    assert diagnose(ordered.metas, ordered.predicted, layer_map) is None


@given(streams(), st.data())
def test_open_layers_at_adds_up_to_the_trace(stream, data):
    metas, layer_map = stream
    trace = replay(metas, layer_map)
    index = data.draw(st.integers(0, len(metas) - 1))
    opened = open_layers_at(index, metas, layer_map)
    assert len(opened) >= trace.steps[index].open_layers
    if not any(layer.deferred for layer in layer_map.layers.values()):
        assert sum(layer.buffered_bytes for layer in opened) >= trace.steps[index].buffered_bytes


def test_first_difference_names_tensor_field_and_both_values():
    metas, layer_map = _two_layers()
    mine, theirs = replay(metas, layer_map), replay(metas[::-1], layer_map)
    assert mine.first_difference(mine) is None
    assert mine.first_difference(theirs) == "tensor 0 (a.0): name predicted a.0, measured b.1"
    shorter = Trace(mine.steps[:-1])
    assert shorter.first_difference(mine) == "3 tensors predicted, 4 measured"


@pytest.mark.parametrize("text", ["", "hf:1", "random", "random:x", "interleaved:0", "sorted"])
def test_unknown_orders_are_refused(text):
    with pytest.raises(ConfigError):
        parse_order(text)


def _two_layers():
    from qerl_sync.plan.layer_map import Contribution, ParentLayer

    metas = [ParamMeta(f"{layer}.{i}", "bfloat16", (4,)) for i in range(2) for layer in "ab"]
    contributions = {m.name: (Contribution(m.name[0], "w", 4, 8, True),) for m in metas}
    layers = {name: ParentLayer(name, "Linear", 8, 8) for name in "ab"}
    return metas, LayerMap(layers, contributions)


@pytest.mark.parametrize("policy", ["warn", "reorder", "spill"])
def test_layers_that_are_not_loaded_layerwise_hold_nothing_in_any_order(policy):
    metas, layer_map = _two_layers()
    layers = {**layer_map.layers, "a": replace(layer_map.layers["a"], loading="direct")}
    known = LayerMap(layers, layer_map.contributions)
    assert known.digest != layer_map.digest
    assert LayerMap.from_json(known.to_json()) == known
    plan = build_plan(metas, known, policy, chunk_bytes=8)
    assert plan.loading == {"a": "direct", "b": "layerwise"}
    assert SyncPlan.from_json(plan.to_json()) == plan
    assert plan.predicted.max_open_layers == 1
    assert plan.predicted.peak_buffered_bytes == 16, "layer b, whole"
    assert plan.as_given.peak_buffered_bytes == 16
    assert plan.peak_staged_bytes == (8 if policy == "spill" else 0), "the first half of b"
    both = {name: replace(layer, loading="direct") for name, layer in layers.items()}
    nothing = build_plan(metas, LayerMap(both, layer_map.contributions), policy, chunk_bytes=8)
    assert (nothing.predicted.peak_pinned_bytes, nothing.peak_staged_bytes) == (0, 0)
    assert len(nothing.chunks) == 4, "no layer has to be kept whole"


def test_the_smallest_part_is_a_whole_layer():
    metas, layer_map = _two_layers()
    small = [replace(meta, shape=(2,)) if meta.name[0] == "b" else meta for meta in metas]
    assert [meta.name for meta in smallest_part(small, layer_map)] == ["b.0", "b.1"]


@given(streams(), st.randoms(use_true_random=False))
def test_a_part_is_the_smallest_one_of_whole_layers(stream, random):
    metas, layer_map = stream
    changed = {meta.name for meta in metas if random.random() < 0.3}
    part = part_to_send(metas, layer_map, {m.name for m in metas} - changed)
    sent = {meta.name for meta in part}
    assert [meta for meta in metas if meta.name in sent] == part

    def module(name):
        return name.rpartition(".")[0]

    lands = {m.name: {c.parent_layer for c in layer_map.contributions[m.name]} for m in metas}
    written = {module(name) for name, layers in lands.items() if not layers}
    places = {n: lands[n] | ({module(n) + "."} if module(n) in written else set()) for n in lands}
    reached: set[str] = set()
    while grown := {n for n in lands if n in changed or places[n] & reached} - reached:
        reached |= grown | {place for name in grown for place in places[name]}
    assert sent == reached & lands.keys()


def _components(metas, layer_map):
    """A label for each layer, equal for layers connected by tensors: naive, for comparison."""
    label = {layer: i for i, layer in enumerate(layer_map.layers)}
    for _ in label:
        for meta in metas:
            parents = layer_map.parents(meta.name)
            lowest = min((label[p] for p in parents), default=0)
            for parent in parents:
                label[parent] = lowest
    return label
