"""Keeps what arrives too early in host memory until the rest of its layer is there."""

from __future__ import annotations

import mmap
import os
import stat
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from qerl_sync.errors import ConfigError, PlanError, TransportError
from qerl_sync.meta import format_bytes
from qerl_sync.plan.spill import Spill
from qerl_sync.plan.staging import offsets
from qerl_sync.plan.sync_plan import SyncPlan
from qerl_sync.wire import cuda_memory
from qerl_sync.wire.segments import view
from qerl_sync.worker.load import memory

Named = tuple[str, torch.Tensor]


class SpillBuffer:
    """Turns the stream of one sync into that which vLLM gets, by one call of `load` for each chunk,
    which must take all that it gets. Not thread-safe.

    What is copied together and loaded together lies in one block, which is unmapped when the last
    tensor of it is gone: blocks count as many bytes as their tensors have, and take up whole pages.
    On a worker with a GPU blocks are page-locked if they can be, and tensors are brought to the
    device when vLLM gets them.

    Attributes:
        staged_bytes: staged now; `peak_bytes`: the most that were staged at once so far.

    Raises:
        PlanError: there is less room than the plan will take.
        ConfigError: the directory for staging is none that this worker uses.
    """

    def __init__(self, plan: SyncPlan, spill: Spill, device: torch.device) -> None:
        self._metas = {meta.name: meta for meta in plan.metas}
        self._device = device
        self._budget_bytes = spill.budget_bytes
        self._directory = None if spill.directory is None else _own_directory(spill.directory)
        self._loads = plan.chunk_loads
        self._due_in = {name: index for index, names in enumerate(self._loads) for name in names}
        self._index = -1
        self._arrived: dict[str, torch.Tensor] = {}
        self._staged: dict[str, torch.Tensor] = {}
        self._blocks: defaultdict[int, list[_Block]] = defaultdict(list)
        self.staged_bytes = self.peak_bytes = 0
        _require_room(plan.peak_staged_bytes, self._directory)

    def load(self, arrived: Iterable[Named], load: Callable[[Iterator[Named]], None]) -> None:
        """Take the next chunk, whole, and `load` what is whole by now, if anything is.

        What has to wait is copied: the chunk's memory will be reused.

        Raises:
            PlanError: more would be staged than the budget allows.
            TransportError: there is no room for it.
        """
        self._index += 1
        self._arrived = dict(arrived)
        due_now = self._loads[self._index]
        if due_now:
            load(self._due(due_now))
        for block in self._blocks.pop(self._index, ()):
            block.free()
        waiting: defaultdict[int, list[str]] = defaultdict(list)
        for name in self._arrived:
            waiting[self._due_in[name]].append(name)
        for due, names in waiting.items():
            self._stage(due, names)
        self._arrived = {}

    def close(self) -> None:
        """Drop all that is staged. Idempotent."""
        self._arrived, self._staged = {}, {}
        for blocks in self._blocks.values():
            for block in blocks:
                block.free()
        self._blocks.clear()

    def _due(self, names: Sequence[str]) -> Iterator[Named]:
        for name in names:
            tensor = self._arrived.pop(name, None)
            if tensor is None:
                tensor = self._staged.pop(name)
                self.staged_bytes -= self._metas[name].nbytes
            tensor = tensor.to(self._device)
            yield name, tensor
            del tensor  # vLLM's alone

    def _stage(self, due: int, names: Sequence[str]) -> None:
        metas = [self._metas[name] for name in names]
        total = self.staged_bytes + sum(meta.nbytes for meta in metas)
        if self._budget_bytes is not None and total > self._budget_bytes:
            raise PlanError(
                f"{total:,} bytes would be staged with {names[-1]!r}, sync.spill_budget_bytes is "
                f"{self._budget_bytes:,}; make the plan again"
            )
        places, nbytes = offsets(metas)
        block = _Block(nbytes, self._directory, locked=self._device.type == "cuda")
        self._blocks[due].append(block)  # first: its pages are unlocked even if a copy fails
        for meta, offset in zip(metas, places, strict=True):
            staged = view(block.memory, offset, meta.shape, getattr(torch, meta.dtype))
            self._staged[meta.name] = staged.copy_(self._arrived[meta.name])
        self.staged_bytes = total
        self.peak_bytes = max(self.peak_bytes, total)


class _Block:
    """A piece of host memory, or of a file that has no name. It is unmapped when it was freed and
    no tensor refers to it any more."""

    def __init__(self, nbytes: int, directory: Path | None, *, locked: bool) -> None:
        self._address: int | None = None
        nbytes = max(nbytes, 1)
        try:
            self.memory = _mapped(nbytes, directory)
        except OSError as exc:
            place = directory or "host memory"
            raise TransportError(
                f"{format_bytes(nbytes)} cannot be staged in {place}: {exc}; make room, set "
                "sync.spill_directory to another directory of the worker, or choose "
                "`policy: reorder` if the source can be reordered"
            ) from exc
        if locked and directory is None:
            # Copies to the device are faster then. torch's own pinned memory comes in powers of
            # two, and is kept when it is free.
            address = torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr()
            if cuda_memory.lock_pages(address, nbytes):
                self._address = address

    def free(self) -> None:
        if self._address is not None:
            cuda_memory.unlock_pages(self._address)
            self._address = None
        del self.memory


def _mapped(nbytes: int, directory: Path | None) -> mmap.mmap:
    if directory is None:
        return mmap.mmap(-1, nbytes)
    # Without a name from the start, where the file system can: a killed process leaves nothing.
    with tempfile.TemporaryFile(dir=directory, prefix="qerl-sync-") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)  # a full disk must not end the process later
        return mmap.mmap(file.fileno(), nbytes)


def _own_directory(text: str) -> Path:
    """Return the directory that the trainer names, if it is one that this worker may use.

    It must be there, and be the worker's own or one in which everybody keeps their own files
    (/tmp). Files in it get no name, so that a trainer cannot name one that exists.
    """
    path = Path(text)
    try:
        found = path.stat()
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"sync.spill_directory: {text!r} is not there for this worker ({exc}); make it, or "
            "name another"
        ) from exc
    own = found.st_uid == os.geteuid() or bool(found.st_mode & stat.S_ISVTX)
    usable = (
        path.is_absolute() and stat.S_ISDIR(found.st_mode) and os.access(path, os.W_OK | os.X_OK)
    )
    if not (own and usable):
        raise ConfigError(
            f"sync.spill_directory: {text!r} must be the absolute path of a directory that belongs "
            "to the worker's user and can be written to"
        )
    return path


def _require_room(nbytes: int, directory: Path | None) -> None:
    if directory is None:
        free, where = memory.free_bytes(torch.device("cpu")), "host memory"
    else:
        found = os.statvfs(directory)
        free, where = found.f_bavail * found.f_frsize, str(directory)
    if nbytes > free:
        raise PlanError(
            f"the plan stages up to {nbytes:,} bytes ({format_bytes(nbytes)}) on this worker, and "
            f"its {where} has {format_bytes(free)} free; set sync.spill_directory to a directory "
            "with more room, or choose `policy: reorder` if the source can be reordered"
        )
