"""Hashes of a tensor's bytes that cost about as much as reading them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import xxhash

PAGE_BYTES = 4096
_WORDS = PAGE_BYTES // 4
# A device's memory is copied to the host, or widened on the device, so many bytes at a time.
_BLOCK_BYTES = 32 << 20


def checksum(tensor: torch.Tensor) -> int:
    """Return the XXH3 hash (64 bits) of the tensor's values in row-major order.

    It is the same on every device and machine: tensors of an accelerator are hashed on the host.
    """
    raw = _bytes(tensor)
    digest = xxhash.xxh3_64()
    for block in _blocks(raw, _BLOCK_BYTES):
        digest.update(block.cpu().numpy().data)
    return digest.intdigest()


def fingerprint(tensor: torch.Tensor) -> int:
    """Return 64 bits to compare with an earlier `fingerprint` taken on the same kind of device.

    On a CPU it is `checksum`. An accelerator reduces each page of 4 KiB to 64 bits itself
    (`page_sums`), so that a 512th of the bytes crosses the bus, and the host hashes those.
    """
    if tensor.device.type == "cpu":
        return checksum(tensor)
    raw = _bytes(tensor)
    whole = raw.numel() // PAGE_BYTES * PAGE_BYTES
    digest = xxhash.xxh3_64(page_sums(raw[:whole]).cpu().numpy().data)
    digest.update(raw[whole:].cpu().numpy().data)
    return digest.intdigest()


def page_sums(raw: torch.Tensor) -> torch.Tensor:
    """Return 64 bits for each 4 KiB of `raw` (bytes, whole pages), computed where it lies.

    Multilinear hashing (Lemire and Kaser): each 32-bit word times a random odd 64-bit key of its
    place in the page, summed modulo 2^64. A single word that changes is seen for certain. Several
    words, signs that flip or words that change places are missed once in 2^31 times. Words of 64
    bits would not do: two flips of their top bits always cancel, whatever the keys are.
    """
    pages = raw.view(torch.int32).view(raw.numel() // PAGE_BYTES, _WORDS)
    keys = _keys(str(raw.device))
    blocks = _blocks(pages, _BLOCK_BYTES // PAGE_BYTES)
    return torch.cat([(block.to(torch.int64) * keys).sum(1) for block in blocks])


def _blocks(rows: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
    return (rows[at : at + count] for at in range(0, max(len(rows), 1), count))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    # Words can be read only from addresses that are multiples of their size.
    aligned = flat.data_ptr() % 4 == 0 and flat.storage_offset() % 4 == 0
    return flat if aligned or flat.device.type == "cpu" else flat.clone()


@lru_cache(maxsize=8)
def _keys(device: str) -> torch.Tensor:
    """Return one key for each word of a page; the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randint(-(2**62), 2**62, (_WORDS,), generator=generator)
    return (wide * 2 + 1).to(device)
