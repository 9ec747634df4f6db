"""What a sync of an adapter sends and takes, beside a sync of the same model's merged weights.

    scripts/bench benchmarks/test_lora_speed.py -s

In the engine's own process, in bf16, with a rank of 8 on all linear layers: 28 layers of the shape
of Qwen3-0.6B, and a smaller vocabulary. An adapter's cost goes by its layers and its bytes, and a
full sync's by the model's: the larger the model, the smaller the share.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from support.adapters import make_policy, step
from support.engines import start_engine
from support.models import QWEN3_SHAPE, random_model, save_model
from transformers import Qwen3Config

from qerl_sync import AdapterSource, HFSource, InProcessTransport, SyncConfig, SyncSession

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LIMIT = 0.2  # holds for so small a model on a busy CPU, too


def test_an_adapter_takes_a_small_part_of_a_full_sync(tmp_path: Path) -> None:
    model = random_model(Qwen3Config(**QWEN3_SHAPE), 0, "bfloat16")
    path = save_model(model, tmp_path / "model")
    engine = start_engine(path, dtype="bfloat16", enable_lora=True, max_lora_rank=16)
    config = SyncConfig.of(on_unchanged="warn")
    full = SyncSession(HFSource(model), InProcessTransport(engine), config)
    full_reports = [full.push(number) for number in range(3)]

    policy = make_policy(base=model, r=8)
    sync = SyncSession(AdapterSource(policy), InProcessTransport(engine), config)
    sync.push(0)
    reports = []
    for number in range(1, 6):
        step(policy, number)
        reports.append(sync.push(number))
    adapter_bytes = sum(p.nbytes for n, p in policy.named_parameters() if "lora_" in n)
    assert {report.sent_bytes for report in reports} == {adapter_bytes}
    seconds, full_seconds = (
        statistics.median(report.seconds["total"] for report in some)
        for some in (reports, full_reports[1:])
    )
    phases = {name: round(s * 1e3, 1) for name, s in reports[-1].seconds.items()}
    print(
        f"\nfull: {full_reports[-1].sent_bytes:,} bytes, {full_seconds * 1e3:.0f} ms; adapter: "
        f"{adapter_bytes:,} bytes, {seconds * 1e3:.1f} ms, {seconds / full_seconds:.1%}; "
        f"by phase, ms: {phases}"
    )
    assert seconds <= LIMIT * full_seconds
