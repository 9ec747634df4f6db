"""A LoRA adapter travels in memory into a live engine, and is served to requests that name none."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.adapters import make_policy, step
from support.engines import PROMPTS, generate, logprob_gap
from support.models import make_model, save_model

from qerl_sync import (
    AdapterSource,
    ConfigError,
    HFSource,
    InProcessTransport,
    SyncConfig,
    SyncError,
    SyncSession,
    noise_of,
)
from qerl_sync.errors import CoverageError, LoadError
from qerl_sync.plan.adapter import Adapter
from qerl_sync.sources.hf import probe_of
from qerl_sync.verify.probe_prompt import largest_gap
from qerl_sync.worker.compat import lora as vllm_lora
from qerl_sync.worker.compat.engine import in_process_parts

pytestmark = pytest.mark.vllm

EXACT = 1e-5


@pytest.fixture(scope="module")
def engines(engine_pool, tmp_path_factory):
    """`served` begins on other base weights than the policies' own, which `files` has."""
    directory = tmp_path_factory.mktemp("lora")
    options = {"enable_lora": True, "max_lora_rank": 8}
    paths = {v: save_model(make_model("dense", v), directory / str(v)) for v in (0, 1)}
    return SimpleNamespace(
        served=engine_pool.start(paths[1], **options),
        files=engine_pool.start(paths[0], **options),
        directory=directory,
    )


def session(engines, policy, source=AdapterSource, **options):
    one = source(policy) if isinstance(source, type) else source
    return SyncSession(one, InProcessTransport(engines.served), SyncConfig.of(**options))


def from_files(engines, policy, number):
    """The answers of a fresh engine that loads what `save_pretrained` writes."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    path = engines.directory / f"adapter-{number}"
    policy.save_pretrained(path)
    sampling = SamplingParams(temperature=0, max_tokens=12, detokenize=False, logprobs=0)
    outputs = engines.files.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        sampling,
        lora_request=LoRARequest(f"files {number}", number, str(path)),
        use_tqdm=False,
    )
    answers = [output.outputs[0] for output in outputs]
    return [
        (list(a.token_ids), [next(iter(at.values())).logprob for at in a.logprobs]) for a in answers
    ]


@pytest.mark.parametrize("verify", ["coverage", "checksum"])
def test_only_the_adapter_travels_and_is_exact(engines, verify):
    policy = make_policy(seed=1)
    sync = session(engines, policy, verify=verify)
    adapter = AdapterSource(policy).adapter()
    for number in (1, 2, 3):
        step(policy, number + 10)
        assert logprob_gap(engines.served, policy) > 0.1, "the engine has another adapter"
        report = sync.push(number)
        assert logprob_gap(engines.served, policy) < EXACT
        assert generate(engines.served) == from_files(engines, policy, number)
        assert report.lora["mode"] == "adapter"
        assert bool(report.lora["base"]) == (number == 1)
        if number > 1:
            assert report.sent_bytes == adapter.nbytes
            assert report.num_tensors == len(adapter.metas)
    assert sync.push().version == report.version + 1


VARIANTS = {
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "patterns": {"rank_pattern": {"q_proj": 8, "v_proj": 2}, "alpha_pattern": {"o_proj": 5}},
    "few modules": {"target_modules": ["q_proj", "v_proj", "down_proj"], "layers_to_transform": 1},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trained norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "q_norm"]},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_kind_of_adapter_is_exact(engines, name):
    policy = make_policy(**VARIANTS[name])
    sync = session(engines, policy)
    for number in (1, 2):
        step(policy, number)
        assert logprob_gap(engines.served, policy) > 1e-3
        report = sync.push(number)
        assert logprob_gap(engines.served, policy) < EXACT
    assert bool(report.lora["base"]) == ("trained" in name)
    assert report.unsent_tensors > 0


def test_noisy_norms_travel_beside_the_adapter(engines):
    """As QeRL has it: the first interval is the adapter alone, then come the norms with it."""
    policy = make_policy()
    before = {n: p.clone() for n, p in policy.named_parameters()}
    noise = {"preset": "section-4.1", "intervals": 3, "steps": 6}
    sync = session(engines, policy, noise=noise, verify="checksum")
    adapter = AdapterSource(policy).adapter().nbytes
    norms = sum(p.nbytes for n, p in before.items() if n.endswith("layernorm.weight"))
    sync.push(0)
    assert sync.push(1).sent_bytes == adapter
    assert logprob_gap(engines.served, policy) < EXACT
    for number in (2, 5):
        report = sync.push(number)
        assert report.sent_bytes == adapter + norms
        tokens = probe_of(policy).token_ids
        asked = sync._transport.prompt_logprobs(tokens)
        assert largest_gap(probe_of(policy).logprobs(tokens), asked) > 1e-5
        assert largest_gap(probe_of(policy).noisy(tokens, noise_of(report)), asked) < EXACT
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters())
    assert sync.push(5, clean=True).sent_bytes == adapter + norms
    assert logprob_gap(engines.served, policy) < EXACT
    assert sync.push(5, clean=True).sent_bytes == adapter


def test_an_engine_may_keep_its_own_base(engines):
    """As one must whose checkpoint is quantised: of the trainer's base nothing travels."""
    own = make_policy(seed=1)
    session(engines, own).push()
    step(own, 2)
    other = make_policy(base=make_model("dense", 1), seed=2)  # the same adapter over another base
    adapter = AdapterSource(other).adapter().nbytes
    sync = session(engines, other, lora_base="engine")
    for number in (1, 2):
        report = sync.push(number)
        assert (report.sent_bytes, report.lora["base"]) == (adapter, "")
        assert logprob_gap(engines.served, own) < EXACT
        assert logprob_gap(engines.served, other) > 0.1
    with pytest.raises(ConfigError):
        session(engines, make_model("dense", 1), HFSource, lora_base="engine").push()


