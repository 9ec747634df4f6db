"""The files that syncs leave in a run's directory. Standard library only."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qerl_sync.errors import FileError

SYNCS, FAILURES, LOG, TRACES = "syncs.jsonl", "failures.jsonl", "log.jsonl", "traces"
# A file of lines that is larger becomes `earlier.NAME`, in place of the one before: at most twice
# this is kept of each. A report takes 1.5 KB and more with the number of workers.
MOST_BYTES = 64 << 20


def append_line(path: Path, value: Any) -> None:
    """Append a line of JSON. The oldest lines are dropped where there are too many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as lines:
        if lines.seek(0, os.SEEK_END):
            lines.seek(-1, os.SEEK_END)
            # A run that died, or a full disk, left half a line. Appended to, it would be one that
            # is no JSON, and nothing of the run could be read again.
            if lines.read() != b"\n":
                lines.truncate(path.read_bytes().rfind(b"\n") + 1)
        lines.write(json.dumps(value).encode() + b"\n")
        size = lines.tell()
    if size > MOST_BYTES:
        path.rename(_earlier(path))


def read_lines(path: Path) -> list[Any]:
    """Return what was appended, the oldest first. Skip a line that was cut off when a run died.

    Raises:
        FileError: a line is no JSON.
    """
    found = []
    for part in (_earlier(path), path):
        if part.exists():
            lines = part.read_text(encoding="utf-8").split("\n")[:-1]
            found += [_parsed(line, f"line {n} of {part}", part) for n, line in enumerate(lines, 1)]
    return found


def keep_lines(path: Path, wanted: Callable[[Any], bool]) -> None:
    """Drop all lines but those that are wanted."""
    kept = [line for line in read_lines(path) if wanted(line)]
    _replace(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    _earlier(path).unlink(missing_ok=True)


def line_files(directory: Path) -> list[Path]:
    """Return the files of lines that are there, and what was dropped of them last."""
    paths = [directory / name for name in (SYNCS, FAILURES, LOG)]
    return [path for each in paths for path in (_earlier(each), each) if path.exists()]


def write_json(path: Path, value: Any) -> None:
    """Write JSON, compressed if the name ends in .gz. Atomic: no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, separators=(",", ":")).encode()
    _replace(path, gzip.compress(text, 1, mtime=0) if path.suffix == ".gz" else text)


def read_json(path: Path) -> Any:
    """Return what `write_json` has written.

    Raises:
        FileError: it holds something else.
    """
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (EOFError, gzip.BadGzipFile, zlib.error) as exc:
        raise _damaged(path, str(path), exc) from exc
    return _parsed(content, str(path), path)


def _parsed(text: str | bytes, place: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as exc:
        raise _damaged(path, place, exc) from exc


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a full disk leaves the old one."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.rename(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _damaged(path: Path, place: str, cause: Exception) -> FileError:
    text = f"{place} is damaged, or was written by something else ({cause}); move {path} away"
    return FileError(text, path=str(path))


def _earlier(path: Path) -> Path:
    return path.with_name(f"earlier.{path.name}")
