"""The command line. Each command imports heavy packages when it runs, so that help is fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from qerl_sync import __version__
from qerl_sync.cli import bench
from qerl_sync.cli.doctor import doctor
from qerl_sync.cli.init import init
from qerl_sync.cli.plan.command import plan
from qerl_sync.cli.report import explain, report
from qerl_sync.cli.serve import serve
from qerl_sync.cli.train import train

app = typer.Typer(
    name="qerl-sync",
    help="Weight sync from trainers to vLLM, planned, ordered by parent layer and measured.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS: tuple[Callable[..., None], ...] = (init, train, plan, serve, doctor, report, explain)
for command in COMMANDS:
    app.command()(command)
app.add_typer(bench.app, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qerl-sync {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Take the options that precede a command."""


def main() -> None:
    """Run the command line: the entry point of the console script."""
    app()
