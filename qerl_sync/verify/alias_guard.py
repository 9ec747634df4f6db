"""Detect writes to tensors that the receiver holds by reference."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from qerl_sync.errors import CoverageError

# About so many bytes are compared, at even distances; of a tensor with gaps, elements.
SAMPLES = 64


class AliasGuard:
    """Detect that a source wrote to memory which the receiver still holds.

    Examples: a receive buffer used again, or parameters that an optimizer steps meanwhile.

    torch counts its own writes. Writes by others (a network card, numpy) show in a sample of the
    values. Sample host memory only: on a device it would wait for the device.
    """

    def __init__(self) -> None:
        self._held: dict[str, list[tuple[str, torch.Tensor, Hashable]]] = {}

    def hold(self, layer: str, name: str, tensor: torch.Tensor) -> None:
        """Record that `tensor` of the stream's `name` is kept for `layer` from here on."""
        seen = (name, tensor, mark_of(tensor))
        self._held.setdefault(layer, []).append(seen)

    def release(self, layer: str) -> None:
        """Raise CoverageError if a tensor held for `layer`, which is about to be loaded, is not
        what it was when it arrived.
        """
        for name, tensor, mark in self._held.pop(layer, ()):
            if mark != mark_of(tensor):
                raise CoverageError(
                    f"the memory of {name!r} was written to while it was held for {layer}, which "
                    "still awaited other tensors: the source uses a buffer again, or the weights "
                    "are trained during the sync. Let the source yield memory that stays as it is "
                    "to the end of the chunk, or copies",
                    tensor=name,
                    layer=layer,
                )


def mark_of(tensor: torch.Tensor) -> Hashable:
    """Return a value that differs once the tensor was written to, or moved: torch's count of its
    writes, and a few bytes. Fused optimizers are not counted, and show in the bytes alone."""
    writes = 0 if tensor.is_inference() else int(tensor._version)
    return tensor.data_ptr(), writes, _sample(tensor)


def _sample(tensor: torch.Tensor) -> bytes | None:
    """Return a few bytes. In numpy: torch's calls for a strided sample cost five times as much."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return None
    plain = tensor.detach()
    if not plain.is_contiguous():
        plain = plain[tuple(slice(None, None, -(-size // 8)) for size in plain.shape)].contiguous()
    raw = plain.view(-1).view(torch.uint8).numpy()
    # An odd distance: not the same byte of each element.
    return bytes(raw[:: raw.size // SAMPLES | 1])
