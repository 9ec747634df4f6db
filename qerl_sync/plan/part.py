"""Choose the tensors that a sync of a part of the model sends: whole parent layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from qerl_sync.errors import CoverageError
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.policies import Joined


def part_to_send(
    metas: Sequence[ParamMeta], layer_map: LayerMap, unchanged: Collection[str]
) -> list[ParamMeta]:
    """Return the tensors that may have changed, with all that share a parent layer with them, in
    stream order.

    Args:
        metas: the whole stream.
        unchanged: names whose values the workers hold already.
    """
    if all(meta.name in unchanged for meta in metas):  # in nearly each sync of an adapter
        return []
    roots = _roots(metas, layer_map)
    moving = {root for meta, root in zip(metas, roots, strict=True) if meta.name not in unchanged}
    return [meta for meta, root in zip(metas, roots, strict=True) if root in moving]


def smallest_part(metas: Sequence[ParamMeta], layer_map: LayerMap) -> list[ParamMeta]:
    """Return the tensors with the fewest bytes that can travel without others."""
    roots = _roots(metas, layer_map)
    nbytes: Counter[str] = Counter()
    for meta, root in zip(metas, roots, strict=True):
        nbytes[root] += meta.nbytes
    smallest = min(nbytes, key=nbytes.__getitem__)
    return [meta for meta, root in zip(metas, roots, strict=True) if root == smallest]


def _roots(metas: Sequence[ParamMeta], layer_map: LayerMap) -> list[str]:
    """Label each tensor: those that must travel together have one label."""
    # vLLM writes some tensors as they arrive (biases), and processing their layer may change them:
    # such a tensor and the rest of its checkpoint module travel together.
    alone = {_module(meta.name) for meta in metas if not layer_map.contributions[meta.name]}
    joined = Joined[str]()
    places: list[list[str]] = []
    for meta in metas:
        place = [c.parent_layer for c in layer_map.contributions[meta.name]]
        if _module(meta.name) in alone:
            place.append(f"checkpoint module {_module(meta.name)}")
        places.append(place)
        joined.join(place)
    return [joined.root(place[0]) for place in places]


def filled_layers(metas: Iterable[ParamMeta], layer_map: LayerMap) -> frozenset[str]:
    """Return the parent layers that a stream fills.

    Raises:
        CoverageError: it brings some of a layer's elements and not the others.
    """
    brought: Counter[str] = Counter()
    for meta in metas:
        for given in layer_map.contributions[meta.name]:
            brought[given.parent_layer] += given.loaded_numel
    for path, numel in brought.items():
        expected = layer_map.layers[path].expected_numel
        if numel != expected:
            raise CoverageError(
                f"the plan brings {numel:,} of the {expected:,} elements of {path} "
                f"({layer_map.layers[path].kind}), and the rest would be lost; send all tensors of "
                "a parent layer or none",
                layer=path,
                expected=expected,
                got=numel,
            )
    return frozenset(brought)


def _module(name: str) -> str:
    return name.rpartition(".")[0]
