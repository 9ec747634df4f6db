"""How much memory is free where the worker keeps its weights."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can be allocated on `device` now.

    On a GPU what the driver has free, and what torch's allocator holds in reserve; on a CPU what is
    available to the host or to the container, whichever is less.
    """
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserved
    container = container_free_bytes(CGROUP, Path("/proc/self/cgroup").read_text())
    host = psutil.virtual_memory().available
    return host if container is None else min(host, container)


def container_free_bytes(root: Path, membership: str) -> int | None:
    """Return the least that a memory limit of the process's control groups leaves; None without a
    limit. File caches that can be dropped are counted as used by the kernel, and as free here.

    Args:
        root: where control groups are mounted.
        membership: what /proc/self/cgroup says (cgroups(7)): a line for each hierarchy, of version
            1 or 2, with the process's group in it.
    """
    free: list[int] = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = Path(path.lstrip("/"))
        # The limits of all groups around it hold too: SLURM and systemd have theirs on outer ones.
        # In a container the path may be the host's, of which only the root is mounted.
        for folder in (mount / group, *(mount / outer for outer in group.parents)):
            limit_bytes, used_bytes = (_number(folder / name) for name in names[:2])
            if limit_bytes is not None and used_bytes is not None:
                fields = {names[2]: "0"}
                with suppress(OSError, ValueError):
                    lines = (folder / "memory.stat").read_text().splitlines()
                    fields |= dict(line.split() for line in lines)
                free.append(max(limit_bytes - used_bytes + int(fields[names[2]]), 0))
    return min(free, default=None)


def _number(path: Path) -> int | None:
    """Return the number in a file; None if there is none ("max": no limit)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


class PeakMemory:
    """The most memory that a stretch of work takes on top of what is held when it begins.

    On a GPU what torch's allocator has handed out; on a CPU the resident memory of the process,
    mapped shared memory included, by Linux's own high-water mark.

    Attributes:
        counts_mapped: memory of another process that is mapped and read counts here too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.counts_mapped = device.type != "cuda"
        self._before: int | None = None

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return
        try:
            # Linux's peak of the resident memory becomes its present value.
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status_bytes("VmRSS")
        except OSError:
            self._before = None

    def extra_bytes(self) -> int | None:
        """Return the most bytes since `start`; None where it cannot be measured."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            return max(torch.cuda.max_memory_allocated(self._device) - self._before, 0)
        return max(_status_bytes("VmHWM") - self._before, 0)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
