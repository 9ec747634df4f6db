"""One worker rank, as the trainer sees it."""

from __future__ import annotations

import os
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
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
from qerl_sync.transports.remote.sender import ChunkSender
from qerl_sync.wire import cuda_memory
from qerl_sync.wire import messages as say
from qerl_sync.wire.channel import Channel
from qerl_sync.wire.device_segments import DeviceSegment
from qerl_sync.wire.segments import SharedSegment

if TYPE_CHECKING:
    from qerl_sync.engines.base import ObjectStore
    from qerl_sync.transports.remote.staging import StagedChunk

M = TypeVar("M")

# How long a worker may take to answer a ping. Its thread for that waits for nothing, but shares the
# interpreter with vLLM. One that takes longer is connected anew.
PING_SECONDS = 10.0


# Random, so that a worker that sees other memory cannot have them by chance.
PROBE_BYTES = 32


def _nonce() -> torch.Tensor:
    return torch.frombuffer(bytearray(secrets.token_bytes(PROBE_BYTES)), dtype=torch.uint8)


def _nothing() -> None:
    pass


class Peer:
    """A connection, what the worker said of itself, and how bytes get to it.

    Attributes:
        kind: cuda_ipc, shm, tcp or ray, once a transport is open, and `reason`, why so.
        layer_map: where this rank's tensors land, once it was asked.
        plan_digest: of the plan that it took last.
    """

    watch = Stopwatch()  # of the current sync

    def __init__(self, channel: Channel, timeout_seconds: float) -> None:
        self._channel = channel
        self._timeout_seconds = timeout_seconds
        self._sender: ChunkSender | None = None
        self._store: ObjectStore | None = None
        self._mailbox = ""
        self._on_the_way: deque[int] = deque()
        self.check_alive: Callable[[], None] = _nothing
        try:
            self.hello = self.expect(say.Hello, "its first message")
        except BaseException:
            channel.close()
            raise
        channel.peer = self.name
        self.kind = self.reason = ""
        self.layer_map: LayerMap | None = None
        self.plan_digest = ""

    @property
    def name(self) -> str:
        return self.hello.worker

    def send(self, message: say.Message) -> None:
        try:
            self._channel.send(message, self._timeout_seconds)
        except PeerLostError as exc:
            raise self._last_words() or exc from None

    def _last_words(self) -> SyncError | None:
        """A worker that gives up says why before it closes the connection."""
        with suppress(TransportError):
            while True:
                message = self._channel.receive(0.0, "its last words")
                if isinstance(message, say.Failure):
                    return say.error_of(message, self.name)
        return None

    def expect(self, kind: type[M], what: str) -> M:
        """The worker's next message.

        Raises:
            SyncError: the worker's own, with its class, if that is what it sends.
            TransportError: something else arrived, or nothing.
        """
        try:
            message = self._channel.receive(self._timeout_seconds, what, self.check_alive)
        except PeerLostError:
            if self._sender is not None and self._sender.error is not None:
                raise self._sender.error from None  # it gave the connection up
            raise
        if isinstance(message, say.Failure):
            # Not `name`: a worker that another trainer holds refuses before it says who it is.
            raise say.error_of(message, self._channel.peer)
        if not isinstance(message, kind):
            raise TransportError(
                f"{self._channel.peer} sent {message.type!r} where {what} was next"
            )
        return message

    def require_connected(self, what: str) -> None:
        """Raises PeerLostError if the worker has closed the connection or died; says that we were
        doing `what`."""
        self._channel.require_open(what)

    @property
    def connected(self) -> bool:
        """Return whether the connection is open, as far as can be told without asking."""
        with suppress(PeerLostError):
            self.require_connected("looking for it")
            return True
        return False

    def skip_to(self, kind: type[M], what: str, timeout_seconds: float) -> M:
        """The next message of that kind; what was sent before it no longer counts."""
        while True:
            message = self._channel.receive(timeout_seconds, what, self.check_alive)
            if isinstance(message, kind):
                return message

    def ping(self) -> None:
        """Begin to ask the worker for a sign of life; `await_pong` has the answer."""
        self._channel.send(say.Ping(), PING_SECONDS)

    def await_pong(self) -> None:
        """Block until the worker answers `ping`. What it sent before no longer counts.

        Raises:
            TransportError: the connection leads nowhere, though neither side has closed it.
        """
        while not isinstance(self._channel.receive(PING_SECONDS, "a sign of life"), say.Pong):
            pass

    def announce(self, chunk: say.Chunk, staged: StagedChunk) -> None:
        """Send a chunk. Its memory must stay as it is until the chunk is loaded."""
        self._on_the_way.append(chunk.index)
        if self._sender is None and self._store is None:
            self.send(chunk)
            return
        pieces = [piece.tensors for piece in staged.pieces]
        chunk = chunk.model_copy(update={"places": [], "segments": [], "pieces": pieces})
        if self._sender is not None:
            self._sender.send(chunk, [piece.bytes for piece in staged.pieces], self.watch)
        elif self._store is not None:
            self.send(chunk)
            self._store.deliver(self._mailbox, chunk.index, staged.stored_by(self._store.put))

    def await_loaded(self, index: int) -> bool:
        """Until the worker has loaded all chunks up to `index` that we sent it. Returns whether it
        had said so before it was asked."""
        prompt = True
        while self._on_the_way and self._on_the_way[0] <= index:
            prompt &= self._channel.readable
            self._take_credit()
        return prompt

    @property
    def busy(self) -> bool:
        """Whether there is something that we sent it and that it has not said to have loaded."""
        return bool(self._on_the_way)

    def _take_credit(self) -> None:
        first = self._on_the_way[0]
        credit = self.expect(say.Credit, f"loading chunk {first}")
        if credit.index != first:
            raise TransportError(f"{self.name} credits chunk {credit.index}, not {first}")
        self._on_the_way.popleft()

    def open_shm(self) -> None:
        """Show the worker a piece of shared memory; it must read back what is in it."""
        probe = SharedSegment(PROBE_BYTES)
        try:
            nonce = _nonce()
            probe.bytes.copy_(nonce)
            announced = say.Segment(name=probe.name, nbytes=probe.nbytes)
            self._prove("shm", announced, nonce, "another /dev/shm")
        finally:
            probe.close()

    def open_cuda_ipc(self, device: torch.device) -> None:
        """Do the same with memory of the GPU that both are on."""
        try:
            probe = DeviceSegment(PROBE_BYTES, device)
            try:
                nonce = _nonce()
                probe.tensor(0, (PROBE_BYTES,), torch.uint8).copy_(nonce)
                cuda_memory.synchronize_stream(device)
                announced = say.Segment(name=probe.name, nbytes=probe.nbytes, handle=probe.handle)
                self._prove("cuda_ipc", announced, nonce, f"other memory of {device}")
            finally:
                probe.close()
        except RuntimeError as exc:  # torch's
            raise TransportError(f"torch cannot use shared memory of {device}: {exc}") from exc

    def _prove(self, kind: str, probe: say.Segment, nonce: torch.Tensor, other: str) -> None:
        ready = self._propose(kind, {"probe": probe.model_dump()})
        if ready.options.get("probe") != bytes(nonce.numpy()).hex():
            raise AgreementError(f"{self.name} sees {other} than the trainer")
        self.kind = kind

    def open_tcp(self, *, sealed: bool) -> None:
        """Send chunks behind their messages. `sealed`: with authentication tags."""
        self._propose("tcp", {"sealed": sealed})
        self._channel.sealed = sealed
        self._sender = ChunkSender(self._channel, self._timeout_seconds)
        self.kind = "tcp"

    def open_store(self, store: ObjectStore) -> None:
        """Have chunks brought by a store that all nodes share."""
        self._propose("ray", {"key": (box := secrets.token_hex(16))})
        store.require_mailbox(box)
        self._store, self._mailbox = store, box
        self.kind = "ray"

    def forget_chunks(self) -> None:
        """Drop what was not yet sent, and expect no credits: the sync of these chunks is over."""
        if self._sender is not None:
            self._sender.cancel()
        self._on_the_way.clear()

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()
        self._channel.close()

    def _propose(self, transport: str, options: dict[str, object]) -> say.Ready:
        self.send(self._welcome(transport, options))
        return self.expect(say.Ready, f"opening {transport}")

    def _welcome(self, transport: str, options: dict[str, object]) -> say.Welcome:
        return say.Welcome.model_validate(
            {
                "transport": transport,
                "timeout_seconds": self._timeout_seconds,
                "options": options,
            }
        )


