"""POSIX shared memory: named files under /dev/shm that die with their owner.

A segment's owner holds a lock on it for as long as it lives. The kernel drops the lock when the
owner ends, SIGKILL included, so the next process to start can tell a dead owner's segments from
others and removes them. A segment that all its readers have attached needs no name (`unlink`), and
leaves nothing behind however its owner ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import io
import math
import mmap
import os
import re
import secrets
import time
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch

from qerl_sync.errors import NoRoomError, TransportError
from qerl_sync.meta import format_bytes
from qerl_sync.wire.forks import close_in_children

DIRECTORY = Path("/dev/shm")
PREFIX = "qerl_sync-"
# A segment is locked within microseconds of its creation; an older one that is not has no owner.
BIRTH_SECONDS = 60.0
# Linux 5.14's number for mapping pages before they are read.
_MADV_POPULATE_READ = 22
_LIBC = ctypes.CDLL(None)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_PARAMETERS: weakref.WeakSet[SharedSegment] = weakref.WeakSet()
_NAME = re.compile(re.escape(PREFIX) + r"[0-9]+-[0-9a-f]{16}")


class SharedSegment:
    """The owner's side of a segment: writable, gone when closed or collected.

    Args:
        parameters: tensors of the model live in it, so that `locate` looks for them here.

    Raises:
        NoRoomError: /dev/shm has not that much room. It is found out here, not by a crash when
            the memory is first written.
        TransportError: it cannot be made for another reason.
    """

    def __init__(self, nbytes: int, *, parameters: bool = False) -> None:
        remove_abandoned()
        self.name = f"{PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
        self.nbytes = nbytes
        path = DIRECTORY / self.name
        lock = _create_locked(path)
        try:
            os.posix_fallocate(lock.fileno(), 0, nbytes)
            self._map = _mapped(path, nbytes)
        except OSError as exc:
            path.unlink()
            lock.close()
            if exc.errno in (errno.ENOSPC, errno.ENOMEM):
                raise _no_room(nbytes) from exc
            raise TransportError(
                f"shared memory of {format_bytes(nbytes)} cannot be made: {exc}"
            ) from exc
        self._path = path
        self.close = weakref.finalize(self, _release, path, lock, os.getpid())
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        if parameters:
            _PARAMETERS.add(self)

    def unlink(self) -> None:
        """Remove the name. Readers that are attached keep the segment; none can attach it anew."""
        self._path.unlink(missing_ok=True)

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Return where `tensor` lies in this segment; None if it does not, or not in one piece."""
        offset = tensor.data_ptr() - self.bytes.data_ptr()
        inside = offset >= 0 and offset + tensor.nbytes <= self.nbytes
        return offset if inside and tensor.is_contiguous() else None

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a writable view. It keeps the memory alive; the name goes with the segment."""
        return view(self._map, offset, shape, dtype)


class AttachedSegment:
    """A reader's side: nothing that is done with it can change the owner's memory.

    Raises:
        TransportError: no segment of ours has that name, or it is smaller than announced.
    """

    def __init__(self, name: str, nbytes: int) -> None:
        if not _NAME.fullmatch(name):
            raise TransportError(
                f"{name!r} is no shared memory of qerl-sync's (they are called {PREFIX}...)"
            )
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # it may be a pipe
        try:
            descriptor = os.open(DIRECTORY / name, flags)
        except OSError as exc:
            raise TransportError(
                f"the trainer's shared memory {name} cannot be opened here ({exc.strerror}); are "
                "both on one host, with one /dev/shm and one user? Otherwise use sync.transport: "
                "tcp"
            ) from exc
        try:
            actual = os.fstat(descriptor).st_size
            if actual < nbytes:
                raise TransportError(
                    f"the trainer's shared memory {name} has {actual:,} bytes, not {nbytes:,}"
                )
            self._map = mmap.mmap(descriptor, nbytes, prot=mmap.PROT_READ)
            self._address = read_only_view(self._map, 0, (nbytes,), torch.uint8).data_ptr()
        finally:
            os.close(descriptor)
        self.name, self.nbytes = name, nbytes

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a view that must not be written: the kernel would end the process."""
        return read_only_view(self._map, offset, shape, dtype)

    def read(self, offset: int, nbytes: int) -> bytes:
        return self._map[offset : offset + nbytes]

    def map_pages(self, offset: int, nbytes: int) -> None:
        """Map these pages before they are read: a page fault for each costs half as much as loading
        its content. Kernels before Linux 5.14 do nothing."""
        start = offset - offset % mmap.PAGESIZE
        if nbytes:
            # Through ctypes, which lets other threads run meanwhile: `mmap.madvise` does not.
            _LIBC.madvise(self._address + start, offset + nbytes - start, _MADV_POPULATE_READ)

    def drop_pages(self) -> None:
        """Take the segment's pages out of this process's resident memory. They stay shared."""
        _LIBC.madvise(self._address, self.nbytes, mmap.MADV_DONTNEED)