@pytest.mark.parametrize("made_by", ["pissa", "pissa_niter_2", "olora"])
def test_an_adapter_that_has_changed_its_base_needs_it_sent(engines, made_by):
    own = make_model("dense", 0)
    session(engines, own, HFSource).push()
    policy = get_peft_model(own, LoraConfig(r=4, init_lora_weights=made_by))
    with pytest.raises(ConfigError, match=made_by):
        session(engines, policy, lora_base="engine").push()
    session(engines, policy).push()
    assert logprob_gap(engines.served, policy) < EXACT


def test_what_was_trained_beside_it_and_is_frozen_travels_once_more(engines):
    own = make_policy(target_modules=["q_proj"], modules_to_save=["norm"])
    session(engines, own).push()
    sync = session(engines, own, lora_base="engine")
    sync.push(1)
    step(own, 2)
    for name, parameter in own.named_parameters():
        if "modules_to_save" in name:
            parameter.requires_grad_(False)
    assert logprob_gap(engines.served, own) > 1e-3
    sync.push(2)
    assert logprob_gap(engines.served, own) < EXACT
    assert sync.push(3).num_tensors == len(AdapterSource(own).adapter().metas)


def test_the_active_one_of_two_adapters_is_served(engines):
    policy = make_policy()
    policy.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj"]))
    policy.set_adapter("second")
    step(policy, 2)
    sync = session(engines, policy)
    for name in ("second", "default"):
        policy.set_adapter(name)
        assert logprob_gap(engines.served, policy) > 1e-3
        sync.push()
        assert logprob_gap(engines.served, policy) < EXACT


class Spoiled(AdapterSource):
    """Yields one of the adapter's tensors otherwise than planned, while `kind` is set."""

    kind = ""

    def check_finite(self, names=None, *, alone=True):
        if self.kind != "nan on the worker":
            super().check_finite(names, alone=alone)

    def materialize(self, names):
        for i, (name, tensor) in enumerate(super().materialize(names)):
            if i != len(names) // 2 or not self.kind:
                yield name, tensor
            elif self.kind == "misshapen":
                yield name, tensor[:-1]
            elif self.kind.startswith("nan"):
                yield name, tensor * math.nan
            elif self.kind == "dies":
                raise ConnectionResetError("peer gone")


def test_another_tools_wrapper_of_the_runner_hides_no_request(engines, monkeypatch):
    policy = make_policy(seed=1)
    runner = in_process_parts(engines.served).runner
    vllm_lora.serve(runner, None)
    execute_model = type(runner).execute_model

    def traced(*args, **options):
        return execute_model(runner, *args, **options)

    monkeypatch.setitem(vars(runner), "execute_model", traced)
    sync = session(engines, policy)
    for number in (1, 2):
        step(policy, number)
        assert logprob_gap(engines.served, policy) > 1e-3
        sync.push(number)
        assert logprob_gap(engines.served, policy) < EXACT


