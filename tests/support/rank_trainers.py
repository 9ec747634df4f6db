"""A program for two ranks: TRL's own GRPOTrainer in both.

Arguments: a directory with the policy, where the engine is, and how the model is held. The engine:
`colocate` (one in each process), `shared` (one, with a tensor parallel worker in each), or the
address of a server. The model: `fsdp1` and `fsdp2` (sharded in `train()`), `ddp`, `lora`, and
DeepSpeed's `zero2` and `zero3` (partitioned as it is loaded); `fsdp1 lora` and `zero3 lora`.
"""

from __future__ import annotations

import support.environment  # noqa: F401  isort:skip  first: it sets what vLLM reads when imported

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from qerl_sync import SyncError, WeightSyncCallback
from qerl_sync.sources.hf import HFSource
from qerl_sync.training.processes import sharding_on_cpus
from support.engines import logprob_gap
from support.fingerprint import difference, fingerprint
from support.ranks import report
from support.sharding import FSDP1, fsdp2
from support.trainers import ENGINE, build_trainer, gap, gap_now


def shard_in_train(trainer: Any, version: int) -> None:
    """Have it sharded where accelerate would on a GPU: after the callback has attached, and before
    the optimizer takes the parameters. accelerate shards nothing on a CPU."""
    create_optimizer = trainer.create_optimizer

    def shard_and_create(*given: Any) -> Any:
        if version == 1:  # as for accelerate's, the trainer's model is the wrapper from now on
            trainer.model = trainer.model_wrapped = FSDP1(trainer.model).module
        else:
            fsdp2(trainer.model)
        return create_optimizer(*given)

    trainer.create_optimizer = shard_and_create
    trainer.accelerator.prepare_model = lambda model, *given, **options: model  # no DDP around it


def whole_copy(model: Any, path: str) -> Any:
    """The trained model as one process would have it."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # which has every model partitioned that is loaded
    copy = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad(), gathered(model):
        own = dict(copy.named_parameters())
        for name, parameter in model.named_parameters():
            name = name.replace("_fsdp_wrapped_module.", "")
            sharded = isinstance(parameter, DTensor)
            own[name].copy_(parameter.full_tensor() if sharded else parameter)
    return copy


def gathered(model: Any) -> Any:
    if isinstance(model, FullyShardedDataParallel):
        return model.summon_full_params(model, writeback=False)
    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()))


def is_sharded(parameter: torch.Tensor) -> bool:
    emptied = hasattr(parameter, "ds_id") and not parameter.numel()
    return isinstance(parameter, DTensor) or emptied or hasattr(parameter, "_fsdp_flattened")


def main(directory: str, place: str, held: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    policy = str(Path(directory).parent / "policy")
    colocated = place in ("colocate", "shared")
    changes: dict[str, Any] = {"max_steps": 2, "ddp_backend": "gloo"}
    if place == "shared":
        changes["vllm_tensor_parallel_size"] = 2
    if not colocated:
        changes |= {"vllm_mode": "server", "vllm_server_base_url": place}
    if held.startswith("zero"):
        changes["built_in"] = sharding_on_cpus
        changes["deepspeed"] = {
            # No parameter stays whole.
            "zero_optimization": {"stage": int(held[4]), "stage3_param_persistence_threshold": 0},
            "train_micro_batch_size_per_gpu": "auto",
        }
    if held.endswith("lora"):
        from peft import LoraConfig

        changes |= {"learning_rate": 0.02, "max_steps": 4}
        changes["peft_config"] = LoraConfig(
            r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    recorded: list[int] = []
    callback = WeightSyncCallback(
        engine=ENGINE if colocated else None,
        recorder=lambda report: recorded.append(report.version),
        timeout_seconds=60,
        verify="full",
        chunk_bytes=1 << 16,
    )
    trainer = build_trainer(Path(policy), Path(directory) / f"run-{rank}", [callback], **changes)
    if held.startswith("fsdp"):
        shard_in_train(trainer, version=int(held[4]))
    trainer.train()
    said: dict[str, Any] = {
        "steps": [r.step for r in callback.reports],
        "versions": [r.version for r in callback.reports],
        "exact": all(r.prediction_exact for r in callback.reports),
        "recorded": list(recorded),
        "sharded": all(map(is_sharded, trainer.model.parameters())),
        "gap": gap(trainer.state.log_history),
        "logged": [e["sync/version"] for e in trainer.state.log_history if "sync/version" in e],
    }
    # Training has ended: the engine is behind. One process alone must not generate, all may.
    generation = trainer.vllm_generation
    engine = generation.llm if colocated else getattr(generation, "vllm_client", None)
    if engine is not None:
        try:
            engine.generate([[5, 6]])
        except SyncError as exc:
            said["alone"] = type(exc).__name__
    if colocated:
        said["gap before"] = gap_now(trainer)
    generation.generate(prompts=[[5, 6]], images=None, num_generations=1)
    said["versions after"] = [r.version for r in callback.reports]
    model = trainer.model
    copy = model if held.endswith("lora") else whole_copy(model, policy)
    if colocated:
        said["gap after"] = logprob_gap(generation.llm, copy)
    if colocated and not held.endswith("lora"):
        # What one process would have sent changes nothing.
        from qerl_sync import InProcessTransport, SyncConfig, SyncSession
        from qerl_sync.worker.compat import engine as compat

        served = compat.in_process_parts(generation.llm).model
        before = fingerprint(served)
        with SyncSession(HFSource(copy), InProcessTransport(generation.llm), SyncConfig()) as own:
            own.push()
        said["differs"] = difference(fingerprint(served), before)
    callback.close()
    report(directory, **said)
    dist.barrier()
    os._exit(0)  # vLLM's engines share process groups, and tear down each other's


if __name__ == "__main__":
    main(*sys.argv[1:])
