"""The layer map by rules, held against the one that vLLM's own model classes give."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qerl_sync.errors import CoverageError, PlanError
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.architectures import ARCHITECTURES
from qerl_sync.plan.rules import rules_map, rules_metas

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "dtype": "bfloat16",
}


def filled(layer_map):
    """The layers that get something from the stream."""
    names = {c.parent_layer for cs in layer_map.contributions.values() for c in cs}
    return {name: layer for name, layer in layer_map.layers.items() if name in names}


def ruled_kinds():
    from support.probes import RULED

    return sorted(RULED)


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ruled_kinds())
def test_rules_and_vllm_agree(kind):
    from support.probes import RULED, config_json, probed

    observed = probed()[kind]
    assert not isinstance(observed, str), observed
    config = config_json(RULED[kind]())
    assert rules_metas(config) == observed.metas
    by_rules = rules_map(config, observed.metas)
    assert by_rules.contributions == observed.layer_map.contributions
    assert by_rules.layers == filled(observed.layer_map)


@pytest.mark.vllm
def test_each_architecture_that_the_rules_claim_is_held_against_vllm():
    from support.probes import RULED, config_json

    tested = {config_json(make())["architectures"][0] for make in RULED.values()}
    assert tested == ARCHITECTURES.keys()


def test_the_trainers_dtype_counts():
    metas = rules_metas(LLAMA, "float32")
    contribution = rules_map(LLAMA, metas).contributions["model.norm.weight"][0]
    assert (contribution.held_bytes, contribution.loaded_numel) == (4 * 64, 64)
    mixed = [replace(m, dtype="bfloat16") if len(m.shape) == 2 else m for m in metas]
    contributions = rules_map(LLAMA, mixed).contributions
    assert contributions["lm_head.weight"][0].held_bytes == 2 * 199 * 64
    assert contributions["model.norm.weight"][0].held_bytes == 4 * 64


def test_padding_is_expected_short():
    head = rules_map(LLAMA, rules_metas(LLAMA)).layers["lm_head"]
    assert (head.expected_numel, head.total_numel) == (199 * 64, 256 * 64)
    assert head.closes_at_numel == 199 * 64


def test_the_order_of_the_names_is_the_callers():
    metas = rules_metas(LLAMA)[::-1]
    assert list(rules_map(LLAMA, metas).contributions) == [meta.name for meta in metas]


def test_unknown_architectures_are_refused_by_name():
    config = {**LLAMA, "architectures": ["SomethingForCausalLM"]}
    with pytest.raises(PlanError, match=r"'SomethingForCausalLM'.*LlamaForCausalLM"):
        rules_metas(config)
    with pytest.raises(PlanError, match="none named"):
        rules_metas({})


REFUSED = {
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
    "no width": ({"intermediate_size": None}, "'intermediate_size'.*None"),
    "dtype": ({"dtype": "float3"}, "float3"),
    "ignored bias": (
        {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "attention_bias": True},
        "o_proj",
    ),
    "bias that is not there": (
        {
            "architectures": ["Qwen2MoeForCausalLM"],
            "decoder_sparse_step": 1,
            "qkv_bias": False,
        },
        "has these biases always",
    ),
    "head size that only transformers knows": (
        {"architectures": ["Qwen3ForCausalLM"]},
        "'head_dim'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_rules_do_not_know_is_refused(case):
    changes, words = REFUSED[case]
    with pytest.raises(PlanError, match=words):
        rules_metas({**LLAMA, **changes})


def test_a_stream_that_is_not_of_this_model_is_refused():
    metas = rules_metas(LLAMA)
    with pytest.raises(PlanError, match=r"no tensor 'model\.layers\.2\.mlp\.up_proj\.weight'"):
        rules_map(LLAMA, [*metas, ParamMeta("model.layers.2.mlp.up_proj.weight", "int8", (1,))])
    with pytest.raises(PlanError, match="named twice"):
        rules_map(LLAMA, [*metas, metas[0]])
    with pytest.raises(PlanError, match=r"\[199, 32\].*\[199, 64\]"):
        rules_map(LLAMA, [replace(metas[0], shape=(199, 32)), *metas[1:]])
    with pytest.raises(CoverageError, match=r"1 tensors .*'model\.norm\.weight'"):
        rules_map(LLAMA, [meta for meta in metas if meta.name != "model.norm.weight"])


def test_a_published_mixture_of_experts():
    """Qwen3-30B-A3B: 48 blocks of 128 experts, as its model card counts them."""
    file = Path(__file__).parents[2] / "configs" / "models" / "qwen3-30b-a3b.json"
    config = json.loads(file.read_text())
    metas = rules_metas(config)
    assert len(metas) == 18_867
    assert round(sum(meta.numel for meta in metas) / 1e9, 1) == 30.5
    experts = rules_map(config, metas).layers["model.layers.0.mlp.experts.routed_experts"]
    assert experts.total_numel == experts.expected_numel == 128 * 3 * 768 * 2048
