"""Cut a stream into chunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.plan.layer_map import LayerMap


@dataclass(frozen=True)
class Chunk:
    """The unit of transfer: consecutive tensors of the plan that leave no parent layer open (with
    the policy `spill`: any consecutive tensors).

    Attributes:
        names: checkpoint names, in plan order.
        nbytes: bytes of these tensors.
        oversized: larger than the chunk size, because it cannot be cut without opening a layer.
    """

    names: tuple[str, ...]
    nbytes: int
    oversized: bool = False


def cut_between_layers(
    metas: Sequence[ParamMeta], layer_map: LayerMap, chunk_bytes: int | None
) -> tuple[Chunk, ...]:
    """Cut where no parent layer is open, into chunks of up to `chunk_bytes`; None: one chunk."""
    if chunk_bytes is None:
        return (_chunk(metas, None),) if metas else ()
    parents = [layer_map.parents(meta.name) for meta in metas]
    awaited = Counter(chain.from_iterable(parents))
    started: set[str] = set()
    # The smallest runs of the stream after which no parent layer is open.
    segments: list[list[ParamMeta]] = [[]]
    for meta, layers in zip(metas, parents, strict=True):
        segments[-1].append(meta)
        for layer in layers:
            awaited[layer] -= 1
            (started.add if awaited[layer] else started.discard)(layer)
        if not started:
            segments.append([])
    return _cut([segment for segment in segments if segment], chunk_bytes)


def cut_anywhere(metas: Sequence[ParamMeta], chunk_bytes: int) -> tuple[Chunk, ...]:
    """Cut between any two tensors, into chunks of up to `chunk_bytes`."""
    return _cut([[meta] for meta in metas], chunk_bytes)


def packed_storages(metas: Sequence[ParamMeta], chunk_bytes: int) -> dict[str, Storage]:
    """Return the memory behind each tensor of a stream packed as vLLM's NCCL engine packs it.

    A chunk is closed by the tensor with which it exceeds `chunk_bytes`: it is larger than that by
    up to one tensor, and a tensor larger than a buffer still shares its chunk with what came
    before. The tensors handed to the model are views of the chunk, so each keeps all of it alive.
    """
    chunks: list[list[ParamMeta]] = [[]]
    filled = 0
    for meta in metas:
        chunks[-1].append(meta)
        filled += meta.nbytes
        if filled > chunk_bytes:
            chunks.append([])
            filled = 0
    return chunk_storages(chunks)


def chunk_storages(chunks: Iterable[Sequence[ParamMeta]]) -> dict[str, Storage]:
    """Return storages of which each is shared by the tensors of one chunk."""
    storages: dict[str, Storage] = {}
    for number, chunk in enumerate(chunks):
        storage = Storage(f"chunk {number}", sum(meta.nbytes for meta in chunk))
        storages |= {meta.name: storage for meta in chunk}
    return storages


def _cut(segments: Sequence[Sequence[ParamMeta]], chunk_bytes: int) -> tuple[Chunk, ...]:
    chunks: list[Chunk] = []
    waiting: list[ParamMeta] = []
    nbytes = 0
    for segment in segments:
        segment_bytes = sum(meta.nbytes for meta in segment)
        if waiting and nbytes + segment_bytes > chunk_bytes:
            chunks.append(_chunk(waiting, chunk_bytes))
            waiting, nbytes = [], 0
        waiting += segment
        nbytes += segment_bytes
    return (*chunks, _chunk(waiting, chunk_bytes)) if waiting else tuple(chunks)


def _chunk(metas: Sequence[ParamMeta], chunk_bytes: int | None) -> Chunk:
    nbytes = sum(meta.nbytes for meta in metas)
    oversized = chunk_bytes is not None and nbytes > chunk_bytes
    return Chunk(tuple(meta.name for meta in metas), nbytes, oversized)
