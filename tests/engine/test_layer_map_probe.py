"""The layer map observed from a live model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from inspect import signature

import pytest
import torch
from support.engines import OLD
from support.models import CONFIGS

from qerl_sync import HFSource
from qerl_sync.errors import CoverageError, LayerMapError
from qerl_sync.meta import ParamMeta
from qerl_sync.worker.compat import engine as compat
from qerl_sync.worker.load.observe import observe_layer_map

pytestmark = pytest.mark.vllm


def observe(one, metas, **options):
    parts = compat.in_process_parts(one.engine)
    return observe_layer_map(parts.model, parts.vllm_config, metas, **options)


def metas_of(one):
    return HFSource(one.trainers[OLD]).metadata()


def pointers(model):
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: (id(t), t.data_ptr(), tuple(t.shape), type(t).__name__) for name, t in named}


@pytest.mark.parametrize("kind", CONFIGS)
def test_leaves_weights_pointers_and_generations_untouched(subject, kind):
    one = subject(kind)
    before = pointers(one.model)
    first = observe(one, metas_of(one))
    assert observe(one, metas_of(one)) == first
    assert pointers(one.model) == before
    assert one.wrong_weights(OLD) == []
    assert one.generates_as(OLD)


def test_groups_by_the_module_that_owns_the_parameter(subject):
    layer_map = observe(subject("dense"), metas_of(subject("dense")))
    attention = "model.layers.0.self_attn"
    for part in "qkv":
        (contribution,) = layer_map.contributions[f"{attention}.{part}_proj.weight"]
        assert contribution.parent_layer == f"{attention}.qkv_proj"
    layer = layer_map.layers[f"{attention}.qkv_proj"]
    assert layer.kind == "QKVParallelLinear"
    assert layer.total_numel == layer.expected_numel == (128 + 64 + 64) * 64


def test_padded_vocabulary_is_expected_short(subject):
    one = subject("padded")
    layer = observe(one, metas_of(one)).layers["model.embed_tokens"]
    assert (layer.expected_numel, layer.total_numel) == (199 * 64, 256 * 64)


def test_attention_scales_are_deferred(subject):
    layer_map = observe(subject("dense"), metas_of(subject("dense")))
    deferred = {name for name, layer in layer_map.layers.items() if layer.deferred}
    assert deferred == {f"model.layers.{i}.self_attn.attn" for i in (0, 1)}


# What the source may get wrong. Each is refused before a byte moves, and nothing has changed.

GATE = "model.layers.1.mlp.gate_proj.weight"


def _without(name):
    return lambda metas: [meta for meta in metas if meta.name != name]


def _with(name, **changes):
    return lambda metas: [replace(m, **changes) if m.name == name else m for m in metas]


def _and(meta):
    return lambda metas: [*metas, meta]


REFUSED = {
    "missing shard": (_without(GATE), CoverageError, "model.layers.1.mlp.gate_up_proj.weight"),
    "missing norm": (_without("model.norm.weight"), CoverageError, "0 of 64"),
    "missing head": (_without("lm_head.weight"), CoverageError, "lm_head.weight"),
    "unknown name": (
        _and(ParamMeta("model.layers.9.mlp.gate_proj.weight", "float32", (128, 64))),
        LayerMapError,
        "model.layers.9.mlp.gate_proj.weight",
    ),
    "wrong shape": (_with(GATE, shape=(128, 32)), LayerMapError, f"{GATE}' (float32, shape"),
    "transposed": (_with(GATE, shape=(64, 128)), LayerMapError, GATE),
    "integers": (_with(GATE, dtype="int64"), LayerMapError, "is int64"),
    "fp8 bytes": (_with(GATE, dtype="float8_e4m3fn"), LayerMapError, "is float8_e4m3fn"),
    "doubled name": (
        _and(ParamMeta(GATE, "float32", (128, 64))),
        CoverageError,
        "exactly once",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(subject, case):
    change, error, words = REFUSED[case]
    one = subject("dense")
    with pytest.raises(error) as raised:
        observe(one, change(metas_of(one)))
    assert words in str(raised.value)
    assert one.wrong_weights(OLD) == []
    assert one.generates_as(OLD)


MISSHAPEN = {
    "a shard of a merged layer": (GATE, (128, 64), (128, 32)),
    "a shard of the attention": ("model.layers.0.self_attn.k_proj.weight", (64, 64), (32, 64)),
    "a row parallel layer": ("model.layers.0.mlp.down_proj.weight", (64, 128), (64, 96)),
    "a norm": ("model.norm.weight", (64,), (32,)),
    "resized embeddings": ("model.embed_tokens.weight", (256, 64), (264, 64)),
}


@pytest.mark.parametrize("case", MISSHAPEN)
def test_a_shape_that_vllm_refuses_is_told_with_the_one_that_it_awaits(subject, case):
    name, expected, got = MISSHAPEN[case]
    one = subject("dense")
    with pytest.raises(LayerMapError) as raised:
        observe(one, _with(name, shape=got)(metas_of(one)))
    error = raised.value
    assert (error.tensor, error.expected, error.got) == (name, expected, got)
    for reported in (name, str(list(expected)), str(list(got))):
        assert reported in str(error)
    assert one.wrong_weights(OLD) == []


def test_a_checkpoint_may_fuse_some_parts_of_a_layer(subject):
    """As Qwen3.5's fuses the first three parts of `in_proj_qkvz`."""
    layer = subject("dense", "plain").model.model.layers[0].mlp.gate_up_proj
    for shard, rows in [(0, 128), ((1,), 128), ((0, 1), 256)]:
        shape = compat.awaited_shape(layer, "weight", {"loaded_shard_id": shard})
        assert shape == (rows, 64)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_floats_are_cast_by_vllm_and_allowed(subject, dtype):
    one = subject("dense")
    assert observe(one, [replace(meta, dtype=dtype) for meta in metas_of(one)])


