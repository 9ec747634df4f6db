"""The trainer's memory for chunks on their way: slots, each with room for one chunk at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import torch

from qerl_sync.buffers.detect import Parents
from qerl_sync.errors import StaleBaseError, TransportError
from qerl_sync.meta import ParamMeta
from qerl_sync.options import SyncOptions
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.staging import offsets, spans
from qerl_sync.plan.sync_plan import SyncPlan
from qerl_sync.transports.base import SyncResult, WorkerReport
from qerl_sync.verify.checksum import checksum
from qerl_sync.verify.stream import as_planned
from qerl_sync.wire import cuda_memory
from qerl_sync.wire.device_segments import DeviceSegment
from qerl_sync.wire.host import avoid_cores
from qerl_sync.wire.messages import Segment
from qerl_sync.wire.mirror import Change, Mirror, require_mirror_room, travelling
from qerl_sync.wire.segments import (
    PrivateMemory,
    SharedSegment,
    locate,
    parameters_are_shared,
    require_room,
)
from qerl_sync.worker.load.memory import free_bytes

# Sent by itself from where it lies; smaller tensors are copied together first.
PIECE_BYTES = 1 << 20

Named = tuple[str, torch.Tensor]
Planned = tuple[ParamMeta, torch.Tensor]
Announced = SharedSegment | DeviceSegment
Slot = Announced | PrivateMemory
Places = list[tuple[int, int]]


@dataclass(frozen=True)
class Piece:
    """The bytes of so many tensors that follow each other in a chunk (`plan.staging.spans`): of a
    slot, or one tensor as it is."""

    tensors: int
    bytes: torch.Tensor


@dataclass
class StagedChunk:
    """A chunk in memory that workers can reach, or that is sent to them.

    Attributes:
        places: (segment, offset) of each tensor, by `WorkerConnection.kind`.
        pieces: its bytes in host memory, in order; none if no worker gets them from there.
        in_place: the tensors lie in shared memory as they are.
        checksums: of each tensor, if `SyncOptions.checksums`.
        changes: what travels of each tensor (`wire.mirror`); none: all travel whole.
    """

    places: dict[str, Places]
    pieces: list[Piece]
    in_place: bool = False
    checksums: list[int] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    _stored: Any = None
    _storing: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def stored_by(self, put: Callable[[torch.Tensor], Any]) -> Any:
        """Return what an object store calls the chunk. The first call puts it there; connections
        to other engines ask at the same time, and wait for that one copy."""
        with self._storing:
            if self._stored is None:
                (piece,) = self.pieces
                self._stored = put(piece.bytes)
            return self._stored


class Staging:
    """Slots in shared memory, or private ones where no worker shares memory with us.

    Workers on the trainer's GPU have slots there. Where there are others too, a chunk is copied to
    both.

    Parameters that are in shared memory (`share_parameters`) need no slot: they are sent as the
    places where they lie. Nor do large tensors that go over sockets, if they last.

    Args:
        kinds: how bytes travel to the workers (`WorkerConnection.kind`). Tensors stay where they
            are only if that suits all of them.
        device: where the slots for `cuda_ipc` are.

    Attributes:
        verify_seconds: what the checksums of the sync that was begun last have taken.
        wire_bytes: what it has sent to each worker.
        mirror: what was sent last, where workers keep that too.
    """

    def __init__(self, kinds: Collection[str], device: torch.device | None = None) -> None:
        self.kinds, self._device = frozenset(kinds), device
        self._sizes: list[int] = []
        # By index and place ("host", "device").
        self._slots: list[dict[str, Slot]] = []
        # By kind, the segments that workers know by their numbers.
        self._tables: dict[str, list[Announced]] = {"shm": [], "cuda_ipc": []}
        self._unlinked_for: set[object] | None = None
        self._options = SyncOptions()
        self._parents: Parents | None = None
        self._busy_cores: Collection[int] = ()
        self.verify_seconds = 0.0
        self.wire_bytes = 0
        self.mirror: Mirror | None = None

    @property
    def segments(self) -> dict[str, list[Segment]]:
        """Return what workers must attach, by kind of shared memory, in the order of places.

        It only grows in a sync.
        """
        return {
            kind: [Segment.model_validate(segment) for segment in table]
            for kind, table in self._tables.items()
        }

    def begin(
        self, plan: SyncPlan, options: SyncOptions, layer_map: LayerMap, busy_cores: Collection[int]
    ) -> None:
        """Begin to stage a sync, with the mirror that it needs. Call it before any worker is told.

        Args:
            layer_map: for errors to name a tensor's parent layers.
            busy_cores: CPUs that workers load with. Nothing is copied on them meanwhile.

        Raises:
            StaleBaseError: what was sent with `SyncOptions.changes_from` is not here any more.
            ConfigError: this host has too little free memory for a mirror.
        """
        self._options, self._parents = options, layer_map.parents_text
        self._busy_cores = busy_cores
        self.verify_seconds, self.wire_bytes = 0.0, 0
        metas = plan.base_metas
        if not options.mirror:
            self.mirror = None
        elif options.changes_from is not None:
            if self.mirror is None or self.mirror.version != options.changes_from:
                raise StaleBaseError(
                    f"what was sent with version {options.changes_from} was not kept here: the "
                    "workers were connected anew, or that sync failed; send everything",
                    base=options.changes_from,
                )
        elif self.mirror is None or self.mirror.metas != metas:
            self.mirror = None  # there may not be room for two
            require_mirror_room(metas, "the trainer", free_bytes(torch.device("cpu")))
            self.mirror = Mirror(metas)
        else:
            self.mirror.version = None

    def prepare(self, sizes: Sequence[int], readers: Collection[object], *, later: bool) -> None:
        """Make or keep slots of these sizes that all of `readers` can attach.

        Args:
            readers: the connections of the sync, as `unlink` is given them after it.
            later: make each slot when it is first needed.

        Raises:
            NoRoomError: there is not that much shared memory. No slot is kept then.
        """
        # A reader that has joined since the names were removed cannot attach the slots there are.
        newcomers = self._unlinked_for is not None and not self._unlinked_for.issuperset(readers)
        if newcomers or list(sizes) != self._sizes:
            self.close()
            self._sizes, self._slots = list(sizes), [{} for _ in sizes]
        if later:
            return
        try:
            # All at once: the first of them may fit where they do not all fit.
            pairs = zip(self._sizes, self._slots, strict=True)
            missing_bytes = sum(nbytes for nbytes, slots in pairs if not slots)
            if "shm" in self.kinds:
                require_room(missing_bytes)
            for index in range(len(sizes)):
                for slot in self._slots_of(index):
                    self._number(slot)
        except TransportError:
            self.close()
            raise

    def stage(
        self,
        index: int,
        metas: Sequence[ParamMeta],
        tensors: Iterable[Named],
        *,
        awaited: bool = False,
    ) -> StagedChunk:
        """Put chunk `index` where workers find it. The slot that it gets must be free.

        Args:
            awaited: workers have nothing else to do until then: copy with all cores. Else copy with
                one that is none of theirs, which is as quick as they load.

        Raises:
            CoverageError: the source yields something else than `metas`.
        """
        avoided = () if awaited else self._busy_cores
        sums: list[int] = []

        def summed() -> Iterator[Planned]:
            for meta, tensor in as_planned(metas, tensors, self._parents):
                if self._options.checksums:
                    start = time.perf_counter()
                    with avoid_cores(avoided):
                        sums.append(checksum(tensor))
                    self.verify_seconds += time.perf_counter() - start
                yield meta, tensor

        stream: Iterator[Planned] = summed()
        changes: list[Change] = []
        stable = self._options.stable
        if self.mirror is not None and metas and metas[0].name in self.mirror:
            with avoid_cores(avoided):
                metas, stream, changes = self._changed(self.mirror, metas, stream)
            stable = True  # what the mirror yields lies in it
        # In place if all of it lies in shared memory. Other memory is the source's again when the
        # next tensor is asked for, so the first such tensor has the rest copied as it comes.
        arrived: list[Planned] = []
        shared: list[tuple[int, int]] = []
        in_place = self.kinds == {"shm"} and parameters_are_shared()
        for item in stream if in_place else ():
            arrived.append(item)
            at = locate(item[1])
            if at is None:
                break
            shared.append((self._number(at[0]), at[1]))
        if metas and len(shared) == len(metas):
            next(stream, None)  # to its end: it may be a collective, and have too much
            staged = StagedChunk({"shm": shared}, [], in_place=True)
        else:
            staged = self._copy(index, metas, chain(arrived, stream), awaited, stable)
            self.wire_bytes += sum(meta.nbytes for meta in metas)
        staged.checksums, staged.changes = sums, changes
        return staged

    def committed(self, version: int) -> None:
        """Record that all workers have committed what was staged, as this version."""
        if self.mirror is not None:
            self.mirror.version = version

    def result(
        self, workers: Sequence[WorkerReport], kinds: Iterable[str], lost: Mapping[str, str] = {}
    ) -> SyncResult:
        """Return the result of a sync that was staged here.

        Args:
            kinds: of each connection, or of each engine.
        """
        return SyncResult(
            workers=workers,
            kind="; ".join(dict.fromkeys(kinds)),
            lost=dict(lost),
            verify_seconds=self.verify_seconds,
            wire_bytes=self.wire_bytes,
            mirror_bytes=0 if self.mirror is None else self.mirror.nbytes,
        )

    def _changed(
        self, mirror: Mirror, metas: Sequence[ParamMeta], stream: Iterable[Planned]
    ) -> tuple[Sequence[ParamMeta], Iterator[Planned], list[Change]]:
        """Return what travels of a chunk: its tensors, or what has changed of them."""
        if self._options.changes_from is None:
            held = [mirror.take(meta.name, tensor) for meta, tensor in stream]
            return metas, zip(metas, held, strict=True), []
        found = [mirror.changes(meta.name, tensor) for meta, tensor in stream]
        changes = [change for _, change in found]
        metas = travelling(metas, changes)
        return metas, zip(metas, (tensor for tensor, _ in found), strict=True), changes

    def unlink(self, readers: Iterable[object]) -> None:
        """Remove the names of the slots. Call it after a sync that all of `readers` have taken.

        Slots on a GPU are freed: the next training step needs the memory, and new ones cost little.

        A trainer that is killed between two syncs, as Ray kills the actors of a driver that ends,
        runs no handler that could remove them, and would leave the memory behind.
        """
        for slots in self._slots:
            if isinstance(slot := slots.get("host"), SharedSegment):
                slot.unlink()
        self._free_device_slots()
        self._unlinked_for = set(readers)

    def close(self) -> None:
        """Free the slots' memory."""
        for slots in self._slots:
            if isinstance(slot := slots.get("host"), SharedSegment):
                slot.close()
        self._free_device_slots()
        self._sizes, self._slots, self._tables["shm"] = [], [], []
        self._unlinked_for = None

    def _free_device_slots(self) -> None:
        for slots in self._slots:
            if isinstance(slot := slots.pop("device", None), DeviceSegment):
                slot.close()
        self._tables["cuda_ipc"] = []

    def _copy(
        self,
        index: int,
        metas: Sequence[ParamMeta],
        tensors: Iterable[Planned],
        awaited: bool,
        stable: bool,
    ) -> StagedChunk:
        # Copying with all cores would take them from workers that load, and wait for the slowest.
        write = _write_alone if awaited else _write_beside
        places, _ = offsets(metas)
        # A trainer rank may hold tensors of which others send all: no slot is made for none.
        slots = self._slots_of(index) if metas else []
        staying: dict[int, torch.Tensor] = {}
        for place, ((meta, tensor), offset) in enumerate(zip(tensors, places, strict=True)):
            stays = (
                stable
                and self.kinds == {"tcp"}
                and tensor.device.type == "cpu"
                and tensor.is_contiguous()
                and tensor.nbytes >= PIECE_BYTES
            )
            if stays:  # it is sent from where it lies
                staying[place] = tensor
            else:
                with avoid_cores(() if awaited else self._busy_cores):
                    for slot in slots:
                        write(slot, offset, meta, tensor)
        staged = StagedChunk({}, [])
        for slot in slots:
            if isinstance(slot, DeviceSegment):
                # The copies are queued only. Workers must not read before they are done.
                cuda_memory.synchronize_stream(slot.device)
                staged.places["cuda_ipc"] = [(self._number(slot), offset) for offset in places]
                continue
            # Each tensor that stays is a piece of its own; the others join those beside them.
            ends = sorted({0, len(metas), *staying, *(place + 1 for place in staying)})
            first, counts = 0, [end - begin for begin, end in pairwise(ends)]
            for count, (begin, end) in zip(counts, spans(metas, counts), strict=True):
                staged.pieces.append(Piece(count, staying.get(first, slot.bytes[begin:end])))
                first += count
            staged.places["shm"] = [(self._number(slot), offset) for offset in places]
        return staged

    def _slots_of(self, index: int) -> list[Slot]:
        """Return where chunk `index` is copied to: host memory, the GPU's, or both."""
        index %= len(self._sizes)
        nbytes, slots = self._sizes[index], self._slots[index]
        if self.kinds - {"cuda_ipc"} and "host" not in slots:
            shared = "shm" in self.kinds
            slots["host"] = SharedSegment(nbytes) if shared else PrivateMemory(nbytes)
        if "cuda_ipc" in self.kinds and "device" not in slots:
            assert self._device is not None
            slots["device"] = DeviceSegment(nbytes, self._device)
        return list(slots.values())

    def _number(self, slot: Slot) -> int:
        """Return the place of a segment in the table that workers know; 0 for private memory."""
        if isinstance(slot, PrivateMemory):
            return 0
        table = self._tables["cuda_ipc" if isinstance(slot, DeviceSegment) else "shm"]
        if slot not in table:
            table.append(slot)
        return table.index(slot)


