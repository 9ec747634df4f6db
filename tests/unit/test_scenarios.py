"""Orders and policies side by side: the walk, the orders, packing, moments, casts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.streams import LedgerReplay, storages, streams

from qerl_sync.buffers.ledger import BufferLedger
from qerl_sync.cli.plan.order_specs import as_saved, by_name, default_orders, resolve_order
from qerl_sync.cli.plan.scenarios import Transport, scenarios
from qerl_sync.errors import ConfigError
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.plan.chunks import packed_storages
from qerl_sync.plan.diagnosis import Cause
from qerl_sync.plan.layer_map import Contribution, LayerMap, ParentLayer
from qerl_sync.plan.simulator import OpenLayer, Simulator, open_at, open_at_each, open_layers_at

GIB = 1024**3


@given(st.data(), streams())
def test_the_walk_is_the_replay_of_a_ledger(data, stream):
    metas, layer_map = stream
    memory = data.draw(storages(metas))
    run = LedgerReplay(layer_map, memory)
    for meta in metas:
        run.feed(meta)
    assert Simulator(metas, layer_map, memory).trace() == run.ledger.trace()


@given(st.data(), streams())
def test_layers_open_in_the_middle_are_those_of_a_ledger(data, stream):
    metas, layer_map = stream
    index = data.draw(st.integers(0, len(metas) - 1))
    run = LedgerReplay(layer_map, {})
    for meta in metas[:index]:
        run.feed(meta)
    run.feed(metas[index], release=False)
    layers = layer_map.layers
    assert open_layers_at(index, metas, layer_map) == [
        OpenLayer(name, layers[name].kind, run.loaded[name], layers[name].total_numel, held_bytes)
        for name, held_bytes in run.held.items()
        if not layers[name].deferred
    ]


@given(streams())
def test_spans_add_up_to_the_trace(stream):
    metas, layer_map = stream
    simulator = Simulator(metas, layer_map)
    trace, spans = simulator.trace(), simulator.spans()
    for index, step in enumerate(trace.steps):
        held = dict(open_at(spans, index))
        # A tensor that lands in several layers may close one before it is held by the next: then
        # the spans of this step add up to more than was ever held together.
        if len(layer_map.contributions[step.name]) <= 1:
            assert sum(held.values()) == step.buffered_bytes
            opened = [name for name in held if not layer_map.layers[name].deferred]
            assert len(opened) == step.open_layers


@given(streams(), st.data())
def test_one_sweep_finds_what_each_moment_holds(stream, data):
    metas, layer_map = stream
    spans = Simulator(metas, layer_map).spans()
    indices = sorted(data.draw(st.sets(st.integers(0, len(metas) - 1))))
    assert list(open_at_each(spans, indices)) == [open_at(spans, index) for index in indices]


@given(streams(), st.integers(1, 64))
def test_chunks_are_cut_like_vllms(stream, chunk_bytes):
    """Against vLLM's loop, written out: append, add, break when it is more than the buffer."""
    metas, _ = stream
    packed = packed_storages(metas, chunk_bytes)
    chunks, names, size = [], [], 0
    for meta in metas:
        names.append(meta.name)
        size += meta.nbytes
        if size > chunk_bytes:
            chunks.append((names, size))
            names, size = [], 0
    chunks += [(names, size)] if names else []
    for names, size in chunks:
        assert {packed[name].nbytes for name in names} == {size}
        assert len({packed[name].key for name in names}) == 1
    assert len({storage.key for storage in packed.values()}) == len(chunks)


@given(streams(shared=False), st.integers(1, 64))
def test_layered_chunks_never_pin_more_than_one_chunk(stream, chunk_bytes):
    metas, layer_map = stream
    orders = {"size": resolve_order("size")}
    (_, ordered) = scenarios(
        metas, layer_map, orders, transport=Transport(chunk_bytes=chunk_bytes, packing="layers")
    )
    largest = max(storage.nbytes for storage in ordered.storages.values())
    assert ordered.peak_pinned_bytes <= largest


@given(streams(shared=False), st.integers(1, 64), st.integers(1, 4))
def test_receive_buffers_only_add_to_what_is_pinned(stream, chunk_bytes, buffers):
    metas, layer_map = stream
    (given_, _) = scenarios(
        metas, layer_map, {"hf": resolve_order("hf")}, transport=Transport(chunk_bytes, buffers)
    )
    assert given_.peak_receive_bytes >= given_.peak_pinned_bytes
    sizes = {storage.key: storage.nbytes for storage in given_.storages.values()}
    assert given_.peak_receive_bytes <= sum(sizes.values())
    # With everything closed at once, what remains is the buffers themselves and the next one.
    in_flight = list(sizes.values())
    windows = [sum(in_flight[i : i + buffers + 1]) for i in range(len(in_flight))]
    assert given_.peak_receive_bytes >= max(windows)


@given(streams(), st.integers(1, 64), st.integers(1, 4))
def test_receive_buffers_are_those_of_vllms_loop(stream, chunk_bytes, buffers):
    """Against a ledger that is told of every buffer: the next is held before the oldest goes."""
    metas, layer_map = stream
    (given_, _) = scenarios(
        metas, layer_map, {"hf": resolve_order("hf")}, transport=Transport(chunk_bytes, buffers)
    )
    ledger = BufferLedger()
    run = LedgerReplay(layer_map, given_.storages, ledger)
    slots: list[str] = []
    peak = 0
    for meta in metas:
        chunk = given_.storages[meta.name]
        if not slots or slots[-1] != f"buffer {chunk.key}":
            slots.append(f"buffer {chunk.key}")
            ledger.hold(slots[-1], 0, [chunk], deferred=True)
            peak = max(peak, ledger.pinned_bytes)
            for oldest in slots[:-buffers]:
                ledger.release(oldest)
        run.feed(meta)
    assert given_.peak_receive_bytes == max(peak, run.ledger.trace().peak_pinned_bytes)


