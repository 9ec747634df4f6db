"""vLLM's `WeightSource` in its two forms, told apart by attributes: the contract changed in 0.33.

                  before                                 since
metadata          a method                               a functools.cached_property
this rank's part  held_names(), None for all             owned_names(rank), ParamMeta.owners
iteration         iter(source), with None for            iter_full(), owned names only
                  names that others hold
groups            groups(), iter_groups()                (none)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch

from qerl_sync.errors import ConfigError
from qerl_sync.worker.compat.coupling import require

require("trainer's side of weight transfer")

# Only now: what an older vLLM lacks is named, and is no ImportError.
from vllm.distributed.weight_transfer import base as base  # noqa: E402

DECLARES_OWNERS = hasattr(base.WeightSource, "owned_names")


def as_declared(method: Callable[[Any], list[Any]]) -> Any:
    """Make this method what `WeightSource.metadata` is. Since 0.33 it is asked once."""
    return cached_property(method) if DECLARES_OWNERS else method


def metas_of(source: base.WeightSource) -> list[Any]:
    """Return vLLM's ParamMeta of each tensor of the whole model."""
    metas = source.metadata
    return list(metas() if callable(metas) else metas)


def held_by(source: base.WeightSource, rank: int) -> frozenset[str] | None:
    """Return the names that this trainer rank holds; None: all."""
    if not DECLARES_OWNERS:
        held = source.held_names()
        return None if held is None else frozenset(held)
    owned = frozenset(source.owned_names(rank))
    return None if owned >= {meta.name for meta in metas_of(source)} else owned


def whole_tensors(source: base.WeightSource) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Begin a pass over whole tensors, in the order of the metadata.

    Raises:
        ConfigError: the source has pieces of tensors only (`iter_local`).
    """
    if not DECLARES_OWNERS:
        return iter(source)
    if not source.implements_iter_full():
        raise ConfigError(
            f"{type(source).__name__} has no iter_full(), and qerl-sync sends whole tensors; "
            "implement it, beside iter_local()"
        )
    return iter(source.iter_full())
