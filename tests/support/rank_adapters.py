"""A program for two ranks, each with a vLLM engine: syncs of a PEFT model that both hold in shards.

Arguments: a directory for the base model and for what the ranks report.
"""

from __future__ import annotations

import support.environment  # noqa: F401  isort:skip  first: it sets what vLLM reads when imported

import copy
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qerl_sync import (
    AdapterSource,
    HFSource,
    InProcessTransport,
    LLMClient,
    PEFTSource,
    RemoteTransport,
    SyncConfig,
    SyncError,
    SyncSession,
)
from qerl_sync.build import make_session
from qerl_sync.sources.sharded import ShardedAdapterSource, ShardedPEFTSource
from qerl_sync.transports.joint import JointTransport, LedTransport, TrainerRanks
from support.adapters import make_policy, step
from support.engines import generate, logprob_gap, model_of, start_engine
from support.models import make_model, save_model
from support.ranks import report
from support.sharding import fsdp2

# By name: the kind of model, LoraConfig's fields, and whether vLLM serves it unmerged.
VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "plain": ("dense", {}, True),
    # With a rank of 1 the second of two processes holds nothing of the first factor.
    "patterns": ("dense", {"use_rslora": True, "rank_pattern": {"q_proj": 1}}, True),
    "trained beside": (
        "dense",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        True,
    ),
    "embeddings": ("dense", {"target_modules": ["q_proj", "embed_tokens"]}, True),
    "DoRA": ("dense", {"use_dora": True}, False),
    "experts": (
        "moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
        False,
    ),
}


def stream(source: Any) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """All that a source yields, gathered in three chunks; of each the rest after its first tensor
    is left to `end_chunk`, and then yielded in a second round."""
    metas, adapter = source.metadata(), source.adapter()
    names = [meta.name for meta in metas]
    names += [meta.name for meta in adapter.metas] if adapter is not None else []
    found: dict[str, torch.Tensor] = {}
    for begin in range(3):
        some = source.materialize(names[begin::3])
        next(some)
        some.close()
        source.end_chunk()
        found |= {n: t.clone() for n, t in source.materialize(names[begin::3])}
        source.end_chunk()
    return metas, adapter, found


def same_stream(name: str, sharded: Any, whole: Any) -> bool:
    kind, config, _ = VARIANTS[name]
    policies = [make_policy(kind, seed=1, **config) for _ in range(2)]
    frozen = {n: p.clone() for n, p in policies[0].named_parameters()}
    metas, adapter, expected = stream(whole(policies[1]))
    found = stream(sharded(fsdp2(policies[0])))
    return (
        (metas, adapter) == found[:2]
        and all(torch.equal(found[2][n], t) for n, t in expected.items())
        and all(torch.equal(p.full_tensor(), frozen[n]) for n, p in policies[0].named_parameters())
    )


@torch.no_grad()
def train(sharded: Any, whole: Any, seed: int) -> None:
    """Move the sharded policy to where the whole one is moved."""
    step(whole, seed)
    right = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        if parameter.requires_grad:
            part = torch.distributed.tensor.distribute_tensor(
                right[name].detach().clone(), parameter.device_mesh, parameter.placements
            )
            parameter.copy_(part)


def pushes(
    engine: Any, ranks: TrainerRanks, config: SyncConfig, carrier: str, seed: int
) -> list[Any]:
    """Three syncs of a sharded policy: how far the engine was off before and after each."""
    whole = make_policy(seed=seed)
    policy = fsdp2(copy.deepcopy(whole))
    if carrier == "joint":
        session = make_session(policy, config, llm=engine, ranks=ranks)
    else:
        own = RemoteTransport(LLMClient(engine), transport=carrier) if ranks.rank == 0 else None
        session = SyncSession(ShardedAdapterSource(policy), LedTransport(own, ranks), config)
    said = []
    with session:
        for number in (1, 2, 3):
            train(policy, whole, seed + number)
            before = logprob_gap(engine, whole)
            pushed = session.push(number)
            said.append(
                {
                    "before": before,
                    "gap": logprob_gap(engine, whole),
                    "sent": pushed.sent_bytes,
                    "lora": pushed.lora,
                    "exact": pushed.prediction_exact,
                }
            )
    return said


class Cut(InProcessTransport):
    """Fails on rank 1 in the middle of a chunk, once it is told to."""

    cut = False

    def send(self, chunk: Any, tensors: Any) -> None:
        if self.cut and dist.get_rank() == 1:
            next(iter(tensors))
            raise KeyError("a rank that the test makes fail")
        super().send(chunk, tensors)


def failures(engine: Any, ranks: TrainerRanks, config: SyncConfig) -> dict[str, Any]:
    whole = make_policy(seed=5)
    policy = fsdp2(copy.deepcopy(whole))
    own = Cut(engine)
    said: dict[str, Any] = {}
    with SyncSession(ShardedAdapterSource(policy), JointTransport(own, ranks), config) as session:
        session.push(1)
        before = generate(engine)
        train(policy, whole, 6)
        own.cut = True
        try:
            session.push(2)
        except SyncError as exc:
            said["error"] = type(exc).__name__, getattr(exc, "rank", None)
        said["old adapter"] = generate(engine) == before
        own.cut = False
        said["base again"] = bool((session.push(3).lora or {})["base"])
        said["gap after"] = logprob_gap(engine, whole)
        # The engine of one rank alone is told that its weights are lost, and then another writes
        # to it: all ranks send everything.
        if ranks.rank == 1:
            other = InProcessTransport(engine)
            SyncSession(HFSource(make_model("dense", 1)), other, SyncConfig()).push()
        said["lost on one"] = bool((session.push(4).lora or {})["base"])
        if ranks.rank == 0:
            with torch.no_grad():
                dict(model_of(engine).named_parameters())["model.norm.weight"].mul_(2)
        said["written on one"] = bool((session.push(5).lora or {})["base"])
        said["gap at last"] = logprob_gap(engine, whole)
    return said


def main(directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = TrainerRanks(60.0)
    said: dict[str, Any] = {
        "adapter streams": {
            name: same_stream(name, ShardedAdapterSource, AdapterSource)
            for name, (*_, served) in VARIANTS.items()
            if served
        },
        "merged streams": {
            name: same_stream(name, ShardedPEFTSource, PEFTSource) for name in VARIANTS
        },
    }
    # Other base weights than the policies'.
    path = save_model(make_model("dense", 1), Path(directory) / "base")
    dist.barrier()
    engine = start_engine(
        path,
        distributed_executor_backend="external_launcher",
        enable_lora=True,
        max_lora_rank=8,
    )
    small = {"chunk_bytes": "16KiB", "verify": "checksum"}
    # Other seeds each: an engine that stays behind must not have those weights from before.
    for seed, carrier in ((10, "joint"), (20, "shm")):
        said[carrier] = pushes(engine, ranks, SyncConfig.of(**small), carrier, seed)
    said["merge"] = pushes(engine, ranks, SyncConfig.of(**small, lora="merge"), "joint", 30)
    said["failures"] = failures(engine, ranks, SyncConfig.of(**small))
    report(directory, **said)
    os._exit(0)  # vLLM's engines share process groups, and tear down each other's


if __name__ == "__main__":
    main(*sys.argv[1:])
