"""What a colocated sync takes beside a copy of its bytes, and beside vLLM's own ways to load them.

    scripts/bench benchmarks/test_load_speed.py -s

In the engine's own process, in bfloat16, with kernels that use parameters as they are (on a CPU a
stand-in for unquantised GPU kernels): 28 layers of the shape of Qwen3-0.6B and a smaller
vocabulary. All rows take turns in one run.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.engines import kernels_in_use, start_engine
from support.models import QWEN3_SHAPE, random_model, save_model
from transformers import Qwen3Config

from qerl_sync import HFSource, InProcessTransport, SyncConfig, SyncSession
from qerl_sync.verify.checksum import checksum
from qerl_sync.worker.compat import engine as compat

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROUNDS = 5


def checksums(model: torch.nn.Module) -> dict[str, int]:
    return {name: checksum(parameter) for name, parameter in model.named_parameters()}


def test_a_direct_sync_costs_little_more_than_the_copy(tmp_path: Path) -> None:
    model = random_model(Qwen3Config(**QWEN3_SHAPE), 0, "bfloat16")
    with kernels_in_use("plain"):
        engine = start_engine(save_model(model, tmp_path / "model"), dtype="bfloat16")
        parts = compat.in_process_parts(engine)
        tensors = [(name, p.detach()) for name, p in model.named_parameters()]
        copies = [torch.zeros_like(tensor) for _, tensor in tensors]
        syncs = {
            name: SyncSession(HFSource(model), InProcessTransport(engine), SyncConfig.of(**options))
            for name, options in {
                "ours, direct": {},
                "ours, direct, unchecked": {"check_finite": False, "on_unchanged": "ignore"},
                "ours, layerwise": {"load": "layerwise"},
            }.items()
        }

        def memcpy() -> None:
            for copy, (_, tensor) in zip(copies, tensors, strict=True):
                copy.copy_(tensor)

        def load_weights() -> None:
            with compat.loading_context(parts.vllm_config):
                parts.model.load_weights(iter(tensors))  # type: ignore[operator]

        def layerwise() -> None:
            with compat.loading_context(parts.vllm_config):
                compat.begin_reload(parts.model)
                parts.model.load_weights(iter(tensors))  # type: ignore[operator]
                compat.finish_reload(parts.model, parts.vllm_config)

        rows: dict[str, Callable[[], object]] = {
            "memcpy": memcpy,
            "load_weights into the live storage": load_weights,
            "vLLM's layerwise reload": layerwise,
            **{name: sync.push for name, sync in syncs.items()},
        }
        seconds: defaultdict[str, list[float]] = defaultdict(list)
        fresh = checksums(parts.model)
        for number in range(ROUNDS + 1):  # the first is not counted
            for name, run in rows.items():
                started = time.perf_counter()
                report = run()
                if number:
                    seconds[name].append(time.perf_counter() - started)
        assert checksums(parts.model) == fresh
        reports = {name: sync.push() for name, sync in syncs.items()}
        ratios = {
            name: statistics.median(a / b for a, b in zip(found, seconds["memcpy"], strict=True))
            for name, found in seconds.items()
        }
        nbytes = sum(tensor.nbytes for _, tensor in tensors)
        print(f"\n{nbytes / 1e6:,.0f} MB, {len(tensors)} tensors")
        for name, found in seconds.items():
            print(f"{name:36}{statistics.median(found) * 1e3:8.0f} ms{ratios[name]:7.2f}")
        for name, report in reports.items():
            print(name, {phase: round(s * 1e3, 1) for phase, s in report.seconds.items()})
        assert reports["ours, direct"].peak_buffered_bytes_measured == 0
        assert ratios["ours, direct"] < 0.8 * ratios["ours, layerwise"]


@torch.no_grad()
def _step(model: torch.nn.Module, names: set[str]) -> None:
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.neg_()


@pytest.mark.parametrize("frozen", [True, False])
def test_what_has_not_changed_costs_a_look_at_most(tmp_path: Path, *, frozen: bool) -> None:
    """Two of 28 layers train. `frozen`: the others say so, and are hashed once."""
    model = random_model(Qwen3Config(**QWEN3_SHAPE), 0, "bfloat16")
    names = {n for n, _ in model.named_parameters() if ".layers.3." in n or ".layers.20." in n}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not frozen or name in names
    with kernels_in_use("plain"):
        engine = start_engine(save_model(model, tmp_path / "model"), dtype="bfloat16")
        full = SyncSession(HFSource(model), InProcessTransport(engine), SyncConfig())
        delta = SyncSession(
            HFSource(model), InProcessTransport(engine), SyncConfig.of(delta="layers")
        )
        everything, part = [], []
        for number in range(ROUNDS + 1):
            _step(model, names)
            everything.append(full.push(2 * number).seconds)
            delta.push(2 * number)  # the other session has synced: everything travels
            _step(model, names)
            report = delta.push(2 * number + 1)
            part.append(report.seconds)
            assert set(delta.plan.order if delta.plan else ()) == names
        both = [statistics.median(s["total"] for s in some[1:]) for some in (everything, part)]
        share = report.sent_bytes / (report.sent_bytes + report.unsent_bytes)
        print(
            f"\n{share:.1%} of the bytes travel, frozen: {frozen}: {both[1] * 1e3:.0f} of "
            f"{both[0] * 1e3:.0f} ms, {both[1] / both[0]:.2f}; by phase, ms: "
            f"{ {phase: round(s * 1e3, 1) for phase, s in part[-1].items()} }"
        )
        assert both[1] < both[0]
