"""Progress of a long command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape


@contextmanager
def telling(console: Console) -> Iterator[Callable[[str], None]]:
    """Return a function that shows the current activity.

    On a terminal it updates one line; elsewhere (a file, a CI log) it prints a line each time.
    """
    if not console.is_terminal:
        yield lambda text: console.print(text, markup=False, highlight=False)
        return
    with console.status("") as status:
        yield lambda text: status.update(escape(text))
