"""Reload a tiny model's weights in a stock vLLM on a CPU; compare with an engine that was started
from the same weights. Needs vLLM's CPU build, torch and transformers; nothing of this project.

    python docs/upstream/reload.py tied|moe|sinks|missing
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import transformers
import vllm
from safetensors.torch import load_file, save_file

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}


def save(case: str, seed: int, folder: Path) -> Path:
    experts = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
    if case == "moe":
        experts |= {"num_experts": 4, "moe_intermediate_size": 96}
        config = transformers.Qwen3MoeConfig(**SIZES, **experts)
    elif case == "sinks":
        config = transformers.GptOssConfig(**SIZES, **experts, num_local_experts=4)
    else:
        config = transformers.Qwen3Config(**SIZES, tie_word_embeddings=case == "tied")
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # transformers starts sinks and biases at zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    return folder


def logprobs(llm: vllm.LLM) -> list[float]:
    """The log-probabilities of one fixed continuation, without the prefix cache."""
    llm.reset_prefix_cache()
    prompt = {"prompt_token_ids": [1, 2, 3, 4, 5, 6, 7, 8]}
    sampling = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (answer,) = llm.generate([prompt], sampling, use_tqdm=False)
    return [next(iter(step.values())).logprob for step in answer.prompt_logprobs[1:]]


def gap(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def main(case: str) -> None:
    scratch = Path(tempfile.mkdtemp())
    old, new = (save(case, seed, scratch / str(seed)) for seed in (0, 1))
    common = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 64,
        "dtype": "float32",
        "num_gpu_blocks_override": 64,
    }
    reloaded = vllm.LLM(str(old), **common)
    fresh = vllm.LLM(str(new), **common)
    before, right = logprobs(reloaded), logprobs(fresh)
    if case == "missing":
        tensors = load_file(new / "model.safetensors")
        del tensors["model.layers.1.mlp.down_proj.weight"]
        save_file(tensors, new / "model.safetensors", {"format": "pt"})
    reloaded.collective_rpc("reload_weights", kwargs={"weights_path": str(new)})
    after = logprobs(reloaded)
    print(f"vLLM {vllm.__version__}, torch {torch.__version__}, {case}: no exception")
    print(f"  largest gap of log-probabilities to the fresh engine: {gap(after, right):.6f}")
    print(f"  (old weights to new weights: {gap(before, right):.6f})")


if __name__ == "__main__":
    main(sys.argv[1])
