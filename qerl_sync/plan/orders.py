"""Orders in which a source may yield its tensors, by name: pure functions on metadata."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest

from qerl_sync.errors import ConfigError
from qerl_sync.meta import ParamMeta

Reorder = Callable[[Sequence[ParamMeta]], list[ParamMeta]]


def hf(metas: Sequence[ParamMeta]) -> list[ParamMeta]:
    """Keep the order in which the trainer's model yields them (`named_parameters`)."""
    return list(metas)


def alphabetical(metas: Sequence[ParamMeta]) -> list[ParamMeta]:
    """Sort by name, as safetensors files are written."""
    return sorted(metas, key=lambda meta: meta.name)


def size(metas: Sequence[ParamMeta]) -> list[ParamMeta]:
    """Sort the largest first, as bucketing transports like it."""
    return sorted(metas, key=lambda meta: -meta.nbytes)


def optimizer(metas: Sequence[ParamMeta]) -> list[ParamMeta]:
    """Put matrices first, then vectors: optimizers keep them in groups with and without decay."""
    return sorted(metas, key=lambda meta: len(meta.shape) < 2)


def shuffled(seed: int) -> Reorder:
    """Return a random order, the same for the same seed."""

    def order(metas: Sequence[ParamMeta]) -> list[ParamMeta]:
        result = list(metas)
        random.Random(seed).shuffle(result)
        return result

    return order


def interleaved(producers: int) -> Reorder:
    """Return the order of `producers` senders that hold one contiguous part each and take turns."""

    def order(metas: Sequence[ParamMeta]) -> list[ParamMeta]:
        part = -(-len(metas) // producers) or 1
        parts = [metas[start : start + part] for start in range(0, len(metas), part)]
        turns = chain.from_iterable(zip_longest(*parts))
        return [meta for meta in turns if meta is not None]

    return order


FIXED: dict[str, Reorder] = {
    "hf": hf,
    "alphabetical": alphabetical,
    "size": size,
    "optimizer": optimizer,
}
WITH_NUMBER: dict[str, Callable[[int], Reorder]] = {
    "random": shuffled,
    "interleaved": interleaved,
}


def parse_order(text: str) -> Reorder:
    """Return the order of that name: hf, alphabetical, size, optimizer, random:SEED, interleaved:N.

    Raises:
        ConfigError: no such order, or its number is missing or cannot be right.
    """
    name, _, number = text.partition(":")
    if name in FIXED and not number:
        return FIXED[name]
    if name in WITH_NUMBER and number.isdecimal() and (name == "random" or int(number) > 0):
        return WITH_NUMBER[name](int(number))
    raise ConfigError(
        f"unknown source order {text!r}; choose {', '.join(FIXED)}, random:SEED (random:0) or "
        "interleaved:N (interleaved:4)"
    )
