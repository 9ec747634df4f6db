"""Identify this machine, and keep a trainer's threads off the CPUs that its workers load with."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def host_id() -> str:
    """Return the same text for all processes under one running kernel, containers included."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return platform.node()


def own_cores() -> frozenset[int]:
    """Return the CPUs that the calling thread may run on; none if the system does not tell."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


@contextmanager
def avoid_cores(cores: Collection[int]) -> Iterator[None]:
    """Keep the calling thread, and threads that it starts, off these CPUs in this context.

    vLLM binds a CPU worker to cores, and a trainer to none. Where the scheduler runs the trainer on
    a worker's core, the worker cannot move to another one, and waits while other cores idle.

    Nothing is done where no CPU is left to the thread.
    """
    own = own_cores() if cores else frozenset()  # without, no call of the kernel for each tensor
    spare = own.difference(cores)
    if not spare or spare == own:
        yield
        return
    os.sched_setaffinity(0, spare)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)
