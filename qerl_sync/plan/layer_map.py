"""Map checkpoint tensors to the parent layers that they land in, with elements and bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from operator import attrgetter
from typing import Any, Literal, NamedTuple

# How a worker gets the tensors of a parent layer into the memory that its kernels read.
# layerwise: vLLM's reload holds them until all have arrived, materialises the layer, processes it
#     and copies the result.
# direct: vLLM's loaders write each tensor there as it arrives. Kernels read what loaders write.
# in place: the same, and the layer is processed at the end of the sync: kernels read another
#     layout of the same size in the same memory. Only for layers that loaders write past the
#     reload, where a layerwise load would lose the tensors.
Loading = Literal["layerwise", "direct", "in place"]


class Contribution(NamedTuple):
    """The share of one checkpoint tensor in one parameter of one parent layer.

    Attributes:
        parent_layer: the vLLM module's path (`model.layers.0.self_attn.qkv_proj`).
        parameter: the parameter's name in it (`weight`).
        loaded_numel: elements that vLLM counts towards the layer, after any sharding.
        held_bytes: bytes of the views that vLLM keeps until the layer is whole, before sharding.
            0: the model's loader writes the tensor past the reload.
        aliases_source: the views share the checkpoint tensor's storage; otherwise the model's
            loader made a copy, which has a storage of its own.
    """

    parent_layer: str
    parameter: str
    loaded_numel: int
    held_bytes: int
    aliases_source: bool


@dataclass(frozen=True)
class ParentLayer:
    """A vLLM module that owns parameters.

    Attributes:
        name: the module's path.
        kind: its class name (`QKVParallelLinear`).
        total_numel: elements that must arrive before vLLM processes the layer by itself.
        expected_numel: elements that the stream brings. Fewer than `total_numel` where the
            layer is padded; the receiver then closes it when these have arrived.
        deferred: processed at the end of the sync, whatever arrives (attention layers).
        loading: how its tensors get there. A layer that is not `layerwise` holds nothing.
        num_loads: calls of its weight loaders that fill it.
    """

    name: str
    kind: str
    total_numel: int
    expected_numel: int
    deferred: bool = False
    loading: Loading = "layerwise"
    num_loads: int = 0

    @property
    def closes_at_numel(self) -> int:
        return min(self.total_numel, self.expected_numel)


_layer_fields = attrgetter(*(field.name for field in fields(ParentLayer)))


@dataclass(frozen=True)
class LayerMap:
    """Checkpoint names -> contributions, and the parent layers that they refer to.

    It holds for one stream (names, dtypes, shapes) and one model layout (architecture,
    quantisation, tensor-parallel rank). A name with no contribution is written by vLLM on arrival
    or known to be ignored, and costs no buffer.

    Attributes:
        elsewhere: names that this rank, a pipeline stage, does nothing with: another must take
            them.
        one_tensor_calls: this vLLM's loader takes all tensors of a call before it loads the first.
            The receiver calls it with one tensor at a time, so that none is held uncounted.
    """

    layers: Mapping[str, ParentLayer]
    contributions: Mapping[str, tuple[Contribution, ...]]
    elsewhere: frozenset[str] = frozenset()
    one_tensor_calls: bool = False

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 over every field."""
        # By columns: one JSON of nested lists takes twice as long.
        contributions = self.contributions
        columns: Iterable[Iterable[Any]] = (
            contributions,
            map(len, contributions.values()),
            *zip(*chain.from_iterable(contributions.values()), strict=True),
            *zip(*map(_layer_fields, self.layers.values()), strict=True),
            *([sorted(self.elsewhere)] if self.elsewhere else []),
            *([["one_tensor_calls"]] if self.one_tensor_calls else []),
        )
        digest = hashlib.sha256()
        for values in map(list, columns):
            is_text = bool(values) and isinstance(values[0], str)
            text = "\0".join(values) if is_text else json.dumps(values)
            digest.update(text.encode() + b"\n")
        return digest.hexdigest()

    @cached_property
    def _never_open(self) -> frozenset[str]:
        layers = self.layers.values()
        return frozenset(one.name for one in layers if one.deferred or one.loading != "layerwise")

    def parents(self, name: str) -> tuple[str, ...]:
        """Return the parent layers that `name` lands in and that wait for their other tensors: all
        but deferred ones, and those that are not loaded layerwise."""
        layers = tuple([c.parent_layer for c in self.contributions[name]])
        if self._never_open.isdisjoint(layers):
            return layers
        return tuple(layer for layer in layers if layer not in self._never_open)

    @cached_property
    def past_reload(self) -> frozenset[str]:
        """Return the names that the model's loader writes past vLLM's reload, into layers that are
        loaded where they stay."""
        return frozenset(
            name
            for name, landed in self.contributions.items()
            if any(not c.held_bytes and c.loaded_numel for c in landed)
        )

    def parents_text(self, name: str) -> str:
        """Return its parent layers for a person; "" where it has none."""
        return ", ".join(dict.fromkeys(c.parent_layer for c in self.contributions.get(name, ())))

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": [dict(vars(layer)) for layer in self.layers.values()],
            "contributions": {n: [list(c) for c in cs] for n, cs in self.contributions.items()},
            "elsewhere": sorted(self.elsewhere),
            "one_tensor_calls": self.one_tensor_calls,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LayerMap:
        layers = (ParentLayer(**fields) for fields in data["layers"])
        return cls(
            layers={layer.name: layer for layer in layers},
            contributions={
                name: tuple(Contribution(*c) for c in contributions)
                for name, contributions in data["contributions"].items()
            },
            elsewhere=frozenset(data.get("elsewhere", ())),
            one_tensor_calls=data.get("one_tensor_calls", False),
        )
