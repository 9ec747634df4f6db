"""Tables of `qerl-sync bench transport` and `bench ray`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from qerl_sync.meta import format_bytes

if TYPE_CHECKING:
    from qerl_sync.bench.on_ray import RayMeasured
    from qerl_sync.bench.transport import Measured


def transport_tables(found: Measured) -> list[Table]:
    """Return tables of the measurements, and of the promised numbers."""
    ratios = _table("Seconds over seconds, medians of the rounds' ratios", "", "ratio")
    for name, ratio in found.ratios.items():
        if not name.endswith(("alone / memcpy", "alone / TCP")):
            ratios.add_row(name, f"{ratio:.2f}")
    memory = _table("What the worker took on top", "", "predicted", "measured")
    for kind, used in found.memory.items():
        memory.add_row(kind, format_bytes(used["predicted"]), format_bytes(used["measured"]))
    return [_seconds(found), ratios, memory, _targets(found)]


def ray_tables(found: RayMeasured) -> list[Table]:
    """Return the tables of `qerl-sync bench ray`."""
    return [_seconds(found), _targets(found)]


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _seconds(found: Measured | RayMeasured) -> Table:
    table = _table(f"{format_bytes(found.nbytes)}, medians of {found.rounds}", "", "ms", "GB/s")
    for name, seconds in found.seconds.items():
        table.add_row(name, f"{1000 * seconds:.0f}", f"{found.nbytes / seconds / 1e9:.2f}")
    return table


def _targets(found: Measured | RayMeasured) -> Table:
    table = _table("Targets", "", "found", "target", "")
    for target in found.targets:
        sign = "≤" if target.at_most else "≥"
        verdict = "met" if target.met else "[red]missed[/red]"
        table.add_row(target.name, f"{target.value:.3g}", f"{sign} {target.limit:g}", verdict)
    return table
