"""Memory of a GPU that trainer and worker share, with the faces of `segments`."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import weakref
from collections.abc import Callable

import torch

from qerl_sync.errors import TransportError
from qerl_sync.wire import cuda_memory


class _DeviceMemory:
    nbytes: int
    device: torch.device
    _address: int

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a view with a storage that is no larger than itself. The owner's is writable, and
        must not be used after `close`."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype, device=self.device)
        memory = cuda_memory.tensor_at(self._address + offset, nbytes, self.device, self)
        return memory.view(dtype).view(shape)


class DeviceSegment(_DeviceMemory):
    """The owner's side: memory that is given back when it is closed or collected.

    It counts for the owner's process. torch's allocator, of either process, does not count it.

    Attributes:
        handle: in hexadecimal digits, with which another process maps it.

    Raises:
        NoRoomError: the device has not that much memory free.
        TransportError: CUDA cannot share it.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.name, self.nbytes, self.device = secrets.token_hex(16), nbytes, device
        self._address = cuda_memory.allocate(nbytes, device)
        self.close = weakref.finalize(
            self, _unless_forked, os.getpid(), cuda_memory.free, self._address, device
        )
        try:
            self.handle = cuda_memory.export_handle(self._address, device).hex()
        except BaseException:
            self.close()
            raise


class AttachedDeviceSegment(_DeviceMemory):
    """A reader's side. It is unmapped when neither it nor a view of it is referred to any more.

    CUDA has no read-only mappings: what is written here is written to the owner's memory.

    Raises:
        TransportError: CUDA cannot map it here.
    """

    def __init__(self, handle: str, nbytes: int, device: torch.device) -> None:
        self.nbytes, self.device = nbytes, device
        self._address = cuda_memory.map_handle(bytes.fromhex(handle), device)
        # Not before the last view is gone: to read what is unmapped ends all work on the device.
        weakref.finalize(
            self, _unless_forked, os.getpid(), cuda_memory.unmap, self._address, device
        )

    def read(self, offset: int, nbytes: int) -> bytes:
        return bytes(self.tensor(offset, (nbytes,), torch.uint8).cpu().numpy())


def _unless_forked(
    owner: int, release: Callable[[int, torch.device], None], address: int, device: torch.device
) -> None:
    """Release memory, but not in a forked child: CUDA is its parent's."""
    if os.getpid() == owner:
        with contextlib.suppress(TransportError):  # the process is ending, and CUDA has ended
            release(address, device)
