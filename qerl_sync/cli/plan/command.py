"""`qerl-sync plan`."""

from __future__ import annotations

import gc
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from qerl_sync.cli.errors import FAILED, Debug, errors_as_text, notes
from qerl_sync.cli.plan.scenarios import VLLM_CHUNK_BUFFERS
from qerl_sync.errors import PlanError

if TYPE_CHECKING:
    from qerl_sync.cli.plan.run import Outcome


def plan(
    model: Annotated[
        Path,
        typer.Argument(
            help="A model directory, a config.json, a safetensors index, a training YAML, or the "
            "output directory of a run. Weights are not needed.",
            show_default=False,
        ),
    ],
    order: Annotated[
        list[str] | None,
        typer.Option(
            help="Order in which the source yields: hf, safetensors, fastsafetensors, "
            "safetensors:5GB, alphabetical, size, optimizer, random:SEED, interleaved:N, "
            "file:PATH, run:DIR. Repeatable; all by default."
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="What to do about it, by the words of sync.policy: warn, reorder, spill; "
            "reorder_in_budget is reorder with --budget. Repeatable; all but spill by default."
        ),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Bytes that may be pinned at any moment, such as 2GiB.")
    ] = None,
    chunk_bytes: Annotated[
        str | None,
        typer.Option(
            help="Size of the transport's chunk buffers, of which the tensors are views "
            "(vLLM's NCCL engine: 1GiB). Default: each tensor has memory of its own."
        ),
    ] = None,
    chunk_buffers: Annotated[
        int, typer.Option(min=1, help="How many chunk buffers the receiver rotates.")
    ] = VLLM_CHUNK_BUFFERS,
    packing: Annotated[
        Literal["auto", "stream", "layers"],
        typer.Option(
            help="Where the stream is cut into chunks: `stream` wherever one is full, as vLLM "
            "does; `layers` between parent layers, as our plans are; `auto`: as given like vLLM, "
            "reordered between layers."
        ),
    ] = "auto",
    tp: Annotated[
        int | None, typer.Option(min=1, help="Tensor parallel size; the plan is that of rank 0.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Dtype of the trainer's tensors. Default: that of the checkpoint."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the plan into this PNG file.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the plan into this HTML file, which works offline.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON on standard output, and nothing else there.")
    ] = False,
    names: Annotated[
        Path | None,
        typer.Option(
            help="Write the names in the first line's order into this file, one a line: to edit, "
            "for --order file:PATH."
        ),
    ] = None,
    assertions: Annotated[
        list[str] | None,
        typer.Option(
            "--assert",
            metavar="FIELD=LIMIT",
            help="Exit with 1 if a line of the table has more than LIMIT: max_open_layers=1, "
            "peak_buffered_bytes=2GiB, peak_pinned_bytes, peak_receive_bytes, peak_staged_bytes. "
            "Repeatable. Without --order and --policy the table then has the one line that would "
            "run.",
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            help="Hold the measured traces of this run against the plan; exit with 1 at the first "
            "difference."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Show what a weight sync would hold in memory, without weights and without an engine."""
    with errors_as_text(debug=debug), ExitStack() as at_end:
        from qerl_sync.cli.plan.run import execute
        from qerl_sync.cli.plan.table import show

        # A plan is many small values and no cycles; looking for cycles takes a fifth of its time.
        gc.disable()
        at_end.callback(gc.enable)
        said = notes()
        outcome = execute(
            model,
            said.status,
            orders=order or [],
            policies=policy or [],
            budget=budget,
            chunk_bytes=chunk_bytes,
            chunk_buffers=chunk_buffers,
            packing=packing,
            tensor_parallel_size=tp,
            dtype=dtype,
            assertions=assertions or [],
            compare=compare,
        )
        # Files come before anything is printed: `| head` ends the command when it has read enough.
        _write_files(outcome, said, names=names, png=png, html=html)
        if as_json:
            typer.echo(json.dumps(outcome.to_json(), indent=2))
        else:
            show(outcome, Console())
        if outcome.refused is not None:
            raise PlanError(outcome.refused)
        for reason in outcome.failures:
            said.print(f"[bold red]failed:[/] {escape(reason)}")
        if outcome.failures:
            raise typer.Exit(FAILED)


def _write_files(
    outcome: Outcome, said: Console, *, names: Path | None, png: Path | None, html: Path | None
) -> None:
    """Write what was asked for, and say so. Raises FileError if a file cannot be written."""
    from qerl_sync.config.files import file_errors_explained

    def write(what: str, path: Path, content: bytes) -> None:
        with file_errors_explained(path):
            path.write_bytes(content)
        said.print(f"{what} written to {path}")

    if names is not None:
        ordered = outcome.scenarios[0].metas
        write("names", names, "".join(f"{meta.name}\n" for meta in ordered).encode())
    if png is not None:
        from qerl_sync.cli.plan.png import plot_plan

        write("picture", png, plot_plan(outcome))
    if html is not None:
        from qerl_sync.cli.plan.html import render_page

        write("page", html, render_page(outcome).encode())
