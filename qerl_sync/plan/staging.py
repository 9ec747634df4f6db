"""Place tensors in transit: offsets in a chunk, receive buffers ("slots") for chunks.

Trainer and worker compute it from the plan, so that a transport's memory is known before the first
byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from qerl_sync.errors import CoverageError
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.sync_plan import SyncPlan

# Every tensor begins on a cache line, which is enough for each dtype and for vectorised copies.
ALIGNMENT_BYTES = 64


def offsets(metas: Iterable[ParamMeta]) -> tuple[list[int], int]:
    """Return the offset of each tensor of a chunk in its slot, and the bytes it needs in all."""
    places, end = [], 0
    for meta in metas:
        places.append(end)
        end += -(-meta.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return places, end


def spans(metas: Sequence[ParamMeta], pieces: Sequence[int]) -> list[tuple[int, int]]:
    """Return begin and end in its slot of each piece of a chunk; piece i has `pieces[i]` tensors.

    A piece of one tensor is that tensor's bytes and nothing else.

    Raises:
        CoverageError: the pieces do not make up the chunk.
    """
    if sum(pieces) != len(metas) or min(pieces, default=1) < 1:
        raise CoverageError(
            f"pieces of {list(pieces)} tensors do not make up a chunk of {len(metas)}"
        )
    places, _ = offsets(metas)
    found, first = [], 0
    for count in pieces:
        last = first + count - 1
        found.append((places[first], places[last] + metas[last].nbytes))
        first += count
    return found


def slot_bytes(sizes: Sequence[int], chunks_in_flight: int) -> list[int]:
    """Return the bytes of each slot when chunk i, of `sizes[i]` bytes, travels in slot i modulo
    `chunks_in_flight`.

    A slot is as large as the largest chunk that it will hold; no slot is made for nothing.
    """
    slots = [max(sizes[i::chunks_in_flight], default=0) for i in range(chunks_in_flight)]
    return [max(slot, ALIGNMENT_BYTES) for slot in slots[: max(len(sizes), 1)]]


def touched_bytes(
    sizes: Sequence[int], chunks_in_flight: int, in_place: Sequence[bool]
) -> list[int]:
    """Return the shared memory that a worker has mapped while it loads each chunk. It reads ahead,
    up to the chunks in flight.

    Args:
        sizes: bytes of each chunk.
        in_place: for each chunk, whether it needs no slot because the worker reads it where the
            trainer keeps it.
    """
    slots = [0] * chunks_in_flight
    kept, touched = 0, []
    for index, nbytes in enumerate(sizes):
        if in_place[index]:
            kept += nbytes
        else:
            slot = index % chunks_in_flight
            slots[slot] = max(slots[slot], nbytes)
        touched.append(sum(slots) + kept)
    # While chunk i is loaded, the worker has read as far as the credits for later chunks allow.
    return touched[chunks_in_flight - 1 :] + touched[-1:] * min(chunks_in_flight - 1, len(touched))


@dataclass(frozen=True)
class Part:
    """The part of a plan that one trainer rank sends.

    Attributes:
        owned: indices into the plan's tensors; None: all of them.
        chunks: of each chunk of the plan, the tensors that this rank sends, in plan order.
    """

    owned: Sequence[int] | None
    chunks: tuple[tuple[ParamMeta, ...], ...]

    @cached_property
    def sizes(self) -> list[int]:
        """Return the bytes of each chunk in its slot."""
        return [offsets(chunk)[1] for chunk in self.chunks]


def part_of(plan: SyncPlan, owned: Sequence[int] | None) -> Part:
    """Return the part of a rank that sends the tensors with these indices, or all."""
    if owned is None:
        return Part(None, plan.chunk_metas)
    names = {plan.metas[index].name for index in owned}
    return Part(
        owned,
        tuple(tuple(m for m in chunk if m.name in names) for chunk in plan.chunk_metas),
    )


def divide(plan: SyncPlan, held: Sequence[Sequence[int] | None]) -> list[Part]:
    """Decide what each rank sends, given what it holds (None: all). The lowest holder sends.

    Raises:
        CoverageError: no rank holds a tensor.
    """
    if held[0] is None:
        return [part_of(plan, None), *(part_of(plan, ()) for _ in held[1:])]
    owner: dict[int, int] = {}
    for rank, indices in enumerate(held):
        for index in range(len(plan.metas)) if indices is None else indices:
            owner.setdefault(index, rank)
    for index, meta in enumerate(plan.metas):
        if index not in owner:
            raise CoverageError(
                f"no trainer rank holds {meta.name!r}; each tensor must be in the `held_names` of "
                "at least one",
                tensor=meta.name,
            )
    return [
        part_of(plan, [index for index in range(len(plan.metas)) if owner[index] == rank])
        for rank in range(len(held))
    ]
