"""A run: model, warm-up, engine, reinforcement learning, report."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from qerl_sync.config import TrainConfig
from qerl_sync.config.files import file_error, file_errors_explained
from qerl_sync.errors import ConfigError, FileError, PeerLostError, SyncError
from qerl_sync.report.plots import plot_buffers, plot_rewards
from qerl_sync.report.summary import Summary, reward_curve, summarize, versions
from qerl_sync.telemetry.recorder import run_errors_recorded
from qerl_sync.training.arguments import (
    engine_options,
    grpo_arguments,
    lora_arguments,
    pool_arguments,
    sft_arguments,
)
from qerl_sync.training.data import load_data
from qerl_sync.training.directory import RunDirectory, step_of
from qerl_sync.training.display import Display
from qerl_sync.training.environment import hush, require_packages
from qerl_sync.training.models import load_model, load_tokenizer, make_tiny, warm_up
from qerl_sync.training.processes import Processes, join, sharding_on_cpus, whole_models
from qerl_sync.training.rewards import BUILTIN, Reward, resolve_reward
from qerl_sync.training.rollouts import engine_lost, engine_process, rollout_server

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, SFTConfig

    from qerl_sync.integrations.trl import WeightSyncCallback
    from qerl_sync.session import SyncReport


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        summary: None on other trainer ranks than 0.
        stopped: by Ctrl-C or SIGTERM, before its last step.
    """

    summary: Summary | None
    directory: RunDirectory
    stopped: bool


@dataclass(frozen=True)
class _Run:
    """A run that was checked before anything heavy starts."""

    config: TrainConfig
    display: Display
    directory: RunDirectory
    processes: Processes
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
    """Train as `config` says, in this process, and write everything into its output directory.

    Call `prepare_environment` before anything imports vLLM, then this, once in a process. For
    `rollout.mode: ray` call `training.on_ray.train_on_ray`, which calls this in an actor.

    Args:
        resume: go on from the last checkpoint of the run in the output directory.
        started: `time.perf_counter()` when the program started, for the wall time.

    Raises:
        SyncError: the configuration cannot be right, or a sync failed.
    """
    started = time.perf_counter() if started is None else started
    directory = RunDirectory(Path(config.output_dir))
    mode = config.rollout.mode
    with file_errors_explained(directory.root):
        with display.phase("checking", "configuration checked"):
            run = _checked(config, display, directory, verbose)
            processes = run.processes
            checkpoint = processes.of_leader("the run's directory", lambda: _open(run, resume))
        path = _policy(run)
        apart = mode == "subprocess" and not verbose
        log = directory.engine_log_of(processes.rank) if apart else None
        # Rank 0 has the server. The other ranks wait for it in the trainer's constructor.
        leads = processes.rank == 0
        server = rollout_server(config, path, directory, display) if leads else nullcontext()
        recorded = run_errors_recorded(directory.root) if leads else nullcontext()
        with recorded, server as url:
            built = "trainer built" if mode == "server" else "vLLM engine started"
            try:
                phase = display.phase("building the trainer", built)
                with phase, engine_process(log), sharding_on_cpus():
                    trainer, callback = _build(run, path, url)
            except Exception as exc:
                _raise_refusal(exc)
                raise
            with closing(callback):
                try:
                    stopped = _learn(run, trainer, checkpoint)
                except Exception as exc:
                    # Calls to an engine process that has died do not say why it died; its log does.
                    lost = log is not None and isinstance(exc, PeerLostError)
                    if lost or type(exc).__name__ == "EngineDeadError":
                        raise engine_lost(log) from exc
                    raise
        with display.phase("writing the report", f"report written to {directory.root}"):
            if not stopped:
                trainer.save_model(str(directory.trained))  # gathers a sharded model on all ranks
            if not leads:
                return Outcome(None, directory, stopped)
            summary = _report(run, trainer.state.log_history, callback, started)
    return Outcome(summary, directory, stopped)


def _checked(config: TrainConfig, display: Display, directory: RunDirectory, verbose: bool) -> _Run:
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
    processes = join(config)
    return _Run(config, display, directory, processes, grpo, sft, lora, rewards, rows, held_out)


def _open(run: _Run, resume: bool) -> str | None:
    """Prepare the directory. Return the checkpoint to resume from."""
    console, directory = run.display.console, run.directory
    if not resume:
        moved = directory.start(run.config)
        if moved is not None:
            console.print(f"  the earlier run was moved to {moved}", highlight=False)
        return None
    checkpoint = directory.resume(run.config)
    done = step_of(checkpoint)
    last = run.config.trainer.get("max_steps", -1)
    if 0 < last <= done:
        raise ConfigError(
            f"nothing left to do: the run in {directory.root} is at step {done} of {last}; raise "
            "trainer.max_steps to train it further"
        )
    console.print(f"  going on from step {done}", highlight=False)
    return str(checkpoint)


