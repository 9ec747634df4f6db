"""Format what `qerl-sync plan` found for a terminal, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qerl_sync.cli.plan.run import Outcome
from qerl_sync.cli.plan.scenarios import Scenario
from qerl_sync.cli.plan.series import POLICY_WORDS, by_order, cause_words, more_columns, shorten
from qerl_sync.meta import format_bytes
from qerl_sync.plan.diagnosis import Cause
from qerl_sync.report.page import buckets

BLOCKS = "▁▂▃▄▅▆▇█"
SHORT_WORDS = {**POLICY_WORDS, "reorder_in_budget": "in budget"}
ORDER_WIDTH = 15
STREAM_WIDTHS = 24, 14, 5  # with so many columns more than usual
SHOWN_LAYERS = 5
OVER, WARN, CALM = "bold red", "yellow", "green"


def show(outcome: Outcome, console: Console) -> None:
    """Print the model, the table, the causes and the worst moment; then the comparisons."""
    head = Text(outcome.asked.name, style="bold")
    if outcome.architecture:
        head.append(f"  {outcome.architecture}", style="not bold")
    layer, held = outcome.largest_layer
    lines = [
        f"{len(outcome.found.metas):,} tensors, {format_bytes(outcome.total_bytes)} in "
        f"{outcome.dtypes}, {len(outcome.layer_bytes):,} parent layers.",
        f"Largest parent layer: {layer}, {format_bytes(held)}.",
        outcome.origin,
    ]
    if outcome.budget_bytes is not None:
        lines.append(f"Budget: at most {format_bytes(outcome.budget_bytes)} pinned.")
    console.print(head.append("\n" + "\n".join(lines), style="not bold"))
    console.print()
    console.print(scenario_table(outcome.scenarios))
    console.print()
    if any(scenario.causes for scenario in outcome.scenarios):
        for text in causes(outcome.scenarios):
            console.print(text)
        console.print()
    console.print(Text(worst_moment(max(outcome.scenarios, key=lambda s: s.peak_buffered_bytes))))
    for comparison in outcome.comparisons:
        plan = comparison.record.plan
        what = (
            f"the recorded sync of {len(plan.metas):,} tensors (source order "
            f"{comparison.record.source_order}, policy {plan.policy}) and the plan"
        )
        if comparison.difference is None:
            console.print(Text(f"Equal, tensor by tensor: {what}.", style="green"))
        else:
            console.print(Text(f"Different: {what}: {comparison.difference}", style="red"))


def scenario_table(scenarios: Sequence[Scenario]) -> Table:
    """Return a line for each order and policy; pinned bytes above the budget stand out.

    The last column is the stream from its first tensor to its last: how many bytes are buffered, on
    one scale for all lines.
    """
    more = more_columns(scenarios)
    width = STREAM_WIDTHS[len(more)]
    top = max((scenario.peak_buffered_bytes for scenario in scenarios), default=0)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("order", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    for title in ("open", "buffered", "pinned", *more):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("" if len(more) == 2 else f"█ = {format_bytes(top)}", no_wrap=True)
    for order, group in by_order(scenarios).items():
        for scenario in group:
            most, share = scenario.max_open_layers, scenario.peak_buffered_bytes / max(top, 1)
            style = "red" if share > 0.5 else WARN if share > 0.1 else CALM
            table.add_row(
                Text(shorten(order, ORDER_WIDTH)) if scenario is group[0] else "",
                SHORT_WORDS[scenario.policy],
                Text(str(most), style=CALM if most <= 1 else WARN),
                format_bytes(scenario.peak_buffered_bytes),
                Text(
                    format_bytes(scenario.peak_pinned_bytes),
                    style=OVER if scenario.within_budget is False else "",
                ),
                *(text(scenario) for text in more.values()),
                Text(sparkline(scenario, top, width), style=style),
            )
    return table


def sparkline(scenario: Scenario, top_bytes: int, width: int) -> str:
    """Draw the most buffered bytes in each stretch of the stream; a space where there are none."""
    heights = [bucket.high_bytes for bucket in buckets(scenario.trace, width)]
    levels = [min(len(BLOCKS) * height // max(top_bytes, 1), len(BLOCKS) - 1) for height in heights]
    return "".join(BLOCKS[n] if height else " " for n, height in zip(levels, heights, strict=True))


def causes(scenarios: Sequence[Scenario]) -> list[Text]:
    """Return each cause that applies somewhere: what it means, where, and what cures it."""
    found = []
    for cause in Cause:
        where = by_order([scenario for scenario in scenarios if cause in scenario.causes])
        places = ", ".join(
            f"{order} ({' and '.join(SHORT_WORDS[scenario.policy] for scenario in group)})"
            for order, group in where.items()
        )
        if places:
            found.append(
                Text.assemble(
                    (f"{cause_words(cause)}: ", "bold"),
                    f"{cause.text}. In {places}. ",
                    ("Cure: ", "bold"),
                    f"{cause.cure}.",
                )
            )
    return found


def worst_moment(scenario: Scenario) -> str:
    """Say when this scenario holds the most and what it holds then; when most layers are open."""
    peak, most = scenario.most_buffered, scenario.most_open
    share = 100 * peak.buffered_bytes / max(scenario.total_bytes, 1)
    lines = [
        f"{scenario.order}, {POLICY_WORDS[scenario.policy]}: {format_bytes(peak.buffered_bytes)} "
        f"buffered ({share:.0f}% of the model) at tensor {peak.index + 1:,} of "
        f"{len(scenario.metas):,} ({peak.name}). Held then:"
    ]
    lines += [
        f"  {shorten(layer, 60):<60} {format_bytes(size):>11}"
        for layer, size in peak.largest(SHOWN_LAYERS)
    ]
    if most.open_layers > peak.open_layers:
        lines.append(
            f"Most layers are open at tensor {most.index + 1:,} ({most.name}): {most.open_layers}."
        )
    return "\n".join(lines)
