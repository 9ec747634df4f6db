"""A program for two ranks, each with one of the two tensor parallel workers of the same engines.

Argument: a directory. `weights` holds the workers against those of freshly loaded engines, `lora`
has adapters, `failures` a rank that fails.
"""

from __future__ import annotations

import support.environment  # noqa: F401  isort:skip  first: it sets what vLLM reads when imported

import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qerl_sync import HFSource, InProcessTransport, SyncConfig, SyncSession
from qerl_sync.errors import PoisonedError, SyncError
from qerl_sync.sources.hf import probe_of
from qerl_sync.sources.sharded import ShardedSource
from qerl_sync.transports.joint import JointTransport, TrainerRanks
from support.engines import NEW, OLD, generate, logprob_gap, model_of, start_engine
from support.fingerprint import difference, fingerprint
from support.models import CONFIGS, make_model, random_model, save_model
from support.rank_adapters import pushes
from support.ranks import report
from support.sharding import fsdp2

TIMEOUT_SECONDS = 20.0
SMALL = {"chunk_bytes": "16KiB", "verify": "checksum", "timeout_seconds": TIMEOUT_SECONDS}
# With expert parallelism each rank has other experts, and so another layer map. vLLM 0.31 loads
# them on a CPU and ends with SIGSEGV when it generates (`cpu_fused_moe`): weights alone are judged.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "moe": ("moe", {}, {}),
    "experts": ("moe", {}, {"enable_expert_parallel": True}),
    "padded": ("padded", {}, {}),
    "few words": ("padded", {"vocab_size": 40}, {}),  # rank 1 has none of them
}


def shared_engine(path: Path, **arguments: Any) -> Any:
    return start_engine(
        path,
        tensor_parallel_size=2,
        distributed_executor_backend="external_launcher",
        **arguments,
    )


def weights(directory: Path, ranks: TrainerRanks, name: str) -> dict[str, Any]:
    """Sync the new weights of a sharded model, then the old ones of a whole one (as DDP has it)."""
    kind, changes, arguments = VARIANTS[name]
    config = CONFIGS[kind]()
    config.update(changes)
    trainers = {seed: random_model(config, seed) for seed in (OLD, NEW)}
    paths = {seed: directory / f"{name}-{seed}" for seed in trainers}
    for seed, path in paths.items():
        save_model(trainers[seed], path)  # transformers has rank 0 write it, and no other
    dist.barrier()
    engines = {seed: shared_engine(path, **arguments) for seed, path in paths.items()}
    KEPT.extend(engines.values())
    right = {seed: fingerprint(model_of(engine)) for seed, engine in engines.items()}
    generates = name != "experts"
    wanted = {seed: generate(one) if generates else None for seed, one in engines.items()}
    engine = engines[OLD]
    ways = {NEW: ShardedSource(fsdp2(random_model(config, NEW))), OLD: HFSource(trainers[OLD])}
    said: dict[str, Any] = {}
    for seed, source in ways.items():
        before = difference(fingerprint(model_of(engine)), right[seed])
        own = InProcessTransport(engine)
        options = SyncConfig.of(**SMALL)
        with SyncSession(source, JointTransport(own, ranks), options) as session:
            result = session.push(step=1)
            digest = session.plan.digest
        said[type(source).__name__] = {
            "different before": len(before),
            "different after": len(difference(fingerprint(model_of(engine)), right[seed])),
            "generates": not generates or generate(engine) == wanted[seed],
            "gap": logprob_gap(engine, trainers[seed]) if generates else 0.0,
            "exact": result.prediction_exact,
            "difference": result.first_difference,
            "digest": digest,
            "map": own.layer_map(session._metas).digest,
            "version": result.version,
        }
    return said


class Failing(InProcessTransport):
    """Fails on rank 1 at the place `at`."""

    at = ""

    def _fail(self, here: str) -> None:
        if self.at == here and dist.get_rank() == 1:
            raise KeyError("a rank that the test makes fail")

    def send(self, chunk: Any, tensors: Any) -> None:
        super().send(chunk, tensors)
        self._fail("send")

    def finish(self) -> Any:
        self._fail("finish")
        return super().finish()

    def answer(self, logprobs: Any, tokens: Any) -> Any:
        self._fail("probe")
        return logprobs(tokens)


def refuses(engine: Any) -> bool:
    """Both workers do before they compute: one alone would wait for the other without end."""
    try:
        generate(engine)
    except PoisonedError:
        return True
    except Exception as exc:
        return "does not generate" in str(exc)
    return False


def failures(directory: Path, ranks: TrainerRanks) -> dict[str, Any]:
    trainers = {seed: make_model("dense", seed) for seed in (OLD, NEW)}
    path = save_model(trainers[OLD], directory / "failures")
    dist.barrier()
    engine = shared_engine(path)
    KEPT.append(engine)
    said: dict[str, Any] = {}
    for at, on_failure in (("send", "poison"), ("finish", "rollback"), ("probe", "poison")):
        own = Failing(engine)
        source = HFSource(trainers[NEW])  # a gather that fails would end the training
        right = probe_of(trainers[NEW])
        probe = replace(right, logprobs=partial(own.answer, right.logprobs))
        config = SyncConfig.of(**{**SMALL, "verify": "full"}, on_failure=on_failure)
        with SyncSession(source, JointTransport(own, ranks), config, probe=probe) as session:
            own.at, began = at, time.monotonic()
            one = said[at] = {}
            try:
                session.push(1)
            except SyncError as exc:
                one["error"] = type(exc).__name__, getattr(exc, "rank", None)
            one["seconds"] = time.monotonic() - began
            one["refuses"] = refuses(engine)
            own.at = ""
            one["probe gap"] = session.push(2).probe_gap
            one["gap after"] = logprob_gap(engine, trainers[NEW])
    return said


def lora(directory: Path, ranks: TrainerRanks) -> dict[str, Any]:
    # Other base weights than the policies'.
    path = save_model(make_model("dense", 1), directory / "base")
    dist.barrier()
    engine = shared_engine(path, enable_lora=True, max_lora_rank=8)
    KEPT.append(engine)
    return {
        "adapter": pushes(engine, ranks, SyncConfig.of(**SMALL), "joint", 10),
        "merge": pushes(engine, ranks, SyncConfig.of(**SMALL, lora="merge"), "joint", 30),
    }


# An engine that is collected tears down the process groups of all others.
KEPT: list[Any] = []


def main(directory: str, *names: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = TrainerRanks(TIMEOUT_SECONDS)
    for name in names or [*VARIANTS, "lora", "failures"]:
        began = time.monotonic()
        if name in VARIANTS:
            said = weights(Path(directory), ranks, name)
        else:
            said = {"lora": lora, "failures": failures}[name](Path(directory), ranks)
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
        report(directory, **{name: said})
    os._exit(0)  # vLLM's engines share process groups, and tear down each other's


if __name__ == "__main__":
    main(*sys.argv[1:])
