"""Plots as PNG files. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import ConfigError

if TYPE_CHECKING:
    from qerl_sync.plan.sync_plan import SyncPlan

INK, GREY, BLUE, ORANGE = "#1f2933", "#9aa5b1", "#2563eb", "#d9622b"
COLORS = (BLUE, ORANGE, "#0f8a5f", "#7c3aed")
MOVING_MEAN_STEPS = 10
STYLE = {
    "font.size": 11,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def plot_rewards(rewards: Sequence[tuple[int, float]], path: Path) -> None:
    """Plot (step, reward) and its moving mean over `MOVING_MEAN_STEPS` logged steps."""
    steps, values = finite_curve(rewards)
    means = moving_mean(values, MOVING_MEAN_STEPS)
    with drawing(path, 1, (8, 4.2)) as (axes,):
        axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=1, label="each logged step")
        label = f"mean of the last {MOVING_MEAN_STEPS}"
        axes.plot(steps, means, color=BLUE, linewidth=2.4, label=label)
        if means:
            axes.annotate(
                f"{means[-1]:.2f}",
                (steps[-1], means[-1]),
                xytext=(6, 0),
                textcoords="offset points",
                color=BLUE,
                fontweight="bold",
                verticalalignment="center",
            )
        axes.set(xlabel="step", ylabel="mean reward", title="Reward")
        axes.set_ylim(bottom=min([0, *values]))
        axes.legend(loc="best")


def plot_learning(curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]], path: Path) -> None:
    """Plot the reward of several runs of each variant: a line each, and the mean over its runs.

    Args:
        curves: by variant, the (step, reward) of each of its runs; all have the same steps.
    """
    with drawing(path, 1, (8, 4.2)) as (axes,):
        for color, (name, runs) in zip(cycle(COLORS), curves.items(), strict=False):
            steps = [step for step, _ in runs[0]]
            smooth = [moving_mean([r for _, r in run], MOVING_MEAN_STEPS) for run in runs]
            for means in smooth:
                axes.plot(steps[: len(means)], means, color=color, alpha=0.3, linewidth=0.9)
            mean = [fmean(values) for values in zip(*smooth, strict=False)]
            label = f"{name or 'mean'} ({len(runs)} seed{'s' * (len(runs) != 1)})"
            axes.plot(steps[: len(mean)], mean, color=color, linewidth=2.2, label=label)
        axes.set(xlabel="step", ylabel="mean reward")
        axes.set_title(f"Reward, mean of the last {MOVING_MEAN_STEPS} steps")
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right")


def finite_curve(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Return the steps and values of a curve without NaN and infinite ones, which no axis has."""
    finite = [(step, value) for step, value in points if isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of the last `window` values at each position, of fewer at the start."""
    return [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def plot_buffers(plan: SyncPlan, measured: Trace, path: Path) -> None:
    """Plot buffered bytes over the stream: the source's order beside the plan, on one scale.

    Args:
        measured: the trace of a sync that ran this plan.
    """
    given, planned = plan.as_given, plan.predicted
    scale, unit = unit_of(max(given.peak_buffered_bytes, measured.peak_buffered_bytes))
    with drawing(path, 2, (11, 4.2)) as (left, right):
        for axes, name, trace, color, shown in (
            (left, "Source order", given, ORANGE, given),
            (right, f"Plan ({plan.policy})", planned, BLUE, measured),
        ):
            positions = range(1, len(trace.steps) + 1)
            heights = [step.buffered_bytes / scale for step in trace.steps]
            axes.fill_between(positions, heights, step="mid", color=color, alpha=0.18, linewidth=0)
            axes.step(
                positions, heights, where="mid", color=color, linewidth=1.6, label="predicted"
            )
            peak, most = shown.peak_buffered_bytes / scale, shown.max_open_layers
            title = f"{name}: peak {peak:.3g} {unit}, {most} open layer{'s' * (most != 1)}"
            axes.set_title(title, color=color)
            axes.set_xlabel("tensors sent")
        right.plot(
            range(1, len(measured.steps) + 1),
            [step.buffered_bytes / scale for step in measured.steps],
            linestyle="none",
            marker="o",
            markersize=4 if len(measured.steps) < 150 else 1.5,
            color=INK,
            clip_on=False,
            label="measured",
        )
        left.set_ylabel(f"buffered in vLLM [{unit}]")
        # Both share one scale; there is room for the legends above the highest point.
        left.set_ylim(bottom=0, top=left.get_ylim()[1] * 1.12)
        left.legend(loc="upper left")
        right.legend(loc="upper left", ncols=2)


def unit_of(largest_bytes: int) -> tuple[float, str]:
    """Return the unit in which to draw up to `largest_bytes`: its bytes and its name."""
    for power, unit in ((3, "GiB"), (2, "MiB")):
        if largest_bytes >= 1024**power:
            return 1024.0**power, unit
    return 1024.0, "KiB"


def matplotlib_or_refusal() -> Any:
    """Import matplotlib. Raises ConfigError if it is not installed."""
    try:
        import matplotlib
    except ImportError as exc:
        raise ConfigError(
            "matplotlib is not installed, so no picture can be drawn; pip install matplotlib"
        ) from exc
    return matplotlib


@contextmanager
def drawing(path: Path, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """Yield axes side by side on one vertical scale; save them as a PNG at the end."""
    matplotlib = matplotlib_or_refusal()
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=150)
        yield figure.subplots(1, columns, squeeze=False, sharey=True)[0]
        figure.savefig(path)
