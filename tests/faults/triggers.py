"""When a fault happens in a sync, and transports and a source that come by those moments."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qerl_sync.buffers.detect import dtype_name
from qerl_sync.meta import ParamMeta
from qerl_sync.sources.base import Source
from qerl_sync.transports.base import SyncResult
from qerl_sync.transports.inproc import InProcessTransport
from qerl_sync.transports.remote import RemoteTransport

if TYPE_CHECKING:
    import torch

    from qerl_sync.plan.sync_plan import Chunk

PHASES = ("before start", "in a chunk", "between chunks", "before finish", "before commit")

Named = tuple[str, "torch.Tensor"]
Stream = Iterable[Named]


class InjectedFault(RuntimeError):
    """What a source raises on purpose."""


class Trigger:
    """Does something once, when the sync reaches a phase.

    Attributes:
        fired_at: `time.monotonic()` of the fault; None while there was none.
        detected_at: when the transport was told to give up.
    """

    def __init__(self, phase: str = "", action: Callable[[], None] = lambda: None) -> None:
        self.phase, self.action = phase, action
        self.fired_at: float | None = None
        self.detected_at: float | None = None

    def at(self, phase: str) -> None:
        if phase == self.phase and self.fired_at is None:
            self.mark()
            self.action()

    def mark(self) -> None:
        self.fired_at = self.fired_at or time.monotonic()

    def detected(self) -> None:
        self.detected_at = self.detected_at or time.monotonic()


class FaultySource(Source):
    """Tensors of a checkpoint, which may be spoiled on their way.

    Args:
        tensors: what the metadata says. A name may come twice.
        spoil: what becomes of the stream after the metadata were told.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor] | Sequence[Named],
        trigger: Trigger | None = None,
        spoil: Callable[[Stream, Trigger], Iterator[Named]] | None = None,
    ) -> None:
        self._pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
        self._trigger = trigger or Trigger()
        self._spoil = spoil or (lambda stream, trigger: iter(stream))
        self._calls = 0

    def metadata(self) -> list[ParamMeta]:
        self._calls = 0
        return [ParamMeta(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in self._pairs]

    def materialize(self, names: Sequence[str]) -> Iterator[Named]:
        self._calls += 1
        return self._spoil(self._named(names, self._calls), self._trigger)

    def _named(self, names: Sequence[str], call: int) -> Iterator[Named]:
        by_name = dict(self._pairs)
        for i, name in enumerate(names):
            if call == 2 and i == len(names) // 2:
                self._trigger.at("in a chunk")
            yield name, by_name[name]


class _Phased:
    """A transport whose `trigger` is told of each phase."""

    trigger = Trigger()
    _sent = 0

    def start(self, *arguments: Any, **options: Any) -> None:
        self._sent = 0
        self.trigger.at("before start")
        super().start(*arguments, **options)

    def send(self, chunk: Chunk, tensors: Stream) -> None:
        if self._sent > 0:
            self.trigger.at("between chunks")
        self._sent += 1
        super().send(chunk, tensors)

    def finish(self) -> SyncResult:
        self.trigger.at("before finish")
        return super().finish()

    def abort(self, reason: str) -> None:
        self.trigger.detected()
        super().abort(reason)


class PhasedInProcess(_Phased, InProcessTransport):
    """To the model in this process."""


class PhasedRemote(_Phased, RemoteTransport):
    """To workers in other processes."""

    def pids(self) -> list[int]:
        """Of the workers that are connected."""
        return [peer.hello.pid for peer in self.workers]

    def cut(self) -> None:
        """What a network does when it drops the connections."""
        for peer in self.workers:
            peer.close()

    def commit(self) -> SyncResult:
        self.trigger.at("before commit")
        return super().commit()
