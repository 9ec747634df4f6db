"""Translate errors about files once: the file, the problem, the next step.

Python, Rust (safetensors) and C++ (torch) word the same problem differently, and only Python
sometimes names the file.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qerl_sync.errors import FileError, SyncError

ANOTHER = "choose another place (of a run: `output_dir`, --output-dir)"
NEXT_STEP = {
    errno.EACCES: f"give this user access to it, or {ANOTHER}",
    errno.EPERM: f"give this user access to it, or {ANOTHER}",
    errno.EROFS: ANOTHER,
    errno.ENOSPC: f"make room there, or {ANOTHER}",
    errno.EDQUOT: f"make room there, or {ANOTHER}",
    errno.EFBIG: f"make room there, or {ANOTHER}",
    errno.EEXIST: f"it is no directory, and one is needed: move it away, or {ANOTHER}",
    errno.ENOTDIR: f"a part of it is no directory: move that away, or {ANOTHER}",
    errno.EISDIR: "it is a directory, and a file is needed: name another",
    errno.ENOENT: "make it, or name another",
    errno.EIO: f"look after the disk, or {ANOTHER}",
    errno.ENAMETOOLONG: ANOTHER,
}
ONLY_FILES = {errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# How Rust ends such a message, and what torch says whatever it was that kept it from writing.
RUST_NUMBER = re.compile(r"\(os error (\d+)\)")
TORCH_FAILED = "PytorchStreamWriter failed"


@contextmanager
def file_errors_explained(writing_to: Path | None = None) -> Iterator[None]:
    """Raise FileError in place of any error in this context that a file caused; let others pass.

    Args:
        writing_to: the directory that is written to, for errors that name no file.
    """
    try:
        yield
    except SyncError:
        raise
    except Exception as exc:
        found = file_error(exc, writing_to)
        if found is None:
            raise
        raise found from exc


def file_error(exc: BaseException, writing_to: Path | None = None) -> FileError | None:
    """Return the FileError for `exc`; None if no file caused it."""
    number, path = _number(exc), getattr(exc, "filename", None)
    if number not in NEXT_STEP:
        return file_error(exc.__cause__, writing_to) if exc.__cause__ is not None else None
    path = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else writing_to
    if path is None and number not in ONLY_FILES:
        return None  # a socket or a process, for all that we know
    place = "a file that was to be written" if path is None else str(path)
    return FileError(
        f"{place}: {os.strerror(number)}; {NEXT_STEP[number]}",
        path=None if path is None else str(path),
    )


def _number(exc: BaseException) -> int | None:
    if isinstance(exc, OSError) and exc.errno is not None:
        return exc.errno
    rust = RUST_NUMBER.search(str(exc))
    if rust is not None:
        return int(rust[1])
    return errno.ENOSPC if TORCH_FAILED in str(exc) else None


def where(path: str) -> str:
    """Return `path` as it was looked up, for errors about a missing file."""
    return str(Path(path).expanduser().absolute())
