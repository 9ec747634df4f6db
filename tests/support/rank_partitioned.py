"""A program for two ranks: a model that DeepSpeed's ZeRO-3 or torch's FSDP1 partitions, gathered.

Arguments: a directory, and `zero3` or `fsdp1`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist

from qerl_sync import AdapterSource, ConfigError, HFSource, PEFTSource
from qerl_sync.sources.sharded import ShardedAdapterSource, ShardedPEFTSource, ShardedSource
from qerl_sync.verify.changes import sample_hash
from support.adapters import make_policy
from support.models import make_model
from support.ranks import report
from support.sharding import FSDP1, partitioned


def parts_of(model: Any) -> list[torch.Tensor]:
    """The parameters of which this rank has a part."""
    sharded = [p for p in model.parameters() if hasattr(p, "_fsdp_flattened")]
    return sharded or [p for p in model.parameters() if p.ds_tensor.numel() < p.ds_numel]


def is_part(parameter: torch.Tensor) -> bool:
    return parameter.dim() == 1 if hasattr(parameter, "_fsdp_flattened") else not parameter.numel()


def gathered(source: Any, chunks: int = 3) -> dict[str, torch.Tensor]:
    """Everything, in chunks of which the receiver takes the first tensor only, and then all."""
    names = names_of(source)
    for half in (0, 1):
        found: dict[str, torch.Tensor] = {}
        for begin in range(chunks):
            stream = source.materialize(names[begin::chunks])
            found |= [next(stream)] if half == 0 else ((n, t.clone()) for n, t in stream)
            source.end_chunk()
    return found


def main(directory: str, by: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    said: dict[str, Any] = {}
    for kind, threshold in (("tied", 0), ("moe", 1000)):
        whole = HFSource(make_model(kind, 1))
        model = make_model(kind, 1)
        engine = FSDP1(model) if by == "fsdp1" else partitioned(model, threshold)
        source = ShardedSource(engine.module)
        expected = {m.name: t for m, (_, t) in zip(whole.metadata(), stream_of(whole), strict=True)}
        first = gathered(source)
        source.check_finite()
        tokens = torch.tensor([[1, 2, 3, 4]])
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
        second = gathered(source)
        parts = parts_of(engine.module)
        said[kind] = {
            "metas": source.metadata() == whole.metadata(),
            "equal": sum(torch.equal(first[n], expected[n]) for n in expected),
            "tensors": len(expected),
            "trained": sum(not torch.equal(first[n], second[n]) for n in expected),
            "fingerprints": [sample_hash(t) for t in second.values()],
            "partitioned": len(parts),
            "still": all(is_part(p) for p in parts if getattr(p, "ds_numel", 1e9) > threshold),
        }
    said["adapters"] = adapters(by)
    if by == "fsdp1":
        try:
            ShardedSource(FSDP1(make_model("tied", 1), original=False).module)
        except ConfigError as exc:
            said["without its own"] = exc.sharding
    report(directory, **said)
    os._exit(0)


def adapters(by: str) -> dict[str, bool]:
    """A PEFT model, partitioned: its adapter and its merged weights are those of the whole one."""
    options = {"r": 4, "modules_to_save": ["norm"]}
    policy = make_policy(seed=1, **options)
    engine = FSDP1(policy) if by == "fsdp1" else partitioned(policy, 0)
    whole = make_policy(seed=1, **options)
    told: dict[str, bool] = {}
    for sharded, plain in (
        (ShardedAdapterSource(engine.module), AdapterSource(whole)),
        (ShardedPEFTSource(engine.module), PEFTSource(whole)),
    ):
        metas, kind = sharded.metadata(), type(plain).__name__
        told[f"{kind}: metas"] = metas == plain.metadata() and sharded.adapter() == plain.adapter()
        found, stamps = gathered(sharded), sharded.unchanging()
        sharded.check_finite()
        told[f"{kind}: equal"] = all(torch.equal(found[n], t) for n, t in stream_of(plain))
        told[f"{kind}: base unchanged"] = bool(stamps) and sharded.unchanging() == stamps
    tokens = torch.tensor([[1, 2, 3, 4]])
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    told["base unchanged by a step"] = (sharded.metadata(), sharded.unchanging()) == (metas, stamps)
    after = gathered(sharded)
    told["trained"] = not torch.equal(after["model.norm.weight"], found["model.norm.weight"])
    return told


def names_of(source: Any) -> list[str]:
    adapter = (source.metadata(), source.adapter())[1]
    beside = [meta.name for meta in adapter.metas] if adapter is not None else []
    return [meta.name for meta in source.metadata()] + beside


def stream_of(source: HFSource) -> Any:
    return source.materialize(names_of(source))


if __name__ == "__main__":
    main(*sys.argv[1:])
