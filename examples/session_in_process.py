"""Sync a Hugging Face model to a vLLM engine in the same process, without TRL.

    python examples/session_in_process.py MODEL

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
from transformers import AutoModelForCausalLM
from vllm import LLM

from qerl_sync import HFSource, InProcessTransport, SyncConfig, SyncSession
from qerl_sync.sources.hf import probe_of


@torch.no_grad()
def train(model: torch.nn.Module) -> None:
    """A step of training would stand here."""
    for parameter in model.parameters():
        parameter.mul_(1 + 0.1 * torch.rand_like(parameter))


def main(path: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    llm = LLM(path, dtype="float32", enforce_eager=True, max_model_len=64)

    transport = InProcessTransport(llm)
    # verify="full" asks the engine a prompt after each sync and compares with the trainer's model.
    config = SyncConfig(policy="reorder", verify="full")
    with SyncSession(HFSource(model), transport, config, probe=probe_of(model)) as session:
        for step in range(1, 4):
            train(model)
            report = session.push(step=step)
            print(f"version {report.version}: exact {report.prediction_exact}")

    print(f"largest difference of log-probabilities: {report.probe_gap:.1e}")


if __name__ == "__main__":
    main(sys.argv[1])
