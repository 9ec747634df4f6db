"""Run on a Ray cluster: one actor trains, rollout actors generate, this process shows the
progress.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qerl_sync.config import TrainConfig
from qerl_sync.errors import ConfigError, PeerLostError, SyncError
from qerl_sync.integrations.ray.actors import RolloutActor, world_size
from qerl_sync.integrations.ray.cluster import (
    connect,
    require_ray,
    require_room,
    require_room_for_chunks,
)
from qerl_sync.integrations.ray.pool import resources_of
from qerl_sync.training.display import Display
from qerl_sync.training.environment import ENGINE_VARIABLES, QUIET_VARIABLES, prepare_environment
from qerl_sync.training.relay import Board, RelayDisplay, Replay

if TYPE_CHECKING:
    from qerl_sync.training.run import Outcome

POLL_SECONDS = 0.2
# What engines read that a run sets; actors on other nodes do not inherit it.
HANDED_ON = (*ENGINE_VARIABLES, *QUIET_VARIABLES, "OMP_NUM_THREADS", "HF_HUB_OFFLINE")


class TrainingActor:
    """Train in an actor. It owns the rollout actors: they end with it."""

    def __repr__(self) -> str:
        return "trainer"

    def run(
        self, config: TrainConfig, board: Any, *, resume: bool, verbose: bool, seconds: float
    ) -> Outcome:
        """Train as `training.run.train` does; `seconds` have passed before it."""
        started = time.perf_counter() - seconds
        prepare_environment(verbose=verbose)
        from qerl_sync.training.run import train_here

        display = RelayDisplay(board)
        return train_here(config, display, resume=resume, verbose=verbose, started=started)


def train_on_ray(config: TrainConfig, display: Display, *, resume: bool, verbose: bool) -> Outcome:
    """Train on a Ray cluster. See `training.run.train`.

    Raises:
        ConfigError: no cluster is there, or it has too little room for the actors or for chunks.
        PeerLostError: the trainer actor died.
    """
    started = time.perf_counter()
    config = with_absolute_paths(config)
    with _cluster(config, display, verbose), _placed(config, display) as strategy:
        ray = require_ray()
        options = {"num_cpus": 1, **config.ray.trainer, "scheduling_strategy": strategy}
        actors: list[Any] = []
        replay: Replay | None = None
        try:
            actors.append(board := start_board(ray))
            trainer = ray.remote(**options)(TrainingActor).options(name="trainer").remote()
            actors.append(trainer)
            replay = Replay(display, board)
            running = trainer.run.remote(
                config,
                board,
                resume=resume,
                verbose=verbose,
                seconds=time.perf_counter() - started,
            )
            with replay.stopping():
                while not ray.wait([running], timeout=POLL_SECONDS)[0]:
                    replay.show()
            replay.show()
            return _outcome(ray, running)
        finally:
            if replay is not None:
                replay.close()
            for actor in reversed(actors):
                ray.kill(actor)


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Resolve relative paths against this process's directory: actors have working directories of
    their own.

    A model or data set that is not here is a name on the hub, or a path on another node.
    """

    def found(section: Any) -> Any:
        path = section.path and Path(section.path)
        return (
            section.model_copy(update={"path": str(path.resolve())})
            if path and path.exists()
            else section
        )

    recorded = config.sync.record_directory
    resolved = recorded and str(Path(recorded).resolve())
    return config.model_copy(
        update={
            "output_dir": str(Path(config.output_dir).resolve()),
            "sync": config.sync.model_copy(update={"record_directory": resolved}),
            "model": found(config.model),
            "data": found(config.data),
        }
    )


def start_board(ray: Any) -> Any:
    """Start the board on this process's node: the run needs this node anyway, another could be
    lost.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    remote = ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=-1)
    return remote(Board).options(name="display").remote()


def pool_arguments(config: TrainConfig) -> dict[str, Any]:
    """Return the arguments of `WorkerPool.start` for a run's rollout actors."""
    environment = {name: os.environ[name] for name in HANDED_ON if name in os.environ}
    actor = RolloutActor
    if config.rollout.async_engine:
        from qerl_sync.integrations.ray.in_flight import AsyncRolloutActor

        actor = AsyncRolloutActor
    if _is_apart(config):
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    return {
        "actor": actor,
        "max_restarts": config.rollout.max_restarts,
        "start_seconds": config.rollout.start_timeout_seconds,
        "generate_seconds": config.rollout.generate_timeout_seconds,
        "options": config.ray.rollout,
        "environment": environment,
    }


def _is_apart(config: TrainConfig) -> bool:
    """Return whether an engine has processes of its own, which Ray's object store does not
    reach.
    """
    return config.rollout.async_engine or world_size(config.rollout.engine) > 1


def _outcome(ray: Any, running: Any) -> Outcome:
    try:
        outcome: Outcome = ray.get(running)
    except ray.exceptions.RayTaskError as exc:
        if isinstance(exc.cause, SyncError):
            raise exc.cause from None
        raise
    except ray.exceptions.RayActorError as exc:
        raise PeerLostError(
            f"the trainer actor died: {exc}. --resume goes on from the last checkpoint"
        ) from exc
    return outcome


@contextmanager
def _cluster(config: TrainConfig, display: Display, verbose: bool) -> Iterator[None]:
    ray = require_ray()
    wanted = _bundles(config)
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": "ERROR"}
    if config.ray.address is None:
        cpus = sum(bundle.get("CPU", 0) for bundle in wanted)
        options["num_cpus"] = config.ray.num_cpus or max(int(cpus), os.cpu_count() or 1)
        options["object_store_memory"] = config.ray.object_store_bytes
    where = config.ray.address or "this machine"
    with display.phase("connecting to Ray", f"Ray cluster on {where}"):
        ours = connect(config.ray.address, **options)
    try:
        require_room(wanted, "this run")
        yield
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _placed(config: TrainConfig, display: Display) -> Iterator[Any]:
    """Reserve room for all actors at once; place those that the trainer starts in it too."""
    ray = require_ray()
    from ray.util import placement_group, placement_group_table, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group(_bundles(config), strategy=config.ray.placement)
    try:
        ready, _ = ray.wait([group.ready()], timeout=config.ray.placement_seconds)
        if not ready:
            raise ConfigError(
                f"the cluster did not find room for {_bundles(config)} ({config.ray.placement}) "
                f"within {config.ray.placement_seconds:g} s; it is taken by others (`ray status`), "
                "or ray.placement cannot be met"
            )
        if not _is_apart(config):
            nodes = placement_group_table(group)["bundles_to_node_id"].values()
            require_room_for_chunks(config.sync, nodes)
        yield PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
        )
    finally:
        remove_placement_group(group)


def _bundles(config: TrainConfig) -> list[dict[str, float]]:
    """Return each actor's resources: the trainer's, then the rollout actors'."""
    rollout = resources_of(config.ray.rollout)
    return [resources_of(config.ray.trainer), *([rollout] * config.rollout.workers)]
