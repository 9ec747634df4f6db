"""Break it: whatever goes wrong in a sync, no worker generates from half of it, and the next full
sync makes it exactly right."""

from __future__ import annotations

import gc
import itertools
import weakref
from dataclasses import replace
from operator import attrgetter

import pytest
import torch
from support.engines import NEW, OLD, generate
from support.features import require_packed
from support.syncs import push, session
from support.worker_extension import unfinished

from qerl_sync import HFSource, PoisonedError, Source, SyncError
from qerl_sync.errors import ConfigError, CoverageError, LoadError, PlanError
from qerl_sync.options import SyncOptions
from qerl_sync.worker.compat import engine as compat
from qerl_sync.worker.load import refresh
from qerl_sync.worker.load.monitor import SyncMonitor
from qerl_sync.worker.load.receiver import Receiver

pytestmark = pytest.mark.vllm

GATE = "model.layers.1.mlp.gate_proj.weight"


class BadStream(Source):
    """Promises what `inner` has, and delivers `spoil(its stream)`."""

    def __init__(self, inner, spoil):
        self._inner, self._spoil = inner, spoil

    def metadata(self):
        return self._inner.metadata()

    def storages(self):
        return self._inner.storages()

    def materialize(self, names):
        return self._spoil(self._inner.materialize(names))


def drop(stream):
    return ((n, t) for n, t in stream if n != GATE)


def stop_early(stream):
    for n, t in stream:
        if n == GATE:
            return
        yield n, t


def double(stream):
    for n, t in stream:
        yield n, t
        if n == GATE:
            yield n, t


def rename(stream):
    return ((n.replace("gate", "gait"), t) for n, t in stream)


def reshape(stream):
    return ((n, t.T if n == GATE else t) for n, t in stream)


def to_bfloat16(stream):
    return ((n, t.bfloat16() if n == GATE else t) for n, t in stream)


def spoil_with(value):
    def spoil(stream):
        for n, t in stream:
            if n == GATE:
                t = t.clone()
                t[3, 3] = value
            yield n, t

    return spoil


def append(stream):
    yield from stream
    yield "one.more", torch.zeros(1)


STREAMS = {
    "dropped": (
        drop,
        r"arrived where the plan has 'model\.layers\.1\.mlp\.gate_proj\.weight' "
        r"\(of model\.layers\.1\.mlp\.gate_up_proj\)",
    ),
    "ends early": (
        stop_early,
        r"ended where 'model\.layers\.1\.mlp\.gate_proj\.weight' \(of .*gate_up_proj\) was next",
    ),
    "doubled": (double, r"gate_proj\.weight' arrived where the plan has"),
    "renamed": (rename, r"'model\.layers\.0\.mlp\.gait_proj\.weight' arrived where"),
    "reshaped": (reshape, r"arrived as float32 \[64, 128\], the plan says float32 \[128, 64\]"),
    "other dtype": (to_bfloat16, r"arrived as bfloat16"),
    "NaN": (
        spoil_with(float("nan")),
        r"\(of .*gate_up_proj\) has 1 NaN or infinite values of 8,192",
    ),
    "infinity": (spoil_with(float("-inf")), r"1 NaN or infinite values"),
    "surplus": (append, r"'one\.more' arrived after the last tensor"),
}


@pytest.mark.parametrize("case", STREAMS)
def test_a_bad_stream_poisons_and_the_next_sync_heals(subject, case):
    spoil, words = STREAMS[case]
    one = subject("dense")
    sync = session(one, BadStream(HFSource(one.trainers[NEW]), spoil))
    with pytest.raises(CoverageError, match=words):
        sync.push()
    assert sync.version == 0
    assert_poisoned(one)
    assert_heals(one)


class Wide(Source):
    """`inner` in float64, which reaches further than the engine's dtype; one value does, too."""

    checks_finite = True

    def __init__(self, inner):
        self._inner = inner

    def check_finite(self, names=None, *, alone=True):
        pass

    def metadata(self):
        return [replace(meta, dtype="float64") for meta in self._inner.metadata()]

    def materialize(self, names):
        for name, tensor in self._inner.materialize(names):
            tensor = tensor.double()
            if name == GATE:
                tensor[3, 3] = -1e39
            yield name, tensor


def test_values_that_the_engines_dtype_has_not_poison(subject):
    """vLLM would load them as infinite."""
    one = subject("dense")
    with pytest.raises(
        CoverageError,
        match=r"gate_proj\.weight' \(of .*gate_up_proj\) has values up to 1e\+39; the engine "
        r"computes in float32, .*rollout\.engine\.dtype",
    ):
        session(one, Wide(HFSource(one.trainers[NEW]))).push()
    assert_poisoned(one)
    assert_heals(one)


