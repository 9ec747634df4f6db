"""Layer maps from recorded patterns are those that vLLM shows."""

from __future__ import annotations

import pytest
from conformance.maps import difference, learnt
from support.layer_maps import MODELS, recorded

from qerl_sync.errors import LayerMapError
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.recorded_map import RecordedMap, recorded_maps


@pytest.mark.parametrize("kind", list(MODELS))
def test_they_give_the_map_of_models_that_they_were_not_recorded_of(kind):
    architecture = MODELS[kind][0]["architectures"][0]
    assert difference(recorded_maps()[1][architecture], recorded()[kind]) == ""


def test_a_difference_is_seen():
    patterns = recorded_maps()[1]["Qwen3ForCausalLM"]
    name = "model.layers.*.self_attn.q_proj.weight"
    (landing,) = patterns.tensors[name]
    other = {name: (landing._replace(parameter="bias"),)}
    assert "q_proj" in difference(
        RecordedMap({**patterns.tensors, **other}, patterns.layers), recorded()["dense"]
    )


def test_what_is_learnt_of_a_small_model_holds_for_a_larger_one():
    patterns = learnt(recorded()["moe of two blocks"])
    assert difference(patterns, recorded()["moe"]) == ""
    assert RecordedMap.from_json(patterns.to_json()) == patterns


def test_a_tensor_that_no_pattern_has_is_refused():
    patterns = recorded_maps()[1]["Qwen3ForCausalLM"]
    with pytest.raises(LayerMapError) as raised:
        patterns.layer_map([ParamMeta("model.layers.0.mlp.new_proj.weight", "float32", (4, 4))])
    assert raised.value.tensor == "model.layers.0.mlp.new_proj.weight"
