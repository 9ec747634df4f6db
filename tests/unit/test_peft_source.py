"""PEFTSource: what it yields is what PEFT itself would merge, and the model stays as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from support.adapters import make_policy
from support.models import make_model, random_model

from qerl_sync import AdapterSource, ConfigError, HFSource, PEFTSource

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted(kind="dense", dtype=torch.float32, **options):
    """A model whose adapters, biases, magnitudes and copies all differ from their beginning."""
    config = peft.LoraConfig(**{"target_modules": ALL, "r": 4, **options})
    model = peft.get_peft_model(make_model(kind, 0).to(dtype), config)
    disturb(model, 1)
    return model


@torch.no_grad()
def disturb(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter += (0.1 * noise).to(parameter.dtype)


def yielded(source):
    return {n: t.clone() for n, t in source.materialize([m.name for m in source.metadata()])}


def merged_by_peft(model):
    return yielded(HFSource(copy.deepcopy(model).float().merge_and_unload()))


def adapters_of(model, name):
    """A and B, in float32, of the plain LoRA layer with the weight `name`."""
    layer = model.get_base_model().get_submodule(name.removesuffix(".weight"))
    return (part["default"].weight.detach().float() for part in (layer.lora_A, layer.lora_B))


CASES = {
    "all linear": ("dense", {}),
    "of rank and alpha patterns, rank stabilised": (
        "dense",
        {
            "rank_pattern": {"q_proj": 2, "down_proj": 8},
            "alpha_pattern": {"k_proj": 32},
            "use_rslora": True,
        },
    ),
    "DoRA": ("dense", {"use_dora": True}),
    "DoRA on embeddings": ("dense", {"use_dora": True, "target_modules": ["embed_tokens"]}),
    "biases": ("bias", {"bias": "lora_only"}),
    "biases of adapters": ("bias", {"lora_bias": True, "target_modules": ALL[:3]}),
    "modules to save": ("dense", {"modules_to_save": ["lm_head", "input_layernorm"]}),
    "embeddings and head": ("padded", {"target_modules": [*ALL, "embed_tokens", "lm_head"]}),
    "saved embeddings tied to the head": (
        "tied",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "fused experts": ("moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "renamed experts": (
        "moe_renamed",
        {"target_modules": ["v_proj"], "target_parameters": EXPERTS},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_yields_what_peft_merges(case):
    kind, options = CASES[case]
    model = adapted(kind, **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found, right = yielded(PEFTSource(model)), merged_by_peft(model)
    assert found.keys() == right.keys()
    plain = yielded(HFSource(make_model(kind, 0)))
    assert found.keys() == plain.keys()
    moved = {name for name, tensor in found.items() if not tensor.equal(plain[name])}
    assert moved
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-5, atol=1e-6, msg=name)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_an_adapter_that_embeddings_and_head_share():
    """PEFT can neither copy such a model nor merge it right: compared is what it computes."""
    model = adapted("tied", target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    plain = make_model("tied", 0)
    ids = torch.tensor([[1, 2, 3, 4]])
    before = plain(input_ids=ids).logits
    plain.load_state_dict(yielded(PEFTSource(model)), strict=False)
    right = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(plain(input_ids=ids).logits, right, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, right, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_once_and_never_touches_the_base(dtype):
    model = adapted(dtype=dtype)
    source = PEFTSource(model)
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    for seed in range(5):
        disturb(model, seed)
        for name, tensor in yielded(source).items():
            layer = model.get_base_model().get_submodule(name.removesuffix(".weight"))
            if not hasattr(layer, "lora_A"):
                continue
            base, (down, up) = layer.base_layer.weight, adapters_of(model, name)
            right = base.detach().float() + layer.scaling["default"] * (up @ down)
            assert tensor.dtype == dtype
            assert tensor.equal(right.to(dtype)), name
    for name, parameter in model.named_parameters():
        assert name not in before or parameter.equal(before[name]), name


@pytest.mark.slow
def test_a_thousand_syncs_leave_a_bfloat16_base_as_it_was():
    model = adapted(dtype=torch.bfloat16)
    source = PEFTSource(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    names = [meta.name for meta in source.metadata()]
    first = {name: tensor.clone() for name, tensor in source.materialize(names)}
    for _ in range(1000):
        for _ in source.materialize(names):
            pass
    assert all(tensor.equal(before[name]) for name, tensor in model.named_parameters())
    assert all(tensor.equal(first[name]) for name, tensor in source.materialize(names))


def test_what_cannot_have_changed_is_declared():
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    source = PEFTSource(model)
    names = {meta.name for meta in source.metadata()}
    first = source.unchanging()
    touched = {n for n in names if "q_proj" in n} | {"lm_head.weight"}
    assert names - first.keys() == touched
    assert source.unchanging() == first
    base = model.get_base_model().model
    with torch.no_grad():
        base.norm.weight.add_(1)
        base.layers[0].mlp.up_proj.weight.data.mul_(2)
    base.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(128, 64), False)
    source.metadata()
    changed = {name for name, stamp in source.unchanging().items() if first[name] != stamp}
    assert changed == {
        "model.norm.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    }
    base.norm.weight.requires_grad_(True)
    assert "model.norm.weight" not in source.unchanging()


def test_the_active_one_of_several_adapters():
    model = adapted(modules_to_save=["lm_head"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    disturb(model, 5)
    source = PEFTSource(model)
    for name in ("other", "default"):
        model.set_adapter(name)
        found, right = yielded(source), merged_by_peft(model)
        for one, tensor in found.items():
            torch.testing.assert_close(tensor, right[one], rtol=1e-5, atol=1e-6, msg=one)


def test_adapters_of_transformers_own():
    model = make_model("dense", 0)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    moved = yielded(PEFTSource(model))
    plain = yielded(HFSource(make_model("dense", 0)))
    assert moved.keys() == plain.keys()
    assert {n for n, t in moved.items() if not t.equal(plain[n])} == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)
    }


def test_transposed_layers():
    from transformers import GPT2Config

    base = random_model(
        GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32), 0
    )
    for dora in (False, True):
        config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=dora)
        model = peft.get_peft_model(copy.deepcopy(base), config)
        disturb(model, 1)
        found, right = yielded(PEFTSource(model)), merged_by_peft(model)
        assert not found["transformer.h.0.attn.c_attn.weight"].equal(
            base.transformer.h[0].attn.c_attn.weight
        )
        for name, tensor in found.items():
            assert tensor.is_contiguous()
            torch.testing.assert_close(tensor, right[name], rtol=1e-5, atol=1e-6, msg=name)


def of_kind(config):
    return lambda: peft.get_peft_model(make_model("dense", 0), config)


def disabled():
    model = adapted()
    model.base_model.disable_adapter_layers()
    return model


def merged():
    model = adapted()
    model.merge_adapter()
    return model


def quantised():
    model = adapted()
    model.get_base_model().quantization_method = "bitsandbytes"
    return model


REFUSED = {
    "IA3": of_kind(peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
    "a prompt": of_kind(peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
    "tokens": of_kind(peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1])),
    "an activated one": of_kind(
        peft.LoraConfig(
            target_modules=["q_proj"], alora_invocation_tokens=[1], task_type="CAUSAL_LM"
        )
    ),
    "biases where the base has none": lambda: adapted(lora_bias=True),
    "one of two tied": lambda: adapted("tied", target_modules=["embed_tokens"]),
    "the head of tied embeddings": lambda: adapted("tied", modules_to_save=["lm_head"]),
    "disabled": disabled,
    "merged": merged,
    "a quantised base": quantised,
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_by_name(case):
    model = REFUSED[case]()
    with pytest.raises(ConfigError) as refused:
        PEFTSource(model)
    assert refused.value.module
    assert refused.value.what


def test_so_is_what_becomes_so_later():
    model = adapted()
    source = PEFTSource(model)
    model.merge_adapter()
    with pytest.raises(ConfigError):
        source.metadata()
    model.unmerge_adapter()
    assert source.metadata()
    with pytest.raises(ConfigError), model.disable_adapter():
        source.metadata()


def test_bad_values_are_found_before_they_are_sent():
    from qerl_sync.errors import CoverageError

    model = adapted(use_dora=True, target_modules=["q_proj"])
    source = PEFTSource(model)
    source.metadata()
    source.check_finite()
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    layer.lora_magnitude_vector["default"].weight.data[0] = float("inf")
    with pytest.raises(CoverageError):
        source.check_finite()
    plain = adapted()
    source = PEFTSource(plain)
    source.metadata()
    plain.get_base_model().model.layers[0].mlp.up_proj.lora_B["default"].weight.data[0] = float(
        "nan"
    )
    with pytest.raises(CoverageError):
        source.check_finite(["model.layers.0.mlp.up_proj.weight"])


def test_holds_one_merged_tensor_at_a_time():
    model = adapted()
    source = PEFTSource(model)
    names = [meta.name for meta in source.metadata() if "proj" in meta.name]
    alive, most, base = [], 0, {p.data_ptr() for p in model.parameters()}
    for _, tensor in source.materialize(names):
        assert tensor.data_ptr() not in base
        alive.append(torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage()))
        del tensor
        most = max(most, sum(not one.expired() for one in alive))
    assert most <= 2, "the last one, and the one that a generator yields"


def test_a_base_that_a_merge_has_rounded_is_another_one():
    """PEFT merges through `.data`, which torch does not count."""
    policy = make_policy(base=make_model("dense", 0).bfloat16(), target_modules=["q_proj"])
    source = AdapterSource(policy)
    names = {meta.name for meta in source.metadata() if "q_proj" in meta.name}
    first, before = source.unchanging(), yielded(source)
    policy.merge_adapter()
    policy.unmerge_adapter()
    assert any(not tensor.equal(before[name]) for name, tensor in yielded(source).items())
    assert {name for name, stamp in source.unchanging().items() if first[name] != stamp} == names


def test_a_base_that_was_made_without_autograd_has_stamps():
    with torch.inference_mode():
        policy = make_policy()
    source = AdapterSource(policy)
    source.metadata()
    assert source.unchanging() == source.unchanging() != {}


def test_an_adapter_source_sees_what_changes_in_its_model():
    """It walks the model's modules once, and anew when one of them is another."""
    policy = make_policy(seed=1)
    source = AdapterSource(policy)
    before = source.metadata()
    assert source.metadata() == before
    assert source._structure.unchanged()

    layer = policy.base_model.model.model.layers[0].mlp.up_proj.base_layer
    layer.weight = torch.nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
    source.metadata()
    ((_, sent),) = source.materialize(["model.layers.0.mlp.up_proj.weight"])
    assert not sent.any()

    for change, undo, feature in (
        (policy.merge_adapter, policy.unmerge_adapter, "merged"),
        (
            policy.base_model.disable_adapter_layers,
            policy.base_model.enable_adapter_layers,
            "disabled",
        ),
    ):
        change()
        with pytest.raises(ConfigError) as caught:
            source.metadata()
        assert caught.value.feature == feature
        undo()
        assert source.metadata() == before

    ranks = source.adapter().rank
    policy.add_adapter(
        "other", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    policy.set_adapter("other")
    source.metadata()
    assert source.adapter().rank == 2 != ranks
    assert all("q_proj" in meta.name for meta in source.adapter().metas)
