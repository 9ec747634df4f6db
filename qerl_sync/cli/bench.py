"""`qerl-sync bench`: measurements that also assert."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qerl_sync.cli.errors import FAILED, Debug, errors_as_text, require_directories
from qerl_sync.meta import parse_bytes

if TYPE_CHECKING:
    from qerl_sync.bench.transport import Results


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Shape = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", help="A transformers config.json: the shape of the model."),
]
Rounds = Annotated[int, typer.Option(min=1, help="How often each thing is measured.")]
# Where `bench compare` runs engines, in this order.
ENGINES = ("process", "server", "ray", "colocate")
app = typer.Typer(help="Measure, and exit with 1 if a target is missed.", no_args_is_help=True)


@app.command()
def learning(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, as for `train`.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="OVERRIDES", help="As for `train`.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="One run for each seed.")] = "0,1,2",
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="'NAME: OVERRIDES'; once for each variant. Each runs with all seeds. Variants are "
            "compared with each other, not with targets."
        ),
    ] = None,
    output_dir: Annotated[
        Path, typer.Option(help="One directory in it for each variant and seed.")
    ] = Path("runs/learning"),
    png: Annotated[Path | None, typer.Option(help="Draw the rewards into this file.")] = None,
    debug: Debug = False,
) -> None:
    """Train with several seeds and print what each reached."""
    wanted = _parse_numbers(seeds, "seeds")
    variants = _parse_variants(variant or [])
    with errors_as_text(debug=debug):
        from qerl_sync.report.plots import matplotlib_or_refusal, plot_learning
        from qerl_sync.report.tables import trials_table
        from qerl_sync.training.trials import Targets, Trial, run_seed

        require_directories(png)
        if png is not None:
            matplotlib_or_refusal()  # before hours of training
        trials = []
        for name, changes in (variants or {"": []}).items():
            for seed in wanted:
                directory = output_dir / _directory_of(name) / f"seed-{seed}"
                summary = run_seed(config, [*(overrides or []), *changes], seed, directory)
                trials.append(Trial(name, seed, summary, directory))
        targets = Targets()
        missed = None if variants else [targets.missed(trial.summary) for trial in trials]
        Console().print(trials_table(trials, missed))
        if png is not None:
            curves: dict[str, list[list[tuple[int, float]]]] = {}
            for trial in trials:
                curves.setdefault(trial.variant, []).append(trial.rewards)
            plot_learning(curves, png)
        if any(missed or []):
            raise typer.Exit(FAILED)


@app.command()
def transport(
    config: Shape = Path("configs/models/qwen3-0.6b.json"),
    rounds: Rounds = 5,
    chunk_bytes: Annotated[str | None, typer.Option(help="As sync.chunk_bytes.")] = None,
    chunks_in_flight: Annotated[int, typer.Option(min=1, help="As sync.chunks_in_flight.")] = 2,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a sync to another process, beside vLLM's load alone, memcpy and TCP."""
    with errors_as_text(debug=debug):
        from qerl_sync.training.environment import prepare_environment

        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        # As vLLM does by itself: on CPU it leaves a core to others, here the trainer.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "auto")
        prepare_environment(verbose=False)
        from qerl_sync.bench.transport import measure
        from qerl_sync.report.bench_tables import transport_tables

        with _telling() as note:
            found = measure(
                config,
                rounds=rounds,
                chunk_bytes=None if chunk_bytes is None else parse_bytes(chunk_bytes),
                chunks_in_flight=chunks_in_flight,
                note=note,
            )
        _show(found, transport_tables(found), as_json)
        _fail_if_missed(found)


