"""What looking at the weights costs beside moving them, on the tensors of a 0.6B model.

scripts/bench benchmarks/test_verification_speed.py -s
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

from qerl_sync.buffers.detect import is_finite
from qerl_sync.verify.changes import ChangeWatch

HIDDEN, LAYERS = 1024, 28
SHAPES = [(2048, HIDDEN), (1024, HIDDEN), (1024, HIDDEN), (HIDDEN, 2048)]
SHAPES += [(3072, HIDDEN), (3072, HIDDEN), (HIDDEN, 3072), (HIDDEN,), (HIDDEN,), (128,), (128,)]


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """0.44B parameters in bf16, 308 tensors."""
    return {
        f"layers.{i}.{j}.weight": torch.randn(shape).bfloat16()
        for i in range(LAYERS)
        for j, shape in enumerate(SHAPES)
    }


def median_seconds(run: Callable[[], object], rounds: int = 5) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def copies(weights: dict[str, torch.Tensor]) -> Callable[[], None]:
    """One pass over the bytes; a sync makes four and more, and a kernel's packing."""
    target = torch.empty(max(w.numel() for w in weights.values()), dtype=torch.bfloat16)

    def run() -> None:
        for tensor in weights.values():
            target[: tensor.numel()].copy_(tensor.view(-1))

    return run


def test_looking_for_nan(weights: dict[str, torch.Tensor]) -> None:
    """About as fast as one copy pass: `sync.check_finite`."""

    def run() -> None:
        assert all(is_finite(tensor) for tensor in weights.values())

    spent, copied = median_seconds(run), median_seconds(copies(weights))
    print(f"\n{spent * 1e3:.1f} ms for {len(weights)} tensors; one copy pass {copied * 1e3:.0f} ms")
    assert spent < 3 * copied


def test_noticing_changes(weights: dict[str, torch.Tensor]) -> None:
    """Against ten passes over the bytes, what a stock sync of these takes."""
    watch = ChangeWatch(weights.items)
    steps = iter(range(100))

    def run() -> None:
        watch.begin()
        for name, tensor in weights.items():
            watch.see(name, tensor)
        changes = watch.conclude(next(steps))
        assert changes.num_changed in (None, 0)

    spent, copied = median_seconds(run), median_seconds(copies(weights))
    print(f"\n{spent * 1e3:.1f} ms for {len(weights)} tensors; one copy pass {copied * 1e3:.0f} ms")
    assert spent < 0.03 * 10 * copied
