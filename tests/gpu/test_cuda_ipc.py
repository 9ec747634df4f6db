"""CUDA's memory between two processes on one GPU: what tests/transport/test_cuda_ipc.py, which has
no GPU, takes for granted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import slow_echo
from support.loaders import TensorSource
from support.servers import wait_until

from qerl_sync import RemoteTransport, SyncConfig, SyncSession, TransportError
from qerl_sync.bench.echo import EchoWorker, checksum
from qerl_sync.errors import NoRoomError
from qerl_sync.wire.device_segments import DeviceSegment

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
MIB = 1 << 20
TIMEOUT_SECONDS = 60


class CudaSource(TensorSource):
    device = CUDA


@pytest.fixture(autouse=True)
def _workers_find_the_tests(monkeypatch):
    root = Path(__file__).parents[2]
    path = [str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


def source(seed: int = 0) -> CudaSource:
    """Some 30 MiB of several dtypes, on the GPU; two tensors are not contiguous."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    held = {}
    for index in range(24):
        dtype = (torch.bfloat16, torch.float32, torch.float16)[index % 3]
        values = torch.randn(641 + index, 700, generator=generator, device=CUDA)
        held[f"layer.{index}.weight"] = values.to(dtype)
    held["transposed"] = torch.randn(300, 200, generator=generator, device=CUDA).T
    held["sliced"] = torch.randn(300, 200, generator=generator, device=CUDA)[:, ::2]
    held["empty"] = torch.empty(0, 3, device=CUDA)
    held["bytes"] = torch.randint(0, 255, (7,), dtype=torch.uint8, device=CUDA)
    return CudaSource(held)


def session(worker: EchoWorker, held: CudaSource, **options) -> SyncSession:
    given = {"timeout_seconds": TIMEOUT_SECONDS, "chunk_bytes": "4MiB", **options}
    sync = SyncConfig.of(**given)
    transport = RemoteTransport(
        worker,
        transport=sync.transport,
        chunks_in_flight=sync.chunks_in_flight,
        timeout_seconds=sync.timeout_seconds,
    )
    return SyncSession(held, transport, sync)


def sums(held: CudaSource) -> dict[str, int]:
    return {name: checksum(tensor) for name, tensor in held.held.items()}


def free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info(CUDA)[0]


@pytest.mark.parametrize(
    ("chunks_in_flight", "allocator"), [(1, ""), (3, ""), (2, "expandable_segments:True")]
)
def test_a_worker_has_what_the_trainer_sent(monkeypatch, chunks_in_flight, allocator):
    if allocator:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", allocator)  # of the worker
    held, free = source(), []
    options = {"chunks_in_flight": chunks_in_flight, "verify": "checksum"}
    with EchoWorker("cuda:0") as worker, session(worker, held, **options) as sync:
        worker.check(True)
        for _ in range(3):
            for tensor in held.held.values():
                tensor.add_(1)
            allocated = torch.cuda.memory_allocated()
            report = sync.push()
            assert report.transport.startswith("cuda_ipc: "), report.transport
            assert report.num_chunks > 3
            assert worker.checksums() == sums(held)
            assert torch.cuda.memory_allocated() == allocated
            free.append(free_bytes())
    assert abs(free[1] - free[2]) < 2 * MIB, "the GPU's memory shrinks from sync to sync"


def test_no_slot_is_written_before_it_was_read():
    """The worker's copies are queued behind a kernel, and there is one slot."""
    held = source()
    with (
        EchoWorker("cuda:0", slow_echo.NAME) as worker,
        session(worker, held, transport="cuda_ipc", chunks_in_flight=1) as sync,
    ):
        for seed in range(2):
            held.held = source(seed).held
            assert sync.push().num_chunks > 3
            assert worker.checksums() == sums(held)


def test_no_chunk_leaves_before_it_was_copied():
    """The trainer's copies are queued behind a kernel."""
    held = source()
    materialize = held.materialize

    def late(names):
        torch.cuda._sleep(slow_echo.CYCLES)
        return materialize(names)

    held.materialize = late
    with (
        EchoWorker("cuda:0") as worker,
        session(worker, held, transport="cuda_ipc", chunks_in_flight=3) as sync,
    ):
        worker.check(True)
        sync.push()
        assert worker.checksums() == sums(held)


