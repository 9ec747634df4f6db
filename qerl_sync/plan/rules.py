"""A layer map by rules, for machines without vLLM: an estimate for one unquantised, unsharded rank.

The rules say how vLLM stacks a checkpoint: q, k and v into one linear layer, gate and up into
another, all experts of a block into one module; vocabularies are padded to a multiple of 64 rows; a
tied head has no tensor of its own. Modules that get nothing from a checkpoint (rotary caches,
attention scales) hold nothing during a sync and are left out. `architectures` has the tables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from qerl_sync.errors import CoverageError, PlanError
from qerl_sync.meta import DTYPE_BITS, ParamMeta
from qerl_sync.plan.architectures import Block, Slot, architecture_name, blocks_of
from qerl_sync.plan.layer_map import Contribution, LayerMap, ParentLayer


@dataclass
class _Place:
    """Where tensors of one shape land: the gates of all experts of a layer share one."""

    shape: tuple[int, ...]
    module: str
    parameter: str
    numel: int
    landings: dict[str, tuple[Contribution, ...]] = field(default_factory=dict)

    def landing(self, dtype: str) -> tuple[Contribution, ...]:
        found = self.landings.get(dtype)
        if found is None:
            held_bytes = ParamMeta(self.module, dtype, self.shape).nbytes
            found = (Contribution(self.module, self.parameter, self.numel, held_bytes, True),)
            self.landings[dtype] = found
        return found


def rules_map(config: Mapping[str, Any], metas: Sequence[ParamMeta]) -> LayerMap:
    """Where each of `metas` lands, by the rules for the architecture that `config` names.

    Raises:
        PlanError: the architecture, a configuration or a tensor is not one that the rules know.
        CoverageError: `metas` lacks tensors that the architecture has.
    """
    blocks = blocks_of(config)
    places = _places(blocks)
    contributions: dict[str, tuple[Contribution, ...]] = {}
    for meta in metas:
        name = meta.name
        place = places.get(name)
        if place is None or place.shape != meta.shape or name in contributions:
            raise PlanError(_surprise(config, meta, place))
        contributions[name] = place.landing(meta.dtype)
    if len(contributions) < len(places):
        first = next(name for name in places if name not in contributions)
        raise CoverageError(
            f"{len(places) - len(contributions)} tensors of {architecture_name(config)} are "
            f"missing, the first is {first!r}; is this another model's config.json, or a "
            "truncated list?"
        )
    return LayerMap(_layers(blocks), contributions)


def _places(blocks: Sequence[Block]) -> dict[str, _Place]:
    """The place of each name."""
    places = {}
    for prefix, slots in blocks:
        shared: dict[tuple[object, ...], _Place] = {}
        for slot in slots:
            place = shared.get(slot[1:])
            if place is None:
                place = _Place(slot.shape, prefix + slot.module, slot.parameter, prod(slot.shape))
                shared[slot[1:]] = place
            places[prefix + slot.name] = place
    return places


def _layers(blocks: Sequence[Block]) -> dict[str, ParentLayer]:
    """The modules that all slots together fill."""
    layers = {}
    filled = {id(slots): _filled(slots) for _, slots in blocks}  # alike blocks share their slots
    for prefix, slots in blocks:
        for module, kind, room, brought in filled[id(slots)]:
            layers[prefix + module] = ParentLayer(prefix + module, kind, room, brought)
    return layers


def _filled(slots: Sequence[Slot]) -> list[tuple[str, str, int, int]]:
    """Each module with its kind, its room and the elements that are brought to it."""
    room, brought = Counter[str](), Counter[str]()
    for slot in slots:
        room[slot.module] += slot.room
        brought[slot.module] += prod(slot.shape)
    kinds = {slot.module: slot.kind for slot in slots}
    return [(module, kind, room[module], brought[module]) for module, kind in kinds.items()]


def rules_metas(config: Mapping[str, Any], dtype: str | None = None) -> list[ParamMeta]:
    """What a trainer sends of this model, in the order of transformers 5, without transformers.

    Args:
        dtype: of all tensors; by default that of the config.

    Raises:
        PlanError: see `rules_map`.
    """
    dtype = str(dtype or config.get("dtype") or config.get("torch_dtype") or "float32")
    if dtype not in DTYPE_BITS:
        raise PlanError(f"the config's dtype is {dtype!r}; known are {', '.join(DTYPE_BITS)}")
    return [
        ParamMeta(prefix + slot.name, dtype, slot.shape)
        for prefix, slots in blocks_of(config)
        for slot in slots
    ]


def _surprise(config: Mapping[str, Any], meta: ParamMeta, place: _Place | None) -> str:
    name = architecture_name(config)
    if place is None:
        return f"the rules for {name} know no tensor {meta.name!r}"
    if place.shape != meta.shape:
        return (
            f"{meta.name!r} is {list(meta.shape)}; by its config.json, this {name} has it as "
            f"{list(place.shape)}"
        )
    return f"{meta.name!r} is named twice"
