"""Options of one sync, besides its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verify = Literal["off", "coverage", "checksum", "full"]
OnFailure = Literal["poison", "rollback"]
FiniteCheck = Literal["source", "worker", "nobody"]
Load = Literal["auto", "layerwise"]


@dataclass(frozen=True)
class MapOptions:
    """Hold what the session asks of a layer map.

    Attributes:
        allow_incomplete: fnmatch patterns of parent layers that may miss elements.
        load: see `SyncConfig`.
    """

    allow_incomplete: Sequence[str] = ()
    load: Load = "auto"


@dataclass(frozen=True)
class SyncOptions:
    """Hold what the session asks of the transport, and the transport of its workers, for one sync.

    Attributes:
        version: of the weights once they are committed.
        verify, on_failure: see `SyncConfig`.
        finite_check: which side looks for NaN and infinite values. The worker looks for values that
            its dtype cannot hold unless it is "nobody".
        stable: the source's tensors keep their values to the end of the sync (`Source.stable`), so
            that the transport may send from where they lie.
        held: the names that this trainer rank can send; None: all.
        base: the version that workers must hold for a plan that leaves tensors out: what does not
            travel stays as it is in that version. None: the plan sends everything.
        is_base: a later sync may build on this one, so that workers remember what their kernels
            hold at its end.
        mirror: a later sync may send changed elements alone, so that both sides keep what is sent
            (`wire.mirror`), where the transport sends them so.
        changes_from: the version that both sides must have kept so, for this sync to send what has
            changed since. None: tensors travel whole.
        record_spans: workers report when they did what (`sync.trace`).
    """

    version: int = 0
    verify: Verify = "coverage"
    on_failure: OnFailure = "poison"
    finite_check: FiniteCheck = "worker"
    stable: bool = False
    held: frozenset[str] | None = None
    base: int | None = None
    is_base: bool = False
    mirror: bool = False
    changes_from: int | None = None
    record_spans: bool = False

    @property
    def checksums(self) -> bool:
        return self.verify in ("checksum", "full")