@dataclass(frozen=True)
class Ways:
    """How a trainer can send its chunks.

    Attributes:
        wanted: `sync.transport`.
        authenticated: trainer and workers share a token that never travelled, so that tags mean
            something.
        store: the object store of the peer's engine; None: it has none.
        no_room: why slots do not fit into a kind of shared memory, where that was tried.
        device: where the trainer's tensors lie; None: not known.
    """

    wanted: str
    authenticated: bool
    store: ObjectStore | None = None
    no_room: Mapping[str, str] = field(default_factory=dict)
    device: torch.device | None = None


def choose_transport(peer: Peer, ways: Ways, own_host: str) -> None:
    """Open `wanted`, or with "auto" the best that works; the peer remembers which and why.

    Shared memory is tried where the worker says that it runs under the same kernel, and memory of a
    GPU where it says that it is on the trainer's. It may fail there too (containers with a /dev/shm
    of their own): what follows is as for another host.

    Raises:
        SyncError: the transport that was asked for does not work, with the reason.
    """
    here = peer.hello.host == own_host
    # Within one machine, whoever could change bytes on their way can change memory as well.
    sealed = ways.authenticated and not here
    if ways.wanted != "auto":
        if ways.wanted == "ray" and ways.store is None:
            raise ConfigError(
                "sync.transport: ray needs engines in Ray actors; choose auto, shm or tcp"
            )
        if ways.store is not None and ways.wanted == "ray":
            peer.open_store(ways.store)
        elif ways.wanted == "tcp":
            peer.open_tcp(sealed=sealed)
        elif ways.wanted == "cuda_ipc":
            if apart := _no_common_gpu(peer.hello, ways.device, own_host):
                raise AgreementError(
                    f"sync.transport: cuda_ipc needs {peer.name} in a process of its own on the "
                    f"GPU that the trainer's tensors are on, and {apart}; choose auto"
                )
            assert ways.device is not None
            peer.open_cuda_ipc(ways.device)
        else:
            peer.open_shm()
        peer.reason = "sync.transport says so"
        return
    on_gpu = ""
    if ways.device is not None and cuda_memory.device_uuid(ways.device):
        on_gpu = _no_common_gpu(peer.hello, ways.device, own_host)
        on_gpu = on_gpu or ways.no_room.get("cuda_ipc", "")
        if not on_gpu:
            try:
                peer.open_cuda_ipc(ways.device)
            except SyncError as exc:
                on_gpu = str(exc)
            else:
                peer.reason = "the worker can map the trainer's memory of the GPU that both are on"
                return
        on_gpu = f"; not cuda_ipc: {on_gpu}"
    reason = ways.no_room.get("shm", "") if here else "the worker is on another host"
    if here and not reason:
        try:
            peer.open_shm()
        except SyncError as exc:
            reason = f"shared memory does not work: {exc}"
        else:
            peer.reason = f"the worker can open the trainer's shared memory{on_gpu}"
            return
    reason += on_gpu
    if ways.store is not None:
        try:
            peer.open_store(ways.store)
        except SyncError as exc:
            reason += f", and the object store does not work: {exc}"
        else:
            peer.reason = reason
            return
    peer.open_tcp(sealed=sealed)
    peer.reason = reason


def _no_common_gpu(worker: say.Hello, device: torch.device | None, own_host: str) -> str:
    """Return why the worker cannot map the trainer's memory of a GPU; empty if it may."""
    own = "" if device is None else cuda_memory.device_uuid(device)
    if not own:
        return f"those are on {device}"
    if worker.host != own_host:
        return "the worker is on another host"
    if not worker.device_uuid:
        return "the worker is on no CUDA device"
    if worker.device_uuid != own:
        return f"the worker is on the GPU {worker.device_uuid}, the trainer on {own}"
    if worker.pid == os.getpid():
        return "the worker is in the trainer's own process"  # CUDA refuses what is its own
    return ""
