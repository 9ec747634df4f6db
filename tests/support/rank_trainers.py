"""A program for two ranks: TRL's own GRPOTrainer in both, its model sharded in `train()`.

Arguments: a directory with the policy, then `colocate`, or `server` and its address.
"""

from __future__ import annotations

import support.environment  # noqa: F401  isort:skip  first: it sets what vLLM reads when imported

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qerl_sync import SyncError, WeightSyncCallback
from qerl_sync.sources.hf import HFSource
from support.fingerprint import difference, fingerprint
from support.ranks import report
from support.trainers import ENGINE, build_trainer, gap


def shard_in_train(trainer: Any) -> None:
    """Have it sharded where accelerate would on a GPU: after the callback has attached, and before
    the optimizer takes the parameters. accelerate shards nothing on a CPU."""
    create_optimizer = trainer.create_optimizer

    def shard_and_create(*given: Any) -> Any:
        for layer in trainer.model.model.layers:
            fully_shard(layer)
        fully_shard(trainer.model)
        return create_optimizer(*given)

    trainer.create_optimizer = shard_and_create
    trainer.accelerator.prepare_model = lambda model, *given, **options: model  # no DDP around it


def whole_copy(model: Any, path: str) -> Any:
    """The trained model as one process would have it."""
    from transformers import AutoModelForCausalLM

    copy = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        own = dict(copy.named_parameters())
        for name, parameter in model.named_parameters():
            own[name].copy_(parameter.full_tensor())
    return copy


def main(directory: str, mode: str, url: str = "") -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    policy = str(Path(directory).parent / "policy")
    changes: dict[str, Any] = {"vllm_mode": mode, "max_steps": 2, "ddp_backend": "gloo"}
    if url:
        changes["vllm_server_base_url"] = url
    recorded: list[int] = []
    callback = WeightSyncCallback(
        engine=None if url else ENGINE,
        recorder=lambda report: recorded.append(report.version),
        timeout_seconds=60,
        chunk_bytes=1 << 16,
    )
    trainer = build_trainer(Path(policy), Path(directory) / f"run-{rank}", [callback], **changes)
    shard_in_train(trainer)
    trainer.train()
    said: dict[str, Any] = {
        "steps": [r.step for r in callback.reports],
        "versions": [r.version for r in callback.reports],
        "exact": all(r.prediction_exact for r in callback.reports),
        "recorded": list(recorded),
        "sharded": all(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "gap": gap(trainer.state.log_history),
        "logged": [e["sync/version"] for e in trainer.state.log_history if "sync/version" in e],
    }
    # Training has ended: the engine is behind. One process alone must not generate, all may.
    generation = trainer.vllm_generation
    engine = generation.llm if mode == "colocate" else getattr(generation, "vllm_client", None)
    if engine is not None:
        try:
            engine.generate([[5, 6]])
        except SyncError as exc:
            said["alone"] = type(exc).__name__
    generation.generate(prompts=[[5, 6]], images=None, num_generations=1)
    said["versions after"] = [r.version for r in callback.reports]
    copy = whole_copy(trainer.model, policy)
    if mode == "colocate":
        # What one process would have sent changes nothing.
        from qerl_sync import InProcessTransport, SyncConfig, SyncSession
        from qerl_sync.worker.compat import engine as compat

        model = compat.in_process_parts(generation.llm).model
        before = fingerprint(model)
        with SyncSession(HFSource(copy), InProcessTransport(generation.llm), SyncConfig()) as own:
            own.push()
        said["differs"] = difference(fingerprint(model), before)
    callback.close()
    report(directory, **said)
    dist.barrier()
    os._exit(0)  # vLLM's engines share process groups, and tear down each other's


if __name__ == "__main__":
    main(*sys.argv[1:])
