"""GRPO with TRL, the vLLM engine in a server.

    qerl-sync serve MODEL -- --dtype float32 --enforce-eager --max-model-len 64
    python examples/trl_server.py MODEL http://127.0.0.1:8000

MODEL is a directory or a hub id. Runs on GPUs, or on a CPU with vLLM's CPU build.
"""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from qerl_sync import WeightSyncCallback

DATA = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(5) for b in range(5)])


def share_of_digits(completions: list[str], **columns: object) -> list[float]:
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]


def main(model: str, url: str) -> None:
    args = GRPOConfig(
        output_dir="runs/trl_server",
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=url,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=16,
        max_steps=3,
        logging_steps=1,
        report_to="none",
    )

    callback = WeightSyncCallback(policy="reorder")
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=share_of_digits,
        args=args,
        train_dataset=DATA,
        callbacks=[callback],
    )
    trainer.train()

    last = callback.reports[-1]
    print(f"{len(callback.reports)} syncs, the prediction was exact: {last.prediction_exact}")
    callback.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
