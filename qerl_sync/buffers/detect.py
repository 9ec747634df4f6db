"""Look into tensors: the storages that they keep alive, and values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from qerl_sync.errors import CoverageError
from qerl_sync.meta import Storage


def storages_of(tensor: torch.Tensor) -> tuple[Storage, ...]:
    """Return the unique storages that a tensor keeps alive.

    A DTensor keeps its local shard, a wrapper subclass (quantised weights) its inner tensors. A
    plain tensor keeps the whole storage that it is a view of, however small the view.
    """
    storages = (plain.untyped_storage() for plain in plain_tensors(tensor))
    return tuple(dict.fromkeys(Storage(one._cdata, one.nbytes()) for one in storages))


def storage_key(tensor: torch.Tensor) -> int:
    """Return the address of its StorageImpl: unique among living storages, also those on meta."""
    return int(tensor.untyped_storage()._cdata)


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Return the tensors that hold the bytes: itself, or a wrapper subclass's inner tensors."""
    if callable(to_local := getattr(tensor, "to_local", None)):
        yield from plain_tensors(to_local())
    elif callable(flatten := getattr(tensor, "__tensor_flatten__", None)):
        for attribute in flatten()[0]:
            yield from plain_tensors(getattr(tensor, attribute))
    else:
        yield tensor


@cache  # asked for each tensor of each sync, as is `_exponent`
def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# A tensor's parent layers, for a person.
Parents = Callable[[str], str]


def named(name: str, parents: Parents | None) -> str:
    """Return the name and, in parentheses, its parent layers."""
    found = parents(name) if parents is not None else ""
    return f"{name!r} (of {found})" if found else repr(name)


