"""When a fault happens in a sync, and transports and a source that come by those moments."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qerl_sync.buffers.detect import dtype_name
from qerl_sync.meta import ParamMeta
from qerl_sync.sources.base import Source
from qerl_sync.transports.base import WorkerReport
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
        if self.fired_at is None:
            self.fired_at = time.monotonic()

    def detected(self) -> None:
        if self.detected_at is None:
            self.detected_at = time.monotonic()


class Checkpoint(Source):
    """Checkpoint tensors, which may be spoiled on their way.

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
        pairs = list(tensors.items()) if isinstance(tensors, Mapping) else list(tensors)
        self._pairs: list[Named] = pairs
        self._by_name = dict(pairs)
        self.trigger = trigger or Trigger()
        self._spoil = spoil
        self._calls = 0

    def metadata(self) -> list[ParamMeta]:
        self._calls = 0
        return [ParamMeta(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in self._pairs]

    def materialize(self, names: Sequence[str]) -> Iterator[Named]:
        self._calls += 1
        stream: Stream = self._named(names, self._calls)
        return iter(stream) if self._spoil is None else self._spoil(stream, self.trigger)

    def _named(self, names: Sequence[str], call: int) -> Iterator[Named]:
        for i, name in enumerate(names):
            if call == 2 and i == len(names) // 2:
                self.trigger.at("in a chunk")
            yield name, self._by_name[name]


class PhasedTransport(RemoteTransport):
    """To workers in other processes; `trigger` is told of each phase."""

    trigger = Trigger()

    def pids(self) -> list[int]:
        """Of the workers that are connected."""
        return [peer.hello.pid for peer in self._peers]

    def cut(self) -> None:
        """What a network does when it drops the connections."""
        for peer in self._peers:
            peer.close()

    def start(self, *arguments: Any, **options: Any) -> None:
        self.trigger.at("before start")
        super().start(*arguments, **options)

    def send(self, chunk: Chunk, tensors: Stream) -> None:
        if self._index > 0:
            self.trigger.at("between chunks")
        super().send(chunk, tensors)

    def complete(self) -> None:
        self.trigger.at("before finish")
        super().complete()

    def commit(self) -> list[WorkerReport]:
        self.trigger.at("before commit")
        return super().commit()

    def abort(self, reason: str) -> None:
        self.trigger.detected()
        super().abort(reason)


class PhasedInProcess(InProcessTransport):
    """To the model in this process; `trigger` is told of each phase."""

    trigger = Trigger()
    _index = 0

    def start(self, *arguments: Any, **options: Any) -> None:
        self._index = 0
        self.trigger.at("before start")
        super().start(*arguments, **options)

    def send(self, chunk: Chunk, tensors: Stream) -> None:
        if self._index > 0:
            self.trigger.at("between chunks")
        self._index += 1
        super().send(chunk, tensors)

    def finish(self) -> list[WorkerReport]:
        self.trigger.at("before finish")
        return super().finish()

    def abort(self, reason: str) -> None:
        self.trigger.detected()
        super().abort(reason)
