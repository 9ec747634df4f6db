"""A GRPO run with TRL on the card: whether it learns, what its syncs take, and how far engine and
trainer part in bfloat16, beside an engine that was started from the same weights."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu import common, report

CONFIG = common.ROOT / "configs" / "gpu" / "grpo_qwen3_gpu.yaml"
# The same run without a GPU: no bfloat16, few steps of a small model.
ON_CPU = (
    "model.tiny.config.hidden_size=64",
    "model.tiny.config.intermediate_size=128",
    "model.tiny.config.num_hidden_layers=2",
    "model.tiny.config.num_attention_heads=4",
    "model.tiny.config.num_key_value_heads=2",
    "model.tiny.config.head_dim=32",
    "warmup.trainer.max_steps=4",
    "warmup.trainer.use_cpu=true",
    "warmup.trainer.bf16=false",
    "trainer.max_steps=4",
    "trainer.use_cpu=true",
    "trainer.bf16=false",
    "threads=1",
)
PROMPTS = 64


def train() -> dict[str, Any]:
    """Run `qerl-sync train`, then hold an engine that starts from its weights against them."""
    common.prepare()
    with tempfile.TemporaryDirectory(prefix="qerl-sync-grpo-") as directory:
        out = Path(directory, "run")
        command = [sys.executable, "-m", "qerl_sync.cli", "train", str(CONFIG)]
        command += [] if common.device() == "cuda" else ON_CPU
        subprocess.run([*command, "--output-dir", str(out), "--debug"], check=True)
        summary = json.loads((out / "summary.json").read_text())
        facts = {**common.facts(), **summary, "passed": summary["prediction_exact"]}
        report.keep(facts)
        (trained,) = {
            path.parent for path in out.rglob("config.json") if path.parent.name == "trained"
        }
        facts["fresh_engine_gap_max"] = fresh_engine_gap(trained)
    return facts


def fresh_engine_gap(path: Path) -> float:
    """Return the largest difference of a sampled token's log-probability between an engine that
    loaded this checkpoint and the model in transformers, computed as the trainer does."""
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(common.device())
    engine = LLM(str(path), **common.engine_arguments("eager", max_model_len=16))
    size = model.config.vocab_size
    prompts = [[3 + (i * 7 + k * 5) % (size - 3) for k in range(4)] for i in range(PROMPTS)]
    answers = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=1.0, max_tokens=2, detokenize=False, logprobs=0, seed=0),
        use_tqdm=False,
    )
    gap = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        completion = answer.outputs[0]
        ids = torch.tensor([prompt + list(completion.token_ids)], device=common.device())
        with torch.no_grad(), torch.autocast(common.device(), dtype=torch.bfloat16):
            right = model(input_ids=ids).logits[0].float().log_softmax(-1)
        for place, step in enumerate(completion.logprobs):
            token = completion.token_ids[place]
            own = float(right[len(prompt) + place - 1, token])
            gap = max(gap, abs(own - step[token].logprob))
    return gap


CASES: dict[str, Callable[[], dict[str, Any]]] = {"grpo": train}
COST: dict[str, tuple[float, float]] = {"grpo": (30.0, 120.0)}
