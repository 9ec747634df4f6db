"""Small random models of every architecture that both vLLM and transformers know.

A configuration is its class's own, with the sizes made small by their names. What an architecture
needs besides stands in `SPECIAL`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from conformance.tokens import token_ids

PATCH, SIDE = 14, 56  # pixels of a patch and of a picture: 16 patches

# By the names under which configurations keep them. Widths are no squares, so that a transposed
# matrix would have another shape; 64 is what vLLM pads vocabularies to.
SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,  # 32 for each of 4 heads, the least that vLLM's CPU attention takes
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "layer_types": None,  # derived anew from the number of layers
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 96,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "mlp_only_layers": [],
    # state-space mixers and linear attention
    "state_size": 16,
    "time_step_rank": 8,
    "mamba_d_state": 16,
    "linear_key_head_dim": 128,  # the least that vLLM's CPU kernel takes
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # multi-head latent attention
    "q_lora_rank": 48,
    "kv_lora_rank": 512,  # with the next, the one size that vLLM's CPU kernel takes
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "expert_ffn_hidden_size": 96,
    # extra heads for speculative decoding are another model to vLLM
    "num_nextn_predict_layers": 0,
    "num_mtp_layers": 0,
    "mtp_num_hidden_layers": 0,
}
# In configurations of vision and audio towers.
TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_heads": 4,
    "num_attention_heads": 4,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 160,
    "d_model": 64,
    "embed_dim": 64,
    "out_hidden_size": 128,
    "projection_dim": 64,
    "vocab_size": 256,
    "image_size": SIDE,
    "patch_size": PATCH,
    "num_position_embeddings": 16,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0],
}

_GEMMA = {
    "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
# Of positions in time, height and width: together half of a head's rotated part.
_ROPE_3D = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
}
_ROPE_MIXED = {"rope_parameters": {**_ROPE_3D["rope_parameters"], "mrope_interleaved": True}}
_LINEAR_3D = {
    **_LINEAR,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
_HEADLESS = {"vision_use_head": False}  # SigLIP's, which no checkpoint of these has
_LLAMA4 = {
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 192,
    "moe_layers": [1],
    "interleave_moe_layer_step": 2,
    "no_rope_layers": [1, 0],
    "layer_types": ["chunked_attention", "full_attention"],
}
SPECIAL: dict[str, dict[str, Any]] = {
    "DeepseekV3ForCausalLM": {"topk_method": "noaux_tc"},
    # vLLM reads windows by layer, and has none for a sliding layer where there is no such list.
    "ExaoneMoeForCausalLM": {
        "sliding_windows": [32, None],
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "FalconH1ForCausalLM": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "layer_types": ...,
    },
    "Gemma3nForCausalLM": {**_GEMMA, "activation_sparsity_pattern": [0.0, 0.0]},
    "Gemma3nForConditionalGeneration": {
        "text_config": {**_GEMMA, "activation_sparsity_pattern": [0.0, 0.0]}
    },
    "Gemma4ForCausalLM": _GEMMA,
    # Checkpoints have it, transformers' class does not.
    "Gemma4ForConditionalGeneration": {
        "text_config": _GEMMA,
        "vision_config": {"default_output_length": 4},
    },
    "Gemma4UnifiedForConditionalGeneration": {"text_config": _GEMMA},
    "GPTJForCausalLM": {"rotary_dim": 16},
    # Checkpoints have it, and vLLM reads it.
    "Glm4MoeForCausalLM": {"head_dim": 32},
    # Another name of qk_rope_head_dim.
    "Glm4MoeLiteForCausalLM": {"head_dim": 64},
    "HYV3ForCausalLM": {"expert_hidden_dim": 96, "mlp_layer_types": ["dense", "sparse"]},
    "LagunaForCausalLM": {
        "num_attention_heads_per_layer": [4, 4],
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "Lfm2ForCausalLM": {
        "block_dim": 128,
        "block_ff_dim": 192,
        "block_auto_adjust_ff_dim": False,
        "conv_dim": 128,
        "layer_types": ["conv", "full_attention"],
        "full_attn_idxs": ...,
    },
    "Llama4ForCausalLM": _LLAMA4,
    "Llama4ForConditionalGeneration": {"text_config": _LLAMA4},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "LongcatFlashForCausalLM": {
        "expert_ffn_hidden_size": 96,
        "zero_expert_num": 0,  # transformers writes weights of theirs, which no checkpoint has
        "zero_expert_type": "identity",
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 32, "n_groups": 2},
    "NemotronHForCausalLM": {
        "layer_types": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_hidden_layers": ...,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 96,
    },
    "MiniMaxM2ForCausalLM": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
    # vLLM takes four times the hidden size, and a key for each query.
    "PhiForCausalLM": {"intermediate_size": 512, "num_key_value_heads": 4},
    "CohereCompassForConditionalGeneration": {
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": _ROPE_3D["rope_parameters"],
                "full_attention": None,
            },
        }
    },
    "Cosmos3EdgeForConditionalGeneration": {"text_config": _ROPE_MIXED},
    "Ernie4_5_VLMoeForConditionalGeneration": {"text_config": {"moe_intermediate_size": [96, 48]}},
    "Gemma3ForConditionalGeneration": {"mm_tokens_per_image": 4, "vision_config": _HEADLESS},
    "InternVLForConditionalGeneration": {"image_seq_length": 4},
    "LlavaOnevisionForConditionalGeneration": {"vision_config": _HEADLESS},
    "PaliGemmaForConditionalGeneration": {"vision_config": _HEADLESS},
    "LlavaForConditionalGeneration": {"image_seq_length": 16},
    "Qwen2VLForConditionalGeneration": {
        "text_config": _ROPE_3D,
        "vision_config": {"hidden_size": 128},  # of what it gives to the language model
    },
    "Qwen2_5_VLForConditionalGeneration": {"text_config": _ROPE_3D},
    # transformers never ties its head, vLLM where this says so, as it does by default.
    "Qwen2_5OmniForConditionalGeneration": {
        "thinker_config": {"text_config": {"tie_word_embeddings": False}}
    },
    "Qwen3VLForConditionalGeneration": {"text_config": _ROPE_MIXED},
    # Checkpoints have it, transformers' class does not.
    "Qwen3VLMoeForConditionalGeneration": {"text_config": {**_ROPE_MIXED, "norm_topk_prob": True}},
    "Glm4vForConditionalGeneration": {"text_config": _ROPE_3D},
    "Glm4vMoeForConditionalGeneration": {"text_config": _ROPE_3D},
    "Glm5NextForConditionalGeneration": {"text_config": {"num_key_value_heads": 4}},
    "GlmOcrForConditionalGeneration": {"text_config": _ROPE_3D},
    "Qwen3NextForCausalLM": _LINEAR,
    "Qwen3_5ForCausalLM": _LINEAR_3D,
    "Qwen3_5MoeForCausalLM": _LINEAR_3D,
    "Qwen3_5ForConditionalGeneration": {"text_config": _LINEAR_3D},
    "Qwen3_5MoeForConditionalGeneration": {"text_config": _LINEAR_3D},
    "Zamba2ForCausalLM": {
        "layer_types": ["linear_attention", "hybrid"],
        "hybrid_layer_ids": [1],
        "attention_hidden_size": 256,
        "attention_head_dim": 64,
        "n_mamba_heads": 4,
        "mamba_headdim": 64,
        "num_key_value_heads": 4,
        "kv_channels": 32,
        "adapter_rank": 8,
    },
}

# Not policies that a text is generated by, or nothing that a random model could be made of here.
LEFT_OUT: dict[str, str] = {}


def config_class(architecture: str) -> Any:
    """Return the configuration's class of an architecture, or None: transformers lacks it."""
    import transformers

    try:
        return getattr(getattr(transformers, architecture), "config_class", None)
    except (AttributeError, ImportError):
        return None


