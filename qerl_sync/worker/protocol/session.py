"""The worker's side of a sync: serve the trainer's requests on vLLM's own thread.

No vLLM in here: the thread is that of an engine's call (`worker.protocol.engine`), or any other.

Every failure is reported to the trainer over its connection. Nothing is raised into vLLM, unless
the trainer is lost before its first request: vLLM's collective calls take the first rank's
exception and leave the others' answers in their queues, where the next call finds them.
"""

from __future__ import annotations

import gc
import logging
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch

from qerl_sync.buffers.detect import storage_key
from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import (
    AgreementError,
    CoverageError,
    EngineTakenError,
    LoadError,
    StaleBaseError,
    SyncError,
    TransportError,
    TransportTimeout,
)
from qerl_sync.meta import ParamMeta, metas_from_json
from qerl_sync.options import FiniteCheck, MapOptions, SyncOptions
from qerl_sync.plan.adapter import Adapter
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.staging import Part, divide, part_of, slot_bytes
from qerl_sync.plan.sync_plan import Chunk, SyncPlan
from qerl_sync.stopwatch import Stopwatch, slowest
from qerl_sync.verify.checksum import checksum
from qerl_sync.wire import cuda_memory
from qerl_sync.wire import messages as say
from qerl_sync.wire.connection import Connection
from qerl_sync.wire.endpoints import connect, parse_endpoint
from qerl_sync.wire.handshake import ConnectCall, ServeCall, parse
from qerl_sync.wire.mirror import Mirror, require_mirror_room
from qerl_sync.wire.tokens import proof, same_proof
from qerl_sync.worker.load.footprint import Arrivals, LoadCosts, footprint_bytes
from qerl_sync.worker.load.memory import PeakMemory, free_bytes
from qerl_sync.worker.protocol.connection import Arrived, TrainerConnection

logger = logging.getLogger(__name__)

PHASES = ("wait", "load", "finish", "verify")
# How long a chunk's tensors may be referred to once vLLM's loaders have returned.
RELEASE_SECONDS = 1.0

M = TypeVar("M")
Item = say.Message | Arrived


class Loader(Protocol):
    """Takes the weights; `worker.load.receiver.Receiver` has what each part means."""

    costs: LoadCosts

    @property
    def quantisation(self) -> dict[str, Any]: ...

    @property
    def poisoned(self) -> str | None: ...

    def layer_map(self, metas: Sequence[ParamMeta], options: MapOptions) -> LayerMap: ...

    def require_adapter(self, adapter: Adapter) -> None: ...

    def free_bytes(self) -> int: ...

    def start(
        self, plan: SyncPlan, layer_map: LayerMap, options: SyncOptions, *, borrowed: bool
    ) -> None: ...

    def receive(self, chunk: Chunk, tensors: Iterable[tuple[str, torch.Tensor]]) -> None: ...

    def finish(self) -> Trace: ...

    def commit(self, version: int, *, keep_old: bool) -> bool: ...

    def abort(self, reason: str, *, keep_old: bool) -> None: ...

    def poison(self, reason: str) -> None: ...


class _AbortRequested(SyncError):
    """The trainer asks to abort the sync, mostly in the middle of it, and awaits Aborted."""

    def __init__(self, request: say.Abort) -> None:
        super().__init__(request.reason)
        self.keep_old = request.keep_old


