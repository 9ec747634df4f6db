"""Make tensors of a chunk's bytes in the worker: mapped from shared memory, or received."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

import torch

from qerl_sync.errors import TransportError
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.staging import offsets, spans
from qerl_sync.wire.connection import Connection
from qerl_sync.wire.device_segments import AttachedDeviceSegment
from qerl_sync.wire.messages import Chunk, Segment
from qerl_sync.wire.segments import AttachedSegment, PrivateMemory, read_only_view
from qerl_sync.worker.protocol import mailbox

Place = tuple[int, int]
A = TypeVar("A", AttachedSegment, AttachedDeviceSegment)


class ChunkReceiver:
    """One trainer rank's chunks. `prepare` before a sync, `fetch` for each chunk, `rest` after it.

    `fetch` and `rest` run in a thread of their own while the worker loads; the others do not. This
    class stands for a connection on which no transport was opened.

    Attributes:
        standing_bytes: memory of the worker's own that it holds from sync to sync.
    """

    standing_bytes = 0

    def prepare(self, segments: Sequence[Segment], slots: Sequence[int]) -> None:
        """Get the memory that the next sync arrives in. Raise TransportError if there is none."""
        raise TransportError("the trainer has not opened a transport on this connection")

    def fetch(self, chunk: Chunk, metas: Sequence[ParamMeta]) -> list[torch.Tensor]:
        """Return the chunk's tensors, in memory that is reused `chunks_in_flight` chunks later.

        Raises:
            TransportError: a tensor would lie outside of that memory, or its bytes do not come.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Unmap what the trainer frees when the sync is over. Every chunk is loaded by now."""

    def rest(self) -> None:
        """Give back what the next sync can get anew. This one is over."""

    def close(self) -> None:
        """Release all memory."""


class SegmentReceiver(ChunkReceiver, ABC, Generic[A]):
    """Views of the trainer's memory, which is mapped once: nothing is copied."""

    def __init__(self) -> None:
        self._attached: dict[str, A] = {}
        self._table: list[A] = []

    @abstractmethod
    def _attach(self, segment: Segment) -> A:
        """Map a segment that was announced."""

    def prepare(self, segments: Sequence[Segment], slots: Sequence[int]) -> None:
        known = self._attached
        self._attached = {s.name: known.get(s.name) or self._attach(s) for s in segments}
        self._table = list(self._attached.values())

    def fetch(self, chunk: Chunk, metas: Sequence[ParamMeta]) -> list[torch.Tensor]:
        if chunk.segments:
            self.prepare(chunk.segments, ())
        if len(chunk.places) != len(metas):
            raise TransportError(
                f"chunk {chunk.index} brings {len(chunk.places)} tensors, the plan has {len(metas)}"
            )
        places = list(zip(metas, chunk.places, strict=True))
        for meta, (number, offset) in places:
            dtype: torch.dtype = getattr(torch, meta.dtype)
            known = 0 <= number < len(self._table)
            inside = known and 0 <= offset <= self._table[number].nbytes - meta.nbytes
            if not inside or offset % dtype.itemsize:
                raise TransportError(
                    f"{meta.name!r} is said to lie at {offset:,} in segment {number}, outside of "
                    "the memory that this sync was announced with"
                )
        self._make_ready(places)
        return [
            self._table[number].tensor(offset, meta.shape, getattr(torch, meta.dtype))
            for meta, (number, offset) in places
        ]

    def _make_ready(self, places: Iterable[tuple[ParamMeta, Place]]) -> None:
        """Prepare memory of these tensors for being read."""

    def close(self) -> None:
        self._attached, self._table = {}, []


class ShmReceiver(SegmentReceiver[AttachedSegment]):
    """Views of the trainer's shared memory, which the kernel keeps from being written."""

    def _attach(self, segment: Segment) -> AttachedSegment:
        return AttachedSegment(segment.name, segment.nbytes)

    def _make_ready(self, places: Iterable[tuple[ParamMeta, Place]]) -> None:
        for number, begin, end in _runs(places):
            self._table[number].map_pages(begin, end - begin)

    def rest(self) -> None:
        for segment in self._table:
            segment.drop_pages()