def test_and_are_sent_to_who_does_not_want_to_know(subject):
    one = subject("dense")
    session(one, Wide(HFSource(one.trainers[NEW])), check_finite=False).push()
    assert len(one.wrong_weights(NEW)) == 1
    push(one, OLD)
    assert one.generates_as(OLD)


@pytest.mark.parametrize("kernels", ["stock", "plain"])
@pytest.mark.parametrize("kind", ["dense", "tied", "moe", "bias"])
@pytest.mark.parametrize("at", ["first", "open layer", "boundary", "last"])
def test_an_exception_in_the_middle_poisons_and_the_next_sync_heals(subject, kind, kernels, at):
    one = subject(kind, kernels)
    sync = session(one, BadStream(HFSource(one.trainers[NEW]), _raise_at(at, one)))
    with pytest.raises(LoadError, match="ConnectionResetError: peer gone") as raised:
        sync.push()
    assert isinstance(raised.value.__cause__, ConnectionResetError)
    assert_poisoned(one)
    assert_heals(one)


def _raise_at(at, one):
    names = [meta.name for meta in HFSource(one.trainers[NEW]).metadata()]
    index = {
        "first": 0,
        "open layer": next(i for i, n in enumerate(names) if "k_proj" in n),
        "boundary": next(i for i, n in enumerate(names) if "o_proj" in n),
        "last": len(names) - 1,
    }[at]

    def spoil(stream):
        for i, item in enumerate(stream):
            if i == index:
                raise ConnectionResetError("peer gone")
            yield item

    return spoil


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_loader_that_fails_poisons_and_the_next_sync_heals(subject, kind, monkeypatch):
    """In vLLM's processing of a whole layer, after its tensors were loaded."""
    one = subject(kind)
    broken = one.model.model.layers[1]
    layer = broken.mlp.experts.routed_experts if kind == "moe" else broken.mlp.gate_up_proj

    def fail(module):
        raise RuntimeError("no kernel for this shape")

    monkeypatch.setattr(layer.quant_method, "process_weights_after_loading", fail)
    with pytest.raises(LoadError, match="no kernel for this shape"):
        push(one, NEW)
    monkeypatch.undo()
    assert_poisoned(one)
    assert_heals(one)


@pytest.mark.parametrize("policy", ["warn", "spill"])
def test_a_loader_that_leaves_tensors_poisons(subject, monkeypatch, policy):
    """The error blames the loader, and not the source for what it yields next."""
    one = subject("dense", "plain")
    options = {"policy": policy, "source_order": "random:0", "load": "layerwise"}
    sync = session(one, HFSource(one.trainers[NEW]), chunk_bytes="80KiB", verify="off", **options)
    sync._agree()
    load_weights = one.model.load_weights

    def leaving(weights):
        return load_weights(itertools.islice(weights, 1))

    monkeypatch.setitem(vars(one.model), "load_weights", leaving)
    with pytest.raises(LoadError, match=r"loader ended before it had taken 'model\."):
        sync.push()
    monkeypatch.undo()
    assert_poisoned(one)
    assert_heals(one)


@pytest.mark.parametrize("load", ["auto", "layerwise"])
def test_a_failed_sync_keeps_no_tensor(subject, load):
    """A source may have made copies, of which an open layer has some."""
    one, copies = subject("moe"), []

    def copied(stream):
        for at, (name, tensor) in enumerate(stream):
            copy = tensor.clone()
            copies.append(weakref.ref(copy))
            yield name, copy
            del copy
            if at == 9:
                raise ConnectionResetError("peer gone")

    sync = session(one, BadStream(HFSource(one.trainers[NEW]), copied), load=load)
    with pytest.raises(LoadError):
        sync.push()
    gc.collect()
    assert [copy() for copy in copies if copy() is not None] == []
    assert len(copies) == 10
    assert_poisoned(one)


def test_what_is_not_finished_is_not_committed(subject):
    one = subject("dense")
    receiver = Receiver(compat.in_process_parts(one.engine))
    sync = session(one, HFSource(one.trainers[NEW]))
    plan, layer_map = sync._agree()
    for ending in ("open", "aborted"):
        receiver.start(plan, layer_map, SyncOptions())
        receiver.receive(plan.chunks[0], sync._source.materialize(plan.chunks[0].names))
        if ending == "aborted":
            receiver.abort("a sync failed: for a test")
        with pytest.raises(SyncError, match="finish one first"):
            receiver.commit(receiver.version + 1)
        assert receiver.poisoned
        receiver.abort("a sync failed: for a test")
    assert_poisoned(one)
    assert_heals(one)


