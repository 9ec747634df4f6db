"""`qerl-sync plan --png`: buffered and pinned bytes along the stream, a panel for each order."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from qerl_sync.cli.plan.scenarios import Scenario
from qerl_sync.cli.plan.series import (
    POLICY_WORDS,
    Bucket,
    buckets,
    by_order,
    everywhere,
    highest,
    shorten,
    staged_words,
    unit_of,
)
from qerl_sync.errors import ConfigError
from qerl_sync.meta import format_bytes
from qerl_sync.report.plots import GREY, INK, STYLE

MUTED, RED = "#66717e", "#b4232f"
COLORS = {
    "as_given": "#d9622b",
    "by_parent_layer": "#2563eb",
    "within_budget": "#0f8a6a",
    "spill": "#7c3aed",
}
COLUMNS, PANEL_INCHES, HEAD_INCHES, BAR_INCHES = 2, (6.2, 2.6), 1.1, 0.21
SUBTITLE_WIDTH, LINE_INCHES = 175, 0.17
BUCKETS = 500
LABELLED_LAYERS, LABEL_WIDTH = 3, 44
STAGED_HATCH = "////"
HEADROOM = 1.5  # of a panel's height, so that the labels stand above the stream


def plot_plan(
    scenarios: Sequence[Scenario],
    *,
    title: str,
    subtitle: str = "",
    budget_bytes: int | None = None,
) -> bytes:
    """Return a PNG: all peaks on one scale, then a panel for each order on a scale of its own.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    orders = by_order(scenarios)
    with matplotlib.rc_context({**STYLE, "figure.constrained_layout.use": False}):
        subtitle = textwrap.fill(subtitle, SUBTITLE_WIDTH)
        head = HEAD_INCHES + LINE_INCHES * subtitle.count("\n")
        figure, overview, panels = _figure(len(orders), len(scenarios) + len(orders), head)
        _draw_peaks(overview, orders, budget_bytes)
        for axes, (order, group) in zip(panels, orders.items(), strict=True):
            _draw_order(axes, order, group, budget_bytes)
        _write_head(figure, scenarios, title, subtitle, budget_bytes)
        picture = io.BytesIO()  # given a path, matplotlib goes by its ending: another file, format
        figure.savefig(picture, format="png")
    return picture.getvalue()


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as exc:
        raise ConfigError(
            "matplotlib is not installed, so no picture can be drawn; pip install matplotlib"
        ) from exc
    return matplotlib


