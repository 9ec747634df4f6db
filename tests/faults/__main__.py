"""`scripts/faults`: does qerl-sync keep its promises here?"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from qerl_sync.cli.errors import UNEXPECTED, errors_as_text
from qerl_sync.cli.progress import telling

if TYPE_CHECKING:
    from faults.outcomes import Outcome
    from faults.subjects import Spec

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def faults(
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="Only these: an engine, or engine/model/kernels such as 'own process/moe/stock'."
        ),
    ] = None,
    case: Annotated[
        list[str] | None, typer.Option(help="Only cases of this name; * stands for anything.")
    ] = None,
    stock: Annotated[
        bool, typer.Option("--stock", help="Break vLLM's own reload in the same ways, beside.")
    ] = False,
    random: Annotated[
        int,
        typer.Option(
            min=0,
            help="Instead: this many random schedules of faults and syncs. SIGKILL and SIGSTOP, "
            "which take seconds and new engines, are left out.",
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the random schedules.")] = 0,
    docs: Annotated[Path | None, typer.Option(help="Write the page docs/faults.md here.")] = None,
    log: Annotated[Path | None, typer.Option(help="Where the engines' output goes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Break syncs of real engines on purpose. Status 0: every case ended as it should."""
    with errors_as_text(debug=debug), tempfile.TemporaryDirectory() as directory:
        from faults.suite import Suite, chosen_specs

        console = Console(stderr=as_json, soft_wrap=True)
        specs = chosen_specs(engine or [])
        output = log or Path(directory) / "engines.log"
        if random:
            _schedules(specs, random, seed, output, console.print, as_json=as_json)
            return
        with telling(console) as note:
            outcomes = Suite(specs, case or (), stock, output, note).run()
        _show(outcomes, console, docs, as_json=as_json)


def _show(outcomes: list[Outcome], console: Console, docs: Path | None, *, as_json: bool) -> None:
    from faults.outcomes import MEANING
    from faults.suite import versions
    from faults.tables import complaints, fault_page, fault_table, stock_table

    if as_json:
        told = {"versions": versions(), "outcomes": [outcome.to_json() for outcome in outcomes]}
        print(json.dumps(told, indent=2))
    else:
        console.print(fault_table(outcomes))
        if any(outcome.by != "qerl-sync" for outcome in outcomes):
            console.print(stock_table(outcomes))
    if docs is not None:
        docs.write_text(fault_page(outcomes, versions(), MEANING))
    wrong = complaints(outcomes)
    for line in wrong:
        console.print(line, markup=False)
    if wrong:
        raise typer.Exit(UNEXPECTED)


def _schedules(
    specs: list[Spec],
    number: int,
    seed: int,
    log: Path,
    note: Callable[[str], None],
    *,
    as_json: bool,
) -> None:
    """On the first of `specs`: an in-process engine takes some 0.1 s for a sync."""
    from faults.suite import run_random

    note(f"{number} schedules on {specs[0]}, seed {seed}")
    found = run_random(specs[0], number, seed, log)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        note(
            f"seed {found['seed']}: {found['schedules']} schedules, {found['steps']} steps, "
            f"{found['faults']} faults, {found['syncs']} good syncs: "
            f"{found['failure'] or 'every state was right'}"
        )
    if found["failure"]:
        raise typer.Exit(UNEXPECTED)


if __name__ == "__main__":
    app(prog_name="scripts/faults")
