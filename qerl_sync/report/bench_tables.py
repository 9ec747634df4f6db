"""Tables of `qerl-sync bench transport`, `bench ray` and `bench compare`."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from qerl_sync.meta import format_bytes
from qerl_sync.report.tables import titled_table

if TYPE_CHECKING:
    from pathlib import Path

    from qerl_sync.bench.compare import Compared
    from qerl_sync.bench.on_ray import RayMeasured
    from qerl_sync.bench.transport import Measured, Results


def transport_tables(found: Measured) -> list[Table]:
    """Return the tables of `qerl-sync bench transport`."""
    ratios = titled_table("Seconds over seconds, medians of the rounds' ratios", "", "ratio")
    for name, ratio in found.ratios.items():
        if " alone / " not in name:  # ratios of bandwidth, shown among the targets
            ratios.add_row(name, f"{ratio:.2f}")
    memory = titled_table("What the worker took on top", "", "predicted", "measured")
    for kind, used in found.memory.items():
        memory.add_row(kind, format_bytes(used["predicted"]), format_bytes(used["measured"]))
    return [_seconds(found), ratios, memory, _targets(found)]


def ray_tables(found: RayMeasured) -> list[Table]:
    """Return the tables of `qerl-sync bench ray`."""
    return [_seconds(found), _targets(found)]


def compare_tables(found: Compared) -> list[Table]:
    """Return the tables of `qerl-sync bench compare`."""
    title = f"{format_bytes(found.nbytes)}, {found.kernels} kernels, medians of {found.rounds}"
    table = titled_table(title, "", "ms", "x memcpy", "weights afterwards")
    table.columns[-1].justify = "left"  # text
    for engine, rows in groupby(found.rows, lambda row: row.engine):
        table.add_section()
        table.add_row(f"[bold]{engine}[/bold]")
        for row in rows:
            milliseconds, ratio, _, finding = found.cells(row)
            style = "red" if row.wrong else ""
            table.add_row(row.way, milliseconds, ratio, Text(finding, style))
    return [table, *([_targets(found)] if found.targets else [])]


def draw_comparison(found: Compared, path: Path) -> None:
    """Draw a bar for each way: its seconds, divided by those of a memcpy of the same bytes."""
    from qerl_sync.report.plots import BLUE, GREY, INK, ORANGE, drawing

    measured = (row for row in found.rows if f"{row.name} / memcpy" in found.ratios)
    rows = [row for row in measured if row.way != "memcpy"]
    with drawing(path, 1, (9.5, 0.7 + 0.36 * len(rows))) as (axes,):
        places = range(len(rows), 0, -1)
        ratios = [found.ratios[f"{row.name} / memcpy"] for row in rows]
        colors = [BLUE if row.way.startswith("qerl-sync") else GREY for row in rows]
        axes.barh(places, ratios, color=colors, height=0.7)
        for place, ratio, row in zip(places, ratios, rows, strict=True):
            text = f" {ratio:.1f}{'  wrong weights' * bool(row.wrong)}"
            axes.text(ratio, place, text, va="center", color=ORANGE if row.wrong else INK)
        axes.set_yticks(places, [f"{row.way}\n({row.engine})" for row in rows], fontsize=7)
        axes.grid(visible=False, axis="y")
        axes.margins(y=0.01)
        axes.set_xlim(right=max(ratios) * 1.25)
        axes.set_xlabel("times the seconds of a memcpy of the same bytes")
        title = f"{format_bytes(found.nbytes)} to a vLLM engine with {found.kernels} kernels"
        axes.set_title(title, loc="left")


def _seconds(found: Results) -> Table:
    title = f"{format_bytes(found.nbytes)}, medians of {found.rounds}"
    table = titled_table(title, "", "ms", "GB/s")
    for name, seconds in found.seconds.items():
        moves = not name.startswith(("kill to", "verify"))
        speed = f"{found.nbytes / seconds / 1e9:.2f}" if moves else ""
        table.add_row(name, f"{1000 * seconds:.0f}", speed)
    return table


def _targets(found: Results) -> Table:
    table = titled_table("Targets", "", "found", "target", "")
    for target in found.targets:
        sign = "≤" if target.at_most else "≥"
        verdict = "met" if target.met else "[red]missed[/red]"
        table.add_row(target.name, f"{target.value:.3g}", f"{sign} {target.limit:g}", verdict)
    return table
