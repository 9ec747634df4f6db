"""A pool of rollout actors that sync together and generate together; actors can join and leave."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from typing_extensions import Self

from qerl_sync.build import transport_options
from qerl_sync.config import SyncConfig
from qerl_sync.engines.ray_actor import RayActorClient, how_it_was_lost, is_gone
from qerl_sync.errors import (
    AgreementError,
    ConfigError,
    PeerLostError,
    PoisonedError,
    TransportError,
    TransportTimeout,
)
from qerl_sync.integrations.ray.actors import CONTROL, Prompts, Rollout, RolloutActor
from qerl_sync.integrations.ray.cluster import require_ray, require_room
from qerl_sync.transports.remote.pool import PoolTransport

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.2
# For how long workers with a passing failure are asked again, where no others can generate: workers
# that another trainer syncs refuse between two calls of its sync.
PASSING_SECONDS = 10.0


class WorkerPool:
    """Sync and generate with several rollout actors as with one.

    Example:
        pool = WorkerPool.start(2, {"model": path}, options={"num_gpus": 1})
        with SyncSession(HFSource(model), pool.transport(config), config) as session:
            session.push(step=1)
        rollouts = pool.generate(prompts, {"max_tokens": 8})
        pool.stop()

    Workers are `RolloutActor`s, or actors with vLLM's four weight transfer methods. Only those that
    have `generate(prompts, sampling, required_version)` generate.

    A pool may be sent to other actors: what arrives there is a pool of the same actors, with
    connections of its own. One trainer at a time syncs them.

    Args:
        workers: the actors' handles by name.
        generate_seconds: how long a worker may take for its share of the prompts. One that takes
            longer is taken for lost.
    """

    def __init__(self, workers: Mapping[str, Any], *, generate_seconds: float = 1800.0) -> None:
        self._workers = {name: Worker(name, handle) for name, handle in workers.items()}
        self._transport: PoolTransport | None = None
        self._timeout_seconds = 300.0
        self.generate_seconds = generate_seconds

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(WorkerPool, generate_seconds=self.generate_seconds), (self.handles,)

    @classmethod
    def start(
        cls,
        count: int,
        engine: Mapping[str, Any],
        *,
        actor: type[RolloutActor] = RolloutActor,
        names: str = "rollout-{}",
        max_restarts: int = -1,
        start_seconds: float = 600.0,
        generate_seconds: float = 1800.0,
        options: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> WorkerPool:
        """Start `count` RolloutActors and wait until their engines are up.

        Args:
            engine: vLLM's engine arguments. `seed` is that of the first; each gets its own, so
                that they do not sample the same completions of the same prompt.
            actor: the class to start, RolloutActor or one that inherits it.
            names: of the actors; `{}` is a number.
            max_restarts: how often Ray restarts an actor that died; -1: always.
            start_seconds: how long they may take to be up.
            generate_seconds: see above.
            options: of the actors, as Ray has them: `num_cpus` (1 unless given), `num_gpus`,
                `resources`, `scheduling_strategy`, `runtime_env`.
            arguments: of `RolloutActor`.

        Raises:
            ConfigError: the cluster has too little for them, or an engine does not start.
            AgreementError: one runs another qerl-sync.
        """
        options = {"num_cpus": 1, **(options or {})}
        require_room([resources_of(options)] * count, f"{count} rollout actors")
        handles = {
            (name := names.format(i)): start_actor(
                name,
                {**engine, "seed": (engine.get("seed") or 0) + i},
                actor,
                max_restarts,
                options,
                **arguments,
            )
            for i in range(count)
        }
        pool = cls(handles, generate_seconds=generate_seconds)
        try:
            pool.wait(start_seconds)
        except BaseException:
            pool.stop()
            raise
        return pool

    # ---- members

    @property
    def handles(self) -> dict[str, Any]:
        """Return the actors' handles by name."""
        return {name: worker.handle for name, worker in self._workers.items()}

    @property
    def versions(self) -> dict[str, int]:
        """Return each worker's weight version, as of the last sync from here.

        0: the worker needs a full sync.
        """
        known = self._transport.versions if self._transport is not None else {}
        return {name: known.get(name, 0) for name in self._workers}

    def add(self, name: str, handle: Any) -> None:
        """Add an actor. It joins the next sync, and generates after it."""
        if name in self._workers:
            raise ConfigError(f"the pool has a worker {name!r} already; give each its own name")
        self._workers[name] = Worker(name, handle)
        if self._transport is not None:
            self._join(self._transport, self._workers[name])

    def remove(self, name: str) -> Any:
        """Remove an actor from the pool and return its handle. The actor lives on."""
        worker = self._workers.pop(name, None)
        if worker is None:
            raise ConfigError(f"the pool has no worker {name!r}, but {', '.join(self._workers)}")
        if self._transport is not None:
            self._transport.remove(name)
        return worker.handle

    def wait(self, timeout_seconds: float = 600.0) -> dict[str, dict[str, Any]]:
        """Block until every engine is up. Return each one's status.

        Raises:
            ConfigError: an engine does not start; with its error.
            AgreementError: one runs another qerl-sync than this process.
            TransportTimeout: one takes longer; names it.
        """
        deadline = time.monotonic() + timeout_seconds
        return {
            name: worker.await_status(deadline, timeout_seconds)
            for name, worker in self._workers.items()
        }

    def await_some(self, timeout_seconds: float = 600.0) -> None:
        """Block until at least one worker can be synced. Return at once if one took the last sync.

        Raises:
            PeerLostError: all are dead for good.
            TransportTimeout: none is up in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while not any(self.versions.values()):
            if [worker for worker in self._workers.values() if worker.answers()]:
                return
            if all(worker.gone for worker in self._workers.values()):
                raise PeerLostError(
                    f"all workers ({', '.join(self._workers)}) died, and Ray does not start them "
                    "again; raise max_restarts, or look at their logs"
                )
            if time.monotonic() > deadline:
                raise TransportTimeout(
                    f"none of the workers {', '.join(self._workers)} was up within "
                    f"{timeout_seconds:.0f} s; they wait for resources (`ray status`), or their "
                    "engines take longer to start"
                )
            time.sleep(POLL_SECONDS)

    # ---- weights

    def transport(self, config: SyncConfig, address: str | None = None) -> PoolTransport:
        """Return a transport to all workers, for a `SyncSession`.

        Args:
            address: where workers reach this process; None: `sync.trainer_address`, and where that
                is loopback, as it is by default, loopback for as long as the cluster has one node,
                else this node's address.
        """

        def own_address() -> str:
            # Looked up for each worker that connects: a cluster grows.
            if address is not None or config.trainer_address != LOOPBACK:
                return address or config.trainer_address
            ray = require_ray()
            nodes = [node for node in ray.nodes() if node["Alive"]]
            return LOOPBACK if len(nodes) == 1 else str(ray.util.get_node_ip_address())

        if self._transport is not None:
            self._transport.close()
        self._timeout_seconds = config.timeout_seconds
        self._transport = PoolTransport(
            address=own_address, first_port=config.trainer_port, **transport_options(config)
        )
        for worker in self._workers.values():
            self._join(self._transport, worker)
        return self._transport

    def _join(self, transport: PoolTransport, worker: Worker) -> None:
        client = RayActorClient(worker.handle, worker.name, self._timeout_seconds)
        transport.add(worker.name, client, worker.is_up)

    # ---- generation

    def generate(
        self, prompts: Prompts, sampling: Any = None, *, required_version: int | None = None
    ) -> list[Rollout]:
        """Return completions of all prompts, in order, by all workers with the newest weights.

        If a worker dies, does not answer or refuses, other workers take over its share.

        Args:
            sampling: vLLM's `SamplingParams`, or their fields as a mapping.
            required_version: the oldest weights that will do; None: those of the last sync.

        Raises:
            TransportError: no worker is left that may generate.
        """
        return self.submit(prompts, sampling, required_version=required_version).result()

    def submit(
        self, prompts: Prompts, sampling: Any = None, *, required_version: int | None = None
    ) -> Batch:
        """Start generating and return at once; `result()` of the returned batch blocks.

        A sync that starts meanwhile waits for the batch on each worker that is no
        `AsyncRolloutActor`.
        """
        if required_version is None:
            required_version = self.newest_version
        return Batch(self, list(prompts), sampling, required_version)

    @property
    def newest_version(self) -> int:
        """Return the version of the last sync from here; 0 before the first."""
        return self._transport.newest_version if self._transport is not None else 0

    def ask(
        self,
        todo: Sequence[int],
        prompts: Sequence[Any],
        sampling: Any,
        required_version: int,
        without: Collection[str] = (),
    ) -> list[Share]:
        """Divide the prompts with these indices between the available workers, and start them.

        Raises:
            TransportError: no worker may.
        """
        versions = self.versions
        able = [
            worker
            for name, worker in self._workers.items()
            if versions[name] >= required_version and name not in without and worker.generates
        ]
        if not able:
            raise TransportError(
                f"no worker of the pool has weight version {required_version} (they have "
                f"{versions}); sync them first"
            )
        # In runs of neighbours, one run for each worker: neighbours may share a prefix.
        each = -(-len(todo) // len(able))
        runs = [todo[i * each : (i + 1) * each] for i in range(len(able))]
        return [
            Share(
                worker.name,
                versions[worker.name],
                indices,
                worker.handle.generate.remote(
                    [prompts[i] for i in indices], sampling, required_version
                ),
            )
            for worker, indices in zip(able, runs, strict=True)
            if indices
        ]

    def answer(self, share: Share, timeout_seconds: float) -> list[Rollout] | Failure:
        """Return a worker's completions, or the reason why others should generate its share.

        Raises:
            Exception: what the worker raises about prompts or sampling; others would, too.
        """
        ray = require_ray()
        failed = ray.exceptions
        try:
            found: list[Rollout] = ray.get(share.answer, timeout=max(timeout_seconds, 0.0))
            if found and len(found) % len(share.indices) == 0:
                return found
            # Of an actor of one's own. Which completion is of which prompt could not be told.
            return self._lost(
                share,
                f"{share.name} returned {len(found)} completions for {len(share.indices)} prompts",
            )
        except failed.GetTimeoutError:
            return self._lost(
                share,
                f"{share.name} did not answer within {self.generate_seconds:g} s, when it was "
                f"asked to generate for {len(share.indices)} prompts",
            )
        except failed.RayTaskError as exc:
            if isinstance(exc.cause, PoisonedError | AgreementError):
                return self._lost(share, str(exc.cause), refused=True)
            if type(exc.cause).__name__ == "EngineDeadError":
                return self._lost(share, f"the engine of {share.name} died while it generated")
            raise
        except failed.RayActorError as exc:
            return self._lost(share, f"{share.name} {how_it_was_lost(exc)}")
        except failed.RayError as exc:  # its answer is lost, and it may be as it was
            reason = f"what {share.name} generated was lost: {type(exc).__name__}: {exc}"
            logger.warning("%s", reason)
            return Failure(share.version, reason, passing=True)

    def _lost(self, share: Share, reason: str, *, refused: bool = False) -> Failure:
        """Mark the worker for a full sync, unless it has had one since the request."""
        logger.warning("others generate what %s was to: %s", share.name, reason)
        if self._transport is not None and self.versions.get(share.name) == share.version:
            self._transport.forget(share.name, reason)
        # A worker that is synced from here refuses until it is synced from here again. One of
        # another trainer may be in the middle of a sync.
        passing = refused and self._transport is None
        return Failure(share.version, reason, passing)

    # ---- the end

    def close(self) -> None:
        """Disconnect from the workers, which live on."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def stop(self) -> None:
        """End the actors."""
        ray = require_ray()
        self.close()
        for worker in self._workers.values():
            ray.kill(worker.handle)
        self._workers = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True)
