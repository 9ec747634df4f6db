"""The files that syncs leave in a run's directory. Standard library only."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

SYNCS, FAILURES, LOG, TRACES = "syncs.jsonl", "failures.jsonl", "log.jsonl", "traces"
# A file of lines that is larger becomes `earlier.NAME`, in place of the one before: at most twice
# this is kept of each. A report takes 1.5 KB and more with the number of workers.
MOST_BYTES = 64 << 20


def append_line(path: Path, value: Any) -> None:
    """Append a line of JSON. The oldest lines are dropped where there are too many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(value) + "\n")
        size = lines.tell()
    if size > MOST_BYTES:
        path.rename(_earlier(path))


def read_lines(path: Path) -> list[Any]:
    """Return what was appended, the oldest first. Skip a line that was cut off when a run died."""
    found = []
    for part in (_earlier(path), path):
        if part.exists():
            lines = part.read_text(encoding="utf-8").split("\n")[:-1]
            found += [json.loads(line) for line in lines]
    return found


def keep_lines(path: Path, wanted: Callable[[Any], bool]) -> None:
    """Drop all lines but those that are wanted."""
    kept = [line for line in read_lines(path) if wanted(line)]
    _earlier(path).unlink(missing_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def line_files(directory: Path) -> list[Path]:
    """Return the files of lines that are there, and what was dropped of them last."""
    paths = [directory / name for name in (SYNCS, FAILURES, LOG)]
    return [path for each in paths for path in (_earlier(each), each) if path.exists()]


def write_json(path: Path, value: Any) -> None:
    """Write JSON, compressed if the name ends in .gz. Atomic: no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, separators=(",", ":")).encode()
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(gzip.compress(text, 1, mtime=0) if path.suffix == ".gz" else text)
    partial.rename(path)


def read_json(path: Path) -> Any:
    """Return what `write_json` has written."""
    content = path.read_bytes()
    return json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)


def _earlier(path: Path) -> Path:
    return path.with_name(f"earlier.{path.name}")
