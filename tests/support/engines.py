"""Real vLLM engines in this process, started once and kept for the whole test session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

PROMPTS = [[1, 2, 3, last] for last in range(4)]

# An engine that is collected tears down the process groups of all others.
_KEPT: list[Any] = []


def start_engine(path: Path, **arguments: Any) -> Any:
    from vllm import LLM

    defaults: dict[str, Any] = {
        "model": str(path),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 64,
        "max_num_seqs": 8,
        "dtype": "float32",
        "disable_log_stats": True,
    }
    engine = LLM(**{**defaults, **arguments})
    _KEPT.append(engine)
    return engine


def model_of(engine: Any) -> torch.nn.Module:
    from qerl_sync.worker import compat

    return compat.in_process_parts(engine).model


def generate(engine: Any, prompts: list[list[int]] = PROMPTS, max_tokens: int = 12) -> Any:
    """Greedy tokens and their logprobs for each prompt."""
    from vllm import SamplingParams

    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False, logprobs=0),
        use_tqdm=False,
    )
    return [
        (
            list(output.outputs[0].token_ids),
            [next(iter(step.values())).logprob for step in output.outputs[0].logprobs],
        )
        for output in outputs
    ]


def logprob_gap(engine: Any, trainer_model: Any) -> float:
    """Largest difference between the engine's and the trainer's logprobs of greedy tokens."""
    gap = 0.0
    for prompt, (tokens, logprobs) in zip(PROMPTS, generate(engine), strict=True):
        ids = torch.tensor([prompt + tokens])
        with torch.no_grad():
            logits = trainer_model(ids).logits[0].log_softmax(-1)
        for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            gap = max(gap, abs(logits[len(prompt) + i - 1, token].item() - logprob))
    return gap
