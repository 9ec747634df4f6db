"""What a sync of very many small tensors takes, beside vLLM's own load and beside few large ones.

    scripts/bench benchmarks/test_many_tensors.py -s

In the engine's own process, about 1 GiB in bfloat16, with kernels that use parameters as they are:
a mixture of 128 experts in 170 layers, which arrive one by one, 65,000 tensors and more; and a
dense model of 300. Both sync in turns in one run.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from pathlib import Path

import pytest
from support.engines import kernels_in_use, start_engine
from support.models import random_model, save_model
from transformers import Qwen3Config, Qwen3MoeConfig

from qerl_sync import HFSource, InProcessTransport, SyncConfig, SyncSession
from qerl_sync.worker.compat import engine as compat

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROUNDS = 3
COMMON = {"vocab_size": 1024, "head_dim": 32, "max_position_embeddings": 64}
MANY = Qwen3MoeConfig(
    **COMMON,
    hidden_size=128,
    intermediate_size=64,
    moe_intermediate_size=64,
    num_hidden_layers=170,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=128,
    num_experts_per_tok=2,
)
FEW = Qwen3Config(
    **COMMON,
    hidden_size=1280,
    intermediate_size=4096,
    num_hidden_layers=27,
    num_attention_heads=40,
    num_key_value_heads=8,
)


def test_very_many_tensors(tmp_path: Path) -> None:
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    sizes, runs = {}, {}
    with kernels_in_use("plain"):
        for name, shape in {"many": MANY, "few": FEW}.items():
            model = random_model(shape, 0, "bfloat16")
            engine = start_engine(save_model(model, tmp_path / name), dtype="bfloat16")
            parts = compat.in_process_parts(engine)
            source = HFSource(model)
            session = SyncSession(source, InProcessTransport(engine), SyncConfig())
            session.push()
            names = [meta.name for meta in source.metadata()]
            sizes[name] = (len(names), sum(meta.nbytes for meta in source.metadata()))
            tensors = list(source.materialize(names))
            runs[name] = (session, parts, tensors)
        for _ in range(ROUNDS):
            for name, (session, parts, tensors) in runs.items():
                seconds[f"{name}, sync"].append(session.push().seconds["total"])
                with compat.loading_context(parts.vllm_config):
                    started = time.perf_counter()
                    parts.model.load_weights(iter(tensors))  # type: ignore[operator]
                    seconds[f"{name}, vLLM's load_weights"].append(time.perf_counter() - started)
                    started = time.perf_counter()
                    compat.begin_reload(parts.model)
                    parts.model.load_weights(iter(tensors))  # type: ignore[operator]
                    compat.finish_reload(parts.model, parts.vllm_config)
                    seconds[f"{name}, vLLM's reload"].append(time.perf_counter() - started)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    for name, (count, nbytes) in sizes.items():
        print(f"\n{name}: {count:,} tensors, {nbytes / 1e6:,.0f} MB", end="")
    for name, found in medians.items():
        print(f"\n{name:28}{found * 1e3:8.0f} ms", end="")
    many, few = sizes["many"][0], sizes["few"][0]
    assert many >= 65_000
    assert few <= 320
    own, few_own = (medians[f"{name}, vLLM's reload"] for name in ("many", "few"))
    print(f"\nmany / few, sync: {medians['many, sync'] / medians['few, sync']:.1f}", end="")
    print(f"; vLLM's reload: {own / few_own:.1f}", end="")
    print(f"\nmany, sync / vLLM's reload: {medians['many, sync'] / own:.2f}")
    # vLLM's own processing of CPU experts is layerwise. Holds on a busy machine, too.
    assert medians["many, sync"] / own < 1.0
