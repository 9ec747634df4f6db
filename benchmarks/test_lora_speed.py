"""What a sync of an adapter sends and takes, beside syncs of the same model's whole weights.

    scripts/bench benchmarks/test_lora_speed.py -s

In the engine's own process, in bf16, with a rank of 8 on all linear layers: 28 layers of the shapes
of Qwen3-0.6B and Qwen3-1.7B, and a smaller vocabulary. Most of an adapter's cost goes by the number
of layers that it adapts, and that of whole weights by their bytes: the larger the model, the
smaller the share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.adapters import make_policy, step
from support.engines import start_engine
from support.models import QWEN3_LARGER_SHAPE, QWEN3_SHAPE, random_model, save_model
from transformers import Qwen3Config

from qerl_sync import (
    AdapterSource,
    HFSource,
    InProcessTransport,
    PEFTSource,
    SyncConfig,
    SyncReport,
    SyncSession,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LIMIT = 0.2  # of the whole weights' time; holds on a busy CPU, too


@pytest.mark.parametrize("shape", [QWEN3_SHAPE, QWEN3_LARGER_SHAPE], ids=["0.5B", "1.4B"])
def test_an_adapter_takes_a_small_part_of_a_full_sync(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    model = random_model(Qwen3Config(**shape), 0, "bfloat16")
    path = save_model(model, tmp_path / "model")
    engine = start_engine(path, dtype="bfloat16", enable_lora=True, max_lora_rank=16)
    config = SyncConfig.of(on_unchanged="warn")
    # In a sync of everything, without any adapter.
    full = SyncSession(HFSource(model), InProcessTransport(engine), config)
    full_reports = [full.push(number) for number in range(4)]

    policy = make_policy(base=model, r=8)

    def synced(session: SyncSession) -> list[SyncReport]:
        session.push(0)
        reports = []
        for number in range(1, 5):
            step(policy, number)
            reports.append(session.push(number))
        return reports

    merged = synced(SyncSession(PEFTSource(policy), InProcessTransport(engine), config))
    adapter = synced(SyncSession(AdapterSource(policy), InProcessTransport(engine), config))
    adapter_bytes = sum(p.nbytes for n, p in policy.named_parameters() if "lora_" in n)
    assert {report.sent_bytes for report in adapter} == {adapter_bytes}
    # The fastest of each: what else the machine does makes all of them slower, by chance.
    rows = {"everything": full_reports[1:], "merged": merged, "adapter": adapter}
    fastest = {name: min(some, key=_seconds) for name, some in rows.items()}
    for name, report in fastest.items():
        phases = {phase: round(s * 1e3, 1) for phase, s in report.seconds.items()}
        share = _seconds(fastest["adapter"]) / _seconds(report)
        print(f"\n{name}: {report.sent_bytes:,} bytes; by phase, ms: {phases}; share: {share:.1%}")
    assert _seconds(fastest["adapter"]) <= LIMIT * _seconds(fastest["everything"])


def _seconds(report: SyncReport) -> float:
    return report.seconds["total"]
