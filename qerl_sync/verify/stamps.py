"""Hash the bytes of a model's tensors, so that those that have not changed need not be sent."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from qerl_sync.verify.changes import fingerprint as sample
from qerl_sync.verify.checksum import fingerprint

# xxhash lets go of the interpreter while it hashes, and memory feeds no more than a few cores.
_THREADS = min(4, os.cpu_count() or 1)


class ContentStamps:
    """Hash tensors anew each time, except those that are frozen and that nobody has written to.

    torch counts what writes to a tensor in place. What writes through `.data` is not counted: a
    frozen tensor is hashed again where a sample of its values has changed, too.
    """

    def __init__(self) -> None:
        self._frozen: dict[str, tuple[Hashable, int]] = {}

    def of(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Return a hash (64 bits) of each tensor's bytes. Only reads."""
        keys = {
            name: _key(tensor)
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


def _key(tensor: torch.Tensor) -> Hashable:
    count = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tuple(tensor.shape), tensor.dtype, count, sample(tensor)