def is_finite(tensor: torch.Tensor, *, alone: bool = True) -> bool:
    """Return True if all values are finite. A tensor without dimensions may be infinite, too: it is
    a bound (Gemma 4 has those of what it clips, as buffers) and not a trained weight.

    One pass at the speed at which memory is read. Where values are summed, the sum propagates any
    NaN or infinity. It may also overflow; only then look at the values one by one.

    Args:
        alone: use all cores. False: one, beside others that load.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0 or _is_infinite_bound(tensor):
        return True
    if _has_readable_bits(tensor):
        return _first_not_finite(list(_runs(tensor)), alone=alone) is None
    return math.isfinite(_sum(tensor).item()) or not _count_not_finite(tensor)


def _is_infinite_bound(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 0 and math.isinf(tensor.item())


def _has_readable_bits(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in _INFINITY and tensor.is_contiguous()


class _Run(NamedTuple):
    """Consecutive values of a tensor in host memory, as unsigned integers."""

    bits: np.ndarray[Any, Any]
    infinity: int

    def is_finite(self) -> bool:
        """Return whether no value is infinite or NaN.

        IEEE 754: their exponents have all bits set. The union of many values' bits mostly lacks
        some of those bits, which acquits all of them at once.
        """
        if self.bits.nbytes % 8 == 0:
            union = np.bitwise_or.reduce(self.bits.view(np.uint64))
            exponents = union.reshape(1).view(self.bits.dtype) & self.infinity
            if not (exponents == self.infinity).any():
                return True
        # As integers, infinity and NaN are the largest values of each sign.
        negative_infinity = self.infinity | 1 << (8 * self.bits.itemsize - 1)
        signed = self.bits.view(f"i{self.bits.itemsize}")
        return all(
            signed[at : at + _BLOCK].max() < self.infinity
            and self.bits[at : at + _BLOCK].max() < negative_infinity
            for at in range(0, signed.size, _BLOCK)
        )


def _runs(tensor: torch.Tensor) -> Iterator[_Run]:
    integer, infinity = _INFINITY[tensor.dtype]
    signed = tensor.detach().view(-1).view(integer).numpy()
    bits = signed.view(f"u{signed.itemsize}")
    return (_Run(bits[at : at + _RUN], infinity) for at in range(0, bits.size, _RUN))


def _first_not_finite(runs: Sequence[_Run], *, alone: bool) -> int | None:
    """Return the index of the first run that has NaN or infinite values; None if none has."""
    # Threads take runs from one iterator: of a tensor alone, most have too few for two cores.
    waiting, bad = iter(enumerate(runs)), []

    def look() -> None:
        for index, run in waiting:  # numpy releases the GIL while it reduces
            if not run.is_finite():
                bad.append(index)
                return

    helpers = min(torch.get_num_threads(), len(runs) // 2) - 1 if alone else 0
    if helpers > 0:
        with ThreadPoolExecutor(helpers) as pool:
            looking = [pool.submit(look) for _ in range(helpers)]
            look()
            for one in looking:
                one.result()
    else:
        look()
    return min(bad, default=None)


def _count_not_finite(tensor: torch.Tensor) -> int:
    wide = tensor.to(torch.float32) if tensor.dtype.itemsize == 1 else tensor
    return int((~torch.isfinite(wide)).sum())


# The signed integer type of the same size, and the bits of infinity.
_INFINITY = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
# Elements that a core's own cache holds between two looks at them; and that are united.
_BLOCK, _RUN = 1 << 17, 1 << 20


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype.itemsize == 1:  # of eight bits torch has no sums
        tensor = tensor.to(torch.float32)
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.sum(dtype=dtype)


def require_all_finite(tensors: Iterable[tuple[str, torch.Tensor]], *, alone: bool = True) -> None:
    """Do as `require_finite` for each of these, by name.

    A GPU is asked once for all of them: for each answer it must first have done all its work, which
    takes longer than most tensors' sums. In host memory, cores share all of them; small tensors (an
    adapter's factors) are looked at together, since each look costs more than their bytes do.
    """
    large: list[tuple[str, torch.Tensor]] = []
    small: dict[torch.dtype, dict[str, torch.Tensor]] = {}
    elsewhere: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        if tensor.device.type != "cpu":
            elsewhere.setdefault(tensor.device, {})[name] = tensor
        elif tensor.numel() > _SMALL and _has_readable_bits(tensor):
            large.append((name, tensor))
        elif tensor.numel() > _SMALL or type(tensor) not in _PLAIN:
            require_finite(name, tensor, alone=alone)
        else:
            some = small.setdefault(tensor.dtype, {})
            some[name] = tensor
            if len(some) == _TOGETHER:
                _require_together(small.pop(tensor.dtype), alone=alone)
    for some in small.values():
        _require_together(some, alone=alone)
    runs = [(name, tensor, run) for name, tensor in large for run in _runs(tensor)]
    index = _first_not_finite([run for *_, run in runs], alone=alone)
    if index is not None:
        name, tensor, _ = runs[index]
        require_finite(name, tensor, alone=alone)
    for held in elsewhere.values():
        sums = torch.stack([_sum(tensor).to(torch.float32) for tensor in held.values()])
        for (name, tensor), total in zip(held.items(), sums.tolist(), strict=True):
            if not math.isfinite(total):
                require_finite(name, tensor)


# Tensors of up to so many elements are looked at together, and so many of them.
_SMALL, _TOGETHER = 1 << 16, 64
# Not those of wrapper subclasses, which may not be joined.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _require_together(tensors: Mapping[str, torch.Tensor], *, alone: bool) -> None:
    """Do as `require_finite` for each of these tensors of one dtype."""
    if is_finite(torch.cat([one.detach().reshape(-1) for one in tensors.values()]), alone=alone):
        return
    for name, tensor in tensors.items():
        require_finite(name, tensor, alone=alone)


def require_finite(
    name: str, tensor: torch.Tensor, parents: Parents | None = None, *, alone: bool = True
) -> None:
    """Raise CoverageError with the number of bad values if `tensor` has any. See `is_finite`."""
    if not is_finite(tensor, alone=alone):
        bad = _count_not_finite(tensor)
        raise CoverageError(
            f"{named(name, parents)} has {bad:,} NaN or infinite values of {tensor.numel():,}; the "
            "training step before this sync went wrong (look at the loss and the gradient norm). "
            "sync.check_finite: false sends it all the same",
            tensor=name,
            num_bad=bad,
        )


def require_in_range(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, parents: Parents | None = None
) -> None:
    """Raise CoverageError with the largest value if any would become infinite as the engine's
    `dtype`. One pass where the dtypes' ranges differ, none elsewhere.
    """
    # float32 ends a little above bfloat16, in a range that no weight reaches: exponents decide.
    floating = tensor.dtype.is_floating_point
    if tensor.numel() == 0 or not floating or _exponent(tensor.dtype) <= _exponent(dtype):
        return
    if _is_infinite_bound(tensor):
        return
    low, high = tensor.aminmax()
    largest = torch.maximum(-low, high)
    if torch.isinf(largest.to(dtype)):
        raise CoverageError(
            f"{named(name, parents)} has values up to {largest.item():.6g}; the engine computes in "
            f"{dtype_name(dtype)}, where what is larger than {torch.finfo(dtype).max:.6g} becomes "
            "infinite. Start it with a dtype of more range (bfloat16: rollout.engine.dtype), or "
            "look at why the weights have grown so. sync.check_finite: false sends it all the same",
            tensor=name,
        )


@cache
def _exponent(dtype: torch.dtype) -> int:
    return math.frexp(torch.finfo(dtype).max)[1]