def test_a_reload_that_somebody_has_left_open_does_not_count(subject):
    """vLLM's own goes on with half-open layers, and takes what they hold for a part of it."""
    one = subject("dense")
    parts = compat.in_process_parts(one.engine)
    name = "model.layers.0.self_attn.q_proj.weight"
    sync = session(one, HFSource(one.trainers[NEW]))
    sync._agree()  # the dry run would mend it
    with compat.loading_context(parts.vllm_config):
        compat.begin_reload(one.model)
        one.model.load_weights([(name, torch.zeros_like(one.trainers[OLD].get_parameter(name)))])
    sync.push()
    assert one.wrong_weights(NEW) == []
    assert one.generates_as(NEW)


def test_a_layer_that_was_not_filled_as_planned_is_named(subject, monkeypatch):
    one = subject("dense")
    processed = SyncMonitor.processed

    def twice(monitor, layer):
        processed(monitor, layer)
        if layer is one.model.model.layers[1].mlp.gate_up_proj:
            processed(monitor, layer)

    monkeypatch.setattr(SyncMonitor, "processed", twice)
    with pytest.raises(CoverageError, match=r"layers\.1\.mlp\.gate_up_proj .*processed 2 times"):
        push(one, NEW)
    assert_poisoned(one)
    push(one, NEW, verify="off")
    assert one.wrong_weights(NEW) == []


def test_a_tied_head_computes_with_the_packed_copy_of_the_embeddings(subject, monkeypatch):
    """vLLM packs both. What it would take to pack the head once more is not counted either; in an
    open reload nothing is tied: it must be known before."""
    one = subject("tied")
    require_packed(one.model, "lm_head")
    push(one, NEW)
    assert one.model.lm_head.cpu_linear is one.model.model.embed_tokens.cpu_linear
    assert one.wrong_weights(NEW) == []
    receiver = Receiver(compat.in_process_parts(one.engine))
    sync = session(one, HFSource(one.trainers[OLD]))
    receiver.start(*sync._agree(), SyncOptions())
    try:
        assert receiver.costs.finishing_bytes == 0
        tied = {"lm_head": ("model.embed_tokens", "weight")}
        monkeypatch.setattr(one.model.model.embed_tokens, "quant_method", None)
        needed = refresh.packed_anew_bytes(one.model, tied, receiver.costs.working_bytes)
        assert needed == one.trainers[OLD].lm_head.weight.nbytes
    finally:
        monkeypatch.undo()
        receiver.abort("a sync failed: for a test")
    assert one.generates_as(NEW), "it had not begun"
    assert_heals(one)


@pytest.mark.parametrize("poisoned", [False, True])
def test_a_sync_that_fails_before_its_first_tensor_changes_nothing(subject, poisoned):
    one = subject("dense")
    push(one, OLD)
    receiver = Receiver(compat.in_process_parts(one.engine))
    if poisoned:
        receiver.poison("an earlier sync failed")
    sync = session(one, HFSource(one.trainers[NEW]))
    plan, layer_map = sync._agree()
    receiver.start(plan, layer_map, SyncOptions())
    receiver.abort("a sync failed: no trainer")
    receiver.abort("a sync failed: once more")
    assert one.wrong_weights(OLD) == []
    if poisoned:
        with pytest.raises(PoisonedError, match=r"an earlier sync failed|once more"):
            generate(one.engine)
    else:
        assert one.generates_as(OLD)
    receiver.start(plan, layer_map, SyncOptions())
    receiver.receive(plan.chunks[0], sync._source.materialize(plan.chunks[0].names))
    receiver.abort("a sync failed: no trainer")
    assert_poisoned(one)
    assert_heals(one)


def test_versions_only_move_forwards(subject):
    one = subject("dense")
    first, second = push(one, NEW), push(one, OLD)  # sessions of their own
    assert second.version == first.version + 1
    receiver = Receiver(compat.in_process_parts(one.engine))
    sync = session(one, HFSource(one.trainers[NEW]))
    plan, layer_map = sync._agree()
    receiver.start(plan, layer_map, SyncOptions())
    for chunk in plan.chunks:
        receiver.receive(chunk, sync._source.materialize(chunk.names))
    receiver.finish()
    with pytest.raises(SyncError, match=f"version 1 was to follow {second.version}"):
        receiver.commit(1)
    assert_poisoned(one)
    assert sync.push().version == second.version + 1
    assert one.generates_as(NEW)


def test_logits_are_refused_too(subject):
    """On GPUs the forward may be a graph that is replayed, which no hook of the model sees."""
    one = subject("dense")
    receiver = Receiver(compat.in_process_parts(one.engine))
    receiver.poison("for a test")
    with pytest.raises(PoisonedError, match="for a test"):
        one.model.compute_logits(None)
    push(one, NEW)
    assert one.generates_as(NEW)
    assert "compute_logits" not in vars(one.model)


