"""Rollout actors as one: synced together, generating together, coming and going."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import Self

from qerl_sync.clients.base import EngineClient
from qerl_sync.clients.ray_actor import RayActorClient
from qerl_sync.config import SyncConfig
from qerl_sync.errors import ConfigError, PeerLostError, TransportError, TransportTimeout
from qerl_sync.integrations.ray.actors import CONTROL, CONTROL_THREADS, Prompts, RolloutActor
from qerl_sync.integrations.ray.cluster import require_ray, require_room
from qerl_sync.integrations.ray.rollouts import Rollout
from qerl_sync.transports.remote.pool import PoolTransport

logger = logging.getLogger(__name__)


class WorkerPool:
    """Several `RolloutActor`s, or actors of one's own with vLLM's four methods.

    A pool may be sent to other actors: what arrives there is a pool of the same actors, with
    connections of its own. One trainer at a time syncs them.

    Args:
        workers: the actors' handles by name.
    """

    def __init__(self, workers: Mapping[str, Any]) -> None:
        self._workers = {name: Worker(name, handle) for name, handle in workers.items()}
        self._transport: PoolTransport | None = None
        self._timeout_seconds = 300.0

    def __reduce__(self) -> tuple[Any, ...]:
        return WorkerPool, (self.handles,)

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
            options: of the actors, as Ray has them: `num_cpus` (1 unless given), `num_gpus`,
                `resources`, `scheduling_strategy`, `runtime_env`.
            arguments: of `RolloutActor`.

        Raises:
            ConfigError: the cluster has too little for them, or an engine does not start.
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
        pool = cls(handles)
        try:
            pool.wait(start_seconds)
        except BaseException:
            pool.stop()
            raise
        return pool

    # ---- members

    @property
    def handles(self) -> dict[str, Any]:
        """The actors by name."""
        return {name: worker.handle for name, worker in self._workers.items()}

    @property
    def versions(self) -> dict[str, int]:
        """The weight version of each, as of the last sync from here; 0: to be synced in full."""
        known = self._transport.versions if self._transport is not None else {}
        return {name: known.get(name, 0) for name in self._workers}

    def add(self, name: str, handle: Any) -> None:
        """Take in an actor. It is part of the next sync, and generates after it."""
        if name in self._workers:
            raise ConfigError(f"the pool has a worker {name!r} already; give each its own name")
        self._workers[name] = Worker(name, handle)
        if self._transport is not None:
            self._join(self._transport, self._workers[name])

    def remove(self, name: str) -> Any:
        """Let go of an actor, which lives on. Returns its handle."""
        worker = self._workers.pop(name, None)
        if worker is None:
            raise ConfigError(f"the pool has no worker {name!r}, but {', '.join(self._workers)}")
        if self._transport is not None:
            self._transport.remove(name)
        return worker.handle

    def wait(self, timeout_seconds: float = 600.0) -> dict[str, dict[str, Any]]:
        """Until every engine is up. Returns what each says of itself.

        Raises:
            ConfigError: an engine does not start; with its error.
            TransportTimeout: one takes longer; names it.
        """
        deadline = time.monotonic() + timeout_seconds
        return {
            name: worker.await_status(max(deadline - time.monotonic(), 0.0), timeout_seconds)
            for name, worker in self._workers.items()
        }

    # ---- weights

    def transport(self, config: SyncConfig, address: str | None = None) -> PoolTransport:
        """The way to all of them, for a `SyncSession`.

        Args:
            address: where workers reach this process; None: loopback in a cluster of one node,
                else this node's address.
        """
        if self._transport is not None:
            self._transport.close()
        self._timeout_seconds = config.timeout_seconds
        self._transport = PoolTransport(
            transport=config.transport,
            chunks_in_flight=config.chunks_in_flight,
            timeout_seconds=config.timeout_seconds,
            address=address or self._own_address(),
            pause_mode=config.pause_mode,
            recompute_running=config.recompute_running,
        )
        for worker in self._workers.values():
            self._join(self._transport, worker)
        return self._transport

    def _join(self, transport: PoolTransport, worker: Worker) -> None:
        transport.add(worker.name, worker.client(self._timeout_seconds), worker.is_up)

    def _own_address(self) -> str:
        ray = require_ray()
        nodes = [node for node in ray.nodes() if node["Alive"]]
        return "127.0.0.1" if len(nodes) == 1 else str(ray.util.get_node_ip_address())

    # ---- generation

    def generate(
        self, prompts: Prompts, sampling: Any = None, *, required_version: int | None = None
    ) -> list[Rollout]:
        """Completions of all prompts, in order, by all workers that are on the newest weights.

        What a worker that dies was to do is done by the others.

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
        """Begin to generate, and go on with something else: `result()` of what is returned waits.

        A sync that is begun meanwhile waits for it too, on each worker.
        """
        if required_version is None:
            required_version = self.newest_version
        return Batch(self, list(prompts), sampling, required_version)

    @property
    def newest_version(self) -> int:
        """Of the last sync from here; 0 before the first."""
        return max(self.versions.values(), default=0)

    def ask(
        self, todo: Sequence[int], prompts: Sequence[Any], sampling: Any, required_version: int
    ) -> dict[str, tuple[Sequence[int], Any]]:
        """Divide the prompts with these indices; for each worker its share, and Ray's answer."""
        return {
            name: (
                share,
                self._workers[name].generate(
                    [prompts[i] for i in share], sampling, required_version
                ),
            )
            for name, share in self._divide(todo, required_version).items()
        }

    def answer(self, name: str, answer: Any) -> list[Rollout] | None:
        """What a worker generated; None if it died."""
        ray = require_ray()
        try:
            found: list[Rollout] = ray.get(answer)
        except ray.exceptions.RayActorError as exc:
            logger.warning("%s died while it generated: %s", name, exc)
            if self._transport is None:
                raise PeerLostError(f"{name} died while it generated") from exc
            self._transport.forget(name, "it died while it generated")
            return None
        return found

    def _divide(self, todo: Sequence[int], required_version: int) -> dict[str, Sequence[int]]:
        """Neighbours to the same worker: they may share a prefix."""
        versions = self.versions
        able = [name for name in versions if versions[name] >= required_version]
        if not able:
            raise TransportError(
                f"no worker of the pool has weight version {required_version} (they have "
                f"{versions}); sync them first"
            )
        share = -(-len(todo) // len(able))
        parts = {name: todo[i * share : (i + 1) * share] for i, name in enumerate(able)}
        return {name: part for name, part in parts.items() if part}

    # ---- the end

    def close(self) -> None:
        """Let go of the workers, which live on."""
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


class Batch:
    """Completions that are being generated. See `WorkerPool.submit`.

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
        self._asked = pool.ask(range(len(prompts)), prompts, sampling, required_version)

    def result(self, oldest_version: int = 0) -> list[Rollout]:
        """Wait for all of them.

        Args:
            oldest_version: those of older weights are generated anew, with the newest.

        Raises:
            TransportError: no worker is left that may generate.
        """
        while True:
            for name, (share, answer) in self._asked.items():
                self._take(share, self._pool.answer(name, answer), oldest_version)
            todo = [index for index in range(len(self._prompts)) if index not in self._done]
            if not todo:
                return [one for index in range(len(self._prompts)) for one in self._done[index]]
            required = max(self.required_version, self._pool.newest_version)
            self._asked = self._pool.ask(todo, self._prompts, self._sampling, required)

    def _take(
        self, share: Sequence[int], rollouts: list[Rollout] | None, oldest_version: int
    ) -> None:
        if not rollouts or rollouts[0].version < oldest_version:
            return
        each = len(rollouts) // len(share)
        for k, index in enumerate(share):
            self._done[index] = rollouts[k * each : (k + 1) * each]


class Worker:
    """An actor of the pool."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name = name
        self.handle = handle
        self.own = hasattr(handle, "reset_caches")
        self._asked: Any = None

    def client(self, timeout_seconds: float) -> EngineClient:
        if self.own:
            return RayActorClient(self.handle, self.name, timeout_seconds)
        from vllm.distributed.weight_transfer.clients import RayVLLMWeightSyncClient

        client: EngineClient = RayVLLMWeightSyncClient(self.handle)
        return client

    def generate(self, prompts: Any, sampling: Any, required_version: int) -> Any:
        return self.handle.generate.remote(prompts, sampling, required_version)

    def is_up(self) -> bool:
        """Asked without waiting: a restarting actor answers when it is there again."""
        ray = require_ray()
        if not hasattr(self.handle, "status"):
            return True
        self._asked = self._asked or self._ask()
        if not ray.wait([self._asked], timeout=0.05)[0]:
            return False
        answer, self._asked = self._asked, None
        try:
            ray.get(answer)
        except ray.exceptions.RayActorError:
            return False
        return True

    def await_status(self, timeout_seconds: float, given: float) -> dict[str, Any]:
        ray = require_ray()
        if not hasattr(self.handle, "status"):
            return {}
        try:
            status: dict[str, Any] = ray.get(self._ask(), timeout=timeout_seconds)
        except ray.exceptions.GetTimeoutError as exc:
            raise TransportTimeout(
                f"{self.name} was not up within {given:.0f} s; it waits for resources (`ray "
                "status`), or its engine takes longer to start"
            ) from exc
        except ray.exceptions.ActorUnavailableError:  # it restarts
            time.sleep(0.2)
            return self.await_status(max(timeout_seconds - 0.2, 0.0), given)
        except ray.exceptions.RayActorError as exc:
            raise ConfigError(f"the engine of {self.name} does not start: {exc}") from exc
        return status

    def _ask(self) -> Any:
        return self.handle.status.options(concurrency_group=CONTROL).remote()


def start_actor(
    name: str,
    engine: Mapping[str, Any],
    actor: type[RolloutActor] = RolloutActor,
    max_restarts: int = -1,
    options: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """One rollout actor, not yet up. See `WorkerPool.start`."""
    ray = require_ray()
    remote = ray.remote(
        concurrency_groups={CONTROL: CONTROL_THREADS}, max_restarts=max_restarts, **(options or {})
    )
    try:
        return remote(actor).options(name=name).remote(engine, name=name, **arguments)
    except ValueError as exc:
        raise ConfigError(
            f"the name {name!r} is taken in this cluster: {exc}; choose others (names), or end the "
            "actors of an earlier pool (pool.stop())"
        ) from exc


def resources_of(options: Mapping[str, Any]) -> dict[str, float]:
    """What an actor with these options takes of a node."""
    found = dict(options.get("resources") or {})
    found["CPU"] = options.get("num_cpus", 1)
    found["GPU"] = options.get("num_gpus", 0)
    return {name: amount for name, amount in found.items() if amount}
