"""A checksum of a tensor's bytes that costs about as much as reading them."""

from __future__ import annotations

import zlib
from functools import lru_cache

import torch

PAGE_BYTES = 4096
_WORDS = PAGE_BYTES // 8
# Devices other than CPUs have no integer products of matrices: there, so many bytes at a time.
_BLOCK_BYTES = 64 << 20


def checksum(tensor: torch.Tensor) -> int:
    """32 bits over the tensor's values in row-major order; the same on every device and machine.

    Each page of 4 KiB becomes the sum of its words, each times an odd number of its own, modulo
    2^64: a word that changes is seen for certain, and so are words that change places unless they
    differ in their top bits alone. A CRC-32 over the pages' sums, in order, sees pages that are
    swapped, lost or stale.
    """
    raw = _bytes(tensor)
    whole = raw.numel() // PAGE_BYTES * PAGE_BYTES
    sums = _page_sums(raw[:whole].view(torch.int64).view(whole // PAGE_BYTES, _WORDS))
    total = zlib.crc32(sums.cpu().numpy().data)
    return zlib.crc32(raw[whole:].cpu().numpy().data, total)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return flat if flat.data_ptr() % 8 == 0 and flat.storage_offset() % 8 == 0 else flat.clone()


def _page_sums(pages: torch.Tensor) -> torch.Tensor:
    factors = _factors(str(pages.device))
    if pages.device.type == "cpu":
        return pages @ factors
    step = _BLOCK_BYTES // PAGE_BYTES
    starts = range(0, max(len(pages), 1), step)
    return torch.cat([(pages[at : at + step] * factors).sum(1) for at in starts])


@lru_cache(maxsize=8)
def _factors(device: str) -> torch.Tensor:
    """Odd and different, one for each word of a page; the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randint(-(2**62), 2**62, (_WORDS,), generator=generator)
    return (wide * 2 + 1).to(device)