class CudaIpcReceiver(SegmentReceiver[AttachedDeviceSegment]):
    """Views of slots that the trainer has on this worker's own GPU. They are the trainer's memory:
    `standing_bytes` does not count them.

    Slots are unmapped when the last chunk is loaded, before the trainer frees them: CUDA leaves
    undefined what the other order does.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def _attach(self, segment: Segment) -> AttachedDeviceSegment:
        return AttachedDeviceSegment(segment.handle, segment.nbytes, self._device)

    def release(self) -> None:
        self.close()


def _runs(places: Iterable[tuple[ParamMeta, Place]]) -> list[tuple[int, int, int]]:
    """Return the memory of these tensors in as few pieces as possible: (segment, begin, end)."""
    runs: list[tuple[int, int, int]] = []
    for number, begin, end in sorted((n, at, at + meta.nbytes) for meta, (n, at) in places):
        if runs and runs[-1][0] == number and begin <= runs[-1][2] + mmap.PAGESIZE:
            runs[-1] = number, runs[-1][1], max(runs[-1][2], end)
        else:
            runs.append((number, begin, end))
    return runs


class TcpReceiver(ChunkReceiver):
    """Private memory that each chunk is received into: it follows its message on the connection.

    It stays from sync to sync: getting fresh pages would take about as long as receiving into them.
    """

    def __init__(self, connection: Connection, timeout_seconds: float) -> None:
        self._connection, self._timeout_seconds = connection, timeout_seconds
        self._slots: list[PrivateMemory] = []

    def prepare(self, segments: Sequence[Segment], slots: Sequence[int]) -> None:
        if [slot.nbytes for slot in self._slots] != list(slots):
            self._slots = []  # free the old ones first
            self._slots = [PrivateMemory(nbytes) for nbytes in slots]
            # Pages come with the first write. During the sync they would be measured as its own, on
            # top of `standing_bytes`.
            for slot in self._slots:
                slot.bytes.fill_(0)
            self.standing_bytes = sum(slots)

    def fetch(self, chunk: Chunk, metas: Sequence[ParamMeta]) -> list[torch.Tensor]:
        places, nbytes = offsets(metas)
        pieces = spans(metas, chunk.pieces)
        slot = self._slots[chunk.index % len(self._slots)]
        if nbytes > slot.nbytes:
            raise TransportError(
                f"chunk {chunk.index} has {nbytes:,} bytes, its slot {slot.nbytes:,}"
            )
        memory = slot.bytes.numpy().data
        self._connection.receive_into(
            [memory[begin:end] for begin, end in pieces],
            self._timeout_seconds,
            f"receiving chunk {chunk.index}",
        )
        return [
            slot.tensor(offset, meta.shape, getattr(torch, meta.dtype))
            for meta, offset in zip(metas, places, strict=True)
        ]

    def close(self) -> None:
        self._slots = []


class ObjectStoreReceiver(ChunkReceiver):
    """Views of objects of a cluster's store, which something else in this process brings here.

    Nothing is copied; an object is released when its chunk is loaded.
    """

    def __init__(self, key: str, timeout_seconds: float) -> None:
        self._key = key
        self._timeout_seconds = timeout_seconds
        mailbox.open_mailbox(key)

    def prepare(self, segments: Sequence[Segment], slots: Sequence[int]) -> None:
        mailbox.open_mailbox(self._key)

    def fetch(self, chunk: Chunk, metas: Sequence[ParamMeta]) -> list[torch.Tensor]:
        places, _ = offsets(metas)
        (_, nbytes), *others = spans(metas, chunk.pieces)
        if others:
            raise TransportError(f"chunk {chunk.index} comes in pieces, an object is one")
        found = mailbox.take(self._key, chunk.index, self._timeout_seconds)
        if found is None or found.nbytes != nbytes:
            what = "did not arrive" if found is None else f"has {found.nbytes:,} bytes"
            raise TransportError(f"chunk {chunk.index} of {nbytes:,} bytes {what}")
        return [
            read_only_view(found, offset, meta.shape, getattr(torch, meta.dtype))
            for meta, offset in zip(metas, places, strict=True)
        ]

    def close(self) -> None:
        mailbox.close_mailbox(self._key)