@pytest.mark.parametrize("carrier", ["shm", "tcp"])
def test_host_memory_is_not_written_before_it_was_read(carrier):
    held = source()
    with (
        EchoWorker("cuda:0", slow_echo.NAME) as worker,
        session(worker, held, transport=carrier, chunks_in_flight=1) as sync,
    ):
        sync.push()
        assert worker.checksums() == sums(held)


def test_a_worker_that_is_killed_gives_the_memory_back():
    held = source()
    materialize, chunks = held.materialize, []
    with EchoWorker("cuda:0") as worker, session(worker, held, transport="cuda_ipc") as sync:
        sync.push()
        before = free_bytes()

        def kill(names):
            chunks.append(names)
            if len(chunks) == 4:
                worker.kill()
            return materialize(names)

        held.materialize = kill
        started = time.monotonic()
        with pytest.raises(TransportError):
            sync.push()
        assert time.monotonic() - started < TIMEOUT_SECONDS
        assert wait_until(lambda: free_bytes() >= before)


def test_a_gpu_without_room():
    with pytest.raises(NoRoomError) as refused:
        DeviceSegment(1 << 45, CUDA)
    assert refused.value.transport == "cuda_ipc"
    assert refused.value.needed_bytes > refused.value.free_bytes > 0


# What may break a context of CUDA has a process of its own. Each prints what it has found, and goes
# on when it is told to.
OWNER = """
import sys, torch
from qerl_sync.wire.device_segments import DeviceSegment
segment = DeviceSegment(int(sys.argv[1]), torch.device("cuda", 0))
segment.tensor(0, (segment.nbytes,), torch.uint8).copy_(torch.arange(segment.nbytes) % 251)
torch.cuda.synchronize()
print(segment.handle, flush=True)
sys.stdin.read()
"""
READER = """
import sys, time, torch
from qerl_sync.buffers.detect import storages_of
from qerl_sync.wire.device_segments import AttachedDeviceSegment
device, nbytes = torch.device("cuda", 0), int(sys.argv[2])
free = lambda: torch.cuda.mem_get_info(device)[0]
before = free()
mapped = AttachedDeviceSegment(sys.argv[1], nbytes, device)
view = mapped.tensor(64, (4,), torch.uint8)
assert [storage.nbytes for storage in storages_of(view)] == [4]
print(view.tolist(), mapped.tensor(nbytes - 4, (4,), torch.uint8).tolist(), flush=True)
sys.stdin.readline()
print(view.tolist(), flush=True)
sys.stdin.readline()
del mapped, view
deadline = time.monotonic() + 20
while free() < before + nbytes and time.monotonic() < deadline:
    time.sleep(0.1)
print(free() - before, flush=True)
"""
OWN_HANDLE = """
import torch
from qerl_sync import TransportError
from qerl_sync.wire.device_segments import AttachedDeviceSegment, DeviceSegment
device = torch.device("cuda", 0)
own = DeviceSegment(32, device)
try:
    AttachedDeviceSegment(own.handle, 32, device)
except TransportError as exc:
    print("refused", exc)
print(torch.ones(3, device=device).sum().item())
"""


@contextmanager
def running(program: str, *arguments: str):
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(TIMEOUT_SECONDS)
        process.stdin.close()
        process.stdout.close()


def go_on(process) -> str:
    print(file=process.stdin, flush=True)
    return process.stdout.readline().strip()


def test_a_process_cannot_map_its_own_memory():
    """`peer.choose_transport` must not offer it."""
    with running(OWN_HANDLE) as process:
        printed = process.stdout.read()
    assert printed.startswith("refused")
    assert printed.endswith("3.0\n"), "the context is broken"


def test_a_trainer_that_is_killed_takes_nothing_from_its_worker():
    """What is mapped stays readable, and is free when it was unmapped."""
    nbytes = 64 * MIB
    with running(OWNER, str(nbytes)) as owner:
        handle = owner.stdout.readline().strip()
        with running(READER, handle, str(nbytes)) as reader:
            last = [(nbytes - 4 + place) % 251 for place in range(4)]
            assert reader.stdout.readline().strip() == f"{[64, 65, 66, 67]} {last}"
            owner.kill()
            owner.wait(TIMEOUT_SECONDS)
            assert go_on(reader) == "[64, 65, 66, 67]"
            assert int(go_on(reader)) >= nbytes
