"""`wire.cuda_memory` for machines without a GPU: shared host memory in place of a GPU's.

Handles, mappings and their lifetimes are as CUDA's, in that what is read after it was unmapped ends
the process. There are no streams: what should have been waited for is recorded.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from pathlib import Path
from typing import Any

import torch

from qerl_sync.errors import TransportError
from qerl_sync.wire import cuda_memory

UUID = "GPU-stand-in"
_numbers = itertools.count()


class CudaStandIn:
    """One process's view of the GPU. `install` puts it in place of the real calls.

    Attributes:
        calls: names of the calls, in order.
        allocated, mapped: by address, the file of what is not yet freed or unmapped.
        uuid: of the GPU; "": there is none.
        mapped_fails: CUDA refuses to map.
    """

    def __init__(self, uuid: str = UUID) -> None:
        self.uuid = uuid
        self.calls: list[str] = []
        self.allocated: dict[int, Path] = {}
        self.mapped: dict[int, Path] = {}
        self.mapped_fails = False
        self._maps: dict[int, mmap.mmap] = {}

    def install(self, setattr: Any = setattr) -> None:
        """Replace the functions of `cuda_memory`, by pytest's `monkeypatch.setattr` or for good."""
        for name in (
            "concrete_device",
            "device_uuid",
            "synchronize",
            "synchronize_stream",
            "allocate",
            "free",
            "export_handle",
            "map_handle",
            "unmap",
            "tensor_at",
        ):
            setattr(cuda_memory, name, getattr(self, name))

    def concrete_device(self, device: torch.device | None) -> torch.device:
        return torch.device("cpu")

    def device_uuid(self, device: torch.device) -> str:
        return self.uuid

    def synchronize(self, device: torch.device) -> None:
        self.calls.append("synchronize")

    def synchronize_stream(self, device: torch.device) -> None:
        self.calls.append("synchronize_stream")

    def allocate(self, nbytes: int, device: torch.device) -> int:
        path = Path(f"/dev/shm/cuda_stand_in-{os.getpid()}-{next(_numbers)}")
        path.write_bytes(b"")
        os.truncate(path, nbytes)
        address = self._map(path)
        self.allocated[address] = path
        self.calls.append("allocate")
        return address

    def free(self, address: int, device: torch.device) -> None:
        self.allocated.pop(address).unlink()
        self._maps.pop(address).close()
        self.calls.append("free")

    def export_handle(self, address: int, device: torch.device) -> bytes:
        return str(self.allocated[address]).encode().ljust(cuda_memory.HANDLE_BYTES, b"\0")

    def map_handle(self, handle: bytes, device: torch.device) -> int:
        path = Path(handle.rstrip(b"\0").decode())
        if self.mapped_fails or not path.exists():
            raise TransportError("CUDA_ERROR_INVALID_VALUE")
        address = self._map(path)
        self.mapped[address] = path
        self.calls.append("map")
        return address

    def unmap(self, address: int, device: torch.device) -> None:
        del self.mapped[address]
        self._maps.pop(address).close()
        self.calls.append("unmap")

    def tensor_at(
        self, address: int, nbytes: int, device: torch.device, owner: object
    ) -> torch.Tensor:
        class Memory(ctypes.c_ubyte * nbytes):  # type: ignore[misc]
            pass

        memory = Memory.from_address(address)
        memory.owner = owner
        return torch.frombuffer(memory, dtype=torch.uint8)

    def _map(self, path: Path) -> int:
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        address = ctypes.addressof(ctypes.c_ubyte.from_buffer(memory))
        self._maps[address] = memory
        return address
