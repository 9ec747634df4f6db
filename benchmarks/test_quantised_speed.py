"""What syncs of an engine that quantises take, beside vLLM's own quantising from memory.

    scripts/bench benchmarks/test_quantised_speed.py -s

In the engine's own process, with weights that vLLM quantises to fp8: 28 layers of the shapes of
Qwen3-0.6B and Qwen3-1.7B, and a smaller vocabulary. All rows take turns in one run. A full sync has
vLLM quantise what arrives; the adapter (rank 8 on all linear layers), the RMSNorm weights that
train beside it and QeRL's noise on those go onto the base that stays as it is.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from support.adapters import make_policy, step
from support.engines import model_of, start_engine
from support.fingerprint import fingerprint
from support.models import QWEN3_LARGER_SHAPE, QWEN3_SHAPE, random_model, save_model
from transformers import Qwen3Config

from qerl_sync import AdapterSource, HFSource, InProcessTransport, SyncConfig, SyncSession
from qerl_sync.worker.compat import engine as compat

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROUNDS = 5
# Hold on a busy machine, too.
FULL_LIMIT, ADAPTER_LIMIT = 2.0, 0.2


@pytest.mark.parametrize("shape", [QWEN3_SHAPE, QWEN3_LARGER_SHAPE], ids=["0.5B", "1.4B"])
def test_what_a_quantised_engine_is_sent_costs_little(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    model = random_model(Qwen3Config(**shape), 0, "bfloat16")
    arguments = {"dtype": "bfloat16", "quantization": "fp8_per_channel", "enable_lora": True}
    engine = start_engine(save_model(model, tmp_path / "model"), **arguments, max_lora_rank=16)
    parts = compat.in_process_parts(engine)
    tensors = [(name, p.detach()) for name, p in model.named_parameters()]

    def quantise() -> None:
        with compat.loading_context(parts.vllm_config):
            compat.begin_reload(parts.model)
            parts.model.load_weights(iter(tensors))  # type: ignore[operator]
            compat.finish_reload(parts.model, parts.vllm_config)

    config = SyncConfig.of(on_unchanged="warn")
    full = SyncSession(HFSource(model), InProcessTransport(engine), config)
    policy = make_policy(base=copy.deepcopy(model), r=8)  # PEFT changes the model that it is given
    for name, parameter in policy.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.requires_grad_(True)
    noisy = SyncConfig.of(noise={"preset": "section-4.1"}, on_unchanged="warn")
    part = SyncSession(AdapterSource(policy), InProcessTransport(engine), noisy)
    part.begin_run(10 * ROUNDS)

    held = fingerprint(model_of(engine))
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for number in range(ROUNDS + 1):  # the first is not counted
        started = time.perf_counter()
        quantise()
        taken = time.perf_counter() - started
        everything = full.push(number)
        assert everything.quantisation["bits"]["8"] > 0
        if number == 0:
            assert fingerprint(model_of(engine)) == held
        part.push(2 * number)  # another session has synced: the base travels once more
        step(policy, number + 1)
        report = part.push(2 * number + 10)
        assert report.noise is not None
        if number:
            seconds["vLLM's quantising"].append(taken)
            seconds["full sync"].append(everything.seconds["total"])
            seconds["adapter, norms and noise"].append(report.seconds["total"])
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(f"\nfull: {everything.sent_bytes:,} bytes; adapter, norms, noise: {report.sent_bytes:,}")
    for name, found in medians.items():
        print(f"{name:28}{found * 1e3:8.1f} ms")
    ratio = medians["full sync"] / medians["vLLM's quantising"]
    share = medians["adapter, norms and noise"] / medians["full sync"]
    print(f"full / vLLM's quantising: {ratio:.2f}; adapter, norms and noise / full: {share:.1%}")
    print("by phase, ms:", {phase: round(s * 1e3, 1) for phase, s in report.seconds.items()})
    assert ratio <= FULL_LIMIT
    assert share <= ADAPTER_LIMIT