@pytest.mark.parametrize("kind", ["dies", "misshapen", "missing", "nan", "nan on the worker"])
def test_an_adapter_that_does_not_arrive_leaves_the_old_one(engines, monkeypatch, kind):
    policy = make_policy(seed=5)
    source = Spoiled(policy)
    if kind.startswith("nan"):
        monkeypatch.setattr(Spoiled, "checks_finite", kind == "nan")
    sync = session(engines, policy, source)
    sync.push(1)
    before, version = generate(engines.served), sync.version
    step(policy, 6)
    source.kind = kind
    if kind == "nan":
        with torch.no_grad():
            next(p for n, p in policy.named_parameters() if "lora_B" in n)[0, 0] = math.nan
    with pytest.raises((CoverageError, LoadError)):
        sync.push(2)
    assert generate(engines.served) == before
    assert sync.version == version
    source.kind = ""
    step(policy, 7)
    assert not sync.push(3).lora["base"], "the engine's base was not touched"
    assert logprob_gap(engines.served, policy) < EXACT


def test_an_adapter_that_vllm_cannot_activate_leaves_the_old_one(engines, monkeypatch):
    policy = make_policy(seed=5)
    sync = session(engines, policy)
    sync.push(1)
    before = generate(engines.served)
    step(policy, 6)
    serve, calls = vllm_lora.serve, []

    def fail_once(runner, lora_model):
        calls.append(lora_model)
        if len(calls) == 1:
            runner.lora_manager.remove_all_adapters()
            raise RuntimeError("no slot")
        serve(runner, lora_model)

    with monkeypatch.context() as patched:
        patched.setattr(vllm_lora, "serve", fail_once)
        with pytest.raises(LoadError):
            sync.push(2)
    assert generate(engines.served) == before
    sync.push(3)
    assert logprob_gap(engines.served, policy) < EXACT


def test_a_layer_that_holds_another_adapter_is_found(engines, monkeypatch):
    policy = make_policy(seed=5)
    sync = session(engines, policy, verify="checksum")
    sync.push(1)
    before = generate(engines.served)
    step(policy, 6)
    serve = vllm_lora.serve

    def serve_otherwise(runner, lora_model):
        serve(runner, lora_model)
        if not done:
            module = runner.lora_manager._adapter_manager.modules["model.layers.1.mlp.down_proj"]
            module.lora_b_stacked[0][0] *= 2
            done.append(True)

    done: list[bool] = []
    with monkeypatch.context() as patched:
        patched.setattr(vllm_lora, "serve", serve_otherwise)
        with pytest.raises(CoverageError) as caught:
            sync.push(2)
    assert caught.value.layer == "model.layers.1.mlp.down_proj"
    assert generate(engines.served) == before
    sync.push(3)
    assert logprob_gap(engines.served, policy) < EXACT


def test_a_base_that_was_lost_or_changed_travels_again(engines):
    policy, full = make_policy(seed=8), make_model("dense", 1)
    sync = session(engines, policy)
    sync.push(1)
    assert not sync.push(2).lora["base"]
    # Another session brings whole weights: they are served without the adapter.
    SyncSession(HFSource(full), InProcessTransport(engines.served), SyncConfig()).push()
    assert logprob_gap(engines.served, full) < EXACT
    assert sync.push(3).lora["base"]
    assert logprob_gap(engines.served, policy) < EXACT
    sync._transport.invalidate("somebody says so")
    assert sync.push(4).lora["base"]
    with torch.no_grad():
        policy.get_base_model().model.norm.weight.mul_(1.5)
    assert sync.push(5).lora["base"]
    assert logprob_gap(engines.served, policy) < EXACT
    assert not sync.push(6).lora["base"]
    policy.get_base_model().lm_head.weight.data.mul_(1.5)
    assert sync.push(7).lora["base"]
    assert logprob_gap(engines.served, policy) < EXACT


