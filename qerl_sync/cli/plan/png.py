"""`qerl-sync plan --png`: buffered and pinned bytes along the stream, a panel for each order."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

from qerl_sync.cli.plan.run import Outcome
from qerl_sync.cli.plan.scenarios import Scenario
from qerl_sync.cli.plan.series import POLICY_WORDS, by_order, device_peak, shorten, staged_words
from qerl_sync.meta import format_bytes
from qerl_sync.report.page import buckets
from qerl_sync.report.plots import GREY, INK, STYLE, matplotlib_or_refusal, unit_of

MUTED, RED = "#66717e", "#b4232f"
COLORS = {
    "warn": "#d9622b",
    "reorder": "#2563eb",
    "reorder_in_budget": "#0f8a6a",
    "spill": "#7c3aed",
}
DOTTED, DASHED, STAGED_HATCH = (0, (1, 1.2)), (0, (5, 3)), "////"
COLUMNS, SUBTITLE_CHARACTERS = 2, 175
WIDTH, HEAD_HEIGHT, PANEL_HEIGHT, BAR_HEIGHT = 12.4, 1.4, 2.6, 0.21  # in inches
BUCKETS = 500
LABELLED_LAYERS, LABEL_WIDTH = 3, 44
HEADROOM = 1.5  # of a panel's height, so that the labels stand above the stream


def plot_plan(outcome: Outcome) -> bytes:
    """Return a PNG: all peaks on one scale, then a panel for each order on a scale of its own.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    matplotlib = matplotlib_or_refusal()
    from matplotlib.figure import Figure

    orders = by_order(outcome.scenarios)
    columns = min(COLUMNS, len(orders))
    heights = [BAR_HEIGHT * (len(outcome.scenarios) + len(orders)) + 0.8]
    heights += [PANEL_HEIGHT] * math.ceil(len(orders) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEAD_HEIGHT + sum(heights)), dpi=150)
        grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
        peaks = figure.add_subplot(grid[0, :])
        _draw_peaks(peaks, outcome)
        size = f"{len(outcome.found.metas):,} tensors, {format_bytes(outcome.total_bytes)}"
        words = f"{size} in {outcome.dtypes}. {outcome.origin}"
        words = textwrap.fill(words, SUBTITLE_CHARACTERS)
        peaks.set_title(words, fontsize=9.5, color=MUTED)
        for number, (order, group) in enumerate(orders.items()):
            row, column = divmod(number, columns)
            axes = figure.add_subplot(grid[1 + row, column])
            _draw_order(axes, order, group, outcome.budget_bytes)
        _write_head(figure, outcome)
        picture = io.BytesIO()  # given a path, matplotlib goes by its ending: another file, format
        figure.savefig(picture, format="png")
    return picture.getvalue()


def _draw_peaks(axes: Any, outcome: Outcome) -> None:
    """Draw a bar for the peak of each scenario; what is pinned beyond it in outline, and what waits
    in host memory hatched beside it."""
    scenarios, budget_bytes = outcome.scenarios, outcome.budget_bytes
    top = max(*(device_peak(s) + s.peak_staged_bytes for s in scenarios), budget_bytes or 0)
    scale, unit = unit_of(top)
    y = 0
    ticks = {}
    for order, group in by_order(scenarios).items():
        ticks[y + (len(group) - 1) / 2] = shorten(order, 26)
        for scenario in group:
            color = COLORS[scenario.policy]
            buffered, pinned = scenario.peak_buffered_bytes, scenario.peak_pinned_bytes
            staged, on_device = scenario.peak_staged_bytes, device_peak(scenario)
            outlined = {"height": 0.74, "facecolor": "none", "edgecolor": color}
            axes.barh(y, buffered / scale, height=0.8, color=color, alpha=0.85)
            if pinned > buffered:
                beyond, left = (pinned - buffered) / scale, buffered / scale
                axes.barh(y, beyond, left=left, linewidth=0.9, linestyle=DOTTED, **outlined)
            if staged:
                left = on_device / scale
                axes.barh(
                    y, staged / scale, left=left, linewidth=0.7, hatch=STAGED_HATCH, **outlined
                )
            pins = f", pins {format_bytes(pinned)}" if pinned > buffered else ""
            axes.annotate(
                f"{format_bytes(buffered)}{pins}, {scenario.max_open_layers} open"
                f"{staged_words(scenario)}",
                ((on_device + staged) / scale, y),
                xytext=(5, 0),
                textcoords="offset points",
                verticalalignment="center",
                fontsize=8,
                color=INK,
                bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none"},
            )
            y += 1
        y += 1
    if budget_bytes is not None:
        axes.axvline(budget_bytes / scale, color=RED, linewidth=1.2, linestyle=DASHED)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(y - 1.4, -0.6)
    # The labels stand behind the bars; those with staged bytes are the longest.
    axes.set_xlim(0, (1.35 if any(s.peak_staged_bytes for s in scenarios) else 1.25) * top / scale)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelsize=10)
    axes.tick_params(axis="x", labelsize=8.5, length=3, color=GREY)
    axes.set_xlabel(f"peak [{unit}]", fontsize=9)