def test_missing_is_allowed_where_the_user_says_so(subject):
    one = subject("dense")
    metas = _without("model.norm.weight")(metas_of(one))
    assert observe(one, metas, allow_incomplete=["model.norm"])


@pytest.mark.parametrize(
    ("name", "load", "taken"),
    [
        ("model.norm", "auto", True),
        ("model.norm", "layerwise", False),
        ("model.layers.1.mlp.down_proj", "auto", False),
    ],
)
def test_a_loader_that_goes_past_the_reload(subject, monkeypatch, name, load, taken):
    """Some models copy into a parameter directly; during a reload that is a copy into nothing.
    Kernels read the norm as loaders write it, and pack the projection."""
    one = subject("dense")
    load_weights = one.model.load_weights
    layer = one.model.get_submodule(name)

    def bypassing(weights):
        def rest():
            for at, tensor in weights:
                if at == f"{name}.weight":
                    layer.weight.data.copy_(tensor)
                else:
                    yield at, tensor

        return load_weights(rest())

    monkeypatch.setattr(one.model, "load_weights", bypassing)
    if taken:
        layer_map = observe(one, metas_of(one), load=load)
        assert layer_map.layers[name].loading == "direct"
        assert layer_map.past_reload == {f"{name}.weight"}
    else:
        with pytest.raises(LayerMapError, match=rf"{name}\.weight.*past the layerwise reload"):
            observe(one, metas_of(one), load=load)
    assert one.wrong_weights(OLD) == []


def test_a_name_that_vllm_drops_without_a_word_is_refused(subject, monkeypatch):
    one = subject("dense")
    load_weights = one.model.load_weights
    monkeypatch.setattr(
        one.model,
        "load_weights",
        lambda weights: load_weights((n, t) for n, t in weights if n != "extra.weight"),
    )
    with pytest.raises(LayerMapError, match=r"accepts 'extra\.weight' and does nothing with it"):
        observe(one, [*metas_of(one), ParamMeta("extra.weight", "float32", (4,))])