class Share:
    """One worker's share of a batch.

    Attributes:
        version: of its weights, as the pool knew it when it was asked.
        indices: of the prompts.
        answer: Ray's reference.
    """

    name: str
    version: int
    indices: Sequence[int]
    answer: Any


@dataclass(frozen=True)
class Failure:
    """A worker's reason for not generating its share.

    Attributes:
        version: of its weights, when it was asked.
        passing: a retry in a moment may succeed.
    """

    version: int
    reason: str
    passing: bool = False


class Batch:
    """Completions in progress. See `WorkerPool.submit`.

    Attributes:
        required_version: of the weights that they are generated with, at least.
    """

    def __init__(
        self, pool: WorkerPool, prompts: list[Any], sampling: Any, required_version: int
    ) -> None:
        self._pool = pool
        self._prompts = prompts
        self._sampling = sampling
        self.required_version = required_version
        self._done: dict[int, list[Rollout]] = {}
        self._failed: dict[str, Failure] = {}
        self._shares: list[Share] = []
        self._patient_until = 0.0
        self._ask(required_version)

    def result(self, oldest_version: int = 0) -> list[Rollout]:
        """Block until all completions are there.

        Args:
            oldest_version: those of older weights are generated anew, with the newest.

        Raises:
            TransportError: no worker is left that may generate. It may be called again, when
                workers have been synced.
        """
        while True:
            deadline = time.monotonic() + self._pool.generate_seconds
            while self._shares:
                share = self._shares.pop(0)
                found = self._pool.answer(share, deadline - time.monotonic())
                self._take(share, found, oldest_version)
            if len(self._done) == len(self._prompts):
                return [one for index in range(len(self._prompts)) for one in self._done[index]]
            self._ask(max(self.required_version, self._pool.newest_version))

    def _ask(self, required_version: int) -> None:
        """Have missing completions generated by other workers.

        Workers that failed at it are asked again after a sync, or if no others are left and their
        failure may pass.
        """
        todo = [index for index in range(len(self._prompts)) if index not in self._done]
        while todo and not self._shares:
            versions, failed = self._pool.versions, self._failed
            without = {name for name in failed if versions.get(name, 0) <= failed[name].version}
            try:
                self._shares = self._pool.ask(
                    todo, self._prompts, self._sampling, required_version, without
                )
            except TransportError as exc:
                passing = [name for name, failure in failed.items() if failure.passing]
                if not passing or time.monotonic() > self._patient_until:
                    reasons = "; ".join(f"{name}: {failed[name].reason}" for name in failed)
                    self._failed, self._patient_until = {}, 0.0  # all may be asked again
                    raise TransportError(
                        f"{exc}. Of those that were asked, {reasons}" if reasons else str(exc)
                    ) from exc
                time.sleep(POLL_SECONDS)
                for name in passing:
                    del failed[name]

    def _take(self, share: Share, found: list[Rollout] | Failure, oldest_version: int) -> None:
        if isinstance(found, Failure):
            self._failed[share.name] = found
            self._patient_until = self._patient_until or time.monotonic() + PASSING_SECONDS
            return
        self._patient_until = 0.0
        if found[0].version < oldest_version:
            return
        each = len(found) // len(share.indices)
        for k, index in enumerate(share.indices):
            self._done[index] = found[k * each : (k + 1) * each]