def test_a_norm_keeps_its_chunk_and_an_open_layer_keeps_two():
    """Two layers of two tensors, 8 bytes each, in chunks of three tensors: the second layer's first
    tensor travels with the first layer and keeps that chunk alive until its last has come."""
    metas, layer_map = two_layers("a.0 a.1 b.0 b.1")
    (given_, ordered) = scenarios(
        metas, layer_map, {"hf": resolve_order("hf")}, transport=Transport(chunk_bytes=23)
    )
    assert [step.buffered_bytes for step in given_.trace.steps] == [8, 16, 8, 16]
    assert [step.pinned_bytes for step in given_.trace.steps] == [24, 24, 24, 32]
    assert given_.peak_receive_bytes == 32
    # Cut between the layers instead: no chunk outlives its own.
    assert [step.pinned_bytes for step in ordered.trace.steps] == [16, 16, 16, 16]
    assert ordered.peak_receive_bytes == 32


def test_a_scenario_says_what_is_held_when():
    metas, layer_map = two_layers("a.0 b.0 b.1 a.1")
    (given_, ordered) = scenarios(metas, layer_map, {"hf": resolve_order("hf")})
    assert (given_.max_open_layers, given_.peak_buffered_bytes) == (2, 24)
    peak = given_.most_buffered
    assert (peak.index, peak.name, peak.held) == (2, "b.1", (("b", 16), ("a", 8)))
    assert given_.most_open.index == 1
    assert ordered.max_open_layers == 1
    assert [meta.name for meta in ordered.metas] == ["a.0", "a.1", "b.0", "b.1"]
    assert given_.causes == (Cause.OUT_OF_ORDER,)
    assert ordered.causes == ()


@given(streams(), st.integers(1, 64))
def test_orders_of_saved_files_are_permutations(stream, shard_bytes):
    metas, _ = stream
    ordered = as_saved(shard_bytes)(metas)
    assert sorted(ordered, key=lambda m: m.name) == sorted(metas, key=lambda m: m.name)


def test_files_are_cut_as_save_pretrained_cuts_them():
    sizes = {"d": 4, "c": 4, "big": 40, "b": 4, "a": 4}
    metas = [ParamMeta(name, "uint8", (size,)) for name, size in sizes.items()]
    assert [m.name for m in as_saved(8)(metas)] == ["big", "c", "d", "a", "b"]


def test_files_are_read_one_after_the_other():
    metas, _ = two_layers("a.0 a.1 b.0 b.1")
    files = {"safetensors": ["b.1", "a.0", "ignored", "a.1"], "fastsafetensors": ["a.1", "b.0"]}
    ordered = resolve_order("safetensors", files=files)(metas)
    assert [m.name for m in ordered] == ["b.1", "a.0", "a.1", "b.0"]
    ordered = resolve_order("fastsafetensors", files=files)(metas)
    assert [m.name for m in ordered] == ["a.1", "b.0", "a.0", "b.1"]
    assert {"safetensors", "fastsafetensors"} < set(default_orders(files))
    same = {kind: ["a.0"] for kind in files}
    assert "fastsafetensors" not in default_orders(same)
    assert "safetensors:5GB" in default_orders(None)
    with pytest.raises(ConfigError):
        resolve_order("safetensors")


def test_an_order_from_a_file(tmp_path):
    metas, _ = two_layers("a.0 a.1 b.0 b.1")
    names = tmp_path / "names.txt"
    names.write_text("# by hand\nb.1\nb.0\n\na.1\na.0\n")
    assert [m.name for m in resolve_order(f"file:{names}")(metas)] == ["b.1", "b.0", "a.1", "a.0"]


@pytest.mark.parametrize(
    ("names", "named"),
    [
        ("a.0 a.1 b.0", "'b.1'"),
        ("a.0", "'a.1'.* 2 more"),
        ("a.0 a.1 b.0 b.1 b.0", "'b.0'"),
        ("a.0 a.1 b.0 b.1 b.2", r"'b.2'.*'b.\d'"),  # and the nearest name
    ],
)
def test_an_order_that_does_not_fit_is_refused(names, named):
    metas, _ = two_layers("a.0 a.1 b.0 b.1")
    with pytest.raises(ConfigError, match=f"names.txt: .*{named}"):
        by_name(names.split(), "names.txt")(metas)


@pytest.mark.parametrize("text", ["sorted", "file:", "run:", "random:x", "safetensors:many"])
def test_unknown_orders_are_refused(text):
    with pytest.raises(ConfigError):
        resolve_order(text)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(ConfigError):
        resolve_order(f"file:{tmp_path / 'none.txt'}")
    with pytest.raises(ConfigError):
        resolve_order(f"run:{tmp_path}")


def test_a_tensor_larger_than_a_buffer_shares_its_chunk():
    metas = [ParamMeta("small", "uint8", (10,)), ParamMeta("large", "uint8", (3 * GIB,))]
    packed = packed_storages(metas, GIB)
    assert packed["small"] == packed["large"] == Storage("chunk 0", 3 * GIB + 10)


def two_layers(names: str) -> tuple[list[ParamMeta], LayerMap]:
    """Layers `a` and `b`, of two bf16 tensors with four elements each."""
    metas = [ParamMeta(name, "bfloat16", (4,)) for name in names.split()]
    contributions = {m.name: (Contribution(m.name[0], "weight", 4, 8, True),) for m in metas}
    layers = {name: ParentLayer(name, "Linear", 8, 8) for name in "ab"}
    return metas, LayerMap(layers, contributions)
