"""After a sync the worker is what a fresh engine, loaded from the same checkpoint, would be."""

from __future__ import annotations

import logging

import pytest
from support.engines import NEW, OLD, EnginePool, logprob_gap, start_engine
from support.features import require_packed
from support.models import CONFIGS, make_model, save_model
from support.syncs import push, session

from qerl_sync import HFSource, InProcessTransport, SyncConfig, SyncSession
from qerl_sync.worker.compat import engine as compat

pytestmark = pytest.mark.vllm

RELOAD = "vllm.model_executor.model_loader.reload"
KERNELS = ["stock", "plain"]
ORDERS = ["hf", "alphabetical", "size", "optimizer", "random:0", "interleaved:3"]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_equals_a_fresh_engine(subject, kind, kernels):
    one = subject(kind, kernels)
    assert not one.wrong_weights(OLD)
    assert one.wrong_weights(NEW), "both versions are the same: the test could not fail"

    report = push(one, NEW)

    assert one.wrong_weights(NEW) == []
    assert one.generates_as(NEW)
    assert logprob_gap(one.engine, one.trainers[NEW]) <= 1e-5
    assert report.prediction_exact, report.first_difference
    assert report.max_open_layers_measured <= 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("policy", ["warn", "reorder"])
@pytest.mark.parametrize("kind", ["dense", "bias", "moe", "moe_renamed", "padded"])
def test_every_order_is_right_and_costs_what_was_predicted(subject, kind, policy, order):
    one = subject(kind)
    report = push(one, NEW, policy=policy, source_order=order)
    assert one.wrong_weights(NEW) == []
    assert report.prediction_exact, report.first_difference
    if policy == "reorder":
        assert report.max_open_layers_measured == 1


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_chunks_do_not_change_the_result(subject, kind):
    one = subject(kind)
    report = push(one, NEW, chunk_bytes="40KiB")
    assert report.num_chunks > 3
    assert one.wrong_weights(NEW) == []
    assert report.prediction_exact, report.first_difference


@pytest.mark.parametrize("ahead", ["whole call", "pairs"])
def test_a_loader_that_takes_tensors_before_it_loads_them(subject, monkeypatch, ahead):
    """One that collects a whole call gets a call for each tensor, so that what vLLM holds is what
    was predicted. One that needs two tensors together gets them together."""
    one = subject("dense")
    load_weights = one.model.load_weights

    def collecting(weights):
        return load_weights(list(weights))

    def pairing(weights):
        def swapped():
            gate = None
            for name, tensor in weights:
                if name.endswith("gate_proj.weight"):
                    gate = name, tensor
                    continue
                yield name, tensor
                if name.endswith("up_proj.weight"):
                    yield gate
                    gate = None

        return load_weights(swapped())

    monkeypatch.setattr(one.model, "load_weights", collecting if ahead != "pairs" else pairing)
    own = session(one, HFSource(one.trainers[NEW]), chunk_bytes="40KiB")
    report = own.push()
    assert one.wrong_weights(NEW) == []
    if ahead == "whole call":
        assert own.layer_map.one_tensor_calls
        assert report.prediction_exact, report.first_difference
    else:
        assert not own.layer_map.one_tensor_calls


@pytest.fixture
def warnings_of_reloads():
    """What vLLM's reload has logged: its loggers hand nothing on to pytest's."""
    logger, heard = logging.getLogger(f"{RELOAD}.layerwise"), []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.WARNING)
    yield heard
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.mark.parametrize("kind", ["dense", "tied"])
def test_a_right_sync_warns_of_nothing(subject, kind, warnings_of_reloads):
    """vLLM has "RotaryEmbedding: Failed to load weights" to say after each, and of tied heads."""
    one = subject(kind)
    push(one, NEW)
    assert one.wrong_weights(NEW) == []
    assert warnings_of_reloads == []


def test_a_layer_that_should_have_got_something_is_warned_of(subject, warnings_of_reloads):
    parts = compat.in_process_parts(subject("dense").engine)
    with compat.loading_context(parts.vllm_config):
        compat.begin_reload(parts.model)
        compat.finish_reload(parts.model, parts.vllm_config, ["model.norm"])
        assert warnings_of_reloads
        assert {line.partition(":")[0] for line in warnings_of_reloads} == {"RMSNorm"}
        compat.begin_reload(parts.model)
        compat.finish_reload(parts.model, parts.vllm_config)
    assert any(line.startswith("RotaryEmbedding") for line in warnings_of_reloads)