class Worker:
    """An actor of the pool.

    Attributes:
        gone: Ray has reported it dead, and does not restart it.
        generates: it can be asked for completions.
    """

    def __init__(self, name: str, handle: Any) -> None:
        self.name = name
        self.handle = handle
        self.gone = False
        self.generates = hasattr(handle, "generate")
        self._asked: Any = None
        self._was_up = False

    def is_up(self) -> bool:
        """Return whether the worker can be asked to connect now. Never block.

        A question without an answer stays open until the next call.
        """
        if not self.answers():
            return False
        self._asked = None
        self._was_up = True
        return True

    def answers(self) -> bool:
        """Return whether the worker has answered; `is_up` then returns the same."""
        ray = require_ray()
        if not self._was_up and not hasattr(self.handle, "status"):
            return True  # the first sync waits for it, and raises if it is no worker of ours
        self._asked = self._asked or self._ask()
        if not ray.wait([self._asked], timeout=0.05)[0]:
            return False
        try:
            ray.get(self._asked)
        except ray.exceptions.RayActorError as exc:
            self._asked = None
            self.gone = is_gone(exc)
            return False
        self.gone = False
        return True

    def await_status(self, deadline: float, given_seconds: float) -> dict[str, Any]:
        """Block until the engine is up, `time.monotonic()` to `deadline`. Return its status."""
        ray = require_ray()
        status: dict[str, Any] | None = None if hasattr(self.handle, "status") else {}
        while status is None:
            left_seconds = max(deadline - time.monotonic(), 0.0)
            try:
                status = ray.get(self._status(), timeout=left_seconds)
            except ray.exceptions.GetTimeoutError as exc:
                raise TransportTimeout(
                    f"{self.name} was not up within {given_seconds:.0f} s; it waits for resources "
                    "(`ray status`), or its engine takes longer to start"
                ) from exc
            except ray.exceptions.ActorUnavailableError:  # it restarts
                time.sleep(POLL_SECONDS)
            except ray.exceptions.RayActorError as exc:
                raise ConfigError(f"the engine of {self.name} does not start: {exc}") from exc
        from qerl_sync import __version__

        theirs = status.get("qerl-sync", __version__)
        if theirs != __version__:
            raise AgreementError(
                f"{self.name} runs qerl-sync {theirs} on node {status.get('node')}, and this "
                f"process {__version__}; install the same version on every node",
                subject="version",
            )
        return status

    def _ask(self) -> Any:
        """Ask the actor whether it is up.

        The first time, ask whether its engine has started. Later the worker was lost, perhaps for
        not answering: then the engine's own thread must answer, behind its present work.
        """
        return self.handle.__ray_ready__.remote() if self._was_up else self._status()

    def _status(self) -> Any:
        return self.handle.status.options(concurrency_group=CONTROL).remote()