def _policy(run: _Run) -> str:
    """Return the path of the policy to start from. Make, warm up and save it if it is missing."""
    model_config, directory = run.config.model, run.directory
    if model_config.path is not None and run.sft is None:
        return model_config.path
    if run.processes.of_leader("whether the model is there", directory.model.is_dir):
        return str(directory.model)
    tiny, dtype = model_config.tiny, model_config.dtype
    ready = f"model ready: {f'a tiny {tiny.architecture}' if tiny else model_config.path}"
    with run.display.phase("making the model", ready), whole_models():
        if tiny is not None:
            texts = (str(row.get(name, "")) for row in run.rows for name in ("prompt", "answer"))
            model, tokenizer = make_tiny(tiny, dtype, texts, run.config.seed)
        else:
            assert model_config.path is not None
            tokenizer = load_tokenizer(model_config.path)
            model = load_model(model_config.path, dtype)
    if run.sft is not None:
        with run.display.steps("warm-up", "warmed up") as steps, whole_models():
            warm_up(model, tokenizer, run.rows, run.sft, steps)

    def save() -> str:
        # Renamed when complete: what an interrupted run left is not taken for a model.
        unfinished = directory.root / "model.unfinished"
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(directory.model)
        return str(directory.model)

    return run.processes.of_leader("saving the model", save)


def _build(run: _Run, path: str, url: str | None) -> tuple[Any, WeightSyncCallback]:
    """Build TRL's trainer with its engine, or for the server at `url`, synced by our callback."""
    from trl import GRPOTrainer

    from qerl_sync.training.callbacks import quieten

    def record(report: SyncReport) -> None:
        assert callback.session is not None
        if report.unsent_tensors:  # `qerl-sync plan --compare` plans the whole model
            return
        run.directory.record_plan(callback.session, run.config.sync)

    callback = _callback(run, record)
    run.grpo.vllm_server_base_url = url
    trainer = GRPOTrainer(
        model=path,
        reward_funcs=run.rewards,
        args=run.grpo,
        train_dataset=run.rows,
        eval_dataset=run.held_out if len(run.held_out) else None,
        processing_class=load_tokenizer(path),
        callbacks=[callback],
        peft_config=run.lora,
    )
    quieten(trainer)
    return trainer, callback


def _raise_refusal(exc: Exception) -> None:
    """Raise ConfigError for an error of TRL or vLLM while trainer and engine were made.

    Nothing has been trained by then, and everything else has been checked, so the configuration is
    the cause. vLLM refuses with any class of error, such as a missing kernel's (fp8 on a CPU).
    """
    import requests

    # A server that cannot be reached, and files, are explained by the callers of this one.
    if isinstance(exc, SyncError | requests.RequestException) or file_error(exc):
        return
    if isinstance(exc, ValidationError):
        reason = "; ".join(found["msg"] for found in exc.errors())
    else:
        reason = str(exc) if isinstance(exc, ValueError) else f"{type(exc).__name__}: {exc}"
    raise ConfigError(
        f"TRL, PEFT or vLLM refuses this run: {reason}; look at the sections `trainer`, `peft` "
        "and `rollout.engine` (--debug shows where)"
    ) from exc


def _callback(run: _Run, record: Callable[[SyncReport], None]) -> WeightSyncCallback:
    from qerl_sync.integrations.trl import WeightSyncCallback

    config, mode = run.config, run.config.rollout.mode
    recorded = config.sync.record_directory or config.output_dir
    sync = config.sync.model_copy(update={"record_directory": recorded})
    # A server has been given its engine's arguments when it was started.
    engine = None if mode == "server" else engine_options(config, run.processes.rank)
    if mode != "ray":
        apart = mode == "subprocess"
        return WeightSyncCallback(sync, engine=engine, in_own_process=apart, recorder=record)
    from qerl_sync.integrations.ray.trl import PoolSyncCallback

    return PoolSyncCallback(
        sync,
        workers=config.rollout.workers,
        max_staleness=config.rollout.max_staleness,
        engine=engine,
        pool=pool_arguments(config),
        recorder=record,
    )


def _learn(run: _Run, trainer: Any, checkpoint: str | None) -> bool:
    """Train to the end, or until Ctrl-C or SIGTERM. Return whether it was stopped."""
    from qerl_sync.training.callbacks import ShowProgress, StopCleanly

    with run.display.steps("training", "trained") as steps:
        stop = StopCleanly(run.display, lambda stopped: run.processes.any("stopping", stopped))
        progress = ShowProgress(steps, _note)
        trainer.add_callback(progress)
        trainer.add_callback(stop)
        with stop.listening():
            try:
                trainer.train(resume_from_checkpoint=checkpoint)
            except SyncError:
                raise
            except Exception as exc:
                # transformers reads the checkpoint before training begins, and its errors do not
                # name the file.
                if checkpoint is None or progress.begun:
                    raise
                raise FileError(
                    f"the run cannot go on from {checkpoint}: {type(exc).__name__}: {exc}; change "
                    "back options that it was written with (sharding, the optimizer). If it is "
                    "damaged, move it away, and --resume goes on from the checkpoint before it",
                    path=checkpoint,
                ) from exc
    return stop.stopped and trainer.state.global_step < trainer.state.max_steps


def _note(log: dict[str, Any]) -> str:
    if "reward" not in log:
        return ""
    sync = f" · sync {1000 * log['sync/seconds/total']:.0f} ms" if "sync/bytes" in log else ""
    return f"reward {float(log['reward']):.2f}{sync}"


def _report(
    run: _Run, log: list[dict[str, Any]], callback: WeightSyncCallback, started: float
) -> Summary:
    """Write summary.json and the plots."""
    directory = run.directory
    # A sync's line is written before the trainer has waited for the sync (`sync.when: eager`), so
    # that `waited` is in the callback's report alone.
    reports = {report.version: report.to_json() for report in callback.reports}
    summary = summarize(
        log,
        [reports.get(sync["version"], sync) for sync in directory.read_syncs()],
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
