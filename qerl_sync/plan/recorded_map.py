"""Layer maps as data, for machines without vLLM: name patterns that were observed from vLLM.

`layer_maps.json` holds for each architecture where its checkpoint's tensors land on one rank
without quantisation, as vLLM's own model class showed on the meta device. In a pattern `*` stands
for a number; the numbers of a parent layer are the first ones of the tensor's name. Patterns of
one size hold at others: `scripts/layer-maps` keeps an architecture only if the patterns of a small
model give the observed map of a larger one.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qerl_sync.errors import LayerMapError
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.layer_map import Contribution, LayerMap, ParentLayer

FILE = Path(__file__).with_name("layer_maps.json")
VOCABULARY_STEP = 64  # vLLM's DEFAULT_VOCAB_PADDING_SIZE


class Landing(NamedTuple):
    """Name a parameter that the tensors of a name pattern land in, as a whole."""

    parent_layer: str
    parameter: str
    aliases_source: bool


class LayerKind(NamedTuple):
    """Describe a kind of parent layer.

    Attributes:
        kind: its class name.
        padded: it has the rows of a vocabulary, of which vLLM makes a multiple of 64.
        deferred: processed at the end of the sync.
    """

    kind: str
    padded: bool
    deferred: bool


class RecordedMap(NamedTuple):
    """The layer map of an architecture at any size."""

    tensors: Mapping[str, tuple[Landing, ...]]
    layers: Mapping[str, LayerKind]

    def layer_map(self, metas: Iterable[ParamMeta]) -> LayerMap:
        """Return where these tensors land.

        Raises:
            LayerMapError: the architecture had no tensor of such a name when it was observed.
        """
        contributions: dict[str, tuple[Contribution, ...]] = {}
        numel: dict[str, int] = defaultdict(int)
        rows: dict[str, int] = {}
        for meta in metas:
            pattern, numbers = generalised(meta.name)
            if pattern not in self.tensors:
                raise LayerMapError(
                    f"{meta.name!r}: the recorded map of this architecture has no tensor of that "
                    "kind; install vLLM, which then says where it lands",
                    tensor=meta.name,
                )
            landings = []
            for landing in self.tensors[pattern]:
                layer = filled(landing.parent_layer, numbers)
                numel[layer] += meta.numel
                found = (meta.numel, meta.nbytes, landing.aliases_source)
                landings.append(Contribution(layer, landing.parameter, *found))
                rows[layer] = meta.shape[0] if meta.shape else 1
            contributions[meta.name] = tuple(landings)
        layers = {}
        for layer, expected in numel.items():
            kind = self.layers[generalised(layer)[0]]
            # vLLM pads vocabularies with rows that no checkpoint has: the stream cannot fill them.
            missing = -rows[layer] % VOCABULARY_STEP if kind.padded else 0
            total = expected + missing * (expected // rows[layer])
            layers[layer] = ParentLayer(layer, kind.kind, total, expected, kind.deferred)
        return LayerMap(layers, contributions)

    def to_json(self) -> dict[str, Any]:
        return {
            "tensors": {name: [list(one) for one in all_] for name, all_ in self.tensors.items()},
            "layers": {name: list(kind) for name, kind in self.layers.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RecordedMap:
        return cls(
            {name: tuple(Landing(*one) for one in all_) for name, all_ in data["tensors"].items()},
            {name: LayerKind(*kind) for name, kind in data["layers"].items()},
        )


@functools.cache
def recorded_maps() -> tuple[str, Mapping[str, RecordedMap]]:
    """Return the vLLM that was observed, and the recorded map of each architecture."""
    content = json.loads(FILE.read_text("utf-8"))
    maps = {name: RecordedMap.from_json(data) for name, data in content["architectures"].items()}
    return content["vllm"], maps


def generalised(path: str) -> tuple[str, list[str]]:
    """Return a dotted path with `*` for each number in it, and those numbers."""
    parts = path.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return ".".join("*" if part.isdigit() else part for part in parts), numbers


def filled(pattern: str, numbers: list[str]) -> str:
    """Return the path that a pattern stands for, its numbers the first of `numbers`."""
    found = iter(numbers)
    return ".".join(next(found) if part == "*" else part for part in pattern.split("."))
