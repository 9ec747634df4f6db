"""Chunks in memory of a GPU that trainer and worker share. `support.cuda_stand_in` is the GPU; on a
real one tests/gpu/test_cuda_ipc.py holds what the stand-in takes for granted."""

from __future__ import annotations

import pytest
import torch
from support.cuda_stand_in import UUID, CudaStandIn
from support.engines import NEW as NEW_SEED
from support.engines import OLD as OLD_SEED
from support.errors import raises
from support.loaders import CPU, NEW, OLD, serves, session
from support.remote import push
from support.remote import session as engine_session
from support.servers import wait_until

from qerl_sync import HFSource, SyncError, TransportError
from qerl_sync.errors import AgreementError, NoRoomError
from qerl_sync.plan.layer_map import LayerMap, ParentLayer
from qerl_sync.wire import cuda_memory
from qerl_sync.wire import messages as say
from qerl_sync.wire.device_segments import DeviceSegment
from qerl_sync.worker.load.memory import PeakMemory
from qerl_sync.worker.load.monitor import SyncMonitor

# As if the worker, which is in this process, had another.
BESIDE = {"pid": 1, "device_uuid": UUID}


@pytest.fixture
def gpu(monkeypatch):
    stand_in = CudaStandIn()
    stand_in.install(monkeypatch.setattr)
    yield stand_in
    assert stand_in.allocated == {}
    # A worker's thread may still be on its way out.
    assert wait_until(lambda: stand_in.mapped == {}, 5), stand_in.mapped


@pytest.fixture
def workers(workers):
    """`workers(BESIDE, ...)`: what each rank says of itself."""
    return lambda *said: workers(len(said), **{f"rank{rank}": one for rank, one in enumerate(said)})


@pytest.mark.parametrize("chunks_in_flight", [1, 2, 3])
@pytest.mark.parametrize("verify", ["coverage", "checksum"])
def test_every_worker_gets_everything(gpu, workers, chunks_in_flight, verify):
    engine = workers(BESIDE, BESIDE)
    options = {"chunks_in_flight": chunks_in_flight, "verify": verify}
    with session(engine, transport="cuda_ipc", **options) as sync:
        for _ in range(2):
            report = sync.push()
            assert serves(engine, NEW)
            assert report.num_chunks == len(NEW)
            assert (gpu.allocated, gpu.mapped) == ({}, {}), "memory of the GPU outlives the sync"
            for loader in engine.loaders:
                loader.serving = dict(OLD)


def test_a_slot_is_mapped_once(gpu, workers):
    with session(workers(BESIDE), transport="cuda_ipc") as sync:
        sync.push()
        gpu.calls.clear()
        report = sync.push()
    assert report.num_chunks > 2
    counted = {call: gpu.calls.count(call) for call in ("allocate", "map", "unmap", "free")}
    assert counted == {"allocate": 2, "map": 2, "unmap": 2, "free": 2}
    assert "unmap" not in gpu.calls[gpu.calls.index("free") :], "CUDA leaves that undefined"


def test_chunks_leave_when_they_are_copied_and_are_credited_when_they_are_read(
    gpu, workers, monkeypatch
):
    for kind in (say.Chunk, say.Credit):
        made = kind.__init__

        def noted(self, *, _made=made, _name=kind.__name__, **fields):
            gpu.calls.append(_name)
            _made(self, **fields)

        monkeypatch.setattr(kind, "__init__", noted)
    with session(workers(BESIDE), transport="cuda_ipc", chunks_in_flight=1) as sync:
        sync.push()
    calls = [call for call in gpu.calls if call[:4] in ("Chun", "Cred", "sync")]
    chunk = ["synchronize_stream", "Chunk", "synchronize", "Credit"]
    # Chunks and credits are made once where they leave; they arrive without __init__.
    assert calls == ["synchronize_stream", *chunk * len(NEW)]


@pytest.mark.parametrize("carrier", ["shm", "tcp"])
def test_no_slot_is_free_before_the_device_has_read_it(gpu, workers, monkeypatch, carrier):
    """Loaders queue copies from page-locked memory on a GPU, and return."""
    engine = workers(BESIDE)
    queued = []
    receive = engine.loaders[0].receive

    def queue(chunk, tensors):
        receive(chunk, tensors)
        queued.append(chunk)

    def credit(self, **fields):
        assert not queued
        say._Message.__init__(self, **fields)

    monkeypatch.setattr(engine.loaders[0], "receive", queue)
    monkeypatch.setattr(cuda_memory, "synchronize", lambda device: queued.clear())
    monkeypatch.setattr(say.Credit, "__init__", credit)
    with session(engine, transport=carrier) as sync:
        sync.push()
    assert serves(engine, NEW)


# ---------------------------------------------------------------------------------------- choice


def test_auto_takes_the_gpu_that_both_are_on(gpu, workers):
    engine = workers(BESIDE)
    with session(engine, transport="auto") as sync:
        assert sync.push().transport.startswith("cuda_ipc: ")
    assert serves(engine, NEW)


