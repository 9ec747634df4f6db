"""Sync a Hugging Face model to a vLLM server, without TRL.

    qerl-sync serve MODEL -- --dtype float32 --enforce-eager --max-model-len 64
    python examples/session_to_server.py MODEL http://127.0.0.1:8000

MODEL is a directory or a hub id. The trainer needs no vLLM.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM

from qerl_sync import HFSource, RemoteTransport, SyncConfig, SyncSession
from qerl_sync.engines.http import HTTPClient
from qerl_sync.sources.hf import probe_of


@torch.no_grad()
def train(model: torch.nn.Module) -> None:
    """A step of training would stand here."""
    for parameter in model.parameters():
        parameter.mul_(1 + 0.1 * torch.rand_like(parameter))


def main(path: str, url: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")

    transport = RemoteTransport(HTTPClient(url))  # or LLMClient(llm), AsyncLLMClient(...)
    # verify="full" asks the engine a prompt after each sync and compares with the trainer's model.
    config = SyncConfig(policy="reorder", verify="full")
    with SyncSession(HFSource(model), transport, config, probe=probe_of(model)) as session:
        for step in range(1, 4):
            train(model)
            report = session.push(step=step)
            print(f"version {report.version}: exact {report.prediction_exact}, {report.transport}")

    print(f"largest difference of log-probabilities: {report.probe_gap:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
