"""Counting the elements that a weight loader copies, as vLLM does and several times faster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from inspect import BoundArguments

Loader = Callable[..., Any]
Count = Callable[[Loader, "BoundArguments"], tuple[int, Any]]

# Arguments that tell calls of one loader apart and do not change how it copies.
LABELS = frozenset({"weight_name", "expert_id"})


class CopyCount:
    """Stands in for vLLM's `get_numel_loaded` in a dry run.

    vLLM looks at every operation of a loader through a dispatch mode, which takes half of a dry
    run's time. Counting calls of `Tensor.copy_` in Python gives the same number for loaders that
    copy by that method, and not for those that copy by other means (`parameter[i] = tensor`). So
    the first call of each kind is counted both ways, and only where both agree is the fast way
    used from then on. A kind is a loader, a parameter, and the shapes and options it is called
    with.

    Args:
        count: vLLM's function.
        cap: elements of a parameter that a checkpoint brings; vLLM counts no more than these.
    """

    def __init__(self, count: Count, cap: Callable[[torch.Tensor], int]) -> None:
        self._count = count
        self._cap = cap
        self._agrees: dict[Hashable, bool] = {}
        self._copied_numel = 0

    def __call__(self, loader: Loader, bound: BoundArguments) -> tuple[int, Any]:
        kind = _kind(loader, bound)
        before = self._copied_numel
        if self._agrees.get(kind):
            result = loader(*bound.args, **bound.kwargs)
            return self._capped(bound, self._copied_numel - before), result
        numel, result = self._count(loader, bound)
        if kind not in self._agrees:
            self._agrees[kind] = numel == self._capped(bound, self._copied_numel - before)
        return numel, result

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count copies into meta tensors in this context. Others are ignored."""
        copy, own = torch.Tensor.copy_, vars(torch.Tensor).get("copy_")

        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if tensor.is_meta:
                self._copied_numel += tensor.numel()
            return copy(tensor, *args, **kwargs)

        torch.Tensor.copy_ = counted  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            del torch.Tensor.copy_  # the method itself is that of torch.Tensor's base
            if own is not None:  # somebody else's wrapper
                torch.Tensor.copy_ = own  # type: ignore[method-assign]

    def _capped(self, bound: BoundArguments, numel: int) -> int:
        parameter = bound.arguments.get("param")
        return min(numel, self._cap(parameter)) if isinstance(parameter, torch.Tensor) else numel


def _kind(loader: Loader, bound: BoundArguments) -> Hashable:
    function = getattr(loader, "__func__", loader)
    options = [_shown(value) for name, value in bound.arguments.items() if name not in LABELS]
    return function, id(bound.arguments.get("param")), *options


def _shown(value: object) -> Hashable:
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    return value if isinstance(value, str | int | None) else repr(value)
