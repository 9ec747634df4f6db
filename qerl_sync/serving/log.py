"""Read the end of a server's log."""

from __future__ import annotations

import re
from pathlib import Path

PROGRESS_BYTES, COMPLAINT_BYTES = 8 * 1024, 256 * 1024
NUM_LINES, NUM_ERRORS = 15, 8

_COLOR = re.compile(r"\x1b\[[0-9;]*m")
# "(Worker pid=7) ERROR 11-22 18:06:52 [multiproc_executor.py:948] " before each line.
_PREFIX = re.compile(r"^\(\w+ pid=\d+\) ?|^[A-Z]+ [\d-]+ [\d:]+ \[[\w./]+:\d+\] ")
_ERROR = re.compile(r"^[\w.]*(Error|Exception|Interrupt)\b")


def tail(log: Path | None, size_bytes: int) -> list[str]:
    """Return the last non-empty lines, without colors and vLLM's prefixes."""
    if log is None or not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - size_bytes))
        text = _COLOR.sub("", file.read().decode(errors="replace"))
    # Twice: the name of the process stands before the rest.
    lines = [_PREFIX.sub("", _PREFIX.sub("", line)) for line in re.split(r"[\r\n]+", text)]
    return [line.rstrip() for line in lines if line.strip()]


def last_line(log: Path | None) -> str:
    """Return the last line that is no continuation; empty if there is none."""
    return next((line for line in reversed(tail(log, PROGRESS_BYTES)) if not line[0].isspace()), "")


def complaint_in(log: Path) -> str:
    """Return the lines that explain why a server ended.

    These are the errors of all its processes, causes before consequences, without tracebacks; or
    the last lines, if there are no errors.
    """
    lines = tail(log, COMPLAINT_BYTES)
    # argparse says all it knows, and at the end what is wrong.
    if lines and ": error: " in lines[-1]:
        return lines[-1]
    errors: dict[str, None] = {}
    in_error = False
    for line in lines:  # those that name an exception, each with the indented ones after it
        in_error = bool(_ERROR.match(line)) or (in_error and line[0].isspace())
        if in_error and not line.lstrip().startswith("File "):
            errors[line] = None
    return "\n".join([*errors][:NUM_ERRORS] or lines[-NUM_LINES:]) or "(it is empty)"
