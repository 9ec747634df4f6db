"""Digest what a model's kernels compute with, to tell whether two workers hold the same."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from qerl_sync.worker.compat import engine as compat
from qerl_sync.worker.load.kernel_check import named_tensors


@torch.no_grad()
def kernel_digests(model: torch.nn.Module) -> dict[str, str]:
    """Return, for each module path, a digest of the weights that its kernels use.

    Parameters and buffers are hashed as they are. CPU kernels keep a packed copy of their own and
    need not look at the parameter: of those the product with a fixed vector is hashed too, which
    costs one pass over the weights. Equal weights give equal digests on the same machine; a layer
    that kept other weights is found, a change below the rounding of that product may not be.
    """
    found: dict[str, Any] = {}  # hashlib's objects have no public type
    for name, tensor in named_tensors(model):
        path = name.rpartition(".")[0]
        digest = found.setdefault(path, hashlib.blake2b(digest_size=8))
        digest.update(name.encode())
        for one in compat.tensors_of(tensor):
            digest.update(_raw(one))
    for path, product in compat.packed_products(model):
        digest = found.setdefault(path, hashlib.blake2b(digest_size=8))
        digest.update(_raw(product))
    return {path: digest.hexdigest() for path, digest in found.items()}


def _raw(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().contiguous().view(-1).cpu()
    return plain.view(torch.uint8).numpy().tobytes()
