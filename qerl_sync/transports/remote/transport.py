"""Sends chunks to the workers of vLLM engines in other processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from qerl_sync.buffers.trace import Trace
from qerl_sync.config.models import require_announced
from qerl_sync.engines.base import PauseMode, WeightSyncClient, as_engine_client
from qerl_sync.errors import (
    ConfigError,
    NoRoomError,
    StaleBaseError,
    SyncError,
    TransportError,
)
from qerl_sync.meta import ParamMeta
from qerl_sync.options import Load, SyncOptions
from qerl_sync.plan.adapter import Adapter
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.replay import replay
from qerl_sync.plan.staging import Part, part_of, slot_bytes
from qerl_sync.plan.sync_plan import Chunk, SyncPlan
from qerl_sync.transports.base import SyncResult, Transport, WorkerReport, require_emptied
from qerl_sync.transports.remote.compatibility import (
    joint_map,
    require_protocol,
    require_same_map,
)
from qerl_sync.transports.remote.control import GRACE_SECONDS, EngineControl
from qerl_sync.transports.remote.listener import WorkerListener
from qerl_sync.transports.remote.peer import Peer, Ways, choose_transport
from qerl_sync.transports.remote.staging import StagedChunk, Staging
from qerl_sync.wire import cuda_memory
from qerl_sync.wire import messages as say
from qerl_sync.wire.channel import TOKEN_VARIABLE, new_token, parse_endpoint, proof
from qerl_sync.wire.host import host_id
from qerl_sync.wire.segments import parameters_are_shared

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

M = TypeVar("M")


class RemoteTransport(Transport):
    """All worker ranks of one or several vLLM engines with the backend `qerl`.

    Example:
        transport = RemoteTransport(HTTPClient("http://127.0.0.1:8000"))
        with SyncSession(HFSource(model), transport, SyncConfig()) as session:
            session.push(step=1)

    The engines' control plane lends us their workers' threads; what is said and sent goes over
    connections of our own (`wire.messages` has the conversation). One call of `update_weights` is
    one sync, between two steps of the scheduler.

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
        pause_mode, recompute_running: see `SyncConfig`.
        endpoints: `host:port` of each trainer rank, where there are several; QERL_SYNC_TOKEN must
            then be set for all of them and for the workers.
        rank: of this process among them.
        num_workers: worker ranks in all, which trainer ranks other than 0 must know.
        worker_timeout_seconds: of the workers' waits, where those should last longer.

    Attributes:
        slot_device: on which slots for `cuda_ipc` are, since the workers were connected.

    Nothing is opened before the first call.
    """

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
        self._client = None if client is None else as_engine_client(client)
        self._wanted = transport
        self._chunks_in_flight = chunks_in_flight
        self._timeout_seconds = timeout_seconds
        self._worker_timeout_seconds = worker_timeout_seconds or timeout_seconds
        self._address, self._port, self._bind = address, port, bind
        self._endpoints = list(endpoints)
        self._rank = rank
        self._num_workers = num_workers
        if rank and not num_workers:
            raise ConfigError(
                f"trainer rank {rank} cannot ask the engine how many workers there are; give "
                "num_workers"
            )
        for announced in (
            address,
            *(endpoint.rpartition(":")[0].strip("[]") for endpoint in endpoints),
        ):
            require_announced(announced)
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
        # Workers keep to one session while it is alive, and name it to whoever else asks.
        self._session = say.TrainerSession.begin()
        self._listener: WorkerListener | None = None
        self._peers: list[Peer] = []
        self._staging: Staging | None = None
        self._staging_is_mine = True
        self._committing = False
        self._free_bytes = 0
        self._map_request: say.MapRequest | None = None
        self._taken = False
        self.slot_device: torch.device | None = None
        self._no_room: dict[str, str] = {}
        self._synced_instances: set[str] = set()  # of the last sync that was committed

    @property
    def peers(self) -> Sequence[Peer]:
        """The workers that are connected. A worker that connects anew is another peer."""
        return self._peers

    @property
    def kinds(self) -> set[str]:
        """How bytes travel to the workers that are connected."""
        return {peer.kind for peer in self._peers}

    @property
    def busy_cores(self) -> set[int]:  # type: ignore[override]
        here = host_id()
        return {core for hello in self.hellos if hello.host == here for core in hello.cores}

    @property
    def connected(self) -> bool:
        return bool(self._peers) and all(peer.connected for peer in self._peers)

    @property
    def hellos(self) -> list[say.Hello]:
        """What the workers that are connected have said of themselves."""
        return [peer.hello for peer in self._peers]

    def committed_version(self) -> int:
        """See the base class. Connect anew where workers were lost, or have joined the engine."""
        if self._peers and self._has_grown():
            if len(self._endpoints) > 1:
                raise SyncError(
                    f"the engine no longer has the {len(self._peers)} workers that this trainer's "
                    "ranks are connected to; close the session on every rank and make a new one"
                )
            self.disconnect()
        self.open()  # others may have synced them since we were connected
        return max(hello.version for hello in self.hellos)

    def holds(self, version: int) -> bool:
        return bool(self._peers) and all(
            hello.version == version
            and not hello.poisoned
            and hello.instance in self._synced_instances
            for hello in self.hellos
        )

    def require_adapter(self, adapter: Adapter) -> None:
        self.open()
        request = say.AdapterRequest(adapter=adapter.to_json())
        self._ask(request, say.AdapterReply, "whether it can serve the adapter")

    def layer_map(
        self,
        metas: Sequence[ParamMeta],
        *,
        allow_incomplete: Sequence[str] = (),
        load: Load = "auto",
    ) -> LayerMap:
        self.open()
        self._map_request = say.MapRequest(
            metas=say.pack_metas(list(metas)),
            allow_incomplete=list(allow_incomplete),
            load=load,
        )
        return self._ask_map(self._map_request)

    def free_bytes(self) -> int:
        """As each worker told it with its layer map; receive buffers are not yet taken off."""
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
        self._renew_map(layer_map)
        self._staging_is_mine = staging is None
        self._plan, self._version, self._index = plan, options.version, 0
        self._committing = False
        indices = None
        if options.held is not None:
            indices = [i for i, meta in enumerate(plan.metas) if meta.name in options.held]
        slots = slot_bytes(part_of(plan, indices).sizes, self._chunks_in_flight)
        if staging is None:
            staging = self._staging_with_room(slots, layer_map)
        if "ray" in self.kinds:
            assert self._client is not None
            assert self._client.store is not None
            self._client.store.require_store(sum(slots))
        self._staging = staging
        if self._staging_is_mine:
            staging.begin(options, layer_map.parents_text, self.busy_cores)
        if options.base is not None and not self.holds(options.base):
            raise StaleBaseError(  # connected anew since the session has asked
                f"a worker is not on version {options.base} any more, on which this sync builds; "
                "send everything",
                base=options.base,
                version=min(hello.version for hello in self.hellos),
            )
        self._control.pause(self._peers)
        self._control.begin_session(self._peers)
        self._announced = staging.segments
        for peer in self._peers:
            peer.forget_chunks()
            known = peer.plan_digest == plan.digest
            if not known:
                # A worker keeps the last plan that it was sent, also one that it then refuses.
                peer.plan_digest = ""
            peer.send(
                say.SyncRequest(
                    digest=plan.digest,
                    plan=None if known else plan.to_json(),
                    layer_map=peer.layer_map.digest if peer.layer_map else "",
                    held=indices,
                    verify=options.verify,
                    on_failure=options.on_failure,
                    finite_check=options.finite_check,
                    base=options.base,
                    is_base=options.is_base,
                    segments=self._announced.get(peer.kind, []),
                    slots=slots,
                )
            )
        self._taken = False
        # Of several trainer ranks, workers say what each sends. One alone need not wait for that.
        self._part: Part = part_of(plan, None)
        if len(self._endpoints) > 1 or indices is not None:
            self._part = part_of(plan, self._await_taken())
        if self._rank and any(self._part.sizes) and not parameters_are_shared():
            # Before the first byte: what this rank sends, and so needs room for, is known by now.
            staging.prepare(slots, self._peers, later=False)

    def send(self, chunk: Chunk, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        index, self._index = self._index, self._index + 1
        metas = self._part.chunks[index]
        if self._part.owned is not None:
            owned = {meta.name for meta in metas}
            tensors = (named for named in tensors if named[0] in owned)
        assert self._staging is not None
        awaited = self.await_room(index)
        staged = self._staging.stage(index, metas, tensors, awaited=awaited)
        if metas:
            self.announce(index, staged)

    def await_room(self, index: int) -> bool:
        """Until every worker has loaded what was in the slot that chunk `index` gets. Returns
        whether they are ahead of us: they load quicker than we stage, or have nothing yet."""
        prompt = [peer.await_loaded(index - self._chunks_in_flight) for peer in self._peers]
        if index < self._chunks_in_flight:
            return not any(peer.busy for peer in self._peers)
        return all(prompt)

    def announce(self, index: int, staged: StagedChunk) -> None:
        """Send a staged chunk to every worker."""
        assert self._staging is not None
        self._await_taken()
        before, self._announced = self._announced, self._staging.segments
        for peer in self._peers:
            segments = self._announced.get(peer.kind, [])
            peer.announce(
                say.Chunk(
                    index=index,
                    places=staged.places.get(peer.kind, []),
                    in_place=staged.in_place,
                    checksums=staged.checksums,
                    segments=segments if segments != before.get(peer.kind, []) else [],
                ),
                staged,
            )

    def finish(self) -> SyncResult:
        self.complete()
        return self.commit()

    def complete(self) -> None:
        """Until every worker has all of the weights, whole, and awaits the commit."""
        if not self._control.in_session:
            raise SyncError("no sync is open on these workers; start one first")
        self._await_taken()
        for peer in self._peers:
            peer.await_loaded(len(self._plan.chunks))
        self._tell(say.Finish())
        self._reported = [peer.expect(say.Report, "finishing the sync") for peer in self._peers]

    def commit(self) -> SyncResult:
        """Let the workers generate with the new weights. Returns what they measured."""
        self._committing = True
        self._tell(say.Commit(version=self._version))
        overwritten = False
        for peer in self._peers:
            overwritten |= peer.expect(say.Committed, "committing").caches_overwritten
            peer.hello = peer.hello.model_copy(update={"version": self._version, "poisoned": None})
        self._synced_instances = {hello.instance for hello in self.hellos}
        assert self._staging is not None
        if self._staging_is_mine:
            self._staging.unlink(self._peers)
        self._end_talk(version=str(self._version))
        connector = next((h.connector for h in self.hellos if h.connector), "")
        self._control.resume(caches=True, overwritten=overwritten, connector=connector)
        self._committing = False
        return SyncResult(
            workers=[
                self._report(peer, reported)
                for peer, reported in zip(self._peers, self._reported, strict=True)
            ],
            kind="; ".join(dict.fromkeys(f"{peer.kind}: {peer.reason}" for peer in self._peers)),
            verify_seconds=self._staging.verify_seconds,
        )

    def abort(self, reason: str) -> None:
        """End whatever is open. Workers that are poisoned stay paused, and so do those that have
        committed what the others may not have; those that were not touched, or are back on the old
        version, go on."""
        in_session, committing, self._committing = self._control.in_session, self._committing, False
        if in_session:
            untouched = [self._abort(peer, reason) for peer in self._peers]
            unharmed = self._end_failed_talk() and all(untouched)
        else:
            unharmed = not any(hello.poisoned for hello in self.hellos)
        unharmed = unharmed and not committing
        if unharmed:
            self._control.go_on(reason)
        elif in_session or committing or self._control.paused:
            self._control.leave_paused(reason)
        if not (in_session and unharmed):  # what state the engine's update is in is not known
            self.disconnect()
        elif self._staging is not None and self._staging_is_mine:
            self._staging.unlink(())  # not every worker has attached them

    @property
    def precision(self) -> tuple[str, str | None]:
        return self._peers[0].hello.dtype, self._peers[0].hello.quantization

    @property
    def context_tokens(self) -> int:
        return min(hello.context_tokens for hello in self.hellos)

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        if self._client is None:
            return super().prompt_logprobs(token_ids)
        return self._client.prompt_logprobs(token_ids)

    def invalidate(self, reason: str) -> None:
        """The engine stays paused, as after a sync that failed; also where it cannot be told."""
        try:
            self._control.pause()
            self._control.begin_session(self._peers)
            self._tell(say.Invalidate(reason=reason))
            for peer in self._peers:
                peer.expect(say.Aborted, "being poisoned")
        finally:
            if self._control.in_session:
                self._end_failed_talk()
            self._control.leave_paused(reason)
            self.disconnect()

    def close(self) -> None:
        self.abort("the session was closed")
        self.disconnect()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _await_taken(self) -> list[int] | None:
        """Until every worker has opened the sync. Returns which of the plan's tensors this trainer
        rank is to send; None: all."""
        if self._taken:
            return None
        accepted = [peer.expect(say.Accepted, "taking the plan") for peer in self._peers]
        for peer in self._peers:
            peer.plan_digest = self._plan.digest
        self._taken = True
        return accepted[0].owned

    def _ask_map(self, request: say.MapRequest) -> LayerMap:
        replies = self._ask(request, say.MapReply, "its layer map")
        for peer, reply in zip(self._peers, replies, strict=True):
            peer.layer_map = LayerMap.from_json(reply.layer_map)
        self._free_bytes = min(reply.free_bytes for reply in replies)
        return joint_map([peer.layer_map for peer in self._peers if peer.layer_map is not None])

    def _ask(self, request: say.Message, kind: type[M], what: str) -> list[M]:
        """Return every worker's answer to a question that touches nothing."""
        try:
            self._control.begin_session(self._peers)
            self._tell(request)
            replies = [peer.expect(kind, what) for peer in self._peers]
            self._end_talk()
        except SyncError:
            self.abort("the dry run failed")
            raise
        return replies

    def _renew_map(self, layer_map: LayerMap) -> None:
        """Workers that were connected anew, after a failure, have forgotten theirs."""
        if self._map_request is not None and any(peer.layer_map is None for peer in self._peers):
            require_same_map(layer_map, self._ask_map(self._map_request))

    @property
    def can_fall_back(self) -> bool:
        """Whether workers may be connected anew to send over something else. Several trainer ranks
        would have to do so at the same time."""
        return self._wanted == "auto" and len(self._endpoints) <= 1

    def fall_back(self, reason: NoRoomError) -> None:
        """Connect anew, over what works besides the memory that has no room, for as long as this
        lives."""
        logger.warning("%s is not used: %s", reason.transport, reason)
        self._no_room[reason.transport] = str(reason)
        self.disconnect()
        self.open()

    def open(self) -> None:
        """Connect to the workers, unless they are: also where an engine was restarted since, or
        where something between them and us has forgotten the connection, while the engine still
        generates.

        Several trainer ranks would have to do so at the same time: there a lost worker is an error.
        """
        if self._peers:
            try:
                for peer in self._peers:
                    peer.ping()
                for peer in self._peers:
                    peer.await_pong()
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
            self._listener = WorkerListener(
                address,
                port,
                self._token,
                bind=self._bind or address,
                timeout_seconds=self._timeout_seconds,
                num_workers=self._num_workers,
            )
        endpoints = self._endpoints or [self._listener.endpoint]
        if len(endpoints) == 1:  # of several ranks, workers may have come to this one before
            self._listener.reject()
        self.slot_device = cuda_memory.concrete_device(self.source_device)
        call = self._control.ask_to_connect(
            {
                "endpoints": endpoints,
                "proof": proof(self._token, "init", *endpoints),
                "session": self._session.model_dump(),
                "token": "" if self._shared_token else self._token,
                "timeout_seconds": self._worker_timeout_seconds,
            }
        )
        self._peers = self._listener.admit(call, self._greet, self._control.world_size)
        if any(peer.hello.update_open for peer in self._peers):
            try:
                self._control.close_stale_update()
            except BaseException:
                self.disconnect()
                raise

    def _has_grown(self) -> bool:
        """Return whether the engine has other workers than those that are connected: vLLM can add
        data parallel replicas to an engine that runs (elastic expert parallelism)."""
        if any(hello.server_is_partial for hello in self.hellos):
            return False
        return self._control.world_size() not in (None, len(self._peers))

    def _greet(self, peer: Peer) -> None:
        from qerl_sync import __version__

        require_protocol(peer.hello, __version__)
        keeps = peer.hello.connector_keeps
        resets = self._client is None or self._client.resets_connector
        if peer.hello.connector and not resets:
            keeps = (
                keeps or "this actor's reset_prefix_cache does not reach it; inherit RolloutActor"
            )
        require_emptied(peer.hello.connector, keeps)
        ways = Ways(
            wanted=self._wanted,
            authenticated=self._shared_token,
            store=None if self._client is None else self._client.store,
            no_room=self._no_room,
            # Of several trainer ranks each has a GPU of its own, and none can fall back alone.
            device=self.slot_device if self.can_fall_back or self._wanted == "cuda_ipc" else None,
        )
        choose_transport(peer, ways, host_id())
        logger.info("%s: %s (%s)", peer.name, peer.kind, peer.reason)
        peer.send(say.End())

    def _staging_with_room(self, slots: list[int], layer_map: LayerMap) -> Staging:
        try:
            return self._staging_for(slots)
        except NoRoomError as exc:
            if not self.can_fall_back:
                raise
            self.fall_back(exc)
            self._renew_map(layer_map)
            return self._staging_with_room(slots, layer_map)  # /dev/shm may have what a GPU has not

    def _staging_for(self, slots: list[int]) -> Staging:
        if self._staging is None:
            self._staging = Staging(self.kinds, self.slot_device)
        later = self._rank > 0 or parameters_are_shared()
        self._staging.prepare(slots, self._peers, later=later)
        return self._staging

    def disconnect(self) -> None:
        """The next use connects anew."""
        for peer in self._peers:
            peer.close()
        self._peers = []
        if self._staging is not None and self._staging_is_mine:
            self._staging.close()
        self._staging = None

    def _abort(self, peer: Peer, reason: str) -> bool:
        """Returns whether the worker was not touched and goes on with what it has."""
        try:
            peer.forget_chunks()
            peer.send(say.Abort(reason=reason, keep_old=not self._committing))
            reported = peer.skip_to(say.Aborted, "giving up the sync", GRACE_SECONDS)
            return reported.poisoned is None
        except SyncError as exc:
            logger.warning("%s cannot be told that the sync has failed: %s", peer.name, exc)
            return False

    def _end_talk(self, version: str | None = None) -> None:
        self._tell(say.End())
        self._control.end_session(self._peers, version)

    def _end_failed_talk(self) -> bool:
        """Returns whether the engine is ready for the next call."""
        for peer in self._peers:
            with suppress(SyncError):
                peer.send(say.End())
        return self._control.end_failed_session()

    def _tell(self, message: say.Message) -> None:
        for peer in self._peers:
            peer.send(message)

    def _report(self, peer: Peer, reported: say.Report) -> WorkerReport:
        plan = self._plan
        assert peer.layer_map is not None
        same = peer.layer_map.digest == plan.layer_map_digest
        return WorkerReport(
            worker=peer.name,
            trace=Trace.from_json(reported.trace),
            predicted=plan.predicted if same else replay(plan.load_metas, peer.layer_map),
            seconds=reported.seconds,
            peak_extra_bytes=reported.peak_extra_bytes,
            peak_extra_bytes_predicted=reported.peak_extra_bytes_predicted,
            peak_staged_bytes=reported.peak_staged_bytes,
            kept_bytes=reported.kept_bytes,
        )
