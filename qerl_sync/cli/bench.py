"""`qerl-sync bench`: measurements that also assert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qerl_sync.cli.errors import UNEXPECTED, errors_as_text

app = typer.Typer(help="Measure, and fail where a target is missed.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps one command alone a command with a name."""


@app.command()
def learning(
    config: Annotated[Path, typer.Argument(help="A YAML file, as for `train`.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, as for `train`.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, one run for each.")] = "0,1,2",
    output_dir: Annotated[
        Path, typer.Option(help="Where the runs go, one directory for each seed.")
    ] = Path("runs/learning"),
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Does it learn? Trains with several seeds and prints what each reached."""
    wanted = _parse_seeds(seeds)
    with errors_as_text(debug=debug):
        from qerl_sync.report.tables import trials_table
        from qerl_sync.training.trials import Targets, run_seed

        targets = Targets()
        runs = {}
        for seed in wanted:
            directory = output_dir / f"seed-{seed}"
            runs[seed] = run_seed(config, overrides or [], seed, directory)
        missed = {seed: targets.missed(run) for seed, run in runs.items()}
        Console().print(trials_table(runs, missed))
        if any(missed.values()):
            raise typer.Exit(UNEXPECTED)


def _parse_seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as exc:
        raise typer.BadParameter(f"{text!r} is no list of seeds; write 0,1,2") from exc
