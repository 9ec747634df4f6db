"""Streams so small that every order of them can be looked at. Shares no code with the library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from qerl_sync.meta import ParamMeta
from qerl_sync.plan.layer_map import Contribution, LayerMap, ParentLayer

# (parent layer, bytes) of each tensor in the source's order; each has a storage of its own.
Small = Sequence[tuple[int, int]]


def as_stream(small: Small) -> tuple[list[ParamMeta], LayerMap]:
    metas = [
        ParamMeta(f"tensor.{place}", "int8", (nbytes,)) for place, (_, nbytes) in enumerate(small)
    ]
    totals: Counter[int] = Counter()
    contributions = {}
    for meta, (layer, nbytes) in zip(metas, small, strict=True):
        totals[layer] += nbytes
        contributions[meta.name] = (Contribution(f"layer.{layer}", "weight", nbytes, nbytes, True),)
    layers = {f"layer.{i}": ParentLayer(f"layer.{i}", "Linear", n, n) for i, n in totals.items()}
    return metas, LayerMap(layers, contributions)


def places(metas: Sequence[ParamMeta]) -> list[int]:
    return [int(meta.name.removeprefix("tensor.")) for meta in metas]


def peak(small: Small, order: Sequence[int]) -> int:
    """The most bytes held while `order`, or the beginning of one, is delivered."""
    left = Counter(layer for layer, _ in small)
    held: Counter[int] = Counter()
    highest = 0
    for place in order:
        layer, nbytes = small[place]
        held[layer] += nbytes
        left[layer] -= 1
        highest = max(highest, held.total())
        if not left[layer]:
            held[layer] = 0
    return highest


def orders_within(small: Small, budget: int, sent: Sequence[int] = ()) -> Iterator[list[int]]:
    """All orders that begin with `sent` and never hold more than `budget`."""
    if peak(small, sent) > budget:
        return
    left = [place for place in range(len(small)) if place not in sent]
    if not left:
        yield list(sent)
    for place in left:
        yield from orders_within(small, budget, [*sent, place])


def followed(order: Sequence[int]) -> int:
    """For how many tensors an order follows the source before it first leaves it."""
    return next((i for i, place in enumerate(order) if place != i), len(order))


def moved(order: Sequence[int]) -> int:
    """How many tensors must be taken out so that the rest is in the source's order."""
    kept: list[int] = []  # the longest ascending run that ends with each tensor
    for i, place in enumerate(order):
        kept.append(1 + max((kept[j] for j in range(i) if order[j] < place), default=0))
    return len(order) - max(kept, default=0)
