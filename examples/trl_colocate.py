"""GRPO with TRL, the vLLM engine in the trainer's process.

    python examples/trl_colocate.py MODEL

MODEL is a directory or a hub id. Runs on a GPU, or on a CPU with vLLM's CPU build.
"""

from __future__ import annotations

import os
import sys

# vLLM reads these when it is imported. The engine must be in this process. On a CPU vLLM would take
# nearly all of the memory for its cache (GiB) and bind the trainer's threads to cores.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from qerl_sync import WeightSyncCallback

DATA = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(5) for b in range(5)])


def share_of_digits(completions: list[str], **columns: object) -> list[float]:
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]


def main(model: str) -> None:
    args = GRPOConfig(
        output_dir="runs/trl_colocate",
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=64,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=16,
        max_steps=3,
        logging_steps=1,
        report_to="none",
    )

    # `engine`: vLLM's engine arguments that TRL does not pass on.
    callback = WeightSyncCallback(engine={"dtype": "float32", "enforce_eager": True})
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


if __name__ == "__main__":
    main(sys.argv[1])
