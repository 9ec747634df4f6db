"""The calls of CUDA that trainer and worker need to share memory of one GPU.

Slots are allocated, exported and mapped by CUDA's driver API, which torch has loaded already, and
become tensors by `__cuda_array_interface__`. Both are documented interfaces. torch's own sharing
(`torch.multiprocessing.reductions`) is not used: it exports blocks of its caching allocator, which
cannot be exported with `expandable_segments`, and a receiver that is killed never gives its
reference back, so that the block stays allocated for as long as the trainer lives.

Nothing here is called for a device other than CUDA's, `synchronize` apart.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from qerl_sync.errors import NoRoomError, TransportError
from qerl_sync.meta import format_bytes

HANDLE_BYTES = 64
# CUDA takes smaller allocations from a common block, and shares that block as a whole.
BLOCK_BYTES = 2 << 20
_OUT_OF_MEMORY = 2
_LAZY_ENABLE_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    """CUipcMemHandle: it is passed by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


def concrete_device(device: torch.device | None) -> torch.device:
    """Return the device with its index, which "cuda" leaves to the thread.

    Args:
        device: None: not known, which is taken to be the current CUDA device of a process that has
            used one.
    """
    if device is None:
        used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        device = torch.device("cuda" if used else "cpu")
    if device == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return device


def device_uuid(device: torch.device) -> str:
    """Identify the physical device (of a partitioned one, the part); empty if it is not CUDA's."""
    if device.type != "cuda":
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


def synchronize(device: torch.device) -> None:
    """Block until the device has done all that this process has asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def synchronize_stream(device: torch.device) -> None:
    """Block until the device has done what is in the current stream of this thread."""
    torch.cuda.current_stream(device).synchronize()


def allocate(nbytes: int, device: torch.device) -> int:
    """Return the address of new memory, outside of torch's allocator.

    Raises:
        NoRoomError: the device has not that much memory free, even after torch's cache was emptied.
    """
    # A block of its own: the other process maps whole blocks.
    nbytes = -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES
    address = ctypes.c_uint64()
    with _context(device) as driver:
        code = driver.cuMemAlloc_v2(ctypes.byref(address), nbytes)
        if code == _OUT_OF_MEMORY:
            torch.cuda.empty_cache()
            code = driver.cuMemAlloc_v2(ctypes.byref(address), nbytes)
    if code == _OUT_OF_MEMORY:
        free = int(torch.cuda.mem_get_info(device)[0])
        raise NoRoomError(
            f"{device} has {format_bytes(free)} free, {format_bytes(nbytes)} are needed for a "
            "receive buffer; take smaller sync.chunk_bytes or fewer sync.chunks_in_flight, give "
            "the engine less (gpu_memory_utilization), or set sync.transport: shm",
            needed_bytes=nbytes,
            free_bytes=free,
            transport="cuda_ipc",
        )
    _require(code, f"{format_bytes(nbytes)} cannot be allocated on {device}")
    return address.value


def free(address: int, device: torch.device) -> None:
    """Give memory of `allocate` back. Idle readers must have unmapped it."""
    with _context(device) as driver:
        driver.cuMemFree_v2(address)


def export_handle(address: int, device: torch.device) -> bytes:
    """Return what lets another process map memory of `allocate`."""
    handle = _Handle()
    with _context(device) as driver:
        code = driver.cuIpcGetMemHandle(ctypes.byref(handle), address)
    _require(code, f"memory of {device} cannot be shared between processes")
    return bytes(handle)


def map_handle(handle: bytes, device: torch.device) -> int:
    """Return the address at which another process's memory is mapped here.

    Raises:
        TransportError: CUDA refuses, as it does in containers without common IPC and PID
            namespaces, and for a handle of this process's own.
    """
    address = ctypes.c_uint64()
    with _context(device) as driver:
        code = driver.cuIpcOpenMemHandle_v2(
            ctypes.byref(address), _Handle.from_buffer_copy(handle), _LAZY_ENABLE_PEER_ACCESS
        )
    _require(code, f"the trainer's CUDA memory cannot be mapped on {device}")
    return address.value


def unmap(address: int, device: torch.device) -> None:
    """Undo `map_handle`. No tensor may refer to the memory any more."""
    with _context(device) as driver:
        driver.cuIpcCloseMemHandle(address)


def tensor_at(address: int, nbytes: int, device: torch.device, owner: object) -> torch.Tensor:
    """Return `nbytes` bytes at an address as a tensor with a storage of its own, which keeps
    `owner` alive."""
    interface = {
        "shape": (nbytes,),
        "typestr": "|u1",
        "data": (address, False),
        "strides": None,
        "version": 2,
    }
    array = SimpleNamespace(__cuda_array_interface__=interface, owner=owner)
    tensor = torch.as_tensor(array, device=device)
    if tensor.data_ptr() != address:
        raise TransportError(
            f"torch {torch.__version__} copies memory of {device} that it should refer to; set "
            "sync.transport: shm"
        )
    return tensor


def lock_pages(address: int, nbytes: int) -> bool:
    """Page-lock host memory, which CUDA copies from faster. Return whether it could be done."""
    return bool(_runtime().cudaHostRegister(address, nbytes, 0) == 0)


def unlock_pages(address: int) -> None:
    """Undo `lock_pages`, before the memory is unmapped."""
    _runtime().cudaHostUnregister(address)


@contextlib.contextmanager
def _context(device: torch.device) -> Iterator[Any]:
    """Make the device's primary context, which torch uses, that of this thread; yield the driver.

    A thread that has not used CUDA yet has none, and the driver would refuse its calls.
    """
    driver = _driver()
    _require(driver.cuCtxPushCurrent_v2(_primary_context(device.index)), f"{device} has no context")
    try:
        yield driver
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


@functools.cache
def _primary_context(index: int) -> ctypes.c_void_p:
    torch.cuda.init()  # type: ignore[no-untyped-call]
    driver, device, context = _driver(), ctypes.c_int(), ctypes.c_void_p()
    _require(driver.cuDeviceGet(ctypes.byref(device), index), f"CUDA has no device {index}")
    code = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    _require(code, f"the context of CUDA device {index} cannot be had")
    return context


@functools.cache
def _driver() -> Any:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as exc:
        raise TransportError(f"CUDA's driver library cannot be loaded: {exc}") from exc
    address, handle = ctypes.c_uint64, ctypes.POINTER(_Handle)
    for name, arguments in {
        "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
        "cuDevicePrimaryCtxRetain": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_int),
        "cuCtxPushCurrent_v2": (ctypes.c_void_p,),
        "cuCtxPopCurrent_v2": (ctypes.POINTER(ctypes.c_void_p),),
        "cuMemAlloc_v2": (ctypes.POINTER(address), ctypes.c_size_t),
        "cuMemFree_v2": (address,),
        "cuIpcGetMemHandle": (handle, address),
        "cuIpcOpenMemHandle_v2": (ctypes.POINTER(address), _Handle, ctypes.c_uint),
        "cuIpcCloseMemHandle": (address,),
        "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    }.items():
        function = getattr(driver, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    return driver


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _require(code: int, what: str) -> None:
    if code:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(name))
        reason = (name.value or b"unknown").decode()
        raise TransportError(f"{what} ({reason}, {code}); set sync.transport: auto or shm")
