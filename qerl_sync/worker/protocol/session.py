"""The worker's side of a conversation: vLLM lends its thread, the trainer's requests are served.

Everything that can go wrong is told to the trainer over its channel. Nothing is raised into vLLM,
unless the trainer is lost before its first request: vLLM's collective calls take the first rank's
exception and leave the others' answers in their queues, where the next call finds them.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

import torch

from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import (
    AgreementError,
    CoverageError,
    LoadError,
    SyncError,
    TransportError,
    TransportTimeout,
)
from qerl_sync.meta import ParamMeta
from qerl_sync.options import FiniteCheck, Load, SyncOptions
from qerl_sync.plan.adapter import Adapter
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.staging import Part, divide, part_of, slot_bytes
from qerl_sync.plan.sync_plan import Chunk, SyncPlan
from qerl_sync.stopwatch import Stopwatch
from qerl_sync.verify.checksum import checksum
from qerl_sync.wire import cuda_memory
from qerl_sync.wire import messages as say
from qerl_sync.worker.load.footprint import Arrivals, footprint_bytes
from qerl_sync.worker.load.memory import PeakMemory
from qerl_sync.worker.protocol.inbox import Arrived, Inbox

logger = logging.getLogger(__name__)

PHASES = ("wait", "load", "finish", "verify")

M = TypeVar("M")
Item = say.Message | Arrived


class Loader(Protocol):
    """Takes the weights; `worker.receiver.Receiver` has what each part means."""

    @property
    def working_bytes(self) -> Mapping[str, int]: ...

    @property
    def finishing_bytes(self) -> int: ...

    @property
    def peak_staged_bytes(self) -> int: ...

    @property
    def verify_seconds(self) -> float: ...

    @property
    def kept_bytes(self) -> int: ...

    @property
    def poisoned(self) -> str | None: ...

    def layer_map(
        self,
        metas: Sequence[ParamMeta],
        *,
        allow_incomplete: Sequence[str] = (),
        load: Load = "auto",
    ) -> LayerMap: ...

    def require_adapter(self, adapter: Adapter) -> None: ...

    def free_bytes(self) -> int: ...

    def start(
        self, plan: SyncPlan, layer_map: LayerMap, options: SyncOptions, *, borrowed: bool
    ) -> None: ...

    def receive(self, chunk: Chunk, tensors: Iterable[tuple[str, torch.Tensor]]) -> None: ...

    def finish(self) -> Trace: ...

    def commit(self, version: int) -> bool: ...

    def abort(self, reason: str, *, keep_old: bool) -> None: ...

    def poison(self, reason: str) -> None: ...


class _GivenUp(SyncError):
    """The trainer asks, in the middle of a sync, to abort it, and awaits Aborted."""

    def __init__(self, request: say.Abort) -> None:
        super().__init__(request.reason)
        self.keep_old = request.keep_old


class WorkerSession:
    """Serves the requests of one trainer, whose ranks say the same things, each on its channel.

    Args:
        loader: takes the weights.
        inboxes: of each trainer rank, in rank order; rank 0 leads.
    """

    def __init__(self, loader: Loader, inboxes: Sequence[Inbox], device: torch.device) -> None:
        self._loader = loader
        self._inboxes = inboxes
        self._device = device
        self._memory = PeakMemory(device)
        self._layer_map: LayerMap | None = None
        self._plan: SyncPlan | None = None
        # All is told and the trainer decides: others may have committed already.
        self._in_doubt = False

    def serve(self) -> None:
        """Answer requests until the trainer says End, or is lost.

        Raises:
            SyncError: the trainer was lost before its first request. Whoever made the call would
                otherwise take this worker for one that has been synced.
        """
        heard = False
        try:
            while True:
                requests = [inbox.next("its next request") for inbox in self._inboxes]
                heard = True
                if isinstance(requests[0], say.End):
                    return
                self._answer(requests)
        except Exception as exc:
            expected = isinstance(exc, SyncError)
            logger.error("the conversation with the trainer ended: %s", exc, exc_info=not expected)
            self._loader.abort(f"a sync failed: {exc}", keep_old=not self._in_doubt)
            self._release(exc)
            self._tell(say.failure(exc))
            for inbox in self._inboxes:
                inbox.close()
            if not heard:
                raise

    def _answer(self, requests: list[Item]) -> None:
        lead = requests[0]
        self._in_doubt = False
        try:
            if isinstance(lead, say.MapRequest):
                self._map(lead)
            elif isinstance(lead, say.AdapterRequest):
                self._loader.require_adapter(Adapter.from_json(lead.adapter))
                self._tell(say.AdapterReply())
            elif isinstance(lead, say.SyncRequest):
                self._sync(_all_of(requests, say.SyncRequest))
            elif isinstance(lead, say.Abort):
                self._loader.abort(lead.reason, keep_old=lead.keep_old)
                self._tell(say.Aborted(poisoned=self._loader.poisoned))
            elif isinstance(lead, say.Invalidate):
                self._loader.poison(lead.reason)
                self._tell(say.Aborted(poisoned=self._loader.poisoned))
            # Anything else was sent before the trainer knew that a sync had failed.
        except _GivenUp as exc:
            self._loader.abort(str(exc), keep_old=exc.keep_old)
            self._release(exc)
            self._tell(say.Aborted(poisoned=self._loader.poisoned))
        except TransportTimeout:  # nobody is there to go on with
            raise
        except SyncError as exc:
            self._loader.abort(f"a sync failed: {exc}", keep_old=not self._in_doubt)
            self._release(exc)
            self._tell(say.failure(exc))

    def _map(self, request: say.MapRequest) -> None:
        metas = say.unpack_metas(request.metas)
        self._layer_map = self._loader.layer_map(
            metas, allow_incomplete=request.allow_incomplete, load=request.load
        )
        reported = self._layer_map.to_json()
        self._tell(say.MapReply(layer_map=reported, free_bytes=self._loader.free_bytes()))

    def _sync(self, requests: list[say.SyncRequest]) -> None:
        plan, layer_map = self._agree(requests)
        parts = self._prepare(plan, requests)
        options = _options_of(requests)
        clock = Stopwatch(PHASES)
        self._wire_clock = Stopwatch(PHASES)
        self._memory.start()
        self._loader.start(plan, layer_map, options, borrowed=True)
        for inbox, part in zip(self._inboxes, parts, strict=True):
            inbox.send(say.Accepted(owned=None if part.owned is None else list(part.owned)))
        in_place = [
            self._load(index, plan, parts, clock, checksums=options.checksums)
            for index in range(len(plan.chunks))
        ]
        self._each(say.Finish, "the end of the stream")
        with clock("finish"):
            trace = self._loader.finish()
        self._release()
        self._tell(
            say.Report(
                trace=trace.to_json(),
                seconds=clock.seconds | {"verify": self._verify_seconds()},
                peak_extra_bytes=self._extra_bytes(),
                peak_staged_bytes=self._loader.peak_staged_bytes,
                kept_bytes=self._loader.kept_bytes,
                peak_extra_bytes_predicted=self._loader.kept_bytes
                + footprint_bytes(
                    plan,
                    layer_map,
                    self._loader.working_bytes,
                    self._loader.finishing_bytes,
                    self._arrivals(parts, requests, in_place),
                ),
            )
        )
        self._in_doubt = True
        commits = self._each(say.Commit, "the other workers")
        overwritten = self._loader.commit(commits[0].version)
        self._tell(say.Committed(caches_overwritten=overwritten))

    def _agree(self, requests: list[say.SyncRequest]) -> tuple[SyncPlan, LayerMap]:
        """Hold the trainer's plan against what this worker knows, before anything is touched."""
        if self._layer_map is None or self._layer_map.digest != requests[0].layer_map:
            raise AgreementError(
                "the plan was made with another layer map than this worker's: its engine was "
                "restarted, or its model replaced. Close the session and make a new one"
            )
        digest = requests[0].digest
        for rank, request in enumerate(requests):
            if request.digest != digest:
                raise AgreementError(
                    f"trainer rank {rank} has another plan than rank 0 (digest {request.digest} "
                    f"and {digest}): names, dtypes, shapes or settings differ between them"
                )
        if self._plan is None or self._plan.digest != digest:
            plan = _plan_of(requests[0])
            known = self._layer_map.contributions
            if unknown := [meta.name for meta in plan.base_metas if meta.name not in known]:
                raise AgreementError(f"the plan has {unknown[0]!r}, which the layer map does not")
            self._plan = plan
        return self._plan, self._layer_map

    def _prepare(self, plan: SyncPlan, requests: list[say.SyncRequest]) -> list[Part]:
        """Who sends what, and the memory for it."""
        parts = divide(plan, [request.held for request in requests])
        for rank, (inbox, part, request) in enumerate(
            zip(self._inboxes, parts, requests, strict=True)
        ):
            held = part if request.held is None and rank == 0 else part_of(plan, request.held)
            number = len(request.slots)
            if not number or request.slots != slot_bytes(held.sizes, number):
                raise AgreementError(
                    f"trainer rank {rank} announces receive buffers of {request.slots} bytes, "
                    "which is not what the plan needs"
                )
            if inbox.chunk_receiver is None:
                raise TransportError(f"trainer rank {rank} has not opened its transport")
            inbox.expect(part.chunks)
            inbox.chunk_receiver.prepare(request.segments, request.slots)
        return parts

    def _load(
        self, index: int, plan: SyncPlan, parts: list[Part], clock: Stopwatch, *, checksums: bool
    ) -> list[bool]:
        """Returns for each trainer rank whether the worker read its part in place."""
        senders = {i: part.chunks[index] for i, part in enumerate(parts) if part.chunks[index]}
        with clock("wait"):
            arrived = {
                i: _awaited(self._inboxes[i], Arrived, f"chunk {index} of {len(plan.chunks)}")
                for i in senders
            }
        found: dict[str, torch.Tensor] = {}
        reported: dict[str, int] = {}
        for i, one in arrived.items():
            if one.index != index:
                raise TransportError(f"chunk {one.index} arrived where {index} was next")
            names = [meta.name for meta in senders[i]]
            found |= zip(names, one.tensors, strict=True)
            if checksums:
                reported |= _told_checksums(names, one)
        in_place = [i in arrived and arrived[i].in_place for i in range(len(parts))]
        del arrived, one
        references = {name: _references(tensor) for name, tensor in found.items()}
        chunk = plan.chunks[index]
        stream = ((name, found[name]) for name in chunk.names)
        with clock("load"):
            self._loader.receive(
                chunk, self._intact(index, stream, reported) if reported else stream
            )
            # vLLM's loaders return before a GPU has copied what they got, and the credit allows
            # the trainer, or the inbox, to write the next chunk over it.
            cuda_memory.synchronize(self._device)
        for name, tensor in found.items():
            _require_released(name, _references(tensor) - references[name])
        for i in senders:
            self._inboxes[i].send(say.Credit(index=index))
        return in_place

    def _intact(
        self, index: int, tensors: Iterator[tuple[str, torch.Tensor]], reported: Mapping[str, int]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The stream, each tensor held against the trainer's checksum before vLLM sees it."""
        for name, tensor in tensors:
            with self._wire_clock("verify"):
                found = checksum(tensor)
            if found != reported[name]:
                raise CoverageError(
                    f"{name!r} of chunk {index} arrived with checksum {found:016x}, and the "
                    f"trainer sent {reported[name]:016x}: its bytes changed on the way. "
                    "Somebody has written to them (shared memory, a parameter that was stepped "
                    "during the sync), or a network card or memory is broken"
                )
            yield name, tensor

    def _verify_seconds(self) -> float:
        return self._loader.verify_seconds + self._wire_clock.seconds["verify"]

    def _extra_bytes(self) -> int | None:
        measured = self._memory.extra_bytes()
        standing = sum(
            inbox.chunk_receiver.standing_bytes for inbox in self._inboxes if inbox.chunk_receiver
        )
        return None if measured is None else measured + standing

    def _arrivals(
        self, parts: list[Part], requests: list[say.SyncRequest], in_place: list[list[bool]]
    ) -> list[Arrivals]:
        return [
            Arrivals(
                sizes=part.sizes if self._memory.counts_mapped else [0] * len(part.sizes),
                chunks_in_flight=len(request.slots),
                standing_bytes=inbox.chunk_receiver.standing_bytes if inbox.chunk_receiver else 0,
                in_place=[chunk[rank] for chunk in in_place],
            )
            for rank, (part, request, inbox) in enumerate(
                zip(parts, requests, self._inboxes, strict=True)
            )
        ]

    def _release(self, error: BaseException | None = None) -> None:
        """Unmap what the trainer will free: no chunk of this sync is read any more.

        Args:
            error: what ended the sync. The frames that it came through hold tensors of a chunk.
        """
        if error is not None:
            traceback.clear_frames(error.__traceback__)
        for inbox in self._inboxes:
            if inbox.chunk_receiver is not None:
                inbox.chunk_receiver.release()

    def _each(self, kind: type[M], what: str) -> list[M]:
        return [_awaited(inbox, kind, what) for inbox in self._inboxes]

    def _tell(self, message: say.Message) -> None:
        """To every rank, also where some are gone."""
        for inbox in self._inboxes:
            with suppress(TransportError):
                inbox.send(message)


def _plan_of(request: say.SyncRequest) -> SyncPlan:
    plan = None if request.plan is None else SyncPlan.from_json(request.plan)
    if plan is None or plan.digest != request.digest:
        raise AgreementError(
            f"the plan with digest {request.digest} did not come with the sync that follows it; "
            "close the session and make a new one"
        )
    return plan


def _options_of(requests: list[say.SyncRequest]) -> SyncOptions:
    lead = requests[0]
    for rank, one in enumerate(requests):
        if (one.base, one.is_base) != (lead.base, lead.is_base):
            raise AgreementError(
                f"trainer rank {rank} builds on version {one.base}, and rank 0 on {lead.base}: "
                "Source.unchanging and the session's pushes must be the same on all ranks"
            )
        if (one.verify, one.on_failure) != (lead.verify, lead.on_failure):
            raise AgreementError(
                f"trainer rank {rank} asks for verify: {one.verify}, on_failure: {one.on_failure}, "
                f"and rank 0 for verify: {lead.verify}, on_failure: {lead.on_failure}; give all "
                "ranks the same sync.verify and sync.on_failure"
            )
    # Values count as looked at only if every rank has looked at what it sends.
    asked = {request.finite_check for request in requests}
    order: tuple[FiniteCheck, ...] = ("worker", "nobody", "source")
    finite_check = next(check for check in order if check in asked)
    return SyncOptions(
        verify=lead.verify,
        on_failure=lead.on_failure,
        finite_check=finite_check,
        base=lead.base,
        is_base=lead.is_base,
    )


def _told_checksums(names: Sequence[str], one: Arrived) -> dict[str, int]:
    if len(one.checksums) != len(names):
        raise TransportError(
            f"chunk {one.index} has {len(names)} tensors and came with {len(one.checksums)} "
            "checksums"
        )
    return dict(zip(names, one.checksums, strict=True))


def _all_of(items: list[Item], kind: type[M]) -> list[M]:
    for item in items:
        if not isinstance(item, kind):
            raise AgreementError(f"trainer ranks ask for different things: {items[0]!r}, {item!r}")
    return items  # type: ignore[return-value]


def _awaited(inbox: Inbox, kind: type[M], what: str) -> M:
    item = inbox.next(what)
    if isinstance(item, say.Abort):
        raise _GivenUp(item)
    if not isinstance(item, kind):
        raise TransportError(f"{type(item).__name__} arrived where {what} was next")
    return item


def _references(tensor: torch.Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def _require_released(name: str, kept: int) -> None:
    """Its memory is used again: vLLM must not hold it any longer."""
    if kept > 0:
        raise LoadError(
            f"vLLM still refers to {name!r} after its chunk was loaded; its weights would change "
            "with the next chunk. This architecture cannot be synced over this transport; colocate "
            "the engine"
        )