def start_actor(
    name: str,
    engine: Mapping[str, Any],
    actor: type[RolloutActor] = RolloutActor,
    max_restarts: int = -1,
    options: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """Start one rollout actor; do not wait for it. See `WorkerPool.start`."""
    groups = dict(actor.CONCURRENCY)
    given = {**(options or {}), "max_restarts": max_restarts, "concurrency_groups": groups}
    with refusals_explained(options or {}, "`options`, in a run ray.rollout"):
        kind = require_ray().remote(**given)(actor).options(name=name)
        try:
            return kind.remote(engine, name=name, **arguments)
        except ValueError as exc:
            if "already taken" not in str(exc):
                raise
            raise ConfigError(
                f"the name {name!r} is taken in this cluster: {exc}; choose others (names), or end "
                "the actors of an earlier pool (pool.stop())"
            ) from exc


@contextmanager
def refusals_explained(options: Mapping[str, Any], where: str) -> Iterator[None]:
    """Raise ConfigError if Ray refuses these options of an actor in this context.

    Args:
        where: the place where they are set.
    """
    try:
        yield
    except (TypeError, ValueError) as exc:
        raise ConfigError(
            f"Ray refuses the actor options {dict(options)}: {exc}; change them ({where})"
        ) from exc


def resources_of(options: Mapping[str, Any]) -> dict[str, float]:
    """Return the resources that an actor with these options takes of a node."""
    found = dict(options.get("resources") or {})
    found["CPU"] = options.get("num_cpus", 1)
    found["GPU"] = options.get("num_gpus", 0)
    return {name: amount for name, amount in found.items() if amount}
