"""What one trainer rank says to a worker, read ahead while the worker is busy loading."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch

from qerl_sync.errors import SyncError, TransportError, TransportTimeout
from qerl_sync.meta import ParamMeta
from qerl_sync.wire.channel import Channel
from qerl_sync.wire.messages import Chunk, End, Message, Ping, Pong
from qerl_sync.worker.protocol.chunk_receivers import ChunkReceiver

M = TypeVar("M")


@dataclass(frozen=True)
class Arrived:
    """A chunk whose tensors are here."""

    index: int
    tensors: list[torch.Tensor]
    in_place: bool
    checksums: list[int]


class Inbox:
    """Messages of one channel in order; of chunks, the tensors.

    A thread reads for as long as the connection lives. It never runs ahead of the memory that
    chunks arrive in: the trainer sends a chunk only when a slot is free for it.

    Args:
        inlet: how this trainer rank's chunks arrive; set before the first sync.
    """

    def __init__(self, channel: Channel, timeout_seconds: float) -> None:
        self.channel = channel
        self.chunk_receiver: ChunkReceiver | None = None
        self.timeout_seconds = timeout_seconds
        self._expected: Sequence[Sequence[ParamMeta]] = ()
        self._queue: queue.SimpleQueue[Message | Arrived | SyncError] = queue.SimpleQueue()
        self._lost: SyncError | None = None
        threading.Thread(target=self._read, name="qerl-sync inbox", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether the trainer is there now. Its thread may not yet have noticed that it left."""
        try:
            self.channel.require_open("looking for the trainer")
        except TransportError:
            return False
        return self._lost is None

    def expect(self, chunks: Sequence[Sequence[ParamMeta]]) -> None:
        """Of each chunk of the coming sync, the tensors that this trainer rank will send."""
        self._expected = chunks

    def send(self, message: Message) -> None:
        self.channel.send(message, self.timeout_seconds)

    def next(self, what: str) -> Message | Arrived:
        """Raises the error that ended the connection, or TransportTimeout."""
        if self._lost is not None and self._queue.empty():
            raise self._lost
        try:
            item = self._queue.get(timeout=self.timeout_seconds)
        except queue.Empty:
            raise TransportTimeout(
                f"this worker waited {self.timeout_seconds:.0f} s for {self.channel.peer}: {what}. "
                "It is stopped or slow; raise sync.timeout_seconds if it needs longer"
            ) from None
        if isinstance(item, SyncError):
            raise item
        return item

    def close(self) -> None:
        self.channel.close()
        with suppress(queue.Empty):  # chunks that nobody will load keep memory mapped
            while True:
                self._queue.get_nowait()
        if self.chunk_receiver is not None:
            self.chunk_receiver.close()

    def _read(self) -> None:
        try:
            while True:
                message = self.channel.receive(math.inf, "the trainer's next message")
                if isinstance(message, Ping):
                    self.send(Pong())
                    continue
                self._queue.put(self._fetch(message) if isinstance(message, Chunk) else message)
                if isinstance(message, End) and self.chunk_receiver is not None:
                    self.chunk_receiver.rest()
        except Exception as exc:
            self._lost = exc if isinstance(exc, SyncError) else TransportError(str(exc))
            self._queue.put(self._lost)

    def _fetch(self, chunk: Chunk) -> Arrived:
        if self.chunk_receiver is None or not 0 <= chunk.index < len(self._expected):
            raise TransportError(f"chunk {chunk.index} arrived, which no sync awaits")
        tensors = self.chunk_receiver.fetch(chunk, self._expected[chunk.index])
        return Arrived(chunk.index, tensors, chunk.in_place, chunk.checksums)
