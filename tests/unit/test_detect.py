"""The storages that tensors keep alive, and values that are not finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.errors import raises
from support.tensors import TwoTensors

from qerl_sync.buffers import detect
from qerl_sync.buffers.detect import (
    is_finite,
    require_all_finite,
    require_finite,
    require_in_range,
    storages_of,
)
from qerl_sync.errors import CoverageError


def test_views_keep_their_whole_storage():
    chunk = torch.empty(1024)
    (whole,), (view,) = storages_of(chunk), storages_of(chunk[3:5])
    assert view == whole
    assert view.nbytes == 4096
    assert storages_of(torch.empty(2))[0].key != whole.key


def test_dtensor_keeps_its_local_shard(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    started = not dist.is_initialized()  # vLLM engines of earlier tests keep one
    if started:
        dist.init_process_group(
            "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
        )
    try:
        local = torch.ones(8)
        sharded = DTensor.from_local(local, init_device_mesh("cpu", (1,)), [Replicate()])
        assert storages_of(sharded) == storages_of(local)
    finally:
        if started:
            dist.destroy_process_group()


def test_wrapper_subclasses_keep_their_inner_tensors():
    values, scales = torch.zeros(8, dtype=torch.int8), torch.ones(2)
    found = storages_of(TwoTensors(values, scales))
    assert {storage.nbytes for storage in found} == {8}
    assert len(found) == 2


@given(st.lists(st.sampled_from([1.0, -3e38, 3e38, float("inf"), float("nan")]), max_size=50))
def test_finite_is_told_apart_from_a_sum_that_overflows(values):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2):
        exact = torch.tensor(values).clamp(-5e4, 5e4).to(dtype)
        if dtype.itemsize > 2 or dtype == torch.bfloat16:
            exact = torch.tensor(values, dtype=dtype)
        right = bool(torch.isfinite(exact.float()).all())
        assert is_finite(exact) == is_finite(exact, alone=False) == right
        matrix = torch.zeros(3, 40, dtype=dtype)
        matrix.view(-1)[11 : 11 + len(values)] = exact
        for alone in (True, False):
            assert is_finite(matrix, alone=alone) == is_finite(matrix.T, alone=alone) == right


def test_bad_values_are_counted_and_named():
    with raises(CoverageError, tensor="w", num_bad=2):
        require_finite("w", torch.tensor([float("nan"), 0.0, float("-inf")]))
    require_finite("integers", torch.tensor([1]))


@pytest.mark.parametrize("bound", [float("inf"), float("-inf")])
def test_a_bound_without_dimensions_may_be_infinite(bound):
    """Gemma 4 keeps those of what it clips in its checkpoints."""
    held = {"w": torch.ones(3), "least": torch.tensor(bound)}
    require_all_finite(held.items())
    require_in_range("least", held["least"], torch.float16)
    for sick in (torch.tensor(float("nan")), torch.tensor([bound])):
        with raises(CoverageError, tensor="least", num_bad=1):
            require_all_finite({**held, "least": sick}.items())


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_many_are_looked_at_together(dtype, alone):
    held = {f"w{i}": torch.full((3, i), 5e4).to(dtype) for i in range(100)}
    held |= {"ids": torch.tensor([1]), "huge": torch.full((9,), 3e38)}  # its sum overflows
    require_all_finite(held.items(), alone=alone)
    held["w80"] = held["w80"].float().index_fill(1, torch.tensor([1]), float("nan")).to(dtype)
    with raises(CoverageError, tensor="w80", num_bad=3):
        require_all_finite(held.items(), alone=alone)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_cores_share_the_runs_of_all_tensors(monkeypatch, dtype, alone, bad):
    monkeypatch.setattr(detect, "_SMALL", 16)
    monkeypatch.setattr(detect, "_RUN", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    # 5 runs and a rest of odd size; exponents of 30,000 and 1e-4 have together all bits of float16.
    held = {f"w{i}": torch.full((333,), 0.5).to(dtype) for i in range(9)}
    held["mixed"] = torch.tensor([3e4, 1e-4, -3e4, 0.0] * 100).to(dtype)
    require_all_finite(held.items(), alone=alone)
    for name, place in (("w7", 332), ("w7", 70), ("w2", 0), ("mixed", 399)):
        sick = held[name].clone()
        sick[place] = bad
        with raises(CoverageError, tensor=name, num_bad=1):
            require_all_finite({**held, name: sick}.items(), alone=alone)


@pytest.mark.parametrize(
    ("dtype", "into", "value", "right"),
    [
        (torch.float32, torch.float16, 65504.0, True),
        (torch.float32, torch.float16, -65519.0, True),  # rounded to the largest
        (torch.float32, torch.float16, 65520.0, False),
        (torch.float32, torch.float16, -1e5, False),
        (torch.bfloat16, torch.float16, 65536.0, False),
        (torch.bfloat16, torch.float16, 65280.0, True),
        (torch.float64, torch.float32, -1e39, False),
        (torch.float64, torch.bfloat16, 1e39, False),
        (torch.float32, torch.bfloat16, 3.38e38, True),
        (torch.float16, torch.bfloat16, 65504.0, True),
        (torch.float8_e4m3fn, torch.float16, 448.0, True),
        (torch.int32, torch.float16, 100_000, True),
    ],
)
def test_what_would_become_infinite_in_the_engines_dtype(dtype, into, value, right):
    tensor = torch.tensor([[0, value], [1, -1]]).to(dtype)
    assert bool(torch.isfinite(tensor.to(into)).all()) is right or not dtype.is_floating_point
    if right:
        return require_in_range("w", tensor, into)
    with raises(CoverageError, tensor="w"):
        require_in_range("w", tensor, into)


def test_an_empty_tensor_is_in_every_range():
    require_in_range("w", torch.empty(0, 3), torch.float16)
