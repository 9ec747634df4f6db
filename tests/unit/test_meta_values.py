"""Meta tensors whose values can be read, where they are small."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from qerl_sync.worker.compat.meta_values import MAX_NUMEL, meta_device  # noqa: E402


@pytest.fixture(autouse=True)
def on_meta():
    with meta_device():
        yield


def test_everything_is_on_meta():
    made = [torch.tensor([1.0]), torch.arange(3), torch.zeros(2), torch.nn.Linear(2, 3).weight]
    assert all(tensor.is_meta for tensor in made)
    assert torch.zeros(2, device="cpu").device.type == "cpu"


def test_values_can_be_read_in_every_way():
    slopes = torch.pow(torch.tensor(0.5), torch.arange(1, 5))
    assert slopes[1:3].tolist() == [0.25, 0.125]
    assert slopes.sum().item() == 0.9375
    assert slopes.detach().cpu().float()[0] == 0.5
    assert bool(slopes[0] > slopes[1])
    assert torch.nonzero(slopes < 0.2).tolist() == [[2], [3]]
    assert torch.nonzero(slopes < 0.2).is_meta
    assert torch.nn.Parameter(torch.log(torch.tensor([1.0]))).item() == 0


def test_writes_are_seen_through_every_view():
    base = torch.zeros(4)
    square = base.view(2, 2)
    base[1:3] = torch.tensor([5.0, 6.0])
    square[1, 1] = 7
    square.mul_(2)
    assert base.tolist() == [0, 10, 12, 14]
    torch.add(base, 1, out=square.view(4))
    assert base.tolist() == [1, 11, 13, 15]
    there = torch.zeros(4, device="cpu")
    there.copy_(base)
    assert there[3] == 15


def test_values_that_depend_on_a_large_tensor_are_unknown_not_wrong():
    small, large = torch.zeros(4), torch.zeros(MAX_NUMEL + 1)
    small.copy_(large[:4])
    for unknown in (large[0], large[:4] + 1, small):
        with pytest.raises(RuntimeError, match="meta"):
            unknown.tolist()
    with pytest.raises(RuntimeError):  # as outside of the mode
        torch.zeros(2) @ torch.zeros(3)
