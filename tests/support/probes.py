"""Layer maps without an engine: many models in one process, as vLLM's imports are slow."""

from __future__ import annotations

import functools
import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qerl_sync
from qerl_sync.plan.checkpoint import Checkpoint
from qerl_sync.plan.offline_map import OfflineMap
from support.layer_maps import MODELS
from support.models import CONFIGS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PROGRAM = """
import pickle, sys
sys.path.append(sys.argv[1])
from qerl_sync.errors import SyncError
from qerl_sync.offline.program import observe

def answer(request):
    try:
        return observe(request)
    except SyncError as exc:
        return f"{type(exc).__name__}: {exc}"

answers = {kind: answer(request) for kind, request in pickle.load(sys.stdin.buffer).items()}
with open(sys.argv[2], "wb") as file:
    pickle.dump(answers, file)
"""

ENGINE = {"max_model_len": 64, "dtype": "float32"}
FP8 = {"max_model_len": 64, "dtype": "bfloat16", "quantization": "fp8_per_channel"}

_COMMON: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_HEADS = {**_COMMON, "head_dim": 32}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
_QWEN2_MOE = {**_COMMON, **_MOE, "num_experts": 4, "shared_expert_intermediate_size": 96}
_BIASED = {"attention_bias": True, "mlp_bias": True}


def _make(kind: str, **arguments: Any) -> Callable[[], PretrainedConfig]:
    def make() -> PretrainedConfig:
        import transformers  # which takes seconds, and most who import this file run nothing

        return getattr(transformers, kind)(**arguments)

    return make


# Architectures that vLLM stacks in different ways, in variants of biases, ties and dense layers.
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "gemma2": _make("Gemma2Config", **_HEADS),
    "gemma2, biased": _make("Gemma2Config", **_HEADS, attention_bias=True),
    "gemma3": _make("Gemma3TextConfig", **_HEADS),
    "gemma3, own head": _make("Gemma3TextConfig", **_HEADS, tie_word_embeddings=False),
    "llama": _make("LlamaConfig", **_COMMON),
    "llama, biased and tied": _make("LlamaConfig", **_HEADS, **_BIASED, tie_word_embeddings=True),
    "mistral": _make("MistralConfig", **_HEADS),
    "mixtral": _make("MixtralConfig", **_COMMON, num_local_experts=4),
    "qwen2": _make("Qwen2Config", **_COMMON),
    "qwen2, tied": _make("Qwen2Config", **_COMMON, tie_word_embeddings=True),
    "qwen2_moe": _make("Qwen2MoeConfig", **_QWEN2_MOE, mlp_only_layers=[0]),
    "qwen2_moe, every other layer": _make("Qwen2MoeConfig", **_QWEN2_MOE, decoder_sparse_step=2),
    "qwen3": _make("Qwen3Config", **_HEADS, tie_word_embeddings=True),
    "qwen3_moe": _make("Qwen3MoeConfig", **_HEADS, **_MOE, num_experts=4, mlp_only_layers=[1]),
}

_ALIBI = {"vocab_size": 199, "hidden_size": 64}

# Models whose constructors in vLLM read the values of tensors, with their numbers of tensors.
READING: dict[str, tuple[Callable[[], PretrainedConfig], int]] = {
    "alibi": (_make("BloomConfig", **_ALIBI, n_layer=2, n_head=4), 29),
    "alibi without biases": (
        _make(
            "FalconConfig",
            **_ALIBI,
            num_hidden_layers=2,
            num_attention_heads=4,
            alibi=True,
            bias=False,
        ),
        15,
    ),
    "activation with parameters": (_make("ApertusConfig", **_COMMON), 45),
}

# What vLLM would get wrong, by the first words of the refusal.
REFUSED = {
    "ignored bias": _make("Qwen3Config", **_HEADS, attention_bias=True),
    "bias that is not there": _make("Qwen2MoeConfig", **_QWEN2_MOE, qkv_bias=False),
}

# Loaders that write sinks and experts past vLLM's reload.
PAST_RELOAD = {
    "gpt_oss": _make("GptOssConfig", **_HEADS, num_local_experts=4, num_experts_per_tok=2),
}


def config_json(config: PretrainedConfig, dtype: str = "float32") -> dict[str, Any]:
    """What `save_pretrained` writes for a model of this configuration."""
    from transformers import AutoModelForCausalLM

    family = AutoModelForCausalLM._model_mapping[type(config)]
    config.architectures, config.dtype = [family.__name__], dtype
    return json.loads(config.to_json_string())


@functools.cache
def probed() -> dict[str, OfflineMap | str]:
    """All models of the tests, observed; of those that are refused, the error's type and text."""
    requests: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {
        **{f"live {kind}": (make(), ENGINE) for kind, make in CONFIGS.items()},
        "live dense, fp8": (CONFIGS["dense"](), FP8),
        "two ranks": (CONFIGS["moe"](), {**ENGINE, "tensor_parallel_size": 2}),
        "two ranks of experts": (
            CONFIGS["moe"](),
            {**ENGINE, "tensor_parallel_size": 2, "enable_expert_parallel": True},
        ),
        **{kind: (make(), ENGINE) for kind, make in {**FAMILIES, **REFUSED, **PAST_RELOAD}.items()},
        **{kind: (make(), ENGINE) for kind, (make, _) in READING.items()},
    }
    return observe_all(
        {
            **{
                kind: (config_json(config), engine, None)
                for kind, (config, engine) in requests.items()
            },
            "dense, sent in bfloat16": (config_json(CONFIGS["dense"]()), ENGINE, "bfloat16"),
            **{f"recorded {kind}": (config, {}, dtype) for kind, (config, dtype) in MODELS.items()},
        }
    )


def observe_all(
    requests: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]],
) -> dict[str, OfflineMap | str]:
    """Return the maps of configurations, each with engine arguments and the trainer's dtype."""
    payload = {}
    for kind, (config, engine, dtype) in requests.items():
        checkpoint = Checkpoint(Path(kind), config, shards=[], metas=None, names_by_offset=None)
        payload[kind] = {"checkpoint": checkpoint, "engine": engine, "dtype": dtype}
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "answers")
        root = str(Path(qerl_sync.__file__).parents[1])
        command = [sys.executable, "-c", PROGRAM, root, str(out)]
        subprocess.run(command, input=pickle.dumps(payload), check=True)
        return pickle.loads(out.read_bytes())
