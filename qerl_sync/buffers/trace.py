"""The trace of a sync: memory held after each tensor. One type for prediction and measurement."""

from __future__ import annotations

from collections.abc import Iterable
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


class Trace:
    """One step for each checkpoint tensor, in stream order. Immutable.

    It is kept in columns, of which a plan of 65,000 tensors makes two; steps are made when they are
    asked for.
    """

    def __init__(self, steps: Iterable[TraceStep]) -> None:
        self._set(*zip(*steps, strict=True))

    @classmethod
    def of_columns(cls, *columns: Iterable[Any]) -> Trace:
        """Return a trace made from the columns of its steps, in the order of `TraceStep`."""
        trace = cls(())
        trace._set(*columns)
        return trace

    def _set(
        self,
        names: Iterable[str] = (),
        buffered_bytes: Iterable[int] = (),
        pinned_bytes: Iterable[int] = (),
        open_layers: Iterable[int] = (),
    ) -> None:
        marks = tuple(buffered_bytes), tuple(pinned_bytes), tuple(open_layers)
        self._columns = tuple(names), *marks

    @cached_property
    def steps(self) -> tuple[TraceStep, ...]:
        return tuple(map(TraceStep._make, zip(*self._columns, strict=True)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trace) and self._columns == other._columns

    def __hash__(self) -> int:
        return hash(self._columns)

    def __repr__(self) -> str:
        return (
            f"Trace({len(self._columns[0])} steps, peak_buffered_bytes={self.peak_buffered_bytes}, "
            f"peak_pinned_bytes={self.peak_pinned_bytes}, max_open_layers={self.max_open_layers})"
        )

    @property
    def peak_buffered_bytes(self) -> int:
        return max(self._columns[1], default=0)

    @property
    def peak_pinned_bytes(self) -> int:
        return max(self._columns[2], default=0)

    @property
    def max_open_layers(self) -> int:
        return max(self._columns[3], default=0)

    @cached_property
    def peak_index(self) -> int:
        """Return the index of the first step with the highest buffered bytes."""
        return self._columns[1].index(self.peak_buffered_bytes)

    @cached_property
    def peak_pinned_index(self) -> int:
        """Return the index of the first step with the highest pinned bytes."""
        return self._columns[2].index(self.peak_pinned_bytes)

    @cached_property
    def max_open_index(self) -> int:
        """Return the index of the first step with the most open layers."""
        return self._columns[3].index(self.max_open_layers)

    def first_difference(self, measured: Trace) -> str | None:
        """Describe where a measured trace first differs from this prediction; None: nowhere."""
        if self == measured:  # nearly always, and it makes no steps
            return None
        for i, (mine, theirs) in enumerate(zip(self.steps, measured.steps, strict=False)):
            for field, a, b in zip(TraceStep._fields, mine, theirs, strict=True):
                if a != b:
                    return f"tensor {i} ({mine.name}): {field} predicted {a}, measured {b}"
        if len(self.steps) != len(measured.steps):
            return f"{len(self.steps)} tensors predicted, {len(measured.steps)} measured"
        return None

    def to_json(self) -> dict[str, Any]:
        return {f: list(c) for f, c in zip(TraceStep._fields, self._columns, strict=True)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trace:
        return cls.of_columns(*(data[field] for field in TraceStep._fields))