@app.command()
def compare(
    config: Shape = Path("configs/models/qwen3-0.6b.json"),
    rounds: Rounds = 5,
    kernels: Annotated[
        Literal["packed", "plain"],
        typer.Option(
            help="Of vLLM on a CPU. packed: its own, which pack weights. plain: kernels that use "
            "parameters as they are, as unquantised GPU kernels do."
        ),
    ] = "packed",
    engines: Annotated[
        str,
        typer.Option(
            help="Which to measure: in a process of its own, behind a server, in a Ray actor, in "
            "this process."
        ),
    ] = ",".join(ENGINES),
    as_json: Json = False,
    markdown: Annotated[Path | None, typer.Option(help="Write a table to this file.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw a bar chart into this file.")] = None,
    debug: Debug = False,
) -> None:
    """Measure every way to bring weights to an engine, and check what it then holds."""
    wanted = [name.strip() for name in engines.split(",")]
    for name in wanted:
        if name not in ENGINES:
            raise typer.BadParameter(f"no engine {name!r}; name some of {', '.join(ENGINES)}")
    with errors_as_text(debug=debug):
        from qerl_sync.report.plots import matplotlib_or_refusal
        from qerl_sync.training.environment import prepare_environment

        require_directories(markdown, png)
        if png is not None:
            matplotlib_or_refusal()
        prepare_environment(verbose=False)
        from qerl_sync.bench.compare import measure, to_markdown
        from qerl_sync.report.bench_tables import compare_tables, draw_comparison

        with _telling() as note:
            found = measure(config, kernels=kernels, engines=wanted, rounds=rounds, note=note)
        _show(found, compare_tables(found), as_json)  # first: a full disk must not lose it
        if markdown is not None:
            markdown.write_text(to_markdown(found), encoding="utf-8")
        if png is not None:
            draw_comparison(found, png)
        _fail_if_missed(found)


@app.command()
def ray(
    config: Shape = Path("configs/models/qwen3-0.2b.json"),
    rounds: Rounds = 5,
    workers: Annotated[str, typer.Option(help="With how many rollout actors.")] = "1,2,3",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a sync of Ray actors, beside loads alone and Ray's put and get; kill an actor."""
    wanted = _parse_numbers(workers, "numbers", least=1)
    with errors_as_text(debug=debug):
        from qerl_sync.training.environment import prepare_environment

        prepare_environment(verbose=False)
        from qerl_sync.bench.on_ray import measure
        from qerl_sync.report.bench_tables import ray_tables

        with _telling() as note:
            found = measure(config, rounds=rounds, workers=wanted, note=note)
        _show(found, ray_tables(found), as_json)
        _fail_if_missed(found)


@contextmanager
def _telling() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the current activity on stderr.

    On a terminal it updates one line; elsewhere (a file, a CI log) it prints a line each time. What
    vLLM and Ray print to stdout goes to stderr, too: with --json, stdout is JSON and nothing else.
    """
    console = Console(stderr=True)
    with redirect_stdout(sys.stderr):
        if not console.is_terminal:
            yield lambda text: console.print(text, markup=False, highlight=False)
            return
        with console.status("") as status:
            yield lambda text: status.update(escape(text))


def _show(found: Results, tables: list[Table], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        for table in tables:
            Console().print(table)


def _fail_if_missed(found: Results) -> None:
    if not all(target.met for target in found.targets):
        raise typer.Exit(FAILED)


def _parse_variants(texts: list[str]) -> dict[str, list[str]]:
    """Return the changes of each variant, by its name."""
    found: dict[str, list[str]] = {}
    for text in texts:
        name, colon, changes = (part.strip() for part in text.partition(":"))
        if not colon or not name:
            raise typer.BadParameter(
                f"{text!r} names no variant; write 'fp8: sync.noise=null', and 'as it is:' for none"
            )
        if _directory_of(name) in map(_directory_of, found):
            raise typer.BadParameter(
                f"{name!r} is the name of another variant, or has the same letters and digits, and "
                "its runs would take the place of the other's; give it another name"
            )
        found[name] = changes.split()
    return found


def _directory_of(variant: str) -> str:
    return re.sub(r"\W+", "-", variant)


def _parse_numbers(text: str, what: str, least: int | None = None) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as exc:
        example = "0,1,2" if least is None else "1,2,3"
        raise typer.BadParameter(f"{text!r} is no list of {what}; write {example}") from exc
    if least is not None and min(found) < least:
        raise typer.BadParameter(f"{text!r} has a number below {least}")
    return found
