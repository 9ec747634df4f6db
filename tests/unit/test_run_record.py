"""What a run records of its plans, and how a plan is held against it."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.streams import storages, streams

from qerl_sync import ConfigError
from qerl_sync.buffers.trace import Trace
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.plan.layer_map import Contribution, LayerMap, ParentLayer
from qerl_sync.plan.orders import parse_order
from qerl_sync.plan.record import (
    SyncRecord,
    first_difference,
    has_record,
    read_record,
    read_records,
    shared_storages,
    write_record,
)
from qerl_sync.plan.simulator import replay
from qerl_sync.plan.sync_plan import build_plan

ANY_EXAMPLE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@given(streams(), st.data())
@ANY_EXAMPLE
def test_a_record_survives_its_file(tmp_path, stream, data):
    metas, layer_map = stream
    memory = data.draw(storages(metas))
    plan = build_plan(metas, layer_map, "warn", storages=memory)
    record = SyncRecord(plan, plan.predicted, "random:3", 64, shared_storages(metas, memory))
    write_record(tmp_path, record)
    assert has_record(tmp_path, plan.digest)
    assert record in read_records(tmp_path)
    assert record.source_names == [meta.name for meta in metas]


@given(streams(), st.data())
@ANY_EXAMPLE
def test_shared_storages_are_all_that_a_prediction_needs(stream, data):
    metas, layer_map = stream
    memory = data.draw(storages(metas))
    memory |= {
        m.name: Storage(f"its own {m.name}", m.nbytes) for m in metas if m.name not in memory
    }
    kept = shared_storages(metas, memory)
    assert replay(metas, layer_map, kept) == replay(metas, layer_map, memory)
    sizes = {meta.name: meta.nbytes for meta in metas}
    assert all(
        sum(s.key == kept[name].key for s in memory.values()) > 1
        or kept[name].nbytes != sizes[name]
        for name in kept
    )


@given(streams(shared=False), st.data())
@ANY_EXAMPLE
def test_a_difference_is_found_at_its_tensor(stream, data):
    metas, layer_map = stream
    plan = build_plan(metas, layer_map, "reorder")
    record = SyncRecord(plan, plan.predicted, "hf")
    assert first_difference(plan, record) is None
    steps = list(plan.predicted.steps)
    index = data.draw(st.integers(0, len(steps) - 1))
    steps[index] = steps[index]._replace(pinned_bytes=steps[index].pinned_bytes + 1)
    found = first_difference(plan, SyncRecord(plan, Trace(tuple(steps)), "hf"))
    assert found.startswith(f"tensor {index} ({steps[index].name}): pinned_bytes")


@given(streams(shared=False))
@ANY_EXAMPLE
def test_another_stream_is_told_apart_from_another_trace(stream):
    metas, layer_map = stream
    plan = build_plan(metas, layer_map, "warn")
    shorter = build_plan(metas[:-1], layer_map, "warn")
    found = first_difference(plan, SyncRecord(shorter, shorter.predicted, "hf"))
    assert f"{metas[-1].name} is only in the plan" in found
    backwards = build_plan(parse_order("size")(metas[::-1]), layer_map, "warn")
    found = first_difference(plan, SyncRecord(backwards, backwards.predicted, "hf"))
    assert (found is None) == (list(backwards.metas) == list(metas))


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99}', '{"format": 1}'])
def test_a_damaged_record_is_refused(tmp_path, content):
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "0.json").write_text(content)
    with pytest.raises(ConfigError):
        read_record(tmp_path)


def test_a_record_whose_plan_was_changed_is_refused(tmp_path):
    meta = ParamMeta("a", "bfloat16", (4,))
    layer_map = LayerMap(
        {"layer": ParentLayer("layer", "Linear", 4, 4)},
        {"a": (Contribution("layer", "weight", 4, 8, True),)},
    )
    plan = build_plan([meta], layer_map, "warn")
    path = write_record(tmp_path, SyncRecord(plan, plan.predicted, "hf"))
    data = json.loads(path.read_text())
    data["plan"]["metas"][0][2] = [99]
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError):
        read_record(tmp_path)
