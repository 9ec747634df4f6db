"""What a sync promises besides its plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verify = Literal["off", "coverage", "checksum", "full"]
OnFailure = Literal["poison", "rollback"]


@dataclass(frozen=True)
class SyncOptions:
    """What the session asks of transport and workers, as the `sync` section has it.

    Attributes:
        verify, on_failure: see `SyncConfig`.
        finite: the source has seen that all values are finite, so that the worker need not look.
    """

    verify: Verify = "coverage"
    on_failure: OnFailure = "poison"
    finite: bool = False

    @property
    def checksums(self) -> bool:
        return self.verify in ("checksum", "full")
