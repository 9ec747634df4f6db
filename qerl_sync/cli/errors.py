"""Print warnings, notes and errors on stderr. An exception becomes a message and an exit code."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from qerl_sync.errors import FileError, SyncError

# Exit codes: of a check that fails, and of an unexpected error; of bad input; of a command that was
# interrupted, which ends like any program that SIGINT kills.
FAILED, REFUSED, INTERRUPTED = 1, 2, 130

# The option of every command.
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]

# Trainer ranks other than 0 wait so long before they print an error. Mostly rank 0 prints the same
# one, and torchrun ends the others meanwhile.
PATIENCE_SECONDS = 10.0


def notes() -> Console:
    """Return a console on stderr, for what is no part of a command's answer. It breaks no lines."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def errors_as_text(*, debug: bool, rank: int = 0) -> Iterator[None]:
    """Turn exceptions into a message on stderr and an exit code, or let them pass if `debug`.

    Args:
        rank: of this process among those of a training.
    """
    console = notes()
    try:
        yield
    except KeyboardInterrupt:
        console.print("[yellow]interrupted[/]")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as exc:
        if debug or isinstance(exc, typer.Exit):
            raise
        if rank:
            time.sleep(PATIENCE_SECONDS)
            console.print(f"[yellow]trainer rank {rank}:[/]")
        from qerl_sync.config.files import file_error  # not for --help, which is to be quick

        refusal = exc if isinstance(exc, SyncError) else file_error(exc)
        if refusal is not None:
            console.print(f"[bold red]error:[/] {escape(str(refusal))}")
            raise typer.Exit(REFUSED) from exc
        console.print(f"[bold red]unexpected {type(exc).__name__}:[/] {escape(str(exc))}")
        console.print("run it again with --debug to see where it happened")
        raise typer.Exit(FAILED) from exc


def require_directories(*paths: Path | None) -> None:
    """Check that files can be written to these paths as far as their directories go.

    For commands that write at the end of long work, which would be lost.

    Raises:
        FileError: a directory is missing.
    """
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise FileError(
                f"{path} cannot be written: there is no directory {path.absolute().parent}; make "
                "it, or name another",
                path=str(path),
            )


class _ToConsole(logging.Handler):
    """Print records unchanged, so that their line breaks and indents survive."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        label = f"[yellow]{record.levelname.lower()}:[/]"
        text = escape(self.format(record))
        self._console.print(f"{label} {text}", highlight=False, soft_wrap=True)


def show_warnings(console: Console) -> None:
    """Show what qerl-sync itself logs on `console`, above a progress bar if there is one."""
    logger = logging.getLogger("qerl_sync")
    logger.handlers = [_ToConsole(console)]
    logger.propagate = False