def _figure(orders: int, bars: int, head: float) -> tuple[Any, Any, list[Any]]:
    """The figure, the axes of the overview, and those of the panels. All places are in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, orders)
    rows = math.ceil(orders / columns)
    overview_inches = BAR_INCHES * bars + 0.3
    width = PANEL_INCHES[0] * COLUMNS
    height = head + overview_inches + 0.75 + PANEL_INCHES[1] * rows
    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)

    def axes_at(left: float, top: float, wide: float, high: float) -> Any:
        return figure.add_axes(
            (left / width, 1 - (top + high) / height, wide / width, high / height)
        )

    overview = axes_at(2.5, head + 0.1, width - 3.4, overview_inches - 0.1)
    wide = (PANEL_INCHES[0] if columns > 1 else width) - 1.0
    below = head + overview_inches + 0.75
    panels = [
        axes_at(
            0.75 + PANEL_INCHES[0] * (place % columns),
            below + 0.45 + PANEL_INCHES[1] * (place // columns),
            wide,
            PANEL_INCHES[1] - 0.95,
        )
        for place in range(orders)
    ]
    return figure, overview, panels


def _draw_peaks(
    axes: Any, orders: Mapping[str, Sequence[Scenario]], budget_bytes: int | None
) -> None:
    """A bar for the peak of each scenario; what is pinned beyond it is drawn in outline, and what
    waits in host memory hatched beside it."""
    everything = [scenario for group in orders.values() for scenario in group]
    top = max(*map(everywhere, everything), budget_bytes or 0)
    scale, unit = unit_of(top)
    y = 0.0
    ticks = []
    for order, group in orders.items():
        ticks.append((y + (len(group) - 1) / 2, shorten(order, 26)))
        for scenario in group:
            color = COLORS.get(scenario.policy, INK)
            buffered, pinned = scenario.peak_buffered_bytes, scenario.peak_pinned_bytes
            axes.barh(y, buffered / scale, height=0.8, color=color, alpha=0.85)
            if pinned > buffered:
                axes.barh(
                    y,
                    (pinned - buffered) / scale,
                    left=buffered / scale,
                    height=0.74,
                    facecolor="none",
                    edgecolor=color,
                    linewidth=0.9,
                    linestyle=(0, (1, 1.2)),
                )
            if scenario.peak_staged_bytes:
                axes.barh(
                    y,
                    scenario.peak_staged_bytes / scale,
                    left=max(buffered, pinned) / scale,
                    height=0.74,
                    facecolor="none",
                    edgecolor=color,
                    linewidth=0.7,
                    hatch=STAGED_HATCH,
                )
            axes.annotate(
                _peak_words(scenario),
                (everywhere(scenario) / scale, y),
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
        axes.axvline(budget_bytes / scale, color=RED, linewidth=1.2, linestyle=(0, (5, 3)))
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.set_ylim(y - 1.4, -0.6)
    axes.set_xlim(0, (1.35 if any(s.peak_staged_bytes for s in everything) else 1.25) * top / scale)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelsize=10)
    axes.tick_params(axis="x", labelsize=8.5, length=3, color=GREY)
    axes.set_xlabel(f"peak [{unit}]", fontsize=9)


def _peak_words(scenario: Scenario) -> str:
    buffered, pinned = scenario.peak_buffered_bytes, scenario.peak_pinned_bytes
    pins = f", pins {format_bytes(pinned)}" if pinned > buffered else ""
    return (
        f"{format_bytes(buffered)}{pins}, {scenario.max_open_layers} open{staged_words(scenario)}"
    )


def _draw_order(axes: Any, order: str, group: Sequence[Scenario], budget_bytes: int | None) -> None:
    """The stream under each policy. The budget is drawn where it is not far above everything."""
    top = highest(group)
    scale, unit = unit_of(top)
    for scenario in group:
        _draw_stream(axes, scenario, scale)
    if budget_bytes is not None and budget_bytes < HEADROOM * top:
        axes.axhline(budget_bytes / scale, color=RED, linewidth=1.2, linestyle=(0, (5, 3)))
    worst = max(group, key=lambda scenario: scenario.peak_buffered_bytes)
    _label_contributors(axes, worst, scale)
    axes.set_ylim(0, HEADROOM * top / scale)
    axes.set_xlim(1, max(len(worst.metas), 2))
    axes.set_title(shorten(order, 60), fontweight="bold", color=INK, fontsize=11)
    axes.set_ylabel(f"held [{unit}]", fontsize=9)
    axes.set_xlabel("tensors handed over", fontsize=9)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.tick_params(labelsize=8.5, length=3, color=GREY)


def _draw_stream(axes: Any, scenario: Scenario, scale: float) -> None:
    parts = buckets(scenario, BUCKETS)
    color = COLORS.get(scenario.policy, INK)
    at = [part.first + 1 for part in parts] + [parts[-1].last + 1]
    low, high, pinned = (
        [getattr(part, field) / scale for part in [*parts, parts[-1]]]
        for field in ("low_bytes", "high_bytes", "pinned_bytes")
    )
    axes.fill_between(at, high, step="post", color=color, alpha=0.16, linewidth=0)
    axes.fill_between(at, low, high, step="post", color=color, alpha=0.55, linewidth=0)
    axes.step(at, high, where="post", color=color, linewidth=1.1)
    if _pins_more(parts):
        axes.step(at, pinned, where="post", color=color, linewidth=1.0, linestyle=(0, (1, 1.2)))


def _pins_more(parts: Sequence[Bucket]) -> bool:
    return any(part.pinned_bytes > part.high_bytes for part in parts)


def _label_contributors(axes: Any, scenario: Scenario, scale: float) -> None:
    """The largest layers at the highest point, beside it, on the side where there is room."""
    peak = scenario.most_buffered
    lines = [
        f"{shorten(layer, LABEL_WIDTH)}  {format_bytes(held)}"
        for layer, held in peak.held[:LABELLED_LAYERS]
    ]
    more = len(peak.held) - LABELLED_LAYERS
    if more > 0:
        rest = sum(held for _, held in peak.held[LABELLED_LAYERS:])
        lines.append(f"and {more} more: {format_bytes(rest)}")
    x, y = peak.index + 1, peak.buffered_bytes / scale
    on_the_right = x < len(scenario.metas) / 2
    axes.plot([x], [y], marker="o", markersize=3.5, color=INK, clip_on=False, zorder=5)
    axes.annotate(
        "\n".join(lines),
        (x, y),
        xycoords="data",
        xytext=(min(x / len(scenario.metas) + 0.03, 0.5) if on_the_right else 0.02, 0.97),
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


def _write_head(
    figure: Any,
    scenarios: Sequence[Scenario],
    title: str,
    subtitle: str,
    budget_bytes: int | None,
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    width, height = figure.get_size_inches()
    left = 0.25 / width
    figure.text(left, 1 - 0.36 / height, title, fontsize=15, fontweight="bold", color=INK)
    more = LINE_INCHES * subtitle.count("\n")
    figure.text(left, 1 - (0.63 + more) / height, subtitle, fontsize=9.5, color=MUTED)
    policies = dict.fromkeys(scenario.policy for scenario in scenarios)
    handles: list[Any] = [
        Patch(color=COLORS.get(policy, INK), alpha=0.75, label=POLICY_WORDS.get(policy, policy))
        for policy in policies
    ]
    if any(s.peak_pinned_bytes > s.peak_buffered_bytes for s in scenarios):
        handles.append(Line2D([], [], color=MUTED, linestyle=(0, (1, 1.2)), label="pinned"))
    if any(s.peak_staged_bytes for s in scenarios):
        label = "staged in host memory"
        handles.append(Patch(facecolor="none", edgecolor=MUTED, hatch=STAGED_HATCH, label=label))
    if budget_bytes is not None:
        label = f"budget {format_bytes(budget_bytes)} (pinned)"
        handles.append(Line2D([], [], color=RED, linestyle=(0, (5, 3)), label=label))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(left - 0.1 / width, 1 - (0.68 + more) / height),
        ncols=len(handles),
        fontsize=9.5,
        frameon=False,
        handlelength=1.6,
        columnspacing=1.6,
    )
