"""The trace of a sync: what is held after each tensor. One type, predicted and measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple


class TraceStep(NamedTuple):
    """High-water marks while one checkpoint tensor is handed to the receiver.

    They are taken when the tensor has been buffered and before a layer that it completes is
    released, so a layer that closes counts as open in the step that closes it.

    Attributes:
        name: the checkpoint tensor's name.
        buffered_bytes: sum of the bytes of all held views (vLLM's `get_info_size`).
        pinned_bytes: bytes of the unique storages that those views keep alive.
        open_layers: parent layers that have some of their elements and are not processed yet.
            Deferred layers (attention scales) hold bytes but do not count, as in vLLM's warning.
    """

    name: str
    buffered_bytes: int
    pinned_bytes: int
    open_layers: int


@dataclass(frozen=True)
class Trace:
    """One step for each checkpoint tensor, in stream order."""

    steps: tuple[TraceStep, ...]

    @cached_property
    def peak_buffered_bytes(self) -> int:
        return max((s.buffered_bytes for s in self.steps), default=0)

    @cached_property
    def peak_pinned_bytes(self) -> int:
        return max((s.pinned_bytes for s in self.steps), default=0)

    @cached_property
    def max_open_layers(self) -> int:
        return max((s.open_layers for s in self.steps), default=0)

    @cached_property
    def peak_index(self) -> int:
        """Index of the first step with the highest buffered bytes."""
        return max(range(len(self.steps)), key=lambda i: (self.steps[i].buffered_bytes, -i))

    def first_difference(self, other: Trace) -> str | None:
        """None if both are equal, tensor by tensor; else what differs first, for a person."""
        for i, (mine, theirs) in enumerate(zip(self.steps, other.steps, strict=False)):
            for field, a, b in zip(TraceStep._fields, mine, theirs, strict=True):
                if a != b:
                    return f"tensor {i} ({mine.name}): {field} is {a} here and {b} there"
        if len(self.steps) != len(other.steps):
            return f"{len(self.steps)} tensors here and {len(other.steps)} there"
        return None

    def to_json(self) -> dict[str, Any]:
        columns = zip(*self.steps, strict=True) if self.steps else ([], [], [], [])
        return {f: list(c) for f, c in zip(TraceStep._fields, columns, strict=True)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trace:
        columns = (data[field] for field in TraceStep._fields)
        return cls(tuple(TraceStep(*row) for row in zip(*columns, strict=True)))
