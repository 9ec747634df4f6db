"""Keep what was sent last on both sides, so that only the elements that change need travel.

A changed tensor travels as the bits of its changed elements, followed by their places: the distance
of each from the one before, in one, two or four bytes, whichever is least in all. A longer distance
is bridged by elements that have not changed.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qerl_sync.errors import ConfigError, TransportError
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.staging import offsets
from qerl_sync.wire.segments import PrivateMemory

Bits = npt.NDArray[Any]

# How many changed elements travel, and the bytes of a place. (0, 0): the tensor travels whole.
Change = tuple[int, int]
WHOLE: Change = 0, 0

_WIDTHS = (1, 2, 4)
# A block, its mirror and the mask of what differs stay in a core's cache.
_BLOCK_ELEMENTS = 1 << 17


def mirror_bytes(metas: Iterable[ParamMeta]) -> int:
    """Return the memory of a mirror of these tensors."""
    return offsets(metas)[1]


def require_mirror_room(metas: Iterable[ParamMeta], where: str, free_bytes: int) -> None:
    """Raise ConfigError if a mirror of these tensors takes more host memory than is free there."""
    needed_bytes = mirror_bytes(metas)
    if needed_bytes > free_bytes:
        raise ConfigError(
            f"sync.delta: elements keeps what was sent last on {where}, {needed_bytes:,} bytes, "
            f"and its host has {free_bytes:,} free; choose sync.delta: layers"
        )


class Mirror:
    """The values of the last sync in host memory, to compare with or to put changes into.

    Args:
        metas: the tensors that it holds; others travel whole.
        id: by which the other side knows it; empty: a new one.

    Attributes:
        version: the weight version whose values it holds; None: a mix of two.
        nbytes: of its memory.
    """

    def __init__(self, metas: Iterable[ParamMeta], id: str = "") -> None:
        self.metas = tuple(metas)
        self.id = id or secrets.token_hex(8)
        self.version: int | None = None
        places, self.nbytes = offsets(self.metas)
        memory = PrivateMemory(max(self.nbytes, 1))
        with torch.inference_mode(False):  # inference tensors have no `_version` to count writes
            self._tensors = {
                meta.name: memory.tensor(place, meta.shape, getattr(torch, meta.dtype))
                for meta, place in zip(self.metas, places, strict=True)
            }
        memory.bytes.fill_(0)  # now, and not with the first sync: pages are counted

    def tensor(self, name: str) -> torch.Tensor:
        """Return the mirror's own tensor, whose values change when it is taken again."""
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @torch.no_grad()
    def take(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Hold these values. Return the mirror's own tensor."""
        self.version = None
        return self._tensors[name].copy_(tensor)

    @torch.no_grad()
    def changes(self, name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, Change]:
        """Return what turns the values that are held into the tensor's, and hold those. All bits
        count: NaN, and the sign of zero.

        Returns:
            The bytes to send, and what they are; the whole tensor where that is no larger. Both
            stay as they are until the tensor is taken again.
        """
        new, held = _bits(tensor.detach().cpu()), _bits(self._tensors[name])
        places = _places_of_changes(held, new)
        if places is not None:
            if not len(places):  # something must travel
                places = np.zeros(1, dtype=np.int64)
            width, places = _bridged(places)
            count = len(places)
            if count * (width + new.itemsize) < new.nbytes:
                self.version = None
                values = new[places]
                held[places] = values
                distances = np.diff(places, prepend=0).astype(f"<u{width}")
                raw = np.concatenate([values.view(np.uint8), distances.view(np.uint8)])
                return torch.from_numpy(raw), (count, width)
        return self.take(name, tensor), WHOLE

    def apply(
        self, metas: Sequence[ParamMeta], arrived: Sequence[torch.Tensor], changes: Sequence[Change]
    ) -> list[torch.Tensor]:
        """Hold what has arrived of these tensors, in whole or as changes (`changes`; empty: all in
        whole). Return them: those of the mirror, or as they came where it has none.

        Raises:
            TransportError: a change lies outside of its tensor.
        """
        found = []
        for meta, tensor, (count, width) in zip(
            metas, arrived, changes or [WHOLE] * len(metas), strict=True
        ):
            if not width:
                held = self.take(meta.name, tensor) if meta.name in self else tensor
                found.append(held)
                continue
            self.version = None
            held = self._tensors[meta.name]
            bits, raw = _bits(held), tensor.numpy()
            middle = count * bits.itemsize
            places = np.cumsum(raw[middle:].view(f"<u{width}"), dtype=np.int64)
            if places[-1] >= bits.size:
                raise TransportError(
                    f"{meta.name!r} of {bits.size:,} elements is said to have changed at "
                    f"{places[-1]:,}"
                )
            bits[places] = raw[:middle].view(bits.dtype)
            found.append(held)
        return found


def travelling(metas: Sequence[ParamMeta], changes: Sequence[Change]) -> list[ParamMeta]:
    """Return what travels of these tensors: themselves, or bytes.

    Raises:
        TransportError: it would be larger than the tensors, whose place it takes.
    """
    if not changes:
        return list(metas)
    if len(changes) != len(metas):
        raise TransportError(f"{len(metas)} tensors were to arrive, and {len(changes)} are said to")
    found = []
    for meta, (count, width) in zip(metas, changes, strict=True):
        if (count, width) == WHOLE:
            found.append(meta)
            continue
        nbytes = count * (width + meta.nbytes // max(meta.numel, 1))
        if width not in _WIDTHS or not 0 < nbytes < meta.nbytes:
            raise TransportError(
                f"{meta.name!r} of {meta.nbytes:,} bytes is said to come as {count:,} changes with "
                f"places of {width} bytes"
            )
        found.append(ParamMeta(meta.name, "uint8", (nbytes,)))
    return found


def _bits(tensor: torch.Tensor) -> Bits:
    """Return the elements as integers, of the same memory."""
    integer = getattr(torch, f"int{8 * tensor.itemsize}")
    found: Bits = tensor.contiguous().view(-1).view(integer).numpy()
    return found


def _places_of_changes(held: Bits, new: Bits) -> Bits | None:
    """Return where elements differ, ascending; None where so many do that the whole is smaller."""
    limit = new.nbytes // (new.itemsize + 1)
    found, count = [np.empty(0, dtype=np.int64)], 0
    for at in range(0, len(new), _BLOCK_ELEMENTS):
        end = at + _BLOCK_ELEMENTS
        places = np.flatnonzero(held[at:end] != new[at:end])
        count += len(places)
        if count >= limit:
            return None
        found.append(places + at)
    return np.concatenate(found)


def _bridged(places: Bits) -> tuple[int, Bits]:
    """Return how many bytes a distance takes, and the places with those that bridge longer ones."""
    distances = np.diff(places, prepend=0)

    def bridges(width: int) -> Bits:
        found: Bits = np.maximum(distances - 1, 0) // (256**width - 1)
        return found

    # By the bytes of all places and, about, of the values that bridge.
    width = min(_WIDTHS, key=lambda one: (len(places) + int(bridges(one).sum())) * (one + 2))
    counts = bridges(width) + 1
    ends = np.cumsum(counts)
    steps = np.arange(ends[-1]) - np.repeat(ends - counts, counts) + 1
    bridged = np.repeat(places - distances, counts) + steps * (256**width - 1)
    bridged[ends - 1] = places
    return width, bridged
