"""A run: model, warm-up, engine, reinforcement learning, report."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from qerl_sync.config import TrainConfig
from qerl_sync.config.files import file_error, file_errors_explained
from qerl_sync.errors import ConfigError, PeerLostError, SyncError
from qerl_sync.report.plots import plot_buffers, plot_rewards
from qerl_sync.report.summary import Summary, reward_curve, summarize, versions
from qerl_sync.telemetry.recorder import run_errors_recorded
from qerl_sync.training.arguments import (
    engine_options,
    grpo_arguments,
    lora_arguments,
    sft_arguments,
)
from qerl_sync.training.data import load_data
from qerl_sync.training.directory import RunDirectory, damaged, step_of
from qerl_sync.training.display import Display
from qerl_sync.training.environment import hush, require_packages
from qerl_sync.training.models import describe, load_model, load_tokenizer, make_tiny, texts_of
from qerl_sync.training.rewards import BUILTIN, Reward, resolve_reward
from qerl_sync.training.rollouts import engine_lost, engine_process, rollout_server
from qerl_sync.training.warmup import warm_up

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, SFTConfig

    from qerl_sync.integrations.trl import WeightSyncCallback
    from qerl_sync.session import SyncReport


@dataclass(frozen=True)
class Outcome:
    """The result of a run. `stopped`: by Ctrl-C, before its last step."""

    summary: Summary
    directory: RunDirectory
    stopped: bool


@dataclass(frozen=True)
class _Parts:
    """The parts of a run, checked before anything heavy starts."""

    grpo: GRPOConfig
    sft: SFTConfig | None
    lora: LoraConfig | None
    rewards: list[Reward]
    rows: Dataset
    held_out: Dataset


def train(
    config: TrainConfig,
    display: Display,
    *,
    resume: bool = False,
    verbose: bool = False,
    started: float | None = None,
) -> Outcome:
    """Train as `config` says and write everything into its output directory.

    Call `prepare_environment` before anything imports vLLM, then this, once in a process.

    Args:
        resume: go on from the last checkpoint of the run in the output directory.
        started: `time.perf_counter()` when the program started, for the wall time.

    Raises:
        SyncError: the configuration cannot be right, or a sync failed.
    """
    if config.rollout.mode == "ray":
        from qerl_sync.training.on_ray import train_on_ray

        return train_on_ray(config, display, resume=resume, verbose=verbose)
    return train_here(config, display, resume=resume, verbose=verbose, started=started)


def train_here(
    config: TrainConfig,
    display: Display,
    *,
    resume: bool = False,
    verbose: bool = False,
    started: float | None = None,
) -> Outcome:
    """Train as `train` does, with the trainer in this process whatever the mode."""
    started = time.perf_counter() if started is None else started
    directory = RunDirectory(Path(config.output_dir))
    with file_errors_explained(directory.root):
        return _run(config, directory, display, resume, verbose, started)


def _run(
    config: TrainConfig,
    directory: RunDirectory,
    display: Display,
    resume: bool,
    verbose: bool,
    started: float,
) -> Outcome:
    with display.phase("checking", "configuration checked"):
        parts = _check(config, verbose)
        checkpoint = _open(directory, config, display, resume)
    path = _policy(config, parts, directory, display)
    log = directory.engine_log if config.rollout.mode == "subprocess" and not verbose else None
    recorded = run_errors_recorded(directory.root)
    with recorded, rollout_server(config, path, directory, display) as url:
        phase = display.phase("building the trainer", _built(config))
        with phase, _refusals_explained(), engine_process(log):
            trainer, callback = _build(config, parts, path, url, directory)
        with closing(callback), _engine_death_explained(log):
            stopped = _learn(trainer, checkpoint, display)
    with display.phase("writing the report", f"report written to {directory.root}"):
        if not stopped:
            trainer.save_model(str(directory.trained))
        summary = _report(trainer.state.log_history, callback, directory, started)
    return Outcome(summary, directory, stopped)


def _built(config: TrainConfig) -> str:
    return "trainer built" if config.rollout.mode == "server" else "vLLM engine started"


def _check(config: TrainConfig, verbose: bool) -> _Parts:
    require_packages()
    import torch

    if not verbose:
        hush()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
        # For engines in processes of their own; vLLM's would take all cores.
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
    needs_answers = config.warmup is not None or any(name in BUILTIN for name in config.reward)
    rewards = [resolve_reward(name) for name in config.reward]
    grpo, sft, lora = grpo_arguments(config), sft_arguments(config), lora_arguments(config)
    if config.model.path is not None:
        load_tokenizer(config.model.path)
    rows, held_out = load_data(config.data, config.seed, needs_answers=needs_answers)
    if grpo.eval_strategy != "no" and not len(held_out):
        raise ConfigError(
            "trainer.eval_strategy is set and there is nothing to evaluate; set data.eval_size"
        )
    return _Parts(grpo, sft, lora, rewards, rows, held_out)


def _open(
    directory: RunDirectory, config: TrainConfig, display: Display, resume: bool
) -> Path | None:
    """Prepare the directory. Return the checkpoint to resume from."""
    if not resume:
        moved = directory.start(config)
        if moved is not None:
            display.console.print(f"  the earlier run was moved to {moved}", highlight=False)
        return None
    checkpoint = directory.resume(config)
    done = step_of(checkpoint)
    last = config.trainer.get("max_steps", -1)
    if 0 < last <= done:
        raise ConfigError(
            f"nothing left to do: the run in {directory.root} is at step {done} of {last}; raise "
            "trainer.max_steps to train it further"
        )
    display.console.print(f"  going on from step {done}", highlight=False)
    return checkpoint


def _policy(config: TrainConfig, parts: _Parts, directory: RunDirectory, display: Display) -> str:
    """Return the path of the policy to start from. Make, warm up and save it if it is missing."""
    if config.model.path is not None and parts.sft is None:
        return config.model.path
    if directory.model.is_dir():
        return str(directory.model)
    with display.phase("making the model", f"model ready: {describe(config.model)}"):
        if config.model.path is not None:
            tokenizer = load_tokenizer(config.model.path)
            model = load_model(config.model.path, config.model.dtype)
        else:
            assert config.model.tiny is not None
            texts = texts_of(parts.rows)
            model, tokenizer = make_tiny(config.model.tiny, config.model.dtype, texts, config.seed)
    if parts.sft is not None:
        with display.steps("warm-up", "warmed up") as steps:
            warm_up(model, tokenizer, parts.rows, parts.sft, steps)
    # Renamed when complete: what an interrupted run left is not taken for a model.
    unfinished = directory.root / "model.unfinished"
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(directory.model)
    return str(directory.model)


def _build(
    config: TrainConfig, parts: _Parts, path: str, url: str | None, directory: RunDirectory
) -> tuple[Any, WeightSyncCallback]:
    """Build TRL's trainer with its engine, or for the server at `url`, synced by our callback."""
    from trl import GRPOTrainer

    from qerl_sync.training.callbacks import quieten

    def record(report: SyncReport) -> None:
        assert callback.session is not None
        if report.unsent_tensors:  # `qerl-sync plan --compare` plans the whole model
            return
        directory.record_plan(callback.session, config.sync)

    callback = _callback(config, record)
    parts.grpo.vllm_server_base_url = url
    trainer = GRPOTrainer(
        model=path,
        reward_funcs=parts.rewards,
        args=parts.grpo,
        train_dataset=parts.rows,
        eval_dataset=parts.held_out if len(parts.held_out) else None,
        processing_class=load_tokenizer(path),
        callbacks=[callback],
        peft_config=parts.lora,
    )
    quieten(trainer)
    return trainer, callback


