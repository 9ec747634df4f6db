"""Orders for a stream: pure functions from metadata in source order to the same metadata."""

from __future__ import annotations

from collections.abc import Sequence

from qerl_sync.meta import ParamMeta
from qerl_sync.plan.layer_map import LayerMap


def as_given(metas: Sequence[ParamMeta], layer_map: LayerMap) -> list[ParamMeta]:
    """The source's own order."""
    return list(metas)


def by_parent_layer(metas: Sequence[ParamMeta], layer_map: LayerMap) -> list[ParamMeta]:
    """All tensors of a parent layer next to each other; otherwise the source's order.

    Layers come in the order of their first tensor, and the tensors of a layer in the order of the
    source. A tensor that lands in several layers joins them into one group, in which more than one
    layer is open by necessity. Everywhere else at most one is.
    """
    groups: dict[str, list[ParamMeta]] = {}
    group_of = _groups(metas, layer_map)
    for meta in metas:
        groups.setdefault(group_of[meta.name], []).append(meta)
    return [meta for group in groups.values() for meta in group]


def _groups(metas: Sequence[ParamMeta], layer_map: LayerMap) -> dict[str, str]:
    """A label for each name, equal for names that are connected by shared parent layers."""
    parent: dict[str, str] = {}

    def root(label: str) -> str:
        while parent.setdefault(label, label) != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    labels: dict[str, str] = {}
    for meta in metas:
        first, *others = layer_map.parents(meta.name) or (f"alone:{meta.name}",)
        labels[meta.name] = first
        for other in others:
            parent[root(other)] = root(first)
    return {name: root(label) for name, label in labels.items()}
