"""Check a stream of tensors against the plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from qerl_sync.buffers.detect import Parents, dtype_name, named
from qerl_sync.errors import CoverageError
from qerl_sync.meta import ParamMeta

if TYPE_CHECKING:
    import torch


def as_planned(
    metas: Iterable[ParamMeta],
    tensors: Iterable[tuple[str, torch.Tensor]],
    parents: Parents | None = None,
) -> Iterator[tuple[ParamMeta, torch.Tensor]]:
    """Yield the same tensors, lazily, each with its entry in the plan.

    Args:
        parents: for errors to name the parent layer.

    Raises:
        CoverageError: the stream ends early, goes on for too long, or a tensor is not the one that
            is next by name, dtype and shape.
    """
    arriving = iter(tensors)
    for meta in metas:
        item = next(arriving, None)
        if item is None:
            raise CoverageError(
                f"the source ended where {named(meta.name, parents)} was next", tensor=meta.name
            )
        name, tensor = item
        if name != meta.name:
            raise CoverageError(
                f"{name!r} arrived where the plan has {named(meta.name, parents)}; the source "
                "must yield exactly the names that it is asked for, in that order",
                tensor=name,
            )
        shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
        if (shape, dtype) != (meta.shape, meta.dtype):
            raise CoverageError(
                f"{named(name, parents)} arrived as {dtype} {list(shape)}, the plan says "
                f"{meta.dtype} {list(meta.shape)}; the source's metadata and its tensors differ",
                tensor=name,
            )
        yield meta, tensor
    surplus = next(arriving, None)
    if surplus is not None:
        raise CoverageError(
            f"{surplus[0]!r} arrived after the last tensor of its chunk; the plan has no such "
            "tensor there. Yield each planned name once",
            tensor=surplus[0],
        )
