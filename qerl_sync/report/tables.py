"""Tables for the terminal, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from qerl_sync.meta import format_bytes
from qerl_sync.report.summary import WINDOW, Summary

if TYPE_CHECKING:
    from qerl_sync.training.trials import Trial

NOT_MEASURED = "not measured"


def titled_table(title: str, *columns: str) -> Table:
    """Return a table with these columns, all but the first for numbers."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def summary_table(summary: Summary) -> Table:
    """Return the table at the end of a run: rewards, and the syncs' predicted and measured cost."""
    exact = "[green]exact[/]" if summary.prediction_exact else "[red]differs (see syncs.jsonl)[/]"
    table = titled_table("Run", "", "predicted", "measured")
    for row in (
        (f"reward, first {WINDOW} logged steps", "", _number(summary.reward_first, ".3f")),
        (f"reward, last {WINDOW} logged steps", "", _number(summary.reward_last, ".3f")),
        ("largest logprob gap, trainer to vLLM", "", _number(summary.logprob_gap_max, ".1e")),
        ("steps", "", str(summary.num_steps)),
        ("wall time", "", f"{summary.wall_seconds:.0f} s"),
        ("", "", ""),
        ("syncs", "", str(summary.num_syncs)),
        ("transport", "", summary.transport.partition(":")[0]),
        ("bytes sent", "", format_bytes(summary.sent_bytes)),
        ("sync share of the step time", "", _number(summary.sync_time_share, ".1%")),
        (
            "peak buffered",
            format_bytes(summary.peak_buffered_bytes_predicted),
            format_bytes(summary.peak_buffered_bytes_measured),
        ),
        (
            "peak pinned",
            format_bytes(summary.peak_pinned_bytes_predicted),
            format_bytes(summary.peak_pinned_bytes_measured),
        ),
        (
            "open layers, at most",
            str(summary.max_open_layers_predicted),
            str(summary.max_open_layers),
        ),
        ("prediction, tensor by tensor", "", exact if summary.num_syncs else NOT_MEASURED),
    ):
        table.add_row(*row)
    return table


def _number(value: float | None, form: str) -> str:
    return NOT_MEASURED if value is None else format(value, form)


def trials_table(trials: Sequence[Trial], missed: Sequence[Sequence[str]] | None) -> Table:
    """Return a table of several runs, each with the targets that it missed (None: it had none)."""
    table = titled_table("Seeds")
    several = len({trial.variant for trial in trials}) > 1
    if several:
        table.add_column("variant")
    for name in ("seed", "first", "last", "seconds", "sync share", "logprob gap"):
        table.add_column(name, justify="right")
    if missed is not None:
        table.add_column("targets")
    for place, trial in enumerate(trials):
        run = trial.summary
        cells = [
            str(trial.seed),
            _number(run.reward_first, ".3f"),
            _number(run.reward_last, ".3f"),
            f"{run.wall_seconds:.0f}",
            _number(run.sync_time_share, ".1%"),
            _number(run.logprob_gap_max, ".1e"),
        ]
        if missed is not None:
            those = "; ".join(missed[place])
            cells.append(f"[red]missed: {those}[/]" if those else "[green]reached[/]")
        table.add_row(*[escape(trial.variant)] * several, *cells)
    return table
