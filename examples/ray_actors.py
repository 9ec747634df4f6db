"""Trainer and vLLM engines as Ray actors.

    python examples/ray_actors.py MODEL

MODEL is a directory or a hub id. Runs on a CPU with vLLM's CPU build; on GPUs give the actors some:
`options={"num_gpus": 1}`.
"""

from __future__ import annotations

import sys

import ray
import torch
from transformers import AutoModelForCausalLM

from qerl_sync import TrainerActor, WorkerPool


@ray.remote(num_cpus=0)
class Trainer(TrainerActor):
    def __init__(self, path, workers):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
        self.sync_to(workers, self.model, chunk_bytes="64MiB")

    @torch.no_grad()
    def train(self):
        """A step of training would stand here."""
        for parameter in self.model.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))

    def step(self, prompts):
        self.train()
        self.sync_weights()
        return self.workers.generate(prompts, {"max_tokens": 8})


def main(path: str) -> None:
    ray.init()  # or address="auto", or "ray://..."

    engine = {"model": path, "dtype": "float32", "enforce_eager": True, "max_model_len": 64}
    pool = WorkerPool.start(2, engine, options={"num_cpus": 1})

    trainer = Trainer.remote(path, pool)
    report = ray.get(trainer.sync_weights.remote())
    print(f"version {report.version}: exact {report.prediction_exact}, {report.transport}")
    for rollout in ray.get(trainer.step.remote([[1, 2, 3], [1, 2, 4]])):
        print(f"{rollout.worker}, version {rollout.version}: {rollout.completion_ids}")


if __name__ == "__main__":
    main(sys.argv[1])
