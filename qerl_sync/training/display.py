"""What a person sees while a run goes on: phases with their times, and progress bars."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Without a terminal (a log file, CI) no bar moves: a line is written this many times instead.
LINES_WITHOUT_TERMINAL = 10


class Steps:
    """The steps of one training, as a bar on a terminal and as lines elsewhere."""

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
        """`done` of `total` steps are done."""
        self._progress.update(self._task, completed=done, total=total)

    def note(self, done: int, total: int, text: str) -> None:
        """`text` says how it goes after `done` steps."""
        self._progress.update(self._task, note=text)
        due = done == total or done >= self._last_line + total / LINES_WITHOUT_TERMINAL
        if due and done > self._last_line and not self._console.is_terminal:
            self._console.print(f"  {self._what} {done}/{total} {text}", highlight=False)
            self._last_line = done

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text)


class Display:
    """The phases of a run on `console`."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def phase(self, doing: str, done: str) -> Iterator[None]:
        """A spinner while it lasts, and a line with its duration when it succeeded."""
        start = time.perf_counter()
        with self.console.status(f"{doing} ..."):
            yield
        self._finished(done, start)

    @contextmanager
    def steps(self, what: str, done: str) -> Iterator[Steps]:
        """A progress bar while it lasts, and a line with its duration when it succeeded."""
        start = time.perf_counter()
        steps = Steps(self.console, what)
        with steps._progress:
            yield steps
        self._finished(done, start)

    def _finished(self, done: str, start: float) -> None:
        seconds = time.perf_counter() - start
        self.console.print(f"[green]✓[/] {done} [dim]{seconds:.1f} s[/]", highlight=False)
