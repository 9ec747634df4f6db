"""Run on a Ray cluster: one actor trains, rollout actors generate, this process shows the
progress.
"""

from __future__ import annotations

import io
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console

from qerl_sync.config import TrainConfig
from qerl_sync.errors import ConfigError, PeerLostError, SyncError
from qerl_sync.integrations.ray.actors import RolloutActor
from qerl_sync.integrations.ray.cluster import (
    connect,
    require_ray,
    require_room,
    require_room_for_chunks,
)
from qerl_sync.integrations.ray.pool import refusals_explained, resources_of
from qerl_sync.serving.processes import signals_handled
from qerl_sync.training.arguments import has_engine_processes
from qerl_sync.training.display import STOPPING, Display
from qerl_sync.training.environment import prepare_environment
from qerl_sync.training.processes import started_ranks

if TYPE_CHECKING:
    from qerl_sync.training.run import Outcome

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
# How long the terminal's actor may take to answer. A run goes on without what is not shown.
TERMINAL_SECONDS = 10.0


class TrainingActor:
    """Train in an actor. It owns the rollout actors: they end with it."""

    def __repr__(self) -> str:
        return "trainer"

    def run(
        self,
        config: TrainConfig,
        terminal: Any,
        console: dict[str, Any],
        *,
        resume: bool,
        verbose: bool,
        seconds: float,
    ) -> Outcome:
        """Train as `training.run.train` does; `seconds` have passed before it."""
        started = time.perf_counter() - seconds
        prepare_environment(verbose=verbose)
        from qerl_sync.training.run import train  # its packages read the environment

        display = remote_display(terminal, console)
        try:
            return train(config, display, resume=resume, verbose=verbose, started=started)
        finally:
            # Ray keeps the order of one caller's calls: once this one is answered, all that was
            # written before has arrived. Else the last lines could be lost.
            display.asked_to_stop()


class Terminal:
    """An actor between the trainer's actor and the terminal that started the run: it keeps what
    the trainer writes until it is read, and whether Ctrl-C was pressed."""

    def __init__(self) -> None:
        self._text = ""
        self._stop = False

    def write(self, text: str) -> None:
        self._text += text

    def read(self) -> str:
        """Return what was written since the last call."""
        text, self._text = self._text, ""
        return text

    def stop(self) -> None:
        self._stop = True

    def asked_to_stop(self) -> bool:
        return self._stop


class _TerminalFile(io.TextIOBase):
    def __init__(self, terminal: Any) -> None:
        self._terminal = terminal

    def write(self, text: str) -> int:
        self._terminal.write.remote(text)  # not awaited: a run does not depend on what is shown
        return len(text)


def remote_display(terminal: Any, console: dict[str, Any]) -> Display:
    """Return a display, for the trainer's actor, that draws on the terminal of another process.

    Bars and spinners are drawn here; what travels is the characters that move them.

    Args:
        console: arguments of rich's `Console`, see `console_of`.
    """

    def asked_to_stop() -> bool:
        ray = require_ray()
        try:
            return bool(ray.get(terminal.asked_to_stop.remote(), timeout=TERMINAL_SECONDS))
        except ray.exceptions.RayError as exc:
            logger.warning("the terminal's actor did not answer: %s", type(exc).__name__)
            return False

    return Display(Console(file=cast("IO[str]", _TerminalFile(terminal)), **console), asked_to_stop)


def console_of(display: Display) -> dict[str, Any]:
    """Return the arguments of a `Console` that draws for the same terminal in another process."""
    console = display.console
    return {
        "force_terminal": console.is_terminal,
        "color_system": console.color_system,
        "width": console.width,
        "height": console.height,
        "quiet": console.quiet,
    }


def train_on_ray(config: TrainConfig, display: Display, *, resume: bool, verbose: bool) -> Outcome:
    """Train on a Ray cluster. See `training.run.train`. For the main thread: the first Ctrl-C stops
    the run after its step, the second at once.

    Raises:
        ConfigError: no cluster is there, or it has too little room for the actors or for chunks.
        PeerLostError: the trainer actor died.
    """
    if started_ranks() > 1:
        raise ConfigError(
            f"rollout.mode: 'ray' has one trainer, an actor, and {started_ranks()} processes "
            "were started (WORLD_SIZE); start one without torchrun or accelerate"
        )
    started = time.perf_counter()
    config = with_absolute_paths(config)
    ray = require_ray()
    # Ray checks options when it makes a class: here, before a cluster is started for them.
    with refusals_explained(config.ray.trainer, "ray.trainer"):
        kind = ray.remote(**{"num_cpus": 1, **config.ray.trainer})(TrainingActor)
    with refusals_explained(config.ray.rollout, "ray.rollout"):
        ray.remote(**{"num_cpus": 1, **config.ray.rollout})(RolloutActor)
    with _cluster(config, display, verbose), _placed(config, display) as strategy:
        actors: list[Any] = []
        try:
            actors.append(terminal := start_terminal(ray))
            trainer = kind.options(name="trainer", scheduling_strategy=strategy).remote()
            actors.append(trainer)
            running = trainer.run.remote(
                config,
                terminal,
                console_of(display),
                resume=resume,
                verbose=verbose,
                seconds=time.perf_counter() - started,
            )
            with _stopping(terminal, display):
                shown = True
                while not ray.wait([running], timeout=POLL_SECONDS)[0]:
                    shown = shown and show(terminal, display)
            if shown:
                show(terminal, display)
            outcome: Outcome = ray.get(running)
            return outcome
        except ray.exceptions.RayTaskError as exc:
            if isinstance(exc.cause, SyncError):
                raise exc.cause from None
            raise
        except ray.exceptions.RayActorError as exc:
            raise PeerLostError(
                f"the trainer actor died: {exc}. --resume goes on from the last checkpoint"
            ) from exc
        finally:
            display.console.show_cursor(True)  # a bar or spinner whose process died hides it
            for actor in reversed(actors):
                ray.kill(actor)


def show(terminal: Any, display: Display) -> bool:
    """Write what the trainer has written since the last call. Return False if the terminal's actor
    has died for good."""
    ray = require_ray()
    file = display.console.file
    try:
        file.write(ray.get(terminal.read.remote(), timeout=TERMINAL_SECONDS))
        file.flush()
    except ray.exceptions.ActorDiedError:
        display.console.print(
            "[yellow]the terminal's actor has died: the run goes on without being shown[/]"
        )
        return False
    except ray.exceptions.RayError as exc:  # it is slow, or being restarted
        logger.warning("the terminal's actor did not answer: %s", type(exc).__name__)
    return True


def start_terminal(ray: Any) -> Any:
    """Start the terminal's actor on this process's node: the run needs this node anyway, another
    could be lost.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    remote = ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=-1)
    return remote(Terminal).remote()


def _stopping(terminal: Any, display: Display) -> AbstractContextManager[None]:
    """Ask the run to stop after its step on Ctrl-C in this context; raise on a second one."""
    pressed = False

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        # On a terminal the trainer's bar stands in this line.
        display.console.print("\n" * display.console.is_terminal + STOPPING)
        terminal.stop.remote()

    return signals_handled(on_interrupt, signal.SIGINT)


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


@contextmanager
def _cluster(config: TrainConfig, display: Display, verbose: bool) -> Iterator[None]:
    ray = require_ray()
    wanted = _bundles(config)
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": "ERROR"}
    if config.ray.address is None:
        cpus = math.ceil(sum(bundle.get("CPU", 0) for bundle in wanted))
        options["num_cpus"] = config.ray.num_cpus or max(cpus, os.cpu_count() or 1)
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
        if not has_engine_processes(config):
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
