"""Show a run's progress: phases with their times, and progress bars."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status

# Without a terminal (a log file, CI) no bar moves: a line is written this many times instead.
LINES_WITHOUT_TERMINAL = 10
SECONDS_BETWEEN_LINES = 10.0
STOPPING = "[yellow]stopping after this step[/] (Ctrl-C again: at once)"


class Steps:
    """Show the steps of one training, as a bar on a terminal and as lines elsewhere."""

    def __init__(self, console: Console, what: str) -> None:
        self._console = console
        self._what = what
        self._last_line = 0
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(what, total=None, note="")

    def advance(self, done: int, total: int) -> None:
        """Show that `done` of `total` steps are done."""
        self._progress.update(self._task, completed=done, total=total)

    def note(self, done: int, total: int, text: str) -> None:
        """Show `text`, the progress after `done` steps."""
        self._progress.update(self._task, note=text)
        due = done == total or done >= self._last_line + total / LINES_WITHOUT_TERMINAL
        if due and done > self._last_line and not self._console.is_terminal:
            self._console.print(f"  {self._what} {done}/{total} {text}", highlight=False)
            self._last_line = done


class Phase:
    """Show one phase that takes time.

    A terminal shows the current activity behind the spinner; other outputs get a line now and then.
    """

    def __init__(self, console: Console, status: Status, doing: str) -> None:
        self._console = console
        self._status = status
        self._doing = doing
        self._next_line_seconds = SECONDS_BETWEEN_LINES

    def progress(self, seconds: float, text: str) -> None:
        """Show `text`, the activity after so many seconds."""
        room = max(0, self._console.width - len(self._doing) - 20)
        line = f"{self._doing} ... {seconds:.0f} s [dim]{escape(text[:room])}[/]"
        self._status.update(line)
        if not self._console.is_terminal and seconds >= self._next_line_seconds:
            self._console.print(f"  {line}", highlight=False)
            self._next_line_seconds = seconds + SECONDS_BETWEEN_LINES


class Display:
    """Show the phases of a run on `console`.

    Args:
        asked_to_stop: return whether a remote viewer asked the run to stop. Called after each step.
    """

    def __init__(self, console: Console, asked_to_stop: Callable[[], bool] = lambda: False) -> None:
        self.console = console
        self.asked_to_stop = asked_to_stop

    @contextmanager
    def phase(self, doing: str, done: str) -> Iterator[Phase]:
        """Show a spinner in this context, and a line with its duration if it succeeded."""
        start = time.perf_counter()
        with self.console.status(f"{doing} ...") as status:
            yield Phase(self.console, status, doing)
        self._finished(done, start)

    @contextmanager
    def steps(self, what: str, done: str) -> Iterator[Steps]:
        """Show a progress bar in this context, and a line with its duration if it succeeded."""
        start = time.perf_counter()
        steps = Steps(self.console, what)
        with steps._progress:
            yield steps
        self._finished(done, start)

    def _finished(self, done: str, start: float) -> None:
        seconds = time.perf_counter() - start
        self.console.print(f"[green]✓[/] {done} [dim]{seconds:.1f} s[/]", highlight=False)
