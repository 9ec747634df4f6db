"""One layer map to plan with, of workers that hold different parts of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qerl_sync.errors import LayerMapError
from qerl_sync.plan.layer_map import Contribution, LayerMap, Loading, ParentLayer


def joint_map(maps: Sequence[LayerMap]) -> LayerMap:
    """Return one layer map to plan with, where ranks hold different parts of the model.

    A tensor's parents are those that it has on any rank, with what most elements of it are worth
    on one, so that a plan that holds for the joint map holds for each rank.

    Raises:
        LayerMapError: no rank does anything with a tensor.
    """
    if untaken := frozenset.intersection(*(one.elsewhere for one in maps)):
        raise LayerMapError(
            f"no pipeline stage of the engine does anything with {min(untaken)!r} (and "
            f"{len(untaken) - 1} more); its weights would stay as they are. Do not send it, or, if "
            "that is right, name it in sync.ignore_names"
        )
    if all(other.digest == maps[0].digest for other in maps[1:]):
        return maps[0]
    layers: dict[str, ParentLayer] = {}
    contributions: dict[str, dict[tuple[str, str, int], Contribution]] = {}
    for one in maps:
        for name, layer in one.layers.items():
            known = layers.setdefault(name, layer)
            if layer.expected_numel > known.expected_numel:
                layers[name] = layer
        for name, found in one.contributions.items():
            mine = contributions.setdefault(name, {})
            # A tensor may land in one parameter more than once: its nth time on one rank is
            # compared with its nth time on another.
            counted: dict[tuple[str, str], int] = {}
            for c in found:
                place = (c.parent_layer, c.parameter)
                counted[place] = counted.get(place, -1) + 1
                key = (*place, counted[place])
                if key not in mine or c.held_bytes > mine[key].held_bytes:
                    mine[key] = c
    joined = {name: tuple(found.values()) for name, found in contributions.items()}
    # What any rank buffers is planned as buffered.
    loading: dict[str, Loading] = {name: layer.loading for name, layer in layers.items()}
    for one in maps:
        layerwise = (name for name, layer in one.layers.items() if layer.loading == "layerwise")
        loading.update(dict.fromkeys(layerwise, "layerwise"))
    expected: dict[str, int] = dict.fromkeys(layers, 0)
    for found in joined.values():
        for c in found:
            expected[c.parent_layer] += c.loaded_numel
    return LayerMap(
        layers={
            name: replace(
                layer,
                total_numel=max(layer.total_numel, expected[name]),
                expected_numel=expected[name],
                loading=loading[name],
            )
            for name, layer in layers.items()
        },
        contributions=joined,
    )