def locate(tensor: torch.Tensor) -> tuple[SharedSegment, int] | None:
    """Return the segment that `tensor` lies in, and where; None for other memory."""
    for segment in _PARAMETERS:
        offset = segment.offset_of(tensor)
        if offset is not None:
            return segment, offset
    return None


def parameters_are_shared() -> bool:
    """Return whether this process keeps parameters in shared memory."""
    return bool(_PARAMETERS)


def view(memory: Any, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor over mapped memory, with a storage that is no larger than itself.

    The mapping lives as long as the tensor does.
    """
    numel = math.prod(shape)
    if numel == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=numel, offset=offset).view(shape)


def read_only_view(
    memory: Any, offset: int, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Return a `view` of any buffer that must not be written."""
    _have_torch_warned()
    return view(memory, offset, shape, dtype)


@functools.cache
def _have_torch_warned() -> None:
    """Swallow torch's warning, once in a process, that a read-only buffer should not be written."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        torch.frombuffer(b"\0", dtype=torch.uint8)


class PrivateMemory:
    """Memory with the interface of a segment, which no other process sees."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._map = mmap.mmap(-1, nbytes)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return view(self._map, offset, shape, dtype)


def remove_abandoned() -> list[str]:
    """Remove the segments of this user's processes that no longer live. Return their names."""
    removed = []
    for path in (*DIRECTORY.glob(f"{PREFIX}*"), *DIRECTORY.glob(f".{PREFIX}*")):
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            # A name that begins with a dot: the file is being made, and gets its lock in a moment.
            young = time.time() - path.stat().st_mtime <= BIRTH_SECONDS
            if path.name.startswith(".") and young:
                continue
            # Anybody may put a file here. To open one on which its owner has a lease blocks for as
            # long as the kernel lets the owner hesitate, 45 s; a pipe blocks for ever.
            if path.lstat().st_uid != os.geteuid():
                continue
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            descriptor = os.open(path, flags)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(path.name)
            finally:
                os.close(descriptor)
    return removed


def free_bytes() -> int:
    """Return how much room /dev/shm has."""
    found = os.statvfs(DIRECTORY)
    return found.f_bavail * found.f_frsize


def require_room(nbytes: int) -> None:
    """Raise NoRoomError if /dev/shm has less."""
    remove_abandoned()
    if nbytes > free_bytes():
        raise _no_room(nbytes)


def _no_room(nbytes: int) -> NoRoomError:
    free = free_bytes()
    return NoRoomError(
        f"{DIRECTORY} has {format_bytes(free)} free, {format_bytes(nbytes)} are needed; make it "
        "larger (docker: --shm-size, or --ipc=host), or take smaller sync.chunk_bytes or fewer "
        "sync.chunks_in_flight, or sync.transport: tcp",
        needed_bytes=nbytes,
        free_bytes=free,
    )


def _create_locked(path: Path) -> io.FileIO:
    """Create it under another name: `remove_abandoned` must never see it without its lock."""
    unlocked = path.with_name(f".{path.name}")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    lock = close_in_children(io.FileIO(os.open(unlocked, flags, 0o600), "r+"))
    fcntl.flock(lock, fcntl.LOCK_EX)
    unlocked.rename(path)
    return lock


def _mapped(path: Path, nbytes: int) -> mmap.mmap:
    """Return the file's memory. By a descriptor of its own: `mmap` keeps a copy of the one that it
    gets, and a forked child's copy of the locked one would keep the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return mmap.mmap(descriptor, nbytes)
    finally:
        os.close(descriptor)


def _release(path: Path, lock: io.FileIO, owner: int) -> None:
    if os.getpid() != owner:  # a forked child must not take its parent's memory away
        return
    path.unlink(missing_ok=True)
    lock.close()
