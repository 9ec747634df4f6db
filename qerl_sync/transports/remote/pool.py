"""One sync for several engines that come and go: staged once, committed by all that are left."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from qerl_sync.engines.base import in_thread
from qerl_sync.errors import (
    AgreementError,
    ConfigError,
    CoverageError,
    LoadError,
    NoRoomError,
    StaleBaseError,
    StaleCacheError,
    SyncError,
    TransportError,
)
from qerl_sync.meta import ParamMeta
from qerl_sync.options import MapOptions, SyncOptions
from qerl_sync.plan.adapter import Adapter
from qerl_sync.plan.joint_map import joint_map
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.staging import part_of, slot_bytes
from qerl_sync.plan.sync_plan import Chunk, SyncPlan
from qerl_sync.transports.base import EngineFacts, ProbeResult, SyncResult, Transport
from qerl_sync.transports.remote.compatibility import require_alike
from qerl_sync.transports.remote.staging import Staging, why_whole
from qerl_sync.transports.remote.transport import RemoteTransport
from qerl_sync.wire.segments import parameters_are_shared

if TYPE_CHECKING:
    import torch

    from qerl_sync.engines.base import WeightSyncClient
    from qerl_sync.wire.messages import Hello

logger = logging.getLogger(__name__)

R = TypeVar("R")

# How long a sync waits for a first member to answer that it is up.
UP_SECONDS = 5.0
# A member that fails with one of these errors is left behind; the others go on. Our other errors
# are about the weights themselves, and end the sync for all. A foreign exception comes from the
# member's engine or client, and leaves it behind too.
MEMBERS_OWN = (TransportError, LoadError, AgreementError, StaleCacheError)


@dataclass(eq=False)
class Member:
    """An engine of a pool.

    Attributes:
        is_up: whether it can be asked to connect; called before each sync while it is not ready.
        ready: it is connected, and its layer map is one that plans are made for.
        version: of its weights, as far as we know; 0 after it was lost.
        last_version: that it was known to have.
        why: it is not ready; empty before it ever was.
        address: under which its workers were told to reach us, and `port`; 0: any.
        leaving: ends what a failed sync has left open, in a thread.
    """

    name: str
    client: WeightSyncClient
    transport: RemoteTransport
    is_up: Callable[[], bool] = lambda: True
    ready: bool = False
    version: int = 0
    last_version: int = 0
    why: str = ""
    address: str = ""
    port: int = 0
    leaving: threading.Thread | None = None

    def needs_full_sync(self, why: str) -> None:
        self.last_version = self.version or self.last_version
        self.ready, self.version, self.why = False, 0, why

    def leave(
        self, why: str, work: Future[Any] | None = None, *, verified: bool = True
    ) -> threading.Thread:
        """End what a sync has open, in a thread. It is not idle until then, and needs a full sync.

        Args:
            work: what another thread still does with the transport.
            verified: False: it serves what it has not answered for (`sync.verify: full`).
        """
        self.needs_full_sync(why)

        def end() -> None:
            if work is not None:
                for worker in self.transport.workers:
                    worker.cut_off()  # it waits no longer
                wait([work])
            if verified:
                self.transport.abort(why)
                self.transport.disconnect()
            else:
                with suppress(Exception):  # it is paused, whatever else cannot be done
                    self.transport.invalidate(why)

        self.leaving = threading.Thread(target=end, name=f"end {self.name}", daemon=True)
        self.leaving.start()
        return self.leaving

    @property
    def absence(self) -> str:
        """Return the reason why a sync goes without it."""
        if not self.why:
            return "not up yet"
        since = f"version {self.last_version}" if self.last_version else "it joined"
        return f"not up again since {since}: {self.why}"

    @property
    def idle(self) -> bool:
        return self.leaving is None or not self.leaving.is_alive()


class PoolTransport(Transport):
    """Gather and stage every chunk once, and have all engines load it at the same time.

        new, lost --is up, next sync--> ready --error of its own--> lost

    An engine that dies, does not answer in time, or gets other bytes than were sent is left out of
    the rest of the sync, which the others finish and commit. It gets a full sync when it is there
    again. Only when all are lost, or the weights themselves are refused, the sync fails.

    Args:
        address: where workers reach this trainer, asked for again whenever one connects: it may
            have come from another host since.
        first_port: that the trainer listens on, for one engine; each further one takes the next
            that is unused. 0: any free ones.
        options: of each member's RemoteTransport, `transport`, `timeout_seconds` and so on.

    Attributes:
        newest_version: of the last sync that was committed here; 0 before the first.
        required_version: what the next sync must commit, or be refused; None: whatever is next.
    """

    def __init__(
        self,
        *,
        chunks_in_flight: int = 2,
        address: Callable[[], str] = lambda: "127.0.0.1",
        first_port: int = 0,
        **options: Any,
    ) -> None:
        self._chunks_in_flight = chunks_in_flight
        self._address, self._first_port = address, first_port
        self._options = options
        self._members: dict[str, Member] = {}
        self._active: list[Member] = []
        self._staging: Staging | None = None
        self._metas: list[ParamMeta] = []
        self._map_options = MapOptions()
        self._maps: set[str] = set()
        self._adapter: Adapter | None = None
        self._hello: Hello | None = None
        # Engines that are not part of the current or last sync, with the reason.
        self._lost: dict[str, str] = {}
        self.newest_version = 0
        # The last version that an engine may have committed, whatever became of the sync.
        self._spent_version = 0
        self.required_version: int | None = None

    # ---- members

    @property
    def versions(self) -> Mapping[str, int]:
        """Return the weight version of each engine; 0: not known, or never synced."""
        return {name: member.version for name, member in self._members.items()}

    @property
    def num_poisoned(self) -> int:
        return sum(member.transport.num_poisoned for member in self._members.values())

    def add(
        self, name: str, client: WeightSyncClient, is_up: Callable[[], bool] = lambda: True
    ) -> None:
        """Add an engine; it is part of the next sync. Raises ConfigError if `name` is taken."""
        if name in self._members:
            raise ConfigError(f"the pool has an engine {name!r} already; give each its own name")
        self._members[name] = self._member(name, client, is_up)

    def remove(self, name: str) -> None:
        """Disconnect an engine and forget it, between two syncs. It keeps its weights."""
        member = self._members.pop(name, None)
        if member is not None:
            if member.leaving is not None:
                member.leaving.join()  # it uses the transport
            member.transport.close()

    def forget(self, name: str, reason: str) -> None:
        """Mark an engine for a full sync: it is known to be gone, or back on other weights. Do
        nothing if it is not, or no longer, in the pool, or needs one anyway."""
        member = self._members.get(name)
        if member is not None and member.ready:
            self._lose(member, TransportError(reason))

    # ---- the transport's contract

    @property
    def busy_cores(self) -> set[int]:  # type: ignore[override]
        return {core for member in self._ready for core in member.transport.busy_cores}

    def committed_version(self) -> int:
        """See the base class. Connect to the engines that are up and not ready: they are part of
        the sync that follows.

        Each states its version here, before one is chosen, since a worker refuses a version that
        it has already. Which one that is after a sync that failed late, or that another trainer
        made, is not known here.
        """
        self._lost = {member.name: member.absence for member in self._members.values()}

        def state(member: Member) -> int:
            if not (member.ready and member.transport.connected):
                self._take_in(member)
            return member.transport.committed_version()

        stated = self._each(self._those_up(), state)
        for member in stated:
            self._lost.pop(member.name)
        return max([self._spent_version, *stated.values()])

    def holds(self, version: int) -> bool:
        """See the base class. One engine that is new, or was lost, has all get everything."""
        return bool(self._ready) and all(m.transport.holds(version) for m in self._ready)

    @property
    def sends_whole(self) -> str:
        return why_whole({kind for member in self._ready for kind in member.transport.kinds})

    def require_adapter(self, adapter: Adapter) -> None:
        """See the base class. Every engine must be able to; one that joins later is asked then."""
        self._each(
            self._those_up(),
            lambda member: member.transport.require_adapter(adapter),
            leave_behind=False,
        )
        self._adapter = adapter

    def layer_map(self, metas: Sequence[ParamMeta], options: MapOptions = MapOptions()) -> LayerMap:
        """See the base class. The first time every engine must answer, so that one that was started
        wrongly is named before anything is trained; later those that do not are left behind."""
        first = not self._metas
        metas = list(metas)

        def ask(member: Member) -> LayerMap:
            if self._adapter is not None and not member.ready:
                member.transport.require_adapter(self._adapter)
            layer_map = member.transport.layer_map(metas, options)
            if self._hello is not None:
                self._require_alike([member])
            return layer_map

        found = self._each(self._those_up(), ask, leave_behind=not first)
        self._require_alike(found)
        self._metas, self._map_options = metas, options
        self._maps = {one.digest for one in found.values()}
        for member in found:
            member.ready = True
        self._require_some(list(found))
        return joint_map(list(found.values()))

    def free_bytes(self) -> int:
        return min(member.transport.free_bytes() for member in self._ready)

    def start(self, plan: SyncPlan, layer_map: LayerMap, options: SyncOptions) -> None:
        version = options.version
        if options.held is not None:
            raise ConfigError(
                "a pool is synced by one trainer rank, which sends every tensor; have it fetch "
                "what others hold (sync_to(..., others=), docs/ray.md), gather on it, or sync each "
                "engine with a RemoteTransport of its own"
            )
        if options.on_failure == "rollback":
            raise ConfigError(
                "a pool commits without the engines that fail, so those cannot go back to the old "
                "version: choose sync.on_failure: poison"
            )
        if self.required_version not in (None, version):
            raise ConfigError(
                f"version {self.required_version} is asked for, and a worker has {version - 1} "
                f"already; versions only move forwards, ask for {version} or more",
                least=version,
            )
        self._version, self._chunks, self._index = version, plan.chunk_metas, 0
        self._require_some(self._ready)
        staging = self._prepare_slots(plan)
        staging.begin(plan, options, layer_map, self.busy_cores)
        # If this raises, any of them may have begun: `abort` must end them all.
        self._active = self._ready
        started = self._each(
            self._active, lambda one: one.transport.start(plan, layer_map, options, staging=staging)
        )
        self._active = list(started)
        self._require_some(self._active)

    def send(self, chunk: Chunk, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        index, self._index = self._index, self._index + 1
        assert self._staging is not None
        awaited = all(self._of_all(lambda member: member.transport.await_room(index)))
        staged = self._staging.stage(index, self._chunks[index], tensors, awaited=awaited)
        self._of_all(lambda member: member.transport.announce(index, staged))

    def finish(self) -> SyncResult:
        complete = self._each(self._active, lambda member: member.transport.complete())
        # From the first Commit on a member may have this version, whatever we hear of it. It is not
        # used again: a worker would refuse it, or two states would have one version.
        self._spent_version = self._version
        committed = self._each(
            list(complete), lambda member: member.transport.commit(), committing=True
        )
        assert self._staging is not None
        self._staging.unlink(worker for member in committed for worker in member.transport.workers)
        self._require_some(list(committed))
        self._staging.committed(self._version)
        for member in committed:
            member.version = self._version
        self.newest_version = self._version
        self._active = []
        results = committed.values()
        reports = [report for result in results for report in result.workers]
        return self._staging.result(reports, (result.kind for result in results), self._lost)

    def abort(self, reason: str) -> None:
        active, self._active = self._active, []
        for leaving in [member.leave(reason) for member in active]:
            leaving.join()
        if self._staging is not None:
            self._staging.unlink(())  # not every worker has attached them

    @property
    def engine_facts(self) -> EngineFacts:
        of_all = [member.transport.engine_facts for member in self._ready]  # but for this, alike:
        return of_all[0]._replace(context_tokens=min(one.context_tokens for one in of_all))

    def probe(self, token_ids: Sequence[int]) -> ProbeResult:
        """See the base class. An engine that does not answer is poisoned, and left behind."""
        reported = self._each(
            self._ready, lambda one: one.transport.prompt_logprobs(token_ids), verified=False
        )
        self._require_some(list(reported))
        answers = {member.name: answer for member, answer in reported.items()}
        return ProbeResult(answers, dict(self._lost))

    def invalidate(self, reason: str) -> None:
        for leaving in [member.leave(reason, verified=False) for member in self._ready]:
            leaving.join()

    def close(self) -> None:
        self.abort("the session was closed")
        for member in self._members.values():
            if member.leaving is not None:
                member.leaving.join()
        wait([in_thread("close", member.transport.close) for member in self._members.values()])
        if self._staging is not None:
            self._staging.close()
            self._staging = None

    # ---- parts

    @property
    def _ready(self) -> list[Member]:
        return [member for member in self._members.values() if member.ready]

    def _member(self, name: str, client: WeightSyncClient, is_up: Callable[[], bool]) -> Member:
        address, port = self._address(), 0
        if self._first_port:
            used = {member.port for member in self._members.values()}
            port = next(one for one in count(self._first_port) if one not in used)
        transport = RemoteTransport(
            client,
            chunks_in_flight=self._chunks_in_flight,
            # While we wait for one that has stopped, the others wait for us.
            worker_timeout_seconds=3 * self._options.get("timeout_seconds", 300.0),
            address=address,
            port=port,
            **self._options,
        )
        return Member(name, client, transport, is_up, address=address, port=port)

    def _those_up(self) -> list[Member]:
        """Return the members that are ready or can be asked to connect. Wait a moment for one."""
        for name, member in list(self._members.items()):
            member.transport.source_device = self.source_device
            if not member.ready and member.idle and member.address != self._address():
                member.transport.close()
                self._members[name] = self._member(name, member.client, member.is_up)
        members = self._members.values()
        up = [member for member in members if member.ready or (member.idle and member.is_up())]
        if up:
            return up
        # None to go on with until one of them is out of the sync that has failed.
        for member in members:
            if member.leaving is not None:
                member.leaving.join(self._options.get("timeout_seconds", 300.0))
        # `is_up` does not block: an actor on a busy machine is not down because it has not answered
        # at once, and a pool without members up would fail the sync.
        deadline = time.monotonic() + UP_SECONDS
        while True:
            idle = [member for member in members if member.idle]
            up = [member for member in idle if member.is_up()]
            if up or not idle or time.monotonic() > deadline:
                return up
            time.sleep(0.1)

    def _require_alike(self, members: Iterable[Member]) -> None:
        """Raise AgreementError if one has another model, dtype, quantisation or layout than those
        that were taken in before. Names both."""
        for member in members:
            for reported in member.transport.hellos:
                hello = reported.model_copy(update={"engine": member.name})
                self._hello = self._hello or hello
                require_alike([self._hello, hello])

    def _take_in(self, member: Member) -> None:
        """Connect, and check that the plan holds for this engine too."""
        found = member.transport.layer_map(self._metas, self._map_options)
        if found.digest not in self._maps:
            raise AgreementError(
                f"{member.name} has another layer map than the engines that the plan was made "
                "with; start it as they were started, or sync it in a session of its own",
                subject="layer_map",
            )
        self._require_alike([member])
        if self._adapter is not None:
            member.transport.require_adapter(self._adapter)
        member.ready = True

    def _prepare_slots(self, plan: SyncPlan) -> Staging:
        """Return slots with room for the chunks in flight; over another transport where there is
        too little of one kind of memory."""
        transports = [member.transport for member in self._ready]
        kinds = {kind for transport in transports for kind in transport.kinds}
        if self._staging is None or kinds != self._staging.kinds:
            if self._staging is not None:
                self._staging.close()
            # The trainer's device: the same for all.
            devices = [t.slot_device for t in transports if "cuda_ipc" in t.kinds]
            self._staging = Staging(kinds, devices[0] if devices else None)
        slots = slot_bytes(part_of(plan, None).sizes, self._chunks_in_flight)
        workers = [worker for transport in transports for worker in transport.workers]
        try:
            self._staging.prepare(slots, workers, later=parameters_are_shared())
        except NoRoomError as exc:
            no_room = exc
            sharing = [m for m in self._ready if exc.transport in m.transport.kinds]
            if not all(member.transport.can_fall_back for member in sharing):
                raise
            self._each(sharing, lambda member: member.transport.fall_back(no_room))
            return self._prepare_slots(plan)  # where a GPU has no room, /dev/shm may have
        return self._staging

    def _each(
        self,
        members: Sequence[Member],
        work: Callable[[Member], R],
        *,
        leave_behind: bool = True,
        verified: bool = True,
        committing: bool = False,
    ) -> dict[Member, R]:
        """Call `work` for all members in parallel. Return the results of those not left behind.

        A CoverageError is about the weights if no member can do it. One that others do not have is
        the member's own: bytes that changed on the way to it, kernels that do not hold them.

        Args:
            verified: False: a member that is left behind is poisoned.
            committing: some may have committed: whatever another one raises then is its own.
        """
        answers = [in_thread("pool", partial(work, member)) for member in members]
        try:
            wait(answers)
        except BaseException as exc:
            # Ctrl-C. The threads go on: `abort`, or the next sync, would use the same connections
            # beside them, and an engine could commit on some of its workers alone.
            for member, answer in zip(members, answers, strict=True) if verified else ():
                self._lose(member, exc, answer)
            raise
        outcomes = [answer.exception() or answer.result() for answer in answers]
        some_can = any(not isinstance(outcome, BaseException) for outcome in outcomes)
        own: tuple[type[SyncError], ...] = MEMBERS_OWN
        if some_can:
            own = (SyncError,) if committing else (*MEMBERS_OWN, CoverageError)
        if members and all(isinstance(outcome, StaleBaseError) for outcome in outcomes):
            leave_behind = False  # the session sends everything then
        done: dict[Member, R] = {}
        for member, outcome in zip(members, outcomes, strict=True):
            if not isinstance(outcome, BaseException):
                done[member] = outcome
            elif leave_behind and isinstance(
                outcome, own if isinstance(outcome, SyncError) else Exception
            ):
                self._lose(member, outcome, verified=verified)
            else:
                raise outcome
        return done

    def _of_all(self, work: Callable[[Member], R]) -> list[R]:
        """Call `work` for all active members. Those that fail are left behind."""
        done = self._each(self._active, work)
        self._active = list(done)
        self._require_some(self._active)
        return list(done.values())

    def _lose(
        self,
        member: Member,
        error: BaseException,
        work: Future[Any] | None = None,
        *,
        verified: bool = True,
    ) -> None:
        """Leave a member behind. See `Member.leave`."""
        reason = str(error) if isinstance(error, SyncError) else f"{type(error).__name__}: {error}"
        logger.warning("%s is left behind: %s", member.name, reason)
        self._lost[member.name] = reason
        self._active = [other for other in self._active if other is not member]
        # It may take as long as the engine takes to answer; the others do not wait for it.
        member.leave(reason, work, verified=verified)

    def _require_some(self, left: Sequence[Member]) -> None:
        if left:
            return
        reasons = "; ".join(f"{name}: {why}" for name, why in self._lost.items())
        raise TransportError(f"no engine of the pool is left ({reasons or 'it has none'})")
