"""What a long command is doing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape


@contextmanager
def telling(console: Console) -> Iterator[Callable[[str], None]]:
    """A function to be told what is being done: one line that changes, or where nobody watches (a
    file, a CI's log) a line each time."""
    if not console.is_terminal:
        yield lambda text: console.print(text, markup=False, highlight=False)
        return
    with console.status("") as status:
        yield lambda text: status.update(escape(text))
