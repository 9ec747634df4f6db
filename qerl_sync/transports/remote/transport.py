"""Sends chunks to the workers of vLLM engines in other processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from qerl_sync.config.models import require_announced
from qerl_sync.engines.base import PauseMode, WeightSyncClient, as_engine_client
from qerl_sync.errors import ConfigError, NoRoomError, StaleBaseError, SyncError, TransportError
from qerl_sync.meta import ParamMeta, metas_to_json
from qerl_sync.options import MapOptions, SyncOptions
from qerl_sync.plan.adapter import Adapter
from qerl_sync.plan.joint_map import joint_map
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.staging import Part, part_of, slot_bytes
from qerl_sync.plan.sync_plan import Chunk, SyncPlan
from qerl_sync.transports.base import (
    EngineFacts,
    SyncResult,
    Transport,
    WorkerReport,
    require_emptied,
)
from qerl_sync.transports.remote.compatibility import require_protocol, require_same_map
from qerl_sync.transports.remote.connection import WorkerConnection, choose_transport
from qerl_sync.transports.remote.control import GRACE_SECONDS, EngineControl
from qerl_sync.transports.remote.listener import admit_workers, reject
from qerl_sync.transports.remote.staging import StagedChunk, Staging, why_whole
from qerl_sync.wire import cuda_memory
from qerl_sync.wire import messages as say
from qerl_sync.wire.endpoints import Listener, format_endpoint, parse_endpoint
from qerl_sync.wire.handshake import ConnectCall
from qerl_sync.wire.host import host_id
from qerl_sync.wire.segments import parameters_are_shared
from qerl_sync.wire.tokens import TOKEN_VARIABLE, new_token, proof

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

M = TypeVar("M")

# How long a worker may take to answer a ping. Its thread for that waits for nothing, but shares the
# interpreter with vLLM. One that takes longer is connected anew.
PING_SECONDS = 10.0


class RemoteTransport(Transport):
    """All worker ranks of one or several vLLM engines with the backend `qerl`.

    Example:
        transport = RemoteTransport(HTTPClient("http://127.0.0.1:8000"))
        with SyncSession(HFSource(model), transport, SyncConfig()) as session:
            session.push(step=1)

    The engines' control plane starts our code on their workers' threads; messages and chunks
    go over connections of our own (`wire.messages`). One call of `update_weights` is one sync,
    between two steps of the scheduler.

    On several trainer ranks, each makes one, with the same `endpoints`; rank 0 has the client.

    Args:
        client: the engines' control plane, an EngineClient or an object with vLLM's four methods;
            None on trainer ranks other than 0.
        transport: `cuda_ipc`, `shm`, `tcp`, or `auto`: for each worker what works best.
        chunks_in_flight: receive buffers; sending runs at most so far ahead of loading.
        timeout_seconds: of each wait, on both sides.
        address: under which workers reach this trainer.
        port: that it listens on; 0 is any free one. With `endpoints`, theirs counts.
        bind: the address that it listens on, and no other; empty: `address`.
        pause_mode: see `SyncConfig`.
        recompute_running: see `SyncConfig`.
        endpoints: `host:port` of each trainer rank, where there are several; QERL_SYNC_TOKEN must
            then be set for all of them and for the workers.
        rank: of this process among them.
        num_workers: worker ranks in all, which trainer ranks other than 0 must know.
        worker_timeout_seconds: of the workers' waits, where those should last longer.

    Attributes:
        workers: the connections to all workers; none before the first use, or after a failure.
        slot_device: on which slots for `cuda_ipc` are, since the workers were connected.

    Nothing is opened before the first call.
    """

    num_poisoned = 0

    def __init__(
        self,
        client: WeightSyncClient | None,
        *,
        transport: str = "auto",
        chunks_in_flight: int = 2,
        timeout_seconds: float = 300.0,
        address: str = "127.0.0.1",
        port: int = 0,
        bind: str = "",
        pause_mode: PauseMode = "keep",
        recompute_running: bool = True,
        endpoints: Sequence[str] = (),
        rank: int = 0,
        num_workers: int = 0,
        worker_timeout_seconds: float | None = None,
    ) -> None:
        self._client = None if client is None else as_engine_client(client, timeout_seconds)
        self._wanted = transport
        self._chunks_in_flight = chunks_in_flight
        self._timeout_seconds = timeout_seconds
        self._worker_timeout_seconds = worker_timeout_seconds or timeout_seconds
        self._address, self._port, self._bind = address, port, bind
        self._endpoints = list(endpoints)
        self._rank = rank
        self.leads = rank == 0
        self._num_workers = num_workers
        if rank and not num_workers:
            raise ConfigError(
                f"trainer rank {rank} cannot ask the engine how many workers there are; give "
                "num_workers"
            )
        require_announced(address)
        for endpoint in endpoints:
            require_announced(endpoint.rpartition(":")[0].strip("[]"))
        self._token = os.environ.get(TOKEN_VARIABLE, "")
        if len(self._endpoints) > 1 and not self._token:
            raise ConfigError(
                f"several trainer ranks need a token that all of them and the workers know; set "
                f"the environment variable {TOKEN_VARIABLE}"
            )
        self._shared_token = bool(self._token)
        self._token = self._token or new_token()
        self._control = EngineControl(
            self._client,
            self._token,
            timeout_seconds=timeout_seconds,
            pause_mode=pause_mode,
            recompute_running=recompute_running,
        )
        # Workers serve one session while it is alive, and name it to other trainers.
        self._session = say.TrainerSession.begin()
        self._listener: Listener[WorkerConnection] | None = None
        self.workers: list[WorkerConnection] = []
        self._staging: Staging | None = None  # of the current sync
        self._own_staging: Staging | None = None  # a pool's members have none
        # From a first Commit until all that follows it has succeeded, in this sync or a later one.
        self._committing = False
        self._spent_version = 0  # the last version that a worker may have committed
        self._free_bytes = 0
        self._map_request: say.MapRequest | None = None
        self._taken = False
        self.slot_device: torch.device | None = None
        self._no_room: dict[str, str] = {}
        self._synced_instances: set[str] = set()  # of the last sync that was committed

    @property
    def kinds(self) -> set[str]:
        """Return the ways by which bytes travel to the workers."""
        return {worker.kind for worker in self.workers}

    @property
    def busy_cores(self) -> set[int]:  # type: ignore[override]
        here = host_id()
        return {core for hello in self.hellos if hello.host == here for core in hello.cores}

    @property
    def connected(self) -> bool:
        return bool(self.workers) and all(worker.connected for worker in self.workers)

    @property
    def hellos(self) -> list[say.Hello]:
        """Return what the connected workers have said of themselves."""
        return [worker.hello for worker in self.workers]

    def committed_version(self) -> int:
        """See the base class. Connect anew where workers were lost, or have joined the engine."""
        # vLLM can add data parallel replicas to an engine that runs (elastic expert parallelism). A
        # server of a part of the replicas counts those of the others, too.
        partial = any(hello.server_is_partial for hello in self.hellos)
        counted = len(self.workers)
        if counted and not partial and self._control.world_size() not in (None, counted):
            if len(self._endpoints) > 1:
                raise SyncError(
                    f"the engine no longer has the {counted} workers that this "
                    "trainer's ranks are connected to; close the session on every rank and make a "
                    "new one"
                )
            self.disconnect()
        self.open()  # others may have synced them since we were connected
        # An engine may have served a version whose sync failed late, and have been restarted since.
        return max(self._spent_version, *(hello.version for hello in self.hellos))

    @property
    def versions(self) -> dict[str, int]:
        return {worker.peer: worker.hello.version for worker in self.workers}

    def holds(self, version: int) -> bool:
        return bool(self.workers) and all(
            hello.version == version
            and not hello.poisoned
            and hello.instance in self._synced_instances
            for hello in self.hellos
        )

    @property
    def sends_whole(self) -> str:
        if len(self._endpoints) > 1:
            return "several trainer ranks send"
        return why_whole(self.kinds)

    def require_adapter(self, adapter: Adapter) -> None:
        self.open()
        request = say.AdapterRequest(adapter=adapter.to_json())
        self._ask(request, say.AdapterReply, "whether it can serve the adapter")

    def layer_map(self, metas: Sequence[ParamMeta], options: MapOptions = MapOptions()) -> LayerMap:
        self.open()
        self._map_request = say.MapRequest(metas=metas_to_json(metas), options=options)
        return self._ask_map(self._map_request)

    def free_bytes(self) -> int:
        """See the base class. Each worker reports it with its layer map, before receive buffers."""
        return self._free_bytes

    def start(
        self,
        plan: SyncPlan,
        layer_map: LayerMap,
        options: SyncOptions,
        *,
        staging: Staging | None = None,
    ) -> None:
        """See the base class.

        Args:
            staging: prepared slots of a caller that stages for several transports. The caller
                begins and closes them, and calls `await_room` and `announce` instead of `send`.
        """
        self.open()
        self._plan, self._version, self._index = plan, options.version, 0
        indices = None
        if options.held is not None:
            indices = [i for i, meta in enumerate(plan.metas) if meta.name in options.held]
        slots = slot_bytes(part_of(plan, indices).sizes, self._chunks_in_flight)
        self._staging = staging or self._prepare_slots(slots)
        self._renew_map(layer_map)
        if "ray" in self.kinds:
            assert self._client is not None
            assert self._client.store is not None
            self._client.store.require_store(sum(slots))
        if self._own_staging is not None:
            self._own_staging.begin(plan, options, layer_map, self.busy_cores)
        mirror = self._staging.mirror
        if options.base is not None and not self.holds(options.base):
            raise StaleBaseError(  # connected anew since the session has asked
                f"a worker is not on version {options.base} any more, on which this sync builds; "
                "send everything",
                base=options.base,
                version=min(hello.version for hello in self.hellos),
            )
        self._control.pause(self.workers)
        # One `update_weights` for the whole sync: between two of them the scheduler would run steps
        # on a mix of versions.
        self._control.begin_session(self.workers)
        self._announced = self._staging.segments
        for worker in self.workers:
            worker.forget_chunks()
            worker.watch = self.watch
            known = worker.plan_digest == plan.digest
            if not known:
                # A worker keeps the last plan that it was sent, also one that it then refuses.
                worker.plan_digest = ""
            worker.tell(
                say.SyncRequest(
                    digest=plan.digest,
                    plan=None if known else plan.to_json(),
                    layer_map=worker.layer_map.digest if worker.layer_map else "",
                    held=indices,
                    options=replace(options, held=None),
                    mirror="" if mirror is None else mirror.id,
                    segments=self._announced.get(worker.kind, []),
                    slots=slots,
                )
            )
        self._taken = False
        # With several trainer ranks, workers decide what each sends. One rank alone does not wait
        # for their answer: it gathers the first chunk while they open the sync.
        self._part: Part = part_of(plan, None)
        if len(self._endpoints) > 1 or indices is not None:
            self._part = part_of(plan, self.await_taken())
        if self._rank and any(self._part.sizes) and not parameters_are_shared():
            # Only now is it known what this rank sends. Find out before the first byte whether
            # there is room for it.
            self._staging.prepare(slots, self.workers, later=False)

    def send(self, chunk: Chunk, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        index, self._index = self._index, self._index + 1
        metas = self._part.chunks[index]
        if self._part.owned is not None:
            owned = {meta.name for meta in metas}
            tensors = (named for named in tensors if named[0] in owned)
        assert self._staging is not None
        # The slot may still be read: what is written to it before its credit would be loaded as the
        # earlier chunk.
        with self.watch.span("await slot", f"chunk {index}"):
            awaited = self.await_room(index)
        # Also without tensors of its own: the source's stream may be a part of collectives.
        staged = self._staging.stage(index, metas, tensors, awaited=awaited)
        if metas:
            self.announce(index, staged)

    def await_room(self, index: int) -> bool:
        """Block until every worker has loaded what was in the slot that chunk `index` gets.

        Returns:
            True if the workers are idle: they load faster than we stage, or have no chunk yet.
        """
        prompt = [worker.await_loaded(index - self._chunks_in_flight) for worker in self.workers]
        if index < self._chunks_in_flight:
            return not any(worker.busy for worker in self.workers)
        return all(prompt)

    def announce(self, index: int, staged: StagedChunk) -> None:
        """Send a staged chunk to every worker."""
        assert self._staging is not None
        # A worker that refuses the plan says so here, before the first chunk is read.
        self.await_taken()
        before, self._announced = self._announced, self._staging.segments
        for worker in self.workers:
            segments = self._announced.get(worker.kind, [])
            new = segments if segments != before.get(worker.kind, []) else []
            worker.announce(index, staged, new)

    def finish(self) -> SyncResult:
        self.complete()
        return self.commit()

    def complete(self) -> None:
        """Block until every worker has all of the weights, whole, and awaits the commit."""
        if not self._control.in_session:
            raise SyncError("no sync is open on these workers; start one first")
        self.await_taken()
        for worker in self.workers:
            worker.await_loaded(len(self._plan.chunks))
        self._tell(say.Finish())
        self._reported = [
            worker.expect(say.Report, "finishing the sync") for worker in self.workers
        ]

    def commit(self) -> SyncResult:
        """Commit: the workers may generate with the new weights. Return what they measured."""
        # From the first Commit on a failure leaves it open which workers have committed: `abort`
        # must then not let the engine go on, nor roll any of them back. Nor must the abort of a
        # later sync that has touched nothing.
        self._committing, self._spent_version = True, self._version
        self._tell(say.Commit(version=self._version))
        overwritten = False
        for worker in self.workers:
            overwritten |= worker.expect(say.Committed, "committing").caches_overwritten
            worker.hello = worker.hello.model_copy(
                update={"version": self._version, "poisoned": None}
            )
        self._synced_instances = {hello.instance for hello in self.hellos}
        assert self._staging is not None
        if self._own_staging is not None:
            # A trainer that is killed between two syncs leaves no shared memory without a name.
            self._own_staging.unlink(self.workers)
            self._own_staging.committed(self._version)
        self._control.end_session(self.workers, version=str(self._version))
        connector = next((h.connector for h in self.hellos if h.connector), "")
        # If caches cannot be emptied, this raises with `_committing` set, and the engine stays
        # paused: it would compute with keys and values of the old weights.
        self._control.resume(caches=True, overwritten=overwritten, connector=connector)
        self._committing, self.num_poisoned = False, 0
        reports = list(map(self._report, self.workers, self._reported))
        return self._staging.result(reports, (f"{w.kind}: {w.reason}" for w in self.workers))

    def abort(self, reason: str) -> None:
        """End whatever is open. Workers that are poisoned stay paused, and so do those that have
        committed what the others may not have; those that were not touched, or are back on the old
        version, go on."""
        in_session, committing = self._control.in_session, self._committing
        if in_session:
            # After a Commit no worker may go back: another one may serve the new version already.
            told = say.Abort(reason=reason, keep_old=not committing)
            untouched = [self._abort(worker, told) for worker in self.workers]
            unharmed = self._control.end_failed_session(self.workers) and all(untouched)
        else:
            unharmed = not any(hello.poisoned for hello in self.hellos)
        unharmed = unharmed and not committing
        self.num_poisoned = 0 if unharmed else len(self.workers) or self.num_poisoned
        if unharmed:
            # A trainer before this one may have died between a Commit and the emptying of caches.
            known = all(hello.instance in self._synced_instances for hello in self.hellos)
            self._control.go_on(reason, caches=not known)
        elif in_session or self._control.paused or (committing and self.workers):
            self._control.leave_paused(reason)
        if not (in_session and unharmed):  # what state the engine's update is in is not known
            self.disconnect()
        elif self._own_staging is not None:
            self._own_staging.unlink(())  # not every worker has attached them

    @property
    def engine_facts(self) -> EngineFacts:
        first, *_ = hellos = self.hellos
        shortest = min(hello.context_tokens for hello in hellos)
        return EngineFacts(first.dtype, first.quantization, shortest)

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        if self._client is None:
            return super().prompt_logprobs(token_ids)
        return self._client.prompt_logprobs(token_ids)

    def invalidate(self, reason: str) -> None:
        """See the base class. The engine stays paused, as after a failed sync; also where its
        workers cannot be reached."""
        try:
            self._control.pause()
            self.open()  # `abort` has disconnected
            self._control.begin_session(self.workers)
            self._tell(say.Invalidate(reason=reason))
            for worker in self.workers:
                worker.expect(say.Aborted, "being poisoned")
        finally:
            # Paused, whatever came of it: a worker that was not reached serves the wrong weights.
            if self._control.in_session:
                self._control.end_failed_session(self.workers)
            self._control.leave_paused(reason)
            self.num_poisoned = len(self.workers)
            self.disconnect()

    def close(self) -> None:
        self.abort("the session was closed")
        self.disconnect()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def await_taken(self) -> list[int] | None:
        if self._taken:
            return None
        accepted = [worker.expect(say.Accepted, "taking the plan") for worker in self.workers]
        for worker in self.workers:  # the next sync with this plan need not send it
            worker.plan_digest = self._plan.digest
        self._taken = True
        return accepted[0].owned

    def _ask_map(self, request: say.MapRequest) -> LayerMap:
        replies = self._ask(request, say.MapReply, "its layer map")
        maps = [LayerMap.from_json(reply.layer_map) for reply in replies]
        for worker, layer_map in zip(self.workers, maps, strict=True):
            worker.layer_map = layer_map
        self._free_bytes = min(reply.free_bytes for reply in replies)
        return joint_map(maps)

    def _ask(self, request: say.Message, kind: type[M], what: str) -> list[M]:
        """Return every worker's answer to a question that touches nothing."""
        try:
            self._control.begin_session(self.workers)
            self._tell(request)
            replies = [worker.expect(kind, what) for worker in self.workers]
            self._control.end_session(self.workers)
        except BaseException:  # Ctrl-C, too: the workers' threads would wait for the next question
            self.abort("the dry run failed")
            raise
        return replies

    def _renew_map(self, layer_map: LayerMap) -> None:
        """Ask for the layer map again where workers were connected anew, and have forgotten it.

        Raises:
            AgreementError: it is another than the plan was made with.
        """
        if self._map_request is not None and any(
            worker.layer_map is None for worker in self.workers
        ):
            require_same_map(layer_map, self._ask_map(self._map_request))

    @property
    def can_fall_back(self) -> bool:
        """Return whether workers may be connected anew to send over something else. Several
        trainer ranks would have to do so at the same time."""
        return self._wanted == "auto" and len(self._endpoints) <= 1

    def fall_back(self, reason: NoRoomError) -> None:
        """Connect anew, over what works besides the memory that has no room, for as long as this
        lives."""
        logger.warning("%s is not used: %s", reason.transport, reason)
        self._no_room[reason.transport] = str(reason)
        self.disconnect()
        self.open()

    def open(self) -> None:
        """Connect to the workers, unless they are connected and answer.

        Connect anew where an engine was restarted, or a router has forgotten the connection. Of
        several trainer ranks all would have to do so at once: there a lost worker is an error.
        """
        if self._control.in_session:
            # A second Ctrl-C has interrupted `abort`, and the engine waits for us.
            self.abort("a sync was interrupted")
        if self.workers:
            try:
                # Before the engine is paused: a connection that leads nowhere would be noticed only
                # by a timeout, with all requests waiting.
                for worker in self.workers:
                    worker.send(say.Ping(), PING_SECONDS)
                for worker in self.workers:
                    # Without `check_alive`, which asks for the engine's call of the sync before.
                    worker.skip_to(say.Pong, "a sign of life", PING_SECONDS)
                return
            except TransportError as exc:
                self.disconnect()
                if len(self._endpoints) > 1:
                    raise
                logger.warning("connecting to the workers anew: %s", exc)
        if self._client is None and self._rank == 0:
            raise ConfigError("trainer rank 0 needs the engine's client")
        if self._listener is None:
            address, port = self._address, self._port
            if self._endpoints:
                address, port = parse_endpoint(self._endpoints[self._rank])
            self._listener = Listener(self._bind or address, port, self._token, WorkerConnection)
            self._endpoint = format_endpoint(address, self._listener.port)
        endpoints = self._endpoints or [self._endpoint]
        if len(endpoints) == 1:
            # Workers that came too late for an earlier call. Of several ranks, the workers of this
            # call may have come here before rank 0 has returned from making it.
            reject(self._listener)
        self.slot_device = cuda_memory.concrete_device(self.source_device)
        call = self._control.ask_to_connect(
            ConnectCall(
                endpoints=endpoints,
                proof=proof(self._token, "init", *endpoints),
                session=self._session,
                token="" if self._shared_token else self._token,
                timeout_seconds=self._worker_timeout_seconds,
            )
        )
        self.workers = admit_workers(
            self._listener,
            call,
            self._greet,
            num_workers=self._num_workers,
            world_size=self._control.world_size,
            timeout_seconds=self._timeout_seconds,
        )
        if any(worker.hello.update_open for worker in self.workers):
            # An earlier trainer died in an update. vLLM would refuse to begin another one.
            try:
                self._control.close_stale_update()
            except BaseException:
                self.disconnect()
                raise

    def _greet(self, worker: WorkerConnection) -> None:
        from qerl_sync import __version__

        require_protocol(worker.hello, __version__)
        keeps = worker.hello.connector_keeps
        resets = self._client is None or self._client.resets_connector
        if worker.hello.connector and not resets:
            keeps = (
                keeps or "this actor's reset_prefix_cache does not reach it; inherit RolloutActor"
            )
        require_emptied(worker.hello.connector, keeps)
        choose_transport(
            worker,
            self._wanted,
            authenticated=self._shared_token,
            store=None if self._client is None else self._client.store,
            no_room=self._no_room,
            # With several trainer ranks each has a GPU of its own, and none can fall back alone.
            device=self.slot_device if self.can_fall_back or self._wanted == "cuda_ipc" else None,
        )
        logger.info("%s: %s (%s)", worker.peer, worker.kind, worker.reason)
        worker.tell(say.End())  # the worker has its transport, and returns to vLLM

    def _prepare_slots(self, slots: list[int]) -> Staging:
        """Return slots with room for the chunks in flight; over another transport where there is
        too little of one kind of memory."""
        if self._own_staging is None:
            self._own_staging = Staging(self.kinds, self.slot_device)
        later = self._rank > 0 or parameters_are_shared()
        try:
            self._own_staging.prepare(slots, self.workers, later=later)
        except NoRoomError as exc:
            if not self.can_fall_back:
                raise
            self.fall_back(exc)
            return self._prepare_slots(slots)  # /dev/shm may have what a GPU has not
        return self._own_staging

    def disconnect(self) -> None:
        """Close all connections. The next use connects anew."""
        for worker in self.workers:
            worker.close()
        self.workers = []
        if self._own_staging is not None:
            self._own_staging.close()
        self._staging = self._own_staging = None

    def _abort(self, worker: WorkerConnection, told: say.Abort) -> bool:
        """Return whether the worker was not touched and goes on with what it has."""
        try:
            worker.forget_chunks()
            worker.tell(told)
            reported = worker.skip_to(
                say.Aborted, "aborting the sync", GRACE_SECONDS, worker.check_alive
            )
            return reported.poisoned is None
        except SyncError as exc:
            logger.warning("%s cannot be reached to abort the failed sync: %s", worker.peer, exc)
            return False

    def _tell(self, message: say.Message) -> None:
        for worker in self.workers:
            worker.tell(message)

    def _report(self, worker: WorkerConnection, reported: say.Report) -> WorkerReport:
        assert worker.layer_map is not None
        predicted = self._plan.predicted_with(worker.layer_map)
        measured = {name: value for name, value in reported if name != "type"}
        return WorkerReport(worker=worker.peer, predicted=predicted, **measured)
