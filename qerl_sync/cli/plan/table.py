"""What `qerl-sync plan` shows in a terminal, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qerl_sync.cli.plan.scenarios import SPILL, Moment, Scenario
from qerl_sync.cli.plan.series import (
    POLICY_WORDS,
    SHORT_WORDS,
    buckets,
    by_order,
    cause_words,
    shorten,
)
from qerl_sync.meta import format_bytes
from qerl_sync.plan.diagnosis import Cause

BLOCKS = "▁▂▃▄▅▆▇█"
ORDER_WIDTH = 15
STREAM_WIDTHS = 24, 14, 5  # with so many columns more than usual
SHOWN_LAYERS = 5
OVER, WARN, CALM = "bold red", "yellow", "green"


def scenario_table(scenarios: Sequence[Scenario]) -> Table:
    """One line for each order and policy; pinned bytes above the budget stand out.

    The last column is the stream from its first tensor to its last: how many bytes are buffered, on
    one scale for all lines.
    """
    packed = any(scenario.receive is not scenario.trace for scenario in scenarios)
    staged = any(scenario.policy == SPILL for scenario in scenarios)
    width = STREAM_WIDTHS[packed + staged]
    more = [title for title, shown in (("receiving", packed), ("staged", staged)) if shown]
    top = max((scenario.peak_buffered_bytes for scenario in scenarios), default=0)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("order", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    for title in ("open", "buffered", "pinned", *more):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("" if packed and staged else f"█ = {format_bytes(top)}", no_wrap=True)
    for order, group in by_order(scenarios).items():
        for i, scenario in enumerate(group):
            over = OVER if scenario.within_budget is False else ""
            table.add_row(
                Text(shorten(order, ORDER_WIDTH)) if i == 0 else "",
                SHORT_WORDS.get(scenario.policy, scenario.policy),
                Text(
                    str(scenario.max_open_layers),
                    style=CALM if scenario.max_open_layers <= 1 else WARN,
                ),
                format_bytes(scenario.peak_buffered_bytes),
                Text(format_bytes(scenario.peak_pinned_bytes), style=over),
                *([format_bytes(scenario.peak_receive_bytes)] if packed else []),
                *([_staged(scenario)] if staged else []),
                Text(sparkline(scenario, top, width), style=_height_style(scenario, top)),
            )
    return table


def causes(scenarios: Sequence[Scenario]) -> RenderableType:
    """Each cause that applies somewhere: what it means, where, and what cures it."""
    lines = []
    for cause in Cause:
        where = by_order([scenario for scenario in scenarios if cause in scenario.causes])
        if where:
            places = ", ".join(f"{order} ({_policies(group)})" for order, group in where.items())
            lines.append(
                Text.assemble(
                    (f"{cause_words(cause)}: ", "bold"),
                    f"{cause.value}. In {places}. ",
                    ("Cure: ", "bold"),
                    f"{cause.cure}.",
                )
            )
    return Group(*lines)


def _policies(group: Sequence[Scenario]) -> str:
    return " and ".join(SHORT_WORDS.get(scenario.policy, scenario.policy) for scenario in group)


def sparkline(scenario: Scenario, top_bytes: int, width: int = STREAM_WIDTHS[0]) -> str:
    """The most buffered bytes in each stretch of the stream; a space where there are none."""
    return "".join(
        " " if not bucket.high_bytes else BLOCKS[_level(bucket.high_bytes, top_bytes)]
        for bucket in buckets(scenario, width)
    )


def worst_moment(scenario: Scenario) -> RenderableType:
    """When this scenario holds the most and what it holds then; when most layers are open."""
    text = moment_lines(scenario, scenario.most_buffered)
    most = scenario.most_open
    if most.open_layers > scenario.most_buffered.open_layers:
        text += (
            f"\nMost layers are open at tensor {most.index + 1:,} ({most.name}): "
            f"{most.open_layers}."
        )
    return Text(text)


def moment_lines(scenario: Scenario, moment: Moment) -> str:
    """What is held at a moment, the largest layers with their paths."""
    share = 100 * moment.buffered_bytes / max(scenario.total_bytes, 1)
    words = POLICY_WORDS.get(scenario.policy, scenario.policy)
    lines = [
        f"{scenario.order}, {words}: {format_bytes(moment.buffered_bytes)} buffered "
        f"({share:.0f}% of the model) at tensor {moment.index + 1:,} of "
        f"{len(scenario.metas):,} ({moment.name}). Held then:"
    ]
    lines += [
        f"  {shorten(layer, 60):<60} {format_bytes(held):>11}"
        for layer, held in moment.held[:SHOWN_LAYERS]
    ]
    rest = moment.held[SHOWN_LAYERS:]
    if rest:
        label = f"and {_plural(len(rest), 'more layer')}"
        lines.append(f"  {label:<60} {format_bytes(sum(held for _, held in rest)):>11}")
    return "\n".join(lines)


def _staged(scenario: Scenario) -> str:
    """In host memory, of which the budget does not speak."""
    return format_bytes(scenario.peak_staged_bytes) if scenario.policy == SPILL else ""


def _level(nbytes: int, top_bytes: int) -> int:
    return min(nbytes * len(BLOCKS) // max(top_bytes, 1), len(BLOCKS) - 1)


def _height_style(scenario: Scenario, top_bytes: int) -> str:
    share = scenario.peak_buffered_bytes / max(top_bytes, 1)
    return "red" if share > 0.5 else "yellow" if share > 0.1 else CALM


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
