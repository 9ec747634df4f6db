"""A worker's end of the connection to one trainer rank, read ahead while the worker loads."""

from __future__ import annotations

import math
import queue
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from qerl_sync.errors import SyncError, TransportError, TransportTimeout
from qerl_sync.meta import ParamMeta
from qerl_sync.wire import cuda_memory
from qerl_sync.wire import messages as say
from qerl_sync.wire.connection import Connection
from qerl_sync.wire.device_segments import AttachedDeviceSegment
from qerl_sync.wire.mirror import Mirror, travelling
from qerl_sync.wire.segments import AttachedSegment
from qerl_sync.worker.protocol.chunk_receivers import (
    ChunkReceiver,
    CudaIpcReceiver,
    ObjectStoreReceiver,
    ShmReceiver,
    TcpReceiver,
)


@dataclass(frozen=True)
class Arrived:
    """A chunk, with its tensors."""

    chunk: say.Chunk
    tensors: list[torch.Tensor]


class TrainerConnection(Connection):
    """Messages in order; of chunks, the tensors.

    A thread reads from `read_ahead` on, for as long as the connection lives. It never runs ahead of
    the memory that chunks arrive in: the trainer sends a chunk only when a slot is free for it.

    Attributes:
        chunk_receiver: how this trainer rank's chunks arrive, once `open_transport` has returned.
        expected: the tensors that this trainer rank sends with each chunk of the coming sync.
        mirror: what this trainer sent last, where its syncs build on that; of rank 0's connection.
    """

    timeout_seconds: float

    def __init__(self, connection: socket.socket, peer: str, key: bytes, role: str) -> None:
        super().__init__(connection, peer, key, role)
        self.chunk_receiver = ChunkReceiver()
        self.expected: Sequence[Sequence[ParamMeta]] = ()
        self.mirror: Mirror | None = None
        self._queue: queue.SimpleQueue[say.Message | Arrived | SyncError] = queue.SimpleQueue()
        self._error: SyncError | None = None

    def read_ahead(self, timeout_seconds: float) -> None:
        """Begin to read what the trainer says, for `next`."""
        self.timeout_seconds = timeout_seconds
        threading.Thread(target=self._read, name="qerl-sync inbox", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Return whether the trainer is there now. The thread may not yet have noticed that it
        left."""
        return self.connected and self._error is None

    def tell(self, message: say.Message) -> None:
        self.send(message, self.timeout_seconds)

    def next(self, what: str) -> say.Message | Arrived:
        """Return what comes next. Raise what ended the connection, or TransportTimeout."""
        if self._error is not None and self._queue.empty():
            raise self._error
        try:
            item = self._queue.get(timeout=self.timeout_seconds)
        except queue.Empty:
            raise TransportTimeout(
                f"this worker waited {self.timeout_seconds:.0f} s for {self.peer}: {what}. "
                "It is stopped or slow; raise sync.timeout_seconds if it needs longer"
            ) from None
        if isinstance(item, SyncError):
            raise item
        return item

    def open_transport(self, device: torch.device) -> None:
        """Try the ways of sending that the trainer proposes, until it is satisfied."""
        while not isinstance(proposal := self.next("how bytes will travel"), say.End):
            if not isinstance(proposal, say.Welcome):
                raise TransportError(f"{type(proposal).__name__} arrived where Welcome was next")
            try:
                options = self._open(proposal, device)
            except (SyncError, KeyError, ValueError, RuntimeError) as exc:  # RuntimeError: of torch
                self.tell(say.failure(exc))
            else:
                self.tell(say.Ready(options=options))

    def close(self) -> None:
        super().close()
        with suppress(queue.Empty):  # chunks that will not be loaded keep memory mapped
            while True:
                self._queue.get_nowait()
        self._free_memory()

    def _free_memory(self) -> None:
        self.chunk_receiver.close()
        self.mirror = None

    def _open(self, proposal: say.Welcome, device: torch.device) -> dict[str, Any]:
        """Make `chunk_receiver`. Return what shows the trainer that its memory is seen here."""
        kind, options = proposal.transport, proposal.options
        if kind in ("cuda_ipc", "shm"):
            probe = say.Segment.model_validate(options["probe"])
            if kind == "shm":
                seen = AttachedSegment(probe.name, probe.nbytes).read(0, probe.nbytes)
                self.chunk_receiver = ShmReceiver()
            else:
                device = cuda_memory.concrete_device(device)  # another is this thread's current one
                # Nothing refers to it when the answer leaves: the trainer frees the probe then.
                seen = AttachedDeviceSegment(probe.handle, probe.nbytes, device).read(
                    0, probe.nbytes
                )
                self.chunk_receiver = CudaIpcReceiver(device)
            return {"probe": seen.hex()}
        if kind == "tcp":
            self.sealed = bool(options["sealed"])
            self.chunk_receiver = TcpReceiver(self, proposal.timeout_seconds)
        else:
            key = str(options["key"])
            self.chunk_receiver = ObjectStoreReceiver(key, proposal.timeout_seconds)
        return {}

    def _read(self) -> None:
        try:
            while True:
                # Hours may pass between two syncs. The end of the connection ends this wait; the
                # kernel's probes find a dead host (`wire.connection`).
                message = self.receive(math.inf, "the trainer's next message")
                if isinstance(message, say.Ping):
                    self.tell(say.Pong())
                elif isinstance(message, say.Chunk):
                    if not 0 <= (index := message.index) < len(self.expected):
                        raise TransportError(f"chunk {index} arrived, which no sync awaits")
                    metas = travelling(self.expected[index], message.changes)
                    tensors = self.chunk_receiver.fetch(message, metas)
                    self._queue.put(Arrived(message, tensors))
                    del tensors  # the loader gives them up while this thread waits for the next
                else:
                    self._queue.put(message)
                if isinstance(message, say.End):
                    self.chunk_receiver.rest()
        except Exception as exc:
            self._error = exc if isinstance(exc, SyncError) else TransportError(str(exc))
            self._queue.put(self._error)
            # Here, not when the next trainer connects: the engine may serve for weeks without one.
            self._free_memory()
