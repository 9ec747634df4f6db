"""How much memory is free where the worker keeps its weights."""

from __future__ import annotations

from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now.

    On a GPU what the driver has free, and what torch's allocator holds in reserve; on a CPU what is
    available to the host or to the container, whichever is less.
    """
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserved
    container = container_free_bytes(CGROUP)
    host = host_free_bytes(MEMINFO)
    return host if container is None else min(host, container)


def host_free_bytes(meminfo: Path) -> int:
    """`MemAvailable` of Linux: free, or used for caches that can be dropped."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def container_free_bytes(cgroup: Path) -> int | None:
    """What a container's memory limit leaves; None without a limit.

    File caches that can be dropped are counted as used by the kernel, and as free here.
    """
    for folder, limit, used, dropped in (
        (cgroup, "memory.max", "memory.current", "inactive_file"),
        (
            cgroup / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        limit_bytes = _number(folder / limit)
        used_bytes = _number(folder / used)
        if limit_bytes is not None and used_bytes is not None:
            return max(limit_bytes - used_bytes + _statistic(folder / "memory.stat", dropped), 0)
    return None


def _number(path: Path) -> int | None:
    """The number in a file; None if there is none ("max": no limit)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _statistic(path: Path, key: str) -> int:
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(fields.get(key, 0))