def _draw_order(axes: Any, order: str, group: Sequence[Scenario], budget_bytes: int | None) -> None:
    """Draw the stream under each policy, and label the largest layers at the highest point."""
    top = device_peak(*group)
    scale, unit = unit_of(top)
    for scenario in group:
        parts, color = buckets(scenario.trace, BUCKETS), COLORS[scenario.policy]
        at = [part.first + 1 for part in parts] + [parts[-1].last + 1]
        low, high, pinned = (
            [getattr(part, field) / scale for part in [*parts, parts[-1]]]
            for field in ("low_bytes", "high_bytes", "pinned_bytes")
        )
        axes.fill_between(at, high, step="post", color=color, alpha=0.16, linewidth=0)
        axes.fill_between(at, low, high, step="post", color=color, alpha=0.55, linewidth=0)
        axes.step(at, high, where="post", color=color, linewidth=1.1)
        if any(part.pinned_bytes > part.high_bytes for part in parts):
            axes.step(at, pinned, where="post", color=color, linewidth=1.0, linestyle=DOTTED)
    if budget_bytes is not None and budget_bytes < HEADROOM * top:  # else far above everything
        axes.axhline(budget_bytes / scale, color=RED, linewidth=1.2, linestyle=DASHED)
    worst = max(group, key=lambda scenario: scenario.peak_buffered_bytes)
    count, peak = len(worst.metas), worst.most_buffered
    lines = [
        f"{shorten(layer, LABEL_WIDTH)}  {format_bytes(held)}"
        for layer, held in peak.largest(LABELLED_LAYERS)
    ]
    x, y = peak.index + 1, peak.buffered_bytes / scale
    axes.plot([x], [y], marker="o", markersize=3.5, color=INK, clip_on=False, zorder=5)
    axes.annotate(
        "\n".join(lines),
        (x, y),
        xycoords="data",
        # Beside the point, on the side where there is room.
        xytext=(min(x / count + 0.03, 0.5) if x < count / 2 else 0.02, 0.97),
        textcoords="axes fraction",
        horizontalalignment="left",
        verticalalignment="top",
        fontsize=7.5,
        linespacing=1.35,
        color=INK,
        bbox={"boxstyle": "round,pad=0.35", "fc": "white", "ec": "#d5dae0", "alpha": 0.92},
        arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.8},
        zorder=6,
    )
    axes.set_ylim(0, HEADROOM * top / scale)
    axes.set_xlim(1, max(count, 2))
    axes.set_title(shorten(order, 60), fontweight="bold", color=INK, fontsize=11)
    axes.set_ylabel(f"held [{unit}]", fontsize=9)
    axes.set_xlabel("tensors handed over", fontsize=9)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.tick_params(labelsize=8.5, length=3, color=GREY)


def _write_head(figure: Any, outcome: Outcome) -> None:
    """Write the title and the legend."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    scenarios = outcome.scenarios
    handles: list[Any] = [
        Patch(color=COLORS[policy], alpha=0.75, label=POLICY_WORDS[policy])
        for policy in dict.fromkeys(scenario.policy for scenario in scenarios)
    ]
    if any(s.peak_pinned_bytes > s.peak_buffered_bytes for s in scenarios):
        handles.append(Line2D([], [], color=MUTED, linestyle=DOTTED, label="pinned"))
    if any(s.peak_staged_bytes for s in scenarios):
        label = "staged in host memory"
        handles.append(Patch(facecolor="none", edgecolor=MUTED, hatch=STAGED_HATCH, label=label))
    if outcome.budget_bytes is not None:
        label = f"budget {format_bytes(outcome.budget_bytes)} (pinned)"
        handles.append(Line2D([], [], color=RED, linestyle=DASHED, label=label))
    figure.legend(
        handles=handles,
        title=outcome.asked.name,
        title_fontproperties={"size": 15, "weight": "bold"},
        alignment="left",
        loc="outside upper left",
        ncols=len(handles),
        fontsize=9.5,
        handlelength=1.6,
        columnspacing=1.6,
    )