@pytest.mark.parametrize("on_failure", ["poison", "rollback"])
def test_a_base_that_fails_in_the_middle_keeps_its_contract(engines, on_failure):
    policy = make_policy(seed=3)
    sync = session(engines, policy)
    sync.push(1)
    before = generate(engines.served)

    class Cut(AdapterSource):
        def materialize(self, names):
            yield from list(super().materialize(names))[: len(names) // 2]
            raise ConnectionResetError("peer gone")

    other = make_policy(base=make_model("dense", 1))
    with pytest.raises(LoadError):
        session(engines, other, Cut, on_failure=on_failure).push()
    if on_failure == "rollback":
        assert generate(engines.served) == before
        assert not sync.push(2).lora["base"]
    else:
        with pytest.raises(SyncError):
            generate(engines.served)
        assert sync.push(2).lora["base"]
    assert logprob_gap(engines.served, policy) < EXACT


def test_half_of_a_base_is_not_healed_by_an_adapter_over_the_engines_own(engines):
    policy = make_policy(seed=3)
    session(engines, policy).push()

    class Cut(AdapterSource):
        def materialize(self, names):
            yield from list(super().materialize(names))[: len(names) // 2]
            raise ConnectionResetError("peer gone")

    with pytest.raises(LoadError):
        session(engines, make_policy(base=make_model("dense", 1)), Cut).push()
    for _ in range(2):
        with pytest.raises(CoverageError):
            session(engines, policy, lora_base="engine").push()
        with pytest.raises(SyncError):
            generate(engines.served)
    session(engines, policy).push()
    assert logprob_gap(engines.served, policy) < EXACT
    step(policy, 4)
    session(engines, policy, lora_base="engine").push()
    assert logprob_gap(engines.served, policy) < EXACT


REFUSED = {
    "use_dora": {"use_dora": True},
    "lora_bias": {"kind": "bias", "target_modules": ["q_proj"], "lora_bias": True},
    "trainable_token_indices": {"trainable_token_indices": {"embed_tokens": [1, 2]}},
}


@pytest.mark.parametrize("feature", REFUSED)
def test_what_vllm_computes_otherwise_is_refused_by_name(feature):
    with pytest.raises(ConfigError) as caught:
        AdapterSource(make_policy(**REFUSED[feature]))
    assert caught.value.feature == feature


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of the same
@pytest.mark.parametrize("copied", ["lm_head", "embed_tokens"])
def test_a_trained_copy_of_tied_weights_is_refused(copied):
    with pytest.raises(ConfigError) as refused:
        AdapterSource(make_policy("tied", target_modules=["q_proj"], modules_to_save=[copied]))
    assert refused.value.feature == "modules_to_save"


def test_an_adapter_at_odds_with_its_model_is_refused():
    policy = make_policy()
    with pytest.raises(ConfigError):
        AdapterSource(make_model("dense", 0))
    source = AdapterSource(policy)
    policy.merge_adapter()
    with pytest.raises(ConfigError) as merged:
        source.metadata()
    policy.unmerge_adapter()
    with policy.disable_adapter(), pytest.raises(ConfigError) as disabled:
        source.metadata()
    policy.base_model.set_adapter([])
    with pytest.raises(ConfigError) as inactive:
        source.metadata()
    features = [one.value.feature for one in (merged, disabled, inactive)]
    assert features == ["merged", "disabled", "disabled"]


def test_a_layer_that_vllm_does_not_know_is_named(engines):
    adapter = AdapterSource(make_policy(target_modules=["q_proj"])).adapter()
    unknown = Adapter(
        tuple(replace(meta, name=meta.name.replace("q_proj", "z_proj")) for meta in adapter.metas),
        {path.replace("q_proj", "z_proj"): scale for path, scale in adapter.scalings.items()},
    )
    with pytest.raises(ConfigError) as caught:
        InProcessTransport(engines.served).require_adapter(unknown)
    assert caught.value.layers == tuple(unknown.scalings)


def test_what_the_engine_cannot_serve_is_refused_at_construction(engines, subject):
    with pytest.raises(ConfigError) as rank:
        session(engines, make_policy(r=16))
    assert (rank.value.rank, rank.value.max_lora_rank) == (16, 8)
    with pytest.raises(ConfigError, match="enable_lora"):
        SyncSession(
            AdapterSource(make_policy()),
            InProcessTransport(subject("dense").engine),
            SyncConfig(),
        )
    with pytest.raises((ConfigError, CoverageError)):
        session(engines, make_policy("bias", target_modules=["q_proj"]))
