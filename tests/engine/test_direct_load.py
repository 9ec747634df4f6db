"""Layers that are loaded where they stay: tensors are written straight to the live storage."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.engines import NEW, OLD, generate, logprob_gap, model_of
from support.fingerprint import difference, fingerprint
from support.models import random_model, save_model
from support.remote import session as remote_session
from support.syncs import session

from qerl_sync import HFSource, InProcessTransport, PoisonedError, SyncConfig, SyncSession
from qerl_sync.errors import CoverageError, LayerMapError, LoadError
from qerl_sync.worker.compat import engine as compat

pytestmark = pytest.mark.vllm

KINDS = ["dense", "bias", "tied", "padded", "moe"]
ORDERS = [("hf", "warn"), ("random:0", "warn"), ("random:1", "reorder"), ("random:2", "spill")]
GATE = "model.layers.1.mlp.gate_proj.weight"


def addresses(model):
    return {name: p.data_ptr() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_order_equals_a_fresh_engine_and_buffers_nothing(subject, kind):
    one = subject(kind, "plain")
    before = addresses(one.model)
    version = NEW
    for order, policy in ORDERS:
        assert one.wrong_weights(version), "both versions are the same: the test could not fail"
        source = HFSource(one.trainers[version])
        with session(one, source, source_order=order, policy=policy) as sync:
            report = sync.push()
        assert one.wrong_weights(version) == []
        assert one.generates_as(version)
        assert logprob_gap(one.engine, one.trainers[version]) <= 1e-5
        assert report.prediction_exact, report.first_difference
        layerwise = [
            n for n, one in sync.layer_map.layers.items() if sync.plan.loading.get(n) == "layerwise"
        ]
        # Experts are packed on a CPU, whatever its linear kernels do.
        assert all(kind == "moe" and name.endswith("experts") for name in layerwise), layerwise
        assert kind == "moe" or report.peak_buffered_bytes_measured == 0
        version = OLD if version == NEW else NEW
    assert addresses(one.model) == before, "kernels and CUDA graphs know where parameters lie"


def test_what_kernels_pack_or_quantise_stays_layerwise(subject):
    for kernels in ("stock", "fp8"):
        one = subject("dense", kernels)
        with session(one, HFSource(one.trainers[NEW])) as sync:
            sync.push()
        packed = {n for n, loading in sync.plan.loading.items() if loading == "layerwise"}
        assert "model.layers.0.mlp.gate_up_proj" in packed
        assert "model.norm" not in packed, "no kernel packs a norm"
        assert one.wrong_weights(NEW) == []


def test_layerwise_can_be_asked_for(subject):
    one = subject("dense", "plain")
    with session(one, HFSource(one.trainers[NEW]), load="layerwise") as sync:
        report = sync.push()
    assert set(sync.plan.loading.values()) == {"layerwise"}
    assert report.peak_buffered_bytes_measured > 0
    assert report.prediction_exact, report.first_difference
    assert one.wrong_weights(NEW) == []


class Cut(HFSource):
    """Dies before the tensor with that place in the stream."""

    at = 0

    def materialize(self, names):
        for place, item in enumerate(super().materialize(names)):
            if place == self.at:
                raise ConnectionResetError("peer gone")
            yield item


@pytest.mark.parametrize("on_failure", ["poison", "rollback"])
def test_a_layer_has_changed_from_its_first_element(subject, on_failure):
    """After one tensor of the embeddings; nothing is put aside that could be dropped."""
    one = subject("dense", "plain")
    source = Cut(one.trainers[NEW])
    source.at = 1
    with session(one, source, on_failure=on_failure, policy="warn") as sync:
        with pytest.raises(LoadError):
            sync.push()
        if on_failure == "rollback":
            assert one.wrong_weights(OLD) == []
            assert one.generates_as(OLD)
        else:
            assert one.wrong_weights(OLD)
            with pytest.raises(PoisonedError):
                generate(one.engine)
        source.at = None
        sync.push()
    assert one.wrong_weights(NEW) == []
    assert one.generates_as(NEW)


class Gaps(HFSource):
    """Yields tensors with gaps in memory: they are loaded by vLLM's loaders, not by a route."""

    def materialize(self, names):
        for name, tensor in super().materialize(names):
            yield name, torch.stack([tensor, tensor], -1)[..., 0]


