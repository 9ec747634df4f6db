"""The policy `spill`: a stream in an order that nobody can change, staged on the worker."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.engines import NEW, OLD, generate
from support.errors import raises
from support.ports import free_port
from support.streams import storages, streams
from support.streams_by_hand import QKV, HandMadeTransport, interleave, stacked_model
from support.syncs import push, session

from qerl_sync import ConfigError, HFSource, PoisonedError, RemoteTransport, SyncConfig, SyncSession
from qerl_sync.errors import CoverageError, LoadError, PlanError
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.orders import parse_order
from qerl_sync.plan.policies import by_parent_layer, group_labels
from qerl_sync.plan.simulator import replay
from qerl_sync.plan.spill import load_order, peak_staged_bytes
from qerl_sync.plan.sync_plan import SyncPlan, build_plan
from qerl_sync.sources.stream import StreamSource
from qerl_sync.worker.load.spill import SpillBuffer

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------ the plan


@given(streams())
def test_groups_are_loaded_whole_and_in_source_order(stream):
    metas, layer_map = stream
    ordered = load_order(metas, layer_map)
    assert Counter(ordered) == Counter(metas)
    label = dict(zip(metas, group_labels(metas, layer_map), strict=True))
    seen = [label[meta] for meta in ordered]
    changes = 1 + sum(a != b for a, b in pairwise(seen))
    assert changes == len(set(seen)), "a group was left and taken up again"
    place = {meta: i for i, meta in enumerate(metas)}
    for group in set(seen):
        places = [place[meta] for meta in ordered if label[meta] == group]
        assert places == sorted(places)


@given(streams(shared=False))
def test_at_most_one_layer_is_open_whatever_the_order(stream):
    metas, layer_map = stream
    assert replay(load_order(metas, layer_map), layer_map).max_open_layers <= 1


@given(streams())
def test_a_stream_by_parent_layer_is_loaded_as_it_comes_and_stages_no_second_group(stream):
    metas, layer_map = stream
    grouped = by_parent_layer(metas, layer_map)
    assert load_order(grouped, layer_map) == grouped
    largest = Counter[str | int]()
    for meta, label in zip(grouped, group_labels(grouped, layer_map), strict=True):
        largest[label] += meta.nbytes
    assert peak_staged_bytes(grouped, layer_map) < max(largest.values(), default=0) + 1


@given(streams(), st.integers(1, 64), st.data())
def test_staged_bytes_and_loads_are_those_of_a_naive_worker(stream, chunk_bytes, data):
    metas, layer_map = stream
    source = data.draw(storages(metas))
    plan = build_plan(metas, layer_map, "spill", chunk_bytes=chunk_bytes, storages=source)
    assert plan.metas == tuple(metas)
    assert sum((chunk.names for chunk in plan.chunks), ()) == plan.order
    assert all(c.nbytes <= chunk_bytes or len(c.names) == 1 for c in plan.chunks)
    loaded, after, copied = _naive_worker(plan, layer_map)
    assert [meta.name for meta in plan.load_metas] == loaded
    assert plan.staged_bytes == after
    assert plan.peak_staged_bytes == max(after)
    assert peak_staged_bytes(metas, layer_map) >= plan.peak_staged_bytes
    own = {name: s for name, s in source.items() if name not in copied}
    assert plan.predicted == replay(plan.load_metas, layer_map, own)


@given(streams(), st.integers(1, 64), st.booleans())
def test_plan_survives_json_and_its_digest_has_the_load_order(stream, chunk_bytes, in_files):
    metas, layer_map = stream
    directory = "/tmp" if in_files else None
    plan = build_plan(metas, layer_map, "spill", chunk_bytes=chunk_bytes, spill_directory=directory)
    again = SyncPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.digest == plan.digest
    warned = build_plan(metas, layer_map, "warn", chunk_bytes=chunk_bytes)
    assert warned.digest != plan.digest
    assert (warned.spill, warned.peak_staged_bytes) == (None, 0)
    assert warned.load_metas == warned.metas


@given(streams(), st.integers(1, 64))
def test_the_budget_is_refused_exactly_below_what_is_staged(stream, chunk_bytes):
    metas, layer_map = stream

    def plan(budget_bytes):
        return build_plan(
            metas,
            layer_map,
            "spill",
            chunk_bytes=chunk_bytes,
            spill_budget_bytes=budget_bytes,
        )

    needed = plan(None).peak_staged_bytes
    assert plan(needed).peak_staged_bytes == needed
    if needed:
        with pytest.raises(PlanError, match=rf"spill_budget_bytes is {needed - 1:,}.*{needed}"):
            plan(needed - 1)


def test_both_budgets_name_the_bytes_the_tensor_and_the_next_step():
    metas, layer_map = _two_layers_interleaved()
    words = (
        r"64 bytes \(64 B\) wait in the worker's host memory when 'b\.k' has arrived, and "
        r"sync\.spill_budget_bytes is 63 \(63 B\); raise it to at least 64, .*`policy: reorder`"
    )
    with pytest.raises(PlanError, match=words):
        build_plan(metas, layer_map, "spill", chunk_bytes=1, spill_budget_bytes=63)
    with pytest.raises(PlanError, match=r"budget_bytes is 47.*48 bytes.*'a\.v'.*at least 48"):
        build_plan(metas, layer_map, "spill", chunk_bytes=1, budget_bytes=47)
    assert build_plan(metas, layer_map, "spill", budget_bytes=48).budget_bytes == 48


def test_what_is_whole_within_a_chunk_is_not_staged():
    metas, layer_map = _two_layers_interleaved()
    assert build_plan(metas, layer_map, "spill").staged_bytes == [0]
    halves = build_plan(metas, layer_map, "spill", chunk_bytes=4 * 16)
    assert halves.staged_bytes == [4 * 16, 0]


@pytest.mark.parametrize(
    "change",
    [
        {"load_order": [0, 0, 2, 3, 4, 5]},
        {"load_order": [1, 3, 5, 0, 2, 4]},
        {"num_loaded": [6, 0, 0, 0, 0, 0]},
        {"num_loaded": [0, 0, 0, 0, 7, -1]},
        {"num_loaded": [0, 0, 0, 0, 3, 2]},
        {"num_loaded": [6]},
    ],
)
def test_a_load_order_that_cannot_be_is_refused(change):
    metas, layer_map = _two_layers_interleaved()
    plan = build_plan(metas, layer_map, "spill", chunk_bytes=1)
    data = plan.to_json()
    data["spill"] |= change
    with pytest.raises(PlanError, match="was changed after it was made"):
        SyncPlan.from_json(data)
    with pytest.raises(PlanError, match="load order is not one of its stream"):
        type(plan.spill).from_json(data["spill"]).require_possible(plan.base_chunk_lengths)


def _naive_worker(plan, layer_map):
    """(what is loaded, bytes staged after each chunk, what was ever staged), step by step."""
    label = dict(zip(plan.order, group_labels(plan.metas, layer_map), strict=True))
    nbytes = {meta.name: meta.nbytes for meta in plan.metas}
    held, loaded, after, copied = [], [], [], set()
    for chunk in plan.chunks:
        for name in chunk.names:
            held.append(name)
            group = [other for other in held if label[other] == label[name]]
            if len(group) == sum(one == label[name] for one in label.values()):
                loaded += group
                held = [other for other in held if other not in group]
        after.append(sum(nbytes[name] for name in held))
        copied.update(held)
    return loaded, after, copied


def _two_layers_interleaved():
    metas = interleave(QKV)
    return metas, HandMadeTransport().layer_map(metas)


# ---------------------------------------------------------------------------------- the worker


def stage(plan, tensors):
    """Run a stream through a stager, in memory that is overwritten after each chunk."""
    stager, got, staged = SpillBuffer(plan, plan.spill, CPU), {}, []

    def load(stream):
        got.update((name, tensor.clone()) for name, tensor in stream)

    for chunk in plan.chunks:
        in_session = {name: tensors[name].clone() for name in chunk.names}
        stager.load(((name, in_session[name]) for name in chunk.names), load)
        staged.append(stager.staged_bytes)
        for tensor in in_session.values():
            tensor.zero_()
    return stager, got, staged


@pytest.mark.parametrize("in_files", [False, True])
def test_the_stager_gives_back_what_it_got_and_takes_what_was_planned(in_files, tmp_path):
    metas, layer_map = stacked_model(3, 64)
    metas = random.Random(0).sample(metas, len(metas))
    plan = build_plan(
        metas,
        layer_map,
        "spill",
        chunk_bytes=20_000,
        spill_directory=str(tmp_path) if in_files else None,
    )
    tensors = {m.name: torch.rand(m.shape).to(torch.bfloat16) for m in metas}
    stager, got, staged = stage(plan, tensors)
    assert list(got) == [meta.name for meta in plan.load_metas]
    assert all(got[name].equal(tensor) for name, tensor in tensors.items())
    assert staged == plan.staged_bytes
    assert stager.peak_bytes == plan.peak_staged_bytes > 0
    assert staged[-1] == 0
    assert not _mapped_under(tmp_path)


def test_files_have_no_names_and_go_with_the_stager(tmp_path):
    metas, layer_map = _two_layers_interleaved()
    plan = build_plan(metas, layer_map, "spill", chunk_bytes=1, spill_directory=str(tmp_path))
    stager = SpillBuffer(plan, plan.spill, CPU)
    for meta in metas[:3]:
        stager.load([(meta.name, torch.ones(meta.shape))], pytest.fail)
    assert os.listdir(tmp_path) == []
    assert _mapped_under(tmp_path) == 3
    stager.close()
    stager.close()
    assert not _mapped_under(tmp_path)


def test_the_budget_holds_at_run_time_too():
    metas, layer_map = _two_layers_interleaved()
    plan = build_plan(metas, layer_map, "spill", chunk_bytes=1)
    small = type(plan.spill)(plan.spill.load_order, plan.spill.num_loaded, budget_bytes=16)
    stager = SpillBuffer(plan, small, CPU)
    stager.load([(metas[0].name, torch.ones(4))], list)
    with pytest.raises(PlanError, match=r"32 bytes would be staged with 'b\.q'.* is 16"):
        stager.load([(metas[1].name, torch.ones(4))], list)


def test_other_peoples_directories_are_refused(tmp_path):
    metas, layer_map = _two_layers_interleaved()

    def refusal(directory):
        plan = build_plan(metas, layer_map, "spill", chunk_bytes=1, spill_directory=directory)
        with pytest.raises(ConfigError, match=r"sync\.spill_directory") as caught:
            SpillBuffer(plan, plan.spill, CPU)
        return str(caught.value)

    (tmp_path / "file").write_text("")
    assert "is not there" in refusal(str(tmp_path / "missing"))
    assert "is not there" in refusal("/tmp/\0")
    assert "directory that belongs" in refusal(str(tmp_path / "file"))
    assert "absolute path" in refusal(".")
    if os.geteuid() == 0:
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", 12345, 12345)
        assert "belongs to the worker's user" in refusal(str(tmp_path / "theirs"))


def test_more_than_the_worker_has_is_refused_before_the_first_byte():
    metas = [ParamMeta(name, "int8", (1 << 50,)) for name in ("a.q", "b.q", "a.k", "b.k")]
    plan = build_plan(metas, HandMadeTransport().layer_map(metas), "spill")
    with pytest.raises(PlanError, match=r"host memory has .* free; set sync\.spill_directory"):
        SpillBuffer(plan, plan.spill, CPU)


def _mapped_under(directory):
    """How many pieces of files of that directory this process has mapped."""
    with open("/proc/self/maps") as maps:
        return sum(str(directory) in line for line in maps)


# ---------------------------------------------------------------------------------- the source


def stream_source(metas, tensors=None, **options):
    """A StreamSource, and a list that grows by one with each stream that it opens."""
    opened = []
    tensors = tensors or {
        meta.name: torch.full(meta.shape, float(i)) for i, meta in enumerate(metas)
    }

    def open_stream():
        opened.append(len(opened))
        yield from tensors.items()

    return StreamSource(metas, open_stream, **options), opened


def make(metas, policy, **options):
    source, opened = stream_source(metas)
    transport = HandMadeTransport()
    return SyncSession(source, transport, SyncConfig.of(policy=policy, **options)), opened


def test_one_stream_serves_all_chunks_of_a_sync_and_the_next_sync_opens_another():
    metas = interleave(QKV)
    source, opened = stream_source(metas)
    for sync in (1, 2):
        assert source.metadata() == metas
        got = [
            (name, tensor[0].item())
            for meta in metas
            for name, tensor in source.materialize([meta.name])
        ]
        assert got == [(meta.name, float(i)) for i, meta in enumerate(metas)]
        assert len(opened) == sync


def opener(metas, closed):
    """A function that opens a stream of these tensors, which notes in `closed` that it ended."""

    def open_stream():
        try:
            for meta in metas:
                yield meta.name, torch.zeros(meta.shape)
        finally:
            closed.append(True)

    return open_stream


@pytest.mark.parametrize("fail_at", [None, 1], ids=["ignored at its end", "failed"])
def test_a_stream_is_closed_with_its_sync(fail_at):
    closed = []
    metas = [*interleave(QKV), ParamMeta("b.last", "float32", (4,))]
    source, transport = StreamSource(metas, opener(metas, closed)), HandMadeTransport()
    session = SyncSession(source, transport, SyncConfig.of(policy="warn", ignore_names=["*.last"]))
    transport.fail_at = fail_at
    with nullcontext() if fail_at is None else pytest.raises(ConnectionError):
        session.push()
    assert closed == [True]


def test_a_stream_that_was_left_in_the_middle_is_closed_and_opened_again():
    closed = []
    metas = interleave(QKV)
    source = StreamSource(lambda: metas, opener(metas, closed))
    source.metadata()
    next(source.materialize([metas[0].name]))
    assert not closed
    source.metadata()
    assert closed
    assert [n for n, _ in source.materialize([m.name for m in metas])] == [m.name for m in metas]


def test_names_that_nobody_asks_for_are_passed_over():
    metas = interleave(QKV)
    source, _ = stream_source(metas)
    source.metadata()
    assert [n for n, _ in source.materialize(["b.q", "b.k"])] == ["b.q", "b.k"]
    with pytest.raises(CoverageError, match=r"'a\.q' is not among what the stream has left"):
        list(source.materialize(["a.q"]))


@pytest.mark.parametrize(
    ("spoil", "tensor"),
    [
        (lambda items: items[1:], "b.q"),
        (lambda items: items[:-1], "b.v"),
        (lambda items: [*items, ("one.more", torch.zeros(1))], "one.more"),
        (lambda items: [("a.q", torch.zeros(5)), *items[1:]], "a.q"),
    ],
)
def test_a_stream_that_is_not_its_metadata_is_refused(spoil, tensor):
    metas = interleave(QKV)
    items = spoil([(meta.name, torch.zeros(meta.shape)) for meta in metas])
    source = StreamSource(metas, lambda: items)
    source.metadata()
    with raises(CoverageError, tensor=tensor):
        list(source.materialize([meta.name for meta in metas]))


def test_a_rank_with_a_part_streams_that_part():
    metas = interleave(QKV)
    held = {"a.q", "b.v"}
    tensors = {meta.name: torch.zeros(meta.shape) for meta in metas if meta.name in held}
    source, _ = stream_source(metas, tensors, held_names=held)
    assert source.metadata() == metas
    assert source.held_names() == held
    assert [n for n, _ in source.materialize(["a.q", "b.v"])] == ["a.q", "b.v"]


def test_reorder_is_refused_for_a_stream_and_offers_spill():
    session, opened = make(interleave(QKV), "reorder")
    for _ in range(2):
        with pytest.raises(
            PlanError, match=r"'a\.k' where the source yields 'b\.q'.*policy: spill"
        ):
            session.push()
    with pytest.raises(PlanError, match="spill"):
        make(interleave(QKV), "warn", source_order="alphabetical")[0].push()
    assert not opened


def test_reorder_of_a_stream_that_is_in_order_has_nothing_to_do():
    session, opened = make([meta for layer in QKV for meta in layer], "reorder")
    assert [session.push().version, session.push().version] == [1, 2]
    assert len(opened) == 2


def test_the_warning_offers_spill_with_its_host_memory(caplog):
    with caplog.at_level("WARNING", logger="qerl_sync"):
        make(interleave(QKV), "warn")[0].push()
    assert (
        "`sync: {policy: spill}` does the same on the worker, with up to 0.0001 MB" in caplog.text
    )


@pytest.mark.parametrize("policy", ["reorder", "warn"])
def test_reports_of_other_policies_stage_nothing(policy):
    report = make([meta for layer in QKV for meta in layer], policy)[0].push()
    assert (report.peak_staged_bytes_predicted, report.peak_staged_bytes_measured) == (0, 0)


# --------------------------------------------------------------------------------- real engines

ORDERS = ["random:0", "striped", "interleaved:4"]
ENGINES = [("dense", "stock"), ("moe", "stock"), ("bias", "plain"), ("tied", "stock")]
ENGINES += [("moe_renamed", "stock"), ("padded", "stock"), ("dense", "fp8")]


def streamed(one, version, order):
    """The weights of that version from a stream in that order; the memory is a new copy each."""
    trainer = HFSource(one.trainers[version])
    metas = trainer.metadata()
    metas = metas[::2] + metas[1::2] if order == "striped" else parse_order(order)(metas)

    def open_stream():
        for meta in metas:
            for name, tensor in trainer.materialize([meta.name]):
                yield name, tensor.clone()

    return StreamSource(metas, open_stream)


@pytest.mark.vllm
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("kind", "kernels"), ENGINES)
def test_every_order_is_right_and_one_layer_is_open(subject, kind, kernels, order):
    one = subject(kind, kernels)
    # Layers that are written where they stay would hold nothing.
    options = {"policy": "spill", "chunk_bytes": "40KiB", "load": "layerwise"}
    sync = session(one, streamed(one, NEW, order), **options)
    report = sync.push()
    assert one.wrong_weights(NEW) == []
    assert report.prediction_exact, report.first_difference
    assert report.max_open_layers_measured == 1
    assert report.peak_staged_bytes_measured == report.peak_staged_bytes_predicted > 0
    assert report.peak_buffered_bytes_measured == _largest_layer(sync)
    assert sync.plan.metas == tuple(sync._source.metadata())
    assert one.generates_as(NEW)


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_model_by_reference_spills_too(subject, kind):
    """Views of the trainer's memory, of which the plan knows the storages; chunks by default."""
    one = subject(kind)
    for chunk_bytes in (None, "20KiB"):
        report = push(one, NEW, policy="spill", source_order="random:3", chunk_bytes=chunk_bytes)
        assert one.wrong_weights(NEW) == []
        assert report.prediction_exact, report.first_difference
        assert report.peak_staged_bytes_measured == report.peak_staged_bytes_predicted
        assert bool(report.peak_staged_bytes_measured) == (chunk_bytes is not None)
        push(one, OLD)


