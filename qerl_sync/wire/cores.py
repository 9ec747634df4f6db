"""CPUs of a machine that a trainer and its workers share: each loads or copies on its own."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager


def own_cores() -> frozenset[int]:
    """Return the CPUs that the calling thread may run on; none if the system does not tell."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


@contextmanager
def avoid_cores(cores: Collection[int]) -> Iterator[None]:
    """Keep the calling thread, and threads that it starts, off these CPUs in this context.

    vLLM binds a CPU worker to cores. The scheduler knows no such bond for a trainer, and where it
    runs one on a worker's core, the worker can go nowhere and stands still; others idle.

    Nothing is done where no CPU is left to the thread.
    """
    own = own_cores()
    spare = own.difference(cores)
    if not spare or spare == own:
        yield
        return
    os.sched_setaffinity(0, spare)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)
