"""Processes that tests look at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import psutil

from qerl_sync.serving.processes import ENDED


def alive(pids: Iterable[int]) -> set[int]:
    """Return those of these processes that have not ended."""
    found = set()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() not in ENDED:
                found.add(pid)
    return found
