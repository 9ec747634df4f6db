"""A LoRA adapter that travels beside base tensors, as a value. No tensor in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qerl_sync.meta import ParamMeta, metas_from_json, metas_to_json


@dataclass(frozen=True)
class Adapter:
    """Describe a LoRA adapter to a worker that is to serve it.

    Attributes:
        metas: its tensors, by the names that PEFT's `save_pretrained` gives them, without
            `base_model.model.`: `model.layers.0.self_attn.q_proj.lora_A.weight`.
        scalings: by the path of the layer that it is added to, the factor of B A x. PEFT computes
            it from `lora_alpha`, `use_rslora` and the patterns; vLLM knows one for all layers.
    """

    metas: tuple[ParamMeta, ...]
    scalings: Mapping[str, float]

    @property
    def nbytes(self) -> int:
        return sum(meta.nbytes for meta in self.metas)

    @property
    def rank(self) -> int:
        """Return the largest rank of its layers."""
        first_factors = (".lora_A.weight", ".lora_embedding_A")  # with one row for each rank
        return max(meta.shape[0] for meta in self.metas if meta.name.endswith(first_factors))

    def to_json(self) -> dict[str, Any]:
        return {"metas": metas_to_json(self.metas), "scalings": dict(self.scalings)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Adapter:
        return cls(tuple(metas_from_json(data["metas"])), dict(data["scalings"]))