def _answer(engine, prompt):
    """Tokens, their log-probabilities, and how much of the prompt came out of the prefix cache."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
    params.logprobs = 0
    (output,) = engine.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    one = output.outputs[0]
    logprobs = [next(iter(step.values())).logprob for step in one.logprobs]
    return (list(one.token_ids), logprobs), output.num_cached_tokens


def test_a_prompt_that_was_cached_under_the_old_weights(engine_pool: EnginePool, subject, tmp_path):
    """vLLM keeps whole blocks, of 128 tokens on CPU: the engines of other tests see none."""
    subject("dense")  # some engine of the pool comes first
    prompt = [i * 7 % 199 for i in range(150)]
    trainer = make_model("dense", NEW)
    engine = start_engine(save_model(make_model("dense", OLD), tmp_path), max_model_len=256)
    engine_pool._kept.append(engine)
    old, _ = _answer(engine, prompt)
    assert _answer(engine, prompt) == (old, 128), "nothing was cached: the test could not fail"

    SyncSession(HFSource(trainer), InProcessTransport(engine), SyncConfig()).push()

    new, cached = _answer(engine, prompt)
    assert cached == 0
    engine.reset_prefix_cache()
    assert _answer(engine, prompt) == (new, 0)
    assert new != old


def test_fused_experts_as_they_are_in_memory(subject):
    """transformers keeps experts fused; vLLM's Qwen3MoE takes them so, and per expert."""
    one = subject("moe")
    fused = HFSource(one.trainers[NEW], convert=False)
    assert any(len(meta.shape) == 3 for meta in fused.metadata())
    report = session(one, fused).push()
    assert one.wrong_weights(NEW) == []
    assert report.prediction_exact, report.first_difference


def test_an_engine_that_quantises_what_it_loads(subject):
    """fp32 weights arrive, vLLM quantises each layer when it is whole."""
    one = subject("dense", "fp8")
    for version in (NEW, OLD, NEW):
        report = push(one, version, source_order="random:0")
        assert one.wrong_weights(version) == []
        assert report.prediction_exact, report.first_difference
    assert one.generates_as(NEW)


def test_many_syncs_in_one_session(subject):
    """The second sync meets what the first one left behind in vLLM's reload state."""
    one = subject("dense")
    trainer = HFSource(one.trainers[NEW])
    sync = session(one, trainer)
    versions = []
    for step in (1, 2, 3):
        report = sync.push(step=step)
        versions.append(report.version)
        assert report.step == step
        assert one.wrong_weights(NEW) == []
        assert report.prediction_exact


def test_a_session_knows_that_another_one_has_synced_its_engine(subject):
    """Both are in the engine's process: nobody is connected, so that nobody can be refused."""
    one = subject("dense")
    first, second = (session(one, HFSource(one.trainers[version])) for version in (NEW, OLD))
    first.push()
    assert first.current
    second.push()
    assert (first.current, second.current) == (False, True)
    first.push()
    assert (first.current, second.current) == (True, False)
    assert one.wrong_weights(NEW) == []


def test_the_trainers_weights_are_only_read(subject):
    one = subject("moe_renamed")
    before = {name: p.clone() for name, p in one.trainers[NEW].state_dict().items()}
    push(one, NEW)
    after = one.trainers[NEW].state_dict()
    assert all(after[name].equal(value) for name, value in before.items())


@pytest.mark.parametrize(("kind", "layer"), [("tied", "lm_head"), ("moe", "mlp.experts")])
def test_stock_vllm_leaves_tied_heads_and_experts_old(subject, kind, layer):
    """What `worker/load/refresh.py` cures. If this fails, vLLM has learned it: drop the cure."""
    one = subject(kind)
    require_packed(one.model, layer)
    parts = compat.in_process_parts(one.engine)
    source = HFSource(one.trainers[NEW])
    names = [meta.name for meta in source.metadata()]
    with compat.loading_context(parts.vllm_config):
        compat.begin_reload(parts.model)
        parts.model.load_weights(source.materialize(names))
        compat.finish_reload(parts.model, parts.vllm_config)
    assert one.wrong_weights(NEW)
    push(one, NEW)
    assert one.wrong_weights(NEW) == []