def test_another_tools_wrapper_of_the_logits_survives_a_sync(subject, monkeypatch):
    one = subject("dense")
    compute_logits, calls = one.model.compute_logits, []

    def traced(*args, **options):
        calls.append(args)
        return compute_logits(*args, **options)

    monkeypatch.setitem(vars(one.model), "compute_logits", traced)
    push(one, NEW)
    assert vars(one.model)["compute_logits"] is traced
    assert one.generates_as(NEW)
    assert calls


def test_ctrl_c_in_the_middle_stays_ctrl_c_and_poisons(subject):
    one = subject("dense")

    def interrupt(stream):
        yield next(stream)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session(one, BadStream(HFSource(one.trainers[NEW]), interrupt)).push()
    assert_poisoned(one)
    assert_heals(one)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_of_a_whole_model_are_refused_before_the_first_byte(subject, value):
    """The source can look without gathering: the worker keeps its weights and goes on."""
    one = subject("dense")
    parameter = one.trainers[NEW].get_parameter(GATE)
    good = parameter[0, 0].item()
    try:
        with torch.no_grad():
            parameter[0, 0] = value
        with pytest.raises(CoverageError, match=r"1 NaN or infinite.*loss.*check_finite: false"):
            push(one, NEW)
    finally:
        with torch.no_grad():
            parameter[0, 0] = good
    assert one.wrong_weights(OLD) == []
    assert one.generates_as(OLD)


def test_a_doubled_name_is_refused_before_the_first_byte(subject):
    one = subject("dense")

    class Doubled(BadStream):
        def metadata(self):
            return [*self._inner.metadata(), self._inner.metadata()[0]]

    with pytest.raises((PlanError, CoverageError), match="embed_tokens"):
        session(one, Doubled(HFSource(one.trainers[NEW]), iter)).push()
    assert one.wrong_weights(OLD) == []
    assert one.generates_as(OLD)


@pytest.mark.parametrize(
    ("part", "option", "value"),
    [
        ("parallel_config", "enable_eplb", True),
        ("offload_config.uva", "cpu_offload_gb", 1.0),
        ("offload_config.prefetch", "offload_group_size", 4),
    ],
)
def test_an_engine_that_moves_its_weights_is_refused(subject, monkeypatch, part, option, value):
    """vLLM does none of this on a CPU: here is what its configuration says, not what it does."""
    one = subject("dense")
    config = compat.in_process_parts(one.engine).vllm_config
    monkeypatch.setattr(attrgetter(part)(config), option, value)
    with pytest.raises(ConfigError) as raised:
        session(one, HFSource(one.trainers[NEW])).push()
    assert raised.value.place == option
    assert one.wrong_weights(OLD) == []


def test_policy_error_refuses_before_the_first_byte(subject):
    one = subject("dense")
    with pytest.raises(PlanError, match=r"parent layers at once(.|\n)*nothing was sent"):
        push(one, NEW, policy="error", source_order="random:0")
    assert one.wrong_weights(OLD) == []
    assert one.generates_as(OLD)
    push(one, NEW, policy="error", source_order="hf")
    assert one.wrong_weights(NEW) == []


def test_a_sync_within_a_sync_is_refused(subject):
    one = subject("dense")
    source = HFSource(one.trainers[NEW])

    class Nested(BadStream):
        def materialize(self, names):
            push(one, NEW)
            return self._inner.materialize(names)

    with pytest.raises(SyncError, match="already open"):
        session(one, Nested(source, iter)).push()
    assert_heals(one)


def test_the_model_refuses_to_run_during_a_sync(subject):
    one = subject("dense")

    class Curious(BadStream):
        def materialize(self, names):
            with pytest.raises(PoisonedError, match="a sync is in progress"):
                one.model(None)
            return self._inner.materialize(names)

    session(one, Curious(HFSource(one.trainers[NEW]), iter)).push()
    assert one.wrong_weights(NEW) == []


def test_a_vllm_without_layerwise_reload_is_named(monkeypatch):
    from vllm.model_executor.model_loader.reload import layerwise

    monkeypatch.delattr(layerwise, "get_numel_loaded")
    with pytest.raises(compat.CompatError) as refused:
        Receiver(compat.EngineParts(torch.nn.Linear(1, 1), None, torch.device("cpu")))
    assert refused.value.missing == (f"{layerwise.__name__}.get_numel_loaded",)


def assert_poisoned(one):
    """Whole modules, no wrappers, and a model that says why it does not run."""
    assert unfinished(one.model) == []
    with pytest.raises(PoisonedError, match="does not generate: a sync failed"):
        generate(one.engine)


def assert_heals(one):
    report = push(one, NEW)
    assert one.wrong_weights(NEW) == []
    assert one.generates_as(NEW)
    assert report.prediction_exact
    assert generate(one.engine)
