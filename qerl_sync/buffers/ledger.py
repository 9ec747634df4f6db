"""The ledger: memory that the receiver holds for incomplete layers. O(1) per tensor."""

from __future__ import annotations

from collections.abc import Iterable

from qerl_sync.buffers.trace import Trace, TraceStep
from qerl_sync.meta import Storage


class BufferLedger:
    """Counts buffered bytes by view and pinned bytes by unique storage, and keeps the trace.

    It is told of events and never looks at a tensor. It accounts for a measured sync
    (`worker.load.monitor`), and tests hold a predicted one (`plan.simulator`) against it:

        begin(name)      the stream hands over its next tensor
        hold(layer, ..)  a view of it is kept for a parent layer
        release(layer)   the layer was processed; all that was held for it is free again

    Not thread-safe: one sync, one ledger.
    """

    def __init__(self) -> None:
        self.buffered_bytes = 0
        self.pinned_bytes = 0
        self._held: dict[str, list[tuple[int, Storage]]] = {}
        self._deferred: set[str] = set()
        self._holders: dict[int | str, int] = {}
        self._steps: list[TraceStep] = []
        self._name: str | None = None
        self._high = self._now

    @property
    def open_layers(self) -> int:
        return len(self._held) - len(self._deferred)

    @property
    def _now(self) -> tuple[int, int, int]:
        return self.buffered_bytes, self.pinned_bytes, self.open_layers

    def begin(self, name: str) -> None:
        """Start the step of the stream's next tensor, `name`, to which later events belong."""
        self._end_step()
        self._name = name
        self._high = self._now

    def hold(
        self,
        layer: str,
        view_bytes: int,
        storages: Iterable[Storage],
        *,
        deferred: bool = False,
    ) -> None:
        """Record that a view of `view_bytes` is kept for `layer` and keeps `storages` alive.

        A deferred layer is processed at the end of the sync whatever arrives, so it is not
        counted among the open ones.
        """
        held = self._held.setdefault(layer, [])
        if deferred:
            self._deferred.add(layer)
        self.buffered_bytes += view_bytes
        for i, storage in enumerate(storages):
            held.append((0 if i else view_bytes, storage))
            holders = self._holders.get(storage.key, 0)
            self._holders[storage.key] = holders + 1
            if holders == 0:
                self.pinned_bytes += storage.nbytes
        buffered, pinned, opened = map(max, self._high, self._now)
        self._high = buffered, pinned, opened

    def release(self, layer: str) -> None:
        """Record that `layer` was processed. Releasing a layer that holds nothing is no error."""
        for view_bytes, storage in self._held.pop(layer, ()):
            self.buffered_bytes -= view_bytes
            self._holders[storage.key] -= 1
            if self._holders[storage.key] == 0:
                del self._holders[storage.key]
                self.pinned_bytes -= storage.nbytes
        self._deferred.discard(layer)

    def trace(self) -> Trace:
        """Return all steps so far, the current one included."""
        self._end_step()
        return Trace(tuple(self._steps))

    def _end_step(self) -> None:
        if self._name is not None:
            self._steps.append(TraceStep(self._name, *self._high))
            self._name = None
