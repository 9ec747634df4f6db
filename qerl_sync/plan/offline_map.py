"""Hold a layer map that was made without an engine, and the stream that it is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qerl_sync.meta import ParamMeta, metas_from_json, metas_to_json
from qerl_sync.plan.layer_map import LayerMap

Origin = Literal["probe", "cache", "recorded"]


@dataclass(frozen=True)
class OfflineMap:
    """The tensors that a trainer would send of a model, and where they land in vLLM.

    Attributes:
        metas: the trainer's tensors in its own order (`named_parameters`), under checkpoint names.
        layer_map: where each lands.
        origin: observed from vLLM's model class now (`probe`) or earlier (`cache`), or made from
            patterns that qerl-sync brings (`recorded`, see `plan.recorded_map`).
        vllm_version: the vLLM that was observed.
        note: what a reader of the numbers must know, in sentences. May be empty.
        seconds: what the parts of the probe took.
    """

    metas: list[ParamMeta]
    layer_map: LayerMap
    origin: Origin
    vllm_version: str
    note: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)

    def to_json(self) -> dict[str, Any]:
        layer_map = self.layer_map.to_json()
        return {**vars(self), "metas": metas_to_json(self.metas), "layer_map": layer_map}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OfflineMap:
        """Read a map. Raise KeyError, TypeError or ValueError if `data` is not of `to_json`."""
        layer_map = LayerMap.from_json(data["layer_map"])
        return cls(**{**data, "metas": metas_from_json(data["metas"]), "layer_map": layer_map})
