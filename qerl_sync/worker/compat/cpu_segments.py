"""Shared memory through which the tensor parallel workers of a CPU engine exchange activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qerl_sync.errors import ConfigError

SHARED_MEMORY = Path("/dev/shm")


def unlink_exchange_segments() -> None:
    """Unlink the segments of this process's tensor parallel group, which its workers have mapped.

    Call it once the engine has started. vLLM names the segments by the group's ranks alone where a
    launcher has started the workers, and unlinks them when their process ends by itself: those of
    a run that was killed would keep the next one on this machine from starting. Without effect
    where there are none, as on GPUs.
    """
    from vllm.distributed.parallel_state import get_tp_group

    communicator: Any = getattr(get_tp_group(), "device_communicator", None)
    name = getattr(getattr(communicator, "dist_module", None), "group_name", None)
    for rank in range(communicator.world_size) if name else ():
        with suppress(OSError):  # another rank was quicker
            (SHARED_MEMORY / f"{str(name).strip('/')}_{rank}").unlink()


@contextmanager
def leftovers_explained() -> Iterator[None]:
    """Raise ConfigError for an engine that does not start because its segments are there already;
    `files` are those, of whichever process.
    """
    try:
        yield
    except RuntimeError as exc:
        if "SHMManager" not in str(exc):
            raise
        files = tuple(sorted(map(str, SHARED_MEMORY.glob("*-cpushm_*"))))
        raise ConfigError(
            "vLLM could not make the shared memory through which the tensor parallel workers of a "
            f"CPU compute together ({exc}). It has the same name in all runs of this machine, and "
            f"these are there: {', '.join(files) or 'none any more'}. Wait for a run that is about "
            "to start its engine; delete what a run has left that was killed while it did",
            files=files,
        ) from exc
