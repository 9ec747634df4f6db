"""Sends chunks to one worker while the next ones are gathered."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from contextlib import suppress

import torch

from qerl_sync.errors import SyncError, TransportError
from qerl_sync.stopwatch import Stopwatch
from qerl_sync.wire.channel import Channel
from qerl_sync.wire.messages import Chunk

Job = tuple[Chunk, Sequence[torch.Tensor], Stopwatch]


class ChunkSender:
    """A thread that sends chunks over a channel, in order. Close it before the channel.

    Attributes:
        error: why the connection was given up; the channel raises PeerLostError from then on.
    """

    def __init__(self, channel: Channel, timeout_seconds: float) -> None:
        self.error: SyncError | None = None
        self._channel, self._timeout_seconds = channel, timeout_seconds
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="qerl-sync sender", daemon=True)
        self._thread.start()

    def send(self, chunk: Chunk, pieces: Sequence[torch.Tensor], watch: Stopwatch) -> None:
        """Begin to send a chunk. `pieces`, contiguous and in host memory, must stay as they are
        until the worker has credited it. `watch` records when it was written."""
        self._jobs.put((chunk, pieces, watch))

    def cancel(self) -> None:
        """Drop the chunks whose sending has not begun."""
        with suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()

    def close(self) -> None:
        """End the connection, and block until no memory is read any more."""
        self.cancel()
        self._jobs.put(None)
        self._channel.cut_off()
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            chunk, pieces, watch = job
            try:
                payload = [_bytes_of(piece) for piece in pieces]
                with watch.span("write", f"chunk {chunk.index} to {self._channel.peer}"):
                    self._channel.send(chunk, self._timeout_seconds, payload)
            except Exception as exc:
                self.error = exc if isinstance(exc, SyncError) else TransportError(str(exc))
                self._channel.cut_off()  # wakes the thread that waits for the credit
                return


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