@contextmanager
def _refusals_explained() -> Iterator[None]:
    """Raise ConfigError for any error of TRL or vLLM while trainer and engine are made.

    Nothing has been trained by then, and everything else has been checked, so the configuration is
    the cause. vLLM refuses with any class of error, such as a missing kernel's (fp8 on a CPU).
    """
    import requests

    try:
        yield
    except Exception as exc:
        # A server that cannot be reached, and files, are explained around this.
        if isinstance(exc, SyncError | requests.RequestException) or file_error(exc):
            raise
        raise ConfigError(
            f"TRL, PEFT or vLLM refuses this run: {_reason(exc)}; look at the sections `trainer`, "
            "`peft` and `rollout.engine` (--debug shows where)"
        ) from exc


def _callback(config: TrainConfig, record: Callable[[SyncReport], None]) -> WeightSyncCallback:
    from qerl_sync.integrations.trl import WeightSyncCallback

    mode = config.rollout.mode
    recorded = config.sync.record_directory or config.output_dir
    sync = config.sync.model_copy(update={"record_directory": recorded})
    # A server has been given its engine's arguments when it was started.
    engine = None if mode == "server" else engine_options(config)
    if mode != "ray":
        apart = mode == "subprocess"
        return WeightSyncCallback(sync, engine=engine, in_own_process=apart, recorder=record)
    from qerl_sync.integrations.ray.trl import PoolSyncCallback
    from qerl_sync.training.on_ray import pool_arguments

    return PoolSyncCallback(
        sync,
        workers=config.rollout.workers,
        max_staleness=config.rollout.max_staleness,
        engine=engine,
        pool=pool_arguments(config),
        recorder=record,
    )