APART = [
    ({**BESIDE, "device_uuid": "GPU-another"}, "GPU-another"),
    ({**BESIDE, "device_uuid": ""}, "no CUDA device"),
    ({"device_uuid": UUID}, "own process"),
]


@pytest.mark.parametrize(("worker", "why"), APART)
def test_a_worker_elsewhere(gpu, workers, worker, why):
    engine = workers(worker)
    with session(engine, transport="cuda_ipc") as sync, raises(AgreementError, subject="device"):
        sync.push()
    with session(engine, transport="auto") as sync:
        transport = sync.push().transport
    assert transport.startswith("shm: ")
    assert why in transport
    assert serves(engine, NEW)


def test_a_worker_on_another_host(gpu, workers):
    engine = workers({**BESIDE, "host": "another"})
    with session(engine, transport="cuda_ipc") as sync, pytest.raises(AgreementError):
        sync.push()
    with session(engine, transport="auto") as sync:
        assert sync.push().transport.startswith("tcp: ")
    assert serves(engine, NEW)


def test_a_trainer_that_is_on_no_gpu(gpu, workers):
    engine = workers(BESIDE)
    gpu.uuid = ""
    with session(engine, transport="cuda_ipc") as sync, pytest.raises(AgreementError):
        sync.push()
    with session(engine, transport="auto") as sync:
        assert "cuda_ipc" not in sync.push().transport


def refuse(gpu, patch):
    gpu.mapped_fails = True


def map_another(gpu, patch):
    """The handle leads to memory that is not the trainer's."""
    found = gpu.tensor_at

    def moved(address, nbytes, device, owner):
        tensor = found(address, nbytes, device, owner)
        return tensor if isinstance(owner, DeviceSegment) else torch.zeros_like(tensor)

    patch.setattr(cuda_memory, "tensor_at", moved)


def fail_in_torch(gpu, patch):
    def fail(*arguments):
        raise RuntimeError("invalid device ordinal")

    patch.setattr(cuda_memory, "tensor_at", fail)


@pytest.mark.parametrize("broken", [refuse, map_another, fail_in_torch])
def test_a_probe_that_is_not_read_back(gpu, workers, monkeypatch, broken):
    engine = workers(BESIDE)
    broken(gpu, monkeypatch)
    with session(engine, transport="cuda_ipc") as sync, pytest.raises(SyncError):
        sync.push()
    assert serves(engine, OLD)
    with session(engine, transport="auto") as sync:
        transport = sync.push().transport
    assert transport.startswith("shm: ")
    assert "not cuda_ipc" in transport
    assert serves(engine, NEW)


def test_a_gpu_without_room(gpu, workers, monkeypatch):
    engine = workers(BESIDE)
    allocate, allocated = gpu.allocate, []

    def full(nbytes, device):
        allocated.append(nbytes)
        if len(allocated) > 2:  # after the probe and the first slot
            raise NoRoomError("full", needed_bytes=nbytes, transport="cuda_ipc")
        return allocate(nbytes, device)

    monkeypatch.setattr(cuda_memory, "allocate", full)
    with session(engine, transport="cuda_ipc") as sync, pytest.raises(NoRoomError):
        sync.push()
    assert serves(engine, OLD)
    allocated.clear()
    with session(engine, transport="auto") as sync:
        for _ in range(2):
            transport = sync.push().transport
    assert transport.startswith("shm: ")
    assert "not cuda_ipc: full" in transport
    assert serves(engine, NEW)


@pytest.mark.parametrize("other", [{}, {"host": "another"}])
def test_workers_on_the_gpu_and_elsewhere(gpu, workers, other):
    engine = workers(BESIDE, other)
    with session(engine, transport="auto") as sync:
        for _ in range(2):
            report = sync.push()
            assert serves(engine, NEW)
            assert "cuda_ipc: " in report.transport
            assert ("tcp: " if other else "shm: ") in report.transport
            for loader in engine.loaders:
                loader.serving = dict(OLD)


# -------------------------------------------------------------------------------------- failures


def test_a_worker_that_fails_gives_the_memory_back(gpu, workers):
    engine = workers(BESIDE, BESIDE)

    def fail():
        raise TransportError("the loader failed")

    with session(engine, transport="cuda_ipc") as sync:
        sync.push()
        engine.loaders[1].before_load = fail
        with pytest.raises(TransportError):
            sync.push()
        assert (gpu.allocated, gpu.mapped) == ({}, {})
        engine.loaders[1].before_load = lambda: None
        sync.push()
    assert serves(engine, NEW)


def test_a_worker_that_dies_gives_the_memory_back(gpu, workers):
    engine = workers(BESIDE, BESIDE)
    with session(engine, transport="cuda_ipc") as sync:
        sync.push()
        engine.loaders[1].before_load = engine.connections[1].close
        with pytest.raises(TransportError):
            sync.push()
        assert gpu.allocated == {}
        engine.loaders[1].before_load = lambda: None
        sync.push()
    assert serves(engine, NEW)


