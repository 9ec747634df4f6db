"""A model on the meta device whose constructor may read the values of small tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from qerl_sync.buffers.detect import storage_key

# Constants that constructors read (ALiBi slopes, activation parameters, expert maps) are far
# smaller. Weights and rotary caches above it stay without values and cost no memory.
MAX_NUMEL = 2**16


@contextlib.contextmanager
def meta_device() -> Iterator[None]:
    """Create tensors on the meta device, with the values of small ones kept beside them on CPU.

    `with torch.device("meta")` alone fails where a constructor reads a tensor (`item`, `tolist`,
    `cpu`, `nonzero`): vLLM slices ALiBi slopes and reads the parameters of activations so.
    """
    with torch.device("meta"), _LiteralsFirst(), _SmallValues():
        yield


class _LiteralsFirst(TorchFunctionMode):
    """Create tensors from Python data on CPU, then copy them to the meta device.

    torch drops the data of `torch.tensor([1, 2], device="meta")` before a dispatch mode sees it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        literal = func in (torch.tensor, torch.as_tensor, torch.asarray) and not any(
            isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs))
        )
        if literal and torch.device(kwargs.get("device") or "meta").type == "meta":
            return func(*args, **{**kwargs, "device": "cpu"}).to("meta")
        return func(*args, **kwargs)


class _SmallValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Run each operation on small meta tensors a second time, on CPU.

    Values belong to storages, so that views and writes through views need no bookkeeping.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # The meta storage is kept too: a freed one's address may be that of the next.
        self._values: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            result = func(*args, **kwargs)
        except RuntimeError:  # it reads values, which meta tensors do not have
            if not self._all_known((args, kwargs)):
                raise
            result = self._on_cpu(func, args, kwargs)
            if func._schema.is_mutable or "device" in kwargs:
                return result  # written, or copied, to where the caller wants it
            return tree_map_only(torch.Tensor, self._keep, result)
        self._follow(func, args, kwargs, result)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Give the outputs of `func` their values, or forget those that it has overwritten."""
        written = [t for t in tree_leaves(result) if _is_meta(t)]
        if func._schema.is_mutable:
            written += [t for t in tree_leaves((args, kwargs)) if _is_meta(t)]
        elif all(storage_key(t) in self._values for t in written):
            return  # a view shares the values of what it views
        small = all(t.numel() <= MAX_NUMEL for t in written)
        if written and small and self._all_known((args, kwargs)):
            with contextlib.suppress(RuntimeError):  # an operation that CPUs do not have
                values = self._on_cpu(func, args, kwargs)
                for twin, value in zip(tree_leaves(result), tree_leaves(values), strict=True):
                    if _is_meta(twin):
                        self._keep(value, twin)
                return
        if func._schema.is_mutable:
            for tensor in written:
                self._values.pop(storage_key(tensor), None)

    def _on_cpu(self, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map_only(torch.Tensor, self._value, (args, kwargs))
        if torch.device(kwargs.get("device") or "cpu").type == "meta":
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)

    def _all_known(self, arguments: Any) -> bool:
        return all(storage_key(t) in self._values for t in tree_leaves(arguments) if _is_meta(t))

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return `tensor` with its data, which shares memory with the values of other views."""
        if not _is_meta(tensor):
            return tensor
        storage = self._values[storage_key(tensor)][1]
        empty = torch.empty(0, dtype=tensor.dtype, device="cpu")
        return empty.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())

    def _keep(self, value: torch.Tensor, twin: torch.Tensor | None = None) -> torch.Tensor:
        """Remember `value` as that of `twin`, by default of a new meta tensor. Returns the twin."""
        twin = torch.empty_like(value, device="meta") if twin is None else twin
        storage = twin.untyped_storage()
        if storage._cdata not in self._values:
            memory = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu")
            self._values[storage._cdata] = storage, memory.untyped_storage()
            self._value(twin).copy_(value)
        return twin


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta
