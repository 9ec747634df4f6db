"""Describe a tensor without having it: name, dtype, shape, bytes. No torch in here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from qerl_sync.errors import ConfigError

# Bits per element of torch's dtypes, by torch's own names (`str(dtype)` without "torch.").
DTYPE_BITS: dict[str, int] = {
    "float64": 64,
    "float32": 32,
    "float16": 16,
    "bfloat16": 16,
    "float8_e4m3fn": 8,
    "float8_e4m3fnuz": 8,
    "float8_e5m2": 8,
    "float8_e5m2fnuz": 8,
    "float8_e8m0fnu": 8,
    "float4_e2m1fn_x2": 8,
    "complex64": 64,
    "int64": 64,
    "int32": 32,
    "int16": 16,
    "int8": 8,
    "uint64": 64,
    "uint32": 32,
    "uint16": 16,
    "uint8": 8,
    "bool": 8,
}

# Dtypes whose values survive a cast to another one of them up to rounding. vLLM casts whatever
# arrives with `copy_`: between these that is what the user means, from any other it is not.
CASTABLE_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})


@dataclass(frozen=True)
class ParamMeta:
    """One checkpoint tensor, by its name in the Hugging Face format; dtype by torch's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BITS:
            raise ConfigError(
                f"{self.name}: unknown dtype {self.dtype!r}; known are {', '.join(DTYPE_BITS)}"
            )

    # Not cached: before Python 3.12 a cached property takes a lock, and costs more than it saves.
    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def not_ignored(metas: Iterable[ParamMeta], patterns: Sequence[str]) -> list[ParamMeta]:
    """Return the tensors without those that a pattern of `sync.ignore_names` (fnmatch) names."""
    return [m for m in metas if not any(fnmatchcase(m.name, pattern) for pattern in patterns)]


def metas_to_json(metas: Iterable[ParamMeta]) -> list[Any]:
    return [[meta.name, meta.dtype, list(meta.shape)] for meta in metas]


def metas_from_json(data: Iterable[Any]) -> list[ParamMeta]:
    return [ParamMeta(name, dtype, tuple(shape)) for name, dtype, shape in data]


@dataclass(frozen=True)
class Storage:
    """The memory behind a tensor: two tensors with the same `key` keep the same `nbytes` alive."""

    key: int | str
    nbytes: int


_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}
_UNITS |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}


def parse_bytes(value: int | float | str) -> int:
    """Return the number of bytes in an integer or a text such as "512MiB", "2 GB", "1e9".

    Raises:
        ConfigError: the value is no positive number of bytes.
    """
    text = str(value).strip().lower()
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)", text)
    unit = match and _UNITS.get(match[2])
    try:
        nbytes = round(float(match[1]) * unit) if match and unit else 0
    except (ValueError, OverflowError):
        nbytes = 0
    if nbytes <= 0 or isinstance(value, bool):
        raise ConfigError(
            f"{value!r} is not a number of bytes; write for example 512MiB, 2GB or 1073741824"
        )
    return nbytes


def format_bytes(nbytes: float) -> str:
    """Format a number of bytes: 1536 -> "1.5 KiB"."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
