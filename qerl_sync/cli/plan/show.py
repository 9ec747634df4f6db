"""How `qerl-sync plan` tells what it found."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from qerl_sync import __version__
from qerl_sync.cli.plan.run import Comparison, Outcome
from qerl_sync.cli.plan.table import causes, scenario_table, worst_moment
from qerl_sync.config.files import file_errors_explained
from qerl_sync.meta import format_bytes


def show(outcome: Outcome, console: Console) -> None:
    """The model, the table, the causes and the worst moment; then the comparisons."""
    console.print(_head(outcome))
    console.print()
    console.print(scenario_table(outcome.scenarios))
    console.print()
    if any(scenario.causes for scenario in outcome.scenarios):
        console.print(causes(outcome.scenarios))
        console.print()
    worst = max(outcome.scenarios, key=lambda scenario: scenario.peak_buffered_bytes)
    console.print(worst_moment(worst))
    for comparison in outcome.comparisons:
        console.print(_verdict(comparison))


def _head(outcome: Outcome) -> Text:
    layer, held = outcome.largest_layer
    lines = [
        f"{len(outcome.found.metas):,} tensors, {format_bytes(outcome.total_bytes)} in "
        f"{outcome.dtypes}, {len(outcome.layer_bytes):,} parent layers.",
        f"Largest parent layer: {layer}, {format_bytes(held)}.",
        " ".join(filter(None, (outcome.origin, outcome.packed))),
    ]
    if outcome.budget_bytes is not None:
        lines.append(f"Budget: at most {format_bytes(outcome.budget_bytes)} pinned.")
    head = Text(outcome.asked.name, style="bold")
    if outcome.architecture:
        head.append(f"  {outcome.architecture}", style="not bold")
    return head.append("\n" + "\n".join(lines), style="not bold")


def _verdict(comparison: Comparison) -> Text:
    plan = comparison.record.plan
    what = (
        f"the recorded sync of {len(plan.metas):,} tensors (source order "
        f"{comparison.record.source_order}, policy {plan.policy})"
    )
    if comparison.difference is None:
        return Text(f"Equal, tensor by tensor: {what} and the plan.", style="green")
    return Text(f"Different: {what} and the plan: {comparison.difference.text}", style="red")


def write_files(
    outcome: Outcome, console: Console, *, names: Path | None, png: Path | None, html: Path | None
) -> None:
    """Write what was asked for, and say so on `console`.

    Raises:
        FileError: a file cannot be written.
    """
    files = (("names", names, _names), ("picture", png, _picture), ("page", html, _page))
    for what, path, content in files:
        if path is not None:
            with file_errors_explained(path):
                path.write_bytes(content(outcome))
            console.print(f"{what} written to {path}", highlight=False, soft_wrap=True)


def _names(outcome: Outcome) -> bytes:
    return "".join(f"{meta.name}\n" for meta in outcome.scenarios[0].metas).encode()


def _picture(outcome: Outcome) -> bytes:
    from qerl_sync.cli.plan.png import plot_plan

    size = f"{len(outcome.found.metas):,} tensors, {format_bytes(outcome.total_bytes)}"
    return plot_plan(
        outcome.scenarios,
        title=outcome.asked.name,
        subtitle=f"{size} in {outcome.dtypes}. {outcome.origin} {outcome.packed}",
        budget_bytes=outcome.budget_bytes,
    )


def _page(outcome: Outcome) -> bytes:
    from qerl_sync.cli.plan.html import render_page

    layer, held = outcome.largest_layer
    facts = [
        ("Tensors", f"{len(outcome.found.metas):,}", ""),
        ("Size", format_bytes(outcome.total_bytes), outcome.dtypes),
        ("Parent layers", f"{len(outcome.layer_bytes):,}", ""),
        ("Largest parent layer", format_bytes(held), layer),
    ]
    if outcome.budget_bytes is not None:
        facts.append(("Budget", format_bytes(outcome.budget_bytes), ""))
    page = render_page(
        outcome.scenarios,
        title=" ".join(filter(None, (outcome.asked.name, outcome.architecture))),
        subtitle=" ".join(filter(None, (outcome.origin, outcome.packed))),
        facts=facts,
        footer=f"Made by qerl-sync {__version__} with `qerl-sync plan`.",
        budget_bytes=outcome.budget_bytes,
    )
    return page.encode()
