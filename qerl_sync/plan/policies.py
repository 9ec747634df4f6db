"""Orders for a stream: pure functions from metadata in source order to the same metadata."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

from qerl_sync.meta import ParamMeta
from qerl_sync.plan.layer_map import LayerMap

T = TypeVar("T", bound=Hashable)


def as_given(metas: Sequence[ParamMeta], layer_map: LayerMap) -> list[ParamMeta]:
    """Keep the source's own order."""
    return list(metas)


def by_parent_layer(metas: Sequence[ParamMeta], layer_map: LayerMap) -> list[ParamMeta]:
    """Put all tensors of a parent layer next to each other; keep the source's order otherwise.

    Layers come in the order of their first tensor, and the tensors of a layer in the order of the
    source. A tensor that lands in several layers joins them into one group, in which more than one
    layer is open by necessity. Everywhere else at most one is.
    """
    groups: dict[str | int, list[ParamMeta]] = {}
    for meta, label in zip(metas, group_labels(metas, layer_map), strict=True):
        groups.setdefault(label, []).append(meta)
    return [meta for group in groups.values() for meta in group]


def group_labels(metas: Sequence[ParamMeta], layer_map: LayerMap) -> list[str | int]:
    """Label each tensor. Those that must be sent together have one label: those of a parent layer,
    and of the layers that it shares tensors with. A tensor without a layer is alone."""
    joined = Joined[str]()
    parents = [layer_map.parents(meta.name) for meta in metas]
    for layers in parents:
        joined.join(layers)
    return [joined.root(layers[0]) if layers else place for place, layers in enumerate(parents)]


class Joined(Generic[T]):
    """Layers that are joined to groups, because tensors are shared among them."""

    def __init__(self) -> None:
        self._above: dict[T, T] = {}

    def join(self, layers: Sequence[T]) -> None:
        for other in layers[1:]:
            ours, theirs = self.root(layers[0]), self.root(other)
            if ours != theirs:
                self._above[theirs] = ours

    def __bool__(self) -> bool:
        """Return whether any are joined."""
        return bool(self._above)

    def root(self, layer: T) -> T:
        """Return the layer that stands for all that are joined with this one."""
        while layer in self._above:
            layer = self._above[layer]
        return layer