def architectures() -> list[str]:
    """Return those of vLLM's registry that transformers can build."""
    from vllm.model_executor.models import registry

    known = [*registry._TEXT_GENERATION_MODELS, *registry._MULTIMODAL_MODELS]
    return [name for name in known if config_class(name) is not None]


def small_config(architecture: str, sizes: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Return a configuration of that architecture whose model has well under 10 MB.

    Args:
        sizes: in place of those of `SMALL`. With twice as many layers, the kinds of layers in
            `SPECIAL` are repeated.
    """
    kind = config_class(architecture)
    special = SPECIAL.get(architecture, {})
    times = sizes.get("num_hidden_layers", SMALL["num_hidden_layers"]) // SMALL["num_hidden_layers"]
    text = {**SMALL, **sizes}
    config = kind(**_small(kind, text, _repeated(special, times), text))
    config.architectures = [architecture]
    return config


def _repeated(special: Mapping[str, Any], times: int) -> dict[str, Any]:
    return {
        name: value * times
        if name in ("layer_types", "activation_sparsity_pattern") and isinstance(value, list)
        else _repeated(value, times)
        if isinstance(value, dict)
        else value
        for name, value in special.items()
    }


def _small(
    kind: Any, sizes: dict[str, Any], special: dict[str, Any], text: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments for a configuration of that class: `sizes` by the names that it has, its
    parts made small in the same way (language models by `text`), and what is special."""
    default = kind()
    names = {**vars(default), **dict.fromkeys(kind.attribute_map)}
    arguments = {name: size for name, size in sizes.items() if name in names}
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        own = getattr(default, name, None)
        if own is not None and not isinstance(own, dict):
            part = type(own)
        if not hasattr(part, "attribute_map") or part.__name__ == "AutoConfig":
            continue
        of_text = "text" in name or "thinker" in name or "talker" in name
        inner = _small(part, text if of_text else TOWER, special.get(name, {}), text)
        arguments[name] = part(**inner).to_dict()
    arguments |= token_ids(names)
    parts = getattr(kind, "sub_configs", None) or {}
    own = {name: value for name, value in special.items() if name not in parts}
    # `...` leaves an argument to the class.
    return {name: value for name, value in {**arguments, **own}.items() if value is not ...}


def random_model(architecture: str, seed: int) -> Any:
    """Return a float32 `PreTrainedModel`, no two of whose tensors are alike in two seeds."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(small_config(architecture)).float().eval()
    with torch.no_grad():  # transformers starts biases at zero and norms at one: tell seeds apart
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor), alpha=0.1 if tensor.dim() == 1 else 0.02)
    _name_as_published(model)
    return model


def _name_as_published(model: Any) -> None:
    """Have transformers write towers under the names that checkpoints have.

    It drops prefixes of towers when it loads, and puts them back only in what it has loaded.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    found = get_model_conversion_mapping(model, add_legacy=False)
    prefixes = [one for one in found if isinstance(one, PrefixChange)]
    others = [
        one
        for one in prefixes
        if one.prefix_to_remove != "vision_model" and one.prefix_to_add != "timm_model"
    ]
    if len(others) < len(prefixes):
        model._weight_conversions = [one for one in found if one not in others]