def test_a_worker_that_fails_has_unmapped_the_slots_when_it_says_so(gpu, workers, monkeypatch):
    """The tensors of the chunk are in the frames of the traceback."""
    engine = workers(BESIDE)
    failure, mapped = say.failure, []

    def fail(chunk, tensors):
        taken = dict(tensors)
        raise TransportError(f"cannot load {list(taken)}")

    def tell(error):
        mapped.append(dict(gpu.mapped))
        return failure(error)

    monkeypatch.setattr(engine.loaders[0], "receive", fail)
    monkeypatch.setattr(say, "failure", tell)
    sync = session(engine, transport="cuda_ipc", chunks_in_flight=1)
    with sync, pytest.raises(TransportError, match="cannot load"):
        sync.push()
    assert mapped == [{}]


@pytest.mark.parametrize("place", [(0, -64), (0, 1 << 40), (0, 3), (-1, 0), (7, 0)])
def test_places_outside_of_the_slots_are_refused(gpu, workers, monkeypatch, place):
    engine = workers(BESIDE)
    send = say.encode

    def moved(message):
        if isinstance(message, say.Chunk):
            message = message.model_copy(update={"places": [place] * len(message.places)})
        return send(message)

    with session(engine, transport="cuda_ipc") as sync:
        with monkeypatch.context() as patch:
            patch.setattr("qerl_sync.wire.connection.encode", moved)
            with pytest.raises(TransportError):
                sync.push()
        sync.push()
    assert serves(engine, NEW)


@pytest.mark.parametrize("handle", ["0" * 127, "g" * 128, "0" * 130, "\n" + "0" * 127])
def test_a_handle_is_64_bytes(handle):
    with pytest.raises(ValueError, match="handle"):
        say.Segment(name="a", nbytes=1, handle=handle)


# -------------------------------------------------------------------------------------- accounts


def test_a_gpus_worker_counts_what_it_holds_in_host_memory():
    """Over shared memory and sockets tensors arrive there; deferred layers must be copied out."""
    layer = torch.nn.Linear(2, 2)
    layers = {"": ParentLayer("", "Attention", 4, 4, deferred=True)}
    monitor = SyncMonitor(layer, LayerMap(layers, {}), layers, borrowed=True)
    slot = torch.ones(4)
    arguments = {"param": layer.weight, "loaded_weight": slot}
    monitor.begin("weight")
    monitor.held(layer, "weight", arguments, 4)
    assert monitor.trace().peak_buffered_bytes == slot.nbytes
    assert arguments["loaded_weight"].data_ptr() != slot.data_ptr()


def test_mapped_memory_is_not_the_workers_on_a_gpu():
    """torch's allocator, which a GPU's worker measures by, does not see it."""
    assert PeakMemory(CPU).counts_mapped
    assert not PeakMemory(torch.device("cuda")).counts_mapped


# --------------------------------------------------------------------------------------- engines


@pytest.fixture
def engine(gpu, remote):
    """vLLM in a process of its own, which takes its memory for that of the same GPU."""
    own = remote("own process")
    own.rpc("use_cuda_stand_in", UUID)
    yield own
    own.rpc("use_cuda_stand_in", "")


@pytest.mark.vllm
@pytest.mark.parametrize("options", [{}, {"verify": "checksum"}, {"chunks_in_flight": 1}])
def test_equals_a_fresh_engine(engine, options):
    model = HFSource(engine.trainers[NEW_SEED])
    with engine_session(
        engine, model, transport="cuda_ipc", chunk_bytes="40KiB", **options
    ) as sync:
        for _ in range(2):
            report = sync.push()
            assert engine.wrong_weights(NEW_SEED) == []
            assert engine.generates_as(NEW_SEED)
            assert report.prediction_exact, report.first_difference
            assert report.num_chunks > 2
    assert push(engine, OLD_SEED, transport="auto").transport.startswith("cuda_ipc: ")
    assert engine.wrong_weights(OLD_SEED) == []


@pytest.mark.vllm
def test_what_waits_for_its_layer_is_staged_from_the_gpu(engine):
    options = {"policy": "spill", "source_order": "random:0", "chunk_bytes": "20KiB"}
    report = push(engine, NEW_SEED, transport="cuda_ipc", **options)
    assert engine.wrong_weights(NEW_SEED) == []
    assert report.peak_staged_bytes_measured == report.peak_staged_bytes_predicted > 0
    assert report.prediction_exact, report.first_difference


@pytest.mark.vllm
def test_a_failed_sync_goes_back_to_the_old_version(engine):
    """vLLM fails in the middle, with views of the slots in its hands."""
    engine.rpc("break_loader", 0, "")
    with engine_session(
        engine,
        HFSource(engine.trainers[NEW_SEED]),
        transport="cuda_ipc",
        chunk_bytes="40KiB",
        on_failure="rollback",
    ) as sync:
        try:
            with pytest.raises(SyncError):
                sync.push()
        finally:
            engine.rpc("mend_loader")
        assert engine.wrong_weights(OLD_SEED) == []
        sync.push()
        assert engine.wrong_weights(NEW_SEED) == []
