"""Stamp tensors: a stamp differs as soon as the tensor's values do."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from qerl_sync.verify.changes import sample_hash
from qerl_sync.verify.checksum import fingerprint
from qerl_sync.verify.parts import part_here

# xxhash releases the GIL while it hashes, and memory feeds no more than a few cores.
_THREADS = min(4, os.cpu_count() or 1)


def stamp(tensor: torch.Tensor) -> Hashable:
    """Return a stamp of a tensor that rarely changes, without reading all of it.

    torch counts what writes to a tensor in place, except through `.data`: PEFT merges adapters so,
    and leaves other bits in the base weight when it unmerges them. A sample of the values is to
    show that: some thousand elements, or all of a small tensor.
    """
    here = part_here(tensor)
    count = None if tensor.is_inference() else (tensor._version, here._version)
    return here.data_ptr(), tuple(here.shape), here.dtype, count, sample_hash(here)


class ContentStamps:
    """Hash tensors anew each time, except those that are frozen and keep their `stamp`."""

    def __init__(self) -> None:
        self._frozen: dict[str, tuple[Hashable, int]] = {}

    def of(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Return a hash (64 bits) of each tensor's bytes. Only reads."""
        keys = {
            name: stamp(tensor)
            for name, tensor in tensors.items()
            # Buffers have no gradients, and training changes some of them.
            if isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad
        }
        known = {
            name: self._frozen[name][1]
            for name, key in keys.items()
            if name in self._frozen and self._frozen[name][0] == key
        }
        unknown = [name for name in tensors if name not in known]
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(fingerprint, (tensors[name].detach() for name in unknown))
            known.update(zip(unknown, found, strict=True))
        self._frozen = {name: (key, known[name]) for name, key in keys.items()}
        return known