@pytest.mark.parametrize("kernels", ["stock", "plain"])
def test_tensors_with_gaps_are_loaded_too(subject, kernels):
    one = subject("moe", kernels)
    assert one.wrong_weights(NEW)
    report = session(one, Gaps(one.trainers[NEW]), policy="reorder").push()
    assert one.wrong_weights(NEW) == []
    assert report.max_open_layers_measured == 1


def test_a_load_that_was_left_out_is_found(subject, monkeypatch):
    one = subject("dense", "plain")
    with session(one, Gaps(one.trainers[NEW])) as sync:
        sync._agree()
        load = one.model.load_weights
        monkeypatch.setitem(
            vars(one.model),
            "load_weights",
            lambda weights: load((n, t) for n, t in weights if n != GATE),
        )
        with pytest.raises(CoverageError, match="gate_up_proj"):
            sync.push()
        with pytest.raises(PoisonedError):
            generate(one.engine)
        monkeypatch.undo()
        sync.push()
    assert one.wrong_weights(NEW) == []


def test_a_loader_that_gives_a_layer_other_memory_is_found(subject):
    """A CUDA graph would go on reading the old one."""
    one = subject("dense", "plain")
    weight = one.model.model.norm.weight
    data, loader = weight.data, getattr(weight, "weight_loader", None)

    def rebind(parameter, loaded):
        parameter.data = loaded.clone()

    with session(one, Gaps(one.trainers[NEW])) as sync:
        sync._agree()
        weight.weight_loader = rebind
        try:
            with pytest.raises(LoadError, match=r"model\.norm"):
                sync.push()
        finally:
            weight.data = data
            del weight.weight_loader
            if loader is not None:
                weight.weight_loader = loader
        with pytest.raises(PoisonedError):
            generate(one.engine)
        sync.push()
    assert one.wrong_weights(NEW) == []
    assert one.generates_as(NEW)


def test_a_layer_that_something_has_changed_since_is_refused(subject):
    one = subject("dense", "plain")
    weight = one.model.model.norm.weight
    with session(one, HFSource(one.trainers[NEW])) as sync:
        sync._agree()
        data = weight.data
        weight.data = torch.stack([data, data])[:, 0]
        try:
            with pytest.raises(LayerMapError, match=r"model\.norm"):
                sync.push()
        finally:
            weight.data = data
    assert one.wrong_weights(OLD) == []
    assert one.generates_as(OLD), "nothing was touched"


@pytest.mark.parametrize("carrier", ["shm", "tcp"])
def test_over_a_connection_the_receiver_needs_its_slots_only(remote, carrier):
    engine = remote("in process", "dense", "plain")
    options = {"transport": carrier, "chunk_bytes": "16KiB", "source_order": "random:0"}
    for version in (NEW, OLD, NEW):
        source = HFSource(engine.trainers[version])
        with remote_session(engine, source, policy="warn", **options) as sync:
            report = sync.push()
        assert engine.wrong_weights(version) == []
        assert report.prediction_exact, report.first_difference
        assert report.peak_buffered_bytes_measured == 0
        assert set(sync.plan.loading.values()) == {"direct"}
        # Two chunks in flight of one tensor at most: no second copy of a layer.
        largest = max(chunk.nbytes for chunk in sync.plan.chunks)
        predicted = report.workers[0]["peak_extra_bytes_predicted"]
        assert predicted <= 2 * largest + (1 << 20)
    assert engine.generates_as(NEW)


# ------------------------------------------------------------- loaders that write past the reload