def test_a_part_that_vllm_lists_as_not_its_own_needs_no_weights(subject, monkeypatch):
    """As LLaVA-NeXT's video model lists `image_newline`, and Qwen2.5-Omni its talker."""
    from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

    one = subject("dense")
    extra, bias = (ParamMeta(name, "float32", (4,)) for name in ("extra.weight", "bias"))
    mapper = WeightsMapper(orig_to_new_prefix={"extra.": None})
    ways = [({"ignore_unexpected_prefixes": ["extra."]}, None), ({}, mapper)]
    if "skip_prefixes" in signature(AutoWeightsLoader).parameters:  # before vLLM 0.31
        ways.append(({"skip_prefixes": ["extra.", "model.norm."]}, None))
    for options, mapped in ways:
        loader = AutoWeightsLoader(one.model, **options)
        load = partial(loader.load_weights, mapper=mapped)
        monkeypatch.setitem(vars(one.model), "load_weights", load)
        monkeypatch.setitem(vars(one.model), "hf_to_vllm_mapper", mapped)
        if "skip_prefixes" in options:  # what is there is no part that vLLM has not
            with pytest.raises(LayerMapError, match=r"model\.norm\.weight"):
                observe(one, [*metas_of(one), extra])
            loader.skip_prefixes.pop()
        assert observe(one, [*metas_of(one), extra]).contributions["extra.weight"] == ()

    loader = AutoWeightsLoader(one.model, ignore_unexpected_suffixes=["bias"])
    monkeypatch.setitem(vars(one.model), "load_weights", loader.load_weights)
    with pytest.raises(LayerMapError, match=r"accepts 'bias' and does nothing with it"):
        observe(one, [*metas_of(one), bias])


def test_what_the_engine_was_built_without_needs_no_weights(subject, monkeypatch):
    """As LLaVA's vision tower, without its last layer and the norm after it."""
    one = subject("dense")
    load_weights, metas = one.model.load_weights, metas_of(one)
    last = [replace(m, name=m.name.replace(".1.", ".2.")) for m in metas if ".layers.1." in m.name]
    norm = ParamMeta("model.after.weight", "float32", (4,))
    gone = {meta.name for meta in [*last, norm]}
    monkeypatch.setattr(
        one.model,
        "load_weights",
        lambda given: load_weights((n, t) for n, t in given if n not in gone),
    )
    with pytest.raises(LayerMapError, match=r"model\.after\.weight"):
        observe(one, [*metas, norm])
    monkeypatch.setattr(one.model.model, "after", None, raising=False)
    assert observe(one, [*metas, norm]).contributions[norm.name] == ()

    with pytest.raises(LayerMapError, match=r"model\.layers\.2\."):  # an engine of a smaller model
        observe(one, [*metas, *last])
    config = compat.in_process_parts(one.engine).vllm_config.model_config.hf_config
    monkeypatch.setattr(config, "num_hidden_layers", 3)
    found = observe(one, [*metas, *last])
    assert {name for name, landings in found.contributions.items() if not landings} == gone - {
        norm.name
    }
    assert found.layers == observe(one, metas).layers


def test_ignoring_a_name_is_no_advice_where_its_parameter_gets_nothing(subject, monkeypatch):
    """As GPT-OSS does in some orders: what it copies from is no view of the tensor any more."""
    one = subject("dense")
    load_weights = one.model.load_weights
    monkeypatch.setattr(
        one.model,
        "load_weights",
        lambda weights: load_weights((n, t) for n, t in weights if n != "model.norm.weight"),
    )
    with pytest.raises(LayerMapError, match=r"model\.norm\.weight") as raised:
        observe(one, metas_of(one))
    assert "ignore_names" not in str(raised.value)
    with pytest.raises(CoverageError):
        observe(one, _without("model.norm.weight")(metas_of(one)))


def test_a_second_probe_during_a_sync_is_no_surprise(subject):
    """Gradients off, inference mode or not: the probe brings its own context."""
    one = subject("dense")
    with torch.inference_mode():
        assert observe(one, metas_of(one))
    assert one.wrong_weights(OLD) == []


def test_an_attribute_that_a_kernel_has_emptied_is_none_again(subject):
    """As int8 checkpoints have it on a CPU: their kernel takes the weight, and the model reads the
    attribute."""
    one = subject("dense")
    parts = compat.in_process_parts(one.engine)
    layer = one.model.get_submodule("model.layers.0.mlp.down_proj")
    own, layer.weight = layer.weight, None
    try:
        with (
            compat.loading_context(parts.vllm_config),
            compat.dry_reload(one.model),
        ):
            assert layer.weight.is_meta
        assert layer.weight is None
    finally:
        layer.weight = own
    assert one.generates_as(OLD)
