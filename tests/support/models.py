"""Tiny models with real architectures and random weights, one for each kind of trouble."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# No matrix that the MLP has is square, in any kind: transposed, it would have the same shape.
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
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 96, "num_experts": 4}


# Of benchmarks: Qwen3-0.6B's, with a smaller vocabulary. Arguments of Qwen3Config.
QWEN3_SHAPE = {
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
# The shape of Qwen3-1.7B, with the same small vocabulary: 1.44 billion parameters.
QWEN3_LARGER_SHAPE = {**QWEN3_SHAPE, "hidden_size": 2048, "intermediate_size": 6144}


def _kind(config_class: str, **arguments: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, config_class)(**{**_COMMON, **arguments})

    return make


CONFIGS: Mapping[str, Callable[[], Any]] = {
    # Experts need a process group of their own, which vLLM makes with the first engine of a
    # process: keep MoE kinds first.
    "moe": _kind("Qwen3MoeConfig", **_MOE, mlp_only_layers=[]),
    "moe_renamed": _kind("MixtralConfig", num_local_experts=4),
    # Its routers' corrections are buffers, which vLLM writes as they arrive.
    "moe_corrected": _kind(
        "Glm4MoeConfig",
        intermediate_size=192,
        moe_intermediate_size=96,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
    ),
    "dense": _kind("Qwen3Config"),
    "bias": _kind("Qwen2Config", hidden_size=128, intermediate_size=192),
    "tied": _kind("Qwen3Config", tie_word_embeddings=True),
    "padded": _kind("Qwen3Config", vocab_size=199),
}


def make_model(kind: str, seed: int) -> Any:
    """An fp32 `PreTrainedModel` on CPU; its weights are a function of the seed."""
    return random_model(CONFIGS[kind](), seed)


def random_model(config: Any, seed: int, dtype: str = "float32") -> Any:
    """Return a `PreTrainedModel` on CPU, no two of whose tensors are alike in two seeds."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, dtype)
    ).eval()
    with torch.no_grad():  # transformers starts biases at zero and norms at one: tell seeds apart
        saved = model.state_dict(keep_vars=True)
        for tensor in {id(tensor): tensor for tensor in saved.values()}.values():
            if tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return model


def save_model(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def checkpoint_tensors(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(directory / "model.safetensors"))
