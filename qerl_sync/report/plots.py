"""Plots as PNG files. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import ConfigError

if TYPE_CHECKING:
    from qerl_sync.plan.sync_plan import SyncPlan

INK, GREY, BLUE, ORANGE = "#1f2933", "#9aa5b1", "#2563eb", "#d9622b"
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
    steps = [step for step, _ in rewards]
    values = [reward for _, reward in rewards]
    means = moving_mean(values, MOVING_MEAN_STEPS)
    with _drawing(path, 1, (8, 4.2)) as (axes,):
        axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=1, label="each logged step")
        label = f"mean of the last {MOVING_MEAN_STEPS}"
        axes.plot(steps, means, color=BLUE, linewidth=2.4, label=label)
        if means:
            _mark_end(axes, steps[-1], means[-1])
        axes.set(xlabel="step", ylabel="mean reward", title="Reward")
        axes.set_ylim(bottom=min(0, *values, 0))
        axes.legend(loc="best")


def _mark_end(axes: Any, x: float, y: float) -> None:
    axes.annotate(
        f"{y:.2f}",
        (x, y),
        xytext=(6, 0),
        textcoords="offset points",
        color=BLUE,
        fontweight="bold",
        verticalalignment="center",
    )


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of the last `window` values at each position, of fewer at the start."""
    return [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def plot_buffers(plan: SyncPlan, measured: Trace, path: Path) -> None:
    """Plot buffered bytes over the stream: the source's order beside the plan, on one scale.

    Args:
        measured: the trace of a sync that ran this plan.
    """
    scale, unit = _unit(max(plan.as_given.peak_buffered_bytes, measured.peak_buffered_bytes))
    with _drawing(path, 2, (11, 4.2)) as (left, right):
        _draw_trace(left, plan.as_given, scale, ORANGE)
        left.set_title(_title("Source order", plan.as_given, scale, unit), color=ORANGE)
        left.set_ylabel(f"buffered in vLLM [{unit}]")
        _draw_trace(right, plan.predicted, scale, BLUE)
        _draw_points(right, measured, scale)
        right.set_title(_title(f"Plan ({plan.policy})", measured, scale, unit), color=BLUE)
        # The scales are one; there is room for the legends above the highest point.
        left.set_ylim(bottom=0, top=left.get_ylim()[1] * 1.12)
        for axes in (left, right):
            axes.set_xlabel("tensors sent")
            axes.legend(loc="upper left", ncols=2)


def _draw_trace(axes: Any, trace: Trace, scale: float, color: str) -> None:
    positions = range(1, len(trace.steps) + 1)
    heights = [step.buffered_bytes / scale for step in trace.steps]
    axes.fill_between(positions, heights, step="mid", color=color, alpha=0.18, linewidth=0)
    axes.step(positions, heights, where="mid", color=color, linewidth=1.6, label="predicted")


def _draw_points(axes: Any, trace: Trace, scale: float) -> None:
    axes.plot(
        range(1, len(trace.steps) + 1),
        [step.buffered_bytes / scale for step in trace.steps],
        linestyle="none",
        marker="o",
        markersize=4 if len(trace.steps) < 150 else 1.5,
        color=INK,
        clip_on=False,
        label="measured",
    )


def _title(name: str, trace: Trace, scale: float, unit: str) -> str:
    count = trace.max_open_layers
    layers = f"{count} open layer{'s' if count != 1 else ''}"
    return f"{name}: peak {trace.peak_buffered_bytes / scale:.3g} {unit}, {layers}"


def _unit(largest_bytes: int) -> tuple[float, str]:
    for power, unit in ((3, "GiB"), (2, "MiB")):
        if largest_bytes >= 1024**power:
            return 1024.0**power, unit
    return 1024.0, "KiB"


@contextmanager
def _drawing(path: Path, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """Yield axes side by side on one vertical scale; save them as a PNG at the end."""
    try:
        import matplotlib
    except ImportError as exc:
        raise ConfigError(
            "matplotlib is not installed, so no plot can be drawn; pip install matplotlib"
        ) from exc
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=150)
        FigureCanvasAgg(figure)
        yield figure.subplots(1, columns, squeeze=False, sharey=True)[0]
        figure.savefig(path)