def why_whole(kinds: Collection[str]) -> str:
    """Return why a changed tensor travels whole over these kinds of transport; empty where its
    changed elements can alone.

    Finding them reads a tensor and what was sent of it last: more than a copy into memory that both
    sides see, and less than a network.
    """
    if "cuda_ipc" in kinds:
        return "a worker reads the trainer's memory of the GPU, and changes are found on the host"
    if kinds and not {"tcp", "ray"} & set(kinds):
        return "the workers read the trainer's shared memory, and a copy into it costs less"
    return ""


def _write_alone(slot: Slot, offset: int, meta: ParamMeta, tensor: torch.Tensor) -> None:
    slot.tensor(offset, meta.shape, tensor.dtype).copy_(tensor)


def _write_beside(slot: Slot, offset: int, meta: ParamMeta, tensor: torch.Tensor) -> None:
    """Copy by one thread. torch's own copy would share the work among all cores, and wait for the
    slowest."""
    plain = tensor.device.type == "cpu" and tensor.is_contiguous() and meta.nbytes
    if plain and not isinstance(slot, DeviceSegment):
        target = slot.bytes[offset : offset + meta.nbytes].numpy()
        target[:] = tensor.detach().view(-1).view(torch.uint8).numpy()
    else:
        _write_alone(slot, offset, meta, tensor)