@pytest.mark.vllm
def test_files_hold_what_waits_and_nothing_is_left(subject, tmp_path):
    one = subject("moe")
    options = {"policy": "spill", "chunk_bytes": "40KiB", "spill_directory": str(tmp_path)}
    seen = []

    class Watched(StreamSource):
        def materialize(self, names):
            seen.append((_mapped_under(tmp_path), os.listdir(tmp_path)))
            return super().materialize(names)

    inner = streamed(one, NEW, "random:0")
    report = session(one, Watched(inner._metadata, inner._open_stream), **options).push()
    assert one.wrong_weights(NEW) == []
    assert report.prediction_exact
    assert report.peak_staged_bytes_measured > 0
    assert max(mapped for mapped, _ in seen) > 0
    assert all(names == [] for _, names in seen)
    assert not _mapped_under(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.vllm
def test_a_budget_or_directory_that_will_not_do_is_refused_before_the_first_byte(subject, tmp_path):
    one = subject("dense")

    def attempt(**options):
        sync = session(
            one, streamed(one, NEW, "random:0"), policy="spill", chunk_bytes="40KiB", **options
        )
        return sync.push()

    needed = attempt().peak_staged_bytes_predicted
    push(one, OLD)
    with pytest.raises(PlanError, match=rf"raise it to at least {needed}"):
        attempt(spill_budget_bytes=needed - 1)
    with pytest.raises(ConfigError, match="is not there for this worker"):
        attempt(spill_directory=str(tmp_path / "missing"))
    assert one.wrong_weights(OLD) == []
    assert one.generates_as(OLD)
    assert attempt(spill_budget_bytes=needed).peak_staged_bytes_measured == needed
    assert one.wrong_weights(NEW) == []


@pytest.mark.vllm
@pytest.mark.parametrize("in_files", [False, True])
def test_a_failure_in_the_middle_poisons_and_the_next_sync_heals(subject, in_files, tmp_path):
    one = subject("dense")
    inner = streamed(one, NEW, "striped")
    failing = [True]

    def open_stream():
        for i, item in enumerate(inner._open_stream()):
            if failing and i == len(inner._metadata) * 2 // 3:
                failing.clear()
                raise ConnectionResetError("peer gone")
            yield item

    sync = session(
        one,
        StreamSource(inner._metadata, open_stream),
        policy="spill",
        chunk_bytes="40KiB",
        spill_directory=str(tmp_path) if in_files else None,
    )
    with pytest.raises(LoadError, match="peer gone"):
        sync.push()
    assert not _mapped_under(tmp_path)
    with pytest.raises(PoisonedError, match="peer gone"):
        generate(one.engine)
    report = sync.push()
    assert one.wrong_weights(NEW) == []
    assert one.generates_as(NEW)
    assert report.prediction_exact


# --------------------------------------------------------------------------- over connections

REMOTE = {"policy": "spill", "chunk_bytes": "40KiB"}


@pytest.mark.vllm
@pytest.mark.parametrize("carrier", ["shm", "tcp"])
@pytest.mark.parametrize("in_files", [False, True])
def test_memory_that_chunks_arrive_in_is_used_again(remote, carrier, in_files, tmp_path):
    """Staged tensors are copies: slots hold the next chunks, deferred layers keep nothing."""
    from support.remote import session as connect

    engine = remote("in process", "moe", "stock")
    options = {**REMOTE, "transport": carrier}
    if in_files:
        options["spill_directory"] = str(tmp_path)
    with connect(engine, streamed(engine, NEW, "random:0"), **options) as sync:
        reports = [sync.push(), sync.push()]
    assert engine.wrong_weights(NEW) == []
    assert engine.generates_as(NEW)
    for report in reports:
        assert report.prediction_exact, report.first_difference
        assert report.max_open_layers_measured == 1
        assert report.peak_staged_bytes_measured == report.peak_staged_bytes_predicted > 0
        assert report.workers[0]["peak_staged_bytes"] == report.peak_staged_bytes_measured
    assert not _mapped_under(tmp_path)


@pytest.mark.vllm
def test_what_the_worker_refuses_leaves_it_as_it_is(remote, tmp_path):
    from support.remote import session as connect

    engine = remote("in process", "dense", "stock")
    options = {**REMOTE, "spill_directory": str(tmp_path / "missing")}
    source = streamed(engine, NEW, "random:0")
    with connect(engine, source, **options) as sync:
        with pytest.raises(ConfigError, match="is not there for this worker"):
            sync.push()
        assert engine.wrong_weights(OLD) == []
        assert engine.generates_as(OLD)
        (tmp_path / "missing").mkdir()
        sync.push()
    assert engine.wrong_weights(NEW) == []


@pytest.mark.vllm
def test_producers_with_a_part_each_are_merged_and_staged(remote, monkeypatch):
    """Two trainer ranks hold every other tensor, and stream what they hold."""
    from support.remote import TIMEOUT_SECONDS

    engine = remote("in process", "moe", "stock")
    monkeypatch.setenv("QERL_SYNC_TOKEN", "known to both sides")
    endpoints = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    whole = streamed(engine, NEW, "random:5")
    metas, tensors = whole.metadata(), list(whole._open_stream())

    def push_part(rank):
        part = tensors[rank::2]
        source = StreamSource(metas, lambda: part, held_names=[name for name, _ in part])
        transport = RemoteTransport(
            engine.client() if rank == 0 else None,
            endpoints=endpoints,
            rank=rank,
            num_workers=1,
            timeout_seconds=TIMEOUT_SECONDS,
        )
        with SyncSession(source, transport, SyncConfig.of(**REMOTE)) as sync:
            return sync.push()

    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(push_part, range(2)))
    assert engine.wrong_weights(NEW) == []
    assert engine.generates_as(NEW)
    for report in reports:
        assert report.prediction_exact, report.first_difference
        assert report.max_open_layers_measured == 1
        assert report.peak_staged_bytes_measured == report.peak_staged_bytes_predicted > 0


def _largest_layer(sync):
    """Buffered bytes of the largest parent layer."""
    held = Counter()
    for contributions in sync.layer_map.contributions.values():
        for c in contributions:
            held[c.parent_layer] += c.held_bytes
    return max(held.values())
