"""Detect writes to tensors that the receiver holds by reference."""

from __future__ import annotations

import torch

from qerl_sync.errors import CoverageError

# Elements that are compared, at most so many in each dimension.
SAMPLES = 8


class AliasGuard:
    """Detect that a source wrote to memory which the receiver still holds.

    Examples: a receive buffer used again, or parameters that an optimizer steps meanwhile.

    torch counts its own writes. Writes by others (a network card, numpy) show in a sample of the
    values. Sample host memory only: on a device it would wait for the device.
    """

    def __init__(self) -> None:
        self._held: dict[str, list[tuple[str, torch.Tensor, int, torch.Tensor | None]]] = {}

    def hold(self, layer: str, name: str, tensor: torch.Tensor) -> None:
        """Record that `tensor` of the stream's `name` is kept for `layer` from here on."""
        seen = (name, tensor, _writes(tensor), _sample(tensor))
        self._held.setdefault(layer, []).append(seen)

    def release(self, layer: str) -> None:
        """Raise CoverageError if a tensor held for `layer`, which is about to be loaded, is not
        what it was when it arrived.
        """
        for name, tensor, writes, sample in self._held.pop(layer, ()):
            now = _sample(tensor)
            same = sample is None or now is None or sample.equal(now)
            if not same or writes != _writes(tensor):
                raise CoverageError(
                    f"the memory of {name!r} was written to while it was held for {layer}, which "
                    "still awaited other tensors: the source uses a buffer again, or the weights "
                    "are trained during the sync. Let the source yield memory that stays as it is "
                    "to the end of the chunk, or copies",
                    tensor=name,
                    layer=layer,
                )


def _writes(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else int(tensor._version)


def _sample(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the bits of a few elements: unlike values, NaN bits equal themselves."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return None
    steps = tuple(slice(None, None, -(-size // SAMPLES)) for size in tensor.shape)
    return tensor[steps].detach().clone().reshape(-1).view(torch.uint8)
