"""What a session needs of the way to the workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qerl_sync.buffers.trace import Trace
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.sync_plan import Chunk, SyncPlan

if TYPE_CHECKING:
    import torch


class Transport(ABC):
    """Carries one sync at a time: `start`, `send` for each chunk in plan order, `finish`.

    Any error leaves the workers poisoned (see `worker.receiver`); `abort` may follow and is
    idempotent. After it a new `start` is allowed.
    """

    @abstractmethod
    def layer_map(
        self,
        metas: Sequence[ParamMeta],
        *,
        allow_incomplete: Sequence[str] = (),
    ) -> LayerMap:
        """Ask the workers where each tensor lands. Leaves their weights untouched.

        Args:
            allow_incomplete: fnmatch patterns of parent layers that may miss elements.

        Raises:
            LayerMapError, CoverageError: the workers cannot take this stream.
        """

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory that is free now on the device of the worker that has the least of it."""

    @abstractmethod
    def start(self, plan: SyncPlan, layer_map: LayerMap, *, check_finite: bool) -> None:
        """Open a sync on all workers. They do not generate from here to the end of `finish`."""

    @abstractmethod
    def send(self, chunk: Chunk, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Deliver one chunk. `tensors` is consumed lazily, once; nothing is kept after `finish`."""

    @abstractmethod
    def finish(self) -> Trace:
        """Close the sync on all workers and return the measured trace."""

    @abstractmethod
    def abort(self, reason: str) -> None:
        """Give up an open sync: the workers are poisoned until the next one has finished."""