@pytest.fixture(scope="module")
def gpt_oss(engine_pool, tmp_path_factory):
    """Its sinks and experts are written by a bare `copy_`. Experts are packed on a CPU."""
    import transformers

    config = transformers.GptOssConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=None,
    )
    trainers = {seed: random_model(config, seed) for seed in (OLD, NEW)}
    engines = {
        seed: engine_pool.start(save_model(trainer, tmp_path_factory.mktemp(f"gpt_oss-{seed}")))
        for seed, trainer in trainers.items()
    }
    return SimpleNamespace(
        engine=engines[OLD],
        trainers=trainers,
        weights={seed: fingerprint(model_of(engine)) for seed, engine in engines.items()},
        answers={seed: generate(engine) for seed, engine in engines.items()},
    )


def wrong(one, version):
    return difference(fingerprint(model_of(one.engine)), one.weights[version])


def gpt_oss_session(one, version, **options):
    source = HFSource(one.trainers[version])
    return SyncSession(source, InProcessTransport(one.engine), SyncConfig.of(**options))


def test_what_loaders_write_past_the_reload_arrives(gpt_oss):
    parts = compat.in_process_parts(gpt_oss.engine)
    source = HFSource(gpt_oss.trainers[NEW])
    with compat.loading_context(parts.vllm_config):
        compat.begin_reload(parts.model)
        parts.model.load_weights(source.materialize([m.name for m in source.metadata()]))
        compat.finish_reload(parts.model, parts.vllm_config)
    stale = wrong(gpt_oss, NEW)
    assert any("sinks" in name for name in stale), "vLLM has learned it: is `in place` needed?"
    assert any("experts" in name for name in stale)
    version = OLD
    for order, policy in ORDERS:
        assert wrong(gpt_oss, version)
        kept = {n: p.clone() for n, p in gpt_oss.trainers[version].named_parameters()}
        options = {"source_order": order, "policy": policy, "verify": "checksum"}
        with gpt_oss_session(gpt_oss, version, **options) as sync:
            report = sync.push()
        assert wrong(gpt_oss, version) == []
        assert generate(gpt_oss.engine) == gpt_oss.answers[version]
        assert report.prediction_exact, report.first_difference
        assert all(p.equal(kept[n]) for n, p in gpt_oss.trainers[version].named_parameters())
        version = OLD if version == NEW else NEW
    assert {sync.plan.loading[f"model.layers.0.{name}"] for name in ("attn",)} == {"direct"}


@pytest.mark.parametrize("on_failure", ["poison", "rollback"])
def test_a_layer_that_is_processed_in_place_fails_like_others(gpt_oss, on_failure, monkeypatch):
    with gpt_oss_session(gpt_oss, OLD) as sync:
        sync.push()
    experts = next(
        m for n, m in model_of(gpt_oss.engine).named_modules() if "w13_weight" in m._parameters
    )

    def fail(layer):
        raise RuntimeError("no kernel for this shape")

    with gpt_oss_session(gpt_oss, NEW, on_failure=on_failure) as sync:
        sync._agree()
        with monkeypatch.context() as patched:
            patched.setattr(experts.quant_method, "process_weights_after_loading", fail)
            with pytest.raises(LoadError, match="no kernel"):
                sync.push()
        if on_failure == "rollback":
            assert wrong(gpt_oss, OLD) == []
            assert generate(gpt_oss.engine) == gpt_oss.answers[OLD]
        else:
            with pytest.raises(PoisonedError):
                generate(gpt_oss.engine)
        sync.push()
    assert wrong(gpt_oss, NEW) == []
    assert generate(gpt_oss.engine) == gpt_oss.answers[NEW]


def test_layerwise_refuses_what_would_be_lost(gpt_oss):
    before = fingerprint(model_of(gpt_oss.engine))
    with gpt_oss_session(gpt_oss, NEW, load="layerwise") as sync, pytest.raises(LayerMapError):
        sync.push()
    assert fingerprint(model_of(gpt_oss.engine)) == before
