"""The fast count of a loader's copies is vLLM's, or is not used."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qerl_sync.worker.load.copy_count import CopyCount


class Slow(TorchDispatchMode):
    """As vLLM counts: every `aten.copy_`, whoever calls it."""

    def __init__(self):
        super().__init__()
        self.numel, self.calls = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.numel += args[0].numel()
        return func(*args, **(kwargs or {}))


class Counting:
    """A `CopyCount` on a loader, and how often it asked vLLM's way."""

    def __init__(self, loader):
        self.loader, self.asked = loader, 0
        self.count = CopyCount(self._slow, cap=torch.numel)

    def _slow(self, loader, bound):
        self.asked += 1
        with Slow() as mode:
            result = loader(*bound.args, **bound.kwargs)
        return min(mode.numel, bound.arguments["param"].numel()), result

    def __call__(self, *args, **kwargs):
        bound = inspect.signature(self.loader).bind(*args, **kwargs)
        with self.count.counting():
            return self.count(self.loader, bound)


def meta(*shape):
    return torch.empty(shape, device="meta")


def by_method(param, tensor, expert_id=0):
    param.data[expert_id].copy_(tensor)
    return "loaded"


def by_assignment(param, tensor, expert_id=0):
    param[expert_id] = tensor


def twice(param, tensor, expert_id=0):
    param[expert_id].copy_(tensor)
    param.copy_(param.clone())


def not_for_us(param, tensor, expert_id=0):
    if expert_id == 0:
        param[0].copy_(tensor)


def test_a_plain_loader_is_asked_once_and_counted_ever_after():
    counting, parameter = Counting(by_method), meta(4, 3)
    for expert in range(4):
        assert counting(parameter, meta(3), expert_id=expert) == (3, "loaded")
    assert counting.asked == 1


def test_a_loader_that_copies_by_other_means_is_always_asked():
    counting, parameter = Counting(by_assignment), meta(4, 3)
    for expert in range(4):
        assert counting(parameter, meta(3), expert_id=expert)[0] == 3
    assert counting.asked == 4


def test_no_more_than_the_parameter_has():
    counting, parameter = Counting(twice), meta(2, 3)
    assert [counting(parameter, meta(3))[0] for _ in range(2)] == [6, 6]
    assert counting.asked == 1


def test_each_call_is_counted_for_itself():
    """Experts of other ranks load nothing."""
    counting, parameter = Counting(not_for_us), meta(4, 3)
    assert [counting(parameter, meta(3), expert_id=e)[0] for e in (0, 1, 0)] == [3, 0, 3]


def test_other_parameters_and_shapes_are_other_calls():
    counting, parameter = Counting(by_method), meta(4, 3)
    counting(parameter, meta(3))
    counting(parameter, meta(1))
    counting(meta(4, 3), meta(3))
    assert counting.asked == 3


def test_real_copies_are_neither_counted_nor_changed():
    counting = Counting(by_method)
    with counting.count.counting():
        assert torch.zeros(3).copy_(torch.ones(3)).sum() == 3
    assert counting.count._copied_numel == 0
    assert "copy_" not in vars(torch.Tensor)


def test_a_wrapper_of_somebody_else_stays(monkeypatch):
    def wrapper(tensor, *args, **kwargs):
        return copy(tensor, *args, **kwargs)

    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", wrapper)
    counting = Counting(by_method)
    counting(meta(4, 3), meta(3))
    assert torch.Tensor.copy_ is wrapper


def test_a_loader_that_fails_leaves_no_trace():
    counting = Counting(by_method)
    with pytest.raises(RuntimeError):
        counting(meta(4, 3), meta(5))
    assert "copy_" not in vars(torch.Tensor)