class WorkerSession:
    """Serves one trainer at a time. Each of its ranks has a connection and says the same.

    Opened by a call that knows the token, used by calls that prove it again.
    """

    def __init__(
        self, loader: Loader, device: torch.device, hello: Callable[[], say.Hello]
    ) -> None:
        self._loader = loader
        self._device = device
        self._hello = hello
        self._memory = PeakMemory(device)
        self._connections: list[TrainerConnection] = []  # in rank order; rank 0 leads
        self._token = ""
        self._session: say.TrainerSession | None = None
        self._calls = 0
        self._layer_map: LayerMap | None = None
        self._plan: SyncPlan | None = None
        # This worker has reported, and the trainer decides: others may have committed already.
        self._in_doubt = False

    def open(self, call: object) -> None:
        """Connect to every rank of the trainer, which `call` (`ConnectCall`, from anybody, of any
        form) names, and agree on how bytes will travel.

        Raises:
            AgreementError: the call is none of ours, or the token is wrong.
            EngineTakenError: another trainer's session is connected. The caller is told on a
                connection of its own, too: through vLLM only a text gets back.
            TransportError: the trainer cannot be reached.
        """
        asked = parse(ConnectCall, call)
        token, timeout_seconds = asked.require_token(), asked.timeout_seconds
        held = self._session
        if held and held != asked.session and any(one.alive for one in self._connections):
            refusal = EngineTakenError(
                f"another trainer is connected: {held}. Close its session, or end that process; "
                "then try again. To sync one engine from several trainer ranks, give them the "
                "same endpoints (RemoteTransport)",
                **held.facts(),
            )
            for endpoint in asked.endpoints:
                with (
                    suppress(SyncError),
                    connect(*parse_endpoint(endpoint), token, timeout_seconds, Connection) as own,
                ):
                    own.send(say.failure(refusal), timeout_seconds)
            raise refusal
        self.close()
        # A new trainer, or this one after a failure, asks for the map and sends its plan again.
        self._layer_map = self._plan = None
        try:
            for endpoint in asked.endpoints:
                connection = connect(
                    *parse_endpoint(endpoint), token, timeout_seconds, TrainerConnection
                )
                self._connections.append(connection)
                connection.send(self._hello(), timeout_seconds)
                connection.read_ahead(timeout_seconds)
            self._token, self._session, self._calls = token, asked.session, 0
            for connection in self._connections:
                connection.open_transport(self._device)
        except BaseException:
            self.close()
            raise

    def serve(self, call: object) -> None:
        """Serve the trainer's requests until it sends End. Failures are reported to it alone.

        Raises:
            AgreementError: no trainer is connected, or the call comes from another one.
            SyncError: the trainer was lost before its first request. Its engine's client would
                otherwise take this worker for one that has been synced.
        """
        asked = parse(ServeCall, call)
        if not self._connections:
            raise AgreementError("no trainer is connected to this worker", subject="session")
        if not same_proof(proof(self._token, "update", asked.number), asked.proof):
            raise AgreementError(
                "the call does not come from the trainer that is connected", subject="token"
            )
        if asked.number <= self._calls:
            raise AgreementError(f"the trainer's call {asked.number} was repeated", subject="call")
        self._calls = asked.number
        heard = False
        try:
            while True:
                requests = [connection.next("its next request") for connection in self._connections]
                heard = True
                if isinstance(requests[0], say.End):
                    return
                self._answer(requests)
        except BaseException as exc:
            # The trainer is lost, or what it says makes no sense: nothing can go on from here. Or
            # Ctrl-C in the engine's process, which would leave the sync open for the next trainer.
            expected = isinstance(exc, SyncError)
            logger.error("the session with the trainer ended: %s", exc, exc_info=not expected)
            self._fail(exc)
            for connection in self._connections:
                connection.close()
            if not heard or not isinstance(exc, Exception):
                raise

    def close(self) -> None:
        """Disconnect from the trainer, and unmap its memory."""
        for connection in self._connections:
            connection.close()
        self._connections = []

    def _answer(self, requests: list[Item]) -> None:
        # Other than syncs, requests are the same from all ranks: rank 0's is taken.
        lead = requests[0]
        self._in_doubt = False
        try:
            if isinstance(lead, say.MapRequest):
                self._map(lead)
            elif isinstance(lead, say.AdapterRequest):
                self._loader.require_adapter(Adapter.from_json(lead.adapter))
                self._tell(say.AdapterReply())
            elif isinstance(lead, say.SyncRequest):
                syncs = [one for one in requests if isinstance(one, say.SyncRequest)]
                if len(syncs) < len(requests):
                    asked = ", ".join(type(one).__name__ for one in requests)
                    raise AgreementError(
                        f"trainer ranks ask for different things: {asked}", subject="request"
                    )
                self._sync(syncs)
            elif isinstance(lead, say.Abort):
                raise _AbortRequested(lead)
            elif isinstance(lead, say.Invalidate):
                self._loader.poison(lead.reason)
                self._tell(say.Aborted(poisoned=self._loader.poisoned))
            # Anything else was sent before the trainer knew that a sync had failed.
        except _AbortRequested as exc:
            self._loader.abort(str(exc), keep_old=exc.keep_old)
            self._release(exc)
            self._tell(say.Aborted(poisoned=self._loader.poisoned))
        except TransportTimeout:  # the trainer is gone
            raise
        except SyncError as exc:
            self._fail(exc)

    def _fail(self, exc: BaseException) -> None:
        self._loader.abort(f"a sync failed: {exc}", keep_old=not self._in_doubt)
        self._release(exc)
        self._tell(say.failure(exc))

    def _map(self, request: say.MapRequest) -> None:
        metas = metas_from_json(request.metas)
        self._layer_map = self._loader.layer_map(metas, request.options)
        reported = self._layer_map.to_json()
        self._tell(say.MapReply(layer_map=reported, free_bytes=self._loader.free_bytes()))

    def _sync(self, requests: list[say.SyncRequest]) -> None:
        plan, layer_map = self._agree(requests)
        parts = self._prepare(plan, requests)
        mirror = self._open_mirror(plan, requests)
        options = _options_of(requests)
        clock = Stopwatch(PHASES, record=options.record_spans)
        self._wire_clock = Stopwatch(PHASES)
        self._memory.start()
        self._loader.start(plan, layer_map, options, borrowed=True)
        for connection, part in zip(self._connections, parts, strict=True):
            connection.tell(say.Accepted(owned=None if part.owned is None else list(part.owned)))
        in_place = [
            self._load(index, plan, parts, mirror, clock, checksums=options.checksums)
            for index in range(len(plan.chunks))
        ]
        for connection in self._connections:
            _await(connection, say.Finish, "the end of the stream")
        with clock("finish"):
            trace = self._loader.finish()
        # Before the report: with the commit the trainer frees its slots on the GPU.
        self._release()
        # Slots of this worker's own stay from sync to sync, and count in what it took.
        standing = [one.chunk_receiver.standing_bytes for one in self._connections]
        extra_bytes = self._memory.extra_bytes()
        arrivals = [
            Arrivals(
                sizes=part.sizes if self._memory.counts_mapped else [0] * len(part.sizes),
                chunks_in_flight=len(request.slots),
                standing_bytes=standing[rank],
                in_place=[chunk[rank] for chunk in in_place],
            )
            for rank, (part, request) in enumerate(zip(parts, requests, strict=True))
        ]
        costs = self._loader.costs
        verify_seconds = costs.verify_seconds + self._wire_clock.seconds["verify"]
        layers = costs.processed_layers
        self._tell(
            say.Report(
                trace=trace,
                seconds=clock.seconds | {"verify": verify_seconds},
                peak_extra_bytes=None if extra_bytes is None else extra_bytes + sum(standing),
                peak_staged_bytes=costs.peak_staged_bytes,
                kept_bytes=costs.kept_bytes,
                mirror_bytes=0 if mirror is None else mirror.nbytes,
                spans=[*clock.spans, *(layers if options.record_spans else slowest(layers))],
                quantisation=self._loader.quantisation,
                peak_extra_bytes_predicted=footprint_bytes(plan, layer_map, costs, arrivals),
            )
        )
        self._in_doubt = True
        commits = [_await(one, say.Commit, "the other workers") for one in self._connections]
        overwritten = self._loader.commit(commits[0].version, keep_old=False)
        if mirror is not None:
            mirror.version = commits[0].version
        self._tell(say.Committed(caches_overwritten=overwritten))

    def _agree(self, requests: list[say.SyncRequest]) -> tuple[SyncPlan, LayerMap]:
        """Check the trainer's plan against what this worker knows, before anything is touched."""
        if self._layer_map is None or self._layer_map.digest != requests[0].layer_map:
            raise AgreementError(
                "the plan was made with another layer map than this worker's: its engine was "
                "restarted, or its model replaced. Close the session and make a new one",
                subject="layer_map",
            )
        digest = requests[0].digest
        for rank, request in enumerate(requests):
            if request.digest != digest:
                raise AgreementError(
                    f"trainer rank {rank} has another plan than rank 0 (digest {request.digest} "
                    f"and {digest}): names, dtypes, shapes or settings differ between them",
                    subject="plan",
                )
        if self._plan is None or self._plan.digest != digest:
            sent = requests[0].plan
            plan = None if sent is None else SyncPlan.from_json(sent)
            if plan is None or plan.digest != digest:
                raise AgreementError(
                    f"the plan with digest {digest} did not come with the sync that follows it; "
                    "close the session and make a new one",
                    subject="plan",
                )
            known = self._layer_map.contributions
            if unknown := [meta.name for meta in plan.base_metas if meta.name not in known]:
                raise AgreementError(
                    f"the plan has {unknown[0]!r}, which the layer map does not", subject="plan"
                )
            self._plan = plan
        return self._plan, self._layer_map

    def _prepare(self, plan: SyncPlan, requests: list[say.SyncRequest]) -> list[Part]:
        """Return the part that each trainer rank sends, and get memory for it."""
        parts = divide(plan, [request.held for request in requests])
        for rank, (connection, part, request) in enumerate(
            zip(self._connections, parts, requests, strict=True)
        ):
            held = part if request.held is None and rank == 0 else part_of(plan, request.held)
            number = len(request.slots)
            if not number or request.slots != slot_bytes(held.sizes, number):
                raise AgreementError(
                    f"trainer rank {rank} announces receive buffers of {request.slots} bytes, "
                    "which is not what the plan needs",
                    subject="slots",
                )
            connection.expected = part.chunks
            connection.chunk_receiver.prepare(request.segments, request.slots)
        return parts

    def _open_mirror(self, plan: SyncPlan, requests: list[say.SyncRequest]) -> Mirror | None:
        """Return the mirror that the trainer's changes are for; None where it sends none."""
        asked, lead = requests[0], self._connections[0]
        held = lead.mirror
        if not asked.mirror or len(requests) > 1:
            lead.mirror = None
            return None
        if (base := asked.options.changes_from) is not None:
            if held is None or (held.id, held.version) != (asked.mirror, base):
                raise StaleBaseError(
                    f"a sync of what has changed since version {base} needs what was "
                    "sent with it, and this worker has not kept that; send everything",
                    base=base,
                    version=self._hello().version,
                )
            return held
        if held is not None and held.metas == plan.base_metas:
            held.id, held.version = asked.mirror, None
            return held
        lead.mirror = held = None  # there is not room for two
        require_mirror_room(plan.base_metas, "this worker", free_bytes(torch.device("cpu")))
        lead.mirror = made = Mirror(plan.base_metas, asked.mirror)
        return made

    def _load(
        self,
        index: int,
        plan: SyncPlan,
        parts: list[Part],
        mirror: Mirror | None,
        clock: Stopwatch,
        *,
        checksums: bool,
    ) -> list[bool]:
        """Load a chunk. Return for each trainer rank whether the worker read its part in place."""
        senders = {i: part.chunks[index] for i, part in enumerate(parts) if part.chunks[index]}
        with clock("wait", f"chunk {index}"):
            arrived = {
                i: _await(self._connections[i], Arrived, f"chunk {index} of {len(plan.chunks)}")
                for i in senders
            }
        found: dict[str, torch.Tensor] = {}
        reported: dict[str, int] = {}
        for i, one in arrived.items():
            sent, tensors = one.chunk, one.tensors
            if sent.index != index:
                raise TransportError(f"chunk {sent.index} arrived where {index} was next")
            names = [meta.name for meta in senders[i]]
            if mirror is not None:
                with clock("load", f"changes of chunk {index}"):
                    tensors = mirror.apply(senders[i], tensors, sent.changes)
            elif sent.changes:
                raise TransportError(
                    f"chunk {index} brings changed elements, and this sync has no mirror for them"
                )
            found |= zip(names, tensors, strict=True)
            if checksums:
                if len(sent.checksums) != len(names):
                    raise TransportError(
                        f"chunk {index} has {len(names)} tensors and came with "
                        f"{len(sent.checksums)} checksums"
                    )
                reported |= zip(names, sent.checksums, strict=True)
        in_place = [i in arrived and arrived[i].chunk.in_place for i in range(len(parts))]
        mirrored = [name for name in found if mirror is not None and name in mirror]
        writes = {name: found[name]._version for name in mirrored}
        del arrived, one, tensors  # they refer to the tensors, whose references are counted below
        references = {name: _references(tensor) for name, tensor in found.items()}
        chunk = plan.chunks[index]
        stream = ((name, found[name]) for name in chunk.names)
        with clock("load", f"chunk {index}"):
            self._loader.receive(
                chunk, self._intact(index, stream, reported) if reported else stream
            )
            # vLLM's loaders return before a GPU has copied what they got, and the credit allows
            # the trainer, or the reading thread, to write the next chunk over it.
            cuda_memory.synchronize(self._device)
        for name, tensor in found.items():
            # The next chunk is written over this one: what vLLM keeps of it would change.
            if not _is_released(tensor, references[name]):
                raise LoadError(
                    f"vLLM still refers to {name!r} after its chunk was loaded; its weights would "
                    "change with the next chunk. This architecture cannot be synced over this "
                    "transport; colocate the engine"
                )
        for name in mirrored:
            if found[name]._version != writes[name]:
                raise LoadError(
                    f"vLLM's loader of {name!r} writes to what it gets, which the next changes are "
                    "put into; choose sync.delta: layers for this architecture"
                )
        for i in senders:
            self._connections[i].tell(say.Credit(index=index))
        return in_place

    def _intact(
        self, index: int, tensors: Iterator[tuple[str, torch.Tensor]], reported: Mapping[str, int]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the stream. Compare each tensor with the trainer's checksum before vLLM sees it."""
        for name, tensor in tensors:
            with self._wire_clock("verify"):
                found = checksum(tensor)
            if found != reported[name]:
                raise CoverageError(
                    f"{name!r} of chunk {index} arrived with checksum {found:016x}, and the "
                    f"trainer sent {reported[name]:016x}: its bytes changed on the way. "
                    "Something has written to them (shared memory, a parameter that was stepped "
                    "during the sync), or a network card or memory is broken",
                    tensor=name,
                )
            yield name, tensor

    def _release(self, error: BaseException | None = None) -> None:
        """Unmap what the trainer will free: no chunk of this sync is read any more."""
        if error is not None:  # the frames that it came through hold tensors of a chunk
            traceback.clear_frames(error.__traceback__)
        for connection in self._connections:
            connection.chunk_receiver.release()

    def _tell(self, message: say.Message) -> None:
        """Send to every rank, also where some are gone."""
        for connection in self._connections:
            with suppress(TransportError):
                connection.tell(message)


def _options_of(requests: list[say.SyncRequest]) -> SyncOptions:
    lead, *_ = options = [request.options for request in requests]
    for rank, one in enumerate(options):
        if (one.base, one.is_base) != (lead.base, lead.is_base):
            raise AgreementError(
                f"trainer rank {rank} builds on version {one.base}, and rank 0 on {lead.base}: "
                "Source.unchanging and the session's pushes must be the same on all ranks",
                subject="base",
            )
        if (one.verify, one.on_failure) != (lead.verify, lead.on_failure):
            raise AgreementError(
                f"trainer rank {rank} asks for verify: {one.verify}, on_failure: {one.on_failure}, "
                f"and rank 0 for verify: {lead.verify}, on_failure: {lead.on_failure}; give all "
                "ranks the same sync.verify and sync.on_failure",
                subject="options",
            )
    # Values count as looked at only if every rank has looked at what it sends.
    asked = {one.finite_check for one in options}
    order: tuple[FiniteCheck, ...] = ("worker", "nobody", "source")
    finite_check = next(check for check in order if check in asked)
    return replace(lead, finite_check=finite_check)


def _await(connection: TrainerConnection, kind: type[M], what: str) -> M:
    """Block for the trainer rank's next message, which must be of that kind."""
    item = connection.next(what)
    if isinstance(item, say.Abort):
        raise _AbortRequested(item)
    if not isinstance(item, kind):
        raise TransportError(f"{type(item).__name__} arrived where {what} was next")
    return item


def _references(tensor: torch.Tensor) -> int:
    """Count what refers to the tensor's storage."""
    return int(torch._C._storage_Use_Count(storage_key(tensor)))


def _is_released(tensor: torch.Tensor, references: int) -> bool:
    """Return whether no more than `references` refer to the tensor's storage, or soon do not."""
    deadline = time.monotonic() + RELEASE_SECONDS
    while _references(tensor) > references:
        if time.monotonic() > deadline:
            return False
        # Garbage is no reference: frames of an error that was caught are cycles, which hold their
        # tensors until the next collection.
        gc.collect()
        time.sleep(0.01)
    return True
