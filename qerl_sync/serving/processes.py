"""Read processes from Linux's /proc: parents, sessions, and listening ports."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
LISTENING = "0A"


class Process(NamedTuple):
    """A process that has not ended (no zombie)."""

    pid: int
    parent: int
    session: int


def running() -> list[Process]:
    """Return all processes that this one may see."""
    found = (_read(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())
    return [process for process in found if process is not None]


def _read(pid: str) -> Process | None:
    try:
        text = (PROC / pid / "stat").read_text(errors="replace")
    except OSError:  # it has ended meanwhile
        return None
    # The name stands in parentheses and may hold anything.
    state, parent, _, session = text.rpartition(")")[2].split()[:4]
    return None if state in "ZX" else Process(int(pid), int(parent), int(session))


def descendants(pid: int) -> list[int]:
    """Return the children of `pid`, their children and so on, parents first."""
    children: dict[int, list[int]] = {}
    for process in running():
        children.setdefault(process.parent, []).append(process.pid)
    found = list(children.get(pid, []))
    for child in found:
        found += children.get(child, [])
    return found


def members(session: int) -> list[int]:
    """Return the processes of the session whose leader is, or was, the process `session`."""
    return [process.pid for process in running() if process.session == session]


def is_resource_tracker(pid: int) -> bool:
    """Return whether this is Python's helper that removes the shared memory of killed processes."""
    try:
        return b"multiprocessing.resource_tracker" in (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False


def any_listens(pids: Iterable[int], port: int) -> bool:
    """Return whether one of these processes listens on that TCP port."""
    sockets = _listening(port)
    return any(_holds(pid, sockets) for pid in pids)


def _listening(port: int) -> set[str]:
    """Return the listening sockets of that port, as /proc/PID/fd names them."""
    found = set()
    for table in (PROC / "net/tcp", PROC / "net/tcp6"):
        lines = table.read_text().splitlines()[1:] if table.exists() else []
        for fields in map(str.split, lines):
            if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(f"socket:[{fields[9]}]")
    return found


def _holds(pid: int, sockets: set[str]) -> bool:
    directory = PROC / str(pid) / "fd"
    try:
        return any(_target(entry) in sockets for entry in directory.iterdir())
    except OSError:
        return False


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""
