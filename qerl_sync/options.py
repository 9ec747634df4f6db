"""Options of one sync, besides its plan."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Verify = Literal["off", "coverage", "checksum", "full"]
OnFailure = Literal["poison", "rollback"]
FiniteCheck = Literal["source", "worker", "nobody"]


@dataclass(frozen=True)
class SyncOptions:
    """Hold what the session asks of the transport, and the transport of its workers, for one sync.

    Attributes:
        version: of the weights once they are committed. A worker gets it with the commit.
        verify, on_failure: see `SyncConfig`.
        finite_check: which side looks for NaN and infinite values. The worker looks for values that
            its dtype cannot hold unless it is "nobody".
        stable: the source's tensors keep their values to the end of the sync (`Source.stable`), so
            that the transport may send from where they lie.
        base: what the base weights are called that a sync sends, or that its adapter, sent alone,
            belongs to; empty: nothing will be sent upon them.
        held: the names that this trainer rank can send; None: all.
    """

    version: int = 0
    verify: Verify = "coverage"
    on_failure: OnFailure = "poison"
    finite_check: FiniteCheck = "worker"
    stable: bool = False
    base: str = ""
    held: Collection[str] | None = None

    @property
    def checksums(self) -> bool:
        return self.verify in ("checksum", "full")
