"""A program for two ranks, each with a vLLM engine: syncs of a model that both hold in shards."""

from __future__ import annotations

import support.environment  # noqa: F401  isort:skip  first: it sets what vLLM reads when imported

import gc
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qerl_sync import (
    HFSource,
    InProcessTransport,
    LLMClient,
    RemoteTransport,
    SyncConfig,
    SyncSession,
    noise_of,
)
from qerl_sync.sources.sharded import ShardedSource
from qerl_sync.transports.joint import JointTransport, LedTransport, TrainerRanks
from support.engines import NEW, OLD, generate, model_of, start_engine
from support.fingerprint import difference, fingerprint
from support.models import CONFIGS, make_model, save_model
from support.ranks import report
from support.sharding import fsdp2

CHUNK_BYTES = 1 << 16


def same_stream(kind: str) -> bool:
    """Gathered, in any order, it is what one process yields: names, shapes, bits, memory."""
    whole, source = HFSource(make_model(kind, NEW)), ShardedSource(fsdp2(make_model(kind, NEW)))
    metas = whole.metadata()
    assert source.metadata() == metas, kind
    names = [meta.name for meta in reversed(metas)]
    expected = dict(whole.materialize(names))
    gathered = dict(source.materialize(names))
    assert {n: s.nbytes for n, s in source.storages().items()} == {
        n: t.untyped_storage().nbytes() for n, t in gathered.items()
    }, kind
    return list(gathered) == names and all(torch.equal(gathered[n], expected[n]) for n in names)


class Alive:
    """Counts the bytes of whole tensors that a source has gathered and that are still alive."""

    def __init__(self, source: ShardedSource) -> None:
        self.now = self.peak = self.seen = 0
        self._known: set[int] = set()
        gather = source._value

        def counted(name: str) -> torch.Tensor:
            whole = gather(name)
            storage = whole.untyped_storage()
            self.now, self.seen = self.now + storage.nbytes(), self.seen + 1
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, storage.nbytes())
            return whole

        source._value = counted  # type: ignore[method-assign]

    def _freed(self, nbytes: int) -> None:
        self.now -= nbytes


def main(directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = TrainerRanks(60.0)
    said: dict[str, Any] = {"streams": {kind: same_stream(kind) for kind in CONFIGS}}

    trainers = {seed: make_model("moe", seed) for seed in (OLD, NEW)}
    paths = {seed: Path(directory) / str(seed) for seed in trainers}
    for seed, path in paths.items():
        save_model(trainers[seed], path)  # transformers has rank 0 write it, and no other
    dist.barrier()
    engines = {
        seed: start_engine(path, distributed_executor_backend="external_launcher")
        for seed, path in paths.items()
    }
    engine, fresh = engines[OLD], engines[NEW]
    right, wanted = fingerprint(model_of(fresh)), generate(fresh)
    config = SyncConfig.of(chunk_bytes=CHUNK_BYTES, verify="checksum")

    def outcome(transport: Any, model: Any, mine: bool) -> dict[str, Any]:
        before = difference(fingerprint(model_of(engine)), right)
        source = ShardedSource(model)
        alive = Alive(source)
        with SyncSession(source, transport, config) as session:
            result = session.push(step=1)
            plan = session.plan
        gc.collect()
        return {
            "different before": len(before),
            "different after": len(difference(fingerprint(model_of(engine)), right)),
            "generates": generate(engine) == wanted,
            "version": result.version,
            "exact": result.prediction_exact,
            "chunks": result.num_chunks,
            "digest": plan.digest,
            "largest chunk": max(chunk.nbytes for chunk in plan.chunks),
            "peak": alive.peak,
            "left": alive.now,
            "gathers": alive.seen,
            "mine": mine,
        }

    def reset() -> None:
        source, transport = HFSource(trainers[OLD]), InProcessTransport(engine)
        with SyncSession(source, transport, SyncConfig()) as session:
            session.push()

    model = fsdp2(make_model("moe", NEW))
    said["joint"] = outcome(JointTransport(InProcessTransport(engine), ranks), model, True)
    reset()
    # Forward passes leave the root gathered; what the optimizer steps are the shards.
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    leads = ranks.rank == 0
    for carrier in ("shm", "tcp"):
        own = RemoteTransport(LLMClient(engine), transport=carrier) if leads else None
        said[carrier] = outcome(LedTransport(own, ranks), model, leads)
        reset()
    noise = {"preset": "section-4.1", "intervals": 2, "steps": 2, "seed": 7}
    noisy = SyncConfig.of(chunk_bytes=CHUNK_BYTES, noise=noise)
    joint = JointTransport(InProcessTransport(engine), ranks)
    with SyncSession(ShardedSource(model), joint, noisy) as session:
        drawn = noise_of(session.push(step=1))
    clean = dict(trainers[NEW].named_parameters())
    held = dict(model_of(engine).named_parameters())
    said["noise"] = {
        "names": len(drawn),
        "held": all(torch.equal(held[name], clean[name] + drawn[name]) for name in drawn),
        "different": len(difference(fingerprint(model_of(engine)), right)),
        "sum": sum(float(each.double().sum()) for each in drawn.values()),
    }
    reset()
    # DDP leaves parameters whole: every rank has what the others have.
    ddp = torch.nn.parallel.DistributedDataParallel(make_model("moe", NEW)).module
    said["ddp"] = outcome(JointTransport(InProcessTransport(engine), ranks), ddp, True)
    report(directory, **said)
    os._exit(0)  # vLLM's engines share process groups, and tear down each other's


if __name__ == "__main__":
    main(*sys.argv[1:])