def _reason(exc: Exception) -> str:
    if isinstance(exc, ValidationError):
        return "; ".join(found["msg"] for found in exc.errors())
    return str(exc) if isinstance(exc, ValueError) else f"{type(exc).__name__}: {exc}"


def _learn(trainer: Any, checkpoint: Path | None, display: Display) -> bool:
    """Train to the end, or until Ctrl-C. Return whether it was stopped."""
    from qerl_sync.training.callbacks import ShowProgress, StopCleanly

    with display.steps("training", "trained") as steps:
        stop = StopCleanly(steps)
        progress = ShowProgress(steps, _note)
        trainer.add_callback(progress)
        trainer.add_callback(stop)
        with stop.listening():
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except SyncError:
                raise
            except Exception as exc:
                # transformers reads the checkpoint before training begins, and says of no error
                # from which file it is.
                if checkpoint is None or progress.begun:
                    raise
                raise damaged(checkpoint, checkpoint, f"{type(exc).__name__}: {exc}") from exc
    return stop.stopped and trainer.state.global_step < trainer.state.max_steps


@contextmanager
def _engine_death_explained(log: Path | None) -> Iterator[None]:
    """Replace an error caused by a dead engine process by one with the last lines of its log."""
    try:
        yield
    except Exception as exc:
        lost = log is not None and isinstance(exc, PeerLostError)
        if not lost and type(exc).__name__ != "EngineDeadError":
            raise
        raise engine_lost(log) from exc


def _note(log: dict[str, Any]) -> str:
    if "reward" not in log:
        return ""
    sync = f" · sync {1000 * log['sync/seconds/total']:.0f} ms" if "sync/bytes" in log else ""
    return f"reward {float(log['reward']):.2f}{sync}"


def _report(
    log: list[dict[str, Any]],
    callback: WeightSyncCallback,
    directory: RunDirectory,
    started: float,
) -> Summary:
    """Write summary.json and the plots."""
    summary = summarize(
        log,
        directory.read_syncs(),
        wall_seconds=time.perf_counter() - started,
        versions=versions(),
    )
    text = json.dumps(summary.to_json(), indent=2) + "\n"
    directory.summary.write_text(text, encoding="utf-8")
    plot_rewards(reward_curve(log), directory.reward_plot)
    session = callback.session
    if session is not None and session.plan is not None and session.last_trace is not None:
        plot_buffers(session.plan, session.last_trace, directory.buffers_plot)
    return summary
