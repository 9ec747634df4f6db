"""The environment that engines are started in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# For an engine on a CPU that shares its machine with a trainer or with other engines. What the user
# has set stays.
ON_SHARED_CORES = {
    # GiB of KV cache; vLLM would take half of the machine's memory.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # vLLM would pin its threads to cores that others use too.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # How long OpenMP's threads spin for the next piece of work, in rounds of their loop. By default
    # they do for milliseconds, and wherever another process wants a core too (a trainer on the
    # engine's host), loading comes to a halt for 0.1 s at a time. Read when OpenMP is loaded, so
    # that it reaches processes started from here on.
    "GOMP_SPINCOUNT": "10000",
}


@contextmanager
def changed_environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Set these environment variables in this context."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
