"""`qerl-sync train`."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qerl_sync.cli.doctor import show_what_is_wrong
from qerl_sync.cli.errors import INTERRUPTED, Debug, errors_as_text, show_warnings


def train(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG", help="A YAML file; `qerl-sync init` writes one to start from."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="OVERRIDES",
            help="Values that replace those of CONFIG: sync.policy=reorder trainer.max_steps=20",
        ),
    ] = None,
    trl_config: Annotated[
        Path | None,
        typer.Option(help="A YAML file for `trl grpo --config`, in place of CONFIG."),
    ] = None,
    output_dir: Annotated[
        str | None,
        typer.Option(help="Where checkpoints, reports and plots go; replaces output_dir."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue from the last checkpoint in the output directory."),
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Replaces seed.")] = None,
    trace: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Record a timeline of the N-th sync, on trainer and workers: trace-N.json, for "
            "ui.perfetto.dev.",
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show what vLLM, TRL and transformers log.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train a policy with TRL's GRPO and vLLM, its weights synced by plan.

    In several processes:

    torchrun --nproc_per_node 2 -m qerl_sync.cli train CONFIG

    accelerate launch -m qerl_sync.cli train CONFIG
    """
    started = time.perf_counter()
    rank = int(os.environ.get("RANK", "0"))
    console = Console(quiet=rank > 0)
    say = partial(console.print, highlight=False, soft_wrap=True)
    if (config is None) == (trl_config is None) and not (config and "=" in config):
        raise typer.BadParameter("give one file: CONFIG, or --trl-config")
    if trl_config is not None and config is not None:
        overrides = [config, *(overrides or [])]  # the first word is no file then
    path = trl_config or Path(str(config))
    options = {"output_dir": output_dir, "seed": seed, "sync.trace": trace}
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    with errors_as_text(debug=debug, rank=rank):
        # Before `load_config`, which imports vLLM: vLLM reads its environment then and never again.
        from qerl_sync.training.environment import prepare_environment

        prepare_environment(verbose=verbose)
        show_warnings(console)
        from qerl_sync.config import load_config
        from qerl_sync.report.tables import summary_table
        from qerl_sync.telemetry.files import FAILURES
        from qerl_sync.training.display import Display

        display = Display(console)
        with display.phase("reading the configuration", f"read {path}"):
            loaded = load_config(
                path, [*(overrides or []), *given], trl_format=trl_config is not None
            )
        show_what_is_wrong(loaded, console)
        try:
            # Only now: both import torch, which takes seconds, and a mistyped path is to be told at
            # once.
            if loaded.rollout.mode == "ray":
                from qerl_sync.training.on_ray import train_on_ray

                outcome = train_on_ray(loaded, display, resume=resume, verbose=verbose)
            else:
                from qerl_sync.training.run import train as run

                outcome = run(loaded, display, resume=resume, verbose=verbose, started=started)
        except Exception:
            if (Path(loaded.output_dir) / FAILURES).exists():
                say(f"next: qerl-sync explain {loaded.output_dir} explains what failed")
            raise
        if outcome.summary is not None:
            console.print(summary_table(outcome.summary))
            say(f"next: qerl-sync report {loaded.output_dir} --open shows what each sync did")
        if outcome.stopped:
            console.print("[yellow]stopped before the end[/]; --resume goes on from here")
            raise typer.Exit(INTERRUPTED)
