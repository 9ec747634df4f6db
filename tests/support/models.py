"""Tiny models with real architectures and random weights, one for each kind of trouble."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf

_COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}

CONFIGS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    # Experts need a process group of their own, which vLLM makes with the first engine of a
    # process: keep MoE kinds first.
    "moe": lambda: tf.Qwen3MoeConfig(**_COMMON, **_MOE, num_experts=4, mlp_only_layers=[]),
    "moe_renamed": lambda: tf.MixtralConfig(**_COMMON, num_local_experts=4),
    "dense": lambda: tf.Qwen3Config(**_COMMON),
    "bias": lambda: tf.Qwen2Config(**{**_COMMON, "hidden_size": 128}),
    "tied": lambda: tf.Qwen3Config(**{**_COMMON, "tie_word_embeddings": True}),
    "padded": lambda: tf.Qwen3Config(**{**_COMMON, "vocab_size": 199}),
}


def make_model(kind: str, seed: int) -> tf.PreTrainedModel:
    """An fp32 model on CPU; its weights are a function of the seed."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32).eval()
    with torch.no_grad():  # transformers starts biases at zero and norms at one: tell seeds apart
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def save_model(model: tf.PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory
