"""The trainer's end of a connection to one worker rank."""

from __future__ import annotations

import os
import queue
import secrets
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, TypeVar

import torch

from qerl_sync.errors import (
    AgreementError,
    ConfigError,
    PeerLostError,
    SyncError,
    TransportError,
)
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.stopwatch import Stopwatch
from qerl_sync.wire import cuda_memory
from qerl_sync.wire import messages as say
from qerl_sync.wire.connection import Connection
from qerl_sync.wire.device_segments import DeviceSegment
from qerl_sync.wire.host import host_id
from qerl_sync.wire.segments import SharedSegment

if TYPE_CHECKING:
    from qerl_sync.engines.ray_actor import RayActorClient
    from qerl_sync.transports.remote.staging import StagedChunk

M = TypeVar("M")
Job = tuple[say.Chunk, list[torch.Tensor], Stopwatch]

PROBE_BYTES = 32


class WorkerConnection(Connection):
    """A connection, what the worker said of itself, and how bytes get to it.

    Attributes:
        hello: what the worker said of itself, once `await_hello` has returned.
        kind: cuda_ipc, shm, tcp or ray, once a transport is open, and `reason`, why so.
        layer_map: where this rank's tensors land, once it was asked.
        plan_digest: of the plan that it took last.
        watch: records the spans of the current sync.
        check_alive: called while an answer is awaited; raises if waiting has become pointless.
    """

    hello: say.Hello
    timeout_seconds: float

    def __init__(self, connection: socket.socket, peer: str, key: bytes, role: str) -> None:
        super().__init__(connection, peer, key, role)
        self.kind = self.reason = self.plan_digest = ""
        self.watch = Stopwatch()
        self.layer_map: LayerMap | None = None
        self.check_alive: Callable[[], None] = lambda: None
        self._on_the_way: deque[int] = deque()
        self._store: RayActorClient | None = None
        self._mailbox = ""
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._sender: threading.Thread | None = None
        self._send_error: SyncError | None = None

    def await_hello(self, timeout_seconds: float) -> None:
        """Block until the worker says what it is. Close the connection if it does not."""
        self.timeout_seconds = timeout_seconds
        try:
            self.hello = self.expect(say.Hello, "its first message")
        except BaseException:
            self.close()
            raise
        self.peer = self.hello.worker

    def tell(self, message: say.Message) -> None:
        """Send a message. A worker that has given up raises here why it has."""
        try:
            self.send(message, self.timeout_seconds)
        except PeerLostError as exc:
            error: SyncError = exc
            with suppress(TransportError):  # no more messages
                error = say.error_of(self.skip_to(say.Failure, "its last words", 0.0), self.peer)
            raise error from None

    def expect(self, kind: type[M], what: str) -> M:
        """Return the worker's next message.

        Raises:
            SyncError: the worker's own, with its class, if that is what it sends.
            TransportError: something else arrived, or nothing.
        """
        try:
            message = self.receive(self.timeout_seconds, what, self.check_alive)
        except PeerLostError:
            if self._send_error is not None:
                raise self._send_error from None  # the sending thread gave the connection up
            raise
        if isinstance(message, say.Failure):
            raise say.error_of(message, self.peer)
        if not isinstance(message, kind):
            raise TransportError(f"{self.peer} sent {message.type!r} where {what} was next")
        return message

    def skip_to(
        self,
        kind: type[M],
        what: str,
        timeout_seconds: float,
        check_alive: Callable[[], None] = lambda: None,
    ) -> M:
        """Return the next message of that kind, and drop what was sent before it."""
        while not isinstance(message := self.receive(timeout_seconds, what, check_alive), kind):
            pass
        return message

    def announce(self, index: int, staged: StagedChunk, segments: Sequence[say.Segment]) -> None:
        """Send a chunk. Its memory must stay as it is until the chunk is loaded.

        Args:
            segments: all that the worker must know from here on, if others than before.
        """
        self._on_the_way.append(index)  # before it is sent: its credit may come at once
        in_pieces = self.kind in ("tcp", "ray")
        chunk = say.Chunk(
            index=index,
            places=staged.places.get(self.kind, []),
            pieces=[piece.tensors for piece in staged.pieces if in_pieces],
            in_place=staged.in_place,
            checksums=staged.checksums,
            changes=staged.changes,
            segments=list(segments),
        )
        if self._sender is not None:
            self._jobs.put((chunk, [piece.bytes for piece in staged.pieces], self.watch))
            return
        if self._store is None:
            self.tell(chunk)
            return
        # Before the message: the worker would wait for an object that the store has not taken.
        stored = staged.stored_by(self._store.put)
        self.tell(chunk)
        self._store.deliver(self._mailbox, index, stored)

    def await_loaded(self, index: int) -> bool:
        """Block until the worker has loaded all chunks up to `index` that we sent it.

        Returns:
            True if all of their credits had arrived before this call.
        """
        prompt = True
        while self._on_the_way and (first := self._on_the_way[0]) <= index:
            prompt &= self.readable
            credit = self.expect(say.Credit, f"loading chunk {first}")
            if credit.index != first:
                raise TransportError(f"{self.peer} credits chunk {credit.index}, not {first}")
            self._on_the_way.popleft()
        return prompt

    @property
    def busy(self) -> bool:
        """Return whether a chunk was sent that the worker has not reported as loaded."""
        return bool(self._on_the_way)

    def forget_chunks(self) -> None:
        """Drop what was not yet sent, and expect no credits: the sync of these chunks is over."""
        with suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()
        self._on_the_way.clear()

    def close(self) -> None:
        """End the connection, and block until no memory is read any more."""
        if self._sender is not None:
            self.forget_chunks()
            self._jobs.put(None)
            # A send that waits for a stopped worker ends by this; only then may slots be freed,
            # which the thread reads.
            self.cut_off()
            self._sender.join()
        super().close()

    # ---- how bytes travel

    def open_shm(self) -> None:
        """Have the worker read random bytes from shared memory and send them back."""
        self._prove("shm", SharedSegment(PROBE_BYTES), "another /dev/shm")

    def open_cuda_ipc(self, device: torch.device) -> None:
        """As `open_shm`, with memory of the GPU that both are on."""
        try:
            self._prove("cuda_ipc", DeviceSegment(PROBE_BYTES, device), f"other memory of {device}")
        except RuntimeError as exc:  # torch's
            raise TransportError(f"torch cannot use shared memory of {device}: {exc}") from exc

    def open_tcp(self, *, sealed: bool) -> None:
        """Send chunks behind their messages, by a thread, while the next ones are gathered.
        `sealed`: with authentication tags."""
        self._propose("tcp", {"sealed": sealed})
        self.sealed = sealed
        self._sender = threading.Thread(
            target=self._send_chunks, name="qerl-sync sender", daemon=True
        )
        self._sender.start()

    def open_store(self, store: RayActorClient) -> None:
        """Send chunks through an object store that all nodes share."""
        self._propose("ray", {"key": (box := secrets.token_hex(16))})
        store.require_mailbox(box)
        self._store, self._mailbox = store, box

    def _prove(self, kind: say.Way, probe: SharedSegment | DeviceSegment, other: str) -> None:
        # Random, so that a worker that sees other memory cannot have them by chance.
        nonce = secrets.token_bytes(PROBE_BYTES)
        with closing(probe):
            shown = probe.tensor(0, (PROBE_BYTES,), torch.uint8)
            shown.copy_(torch.frombuffer(bytearray(nonce), dtype=torch.uint8))
            if isinstance(probe, DeviceSegment):
                cuda_memory.synchronize_stream(probe.device)
            announced = say.Segment.model_validate(probe).model_dump()
            ready = self._propose(kind, {"probe": announced})
        if ready.options.get("probe") != nonce.hex():
            raise AgreementError(f"{self.peer} sees {other} than the trainer", subject="memory")

    def _propose(self, way: say.Way, options: dict[str, object]) -> say.Ready:
        seconds = self.timeout_seconds
        self.tell(say.Welcome(transport=way, timeout_seconds=seconds, options=options))
        return self.expect(say.Ready, f"opening {way}")

    def _send_chunks(self) -> None:
        while (job := self._jobs.get()) is not None:
            chunk, pieces, watch = job
            try:
                payload = [
                    piece.detach().reshape(-1).view(torch.uint8).numpy().data for piece in pieces
                ]
                with watch.span("write", f"chunk {chunk.index} to {self.peer}"):
                    self.send(chunk, self.timeout_seconds, payload)
            except Exception as exc:
                self._send_error = exc if isinstance(exc, SyncError) else TransportError(str(exc))
                self.cut_off()  # wakes the thread that waits for the credit
                return


def choose_transport(
    worker: WorkerConnection,
    wanted: str,
    *,
    authenticated: bool,
    store: RayActorClient | None = None,
    no_room: Mapping[str, str],
    device: torch.device | None = None,
) -> None:
    """Open `wanted`, or with "auto" the best that works; the connection remembers which and why.

    Shared memory is tried where the worker says that it runs under the same kernel, and memory of a
    GPU where it says that it is on the trainer's. It may fail there too (containers with a /dev/shm
    of their own): what follows is as for another host.

    Args:
        wanted: `sync.transport`.
        authenticated: trainer and workers share a token that never travelled, so that tags mean
            something.
        store: the object store of the worker's engine; None: it has none.
        no_room: why slots do not fit into a kind of shared memory, where that was tried.
        device: where the trainer's tensors lie; None: not known.

    Raises:
        SyncError: the transport that was asked for does not work, with the reason.
    """
    here = worker.hello.host == host_id()
    # Within one machine, a process that could change bytes on their way can change memory too.
    sealed = authenticated and not here
    opening: dict[str, Callable[[], None]] = {
        "shm": worker.open_shm,
        "tcp": lambda: worker.open_tcp(sealed=sealed),
    }
    if device is not None:
        opening["cuda_ipc"] = lambda: worker.open_cuda_ipc(device)
    if store is not None:
        opening["ray"] = lambda: worker.open_store(store)
    if wanted != "auto":
        if wanted == "ray" and store is None:
            raise ConfigError(
                "sync.transport: ray needs engines in Ray actors; choose auto, shm or tcp"
            )
        if wanted == "cuda_ipc" and (apart := _no_common_gpu(worker.hello, device)):
            raise AgreementError(
                f"sync.transport: cuda_ipc needs {worker.peer} in a process of its own on the "
                f"GPU that the trainer's tensors are on, and {apart}; choose auto",
                subject="device",
            )
        opening[wanted]()
        worker.kind, worker.reason = wanted, "sync.transport says so"
        return
    # In the order of trial: why not; empty where nothing is known to be against it.
    against: dict[str, str] = {}
    on_gpu = device is not None and bool(cuda_memory.device_uuid(device))
    if on_gpu:
        against["cuda_ipc"] = _no_common_gpu(worker.hello, device) or no_room.get("cuda_ipc", "")
    against["shm"] = no_room.get("shm", "") if here else "the worker is on another host"
    if store is not None:
        against["ray"] = ""
    failed = {
        "shm": "shared memory does not work: ",
        "ray": ", and the object store does not work: ",
    }
    for kind, why in against.items():
        if not why:
            try:
                opening[kind]()
            except SyncError as exc:
                against[kind] = f"{failed.get(kind, '')}{exc}"
            else:
                worker.kind = kind
                break
    else:
        opening["tcp"]()
        worker.kind = "tcp"
    not_gpu = f"; not cuda_ipc: {against['cuda_ipc']}" if on_gpu else ""
    worker.reason = {
        "cuda_ipc": "the worker can map the trainer's memory of the GPU that both are on",
        "shm": f"the worker can open the trainer's shared memory{not_gpu}",
    }.get(worker.kind, f"{against['shm']}{not_gpu}{against.get('ray', '')}")


def _no_common_gpu(worker: say.Hello, device: torch.device | None) -> str:
    """Return why the worker cannot map the trainer's memory of a GPU; empty if it may."""
    own = "" if device is None else cuda_memory.device_uuid(device)
    if not own:
        return f"those are on {device}"
    if worker.host != host_id():
        return "the worker is on another host"
    if not worker.device_uuid:
        return "the worker is on no CUDA device"
    if worker.device_uuid != own:
        return f"the worker is on the GPU {worker.device_uuid}, the trainer on {own}"
    if worker.pid == os.getpid():
        return "the worker is in the trainer's own process"  # CUDA refuses what is its own
    return ""
